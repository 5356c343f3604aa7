//! Calls with an `Idempotency-Key`: done once, answered as often as they are repeated.

use std::path::Path;

use futures_util::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::deployment::{Answer, Deployment, eventually};

fn named(api: &Deployment, user: &str, key: &str, tool: &str, args: &Value) -> RequestBuilder {
    let body = json!({"username": user, "serverName": "s", "methodName": tool, "args": args});
    api.request(Method::POST, "/mcp/tool/call").header("Idempotency-Key", key).json(&body)
}

async fn call(api: &Deployment, key: &str, tool: &str, args: Value) -> Answer {
    api.send(named(api, "alice", key, tool, &args)).await
}

fn lines(file: &Path) -> Vec<String> {
    std::fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn is_replayed(answer: &Answer) -> bool {
    answer.headers.get("idempotency-replayed").is_some_and(|value| value == "true")
}

#[tokio::test]
async fn a_repeated_call_is_answered_and_not_done_again() {
    let api = Deployment::start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    let file = api.data().path().join("done");
    let args = json!({"path": file, "text": "once"});
    let first = call(&api, "k-1", "touch", args.clone()).await.ok();
    assert!(!is_replayed(&first));
    // The same arguments, spelled in another order.
    let again = call(&api, "k-1", "touch", json!({"text": "once", "path": file})).await.ok();
    assert!(is_replayed(&again));
    assert_eq!(again.json(), first.json());
    assert_eq!(lines(&file), ["once"]);

    let other = json!({"path": file, "text": "other"});
    call(&api, "k-1", "touch", other.clone()).await.fails(422, "idempotency_key_reused");
    call(&api, "k-1", "echo", json!({"text": "x"})).await.fails(422, "idempotency_key_reused");
    // Names are their users' own.
    api.send(named(&api, "bob", "k-1", "touch", &other)).await.ok();
    call(&api, "k-2", "touch", args).await.ok();
    assert_eq!(lines(&file), ["once", "other", "once"]);

    // What a tool reports as its own failure is a result as well.
    let failed = call(&api, "k-3", "fail", json!({"text": "no"})).await.ok();
    let again = call(&api, "k-3", "fail", json!({"text": "no"})).await.ok();
    assert!(is_replayed(&again));
    assert_eq!(again.json(), failed.json());
    assert_eq!(failed.json()["data"]["isError"], true);
    let refused = call(&api, "k-4", "rpc_error", json!({"code": -32000, "message": "no"})).await;
    let refused = refused.fails(502, "mcp_error");
    let again = call(&api, "k-4", "rpc_error", json!({"code": -32000, "message": "no"})).await;
    assert!(is_replayed(&again));
    assert_eq!(again.fails(502, "mcp_error").json()["mcpCode"], refused.json()["mcpCode"]);
}

#[tokio::test]
async fn of_many_at_once_one_is_done() {
    let api = Deployment::start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    let file = api.data().path().join("done");
    let args = json!({"path": file, "text": "once"});
    let answers = join_all((0..50).map(|_| call(&api, "same", "touch", args.clone()))).await;
    let mut done = 0;
    for answer in answers {
        match answer.status {
            200 => done += 1,
            _ => {
                assert!(answer.headers.contains_key("retry-after"));
                assert_eq!(answer.fails(409, "idempotency_in_progress").json()["outcome"], "not_started");
            }
        }
    }
    assert!(done >= 1);
    call(&api, "same", "touch", args).await.ok();
    assert_eq!(lines(&file), ["once"]);
}

#[tokio::test]
async fn a_caller_that_leaves_finds_the_result_when_it_comes_back() {
    let api = Deployment::start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    let args = json!({"ms": 1_500});
    let request = named(&api, "alice", "left", "sleep", &args);
    let client = tokio::spawn(async move {
        let response = request.send().await.unwrap();
        response.text().await
    });
    eventually("the call is in flight", async || {
        let server = api.server("s").await;
        server["instances"].as_array().unwrap().iter().any(|one| one["inFlight"] == 1)
    })
    .await;
    client.abort();
    call(&api, "left", "sleep", args.clone()).await.fails(409, "idempotency_in_progress");
    eventually("the call is over", async || {
        let answer = call(&api, "left", "sleep", args.clone()).await;
        answer.status == 200 && is_replayed(&answer)
    })
    .await;
}

#[tokio::test]
async fn what_was_not_started_may_be_tried_again_under_the_same_name() {
    let api = Deployment::start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    api.put("/mcp/servers/s/disable", None).await.ok();
    call(&api, "k", "echo", json!({"text": "hi"})).await.fails(409, "server_disabled");
    api.put("/mcp/servers/s/enable", None).await.ok();
    let answer = call(&api, "k", "echo", json!({"text": "hi"})).await.ok();
    assert!(!is_replayed(&answer));
    assert_eq!(answer.tool_text(), "hi");
}

#[tokio::test]
async fn a_call_whose_server_died_stays_unknown() {
    let api = Deployment::start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    let first = call(&api, "k", "crash", json!({})).await.fails(502, "server_crashed");
    assert_eq!(first.json()["outcome"], "unknown");
    let again = call(&api, "k", "crash", json!({})).await;
    assert!(is_replayed(&again));
    assert_eq!(again.fails(502, "server_crashed").json()["outcome"], "unknown");
}

#[tokio::test]
async fn large_results_are_kept_whole_or_known_to_be_gone() {
    let api = Deployment::start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    let first = call(&api, "large", "big", json!({"bytes": 900_000})).await.ok();
    let again = call(&api, "large", "big", json!({"bytes": 900_000})).await.ok();
    assert!(is_replayed(&again));
    assert_eq!(again.json(), first.json());
    call(&api, "larger", "big", json!({"bytes": 1_100_000})).await.ok();
    let gone = call(&api, "larger", "big", json!({"bytes": 1_100_000})).await;
    assert_eq!(gone.fails(410, "idempotency_result_gone").json()["outcome"], "completed");
}

#[tokio::test]
async fn results_survive_a_restart_and_are_not_readable_in_the_store() {
    let api = Deployment::start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    let canary = "canary-of-a-result";
    call(&api, "k", "echo", json!({"text": canary})).await.ok();
    let data = api.data();
    assert!(api.stop().await.success());
    if !crate::CLUSTER {
        for file in std::fs::read_dir(data.path().join("data")).unwrap() {
            let path = file.unwrap().path();
            if path.is_file() {
                let bytes = std::fs::read(&path).unwrap();
                assert!(!bytes.windows(canary.len()).any(|window| window == canary.as_bytes()), "{path:?}");
            }
        }
    }
    let api = Deployment::builder().data(&data).start().await;
    let again = call(&api, "k", "echo", json!({"text": canary})).await.ok();
    assert!(is_replayed(&again));
    assert_eq!(again.tool_text(), canary);
}

#[tokio::test]
async fn a_key_that_is_none_is_refused() {
    let api = Deployment::start().await;
    api.add_fixture("s", &[], json!({})).await;
    let long = "k".repeat(256);
    for key in ["", "   ", "schl\u{fc}ssel", long.as_str()] {
        let answer = call(&api, key, "echo", json!({"text": "x"})).await.fails(400, "invalid_request");
        assert_eq!(answer.json()["outcome"], "not_started");
    }
    call(&api, &long[1..], "echo", json!({"text": "x"})).await.ok();
}
