//! The micro-service protocol of NATS, by which `nats micro ls` shows the fleet.

use async_nats::service::{Service, ServiceExt};

use crate::bus::Bus;

/// The queue group of all workers: one of them answers.
pub const GROUP: &str = "workers";

/// Registers this node under a name. It is listed until the returned value is gone.
pub async fn register(bus: &Bus, name: &str) -> Result<Service, async_nats::Error> {
    let about = [
        ("node".to_owned(), bus.node().to_string()),
        ("prefix".to_owned(), bus.subjects().prefix().to_owned()),
    ];
    bus.client()
        .service_builder()
        .description("MCP servers behind one API")
        .queue_group(GROUP)
        .metadata(about.into())
        .start(name, env!("CARGO_PKG_VERSION"))
        .await
}
