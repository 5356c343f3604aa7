//! The worker's side of the bus: the one place where this crate meets `mcp_nats`.

use std::{sync::Arc, time::Duration};

use mcp_nats::{
    bus,
    connect::OpenError,
    router::{Describe, Router},
    server::Server,
};
use mcp_shared::{
    config::BusSettings,
    error::{ErrorCode, WorkerError},
    hosting::Hosting,
    node::NodeError,
};

use crate::worker::Worker;

/// A connection to NATS, and what it serves. Cloning it is cheap and shares everything.
#[derive(Clone)]
pub struct Bus {
    router: Router,
    server: Arc<Server>,
}

impl Bus {
    /// Connects and logs in, once, and brings the worker the calls of the fleet from then on; whoever starts
    /// a program is patient with it.
    pub async fn connect(settings: &BusSettings, worker: &Arc<Worker>) -> Result<Self, NodeError> {
        let bus = bus::Bus::open(settings, worker.id().clone()).await;
        let bus = bus.map_err(|error| unusable(settings, error))?;
        let host = Arc::clone(worker) as Arc<dyn Hosting>;
        let describe: Describe = {
            let host = Arc::clone(&host);
            Arc::new(move || host.describe())
        };
        let router = Router::join(bus.clone(), describe, host.changed()).await;
        let router = router.map_err(|error| unusable(settings, error))?;
        let server = Server::start(bus, host, router.clone()).await;
        let server = Arc::new(server.map_err(|error| unusable(settings, error))?);
        Ok(Self { router, server })
    }

    /// Waits until calls are taken.
    pub async fn in_step(&self) {
        while !self.server.is_ready() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether calls are taken right now; the error says why not.
    pub fn ready(&self) -> Result<(), WorkerError> {
        if self.server.is_ready() {
            return Ok(());
        }
        Err(WorkerError::new(ErrorCode::BusUnavailable, "The message bus cannot be reached"))
    }

    /// Tells the fleet that this worker is leaving, takes nothing new, and waits until others run what it
    /// ran and its calls are over, at most for `limit`.
    pub async fn drain(&self, limit: Duration) {
        self.server.drain(limit).await;
    }

    /// Sends what is left to be sent, the last answers among it, and leaves.
    pub async fn close(&self) {
        self.server.stop().await;
        self.router.leave().await;
    }
}

/// The line of `check` about the bus: whether it can be reached and logged in to, which version it has,
/// and whether it asks everybody for a login. It connects once and leaves nothing behind.
pub async fn check(settings: &BusSettings) -> Result<String, String> {
    mcp_nats::connect::check(settings).await.map_err(|error| unusable(settings, error).to_string())
}

fn unusable(settings: &BusSettings, error: OpenError) -> NodeError {
    let servers = settings.shown();
    match error {
        OpenError::Unreachable(cause) => NodeError::BusUnreachable { servers, cause },
        OpenError::Unfit(cause) => NodeError::BusUnfit { servers, cause },
    }
}
