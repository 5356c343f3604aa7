//! `/admin/log`: what stands in the log, while the program runs.

use std::sync::Arc;

use axum::{body::Body, extract::State, response::Response};
use http::{HeaderMap, StatusCode};
use mcp_shared::{
    audit::{Action, Object},
    error::WorkerError,
    telemetry,
};
use serde_json::json;

use crate::{
    app::App,
    body::{Field, Fields},
    caller::Caller,
    problem::{Problem, json_response},
};

/// `GET /admin/log`: the filter in force here, and that of the settings.
pub async fn get() -> Result<Response, Problem> {
    answer()
}

/// `PUT /admin/log`: another filter for this node and all others that are heard, until they end; `null` is that of
/// the settings.
pub async fn set(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = app.body(&headers, body).await?;
    let filter = match Fields::parse(&body)?.text("filter")? {
        Field::Value(filter) => Some(filter),
        Field::Null => None,
        Field::Absent => {
            return Err(Problem::invalid("filter is required: levels, or null for those of the settings"));
        }
    };
    if let Some(filter) = &filter {
        telemetry::check_filter(filter).map_err(|error| Problem::invalid(format!("filter {error}")))?;
    }
    let named = filter.as_deref().unwrap_or("as configured");
    let _recorded = caller.record(&app, Action::LogFilter, Object::filter(named)).await?;
    app.worker.filter_logs(filter.as_deref()).await?;
    telemetry::set_filter(filter.as_deref()).map_err(WorkerError::internal)?;
    answer()
}

fn answer() -> Result<Response, Problem> {
    let (filter, configured) =
        telemetry::filters().ok_or_else(|| WorkerError::internal("logging was not set up"))?;
    let body = json!({"success": true, "filter": filter, "configured": configured});
    Ok(json_response(StatusCode::OK, &body))
}
