//! Every route and every layer, on one page.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    middleware::from_fn_with_state,
    routing::{any, delete, get, post, put},
};
use mcp_shared::error::{ErrorCode, WorkerError};

use crate::{
    app::App,
    edge::{Allowed, edge},
    problem::Problem,
    routes::{auth, fleet, google, health, jobs, metrics, oauth, packages, secrets, servers, tools},
};

/// What is answered while the program starts: an orchestrator can see that it lives and what it waits
/// for is not there yet.
pub fn starting(allowed: Arc<Allowed>) -> Router {
    let problem = || {
        let text = "mcp-api is starting: its store or its message bus has not answered yet";
        WorkerError::new(ErrorCode::StoreUnavailable, text)
            .retry_after(Duration::from_secs(1))
            .with("notReady", vec!["store"])
    };
    Router::new()
        .route("/healthz", get(health::healthz))
        .route("/mcp/tool/call", any(async move || Problem::from(problem()).not_started()))
        .fallback(async move || Problem::from(problem()))
        .layer(from_fn_with_state(allowed, edge))
}

/// The whole HTTP API.
pub fn router(app: Arc<App>, allowed: Arc<Allowed>) -> Router {
    Router::new()
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(metrics::get))
        .route("/fleet", get(fleet::get))
        .route("/fleet/workers/{id}/drain", post(fleet::drain))
        .route("/mcp/tool/call", post(tools::call))
        .route("/mcp/tools", get(tools::list))
        .route("/mcp/servers", get(servers::list).post(servers::add))
        .route("/mcp/servers/{name}", get(servers::get).put(servers::update).delete(servers::delete))
        .route("/mcp/servers/{name}/enable", put(servers::enable))
        .route("/mcp/servers/{name}/disable", put(servers::disable))
        .route("/mcp/servers/{name}/delete-impact", get(servers::delete_impact))
        .route("/mcp/servers/{name}/oauth", post(oauth::set).delete(oauth::delete))
        .route("/packages", get(packages::list))
        .route("/packages/install", post(packages::install))
        .route("/packages/updates", get(packages::updates))
        .route("/packages/upgrade-all", put(packages::upgrade_all))
        .route("/packages/by-name/{*name}", get(packages::by_name))
        .route("/packages/by-id/{name}", get(packages::by_id))
        .route("/packages/jobs", get(jobs::list))
        .route("/packages/jobs/{id}", get(jobs::get))
        .route("/packages/{name}", delete(packages::delete))
        .route("/packages/{name}/enable", put(packages::enable))
        .route("/packages/{name}/disable", put(packages::disable))
        .route("/packages/{name}/upgrade", put(packages::upgrade))
        .route("/secrets/set", post(secrets::set))
        .route("/secrets/delete", post(secrets::delete))
        .route("/auth/callback", get(auth::callback))
        .route("/auth/client.json", get(auth::client))
        .route("/auth/google/login", get(google::login))
        .route("/auth/google/callback", get(google::callback))
        .route("/auth/{server}/login", get(auth::login))
        .fallback(async || Problem::new(ErrorCode::NotFound, "There is no such route"))
        .method_not_allowed_fallback(async || {
            Problem::new(ErrorCode::MethodNotAllowed, "This route does not have that method")
        })
        .layer(from_fn_with_state(allowed, edge))
        .with_state(app)
}
