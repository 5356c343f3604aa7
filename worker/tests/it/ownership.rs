//! What a worker of a cluster owns, and how it comes to own more or less.

use mcp_shared::{
    error::ErrorCode,
    fleet::Role,
    hosting::{Hosting, Placing, Refusal},
    ids::{ServerName, UserId},
    server::Transport,
    worker_api::{ServerStatus, WorkerApi},
};
use mcp_worker::Boot;
use serde_json::json;

use crate::cluster::{Cluster, Node, owner, until};

async fn connected(node: &Node, server: &ServerName) {
    until("it is connected", async || {
        node.load(server).is_some_and(|load| load.status == ServerStatus::Connected)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_starts_until_it_is_placed_or_taken() {
    let cluster = Cluster::new();
    let server = cluster.register("echo", json!({})).await;
    let other = cluster.register("other", json!({})).await;
    let sleepy = cluster.register("sleepy", json!({ "idleTimeout": 60_000 })).await;
    let node = cluster.worker(Boot::OnDemand).await;
    let report = node.worker.describe();
    // But for what is part of every worker.
    assert!(report.servers.iter().all(|load| load.name.as_str() == "webtools"));
    assert_eq!((report.role, report.wire, report.draining), (Role::Worker, (1, 1), false));
    assert!(report.capacity > 0 && report.keys.len() == 1);
    assert_eq!(owner(node.offer(&server, "ann", "echo", Placing::Owned).await), None);

    // A change of a server that nobody placed here starts nothing here.
    cluster.change(&server, |record| record.description = "changed".to_owned()).await;
    node.announce(&server).await;
    let Transport::Stdio { args, .. } = node_transport(&cluster, &server).await else { panic!() };
    cluster
        .change(&server, |record| {
            let Transport::Stdio { args: own, .. } = &mut record.transport else { panic!() };
            *own = args.iter().cloned().chain(["--banner".to_owned(), "1".to_owned()]).collect();
        })
        .await;
    node.announce(&server).await;
    assert!(cluster.lines("echo.starts").is_empty());
    let unowned = node.worker.report(&server).await.unwrap();
    assert_eq!((unowned.status, unowned.instances.len()), (ServerStatus::Disconnected, 0));

    let mut wanted = node.worker.wanted();
    wanted.sort();
    assert_eq!(wanted, [(server.clone(), false), (other.clone(), false)]);
    let mut changed = node.worker.changed();
    changed.mark_unchanged();
    node.worker.place(&server).await.unwrap();
    connected(&node, &server).await;
    assert!(changed.has_changed().unwrap());
    assert!(node.worker.wanted().contains(&(server.clone(), true)));
    let report = node.worker.report(&server).await.unwrap();
    assert!(report.listed.is_some() && report.tools.is_some());
    // Placing again is nothing new, and owners take calls.
    node.worker.place(&server).await.unwrap();
    let text = node.call(&server, "ann", "echo", json!({ "text": "hi" }), Placing::Owned).await.unwrap();
    assert_eq!((text.as_str(), cluster.lines("echo.starts").len()), ("hi", 1));

    // A change of what is owned here replaces it here.
    cluster.change(&server, |record| record.concurrency = Some(3)).await;
    node.announce(&server).await;
    connected(&node, &server).await;
    assert_eq!(node.load(&server).unwrap().slots, 3);

    // An order to start takes it as well.
    node.worker.start_server(&UserId::default(), &other).await.unwrap();
    assert!(node.load(&other).is_some() && node.load(&sleepy).is_none());
    node.stop().await;
}

async fn node_transport(cluster: &Cluster, server: &ServerName) -> Transport {
    cluster.vault().await.server(server).await.unwrap().unwrap().value.transport
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_given_up_when_nothing_uses_it() {
    let cluster = Cluster::new();
    let server = cluster.register("echo", json!({})).await;
    let single = cluster.register("single", json!({ "scaling": "singleton" })).await;
    let node = cluster.worker(Boot::OnDemand).await;
    assert!(!node.worker.give_up(&server).await);
    let mut call = node.offer(&server, "ann", "echo", Placing::Take).await.unwrap();
    call.held().await.unwrap();
    assert!(!node.worker.give_up(&server).await);
    drop(call);
    until("it is given up", async || node.worker.give_up(&server).await).await;
    assert!(node.load(&server).is_none());
    assert_eq!(owner(node.offer(&server, "ann", "echo", Placing::Owned).await), None);
    let text = node.call(&server, "ann", "echo", json!({ "text": "hi" }), Placing::Take).await.unwrap();
    assert_eq!((text.as_str(), cluster.lines("echo.starts").len()), ("hi", 2));
    // What may run only once is not owned by others as well.
    node.call(&single, "ann", "echo", json!({ "text": "hi" }), Placing::Take).await.unwrap();
    assert!(!node.worker.give_up(&single).await);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_sleeps_is_nobodys() {
    let cluster = Cluster::new();
    let server = cluster.register("sleepy", json!({ "idleTimeout": 100 })).await;
    let node = cluster.worker(Boot::OnDemand).await;
    node.call(&server, "ann", "echo", json!({ "text": "hi" }), Placing::Take).await.unwrap();
    until("it sleeps", async || node.load(&server).is_none()).await;
    assert_eq!(owner(node.offer(&server, "ann", "echo", Placing::Owned).await), None);
    assert_eq!(node.worker.report(&server).await.unwrap().status, ServerStatus::Disconnected);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resync_finds_everything_that_was_missed() {
    let cluster = Cluster::new();
    let kept = cluster.register("kept", json!({})).await;
    let removed = cluster.register("removed", json!({})).await;
    let fields = json!({ "isolation": "per_user", "secretEnv": { "TOKEN": "token" } });
    let own = cluster.register("own", fields).await;
    cluster.set_secret("ann", &own, "token", "the first value").await;
    cluster.set_secret("ann", &kept, "token", "the first value").await;
    let node = cluster.worker(Boot::OnDemand).await;
    for server in [&kept, &removed] {
        node.worker.start_server(&UserId::default(), server).await.unwrap();
    }
    let token = async || node.call(&own, "ann", "env", json!({ "name": "TOKEN" }), Placing::Take).await;
    let seen = async || node.call(&kept, "ann", "args", json!({}), Placing::Owned).await;
    assert_eq!(token().await.unwrap(), "the first value");
    assert_eq!(seen().await.unwrap(), r#"{"token":"the first value"}"#);

    let added = cluster.register("added", json!({})).await;
    cluster.vault().await.delete_server(&removed).await.unwrap();
    cluster.change(&kept, |record| record.description = "changed".to_owned()).await;
    cluster.set_secret("ann", &own, "token", "the second value").await;
    cluster.set_secret("ann", &kept, "token", "the second value").await;
    node.worker.resync(true).await.unwrap();

    assert!(node.load(&removed).is_none());
    let refused = node.offer(&removed, "ann", "echo", Placing::Take).await.unwrap_err();
    let Refusal::Error { error } = refused else { panic!("{refused:?}") };
    assert_eq!(error.code, ErrorCode::ServerNotFound);
    assert!(node.worker.wanted().contains(&(added, false)));
    assert_eq!(token().await.unwrap(), "the second value");
    assert_eq!(seen().await.unwrap(), r#"{"token":"the second value"}"#);
    // What did not change was left alone.
    assert_eq!(cluster.lines("kept.starts").len(), 1);
    node.worker.resync(true).await.unwrap();
    assert_eq!(token().await.unwrap(), "the second value");
    assert_eq!(cluster.lines("own.starts").len(), 2);
    node.stop().await;
}
