//! The worker's side of calls, as a state machine over all of them: no clock, no bus, no processes.
//!
//! What it sees to: an attempt starts at most once, only after GO, only while its place is held, and
//! only on messages that are known to be young. What was said to be refused never starts.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use mcp_shared::{error::WorkerError, ids::WorkerId};

use crate::{caller::Now, wire::CallId};

/// How long a place is held for a GO, and how long the parts of a GO may be apart.
pub const HOLD: Duration = Duration::from_secs(2);
/// A worker that has not heard its own pulse of this age or younger starts nothing.
pub const FRESH: Duration = Duration::from_secs(1);
/// How long answers are kept for routers that did not get them.
pub const KEEP: Duration = Duration::from_secs(30);
/// Bytes of kept answers.
const KEPT_BYTES: usize = 64 * 1024 * 1024;
/// A router that asked for nothing for so long is gone, and its calls are given up.
pub const ROUTER_SILENCE: Duration = Duration::from_secs(5);
/// Attempts that are remembered after they are over.
const REMEMBERED: usize = 65_536;

/// How old the messages are that a worker reads: it sends itself pulses, which travel in one stream with
/// everything else. While the last pulse that came is young, what comes after it is young as well. After
/// a freeze, an outage or a backlog it is not, until a new pulse has come through.
#[derive(Debug, Default)]
pub struct Freshness {
    pulse_sent: Option<Now>,
}

impl Freshness {
    /// A pulse came, which was sent then.
    pub fn pulse(&mut self, sent: Now) {
        self.pulse_sent = self.pulse_sent.max(Some(sent));
    }

    /// Whether messages that are read now can be trusted to be young.
    pub fn is_fresh(&self, now: Now) -> bool {
        self.pulse_sent.is_some_and(|sent| now.saturating_sub(sent) < FRESH)
    }
}

/// The end of a call, as its router is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// The server's answer.
    Answer(Bytes),
    /// Why there is none.
    Failed(WorkerError),
}

/// What is said about an attempt, once more or for the first time.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// It waits.
    Wait,
    /// Its place is held.
    Accept,
    /// It was not started and will not be.
    Refuse,
    /// Its end.
    End(Ending),
    /// It ran, and its end is not kept any more.
    Forgotten,
}

/// What to do about an offer.
#[derive(Debug, PartialEq)]
pub enum OnOffer {
    /// Look for a place.
    Admit,
    /// Say this.
    Say(Reply),
    /// Nothing.
    Ignore,
}

/// What to do about a part of a GO.
#[derive(Debug, PartialEq)]
pub enum OnGo {
    /// Take it in.
    Take,
    /// Say this; give up the place, if there is one.
    Say(Reply),
    /// Nothing.
    Ignore,
}

/// What to do about a call that is given up.
#[derive(Debug, PartialEq)]
pub enum GivenUp {
    /// It has no place and does not run.
    Nothing,
    /// Give up its place.
    Place,
    /// Cancel it.
    Running,
}

#[derive(Debug)]
enum State {
    Waiting,
    Held { since: Now },
    Receiving { since: Now },
    Running,
    Ended { ending: Option<Ending> },
}

#[derive(Debug)]
struct Entry {
    router: WorkerId,
    state: State,
}

/// The last ids of a kind.
#[derive(Debug, Default)]
struct Memory {
    ids: HashSet<CallId>,
    order: VecDeque<CallId>,
}

impl Memory {
    fn contains(&self, call: CallId) -> bool {
        self.ids.contains(&call)
    }

    fn insert(&mut self, call: CallId) {
        if self.ids.insert(call) {
            self.order.push_back(call);
            if self.order.len() > REMEMBERED
                && let Some(oldest) = self.order.pop_front()
            {
                self.ids.remove(&oldest);
            }
        }
    }
}

/// All calls of one worker.
#[derive(Debug, Default)]
pub struct Desk {
    calls: HashMap<CallId, Entry>,
    /// Attempts that were refused or given up, and those whose end has arrived: never to be started.
    over: Memory,
    /// Attempts that ran, and whose end nobody took while it was kept. They are few, and remembered on
    /// their own: whoever asks for one must not hear that it was not started.
    ran: Memory,
    /// Ends that are kept, oldest first.
    kept: VecDeque<(Now, CallId)>,
    kept_bytes: usize,
    routers: HashMap<WorkerId, Now>,
}

impl Desk {
    /// An offer came. The router has to be told something about every offer that is young.
    pub fn offer(&mut self, now: Now, fresh: bool, call: CallId, router: &WorkerId) -> OnOffer {
        if let Some(reply) = self.standing(call) {
            return reply.map_or(OnOffer::Ignore, OnOffer::Say);
        }
        if !fresh || self.over.contains(call) {
            self.over.insert(call);
            return OnOffer::Say(Reply::Refuse);
        }
        self.heard(now, router);
        self.calls.insert(call, Entry { router: router.clone(), state: State::Waiting });
        OnOffer::Admit
    }

    /// Whether an attempt was met before, so that what is said about it says what became of that.
    pub fn knows(&self, call: CallId) -> bool {
        self.calls.contains_key(&call) || self.ran.contains(call) || self.over.contains(call)
    }

    /// The call was refused. Says whether the router still has to hear of it.
    pub fn refused(&mut self, call: CallId) -> bool {
        match self.calls.get(&call).map(|entry| &entry.state) {
            Some(State::Waiting | State::Held { .. } | State::Receiving { .. }) => {
                self.calls.remove(&call);
                self.over.insert(call);
                true
            }
            _ => false,
        }
    }

    /// The call has its place. Says whether it is still wanted.
    pub fn held(&mut self, now: Now, call: CallId) -> bool {
        match self.calls.get_mut(&call) {
            Some(entry) if matches!(entry.state, State::Waiting) => {
                entry.state = State::Held { since: now };
                true
            }
            _ => false,
        }
    }

    /// A part of the arguments came.
    pub fn go(&mut self, now: Now, fresh: bool, call: CallId) -> OnGo {
        let Some(entry) = self.calls.get_mut(&call) else {
            if self.ran.contains(call) {
                return OnGo::Say(Reply::Forgotten);
            }
            // Whatever it was, it is not started from now on either.
            self.over.insert(call);
            return OnGo::Say(Reply::Refuse);
        };
        match &mut entry.state {
            State::Held { since } | State::Receiving { since } => {
                if !fresh || now.saturating_sub(*since) > HOLD {
                    self.calls.remove(&call);
                    self.over.insert(call);
                    return OnGo::Say(Reply::Refuse);
                }
                entry.state = State::Receiving { since: now };
                OnGo::Take
            }
            // Nobody was told to send it.
            State::Waiting | State::Running => OnGo::Ignore,
            State::Ended { ending } => OnGo::Say(ending.clone().map_or(Reply::Forgotten, Reply::End)),
        }
    }

    /// All parts are there. Says whether the call may start now; it counts as started then.
    pub fn start(&mut self, call: CallId) -> bool {
        match self.calls.get_mut(&call) {
            Some(entry) if matches!(entry.state, State::Receiving { .. }) => {
                entry.state = State::Running;
                true
            }
            _ => false,
        }
    }

    /// The call is over. Says whether its router has to hear of it.
    pub fn ended(&mut self, now: Now, call: CallId, ending: &Ending) -> bool {
        let Some(entry) = self.calls.get_mut(&call) else { return false };
        if !matches!(entry.state, State::Running) {
            return false;
        }
        entry.state = State::Ended { ending: Some(ending.clone()) };
        self.kept_bytes += weight(ending);
        self.kept.push_back((now, call));
        self.drop_kept(now);
        true
    }

    /// The router gave the call up.
    pub fn cancel(&mut self, now: Now, call: CallId) -> GivenUp {
        match self.calls.get_mut(&call) {
            None => {
                self.over.insert(call);
                GivenUp::Nothing
            }
            Some(entry) => match entry.state {
                State::Waiting | State::Held { .. } | State::Receiving { .. } => {
                    self.calls.remove(&call);
                    self.over.insert(call);
                    GivenUp::Place
                }
                State::Running => {
                    entry.state = State::Ended { ending: None };
                    self.kept.push_back((now, call));
                    GivenUp::Running
                }
                State::Ended { .. } => GivenUp::Nothing,
            },
        }
    }

    /// A router asks about calls that it has heard nothing of, and says which it is done with. Returned
    /// is what it has to be told; a call that nothing is known of was not started, and will not be.
    pub fn probe(
        &mut self,
        now: Now,
        router: &WorkerId,
        open: &[CallId],
        done: &[CallId],
    ) -> Vec<(CallId, Reply)> {
        self.heard(now, router);
        for call in done {
            if self.calls.get(call).is_some_and(|entry| matches!(entry.state, State::Ended { .. })) {
                self.release(*call);
                self.over.insert(*call);
            }
        }
        let mut replies = Vec::new();
        for call in open {
            match self.standing(*call) {
                Some(reply) => replies.extend(reply.map(|reply| (*call, reply))),
                None => {
                    self.over.insert(*call);
                    replies.push((*call, Reply::Refuse));
                }
            }
        }
        replies
    }

    /// Time goes by: places that no GO came for, and calls of routers that are gone. While this worker
    /// itself hears nothing, the silence of routers means nothing.
    pub fn tick(&mut self, now: Now, fresh: bool) -> Vec<(CallId, GivenUp)> {
        self.drop_kept(now);
        if !fresh {
            self.routers.values_mut().for_each(|heard| *heard = now);
        }
        let silent: HashSet<WorkerId> = self
            .routers
            .iter()
            .filter(|(_, heard)| now.saturating_sub(**heard) > ROUTER_SILENCE)
            .map(|(router, _)| router.clone())
            .collect();
        let mut given_up = Vec::new();
        for (call, entry) in &self.calls {
            let late = match entry.state {
                State::Held { since } | State::Receiving { since } => now.saturating_sub(since) > HOLD,
                State::Waiting | State::Running => false,
                State::Ended { .. } => continue,
            };
            if late || silent.contains(&entry.router) {
                given_up.push(*call);
            }
        }
        let given_up = given_up.into_iter().map(|call| (call, self.cancel(now, call))).collect();
        self.routers.retain(|router, _| !silent.contains(router));
        given_up
    }

    /// Calls that are neither over nor refused.
    pub fn open(&self) -> usize {
        self.calls.values().filter(|entry| !matches!(entry.state, State::Ended { .. })).count()
    }

    /// What can be said of a call that is known, or that is known to have run; inside, nothing while it runs.
    fn standing(&self, call: CallId) -> Option<Option<Reply>> {
        let Some(entry) = self.calls.get(&call) else {
            return self.ran.contains(call).then_some(Some(Reply::Forgotten));
        };
        Some(match &entry.state {
            State::Waiting => Some(Reply::Wait),
            State::Held { .. } => Some(Reply::Accept),
            State::Receiving { .. } | State::Running => None,
            State::Ended { ending } => Some(ending.clone().map_or(Reply::Forgotten, Reply::End)),
        })
    }

    fn heard(&mut self, now: Now, router: &WorkerId) {
        match self.routers.get_mut(router) {
            Some(heard) => *heard = now,
            None => {
                self.routers.insert(router.clone(), now);
            }
        }
    }

    fn release(&mut self, call: CallId) {
        if let Some(Entry { state: State::Ended { ending }, .. }) = self.calls.remove(&call) {
            self.kept_bytes = self.kept_bytes.saturating_sub(ending.as_ref().map_or(0, weight));
        }
    }

    fn drop_kept(&mut self, now: Now) {
        while let Some((at, call)) = self.kept.front().copied() {
            let gone = !self.calls.contains_key(&call);
            if !gone && now.saturating_sub(at) < KEEP && self.kept_bytes <= KEPT_BYTES {
                return;
            }
            self.kept.pop_front();
            if !gone {
                self.release(call);
                self.ran.insert(call);
            }
        }
    }
}

fn weight(ending: &Ending) -> usize {
    match ending {
        Ending::Answer(answer) => answer.len() + 256,
        Ending::Failed(_) => 512,
    }
}
