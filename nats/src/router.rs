//! The router: [`WorkerApi`] over the bus. Every gateway has one, and every worker for its front door.
//!
//! Nothing here waits on behalf of a call: replies move the calls' state machines on, and a watch looks
//! after those that nobody answers. A call costs its caller one sleep.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use lru::LruCache;
use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    fleet::{Fleet, NodeReport},
    ids::{ServerName, UserId, WorkerId},
    limits,
    metrics::{Exposition, Metric},
    package::{Latest, LatestQuery},
    remote::{RemoteAnswer, RemoteAsk},
    worker_api::{CallContext, CallStream, Change, ServerReport, ToolCall, WorkerApi},
};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{calls::Call, crowds::Crowds, posts::Cancelled, questions::Heard};
use crate::{
    bus::Bus,
    caller::{Now, bus_unavailable, no_worker},
    connect::OpenError,
    fleet::FleetView,
    wire::CallId,
};

mod beats;
mod calls;
mod changes;
mod crowds;
mod posts;
mod questions;
mod replies;
mod upkeep;

/// Calls that one router looks after at once. Those who bring them set limits of their own, which come first.
const OPEN_CALLS: usize = mcp_shared::config::MOST_CALLS;
/// Kibibytes of large answers that may be on their way to one router.
const BODIES_KIB: usize = 48 * 1024;
/// Messages of the watch that may wait for the connection.
const ERRANDS: usize = 8_192;
/// The bus is away when this node has not heard itself for so long.
const ECHO_PATIENCE: Duration = Duration::from_secs(3);
/// Nodes of other fleets that are remembered, so that the log has each once.
const STRANGERS: NonZeroUsize = NonZeroUsize::new(64).expect("it is not zero");
/// How long a new node waits for the others to introduce themselves.
const INTRODUCTION: Duration = Duration::from_millis(300);

/// What a node says of itself, when it is asked.
pub type Describe = Arc<dyn Fn() -> NodeReport + Send + Sync>;

/// Something to send for which the watch does not wait: it has to look at the clock, above all when
/// nothing can be sent.
type Errand = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A router. Cloning it shares it.
#[derive(Clone)]
pub struct Router {
    inner: Arc<Inner>,
}

struct Inner {
    bus: Bus,
    describe: Describe,
    /// Somebody new wants to hear what this node is.
    asked: Notify,
    fleet: RwLock<FleetView>,
    /// What this node said of itself last.
    me: Mutex<NodeReport>,
    /// Nodes that cannot be of one fleet with this one, and why.
    strangers: Mutex<LruCache<WorkerId, String>>,
    /// Attempts under way, by their ids.
    attempts: Mutex<HashMap<CallId, Arc<Call>>>,
    /// Calls that are not over, by the id that they were given first.
    open: Mutex<HashMap<CallId, Arc<Call>>>,
    questions: Mutex<HashMap<CallId, mpsc::Sender<Heard>>>,
    probes: Mutex<HashMap<CallId, WorkerId>>,
    /// Attempts that were given up lately.
    cancelled: Cancelled,
    /// Attempts whose answers have arrived, to be forgotten by the workers.
    done: Mutex<HashMap<WorkerId, Vec<CallId>>>,
    /// Servers for which another worker was asked to run them as well, and until when that counts.
    expanding: Mutex<HashMap<ServerName, Now>>,
    /// Servers that no worker had room for a moment ago.
    crowds: Crowds,
    ids: Ids,
    errands: mpsc::Sender<Errand>,
    bodies: Arc<Semaphore>,
    tasks: TaskTracker,
    stopping: CancellationToken,
    runtime: tokio::runtime::Handle,
    /// When this node last heard itself, in milliseconds.
    echo: AtomicU64,
    /// Until when others may still be connecting anew, in milliseconds.
    unsettled_until: AtomicU64,
    random: AtomicU64,
    listing: Mutex<Option<async_nats::service::Service>>,
}

/// Ids that nobody else gives: half of one is drawn once, the other half counts.
struct Ids {
    drawn: u64,
    next: AtomicU64,
}

impl Ids {
    fn new() -> Self {
        let (drawn, _) = uuid::Uuid::new_v4().as_u64_pair();
        Self { drawn, next: AtomicU64::new(1) }
    }

    fn next(&self) -> CallId {
        let count = self.next.fetch_add(1, Ordering::Relaxed);
        CallId((u128::from(self.drawn) << 64) | u128::from(count))
    }
}

impl Router {
    /// Joins the fleet: listens, introduces this node, and waits until the others had time to answer. A
    /// node that cannot be one of them is refused.
    /// `changed` makes it say at once what `describe` says then.
    pub async fn join(bus: Bus, describe: Describe, changed: watch::Receiver<()>) -> Result<Self, OpenError> {
        let (errands, orders) = mpsc::channel(ERRANDS);
        let inner = Arc::new(Inner {
            me: Mutex::new(describe()),
            strangers: Mutex::new(LruCache::new(STRANGERS)),
            describe,
            asked: Notify::new(),
            fleet: RwLock::default(),
            attempts: Mutex::default(),
            open: Mutex::default(),
            questions: Mutex::default(),
            probes: Mutex::default(),
            cancelled: Cancelled::default(),
            done: Mutex::default(),
            expanding: Mutex::default(),
            crowds: Crowds::default(),
            ids: Ids::new(),
            errands,
            bodies: Arc::new(Semaphore::new(BODIES_KIB)),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            runtime: tokio::runtime::Handle::current(),
            echo: AtomicU64::new(crate::wire::millis(bus.now())),
            unsettled_until: AtomicU64::new(0),
            random: AtomicU64::new(uuid::Uuid::new_v4().as_u64_pair().1 | 1),
            listing: Mutex::default(),
            bus,
        });
        let replies = inner.bus.replies().await?;
        let beats = inner.bus.client().subscribe(inner.bus.subjects().beats()).await?;
        inner.tasks.spawn(Arc::clone(&inner).listen(replies));
        inner.tasks.spawn(Arc::clone(&inner).hear_beats(beats));
        inner.tasks.spawn(Arc::clone(&inner).watch());
        inner.tasks.spawn(Arc::clone(&inner).run_errands(orders));
        inner.tasks.spawn(Arc::clone(&inner).beat(changed));
        tokio::time::sleep(INTRODUCTION).await;
        let router = Self { inner };
        let stranger = lock(&router.inner.strangers).pop_lru();
        match stranger {
            Some((_, why)) => {
                router.leave().await;
                Err(OpenError::Unfit(why))
            }
            None => Ok(router),
        }
    }

    /// Shows this node to the micro-service protocol of NATS. A node that cannot be listed works all the
    /// same.
    pub async fn register(&self, name: &str) {
        match crate::micro::register(&self.inner.bus, name).await {
            Ok(service) => *lock(&self.inner.listing) = Some(service),
            Err(error) => tracing::warn!(error.cause = %error, "this node is not listed as a micro service"),
        }
    }

    /// Shows how this node sees the bus and the fleet.
    pub fn show(&self, metrics: &Exposition) {
        self.inner.bus.show(metrics);
        let router = self.clone();
        metrics.show(Metric::BusConnected, move || f64::from(u8::from(router.is_up())));
        let router = self.clone();
        metrics.show_count(Metric::FleetWorkers, move || router.staying().len());
    }

    /// The bus that it is on.
    pub fn bus(&self) -> &Bus {
        &self.inner.bus
    }

    /// The workers that own a server and stay; see [`FleetView::owners`].
    pub fn owners(&self, server: &ServerName) -> Vec<WorkerId> {
        self.inner.fleet().owners(self.inner.bus.now(), server)
    }

    /// The workers where a server runs; see [`FleetView::running`].
    pub fn running(&self, server: &ServerName) -> Vec<WorkerId> {
        self.inner.fleet().running(self.inner.bus.now(), server)
    }

    /// The worker that should run a server first.
    pub fn first(&self, server: &ServerName) -> Option<WorkerId> {
        self.inner.fleet().first(self.inner.bus.now(), server)
    }

    /// Workers that answer and stay.
    pub fn staying(&self) -> Vec<WorkerId> {
        self.inner.fleet().staying(self.inner.bus.now())
    }

    /// Whether the NATS servers may have lost each other: there are several, and somebody who was heard lately
    /// is not, and has not said goodbye.
    pub fn may_be_split(&self) -> bool {
        let inner = &self.inner;
        inner.bus.is_clustered() && inner.fleet().misses_somebody(inner.bus.now())
    }

    /// Says what this node is now, and waits until the message is on its way.
    pub async fn show_up(&self) {
        self.inner.show_up().await;
    }

    /// Whether this node hears itself.
    pub fn is_up(&self) -> bool {
        self.inner.is_up()
    }

    /// Says goodbye and ends every task. Calls that are still open have a moment; then they are given up.
    pub async fn leave(&self) {
        self.inner.end_calls().await;
        self.inner.say_goodbye().await;
        self.inner.stopping.cancel();
        self.inner.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.inner.tasks.wait()).await;
    }
}

impl Inner {
    fn fleet(&self) -> RwLockReadGuard<'_, FleetView> {
        self.fleet.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn fleet_mut(&self) -> RwLockWriteGuard<'_, FleetView> {
        self.fleet.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_up(&self) -> bool {
        let echo = Duration::from_millis(self.echo.load(Ordering::Acquire));
        self.bus.is_connected() && self.bus.now().saturating_sub(echo) < ECHO_PATIENCE
    }

    /// A number below `end`, from a generator that needs no lock. It only spreads load.
    fn draw(&self, end: usize) -> usize {
        let mut x = self.random.load(Ordering::Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.store(x, Ordering::Relaxed);
        usize::try_from(x % u64::try_from(end.max(1)).unwrap_or(1)).unwrap_or(0)
    }
}

#[async_trait]
impl WorkerApi for Router {
    async fn call_tool(&self, context: CallContext, call: ToolCall) -> Result<CallStream, WorkerError> {
        let inner = &self.inner;
        if !inner.is_up() {
            return Err(bus_unavailable());
        }
        if lock(&inner.open).len() >= OPEN_CALLS {
            let text = "This gateway has too many calls in flight";
            return Err(WorkerError::new(ErrorCode::Overloaded, text)
                .outcome(Outcome::NotStarted)
                .retry_after(Duration::from_secs(1)));
        }
        let (events, receiver) = mpsc::channel(limits::PROGRESS_QUEUE + 1);
        let (tell, admitted) = oneshot::channel();
        let early = call.progress.then_some(tell);
        let guard = inner.begin(context, call, events, early).await?;
        if guard.reports_admission()
            && let Ok(Err(error)) = admitted.await
        {
            return Err(error);
        }
        Ok(CallStream::new(receiver, guard))
    }

    async fn start_server(&self, user: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError> {
        self.inner.start(user, server).await
    }

    async fn restart_server(&self, user: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError> {
        self.inner.restart(user, server).await
    }

    async fn announce(&self, change: Change) -> Result<(), WorkerError> {
        self.inner.announce(change).await
    }

    async fn report(&self, server: &ServerName) -> Result<ServerReport, WorkerError> {
        self.inner.report(server).await
    }

    async fn reports(&self) -> Result<Vec<ServerReport>, WorkerError> {
        self.inner.reports().await
    }

    async fn filter_logs(&self, filter: Option<&str>) -> Result<(), WorkerError> {
        self.inner.filter_logs(filter).await
    }

    async fn ready(&self) -> Result<(), WorkerError> {
        if !self.inner.is_up() {
            return Err(bus_unavailable());
        }
        if self.inner.fleet().staying(self.inner.bus.now()).is_empty() {
            return Err(no_worker());
        }
        Ok(())
    }

    async fn wake(&self) -> Result<(), WorkerError> {
        self.inner.wake().await
    }

    async fn latest(&self, packages: Vec<LatestQuery>) -> Result<Vec<Latest>, WorkerError> {
        self.inner.latest(packages).await
    }

    async fn remote(&self, ask: RemoteAsk) -> Result<RemoteAnswer, WorkerError> {
        self.inner.remote(ask).await
    }

    async fn release_worker(&self, worker: &WorkerId) -> Result<(), WorkerError> {
        self.inner.release_worker(worker).await
    }

    async fn fleet(&self) -> Result<Fleet, WorkerError> {
        Ok(self.inner.fleet().view(self.inner.bus.now()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
