//! Programs on a NATS that is set up as `nats/README.md` says, each with no more than its key allows.

use std::process::{Command, Stdio};

use mcp_shared::testing::services::NatsServer;
use serde_json::{Value, json};

use crate::deployment::{Deployment, eventually};

/// The configuration that operators copy.
const CONFIGURATION: &str = include_str!("../../../nats/nats-server.conf");

/// Runs `mcp-gateway` and returns its exit status and what it printed.
fn gateway(arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-gateway"));
    let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[tokio::test]
async fn a_fleet_lives_within_what_its_keys_allow() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let make = ["nkeys", "gateway", "worker", "operator", "svc-billing", "--folder", path];
    let (status, printed) = gateway(&make);
    assert_eq!(status, Some(0));
    assert_eq!(gateway(&make), (Some(0), printed.clone()), "a second time it is the same keys");
    let keys: Vec<(&str, &str)> = printed.lines().map(|line| line.split_once('=').unwrap()).collect();
    assert_eq!(keys.len(), 4);
    let configuration: Vec<_> = CONFIGURATION.lines().filter(|line| !line.starts_with("listen:")).collect();
    // Each test has subjects of its own.
    let builder = Deployment::builder();
    let seed = |name: &str| folder.path().join(format!("{name}.nk")).display().to_string();
    let nats = NatsServer::start_with(&configuration.join("\n"), &keys);
    let mut api = builder
        .env("NATS_URL", nats.url())
        .env("NATS_PREFIX", "mcp")
        .env("NATS_NKEY_SEED_FILE", seed("gateway"))
        .workers(0)
        .start()
        .await;
    api.add_worker_with(&[("NATS_NKEY_SEED_FILE", &seed("worker"))]).await;
    api.add_fixture("github", &[], json!({})).await;
    assert_eq!(api.call("github", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    api.set_secret("svc-billing", "github", "K", "a secret").await.ok();

    // A service that reaches its server as its user, and its answer.
    let service = async_nats::ConnectOptions::with_nkey(
        std::fs::read_to_string(seed("svc-billing")).unwrap().trim().to_owned(),
    )
    .custom_inbox_prefix("_INBOX.billing")
    .connect(nats.url())
    .await
    .unwrap();
    let ask = async |body: Value| -> Value {
        let request = service.request("mcp.v1.call.github.svc-billing", body.to_string().into());
        serde_json::from_slice(&request.await.unwrap().payload).unwrap()
    };
    let answer = ask(json!({"tool": "args", "args": {}})).await;
    assert_eq!(answer["data"]["content"][0]["text"], r#"{"K":"a secret"}"#, "{answer}");
    // What it says in the body is not what it may.
    for (field, value) in [("user", "alice"), ("server", "payroll"), ("user", ""), ("user", "svc-billing ")] {
        let refused = ask(json!({"tool": "args", field: value})).await;
        assert_eq!(refused["code"], "invalid_request", "{refused}");
        assert_eq!(refused["outcome"], "not_started", "{refused}");
    }
    // Nothing that nodes do is forbidden to them.
    eventually("the worker is seen by all", async || api.get("/readyz").await.status == 200).await;
    assert!(
        !api.log().contains("Permissions Violation") && !api.log().contains("permissions violation"),
        "{}",
        api.log()
    );
}

#[tokio::test]
async fn a_stranger_is_not_let_in_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let (_, printed) = gateway(&["nkeys", "gateway", "worker", "operator", "svc-billing", "--folder", path]);
    let keys: Vec<(&str, &str)> = printed.lines().map(|line| line.split_once('=').unwrap()).collect();
    let configuration: Vec<_> = CONFIGURATION.lines().filter(|line| !line.starts_with("listen:")).collect();
    let nats = NatsServer::start_with(&configuration.join("\n"), &keys);
    let other = tempfile::tempdir().unwrap();
    gateway(&["nkeys", "stranger", "--folder", other.path().to_str().unwrap()]);
    let builder = Deployment::builder()
        .env("NATS_URL", nats.url())
        .env("NATS_NKEY_SEED_FILE", other.path().join("stranger.nk").display().to_string());
    let mut command = builder.command();
    let ended = tokio::task::spawn_blocking(move || {
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
    });
    let ended = ended.await.unwrap();
    assert_eq!(ended.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("authorization"));
    for bad in ["../x", "A", ""] {
        assert_eq!(gateway(&["nkeys", "--folder", path, "--", bad]).0, Some(2), "{bad}");
    }
}
