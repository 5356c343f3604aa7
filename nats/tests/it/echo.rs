//! A worker whose servers answer with what they were asked, without any process behind them.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use mcp_shared::{
    error::{ErrorCode, WorkerError},
    fleet::{Fleet, NodeReport, Role, ServerLoad},
    hosting::{CallOffer, Hosting, Placing, Refusal, Reservation},
    ids::{ServerName, UserId, WorkerId},
    json::RawJson,
    limits,
    package::{Latest, LatestQuery},
    remote::{RemoteAnswer, RemoteAsk},
    timestamp::Timestamp,
    worker_api::{
        CallContext, CallEvent, CallStream, Change, ServerReport, ServerStatus, ToolCall, WorkerApi,
    },
};
use serde_json::json;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// What a test lets such a worker do, and what it has seen.
pub struct Echo {
    id: WorkerId,
    /// The servers that it owns; it takes calls for no others.
    pub servers: Mutex<Vec<ServerName>>,
    /// Who a lease names, until somebody takes over; and how long that takes.
    pub leased: Mutex<Option<(WorkerId, Duration)>>,
    /// Changes that it was told of.
    pub changes: Mutex<Vec<Change>>,
    /// How often it has read everything.
    pub resyncs: AtomicUsize,
    /// Whether changes cannot be taken in.
    pub failing: AtomicBool,
    /// When closed, reading everything takes until it is opened.
    pub reading: watch::Sender<bool>,
    /// Calls that were started.
    pub started: Arc<AtomicUsize>,
    /// Calls that were cancelled while they ran.
    pub cancelled: Arc<AtomicUsize>,
    changed: watch::Sender<()>,
}

impl Echo {
    /// A worker that owns these servers.
    pub fn new(id: WorkerId, servers: &[&str]) -> Arc<Self> {
        Arc::new(Self {
            id,
            servers: Mutex::new(servers.iter().map(|name| ServerName::from_stored(*name)).collect()),
            leased: Mutex::default(),
            changes: Mutex::default(),
            resyncs: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            reading: watch::Sender::new(true),
            started: Arc::default(),
            cancelled: Arc::default(),
            changed: watch::Sender::new(()),
        })
    }

    fn owns(&self, server: &ServerName) -> bool {
        get(&self.servers).contains(server)
    }

    fn report_on(&self, server: &ServerName) -> ServerReport {
        let status = if self.owns(server) { ServerStatus::Connected } else { ServerStatus::Disconnected };
        let logs = vec![format!("seen by {}", self.id)];
        ServerReport { name: server.clone(), status, tools: None, logs, instances: Vec::new(), listed: None }
    }
}

/// A test's lock.
pub fn get<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a call that is dropped before its end.
struct Watched(Arc<AtomicUsize>, CancellationToken);

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.1.is_cancelled() {
            self.0.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// What a tool does with its arguments.
async fn run(
    tool: &str,
    about: serde_json::Value,
    arguments: RawJson,
    events: &mpsc::Sender<CallEvent>,
) -> Result<RawJson, WorkerError> {
    match tool {
        "progress" => {
            for step in 1..=3 {
                let params = RawJson::of(&json!({"progress": step})).unwrap();
                events.send(CallEvent::Progress(params)).await.unwrap();
            }
        }
        "fail" => return Err(WorkerError::new(ErrorCode::McpError, "it failed")),
        "hang" => std::future::pending().await,
        "grow" => {
            let text = "x"
                .repeat(arguments.read::<serde_json::Value>().unwrap()["bytes"].as_u64().unwrap() as usize);
            return Ok(RawJson::of(&json!({"text": text})).unwrap());
        }
        _ => {}
    }
    let arguments: serde_json::Value = arguments.read().unwrap();
    Ok(RawJson::of(&json!({"about": about, "arguments": arguments})).unwrap())
}

#[async_trait]
impl Hosting for Echo {
    async fn reserve(&self, context: CallContext, offer: CallOffer) -> Result<Reservation, Refusal> {
        if !self.owns(&offer.server) {
            let leased = get(&self.leased).clone();
            let Some((owner, patience)) = leased else {
                let error = WorkerError::new(ErrorCode::ServerNotFound, "No server has that name");
                return Err(Refusal::Error { error });
            };
            if offer.placing != Placing::TakeOver {
                return Err(Refusal::NotOwner { owner: Some(owner) });
            }
            tokio::time::sleep(patience).await;
        }
        let (tell, held) = oneshot::channel();
        let (arguments, go) = oneshot::channel();
        let (events, receiver) = mpsc::channel(limits::PROGRESS_QUEUE + 1);
        let ended = CancellationToken::new();
        let watched = Watched(Arc::clone(&self.cancelled), ended.clone());
        let started = Arc::clone(&self.started);
        let about = json!({"server": offer.server, "user": context.user, "worker": self.id});
        tokio::spawn(async move {
            let _ = tell.send(Ok(()));
            let work = async {
                let arguments = go.await.ok()?;
                started.fetch_add(1, Ordering::AcqRel);
                Some(run(offer.tool.as_str(), about, arguments, &events).await)
            };
            tokio::select! {
                result = work => if let Some(result) = result {
                    ended.cancel();
                    let _ = events.send(CallEvent::Done(result)).await;
                },
                () = events.closed() => {}
            }
        });
        let limit = context.timeout.unwrap_or(limits::TOOL_TIMEOUT);
        Ok(Reservation::new(held, arguments, CallStream::new(receiver, watched), limit))
    }

    fn describe(&self) -> NodeReport {
        let servers = get(&self.servers);
        let load = |name: &ServerName| ServerLoad {
            name: name.clone(),
            status: ServerStatus::Connected,
            instances: 1,
            users: 0,
            slots: 16,
            in_flight: 0,
            waiting: 0,
            wait_ms: 0,
            since: Timestamp::from_millis(0),
        };
        NodeReport { servers: servers.iter().map(load).collect(), ..about(&self.id, Role::Worker) }
    }

    async fn place(&self, _: &ServerName) -> Result<(), WorkerError> {
        Ok(())
    }

    async fn give_up(&self, _: &ServerName) -> bool {
        false
    }

    fn wanted(&self) -> Vec<(ServerName, bool)> {
        Vec::new()
    }

    async fn resync(&self, _: bool) -> Result<(), WorkerError> {
        self.resyncs.fetch_add(1, Ordering::AcqRel);
        self.reading.subscribe().wait_for(|open| *open).await.map_err(WorkerError::internal)?;
        Ok(())
    }

    fn drain(&self) {}

    fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

#[async_trait]
impl WorkerApi for Echo {
    async fn call_tool(&self, context: CallContext, call: ToolCall) -> Result<CallStream, WorkerError> {
        let ToolCall { server, tool, arguments, progress, idempotency } = call;
        let offer = CallOffer { server, tool, progress, placing: Placing::Take, idempotency };
        let reservation = self.reserve(context, offer).await.map_err(Refusal::into_error)?;
        Ok(reservation.go(arguments))
    }

    async fn start_server(&self, _: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError> {
        get(&self.servers).push(server.clone());
        self.changed.send_replace(());
        Ok(self.report_on(server))
    }

    async fn restart_server(&self, _: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError> {
        Ok(self.report_on(server))
    }

    async fn announce(&self, change: Change) -> Result<(), WorkerError> {
        get(&self.changes).push(change);
        if self.failing.load(Ordering::Acquire) {
            return Err(WorkerError::new(ErrorCode::StoreUnavailable, "The store did not answer"));
        }
        Ok(())
    }

    async fn report(&self, server: &ServerName) -> Result<ServerReport, WorkerError> {
        Ok(self.report_on(server))
    }

    async fn reports(&self) -> Result<Vec<ServerReport>, WorkerError> {
        let servers = get(&self.servers).clone();
        Ok(servers.iter().map(|server| self.report_on(server)).collect())
    }

    async fn filter_logs(&self, _: Option<&str>) -> Result<(), WorkerError> {
        Ok(())
    }

    async fn ready(&self) -> Result<(), WorkerError> {
        Ok(())
    }

    async fn wake(&self) -> Result<(), WorkerError> {
        Ok(())
    }

    async fn latest(&self, packages: Vec<LatestQuery>) -> Result<Vec<Latest>, WorkerError> {
        Ok(packages.into_iter().map(|package| Latest::Version(package.name)).collect())
    }

    async fn remote(&self, _: RemoteAsk) -> Result<RemoteAnswer, WorkerError> {
        Ok(RemoteAnswer::Done)
    }

    async fn release_worker(&self, _: &WorkerId) -> Result<(), WorkerError> {
        Ok(())
    }

    async fn fleet(&self) -> Result<Fleet, WorkerError> {
        Ok(Fleet::default())
    }
}

/// A node that owns nothing.
pub fn about(id: &WorkerId, role: Role) -> NodeReport {
    NodeReport {
        id: id.clone(),
        role,
        version: "0.0.0".to_owned(),
        started: Timestamp::from_millis(0),
        wire: mcp_nats::wire::VERSIONS,
        store: String::new(),
        keys: Vec::new(),
        capacity: 4,
        draining: false,
        servers: Vec::new(),
        per_user: Vec::new(),
    }
}
