//! A worker's health over HTTP, for orchestrators: whether the process lives, and whether it can take calls. And what
//! it counts, for Prometheus.
//!
//! It is so small that it needs no framework. A connection has one request and little time, so that nobody
//! can hold it open; and what it tells is worth nothing to strangers.

use std::{
    convert::Infallible,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mcp_shared::{
    answer::failure,
    error::{ErrorCode, WorkerError},
    ids::RequestId,
    limits,
    metrics::{CONTENT_TYPE, Exposition},
    vault::Vault,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{bus::Bus, worker::Worker};

/// How long to wait before accepting again when the system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a worker needs to take calls, as far as it has it.
#[derive(Default)]
pub struct Health {
    vault: OnceLock<Vault>,
    bus: OnceLock<Bus>,
    metrics: OnceLock<Exposition>,
    serving: OnceLock<()>,
    draining: CancellationToken,
}

impl Health {
    /// The store was opened.
    pub fn store(&self, vault: &Vault) {
        let _ = self.vault.set(vault.clone());
    }

    /// The worker was opened.
    pub fn worker(&self, worker: &Arc<Worker>) {
        let metrics = Exposition::default();
        worker.show(&metrics);
        let _ = self.metrics.set(metrics);
    }

    /// The bus was connected to.
    pub fn bus(&self, bus: &Bus) {
        if let Some(metrics) = self.metrics.get() {
            bus.show(metrics);
        }
        let _ = self.bus.set(bus.clone());
    }

    /// Calls are taken.
    pub fn serving(&self) {
        let _ = self.serving.set(());
    }

    /// Calls are taken no more.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// What is missing, and the code of the first of it.
    async fn missing(&self) -> Vec<(&'static str, ErrorCode)> {
        let mut missing = Vec::new();
        if self.draining.is_cancelled() {
            missing.push(("worker", ErrorCode::ShuttingDown));
        }
        let store = match self.vault.get() {
            None => false,
            Some(vault) => match vault.ping().await {
                Ok(()) => true,
                Err(error) => {
                    tracing::warn!(error.cause = %error, "not ready: the store");
                    false
                }
            },
        };
        if !store {
            missing.push(("store", ErrorCode::StoreUnavailable));
        }
        if self.bus.get().is_none_or(|bus| bus.ready().is_err()) {
            missing.push(("bus", ErrorCode::BusUnavailable));
        }
        // The last steps of a start, between the two and the first call.
        if missing.is_empty() && self.serving.get().is_none() {
            missing.push(("worker", ErrorCode::NoWorker));
        }
        missing
    }

    async fn answer(&self, method: &Method, path: &str) -> Answer {
        match (method, path) {
            (&Method::GET | &Method::HEAD, "/healthz") => {
                Answer::json(StatusCode::OK, &json!({"status": "ok"}))
            }
            (&Method::GET | &Method::HEAD, "/readyz") => {
                let missing = self.missing().await;
                let Some((_, code)) = missing.first() else {
                    return Answer::json(StatusCode::OK, &json!({"status": "ready"}));
                };
                let names: Vec<_> = missing.iter().map(|(name, _)| *name).collect();
                let text = format!("Not ready: {}", names.join(", "));
                let error = WorkerError::new(*code, text).with("notReady", names);
                Answer::error(StatusCode::SERVICE_UNAVAILABLE, &error)
            }
            (&Method::GET | &Method::HEAD, "/metrics") => match self.metrics.get().map(Exposition::text) {
                Some(Ok(text)) => Answer { status: StatusCode::OK, kind: CONTENT_TYPE, body: text },
                Some(Err(error)) => {
                    Answer::error(StatusCode::INTERNAL_SERVER_ERROR, &WorkerError::internal(error))
                }
                None => {
                    let error = WorkerError::new(ErrorCode::StoreUnavailable, "This worker is starting");
                    Answer::error(StatusCode::SERVICE_UNAVAILABLE, &error)
                }
            },
            _ => {
                let error = WorkerError::new(ErrorCode::NotFound, "There is no such route");
                Answer::error(StatusCode::NOT_FOUND, &error)
            }
        }
    }
}

/// What a request is answered with.
struct Answer {
    status: StatusCode,
    kind: &'static str,
    body: String,
}

impl Answer {
    fn json(status: StatusCode, document: &Value) -> Self {
        Self { status, kind: "application/json; charset=utf-8", body: document.to_string() }
    }

    fn error(status: StatusCode, error: &WorkerError) -> Self {
        Self::json(status, &failure(error, &RequestId::generate()))
    }
}

/// Answers until `stop`; connections that are open then end within their time.
pub async fn serve(listener: TcpListener, health: Arc<Health>, stop: CancellationToken) {
    let room = Arc::new(Semaphore::new(limits::HEALTH_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(error.cause = %error, "no connection could be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
        let health = Arc::clone(&health);
        tokio::spawn(async move {
            let service = service_fn(move |request| respond(Arc::clone(&health), request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(limits::HEALTH_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // Whoever is too slow or says what is no HTTP has no use for an answer.
            let _ = timeout(limits::HEALTH_TIMEOUT, connection).await;
            drop(permit);
        });
    }
}

async fn respond(
    health: Arc<Health>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let Answer { status, kind, body } = health.answer(request.method(), request.uri().path()).await;
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}
