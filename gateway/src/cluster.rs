//! The gateway's side of the bus: the one place where this crate meets `mcp_nats`.

use std::sync::Arc;

use mcp_nats::{
    bus::Bus,
    connect::OpenError,
    router::{Describe, Router},
};
use mcp_shared::{
    config::BusSettings, fleet::NodeReport, metrics::Exposition, node::NodeError, vault::Vault,
    worker_api::WorkerApi,
};
use tokio::sync::watch;

/// The workers of a fleet, as one.
pub struct Cluster {
    /// They do the work.
    pub worker: Arc<dyn WorkerApi>,
    router: Router,
}

impl Cluster {
    /// Shows how this gateway sees bus and fleet.
    pub fn show(&self, metrics: &Exposition) {
        self.router.show(metrics);
    }

    /// Says goodbye, sends what is left to be sent and disconnects.
    pub async fn close(self) {
        self.router.leave().await;
    }
}

/// Connects to the bus and logs in, once; whoever starts the program is patient with it. `me` is what the
/// fleet is told of this gateway.
pub async fn connect(settings: &BusSettings, me: &NodeReport, vault: &Vault) -> Result<Cluster, NodeError> {
    let bus = Bus::open(settings, me.id.clone()).await.map_err(|error| unusable(settings, error))?;
    let describe: Describe = {
        let (me, vault) = (me.clone(), vault.clone());
        Arc::new(move || NodeReport { keys: vault.kids(), ..me.clone() })
    };
    let joined = Router::join(bus, describe, watch::channel(()).1).await;
    let router = joined.map_err(|error| unusable(settings, error))?;
    router.register("mcp-gateway").await;
    Ok(Cluster { worker: Arc::new(router.clone()), router })
}

/// Why a bus cannot be used, for people.
pub fn unusable(settings: &BusSettings, error: OpenError) -> NodeError {
    let servers = settings.shown();
    match error {
        OpenError::Unreachable(cause) => NodeError::BusUnreachable { servers, cause },
        OpenError::Unfit(cause) => NodeError::BusUnfit { servers, cause },
    }
}
