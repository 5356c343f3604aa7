//! Whether the process lives, and whether it can serve.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use http::StatusCode;
use mcp_shared::error::{ErrorCode, WorkerError};
use serde_json::json;

use crate::{
    app::App,
    problem::{Problem, json_response},
};

/// `GET /healthz`: the process lives.
pub async fn healthz() -> Response {
    json_response(StatusCode::OK, &json!({"status": "ok"}))
}

/// `GET /readyz`: the store can be written, workers can be reached that take calls, and the program is not
/// about to stop; otherwise 503 that names what not.
pub async fn readyz(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    if app.stop.is_cancelled() {
        return Err(WorkerError::new(ErrorCode::ShuttingDown, "Not ready: this program is stopping").into());
    }
    let (worker, store) = tokio::join!(app.worker.ready(), app.vault.ping());
    let mut missing = Vec::new();
    let mut code = ErrorCode::StoreUnavailable;
    if let Err(error) = store {
        tracing::warn!(error.cause = %error, "not ready: the store");
        missing.push("store");
    }
    if let Err(error) = worker {
        missing.push(if error.code == ErrorCode::BusUnavailable { "bus" } else { "worker" });
        code = error.code;
    }
    if missing.is_empty() {
        return Ok(json_response(StatusCode::OK, &json!({"status": "ready"})));
    }
    let text = format!("Not ready: {}", missing.join(", "));
    Err(WorkerError::new(code, text).with("notReady", missing).into())
}
