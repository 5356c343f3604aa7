//! Who runs what: load is spread, and what may run only once does.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::deployment::{Data, Deployment, PATIENCE, alive, eventually};

async fn pid_of(api: &Deployment, user: &str, server: &str) -> Option<i32> {
    let answer = api.call_as(user, server, "pid", json!({})).await;
    if answer.status != 200 {
        assert_eq!(answer.json()["outcome"], "not_started", "{}", answer.text);
        return None;
    }
    let ids: Value = serde_json::from_str(&answer.tool_text()).unwrap();
    i32::try_from(ids["pid"].as_i64()?).ok()
}

/// Keeps a server busy until the condition holds, and returns how many calls were answered by whom.
async fn busy_until<F: Future<Output = bool>>(api: &Deployment, server: &str, condition: impl Fn() -> F) {
    let stop = tokio_util::sync::CancellationToken::new();
    let callers = (0..12).map(|_| async {
        while !stop.is_cancelled() {
            api.call(server, "sleep", json!({"ms": 200})).await.ok();
        }
    });
    let watch = async {
        eventually("the condition under load", condition).await;
        stop.cancel();
    };
    tokio::join!(futures_util::future::join_all(callers), watch);
}

#[tokio::test]
async fn load_brings_in_more_workers_and_they_may_leave_again() {
    let mut api = Deployment::start().await;
    api.add_fixture("slow", &["--more"], json!({"concurrency": 1})).await;
    assert_eq!(api.owners_of("slow").await.len(), 1);
    busy_until(&api, "slow", async || api.owners_of("slow").await.len() == 2).await;
    // Both answer calls.
    let mut pids = BTreeSet::new();
    let asked = Instant::now();
    while pids.len() < 2 {
        assert!(asked.elapsed() < Duration::from_secs(20), "only {pids:?} answered");
        let answers = futures_util::future::join_all((0..8).map(|_| pid_of(&api, "default", "slow"))).await;
        pids.extend(answers.into_iter().flatten());
    }
    // One stops while calls run, and none of them fails.
    let leaving = api.owners_of("slow").await.remove(0);
    let leaving = api.take_worker(&leaving);
    let mut leaving = Some(tokio::spawn(leaving.stop()));
    busy_until(&api, "slow", async || api.owners_of("slow").await.len() == 1).await;
    assert!(leaving.take().unwrap().await.unwrap().success());
    // A third one takes part.
    api.add_worker().await;
    busy_until(&api, "slow", async || api.owners_of("slow").await.len() == 2).await;
}

/// A file that a server appends its pid to at each start tells how many run at once.
fn running(starts: &std::path::Path) -> Vec<i32> {
    let text = std::fs::read_to_string(starts).unwrap_or_default();
    text.lines().map(|line| line.parse().unwrap()).filter(|pid| alive(*pid)).collect()
}

#[tokio::test]
async fn a_singleton_has_one_owner_in_the_fleet() {
    let mut api = Deployment::builder().workers(3).start().await;
    let starts = api.data().path().join("starts");
    let flags = ["--more", "--start-file", starts.to_str().unwrap()];
    api.add_fixture("one", &flags, json!({"scaling": "singleton", "concurrency": 2})).await;
    let owner = api.owners_of("one").await;
    assert_eq!(owner.len(), 1);
    // Load that would spread another server leaves this one alone.
    let busy = Instant::now();
    busy_until(&api, "one", async || busy.elapsed() > Duration::from_secs(4)).await;
    assert_eq!(api.owners_of("one").await, owner);
    assert_eq!(running(&starts).len(), 1);
    // Its owner is lost: another one takes over when the lease has run out, not before.
    let lost = api.take_worker(&owner[0]);
    lost.signal(Signal::SIGKILL);
    let start = Instant::now();
    eventually("another worker has taken over", async || {
        assert!(running(&starts).len() <= 1, "two run at once");
        pid_of(&api, "default", "one").await.is_some()
    })
    .await;
    assert!(start.elapsed() < Duration::from_secs(20), "it took {:?}", start.elapsed());
    let next = api.owners_of("one").await;
    assert!(next.len() == 1 && next != owner, "{next:?}");
}

/// The owner is cut off rather than dead: it must have stopped accepting before another one does.
#[tokio::test]
async fn a_frozen_owner_of_a_users_process_accepts_nothing_when_it_wakes() {
    let api = Deployment::start().await;
    api.register_fixture("own", &["--more"], json!({"isolation": "per_user"})).await.ok();
    let first = pid_of(&api, "alice", "own").await.unwrap();
    assert_eq!(pid_of(&api, "alice", "own").await.unwrap(), first, "a user's process stays the same");
    let other = pid_of(&api, "bob", "own").await.unwrap();
    assert_ne!(first, other);
    let owner = {
        let server = api.server("own").await;
        let instances = server["instances"].as_array().unwrap().clone();
        let of_alice = instances.iter().find(|one| one["username"] == "alice").unwrap();
        of_alice["workerId"].as_str().unwrap().to_owned()
    };
    let frozen = api.workers().into_iter().find(|worker| worker.id == owner).unwrap();
    frozen.signal(Signal::SIGSTOP);
    let patience = Instant::now() + PATIENCE;
    let taken_over = loop {
        assert!(Instant::now() < patience, "alice is served by no other worker");
        if let Some(pid) = pid_of(&api, "alice", "own").await {
            break pid;
        }
    };
    assert_ne!(taken_over, first);
    frozen.signal(Signal::SIGCONT);
    for _ in 0..30 {
        assert_eq!(pid_of(&api, "alice", "own").await, Some(taken_over), "two owners accept");
    }
    eventually("the old process is gone", async || !alive(first)).await;
}

#[tokio::test]
async fn users_share_the_workers() {
    let api = Deployment::start().await;
    api.register_fixture("own", &["--more"], json!({"isolation": "per_user"})).await.ok();
    let users: Vec<_> = (0..12).map(|at| format!("user-{at}")).collect();
    let pids = futures_util::future::join_all(users.iter().map(|user| pid_of(&api, user, "own"))).await;
    let pids: BTreeSet<_> = pids.into_iter().map(Option::unwrap).collect();
    assert_eq!(pids.len(), users.len(), "every user has a process");
    assert_eq!(api.owners_of("own").await.len(), 2, "both workers run some");
    // Whichever gateway is asked, the user's own process answers.
    for user in &users {
        let first = pid_of(&api, user, "own").await.unwrap();
        assert_eq!(pid_of(&api, user, "own").await.unwrap(), first);
        assert!(pids.contains(&first));
    }
}

/// A program that one worker has, and the others have not: whoever ranks first, calls find it.
#[tokio::test]
async fn what_does_not_start_on_one_worker_may_start_on_another() {
    let mut api = Deployment::builder().workers(1).start().await;
    let without = api.workers()[0].id.clone();
    let tools = Data::new();
    std::os::unix::fs::symlink(std::env::current_exe().unwrap(), tools.path().join("only-there")).unwrap();
    let path = format!("{}:{}", tools.path().display(), std::env::var("PATH").unwrap());
    api.add_worker_with(&[("PATH", path.as_str())]).await;
    let with = api.workers()[1].id.clone();
    let tried = async |name: &str| {
        let server = api.server(name).await;
        let instances = server["instances"].as_array().unwrap().clone();
        instances.iter().any(|one| one["workerId"] == without.as_str())
    };
    let mut name = String::new();
    for at in 0..64 {
        name = format!("rare-{at}");
        api.register_fixture(&name, &["--more"], json!({"command": "only-there"})).await.ok();
        if tried(&name).await {
            break;
        }
    }
    assert!(tried(&name).await, "no server falls to the first worker");
    assert_eq!(api.call(&name, "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    assert_eq!(api.owners_of(&name).await, [with]);

    // What nobody has is not looked for for ever, and the answer is the one of a single node.
    api.register_fixture("nowhere", &[], json!({"command": "/nowhere/at/all"})).await.ok();
    let answer = api.call("nowhere", "echo", json!({"text": "hi"})).await.fails(502, "server_unavailable");
    assert_eq!(answer.json()["outcome"], "not_started", "{}", answer.text);
}
