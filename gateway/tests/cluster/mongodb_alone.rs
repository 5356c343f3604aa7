//! One program whose store is a MongoDB: how a deployment of mcp-api moves over.

use mongodb::bson::{Bson, DateTime, doc, oid::ObjectId};
use serde_json::json;

use crate::{
    deployment::{Data, Deployment, eventually},
    packages::{from, registry, version},
};

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

/// What mcp-api installed is on its machine's disk. Here it is installed anew, in the version that it had, and
/// what its users removed stays removed.
#[tokio::test]
async fn packages_of_mcp_api_move_over() {
    let registry = registry();
    let data = Data::new();
    let client = mongodb::Client::with_uri_str(data.mongo()).await.unwrap();
    let database = client.database(data.name());
    let date = || Bson::DateTime(DateTime::now());
    let entry = "./packages/acme-clock/node_modules/@acme/clock/cli.js";
    for (server, installed) in [("clock", "1.0.0"), ("newest", "latest")] {
        let row = doc! {
            "name": server, "displayName": server, "source": "platform", "authMode": "none", "transportType": "stdio",
            "command": "node", "args": [entry], "env": {}, "status": "connected", "enabled": true,
            "createdAt": date(), "updatedAt": date(), "startupTimeout": Bson::Null,
        };
        database.collection("mcp").insert_one(row).await.unwrap();
        let row = doc! {
            "name": "@acme/clock", "version": installed, "installPath": "packages/acme-clock", "status": "installed",
            "installed": date(), "mcpServerId": server, "enabled": true, "main": Bson::Null,
        };
        database.collection("packages").insert_one(row).await.unwrap();
    }
    let state = doc! {
        "_id": ObjectId::new(), "firstRunCompleted": true,
        "installedPackages": [{ "repo": "@acme/clock", "serverName": "gone", "uninstalled": true }],
    };
    database.collection("appState").insert_one(state).await.unwrap();

    let api = from(&registry).data(&data).alone().env("INSTALL_ON_START", "@acme/clock|gone").start().await;
    for (server, expected) in [("clock", "1.0.0"), ("newest", "1.1.0")] {
        eventually("the package is installed here", async || {
            api.call(server, "version", json!({})).await.status == 200
        })
        .await;
        assert_eq!(version(&api, server).await, expected);
        let package = api.get(&format!("/packages/by-id/{server}")).await.ok().json()["package"].clone();
        assert_eq!(package["version"], expected, "{package}");
        assert_eq!(api.server(server).await["args"], json!([entry]));
    }
    api.get("/mcp/servers/gone").await.fails(404, "server_not_found");
    let jobs = api.get("/packages/jobs").await.ok().json()["jobs"].clone();
    assert_eq!(jobs.as_array().unwrap().len(), 2, "{jobs}");
}
