//! A secret that was set by one gateway is the one that every call uses from then on, by whichever gateway
//! and worker.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use serde_json::{Value, json};

use crate::deployment::Deployment;

const CHANGES: usize = 500;

#[tokio::test]
async fn five_hundred_changes_and_no_stale_use() {
    let api = Arc::new(Deployment::builder().workers(3).start().await);
    // One call at a time at each worker, so that the calls below bring in all of them.
    api.add_fixture("echo", &[], json!({"concurrency": 1})).await;
    let written = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..6)
        .map(|_| {
            let (api, written, done) = (Arc::clone(&api), Arc::clone(&written), Arc::clone(&done));
            tokio::spawn(async move {
                let mut calls = 0;
                while !done.load(Ordering::Acquire) {
                    let at_least = written.load(Ordering::Acquire);
                    let answer = api.call_as("alice", "echo", "args", json!({})).await.tool_text();
                    let args: Value = serde_json::from_str(&answer).unwrap();
                    let used: usize = args["KEY"].as_str().map_or(0, |value| value.parse().unwrap());
                    assert!(used >= at_least, "{used} was used after {at_least} had been set");
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    for value in 1..=CHANGES {
        api.set_secret("alice", "echo", "KEY", &value.to_string()).await.ok();
        written.store(value, Ordering::Release);
        let answer = api.call_as("alice", "echo", "args", json!({})).await.tool_text();
        let args: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(args["KEY"], value.to_string());
    }
    done.store(true, Ordering::Release);
    for reader in readers {
        assert!(reader.await.unwrap() > 0);
    }
    let body = json!({"username": "alice", "serverName": "echo", "secretName": "KEY"});
    api.post("/secrets/delete", &body).await.ok();
    for _ in 0..20 {
        assert_eq!(api.call_as("alice", "echo", "args", json!({})).await.tool_text(), "{}");
    }
}
