//! What is lost on the way, and who is lost: calls end as they should all the same.

use std::{sync::atomic::Ordering, time::Duration};

use async_nats::{Message, Subscriber};
use bytes::Bytes;
use futures_util::future::join_all;
use mcp_nats::{
    frames::{Assembled, Assembly, FRAME_BYTES},
    wire::{self, Beat, CallId, Frame, Offer, ToRouter, ToWorker, VERSIONS},
};
use mcp_shared::{
    error::{ErrorCode, Outcome},
    fleet::{NodeReport, Role},
    hosting::{CallOffer, Hosting, Placing},
    ids::{RequestId, ServerName, ToolName, UserId, WorkerId},
    testing::services::NatsServer,
};
use serde_json::json;
use tokio::time::timeout;

use crate::{
    client::{LONG, Login, guarded, next},
    echo::{Echo, about, get},
    node::{begin, call, gateway, sees, until, worker},
};

/// Something that a worker is told, by hand.
async fn tell(router: &Login, worker: &WorkerId, id: CallId, message: ToWorker, body: &[u8]) {
    let subject = format!("mcp.v1.worker.{worker}.{}", message.verb());
    let payload = wire::encode(&(id, message), body).unwrap();
    router.client.publish_with_reply(subject, format!("mcp.v1.inbox.g1.{id}"), payload).await.unwrap();
}

/// What is answered, but for signs of life.
async fn answer(inbox: &mut Subscriber) -> (ToRouter, Bytes) {
    loop {
        let (said, body) = wire::decode::<ToRouter>(&next(inbox).await.payload).unwrap();
        if !matches!(said, ToRouter::Alive) {
            return (said, body);
        }
    }
}

#[tokio::test]
async fn a_large_answer_that_was_lost_is_sent_again_in_full() {
    let nats = guarded("");
    let worker = worker(&nats, &["github"]).await;
    let router = Login::new(&nats, "gateway", "mcp.v1.inbox.g1.own").await;
    let mut inbox = router.listen("mcp.v1.inbox.g1.*").await;
    let (id, node) = (CallId(1), WorkerId::from_stored("g1"));
    let arguments = br#"{"bytes":3000000}"#;
    let offer = Offer {
        version: VERSIONS.1,
        request: RequestId::generate(),
        user: UserId::from_stored("anna"),
        timeout_ms: None,
        spent_ms: 0,
        size: arguments.len(),
        router: node.clone(),
        call: CallOffer {
            idempotency: None,
            server: ServerName::from_stored("github"),
            tool: ToolName::from_stored("grow"),
            progress: false,
            placing: Placing::Owned,
        },
        trace: None,
    };
    tell(&router, &worker.id, id, ToWorker::Offer(offer), &[]).await;
    assert!(matches!(answer(&mut inbox).await.0, ToRouter::Accept { .. }));
    let whole = Frame { number: 0, total: arguments.len(), sha256: None };
    tell(&router, &worker.id, id, ToWorker::Go(whole), arguments).await;
    // All of it is lost: nobody asks for more of what is being sent.
    let mut frames = 1;
    let mut lost = 0;
    while lost < frames {
        let (ToRouter::Answer(frame), _) = answer(&mut inbox).await else { panic!("no answer") };
        frames = frame.total.div_ceil(FRAME_BYTES);
        if lost == 0 {
            tell(&router, &worker.id, id, ToWorker::Credit(u32::try_from(frames).unwrap()), &[]).await;
        }
        lost += 1;
    }
    assert!(frames > 8);

    let probe = ToWorker::Probe { router: node, open: vec![id], done: Vec::new() };
    tell(&router, &worker.id, CallId(2), probe, &[]).await;
    let mut assembly = Assembly::default();
    loop {
        let (said, part) = answer(&mut inbox).await;
        let ToRouter::Answer(frame) = said else { panic!("{said:?}") };
        if frame.number == 0 {
            let frames = u32::try_from(frame.total.div_ceil(FRAME_BYTES)).unwrap();
            tell(&router, &worker.id, id, ToWorker::Credit(frames), &[]).await;
        }
        match assembly.take(&frame, part, 16 * 1024 * 1024) {
            Assembled::Partly => {}
            Assembled::Whole(answer) => break assert_eq!(answer.len(), 3_000_000 + r#"{"text":""}"#.len()),
            broken => panic!("{broken:?}"),
        }
    }
}

#[tokio::test]
async fn a_lost_owner_is_waited_for_as_long_as_its_lease_runs() {
    let nats = guarded("");
    let (worker, router) = (worker(&nats, &[]).await, gateway(&nats).await);
    until("the router knows the worker", || router.staying().len() == 1).await;
    // Longer than an offer may go without an answer.
    *get(&worker.echo.leased) = Some((WorkerId::from_stored("lost"), Duration::from_millis(1_800)));
    let answer = call(&router, "github", "echo", json!({"a": 1})).await.unwrap();
    assert_eq!(answer["arguments"], json!({"a": 1}));
    assert_eq!(worker.echo.started.load(Ordering::Acquire), 1);
}

/// Poses as a worker that owns a server: a worker may.
async fn pose(nats: &NatsServer, id: &str, server: &str) -> (Login, Subscriber) {
    let worker = Login::new(nats, "worker", &format!("mcp.v1.inbox.{id}.own")).await;
    let told = worker.listen(&format!("mcp.v1.worker.{id}.>")).await;
    let id = WorkerId::from_stored(id);
    let owner = Echo::new(id.clone(), &[server]);
    let report: NodeReport = owner.describe();
    assert_eq!(report.servers.len(), about(&id, Role::Worker).servers.len() + 1);
    let beat = wire::encode(&Beat::Here(report), &[]).unwrap();
    worker.client.publish(format!("mcp.v1.beat.{id}"), beat).await.unwrap();
    (worker, told)
}

async fn say(worker: &Login, to: &Message, message: &ToRouter, body: &[u8]) {
    let payload = wire::encode(message, body).unwrap();
    worker.client.publish(to.reply.clone().unwrap(), payload).await.unwrap();
}

#[tokio::test]
async fn a_call_whose_worker_goes_amid_its_answer_is_not_made_again() {
    let nats = guarded("");
    let router = gateway(&nats).await;
    let (lost, mut told) = pose(&nats, "w1", "github").await;
    sees(&router, "github", 1).await;
    let stream = begin(&router, "github", "echo", json!({}), None).await.unwrap();
    let calling = tokio::spawn(stream.result());
    let offer = next(&mut told).await;
    say(&lost, &offer, &ToRouter::Accept { limit_ms: 60_000, repeatable: false }, &[]).await;
    let go = next(&mut told).await;
    assert!(go.subject.ends_with(".go"));

    // The call runs. Another worker could take it, if somebody thought that it did not.
    let other = worker(&nats, &["github"]).await;
    sees(&router, "github", 2).await;
    told.unsubscribe().await.unwrap();
    lost.listen("mcp.v1.inbox.w1.*").await;
    let first = Frame { number: 0, total: 2 * FRAME_BYTES, sha256: None };
    say(&lost, &go, &ToRouter::Answer(first), &vec![b' '; FRAME_BYTES]).await;

    let error = timeout(LONG, calling).await.unwrap().unwrap().unwrap_err();
    assert_eq!((error.code, error.outcome), (ErrorCode::WorkerLost, Some(Outcome::Unknown)));
    assert_eq!(other.echo.started.load(Ordering::Acquire), 0);
}

#[tokio::test]
async fn deadlines_hold_while_nothing_can_be_sent() {
    let mut nats = guarded("");
    let (worker, router) = (worker(&nats, &["github"]).await, gateway(&nats).await);
    sees(&router, "github", 1).await;
    // More than may wait to be sent.
    let many = 700;
    let limit = Some(Duration::from_secs(4));
    let begun = join_all((0..many).map(|_| begin(&router, "github", "hang", json!({}), limit))).await;
    let calls: Vec<_> = begun.into_iter().map(|call| tokio::spawn(call.unwrap().result())).collect();
    until("all calls run", || worker.echo.started.load(Ordering::Acquire) == many).await;
    nats.kill();
    let ended = timeout(LONG, join_all(calls)).await.expect("deadlines hold");
    for error in ended.into_iter().map(|ended| ended.unwrap().unwrap_err()) {
        assert_eq!((error.code, error.outcome), (ErrorCode::DeadlineExceeded, Some(Outcome::Unknown)));
    }
    nats.restart();
    until("calls are taken again", || router.is_up() && worker.server.is_ready()).await;
    sees(&router, "github", 1).await;
    call(&router, "github", "echo", json!({})).await.unwrap();
}
