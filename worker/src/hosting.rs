//! The worker as the bus sees it: what it owns, and how it comes to own more or less.

use std::collections::HashSet;

use async_trait::async_trait;
use mcp_shared::{
    audit::{Action, AuditCalls, Entry, Event, Object},
    error::{ErrorCode, WorkerError},
    fleet::NodeReport,
    hosting::{CallOffer, Hosting, Refusal, Reservation},
    ids::{ServerName, UserId},
    users::Entered,
    worker_api::{CallContext, ToolCall},
};
use tokio::sync::watch;

use crate::{
    call::stopping,
    group::current,
    worker::{Worker, stored_listings, too_many_calls},
};

/// What is recorded as the credential of a service on NATS, where NATS itself says who may speak for whom.
const SERVICE: &str = "nats";

#[async_trait]
impl Hosting for Worker {
    async fn reserve(&self, context: CallContext, offer: CallOffer) -> Result<Reservation, Refusal> {
        self.admit(context, offer).await
    }

    fn room(&self) -> Result<(), WorkerError> {
        if self.room.available_permits() > 0 { Ok(()) } else { Err(too_many_calls()) }
    }

    fn enter(&self, user: &UserId) -> Result<Entered, WorkerError> {
        self.users.enter(user).map_err(|refused| refused.error())
    }

    fn record_call(&self, context: &CallContext, call: &ToolCall) {
        if let Some(audit) = self.host.audit.as_ref().filter(|audit| audit.calls() == AuditCalls::All) {
            let object = Object::server(&call.server).with_tools([&call.tool]);
            let entry = Entry::new(Event::Allowed, Action::ToolCall, object).by(SERVICE, &context.user);
            audit.note(entry.in_request(&context.request_id));
        }
    }

    fn describe(&self) -> NodeReport {
        let mut servers = self.loads();
        servers.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        NodeReport {
            draining: self.host.draining.is_cancelled(),
            servers,
            per_user: self.per_user(),
            keys: self.host.vault.kids(),
            ..self.me.clone()
        }
    }

    async fn place(&self, server: &ServerName) -> Result<(), WorkerError> {
        if self.host.draining.is_cancelled() {
            return Err(stopping());
        }
        let entry = self.entry(server)?;
        entry.check_enabled(&current(&entry.record))?;
        entry.want_running(&self.host);
        Ok(())
    }

    async fn give_up(&self, server: &ServerName) -> bool {
        match self.entry(server) {
            Ok(entry) => entry.give_up(&self.host).await,
            Err(_) => false,
        }
    }

    fn wanted(&self) -> Vec<(ServerName, bool)> {
        let entries = self.entries();
        let runs_always = entries.iter().filter(|entry| {
            let record = current(&entry.record);
            // What is part of the program runs everywhere without being placed.
            record.enabled && !record.is_per_user() && record.idle_limit().is_none() && !entry.is_builtin()
        });
        runs_always.map(|entry| (entry.name.clone(), entry.runs_shared())).collect()
    }

    async fn resync(&self, missed: bool) -> Result<(), WorkerError> {
        let stored = self.host.vault.servers().await?;
        let mut listings = stored_listings(&self.host.vault).await?;
        // Only now: what is known serves as long as the store does not answer.
        if missed {
            self.host.secrets.forget_all();
            self.host.oauth.forget_all();
        } else {
            self.host.secrets.doubt_all();
            self.host.oauth.doubt_all();
        }
        let mut names: HashSet<ServerName> = self.entries().iter().map(|entry| entry.name.clone()).collect();
        for server in stored {
            let same =
                self.entry(&server.value.name).is_ok_and(|entry| *current(&entry.record) == server.value);
            if same {
                names.remove(&server.value.name);
            } else {
                names.insert(server.value.name);
            }
        }
        for name in names {
            match self.server_changed(&name).await {
                Err(error) if error.code == ErrorCode::StoreUnavailable => return Err(error),
                // One record that cannot be read must not keep the others from being served. It was
                // logged, and stays as it was until somebody mends it.
                Err(_) | Ok(()) => {}
            }
        }
        for entry in self.entries() {
            if let Some(tools) = listings.remove(&entry.name) {
                entry.set_stored_tools(tools);
            }
            entry.renew_environments(&self.host).await?;
        }
        Ok(())
    }

    fn drain(&self) {
        self.begin_drain();
    }

    fn changed(&self) -> watch::Receiver<()> {
        self.host.changed.subscribe()
    }
}

impl Worker {
    /// Enabled servers with a process or connection for each user.
    fn per_user(&self) -> Vec<ServerName> {
        let entries = self.entries();
        let mut names: Vec<_> = entries
            .iter()
            .filter(|entry| {
                let record = current(&entry.record);
                record.enabled && record.is_per_user()
            })
            .map(|entry| entry.name.clone())
            .collect();
        names.sort_unstable();
        names
    }
}
