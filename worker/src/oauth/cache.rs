//! What a worker remembers of users' tokens, so that a request needs no look into the store.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mcp_shared::{error::WorkerError, limits, remote::OAuthTokens, store::Versioned, timestamp::Timestamp};
use tokio::time::Instant;

use super::Bearer;
pub use crate::remembered::Key;
use crate::remembered::Remembered;

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
pub type Cache = Remembered<Option<Arc<Tokens>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
