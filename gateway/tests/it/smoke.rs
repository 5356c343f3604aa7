//! The thinnest path: start, register, list, call, stop.

use serde_json::json;

use crate::deployment::{Deployment, alive};

#[tokio::test]
async fn a_server_is_registered_listed_called_and_stopped() {
    let api = Deployment::start().await;
    assert_eq!(api.get("/healthz").await.ok().json(), json!({"status": "ok"}));
    assert_eq!(api.get("/readyz").await.ok().json(), json!({"status": "ready"}));

    let server = api.add_fixture("echo", &[], json!({})).await;
    assert_eq!(server["toolsList"][0]["name"], "echo");
    let tools = api.get("/mcp/tools").await.ok().json();
    assert_eq!(tools["tools"][0]["echo"][0]["name"], "echo");
    assert_eq!(api.call("echo", "echo", json!({"text": "hi"})).await.tool_text(), "hi");

    let pid = api.pids("echo").await[0];
    assert!(alive(pid));
    assert!(api.stop().await.success());
    assert!(!alive(pid), "the server outlived the program that started it");
}

#[tokio::test]
async fn a_second_start_finds_everything_again() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({"description": "says it again"})).await;
    api.set_secret("alice", "echo", "API_KEY", "s3cr3t-value").await.ok();
    let data = api.data();
    api.stop().await;

    let api = Deployment::builder().data(&data).start().await;
    assert_eq!(api.server("echo").await["description"], "says it again");
    let told = api.call_as("alice", "echo", "args", json!({"q": 1})).await.tool_text();
    assert_eq!(told, r#"{"q":1,"API_KEY":"s3cr3t-value"}"#);
}
