//! Slots: the rights to calls in flight, in a pool that bounds them.

use std::sync::{Arc, Weak, atomic::Ordering};

use deadpool::managed::{Manager, Metrics, Pool, QueueMode, RecycleError, RecycleResult};

use super::Group;
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
