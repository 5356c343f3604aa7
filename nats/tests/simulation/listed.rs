//! All schedules of one call and two workers in which at most so many things go wrong, one after the
//! other: every message of the call may be lost, doubled or late, the bus may go away with it, and
//! whoever is to read one may freeze or die before, or the call be cancelled.

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use crate::{
    bus::{Event, Fate, Misdeed, Shared},
    chance::{Listed, Rng},
    history::{End, Tool},
    store::Server,
    world::World,
};

/// What was gone through.
#[derive(Debug, Default)]
pub struct Explored {
    pub schedules: usize,
    /// Different courses of events: what the nodes said and did, in order, whatever the moments.
    pub courses: HashSet<u64>,
    /// The first schedule that broke a rule.
    pub broken: Option<(Vec<u8>, String)>,
}

/// Runs one schedule.
pub fn run(choices: Vec<u8>, single: bool, misdeed: Misdeed) -> World {
    let fate = Fate::Listed(Listed::new(choices));
    let limit = Duration::from_secs(9);
    let servers = vec![Server::new(single, limit)];
    let mut world = World::new(Shared::new(Rng::new(7), fate, servers, misdeed), false);
    world.shared.history.traced = true;
    world.add_worker(1, 2);
    world.add_worker(1, 2);
    world.add_router();
    let tool = Tool {
        takes: Some(Duration::from_millis(40)),
        frames: if single { 1 } else { 2 },
        repeatable: false,
    };
    let begin = Event::Begin { router: Some(0), server: 0, limit: Some(limit), tool, plain: false };
    world.shared.at(Duration::from_millis(20), begin);
    while world.shared.now < Duration::from_secs(20) && world.shared.history.violation.is_none() {
        let until = world.shared.now + Duration::from_millis(500);
        world.run(until);
        world.shared.now = until;
        let over =
            world.is_quiet() && world.workers.iter().all(|worker| worker.busy() == 0 && !worker.frozen);
        if over && world.shared.now > Duration::from_secs(1) {
            break;
        }
    }
    // What is still on its way must do no harm either.
    let until = world.shared.now + Duration::from_secs(6);
    world.run(until);
    while world.workers.iter().any(|worker| worker.frozen || worker.busy() > 0)
        && world.shared.now < Duration::from_secs(45)
    {
        let until = world.shared.now.max(until) + Duration::from_secs(3);
        world.run(until);
        world.shared.now = until;
        if world.shared.history.violation.is_some() {
            break;
        }
    }
    if world.shared.history.violation.is_none() {
        world.judge();
    }
    world
}

/// Goes through all schedules with at most `faults` things going wrong.
pub fn explore(faults: usize, single: bool, misdeed: Misdeed) -> Explored {
    let mut explored = Explored::default();
    let mut todo: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(choices) = todo.pop() {
        let from = choices.len();
        let wrong = choices.iter().filter(|choice| **choice != 0).count();
        let world = run(choices.clone(), single, misdeed);
        explored.schedules += 1;
        explored.courses.insert(course(&world));
        let mut broken = world.shared.history.violation.clone();
        let calls = &world.shared.history.calls;
        let answered = matches!(calls[0].ends.first(), Some((End::Answered(_), _)));
        let Fate::Listed(listed) = &world.shared.fate else { continue };
        // What befell one message only costs time.
        if wrong <= 1 && !listed.mishaps && !answered {
            broken.get_or_insert("(8) one message was enough to fail the call".to_owned());
        }
        if let Some(rule) = broken {
            explored.broken = Some((choices, rule));
            return explored;
        }
        if wrong >= faults {
            continue;
        }
        for at in from..listed.met() {
            for way in 1..listed.ways[at] {
                let mut next = choices.clone();
                next.resize(at, 0);
                next.push(way);
                todo.push(next);
            }
        }
    }
    explored
}

fn course(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    for line in &world.shared.history.trace {
        if ["Pulse", "Beat", "Echo", "Alive"].iter().all(|word| !line.contains(word)) {
            line[9..].hash(&mut hasher);
        }
    }
    hasher.finish()
}
