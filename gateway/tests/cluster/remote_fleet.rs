//! Remote servers and a fleet: whichever worker comes next goes on with what another one began.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    deployment::eventually,
    remote::{add, permitting, remote},
};

#[tokio::test]
async fn a_session_outlives_its_worker() {
    let remote = remote(&[]);
    let mut api = permitting().start().await;
    add(&api, "remote", &remote, json!({})).await;
    for user in ["alice", "bob", "carol", "dave"] {
        api.call_as(user, "remote", "remember", json!({"value": user})).await.ok();
    }
    let begun = remote.count("initialize");
    // Whoever has a connection is killed at last, as both are, one after the other.
    for _ in 0..2 {
        let id = api.workers()[0].id.clone();
        let worker = api.take_worker(&id);
        worker.signal(Signal::SIGKILL);
        drop(worker);
        for user in ["alice", "bob", "carol", "dave"] {
            eventually("another worker answers", async || {
                let answer = api.call_as(user, "remote", "recall", json!({})).await;
                assert!(answer.status == 200 || answer.status >= 500, "{}", answer.text);
                answer.status == 200 && answer.tool_text() == user
            })
            .await;
        }
        api.add_worker().await;
    }
    assert_eq!(remote.count("initialize"), begun, "no session was begun anew");
}

#[tokio::test]
async fn a_worker_that_leaves_in_order_hands_its_sessions_over() {
    let remote = remote(&[]);
    let mut api = permitting().start().await;
    add(&api, "remote", &remote, json!({})).await;
    api.call_as("alice", "remote", "remember", json!({"value": "kept"})).await.ok();
    let begun = remote.count("initialize");
    for _ in 0..2 {
        api.add_worker().await;
        let id = api.workers()[0].id.clone();
        assert!(api.take_worker(&id).stop().await.success());
        assert_eq!(api.call_as("alice", "remote", "recall", json!({})).await.tool_text(), "kept");
    }
    assert_eq!(remote.count("initialize"), begun);
    assert!(remote.seen().iter().all(|seen| seen.method != "DELETE"));
}

#[tokio::test]
async fn a_killed_worker_repeats_no_call() {
    let remote = remote(&[]);
    let mut api = permitting().start().await;
    add(&api, "remote", &remote, json!({})).await;
    let users: Vec<String> = (0..8).map(|n| format!("user-{n}")).collect();
    for user in &users {
        api.call_as(user, "remote", "count", json!({})).await.ok();
    }
    let id = api.workers()[0].id.clone();
    let victim = api.take_worker(&id);
    let calls = futures_util::future::join_all(
        users.iter().map(|user| api.call_as(user, "remote", "sleep", json!({"ms": 1_500, "user": user}))),
    );
    let killing = async {
        eventually("all calls run", async || {
            remote.executed().iter().filter(|line| line.starts_with("sleep")).count() == users.len()
        })
        .await;
        victim.signal(Signal::SIGKILL);
    };
    let (answers, ()) = tokio::join!(calls, killing);
    for answer in answers {
        if answer.status != 200 {
            let answer = answer.fails(502, "worker_lost");
            assert_eq!(answer.json()["outcome"], "unknown", "{}", answer.text);
        }
    }
    let runs = remote.executed().into_iter().filter(|line| line.starts_with("sleep")).collect::<Vec<_>>();
    assert_eq!(runs.iter().collect::<BTreeSet<_>>().len(), runs.len(), "{runs:?}");
    assert_eq!(runs.len(), users.len(), "{runs:?}");
}

#[tokio::test]
async fn sessions_end_with_their_server_whichever_worker_had_them() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    add(&api, "remote", &remote, json!({})).await;
    for n in 0..8 {
        api.call_as(&format!("user-{n}"), "remote", "count", json!({})).await.ok();
    }
    assert!(remote.sessions() >= 8);
    api.delete("/mcp/servers/remote").await.ok();
    eventually("all sessions are ended", async || remote.sessions() == 0).await;
}
