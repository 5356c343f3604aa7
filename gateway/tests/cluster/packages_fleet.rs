//! Packages in a fleet: the same on every worker, whoever installed them, and whoever died meanwhile.

use std::time::Duration;

use mcp_shared::testing::registry::Fault;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    deployment::{Deployment, eventually},
    packages::{add_version, from, install, registry, version},
};

#[tokio::test]
async fn another_worker_serves_the_same_version() {
    let registry = registry();
    let mut api = from(&registry).workers(3).start().await;
    install(&api, json!({"name": "@acme/clock", "serverName": "clock"})).await.ok();
    // What comes later is nobody's business until somebody asks for it.
    add_version(&registry, "1.9.0");
    let owner = api.owners_of("clock").await.remove(0);
    api.take_worker(&owner).signal(Signal::SIGKILL);
    let answer = api.call("clock", "version", json!({})).await;
    assert_eq!(answer.tool_text(), "1.1.0", "the next call is answered by another worker");
    // So do workers that join later.
    for other in api.workers().into_iter().map(|worker| worker.id.clone()).collect::<Vec<_>>() {
        api.take_worker(&other).signal(Signal::SIGKILL);
    }
    api.add_worker().await;
    assert_eq!(version(&api, "clock").await, "1.1.0");
}

#[tokio::test]
async fn what_differs_from_the_lock_is_refused() {
    let registry = registry();
    let mut api = from(&registry).workers(1).start().await;
    install(&api, json!({"name": "@acme/clock", "serverName": "clock"})).await.ok();
    registry.fault(Fault::Corrupt);
    let only = api.workers()[0].id.clone();
    api.take_worker(&only).signal(Signal::SIGKILL);
    api.add_worker().await;
    api.call("clock", "version", json!({})).await.fails(502, "server_unavailable");
    let server = api.server("clock").await;
    assert!(server["logs"].to_string().contains("cannot be installed here"), "{server}");
}

/// Waits until a worker is at a job.
async fn owner_of(api: &Deployment, path: &str) -> String {
    let owner = std::sync::OnceLock::new();
    eventually("a worker has begun", async || {
        let job = api.get(path).await.ok().json()["job"].clone();
        job["owner"].as_str().is_some_and(|worker| owner.set(worker.to_owned()).is_ok())
    })
    .await;
    owner.into_inner().unwrap()
}

/// Whenever the worker that installs dies: another one installs, all of it.
#[tokio::test]
async fn an_installation_survives_its_worker() {
    let registry = registry();
    let mut api = from(&registry).start().await;
    for round in 0..10_u64 {
        let server = format!("clock-{round}");
        let body = json!({"name": "@acme/clock", "version": if round % 2 == 0 { "1.0.0" } else { "1.1.0" }, "serverName": server});
        let request =
            api.request(reqwest::Method::POST, "/packages/install").header("Prefer", "respond-async");
        let accepted = api.send(request.json(&body)).await;
        assert_eq!(accepted.status, 202, "{}", accepted.text);
        let path = accepted.headers["location"].to_str().unwrap().to_owned();
        let owner = owner_of(&api, &path).await;
        tokio::time::sleep(Duration::from_millis(round * 150)).await;
        let lost = api.take_worker(&owner);
        lost.signal(Signal::SIGKILL);
        drop(lost);
        api.add_worker().await;
        let job = async || api.get(&path).await.ok().json()["job"].clone();
        eventually("the job is over", async || {
            job().await["state"] != "running" && job().await["state"] != "queued"
        })
        .await;
        let job = job().await;
        assert_eq!(job["state"], "done", "round {round}: {job}");
        let expected = body["version"].as_str().unwrap();
        assert_eq!(version(&api, &server).await, expected, "round {round}");
        let listed: Value = api.get("/packages").await.ok().json()["packages"].clone();
        assert_eq!(listed.as_array().unwrap().len(), usize::try_from(round).unwrap() + 1);
    }
}

#[tokio::test]
async fn a_worker_that_stops_gives_its_job_back() {
    let registry = registry();
    let mut api: Deployment = from(&registry).start().await;
    registry.fault(Fault::Hang);
    let request = api.request(reqwest::Method::POST, "/packages/install").header("Prefer", "respond-async");
    let accepted = api.send(request.json(&json!({"name": "@acme/clock", "serverName": "clock"}))).await;
    let path = accepted.headers["location"].to_str().unwrap().to_owned();
    let owner = owner_of(&api, &path).await;
    let leaving = api.take_worker(&owner);
    registry.fault(Fault::None);
    assert!(leaving.stop().await.success());
    eventually("it is done by the other", async || {
        api.get(&path).await.ok().json()["job"]["state"] == "done"
    })
    .await;
    assert_eq!(version(&api, "clock").await, "1.1.0");
}
