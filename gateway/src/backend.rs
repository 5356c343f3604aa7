//! Who does the work behind the API: the worker of this process, or a fleet of them. Nothing else in this
//! crate knows which.

use std::{sync::Arc, time::Duration};

use mcp_shared::{
    audit::Audit,
    config::Settings,
    fleet::{NodeReport, Role},
    ids::WorkerId,
    metrics::Exposition,
    node::{self, NodeError, Reloader},
    vault::Vault,
    worker_api::WorkerApi,
};
use mcp_worker::{Boot, Worker, supervisor};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::cluster::{self, Cluster};

/// How long the last messages may take to leave.
const LAST_MESSAGES: Duration = Duration::from_secs(3);

/// The one or the other.
pub enum Backend {
    /// The worker of this process.
    Here(Arc<Worker>),
    /// Workers behind the bus.
    Fleet(Cluster),
}

impl Backend {
    /// Opens what the settings name.
    pub async fn open(
        settings: &Settings,
        vault: &Vault,
        me: &NodeReport,
        stop: &CancellationToken,
        audit: &Audit,
    ) -> Result<Self, NodeError> {
        match &settings.bus {
            None => {
                let program = supervisor::this_program();
                let (packages, remote, limits) = (&settings.packages, &settings.remote, &settings.limits);
                let boot = Boot::Everything;
                let audit = Some(audit.clone());
                let worker =
                    Worker::open(vault.clone(), program, boot, packages, remote, limits, audit).await?;
                worker.serve_jobs(Arc::clone(&worker) as Arc<dyn WorkerApi>);
                Ok(Backend::Here(worker))
            }
            Some(bus) => {
                let connect = async || cluster::connect(bus, me, vault).await;
                node::patiently(settings, stop, connect).await.map(Backend::Fleet)
            }
        }
    }

    /// Who takes calls.
    pub fn worker(&self) -> Arc<dyn WorkerApi> {
        match self {
            Backend::Here(worker) => Arc::clone(worker) as Arc<dyn WorkerApi>,
            Backend::Fleet(cluster) => Arc::clone(&cluster.worker),
        }
    }

    /// Reads the keys of this gateway, and of a worker in its process, anew while it runs.
    pub fn reloader(&self, settings: &Settings, vault: &Vault, me: &NodeReport) -> Arc<Reloader> {
        let fleet = match self {
            // It has the same keys, in the same place.
            Backend::Here(_) => None,
            Backend::Fleet(cluster) => Some(Arc::clone(&cluster.worker)),
        };
        Reloader::new(settings, vault, me, fleet)
    }

    /// Shows what the worker of this process is busy with, or how this gateway sees the fleet.
    pub fn show(&self, metrics: &Exposition) {
        match self {
            Backend::Here(worker) => worker.show(metrics),
            Backend::Fleet(cluster) => cluster.show(metrics),
        }
    }

    /// Ends it: calls of a worker in this process have until `drain` is over.
    pub async fn shutdown(self, drain: Duration) {
        match self {
            Backend::Here(worker) => worker.shutdown(drain).await,
            Backend::Fleet(cluster) => {
                if timeout(LAST_MESSAGES, cluster.close()).await.is_err() {
                    tracing::warn!("the last messages could not be sent");
                }
            }
        }
    }
}

/// What this gateway says of itself.
pub fn myself(vault: &Vault) -> NodeReport {
    let id = WorkerId::from_stored(format!("g-{}", uuid::Uuid::now_v7().simple()));
    NodeReport::of(id, Role::Gateway, mcp_nats::wire::VERSIONS, vault)
}
