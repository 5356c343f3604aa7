//! Changes reach every worker that could still use what they replace.

use std::sync::atomic::Ordering;

use mcp_shared::{
    error::ErrorCode,
    ids::{ServerName, WorkerId},
    worker_api::{Change, WorkerApi},
};

use crate::{
    client::{Login, guarded},
    echo::{about, get},
    node::{gateway, sees, until, worker},
};
use mcp_nats::wire::{self, Beat};
use mcp_shared::fleet::Role;

fn change() -> Change {
    Change::Server { server: ServerName::from_stored("github") }
}

#[tokio::test]
async fn a_worker_that_was_missed_once_hears_of_the_next_change() {
    let nats = guarded("");
    let router = gateway(&nats).await;
    // It says that it is there before anybody can tell it something, as every worker does at its start.
    let raw = Login::new(&nats, "worker", "mcp.v1.inbox.w1.own").await;
    let id = WorkerId::from_stored("w1");
    let hello = wire::encode(&Beat::Here(about(&id, Role::Worker)), &[]).unwrap();
    raw.client.publish("mcp.v1.beat.w1", hello).await.unwrap();
    until("the worker is known", || router.staying() == [id.clone()]).await;
    router.announce(change()).await.unwrap();
    assert!(router.staying().is_empty(), "nobody answered in its name");

    // Now it listens, and has read what is stored; its next beat is a while off.
    let mut told = raw.listen("mcp.v1.worker.w1.ask").await;
    let (announced, asked) = tokio::join!(router.announce(change()), crate::client::next(&mut told));
    announced.unwrap();
    assert!(String::from_utf8_lossy(&asked.payload).contains("invalidate"));
}

#[tokio::test]
async fn what_fails_while_everything_is_read_is_read_again() {
    let nats = guarded("");
    let (worker, router) = (worker(&nats, &["github"]).await, gateway(&nats).await);
    sees(&router, "github", 1).await;
    let before = worker.echo.resyncs.load(Ordering::Acquire);
    worker.echo.reading.send_replace(false);
    worker.echo.failing.store(true, Ordering::Release);

    // Nothing is started with what was known before, so nobody has to wait.
    router.announce(change()).await.unwrap();
    until("it reads everything", || worker.echo.resyncs.load(Ordering::Acquire) == before + 1).await;
    // What it reads is older than the second change.
    router.announce(change()).await.unwrap();
    assert_eq!(get(&worker.echo.changes).len(), 2);
    worker.echo.reading.send_replace(true);
    until("it is in step", || worker.server.is_ready()).await;
    assert!(worker.echo.resyncs.load(Ordering::Acquire) >= before + 2, "it has read the second change");
}

#[tokio::test]
async fn a_change_that_does_not_leave_this_node_is_not_called_done() {
    let nats = guarded("");
    let (worker, router) = (worker(&nats, &["github"]).await, gateway(&nats).await);
    sees(&router, "github", 1).await;
    nats.freeze();
    let announced = router.announce(change()).await;
    nats.thaw();
    assert_eq!(announced.unwrap_err().code, ErrorCode::BusUnavailable);
    until("the worker is back", || worker.server.is_ready()).await;
    router.announce(change()).await.unwrap();
}
