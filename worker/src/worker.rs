//! The worker: the implementation of [`WorkerApi`] that owns processes.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use async_trait::async_trait;
use mcp_shared::{
    audit::Audit,
    builtin,
    config::{LimitSettings, PackageSettings, RemoteSettings},
    error::{ErrorCode, Outcome, WorkerError},
    fleet::{Fleet, NodeReport, NodeView, Role},
    hosting::{CallOffer, Hosting, Placing, Refusal, Reservation},
    ids::{ServerName, UserId, WorkerId},
    json::RawJson,
    limits,
    metrics::{self, Limit},
    package::{Latest, LatestQuery},
    remote::{RemoteAnswer, RemoteAsk},
    server::Isolation,
    trace::{self, Key, Kind},
    users::Users,
    vault::{Vault, VaultError},
    worker_api::{CallContext, CallEvent, CallStream, Change, ServerReport, ToolCall, WorkerApi},
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    call::{Call, Go},
    group::{NoSlot, current},
    host::{Boot, Host, runs_once},
    idempotency,
    leases::Leases,
    packages,
    registry::Entry,
    remote,
};

/// The pause after a changed server could not be read.
const UNREADABLE: Duration = Duration::from_millis(500);

/// The servers that a worker knows.
type Entries = RwLock<HashMap<ServerName, Arc<Entry>>>;

/// A worker in this process.
pub struct Worker {
    pub(crate) host: Arc<Host>,
    entries: Arc<Entries>,
    /// Calls in flight, which a stop waits for.
    calls: TaskTracker,
    /// A permit for each call that this worker may look after.
    pub(crate) room: Arc<Semaphore>,
    /// Whose calls came on NATS.
    pub(crate) users: Arc<Users>,
    /// What the fleet is told of it, less what changes.
    pub(crate) me: NodeReport,
    /// Servers that were changed and could not be read since.
    unread: Arc<RwLock<HashSet<ServerName>>>,
    /// Set when somebody asked it to leave.
    leave: CancellationToken,
}

impl Worker {
    /// Reads what is stored and begins to start what `boot` says. `executable` is this program, which
    /// runs again as the supervisor of the servers (see [`crate::supervisor`]).
    pub async fn open(
        vault: Vault,
        executable: PathBuf,
        boot: Boot,
        packages: &PackageSettings,
        remote: &RemoteSettings,
        limits: &LimitSettings,
        audit: Option<Audit>,
    ) -> Result<Arc<Self>, VaultError> {
        let servers = vault.servers().await?;
        let mut listings = stored_listings(&vault).await?;
        let host = Arc::new(Host::new(vault, executable, boot, packages, remote, limits, audit));
        let mut entries: HashMap<_, _> = servers
            .into_iter()
            .map(|server| {
                let tools = listings.remove(&server.value.name);
                (server.value.name.clone(), Entry::new(server.value, tools))
            })
            .collect();
        for record in builtin::records() {
            let name = record.name.clone();
            if entries.insert(name.clone(), Entry::builtin(record, host.web_tools.tools())).is_some() {
                tracing::warn!(
                    server = %name,
                    "a server is stored under the name of a built-in one; it is kept, and not used"
                );
            }
        }
        for entry in entries.values() {
            // What is part of the program runs in every worker of a fleet.
            if boot == Boot::Everything || entry.is_builtin() {
                entry.want_running(&host);
            }
        }
        let entries = Arc::new(RwLock::new(entries));
        if let Some(leases) = &host.leases {
            // Where the store does not answer, the task below goes on trying.
            leases.enter().await.unwrap_or_else(|error| {
                tracing::warn!(error.cause = %error, "this worker cannot take its lease yet");
            });
            host.tasks.spawn(keep_leases(Arc::clone(leases), Arc::clone(&entries), Arc::clone(&host)));
        }
        host.tasks.spawn(idempotency::sweep(Arc::clone(&host)));
        let me = NodeReport::of(host.worker_id.clone(), Role::Worker, mcp_nats::wire::VERSIONS, &host.vault);
        Ok(Arc::new(Self {
            host,
            entries,
            calls: TaskTracker::new(),
            room: Arc::new(Semaphore::new(limits.worker_calls)),
            users: Users::new(limits.user),
            me,
            unread: Arc::default(),
            leave: CancellationToken::new(),
        }))
    }

    /// Takes jobs from the store from now on, until this worker stops. `fleet` is this worker, or all of
    /// those that have to hear of what a job changes.
    pub fn serve_jobs(&self, fleet: Arc<dyn WorkerApi>) {
        self.host.tasks.spawn(packages::serve(Arc::clone(&self.host), fleet));
    }

    /// Keeps what may run only once from now on only while the fleet reaches this worker, which `reached`
    /// tells.
    pub fn own_only_while(&self, reached: impl Fn() -> bool + Send + Sync + 'static) {
        if let Some(leases) = &self.host.leases {
            leases.only_while(reached);
        }
    }

    /// Waits until somebody asked this worker to leave the fleet.
    pub async fn asked_to_leave(&self) {
        self.leave.cancelled().await;
    }

    /// What is stored, and its keys.
    pub(crate) fn vault(&self) -> &Vault {
        &self.host.vault
    }

    /// This worker's id.
    pub fn id(&self) -> &WorkerId {
        &self.host.worker_id
    }

    /// Takes no more calls, lets those in flight finish within `drain`, and ends every process. When
    /// this returns no child is left.
    pub async fn shutdown(&self, drain: Duration) {
        self.begin_drain();
        self.calls.close();
        if timeout(drain, self.calls.wait()).await.is_err() {
            tracing::warn!(
                calls = self.calls.len(),
                "calls were still in flight when the time to stop was over"
            );
        }
        self.host.stopping.cancel();
        let entries = self.entries();
        futures_util::future::join_all(entries.iter().map(|entry| entry.stop(None, &self.host))).await;
        if let Some(leases) = &self.host.leases {
            leases.close().await;
        }
        self.host.tasks.close();
        // Tokens that are being refreshed would be lost with their users' logins.
        let patience =
            if self.host.oauth.is_refreshing() { 2 * limits::OAUTH_TIMEOUT } else { limits::STOP_DRAIN };
        if timeout(patience, self.host.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = self.host.tasks.len(), "tasks were still running at the end");
        }
    }

    /// Takes no more calls. What may run only once goes to other workers as soon as no call uses it.
    pub(crate) fn begin_drain(&self) {
        if self.host.draining.is_cancelled() {
            return;
        }
        self.host.draining.cancel();
        self.host.note_change();
        if self.host.leases.is_some() {
            for entry in self.entries() {
                entry.hand_over(&self.host);
            }
        }
    }

    /// All servers that this worker knows.
    pub(crate) fn entries(&self) -> Vec<Arc<Entry>> {
        all(&self.entries)
    }

    pub(crate) fn entry(&self, server: &ServerName) -> Result<Arc<Entry>, WorkerError> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(server).cloned().ok_or_else(|| WorkerError::server_not_found(server))
    }

    /// Takes in that a server was added, changed or removed. Whatever else happens to the name
    /// meanwhile, what is stored when this returns is what runs.
    pub(crate) async fn server_changed(&self, server: &ServerName) -> Result<(), WorkerError> {
        bring_in_line(&self.host, &self.entries, server).await
    }

    /// Has a changed server read as soon as the store answers. Until then nothing of it is used that was known
    /// before; other servers are not concerned.
    fn read_later(&self, server: ServerName) {
        let is_new = self.unread.write().unwrap_or_else(PoisonError::into_inner).insert(server.clone());
        if !is_new {
            return;
        }
        tracing::warn!(%server, "a changed server cannot be read: it takes no calls until it can");
        let (host, entries, unread) =
            (Arc::clone(&self.host), Arc::clone(&self.entries), Arc::clone(&self.unread));
        self.host.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = sleep(UNREADABLE) => {}
                    () = host.stopping.cancelled() => return,
                }
                match bring_in_line(&host, &entries, &server).await {
                    Err(error) if error.code == ErrorCode::StoreUnavailable => {}
                    // A record that cannot be understood was logged, and stays as it was until it is mended.
                    Ok(()) | Err(_) => break,
                }
            }
            tracing::info!(%server, "a changed server was read");
            unread.write().unwrap_or_else(PoisonError::into_inner).remove(&server);
        });
    }

    fn check_read(&self, server: &ServerName) -> Result<(), WorkerError> {
        let unread = self.unread.read().unwrap_or_else(PoisonError::into_inner);
        if !unread.contains(server) {
            return Ok(());
        }
        let text = format!("Server {server} was changed, and the store does not answer");
        Err(WorkerError::new(ErrorCode::StoreUnavailable, text)
            .with("serverName", server.as_str())
            .outcome(Outcome::NotStarted)
            .retry_after(Duration::from_secs(1)))
    }

    /// Admits a call: from here on its time counts and a task looks after it.
    pub(crate) async fn admit(&self, context: CallContext, offer: CallOffer) -> Result<Reservation, Refusal> {
        let received = Instant::now();
        if self.host.draining.is_cancelled() {
            return Err(Refusal::Draining);
        }
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            return Err(Refusal::Busy { error: too_many_calls() });
        };
        let refused = |error: WorkerError| Refusal::Error { error: error.or_outcome(Outcome::NotStarted) };
        let entry = self.entry(&offer.server).map_err(refused)?;
        let record = current(&entry.record);
        entry.check_enabled(&record).map_err(refused)?;
        self.check_read(&offer.server).map_err(refused)?;
        let limit = record.call_limit(context.timeout);
        let deadline = received + limit.saturating_sub(context.spent);
        // On a single node there is nobody else who could own it.
        if self.host.leases.is_some() || offer.placing == Placing::Owned {
            entry.own(&context.user, offer.placing, deadline, &self.host).await?;
        }
        let (events, receiver) = mpsc::channel(limits::PROGRESS_QUEUE + 1);
        // The end has its place in the queue from the start: progress cannot crowd it out.
        let end = events
            .clone()
            .try_reserve_owned()
            .map_err(|_| refused(WorkerError::internal("a new channel is full")))?;
        let (held_sender, held) = oneshot::channel();
        let (arguments_sender, arguments) = oneshot::channel();
        let cancelled = CancellationToken::new();
        let guard = cancelled.clone().drop_guard();
        // Whoever named the call comes back for what became of it.
        let repeatable = offer.idempotency.is_none() && entry.is_repeatable(&offer.tool);
        let (mut span, trace) = trace::begin(context.trace, self.call_kind(), || "call".into());
        span.say(Key::Server, || offer.server.as_str().to_owned());
        let call = Call {
            host: Arc::clone(&self.host),
            entry,
            user: context.user,
            trace,
            offer,
            deadline,
            limit,
            cancelled,
            events,
            repeatable,
        };
        self.calls.spawn(async move {
            let go = Go { held: Some(held_sender), arguments, unable: false, span };
            end.send(CallEvent::Done(call.run(go).await));
            drop(room);
        });
        let stream = CallStream::new(receiver, guard);
        Ok(Reservation::new(held, arguments_sender, stream, limit)
            .repeatable(repeatable)
            .alone(runs_once(&record)))
    }

    /// Who asks for calls: another process, or this one.
    fn call_kind(&self) -> Kind {
        if self.host.leases.is_some() { Kind::Server } else { Kind::Internal }
    }

    /// Tells a remote server that its sessions are over.
    async fn end_sessions(&self, server: &ServerName) -> Result<(), WorkerError> {
        let record = current(&self.entry(server)?.record);
        if !record.is_remote() {
            return Ok(());
        }
        remote::end_sessions(&self.host, record).await
    }

    async fn wait_running(&self, entry: &Arc<Entry>, user: &UserId) -> Result<ServerReport, WorkerError> {
        let record = current(&entry.record);
        entry.check_enabled(&record)?;
        if record.isolation == Isolation::PerUser && !record.is_remote() {
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
                Ok(()) | Err(NoSlot::Unable(_) | NoSlot::Error(_)) => return Ok(entry.report()),
                // It runs, or may run, elsewhere: the report of this worker would say nothing.
                Err(NoSlot::Denied(denied)) => return Err(denied.into_error()),
            }
        }
    }
}

#[async_trait]
impl WorkerApi for Worker {
    async fn call_tool(&self, context: CallContext, call: ToolCall) -> Result<CallStream, WorkerError> {
        let ToolCall { server, tool, arguments, progress, idempotency } = call;
        let offer = CallOffer { server, tool, progress, placing: Placing::Take, idempotency };
        let admitted = self.admit(context, offer).await.map_err(Refusal::into_error)?;
        Ok(admitted.go(arguments))
    }

    async fn start_server(&self, user: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError> {
        let entry = self.entry(server)?;
        self.wait_running(&entry, user).await
    }

    async fn restart_server(&self, user: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError> {
        let entry = self.entry(server)?;
        entry.restart(&self.host).await;
        self.wait_running(&entry, user).await
    }

    async fn announce(&self, change: Change) -> Result<(), WorkerError> {
        match change {
            Change::Server { server } => match self.server_changed(&server).await {
                Err(error) if error.code == ErrorCode::StoreUnavailable => {
                    self.read_later(server);
                    Ok(())
                }
                taken_in => taken_in,
            },
            Change::Secret { user, server, name } => {
                self.host.secrets.forget(&user, &server);
                // A server that was removed meanwhile has taken its secrets with it.
                if let Ok(entry) = self.entry(&server) {
                    entry.secret_changed(&user, &name, &self.host).await;
                }
                Ok(())
            }
            Change::Login { user, server } => {
                self.host.oauth.forget(&user, &server);
                if let Ok(entry) = self.entry(&server) {
                    entry.stop(Some(user), &self.host).await;
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

    async fn filter_logs(&self, _filter: Option<&str>) -> Result<(), WorkerError> {
        // There is no other node.
        Ok(())
    }

    async fn ready(&self) -> Result<(), WorkerError> {
        if self.host.draining.is_cancelled() {
            return Err(WorkerError::new(ErrorCode::ShuttingDown, "This worker is stopping"));
        }
        Ok(())
    }

    async fn wake(&self) -> Result<(), WorkerError> {
        self.host.packages.wake();
        Ok(())
    }

    async fn latest(&self, packages: Vec<LatestQuery>) -> Result<Vec<Latest>, WorkerError> {
        Ok(self.host.packages.latest(packages, &self.host).await)
    }

    async fn remote(&self, ask: RemoteAsk) -> Result<RemoteAnswer, WorkerError> {
        match ask {
            RemoteAsk::EndSessions { server } => {
                self.end_sessions(&server).await?;
                Ok(RemoteAnswer::Done)
            }
            ask => self.host.oauth.answer(ask).await,
        }
    }

    async fn release_worker(&self, worker: &WorkerId) -> Result<(), WorkerError> {
        if *worker != self.host.worker_id {
            return Err(WorkerError::worker_not_found(worker));
        }
        if self.host.leases.is_none() {
            let text = "This is the only worker: stop the program instead";
            return Err(WorkerError::new(ErrorCode::InvalidRequest, text));
        }
        tracing::info!("asked to leave the fleet");
        self.leave.cancel();
        Ok(())
    }

    async fn fleet(&self) -> Result<Fleet, WorkerError> {
        let myself = NodeView::of_myself(self.describe());
        Ok(Fleet { workers: vec![myself], gateways: Vec::new() })
    }
}

/// Brings what runs of a server in line with what is stored of it now.
async fn bring_in_line(host: &Arc<Host>, entries: &Entries, server: &ServerName) -> Result<(), WorkerError> {
    if builtin::is_builtin(server) {
        return Ok(());
    }
    loop {
        let known = entries.read().unwrap_or_else(PoisonError::into_inner).get(server).cloned();
        let entry = match known {
            Some(entry) => entry,
            None => {
                let Some(stored) = host.vault.server(server).await? else { return Ok(()) };
                let mut entries = entries.write().unwrap_or_else(PoisonError::into_inner);
                Arc::clone(entries.entry(server.clone()).or_insert_with(|| Entry::new(stored.value, None)))
            }
        };
        // An entry that was just made is looked at as well: the server may have been removed between
        // the moment it was read and the moment others could see the entry.
        entry.refresh(host).await?;
        if !entry.is_removed() {
            return Ok(());
        }
        let mut entries = entries.write().unwrap_or_else(PoisonError::into_inner);
        if entries.get(server).is_some_and(|current| Arc::ptr_eq(current, &entry)) {
            entries.remove(server);
        }
    }
}

/// The refusal of a call that would be one too many for this worker; it is counted.
pub(crate) fn too_many_calls() -> WorkerError {
    metrics::count_refusal(Limit::WorkerCalls);
    WorkerError::new(ErrorCode::Overloaded, "This worker has too many calls in flight")
        .outcome(Outcome::NotStarted)
        .retry_after(Duration::from_secs(1))
}

fn all(entries: &Entries) -> Vec<Arc<Entry>> {
    entries.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
}

/// Keeps this worker alive in the store, and ends what it may not run any more.
async fn keep_leases(leases: Arc<Leases>, entries: Arc<Entries>, host: Arc<Host>) {
    let retire = |loss| {
        let (entries, host) = (all(&entries), Arc::clone(&host));
        async move {
            host.note_change();
            for ended in entries.into_iter().map(|entry| entry.lose(loss, &host)).collect::<Vec<_>>() {
                // Each is a task of its own already.
                let _ = ended.await;
            }
        }
    };
    leases.keep(retire).await;
}

/// What everybody sees as the servers' tools, as stored.
pub(crate) async fn stored_listings(vault: &Vault) -> Result<HashMap<ServerName, RawJson>, VaultError> {
    let mut listings = HashMap::new();
    for stored in vault.tools().await? {
        if let (None, Ok(tools)) = (stored.user, RawJson::parse(stored.tools)) {
            listings.insert(stored.server, tools);
        }
    }
    Ok(listings)
}
