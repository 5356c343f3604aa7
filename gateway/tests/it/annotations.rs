//! What a server says of its tools: believed where an administrator says so, and nowhere else.

use serde_json::{Value, json};

use crate::deployment::{Data, Deployment};

/// A server that says of each of its tools that it only reads.
const LIAR: [&str; 2] = ["--more", "--read-only"];

fn lines(path: &std::path::Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[tokio::test]
async fn what_a_server_says_of_its_tools_is_not_believed() {
    let (api, data) = (Deployment::start().await, Data::new());
    let path = data.path().join("liar");
    api.add_fixture("liar", &LIAR, json!({})).await;
    let answer = api.call("liar", "touch", json!({"path": path, "text": "x", "crashUntil": 1})).await;
    let answer = answer.fails(502, "server_crashed");
    assert_eq!(answer.json()["outcome"], "unknown", "{}", answer.text);
    assert_eq!(lines(&path), 1, "it ran once");
    assert!(api.server("liar").await.get("trustAnnotations").is_none());
}

#[tokio::test]
async fn a_trusted_tool_that_only_reads_is_called_again() {
    let (api, data) = (Deployment::start().await, Data::new());
    let trusted = json!({"trustAnnotations": true});
    let path = data.path().join("trusted");
    let added = api.add_fixture("trusted", &LIAR, trusted.clone()).await;
    assert_eq!(added["trustAnnotations"], true);
    let again = |until: u64| json!({"path": path, "text": "x", "crashUntil": until});
    assert_eq!(api.call("trusted", "touch", again(1)).await.ok().tool_text(), "touched");
    assert_eq!(lines(&path), 2, "it ran twice");

    // Not for ever.
    let answer = api.call("trusted", "touch", again(1_000)).await.fails(502, "server_crashed");
    assert_eq!(answer.json()["outcome"], "unknown", "{}", answer.text);
    assert_eq!(lines(&path), 5);

    // A call that has a name is its caller's to repeat.
    let path = data.path().join("named");
    let args = json!({"path": path, "text": "x", "crashUntil": 1});
    let body = json!({"serverName": "trusted", "methodName": "touch", "args": args});
    let named = api.request(reqwest::Method::POST, "/mcp/tool/call").header("Idempotency-Key", "once");
    let answer = api.send(named.json(&body)).await.fails(502, "server_crashed");
    assert_eq!(answer.json()["outcome"], "unknown", "{}", answer.text);
    assert_eq!(lines(&path), 1);

    // A server of the same kind that says nothing of its tools.
    api.add_fixture("silent", &["--more"], trusted).await;
    let path = data.path().join("silent");
    let answer = api.call("silent", "touch", json!({"path": path, "text": "x", "crashUntil": 1})).await;
    answer.fails(502, "server_crashed");
    assert_eq!(lines(&path), 1);
}

#[tokio::test]
async fn trust_is_given_and_taken_without_a_restart() {
    let (api, data) = (Deployment::start().await, Data::new());
    api.add_fixture("s", &LIAR, json!({})).await;
    let pids = api.pids("s").await;
    let set = async |value: Value| api.put("/mcp/servers/s", Some(&json!({"trustAnnotations": value}))).await;
    set(json!("yes")).await.fails(400, "invalid_request");
    set(json!(true)).await.ok();
    assert_eq!(api.pids("s").await, pids);
    let path = data.path().join("s");
    let args = json!({"path": path, "text": "x", "crashUntil": 1});
    assert_eq!(api.call("s", "touch", args.clone()).await.ok().tool_text(), "touched");
    set(json!(false)).await.ok();
    std::fs::remove_file(&path).unwrap();
    api.call("s", "touch", args).await.fails(502, "server_crashed");
    assert_eq!(lines(&path), 1);
}
