//! The processes that serve one server, or one user of it: started together, replaced when they die,
//! shared by slots, stopped when idle or no longer wanted.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak, atomic::Ordering},
    time::Duration,
};

use deadpool::managed::Pool;
use mcp_shared::{
    error::{Outcome, WorkerError},
    ids::{ServerName, UserId},
    json::RawJson,
    limits,
    metrics::Gone,
    server::ServerRecord,
    timestamp::Timestamp,
    worker_api::{InstanceReport, ServerStatus},
};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    queue::Queue,
    slots::{Slots, pool},
    starting::{Busy, Start},
    upkeep::watch_idle,
};
use crate::{
    host::Host,
    instance::{End, Instance},
    leases::{Denied, Hold},
    logs::Log,
    meters,
};

mod owning;
mod queue;
mod silence;
mod slots;
mod starting;
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
    queue: Queue,
    /// The lease that must be in force while it runs, if it is of a kind that may run only once.
    hold: Option<Hold>,
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
    busy: Option<Busy>,
    /// Crashes and failed starts in a row.
    failures: u32,
    not_before: Instant,
    /// Why it does not run, until it does.
    trouble: Option<Trouble>,
    /// What went wrong last, also when it is mended.
    last_error: Option<String>,
    /// Whether it should run although nobody calls.
    wanted: bool,
    /// The secrets that its environment was made of, as [`crate::host::fingerprint`] tells them.
    secrets: Option<u64>,
    /// Whether it is being given up, so that its owner need not be this worker any more.
    leaving: bool,
    /// Whether the next group of its name takes its lease over.
    lease_handed_on: bool,
    last_used: Instant,
    since: Timestamp,
    /// Since when it runs, starts or should.
    owned_since: Timestamp,
}

#[derive(Clone)]
struct Trouble {
    /// For whoever runs the server: it may quote the server's own words.
    text: String,
    /// It never came up. (Otherwise it ran and died, so that waiting for it makes sense.)
    at_start: bool,
    /// Secrets that its user has not set and that its environment should have had.
    missing: Vec<String>,
    /// What callers are told, where more can be said than that it is not available.
    error: Option<Box<WorkerError>>,
}

/// Why a call got no slot.
pub enum NoSlot {
    /// This group ends; there may be a new one.
    Retired,
    /// This worker may not run it.
    Denied(Denied),
    /// It cannot be started here; another worker may be able to.
    Unable(WorkerError),
    /// For the caller.
    Error(WorkerError),
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
        let hold = host.hold(&now, user.as_ref());
        let group = Arc::new_cyclic(|group: &Weak<Self>| Self {
            user,
            server: now.name.clone(),
            record,
            host,
            log,
            pool: pool(Slots(group.clone()), slots),
            queue: Queue::default(),
            hold,
            state: Mutex::new(State {
                instances: Vec::new(),
                busy: None,
                failures: 0,
                not_before: Instant::now(),
                trouble: None,
                last_error: None,
                wanted: false,
                secrets: None,
                leaving: false,
                lease_handed_on: false,
                last_used: Instant::now(),
                since: Timestamp::now(),
                owned_since: Timestamp::now(),
            }),
            changed: Notify::new(),
            urgent: Notify::new(),
            retired: CancellationToken::new(),
            on_tools,
        });
        group.host.tasks.spawn(watch_idle(Arc::downgrade(&group)));
        group
    }

    /// Sees to it that it runs, without waiting.
    pub fn want_running(self: &Arc<Self>) {
        let mut state = self.state();
        state.wanted = true;
        if state.busy.is_none() && state.instances.is_empty() && !self.retired.is_cancelled() {
            self.begin_start(&mut state, Start::Background);
        }
    }

    /// Ends it for good: calls in flight get a moment, waiting ones are sent elsewhere. Returns when
    /// the last process is reaped.
    pub async fn retire(&self, drain: Duration) {
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
            _ = timeout(drain, drained) => {}
            // The calls had their time before the worker came to this.
            () = self.host.stopping.cancelled() => {}
        }
        let busy = self.state().busy.clone();
        if let Some(mut busy) = busy {
            while busy.changed().await.is_ok() {}
        }
        // They stay in the list until they are gone, so that nobody takes the group for unused.
        let instances = self.state().instances.clone();
        futures_util::future::join_all(instances.iter().map(|instance| instance.stop())).await;
        self.state().instances.clear();
        self.host.note_change();
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
    pub fn call_ended(self: &Arc<Self>) {
        let mut state = self.state();
        state.last_used = Instant::now();
        self.replace_stuck(&state);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Replaces processes that did not give up several calls that were cancelled, as soon as no call is with them:
    /// whatever they do for nobody costs those that come.
    fn replace_stuck(self: &Arc<Self>, state: &State) {
        for instance in &state.instances {
            let stuck = instance.ignored_cancels.load(Ordering::Acquire) >= limits::IGNORED_CANCELS;
            if !stuck || instance.pid().is_none() || instance.in_flight.load(Ordering::Acquire) > 0 {
                continue;
            }
            // From here on no call begins on it; one that was just about to looks again.
            if instance.leave() {
                continue;
            }
            self.log.note("the process goes on with calls that were cancelled: it is replaced");
            tracing::warn!(server = %self.server, "a process that gives no call up is replaced");
            let (group, instance) = (Arc::clone(self), Arc::clone(instance));
            self.host.tasks.spawn(async move {
                let idle = async {
                    loop {
                        let mut changed = std::pin::pin!(group.changed.notified());
                        changed.as_mut().enable();
                        if instance.in_flight.load(Ordering::SeqCst) == 0 {
                            return;
                        }
                        changed.await;
                    }
                };
                let _ = timeout(limits::TOOL_TIMEOUT_MAX, idle).await;
                instance.stop_for(Gone::Stuck).await;
            });
        }
    }

    /// The group's state and that of its processes.
    pub fn report(&self) -> (ServerStatus, Vec<InstanceReport>) {
        let state = self.state();
        // It only asks whether it may start.
        if state.instances.is_empty() && !self.may_run() {
            return (ServerStatus::Disconnected, Vec::new());
        }
        let mut reports: Vec<_> = state
            .instances
            .iter()
            .map(|instance| InstanceReport {
                worker_id: self.host.worker_id.clone(),
                pid: instance.pid(),
                username: self.user.clone(),
                status: if instance.is_open() { ServerStatus::Connected } else { ServerStatus::Disconnected },
                in_flight: instance.in_flight.load(Ordering::Acquire),
                since: instance.since,
                last_error: state.last_error.clone(),
            })
            .collect();
        let mut status = Self::status(&state);
        // That one user cannot connect says nothing about the server.
        if status == ServerStatus::Error && current(&self.record).is_remote() {
            status = ServerStatus::Disconnected;
        }
        let troubled = status != ServerStatus::Disconnected || state.trouble.is_some();
        if reports.is_empty() && troubled {
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

    /// Its state, and how many processes or connections it has, for counting.
    pub fn standing(&self) -> (ServerStatus, usize) {
        let state = self.state();
        (Self::status(&state), state.instances.len())
    }

    fn status(state: &State) -> ServerStatus {
        match (&state.trouble, &state.busy) {
            _ if state.instances.iter().any(|instance| instance.is_open()) => ServerStatus::Connected,
            // A server that failed is in error until it is up, however often it is tried.
            (Some(_), _) => ServerStatus::Error,
            (None, Some(_)) => ServerStatus::Connecting,
            (None, None) => ServerStatus::Disconnected,
        }
    }

    /// What blots out secrets in the words of this server.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Takes in the end of a process.
    fn instance_ended(self: &Arc<Self>, instance: &Arc<Instance>, end: End) {
        meters::gone(instance.gone(end));
        let mut state = self.state();
        state.instances.retain(|one| !Arc::ptr_eq(one, instance));
        if !instance.is_stopping() && !self.retired.is_cancelled() {
            let trouble =
                Trouble { text: end.to_string(), at_start: false, missing: Vec::new(), error: None };
            self.fail(&mut state, trouble, Some(instance.started.elapsed()));
        } else if instance.is_leaving() && state.busy.is_none() && self.user.is_none() {
            // It was replaced. A user's own process is started by the user's next call.
            if !self.retired.is_cancelled() {
                self.begin_start(&mut state, Start::Background);
            }
        }
        drop(state);
        self.changed.notify_waiters();
        self.rest_later();
    }

    fn in_flight(&self) -> usize {
        self.state().instances.iter().map(|instance| instance.in_flight.load(Ordering::Acquire)).sum()
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
