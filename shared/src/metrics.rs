//! What a node counts, and how it is shown to Prometheus.
//!
//! Counts are the process's: whatever counts need not be handed anything. What is true at a moment, such as calls in
//! flight, is read when somebody asks. No label has a user's or a server's name: what names can be is not bounded.

use std::{fmt, sync::LazyLock};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::Counter, family::Family, gauge::ConstGauge},
    registry::Registry,
};

use crate::crypter::CryptoErrorKind;

/// The media type of [`Exposition::text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What every name begins with.
const PREFIX: &str = "mcp";

macro_rules! limits {
    ($($variant:ident = $text:literal, $meaning:literal;)*) => {
        /// A limit that a call, or a client, can meet. The set is closed: it is the values of a label.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Limit {
            $(#[doc = $meaning] $variant,)*
        }

        impl Limit {
            /// All of them.
            pub const ALL: &'static [Limit] = &[$(Limit::$variant,)*];

            /// As the label has it.
            pub fn as_str(self) -> &'static str {
                match self { $(Limit::$variant => $text,)* }
            }
        }
    };
}

limits! {
    Connections = "gateway_connections", "Connections to a gateway (`MAX_CONNECTIONS`).";
    GatewayCalls = "gateway_calls", "Calls in flight at a gateway (`MAX_CALLS`).";
    GatewayBodies = "gateway_body_bytes", "Bytes of request bodies in flight at a gateway (`MAX_BODY_BYTES`).";
    UserCalls = "user_calls", "Calls in flight of one user (`USER_MAX_CALLS`).";
    UserRate = "user_rate", "Calls per second of one user (`USER_MAX_RATE`).";
    WorkerCalls = "worker_calls", "Calls that one worker looks after (`WORKER_MAX_CALLS`).";
    ServerQueue = "server_queue", "Calls that wait for a free slot of one server (`SERVER_QUEUE`).";
    Crowd = "crowd", "Calls that a gateway refused by itself: workers refused many of their server within a second, one of them less than 50 ms ago.";
    ServiceCalls = "service_calls", "Calls of services on NATS that one worker sees to.";
}

type Label = [(&'static str, &'static str); 1];

struct Counts {
    refused: Family<Label, Counter>,
    progress_dropped: Counter,
    slow_consumers: Counter,
    bus_connections: Counter,
    integrity_failures: Family<Label, Counter>,
    audit_dropped: Counter,
    audit_failures: Counter,
    tool_changes: Counter,
    exported_spans: Counter,
    lost_spans: Family<Label, Counter>,
}

/// Why a span did not get to the collector of traces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanLoss {
    /// More came than could be sent.
    QueueFull,
    /// The collector could not be reached, or did not take the batch.
    Failed,
    /// The collector took the batch, but not this.
    Rejected,
}

impl SpanLoss {
    /// All of them.
    pub const ALL: &'static [SpanLoss] = &[SpanLoss::QueueFull, SpanLoss::Failed, SpanLoss::Rejected];

    /// As the label has it.
    pub fn as_str(self) -> &'static str {
        match self {
            SpanLoss::QueueFull => "queue_full",
            SpanLoss::Failed => "export_failed",
            SpanLoss::Rejected => "rejected",
        }
    }
}

static COUNTS: LazyLock<Counts> = LazyLock::new(|| {
    let refused = Family::<Label, Counter>::default();
    for limit in Limit::ALL {
        // What never happened is shown as 0, so that its first time is seen as a change.
        let _ = refused.get_or_create(&[("reason", limit.as_str())]);
    }
    let integrity_failures = Family::<Label, Counter>::default();
    for kind in CryptoErrorKind::ALL {
        let _ = integrity_failures.get_or_create(&[("kind", kind.as_str())]);
    }
    let lost_spans = Family::<Label, Counter>::default();
    for loss in SpanLoss::ALL {
        let _ = lost_spans.get_or_create(&[("reason", loss.as_str())]);
    }
    Counts {
        refused,
        progress_dropped: Counter::default(),
        slow_consumers: Counter::default(),
        bus_connections: Counter::default(),
        integrity_failures,
        audit_dropped: Counter::default(),
        audit_failures: Counter::default(),
        tool_changes: Counter::default(),
        exported_spans: Counter::default(),
        lost_spans,
    }
});

/// A call, or a connection, was refused because of a limit.
pub fn count_refusal(limit: Limit) {
    COUNTS.refused.get_or_create(&[("reason", limit.as_str())]).inc();
}

/// A progress event was dropped because its reader was slow.
pub fn count_dropped_progress() {
    COUNTS.progress_dropped.inc();
}

/// A message of the bus was lost because it came faster than messages were read.
pub fn count_slow_consumer() {
    COUNTS.slow_consumers.inc();
}

/// The bus was connected to, for the first time or again.
pub fn count_bus_connection() {
    COUNTS.bus_connections.inc();
}

/// A stored value could not be opened: it was changed or moved, or its key is not here.
pub fn count_integrity_failure(kind: CryptoErrorKind) {
    COUNTS.integrity_failures.get_or_create(&[("kind", kind.as_str())]).inc();
}

/// Lines of the audit log were dropped, because they came faster than they were written, or could not be.
pub fn count_audit_dropped(lines: u64) {
    COUNTS.audit_dropped.inc_by(lines);
}

/// Lines of the audit log could not be written.
pub fn count_audit_failure() {
    COUNTS.audit_failures.inc();
}

/// A server listed tools otherwise than before, with nothing changed in its record.
pub fn count_tool_change() {
    COUNTS.tool_changes.inc();
}

/// Spans got to the collector of traces.
pub fn count_exported_spans(spans: u64) {
    COUNTS.exported_spans.inc_by(spans);
}

/// Spans did not.
pub fn count_lost_spans(loss: SpanLoss, spans: u64) {
    COUNTS.lost_spans.get_or_create(&[("reason", loss.as_str())]).inc_by(spans);
}

/// What one node shows.
pub struct Exposition {
    registry: Registry,
}

impl Default for Exposition {
    fn default() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let counts = &*COUNTS;
        registry.register(
            "refused",
            "Calls and connections that were refused because of a limit",
            counts.refused.clone(),
        );
        registry.register(
            "progress_dropped",
            "Progress events that were dropped because their readers were slow",
            counts.progress_dropped.clone(),
        );
        registry.register(
            "bus_slow_consumers",
            "Messages from NATS that were lost because they came faster than they were read",
            counts.slow_consumers.clone(),
        );
        registry.register(
            "bus_connections",
            "Connections to NATS that were made",
            counts.bus_connections.clone(),
        );
        registry.register(
            "integrity_failures",
            "Stored values that could not be decrypted, because they were changed or moved, or their key is not here",
            counts.integrity_failures.clone(),
        );
        registry.register(
            "audit_dropped",
            "Lines of the audit log that were dropped",
            counts.audit_dropped.clone(),
        );
        registry.register(
            "audit_failures",
            "Attempts to write the audit log that failed",
            counts.audit_failures.clone(),
        );
        registry.register(
            "tool_changes",
            "Servers that listed tools otherwise than before, with nothing changed in their records",
            counts.tool_changes.clone(),
        );
        registry.register(
            "trace_spans_exported",
            "Spans that the collector of traces took",
            counts.exported_spans.clone(),
        );
        registry.register(
            "trace_spans_dropped",
            "Spans that did not get to the collector of traces",
            counts.lost_spans.clone(),
        );
        Self { registry }
    }
}

impl Exposition {
    /// Shows a value that is read whenever somebody asks. `name` has its unit at the end, and no prefix.
    pub fn show(
        &mut self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> f64 + Send + Sync + 'static,
    ) {
        self.registry.register_collector(Box::new(Reading { name, help, read }));
    }

    /// Shows a number that can be told without loss, as counts below 2^53 can.
    pub fn show_count(
        &mut self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> usize + Send + Sync + 'static,
    ) {
        self.show(name, help, move || read() as f64);
    }

    /// Everything as text, in the format of OpenMetrics.
    pub fn text(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry)?;
        Ok(out)
    }
}

struct Reading<F> {
    name: &'static str,
    help: &'static str,
    read: F,
}

impl<F> fmt::Debug for Reading<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl<F: Fn() -> f64 + Send + Sync + 'static> Collector for Reading<F> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let metric = encoder.encode_descriptor(self.name, self.help, None, MetricType::Gauge)?;
        ConstGauge::new((self.read)()).encode(metric)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_there_from_the_start_under_names_that_prometheus_takes() {
        let mut exposition = Exposition::default();
        exposition.show_count("gateway_calls_limit", "Calls", || 16_384);
        exposition.show("worker_longest_wait_seconds", "Wait", || 0.25);
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
        ] {
            assert!(text.contains(&format!("\n{line}")), "{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
