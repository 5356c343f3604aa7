//! `nats-server.conf`: what a service, a gateway, a worker and nobody may do on the bus. Every refusal is
//! proven by what the server says, and by something permitted that comes later on the same connection.

use async_nats::{ConnectErrorKind, ConnectOptions};
use bytes::Bytes;

use nkeys::KeyPair;

use crate::client::{Login, guarded, next, nothing_came, other_service, refused, seed};

/// What a service of the configuration may call.
const CALL: &str = "mcp.v1.call.github.svc-billing";

/// A worker that answers calls, as far as the server lets it.
async fn answering(worker: &Login) -> tokio::task::JoinHandle<()> {
    let mut calls = worker.join("mcp.v1.call.*.*", "workers").await;
    let client = worker.client.clone();
    tokio::spawn(async move {
        loop {
            let call = next(&mut calls).await;
            client.publish(call.reply.unwrap(), call.payload).await.unwrap();
        }
    })
}

#[tokio::test]
async fn a_service_can_call_its_server_as_its_user_and_nothing_else() {
    let server = guarded("");
    let worker = Login::new(&server, "worker", "mcp.v1.inbox.w1.own").await;
    let answering = answering(&worker).await;
    let mut service = Login::billing(&server).await;
    assert_eq!(service.request(CALL, "one").await.payload, "one");

    let mut heard = worker.listen("mcp.v1.worker.w1.>").await;
    for subject in [
        // Another server, another user, both, more and less.
        "mcp.v1.call.payroll.svc-billing",
        "mcp.v1.call.github.anna",
        "mcp.v1.call.payroll.anna",
        "mcp.v1.call.github.*",
        "mcp.v1.call.*.svc-billing",
        "mcp.v1.call.github",
        "mcp.v1.call.github.svc-billing.x",
        "mcp.v1.call.>",
        // What only nodes say.
        "mcp.v1.worker.w1.go",
        "mcp.v1.worker.w1.ask",
        "mcp.v1.beat.w1",
        "mcp.v1.event.server.changed",
        "mcp.v1.inbox.w1.00000000000000000000000000000001",
        "mcp.v1.inbox.w1.echo",
        // Other people's answers, its own, and NATS itself.
        "_INBOX.payroll.1",
        "_INBOX.billing.1",
        "$SRV.PING",
        "$SRV.STATS.mcp-worker",
        "$SYS.REQ.SERVER.PING",
        "$JS.API.INFO",
    ] {
        service.cannot_publish(subject).await;
    }
    assert_eq!(service.request(CALL, "two").await.payload, "two", "the connection is as good as before");
    service.had_no_other_refusals();

    let gateway = Login::new(&server, "gateway", "mcp.v1.inbox.g1.own").await;
    gateway.client.publish("mcp.v1.worker.w1.go", Bytes::from_static(b"control")).await.unwrap();
    assert_eq!(next(&mut heard).await.payload, "control", "nothing came before it");
    answering.abort();
}

#[tokio::test]
async fn a_service_hears_only_its_own_answers() {
    let server = guarded(&other_service());
    let worker = Login::new(&server, "worker", "mcp.v1.inbox.w1.own").await;
    let answering = answering(&worker).await;
    let gateway = Login::new(&server, "gateway", "mcp.v1.inbox.g1.own").await;
    let other = Login::new(&server, "svc-payroll", "_INBOX.payroll").await;
    let mut service = Login::billing(&server).await;

    let mut spied = Vec::new();
    for subject in [
        ">",
        "*.>",
        "mcp.>",
        "mcp.v1.>",
        "*.*.inbox.>",
        "mcp.v1.inbox.>",
        "mcp.v1.inbox.g1.*",
        "mcp.v1.worker.w1.>",
        "mcp.v1.worker.*.*",
        "mcp.v1.beat.*",
        "mcp.v1.event.*.*",
        "mcp.v1.call.*.*",
        "mcp.v1.call.github.svc-billing",
        "_INBOX.>",
        "_INBOX.payroll.>",
        "_INBOX.*.*",
        "$SRV.>",
        "$SYS.>",
    ] {
        spied.push(service.cannot_subscribe(subject).await);
    }
    for group in ["workers", "spies"] {
        spied.push(service.cannot_join("mcp.v1.call.*.*", group).await);
        spied.push(service.cannot_join("mcp.v1.call.payroll.svc-payroll", group).await);
        spied.push(service.cannot_join("_INBOX.payroll.>", group).await);
    }

    // Something happens on each of them, and then something that the service may hear.
    assert_eq!(other.request("mcp.v1.call.payroll.svc-payroll", "wages").await.payload, "wages");
    for subject in
        ["mcp.v1.worker.w1.go", "mcp.v1.beat.g1", "mcp.v1.inbox.g1.1", "mcp.v1.event.server.changed"]
    {
        gateway.client.publish(subject, Bytes::from_static(b"a secret")).await.unwrap();
    }
    gateway.listen("mcp.v1.beat.*").await;
    assert_eq!(service.request(CALL, "mine").await.payload, "mine");
    spied.iter_mut().for_each(nothing_came);
    service.had_no_other_refusals();
    answering.abort();
}

#[tokio::test]
async fn gateways_and_workers_may_not_do_each_others_part() {
    let server = guarded("");
    let mut gateway = Login::new(&server, "gateway", "mcp.v1.inbox.g1.own").await;
    let mut worker = Login::new(&server, "worker", "mcp.v1.inbox.w1.own").await;

    let mut spied = Vec::new();
    for subject in [
        ">",
        "mcp.v1.>",
        "mcp.v1.call.*.*",
        "mcp.v1.call.>",
        "mcp.v1.worker.*.>",
        "mcp.v1.worker.w1.go",
        "_INBOX.>",
    ] {
        spied.push(gateway.cannot_subscribe(subject).await);
    }
    spied.push(gateway.cannot_join("mcp.v1.call.*.*", "workers").await);
    gateway.cannot_publish(CALL).await;
    gateway.cannot_publish("_INBOX.billing.1").await;

    // Beside the group, or in a group of one's own, a worker would hear every service's calls.
    let mut beside = Vec::new();
    for subject in ["mcp.v1.call.*.*", "mcp.v1.call.>", CALL, ">", "_INBOX.>"] {
        beside.push(worker.cannot_subscribe(subject).await);
    }
    for group in ["spies", "worker", "workers2"] {
        beside.push(worker.cannot_join("mcp.v1.call.*.*", group).await);
    }
    worker.cannot_publish(CALL).await;
    worker.cannot_publish("_INBOX.billing.1").await;

    let answering = answering(&worker).await;
    let service = Login::billing(&server).await;
    assert_eq!(service.request(CALL, "one").await.payload, "one");
    let mut own = gateway.listen("mcp.v1.inbox.g1.1").await;
    let mut told = worker.listen("mcp.v1.worker.w1.>").await;
    gateway.client.publish("mcp.v1.worker.w1.go", Bytes::from_static(b"go")).await.unwrap();
    assert_eq!(next(&mut told).await.payload, "go");
    worker.client.publish("mcp.v1.inbox.g1.1", Bytes::from_static(b"answer")).await.unwrap();
    assert_eq!(next(&mut own).await.payload, "answer");
    spied.iter_mut().chain(&mut beside).for_each(nothing_came);
    gateway.had_no_other_refusals();
    worker.had_no_other_refusals();
    answering.abort();
}

#[tokio::test]
async fn an_answer_goes_once_and_only_to_who_asked() {
    let server = guarded("");
    let mut worker = Login::new(&server, "worker", "mcp.v1.inbox.w1.own").await;
    let mut calls = worker.join("mcp.v1.call.*.*", "workers").await;
    let service = Login::billing(&server).await;
    let mut inbox = service.client.subscribe("_INBOX.billing.own").await.unwrap();
    service.client.publish_with_reply(CALL, "_INBOX.billing.own", Bytes::new()).await.unwrap();
    let reply = next(&mut calls).await.reply.unwrap();

    worker.client.publish(reply.clone(), Bytes::from_static(b"the answer")).await.unwrap();
    worker.cannot_publish(&reply).await;
    worker.cannot_publish("_INBOX.billing.another").await;
    assert_eq!(next(&mut inbox).await.payload, "the answer");
    nothing_came(&mut inbox);
}

#[tokio::test]
async fn operators_look_and_do_not_touch() {
    let server = guarded("");
    let mut operator = Login::new(&server, "operator", "_INBOX.operator").await;
    let gateway = Login::new(&server, "gateway", "mcp.v1.inbox.g1.own").await;
    let mut beats = operator.client.subscribe("mcp.v1.beat.*").await.unwrap();
    for subject in
        [CALL, "mcp.v1.worker.w1.go", "mcp.v1.beat.w1", "mcp.v1.inbox.g1.1", "mcp.v1.event.server.changed"]
    {
        operator.cannot_publish(subject).await;
    }
    for subject in [">", "mcp.v1.>", "mcp.v1.inbox.>", "mcp.v1.worker.*.>", "mcp.v1.call.*.*", "_INBOX.>"] {
        operator.cannot_subscribe(subject).await;
    }
    gateway.client.publish("mcp.v1.beat.g1", Bytes::from_static(b"beat")).await.unwrap();
    assert_eq!(next(&mut beats).await.payload, "beat");
}

#[tokio::test]
async fn nobody_comes_in_without_a_key() {
    let server = guarded("");
    let with = |user: &str, password: &str| {
        ConnectOptions::with_user_and_password(user.to_owned(), password.to_owned())
    };
    let kind = ConnectErrorKind::AuthorizationViolation;
    let (stranger, gateway) = (KeyPair::new_user(), KeyPair::from_seed(&seed("gateway")).unwrap());
    assert_eq!(refused(&server, ConnectOptions::new()).await, kind);
    assert_eq!(refused(&server, ConnectOptions::with_nkey(stranger.seed().unwrap())).await, kind);
    assert_eq!(refused(&server, with("gateway", "wrong")).await, kind);
    assert_eq!(refused(&server, with("gateway", "")).await, kind);
    // The public half is no secret, and no password; neither is the name of the variable.
    assert_eq!(refused(&server, with(&gateway.public_key(), "")).await, kind);
    assert_eq!(refused(&server, with("gateway", &gateway.public_key())).await, kind);
    assert_eq!(refused(&server, with("gateway", "$MCP_GATEWAY_NKEY")).await, kind);
    assert_eq!(refused(&server, ConnectOptions::with_token(gateway.public_key())).await, kind);
    Login::new(&server, "gateway", "mcp.v1.inbox.g1.own").await;
}
