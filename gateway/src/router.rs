//! Every route and every layer, on one page.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    middleware::from_fn_with_state,
    routing::{MethodRouter, any, delete, get, post, put},
};
use http::Method;
use mcp_shared::{
    error::{ErrorCode, WorkerError},
    principal::Scope,
};

use crate::{
    app::App,
    edge::{Allowed, Edge, edge},
    guard::{Access, Guard},
    problem::Problem,
    routes::{
        api_keys, auth, fleet, google, health, jobs, keys, log, metrics, oauth, packages, secrets, servers,
        tools,
    },
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
        .layer(from_fn_with_state(Arc::new(Edge { allowed, guard: None }), edge))
}

/// A route: who may come, and who answers.
pub struct Route {
    /// The method.
    pub method: Method,
    /// The pattern of the path.
    pub path: &'static str,
    /// Who may come.
    pub access: Access,
    handler: MethodRouter<Arc<App>>,
}

fn on(method: Method, path: &'static str, access: Access, handler: MethodRouter<Arc<App>>) -> Route {
    Route { method, path, access, handler }
}

/// The table of all routes. Nothing is served that does not stand here.
#[rustfmt::skip]
pub fn table() -> Vec<Route> {
    use Access::{Login, Needs, Public};
    use Scope::{Admin, Call, Metrics, Secrets};
    const GET: Method = Method::GET;
    const POST: Method = Method::POST;
    const PUT: Method = Method::PUT;
    const DELETE: Method = Method::DELETE;
    vec![
        on(GET, "/healthz", Public, get(health::healthz)),
        on(GET, "/readyz", Public, get(health::readyz)),
        on(GET, "/metrics", Needs(Metrics), get(metrics::get)),
        on(GET, "/fleet", Needs(Metrics), get(fleet::get)),
        on(POST, "/fleet/workers/{id}/drain", Needs(Admin), post(fleet::drain)),
        on(POST, "/mcp/tool/call", Needs(Call), post(tools::call)),
        on(GET, "/mcp/tools", Needs(Call), get(tools::list)),
        on(GET, "/mcp/servers", Needs(Call), get(servers::list)),
        on(POST, "/mcp/servers", Needs(Admin), post(servers::add)),
        on(GET, "/mcp/servers/{name}", Needs(Call), get(servers::get)),
        on(PUT, "/mcp/servers/{name}", Needs(Admin), put(servers::update)),
        on(DELETE, "/mcp/servers/{name}", Needs(Admin), delete(servers::delete)),
        on(PUT, "/mcp/servers/{name}/enable", Needs(Admin), put(servers::enable)),
        on(PUT, "/mcp/servers/{name}/disable", Needs(Admin), put(servers::disable)),
        on(GET, "/mcp/servers/{name}/delete-impact", Needs(Admin), get(servers::delete_impact)),
        on(POST, "/mcp/servers/{name}/oauth", Needs(Secrets), post(oauth::set)),
        on(DELETE, "/mcp/servers/{name}/oauth", Needs(Secrets), delete(oauth::delete)),
        on(GET, "/packages", Needs(Admin), get(packages::list)),
        on(POST, "/packages/install", Needs(Admin), post(packages::install)),
        on(GET, "/packages/updates", Needs(Admin), get(packages::updates)),
        on(PUT, "/packages/upgrade-all", Needs(Admin), put(packages::upgrade_all)),
        on(GET, "/packages/by-name/{*name}", Needs(Admin), get(packages::by_name)),
        on(GET, "/packages/by-id/{name}", Needs(Admin), get(packages::by_id)),
        on(GET, "/packages/jobs", Needs(Admin), get(jobs::list)),
        on(GET, "/packages/jobs/{id}", Needs(Admin), get(jobs::get)),
        on(DELETE, "/packages/{name}", Needs(Admin), delete(packages::delete)),
        on(PUT, "/packages/{name}/enable", Needs(Admin), put(packages::enable)),
        on(PUT, "/packages/{name}/disable", Needs(Admin), put(packages::disable)),
        on(PUT, "/packages/{name}/upgrade", Needs(Admin), put(packages::upgrade)),
        on(POST, "/secrets/set", Needs(Secrets), post(secrets::set)),
        on(POST, "/secrets/delete", Needs(Secrets), post(secrets::delete)),
        on(GET, "/auth/callback", Public, get(auth::callback)),
        on(GET, "/auth/client.json", Public, get(auth::client)),
        on(GET, "/auth/google/login", Login, get(google::login)),
        on(GET, "/auth/google/callback", Public, get(google::callback)),
        on(GET, "/auth/{server}/login", Login, get(auth::login)),
        on(GET, "/admin/api-keys", Needs(Admin), get(api_keys::list)),
        on(POST, "/admin/api-keys", Needs(Admin), post(api_keys::create)),
        on(DELETE, "/admin/api-keys/{id}", Needs(Admin), delete(api_keys::revoke)),
        on(GET, "/admin/keys", Needs(Admin), get(keys::list)),
        on(POST, "/admin/keys/reload", Needs(Admin), post(keys::reload)),
        on(GET, "/admin/keys/rewrap", Needs(Admin), get(keys::rewrapping)),
        on(POST, "/admin/keys/rewrap", Needs(Admin), post(keys::rewrap)),
        on(POST, "/admin/keys/retire", Needs(Admin), post(keys::retire)),
        on(GET, "/admin/log", Needs(Admin), get(log::get)),
        on(PUT, "/admin/log", Needs(Admin), put(log::set)),
    ]
}

/// The whole HTTP API.
pub fn router(app: Arc<App>, allowed: Arc<Allowed>) -> Router {
    let table = table();
    let access = table.iter().map(|route| (route.path, route.method.clone(), route.access));
    let guard = Guard::new(access, Arc::clone(&app.authenticator));
    let mut router = Router::new();
    for route in table {
        router = router.route(route.path, route.handler);
    }
    router
        .fallback(async || Problem::new(ErrorCode::NotFound, "There is no such route"))
        .method_not_allowed_fallback(async || {
            Problem::new(ErrorCode::MethodNotAllowed, "This route does not have that method")
        })
        .layer(from_fn_with_state(Arc::new(Edge { allowed, guard: Some(guard) }), edge))
        .with_state(app)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_these_routes_need_no_scope() {
        let open: Vec<_> = table()
            .into_iter()
            .filter(|route| !matches!(route.access, Access::Needs(_)))
            .map(|route| (route.path, route.access))
            .collect();
        assert_eq!(
            open,
            [
                ("/healthz", Access::Public),
                ("/readyz", Access::Public),
                ("/auth/callback", Access::Public),
                ("/auth/client.json", Access::Public),
                ("/auth/google/login", Access::Login),
                ("/auth/google/callback", Access::Public),
                ("/auth/{server}/login", Access::Login),
            ]
        );
    }

    #[test]
    fn what_changes_something_needs_more_than_calling() {
        for route in table() {
            let harmless = route.method == Method::GET || route.path == "/mcp/tool/call";
            assert!(harmless || route.access != Access::Needs(Scope::Call), "{}", route.path);
        }
    }
}
