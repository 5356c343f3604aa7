//! Workers that die, hang or are cut off from the bus while they run calls: their calls are answered in time
//! and truly, others take over, and who comes back does nothing that is over.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{
    super::deployment::{alive, eventually},
    history::{self, Call, told},
    stage::{Stage, descendants},
};

/// Machines are slow and shared.
const GRACE: Duration = Duration::from_secs(2);
/// How long it may take until another worker runs what the lost one ran.
const TAKEOVER: Duration = Duration::from_secs(10);
/// How long its children may outlive a killed worker.
const CHILDREN: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Kill,
    Freeze,
    CutBus,
    HoldBus,
}

impl Harm {
    /// How long it may take until the worker is known to be lost.
    fn noticed(self) -> Duration {
        match self {
            // Nobody answers in its name any more.
            Harm::Kill | Harm::CutBus => Duration::from_millis(500),
            // It says nothing any more.
            Harm::Freeze | Harm::HoldBus => Duration::from_millis(4_500),
        }
    }
}

async fn lose_a_worker(harm: Harm) {
    let stage = Stage::start(2, 2, 0).await;
    stage.add("s", json!({})).await;
    let owner = stage.owners(0, "s").await.remove(0);
    let seat = stage.seat_of(&owner);
    let children = descendants(seat.pid().unwrap());
    let record = async |id: String, ms: u64| {
        let args = json!({"path": stage.executed(), "id": id, "ms": ms});
        let answer = stage.call(0, "default", "s", "record", args).await;
        let code = answer.code();
        (Call::new(id, "-", "s", told(answer.status, &answer.json())), code)
    };
    let mut calls = Vec::new();
    let ((running, code, answered), harmed) = tokio::join!(
        async {
            let (call, code) = record("running".to_owned(), 20_000).await;
            (call, code, Instant::now())
        },
        async {
            eventually("the call runs", async || stage.history().contains("running")).await;
            let harmed = Instant::now();
            match harm {
                Harm::Kill => seat.kill(),
                Harm::Freeze => seat.freeze(),
                Harm::CutBus => seat.bus.cut(),
                Harm::HoldBus => seat.bus.hold(),
            }
            if harm == Harm::Kill {
                eventually("its children are gone", async || !children.iter().any(|pid| alive(*pid))).await;
                assert!(harmed.elapsed() < CHILDREN + GRACE, "it took {:?}", harmed.elapsed());
            }
            harmed
        }
    );
    assert_eq!(code, "worker_lost");
    let took = answered - harmed;
    println!("{harm:?}: noticed after {took:?}");
    let metrics = stage.get(0, "/metrics").await.text;
    assert!(metrics.contains("\nmcp_fleet_workers_lost_total 1\n"), "{harm:?}: {metrics}");
    assert!(took < harm.noticed() + GRACE, "{harm:?}: it took {took:?}");
    calls.push(running);
    // Some of them are offered to it, or even sent to it, before anybody knows better.
    for at in 0..20 {
        calls.push(record(format!("meanwhile-{at}"), 0).await.0);
    }
    eventually("another worker runs it", async || {
        let other = stage.owners(0, "s").await;
        !other.is_empty() && !other.contains(&owner)
    })
    .await;
    assert!(harmed.elapsed() < TAKEOVER + GRACE, "{harm:?}: it took {:?}", harmed.elapsed());
    match harm {
        Harm::Kill => seat.fill(&stage.data).await,
        Harm::Freeze => seat.thaw(),
        Harm::CutBus | Harm::HoldBus => seat.bus.mend(),
    }
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
async fn a_worker_that_is_killed() {
    lose_a_worker(Harm::Kill).await;
}

#[tokio::test]
async fn a_worker_that_is_frozen() {
    lose_a_worker(Harm::Freeze).await;
}

#[tokio::test]
async fn a_worker_whose_connection_to_the_bus_ends() {
    lose_a_worker(Harm::CutBus).await;
}

/// What was sent to it arrives late, when it is not to be done any more.
#[tokio::test]
async fn a_worker_that_nothing_reaches_by_the_bus() {
    lose_a_worker(Harm::HoldBus).await;
}
