//! Overload as only a fleet has it: services on NATS, and messages that come faster than they are read.

use std::time::Duration;

use futures_util::future::join_all;
use mcp_shared::testing::services::shared_nats;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::deployment::{Deployment, eventually};

#[tokio::test]
async fn services_have_the_limits_of_the_users_that_they_call_for() {
    let api = Deployment::builder().env("USER_MAX_CALLS", "1").workers(1).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let client = async_nats::connect(shared_nats().url()).await.unwrap();
    let ask = async |user: &str, body: Value| {
        let subject = format!("{}.v1.call.echo.{user}", api.data().name());
        let request = async_nats::Request::new().payload(body.to_string().into()).timeout(None);
        let reply = client.send_request(subject, request).await.unwrap();
        serde_json::from_slice::<Value>(&reply.payload).unwrap()
    };
    let slow = json!({"tool": "sleep", "args": {"ms": 60_000}, "timeoutMs": 60_000});
    let quick = json!({"tool": "echo", "args": {"text": "x"}});
    tokio::select! {
        _ = ask("alice", slow) => panic!("nobody waits that long"),
        () = async {
            eventually("the call runs", async || api.metric("mcp_worker_running_calls").await == 1.0).await;
            let reply = ask("alice", quick.clone()).await;
            assert_eq!((&reply["code"], &reply["outcome"]), (&json!("rate_limited"), &json!("not_started")));
            assert_eq!((&reply["retryable"], &reply["retryAfterMs"]), (&json!(true), &json!(1_000)));
            assert_eq!(ask("bob", quick.clone()).await["success"], true);
            // What comes by HTTP is counted by the gateway that it comes to.
            api.call_as("alice", "echo", "echo", json!({"text": "x"})).await.ok();
        } => {}
    }
    assert_eq!(api.metric("mcp_refused_total{reason=\"user_calls\"}").await, 1.0);
}

#[tokio::test]
async fn messages_that_come_too_fast_are_counted_and_made_up_for() {
    let api = Deployment::builder().workers(1).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let worker = api.workers()[0];
    assert_eq!(api.metric("mcp_bus_slow_consumers_total").await, 0.0);
    assert_eq!(api.metric("mcp_bus_connections_total").await, 3.0);

    let flooding = async_nats::connect(shared_nats().url()).await.unwrap();
    let subject = async_nats::Subject::from(format!("{}.v1.worker.{}.flood", api.data().name(), worker.id));
    let client = reqwest::Client::new();
    eventually("messages are lost, and counted", async || {
        // What the worker cannot take while it is stopped comes all at once when it goes on.
        worker.signal(Signal::SIGSTOP);
        for _ in 0..60_000 {
            flooding.publish(subject.clone(), "nonsense".into()).await.unwrap();
        }
        flooding.flush().await.unwrap();
        worker.signal(Signal::SIGCONT);
        worker.metric(&client, "mcp_bus_slow_consumers_total").await.unwrap() > 0.0
    })
    .await;
    api.logged("messages are lost").await;

    // The worker has read everything again, and serves.
    eventually("calls are good", async || api.call("echo", "echo", json!({"text": "x"})).await.status == 200)
        .await;
    let calls = join_all((0..50).map(|_| api.call("echo", "echo", json!({"text": "x"})))).await;
    assert!(calls.iter().all(|answer| answer.status == 200), "{calls:?}");
    tokio::time::timeout(Duration::from_secs(30), api.stop()).await.unwrap();
}
