//! The store is away, for all nodes or for one: what may run only once stays one.

use std::time::{Duration, Instant};

use mcp_shared::testing::{link::Link, services::MongoServer};
use serde_json::{Value, json};

use crate::deployment::{Data, Deployment, alive, eventually};

fn through(link: &Link) -> String {
    format!("mongodb://{}/?directConnection=true&serverSelectionTimeoutMS=1000", link.address())
}

/// The process that answers a call; `None` if nobody took it.
async fn answering(api: &Deployment, server: &str) -> Option<i32> {
    let answer = api.call(server, "pid", json!({})).await;
    if answer.status != 200 {
        assert_eq!(answer.json()["outcome"], "not_started", "{}", answer.text);
        return None;
    }
    let ids: Value = serde_json::from_str(&answer.tool_text()).unwrap();
    i32::try_from(ids["pid"].as_i64()?).ok()
}

#[tokio::test]
async fn a_short_absence_restarts_nothing() {
    let mongo = MongoServer::start();
    let link = Link::to(mongo.address());
    let api = Deployment::builder().env("MONGODB_URI", through(&link)).start().await;
    api.add_fixture("many", &["--more"], json!({})).await;
    api.add_fixture("one", &["--more"], json!({"scaling": "singleton"})).await;
    let (many, one) = (answering(&api, "many").await.unwrap(), answering(&api, "one").await.unwrap());

    link.cut();
    let cut = Instant::now();
    eventually("nobody can know any more who may run it", async || answering(&api, "one").await.is_none())
        .await;
    // Longer than a lease is valid, and longer than it takes until others take over from a lost worker.
    while cut.elapsed() < Duration::from_secs(6) {
        assert_eq!(answering(&api, "one").await, None);
        assert_eq!(answering(&api, "many").await, Some(many), "what needs no lease goes on");
    }
    link.mend();
    eventually("it is answered again", async || answering(&api, "one").await.is_some()).await;
    assert_eq!(answering(&api, "one").await, Some(one), "its process went on");
}

/// It is still on the bus, so that nobody takes it for lost until its lease says so.
#[tokio::test]
async fn an_owner_that_is_cut_off_from_the_store_is_replaced() {
    let mongo = MongoServer::start();
    let link = Link::to(mongo.address());
    let direct = format!("mongodb://{}/?directConnection=true", mongo.address());
    let mut api = Deployment::builder().workers(1).env("MONGODB_URI", direct).start().await;
    api.add_worker_with(&[("MONGODB_URI", &through(&link))]).await;
    let cut_off = api.workers()[1].id.clone();
    let mut name = String::new();
    for at in 0..64 {
        name = format!("one-{at}");
        api.add_fixture(&name, &["--more"], json!({"scaling": "singleton"})).await;
        if api.owners_of(&name).await[0] == cut_off {
            break;
        }
    }
    let first = answering(&api, &name).await.unwrap();
    assert_eq!(api.owners_of(&name).await, [cut_off], "no server falls to the second worker");

    link.cut();
    eventually("another worker answers", async || {
        answering(&api, &name).await.is_some_and(|pid| pid != first)
    })
    .await;
    let second = answering(&api, &name).await.unwrap();
    for _ in 0..20 {
        assert_eq!(answering(&api, &name).await, Some(second), "two owners accept");
    }
    link.mend();
    eventually("the old process ends as soon as its worker learns of it", async || !alive(first)).await;
    assert_eq!(answering(&api, &name).await, Some(second));
}

/// Workers read everything again every thirty seconds, and that fails now.
#[tokio::test]
async fn calls_that_need_no_secrets_outlast_the_store() {
    let mongo = MongoServer::start();
    let link = Link::to(mongo.address());
    let api = Deployment::builder().env("MONGODB_URI", through(&link)).start().await;
    for server in ["plain", "other", "changed"] {
        api.add_fixture(server, &["--more"], json!({})).await;
    }
    api.set_secret("alice", "plain", "text", "of alice").await.ok();
    let echo =
        async |user: &str, server: &str| api.call_as(user, server, "echo", json!({"text": "hi"})).await;
    // Both workers know who has secrets, and who has none.
    for _ in 0..2 {
        assert_eq!(echo("bob", "plain").await.tool_text(), "hi");
        assert_eq!(echo("alice", "plain").await.tool_text(), "of alice");
        assert_eq!(echo("bob", "other").await.tool_text(), "hi");
    }

    link.cut();
    let cut = Instant::now();
    // Whether it was written nobody can say, so that nothing of this server is certain. Others go on.
    let change = api.put("/mcp/servers/changed", Some(&json!({"description": "new"}))).await;
    change.fails(503, "store_unavailable");
    let refused = echo("bob", "changed").await.fails(503, "store_unavailable");
    assert_eq!(refused.json()["outcome"], "not_started", "{}", refused.text);
    api.set_secret("alice", "other", "text", "new").await.fails(503, "store_unavailable");
    while cut.elapsed() < Duration::from_secs(37) {
        assert_eq!(echo("bob", "plain").await.tool_text(), "hi");
        assert_eq!(echo("bob", "other").await.tool_text(), "hi");
        // Never without them.
        let alice = echo("alice", "plain").await;
        if alice.status == 200 {
            assert_eq!(alice.tool_text(), "of alice");
        } else {
            // What is known serves for a while.
            assert!(cut.elapsed() > Duration::from_secs(25), "{}", alice.text);
            assert_eq!(alice.fails(503, "store_unavailable").json()["outcome"], "not_started");
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    // Whoever set this one is told that it may not be there.
    echo("alice", "other").await.fails(503, "store_unavailable");

    link.mend();
    for (user, server) in [("alice", "other"), ("bob", "changed"), ("alice", "plain")] {
        eventually("all is as it was", async || echo(user, server).await.status == 200).await;
    }
    api.set_secret("alice", "other", "text", "newest").await.ok();
    assert_eq!(echo("alice", "other").await.tool_text(), "newest");
}

#[tokio::test]
async fn a_call_with_a_name_is_not_made_unguarded() {
    let mongo = MongoServer::start();
    let link = Link::to(mongo.address());
    let (api, data) = (Deployment::builder().env("MONGODB_URI", through(&link)).start().await, Data::new());
    api.add_fixture("s", &["--more"], json!({})).await;
    let path = data.path().join("named");
    let args = json!({"path": path, "text": "x"});
    let body = json!({"serverName": "s", "methodName": "touch", "args": args});
    let named = async || {
        let request = api.request(reqwest::Method::POST, "/mcp/tool/call").header("Idempotency-Key", "once");
        api.send(request.json(&body)).await
    };
    // The user is known at both workers.
    for _ in 0..4 {
        assert_eq!(api.call("s", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    }
    link.cut();
    let refused = named().await.fails(503, "store_unavailable");
    assert_eq!(refused.json()["outcome"], "not_started", "{}", refused.text);
    assert!(refused.headers.contains_key("retry-after"));
    assert!(!path.exists());
    link.mend();
    eventually("the name can be taken", async || named().await.status == 200).await;
    assert_eq!(named().await.ok().headers["idempotency-replayed"], "true");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "x\n");
}

#[tokio::test]
async fn a_slow_store_slows_only_what_needs_it() {
    let mongo = MongoServer::start();
    let link = Link::to(mongo.address());
    let api = Deployment::builder().env("MONGODB_URI", through(&link)).start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    let echo = async || api.call("s", "echo", json!({"text": "hi"})).await.ok().tool_text();
    for _ in 0..4 {
        assert_eq!(echo().await, "hi");
    }
    // Two seconds for each question and its answer.
    link.delay(Duration::from_secs(1));
    let begun = Instant::now();
    let mut calls = 0;
    let changed = async {
        let answer = api.set_secret("alice", "s", "text", "slow").await;
        // Slow enough to be given up, or not quite.
        if answer.status != 200 {
            answer.fails(503, "store_unavailable");
        }
        begun.elapsed()
    };
    let calling = async {
        while begun.elapsed() < Duration::from_secs(3) {
            assert_eq!(echo().await, "hi");
            calls += 1;
        }
    };
    let (took, ()) = tokio::join!(changed, calling);
    assert!(took >= Duration::from_secs(2), "the store was not slow: {took:?}");
    assert!(calls > 10, "calls waited for the store: {calls} in three seconds");
    link.mend();
    eventually("secrets can be set", async || {
        api.set_secret("alice", "s", "text", "quick").await.status == 200
    })
    .await;
    assert_eq!(api.call_as("alice", "s", "echo", json!({"text": "hi"})).await.tool_text(), "quick");
}
