//! The worker: the implementation of [`WorkerApi`] that owns processes.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use async_trait::async_trait;
use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    fleet::Fleet,
    ids::{ServerName, UserId, WorkerId},
    json::RawJson,
    limits,
    server::Isolation,
    vault::{Vault, VaultError},
    worker_api::{CallContext, CallEvent, CallStream, Change, ServerReport, ToolCall, WorkerApi},
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    call::Call,
    group::{NoSlot, current},
    host::Host,
    registry::Entry,
};

/// A worker in this process.
pub struct Worker {
    host: Arc<Host>,
    entries: RwLock<HashMap<ServerName, Arc<Entry>>>,
    /// Calls in flight, which a stop waits for.
    calls: TaskTracker,
    stopping: CancellationToken,
}

impl Worker {
    /// Reads what is stored and begins to start every enabled server. `executable` is this program,
    /// which runs again as the supervisor of the servers (see [`crate::supervisor`]).
    pub async fn open(vault: Vault, executable: PathBuf) -> Result<Arc<Self>, VaultError> {
        let servers = vault.servers().await?;
        let mut listings: HashMap<ServerName, RawJson> = HashMap::new();
        for stored in vault.tools().await? {
            if let (None, Ok(tools)) = (stored.user, RawJson::parse(stored.tools)) {
                listings.insert(stored.server, tools);
            }
        }
        let host = Arc::new(Host::new(vault, executable));
        let entries: HashMap<_, _> = servers
            .into_iter()
            .map(|server| {
                let tools = listings.remove(&server.value.name);
                (server.value.name.clone(), Entry::new(server.value, tools))
            })
            .collect();
        for entry in entries.values() {
            entry.want_running(&host);
        }
        Ok(Arc::new(Self {
            host,
            entries: RwLock::new(entries),
            calls: TaskTracker::new(),
            stopping: CancellationToken::new(),
        }))
    }

    /// This worker's id.
    pub fn id(&self) -> &WorkerId {
        &self.host.worker_id
    }

    /// Takes no more calls, lets those in flight finish within `drain`, and ends every process. When
    /// this returns no child is left.
    pub async fn shutdown(&self, drain: Duration) {
        self.stopping.cancel();
        self.calls.close();
        if timeout(drain, self.calls.wait()).await.is_err() {
            tracing::warn!(
                calls = self.calls.len(),
                "calls were still in flight when the time to stop was over"
            );
        }
        self.host.stopping.cancel();
        let entries: Vec<_> =
            self.entries.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        futures_util::future::join_all(entries.iter().map(|entry| entry.stop(None, &self.host))).await;
        self.host.tasks.close();
        if timeout(limits::STOP_DRAIN, self.host.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.host.tasks.len(), "tasks were still running at the end");
        }
    }

    fn entry(&self, server: &ServerName) -> Result<Arc<Entry>, WorkerError> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(server).cloned().ok_or_else(|| WorkerError::server_not_found(server))
    }

    /// Takes in that a server was added, changed or removed. Whatever else happens to the name
    /// meanwhile, what is stored when this returns is what runs.
    async fn server_changed(&self, server: &ServerName) -> Result<(), WorkerError> {
        loop {
            let entry = match self.entry(server) {
                Ok(entry) => entry,
                Err(_) => {
                    let Some(stored) = self.host.vault.server(server).await? else { return Ok(()) };
                    let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
                    Arc::clone(
                        entries.entry(server.clone()).or_insert_with(|| Entry::new(stored.value, None)),
                    )
                }
            };
            // An entry that was just made is looked at as well: the server may have been removed between
            // the moment it was read and the moment others could see the entry.
            entry.refresh(&self.host).await?;
            if !entry.is_removed() {
                return Ok(());
            }
            let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
            if entries.get(server).is_some_and(|current| Arc::ptr_eq(current, &entry)) {
                entries.remove(server);
            }
        }
    }

    async fn wait_running(&self, entry: &Arc<Entry>, user: &UserId) -> Result<ServerReport, WorkerError> {
        let record = current(&entry.record);
        entry.check_enabled(&record)?;
        if record.isolation == Isolation::PerUser {
            let missing =
                self.host.secret_env(Some(user), &record).await.is_ok_and(|env| !env.missing.is_empty());
            if missing {
                // This user cannot be served yet; the first one who can fills the listing.
                return Ok(entry.report());
            }
        }
        // A process that did not come up in time still has to go before the start is over.
        let end = limits::STOP_EOF + limits::STOP_TERM + Duration::from_secs(1);
        let deadline = Instant::now() + record.startup_limit() + end;
        loop {
            match entry.group(user, &self.host)?.ensure_running(deadline, true).await {
                Err(NoSlot::Retired) if Instant::now() < deadline => entry.settled().await,
                Err(NoSlot::Retired) => return Ok(entry.report()),
                // Why it does not run stands in the report.
                Ok(()) | Err(NoSlot::Error(_)) => return Ok(entry.report()),
            }
        }
    }
}

#[async_trait]
impl WorkerApi for Worker {
    async fn call_tool(&self, context: CallContext, call: ToolCall) -> Result<CallStream, WorkerError> {
        let received = Instant::now();
        if self.stopping.is_cancelled() {
            return Err(WorkerError::new(ErrorCode::ShuttingDown, "This worker is stopping")
                .outcome(Outcome::NotStarted)
                .retry_after(Duration::from_secs(1)));
        }
        let entry = self.entry(&call.server).map_err(|error| error.outcome(Outcome::NotStarted))?;
        let record = current(&entry.record);
        entry.check_enabled(&record)?;
        let limit = record.call_limit(context.timeout);
        let (events, receiver) = mpsc::channel(limits::PROGRESS_QUEUE + 1);
        // The end has its place in the queue from the start: progress cannot crowd it out.
        let end = events
            .clone()
            .try_reserve_owned()
            .map_err(|_| WorkerError::internal("a new channel is full").outcome(Outcome::NotStarted))?;
        let cancelled = CancellationToken::new();
        let guard = cancelled.clone().drop_guard();
        let call = Call {
            host: Arc::clone(&self.host),
            entry,
            user: context.user,
            request: call,
            deadline: received + limit,
            limit,
            cancelled,
            events,
        };
        self.calls.spawn(async move {
            end.send(CallEvent::Done(call.run().await));
        });
        Ok(CallStream::new(receiver, guard))
    }

    async fn start_server(&self, user: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError> {
        let entry = self.entry(server)?;
        self.wait_running(&entry, user).await
    }

    async fn restart_server(&self, user: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError> {
        let entry = self.entry(server)?;
        entry.stop(None, &self.host).await;
        entry.want_running(&self.host);
        self.wait_running(&entry, user).await
    }

    async fn announce(&self, change: Change) -> Result<(), WorkerError> {
        match change {
            Change::Server { server } => self.server_changed(&server).await,
            Change::Secret { user, server, name } => {
                self.host.secrets.forget(&user, &server);
                // A server that was removed meanwhile has taken its secrets with it.
                if let Ok(entry) = self.entry(&server) {
                    entry.secret_changed(&user, &name, &self.host).await;
                }
                Ok(())
            }
        }
    }

    async fn report(&self, server: &ServerName) -> Result<ServerReport, WorkerError> {
        Ok(self.entry(server)?.report())
    }

    async fn reports(&self) -> Result<Vec<ServerReport>, WorkerError> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        Ok(entries.values().map(|entry| entry.report()).collect())
    }

    async fn ready(&self) -> Result<(), WorkerError> {
        if self.stopping.is_cancelled() {
            return Err(WorkerError::new(ErrorCode::ShuttingDown, "This worker is stopping"));
        }
        Ok(())
    }

    async fn fleet(&self) -> Result<Fleet, WorkerError> {
        Ok(Fleet::default())
    }
}
