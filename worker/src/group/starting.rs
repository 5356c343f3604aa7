//! How a group's processes come to run: one start at a time, shared by all who wait, tried again after
//! a pause that grows.

use std::{sync::Arc, time::Duration};

use mcp_shared::{
    builtin,
    error::{ErrorCode, Outcome, WorkerError},
    limits,
    metrics::{Carrier, Gone, Started},
    package::PackageRef,
    server::{ServerRecord, Transport, looks_secret},
    timestamp::Timestamp,
};
use secrecy::SecretString;
use tokio::{
    sync::{futures::Notified, watch},
    time::{Instant, timeout_at},
};

use super::{
    Group, NoSlot, State, Trouble, current, not_started, silence::watch_silence, upkeep::watch_instance,
};
use crate::{
    instance::{Instance, Launch},
    leases::Denied,
    meters,
    packages::{folders::Installed, managers::Say},
    remote::{self, Target},
};

/// A start or a stop that is under way. The channel closes when it is over, and says then why a start
/// was not allowed.
pub(super) type Busy = watch::Receiver<Option<Denied>>;

/// What has to happen before a process can be connected.
enum Wait<'a> {
    /// The end of a start or a stop.
    Busy(Busy),
    /// The end of a process.
    Change(Notified<'a>),
    /// The end of the pause after a failure.
    Until(Instant),
}

/// What came of waiting.
enum Waited {
    /// A start or a stop is over; a start may have been denied.
    Start(Option<Denied>),
    /// Time passed or something changed.
    Other,
}

/// Who wants a start.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// A call, which goes elsewhere if another worker has the lease.
    ForCall,
    /// Somebody who ordered it. An owner that is silent is waited for, to see whether it is lost.
    Ordered,
    /// Nobody who waits: as ordered, in its turn among others.
    Background,
}

impl Group {
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
                        return Err(self.no_start(trouble, pause));
                    }
                    _ if !pause.is_zero() => Wait::Until(now + pause),
                    _ => Wait::Busy(
                        self.begin_start(&mut state, if force { Start::Ordered } else { Start::ForCall }),
                    ),
                }
            };
            let wait = async {
                match wait {
                    Wait::Busy(mut busy) => {
                        self.urgent.notify_one();
                        while busy.changed().await.is_ok() {}
                        let denied = busy.borrow().clone();
                        Waited::Start(denied)
                    }
                    Wait::Change(changed) => {
                        changed.await;
                        Waited::Other
                    }
                    Wait::Until(pause_end) => {
                        tokio::time::sleep_until(pause_end).await;
                        Waited::Other
                    }
                }
            };
            let waited = tokio::select! {
                waited = timeout_at(deadline, wait) => waited,
                () = self.retired.cancelled() => return Err(NoSlot::Retired),
            };
            match waited {
                Ok(Waited::Start(Some(Denied::Retired))) => return Err(NoSlot::Retired),
                Ok(Waited::Start(Some(denied))) => return Err(NoSlot::Denied(denied)),
                // One start is forced; when it fails, its pause counts.
                Ok(Waited::Start(None)) => force = false,
                Ok(Waited::Other) => {}
                Err(_) => {
                    let text = format!("Server {} is starting", self.server);
                    return Err(not_started(
                        WorkerError::new(ErrorCode::ServerStarting, text)
                            .with("serverName", self.server.as_str())
                            .retry_after(Duration::from_secs(2)),
                    ));
                }
            }
        }
    }

    /// Begins a start; the returned channel closes when it is over.
    pub(super) fn begin_start(self: &Arc<Self>, state: &mut State, start: Start) -> Busy {
        let (done, busy) = watch::channel(None);
        if !self.is_active(state) {
            state.owned_since = Timestamp::now();
        }
        state.busy = Some(busy.clone());
        state.wanted = true;
        state.since = Timestamp::now();
        let group = Arc::clone(self);
        self.host.tasks.spawn(async move {
            // At boot hundreds may want to start at once; a caller who waits goes first.
            let permit = if start == Start::Background {
                tokio::select! {
                    permit = group.host.background_starts.acquire() => permit.ok(),
                    () = group.urgent.notified() => None,
                    () = group.retired.cancelled() => None,
                }
            } else {
                None
            };
            let patience = (start != Start::ForCall).then(|| Instant::now() + limits::LEASE_TAKEOVER * 2);
            match group.take_lease(patience).await {
                Ok(()) => {
                    let started = group.start_missing().await;
                    group.started(started);
                }
                Err(denied) => {
                    let mut state = group.state();
                    state.busy = None;
                    state.wanted = false;
                    drop(state);
                    done.send_replace(Some(denied));
                }
            }
            drop(permit);
            drop(done);
            group.changed.notify_waiters();
            group.host.note_change();
            group.rest().await;
        });
        self.host.note_change();
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
        futures_util::future::join_all((0..missing).map(|_| self.start_counted(&record))).await
    }

    async fn start_counted(&self, record: &Arc<ServerRecord>) -> Result<Arc<Instance>, Trouble> {
        if builtin::is_builtin(&record.name) {
            // Neither a process nor a connection to anywhere.
            return self.start_one(record).await;
        }
        let carrier = Carrier::of(record.is_remote());
        let timer = meters::start(carrier);
        let started = self.start_one(record).await;
        drop(timer);
        match &started {
            Ok(_) => meters::started(carrier, Started::Ok),
            // It was given up, which is not the server's failure.
            Err(_) if self.retired.is_cancelled() => {}
            Err(_) => meters::started(carrier, Started::Failed),
        }
        started
    }

    async fn start_one(&self, record: &Arc<ServerRecord>) -> Result<Arc<Instance>, Trouble> {
        let failed = |text, missing| Trouble { text, at_start: true, missing, error: None };
        if builtin::is_builtin(&record.name) {
            let opened = crate::builtin::open(&self.host, &self.log).await;
            return opened.map_err(|text| failed(text, Vec::new()));
        }
        let Transport::Stdio { command, args, env } = &record.transport else {
            return self.connect_one(record).await;
        };
        let secret_env = self.host.secret_env(self.user.as_ref(), record).await;
        let secret_env = secret_env.map_err(|text| failed(text, Vec::new()))?;
        self.state().secrets = Some(secret_env.fingerprint);
        // What the process knows for as long as it lives must not show up in its log: its user's secrets, and what
        // the record keeps for everybody under a name that is one of a secret.
        let own: Vec<SecretString> = env
            .0
            .iter()
            .filter(|(name, _)| looks_secret(name))
            .map(|(_, value)| SecretString::from(value.as_str()))
            .collect();
        let known = self.log.remember(secret_env.values.iter().chain(&own));
        let package = match &record.package {
            Some(reference) => {
                let installed = self.installed(reference).await;
                Some((reference, installed.map_err(|text| failed(text, Vec::new()))?))
            }
            None => None,
        };
        let launch = Launch { command, args, env: &env.0, package, secret_env: secret_env.variables, known };
        let limit = record.startup_limit();
        let host = &self.host;
        let started =
            Instance::start(launch, limit, &self.retired, &self.log, &host.supervisor, &host.tasks).await;
        // It may repeat the server's own words.
        started.map_err(|text| failed(self.log.redactor().quote(text), secret_env.missing))
    }

    /// Connects to a remote server for the group's user.
    async fn connect_one(&self, record: &Arc<ServerRecord>) -> Result<Arc<Instance>, Trouble> {
        let user = self.user.clone().unwrap_or_default();
        let target = Target {
            host: &self.host,
            user,
            record,
            current: &self.record,
            log: &self.log,
            given_up: &self.retired,
        };
        remote::connect(target).await.map_err(|error| Trouble {
            text: error.message.clone(),
            at_start: true,
            missing: Vec::new(),
            error: Some(Box::new(error)),
        })
    }

    /// The installation that it runs, which this worker may have to make first.
    async fn installed(&self, reference: &PackageRef) -> Result<Arc<Installed>, String> {
        let log = Arc::clone(&self.log);
        let say: Say = Arc::new(move |line| log.note(line));
        let installed = self.host.packages.ensure(reference, &self.host, say, &self.retired).await;
        installed.map_err(|error| format!("its package cannot be installed here: {}", error.message))
    }

    /// Takes in what a start brought.
    fn started(self: &Arc<Self>, started: Vec<Result<Arc<Instance>, Trouble>>) {
        let mut state = self.state();
        state.busy = None;
        let (instances, troubles): (Vec<_>, Vec<_>) = started.into_iter().partition(Result::is_ok);
        if self.retired.is_cancelled() {
            // Whoever retires the group waits for this start, and then stops what it brought.
            instances.iter().for_each(|_| meters::gone(Gone::Stopped));
            state.instances.extend(instances.into_iter().flatten());
            return;
        }
        for instance in instances.into_iter().flatten() {
            tracing::info!(server = %self.server, pid = instance.pid(), "server connected");
            state.trouble = None;
            state.since = instance.since;
            (self.on_tools)(&instance.tools());
            self.host.tasks.spawn(watch_instance(Arc::clone(self), Arc::clone(&instance)));
            if instance.pid().is_some() {
                self.host.tasks.spawn(watch_silence(Arc::clone(self), Arc::clone(&instance)));
            }
            state.instances.push(instance);
        }
        // Processes of one start fail for one reason, and count once.
        match troubles.into_iter().find_map(Result::err) {
            Some(trouble) => self.fail(&mut state, trouble, None),
            // One may have died while another was being started.
            None => self.start_missing_later(&state),
        }
    }

    /// Notes a failure, and tries again after a pause that grows. A process that ran (`lived`) and died
    /// is replaced at once the first time.
    pub(super) fn fail(self: &Arc<Self>, state: &mut State, trouble: Trouble, lived: Option<Duration>) {
        self.log.note(&trouble.text);
        tracing::warn!(server = %self.server, error = %trouble.text, "server failed");
        if lived.is_some_and(|lived| lived >= limits::STABLE_AFTER) {
            state.failures = 0;
        }
        state.failures += 1;
        let doublings = state.failures.saturating_sub(if lived.is_some() { 2 } else { 1 }).min(16);
        let record = current(&self.record);
        let pause = if lived.is_some() && state.failures == 1 {
            Duration::ZERO
        } else if record.is_remote() {
            record.reconnection().pause(doublings)
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
                        group.begin_start(&mut state, Start::Background);
                    }
                }
            }
        });
    }

    fn is_complete(&self, state: &State) -> bool {
        state.instances.len() >= current(&self.record).instance_limit()
    }

    /// Why there is no process. What has the user or the place of a remote server to do with it is the same
    /// everywhere; a program that does not start here may start where another Node, or more disk, is.
    fn no_start(&self, trouble: &Trouble, pause: Duration) -> NoSlot {
        let error = self.unavailable(trouble, pause).outcome(Outcome::NotStarted);
        if trouble.missing.is_empty() && !current(&self.record).is_remote() {
            NoSlot::Unable(error)
        } else {
            NoSlot::Error(error)
        }
    }

    /// What a caller is told. Why it fails stands in the server's document, for those who run it.
    fn unavailable(&self, trouble: &Trouble, pause: Duration) -> WorkerError {
        if let Some(error) = &trouble.error {
            let mut error = (**error).clone();
            if error.code.retryable() {
                error.retry_after_ms.get_or_insert(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX));
            }
            return error;
        }
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
}
