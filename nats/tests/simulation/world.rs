//! The fleet and its time: takes one event after the other until all is quiet, and looks whether
//! everything is as it has to be.

use std::time::Duration;

use mcp_nats::caller::{ANSWER_GRACE, Now};
use mcp_shared::limits;

use crate::{
    bus::{Event, Mishap, Node, Shared},
    clock::Clock,
    history::{End, Record},
    router::Router,
    worker::Worker,
};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const ROUTER_TICK: Duration = ms(50);
const WORKER_TICK: Duration = ms(100);
const PULSE: Duration = ms(250);
const BEAT: Duration = ms(1_000);

/// All nodes, and what they share.
#[derive(Debug)]
pub struct World {
    pub shared: Shared,
    pub routers: Vec<Router>,
    pub workers: Vec<Worker>,
    /// Whether nodes begin to work at drawn moments, with clocks of their own.
    ragged: bool,
}

impl World {
    pub fn new(shared: Shared, ragged: bool) -> Self {
        Self { shared, routers: Vec::new(), workers: Vec::new(), ragged }
    }

    fn clock(&mut self) -> Clock {
        if self.ragged { Clock::drawn(&mut self.shared.rng) } else { Clock::default() }
    }

    fn phase(&mut self, of: Duration) -> Duration {
        if self.ragged {
            self.shared.rng.millis(0, 1_000) * u32::try_from(of.as_millis()).unwrap_or(0) / 1_000
        } else {
            ms(1)
        }
    }

    pub fn add_worker(&mut self, slots: usize, queue: usize) {
        let (index, clock) = (self.workers.len(), self.clock());
        self.workers.push(Worker::new(index, clock, slots, queue));
        self.shared.workers += 1;
        for (period, event) in [
            (WORKER_TICK, Event::Tick(Node::Worker(index))),
            (PULSE, Event::Pulse(index)),
            (BEAT, Event::Beat(index)),
        ] {
            let phase = self.phase(period);
            self.shared.after(phase, event);
        }
    }

    pub fn add_router(&mut self) {
        let (index, clock) = (self.routers.len(), self.clock());
        self.routers.push(Router::new(index, clock, self.shared.now, self.workers.len()));
        let phase = self.phase(ROUTER_TICK);
        self.shared.after(phase, Event::Tick(Node::Router(index)));
    }

    fn is_dead(&self, node: Node) -> bool {
        self.shared.dead.contains(&node)
    }

    fn frozen(&mut self, node: Node) -> Option<&mut bool> {
        match node {
            Node::Router(at) => self.routers.get_mut(at).map(|router| &mut router.frozen),
            Node::Worker(at) => self.workers.get_mut(at).map(|worker| &mut worker.frozen),
        }
    }

    fn is_frozen(&mut self, node: Node) -> bool {
        self.frozen(node).is_some_and(|frozen| *frozen)
    }

    /// Runs until a moment, or until something happened that must not.
    pub fn run(&mut self, until: Now) {
        while self.shared.history.violation.is_none() {
            let Some(event) = self.shared.next(until) else { return };
            self.happens(event);
        }
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Tick(node) => self.tick(node),
            Event::Pulse(worker) => {
                if !self.is_dead(Node::Worker(worker)) {
                    self.shared.after(PULSE, Event::Pulse(worker));
                    if !self.workers[worker].frozen {
                        self.workers[worker].pulse(&mut self.shared);
                    }
                }
            }
            Event::Beat(worker) => {
                if !self.is_dead(Node::Worker(worker)) {
                    self.shared.after(BEAT, Event::Beat(worker));
                    if !self.workers[worker].frozen {
                        self.workers[worker].beat(&mut self.shared, self.routers.len());
                    }
                }
            }
            Event::Begin { router, server, limit, tool, plain } => match router {
                Some(router) => self.begin(router, server, limit, tool, plain),
                None => {
                    for router in 0..self.routers.len() {
                        self.begin(router, server, limit, tool, plain);
                    }
                }
            },
            Event::Freeze(node, time) => self.freeze(node, time),
            Event::Wake(node) => self.wake(node),
            Event::Kill(node) => self.kill(node),
            Event::Drain(worker) => {
                self.shared.note(&format!("{worker} drains"));
                self.workers[worker].drain();
            }
            Event::NewWorker => {
                self.shared.note("a new worker");
                self.add_worker(2, 8);
            }
            Event::Calm => self.shared.note("all is calm"),
            Event::Arrives(ref mail) => self.take(mail.to, event.clone()),
            Event::SayWait(worker, _) | Event::ToolEnds(worker, _) => {
                self.take(Node::Worker(worker), event);
            }
            Event::Cancel(call) => {
                if let Some(router) = self.shared.history.calls.get(call).map(|record| record.router) {
                    self.take(Node::Router(router), event);
                }
            }
        }
    }

    fn begin(
        &mut self,
        router: usize,
        server: usize,
        limit: Option<Duration>,
        tool: crate::history::Tool,
        plain: bool,
    ) {
        if self.is_dead(Node::Router(router)) || self.is_frozen(Node::Router(router)) {
            return;
        }
        let call = self.shared.history.calls.len();
        let begun = self.shared.now;
        self.shared.history.calls.push(Record {
            router,
            server,
            tool,
            limit,
            plain,
            begun,
            starts: Vec::new(),
            finished: Vec::new(),
            ends: Vec::new(),
            cancelled: false,
        });
        self.shared.note(&format!("BEGIN call {call} by {router} limit {limit:?} {tool:?}"));
        self.routers[router].begin(&mut self.shared, call, limit);
    }

    /// A node is to read something, if it can.
    fn take(&mut self, node: Node, event: Event) {
        if self.is_dead(node) {
            return;
        }
        if !self.is_frozen(node)
            && let Event::Arrives(mail) = &event
        {
            match self.shared.mishap(&mail.letter) {
                Mishap::None => {}
                Mishap::Freeze(time) => self.freeze(node, time),
                Mishap::Kill => return self.kill(node),
                Mishap::Cancel => self.happens(Event::Cancel(0)),
            }
        }
        if self.is_frozen(node) {
            match node {
                Node::Router(at) => self.routers[at].inbox.push_back(event),
                Node::Worker(at) => self.workers[at].inbox.push_back(event),
            }
            return;
        }
        self.read(node, event);
    }

    fn read(&mut self, node: Node, event: Event) {
        let shared = &mut self.shared;
        match (node, event) {
            (Node::Router(at), Event::Arrives(mail)) => self.routers[at].read(shared, mail),
            (Node::Router(at), Event::Cancel(call)) => {
                if let Some(record) = shared.history.calls.get_mut(call) {
                    record.cancelled = true;
                }
                self.routers[at].cancel(shared, call);
            }
            (Node::Worker(at), Event::Arrives(mail)) => self.workers[at].read(shared, mail),
            (Node::Worker(at), Event::SayWait(_, id)) => self.workers[at].say_wait(shared, id),
            (Node::Worker(at), Event::ToolEnds(_, id)) => self.workers[at].tool_ends(shared, id),
            _ => {}
        }
    }

    fn tick(&mut self, node: Node) {
        if self.is_dead(node) {
            return;
        }
        let period = if matches!(node, Node::Router(_)) { ROUTER_TICK } else { WORKER_TICK };
        self.shared.after(period, Event::Tick(node));
        if !self.is_frozen(node) {
            self.tick_now(node);
        }
    }

    fn tick_now(&mut self, node: Node) {
        match node {
            Node::Router(at) => self.routers[at].tick(&mut self.shared),
            Node::Worker(at) => self.workers[at].tick(&mut self.shared),
        }
    }

    fn freeze(&mut self, node: Node, time: Duration) {
        if self.is_dead(node) || self.is_frozen(node) {
            return;
        }
        self.shared.note(&format!("{node:?} freezes for {time:?}"));
        let now = self.shared.now;
        if let Some(frozen) = self.frozen(node) {
            *frozen = true;
            self.shared.history.freezes.push((node, now, now + time));
            self.shared.after(time, Event::Wake(node));
        }
    }

    /// It reads what has piled up, in order; timers may come before or after.
    fn wake(&mut self, node: Node) {
        if self.is_dead(node) {
            return;
        }
        self.shared.note(&format!("{node:?} wakes"));
        if let Some(frozen) = self.frozen(node) {
            *frozen = false;
        }
        let first = self.shared.rng.happens(500);
        if first {
            self.tick_now(node);
        }
        let piled = match node {
            Node::Router(at) => std::mem::take(&mut self.routers[at].inbox),
            Node::Worker(at) => std::mem::take(&mut self.workers[at].inbox),
        };
        for event in piled {
            self.read(node, event);
        }
        if !first {
            self.tick_now(node);
        }
    }

    fn kill(&mut self, node: Node) {
        if self.is_dead(node) {
            return;
        }
        self.shared.note(&format!("{node:?} is killed"));
        self.shared.dead.push(node);
    }

    /// Whether anything is still to come of the calls.
    pub fn is_quiet(&self) -> bool {
        let quiet = |router: &Router| self.is_dead(Node::Router(router.index)) || router.open().is_empty();
        self.routers.iter().all(quiet)
    }

    /// Looks over all that happened, once everything is over.
    pub fn judge(&mut self) {
        let mut wrong = Vec::new();
        for (number, record) in self.shared.history.calls.iter().enumerate() {
            if self.is_dead(Node::Router(record.router)) {
                continue;
            }
            let Some((end, at)) = record.ends.first() else {
                wrong.push(format!("(4) call {number} has no end"));
                continue;
            };
            let limit = record.limit.unwrap_or(limits::TOOL_TIMEOUT);
            let took = at.saturating_sub(record.begun);
            let frozen = self.shared.history.frozen(Node::Router(record.router), record.begun, *at);
            if took > limit + ANSWER_GRACE + ROUTER_TICK + ms(20) + frozen {
                wrong.push(format!("(4) call {number} took {took:?} with a limit of {limit:?}"));
            }
            if record.plain && !matches!(end, End::Answered(_)) {
                wrong.push(format!("(6) call {number} failed when all was well: {end:?}"));
            }
        }
        let now = self.shared.now;
        for worker in &mut self.workers {
            if self.shared.dead.contains(&Node::Worker(worker.index)) {
                continue;
            }
            if worker.busy() > 0 {
                wrong.push(format!("(5) worker {} still holds {worker:?}", worker.index));
            } else if let Some(left) = worker.leftovers(now + ms(31_000)) {
                wrong.push(format!("(5) worker {} still keeps {left}", worker.index));
            }
        }
        wrong.iter().for_each(|rule| self.shared.history.violate(rule));
    }
}
