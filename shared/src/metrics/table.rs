//! Every metric there is. What is not in this table cannot be shown, and what is in it is documented: the README's table
//! is made of it, and tests hold what running nodes show against it, and dashboard and alerts against both.

use prometheus_client::{metrics::MetricType, registry::Unit};

use super::labels::{
    BusTrouble, CallEnd, Carrier, Direction, Gone, JobEnd, JobWork, Limit, Pooled, Refreshed, Reply,
    SecretSource, SpanLoss, Stage, Started, Status, StatusClass, StoreEnd, StoreWork,
};
use crate::{audit::Event, crypter::CryptoErrorKind, error::ErrorCode};

/// A label's values: a closed set.
pub trait Closed: Copy + 'static {
    /// All of them.
    fn all() -> &'static [Self];

    /// Its place among all.
    fn index(self) -> usize;

    /// As the label has it.
    fn text(self) -> &'static str;
}

/// All values, as the label has them.
fn texts<L: Closed>() -> Vec<&'static str> {
    L::all().iter().map(|value| value.text()).collect()
}

/// What a metric tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A number that only grows; its name ends with `_total`.
    Counter,
    /// What is true at this moment.
    Gauge,
    /// How often something was how large: `_bucket`, `_sum` and `_count`.
    Histogram,
}

impl Kind {
    /// In one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// Which nodes show a metric. A program alone is a gateway and a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nodes {
    /// Gateways.
    Gateways,
    /// Gateways, where there is such a setting.
    GatewaysIfSet,
    /// Workers.
    Workers,
    /// All.
    All,
    /// All of a cluster.
    Cluster,
}

impl Nodes {
    /// In a few words.
    pub fn as_str(self) -> &'static str {
        match self {
            Nodes::Gateways => "gateways",
            Nodes::GatewaysIfSet => "gateways, where it is set",
            Nodes::Workers => "workers",
            Nodes::All => "all",
            Nodes::Cluster => "all of a cluster",
        }
    }
}

/// A label, and what it can say.
#[derive(Debug, Clone, Copy)]
pub struct Label {
    /// Its name.
    pub name: &'static str,
    /// Its values; `None` where the program's own tables have them: routes, methods, its version.
    pub values: Option<fn() -> Vec<&'static str>>,
}

const fn label<L: Closed>(name: &'static str) -> Label {
    Label { name, values: Some(texts::<L>) }
}

const fn own(name: &'static str) -> Label {
    Label { name, values: None }
}

const SECONDS: Option<Unit> = Some(Unit::Seconds);
const BYTES: Option<Unit> = Some(Unit::Bytes);
const NONE: Option<Unit> = None;

macro_rules! metrics {
    ($($variant:ident = $name:literal, $kind:ident, $unit:ident, [$($label:expr),*], $nodes:ident, $help:literal;)*) => {
        /// A metric.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Metric {
            $(#[doc = $help] $variant,)*
        }

        impl Metric {
            /// All of them, as they are shown.
            pub const ALL: &'static [Metric] = &[$(Metric::$variant,)*];

            /// Its name, without unit and without what its kind appends.
            pub(super) fn stem(self) -> &'static str {
                match self { $(Metric::$variant => $name,)* }
            }

            /// What it tells.
            pub fn kind(self) -> Kind {
                match self { $(Metric::$variant => Kind::$kind,)* }
            }

            pub(super) fn unit(self) -> Option<Unit> {
                match self { $(Metric::$variant => $unit,)* }
            }

            /// Its labels.
            pub fn labels(self) -> Vec<Label> {
                match self { $(Metric::$variant => vec![$($label,)*],)* }
            }

            /// Who shows it.
            pub fn nodes(self) -> Nodes {
                match self { $(Metric::$variant => Nodes::$nodes,)* }
            }

            /// What it means.
            pub fn help(self) -> &'static str {
                match self { $(Metric::$variant => $help,)* }
            }
        }
    };
}

metrics! {
    // What comes in.
    HttpRequests = "mcp_http_requests", Counter, NONE, [own("method"), own("route"), label::<StatusClass>("status")], Gateways, "Requests that were answered, by the pattern of the route; `other` is what no route has";
    HttpDuration = "mcp_http_request_duration", Histogram, SECONDS, [own("method"), own("route")], Gateways, "Time from a request's head to that of its answer";
    Errors = "mcp_errors", Counter, NONE, [label::<ErrorCode>("code")], Gateways, "Answers with an error, by its code, those at the end of an event stream among them";
    Calls = "mcp_calls", Counter, NONE, [label::<CallEnd>("outcome")], Gateways, "Calls of tools over HTTP that are over";
    CallDuration = "mcp_call_duration", Histogram, SECONDS, [label::<Reply>("reply")], Gateways, "Time of a call at the gateway, from its head to its end";
    CallBody = "mcp_call_body", Histogram, BYTES, [label::<Direction>("direction")], Gateways, "Size of bodies of calls (`in`) and of results (`out`)";
    GatewayCalls = "mcp_gateway_calls", Gauge, NONE, [], Gateways, "Calls in flight";
    GatewayCallsLimit = "mcp_gateway_calls_limit", Gauge, NONE, [], Gateways, "Calls that may be in flight (`MAX_CALLS`)";
    GatewayConnections = "mcp_gateway_connections", Gauge, NONE, [], Gateways, "Connections of clients";
    GatewayConnectionsLimit = "mcp_gateway_connections_limit", Gauge, NONE, [], Gateways, "Connections of clients that are served at once (`MAX_CONNECTIONS`)";
    GatewayBody = "mcp_gateway_body", Gauge, BYTES, [], Gateways, "Bytes of request bodies in memory, those of calls until they are over, in whole kibibytes";
    GatewayBodyLimit = "mcp_gateway_body_limit", Gauge, BYTES, [], Gateways, "Bytes of request bodies that may be in memory (`MAX_BODY_BYTES`)";
    UserCallsLimit = "mcp_user_calls_limit", Gauge, NONE, [], GatewaysIfSet, "Calls that one user may have in flight (`USER_MAX_CALLS`)";
    UserRateLimit = "mcp_user_rate_limit", Gauge, NONE, [], GatewaysIfSet, "Calls that one user may make in a second (`USER_MAX_RATE`)";
    CertificateEnd = "mcp_tls_certificate_expiry_timestamp", Gauge, SECONDS, [], GatewaysIfSet, "When the certificate in use ends, since 1970 (`TLS_CERT_FILE`)";
    Refused = "mcp_refused", Counter, NONE, [label::<Limit>("reason")], All, "Calls and connections that were refused because of a limit. A cluster refuses a call of a full worker only when no other has room, so that `worker_calls` and `server_queue` may be more than callers saw";
    // What workers do.
    WorkerCalls = "mcp_worker_calls", Gauge, NONE, [], Workers, "Calls that the worker looks after, running and waiting";
    WorkerCallsLimit = "mcp_worker_calls_limit", Gauge, NONE, [], Workers, "Calls that the worker looks after at once (`WORKER_MAX_CALLS`)";
    WorkerRunning = "mcp_worker_running_calls", Gauge, NONE, [], Workers, "Calls that hold a slot of a server";
    WorkerWaiting = "mcp_worker_waiting_calls", Gauge, NONE, [], Workers, "Calls that wait for a slot of a server";
    WorkerSlots = "mcp_worker_slots", Gauge, NONE, [], Workers, "Slots of the servers that run, or should: calls that these may have in flight";
    WorkerWait = "mcp_worker_longest_wait", Gauge, SECONDS, [], Workers, "How long the call waits that waits longest for a slot; where none does, how long the last one had to that got its slot within the last second";
    ServerQueueLimit = "mcp_server_queue_limit", Gauge, NONE, [], Workers, "Calls that may wait for a slot of one server (`SERVER_QUEUE`)";
    WorkerDraining = "mcp_worker_draining", Gauge, NONE, [], Workers, "1 from when the worker takes no more calls, because it leaves";
    ServerCalls = "mcp_server_calls", Counter, NONE, [label::<CallEnd>("outcome")], Workers, "Calls that the worker took in and that are over, those of services on NATS among them";
    ServerErrors = "mcp_server_call_errors", Counter, NONE, [label::<ErrorCode>("code")], Workers, "Calls that the worker took in and that ended with an error, by its code";
    StageDuration = "mcp_call_stage_duration", Histogram, SECONDS, [label::<Stage>("stage"), label::<Carrier>("transport")], Workers, "Time of a call in each of its stages; one that comes to nothing in a stage has its time there, too";
    Replayed = "mcp_calls_replayed", Counter, NONE, [], Workers, "Calls that were answered with what came of them when they were made for the first time (`Idempotency-Key`)";
    CancelsIgnored = "mcp_cancels_ignored", Counter, NONE, [], Workers, "Calls that were cancelled and that the server did not give up in time";
    BrowserStarts = "mcp_browser_starts", Counter, NONE, [], Workers, "Starts of the browser that renders pages for the built-in get_url_content";
    BrowserPages = "mcp_browser_pages", Gauge, NONE, [], Workers, "Pages that it has open";
    SecretReads = "mcp_secret_reads", Counter, NONE, [label::<SecretSource>("source")], Workers, "Looks at a user's secrets for a server, by where they came from";
    TokenRefreshes = "mcp_token_refreshes", Counter, NONE, [label::<Refreshed>("result")], Workers, "Refreshes of users' tokens for remote servers";
    Servers = "mcp_servers", Gauge, NONE, [label::<Status>("status")], Workers, "Servers that are registered, by what they do at this worker";
    ServerInstances = "mcp_server_instances", Gauge, NONE, [label::<Carrier>("transport")], Workers, "Processes of servers that run (`stdio`), and connections to remote ones (`http`)";
    ServerStarts = "mcp_server_starts", Counter, NONE, [label::<Carrier>("transport"), label::<Started>("result")], Workers, "Starts of processes, and connections that were made";
    ServerStartDuration = "mcp_server_start_duration", Histogram, SECONDS, [label::<Carrier>("transport")], Workers, "Time from the beginning of a start to the server's tools, or to its failure";
    ServerExits = "mcp_server_exits", Counter, NONE, [label::<Gone>("reason")], Workers, "Ends of what had started";
    ToolChanges = "mcp_tool_changes", Counter, NONE, [], All, "How often a server listed tools otherwise than before, with nothing changed in its record";
    ProgressDropped = "mcp_progress_dropped", Counter, NONE, [], All, "Progress events that were dropped because their readers were slow";
    LogDropped = "mcp_log_dropped", Counter, NONE, [], All, "Lines of the log that were dropped because their reader was slow";
    SpansExported = "mcp_trace_spans_exported", Counter, NONE, [], All, "Spans that the collector of traces took";
    SpansDropped = "mcp_trace_spans_dropped", Counter, NONE, [label::<SpanLoss>("reason")], All, "Spans that the collector of traces did not get";
    Jobs = "mcp_install_jobs", Counter, NONE, [label::<JobWork>("kind"), label::<JobEnd>("outcome")], Workers, "Turns of this worker at jobs, by what came of them";
    JobDuration = "mcp_install_job_duration", Histogram, SECONDS, [label::<JobWork>("kind")], Workers, "Time of a turn at a job";
    JobsRunning = "mcp_install_jobs_running", Gauge, NONE, [], Workers, "Jobs that this worker is at";
    // What they stand on.
    StoreOperations = "mcp_store_operations", Counter, NONE, [label::<StoreWork>("operation"), label::<StoreEnd>("outcome")], All, "Operations of the store";
    StoreDuration = "mcp_store_operation_duration", Histogram, SECONDS, [label::<StoreWork>("operation")], All, "Time of an operation of the store, waiting for its turn included";
    StoreRunning = "mcp_store_operations_running", Gauge, NONE, [], All, "Operations of the store that run or wait";
    StoreConnections = "mcp_store_connections", Gauge, NONE, [label::<Pooled>("state")], All, "Connections to MongoDB; the embedded store has none";
    StoreConnectionsLimit = "mcp_store_connections_limit", Gauge, NONE, [], All, "Connections to MongoDB that there may be";
    StoreCheckouts = "mcp_store_checkout_failures", Counter, NONE, [], All, "Operations that got no connection to MongoDB";
    BusConnected = "mcp_bus_connected", Gauge, NONE, [], Cluster, "1 while the node is connected to NATS and hears itself";
    BusMessages = "mcp_bus_messages", Counter, NONE, [label::<Direction>("direction")], Cluster, "Messages that came from NATS and went there";
    BusPayload = "mcp_bus_payload", Counter, BYTES, [label::<Direction>("direction")], Cluster, "Bytes of these messages";
    BusConnections = "mcp_bus_connections", Counter, NONE, [], All, "Connections to NATS that were made";
    BusDisconnections = "mcp_bus_disconnections", Counter, NONE, [], All, "Connections to NATS that were lost";
    BusErrors = "mcp_bus_errors", Counter, NONE, [label::<BusTrouble>("kind")], All, "What went wrong with NATS";
    SlowConsumers = "mcp_bus_slow_consumers", Counter, NONE, [], All, "Messages from NATS that were lost because they came faster than they were read, at least; a worker that lost any takes no calls until it has read everything again";
    FleetWorkers = "mcp_fleet_workers", Gauge, NONE, [], Cluster, "Workers that this node hears and that stay";
    WorkersLost = "mcp_fleet_workers_lost", Counter, NONE, [], All, "Workers that this node took for lost while it had calls with them";
    LeasesLost = "mcp_leases_lost", Counter, NONE, [], All, "How often this worker could not show in time that it lives, and gave up what may run only once";
    Integrity = "mcp_integrity_failures", Counter, NONE, [label::<CryptoErrorKind>("kind")], All, "Stored values that could not be decrypted, because they were changed or moved, or their key is not here";
    AuditLines = "mcp_audit_lines", Counter, NONE, [label::<Event>("event")], All, "Lines of the audit log that were written";
    AuditDropped = "mcp_audit_dropped", Counter, NONE, [], All, "Lines of the audit log that were dropped: of refused requests and of calls; never those of changes";
    AuditFailures = "mcp_audit_failures", Counter, NONE, [], All, "Attempts to write the audit log that failed";
    // The process itself.
    BuildInfo = "mcp_build_info", Gauge, NONE, [own("version")], All, "1; the label says which version runs";
    RuntimeThreads = "mcp_runtime_threads", Gauge, NONE, [], All, "Threads that run tasks";
    RuntimeBusy = "mcp_runtime_busy", Counter, SECONDS, [], All, "Time that these threads were busy, added up";
    RuntimeTasks = "mcp_runtime_tasks", Gauge, NONE, [], All, "Tasks that are alive";
    RuntimeQueue = "mcp_runtime_queue", Gauge, NONE, [], All, "Tasks that are ready and that no thread has taken up yet";
    ProcessCpu = "process_cpu", Counter, SECONDS, [], All, "Time on processors, servers not included";
    ProcessMemory = "process_resident_memory", Gauge, BYTES, [], All, "Memory, servers not included";
    ProcessFiles = "process_open_fds", Gauge, NONE, [], All, "Open files, connections among them";
    ProcessFilesLimit = "process_max_fds", Gauge, NONE, [], All, "Files that may be open";
    ProcessStart = "process_start_time", Gauge, SECONDS, [], All, "When the process started, since 1970";
}

impl Metric {
    /// Its name in rules and dashboards, as far as it is one: histograms append `_bucket`, `_sum` and `_count` to it.
    pub fn name(self) -> String {
        let mut name = self.stem().to_owned();
        if let Some(unit) = self.unit() {
            name.push('_');
            name.push_str(unit.as_str());
        }
        if self.kind() == Kind::Counter {
            name.push_str("_total");
        }
        name
    }

    /// Every name that a time series of it can have.
    pub fn series(self) -> Vec<String> {
        let name = self.name();
        match self.kind() {
            Kind::Counter | Kind::Gauge => vec![name],
            Kind::Histogram => ["bucket", "sum", "count"].map(|part| format!("{name}_{part}")).to_vec(),
        }
    }

    pub(super) fn metric_type(self) -> MetricType {
        match self.kind() {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
            Kind::Histogram => MetricType::Histogram,
        }
    }
}

/// The table of the README.
pub fn markdown_table() -> String {
    let mut table = "| metric | kind | where | meaning |\n|---|---|---|---|\n".to_owned();
    for metric in Metric::ALL {
        let labels: Vec<_> = metric.labels().iter().map(|label| label.name).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let (name, kind) = (metric.name(), metric.kind().as_str());
        let (nodes, help) = (metric.nodes().as_str(), metric.help());
        table.push_str(&format!("| `{name}{labels}` | {kind} | {nodes} | {help} |\n"));
    }
    table
}

/// The table of the README of what labels say.
pub fn markdown_labels() -> String {
    let mut table = "| label | of | value | meaning |\n|---|---|---|---|\n".to_owned();
    let mut add = |label: &str, of: Metric, values: Vec<(&str, &str)>| {
        for (value, meaning) in values {
            table.push_str(&format!("| `{label}` | `{}` | `{value}` | {meaning} |\n", of.name()));
        }
    };
    macro_rules! add {
        ($($metric:ident $label:literal $values:ident,)*) => {$(
            let values = $values::ALL.iter().map(|value| (value.as_str(), value.meaning())).collect();
            add($label, Metric::$metric, values);
        )*};
    }
    add! {
        Calls "outcome" CallEnd,
        StageDuration "stage" Stage,
        StageDuration "transport" Carrier,
        Servers "status" Status,
        ServerExits "reason" Gone,
        Refused "reason" Limit,
        Jobs "outcome" JobEnd,
        StoreOperations "operation" StoreWork,
        StoreOperations "outcome" StoreEnd,
        BusErrors "kind" BusTrouble,
        SpansDropped "reason" SpanLoss,
        SecretReads "source" SecretSource,
        TokenRefreshes "result" Refreshed,
    }
    table
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_as_prometheus_wants_them() {
        let mut series = BTreeSet::new();
        for metric in Metric::ALL {
            let name = metric.name();
            assert!(name.starts_with("mcp_") || name.starts_with("process_"), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            assert!(!metric.stem().ends_with("_total"), "{name} says it twice");
            assert!(metric.help().len() < 300 && !metric.help().ends_with('.'), "{name}");
            for one in metric.series() {
                assert!(series.insert(one.clone()), "two metrics have {one}");
            }
            for label in metric.labels() {
                let values = label.values.map(|values| values()).unwrap_or_default();
                assert_eq!(
                    values.iter().collect::<BTreeSet<_>>().len(),
                    values.len(),
                    "{name} {}",
                    label.name
                );
                assert!(!["le", "quantile", "job", "instance"].contains(&label.name), "{name}");
            }
        }
        // The families' names, without what kinds append, differ as well.
        let families: BTreeSet<_> =
            Metric::ALL.iter().map(|metric| metric.name().replace("_total", "")).collect();
        assert_eq!(families.len(), Metric::ALL.len());
    }

    /// What a fleet keeps for each node in Prometheus.
    #[test]
    fn the_number_of_time_series_is_bounded() {
        let mut all = 0;
        for metric in Metric::ALL {
            // Some 45 routes.
            let of = |label: &Label| match (label.name, label.values) {
                (_, Some(values)) => values().len(),
                ("route", None) => 50,
                _ => 1,
            };
            let series: usize = metric.labels().iter().map(of).product();
            all += series * if metric.kind() == Kind::Histogram { 22 } else { 1 };
        }
        assert!(all < 4_000, "{all}");
    }

    #[test]
    fn places_of_labels_are_those_of_their_values() {
        fn check<L: Closed>() {
            assert!(L::all().iter().enumerate().all(|(at, value)| value.index() == at));
        }
        check::<ErrorCode>();
        check::<CryptoErrorKind>();
        check::<Limit>();
        check::<Gone>();
        check::<Event>();
    }
}
