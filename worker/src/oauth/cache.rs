//! What a worker remembers of users' tokens, so that a request needs no look into the store.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use lru::LruCache;
use mcp_shared::{
    error::WorkerError,
    ids::{ServerName, UserId},
    limits,
    remote::OAuthTokens,
    store::Versioned,
    timestamp::Timestamp,
};
use tokio::time::Instant;

use super::Bearer;

/// Generations are counted for groups of users; see `secrets.rs`.
const GENERATIONS: usize = 256;

/// Whose tokens for which server.
pub type Key = (UserId, ServerName);

/// Tokens as they were when they were read.
pub struct Tokens {
    /// The document.
    pub stored: Versioned<OAuthTokens>,
    /// From when on they are to be refreshed, in milliseconds since 1970.
    due: Option<i64>,
    /// Why they could not be refreshed ahead, and until when nobody tries again.
    pause: Mutex<Option<(Instant, WorkerError)>>,
}

impl Tokens {
    /// Tokens that were just read, or just given.
    pub fn new(stored: Versioned<OAuthTokens>) -> Arc<Self> {
        let now = Timestamp::now().millis();
        let due = stored.value.expires_at.map(|end| {
            // Half of what is left: nobody wrote down how long the life was.
            let half = (end.millis() - now) / 2;
            let ahead = i64::try_from(limits::OAUTH_REFRESH_AHEAD.as_millis()).unwrap_or(i64::MAX);
            end.millis() - ahead.min(half.max(0))
        });
        Arc::new(Self { stored, due, pause: Mutex::default() })
    }

    /// What requests are authorized with.
    pub fn bearer(&self) -> Bearer {
        Bearer { token: self.stored.value.access_token.clone(), revision: self.stored.revision }
    }

    /// Whether the access token may still be accepted.
    pub fn lives(&self) -> bool {
        self.stored.value.expires_at.is_none_or(|end| end > Timestamp::now())
    }

    /// Whether it is time to refresh them.
    pub fn due(&self) -> bool {
        self.due.is_some_and(|due| due <= Timestamp::now().millis())
    }

    /// Has nobody try again for a while.
    pub fn pause(&self, time: Duration, error: WorkerError) {
        *lock(&self.pause) = Some((Instant::now() + time, error));
    }

    /// Why nobody should try right now.
    pub fn paused(&self) -> Option<WorkerError> {
        lock(&self.pause)
            .as_ref()
            .filter(|(until, _)| *until > Instant::now())
            .map(|(_, error)| error.clone())
    }
}

/// Tokens by user and server; `None`: the user has none.
pub struct Cache {
    entries: Mutex<LruCache<Key, Option<Arc<Tokens>>>>,
    generations: [AtomicU64; GENERATIONS],
}

impl Cache {
    /// Remembers nothing yet.
    pub fn new() -> Self {
        let size = NonZeroUsize::new(limits::SECRET_CACHE).unwrap_or(NonZeroUsize::MIN);
        Self {
            entries: Mutex::new(LruCache::new(size)),
            generations: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// What is remembered; the outer `None`: nothing.
    pub fn get(&self, key: &Key) -> Option<Option<Arc<Tokens>>> {
        lock(&self.entries).get(key).cloned()
    }

    /// To be asked before the store is, and handed to [`Cache::put`].
    pub fn generation(&self, key: &Key) -> u64 {
        self.counter(key).load(Ordering::Acquire)
    }

    /// Remembers what was read or written, unless it may have changed since `generation`.
    pub fn put(&self, key: &Key, generation: u64, tokens: Option<Arc<Tokens>>) {
        let mut entries = lock(&self.entries);
        if self.generation(key) == generation {
            entries.put(key.clone(), tokens);
        }
    }

    /// Forgets one user's tokens for a server.
    pub fn forget(&self, key: &Key) {
        self.counter(key).fetch_add(1, Ordering::AcqRel);
        lock(&self.entries).pop(key);
    }

    /// Forgets everything.
    pub fn forget_all(&self) {
        for generation in &self.generations {
            generation.fetch_add(1, Ordering::AcqRel);
        }
        lock(&self.entries).clear();
    }

    fn counter(&self, key: &Key) -> &AtomicU64 {
        let mut hasher = DefaultHasher::new();
        key.0.hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % GENERATIONS as u64).unwrap_or(0);
        &self.generations[index]
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
