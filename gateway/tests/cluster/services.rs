//! Services call tools by NATS alone.

use std::time::Duration;

use async_nats::Client;
use futures_util::StreamExt;
use mcp_shared::testing::services::shared_nats;
use serde_json::{Value, json};

use crate::{collector::Collector, deployment::Deployment};

async fn client() -> Client {
    async_nats::connect(shared_nats().url()).await.unwrap()
}

/// A request as `nats request` sends it.
async fn request(client: &Client, subject: String, body: &str) -> Value {
    let request =
        async_nats::Request::new().payload(body.to_owned().into()).timeout(Some(Duration::from_secs(30)));
    let reply = client.send_request(subject, request).await.unwrap();
    serde_json::from_slice(&reply.payload).unwrap()
}

#[tokio::test]
async fn one_request_calls_a_tool() {
    let api = Deployment::start().await;
    let prefix = api.data().name().to_owned();
    api.add_fixture("everything", &["--more"], json!({})).await;
    api.set_secret("anna@example.org", "everything", "KEY", "annas").await.ok();
    let client = client().await;
    let call = |server: &str, user: &str| format!("{prefix}.v1.call.{server}.{user}");

    let body = r#"{"tool":"echo","args":{"text":"hi"}}"#;
    let reply = request(&client, call("everything", "default"), body).await;
    let by_http = api.call("everything", "echo", json!({"text": "hi"})).await.ok().json();
    assert_eq!(reply, by_http, "the reply is the document that HTTP answers");

    // What is part of the program is called like any other.
    let body = r#"{"tool":"get_url_content","args":{"url":"http://169.254.169.254/"}}"#;
    let reply = request(&client, call("webtools", "default"), body).await;
    let by_http = api.call("webtools", "get_url_content", json!({"url": "http://169.254.169.254/"})).await;
    assert_eq!(reply, by_http.ok().json());
    assert_eq!(reply["data"]["isError"], true, "{reply}");

    // A name that is no safe token is a hash, and stands in the request.
    let token = mcp_nats::subjects::token("anna@example.org");
    let body = r#"{"tool":"args","user":"anna@example.org"}"#;
    let reply = request(&client, call("everything", &token), body).await;
    assert_eq!(reply["data"]["content"][0]["text"], r#"{"KEY":"annas"}"#);

    // Sleeping and per-user servers are woken.
    let sleepy = json!({"isolation": "per_user", "idleTimeout": 300});
    api.register_fixture("own", &["--more"], sleepy).await.ok();
    let reply = request(&client, call("own", "bob"), r#"{"tool":"echo","args":{"text":"up"}}"#).await;
    assert_eq!(reply["data"]["content"][0]["text"], "up", "{reply}");
}

#[tokio::test]
async fn a_service_says_where_its_call_belongs() {
    let collector = Collector::start().await;
    let api = Deployment::builder()
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url())
        .env("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        .env("OTEL_BSP_SCHEDULE_DELAY", "20")
        .start()
        .await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    let client = client().await;
    let subject = format!("{}.v1.call.echo.default", api.data().name());
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let call = async |name: &str, flags: &str| -> Value {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(name, format!("00-{trace}-b7ad6b7169203331-{flags}").as_str());
        let request = async_nats::Request::new()
            .payload(r#"{"tool":"meta"}"#.into())
            .headers(headers)
            .timeout(Some(Duration::from_secs(30)));
        let reply = client.send_request(subject.clone(), request).await.unwrap();
        let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
        let told: Value =
            serde_json::from_str(reply["data"]["content"][0]["text"].as_str().unwrap()).unwrap();
        told["traceparent"].clone()
    };
    assert_eq!(call("traceparent", "00").await, format!("00-{trace}-b7ad6b7169203331-00"));
    let told = call("Traceparent", "01").await;
    let spans = collector.trace(trace, 5).await;
    let below = |parent: &str| spans.iter().filter(|span| span.parent == parent).collect::<Vec<_>>();
    let [door] = &below("b7ad6b7169203331")[..] else { panic!("{spans:#?}") };
    assert_eq!((door.says("messaging.system"), door.kind), ("nats", 2));
    let [call] = &below(&door.id)[..] else { panic!("{spans:#?}") };
    assert_eq!(call.says("mcp.server.name"), "echo");
    let asking = below(&call.id).into_iter().find(|span| span.name == "tools/call").unwrap();
    assert_eq!(told, format!("00-{trace}-{}-01", asking.id));
}

#[tokio::test]
async fn bad_requests_are_refused_with_the_documented_envelope() {
    let api = Deployment::start().await;
    let prefix = api.data().name().to_owned();
    api.add_fixture("echo", &[], json!({})).await;
    let client = client().await;
    let cases = [
        ("echo.default", "{}", "invalid_request"),
        ("echo.default", "", "invalid_request"),
        ("echo.default", "nonsense", "invalid_request"),
        ("echo.default", r#"{"tool":"echo","args":[1]}"#, "invalid_request"),
        ("echo.default", r#"{"tool":"echo","user":"other"}"#, "invalid_request"),
        ("echo.default", r#"{"tool":"echo","server":"other"}"#, "invalid_request"),
        ("echo.default", r#"{"tool":"echo","username":"other"}"#, "invalid_request"),
        ("echo.default", r#"{"tool":"echo","timeoutMs":0}"#, "invalid_request"),
        ("echo.=0123456789abcdef0123456789abcdef", r#"{"tool":"echo","user":"x"}"#, "invalid_request"),
        ("nobody.default", r#"{"tool":"echo"}"#, "server_not_found"),
    ];
    for (subject, body, code) in cases {
        let reply = request(&client, format!("{prefix}.v1.call.{subject}"), body).await;
        assert_eq!(reply["code"], code, "{subject} {body}: {reply}");
        assert_eq!(reply["success"], false);
        assert_eq!(reply["outcome"], "not_started", "{subject} {body}: {reply}");
        assert!(reply["requestId"].is_string());
    }
    let slow = r#"{"tool":"sleep","args":{"ms":20000},"timeoutMs":200,"requestId":"mine-1"}"#;
    let reply = request(&client, format!("{prefix}.v1.call.echo.default"), slow).await;
    assert_eq!((&reply["code"], &reply["requestId"]), (&json!("deadline_exceeded"), &json!("mine-1")));
}

#[tokio::test]
async fn an_answer_that_no_message_holds_says_so() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    let client = client().await;
    let subject = format!("{}.v1.call.echo.default", api.data().name());
    let reply = request(&client, subject.clone(), r#"{"tool":"big","args":{"bytes":2000000}}"#).await;
    assert_eq!((&reply["code"], &reply["outcome"]), (&json!("result_too_large"), &json!("completed")));
    let reply = request(&client, subject, r#"{"tool":"big","args":{"bytes":900000}}"#).await;
    assert_eq!(reply["success"], true);
}

#[tokio::test]
async fn the_nodes_answer_the_micro_service_protocol() {
    let api = Deployment::start().await;
    let client = client().await;
    let inbox = client.new_inbox();
    let mut replies = client.subscribe(inbox.clone()).await.unwrap();
    client.publish_with_reply("$SRV.INFO", inbox, "".into()).await.unwrap();
    let mut ours = std::collections::BTreeMap::new();
    let own = format!("{}.", api.data().name());
    // Other tests have nodes on the same server; ours are those with our prefix.
    while ours.len() < 4 {
        let reply = tokio::time::timeout(Duration::from_secs(10), replies.next()).await;
        let reply = reply.expect("four nodes answer").unwrap();
        let info: Value = serde_json::from_slice(&reply.payload).unwrap();
        if info["metadata"]["prefix"] == own.trim_end_matches('.') {
            ours.insert(info["metadata"]["node"].as_str().unwrap().to_owned(), info);
        }
    }
    let named = |name: &str| ours.values().filter(|info| info["name"] == name).count();
    assert_eq!((named("mcp-gateway"), named("mcp-worker")), (2, 2));
    let worker = ours.values().find(|info| info["name"] == "mcp-worker").unwrap();
    assert_eq!(worker["endpoints"][0]["subject"], format!("{own}v1.call.*.*"));
}
