//! Slots: the rights to calls in flight, in a pool that bounds them.

use std::{
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use deadpool::managed::{
    Manager, Metrics, Object, Pool, PoolError, QueueMode, RecycleError, RecycleResult, Timeouts,
};
use mcp_shared::{
    error::{ErrorCode, WorkerError},
    limits,
    metrics::{self, Limit},
};
use tokio::time::{Instant, timeout};

use super::{Group, NoSlot, current, not_started};
use crate::instance::Instance;

/// The right to one call in flight on one instance.
pub struct Slot {
    /// Where the call goes.
    pub instance: Arc<Instance>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.instance.slots.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Makes slots for the pool.
pub struct Slots(pub(super) Weak<Group>);

impl Manager for Slots {
    type Type = Slot;
    type Error = ();

    async fn create(&self) -> Result<Slot, ()> {
        self.0.upgrade().and_then(|group| group.new_slot()).ok_or(())
    }

    async fn recycle(&self, slot: &mut Slot, _: &Metrics) -> RecycleResult<()> {
        if slot.instance.is_open() { Ok(()) } else { Err(RecycleError::Backend(())) }
    }
}

/// Slots are taken in turn, so that several processes share the load.
pub(super) fn pool(manager: Slots, size: usize) -> Pool<Slots> {
    let built = Pool::builder(manager)
        .max_size(size)
        .queue_mode(QueueMode::Fifo)
        .runtime(deadpool::Runtime::Tokio1)
        .build();
    match built {
        Ok(pool) => pool,
        // Only time limits without a runtime are refused, and the runtime is given above.
        Err(error) => unreachable!("{error}"),
    }
}

impl Group {
    /// A slot for one call, in its turn; starts the processes when none runs.
    pub async fn slot(self: &Arc<Self>, deadline: Instant) -> Result<Object<Slots>, NoSlot> {
        let _caller = self.queue.caller();
        loop {
            self.ensure_running(deadline, false).await?;
            // Only who finds no free slot is put on the list of those who wait.
            let mut got = self.pool.timeout_get(&waiting(Duration::ZERO)).await;
            if let Err(PoolError::Timeout(_)) = got {
                let Some(turn) = self.queue.turn(self.host.limits.server_queue) else {
                    return Err(self.too_many_waiting());
                };
                let wait = deadline.saturating_duration_since(Instant::now());
                got = self.pool.timeout_get(&waiting(wait)).await;
                if got.is_ok() {
                    turn.came();
                }
            }
            match got {
                Ok(slot) => {
                    self.state().last_used = Instant::now();
                    return Ok(slot);
                }
                Err(PoolError::Closed) => return Err(NoSlot::Retired),
                Err(PoolError::Timeout(_)) => {
                    return Err(self.no_slot_in_time());
                }
                // One of several processes is gone and the others are full: wait for any change.
                Err(_) => {
                    if Instant::now() >= deadline {
                        return Err(self.no_slot_in_time());
                    }
                    let _ = timeout(Duration::from_millis(10), self.changed.notified()).await;
                }
            }
        }
    }

    /// Calls that hold a slot.
    pub(super) fn slots_in_use(&self) -> usize {
        let status = self.pool.status();
        status.size.saturating_sub(status.available)
    }

    fn new_slot(&self) -> Option<Slot> {
        let state = self.state();
        let limit = current(&self.record).concurrency_limit();
        let instance = state
            .instances
            .iter()
            .filter(|instance| instance.is_open())
            .min_by_key(|instance| instance.slots.load(Ordering::Acquire))
            .filter(|instance| instance.slots.load(Ordering::Acquire) < limit)?;
        instance.slots.fetch_add(1, Ordering::AcqRel);
        Some(Slot { instance: Arc::clone(instance) })
    }

    /// The refusal of a call that would have to wait behind too many. It is to come back when those will have gone: a crowd
    /// that comes back every second would take the time that the calls need.
    fn too_many_waiting(&self) -> NoSlot {
        metrics::count_refusal(Limit::ServerQueue);
        let wait = self.queue.drained_in();
        let text = format!("Server {} has too many calls waiting", self.server);
        let error = WorkerError::new(ErrorCode::Overloaded, text);
        not_started(error.retry_after(wait.clamp(limits::RETRY_LEAST, limits::RETRY_MOST)).spread())
    }

    fn no_slot_in_time(&self) -> NoSlot {
        let text = format!("Server {} had no free slot in time", self.server);
        not_started(
            WorkerError::new(ErrorCode::DeadlineExceeded, text).with("serverName", self.server.as_str()),
        )
    }
}

fn waiting(wait: Duration) -> Timeouts {
    Timeouts { wait: Some(wait), create: None, recycle: None }
}
