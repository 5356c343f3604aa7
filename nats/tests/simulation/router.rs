//! A router: the real `Caller` of each of its calls, and around them what its driver does.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use mcp_nats::{
    callee::Ending,
    caller::{Caller, Now, Said, Step, Turn, bus_unavailable, no_worker},
    frames::split,
    wire::{CallId, Frame},
};
use mcp_shared::{error::Outcome, hosting::Placing};
use sha2::{Digest, Sha256};

use crate::{
    bus::{Event, Letter, Mail, Misdeed, Node, Shared},
    clock::{Clock, index, worker_id},
    history::{End, Tool},
};

/// A worker that said nothing for so long is lost.
const SILENCE: Duration = Duration::from_millis(3_500);
/// One that did not beat for so long is offered nothing.
const UNHEARD: Duration = Duration::from_secs(3);
/// How often calls' workers are asked.
const PROBE: Duration = Duration::from_millis(500);
/// Calls are asked for that nothing was heard of for so long.
const QUIET: Duration = Duration::from_secs(1);
/// A router that did not hear itself for so long takes the bus for lost. It is more than a period and
/// the slowest bus that there is.
const NO_ECHO: Duration = Duration::from_millis(1_500);
/// How long calls wait for the bus.
const OUTAGE: Duration = Duration::from_secs(10);
/// A gap between two ticks that shows that this router itself stood still.
const STOOD_STILL: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Live {
    caller: Caller,
    heard: Now,
}

/// What is known of a worker.
#[derive(Debug, Default)]
struct Seen {
    heard: Now,
    gone: bool,
    owns: u32,
    draining: bool,
    done: Vec<CallId>,
    /// Which of those were sent with which probe.
    asked: Vec<(u64, usize)>,
}

/// One router.
#[derive(Debug)]
pub struct Router {
    pub index: usize,
    pub clock: Clock,
    pub frozen: bool,
    pub inbox: VecDeque<Event>,
    calls: BTreeMap<usize, Live>,
    seen: BTreeMap<usize, Seen>,
    echo: Now,
    outage: Option<Now>,
    ticked: Now,
    probed: Now,
    echoed: Now,
    counter: u64,
}

impl Router {
    pub fn new(index: usize, clock: Clock, now: Now, workers: usize) -> Self {
        let now = clock.at(now);
        let seen = (0..workers).map(|worker| (worker, Seen { heard: now, ..Seen::default() })).collect();
        Self {
            index,
            clock,
            frozen: false,
            inbox: VecDeque::new(),
            calls: BTreeMap::new(),
            seen,
            echo: now,
            outage: None,
            ticked: now,
            probed: now,
            echoed: now,
            counter: 0,
        }
    }

    fn node(&self) -> Node {
        Node::Router(self.index)
    }

    pub fn begin(&mut self, shared: &mut Shared, call: usize, limit: Option<Duration>) {
        let now = self.clock.at(shared.now);
        let live = Live { caller: Caller::new(now, limit), heard: now };
        self.calls.insert(call, live);
        if self.outage.is_some() {
            let turn = self.calls.get_mut(&call).map(|live| live.caller.cut_off());
            return self.follow(shared, call, turn);
        }
        let turn = Turn { withdraw: None, step: Step::Choose };
        self.follow(shared, call, Some(turn));
    }

    pub fn cancel(&mut self, shared: &mut Shared, call: usize) {
        let turn = self.calls.get_mut(&call).map(|live| live.caller.cancel());
        self.follow(shared, call, turn);
    }

    pub fn read(&mut self, shared: &mut Shared, mail: Mail) {
        let now = self.clock.at(shared.now);
        match mail.letter {
            Letter::Said { id, worker, said } => {
                self.heard(now, worker);
                let Some((call, id)) = self.find(shared, id) else { return };
                let turn = self.calls.get_mut(&call).map(|live| {
                    live.heard = now;
                    live.caller.said(now, id, said)
                });
                self.follow(shared, call, turn);
            }
            Letter::Ended { id, worker, ending } => {
                self.heard(now, worker);
                self.seen.entry(worker).or_default().done.push(id);
                let Some((call, id)) = self.find(shared, id) else { return };
                let Some(live) = self.calls.get_mut(&call) else { return };
                if live.caller.attempt() != Some(id) {
                    return;
                }
                let turn = live.caller.said(now, id, Said::Done);
                let end = match ending {
                    Ending::Answer(bytes) => {
                        let of = std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok());
                        End::Answered(of.unwrap_or(CallId(0)))
                    }
                    Ending::Failed(error) => {
                        End::Failed(live.caller.honest(error).outcome.unwrap_or(Outcome::Unknown))
                    }
                };
                shared.history.ended(shared.now, call, end);
                self.follow(shared, call, Some(turn));
                self.calls.remove(&call);
            }
            Letter::Alive { worker, number } => {
                self.heard(now, worker);
                let seen = self.seen.entry(worker).or_default();
                if let Some(at) = seen.asked.iter().position(|(one, _)| *one == number) {
                    let count = seen.asked[at].1.min(seen.done.len());
                    seen.done.drain(..count);
                    seen.asked.clear();
                }
            }
            Letter::Beat { worker, owns, draining } => {
                self.heard(now, worker);
                let seen = self.seen.entry(worker).or_default();
                (seen.owns, seen.draining) = (owns, draining);
                // It connected anew when it seemed to be gone.
                seen.gone = false;
            }
            Letter::Gone { worker } => {
                self.seen.entry(worker).or_default().gone = true;
                self.lost(shared, worker);
            }
            Letter::Echo { at } => {
                self.echo = self.echo.max(at);
                if self.outage.is_some() && now.saturating_sub(at) < NO_ECHO {
                    self.outage = None;
                    self.forgive(now);
                }
            }
            _ => {}
        }
    }

    pub fn tick(&mut self, shared: &mut Shared) {
        let now = self.clock.at(shared.now);
        if now.saturating_sub(self.ticked) > STOOD_STILL {
            // What came meanwhile is still to be read; until then nobody's silence means anything.
            self.echo = now;
            self.outage = None;
            self.forgive(now);
        }
        self.ticked = now;
        if now.saturating_sub(self.echo) > NO_ECHO {
            self.outage.get_or_insert(self.echo);
        }
        if shared.misdeed == Misdeed::NeverTick {
            return;
        }
        if self.outage.is_some_and(|since| now.saturating_sub(since) >= OUTAGE) {
            for call in self.open() {
                let turn = self.calls.get_mut(&call).map(|live| live.caller.cut_off());
                self.follow(shared, call, turn);
            }
        }
        if self.outage.is_none() {
            let silent = |(worker, seen): (&usize, &Seen)| {
                (!seen.gone && now.saturating_sub(seen.heard) > SILENCE).then_some(*worker)
            };
            for worker in self.seen.iter().filter_map(silent).collect::<Vec<_>>() {
                self.lost(shared, worker);
            }
        }
        for call in self.open() {
            let away = self.outage.is_some();
            let turn = self.calls.get_mut(&call).map(|live| {
                if away {
                    live.caller.without_bus(now);
                }
                live.caller.tick(now)
            });
            self.follow(shared, call, turn);
        }
        if now.saturating_sub(self.echoed) >= PROBE / 2 {
            self.echoed = now;
            shared.send(self.node(), self.node(), Letter::Echo { at: now });
        }
        if now.saturating_sub(self.probed) >= PROBE {
            self.probed = now;
            self.probe(shared, now);
        }
    }

    /// Calls that have not ended.
    pub fn open(&self) -> Vec<usize> {
        self.calls.keys().copied().collect()
    }

    fn probe(&mut self, shared: &mut Shared, now: Now) {
        let mut asked: BTreeMap<usize, Vec<CallId>> = BTreeMap::new();
        for live in self.calls.values() {
            if let Some((worker, id)) = live.caller.worker().zip(live.caller.attempt()) {
                let open = asked.entry(index(worker)).or_default();
                if now.saturating_sub(live.heard) >= QUIET {
                    open.push(id);
                }
            }
        }
        for (worker, seen) in &self.seen {
            if !seen.done.is_empty() && !seen.gone {
                asked.entry(*worker).or_default();
            }
        }
        for (worker, open) in asked {
            self.counter += 1;
            let number = self.counter;
            let seen = self.seen.entry(worker).or_default();
            seen.asked.push((number, seen.done.len()));
            let done = seen.done.clone();
            let probe = Letter::Probe { router: self.index, number, open, done };
            shared.send(Node::Router(self.index), Node::Worker(worker), probe);
        }
    }

    fn find(&self, shared: &Shared, id: CallId) -> Option<(usize, CallId)> {
        let call = shared.history.attempts.get(&id).copied()?;
        let live = self.calls.get(&call)?;
        if shared.misdeed == Misdeed::MixAttempts {
            return Some((call, live.caller.attempt()?));
        }
        Some((call, id))
    }

    fn heard(&mut self, now: Now, worker: usize) {
        self.seen.entry(worker).or_default().heard = now;
    }

    fn forgive(&mut self, now: Now) {
        self.seen.values_mut().for_each(|seen| seen.heard = now);
    }

    fn lost(&mut self, shared: &mut Shared, worker: usize) {
        let now = self.clock.at(shared.now);
        for call in self.open() {
            let Some(live) = self.calls.get_mut(&call) else { continue };
            let going = live.caller.attempt().is_some_and(|attempt| live.caller.is_going(attempt));
            if shared.misdeed == Misdeed::RetryAfterGo
                && going
                && live.caller.worker() == Some(&worker_id(worker))
            {
                live.caller = Caller::new(now, shared.history.calls[call].limit);
                continue;
            }
            let turn = live.caller.lost(now, &worker_id(worker));
            self.follow(shared, call, Some(turn));
        }
    }

    /// Does what a call wants, until it wants nothing more.
    fn follow(&mut self, shared: &mut Shared, call: usize, turn: Option<Turn>) {
        let now = self.clock.at(shared.now);
        let mut next = turn;
        while let Some(Turn { withdraw, step }) = next.take() {
            if let Some((worker, id)) = withdraw {
                shared.send(self.node(), Node::Worker(index(&worker)), Letter::Cancel { id });
            }
            match step {
                Step::Stay => {}
                Step::Choose => next = self.choose(shared, now, call),
                Step::Go(worker, id) => {
                    let over = shared.history.calls[call].limit.is_some_and(|limit| {
                        self.calls.get(&call).is_some_and(|live| live.caller.spent(now) >= limit)
                    });
                    if over {
                        shared.history.violate(&format!("(4) call {call} was sent when its time was over"));
                    }
                    self.go(shared, call, index(&worker), id);
                }
                Step::End(error) => {
                    let mut outcome = error.outcome.unwrap_or(Outcome::Unknown);
                    if shared.misdeed == Misdeed::ClaimNotStarted {
                        outcome = Outcome::NotStarted;
                    }
                    shared.history.ended(shared.now, call, End::Failed(outcome));
                    self.calls.remove(&call);
                }
            }
        }
    }

    fn choose(&mut self, shared: &mut Shared, now: Now, call: usize) -> Option<Turn> {
        let server = shared.history.calls[call].server;
        let live = self.calls.get_mut(&call)?;
        let drawn = draw(&self.seen, live.caller.wish(), shared, now, server);
        let Some((worker, placing)) = drawn else {
            let why = if self.outage.is_some() { bus_unavailable() } else { no_worker() };
            return Some(live.caller.nobody(now, why));
        };
        self.counter += 1;
        let id = CallId((u128::from(self.counter) << 64) | (self.index as u128 + 1));
        shared.history.attempts.insert(id, call);
        live.caller.chosen(now, worker_id(worker), id);
        live.heard = now;
        let spent = live.caller.spent(now);
        let offer = Letter::Offer { id, router: self.index, call, placing, spent };
        shared.send(Node::Router(self.index), Node::Worker(worker), offer);
        if shared.misdeed == Misdeed::GoAtOnce {
            self.go(shared, call, worker, id);
        }
        None
    }

    fn go(&mut self, shared: &mut Shared, call: usize, worker: usize, id: CallId) {
        for (frame, part) in frames(shared.history.calls[call].tool) {
            shared.send(self.node(), Node::Worker(worker), Letter::Go { id, frame, part });
        }
    }
}

/// The arguments as messages. Frames of 256 KiB would only cost time here, so that those of arguments
/// that need several are small.
fn frames(tool: Tool) -> Vec<(Frame, Bytes)> {
    if tool.frames <= 1 {
        return split(&Bytes::from_static(b"{}")).collect();
    }
    let total = usize::try_from(tool.frames).unwrap_or(1);
    let whole: BytesMut = (0..tool.frames).map(|at| u8::try_from(at % 256).unwrap_or(0)).collect();
    let hash = hex::encode(Sha256::digest(&whole));
    let whole = whole.freeze();
    (0..total)
        .map(|at| {
            let sha256 = (at + 1 == total).then(|| hash.clone());
            let number = u32::try_from(at).unwrap_or(0);
            (Frame { number, total, sha256 }, whole.slice(at..=at))
        })
        .collect()
}

/// A worker for the next attempt, and how far it may go.
fn draw(
    seen: &BTreeMap<usize, Seen>,
    wish: &mcp_nats::caller::Wish,
    shared: &mut Shared,
    now: Now,
    server: usize,
) -> Option<(usize, Placing)> {
    let avoided = |worker: usize| wish.avoid.iter().any(|one| index(one) == worker);
    if let Some(owner) = wish.owner.as_ref().map(index).filter(|owner| !avoided(*owner)) {
        return Some((owner, Placing::Take));
    }
    let live: Vec<usize> = seen
        .iter()
        .filter(|(worker, one)| {
            let heard = now.saturating_sub(one.heard) < UNHEARD;
            heard && !one.gone && !one.draining && !avoided(**worker)
        })
        .map(|(worker, _)| *worker)
        .collect();
    let owners: Vec<usize> = live
        .iter()
        .copied()
        .filter(|worker| seen[worker].owns & (1 << server) != 0)
        .filter(|worker| !wish.not_owners.iter().any(|one| index(one) == *worker))
        .collect();
    if !owners.is_empty() {
        return Some((owners[shared.rng.index(owners.len())], Placing::Owned));
    }
    let lost = wish.lost_owner.as_ref().map(index);
    let rank = |worker: &usize| (worker + 1).wrapping_mul(server + 7).wrapping_mul(2_654_435_761) % 1_000;
    let best = live.iter().copied().filter(|worker| Some(*worker) != lost).min_by_key(rank)?;
    Some((best, if lost.is_some() { Placing::TakeOver } else { Placing::Take }))
}
