//! Workers that are cut off from the bus while they run calls.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{
    super::deployment::eventually,
    history::{self, Call, told},
    stage::Stage,
};

/// How long it may take until a worker is known to be lost that says nothing any more.
const SILENT: Duration = Duration::from_millis(4_500);
/// The same where its connection ends.
const ENDED: Duration = Duration::from_millis(1_000);
/// Machines are slow and shared.
const GRACE: Duration = Duration::from_secs(2);

async fn cut_off_a_worker(silently: bool) {
    let stage = Stage::start(2, 2, 0).await;
    stage.add("s", json!({})).await;
    let owner = stage.owners(0, "s").await.remove(0);
    let seat = stage.seat_of(&owner);
    let record = async |id: String, ms: u64| {
        let args = json!({"path": stage.executed(), "id": id, "ms": ms});
        let answer = stage.call(0, "default", "s", "record", args).await;
        let code = answer.code();
        (Call::new(id, "-", "s", told(answer.status, &answer.json())), code)
    };
    let mut calls = Vec::new();
    let ((running, code), cut) = tokio::join!(record("running".to_owned(), 20_000), async {
        eventually("the call runs", async || stage.history().contains("running")).await;
        if silently {
            seat.bus.hold()
        } else {
            seat.bus.cut()
        }
        Instant::now()
    });
    let took = cut.elapsed();
    assert_eq!(code, "worker_lost");
    assert!(took < GRACE + if silently { SILENT } else { ENDED }, "it took {took:?}");
    calls.push(running);
    // Some of them are offered to it, or even sent to it, before anybody knows better.
    for at in 0..20 {
        calls.push(record(format!("meanwhile-{at}"), 0).await.0);
    }
    let other = stage.owners(0, "s").await;
    assert!(other.len() == 1 && other[0] != owner, "{other:?}");
    seat.bus.mend();
    stage.whole().await;
    for at in 0..20 {
        let (call, code) = record(format!("after-{at}"), 0).await;
        assert_eq!(code, "", "calls go on");
        calls.push(call);
    }
    println!("{}", history::table(&calls));
    assert_eq!(history::violations(&calls, &stage.history()), [""; 0]);
    stage.stop().await;
}

#[tokio::test]
async fn a_worker_whose_connection_to_the_bus_ends_is_lost_and_comes_back() {
    cut_off_a_worker(false).await;
}

/// What was sent to it arrives late, when it is not to be done any more.
#[tokio::test]
async fn a_worker_that_nothing_reaches_by_the_bus_does_nothing_stale_when_it_is_back() {
    cut_off_a_worker(true).await;
}
