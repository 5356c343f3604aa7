//! What a worker shows of how busy it is.

use std::sync::{Arc, Weak};

use mcp_shared::{fleet::ServerLoad, metrics::Exposition};

use crate::worker::Worker;

impl Worker {
    /// Shows limits, and what of them is in use.
    pub fn show(self: &Arc<Self>, metrics: &mut Exposition) {
        let limits = &self.host.limits;
        let (most, queue) = (limits.worker_calls, limits.server_queue);
        let room = Arc::clone(&self.room);
        metrics.show_count(
            "worker_calls",
            "Calls that this worker looks after, running and waiting",
            move || most - room.available_permits(),
        );
        metrics.show_count("worker_calls_limit", "Calls that this worker looks after at once", move || most);
        metrics.show_count(
            "server_queue_limit",
            "Calls that may wait for a free slot of one server on this worker",
            move || queue,
        );
        let of_servers = |read: fn(&[ServerLoad]) -> f64| {
            let worker = Arc::downgrade(self);
            move || Weak::upgrade(&worker).map_or(0.0, |worker| read(&worker.loads()))
        };
        metrics.show(
            "worker_running_calls",
            "Calls that hold a slot of a server on this worker",
            of_servers(|servers| servers.iter().map(|server| server.in_flight).sum::<usize>() as f64),
        );
        metrics.show(
            "worker_waiting_calls",
            "Calls that wait for a free slot of a server on this worker",
            of_servers(|servers| servers.iter().map(|server| server.waiting).sum::<usize>() as f64),
        );
        metrics.show(
            "worker_longest_wait_seconds",
            "How long the call waits that waits longest for a slot of a server on this worker; where none does, how \
             long the last one had to that got its slot within the last second",
            of_servers(|servers| servers.iter().map(|server| server.wait_ms as f64 / 1e3).fold(0.0, f64::max)),
        );
    }

    /// The servers that it owns, and how busy they are.
    pub(crate) fn loads(&self) -> Vec<ServerLoad> {
        self.entries().iter().filter_map(|entry| entry.load()).collect()
    }
}
