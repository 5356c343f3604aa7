//! What may run only once: one owner, whatever happens to workers and to their links to the store.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mcp_shared::{
    error::{ErrorCode, Outcome},
    hosting::{Hosting, Placing, Refusal},
    ids::ServerName,
    worker_api::WorkerApi,
};
use mcp_worker::Boot;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    cluster::{Cluster, Node, finish, owner, until},
    faults::Link,
};

fn singleton() -> Value {
    json!({ "scaling": "singleton" })
}

async fn two(cluster: &Cluster) -> (Node, Node) {
    (cluster.worker(Boot::OnDemand).await, cluster.worker(Boot::OnDemand).await)
}

async fn echo(node: &Node, server: &ServerName, user: &str, placing: Placing) -> Result<String, Refusal> {
    node.call(server, user, "echo", json!({ "text": "hi" }), placing).await
}

fn name(node: &Node) -> Option<String> {
    Some(node.worker.id().as_str().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_worker_says_who_the_owner_is() {
    let cluster = Cluster::new();
    let single = cluster.register("single", singleton()).await;
    let own = cluster.register("own", json!({ "isolation": "per_user" })).await;
    let (one, two) = two(&cluster).await;
    assert_eq!(owner(one.offer(&single, "ann", "echo", Placing::Owned).await), None);
    echo(&one, &single, "ann", Placing::Take).await.unwrap();
    echo(&one, &single, "bob", Placing::Owned).await.unwrap();
    for placing in [Placing::Take, Placing::TakeOver] {
        // Whoever lives cannot be taken over either, and that shows at its next sign of life.
        assert_eq!(owner(two.offer(&single, "ann", "echo", placing).await), name(&one));
    }
    assert_eq!(owner(two.offer(&single, "ann", "echo", Placing::Owned).await), None);
    two.worker.place(&single).await.unwrap();

    // Every user has an owner.
    echo(&one, &own, "ann", Placing::Take).await.unwrap();
    echo(&two, &own, "bob", Placing::Take).await.unwrap();
    echo(&two, &own, "cem", Placing::Take).await.unwrap();
    assert_eq!(owner(two.offer(&own, "ann", "echo", Placing::Take).await), name(&one));
    assert_eq!(owner(one.offer(&own, "bob", "echo", Placing::Take).await), name(&two));
    assert_eq!((one.load(&own).unwrap().users, two.load(&own).unwrap().users), (1, 2));
    assert_eq!(two.load(&own).unwrap().instances, 2);
    until("placing it had no effect", async || two.load(&single).is_none()).await;
    assert_eq!(cluster.lines("single.starts").len(), 1);

    // Who leaves in order leaves everything to the others at once.
    one.stop().await;
    echo(&two, &own, "ann", Placing::Take).await.unwrap();
    echo(&two, &single, "ann", Placing::Take).await.unwrap();
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_offers_at_once_agree_on_one_owner() {
    let cluster = Cluster::new();
    let (one, two) = two(&cluster).await;
    for round in 0..5 {
        let server = cluster.register(&format!("single-{round}"), singleton()).await;
        one.announce(&server).await;
        two.announce(&server).await;
        let offers = (0..20).map(|n| {
            let node = if n % 2 == 0 { &one } else { &two };
            let server = &server;
            async move { (n % 2, echo(node, server, "ann", Placing::Take).await) }
        });
        let all = futures_util::future::join_all(offers).await;
        let (won, lost): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, answer)| answer.is_ok());
        assert_eq!(won.len(), 10, "{lost:?}");
        assert!(won.iter().all(|(node, _)| *node == won[0].0));
        let refused = |(_, answer): &(usize, Result<String, Refusal>)| {
            matches!(answer, Err(Refusal::NotOwner { owner: Some(_) }))
        };
        assert!(lost.iter().all(refused), "{lost:?}");
        assert_eq!(cluster.lines(&format!("single-{round}.starts")).len(), 1);
    }
    one.stop().await;
    two.stop().await;
}

/// Calls a worker again and again until told to stop; returns when each call was accepted.
async fn hammer(
    node: Arc<Node>,
    server: ServerName,
    file: std::path::PathBuf,
    over: Arc<AtomicBool>,
) -> Vec<Instant> {
    let mut accepted = Vec::new();
    while !over.load(Ordering::Acquire) {
        if let Ok(mut call) = node.offer(&server, "ann", "touch", Placing::Take).await
            && call.held().await.is_ok()
        {
            accepted.push(Instant::now());
            let _ = finish(call, json!({ "path": file, "text": "one" })).await;
        }
        sleep(Duration::from_millis(5)).await;
    }
    accepted
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_silent_worker_ran_is_taken_over_and_never_accepted_twice() {
    let cluster = Cluster::new();
    let server = cluster.register("single", singleton()).await;
    let other = cluster.register("other", singleton()).await;
    let (one, two) = two(&cluster).await;
    let one = Arc::new(one);
    echo(&one, &server, "ann", Placing::Take).await.unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let calls =
        tokio::spawn(hammer(Arc::clone(&one), server.clone(), cluster.file("touched"), Arc::clone(&over)));
    until("calls arrive", async || cluster.lines("touched").len() > 10).await;

    one.link.set(Link::Frozen);
    let silent = Instant::now();
    assert_eq!(owner(two.offer(&server, "ann", "touch", Placing::Take).await), name(&one));
    // Two who wait share one look at the silent worker.
    let (first, second) = tokio::join!(
        two.offer(&server, "ann", "touch", Placing::TakeOver),
        two.offer(&server, "bob", "touch", Placing::TakeOver)
    );
    let (mut first, mut second) = (first.unwrap(), second.unwrap());
    first.held().await.unwrap();
    let accepted = Instant::now();
    second.held().await.unwrap();
    let took = accepted - silent;
    assert!(took < Duration::from_secs(7), "{took:?}");
    finish(first, json!({ "path": cluster.file("touched"), "text": "two" })).await.unwrap();
    drop(second);

    // Its late renewals arrive now, and tell it that it is out.
    one.link.set(Link::Whole);
    until("the old owner ended what it ran", async || one.load(&server).is_none()).await;
    until("the old owner begins a new life", async || echo(&one, &other, "ann", Placing::Take).await.is_ok())
        .await;
    over.store(true, Ordering::Release);
    let old = calls.await.unwrap();
    assert!(old.iter().all(|call| *call < accepted), "both owners accepted calls");
    let lines = cluster.lines("touched");
    let begun = lines.iter().position(|line| line == "two").unwrap();
    assert!(lines[begun..].iter().all(|line| line == "two"), "the old owner wrote after the new one");
    assert!(begun > 10);
    assert_eq!(owner(one.offer(&server, "ann", "echo", Placing::Take).await), name(&two));
    echo(&two, &server, "ann", Placing::Owned).await.unwrap();
    two.stop().await;
    one.worker.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_was_put_out_ends_what_it_ran_and_begins_a_new_life() {
    let cluster = Cluster::new();
    let server = cluster.register("single", singleton()).await;
    let many = cluster.register("many", json!({})).await;
    let node = cluster.worker(Boot::OnDemand).await;
    echo(&node, &server, "ann", Placing::Take).await.unwrap();
    echo(&node, &many, "ann", Placing::Take).await.unwrap();
    let mut call = node.offer(&server, "ann", "sleep", Placing::Owned).await.unwrap();
    call.held().await.unwrap();
    let call = tokio::spawn(finish(call, json!({ "ms": 10_000 })));
    until("the call is in flight", async || {
        let report = node.worker.report(&server).await.unwrap();
        report.instances.iter().any(|instance| instance.in_flight == 1)
    })
    .await;

    let vault = cluster.vault().await;
    let lease = format!("worker/{}", node.worker.id());
    until("it was put out", async || {
        let seen = vault.store().lease(&lease).await.unwrap().unwrap().revision;
        vault.store().take_lease(&lease, "somebody else", Some(seen)).await.is_ok()
    })
    .await;
    // The call was in flight on a process that may run elsewhere by now.
    let ended = call.await.unwrap().unwrap_err();
    assert_eq!((ended.code, ended.outcome), (ErrorCode::ServerStopped, Some(Outcome::Unknown)));
    until("it owns again", async || echo(&node, &server, "ann", Placing::Take).await.is_ok()).await;
    assert_eq!(cluster.lines("single.starts").len(), 2);
    assert_eq!(cluster.lines("many.starts").len(), 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn placing_takes_over_what_a_lost_worker_ran() {
    let cluster = Cluster::new();
    let server = cluster.register("single", singleton()).await;
    let (one, two) = two(&cluster).await;
    echo(&one, &server, "ann", Placing::Take).await.unwrap();
    one.link.set(Link::Cut);
    until("it is placed elsewhere", async || {
        two.worker.place(&server).await.unwrap();
        two.load(&server).is_some()
    })
    .await;
    echo(&two, &server, "ann", Placing::Owned).await.unwrap();
    two.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_store_only_what_needs_no_lease_goes_on() {
    let cluster = Cluster::new();
    let single = cluster.register("single", singleton()).await;
    let own = cluster.register("own", json!({ "isolation": "per_user" })).await;
    let many = cluster.register("many", json!({})).await;
    let node = cluster.worker(Boot::OnDemand).await;
    for server in [&single, &own, &many] {
        echo(&node, server, "ann", Placing::Take).await.unwrap();
    }
    node.link.set(Link::Cut);
    let cut = Instant::now();
    // A call that was admitted before is not started after.
    let mut admitted = None;
    until("leased servers take no calls", async || {
        match node.offer(&single, "ann", "echo", Placing::Take).await {
            Ok(call) => {
                admitted = Some(call);
                false
            }
            Err(Refusal::Busy { error }) => {
                assert_eq!((error.code, error.outcome), (ErrorCode::NoWorker, Some(Outcome::NotStarted)));
                true
            }
            Err(other) => panic!("{other:?}"),
        }
    })
    .await;
    assert!(cut.elapsed() < Duration::from_secs(4), "{:?}", cut.elapsed());
    let late = finish(admitted.unwrap(), json!({ "text": "hi" })).await.unwrap_err();
    assert_eq!((late.code, late.outcome), (ErrorCode::NoWorker, Some(Outcome::NotStarted)));
    assert!(node.load(&single).is_none() && node.load(&own).is_none());
    assert_eq!(owner(node.offer(&own, "ann", "echo", Placing::Owned).await), None);
    echo(&node, &many, "ann", Placing::Owned).await.unwrap();

    // After a while their processes go.
    let report = async |server| node.worker.report(server).await.unwrap().instances.len();
    assert_eq!(report(&single).await, 1);
    until("the processes are gone", async || report(&single).await == 0 && report(&own).await == 0).await;
    assert_eq!(report(&many).await, 1);

    node.link.set(Link::Whole);
    until("it owns again", async || echo(&node, &single, "ann", Placing::Take).await.is_ok()).await;
    assert_eq!(cluster.lines("single.starts").len(), 2);
    assert_eq!(cluster.lines("many.starts").len(), 1);
    // What is not asked for any more is free for others.
    let second = cluster.worker(Boot::OnDemand).await;
    echo(&second, &own, "ann", Placing::Take).await.unwrap();
    second.stop().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_outage_costs_no_process() {
    let cluster = Cluster::new();
    let single = cluster.register("single", singleton()).await;
    let node = cluster.worker(Boot::OnDemand).await;
    echo(&node, &single, "ann", Placing::Take).await.unwrap();
    node.link.set(Link::Cut);
    until("it is not sure any more", async || node.load(&single).is_none()).await;
    node.link.set(Link::Whole);
    until("it is sure again", async || node.load(&single).is_some()).await;
    echo(&node, &single, "ann", Placing::Owned).await.unwrap();
    assert_eq!(cluster.lines("single.starts").len(), 1);
    node.stop().await;
}

/// A worker that the fleet reaches for as long as the flag says so.
async fn reached(cluster: &Cluster) -> (Node, Arc<AtomicBool>) {
    let (node, flag) = (cluster.worker(Boot::OnDemand).await, Arc::new(AtomicBool::new(true)));
    let reached = Arc::clone(&flag);
    node.worker.own_only_while(move || reached.load(Ordering::Relaxed));
    (node, flag)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_reached_owns_nothing_although_the_store_answers() {
    let cluster = Cluster::new();
    let single = cluster.register("single", singleton()).await;
    let (one, flag) = reached(&cluster).await;
    let other = cluster.worker(Boot::OnDemand).await;
    echo(&one, &single, "ann", Placing::Take).await.unwrap();
    // For a moment: nobody has taken over, and the process goes on.
    flag.store(false, Ordering::Relaxed);
    until("it is not sure any more", async || one.load(&single).is_none()).await;
    assert!(echo(&one, &single, "ann", Placing::Take).await.is_err());
    flag.store(true, Ordering::Relaxed);
    until("it is sure again", async || one.load(&single).is_some()).await;
    echo(&one, &single, "ann", Placing::Owned).await.unwrap();
    assert_eq!(cluster.lines("single.starts").len(), 1);
    // For long: another one takes over, and this one ends what it ran.
    flag.store(false, Ordering::Relaxed);
    until("another one has taken over", async || {
        echo(&other, &single, "ann", Placing::TakeOver).await.is_ok()
    })
    .await;
    until("the old process is gone", async || one.worker.report(&single).await.unwrap().instances.is_empty())
        .await;
    flag.store(true, Ordering::Relaxed);
    until("it knows whose it is", async || {
        let refused = one.offer(&single, "ann", "echo", Placing::Take).await.err();
        matches!(refused, Some(Refusal::NotOwner { owner: Some(owner) }) if owner == *other.worker.id())
    })
    .await;
    other.stop().await;
    until("it owns again", async || echo(&one, &single, "ann", Placing::Take).await.is_ok()).await;
    assert_eq!(cluster.lines("single.starts").len(), 3);
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stops_is_free_at_once() {
    let cluster = Cluster::new();
    let sleepy = cluster.register("sleepy", json!({ "scaling": "singleton", "idleTimeout": 200 })).await;
    let crashing = cluster.register("crashing", json!({ "isolation": "per_user" })).await;
    let switched = cluster.register("switched", singleton()).await;
    let (one, two) = two(&cluster).await;
    for server in [&sleepy, &crashing, &switched] {
        echo(&one, server, "ann", Placing::Take).await.unwrap();
    }
    let taken = async |server: &ServerName| {
        until("another takes it", async || echo(&two, server, "ann", Placing::Take).await.is_ok()).await;
    };
    // The owner lives on, so none of these leases runs out.
    taken(&sleepy).await;
    let _ = one.call(&crashing, "ann", "crash", json!({}), Placing::Owned).await;
    taken(&crashing).await;
    // A restart keeps it; being switched off does not.
    for concurrency in 2..5 {
        cluster.change(&switched, |record| record.concurrency = Some(concurrency)).await;
        one.announce(&switched).await;
        two.announce(&switched).await;
        assert_eq!(owner(two.offer(&switched, "ann", "echo", Placing::Take).await), name(&one));
    }
    cluster.change(&switched, |record| record.enabled = false).await;
    one.announce(&switched).await;
    two.announce(&switched).await;
    cluster.change(&switched, |record| record.enabled = true).await;
    one.announce(&switched).await;
    two.announce(&switched).await;
    taken(&switched).await;
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_drains_hands_over_what_no_call_uses() {
    let cluster = Cluster::new();
    let idle = cluster.register("idle", singleton()).await;
    let used = cluster.register("used", singleton()).await;
    let (one, two) = two(&cluster).await;
    echo(&one, &idle, "ann", Placing::Take).await.unwrap();
    let mut call = one.offer(&used, "ann", "sleep", Placing::Take).await.unwrap();
    call.held().await.unwrap();
    let call = tokio::spawn(finish(call, json!({ "ms": 700 })));
    until("the call is in flight", async || {
        let report = one.worker.report(&used).await.unwrap();
        report.instances.iter().any(|instance| instance.in_flight == 1)
    })
    .await;
    one.worker.drain();
    until("what is idle is taken", async || echo(&two, &idle, "ann", Placing::Take).await.is_ok()).await;
    assert!(!call.is_finished());
    assert_eq!(owner(two.offer(&used, "ann", "echo", Placing::Take).await), name(&one));
    assert_eq!(call.await.unwrap().unwrap(), "slept 700");
    until("what was used is taken", async || echo(&two, &used, "ann", Placing::Take).await.is_ok()).await;
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_node_needs_no_leases() {
    let cluster = Cluster::new();
    let single = cluster.register("single", singleton()).await;
    let own = cluster.register("own", json!({ "isolation": "per_user" })).await;
    let node = cluster.worker(Boot::Everything).await;
    until("it starts by itself", async || node.load(&single).is_some()).await;
    echo(&node, &single, "ann", Placing::Owned).await.unwrap();
    echo(&node, &own, "ann", Placing::Take).await.unwrap();
    let link = Arc::clone(&node.link);
    node.stop().await;
    assert_eq!(link.lease_operations(), 0);
}
