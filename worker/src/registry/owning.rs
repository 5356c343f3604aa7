//! What of a server is this worker's to run: taken, given up, lost and handed over.

use std::{sync::Arc, time::Duration};

use mcp_shared::{
    error::{ErrorCode, WorkerError},
    fleet::ServerLoad,
    hosting::{Placing, Refusal},
    ids::UserId,
    json::RawJson,
    limits,
    worker_api::ServerStatus,
};
use tokio::{
    sync::oneshot,
    task::JoinHandle,
    time::{Instant, timeout_at},
};

use super::{Entry, annotations::Repeatable, lock};
use crate::{
    group::{Group, current},
    host::{Host, fingerprint},
    leases::{Denied, Loss},
};

impl Entry {
    /// Sees to it that a user's call may be taken here, as far as the offer allows. A server that needs no
    /// lease becomes this worker's when the call starts it.
    pub async fn own(
        self: &Arc<Self>,
        user: &UserId,
        placing: Placing,
        deadline: Instant,
        host: &Arc<Host>,
    ) -> Result<(), Refusal> {
        if self.is_owned(user) {
            return Ok(());
        }
        if placing == Placing::Owned {
            return Err(Refusal::NotOwner { owner: None });
        }
        let patience = (placing == Placing::TakeOver).then_some(deadline);
        while host.leases.is_some() {
            let group = self.group(user, host).map_err(|error| match error.code {
                ErrorCode::Overloaded => Refusal::Busy { error },
                _ => Refusal::Error { error },
            })?;
            if !group.is_leased() {
                break;
            }
            let owned = timeout_at(deadline, group.own(patience)).await;
            match owned.unwrap_or_else(|_| Err(Denied::unreachable())) {
                Ok(()) => break,
                // It is being replaced; there is a new one then.
                Err(Denied::Retired) if Instant::now() < deadline => {
                    let _ = timeout_at(deadline, self.settled()).await;
                }
                Err(denied) => {
                    self.forget_if_asleep(&group);
                    return Err(denied.into_refusal());
                }
            }
        }
        Ok(())
    }

    /// Drops a user's group that runs nothing: users whom another worker serves leave no trace here.
    fn forget_if_asleep(&self, group: &Arc<Group>) {
        let mut groups = self.groups();
        if let Some(user) = &group.user
            && groups.users.get(user).is_some_and(|current| Arc::ptr_eq(current, group))
            && group.dismiss()
        {
            groups.users.remove(user);
        }
    }

    /// Whether this worker owns what serves a user.
    pub fn is_owned(&self, user: &UserId) -> bool {
        let per_user = current(&self.record).is_per_user();
        let groups = self.groups();
        let group = if per_user { groups.users.get(user) } else { groups.shared.as_ref() };
        group.is_some_and(|group| group.is_owned())
    }

    /// Whether the server that all users share runs here, starts or should.
    pub fn runs_shared(&self) -> bool {
        self.groups().shared.as_ref().is_some_and(|group| group.is_owned())
    }

    /// How busy it is here; `None` if nothing of it is owned.
    pub fn load(&self) -> Option<ServerLoad> {
        let groups = self.groups();
        let mut sum: Option<ServerLoad> = None;
        for group in groups.shared.iter().chain(groups.users.values()) {
            let Some(load) = group.load() else { continue };
            let sum = sum.get_or_insert_with(|| ServerLoad {
                name: self.name.clone(),
                status: ServerStatus::Error,
                instances: 0,
                users: 0,
                slots: 0,
                in_flight: 0,
                waiting: 0,
                wait_ms: 0,
                since: load.since,
            });
            sum.status = sum.status.max(load.status);
            sum.instances += load.instances;
            sum.users += usize::from(group.user.is_some());
            sum.slots += load.slots;
            sum.in_flight += load.in_flight;
            sum.waiting += load.waiting;
            sum.wait_ms = sum.wait_ms.max(u64::try_from(load.wait.as_millis()).unwrap_or(u64::MAX));
            sum.since = sum.since.min(load.since);
        }
        sum
    }

    /// Stops the server that all users share unless something still uses it here; says whether it does,
    /// without waiting for the end of the processes.
    pub async fn give_up(self: &Arc<Self>, host: &Arc<Host>) -> bool {
        if self.is_builtin() {
            return false;
        }
        let (sender, given_up) = oneshot::channel();
        let (entry, means) = (Arc::clone(self), Arc::clone(host));
        host.tasks.spawn(async move {
            // A server that is being changed is not idle.
            let Ok(_changing) = entry.changing.try_lock() else { return };
            let group = entry.groups().shared.clone();
            if !group.is_some_and(|group| group.leave_if_unused()) {
                return;
            }
            let _ = sender.send(());
            means.note_change();
            entry.retire(Group::is_leaving, Duration::ZERO, |_| false).await;
            means.note_change();
        });
        given_up.await.is_ok()
    }

    /// Ends what runs under a lease that is not this worker's any more. It has begun when this returns;
    /// the handle tells when it is over.
    pub fn lose(self: &Arc<Self>, loss: Loss, host: &Arc<Host>) -> JoinHandle<()> {
        let drain = match loss {
            // Somebody else may run it by now.
            Loss::Taken => Duration::ZERO,
            Loss::Silence => limits::STOP_DRAIN,
        };
        self.end_leased(drain, host)
    }

    /// Gives what runs under a lease to others: calls in flight may end, waiting ones are sent elsewhere,
    /// and each lease goes back when its process is gone.
    pub fn hand_over(self: &Arc<Self>, host: &Arc<Host>) {
        for group in self.leased_groups() {
            group.leave();
        }
        self.end_leased(limits::TOOL_TIMEOUT_MAX, host);
    }

    fn end_leased(self: &Arc<Self>, drain: Duration, host: &Arc<Host>) -> JoinHandle<()> {
        let (entry, means) = (Arc::clone(self), Arc::clone(host));
        host.tasks.spawn(async move {
            if entry.leased_groups().is_empty() {
                return;
            }
            let _changing = entry.changing.lock().await;
            entry.retire(Group::is_leased, drain, |_| false).await;
            means.note_change();
        })
    }

    /// Ends users' processes whose environment holds other secrets than the store does now.
    pub async fn renew_environments(self: &Arc<Self>, host: &Arc<Host>) -> Result<(), WorkerError> {
        let record = current(&self.record);
        if record.secret_env.is_empty() {
            return Ok(());
        }
        let users: Vec<_> = self.groups().users.values().cloned().collect();
        for group in users {
            let Some(user) = &group.user else { continue };
            let stored = host.vault.sealed_secrets(user, &self.name).await?;
            if group.has_other_secrets(fingerprint(&record, &stored)) {
                self.stop(Some(user.clone()), host).await;
            }
        }
        Ok(())
    }

    fn leased_groups(&self) -> Vec<Arc<Group>> {
        let groups = self.groups();
        groups.shared.iter().chain(groups.users.values()).filter(|group| group.is_leased()).cloned().collect()
    }

    /// Takes the listing that the store has, unless this worker made a newer one.
    pub fn set_stored_tools(&self, tools: RawJson) {
        if self.load().is_none() && !self.is_builtin() {
            let mut listing = lock(&self.listing);
            listing.repeatable = Repeatable::of(Some(&tools));
            listing.tools = Some(tools);
            listing.listed = None;
            listing.of = None;
        }
    }
}
