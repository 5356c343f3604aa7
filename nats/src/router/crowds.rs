//! Servers that no worker has room for, again and again. Whoever comes a moment after such a refusal is told so at once:
//! asking every worker for each of thousands of callers would keep them from the calls that they do have room for.

use std::{
    collections::HashMap,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use mcp_shared::{
    error::{Outcome, WorkerError},
    ids::{ServerName, UserId},
};

use super::lock;
use crate::caller::Now;

/// How long a moment is. Places that come free in it are taken a moment later.
const MOMENT: Now = Now::from_millis(50);
/// How many refusals make a crowd, within [`CROWDED`]. Before that everybody is offered to the workers.
const CROWD: u32 = 8;
/// How long refusals are counted together.
const CROWDED: Now = Now::from_secs(1);
/// Servers, and users' processes of them, that are remembered.
const REMEMBERED: usize = 1_024;

/// A server, and the user where every user has a process.
type Crowd = (ServerName, Option<UserId>);

/// What workers said of a crowd.
struct Refused {
    since: Now,
    count: u32,
    last: Now,
    told: WorkerError,
}

/// What is remembered of refusals.
#[derive(Default)]
pub(super) struct Crowds {
    refused: Mutex<HashMap<Crowd, Refused>>,
    /// Whether anything is, so that it costs nothing where there is no crowd.
    any: AtomicBool,
}

impl Crowds {
    /// Whether anything is remembered at all.
    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// No worker had room: this is what the caller was told.
    pub(super) fn note(&self, now: Now, crowd: Crowd, told: &WorkerError) {
        let mut refused = lock(&self.refused);
        refused.retain(|_, one| now < one.since + CROWDED);
        let new = Refused { since: now, count: 0, last: now, told: told.clone() };
        if refused.len() < REMEMBERED || refused.contains_key(&crowd) {
            let one = refused.entry(crowd).or_insert(new);
            // Nothing is started of a call that is told so at once, whatever became of the one before.
            one.told = told.clone().outcome(Outcome::NotStarted);
            (one.count, one.last) = (one.count + 1, now);
        }
        self.any.store(true, Ordering::Relaxed);
    }

    /// What is to be told at once, because many were told so, one of them a moment ago.
    pub(super) fn told(&self, now: Now, crowd: &Crowd) -> Option<WorkerError> {
        let mut refused = lock(&self.refused);
        let one = refused.get(crowd)?;
        if now >= one.since + CROWDED {
            refused.remove(crowd);
            self.any.store(!refused.is_empty(), Ordering::Relaxed);
            return None;
        }
        (one.count >= CROWD && now < one.last + MOMENT).then(|| one.told.clone().spread())
    }
}

#[cfg(test)]
mod tests {
    use mcp_shared::error::ErrorCode;

    use super::*;

    #[test]
    fn many_refusals_count_for_a_moment_and_for_their_own_crowd() {
        let crowds = Crowds::default();
        let server = |name| ServerName::parse_new(name).unwrap();
        let (slow, other) = ((server("slow"), None), (server("other"), None));
        let full = WorkerError::new(ErrorCode::Overloaded, "full");
        let start = Now::from_secs(5);
        assert!(!crowds.any() && crowds.told(start, &slow).is_none());
        for _ in 0..CROWD {
            assert_eq!(crowds.told(start, &slow), None, "a few are no crowd");
            crowds.note(start, slow.clone(), &full);
        }
        assert!(crowds.any());
        let told = crowds.told(start + Now::from_millis(49), &slow);
        assert_eq!(told, Some(full.clone().outcome(Outcome::NotStarted)));
        assert_eq!(crowds.told(start, &other), None);
        assert_eq!(crowds.told(start, &(server("slow"), Some(UserId::default()))), None);
        assert_eq!(crowds.told(start + MOMENT, &slow), None, "somebody is offered again");
        crowds.note(start + MOMENT, slow.clone(), &full);
        assert!(crowds.told(start + MOMENT, &slow).is_some());
        assert_eq!(crowds.told(start + CROWDED, &slow), None);
        assert!(!crowds.any());
    }
}
