//! A router and a worker that may do just what the configuration allows: everything works.

use std::{sync::atomic::Ordering, time::Duration};

use async_nats::StatusCode;
use bytes::Bytes;
use futures_util::StreamExt;
use mcp_shared::{
    error::{ErrorCode, Outcome},
    ids::{SecretName, ServerName, UserId},
    worker_api::{CallEvent, Change, ServerStatus, WorkerApi},
};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    client::{LONG, Login, guarded, next, nothing_came},
    echo::get,
    node::{begin, call, gateway, sees, until, worker},
};

#[tokio::test]
async fn calls_come_through_with_arguments_answers_progress_and_errors() {
    let nats = guarded("");
    let (worker, router) = (worker(&nats, &["github"]).await, gateway(&nats).await);
    sees(&router, "github", 1).await;

    let answer = call(&router, "github", "echo", json!({"a": 1})).await.unwrap();
    assert_eq!(answer["arguments"], json!({"a": 1}));
    assert_eq!(answer["about"], json!({"server": "github", "user": "anna", "worker": worker.id}));

    // Large both ways, in parts.
    let text = "x".repeat(3_000_000);
    let answer = call(&router, "github", "echo", json!({"text": text})).await.unwrap();
    assert_eq!(answer["arguments"]["text"].as_str().map(str::len), Some(3_000_000));

    let mut stream = begin(&router, "github", "progress", json!({}), None).await.unwrap();
    let mut steps = Vec::new();
    let end = loop {
        match timeout(LONG, stream.next()).await.unwrap().expect("an end comes") {
            CallEvent::Progress(params) => steps.push(params.read::<Value>().unwrap()["progress"].clone()),
            CallEvent::Replayed => panic!("nobody named the call"),
            CallEvent::Done(end) => break end,
        }
    };
    assert!(end.is_ok());
    assert_eq!(steps, [json!(1), json!(2), json!(3)]);
    let after = timeout(LONG, stream.next()).await.expect("whoever reads on sees that nothing follows");
    assert!(after.is_none());

    let error = call(&router, "github", "fail", json!({})).await.unwrap_err();
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::McpError, "it failed"));
    let error = call(&router, "unheard-of", "echo", json!({})).await.unwrap_err();
    assert_eq!(error.outcome, Some(Outcome::NotStarted));
}

#[tokio::test]
async fn a_call_that_nobody_wants_any_more_is_cancelled() {
    let nats = guarded("");
    let (worker, router) = (worker(&nats, &["github"]).await, gateway(&nats).await);
    sees(&router, "github", 1).await;
    let stream = begin(&router, "github", "hang", json!({}), None).await.unwrap();
    until("the call runs", || worker.echo.started.load(Ordering::Acquire) == 1).await;
    drop(stream);
    until("the call is cancelled", || worker.echo.cancelled.load(Ordering::Acquire) == 1).await;

    let limit = Some(Duration::from_millis(300));
    let stream = begin(&router, "github", "hang", json!({}), limit).await.unwrap();
    let error = timeout(LONG, stream.result()).await.unwrap().unwrap_err();
    assert_eq!((error.code, error.outcome), (ErrorCode::DeadlineExceeded, Some(Outcome::Unknown)));
    until("the call is cancelled", || worker.echo.cancelled.load(Ordering::Acquire) == 2).await;
}

#[tokio::test]
async fn servers_are_started_reported_on_and_announced() {
    let nats = guarded("");
    let one = worker(&nats, &["github"]).await;
    let (two, router) = (worker(&nats, &["github", "maps"]).await, gateway(&nats).await);
    sees(&router, "github", 2).await;
    let (user, github) = (UserId::from_stored("anna"), ServerName::from_stored("github"));

    let report = router.report(&github).await.unwrap();
    assert_eq!(report.status, ServerStatus::Connected);
    let mut logs = report.logs;
    logs.sort();
    let mut both = vec![format!("seen by {}", one.id), format!("seen by {}", two.id)];
    both.sort();
    assert_eq!(logs, both);
    let mut names: Vec<_> = router.reports().await.unwrap().into_iter().map(|report| report.name).collect();
    names.sort();
    assert_eq!(names, [github.clone(), ServerName::from_stored("maps")]);

    let files = ServerName::from_stored("files");
    assert_eq!(router.start_server(&user, &files).await.unwrap().status, ServerStatus::Connected);
    sees(&router, "files", 1).await;
    assert_eq!(router.restart_server(&user, &github).await.unwrap().status, ServerStatus::Connected);

    let events = Login::new(&nats, "operator", "_INBOX.operator").await;
    let mut told = events.client.subscribe("mcp.v1.event.*.*").await.unwrap();
    // Its own answers show that the server has the subscription.
    events.request("$SRV.PING.mcp-gateway", "").await;
    let name = SecretName::from_stored("token");
    router.announce(Change::Secret { user, server: github.clone(), name }).await.unwrap();
    router.announce(Change::Server { server: github }).await.unwrap();
    for worker in [&one, &two] {
        let changes = get(&worker.echo.changes);
        assert!(matches!(changes.as_slice(), [Change::Secret { .. }, Change::Server { .. }]), "{changes:?}");
    }
    assert_eq!(next(&mut told).await.subject.as_str(), "mcp.v1.event.secret.changed");
    assert_eq!(next(&mut told).await.subject.as_str(), "mcp.v1.event.server.changed");
}

#[tokio::test]
async fn nodes_are_seen_while_they_are_there() {
    let nats = guarded("");
    let (worker, router) = (worker(&nats, &["github"]).await, gateway(&nats).await);
    sees(&router, "github", 1).await;
    router.ready().await.unwrap();
    let fleet = router.fleet().await.unwrap();
    assert_eq!((fleet.workers.len(), fleet.gateways.len()), (1, 1));

    let operator = Login::new(&nats, "operator", "_INBOX.operator").await;
    let mut answers = operator.client.subscribe("_INBOX.operator.all").await.unwrap();
    operator.client.publish_with_reply("$SRV.PING", "_INBOX.operator.all", Bytes::new()).await.unwrap();
    let mut names = Vec::new();
    for _ in 0..2 {
        let answer: Value = serde_json::from_slice(&next(&mut answers).await.payload).unwrap();
        names.push(answer["name"].as_str().unwrap().to_owned());
    }
    names.sort();
    assert_eq!(names, ["mcp-gateway", "mcp-worker"]);
    let stats: Value =
        serde_json::from_slice(&operator.request("$SRV.STATS.mcp-worker", "").await.payload).unwrap();
    assert_eq!(stats["endpoints"][0]["queue_group"], "workers");

    worker.server.stop().await;
    worker.router.leave().await;
    until("the worker is gone", || router.staying().is_empty()).await;
    assert_eq!(router.ready().await.unwrap_err().code, ErrorCode::NoWorker);
}

#[tokio::test]
async fn a_service_calls_through_the_front_door() {
    let nats = guarded("");
    let (worker, _) = (worker(&nats, &["github"]).await, gateway(&nats).await);
    sees(&worker.router, "github", 1).await;
    let mut service = Login::billing(&nats).await;
    let call = "mcp.v1.call.github.svc-billing";
    let answer = service.request(call, r#"{"tool":"echo","args":{"a":1}}"#).await;
    let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!((&answer["success"], &answer["data"]["arguments"]), (&json!(true), &json!({"a": 1})));
    assert_eq!(answer["data"]["about"]["user"], "svc-billing");

    // What the subject confines, the body cannot widen.
    for body in [
        r#"{"tool":"echo","user":"anna"}"#,
        r#"{"tool":"echo","server":"payroll"}"#,
        r#"{"tool":"echo","args":[]}"#,
        r#"{"tool":"echo","other":1}"#,
        "no JSON",
    ] {
        let answer: Value = serde_json::from_slice(&service.request(call, body).await.payload).unwrap();
        assert_eq!(
            (&answer["success"], &answer["outcome"]),
            (&json!(false), &json!("not_started")),
            "{body}"
        );
    }
    assert_eq!(worker.echo.started.load(Ordering::Acquire), 1);
    service.had_no_other_refusals();
}

#[tokio::test]
async fn a_service_cannot_have_its_answer_sent_to_a_node() {
    let nats = guarded("");
    let worker = worker(&nats, &["github"]).await;
    sees(&worker.router, "github", 1).await;
    let gateway = Login::new(&nats, "gateway", "mcp.v1.inbox.g1.own").await;
    let mut node = gateway.listen("mcp.v1.inbox.g1.*").await;
    let mut told = Login::new(&nats, "worker", "mcp.v1.inbox.w9.own").await.listen("mcp.v1.worker.*.>").await;
    let mut beats = gateway.listen("mcp.v1.beat.g1").await;
    let mut nats_own = gateway.listen("$SRV.PING").await;
    let mut service = Login::billing(&nats).await;

    let call = "mcp.v1.call.github.svc-billing";
    let body = Bytes::from_static(br#"{"tool":"echo"}"#);
    let into = [
        "mcp.v1.inbox.g1.1",
        "mcp.v1.worker.w9.go",
        "mcp.v1.beat.g1",
        "$SRV.PING",
        "mcp.v1.call.payroll.anna",
    ];
    for reply in into {
        service.client.publish_with_reply(call, reply, body.clone()).await.unwrap();
    }
    // The worker reads them in order, and runs only the last one.
    let answer = service.request(call, r#"{"tool":"echo"}"#).await;
    assert_ne!(answer.status, Some(StatusCode::NO_RESPONDERS));
    assert_eq!(worker.echo.started.load(Ordering::Acquire), 1);
    for subject in ["mcp.v1.inbox.g1.1", "mcp.v1.beat.g1"] {
        gateway.client.publish(subject, Bytes::from_static(b"control")).await.unwrap();
    }
    assert_eq!(next(&mut node).await.payload, "control");
    assert_eq!(next(&mut beats).await.payload, "control");
    nothing_came(&mut nats_own);
    let forged = std::iter::from_fn(|| futures_util::FutureExt::now_or_never(told.next()).flatten());
    assert!(forged.filter(|message| message.subject.contains(".w9.")).count() == 0);
    service.had_no_other_refusals();
}
