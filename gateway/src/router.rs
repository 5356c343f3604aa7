//! Every route and every layer, on one page.

use std::sync::Arc;

use axum::{
    Router,
    middleware::from_fn_with_state,
    routing::{get, post, put},
};
use mcp_shared::error::ErrorCode;

use crate::{
    app::App,
    edge::{Allowed, edge},
    problem::Problem,
    routes::{fleet, health, secrets, servers, tools},
};

/// The whole HTTP API.
pub fn router(app: Arc<App>, allowed: Arc<Allowed>) -> Router {
    Router::new()
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .route("/fleet", get(fleet::get))
        .route("/mcp/tool/call", post(tools::call))
        .route("/mcp/tools", get(tools::list))
        .route("/mcp/servers", get(servers::list).post(servers::add))
        .route("/mcp/servers/{name}", get(servers::get).put(servers::update).delete(servers::delete))
        .route("/mcp/servers/{name}/enable", put(servers::enable))
        .route("/mcp/servers/{name}/disable", put(servers::disable))
        .route("/mcp/servers/{name}/delete-impact", get(servers::delete_impact))
        .route("/secrets/set", post(secrets::set))
        .route("/secrets/delete", post(secrets::delete))
        .fallback(async || Problem::new(ErrorCode::NotFound, "There is no such route"))
        .method_not_allowed_fallback(async || {
            Problem::new(ErrorCode::MethodNotAllowed, "This route does not have that method")
        })
        .layer(from_fn_with_state(allowed, edge))
        .with_state(app)
}
