//! The worker's side of the bus: the one place where this crate meets `mcp_nats`.

use std::sync::Arc;

use mcp_shared::{
    config::BusSettings,
    error::{ErrorCode, WorkerError},
    node::NodeError,
    vault::Vault,
};

use crate::worker::Worker;

/// A connection to NATS, and what it serves. Cloning it is cheap and shares everything.
#[derive(Debug, Clone)]
pub struct Bus {
    servers: String,
}

impl Bus {
    /// Connects and logs in, once; whoever starts a program is patient with it. Nothing is served yet.
    pub async fn connect(settings: &BusSettings, _vault: &Vault) -> Result<Self, NodeError> {
        Err(not_built(settings))
    }

    /// Brings the worker the calls of the fleet from now on, and tells the fleet of it.
    pub async fn serve(&self, _worker: &Arc<Worker>) -> Result<(), NodeError> {
        Ok(())
    }

    /// Whether the bus can be reached right now; the error says that it cannot.
    pub fn ready(&self) -> Result<(), WorkerError> {
        tracing::debug!(servers = %self.servers, "not connected");
        Err(WorkerError::new(ErrorCode::BusUnavailable, "The message bus cannot be reached"))
    }

    /// Tells the fleet that this worker is leaving, and takes nothing new. Calls in flight go on.
    pub async fn drain(&self) {}

    /// Sends what is left to be sent, the last answers among it, and disconnects.
    pub async fn close(&self) {}
}

/// The line of `check` about the bus: whether it can be reached and logged in to, which version it has,
/// and whether it asks everybody for a login. It connects once and leaves nothing behind.
pub async fn check(settings: &BusSettings) -> Result<String, String> {
    Err(not_built(settings).to_string())
}

/// As if nobody answered, which is how a program without a bus sees it.
fn not_built(settings: &BusSettings) -> NodeError {
    NodeError::BusUnreachable {
        servers: settings.shown(),
        cause: "the bus is not part of this build".to_owned(),
    }
}
