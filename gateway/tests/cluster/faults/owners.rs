//! What may run only once, while its owner is frozen or cut off: another worker takes over, and at no moment
//! do two accept calls.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    super::deployment::{alive, eventually},
    history::{self, Call, Told, told},
    stage::{Seat, Stage},
};

/// How long it may take until another worker runs what the owner ran.
const TAKEOVER: Duration = Duration::from_secs(10);
/// Machines are slow and shared, and the server has to start.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy)]
enum Harm {
    Freeze,
    CutBus,
    HoldBus,
    CutStore,
    HoldStore,
}

impl Harm {
    fn begin(self, seat: &Seat) {
        match self {
            Harm::Freeze => seat.freeze(),
            Harm::CutBus => seat.bus.cut(),
            Harm::HoldBus => seat.bus.hold(),
            Harm::CutStore => seat.store.cut(),
            Harm::HoldStore => seat.store.hold(),
        }
    }

    fn end(self, seat: &Seat) {
        match self {
            Harm::Freeze => seat.thaw(),
            Harm::CutBus | Harm::HoldBus => seat.bus.mend(),
            Harm::CutStore | Harm::HoldStore => seat.store.mend(),
        }
    }
}

/// The servers that may run only once, and who calls them.
const SERVERS: [(&str, &str); 2] = [("one", "default"), ("own", "alice")];

/// Calls one after the other, and where each was answered.
async fn caller(stage: &Stage, server: &str, user: &str, calls: &Mutex<Vec<Call>>, stop: &CancellationToken) {
    while !stop.is_cancelled() {
        let id = {
            let mut calls = calls.lock().unwrap();
            let id = format!("{server}-{}", calls.len());
            calls.push(Call::new(id.clone(), "-", server, Told::Nothing));
            id
        };
        let lock = stage.data.path().join(format!("lock-{server}-{user}"));
        let args = json!({"path": stage.executed(), "id": id, "ms": 30, "lock": lock});
        let answer = stage.call(0, user, server, "record", args).await;
        let told = told(answer.status, &answer.json());
        let mut calls = calls.lock().unwrap();
        calls.iter_mut().find(|call| call.id == id).unwrap().told = vec![told];
    }
}

/// The process that ran a server's latest call, and how many it ran since it began to.
fn latest(history: &str, server: &str) -> Option<(i32, usize)> {
    let prefix = format!("{server}-");
    let mut pids = history.lines().rev().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        words.next()?.starts_with(&prefix).then(|| words.next()?.parse::<i32>().ok()).flatten()
    });
    let last = pids.next()?;
    Some((last, 1 + pids.take_while(|pid| *pid == last).count()))
}

async fn harm_an_owner(harm: Harm) {
    let stage = Stage::start(1, 2, 0).await;
    stage.add("one", json!({"scaling": "singleton"})).await;
    stage.add("own", json!({"isolation": "per_user"})).await;
    for (server, user) in SERVERS {
        let (calls, stop) = (Mutex::default(), CancellationToken::new());
        let watch = async {
            let ran = |history: String| latest(&history, server);
            eventually("calls run", async || ran(stage.history()).is_some_and(|(_, times)| times > 5)).await;
            let (first, _) = ran(stage.history()).unwrap();
            let owner = stage
                .workers
                .iter()
                .find(|seat| super::stage::descendants(seat.pid().unwrap()).contains(&first));
            let owner = owner.unwrap();
            harm.begin(owner);
            let harmed = Instant::now();
            eventually(&format!("another worker runs {server}"), async || {
                ran(stage.history()).is_some_and(|(pid, times)| pid != first && times > 5)
            })
            .await;
            println!("{harm:?}, {server}: taken over after {:?}", harmed.elapsed());
            assert!(harmed.elapsed() < TAKEOVER + GRACE, "{harm:?}, {server}: {:?}", harmed.elapsed());
            let (second, _) = ran(stage.history()).unwrap();
            harm.end(owner);
            stage.whole().await;
            let (_, so_far) = ran(stage.history()).unwrap();
            eventually("it goes on where it is", async || {
                let (pid, times) = ran(stage.history()).unwrap();
                assert_eq!(pid, second, "{harm:?}, {server}: the old owner accepts calls again");
                times > so_far + 30
            })
            .await;
            stop.cancel();
            eventually("the old process is gone", async || !alive(first)).await;
        };
        tokio::join!(
            watch,
            caller(&stage, server, user, &calls, &stop),
            caller(&stage, server, user, &calls, &stop),
            caller(&stage, server, user, &calls, &stop),
        );
        let calls = calls.into_inner().unwrap();
        println!("{}", history::table(&calls));
        let executed: Vec<_> = stage.history().lines().map(str::to_owned).collect();
        let prefix = format!(" {server}-");
        let own: Vec<_> = executed.into_iter().filter(|line| line.contains(&prefix)).collect();
        assert_eq!(history::violations(&calls, &own.join("\n")), [""; 0], "{harm:?}, {server}");
    }
    stage.stop().await;
}

#[tokio::test]
async fn an_owner_that_is_frozen() {
    harm_an_owner(Harm::Freeze).await;
}

#[tokio::test]
async fn an_owner_whose_connection_to_the_bus_ends() {
    harm_an_owner(Harm::CutBus).await;
}

#[tokio::test]
async fn an_owner_that_nothing_reaches_by_the_bus() {
    harm_an_owner(Harm::HoldBus).await;
}

#[tokio::test]
async fn an_owner_whose_connection_to_the_store_ends() {
    harm_an_owner(Harm::CutStore).await;
}

#[tokio::test]
async fn an_owner_that_nothing_reaches_from_the_store() {
    harm_an_owner(Harm::HoldStore).await;
}
