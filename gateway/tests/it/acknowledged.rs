//! Every kind of write, and a kill right after its answer: what was acknowledged is there afterwards.
//!
//! `FAULTS_LONG=1` goes round many times.

#![allow(clippy::print_stdout, reason = "the figures are what the long run is for")]

use mcp_shared::testing::{authorization::Authorization, registry::Registry, remote::Remote};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    FIXTURE,
    deployment::{Data, Deployment, fixture},
    packages,
};

/// Rounds through all kinds of writes.
const ROUNDS: usize = if crate::CLUSTER { 1 } else { 3 };
/// The same in the long mode.
const LONG_ROUNDS: usize = if crate::CLUSTER { 20 } else { 200 };

/// Data, and programs on it that do not live long.
struct Lives {
    data: Data,
    registry: Registry,
    api: Option<Deployment>,
    kills: usize,
}

impl Lives {
    async fn begin() -> Self {
        let (data, registry) = (Data::new(), packages::registry());
        let api = packages::from(&registry).data(&data).start().await;
        Self { data, registry, api: Some(api), kills: 0 }
    }

    fn api(&self) -> &Deployment {
        self.api.as_ref().unwrap()
    }

    /// Sends a write, sees it acknowledged, kills the programs that very moment, and starts others.
    async fn write(&mut self, method: Method, path: &str, body: Value) {
        let api = self.api.take().unwrap();
        let request = api.request(method, path).json(&body);
        api.send(request).await.ok();
        api.kill().await;
        self.kills += 1;
        self.api = Some(packages::from(&self.registry).data(&self.data).start().await);
    }

    /// The user's secrets, as their server is given them.
    async fn secrets(&self) -> Value {
        let text = self.api().call_as("alice", "stays", "args", json!({})).await.tool_text();
        serde_json::from_str(&text).unwrap()
    }

    /// What a call of the user's remote server comes to.
    async fn remote(&self) -> (u16, String) {
        let answer = self.api().call_as("alice", "remote", "echo", json!({"text": "hi"})).await;
        (answer.status, answer.code())
    }
}

#[tokio::test]
async fn every_kind_of_write_survives_a_kill_right_after_its_answer() {
    let long = std::env::var_os("FAULTS_LONG").is_some_and(|value| value == "1");
    let authorization = Authorization::start();
    authorization.add_client("client", Some("its secret"), &["https://example.com/back"]);
    let remote = Remote::start(FIXTURE, &["--auth", &authorization.issuer()]);
    let mut lives = Lives::begin().await;
    lives.api().add_fixture("stays", &[], json!({})).await;
    let body = json!({"name": "remote", "transportType": "streamable_http", "url": remote.url()});
    lives.api().post("/mcp/servers", &body).await.ok();
    for round in 0..if long { LONG_ROUNDS } else { ROUNDS } {
        servers(&mut lives, round).await;
        secrets(&mut lives, round).await;
        named_calls(&mut lives, round).await;
        logins(&mut lives, &authorization, &remote).await;
        // Installing takes far longer than all the rest.
        if round == 0 {
            installations(&mut lives).await;
        }
    }
    println!("{} kills", lives.kills);
    assert!(lives.api.unwrap().stop().await.success());
}

async fn servers(lives: &mut Lives, round: usize) {
    let mut body = fixture("new", &[]);
    body["description"] = json!(format!("made in round {round}"));
    body["env"] = json!({"ROUND": round.to_string()});
    lives.write(Method::POST, "/mcp/servers", body.clone()).await;
    let server = lives.api().server("new").await;
    assert_eq!((&server["description"], &server["env"]), (&body["description"], &body["env"]));

    let change = json!({"description": format!("changed in round {round}")});
    lives.write(Method::PUT, "/mcp/servers/new", change.clone()).await;
    assert_eq!(lives.api().server("new").await["description"], change["description"]);

    for (path, enabled) in [("disable", false), ("enable", true)] {
        lives.write(Method::PUT, &format!("/mcp/servers/new/{path}"), json!({})).await;
        assert_eq!(lives.api().server("new").await["enabled"], enabled);
    }
    assert_eq!(lives.api().call("new", "echo", json!({"text": "hi"})).await.tool_text(), "hi");

    lives.write(Method::DELETE, "/mcp/servers/new", json!({})).await;
    lives.api().get("/mcp/servers/new").await.fails(404, "server_not_found");
}

async fn secrets(lives: &mut Lives, round: usize) {
    let name = json!({"username": "alice", "serverName": "stays", "secretName": "KEY"});
    for value in [format!("first {round}"), format!("second {round}")] {
        let mut body = name.clone();
        body["secretValue"] = json!(value);
        lives.write(Method::POST, "/secrets/set", body).await;
        assert_eq!(lives.secrets().await, json!({"KEY": value}));
    }
    lives.write(Method::POST, "/secrets/delete", name).await;
    assert_eq!(lives.secrets().await, json!({}));
}

/// A call with a name is a write, too: what came of it is kept.
async fn named_calls(lives: &mut Lives, round: usize) {
    let (key, text) = (format!("key {round}"), format!("done in round {round}"));
    let body = json!({"serverName": "stays", "methodName": "echo", "args": {"text": text}});
    let named = |api: &Deployment| {
        api.request(Method::POST, "/mcp/tool/call").header("Idempotency-Key", &key).json(&body)
    };
    let api = lives.api.take().unwrap();
    assert_eq!(api.send(named(&api)).await.tool_text(), text);
    api.kill().await;
    lives.kills += 1;
    lives.api = Some(packages::from(&lives.registry).data(&lives.data).start().await);
    let again = lives.api().send(named(lives.api())).await;
    assert_eq!(again.tool_text(), text);
    assert_eq!(again.headers["idempotency-replayed"], "true");
}

async fn logins(lives: &mut Lives, authorization: &Authorization, remote: &Remote) {
    assert_eq!(lives.remote().await, (401, "reauth_required".to_owned()));
    let tokens = authorization.mint("client", "alice", Some(&remote.url()));
    let body = json!({"username": "alice", "accessToken": tokens.access, "refreshToken": tokens.refresh,
        "clientId": "client", "clientSecret": "its secret", "redirectUri": "https://example.com/back"});
    lives.write(Method::POST, "/mcp/servers/remote/oauth", body).await;
    assert_eq!(lives.remote().await.0, 200);
    lives.write(Method::DELETE, "/mcp/servers/remote/oauth?username=alice", json!({})).await;
    assert_eq!(lives.remote().await, (401, "reauth_required".to_owned()));
}

async fn installations(lives: &mut Lives) {
    let body = json!({"name": "@acme/clock", "version": "old", "serverName": "clock"});
    lives.write(Method::POST, "/packages/install", body).await;
    assert_eq!(packages::version(lives.api(), "clock").await, "1.0.0");
    lives.write(Method::PUT, "/packages/clock/upgrade", json!({})).await;
    assert_eq!(packages::version(lives.api(), "clock").await, "1.1.0");
    lives.write(Method::DELETE, "/packages/clock", json!({})).await;
    lives.api().get("/packages/by-id/clock").await.fails(404, "package_not_found");
}
