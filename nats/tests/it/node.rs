//! Gateways and workers on a guarded NATS, each with no more than its user may do.

use std::{sync::Arc, time::Duration};

use mcp_nats::{bus::Bus, router::Router, server::Server};
use mcp_shared::{
    error::WorkerError,
    fleet::Role,
    hosting::Hosting,
    ids::{RequestId, ServerName, ToolName, UserId, WorkerId},
    json::RawJson,
    testing::services::NatsServer,
    worker_api::{CallContext, CallStream, ToolCall, WorkerApi},
};
use serde_json::Value;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    client::{LONG, seed},
    echo::{Echo, about},
    login::{key, settings},
};

async fn bus(server: &NatsServer, role: &str) -> Bus {
    Bus::open(&settings(server, key(&seed(role))), WorkerId::generate()).await.unwrap()
}

/// A gateway's router.
pub async fn gateway(server: &NatsServer) -> Router {
    let bus = bus(server, "gateway").await;
    let id = bus.node().clone();
    let describe = Arc::new(move || about(&id, Role::Gateway));
    // Nothing about it changes.
    let (_, unchanged) = watch::channel(());
    let router = Router::join(bus, describe, unchanged).await.unwrap();
    router.register("mcp-gateway").await;
    router
}

/// A worker with servers that echo.
pub struct Worker {
    pub id: WorkerId,
    pub echo: Arc<Echo>,
    pub server: Server,
    pub router: Router,
}

/// A worker that takes calls.
pub async fn worker(server: &NatsServer, servers: &[&str]) -> Worker {
    let bus = bus(server, "worker").await;
    let id = bus.node().clone();
    let echo = Echo::new(id.clone(), servers);
    let host = Arc::clone(&echo);
    let router = Router::join(bus.clone(), Arc::new(move || host.describe()), echo.changed()).await.unwrap();
    let server = Server::start(bus, Arc::clone(&echo) as Arc<dyn Hosting>, router.clone()).await.unwrap();
    let worker = Worker { id, echo, server, router };
    until("the worker is ready", || worker.server.is_ready()).await;
    worker
}

/// Waits for a condition.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LONG, "not in time: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until a router would call a server.
pub async fn sees(router: &Router, server: &str, owners: usize) {
    let server = ServerName::from_stored(server);
    until("the router knows the owners", || router.running(&server).len() == owners).await;
}

/// Begins a call as somebody's.
pub async fn begin(
    router: &Router,
    server: &str,
    tool: &str,
    arguments: Value,
    timeout: Option<Duration>,
) -> Result<CallStream, WorkerError> {
    let user = UserId::from_stored("anna");
    let context =
        CallContext { request_id: RequestId::generate(), user, timeout, spent: Duration::ZERO, trace: None };
    let call = ToolCall {
        idempotency: None,
        server: ServerName::from_stored(server),
        tool: ToolName::from_stored(tool),
        arguments: RawJson::of(&arguments).unwrap(),
        progress: tool == "progress",
    };
    router.call_tool(context, call).await
}

/// Makes a call and waits for its end.
pub async fn call(router: &Router, server: &str, tool: &str, arguments: Value) -> Result<Value, WorkerError> {
    let stream = begin(router, server, tool, arguments, None).await?;
    let ended = tokio::time::timeout(LONG, stream.result()).await.expect("the call ends");
    ended.map(|result| result.read().unwrap())
}
