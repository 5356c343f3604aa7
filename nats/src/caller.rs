//! The router's side of one call, as a state machine: no clock, no bus, no fleet. Whoever drives it
//! tells it what happened and when, and does what it says.
//!
//! Its one rule above all: after GO was sent the call is offered to nobody else, unless the worker said
//! that it did not start it and will not.

use std::time::Duration;

use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    hosting::Refusal,
    ids::WorkerId,
    limits,
};

use crate::wire::CallId;

/// A moment: the time since some start, by the driver's own monotonic clock.
pub type Now = Duration;

/// How long a worker may take to say anything about an offer.
pub const OFFER_PATIENCE: Duration = Duration::from_secs(1);
/// How long after its deadline a started call may still be answered by its worker.
pub const ANSWER_GRACE: Duration = Duration::from_millis(250);
/// How many attempts may fail for reasons that are nobody's refusal.
const FAILURES: u32 = 3;
/// How long a call waits for workers that are there and cannot take it right now.
const RECOVERY: Duration = Duration::from_secs(3);
/// The pause before an attempt that follows on two that brought nothing.
const PAUSE: Duration = Duration::from_millis(25);

/// What the next worker must or must not be.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wish {
    /// Workers that have no room or did not answer.
    pub avoid: Vec<WorkerId>,
    /// Workers that do not own the server although they seemed to.
    pub not_owners: Vec<WorkerId>,
    /// Who owns what the call needs, as a lease says.
    pub owner: Option<WorkerId>,
    /// The owner that a lease names is lost: somebody has to take over from it.
    pub lost_owner: Option<WorkerId>,
}

/// What is to be done now.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// Nothing.
    Stay,
    /// Choose a worker by the wish, and say which one ([`Caller::chosen`], [`Caller::nobody`]).
    Choose,
    /// Send the arguments to the worker that accepted.
    Go(WorkerId, CallId),
    /// The call is over without an answer.
    End(Box<WorkerError>),
}

/// A step, and the attempt that has to be taken back before it.
#[derive(Debug, PartialEq)]
pub struct Turn {
    /// Tell this worker that the attempt is given up.
    pub withdraw: Option<(WorkerId, CallId)>,
    /// Then do this.
    pub step: Step,
}

impl Turn {
    fn just(step: Step) -> Self {
        Self { withdraw: None, step }
    }

    const STAY: Self = Self { withdraw: None, step: Step::Stay };
}

/// What a worker said about an attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// It waits for its turn.
    Wait {
        /// The call's whole time.
        limit: Duration,
    },
    /// It has its place.
    Accept {
        /// The call's whole time.
        limit: Duration,
        /// It may be made again when nobody knows what became of it.
        repeatable: bool,
    },
    /// It was not started, and will not be.
    Refuse(Refusal),
    /// The answer is here.
    Done,
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    Choosing { not_before: Now },
    Offered { worker: WorkerId, attempt: CallId, since: Now },
    Waiting { worker: WorkerId, attempt: CallId },
    Going { worker: WorkerId, attempt: CallId },
    Ended,
}

/// One call.
#[derive(Debug)]
pub struct Caller {
    phase: Phase,
    begun: Now,
    limit: Duration,
    /// The worker's record said so, or the caller.
    limit_known: bool,
    failures: u32,
    rounds: u32,
    wish: Wish,
    /// Workers that said that they have no room, each as often as it did.
    full: Vec<WorkerId>,
    refused: Option<WorkerError>,
    /// Workers that cannot start the server.
    unable: u32,
    /// Somebody who could take it is about to stop, and hands over what it runs.
    leaving: bool,
    /// It may be made again when nobody knows what became of it.
    repeatable: bool,
    /// A worker was lost that had begun it.
    may_have_run: bool,
    /// Since when nobody has been able to take it who is there.
    stuck: Option<Now>,
}

impl Caller {
    /// A call that begins now, with the limit that its caller asked for. It wants a worker at once.
    pub fn new(now: Now, timeout: Option<Duration>) -> Self {
        Self {
            phase: Phase::Choosing { not_before: now },
            begun: now,
            limit: timeout.unwrap_or(limits::TOOL_TIMEOUT),
            limit_known: false,
            failures: 0,
            rounds: 0,
            wish: Wish::default(),
            full: Vec::new(),
            refused: None,
            unable: 0,
            leaving: false,
            repeatable: false,
            may_have_run: false,
            stuck: None,
        }
    }

    /// What the next worker must or must not be.
    pub fn wish(&self) -> &Wish {
        &self.wish
    }

    /// How much of its time is gone.
    pub fn spent(&self, now: Now) -> Duration {
        now.saturating_sub(self.begun)
    }

    /// The worker that has the call right now.
    pub fn worker(&self) -> Option<&WorkerId> {
        match &self.phase {
            Phase::Offered { worker, .. } | Phase::Waiting { worker, .. } | Phase::Going { worker, .. } => {
                Some(worker)
            }
            Phase::Choosing { .. } | Phase::Ended => None,
        }
    }

    /// The attempt that is under way.
    pub fn attempt(&self) -> Option<CallId> {
        match &self.phase {
            Phase::Offered { attempt, .. }
            | Phase::Waiting { attempt, .. }
            | Phase::Going { attempt, .. } => Some(*attempt),
            Phase::Choosing { .. } | Phase::Ended => None,
        }
    }

    /// Whether the arguments were sent for this attempt, so that it may run.
    pub fn is_going(&self, attempt: CallId) -> bool {
        matches!(&self.phase, Phase::Going { attempt: own, .. } if *own == attempt)
    }

    /// Whether it is over.
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// The offer goes to this worker.
    pub fn chosen(&mut self, now: Now, worker: WorkerId, attempt: CallId) {
        if matches!(self.phase, Phase::Choosing { .. }) {
            self.rounds += 1;
            self.phase = Phase::Offered { worker, attempt, since: now };
        }
    }

    /// There is no worker to choose. `why` says so, unless a worker has given a better reason before.
    ///
    /// Workers that could not take it at that moment, because they had been cut off or were just about to
    /// read what they had missed, are asked again for a while.
    pub fn nobody(&mut self, now: Now, why: WorkerError) -> Turn {
        if !matches!(self.phase, Phase::Choosing { .. }) {
            return Turn::STAY;
        }
        let passing =
            self.leaving || self.refused.as_ref().is_some_and(|error| error.code == ErrorCode::NoWorker);
        // A call that had waited long before has as much of a chance as one that is new.
        if passing && now.saturating_sub(*self.stuck.get_or_insert(now)) < RECOVERY {
            self.wish.avoid.clear();
            self.phase = Phase::Choosing { not_before: now + RECOVERY / 20 };
            return Turn::STAY;
        }
        let error = self.refused.take().unwrap_or(why);
        self.end(error, Outcome::NotStarted)
    }

    /// A worker said something. What belongs to another attempt is passed over.
    pub fn said(&mut self, now: Now, attempt: CallId, said: Said) -> Turn {
        if self.attempt() != Some(attempt) {
            return Turn::STAY;
        }
        let Some(worker) = self.worker().cloned() else { return Turn::STAY };
        match said {
            Said::Wait { limit } => {
                self.stuck = None;
                self.learn(limit);
                if matches!(self.phase, Phase::Offered { .. }) {
                    self.phase = Phase::Waiting { worker, attempt };
                }
                Turn::STAY
            }
            Said::Accept { limit, repeatable } => {
                self.stuck = None;
                self.learn(limit);
                self.repeatable = repeatable;
                if matches!(self.phase, Phase::Going { .. }) {
                    return Turn::STAY;
                }
                // After a pause of this process an answer may be read before the clock is.
                if self.spent(now) >= self.limit {
                    return self.out_of_time();
                }
                self.phase = Phase::Going { worker: worker.clone(), attempt };
                Turn::just(Step::Go(worker, attempt))
            }
            Said::Refuse(refusal) => self.refused(now, worker, refusal),
            Said::Done => {
                self.phase = Phase::Ended;
                Turn::STAY
            }
        }
    }

    /// The worker is gone: it answers no more.
    pub fn lost(&mut self, now: Now, lost: &WorkerId) -> Turn {
        if self.worker() != Some(lost) {
            return Turn::STAY;
        }
        if matches!(self.phase, Phase::Going { .. }) {
            let text = "The worker that ran the call was lost";
            // Should it come back, it is not to go on.
            let withdraw = Some(lost.clone()).zip(self.attempt());
            let error = WorkerError::new(ErrorCode::WorkerLost, text).outcome(Outcome::Unknown);
            if !self.repeatable {
                return Turn { withdraw, ..self.end(error, Outcome::Unknown) };
            }
            self.may_have_run = true;
            self.refused = Some(error);
            self.blame(lost);
            return Turn { withdraw, ..self.failed(now, lost.clone()) };
        }
        self.blame(lost);
        self.failed(now, lost.clone())
    }

    /// The bus is away for longer than calls can wait for it.
    pub fn cut_off(&mut self) -> Turn {
        match self.phase {
            Phase::Ended => Turn::STAY,
            Phase::Going { .. } => {
                let text = "The message bus was lost while the call was in flight";
                self.end(WorkerError::new(ErrorCode::WorkerLost, text), Outcome::Unknown)
            }
            _ => self.end(bus_unavailable(), Outcome::NotStarted),
        }
    }

    /// The bus is away, and nobody can be heard: what was offered is not taken for unanswered, and nothing is
    /// offered until it is back.
    pub fn without_bus(&mut self, now: Now) {
        match &mut self.phase {
            Phase::Choosing { not_before } => *not_before = (*not_before).max(now + PAUSE),
            Phase::Offered { since, .. } => *since = now,
            Phase::Waiting { .. } | Phase::Going { .. } | Phase::Ended => {}
        }
    }

    /// The caller is gone.
    pub fn cancel(&mut self) -> Turn {
        let outcome = self.outcome();
        let withdraw = self.worker().cloned().zip(self.attempt());
        let error = WorkerError::new(ErrorCode::Cancelled, "The call was cancelled");
        Turn { withdraw, ..self.end(error, outcome) }
    }

    /// The answer cannot be taken in.
    pub fn give_up(&mut self, error: WorkerError) -> Turn {
        let outcome = self.outcome();
        let withdraw = self.worker().cloned().zip(self.attempt());
        Turn { withdraw, ..self.end(error, outcome) }
    }

    /// Time goes by.
    pub fn tick(&mut self, now: Now) -> Turn {
        let spent = self.spent(now);
        match &self.phase {
            Phase::Ended => Turn::STAY,
            // A worker that has the call knows best why it took so long, and says it when the time is over.
            Phase::Going { .. } | Phase::Waiting { .. } if spent < self.limit + ANSWER_GRACE => Turn::STAY,
            _ if spent >= self.limit => self.out_of_time(),
            Phase::Choosing { not_before } if now >= *not_before => Turn::just(Step::Choose),
            Phase::Offered { worker, attempt, since } if now.saturating_sub(*since) >= OFFER_PATIENCE => {
                let (worker, attempt) = (worker.clone(), *attempt);
                let turn = self.failed(now, worker.clone());
                Turn { withdraw: Some((worker, attempt)), ..turn }
            }
            _ => Turn::STAY,
        }
    }

    /// What became of the call as a whole, when this attempt came to such an end.
    pub fn honest(&self, error: WorkerError) -> WorkerError {
        match error.outcome {
            Some(Outcome::NotStarted) if self.may_have_run => error.outcome(Outcome::Unknown),
            _ => error,
        }
    }

    /// A worker that was named as the owner is lost.
    fn blame(&mut self, lost: &WorkerId) {
        if self.wish.owner.as_ref() == Some(lost) {
            self.wish.owner = None;
            self.wish.lost_owner = Some(lost.clone());
        }
    }

    fn outcome(&self) -> Outcome {
        match self.phase {
            Phase::Going { .. } => Outcome::Unknown,
            _ => Outcome::NotStarted,
        }
    }

    fn learn(&mut self, limit: Duration) {
        if !self.limit_known {
            self.limit_known = true;
            self.limit = limit;
        }
    }

    fn refused(&mut self, now: Now, worker: WorkerId, refusal: Refusal) -> Turn {
        let going = matches!(self.phase, Phase::Going { .. });
        let hinted = self.wish.owner.take();
        let refusal = match refusal {
            // It began to stop when it had the call already. What it runs is about to be somebody else's.
            Refusal::Busy { error } if error.code == ErrorCode::ShuttingDown => {
                if going {
                    self.failures += 1;
                }
                Refusal::Draining
            }
            other => other,
        };
        match refusal {
            Refusal::Error { error } => return self.end(error, Outcome::NotStarted),
            Refusal::NotOwner { owner: Some(owner) } if owner != worker => {
                // Nobody else may take it, and it has no room. (Once may have been about one attempt only.)
                if self.full.iter().filter(|one| **one == owner).count() > 1 {
                    let error = self.refused.take().unwrap_or_else(no_worker);
                    return self.end(error, Outcome::NotStarted);
                }
                // The owner may be lost. It is asked once; if it is gone, somebody takes over. Who was
                // asked to and names it again saw that it renews its lease: it is not lost after all,
                // and only connected anew.
                let back = self.wish.lost_owner.take().as_ref() == Some(&owner);
                self.wish.avoid.retain(|one| *one != owner);
                self.wish.owner = Some(owner);
                // An owner that is named again and again is one that cannot take the call yet.
                if back || hinted.is_some() || self.rounds > 4 {
                    return self.again(now);
                }
                self.phase = Phase::Choosing { not_before: now };
                return Turn::just(Step::Choose);
            }
            Refusal::NotOwner { .. } => {
                if !self.wish.not_owners.contains(&worker) {
                    self.wish.not_owners.push(worker);
                }
                if self.rounds <= 2 {
                    self.phase = Phase::Choosing { not_before: now };
                    return Turn::just(Step::Choose);
                }
            }
            Refusal::Busy { error } => {
                let unable = !matches!(error.code, ErrorCode::Overloaded | ErrorCode::NoWorker);
                if unable {
                    // It cannot be started there. Where two workers cannot, others are not tried.
                    self.unable += 1;
                    if self.unable > 1 {
                        return self.end(error, Outcome::NotStarted);
                    }
                }
                self.refused = Some(error);
                self.full.push(worker.clone());
                self.wish.avoid.push(worker);
                if going {
                    self.failures += 1;
                }
            }
            Refusal::Draining => {
                self.leaving = true;
                if !self.wish.not_owners.contains(&worker) {
                    self.wish.not_owners.push(worker.clone());
                }
                // What it alone may own, it gives back in a moment.
                if hinted.is_none() {
                    self.wish.avoid.push(worker);
                }
            }
        }
        if self.failures >= FAILURES {
            let error = self.refused.take().unwrap_or_else(no_worker);
            return self.end(error, Outcome::NotStarted);
        }
        self.again(now)
    }

    /// An attempt brought nothing, and nobody said why.
    fn failed(&mut self, now: Now, worker: WorkerId) -> Turn {
        self.failures += 1;
        if self.failures >= FAILURES {
            let error = self.refused.take().unwrap_or_else(no_worker);
            return self.end(error, Outcome::NotStarted);
        }
        self.wish.avoid.push(worker);
        self.again(now)
    }

    fn again(&mut self, now: Now) -> Turn {
        if self.rounds <= 2 {
            self.phase = Phase::Choosing { not_before: now };
            return Turn::just(Step::Choose);
        }
        self.phase = Phase::Choosing { not_before: now + PAUSE * self.rounds.min(8) };
        Turn::STAY
    }

    fn end(&mut self, error: WorkerError, outcome: Outcome) -> Turn {
        if self.is_ended() {
            return Turn::STAY;
        }
        self.phase = Phase::Ended;
        Turn::just(Step::End(Box::new(self.honest(error.or_outcome(outcome)))))
    }

    fn out_of_time(&mut self) -> Turn {
        let outcome = self.outcome();
        let withdraw = self.worker().cloned().zip(self.attempt());
        let late = self.late();
        Turn { withdraw, ..self.end(late, outcome) }
    }

    fn late(&self) -> WorkerError {
        let text = format!("The call did not finish within {} ms", self.limit.as_millis());
        WorkerError::new(ErrorCode::DeadlineExceeded, text)
    }
}

/// Nobody can take a call right now.
pub fn no_worker() -> WorkerError {
    WorkerError::new(ErrorCode::NoWorker, "No worker can take the call right now")
        .outcome(Outcome::NotStarted)
        .retry_after(Duration::from_secs(1))
}

/// The bus is away.
pub fn bus_unavailable() -> WorkerError {
    WorkerError::new(ErrorCode::BusUnavailable, "The message bus cannot be reached")
        .outcome(Outcome::NotStarted)
        .retry_after(Duration::from_secs(1))
}
