//! How much a gateway takes in at once. Whatever comes beyond is refused without waiting, with an answer that says
//! when to come back.

use std::{sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue};
use mcp_shared::{
    config::LimitSettings,
    error::{ErrorCode, WorkerError},
    ids::UserId,
    metrics::{self, Exposition, Limit, Metric},
    users::{Entered, TooMany, Users},
    worker_api::CallContext,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::problem::Problem;

/// The limit that was met, and what is left of it (draft-ietf-httpapi-ratelimit-headers).
const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const LEFT: HeaderName = HeaderName::from_static("ratelimit");

/// Bytes that one permit for bodies stands for.
const UNIT: usize = 1024;

/// What there is room for.
pub struct Admission {
    limits: LimitSettings,
    calls: Arc<Semaphore>,
    bodies: Arc<Semaphore>,
    users: Arc<Users>,
}

/// A call in flight.
#[must_use = "the call counts as long as this is held"]
pub struct InFlight(#[allow(dead_code, reason = "it is held, and not looked at")] OwnedSemaphorePermit);

/// Room for the bytes of one body.
pub struct Room {
    bodies: Arc<Semaphore>,
    taken: Option<OwnedSemaphorePermit>,
}

impl Admission {
    /// Room for as much as the settings say.
    pub fn new(limits: &LimitSettings) -> Self {
        Self {
            calls: Arc::new(Semaphore::new(limits.calls)),
            bodies: Arc::new(Semaphore::new(limits.body_bytes.div_ceil(UNIT))),
            users: Users::new(limits.user),
            limits: limits.clone(),
        }
    }

    /// Takes a call in.
    pub fn call(&self) -> Result<InFlight, Problem> {
        let permit = Arc::clone(&self.calls).try_acquire_owned();
        permit
            .map(InFlight)
            .map_err(|_| overloaded(Limit::GatewayCalls, "This gateway has too many calls in flight"))
    }

    /// Room for a body, of which nothing is taken yet.
    pub fn body(&self) -> Room {
        Room { bodies: Arc::clone(&self.bodies), taken: None }
    }

    /// Lets a call in on behalf of whom it is counted for.
    pub fn user(&self, context: &CallContext) -> Result<Entered, Problem> {
        self.users.enter(counted(context)).map_err(too_many)
    }

    /// Shows limits, and what of them is in use.
    pub fn show(&self, metrics: &Exposition) {
        let limits = &self.limits;
        let (most_calls, most_bytes) = (limits.calls, limits.body_bytes.div_ceil(UNIT) * UNIT);
        let (calls, bodies) = (Arc::clone(&self.calls), Arc::clone(&self.bodies));
        metrics.show_count(Metric::GatewayCalls, move || most_calls - calls.available_permits());
        metrics.show_count(Metric::GatewayCallsLimit, move || most_calls);
        metrics.show_count(Metric::GatewayBody, move || most_bytes - bodies.available_permits() * UNIT);
        metrics.show_count(Metric::GatewayBodyLimit, move || most_bytes);
        // What has no limit shows none.
        if let Some(most) = limits.user.calls {
            metrics.show_count(Metric::UserCallsLimit, move || most);
        }
        if let Some(rate) = limits.user.rate {
            metrics.show(Metric::UserRateLimit, move || rate);
        }
    }
}

/// Whom a call is counted for. Without authentication that is whom it is for; with it, it will be who made it.
fn counted(context: &CallContext) -> &UserId {
    &context.user
}

fn too_many(refused: TooMany) -> Problem {
    let mut problem = Problem::from(refused.error());
    for (name, value) in [(POLICY, refused.policy), (LEFT, refused.left)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            problem = problem.header(name, value);
        }
    }
    problem
}

fn overloaded(limit: Limit, text: &str) -> Problem {
    metrics::count_refusal(limit);
    WorkerError::new(ErrorCode::Overloaded, text).retry_after(Duration::from_secs(1)).into()
}

impl Room {
    /// Has room for so many bytes from now on, or has no more than it had.
    pub fn grow_to(&mut self, bytes: usize) -> Result<(), Problem> {
        let taken = self.taken.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = bytes.div_ceil(UNIT).saturating_sub(taken);
        if more == 0 {
            return Ok(());
        }
        let permit = u32::try_from(more)
            .ok()
            .and_then(|more| Arc::clone(&self.bodies).try_acquire_many_owned(more).ok());
        let Some(permit) = permit else {
            return Err(overloaded(
                Limit::GatewayBodies,
                "This gateway has too much of requests in its memory",
            ));
        };
        match &mut self.taken {
            Some(taken) => taken.merge(permit),
            none => *none = Some(permit),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(calls: usize, body_bytes: usize) -> Admission {
        Admission::new(&LimitSettings { calls, body_bytes, ..LimitSettings::default() })
    }

    #[test]
    fn calls_come_in_until_there_is_no_room_and_again_when_one_is_over() {
        let admission = admission(2, UNIT);
        let (first, _second) = (admission.call().ok().unwrap(), admission.call().ok().unwrap());
        assert_eq!(admission.call().err().unwrap().code(), ErrorCode::Overloaded);
        drop(first);
        assert!(admission.call().is_ok());
    }

    #[test]
    fn bodies_share_their_room() {
        let admission = admission(1, 8 * UNIT);
        let (mut one, mut other) = (admission.body(), admission.body());
        one.grow_to(1).unwrap();
        one.grow_to(5 * UNIT).unwrap();
        one.grow_to(3 * UNIT).unwrap();
        other.grow_to(3 * UNIT).unwrap();
        assert_eq!(other.grow_to(3 * UNIT + 1).err().unwrap().code(), ErrorCode::Overloaded);
        assert_eq!(admission.bodies.available_permits(), 0);
        drop((one, other));
        assert_eq!(admission.bodies.available_permits(), 8);
        assert!(admission.body().grow_to(usize::MAX).is_err());
    }
}
