//! The worker's side of the bus: the one place where this crate meets `mcp_nats`.

use std::{sync::Arc, time::Duration};

use mcp_nats::{
    bus,
    connect::OpenError,
    router::{Describe, Router},
    server::Server,
};
use mcp_shared::{
    check::Finding,
    config::{BusSettings, Settings},
    error::{ErrorCode, WorkerError},
    fleet::{NodeReport, Role},
    hosting::Hosting,
    metrics::Exposition,
    node::{NodeError, Reloader},
    worker_api::WorkerApi,
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
        let fleet = router.clone();
        worker.own_only_while(move || fleet.is_up());
        Ok(Self { router, server })
    }

    /// Shows how this worker sees bus and fleet.
    pub fn show(&self, metrics: &Exposition) {
        self.router.show(metrics);
    }

    /// Reads the worker's keys anew while it runs, as far as the fleet agrees with them.
    pub fn reloader(&self, settings: &Settings, worker: &Worker) -> Arc<Reloader> {
        Reloader::new(settings, worker.vault(), &worker.me, Some(self.fleet()))
    }

    /// The workers of the fleet, this one among them.
    pub fn fleet(&self) -> Arc<dyn WorkerApi> {
        Arc::new(self.router.clone())
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

/// The lines of `check` about the bus and who is on it: whether it can be reached and logged in to, which
/// version it has, whether it asks everybody for a login; and whether store and keys of this node, as far
/// as they are known, are those of the fleet. It connects once and leaves nothing behind.
pub async fn check(settings: &BusSettings, own: Option<&NodeReport>) -> Vec<Finding> {
    look(settings, own).await.0
}

/// The same, with the nodes that were heard.
pub async fn look(settings: &BusSettings, own: Option<&NodeReport>) -> (Vec<Finding>, Vec<NodeReport>) {
    match mcp_nats::connect::check(settings).await {
        Ok((description, nodes)) => (vec![("bus", Ok(description)), ("fleet", compare(own, &nodes))], nodes),
        Err(error) => (vec![("bus", Err(unusable(settings, error).to_string()))], Vec::new()),
    }
}

fn compare(own: Option<&NodeReport>, nodes: &[NodeReport]) -> Result<String, String> {
    let workers = nodes.iter().filter(|node| node.role == Role::Worker).count();
    let heard = format!("gateways heard: {}, workers heard: {workers}", nodes.len() - workers);
    let Some(own) = own.filter(|_| !nodes.is_empty()) else { return Ok(heard) };
    match nodes.iter().find_map(|node| own.disagreement(node)) {
        None => Ok(format!("{heard}; they have this node's store and keys")),
        Some(why) => Err(format!("{heard}; {why}")),
    }
}

fn unusable(settings: &BusSettings, error: OpenError) -> NodeError {
    let servers = settings.shown();
    match error {
        OpenError::Unreachable(cause) => NodeError::BusUnreachable { servers, cause },
        OpenError::Unfit(cause) => NodeError::BusUnfit { servers, cause },
    }
}
