//! `/metrics`.

use std::sync::Arc;

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use http::header;
use mcp_shared::{error::WorkerError, metrics::CONTENT_TYPE};

use crate::{app::App, problem::Problem};

/// `GET /metrics`: what this node counts, for Prometheus.
pub async fn get(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let text = app.metrics.text().map_err(WorkerError::internal)?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}
