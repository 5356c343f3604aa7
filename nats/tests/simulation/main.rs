//! A simulation of the fleet: the real state machines of both sides of a call, driven by virtual time
//! over a bus that loses, doubles and delays messages, by nodes that freeze and die.

mod bus;
mod chance;
mod clock;
mod drawn;
mod history;
mod listed;
mod router;
mod scenes;
mod store;
mod worker;
mod world;

use std::time::Instant;

use bus::Misdeed;
use drawn::Tally;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
#[allow(clippy::print_stdout, clippy::use_debug)]
fn drawn_schedules_keep_every_promise() {
    let only = number("MCP_SIMULATION_SEED");
    let seeds = only.map_or(0..number("MCP_SIMULATION_SCHEDULES").unwrap_or(1_000), |one| one..one + 1);
    let (begun, count) = (Instant::now(), seeds.end - seeds.start);
    let mut sum = Tally::default();
    for seed in seeds {
        let world = drawn::run(seed, Misdeed::None, only.is_some());
        if let Some(violation) = &world.shared.history.violation {
            let world = drawn::run(seed, Misdeed::None, true);
            show(&world);
            panic!("MCP_SIMULATION_SEED={seed}: {violation}");
        }
        sum.add(&Tally::of(&world));
    }
    println!("{count} drawn schedules, {sum:?}, in {:?}", begun.elapsed());
}

#[test]
#[allow(clippy::print_stdout)]
fn listed_schedules_of_one_call_keep_every_promise() {
    let faults = number("MCP_SIMULATION_FAULTS").unwrap_or(2);
    let faults = usize::try_from(faults).unwrap();
    for single in [false, true] {
        let begun = Instant::now();
        let explored = listed::explore(faults, single, Misdeed::None);
        if let Some((choices, rule)) = &explored.broken {
            let world = listed::run(choices.clone(), single, Misdeed::None);
            show(&world);
            panic!("{choices:?}, single {single}: {rule}");
        }
        println!(
            "{} listed schedules with at most {faults} faults, {} courses of events, in {:?}",
            explored.schedules,
            explored.courses.len(),
            begun.elapsed()
        );
    }
}

#[allow(clippy::print_stdout)]
fn show(world: &world::World) {
    for line in &world.shared.history.trace {
        if ["Pulse", "Beat", "Echo", "Alive"].iter().all(|word| !line.contains(word)) {
            println!("{}", line.chars().take(260).collect::<String>());
        }
    }
}

/// Every misdeed of a driver breaks a rule that the simulation knows, and within the schedules that run
/// each time.
#[test]
#[allow(clippy::print_stdout, clippy::use_debug)]
fn misdeeds_are_found() {
    for (misdeed, rules) in [
        (Misdeed::RetryAfterGo, "(1) (2)"),
        (Misdeed::MixAttempts, "(1) (2) (3)"),
        (Misdeed::GoAtOnce, "(1) (2) (3)"),
        (Misdeed::ClaimNotStarted, "(2)"),
        (Misdeed::NeverTick, "(4) (6)"),
        (Misdeed::TrustAge, "(7)"),
        (Misdeed::StartAnyway, "(1) (2) (5) (7)"),
        (Misdeed::DenyRunning, "(1) (2)"),
        (Misdeed::KeepPlaces, "(5) (6)"),
        (Misdeed::NeverTickDesk, "(5) (6)"),
        (Misdeed::DropPulses, "(6)"),
    ] {
        let violation = |seed: u64| Some((seed, drawn::run(seed, misdeed, false).shared.history.violation?));
        let found = (0..1_000).find_map(violation);
        let Some((seed, rule)) = found else { panic!("{misdeed:?} was not found") };
        println!("{misdeed:?} is found by seed {seed}: {}", rule.chars().take(120).collect::<String>());
        assert!(rules.contains(&rule[..3]), "{misdeed:?}: {rule}");
    }
}
