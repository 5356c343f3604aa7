//! What a worker counts, and what it shows of how busy it is.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use mcp_shared::{
    error::{ErrorCode, WorkerError},
    fleet::ServerLoad,
    json::RawJson,
    metrics::{
        CallEnd, Carrier, Closed, Count, Counts, Exposition, Gone, Histograms, JobEnd, JobWork, Metric,
        Refreshed, Running, SecretSource, Stage, Started, Status, Timer, instruments,
    },
};

use crate::worker::Worker;

static ENDS: Counts<CallEnd, { CallEnd::ALL.len() }> = Counts::new();
static ERRORS: Counts<ErrorCode, { ErrorCode::ALL.len() }> = Counts::new();
static STAGES: [Histograms<Stage, { Stage::ALL.len() }>; Carrier::ALL.len()] =
    [const { Histograms::new(instruments::CALLS) }; Carrier::ALL.len()];
static STARTS: [Counts<Started, { Started::ALL.len() }>; Carrier::ALL.len()] =
    [const { Counts::new() }; Carrier::ALL.len()];
static START_TIMES: Histograms<Carrier, { Carrier::ALL.len() }> = Histograms::new(instruments::SLOW);
static REPLAYED: Count = Count::new();
static CANCELS_IGNORED: Count = Count::new();
static BROWSER_STARTS: Count = Count::new();
static BROWSER_PAGES: AtomicU64 = AtomicU64::new(0);
static SECRET_READS: Counts<SecretSource, { SecretSource::ALL.len() }> = Counts::new();
static REFRESHES: Counts<Refreshed, { Refreshed::ALL.len() }> = Counts::new();
static EXITS: Counts<Gone, { Gone::ALL.len() }> = Counts::new();
static JOBS: [Counts<JobEnd, { JobEnd::ALL.len() }>; JobWork::ALL.len()] =
    [const { Counts::new() }; JobWork::ALL.len()];
static JOB_TIMES: Histograms<JobWork, { JobWork::ALL.len() }> = Histograms::new(instruments::SLOW);
static JOBS_RUNNING: AtomicU64 = AtomicU64::new(0);

/// A call that was taken in is over.
pub fn call_ended(result: &Result<RawJson, WorkerError>) {
    match result {
        Ok(result) => ENDS.one(CallEnd::of_result(result)),
        Err(error) => {
            ENDS.one(CallEnd::of_error(error));
            ERRORS.one(error.code);
        }
    }
}

/// Measures the stages of a call, one after the other: the end of each is the beginning of the next, so that the clock is
/// read once for both. The last one ends when this is dropped, however that comes about.
#[must_use = "it measures as long as it is held"]
pub struct Stages {
    carrier: Carrier,
    stage: Stage,
    since: Instant,
}

impl Stages {
    /// Begins with a stage.
    pub fn begin(stage: Stage, carrier: Carrier) -> Self {
        Self { carrier, stage, since: Instant::now() }
    }

    /// Goes on with another.
    pub fn enter(&mut self, stage: Stage) {
        let now = Instant::now();
        STAGES[self.carrier.index()].of(self.stage).time(now - self.since);
        (self.stage, self.since) = (stage, now);
    }
}

impl Drop for Stages {
    fn drop(&mut self) {
        STAGES[self.carrier.index()].of(self.stage).time(self.since.elapsed());
    }
}

/// Measures a start, until it is dropped.
pub fn start(carrier: Carrier) -> Timer<'static> {
    START_TIMES.of(carrier).timer()
}

/// A call was answered with what came of it before.
pub fn replayed() {
    REPLAYED.add(1);
}

/// A call that was cancelled was not given up in time.
pub fn cancel_ignored() {
    CANCELS_IGNORED.add(1);
}

/// The browser was started.
pub fn browser_started() {
    BROWSER_STARTS.add(1);
}

/// A page is open, until this is dropped.
pub fn page() -> Running<'static> {
    Running::begin(&BROWSER_PAGES)
}

/// A user's secrets were looked at.
pub fn secrets_from(source: SecretSource) {
    SECRET_READS.one(source);
}

/// A user's tokens were to be refreshed.
pub fn refreshed(result: Refreshed) {
    REFRESHES.one(result);
}

/// A start is over.
pub fn started(carrier: Carrier, came: Started) {
    STARTS[carrier.index()].one(came);
}

/// What had started is gone.
pub fn gone(why: Gone) {
    EXITS.one(why);
}

/// A turn at a job, which counts as under way until it is dropped.
pub struct JobMeter {
    work: JobWork,
    _running: Running<'static>,
    _timer: Timer<'static>,
}

impl JobMeter {
    /// Begins one.
    pub fn begin(work: JobWork) -> Self {
        Self { work, _running: Running::begin(&JOBS_RUNNING), _timer: JOB_TIMES.of(work).timer() }
    }

    /// What came of it.
    pub fn ended(self, end: JobEnd) {
        JOBS[self.work.index()].one(end);
    }
}

impl Worker {
    /// Shows limits, and what of them is in use; what came of calls and starts; and what runs.
    pub fn show(self: &Arc<Self>, metrics: &Exposition) {
        let limits = &self.host.limits;
        let (most, queue) = (limits.worker_calls, limits.server_queue);
        let room = Arc::clone(&self.room);
        metrics.show_count(Metric::WorkerCalls, move || most - room.available_permits());
        metrics.show_count(Metric::WorkerCallsLimit, move || most);
        metrics.show_count(Metric::ServerQueueLimit, move || queue);
        let draining = self.host.draining.clone();
        metrics.show(Metric::WorkerDraining, move || f64::from(u8::from(draining.is_cancelled())));
        let of_servers = |metric, read: fn(&[ServerLoad]) -> f64| {
            let worker = Arc::downgrade(self);
            metrics.show(metric, move || Weak::upgrade(&worker).map_or(0.0, |worker| read(&worker.loads())));
        };
        of_servers(Metric::WorkerRunning, |servers| sum(servers, |server| server.in_flight));
        of_servers(Metric::WorkerWaiting, |servers| sum(servers, |server| server.waiting));
        of_servers(Metric::WorkerSlots, |servers| sum(servers, |server| server.slots));
        of_servers(Metric::WorkerWait, |servers| {
            servers.iter().map(|server| server.wait_ms as f64 / 1e3).fold(0.0, f64::max)
        });
        self.show_servers(metrics);
        show_counts(metrics);
    }

    fn show_servers(self: &Arc<Self>, metrics: &Exposition) {
        let worker = Arc::downgrade(self);
        metrics.show_all(Metric::Servers, move |samples| {
            let mut count = [0_usize; Status::ALL.len()];
            for entry in Weak::upgrade(&worker).map(|worker| worker.entries()).unwrap_or_default() {
                count[entry.standing().status.index()] += 1;
            }
            for status in Status::ALL {
                samples.value(&[("status", status.as_str())], count[status.index()] as f64);
            }
        });
        let worker = Arc::downgrade(self);
        metrics.show_all(Metric::ServerInstances, move |samples| {
            let mut count = [0_usize; Carrier::ALL.len()];
            for entry in Weak::upgrade(&worker).map(|worker| worker.entries()).unwrap_or_default() {
                let standing = entry.standing();
                count[standing.carrier.index()] += standing.instances;
            }
            for carrier in Carrier::ALL {
                samples.value(&[("transport", carrier.as_str())], count[carrier.index()] as f64);
            }
        });
    }

    /// The servers that it owns, and how busy they are.
    pub(crate) fn loads(&self) -> Vec<ServerLoad> {
        self.entries().iter().filter_map(|entry| entry.load()).collect()
    }
}

fn sum(servers: &[ServerLoad], of: fn(&ServerLoad) -> usize) -> f64 {
    servers.iter().map(of).fold(0, usize::saturating_add) as f64
}

fn show_counts(metrics: &Exposition) {
    metrics.show_counts(Metric::ServerCalls, "outcome", &ENDS);
    metrics.show_counts(Metric::ServerErrors, "code", &ERRORS);
    metrics.show_counts(Metric::ServerExits, "reason", &EXITS);
    metrics.show_counts(Metric::SecretReads, "source", &SECRET_READS);
    metrics.show_counts(Metric::TokenRefreshes, "result", &REFRESHES);
    metrics.show_all(Metric::Replayed, |samples| samples.count(&[], REPLAYED.get()));
    metrics.show_all(Metric::BrowserStarts, |samples| samples.count(&[], BROWSER_STARTS.get()));
    metrics.show(Metric::BrowserPages, || BROWSER_PAGES.load(Relaxed) as f64);
    metrics.show_all(Metric::CancelsIgnored, |samples| samples.count(&[], CANCELS_IGNORED.get()));
    metrics.show_all(Metric::StageDuration, |samples| {
        for (carrier, stages) in Carrier::ALL.iter().zip(&STAGES) {
            for stage in Stage::ALL {
                let labels = [("stage", stage.as_str()), ("transport", carrier.as_str())];
                samples.histogram(&labels, stages.of(*stage));
            }
        }
    });
    metrics.show_all(Metric::ServerStarts, |samples| {
        for (carrier, starts) in Carrier::ALL.iter().zip(&STARTS) {
            for came in Started::ALL {
                let labels = [("transport", carrier.as_str()), ("result", came.as_str())];
                samples.count(&labels, starts.get(*came));
            }
        }
    });
    metrics.show_all(Metric::ServerStartDuration, |samples| {
        for carrier in Carrier::ALL {
            samples.histogram(&[("transport", carrier.as_str())], START_TIMES.of(*carrier));
        }
    });
    metrics.show_all(Metric::Jobs, |samples| {
        for (work, jobs) in JobWork::ALL.iter().zip(&JOBS) {
            for end in JobEnd::ALL {
                samples.count(&[("kind", work.as_str()), ("outcome", end.as_str())], jobs.get(*end));
            }
        }
    });
    metrics.show_all(Metric::JobDuration, |samples| {
        for work in JobWork::ALL {
            samples.histogram(&[("kind", work.as_str())], JOB_TIMES.of(*work));
        }
    });
    metrics.show(Metric::JobsRunning, || JOBS_RUNNING.load(Relaxed) as f64);
}
