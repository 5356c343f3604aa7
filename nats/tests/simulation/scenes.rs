//! Single scenes with a server that only one worker may own, where a call could go in circles.

use std::time::Duration;

use mcp_shared::error::Outcome;

use crate::{
    bus::{Event, Fate, Misdeed, Shared, Weather},
    chance::Rng,
    history::{End, Tool},
    store::Server,
    world::World,
};

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn call(world: &mut World, time: Duration, takes: Option<Duration>) {
    let tool = Tool { takes, frames: 1, repeatable: false };
    let limit = Some(ms(6_000));
    world.shared.at(time, Event::Begin { router: Some(0), server: 0, limit, tool, plain: false });
}

/// Two workers with one place each, and a server that one of them owns after a first call.
fn owned(away: bool) -> World {
    let mut weather = Weather { latency: (1, 1), calm: Duration::from_secs(60), ..Weather::default() };
    if away {
        // Whichever of the two it is: the other is back before it is asked.
        weather.away = vec![(0, ms(4_000), ms(4_040)), (1, ms(4_000), ms(4_005))];
    }
    let servers = vec![Server::new(true, ms(6_000))];
    let mut world = World::new(Shared::new(Rng::new(1), Fate::Drawn(weather), servers, Misdeed::None), false);
    world.add_worker(1, 1);
    world.add_worker(1, 1);
    world.add_router();
    call(&mut world, ms(1_000), Some(ms(10)));
    world
}

fn end(world: &World, call: usize) -> (End, Duration) {
    assert_eq!(world.shared.history.violation, None);
    let record = &world.shared.history.calls[call];
    let (end, at) = record.ends[0];
    (end, at - record.begun)
}

#[test]
fn an_owner_that_connects_anew_is_asked_again() {
    let mut world = owned(true);
    world.run(ms(3_000));
    assert_eq!(world.shared.store[0].owner(), Some(0), "it is the one that is away for longer");
    call(&mut world, ms(4_010), Some(ms(10)));
    world.run(ms(12_000));
    let (end, took) = end(&world, 1);
    assert!(matches!(end, End::Answered(_)) && took < ms(2_000), "{end:?} after {took:?}");
}

#[test]
fn a_full_owner_is_told_of_at_once() {
    let mut world = owned(false);
    // One runs, one waits, and there is no room for the third.
    for time in [4_000, 4_200, 4_400] {
        call(&mut world, ms(time), None);
    }
    world.run(ms(15_000));
    let (end, took) = end(&world, 3);
    assert!(end == End::Failed(Outcome::NotStarted) && took < ms(1_000), "{end:?} after {took:?}");
}
