//! Whether the process lives, and whether it can serve.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use http::StatusCode;
use mcp_shared::error::WorkerError;
use serde_json::json;

use crate::{
    app::App,
    problem::{Problem, json_response},
};

/// `GET /healthz`: the process lives.
pub async fn healthz() -> Response {
    json_response(StatusCode::OK, &json!({"status": "ok"}))
}

/// `GET /readyz`: the store can be written and calls can be taken; otherwise 503 that names what not.
pub async fn readyz(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    app.worker.ready().await.map_err(|error| error.with("component", "worker"))?;
    app.vault.ping().await.map_err(|error| WorkerError::from(error).with("component", "store"))?;
    Ok(json_response(StatusCode::OK, &json!({"status": "ready"})))
}
