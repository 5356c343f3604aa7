//! Calls of remote servers that want a login: whose token they carry, and how it stays good.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use mcp_shared::testing::{
    authorization::{Authorization, Fault, Settings, Tokens},
    remote::Remote,
};
use serde_json::{Value, json};

use crate::{
    FIXTURE,
    deployment::{Answer, Deployment},
    logins::{Begun, builder, local, nowhere, open},
};

const SECRET: &str = "client-secret-canary-3f0a";

/// A deployment with a remote server, and whom that trusts.
struct World {
    api: Deployment,
    authorization: Authorization,
    remote: Remote,
}

impl World {
    async fn new(settings: Settings, more: Value) -> Self {
        let authorization = Authorization::start_with(settings);
        authorization.add_client("client", Some(SECRET), &["https://example.com/back"]);
        let remote = Remote::start(FIXTURE, &["--auth", &authorization.issuer()]);
        let api = builder().start().await;
        let mut body = json!({"name": "remote", "transportType": "streamable_http", "url": remote.url()});
        body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        api.post("/mcp/servers", &body).await.ok();
        Self { api, authorization, remote }
    }

    /// Gives a user tokens as a login elsewhere would have.
    async fn give(&self, user: &str, more: Value) -> Tokens {
        let tokens = self.authorization.mint("client", user, Some(&self.remote.url()));
        let mut body = json!({"username": user, "accessToken": tokens.access, "refreshToken": tokens.refresh,
            "clientId": "client", "clientSecret": SECRET, "redirectUri": "https://example.com/back"});
        body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        self.api.post("/mcp/servers/remote/oauth", &body).await.ok();
        tokens
    }

    async fn echo(&self, user: &str, text: &str) -> Answer {
        self.api.call_as(user, "remote", "echo", json!({"text": text})).await
    }

    /// Calls side by side, all of which must succeed.
    async fn storm(&self, calls: usize) {
        let texts: Vec<_> = (0..calls).map(|n| format!("call {n}")).collect();
        let answers = join_all(texts.iter().map(|text| self.echo("alice", text))).await;
        for (answer, text) in answers.iter().zip(&texts) {
            assert_eq!(answer.tool_text(), *text);
        }
    }

    fn logs_in(&self, answer: Answer) -> Value {
        let answer = answer.fails(401, "reauth_required").json();
        assert_eq!((&answer["outcome"], &answer["retryable"]), (&json!("not_started"), &json!(false)));
        assert_eq!(answer["serverName"], "remote");
        answer
    }
}

#[tokio::test]
async fn a_user_logs_in_where_the_refusal_says_and_calls() {
    let world = World::new(Settings { subject: "alice".to_owned(), ..Settings::default() }, json!({})).await;
    let api = &world.api;
    let refused = world.logs_in(world.echo("alice", "too early").await);
    let login = refused["loginUrl"].as_str().unwrap();
    assert_eq!(local(login), "/auth/remote/login?username=alice");
    let begun = Begun::at(api, &local(login)).await;
    let back = local(&world.authorization.browse(&begun.location));
    open(api, &back, Some(begun.cookie())).await.ok();
    for _ in 0..4 {
        assert_eq!(world.echo("alice", "hello").await.tool_text(), "hello");
    }
    world.logs_in(world.echo("bob", "hello").await);
    // The token was asked for, and is good, for this server alone.
    let calls: Vec<_> = world.remote.seen().into_iter().filter(|seen| seen.is("tools/call")).collect();
    assert!(!calls.is_empty() && calls.iter().all(|seen| seen.user.as_deref() == Some("alice")));
    let token = calls[0].header("authorization").strip_prefix("Bearer ").unwrap().to_owned();
    let granted = world.authorization.granted(&token).unwrap();
    assert_eq!(granted.resource.as_deref(), Some(world.remote.url().as_str()));
    assert_eq!(world.remote.executed().len(), 4);

    api.delete("/mcp/servers/remote/oauth?username=alice").await.ok();
    for _ in 0..2 {
        world.logs_in(world.echo("alice", "hello").await);
    }
    assert_eq!(world.remote.executed().len(), 4);
    nowhere(api, &[&token]);
}

#[tokio::test]
async fn a_token_that_is_refused_is_refreshed_once_for_all_calls() {
    let world = World::new(Settings::default(), json!({})).await;
    let old = world.give("alice", json!({"expiresIn": 3600})).await;
    world.storm(8).await;
    assert_eq!(world.authorization.refreshes(), 0);
    world.authorization.expire_all();
    // Long enough that all meet it.
    world.authorization.delay(Duration::from_millis(400));
    world.storm(48).await;
    assert_eq!((world.authorization.refreshes(), world.authorization.reuses()), (1, 0));
    // Nothing was done twice.
    assert_eq!(world.remote.executed().len(), 56);
    nowhere(&world.api, &[&old.access, old.refresh.as_deref().unwrap(), SECRET]);
}

#[tokio::test]
async fn tokens_that_end_all_the_time_trouble_no_call() {
    let settings = Settings { lifetime: Duration::from_secs(2), ..Settings::default() };
    let world = World::new(settings, json!({})).await;
    world.give("alice", json!({"expiresIn": 2})).await;
    let begun = Instant::now();
    let mut calls = 0;
    while begun.elapsed() < Duration::from_secs(7) {
        world.storm(12).await;
        calls += 12;
    }
    assert_eq!(world.authorization.reuses(), 0);
    // Half of each life is used at least, by the worker that saw its beginning.
    let refreshes = world.authorization.refreshes();
    assert!((3..=14).contains(&refreshes), "{refreshes} refreshes");
    assert_eq!(world.remote.executed().len(), calls);
}

#[tokio::test]
async fn what_cannot_be_refreshed_leads_to_a_login_and_what_can_later_does_not() {
    let world = World::new(Settings::default(), json!({})).await;
    world.give("alice", json!({"expiresIn": 3600})).await;
    world.storm(1).await;
    world.authorization.fault("/token", Some(Fault::Status(503)));
    world.authorization.expire_all();
    let answer = world.echo("alice", "x").await;
    assert_eq!((answer.status, answer.json()["retryable"].clone()), (502, json!(true)), "{}", answer.text);
    world.authorization.fault("/token", None);
    let begun = Instant::now();
    while world.echo("alice", "x").await.status != 200 {
        assert!(begun.elapsed() < crate::deployment::PATIENCE);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.authorization.revoke_all();
    let asked = world.authorization.refreshes();
    for _ in 0..6 {
        let answer = world.logs_in(world.echo("alice", "x").await);
        assert_eq!(
            answer["authorizationServer"].as_str().unwrap().trim_end_matches('/'),
            world.authorization.issuer()
        );
        assert!(answer["loginUrl"].as_str().unwrap().ends_with("/auth/remote/login?username=alice"));
    }
    assert_eq!(world.authorization.refreshes(), asked + 1);
    // A new login, wherever, mends it.
    world.give("alice", json!({})).await;
    world.storm(4).await;
}

#[tokio::test]
async fn a_users_token_takes_the_place_of_a_static_one() {
    let fixed = json!({"headers": {"Authorization": "Bearer everybodys", "X-Tenant": "acme"}});
    let world = World::new(Settings::default(), fixed).await;
    // It is not one that the server takes, and is sent all the same.
    assert_eq!(world.echo("bob", "x").await.status, 401);
    let seen = world.remote.seen();
    assert!(seen.iter().any(|seen| seen.header("authorization") == "Bearer everybodys"));
    let tokens = world.give("alice", json!({})).await;
    let before = world.remote.seen().len();
    world.storm(4).await;
    for seen in &world.remote.seen()[before..] {
        assert_eq!(seen.header("authorization"), format!("Bearer {}", tokens.access), "{seen:?}");
        assert_eq!(seen.header("x-tenant"), "acme");
    }
}

#[tokio::test]
async fn a_server_that_names_another_authorization_server_gets_nothing_there() {
    let mut world = World::new(Settings::default(), json!({})).await;
    let tokens = world.give("alice", json!({"expiresIn": 3600})).await;
    world.storm(2).await;
    let thief = Authorization::start();
    world.remote.restart_with(&["--auth", &thief.issuer()]);
    for _ in 0..3 {
        let answer = world.logs_in(world.echo("alice", "x").await);
        let issuer = answer["authorizationServer"].as_str().unwrap();
        assert_eq!(issuer.trim_end_matches('/'), world.authorization.issuer());
    }
    assert!(!thief.has_seen(tokens.refresh.as_deref().unwrap()) && !thief.has_seen(SECRET));
    assert_eq!((thief.token_requests(), world.authorization.token_requests()), (0, 0));
}
