//! Who waits for a slot, and for how long. The pool keeps them in order; this keeps the times, which
//! tell routers that a server is too busy.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use mcp_shared::limits;
use tokio::time::Instant;

/// The calls on their way to a slot.
#[derive(Default)]
pub struct Queue {
    /// All of them: also those that wait for a start, and those that find a free slot at once.
    callers: AtomicUsize,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    /// In the order in which they came.
    since: BTreeMap<u64, Instant>,
    /// When the last one got its slot, and how long it had waited.
    granted: Option<(Instant, Duration)>,
}

impl Waiting {
    fn enter(&mut self, limit: usize, now: Instant) -> Option<u64> {
        if self.since.len() >= limit {
            return None;
        }
        let number = self.next;
        self.next += 1;
        self.since.insert(number, now);
        Some(number)
    }

    fn came(&mut self, number: u64, now: Instant) {
        if let Some(since) = self.since.get(&number) {
            self.granted = Some((now, now - *since));
        }
    }

    fn longest(&self, now: Instant) -> Duration {
        match (self.since.values().next(), self.granted) {
            (Some(first), _) => now - *first,
            (None, Some((when, waited))) if now - when < limits::SLOT_WAIT_SHOWN => waited,
            _ => Duration::ZERO,
        }
    }
}

impl Queue {
    /// Counts a call until it has its slot or gives up.
    pub fn caller(&self) -> Caller<'_> {
        self.callers.fetch_add(1, Ordering::AcqRel);
        Caller(self)
    }

    /// A place among those that wait, unless so many do already.
    pub fn turn(&self, limit: usize) -> Option<Turn<'_>> {
        let number = self.waiting().enter(limit, Instant::now())?;
        Some(Turn { queue: self, number })
    }

    /// Whether no call is on its way to a slot.
    pub fn is_empty(&self) -> bool {
        self.callers.load(Ordering::Acquire) == 0
    }

    /// How many wait, and how long the first of them has, or the last one had that got its slot a moment
    /// ago: a queue that moves fast may be empty whenever somebody looks.
    pub fn wait(&self) -> (usize, Duration) {
        let waiting = self.waiting();
        (waiting.since.len(), waiting.longest(Instant::now()))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is counted.
pub struct Caller<'a>(&'a Queue);

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        self.0.callers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A call that waits.
pub struct Turn<'a> {
    queue: &'a Queue,
    number: u64,
}

impl Turn<'_> {
    /// It got its slot.
    pub fn came(self) {
        self.queue.waiting().came(self.number, Instant::now());
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.queue.waiting().since.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_how_long_the_first_one_waits() {
        let (mut queue, begin) = (Waiting::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        assert_eq!(queue.longest(at(0)), Duration::ZERO);
        let first = queue.enter(2, at(0)).unwrap();
        let second = queue.enter(2, at(300)).unwrap();
        assert!(queue.enter(2, at(300)).is_none());
        assert_eq!(queue.longest(at(400)), Duration::from_millis(400));
        // The first gives up, the second gets a slot.
        queue.since.remove(&first);
        assert_eq!(queue.longest(at(400)), Duration::from_millis(100));
        queue.came(second, at(500));
        queue.since.remove(&second);
        assert_eq!(queue.longest(at(1_400)), Duration::from_millis(200));
        assert_eq!(queue.longest(at(1_600)), Duration::ZERO);
    }
}
