//! The processes that serve one server, or one user of it: started together, replaced when they die,
//! shared by slots, stopped when idle or no longer wanted.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak, atomic::Ordering},
    time::Duration,
};

use deadpool::managed::{Object, Pool, PoolError, Timeouts};
use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    ids::{ServerName, UserId},
    json::RawJson,
    limits,
    server::{ServerRecord, Transport},
    timestamp::Timestamp,
    worker_api::{InstanceReport, ServerStatus},
};
use tokio::{
    sync::{Notify, futures::Notified, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use self::{
    slots::{Slot, Slots, pool},
    upkeep::{watch_idle, watch_instance},
};
use crate::{
    host::Host,
    instance::{Instance, Launch},
    logs::Log,
};

mod slots;
mod upkeep;

/// The record of a server, as it is now. Changes that need no new process show up here.
pub type CurrentRecord = RwLock<Arc<ServerRecord>>;

/// Hears of listings. (The group knows whose they are.)
pub type OnTools = Box<dyn Fn(&RawJson) + Send + Sync>;

/// A set of like processes.
pub struct Group {
    /// Whose server this is; `None`: everybody's.
    pub user: Option<UserId>,
    server: ServerName,
    record: Arc<CurrentRecord>,
    host: Arc<Host>,
    log: Arc<Log>,
    pool: Pool<Slots>,
    state: Mutex<State>,
    /// Something happened that a waiting task may be waiting for.
    changed: Notify,
    /// Somebody waits for a start that waits for its turn.
    urgent: Notify,
    /// No more starts; those under way are given up.
    retired: CancellationToken,
    on_tools: OnTools,
}

struct State {
    instances: Vec<Arc<Instance>>,
    /// A start or a stop is under way; the channel closes when it is over.
    busy: Option<watch::Receiver<()>>,
    /// Crashes and failed starts in a row.
    failures: u32,
    not_before: Instant,
    /// Why it does not run, until it does.
    trouble: Option<Trouble>,
    /// What went wrong last, also when it is mended.
    last_error: Option<String>,
    /// Whether it should run although nobody calls.
    wanted: bool,
    last_used: Instant,
    since: Timestamp,
}

#[derive(Clone)]
struct Trouble {
    /// For whoever runs the server: it may quote the server's own words.
    text: String,
    /// It never came up. (Otherwise it ran and died, so that waiting for it makes sense.)
    at_start: bool,
    /// Secrets that its user has not set and that its environment should have had.
    missing: Vec<String>,
}

/// Why a call got no slot.
pub enum NoSlot {
    /// This group ends; there may be a new one.
    Retired,
    /// For the caller.
    Error(WorkerError),
}

/// What has to happen before a process can be connected.
enum Wait<'a> {
    /// The end of a start or a stop.
    Busy(watch::Receiver<()>),
    /// The end of a process.
    Change(Notified<'a>),
    /// The end of the pause after a failure.
    Until(Instant),
}

impl Group {
    /// A group that runs nothing yet.
    pub fn new(
        user: Option<UserId>,
        record: Arc<CurrentRecord>,
        host: Arc<Host>,
        log: Arc<Log>,
        on_tools: OnTools,
    ) -> Arc<Self> {
        let now = current(&record);
        let slots = now.concurrency_limit().saturating_mul(now.instance_limit());
        let group = Arc::new_cyclic(|group: &Weak<Self>| Self {
            user,
            server: now.name.clone(),
            record,
            host,
            log,
            pool: pool(Slots(group.clone()), slots),
            state: Mutex::new(State {
                instances: Vec::new(),
                busy: None,
                failures: 0,
                not_before: Instant::now(),
                trouble: None,
                last_error: None,
                wanted: false,
                last_used: Instant::now(),
                since: Timestamp::now(),
            }),
            changed: Notify::new(),
            urgent: Notify::new(),
            retired: CancellationToken::new(),
            on_tools,
        });
        group.host.tasks.spawn(watch_idle(Arc::downgrade(&group)));
        group
    }

    /// A slot for one call, in its turn; starts the processes when none runs.
    pub async fn slot(self: &Arc<Self>, deadline: Instant) -> Result<Object<Slots>, NoSlot> {
        loop {
            self.ensure_running(deadline, false).await?;
            if self.pool.status().waiting >= limits::CALL_QUEUE {
                let text = format!("Server {} has too many calls waiting", self.server);
                return Err(not_started(
                    WorkerError::new(ErrorCode::Overloaded, text).retry_after(Duration::from_secs(1)),
                ));
            }
            let wait = deadline.saturating_duration_since(Instant::now());
            match self.pool.timeout_get(&Timeouts { wait: Some(wait), create: None, recycle: None }).await {
                Ok(slot) => {
                    self.state().last_used = Instant::now();
                    return Ok(slot);
                }
                Err(PoolError::Closed) => return Err(NoSlot::Retired),
                Err(PoolError::Timeout(_)) => {
                    return Err(self.no_slot_in_time());
                }
                // One of several processes is gone and the others are full: wait for any change.
                Err(_) => {
                    if Instant::now() >= deadline {
                        return Err(self.no_slot_in_time());
                    }
                    let _ = timeout(Duration::from_millis(10), self.changed.notified()).await;
                }
            }
        }
    }

    /// Waits until a process is connected. `force`: does not wait out the pause after a failure.
    pub async fn ensure_running(self: &Arc<Self>, deadline: Instant, mut force: bool) -> Result<(), NoSlot> {
        loop {
            let wait = {
                let mut state = self.state();
                if self.retired.is_cancelled() {
                    return Err(NoSlot::Retired);
                }
                if state.instances.iter().any(|instance| instance.is_open()) {
                    return Ok(());
                }
                let now = Instant::now();
                let pause =
                    if force { Duration::ZERO } else { state.not_before.saturating_duration_since(now) };
                match (&state.busy, &state.trouble) {
                    (Some(busy), _) => Wait::Busy(busy.clone()),
                    // The last one is on its way out: its end decides when there is another.
                    _ if !state.instances.is_empty() => Wait::Change(self.changed.notified()),
                    (None, Some(trouble))
                        if !pause.is_zero() && (trouble.at_start || now + pause >= deadline) =>
                    {
                        return Err(not_started(self.unavailable(trouble, pause)));
                    }
                    _ if !pause.is_zero() => Wait::Until(now + pause),
                    _ => Wait::Busy(self.begin_start(&mut state, false)),
                }
            };
            let wait = async {
                match wait {
                    Wait::Busy(mut busy) => {
                        self.urgent.notify_one();
                        while busy.changed().await.is_ok() {}
                        true
                    }
                    Wait::Change(changed) => {
                        changed.await;
                        false
                    }
                    Wait::Until(pause_end) => {
                        tokio::time::sleep_until(pause_end).await;
                        false
                    }
                }
            };
            let waited = tokio::select! {
                waited = timeout_at(deadline, wait) => waited,
                () = self.retired.cancelled() => return Err(NoSlot::Retired),
            };
            // One start is forced; when it fails, its pause counts.
            force &= waited != Ok(true);
            if waited.is_err() {
                let text = format!("Server {} is starting", self.server);
                return Err(not_started(
                    WorkerError::new(ErrorCode::ServerStarting, text)
                        .with("serverName", self.server.as_str())
                        .retry_after(Duration::from_secs(2)),
                ));
            }
        }
    }

    /// Sees to it that it runs, without waiting.
    pub fn want_running(self: &Arc<Self>) {
        let mut state = self.state();
        state.wanted = true;
        if state.busy.is_none() && state.instances.is_empty() && !self.retired.is_cancelled() {
            self.begin_start(&mut state, true);
        }
    }

    /// Ends it for good: calls in flight get a moment, waiting ones are sent elsewhere. Returns when
    /// the last process is reaped.
    pub async fn retire(&self) {
        self.retired.cancel();
        self.pool.close();
        let drained = async {
            loop {
                // Listening begins before looking, so that no end of a call is missed in between.
                let mut changed = std::pin::pin!(self.changed.notified());
                changed.as_mut().enable();
                if self.in_flight() == 0 {
                    return;
                }
                changed.await;
            }
        };
        tokio::select! {
            _ = timeout(limits::STOP_DRAIN, drained) => {}
            // The calls had their time before the worker came to this.
            () = self.host.stopping.cancelled() => {}
        }
        let busy = self.state().busy.clone();
        if let Some(mut busy) = busy {
            while busy.changed().await.is_ok() {}
        }
        let instances = std::mem::take(&mut self.state().instances);
        futures_util::future::join_all(instances.iter().map(|instance| instance.stop())).await;
    }

    /// Retires the group if it runs nothing; says whether it did. A call that was about to start it
    /// finds it retired and asks for another.
    pub fn dismiss(&self) -> bool {
        let state = self.state();
        let asleep = state.instances.is_empty() && state.busy.is_none();
        if asleep {
            self.retired.cancel();
            self.pool.close();
        }
        asleep
    }

    /// To be called when a call ended.
    pub fn call_ended(&self) {
        self.state().last_used = Instant::now();
        self.changed.notify_waiters();
    }

    /// The group's state and that of its processes.
    pub fn report(&self) -> (ServerStatus, Vec<InstanceReport>) {
        let state = self.state();
        let mut reports: Vec<_> = state
            .instances
            .iter()
            .map(|instance| InstanceReport {
                worker_id: self.host.worker_id.clone(),
                pid: Some(instance.pid),
                username: self.user.clone(),
                status: if instance.is_open() { ServerStatus::Connected } else { ServerStatus::Disconnected },
                in_flight: instance.in_flight.load(Ordering::Acquire),
                since: instance.since,
                last_error: state.last_error.clone(),
            })
            .collect();
        let status = match (&state.trouble, &state.busy) {
            _ if reports.iter().any(|report| report.status == ServerStatus::Connected) => {
                ServerStatus::Connected
            }
            // A server that failed is in error until it is up, however often it is tried.
            (Some(_), _) => ServerStatus::Error,
            (None, Some(_)) => ServerStatus::Connecting,
            (None, None) => ServerStatus::Disconnected,
        };
        if reports.is_empty() && status != ServerStatus::Disconnected {
            reports.push(InstanceReport {
                worker_id: self.host.worker_id.clone(),
                pid: None,
                username: self.user.clone(),
                status,
                in_flight: 0,
                since: state.since,
                last_error: state.last_error.clone(),
            });
        }
        (status, reports)
    }

    /// What blots out secrets in the words of this server.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Begins a start; the returned channel closes when it is over.
    fn begin_start(self: &Arc<Self>, state: &mut State, background: bool) -> watch::Receiver<()> {
        let (done, busy) = watch::channel(());
        state.busy = Some(busy.clone());
        state.wanted = true;
        state.since = Timestamp::now();
        let group = Arc::clone(self);
        self.host.tasks.spawn(async move {
            // At boot hundreds may want to start at once; a caller who waits goes first.
            let permit = if background {
                tokio::select! {
                    permit = group.host.background_starts.acquire() => permit.ok(),
                    () = group.urgent.notified() => None,
                    () = group.retired.cancelled() => None,
                }
            } else {
                None
            };
            let started = group.start_missing().await;
            drop(permit);
            group.started(started);
            drop(done);
            group.changed.notify_waiters();
        });
        busy
    }

    /// Starts as many processes as are missing, side by side.
    async fn start_missing(self: &Arc<Self>) -> Vec<Result<Arc<Instance>, Trouble>> {
        if self.retired.is_cancelled() {
            return Vec::new();
        }
        let record = current(&self.record);
        let running = self.state().instances.iter().filter(|instance| instance.is_open()).count();
        let missing = record.instance_limit().saturating_sub(running);
        futures_util::future::join_all((0..missing).map(|_| self.start_one(&record))).await
    }

    async fn start_one(&self, record: &ServerRecord) -> Result<Arc<Instance>, Trouble> {
        let failed = |text, missing| Trouble { text, at_start: true, missing };
        let Transport::Stdio { command, args, env } = &record.transport else {
            let text = "servers of this transport are not supported by this version".to_owned();
            return Err(failed(text, Vec::new()));
        };
        let secret_env = self.host.secret_env(self.user.as_ref(), record).await;
        let secret_env = secret_env.map_err(|text| failed(text, Vec::new()))?;
        // What the process knows for as long as it lives must not show up in its log.
        let known = self.log.remember(secret_env.values.iter());
        let launch = Launch { command, args, env: &env.0, secret_env: secret_env.variables, known };
        let limit = record.startup_limit();
        let host = &self.host;
        let started =
            Instance::start(launch, limit, &self.retired, &self.log, &host.supervisor, &host.tasks).await;
        // It may repeat the server's own words.
        started.map_err(|text| failed(self.log.redactor().quote(text), secret_env.missing))
    }

    /// Takes in what a start brought.
    fn started(self: &Arc<Self>, started: Vec<Result<Arc<Instance>, Trouble>>) {
        let mut state = self.state();
        state.busy = None;
        let (instances, troubles): (Vec<_>, Vec<_>) = started.into_iter().partition(Result::is_ok);
        if self.retired.is_cancelled() {
            // Whoever retires the group waits for this start, and then stops what it brought.
            state.instances.extend(instances.into_iter().flatten());
            return;
        }
        for instance in instances.into_iter().flatten() {
            tracing::info!(server = %self.server, pid = instance.pid, "server connected");
            state.trouble = None;
            state.since = instance.since;
            (self.on_tools)(&instance.tools());
            self.host.tasks.spawn(watch_instance(Arc::clone(self), Arc::clone(&instance)));
            state.instances.push(instance);
        }
        // Processes of one start fail for one reason, and count once.
        match troubles.into_iter().find_map(Result::err) {
            Some(trouble) => self.fail(&mut state, trouble, None),
            // One may have died while another was being started.
            None => self.start_missing_later(&state),
        }
    }

    /// Takes in the end of a process.
    fn instance_ended(self: &Arc<Self>, instance: &Arc<Instance>, exit: crate::supervisor::Exit) {
        let mut state = self.state();
        state.instances.retain(|one| !Arc::ptr_eq(one, instance));
        if !instance.is_stopping() && !self.retired.is_cancelled() {
            let text = format!("the process {exit}");
            let trouble = Trouble { text, at_start: false, missing: Vec::new() };
            self.fail(&mut state, trouble, Some(instance.started.elapsed()));
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Notes a failure, and tries again after a pause that grows. A process that ran (`lived`) and died
    /// is replaced at once the first time.
    fn fail(self: &Arc<Self>, state: &mut State, trouble: Trouble, lived: Option<Duration>) {
        self.log.note(&trouble.text);
        tracing::warn!(server = %self.server, error = %trouble.text, "server failed");
        if lived.is_some_and(|lived| lived >= limits::STABLE_AFTER) {
            state.failures = 0;
        }
        state.failures += 1;
        let doublings = state.failures.saturating_sub(if lived.is_some() { 2 } else { 1 }).min(16);
        let pause = if lived.is_some() && state.failures == 1 {
            Duration::ZERO
        } else {
            (limits::RESTART_BACKOFF * (1 << doublings)).min(limits::RESTART_BACKOFF_MAX)
        };
        state.not_before = Instant::now() + pause;
        state.last_error = Some(trouble.text.clone());
        state.trouble = Some(trouble);
        state.since = Timestamp::now();
        self.start_missing_later(state);
    }

    /// Sees to it that missing processes are started after the pause. A user's own process is started by
    /// the user's next call.
    fn start_missing_later(self: &Arc<Self>, state: &State) {
        if !state.wanted || self.user.is_some() || self.is_complete(state) {
            return;
        }
        let group = Arc::clone(self);
        let not_before = state.not_before;
        self.host.tasks.spawn(async move {
            tokio::select! {
                () = group.retired.cancelled() => {}
                () = group.host.stopping.cancelled() => {}
                () = tokio::time::sleep_until(not_before) => {
                    let mut state = group.state();
                    let due = state.not_before <= Instant::now();
                    if due && state.wanted && state.busy.is_none() && !group.is_complete(&state) {
                        group.begin_start(&mut state, true);
                    }
                }
            }
        });
    }

    fn is_complete(&self, state: &State) -> bool {
        state.instances.len() >= current(&self.record).instance_limit()
    }

    fn new_slot(&self) -> Option<Slot> {
        let state = self.state();
        let limit = current(&self.record).concurrency_limit();
        let instance = state
            .instances
            .iter()
            .filter(|instance| instance.is_open())
            .min_by_key(|instance| instance.slots.load(Ordering::Acquire))
            .filter(|instance| instance.slots.load(Ordering::Acquire) < limit)?;
        instance.slots.fetch_add(1, Ordering::AcqRel);
        Some(Slot { instance: Arc::clone(instance) })
    }

    fn in_flight(&self) -> usize {
        self.state().instances.iter().map(|instance| instance.in_flight.load(Ordering::Acquire)).sum()
    }

    fn no_slot_in_time(&self) -> NoSlot {
        let text = format!("Server {} had no free slot in time", self.server);
        not_started(
            WorkerError::new(ErrorCode::DeadlineExceeded, text).with("serverName", self.server.as_str()),
        )
    }

    /// What a caller is told. Why it fails stands in the server's document, for those who run it.
    fn unavailable(&self, trouble: &Trouble, pause: Duration) -> WorkerError {
        let why = if trouble.at_start { "it could not be started" } else { "its process keeps ending" };
        let missing = match trouble.missing.as_slice() {
            [] => String::new(),
            missing => format!(" (secrets that are not set for this user: {})", missing.join(", ")),
        };
        let text = format!("Server {} is not available: {why}{missing}", self.server);
        WorkerError::new(ErrorCode::ServerUnavailable, text)
            .with("serverName", self.server.as_str())
            .retry_after(pause)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The record as it is now.
pub fn current(record: &CurrentRecord) -> Arc<ServerRecord> {
    Arc::clone(&record.read().unwrap_or_else(PoisonError::into_inner))
}

fn not_started(error: WorkerError) -> NoSlot {
    NoSlot::Error(error.outcome(Outcome::NotStarted))
}
