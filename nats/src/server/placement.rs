//! Which servers this worker runs although nobody calls: those for which it ranks first and that nobody
//! runs. Every worker decides for itself, and all decide alike.

use std::{collections::HashMap, sync::Arc, time::Duration};

use mcp_shared::{fleet::ServerLoad, ids::ServerName};
use tokio::time::{Instant, sleep};

use super::Inner;

/// How often a worker looks whether something has to be run.
const EVERY: Duration = Duration::from_millis(500);
/// How long a new worker listens to beats before it starts anything by itself: most of it runs already
/// somewhere, unless the whole fleet has just started.
const FIRST_LOOK: Duration = Duration::from_millis(1_300);
/// A second owner whose server nobody called for so long gives it up.
const SPARE_IDLE: Duration = Duration::from_secs(60);

impl Inner {
    pub(super) async fn place(self: Arc<Self>) {
        let mut pause = FIRST_LOOK;
        let mut idle_since: HashMap<ServerName, Instant> = HashMap::new();
        loop {
            tokio::select! {
                () = sleep(pause) => {}
                () = self.stopping.cancelled() => return,
            }
            pause = EVERY;
            if !self.router.is_up() || self.is_stale() {
                continue;
            }
            let report = self.host.describe();
            if report.draining {
                continue;
            }
            for (server, owned) in self.host.wanted() {
                let first = self.router.first(&server).as_ref() == Some(self.bus.node());
                if !owned && first && self.router.owners(&server).is_empty() {
                    tracing::info!(%server, "nobody runs this server: starting it here");
                    if let Err(error) = self.host.place(&server).await {
                        tracing::warn!(%server, %error, "a server was not started");
                    }
                }
            }
            self.give_up_spares(&report.servers, &mut idle_since).await;
        }
    }

    /// Gives up what others run as well and nobody calls here.
    async fn give_up_spares(&self, servers: &[ServerLoad], idle_since: &mut HashMap<ServerName, Instant>) {
        idle_since.retain(|name, _| servers.iter().any(|load| load.name == *name));
        for load in servers {
            let idle = load.in_flight == 0 && load.waiting == 0 && load.users == 0;
            let spare = idle
                && self.router.first(&load.name).as_ref() != Some(self.bus.node())
                && self.router.running(&load.name).iter().any(|owner| owner != self.bus.node());
            if !spare {
                idle_since.remove(&load.name);
                continue;
            }
            let since = *idle_since.entry(load.name.clone()).or_insert_with(Instant::now);
            if since.elapsed() >= SPARE_IDLE && self.host.give_up(&load.name).await {
                tracing::info!(server = %load.name, "given up: another worker runs it, and nobody calls here");
                idle_since.remove(&load.name);
            }
        }
    }
}
