//! Whether a group is this worker's to run, and how it comes and goes.

use std::{sync::Arc, time::Duration};

use mcp_shared::{error::WorkerError, timestamp::Timestamp, worker_api::ServerStatus};
use tokio::time::Instant;

use super::{Group, State, starting::Start};
use crate::leases::{Denied, Hold};

/// How busy a group is.
pub struct Load {
    /// Its state.
    pub status: ServerStatus,
    /// Its processes.
    pub instances: usize,
    /// Calls that may be in flight at once.
    pub slots: usize,
    /// Calls that hold a slot.
    pub in_flight: usize,
    /// Calls that wait for one.
    pub waiting: usize,
    /// How long they have to.
    pub wait: Duration,
    /// Since when it is owned.
    pub since: Timestamp,
}

impl Group {
    /// Whether it runs only under a lease.
    pub fn is_leased(&self) -> bool {
        self.hold.is_some()
    }

    /// Whether calls may be accepted and started: always, unless a lease is needed and not in force.
    pub fn may_run(&self) -> bool {
        self.hold.as_ref().is_none_or(Hold::in_force)
    }

    /// Whether this worker owns what the group serves.
    pub fn is_owned(&self) -> bool {
        let state = self.state();
        !state.leaving && self.is_active(&state) && self.may_run()
    }

    /// How busy it is; `None` if this worker does not own it.
    pub fn load(&self) -> Option<Load> {
        let state = self.state();
        if state.leaving || !self.is_active(&state) || !self.may_run() {
            return None;
        }
        let (status, instances, since) = (Self::status(&state), state.instances.len(), state.owned_since);
        drop(state);
        let (waiting, wait) = self.queue.wait();
        let (slots, in_flight) = (self.pool.status().max_size, self.slots_in_use());
        Some(Load { status, instances, slots, in_flight, waiting, wait, since })
    }

    /// Becomes the owner of a group that needs a lease, and starts it. Once begun it is carried through,
    /// whether or not somebody waits: a lease that is taken belongs to something that runs.
    pub async fn own(self: &Arc<Self>, patience: Option<Instant>) -> Result<(), Denied> {
        let group = Arc::clone(self);
        let task = self.host.tasks.spawn(async move {
            group.take_lease(patience).await?;
            {
                let mut state = group.state();
                let due = state.not_before <= Instant::now() && !group.retired.is_cancelled();
                if due && state.busy.is_none() && state.instances.is_empty() {
                    group.begin_start(&mut state, Start::ForCall);
                }
            }
            group.rest().await;
            Ok(())
        });
        task.await.unwrap_or_else(|error| Err(Denied::NotNow(WorkerError::internal(error))))
    }

    /// Ends the group if no call is in flight, waiting or about to be; says whether it will be gone. The
    /// caller then retires it.
    pub fn leave_if_unused(&self) -> bool {
        let mut state = self.state();
        let used = state.busy.is_some() || !self.queue.is_empty() || self.slots_in_use() > 0;
        if used || self.is_leased() {
            return false;
        }
        state.leaving = true;
        state.wanted = false;
        self.retired.cancel();
        self.pool.close();
        true
    }

    /// Whether it is being given up.
    pub fn is_leaving(&self) -> bool {
        self.state().leaving
    }

    /// Sends calls elsewhere from now on. The caller then retires it.
    pub fn leave(&self) {
        self.state().leaving = true;
    }

    /// Whether its environment was made of other secrets than these.
    pub fn has_other_secrets(&self, fingerprint: u64) -> bool {
        self.state().secrets.is_some_and(|own| own != fingerprint)
    }

    /// Leaves the lease to the next group of the name, which is about to be made.
    pub fn hand_lease_on(&self) {
        self.state().lease_handed_on = true;
    }

    /// Gives the lease back if nothing runs. Safe to call at any time.
    pub async fn rest(&self) {
        if let Some(hold) = &self.hold {
            hold.give_back(|| !self.needs_lease()).await;
        }
    }

    /// As [`Group::rest`], for those who cannot wait.
    pub(super) fn rest_later(self: &Arc<Self>) {
        self.host.note_change();
        if self.is_leased() {
            let group = Arc::clone(self);
            self.host.tasks.spawn(async move { group.rest().await });
        }
    }

    pub(super) async fn take_lease(&self, patience: Option<Instant>) -> Result<(), Denied> {
        match &self.hold {
            Some(hold) => hold.take(patience, &self.retired, &self.host.draining).await,
            None => Ok(()),
        }
    }

    /// Whether it runs, starts or should: a user's own process is started by the user's next call, and
    /// should not run before.
    pub(super) fn is_active(&self, state: &State) -> bool {
        !state.instances.is_empty() || state.busy.is_some() || (state.wanted && self.user.is_none())
    }

    fn needs_lease(&self) -> bool {
        let state = self.state();
        let runs = !state.instances.is_empty() || state.busy.is_some();
        runs || state.lease_handed_on || (self.is_active(&state) && !self.retired.is_cancelled())
    }
}
