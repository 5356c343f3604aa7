//! What a node counts, and how it is shown to Prometheus.
//!
//! Counts are the process's: whatever counts need not be handed anything, and counting is an addition to a number whose
//! place is known. What is true at a moment, such as calls in flight, is read when somebody asks. No label has a user's, a
//! server's or a tool's name: what names can be is not bounded. [`Metric`] is the table of all.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

use crate::{audit::Event, crypter::CryptoErrorKind, store::StoreError};

mod exposition;
pub mod instruments;
mod labels;
mod process;
mod table;

pub use exposition::{CONTENT_TYPE, Exposition, Samples};
pub use instruments::{Count, Counts, Histogram, Histograms, Running, Timer};
pub use labels::{
    BusTrouble, CallEnd, Carrier, Direction, Gone, JobEnd, JobWork, Limit, Pooled, Refreshed, Reply,
    SecretSource, SpanLoss, Stage, Started, Status, StatusClass, StoreEnd, StoreWork,
};
pub use table::{Closed, Kind, Label, Metric, Nodes, markdown_labels, markdown_table};

static REFUSED: Counts<Limit, { Limit::ALL.len() }> = Counts::new();
static INTEGRITY: Counts<CryptoErrorKind, { CryptoErrorKind::ALL.len() }> = Counts::new();
static PROGRESS_DROPPED: Count = Count::new();
static TOOL_CHANGES: Count = Count::new();
static LOG_DROPPED: Count = Count::new();
static SPANS_EXPORTED: Count = Count::new();
static SPANS_DROPPED: Counts<SpanLoss, { SpanLoss::ALL.len() }> = Counts::new();
static AUDIT_DROPPED: Count = Count::new();
static AUDIT_FAILURES: Count = Count::new();
static AUDIT_LINES: Counts<Event, 4> = Counts::new();
static WORKERS_LOST: Count = Count::new();
static LEASES_LOST: Count = Count::new();
static SLOW_CONSUMERS: Count = Count::new();
static BUS_CONNECTIONS: Count = Count::new();
static BUS_DISCONNECTIONS: Count = Count::new();
static BUS_TROUBLES: Counts<BusTrouble, { BusTrouble::ALL.len() }> = Counts::new();
static STORE_ENDS: [Counts<StoreEnd, { StoreEnd::ALL.len() }>; StoreWork::ALL.len()] =
    [const { Counts::new() }; StoreWork::ALL.len()];
static STORE_TIMES: Histograms<StoreWork, { StoreWork::ALL.len() }> = Histograms::new(instruments::REQUESTS);
static STORE_RUNNING: AtomicU64 = AtomicU64::new(0);
static STORE_POOL: StorePool = StorePool {
    limit: AtomicU64::new(0),
    open: AtomicI64::new(0),
    in_use: AtomicI64::new(0),
    failures: Count::new(),
};

/// A call, or a connection, was refused because of a limit.
pub fn count_refusal(limit: Limit) {
    REFUSED.one(limit);
}

/// A progress event was dropped because its reader was slow.
pub fn count_dropped_progress() {
    PROGRESS_DROPPED.add(1);
}

/// A message of the bus was lost because it came faster than messages were read.
pub fn count_slow_consumer() {
    SLOW_CONSUMERS.add(1);
}

/// The bus was connected to, for the first time or again.
pub fn count_bus_connection() {
    BUS_CONNECTIONS.add(1);
}

/// The connection to the bus was lost.
pub fn count_bus_disconnection() {
    BUS_DISCONNECTIONS.add(1);
}

/// Something went wrong with the bus.
pub fn count_bus_trouble(trouble: BusTrouble) {
    BUS_TROUBLES.one(trouble);
}

/// A stored value could not be opened: it was changed or moved, or its key is not here.
pub fn count_integrity_failure(kind: CryptoErrorKind) {
    INTEGRITY.one(kind);
}

/// Lines of the audit log were dropped, because they came faster than they were written, or could not be.
pub fn count_audit_dropped(lines: u64) {
    AUDIT_DROPPED.add(lines);
}

/// Lines of the audit log could not be written.
pub fn count_audit_failure() {
    AUDIT_FAILURES.add(1);
}

/// A line of the audit log was written.
pub fn count_audit_line(event: Event) {
    AUDIT_LINES.one(event);
}

/// A worker that had calls of this node was taken for lost.
pub fn count_lost_worker() {
    WORKERS_LOST.add(1);
}

/// This worker lost its own lease.
pub fn count_lost_lease() {
    LEASES_LOST.add(1);
}

/// Spans got to the collector of traces.
pub(crate) fn count_exported_spans(spans: u64) {
    SPANS_EXPORTED.add(spans);
}

/// Spans did not.
pub(crate) fn count_lost_spans(loss: SpanLoss, spans: u64) {
    SPANS_DROPPED.add(loss, spans);
}

/// A line of the log was dropped, because its reader was slow.
pub(crate) fn count_dropped_line() {
    LOG_DROPPED.add(1);
}

/// A server listed tools otherwise than before, with nothing changed in its record.
pub fn count_tool_change() {
    TOOL_CHANGES.add(1);
}

/// Measures an operation of the store. One whose caller does not wait for its end counts only as one that runs.
pub(crate) async fn of_store<T>(
    work: StoreWork,
    operation: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let _running = Running::begin(&STORE_RUNNING);
    let _timer = STORE_TIMES.of(work).timer();
    let done = operation.await;
    STORE_ENDS[work.index()].one(StoreEnd::of(&done));
    done
}

/// The connections of a store that has some.
pub(crate) struct StorePool {
    limit: AtomicU64,
    open: AtomicI64,
    in_use: AtomicI64,
    failures: Count,
}

impl StorePool {
    /// That of this process.
    pub(crate) fn of_process() -> &'static Self {
        &STORE_POOL
    }

    /// There may be so many.
    pub(crate) fn limit(&self, most: u32) {
        self.limit.store(most.into(), Relaxed);
    }

    /// One was made.
    pub(crate) fn made(&self) {
        self.open.fetch_add(1, Relaxed);
    }

    /// One was closed.
    pub(crate) fn closed(&self) {
        self.open.fetch_sub(1, Relaxed);
    }

    /// One has an operation.
    pub(crate) fn taken(&self) {
        self.in_use.fetch_add(1, Relaxed);
    }

    /// One has none any more.
    pub(crate) fn returned(&self) {
        self.in_use.fetch_sub(1, Relaxed);
    }

    /// None was to be had.
    pub(crate) fn failed(&self) {
        self.failures.add(1);
    }
}

impl Default for Exposition {
    /// What every node shows.
    fn default() -> Self {
        let shown = Exposition::empty();
        let count = |metric: Metric, count: &'static Count| {
            shown.show_all(metric, move |samples| samples.count(&[], count.get()));
        };
        count(Metric::ProgressDropped, &PROGRESS_DROPPED);
        count(Metric::ToolChanges, &TOOL_CHANGES);
        count(Metric::LogDropped, &LOG_DROPPED);
        count(Metric::SpansExported, &SPANS_EXPORTED);
        shown.show_counts(Metric::SpansDropped, "reason", &SPANS_DROPPED);
        count(Metric::AuditDropped, &AUDIT_DROPPED);
        count(Metric::AuditFailures, &AUDIT_FAILURES);
        count(Metric::WorkersLost, &WORKERS_LOST);
        count(Metric::LeasesLost, &LEASES_LOST);
        shown.show_counts(Metric::AuditLines, "event", &AUDIT_LINES);
        count(Metric::SlowConsumers, &SLOW_CONSUMERS);
        count(Metric::BusConnections, &BUS_CONNECTIONS);
        count(Metric::BusDisconnections, &BUS_DISCONNECTIONS);
        count(Metric::StoreCheckouts, &STORE_POOL.failures);
        shown.show_counts(Metric::Refused, "reason", &REFUSED);
        shown.show_counts(Metric::Integrity, "kind", &INTEGRITY);
        shown.show_counts(Metric::BusErrors, "kind", &BUS_TROUBLES);
        shown.show_all(Metric::StoreOperations, |samples| {
            for (work, ends) in StoreWork::ALL.iter().zip(&STORE_ENDS) {
                for end in StoreEnd::ALL {
                    let labels = [("operation", work.as_str()), ("outcome", end.as_str())];
                    samples.count(&labels, ends.get(*end));
                }
            }
        });
        shown.show_all(Metric::StoreDuration, |samples| {
            for work in StoreWork::ALL {
                samples.histogram(&[("operation", work.as_str())], STORE_TIMES.of(*work));
            }
        });
        let load = |gauge: &AtomicU64| gauge.load(Relaxed) as f64;
        shown.show(Metric::StoreRunning, move || load(&STORE_RUNNING));
        shown.show(Metric::StoreConnectionsLimit, move || load(&STORE_POOL.limit));
        shown.show_all(Metric::StoreConnections, move |samples| {
            let (open, in_use) = (STORE_POOL.open.load(Relaxed), STORE_POOL.in_use.load(Relaxed).max(0));
            // The two are read one after the other.
            samples.value(&[("state", Pooled::Idle.as_str())], (open - in_use).max(0) as f64);
            samples.value(&[("state", Pooled::InUse.as_str())], in_use as f64);
        });
        process::show(&shown);
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_there_from_the_start_under_names_that_prometheus_takes() {
        let exposition = Exposition::default();
        exposition.show_count(Metric::GatewayCallsLimit, || 16_384);
        exposition.show(Metric::WorkerWait, || 0.25);
        let text = exposition.text().unwrap();
        for limit in Limit::ALL {
            let line = format!("mcp_refused_total{{reason=\"{}\"}} ", limit.as_str());
            assert!(text.contains(&line), "{text}");
        }
        for kind in CryptoErrorKind::ALL {
            let line = format!("mcp_integrity_failures_total{{kind=\"{kind}\"}} ");
            assert!(text.contains(&line), "{text}");
        }
        for line in [
            "mcp_gateway_calls_limit 16384.0",
            "mcp_worker_longest_wait_seconds 0.25",
            "mcp_bus_slow_consumers_total ",
            "mcp_store_operations_total{operation=\"ping\",outcome=\"unavailable\"} ",
            "mcp_store_operation_duration_seconds_bucket{le=\"0.0005\",operation=\"lease\"} ",
            "mcp_store_operation_duration_seconds_bucket{le=\"+Inf\",operation=\"lease\"} ",
            "mcp_store_operation_duration_seconds_count{operation=\"lease\"} ",
            "process_cpu_seconds_total ",
        ] {
            assert!(text.contains(&format!("\n{line}")), "{line}: {text}");
        }
        assert!(text.ends_with("# EOF\n"));
        let always = |metric: &&Metric| metric.nodes() == Nodes::All;
        let missing: Vec<_> = Metric::ALL
            .iter()
            .filter(always)
            .filter(|metric| !exposition.metrics().contains(metric))
            .collect();
        assert_eq!(missing, Vec::<&Metric>::new());
    }

    #[tokio::test]
    async fn operations_of_the_store_are_counted_by_what_came_of_them() {
        let count = |end| STORE_ENDS[StoreWork::Lease.index()].get(end);
        let _ = of_store(StoreWork::Lease, async { Ok(()) }).await;
        let _ = of_store::<()>(StoreWork::Lease, async { Err(StoreError::Conflict) }).await;
        assert!(count(StoreEnd::Ok) >= 1 && count(StoreEnd::Conflict) >= 1);
    }
}
