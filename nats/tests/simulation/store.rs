//! The store, as far as calls see it: who owns servers of which there may be only one.

use std::time::Duration;

use mcp_nats::caller::Now;

/// How long a lease stands that nobody renews.
const LEASE: Duration = Duration::from_secs(3);
/// How long its owner goes by it.
const TRUSTED: Duration = Duration::from_secs(2);

/// A registered server.
#[derive(Debug, Clone, Default)]
pub struct Server {
    /// Only one worker may own it.
    pub single: bool,
    /// Who does, and since when that was last said.
    pub lease: Option<(usize, Now)>,
    /// Its own limit for calls.
    pub limit: Duration,
}

impl Server {
    /// A server that is not owned yet.
    pub fn new(single: bool, limit: Duration) -> Self {
        Self { single, lease: None, limit }
    }

    /// Who owns it by a lease, however old.
    pub fn owner(&self) -> Option<usize> {
        self.lease.map(|(owner, _)| owner)
    }

    /// Whether this worker may accept calls as its owner.
    pub fn is_owned(&self, worker: usize, now: Now) -> bool {
        self.lease.is_some_and(|(owner, renewed)| owner == worker && now.saturating_sub(renewed) < TRUSTED)
    }

    /// Takes the lease if it is free, or renews it; `over` says that one that ran out is free as well.
    pub fn take(&mut self, worker: usize, now: Now, over: bool) -> bool {
        let free = match self.lease {
            None => true,
            Some((owner, _)) if owner == worker => true,
            Some((_, renewed)) => over && now.saturating_sub(renewed) > LEASE,
        };
        if free {
            self.lease = Some((worker, now));
        }
        free
    }

    /// Gives the lease back.
    pub fn give_back(&mut self, worker: usize) {
        if self.owner() == Some(worker) {
            self.lease = None;
        }
    }
}

/// All of them.
pub type Store = Vec<Server>;
