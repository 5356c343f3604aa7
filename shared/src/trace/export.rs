//! The way of spans out: a queue with an end, and a task that sends batches of it to a collector by OTLP over HTTP.
//! Whatever becomes of that, nobody waits for it: what does not fit or is not taken is dropped and counted.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span, Status, span::SpanKind, status::StatusCode},
};
use prost::Message;
use reqwest::{
    Client, Response,
    header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER},
    redirect::Policy,
};
use tokio::{
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{
    Sampler,
    span::{Kind, Record, Tracer, Value, install},
};
use crate::{
    lifecycle::explain,
    limits,
    metrics::{self, SpanLoss},
    tls,
};

/// The first pause before a batch is sent again, which doubles.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Bytes of a collector's answer that are read.
const ANSWER_BYTES: usize = 64 * 1024;
/// The flags of an exported span: that it is known whether its parent is remote, and that it is.
const HAS_REMOTE: u32 = 0x100;
const IS_REMOTE: u32 = 0x200;

/// How spans are exported.
#[derive(Debug, Clone)]
pub struct Export {
    /// The address that batches are posted to.
    pub endpoint: Url,
    /// Headers of each request; their values are credentials.
    pub headers: HeaderMap,
    /// How long sending a batch may take, with all that is tried again.
    pub timeout: Duration,
    /// Which traces are recorded.
    pub sampler: Sampler,
    /// What is said of this program, where the settings say it: `service.name` and others.
    pub resource: Vec<(String, String)>,
    /// Spans that may wait.
    pub queue: usize,
    /// Spans that are sent together.
    pub batch: usize,
    /// How long they may wait for more.
    pub delay: Duration,
}

/// Spans that wait.
#[derive(Debug)]
pub(super) struct Queue {
    waiting: Mutex<VecDeque<Box<Record>>>,
    most: usize,
    batch: usize,
    full_batch: Notify,
    closed: AtomicBool,
}

impl Queue {
    pub fn new(most: usize, batch: usize) -> Self {
        let waiting = Mutex::new(VecDeque::with_capacity(most.min(1_024)));
        Self { waiting, most, batch, full_batch: Notify::new(), closed: AtomicBool::new(false) }
    }

    /// Takes a span in, if there is room.
    pub fn push(&self, record: Box<Record>) {
        let waiting = {
            let mut waiting = self.waiting();
            if waiting.len() >= self.most || self.closed.load(Ordering::Relaxed) {
                None
            } else {
                waiting.push_back(record);
                Some(waiting.len())
            }
        };
        match waiting {
            None => metrics::count_lost_spans(SpanLoss::QueueFull, 1),
            // The one that fills it tells, and no other.
            Some(waiting) if waiting == self.batch => self.full_batch.notify_one(),
            Some(_) => {}
        }
    }

    fn take(&self) -> Vec<Record> {
        let mut waiting = self.waiting();
        let count = waiting.len().min(self.batch);
        waiting.drain(..count).map(|record| *record).collect()
    }

    /// Takes nothing in any more. Returned is how many were still there.
    fn close(&self) -> usize {
        let mut waiting = self.waiting();
        self.closed.store(true, Ordering::Relaxed);
        std::mem::take(&mut *waiting).len()
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Box<Record>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The export of one process.
#[derive(Debug, Default)]
pub struct Traces(Option<Running>);

#[derive(Debug)]
struct Running {
    queue: Arc<Queue>,
    closing: CancellationToken,
    task: JoinHandle<()>,
}

/// Begins to export what is recorded from now on, if the settings name a collector. `service` is what this program is
/// called, unless the settings call it otherwise, and `instance` this process.
pub fn open(settings: Option<&Export>, service: &'static str, instance: &str) -> Traces {
    let Some(settings) = settings else { return Traces(None) };
    tls::install_provider();
    let client = Client::builder()
        .user_agent(concat!("mcp-api/", env!("CARGO_PKG_VERSION")))
        .no_proxy()
        .redirect(Policy::none())
        .connect_timeout(settings.timeout)
        .build();
    let client = match client {
        Ok(client) => client,
        Err(error) => {
            tracing::error!(error.cause = %explain(&error), "traces are not exported: no TLS client");
            return Traces(None);
        }
    };
    let queue = Arc::new(Queue::new(settings.queue, settings.batch));
    if !install(Tracer { sampler: settings.sampler, queue: Arc::clone(&queue) }) {
        return Traces(None);
    }
    let exporter = Exporter {
        settings: settings.clone(),
        client,
        resource: resource(settings, service, instance),
        queue: Arc::clone(&queue),
        closing: CancellationToken::new(),
        failing: false,
    };
    tracing::info!(endpoint = %settings.endpoint, sampler = ?settings.sampler, "traces are exported");
    let closing = exporter.closing.clone();
    Traces(Some(Running { queue, closing, task: tokio::spawn(exporter.run()) }))
}

impl Traces {
    /// Sends what is still there, as far as that can be done soon.
    pub async fn close(self) {
        let Some(Running { queue, closing, mut task }) = self.0 else { return };
        closing.cancel();
        if tokio::time::timeout(limits::TRACES_FAREWELL, &mut task).await.is_err() {
            task.abort();
        }
        let left = queue.close();
        if left > 0 {
            metrics::count_lost_spans(SpanLoss::Failed, u64::try_from(left).unwrap_or(u64::MAX));
            tracing::warn!(spans = left, "the last spans were not exported");
        }
    }
}

/// What is said of this process with every batch. Who sets the same in `OTEL_RESOURCE_ATTRIBUTES` knows better.
fn resource(settings: &Export, service: &str, instance: &str) -> Resource {
    let ours = [
        ("service.name", service),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("service.instance.id", instance),
    ];
    let ours = ours.into_iter().filter(|(key, _)| settings.resource.iter().all(|(other, _)| other != key));
    let theirs = settings.resource.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let attributes = ours
        .chain(theirs)
        .map(|(key, value)| pair(key, any_value::Value::StringValue(value.to_owned())))
        .collect();
    Resource { attributes, ..Resource::default() }
}

struct Exporter {
    settings: Export,
    client: Client,
    resource: Resource,
    queue: Arc<Queue>,
    closing: CancellationToken,
    /// The last batch was not taken. That is logged once, and not with each of thousands.
    failing: bool,
}

/// Why a batch was not taken.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("HTTP status {0}")]
    Status(u16),
    #[error("it did not answer in time")]
    Late,
    #[error("{0}")]
    Lost(String),
}

impl Exporter {
    async fn run(mut self) {
        loop {
            let closing = tokio::select! {
                () = self.queue.full_batch.notified() => false,
                () = sleep(self.settings.delay) => false,
                () = self.closing.cancelled() => true,
            };
            loop {
                let batch = self.queue.take();
                if batch.is_empty() {
                    break;
                }
                let whole = batch.len() == self.settings.batch;
                self.export(batch).await;
                if !whole {
                    break;
                }
            }
            if closing {
                return;
            }
        }
    }

    async fn export(&mut self, batch: Vec<Record>) {
        let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        let body = self.request(batch).encode_to_vec();
        match self.send(body.into()).await {
            Ok(rejected) => {
                let rejected = rejected.min(count);
                metrics::count_exported_spans(count - rejected);
                if rejected > 0 {
                    metrics::count_lost_spans(SpanLoss::Rejected, rejected);
                }
                if std::mem::take(&mut self.failing) {
                    tracing::info!("spans are exported again");
                }
            }
            Err(refused) => {
                metrics::count_lost_spans(SpanLoss::Failed, count);
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(error.cause = %refused, "spans cannot be exported, and are dropped");
                }
            }
        }
    }

    /// Sends a batch, again and again while that may help and there is time. Returned is how many spans of it the
    /// collector did not want.
    async fn send(&self, body: bytes::Bytes) -> Result<u64, Refused> {
        let deadline = Instant::now() + self.settings.timeout;
        let mut pause = PAUSE;
        loop {
            let request = self
                .client
                .post(self.settings.endpoint.clone())
                .headers(self.settings.headers.clone())
                .header(CONTENT_TYPE, "application/x-protobuf")
                .body(body.clone());
            let sent = match timeout_at(deadline, request.send()).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => {
                    let error = Refused::Lost(explain(&error.without_url()));
                    self.rest(deadline, &mut pause, None, error).await?;
                    continue;
                }
                Err(_) => return Err(Refused::Late),
            };
            match sent.status().as_u16() {
                200..=299 => return Ok(timeout_at(deadline, rejected(sent)).await.unwrap_or(0)),
                status @ (429 | 502 | 503 | 504) => {
                    let asked = asked_pause(&sent);
                    self.rest(deadline, &mut pause, asked, Refused::Status(status)).await?;
                }
                status => return Err(Refused::Status(status)),
            }
        }
    }

    /// Waits before the next attempt, if there is time for one.
    async fn rest(
        &self,
        deadline: Instant,
        pause: &mut Duration,
        asked: Option<Duration>,
        refused: Refused,
    ) -> Result<(), Refused> {
        let wait = asked.unwrap_or(*pause);
        *pause = (*pause * 2).min(LONGEST_PAUSE);
        if self.closing.is_cancelled() || Instant::now() + wait >= deadline {
            return Err(refused);
        }
        tokio::select! {
            () = sleep(wait) => Ok(()),
            // One more attempt, at once.
            () = self.closing.cancelled() => Ok(()),
        }
    }

    fn request(&self, batch: Vec<Record>) -> ExportTraceServiceRequest {
        let scope = InstrumentationScope {
            name: "mcp-api".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        let spans = batch.into_iter().map(span).collect();
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans, schema_url: String::new() }];
        let resource = Some(self.resource.clone());
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans { resource, scope_spans, schema_url: String::new() }],
        }
    }
}

/// How long a collector asks to be left alone, in seconds only.
fn asked_pause(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// How many spans of a batch were not wanted.
async fn rejected(mut response: Response) -> u64 {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > ANSWER_BYTES {
            return 0;
        }
    }
    let answer = ExportTraceServiceResponse::decode(body.as_slice()).unwrap_or_default();
    let rejected = answer.partial_success.map_or(0, |partial| partial.rejected_spans);
    u64::try_from(rejected).unwrap_or(0)
}

fn span(record: Record) -> Span {
    let context = record.context;
    let remote = if record.remote { IS_REMOTE } else { 0 };
    let attributes = record.attributes.into_iter().map(|(key, value)| {
        pair(
            key.as_str(),
            match value {
                Value::Text(text) => any_value::Value::StringValue(text.into_owned()),
                Value::Number(number) => any_value::Value::IntValue(number),
                Value::Flag(flag) => any_value::Value::BoolValue(flag),
            },
        )
    });
    let status = record.failed.then(|| Status { message: String::new(), code: StatusCode::Error.into() });
    let kind = match record.kind {
        Kind::Internal => SpanKind::Internal,
        Kind::Server => SpanKind::Server,
        Kind::Client => SpanKind::Client,
    };
    Span {
        trace_id: context.trace.get().to_be_bytes().to_vec(),
        span_id: context.span.get().to_be_bytes().to_vec(),
        trace_state: record.state.as_deref().unwrap_or_default().to_owned(),
        parent_span_id: record.parent.map(|parent| parent.get().to_be_bytes().to_vec()).unwrap_or_default(),
        flags: u32::from(context.flags) | HAS_REMOTE | remote,
        name: record.name.into_owned(),
        kind: kind.into(),
        start_time_unix_nano: nanos(record.begun),
        // Clocks are set back now and then.
        end_time_unix_nano: nanos(record.ended.max(record.begun)),
        attributes: attributes.collect(),
        status,
        ..Span::default()
    }
}

fn pair(key: &str, value: any_value::Value) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
