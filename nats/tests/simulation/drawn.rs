//! Schedules that are drawn from a seed.

use std::time::Duration;

use crate::{
    bus::{Event, Fate, Misdeed, Node, Shared, Weather},
    chance::Rng,
    history::{End, Tool},
    store::Server,
    world::World,
};

/// Faults stop then.
const CALM: Duration = Duration::from_secs(9);

/// What came of a schedule.
#[derive(Debug, Default)]
pub struct Tally {
    pub calls: usize,
    pub answered: usize,
    pub not_started: usize,
    pub unknown: usize,
    pub retried: usize,
    /// Calls that ran more than once: only those that may.
    pub repeated: usize,
}

impl Tally {
    /// Adds another.
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.answered += other.answered;
        self.not_started += other.not_started;
        self.unknown += other.unknown;
        self.retried += other.retried;
        self.repeated += other.repeated;
    }

    /// Of one world.
    pub fn of(world: &World) -> Self {
        let mut tally = Self::default();
        let history = &world.shared.history;
        tally.calls = history.calls.len();
        tally.retried = history.attempts.len().saturating_sub(tally.calls);
        tally.repeated = history.calls.iter().filter(|record| record.starts.len() > 1).count();
        for (end, _) in history.calls.iter().filter_map(|record| record.ends.first()) {
            match end {
                End::Answered(_) => tally.answered += 1,
                End::Failed(mcp_shared::error::Outcome::NotStarted) => tally.not_started += 1,
                End::Failed(_) => tally.unknown += 1,
            }
        }
        tally
    }
}

/// Runs the schedule of a seed.
pub fn run(seed: u64, misdeed: Misdeed, traced: bool) -> World {
    let mut rng = Rng::new(seed);
    let weather = weather(&mut rng);
    let servers = (0..1 + rng.index(2))
        .map(|_| Server::new(rng.happens(400), rng.millis(1_500, 5_000)))
        .collect::<Vec<_>>();
    let (routers, workers, count) = (1 + rng.index(3), 1 + rng.index(4), servers.len());
    let shared = Shared::new(rng, Fate::Drawn(weather), servers, misdeed);
    let mut world = World::new(shared, true);
    world.shared.history.traced = traced;
    for _ in 0..workers {
        let (slots, queue) = (1 + world.shared.rng.index(3), 6 + world.shared.rng.index(3));
        world.add_worker(slots, queue);
    }
    (0..routers).for_each(|_| world.add_router());
    calls(&mut world.shared, routers, count);
    mishaps(&mut world.shared, routers, workers);
    world.shared.at(CALM, Event::Calm);
    // Somebody has to be there afterwards, however many were killed or are leaving.
    world.shared.at(CALM, Event::NewWorker);
    let back = world.shared.outages.iter().map(|(_, to)| *to).max().unwrap_or_default().max(CALM);
    let history = |world: &World| world.shared.history.freezes.iter().map(|(.., to)| *to).max();
    world.run(back);
    let awake = history(&world).unwrap_or_default().max(back);
    world.run(awake + Duration::from_secs(7));
    // Calls whose callers named no limit may take longer.
    while !world.is_quiet() && world.shared.history.violation.is_none() {
        let until = world.shared.now.max(CALM) + Duration::from_secs(5);
        if until > Duration::from_secs(120) {
            break;
        }
        world.run(until);
    }
    let now = world.shared.now;
    for server in 0..count {
        let tool = Tool { takes: Some(Duration::from_millis(20)), frames: 1, repeatable: false };
        let limit = Some(Duration::from_secs(6));
        let event = Event::Begin { router: None, server, limit, tool, plain: true };
        // Not all at once: the smallest queue has six places.
        let wait = Duration::from_millis(1 + 1_000 * u64::try_from(server).unwrap_or(0));
        world.shared.at(now + wait, event);
    }
    world.run(now + Duration::from_secs(9));
    if world.shared.history.violation.is_none() {
        world.judge();
    }
    world
}

fn weather(rng: &mut Rng) -> Weather {
    let calm = CALM;
    // Some schedules have one kind of fault only, so that the others do not hide what it does.
    let mut rate = |often: u64, most: u64| if rng.happens(often) { 1 + rng.below(most) } else { 0 };
    let (lost, doubled, late) = (rate(500, 150), rate(500, 150), rate(400, 100));
    let refused = rate(300, 200);
    let lateness = [10, 300, 1_500, 4_000][rng.index(4)];
    let latency = [(0, 1), (1, 5), (1, 60), (20, 400)][rng.index(4)];
    let mut cuts = Vec::new();
    if rng.happens(200) {
        let from = rng.millis(0, 6_000);
        cuts.push((rng.index(3), rng.index(4), from, (from + rng.millis(200, 6_000)).min(calm)));
    }
    let mut away = Vec::new();
    if rng.happens(200) {
        let from = rng.millis(0, 7_000);
        away.push((rng.index(4), from, (from + rng.millis(5, 700)).min(calm)));
    }
    Weather { lost, doubled, late, lateness, latency, cuts, away, refused, calm }
}

fn calls(shared: &mut Shared, routers: usize, servers: usize) {
    // Now and then a router stands still for longer than ends are kept, with calls that may take so long.
    if shared.rng.happens(20) {
        let tool = Tool { takes: Some(shared.rng.millis(200, 9_000)), frames: 1, repeatable: false };
        let limit = Some(Duration::from_secs(60));
        shared.at(
            Duration::from_secs(1),
            Event::Begin { router: Some(0), server: 0, limit, tool, plain: false },
        );
        let time = shared.rng.millis(1_030, 4_000);
        let still = shared.rng.millis(28_000, 42_000);
        shared.at(time, Event::Freeze(Node::Router(0), still));
    }
    let count = 2 + shared.rng.index(12);
    for call in 0..count {
        let rng = &mut shared.rng;
        let takes = match rng.below(10) {
            0 => None,
            1 | 2 => Some(rng.millis(1_000, 6_000)),
            _ => Some(rng.millis(0, 400)),
        };
        let frames = [1, 1, 1, 2, 5][rng.index(5)];
        let limit = (!rng.happens(30)).then(|| rng.millis(600, 6_500));
        let event = Event::Begin {
            router: Some(rng.index(routers)),
            server: rng.index(servers),
            limit,
            tool: Tool { takes, frames, repeatable: rng.happens(400) },
            plain: false,
        };
        let time = rng.millis(0, 7_000);
        let cancelled = rng.happens(120).then(|| time + rng.millis(0, 2_000));
        shared.at(time, event);
        if let Some(time) = cancelled {
            shared.at(time, Event::Cancel(call));
        }
    }
}

fn mishaps(shared: &mut Shared, routers: usize, workers: usize) {
    for index in 0..routers {
        let node = Node::Router(index);
        if shared.rng.happens(150) {
            let event = Event::Freeze(node, shared.rng.millis(100, 7_000));
            let time = shared.rng.millis(0, 6_000);
            shared.at(time, event);
        }
        if shared.rng.happens(80) {
            let time = shared.rng.millis(0, 8_000);
            shared.at(time, Event::Kill(node));
        }
    }
    for index in 0..workers {
        let node = Node::Worker(index);
        let freezes = if shared.rng.happens(400) { 1 + shared.rng.index(3) } else { 0 };
        for _ in 0..freezes {
            let longest = [600, 1_500, 2_500, 10_000][shared.rng.index(4)];
            let event = Event::Freeze(node, shared.rng.millis(100, longest));
            let time = shared.rng.millis(0, 6_000);
            shared.at(time, event);
        }
        if shared.rng.happens(200) {
            let time = shared.rng.millis(0, 8_000);
            shared.at(time, Event::Kill(node));
            if shared.rng.happens(500) {
                shared.at(time + Duration::from_millis(300), Event::NewWorker);
            }
        }
        if shared.rng.happens(100) {
            let time = shared.rng.millis(0, 8_000);
            shared.at(time, Event::Drain(index));
        }
    }
    if shared.rng.happens(150) {
        let from = shared.rng.millis(0, 6_000);
        let longest = [500, 2_000, 12_000][shared.rng.index(3)];
        let to = from + shared.rng.millis(100, longest);
        shared.outages.push((from, to));
    }
}
