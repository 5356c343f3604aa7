//! `/fleet`.

use std::sync::Arc;

use axum::{
    extract::{Path, State},
    response::Response,
};
use http::StatusCode;
use mcp_shared::{
    audit::{Action, Object},
    fleet::{Fleet, NodeReport, NodeView},
    ids::WorkerId,
};
use serde::Serialize;
use serde_json::json;

use crate::{
    app::App,
    caller::Caller,
    problem::{Problem, json_response},
};

#[derive(Serialize)]
struct Answer {
    success: bool,
    #[serde(flatten)]
    fleet: Fleet,
}

/// `POST /fleet/workers/:id/drain`: has a worker leave in order, as SIGTERM does. The answer says that it has
/// begun; `GET /fleet` shows it as `draining`, and then no more.
pub async fn drain(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let _recorded = caller.record(&app, Action::WorkerDrain, Object::worker(&id)).await?;
    app.worker.release_worker(&WorkerId::from_stored(id)).await?;
    Ok(json_response(StatusCode::ACCEPTED, &json!({"success": true})))
}

/// `GET /fleet`: the nodes that are heard, this one among them.
pub async fn get(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let mut fleet = app.worker.fleet().await?;
    // A worker in the same process knows of no gateways, and a gateway that is just starting has not heard
    // itself yet.
    if !fleet.gateways.iter().any(|gateway| gateway.report.id == app.me.id) {
        let me = NodeReport { keys: app.vault.kids(), ..app.me.clone() };
        fleet.gateways.push(NodeView::of_myself(me));
    }
    Ok(json_response(StatusCode::OK, &Answer { success: true, fleet }))
}
