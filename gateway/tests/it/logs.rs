//! The log: a line for each request, and as much of the rest as somebody asks for while the programs run.

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::deployment::{Deployment, eventually};

async fn filter(api: &Deployment) -> Value {
    api.get("/admin/log").await.ok().json()["filter"].clone()
}

/// Sets a filter and waits until every gateway has it: requests go to them in turn.
async fn set(api: &Deployment, wanted: Value) -> Value {
    let body = json!({ "filter": wanted });
    let now = api.put("/admin/log", Some(&body)).await.ok().json()["filter"].clone();
    for _ in 0..4 {
        eventually("gateways have the filter", async || filter(api).await == now).await;
    }
    now
}

/// A request with an id of its own to every gateway.
async fn ask(api: &Deployment, id: &str) {
    for at in 0..4 {
        let request = api.request(Method::GET, "/mcp/servers").header("x-request-id", format!("{id}-{at}"));
        api.send(request).await.ok();
    }
}

fn lines(api: &Deployment, what: &str) -> Vec<Value> {
    let log = api.log();
    log.lines().filter(|line| line.contains(what)).map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn levels_change_while_the_programs_run() {
    let api = Deployment::start().await;
    let first = api.get("/admin/log").await.ok().json();
    assert_eq!(first, json!({"success": true, "filter": "info", "configured": "info"}));

    // All of them hear of it, workers too.
    assert_eq!(
        set(&api, json!("warn,mcp_shared=info,mcp_gateway::access=off")).await,
        "warn,mcp_shared=info,mcp_gateway::access=off"
    );
    let programs = api.programs().len();
    eventually("every program logs by it", async || {
        lines(&api, "the log's filter was changed").len() == programs
    })
    .await;
    ask(&api, "quiet").await;
    assert_eq!(set(&api, json!(null)).await, "info");
    ask(&api, "loud").await;
    for at in 0..4 {
        let id = format!("loud-{at}");
        eventually("requests are logged again", async || !lines(&api, &id).is_empty()).await;
    }
    assert_eq!(lines(&api, "quiet-"), Vec::<Value>::new());

    // Whatever is asked for, those who would show others' secrets stay silent.
    set(&api, json!("trace,hyper=trace,async_nats=trace,reqwest=trace")).await;
    ask(&api, "all").await;
    // Something that is said only to those who want to know everything.
    for _ in 0..4 {
        let mut stranger = tokio::net::TcpStream::connect(api.address()).await.unwrap();
        stranger.write_all(b"this is no request\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        stranger.read_to_end(&mut answer).await.unwrap();
    }
    eventually("everything is logged", async || {
        lines(&api, "a connection ended with an error").iter().any(|line| line["level"] == "DEBUG")
    })
    .await;
    for line in [lines(&api, "\"TRACE\""), lines(&api, "\"DEBUG\"")].concat() {
        let target = line["target"].as_str().unwrap();
        assert!(
            !["hyper", "async_nats", "reqwest", "mongodb", "h2"].iter().any(|one| target.starts_with(one)),
            "{line}"
        );
    }
    // A program that starts again knows nothing of it.
    let data = api.data();
    api.stop().await;
    let api = Deployment::builder().data(&data).start().await;
    assert_eq!(filter(&api).await, "info");
}

#[tokio::test]
async fn filters_that_are_none_are_refused() {
    let api = Deployment::start().await;
    let long = "info,".repeat(300) + "info";
    for bad in [
        json!(""),
        json!("verbose"),
        json!("info,"),
        json!("mcp_worker=loud"),
        json!("a=b=c"),
        json!("[span{field=value}]=info"),
        json!("info\n"),
        json!("3"),
        json!(3),
        json!(["info"]),
        json!(long),
    ] {
        let refused =
            api.put("/admin/log", Some(&json!({ "filter": bad }))).await.fails(400, "invalid_request");
        assert!(refused.text.len() < 600, "{}", refused.text);
    }
    api.put("/admin/log", Some(&json!({}))).await.fails(400, "invalid_request");
    assert_eq!(filter(&api).await, "info");
}

#[tokio::test]
async fn a_request_leaves_one_line() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let body = json!({"serverName": "echo", "methodName": "echo", "args": {"text": "hi"}}).to_string();
    let request = api.request(Method::POST, "/mcp/tool/call").header("x-request-id", "the-call");
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    let request = request.header("content-type", "application/json").header("traceparent", parent);
    let answer = api.send(request.body(body.clone())).await.ok();
    eventually("the line is there", async || !lines(&api, "the-call").is_empty()).await;
    let lines = lines(&api, "the-call");
    let [line] = &lines[..] else { panic!("{lines:?}") };
    assert_eq!((&line["method"], &line["route"]), (&json!("POST"), &json!("/mcp/tool/call")));
    assert_eq!((&line["status"], &line["request_id"]), (&json!(200), &json!("the-call")));
    assert_eq!((&line["bytes_in"], &line["bytes_out"]), (&json!(body.len()), &json!(answer.text.len())));
    assert_eq!(line["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    assert!(line["duration_ms"].as_f64().unwrap() > 0.0 && line["caller"].is_string(), "{line}");
}
