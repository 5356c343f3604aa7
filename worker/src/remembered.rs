//! What a worker remembers of the store by user and server, so that a call needs no look into it.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroUsize,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use lru::LruCache;
use mcp_shared::{
    ids::{ServerName, UserId},
    limits,
};
use tokio::time::Instant;

/// Generations are counted for groups of users, so that a write for one does not keep what belongs to all
/// others from being remembered.
const GENERATIONS: usize = 256;

/// Whose, and for which server.
pub type Key = (UserId, ServerName);

/// Values by user and server, the least used of which are forgotten when they become too many.
pub struct Remembered<V> {
    entries: Mutex<LruCache<Key, Entry<V>>>,
    generations: [AtomicU64; GENERATIONS],
    /// Grows when everything is to be looked at again as soon as that can be done.
    epoch: AtomicU64,
    /// When the store last answered somebody who asks it regularly. `None`: nobody does, since nothing can change
    /// without this worker.
    seen: Mutex<Option<Instant>>,
}

struct Entry<V> {
    value: V,
    epoch: u64,
}

/// A moment, before something is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stamp {
    generation: u64,
    epoch: u64,
}

/// What is remembered.
#[derive(Debug, Clone, PartialEq)]
pub enum Found<V> {
    /// It is what the store has, as far as anybody has said.
    Certain(V),
    /// It is to be read again. If the store does not answer, nobody has said that it changed.
    Doubtful(V),
}

impl<V> Found<V> {
    /// The value, whatever is known about it.
    pub fn value(self) -> V {
        match self {
            Found::Certain(value) | Found::Doubtful(value) => value,
        }
    }
}

impl<V: Clone> Remembered<V> {
    /// Nothing yet.
    pub fn new() -> Self {
        let size = NonZeroUsize::new(limits::SECRET_CACHE).unwrap_or(NonZeroUsize::MIN);
        Self {
            entries: Mutex::new(LruCache::new(size)),
            generations: std::array::from_fn(|_| AtomicU64::new(0)),
            epoch: AtomicU64::new(0),
            seen: Mutex::new(None),
        }
    }

    /// What is remembered of a user and a server.
    pub fn get(&self, key: &Key) -> Option<Found<V>> {
        let epoch = self.epoch.load(Ordering::Acquire);
        let mut entries = self.entries();
        let entry = entries.get(key)?;
        let value = entry.value.clone();
        Some(if entry.epoch == epoch { Found::Certain(value) } else { Found::Doubtful(value) })
    }

    /// To be asked before the store is, and handed to [`Remembered::put`].
    pub fn stamp(&self, key: &Key) -> Stamp {
        let epoch = self.epoch.load(Ordering::Acquire);
        Stamp { generation: self.counter(key).load(Ordering::Acquire), epoch }
    }

    /// Whether nobody has said since then that it changed.
    pub fn is_untouched(&self, key: &Key, since: Stamp) -> bool {
        self.counter(key).load(Ordering::Acquire) == since.generation
    }

    /// Remembers what was read or written, unless it may have changed since `stamp`. It is as certain as it was
    /// then.
    pub fn put(&self, key: &Key, stamp: Stamp, value: V) {
        let mut entries = self.entries();
        if self.is_untouched(key, stamp) {
            entries.put(key.clone(), Entry { value, epoch: stamp.epoch });
        }
    }

    /// Forgets what belongs to a user and a server. What was being read meanwhile is not remembered.
    pub fn forget(&self, key: &Key) {
        self.counter(key).fetch_add(1, Ordering::AcqRel);
        self.entries().pop(key);
    }

    /// Forgets what belongs to a server.
    pub fn forget_server(&self, server: &ServerName) {
        self.touch_all();
        let mut entries = self.entries();
        let keys: Vec<_> =
            entries.iter().map(|(key, _)| key).filter(|key| key.1 == *server).cloned().collect();
        for key in keys {
            entries.pop(&key);
        }
    }

    /// Forgets everything: it may have changed, and nobody would say so again. The store has just answered.
    pub fn forget_all(&self) {
        self.touch_all();
        self.entries().clear();
        self.see();
    }

    /// Has everything read again when it is needed, as long as the store answers. It has just done so.
    pub fn doubt_all(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.see();
    }

    /// Whether the store has been away for so long that what it would say may be another thing by now.
    pub fn is_outdated(&self) -> bool {
        let seen = *self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.is_some_and(|seen| seen.elapsed() > limits::SECRET_TRUST)
    }

    fn see(&self) {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn touch_all(&self) {
        for generation in &self.generations {
            generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn counter(&self, key: &Key) -> &AtomicU64 {
        let mut hasher = DefaultHasher::new();
        key.0.hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % GENERATIONS as u64).unwrap_or(0);
        &self.generations[index]
    }

    fn entries(&self) -> MutexGuard<'_, LruCache<Key, Entry<V>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn key(user: &str, server: &str) -> Key {
        (UserId::parse(user).unwrap(), ServerName::parse_new(server).unwrap())
    }

    #[test]
    fn what_was_read_before_a_change_is_not_remembered() {
        let remembered = Remembered::new();
        let (alice, bob) = (key("alice", "s"), key("bob", "s"));
        let before = remembered.stamp(&alice);
        remembered.forget(&alice);
        remembered.put(&alice, before, 1);
        assert_eq!(remembered.get(&alice), None);
        remembered.put(&alice, remembered.stamp(&alice), 2);
        remembered.put(&bob, remembered.stamp(&bob), 3);
        assert_eq!(remembered.get(&alice), Some(Found::Certain(2)));
        remembered.forget_server(&alice.1);
        assert_eq!((remembered.get(&alice), remembered.get(&bob)), (None, None));
    }

    #[test]
    fn doubts_are_no_reason_to_forget() {
        let remembered = Remembered::new();
        let alice = key("alice", "s");
        remembered.put(&alice, remembered.stamp(&alice), 1);
        assert!(!remembered.is_outdated());
        remembered.doubt_all();
        assert_eq!(remembered.get(&alice), Some(Found::Doubtful(1)));
        remembered.put(&alice, remembered.stamp(&alice), 1);
        assert_eq!(remembered.get(&alice), Some(Found::Certain(1)));
        let long = limits::SECRET_TRUST + Duration::from_secs(1);
        *remembered.seen.lock().unwrap() = Some(Instant::now() - long);
        assert!(remembered.is_outdated());
        remembered.forget_all();
        assert!(remembered.get(&alice).is_none() && !remembered.is_outdated());
    }
}
