//! The bus between the nodes, the events that wait for their time, and what can happen to a message.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use bytes::Bytes;
use mcp_nats::{
    callee::Ending,
    caller::{Now, Said},
    wire::{CallId, Frame},
};
use mcp_shared::hosting::Placing;

use crate::{
    chance::{Listed, Rng},
    history::{History, Tool},
    store::Store,
};

/// A process of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    Router(usize),
    Worker(usize),
}

/// What travels. Ids of attempts stand in it; what a message says more, nodes read from the history.
#[derive(Debug, Clone)]
pub enum Letter {
    Offer { id: CallId, router: usize, call: usize, placing: Placing, spent: Duration },
    Go { id: CallId, frame: Frame, part: Bytes },
    Cancel { id: CallId },
    Probe { router: usize, number: u64, open: Vec<CallId>, done: Vec<CallId> },
    Pulse { at: Now },
    Said { id: CallId, worker: usize, said: Said },
    Ended { id: CallId, worker: usize, ending: Ending },
    Alive { worker: usize, number: u64 },
    Beat { worker: usize, owns: u32, draining: bool },
    Gone { worker: usize },
    Echo { at: Now },
}

impl Letter {
    /// Whether it belongs to a call, and is not one of many of its kind. Only these have choices in
    /// listed schedules.
    fn is_of_a_call(&self) -> bool {
        match self {
            Self::Offer { .. } | Self::Go { .. } | Self::Cancel { .. } => true,
            Self::Said { .. } | Self::Ended { .. } => true,
            Self::Probe { open, done, .. } => !open.is_empty() || !done.is_empty(),
            _ => false,
        }
    }
}

/// A message on its way or in an inbox.
#[derive(Debug, Clone)]
pub struct Mail {
    pub to: Node,
    pub letter: Letter,
    pub sent: Now,
    pub arrived: Now,
}

/// What happens at its time.
#[derive(Debug, Clone)]
pub enum Event {
    Arrives(Mail),
    /// The ticking of a router, or of a worker.
    Tick(Node),
    Pulse(usize),
    Beat(usize),
    SayWait(usize, CallId),
    ToolEnds(usize, CallId),
    Begin {
        router: Option<usize>,
        server: usize,
        limit: Option<Duration>,
        tool: Tool,
        plain: bool,
    },
    Cancel(usize),
    Freeze(Node, Duration),
    Wake(Node),
    Kill(Node),
    Drain(usize),
    NewWorker,
    Calm,
}

/// What befalls a node before it reads a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mishap {
    None,
    Freeze(Duration),
    Kill,
    Cancel,
}

/// How messages fare in drawn schedules.
#[derive(Debug, Default, Clone)]
pub struct Weather {
    /// In a thousand messages so many are lost, doubled, and late.
    pub lost: u64,
    pub doubled: u64,
    pub late: u64,
    /// How late, in milliseconds.
    pub lateness: u64,
    /// Milliseconds that a message takes.
    pub latency: (u64, u64),
    /// One router and one worker do not hear each other for a while.
    pub cuts: Vec<(usize, usize, Now, Now)>,
    /// A worker is alive and connects anew, so that its subscription is not there.
    pub away: Vec<(usize, Now, Now)>,
    /// Offers that a worker refuses without a reason of the model, in a thousand.
    pub refused: u64,
    /// When all this stops.
    pub calm: Now,
}

/// Who decides.
#[derive(Debug)]
pub enum Fate {
    Drawn(Weather),
    Listed(Listed),
}

/// What the driver around the state machines does wrong on purpose, to show that it would be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Misdeed {
    None,
    /// The router begins anew when it lost the worker after GO.
    RetryAfterGo,
    /// The router takes what a worker says of an older attempt for the present one.
    MixAttempts,
    /// The router sends the arguments with the offer and not after it was accepted.
    GoAtOnce,
    /// The router says that a call was not started although it sent GO.
    ClaimNotStarted,
    /// The router forgets to look at the time.
    NeverTick,
    /// The worker takes every message for young.
    TrustAge,
    /// The worker starts what it was told not to.
    StartAnyway,
    /// The worker says of a call that runs that it will not be started.
    DenyRunning,
    /// The worker frees no place for which no GO came.
    KeepPlaces,
    /// The worker tells its desk nothing of the time.
    NeverTickDesk,
    /// The worker takes no pulses, so that nothing is ever young again.
    DropPulses,
}

/// What all nodes share: time, the bus, and those who keep the books.
#[derive(Debug)]
pub struct Shared {
    pub now: Now,
    queue: BinaryHeap<Reverse<Due>>,
    order: u64,
    pub rng: Rng,
    pub fate: Fate,
    pub outages: Vec<(Now, Now)>,
    /// When the last message on a link arrives: the next does not overtake it.
    last: BTreeMap<(Node, Node), Now>,
    pub dead: Vec<Node>,
    /// How many workers there have been.
    pub workers: usize,
    pub history: History,
    pub store: Store,
    pub misdeed: Misdeed,
}

#[derive(Debug)]
struct Due(Now, u64, Event);

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl Shared {
    pub fn new(rng: Rng, fate: Fate, servers: Store, misdeed: Misdeed) -> Self {
        Self {
            now: Duration::ZERO,
            queue: BinaryHeap::new(),
            order: 0,
            rng,
            fate,
            outages: Vec::new(),
            last: BTreeMap::new(),
            dead: Vec::new(),
            workers: 0,
            history: History::default(),
            store: servers,
            misdeed,
        }
    }

    /// Puts an event on its time.
    pub fn at(&mut self, time: Now, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Due(time, self.order, event)));
    }

    /// Puts an event a while from now.
    pub fn after(&mut self, while_: Duration, event: Event) {
        self.at(self.now + while_, event);
    }

    /// Goes to the next event that is due until then.
    pub fn next(&mut self, until: Now) -> Option<Event> {
        let due = self.queue.peek().is_some_and(|Reverse(due)| due.0 <= until);
        let Due(time, _, event) = due.then(|| self.queue.pop()).flatten()?.0;
        self.now = time;
        Some(event)
    }

    /// Whether the bus is away.
    pub fn is_out(&self) -> bool {
        self.outages.iter().any(|(from, to)| (*from..*to).contains(&self.now))
    }

    fn is_away(&self, worker: usize) -> bool {
        let Fate::Drawn(weather) = &self.fate else { return false };
        weather.away.iter().any(|(one, from, to)| *one == worker && (*from..*to).contains(&self.now))
    }

    /// Publishes a message.
    pub fn send(&mut self, from: Node, to: Node, letter: Letter) {
        let told = letter.is_of_a_call() || matches!(self.fate, Fate::Drawn(_));
        if self.history.traced && told {
            let line = format!("{from:?} -> {to:?} {letter:?}");
            self.note(&line);
        }
        if self.is_out() {
            return;
        }
        let now = self.now;
        let gone = match (to, &letter) {
            (Node::Worker(worker), _) if worker >= self.workers || self.dead.contains(&to) => Some(worker),
            (Node::Worker(worker), _) if self.is_away(worker) => Some(worker),
            _ => None,
        };
        if let Some(worker) = gone {
            let back = Letter::Gone { worker };
            if matches!(from, Node::Router(_)) {
                self.arrive(from, back, ms(1));
            }
            return;
        }
        match &mut self.fate {
            Fate::Listed(listed) => {
                let way = if from != to && letter.is_of_a_call() { listed.choose(8) } else { 0 };
                match way {
                    1 => return self.note("  lost"),
                    2 => self.arrive(to, letter.clone(), ms(1)),
                    3 => self.arrive(to, letter.clone(), ms(2_600)),
                    4 => return self.arrive(to, letter, ms(30)),
                    5 => return self.arrive(to, letter, ms(1_400)),
                    6 => return self.arrive(to, letter, ms(2_700)),
                    7 => {
                        listed.mishaps = true;
                        self.outages.push((now, now + ms(1_700)));
                        return self.note("  lost, and the bus goes away");
                    }
                    _ => {}
                }
                self.in_order(from, to, letter, ms(1));
            }
            Fate::Drawn(weather) => {
                let weather = weather.clone();
                let latency = self.rng.millis(weather.latency.0, weather.latency.1);
                if now < weather.calm {
                    let cut = weather.cuts.iter().any(|(router, worker, begin, end)| {
                        let link = [Node::Router(*router), Node::Worker(*worker)];
                        link.contains(&from)
                            && link.contains(&to)
                            && from != to
                            && (*begin..*end).contains(&now)
                    });
                    if cut || self.rng.happens(weather.lost) {
                        return self.note("  lost");
                    }
                    if self.rng.happens(weather.doubled) {
                        let late = self.rng.millis(0, weather.lateness);
                        self.arrive(to, letter.clone(), latency + late);
                    }
                    if self.rng.happens(weather.late) {
                        let late = self.rng.millis(0, weather.lateness);
                        return self.arrive(to, letter, latency + late);
                    }
                }
                self.in_order(from, to, letter, latency);
            }
        }
    }

    /// What befalls the node that is about to read this.
    pub fn mishap(&mut self, letter: &Letter) -> Mishap {
        match &mut self.fate {
            Fate::Listed(listed) if letter.is_of_a_call() => match listed.befall(6) {
                1 => Mishap::Freeze(ms(700)),
                2 => Mishap::Freeze(ms(1_600)),
                3 => Mishap::Freeze(ms(4_500)),
                4 => Mishap::Kill,
                5 => Mishap::Cancel,
                _ => Mishap::None,
            },
            _ => Mishap::None,
        }
    }

    /// Whether a worker refuses an offer out of the blue.
    pub fn refuses(&mut self) -> bool {
        match &self.fate {
            Fate::Drawn(weather) if self.now < weather.calm => self.rng.happens(weather.refused),
            _ => false,
        }
    }

    /// Writes a line into the trace.
    pub fn note(&mut self, line: &str) {
        self.history.note(self.now, line);
    }

    fn in_order(&mut self, from: Node, to: Node, letter: Letter, latency: Duration) {
        let last = self.last.get(&(from, to)).copied().unwrap_or_default();
        let time = (self.now + latency).max(last);
        self.last.insert((from, to), time);
        self.arrive(to, letter, time - self.now);
    }

    fn arrive(&mut self, to: Node, letter: Letter, latency: Duration) {
        let (sent, arrived) = (self.now, self.now + latency);
        self.at(arrived, Event::Arrives(Mail { to, letter, sent, arrived }));
    }
}
