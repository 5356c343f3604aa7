//! A worker: the real `Desk` and `Freshness`, and around them what its driver does.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use bytes::Bytes;
use mcp_nats::{
    callee::{Desk, Ending, FRESH, Freshness, GivenUp, HOLD, OnGo, OnOffer, Reply},
    caller::{Now, Said},
    frames::{Assembled, Assembly},
    wire::{CallId, Frame},
};
use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    hosting::{Placing, Refusal},
};

use crate::{
    bus::{Event, Letter, Mail, Misdeed, Node, Shared},
    clock::{Clock, router_id, worker_id},
};

/// How long a call waits before its router hears of it.
const SILENT_WAIT: Duration = Duration::from_millis(100);

/// A call that was admitted.
#[derive(Debug)]
struct Waiting {
    id: CallId,
    server: usize,
    deadline: Now,
    /// Whose lease it waits for, and when that was renewed last.
    over: Option<(usize, Now)>,
}

/// One worker.
#[derive(Debug)]
pub struct Worker {
    pub index: usize,
    pub clock: Clock,
    pub frozen: bool,
    pub inbox: VecDeque<Event>,
    pub desk: Desk,
    fresh: Freshness,
    slots: usize,
    queue: usize,
    draining: bool,
    /// Where answers go, and until when a call may take.
    known: BTreeMap<CallId, (usize, Now, Duration)>,
    waiting: Vec<Waiting>,
    places: BTreeMap<CallId, Assembly>,
    /// When the oldest part of the arguments was sent.
    oldest: BTreeMap<CallId, Now>,
    running: BTreeMap<CallId, bool>,
    ready: BTreeMap<usize, Now>,
    owned: BTreeSet<usize>,
    /// Attempts that were refused or taken back.
    closed: BTreeSet<CallId>,
    /// When a place was given, or a part of the arguments came last.
    touched: BTreeMap<CallId, Now>,
}

impl Worker {
    pub fn new(index: usize, clock: Clock, slots: usize, queue: usize) -> Self {
        Self {
            index,
            clock,
            frozen: false,
            inbox: VecDeque::new(),
            desk: Desk::default(),
            fresh: Freshness::default(),
            slots,
            queue,
            draining: false,
            known: BTreeMap::new(),
            waiting: Vec::new(),
            places: BTreeMap::new(),
            oldest: BTreeMap::new(),
            running: BTreeMap::new(),
            ready: BTreeMap::new(),
            owned: BTreeSet::new(),
            closed: BTreeSet::new(),
            touched: BTreeMap::new(),
        }
    }

    fn node(&self) -> Node {
        Node::Worker(self.index)
    }

    fn is_fresh(&self, shared: &Shared) -> bool {
        shared.misdeed == Misdeed::TrustAge || self.fresh.is_fresh(self.clock.at(shared.now))
    }

    /// What is occupied or waits, for the end of the simulation.
    pub fn busy(&self) -> usize {
        self.waiting.len() + self.places.len() + self.running.len() + self.desk.open()
    }

    pub fn read(&mut self, shared: &mut Shared, mail: Mail) {
        let now = self.clock.at(shared.now);
        match mail.letter {
            Letter::Pulse { at } if shared.misdeed != Misdeed::DropPulses => self.fresh.pulse(at),
            Letter::Offer { id, router, call, placing, spent } => {
                let admitted = self.offer(shared, id, router, call, placing, spent);
                if admitted {
                    self.admitted(shared, id, mail.arrived);
                }
            }
            Letter::Go { id, frame, part } => {
                let oldest = self.oldest.get(&id).copied().unwrap_or(mail.sent).min(mail.sent);
                self.go(shared, id, &frame, part, oldest, mail.arrived);
            }
            Letter::Cancel { id } => {
                let given_up = self.desk.cancel(now, id);
                self.closed.insert(id);
                self.give_up(shared, id, &given_up);
            }
            Letter::Probe { router, number, open, done } => {
                for (id, reply) in self.desk.probe(now, &router_id(router), &open, &done) {
                    self.say(shared, id, router, reply);
                }
                if shared.misdeed == Misdeed::DenyRunning {
                    let running = |id: &&CallId| self.running.contains_key(id);
                    for id in open.iter().filter(running).copied().collect::<Vec<_>>() {
                        self.say(shared, id, router, Reply::Refuse);
                    }
                }
                let alive = Letter::Alive { worker: self.index, number };
                shared.send(self.node(), Node::Router(router), alive);
            }
            _ => {}
        }
        self.grant(shared);
    }

    pub fn pulse(&self, shared: &mut Shared) {
        let at = self.clock.at(shared.now);
        shared.send(self.node(), self.node(), Letter::Pulse { at });
    }

    pub fn beat(&self, shared: &mut Shared, routers: usize) {
        let owns = self.owned.iter().fold(0, |mask, server| mask | (1 << server));
        for router in 0..routers {
            let beat = Letter::Beat { worker: self.index, owns, draining: self.draining };
            shared.send(self.node(), Node::Router(router), beat);
        }
    }

    pub fn drain(&mut self) {
        self.draining = true;
    }

    pub fn tick(&mut self, shared: &mut Shared) {
        let now = self.clock.at(shared.now);
        let fresh = self.is_fresh(shared);
        if shared.misdeed != Misdeed::NeverTickDesk {
            // In an order of its own: the desk's is drawn anew each time.
            let mut given_up = self.desk.tick(now, fresh);
            given_up.sort_by_key(|(id, _)| *id);
            for (id, given_up) in given_up {
                if shared.misdeed != Misdeed::KeepPlaces {
                    self.give_up(shared, id, &given_up);
                }
            }
        }
        for server in self.owned.clone() {
            let entry = &mut shared.store[server];
            if entry.single {
                if self.draining {
                    entry.give_back(self.index);
                }
                if self.draining || !entry.take(self.index, shared.now, false) {
                    self.owned.remove(&server);
                }
            }
        }
        let late = |one: &Waiting| (one.deadline <= now).then_some(one.id);
        for id in self.waiting.iter().filter_map(late).collect::<Vec<_>>() {
            let error = WorkerError::new(ErrorCode::DeadlineExceeded, "late").outcome(Outcome::NotStarted);
            self.refuse(shared, id, Refusal::Error { error });
        }
        let mut elsewhere = Vec::new();
        for one in self.waiting.iter_mut().filter(|one| one.over.is_some()) {
            let server = &mut shared.store[one.server];
            if server.take(self.index, shared.now, true) {
                one.over = None;
                self.owned.insert(one.server);
            } else if server.lease != one.over {
                elsewhere.push((one.id, server.owner()));
            }
        }
        // Another took it, or its owner is not lost at all.
        for (id, owner) in elsewhere {
            self.refuse(shared, id, Refusal::NotOwner { owner: owner.map(worker_id) });
        }
        self.grant(shared);
    }

    /// The time has come to say that a call waits.
    pub fn say_wait(&mut self, shared: &mut Shared, id: CallId) {
        if let Some((router, ..)) = self.known.get(&id).copied()
            && self.waiting.iter().any(|one| one.id == id)
        {
            self.say(shared, id, router, Reply::Wait);
        }
    }

    /// A tool ended, or was made to.
    pub fn tool_ends(&mut self, shared: &mut Shared, id: CallId) {
        let Some(whole) = self.running.remove(&id) else { return };
        let now = self.clock.at(shared.now);
        let ending = if whole {
            shared.history.finished(id);
            Ending::Answer(Bytes::from(id.to_string()))
        } else {
            let error = WorkerError::new(ErrorCode::DeadlineExceeded, "late").outcome(Outcome::Unknown);
            Ending::Failed(error)
        };
        if self.desk.ended(now, id, &ending)
            && let Some((router, ..)) = self.known.get(&id).copied()
        {
            self.say(shared, id, router, Reply::End(ending));
        }
        self.known.remove(&id);
        self.grant(shared);
    }

    fn offer(
        &mut self,
        shared: &mut Shared,
        id: CallId,
        router: usize,
        call: usize,
        placing: Placing,
        spent: Duration,
    ) -> bool {
        let now = self.clock.at(shared.now);
        let fresh = self.is_fresh(shared);
        match self.desk.offer(now, fresh, id, &router_id(router)) {
            OnOffer::Ignore => return false,
            OnOffer::Say(reply) => {
                self.say(shared, id, router, reply);
                return false;
            }
            OnOffer::Admit => {}
        }
        let record = &shared.history.calls[call];
        let server = record.server;
        let limit = record.limit.unwrap_or(shared.store[server].limit);
        self.known.insert(id, (router, now + limit.saturating_sub(spent), limit));
        if let Some(refusal) = self.objection(shared, server, placing) {
            self.refuse(shared, id, refusal);
            return false;
        }
        let foreign = shared.store[server].single && !self.owned.contains(&server);
        let over = shared.store[server].lease.filter(|_| foreign);
        let deadline = now + limit.saturating_sub(spent);
        self.waiting.push(Waiting { id, server, deadline, over });
        let start = shared.rng.millis(0, 1_200);
        let start = if placing == Placing::Owned { Duration::ZERO } else { start };
        self.ready.entry(server).or_insert(now + start);
        shared.after(SILENT_WAIT, Event::SayWait(self.index, id));
        true
    }

    /// Looks whether this attempt may be admitted at all.
    fn admitted(&self, shared: &mut Shared, id: CallId, arrived: Now) {
        if self.closed.contains(&id) {
            shared.history.violate(&format!("(9) {id} was admitted after it was refused or taken back"));
        }
        if shared.now.saturating_sub(arrived) > FRESH {
            shared.history.violate(&format!("(7) {id} was admitted by an offer that lay about for too long"));
        }
    }

    /// Why a call is not admitted, if it is not.
    fn objection(&mut self, shared: &mut Shared, server: usize, placing: Placing) -> Option<Refusal> {
        if self.draining {
            return Some(Refusal::Draining);
        }
        if shared.refuses() {
            let error = WorkerError::new(ErrorCode::Overloaded, "busy");
            return Some(match shared.rng.below(4) {
                0 => Refusal::Error { error },
                1 => Refusal::NotOwner { owner: None },
                2 => Refusal::NotOwner { owner: Some(worker_id(shared.rng.index(4))) },
                _ => Refusal::Busy { error },
            });
        }
        if self.waiting.len() >= self.queue {
            return Some(busy());
        }
        let now = shared.now;
        let entry = &mut shared.store[server];
        let owns = if entry.single { entry.is_owned(self.index, now) } else { self.owned.contains(&server) };
        let owner = entry.owner().filter(|owner| *owner != self.index).map(worker_id);
        match placing {
            _ if owns => None,
            Placing::Owned => Some(Refusal::NotOwner { owner }),
            Placing::Take | Placing::TakeOver if !entry.single || entry.take(self.index, now, false) => {
                self.owned.insert(server);
                None
            }
            Placing::Take => Some(Refusal::NotOwner { owner }),
            Placing::TakeOver => None,
        }
    }

    /// Gives free places to those who wait.
    fn grant(&mut self, shared: &mut Shared) {
        let now = self.clock.at(shared.now);
        while self.places.len() + self.running.len() < self.slots {
            let free = self.waiting.iter().position(|one| {
                let ready = self.ready.get(&one.server).is_none_or(|ready| *ready <= now);
                let entry = &shared.store[one.server];
                ready && one.over.is_none() && (!entry.single || entry.is_owned(self.index, shared.now))
            });
            let Some(at) = free else { return };
            let id = self.waiting.remove(at).id;
            let Some((router, ..)) = self.known.get(&id).copied() else { continue };
            if self.desk.held(now, id) {
                self.places.insert(id, Assembly::default());
                self.touched.insert(id, now);
                self.say(shared, id, router, Reply::Accept);
            }
        }
    }

    fn go(&mut self, shared: &mut Shared, id: CallId, frame: &Frame, part: Bytes, oldest: Now, arrived: Now) {
        let now = self.clock.at(shared.now);
        let fresh = self.is_fresh(shared);
        let anyway = shared.misdeed == Misdeed::StartAnyway && !self.running.contains_key(&id);
        match self.desk.go(now, fresh, id) {
            OnGo::Ignore if !anyway => return,
            OnGo::Say(reply) if !anyway => {
                self.free(id);
                if let Some(call) = shared.history.attempts.get(&id) {
                    let router = shared.history.calls[*call].router;
                    self.say(shared, id, router, reply);
                }
                return;
            }
            _ => {}
        }
        let late = |touched: Now| now.saturating_sub(touched) > HOLD;
        if self.touched.insert(id, now).is_some_and(late) {
            shared.history.violate(&format!("(7) {id} was taken after its place was held for too long"));
        }
        let assembly = self.places.entry(id).or_default();
        match assembly.take(frame, part, 1024) {
            Assembled::Partly => {
                self.oldest.insert(id, oldest);
            }
            Assembled::Broken | Assembled::TooLarge => self.refuse(shared, id, busy()),
            Assembled::Whole(_) => {
                self.free(id);
                if self.desk.start(id) || anyway {
                    self.start(shared, id, oldest, arrived);
                }
            }
        }
    }

    fn start(&mut self, shared: &mut Shared, id: CallId, oldest: Now, arrived: Now) {
        shared.history.started(shared.now, id, self.index, oldest, arrived);
        let Some(call) = shared.history.attempts.get(&id).copied() else { return };
        let tool = shared.history.calls[call].tool;
        let now = self.clock.at(shared.now);
        let left = self.known.get(&id).map_or(Duration::ZERO, |known| known.1.saturating_sub(now));
        let whole = tool.takes.is_some_and(|takes| takes <= left);
        self.running.insert(id, whole);
        shared.after(tool.takes.unwrap_or(left).min(left), Event::ToolEnds(self.index, id));
    }

    fn refuse(&mut self, shared: &mut Shared, id: CallId, refusal: Refusal) {
        let router = self.known.get(&id).map(|known| known.0);
        self.closed.insert(id);
        if self.desk.refused(id)
            && let Some(router) = router
        {
            let letter = Letter::Said { id, worker: self.index, said: Said::Refuse(refusal) };
            shared.send(self.node(), Node::Router(router), letter);
        }
        self.free(id);
        self.known.remove(&id);
    }

    fn give_up(&mut self, shared: &mut Shared, id: CallId, given_up: &GivenUp) {
        match given_up {
            GivenUp::Nothing => {}
            GivenUp::Place => {
                self.free(id);
                self.known.remove(&id);
            }
            GivenUp::Running => {
                // Half of the tools stop at once, the others need a while; none is whole.
                if let Some(whole) = self.running.get_mut(&id) {
                    *whole = false;
                }
                let grace = shared.rng.millis(0, 2_000);
                shared.after(grace, Event::ToolEnds(self.index, id));
            }
        }
    }

    fn free(&mut self, id: CallId) {
        self.waiting.retain(|one| one.id != id);
        self.places.remove(&id);
        self.oldest.remove(&id);
    }

    fn say(&mut self, shared: &mut Shared, id: CallId, router: usize, reply: Reply) {
        let limit = self.known.get(&id).map_or(Duration::ZERO, |known| known.2);
        let worker = self.index;
        let said = match reply {
            Reply::Wait => Said::Wait { limit },
            Reply::Accept => {
                let call = shared.history.attempts.get(&id).map(|call| &shared.history.calls[*call]);
                Said::Accept { limit, repeatable: call.is_some_and(|call| call.tool.repeatable) }
            }
            Reply::Refuse => {
                self.closed.insert(id);
                Said::Refuse(busy())
            }
            Reply::End(ending) => {
                let letter = Letter::Ended { id, worker, ending };
                return shared.send(self.node(), Node::Router(router), letter);
            }
            Reply::Forgotten => {
                let error = WorkerError::new(ErrorCode::WorkerLost, "gone").outcome(Outcome::Unknown);
                let letter = Letter::Ended { id, worker, ending: Ending::Failed(error) };
                return shared.send(self.node(), Node::Router(router), letter);
            }
        };
        shared.send(self.node(), Node::Router(router), Letter::Said { id, worker, said });
    }

    /// Who asked this worker lately, and what it still keeps, once enough time has passed to forget it.
    pub fn leftovers(&mut self, now: Now) -> Option<String> {
        let now = self.clock.at(now);
        self.desk.tick(now, true);
        let text = format!("{:?}", self.desk);
        let clean = ["calls: {}", "kept: []", "kept_bytes: 0", "routers: {}"];
        clean.iter().find(|part| !text.contains(**part)).map(|part| format!("{part} not in {text}"))
    }
}

fn busy() -> Refusal {
    Refusal::Busy { error: WorkerError::new(ErrorCode::Overloaded, "busy") }
}
