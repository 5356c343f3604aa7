//! What one user may ask at once and in a second, so that nobody takes all that there is.
//!
//! It counts what comes by one way in: a gateway counts the calls that it is sent by HTTP, and a worker those of services
//! that it answers on NATS.

use std::{
    collections::{HashMap, hash_map},
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;

use crate::{
    config::UserLimits,
    error::{ErrorCode, Outcome, WorkerError},
    ids::UserId,
    limits,
    metrics::{self, Limit},
};

/// Who is here, and how often they came lately.
pub struct Users {
    limits: UserLimits,
    state: Mutex<State>,
}

struct State {
    /// Only of users who have calls in flight.
    calls: HashMap<UserId, usize>,
    buckets: LruCache<UserId, Bucket>,
}

/// A call that was let in. It counts until this is dropped.
#[derive(Default)]
#[must_use = "the call counts as long as this is held"]
pub struct Entered(Option<(Arc<Users>, UserId)>);

/// A call that was not.
#[derive(Debug, Clone, PartialEq)]
pub struct TooMany {
    /// What it would have gone beyond.
    pub limit: Limit,
    /// After how long there will be room; where nobody can know, when to look again.
    pub wait: Duration,
    /// The limit, as the header field `RateLimit-Policy` has it.
    pub policy: String,
    /// How much of it is left, as the header field `RateLimit` has it.
    pub left: String,
}

impl TooMany {
    /// What the caller is told.
    pub fn error(&self) -> WorkerError {
        let text = match self.limit {
            Limit::UserRate => "This user has made too many calls lately",
            _ => "This user has too many calls in flight",
        };
        WorkerError::new(ErrorCode::RateLimited, text).outcome(Outcome::NotStarted).retry_after(self.wait)
    }
}

impl Users {
    /// Nobody is here yet.
    pub fn new(limits: UserLimits) -> Arc<Self> {
        let size = NonZeroUsize::new(limits::USERS).unwrap_or(NonZeroUsize::MIN);
        let state = State { calls: HashMap::new(), buckets: LruCache::new(size) };
        Arc::new(Self { limits, state: Mutex::new(state) })
    }

    /// Lets a user's call in, or says at once why not.
    pub fn enter(self: &Arc<Self>, user: &UserId) -> Result<Entered, TooMany> {
        self.enter_at(user, Instant::now()).inspect_err(|refused| metrics::count_refusal(refused.limit))
    }

    fn enter_at(self: &Arc<Self>, user: &UserId, now: Instant) -> Result<Entered, TooMany> {
        if self.limits == UserLimits::default() {
            return Ok(Entered(None));
        }
        let mut state = self.state();
        let in_flight = state.calls.get(user).copied().unwrap_or(0);
        if let Some(most) = self.limits.calls.filter(|most| in_flight >= *most) {
            return Err(TooMany {
                limit: Limit::UserCalls,
                // Nobody knows when one of them will be over.
                wait: Duration::from_secs(1),
                policy: format!("\"calls\";q={most};qu=\"concurrent-requests\""),
                left: "\"calls\";r=0".to_owned(),
            });
        }
        if let Some(rate) = self.limits.rate {
            // Whoever has not come for longest is forgotten first, and has a full bucket when they come again.
            let bucket = match state.buckets.get_mut(user) {
                Some(bucket) => bucket,
                None => state.buckets.get_or_insert_mut(user.clone(), || Bucket { full_at: now }),
            };
            if let Err(wait) = bucket.take(rate, now) {
                let (burst, window) = (burst(rate), (burst(rate) / rate).ceil());
                return Err(TooMany {
                    limit: Limit::UserRate,
                    wait,
                    policy: format!("\"rate\";q={burst};w={window}"),
                    left: format!("\"rate\";r=0;t={}", wait.as_secs_f64().ceil().max(1.0)),
                });
            }
        }
        *state.calls.entry(user.clone()).or_default() += 1;
        Ok(Entered(Some((Arc::clone(self), user.clone()))))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let Some((users, user)) = self.0.take() else { return };
        if let hash_map::Entry::Occupied(mut calls) = users.state().calls.entry(user) {
            *calls.get_mut() -= 1;
            if *calls.get() == 0 {
                calls.remove();
            }
        }
    }
}

/// A token bucket, kept as the one moment at which it will be full again (the generic cell rate algorithm).
/// It holds what comes in one second, and never less than one call.
struct Bucket {
    full_at: Instant,
}

/// Calls that a full bucket has.
fn burst(rate: f64) -> f64 {
    rate.ceil().max(1.0)
}

impl Bucket {
    /// Takes one call out, or says when there will be one.
    fn take(&mut self, rate: f64, now: Instant) -> Result<(), Duration> {
        let one = Duration::from_secs_f64(1.0 / rate);
        let others = one.mul_f64(burst(rate) - 1.0);
        let used = self.full_at.saturating_duration_since(now);
        if used > others {
            return Err(used - others);
        }
        self.full_at = now + used + one;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> UserId {
        UserId::parse(name).unwrap()
    }

    fn users(calls: Option<usize>, rate: Option<f64>) -> Arc<Users> {
        Users::new(UserLimits { calls, rate })
    }

    #[test]
    fn without_limits_nobody_is_counted() {
        let users = users(None, None);
        let all: Vec<_> = (0..100).map(|_| users.enter(&user("alice")).ok().unwrap()).collect();
        assert_eq!(all.len(), 100);
        assert!(users.state().calls.is_empty() && users.state().buckets.is_empty());
    }

    #[test]
    fn calls_in_flight_are_counted_by_user_until_they_are_over() {
        let users = users(Some(2), None);
        let (first, _second) =
            (users.enter(&user("alice")).ok().unwrap(), users.enter(&user("alice")).ok().unwrap());
        let refused = users.enter(&user("alice")).err().unwrap();
        assert_eq!((refused.limit, refused.wait), (Limit::UserCalls, Duration::from_secs(1)));
        assert_eq!(refused.policy, "\"calls\";q=2;qu=\"concurrent-requests\"");
        assert_eq!(refused.error().code, ErrorCode::RateLimited);
        drop(users.enter(&user("bob")).ok().unwrap());
        drop(first);
        drop(users.enter(&user("alice")).ok().unwrap());
        assert_eq!(users.state().calls.len(), 1, "who has no calls is not remembered");
    }

    #[test]
    fn a_bucket_says_exactly_when_it_has_a_call_again() {
        let (users, begin) = (users(None, Some(4.0)), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        for _ in 0..4 {
            drop(users.enter_at(&user("alice"), at(0)).ok().unwrap());
        }
        let refused = users.enter_at(&user("alice"), at(100)).err().unwrap();
        assert_eq!((refused.limit, refused.wait), (Limit::UserRate, Duration::from_millis(150)));
        assert_eq!(
            (refused.policy.as_str(), refused.left.as_str()),
            ("\"rate\";q=4;w=1", "\"rate\";r=0;t=1")
        );
        assert!(users.enter_at(&user("bob"), at(100)).is_ok());
        // To be refused costs nothing, and to wait as long as was said is enough.
        assert!(users.enter_at(&user("alice"), at(249)).is_err());
        assert!(users.enter_at(&user("alice"), at(250)).is_ok());
        assert!(users.enter_at(&user("alice"), at(250)).is_err());
        // A bucket never holds more than a second's calls.
        let later = (0..10).filter(|_| users.enter_at(&user("alice"), at(60_000)).is_ok()).count();
        assert_eq!(later, 4);
    }

    #[test]
    fn slow_rates_have_honest_waits() {
        let (users, begin) = (users(None, Some(0.1)), Instant::now());
        assert!(users.enter_at(&user("alice"), begin).is_ok());
        let refused = users.enter_at(&user("alice"), begin + Duration::from_millis(500)).err().unwrap();
        assert_eq!(refused.wait, Duration::from_millis(9_500));
        assert_eq!(
            (refused.policy.as_str(), refused.left.as_str()),
            ("\"rate\";q=1;w=10", "\"rate\";r=0;t=10")
        );
    }

    #[test]
    fn memory_is_bounded_however_many_users_come() {
        let users = users(None, Some(1.0));
        for number in 0..limits::USERS + 100 {
            drop(users.enter(&user(&format!("user-{number}"))).ok().unwrap());
        }
        assert_eq!(users.state().buckets.len(), limits::USERS);
        assert!(users.state().calls.is_empty());
    }
}
