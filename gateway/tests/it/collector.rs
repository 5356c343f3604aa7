//! A collector of traces, as the programs know one: it takes OTLP over HTTP and keeps what it was sent.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use axum::{Router, body::Bytes, extract::State, routing::post};
use http::{HeaderMap, StatusCode};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    trace::v1::status::StatusCode as SpanStatus,
};
use prost::Message;
use tokio::task::JoinHandle;

use crate::deployment::eventually;

/// A span as it came, with its ids as texts.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `service.name` of whoever sent it.
    pub service: String,
    /// `service.instance.id`.
    pub instance: String,
    pub trace: String,
    pub id: String,
    /// Empty for the first of a trace.
    pub parent: String,
    pub name: String,
    pub state: String,
    /// 1 internal, 2 server, 3 client.
    pub kind: i32,
    pub flags: u32,
    pub begun: u64,
    pub ended: u64,
    pub failed: bool,
    pub attributes: BTreeMap<String, String>,
}

impl Seen {
    /// What it says under a key; empty if it says nothing.
    pub fn says(&self, key: &str) -> &str {
        self.attributes.get(key).map(String::as_str).unwrap_or_default()
    }
}

#[derive(Default)]
struct Kept {
    bodies: Mutex<Vec<Bytes>>,
    keys: Mutex<Vec<String>>,
    /// Statuses that the next batches are answered with, and then 200.
    faults: Mutex<Vec<u16>>,
}

/// It ends when it is dropped.
pub struct Collector {
    address: String,
    kept: Arc<Kept>,
    serving: JoinHandle<()>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Collector {
    /// Starts one on a free port.
    pub async fn start() -> Self {
        let kept = Arc::<Kept>::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = Router::new().route("/v1/traces", post(take)).with_state(Arc::clone(&kept));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, kept, serving }
    }

    /// What `OTEL_EXPORTER_OTLP_ENDPOINT` is to be.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers the next batches with these statuses.
    pub fn fail(&self, statuses: &[u16]) {
        self.kept.faults.lock().unwrap().extend(statuses.iter().rev());
    }

    /// Faults that nobody has met yet.
    pub fn faults_left(&self) -> usize {
        self.kept.faults.lock().unwrap().len()
    }

    /// All batches that were taken, as they came.
    pub fn bodies(&self) -> Vec<Bytes> {
        self.kept.bodies.lock().unwrap().clone()
    }

    /// The header `x-key` of each request.
    pub fn keys(&self) -> Vec<String> {
        self.kept.keys.lock().unwrap().clone()
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Seen> {
        self.bodies().iter().flat_map(spans).collect()
    }

    /// Waits until there are so many spans of a trace, and that there are no more by then.
    pub async fn trace(&self, trace: &str, count: usize) -> Vec<Seen> {
        let of_trace =
            || -> Vec<Seen> { self.spans().into_iter().filter(|span| span.trace == trace).collect() };
        eventually("the spans of a trace arrive", async || of_trace().len() >= count).await;
        let spans = of_trace();
        assert_eq!(spans.len(), count, "{spans:#?}");
        spans
    }
}

async fn take(State(kept): State<Arc<Kept>>, headers: HeaderMap, body: Bytes) -> (StatusCode, Vec<u8>) {
    assert_eq!(headers["content-type"], "application/x-protobuf");
    if let Some(key) = headers.get("x-key") {
        kept.keys.lock().unwrap().push(key.to_str().unwrap().to_owned());
    }
    if let Some(fault) = kept.faults.lock().unwrap().pop() {
        return (StatusCode::from_u16(fault).unwrap(), Vec::new());
    }
    kept.bodies.lock().unwrap().push(body);
    (StatusCode::OK, Vec::new())
}

fn spans(body: &Bytes) -> Vec<Seen> {
    let request = ExportTraceServiceRequest::decode(body.clone()).unwrap();
    let mut found = Vec::new();
    for of_resource in request.resource_spans {
        let resource = texts(&of_resource.resource.unwrap().attributes);
        for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            found.push(Seen {
                service: resource["service.name"].clone(),
                instance: resource["service.instance.id"].clone(),
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                name: span.name,
                state: span.trace_state,
                kind: span.kind,
                flags: span.flags,
                begun: span.start_time_unix_nano,
                ended: span.end_time_unix_nano,
                failed: span.status.is_some_and(|status| status.code() == SpanStatus::Error),
                attributes: texts(&span.attributes),
            });
        }
    }
    found
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: Value| match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(flag) => flag.to_string(),
        other => panic!("{other:?}"),
    };
    let pairs =
        attributes.iter().map(|pair| (pair.key.clone(), text(pair.value.clone().unwrap().value.unwrap())));
    pairs.collect()
}
