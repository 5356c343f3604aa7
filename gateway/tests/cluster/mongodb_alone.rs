//! One program whose store is a MongoDB: how a deployment of mcp-api moves over.

use serde_json::json;

use crate::deployment::Deployment;

#[tokio::test]
async fn one_program_serves_from_a_mongodb() {
    let api = Deployment::builder().alone().start().await;
    api.add_fixture("echo", &[], json!({"description": "says it again"})).await;
    api.set_secret("alice", "echo", "KEY", "hers").await.ok();
    assert_eq!(api.call_as("alice", "echo", "args", json!({})).await.tool_text(), r#"{"KEY":"hers"}"#);
    let fleet = api.get("/fleet").await.ok().json();
    assert_eq!(fleet["workers"].as_array().unwrap().len(), 1, "{fleet}");
    let data = api.data();
    assert!(!data.path().join("gateway-0/data/mcp-api.db").exists(), "an embedded store was made as well");
    assert!(api.stop().await.success());

    let api = Deployment::builder().alone().data(&data).start().await;
    assert_eq!(api.server("echo").await["description"], "says it again");
    assert_eq!(api.call_as("alice", "echo", "args", json!({})).await.tool_text(), r#"{"KEY":"hers"}"#);
    assert!(api.stop().await.success());

    // The same data serves a cluster from then on, and the other way round.
    let api = Deployment::builder().data(&data).start().await;
    assert_eq!(api.call_as("alice", "echo", "args", json!({})).await.tool_text(), r#"{"KEY":"hers"}"#);
}
