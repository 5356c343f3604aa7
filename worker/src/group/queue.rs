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

/// Of how many slots the pace is an average.
const PACE_OF: u32 = 8;

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
    /// How long a slot takes to come free, on average of the last ones that came to somebody who waited.
    pace: Option<Duration>,
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
        let Some(since) = self.since.get(&number).copied() else { return };
        // Only while somebody waits do slots come free as fast as they can.
        let begin = self.granted.map_or(since, |(last, _)| last.max(since));
        let took = now - begin;
        self.pace = Some(self.pace.map_or(took, |pace| (pace * (PACE_OF - 1) + took) / PACE_OF));
        self.granted = Some((now, now - since));
    }

    /// How long it will be until all have gone, as far as can be seen.
    fn drained_in(&self, now: Instant) -> Duration {
        let calls = u32::try_from(self.since.len()).unwrap_or(u32::MAX);
        let by_pace = self.pace.map_or(Duration::ZERO, |pace| pace.saturating_mul(calls));
        by_pace.max(self.longest(now))
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

    /// How long it will be until all that wait now have gone, as far as can be seen: by how fast slots came free lately, and
    /// no less than the first one has waited.
    pub fn drained_in(&self) -> Duration {
        self.waiting().drained_in(Instant::now())
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

    #[test]
    fn tells_when_those_who_wait_will_have_gone() {
        let (mut queue, begin) = (Waiting::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        let callers: Vec<_> = (0..100).map(|_| queue.enter(100, at(0)).unwrap()).collect();
        assert_eq!(queue.drained_in(at(0)), Duration::ZERO, "nothing is known yet");
        assert_eq!(queue.drained_in(at(30)), Duration::from_millis(30));
        for (caller, ms) in callers.iter().zip([40, 80, 120, 160]) {
            queue.came(*caller, at(ms));
            queue.since.remove(caller);
        }
        assert_eq!(queue.drained_in(at(160)), Duration::from_millis(96 * 40));
        // Nothing more comes: what they have waited says more than what was.
        assert_eq!(queue.drained_in(at(9_000)), Duration::from_millis(9_000));
        // Times without anybody waiting are no times of the server.
        queue.since.clear();
        let late = queue.enter(100, at(60_000)).unwrap();
        queue.came(late, at(60_040));
        assert_eq!(queue.pace, Some(Duration::from_millis(40)));
    }
}
