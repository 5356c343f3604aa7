//! What only the embedded store has: its folder, its file, its key.

use std::{os::unix::fs::PermissionsExt, path::Path};

use rusqlite::{Connection, params};
use serde_json::json;

use crate::{
    deployment::{Data, Deployment},
    secrets::{arguments, set},
};

fn database(data: &Data) -> Connection {
    Connection::open(data.path().join("data").join("mcp-api.db")).unwrap()
}

#[tokio::test]
async fn the_longest_server_name_before_a_dot_is_meant() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    // Databases of earlier versions have servers with dots in their names; only such a database can
    // make two servers fit one name.
    let data = api.data();
    api.stop().await;
    database(&data)
        .execute(
            "INSERT INTO servers (name, case_key, revision, document) \
             SELECT 'echo.v2', 'echo.v2', 1, json_set(document, '$.name', 'echo.v2') FROM servers",
            [],
        )
        .unwrap();
    let api = Deployment::builder().data(&data).start().await;
    set(&api, "echo.v2.API_KEY", "two").await.ok();
    set(&api, "echo.v3.API_KEY", "three").await.ok();
    assert_eq!(arguments(&api, "alice", "echo.v2", json!({})).await, json!({"API_KEY": "two"}));
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({"v3.API_KEY": "three"}));
}

#[tokio::test]
async fn a_stored_server_with_the_name_of_a_built_in_one_is_kept_and_not_used() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let data = api.data();
    api.stop().await;
    database(&data)
        .execute(
            "INSERT INTO servers (name, case_key, revision, document) \
             SELECT 'webtools', 'webtools', 1, json_set(document, '$.name', 'webtools', '$.description', 'old') \
             FROM servers",
            [],
        )
        .unwrap();
    let api = Deployment::builder().data(&data).start().await;
    api.logged("a server is stored under the name of a built-in one").await;
    let own = api.server("webtools").await;
    assert_eq!((&own["command"], &own["status"]), (&json!("built-in"), &json!("connected")));
    let listed = api.get("/mcp/servers").await.ok().json()["servers"].clone();
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    let answer = api.call("webtools", "echo", json!({"text": "hi"})).await;
    assert_eq!(answer.tool_text(), "Unknown tool: echo");
    api.delete("/mcp/servers/webtools").await.fails(403, "builtin_server");
    api.stop().await;
    let kept: i64 = database(&data)
        .query_row(
            "SELECT count(*) FROM servers WHERE name = 'webtools' AND document LIKE '%old%'",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(kept, 1);
}

#[tokio::test]
async fn key_and_folder_belong_to_their_owner_alone() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let folder = api.data().path().join("data");
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    for file in std::fs::read_dir(&folder).unwrap() {
        let path = file.unwrap().path();
        assert_eq!(mode(&path) & 0o077, 0, "{}", path.display());
    }
    assert_eq!(mode(&folder.join("secrets.key")), 0o600);
}

#[tokio::test]
async fn values_that_were_moved_in_the_database_are_not_used() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    api.add_fixture("other", &["--more"], json!({})).await;
    api.add_fixture("variables", &[], json!({"env": {"ONE": "first value", "TWO": "second value"}})).await;
    for user in ["alice", "bob", "carol"] {
        api.set_secret(user, "echo", "K", &format!("key-of-{user}")).await.ok();
    }
    api.set_secret("dave", "other", "K", "daves key").await.ok();
    let data = api.data();
    api.stop().await;

    let database = database(&data);
    let value = |user: &str| -> String {
        let sql = "SELECT value FROM secrets WHERE username = ?1";
        database.query_row(sql, [user], |row| row.get(0)).unwrap()
    };
    let (of_alice, of_bob) = (value("alice"), value("bob"));
    for (user, value) in [("alice", of_bob), ("bob", of_alice)] {
        let sql = "UPDATE secrets SET value = ?2 WHERE username = ?1";
        assert_eq!(database.execute(sql, params![user, value]).unwrap(), 1);
    }
    // A secret is not sent to another server by changing the name beside it.
    let sql = "UPDATE secrets SET server_name = 'echo' WHERE username = 'dave'";
    assert_eq!(database.execute(sql, []).unwrap(), 1);
    let sql = "UPDATE servers SET document = json_set(document, \
               '$.env.ONE', json_extract(document, '$.env.TWO'), \
               '$.env.TWO', json_extract(document, '$.env.ONE')) WHERE name = 'variables'";
    assert_eq!(database.execute(sql, []).unwrap(), 1);
    drop(database);

    let api = Deployment::builder().data(&data).start().await;
    for user in ["alice", "bob", "dave"] {
        let refused = api.call_as(user, "echo", "count", json!({})).await.fails(500, "secret_integrity");
        assert_eq!(refused.json()["outcome"], "not_started", "{user}");
        assert_eq!(refused.json()["retryable"], false, "{user}");
    }
    assert!(api.metric("mcp_integrity_failures_total{kind=\"tag_mismatch\"}").await >= 2.0);
    assert!(api.metric("mcp_integrity_failures_total{kind=\"misplaced\"}").await >= 1.0);
    // Only the calls that need such a value fail, and they never reached the server.
    assert_eq!(api.call_as("carol", "echo", "count", json!({})).await.tool_text(), "1");
    assert_eq!(arguments(&api, "carol", "echo", json!({})).await, json!({"K": "key-of-carol"}));
    assert_eq!(arguments(&api, "alice", "other", json!({})).await, json!({}));
    api.get("/mcp/servers/variables").await.fails(500, "secret_integrity");
    let servers = api.get("/mcp/servers").await.ok().json();
    assert_eq!(servers["servers"].as_array().unwrap().len(), 3, "the others are still listed");
    // Setting the secret again mends it.
    api.set_secret("alice", "echo", "K", "mended").await.ok();
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({"K": "mended"}));
}

#[tokio::test]
async fn a_data_folder_serves_one_program_at_a_time() {
    let api = Deployment::start().await;
    let data = api.data();
    let second = |data: Data| async move {
        let mut command = Deployment::builder().data(&data).command();
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    };
    let output = second(data.clone()).await;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(75), "{stderr}");
    assert!(stderr.contains("another mcp-api process uses the data folder"), "{stderr}");
    assert_eq!(api.get("/readyz").await.status, 200);
    // A program that was killed does not keep the folder.
    api.kill().await;
    let api = Deployment::builder().data(&data).start().await;
    assert_eq!(api.get("/readyz").await.status, 200);
}
