//! Clocks that nobody agrees on, and the names of nodes.

use std::time::Duration;

use mcp_nats::caller::Now;
use mcp_shared::ids::WorkerId;

use crate::chance::Rng;

/// A node's own clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock {
    offset: Duration,
    /// It runs so many millionths too fast.
    drift: u32,
}

impl Clock {
    /// Some clock.
    pub fn drawn(rng: &mut Rng) -> Self {
        Self { offset: rng.millis(0, 3_600_000), drift: u32::try_from(rng.below(200)).unwrap_or(0) }
    }

    /// What it shows at a moment.
    pub fn at(&self, now: Now) -> Now {
        self.offset + now + now * self.drift / 1_000_000
    }
}

/// A worker's id.
pub fn worker_id(index: usize) -> WorkerId {
    WorkerId::from_stored(format!("w{index}"))
}

/// A router's id.
pub fn router_id(index: usize) -> WorkerId {
    WorkerId::from_stored(format!("r{index}"))
}

/// The number in an id.
pub fn index(id: &WorkerId) -> usize {
    id.as_str()[1..].parse().unwrap_or(usize::MAX)
}
