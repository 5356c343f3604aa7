//! What metrics say when a part of a cluster is lost: that is what alerts go by.

use mcp_shared::testing::{
    link::Link,
    services::{MongoServer, shared_nats},
};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::deployment::{Deployment, Node, client, eventually};

async fn metric(node: &Node, name: &str) -> f64 {
    node.metric(&client(), name).await.unwrap_or_else(|| panic!("{name} is not shown"))
}

#[tokio::test]
async fn a_worker_that_is_cut_off_from_the_bus_says_so_and_others_miss_it() {
    let mut api = Deployment::builder().workers(1).start().await;
    let link = Link::to(shared_nats().address());
    api.add_worker_with(&[("NATS_URL", &format!("nats://{}", link.address()))]).await;
    let worker = api.workers()[1];
    assert_eq!(metric(worker, "mcp_bus_connected").await, 1.0);
    assert_eq!(metric(worker, "mcp_bus_disconnections_total").await, 0.0);
    eventually("all four hear two", async || api.metric("mcp_fleet_workers").await == 8.0).await;

    link.cut();
    eventually("it is not connected", async || metric(worker, "mcp_bus_connected").await == 0.0).await;
    assert!(metric(worker, "mcp_bus_disconnections_total").await >= 1.0);
    for gateway in api.gateways() {
        eventually("it is missed", async || metric(gateway, "mcp_fleet_workers").await == 1.0).await;
        assert_eq!(metric(gateway, "mcp_bus_connected").await, 1.0);
    }

    link.mend();
    eventually("it is connected", async || metric(worker, "mcp_bus_connected").await == 1.0).await;
    assert!(metric(worker, "mcp_bus_connections_total").await >= 2.0);
    eventually("all four hear two again", async || api.metric("mcp_fleet_workers").await == 8.0).await;
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_seen_at_every_node() {
    let mongo = MongoServer::start();
    let link = Link::to(mongo.address());
    let uri = format!("mongodb://{}/?directConnection=true&serverSelectionTimeoutMS=1000", link.address());
    let api = Deployment::builder().workers(1).env("MONGODB_URI", uri).start().await;
    let unanswered =
        |work: &str| format!("mcp_store_operations_total{{operation=\"{work}\",outcome=\"unavailable\"}}");
    assert_eq!(api.metric(&unanswered("ping")).await, 0.0);
    link.cut();
    for node in api.gateways().into_iter().chain(api.workers()) {
        let ready = client().get(format!("{}/readyz", node.base)).send().await.unwrap();
        assert_eq!(ready.status(), 503);
        assert!(metric(node, &unanswered("ping")).await >= 1.0);
    }
    let worker = api.workers()[0];
    eventually("its lease is not renewed", async || metric(worker, &unanswered("lease")).await >= 1.0).await;
    eventually("it gives up what may run only once", async || {
        metric(worker, "mcp_leases_lost_total").await == 1.0
    })
    .await;
    link.mend();
    eventually("all are ready", async || {
        let mut ready = true;
        for node in api.gateways() {
            ready &= client().get(format!("{}/readyz", node.base)).send().await.unwrap().status() == 200;
        }
        ready
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_is_lost_with_a_call_is_counted() {
    let mut api = Deployment::builder().workers(1).start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    let worker = api.take_worker(&api.workers()[0].id.clone());
    let call = api.call("echo", "hang", json!({}));
    let killed = async {
        eventually("it runs", async || metric(&worker, "mcp_worker_running_calls").await == 1.0).await;
        assert_eq!(api.metric("mcp_fleet_workers_lost_total").await, 0.0);
        worker.signal(Signal::SIGKILL);
    };
    let (answer, ()) = tokio::join!(call, killed);
    answer.fails(502, "worker_lost");
    assert!(api.metric("mcp_fleet_workers_lost_total").await >= 1.0);
    assert_eq!(api.metric("mcp_errors_total{code=\"worker_lost\"}").await, 1.0);
    assert_eq!(api.metric("mcp_calls_total{outcome=\"unknown\"}").await, 1.0);
}
