//! Calls in steps: admission, a slot, the arguments.

use std::time::Duration;

use mcp_shared::{
    error::{ErrorCode, Outcome},
    hosting::{Hosting, Placing, Refusal},
    ids::ServerName,
    worker_api::ServerStatus,
};
use mcp_worker::Boot;
use serde_json::json;

use crate::cluster::{Cluster, finish, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_that_is_dropped_frees_its_slot_and_starts_nothing() {
    let cluster = Cluster::new();
    let server = cluster.register("narrow", json!({ "concurrency": 1 })).await;
    let node = cluster.worker(Boot::OnDemand).await;
    let mut first = node.offer(&server, "ann", "touch", Placing::Take).await.unwrap();
    first.held().await.unwrap();
    let mut second = node.offer(&server, "ann", "touch", Placing::Take).await.unwrap();
    until("the second call waits for a slot", async || {
        let load = node.load(&server).unwrap();
        assert_eq!((load.slots, load.in_flight), (1, 1));
        load.waiting == 1 && load.wait_ms > 0
    })
    .await;
    drop(first);
    second.held().await.unwrap();
    let load = node.load(&server).unwrap();
    assert_eq!((load.in_flight, load.waiting), (1, 0));
    assert!(load.wait_ms > 0, "the wait of a moment ago is still shown: {load:?}");
    let file = cluster.file("touched");
    let text = finish(second, json!({ "path": file, "text": "second" })).await.unwrap();
    assert_eq!(text, "touched");
    assert_eq!(cluster.lines("touched"), ["second"]);
    until("the slot is free again", async || node.load(&server).unwrap().in_flight == 0).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_a_call_counts_while_it_waits_for_its_arguments() {
    let cluster = Cluster::new();
    let server = cluster.register("slow", json!({})).await;
    let node = cluster.worker(Boot::Everything).await;
    until("it runs", async || node.load(&server).is_some_and(|load| load.status == ServerStatus::Connected))
        .await;
    let limit = Duration::from_millis(300);
    let mut call = node.offer_within(&server, "ann", "touch", Placing::Owned, limit).await.unwrap();
    call.held().await.unwrap();
    until("its slot is free again", async || node.load(&server).unwrap().in_flight == 0).await;
    let late = finish(call, json!({ "path": cluster.file("touched"), "text": "late" })).await.unwrap_err();
    assert_eq!((late.code, late.outcome), (ErrorCode::DeadlineExceeded, Some(Outcome::NotStarted)));
    assert!(cluster.lines("touched").is_empty());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_who_might_do_better() {
    let cluster = Cluster::new();
    let disabled = cluster.register("disabled", json!({ "enabled": false })).await;
    let broken = cluster.register("broken", json!({ "command": "/nowhere/at/all" })).await;
    let node = cluster.worker(Boot::OnDemand).await;
    for (server, code) in [
        (ServerName::from_stored("unknown"), ErrorCode::ServerNotFound),
        (disabled, ErrorCode::ServerDisabled),
    ] {
        let refused = node.offer(&server, "ann", "echo", Placing::Take).await.unwrap_err();
        let Refusal::Error { error } = refused else { panic!("{refused:?}") };
        assert_eq!((error.code, error.outcome), (code, Some(Outcome::NotStarted)));
    }
    let refused = node.call(&broken, "ann", "echo", json!({}), Placing::Take).await.unwrap_err();
    let Refusal::Busy { error } = refused else { panic!("{refused:?}") };
    assert_eq!((error.code, error.outcome), (ErrorCode::ServerUnavailable, Some(Outcome::NotStarted)));
    node.worker.drain();
    let refused = node.offer(&broken, "ann", "echo", Placing::Take).await.unwrap_err();
    assert_eq!(refused, Refusal::Draining);
    assert!(node.worker.describe().draining);
    node.stop().await;
}
