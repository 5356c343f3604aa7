//! Rows that are about time and number: whoever is slow is let go, and whoever comes too often is told so.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use super::{
    case::{Expected, Row},
    request::Request,
};
use crate::deployment::{Deployment, eventually};

/// Row 29: a byte every five seconds.
const PAUSE: Duration = Duration::from_secs(5);
/// When it is too late for a test that waits for an end.
const LATE: Duration = Duration::from_secs(90);

/// Sends bytes one by one until the other side has had enough, and returns what it said and when.
async fn dribble(host: &str, at_once: &[u8], slowly: &[u8]) -> (String, Duration) {
    let mut stream = TcpStream::connect(host).await.unwrap();
    let begun = Instant::now();
    stream.write_all(at_once).await.unwrap();
    let (mut said, mut chunk) = (Vec::new(), [0; 4_096]);
    for byte in slowly {
        // It may close in the middle of it.
        let _ = stream.write_all(&[*byte]).await;
        match timeout(PAUSE, stream.read(&mut chunk)).await {
            Ok(Ok(0) | Err(_)) => break,
            Ok(Ok(count)) => said.extend_from_slice(&chunk[..count]),
            Err(_) => {}
        }
        assert!(begun.elapsed() < LATE, "who sends slowly may do so for ever");
    }
    (String::from_utf8(said).unwrap(), begun.elapsed())
}

/// Row 29. (How many connections may be open is shown where that is set.)
#[tokio::test]
async fn who_dribbles_is_let_go() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let host = api.address().to_owned();
    let call = json!({"serverName": "echo", "methodName": "echo", "args": {"text": "hi"}});
    let bytes = Request::call(&call).bytes(&host);
    let head = dribble(&host, b"", &bytes);
    let (at_once, slowly) = bytes.split_at(bytes.len() - 40);
    let body = dribble(&host, at_once, slowly);
    let ((_, head_after), (said, body_after)) = tokio::join!(head, body);
    assert!(head_after > Duration::from_secs(8), "it was closed before its time: {head_after:?}");
    assert!(said.starts_with("HTTP/1.1 408 "), "{said}");
    for word in ["request_timeout", "not_started"] {
        assert!(said.contains(word), "{said}");
    }
    assert!(body_after > Duration::from_secs(25), "it was closed before its time: {body_after:?}");
    assert_eq!(api.call("echo", "echo", json!({"text": "x"})).await.tool_text(), "x");
}

/// Row 30. One gateway alone: each counts for itself.
#[tokio::test]
async fn five_hundred_calls_of_one_user_at_once_are_too_many() {
    const CALLS: usize = 500;
    const ALLOWED: usize = 256;
    let api = Deployment::builder().env("USER_MAX_CALLS", ALLOWED.to_string()).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let host = api.address().to_owned();
    let body =
        json!({"username": "alice", "serverName": "echo", "methodName": "sleep", "args": {"ms": 60_000}});
    let case = |body| {
        let row = Row::new("30").add("a call", Request::call(body), Expected::Refused(429, "rate_limited"));
        row.with("retry-after", "1").cases().pop().unwrap()
    };
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        let (host, case) = (host.clone(), case(&body));
        calls.spawn(async move {
            let received = case.request.send(&host).await;
            case.faults(&host, &received)
        });
    }
    for refused in 0..CALLS - ALLOWED {
        let faults = calls.join_next().await.unwrap().unwrap();
        assert!(faults.is_empty(), "call {refused}: {faults:?}");
    }
    // What is not too much goes on, and others have room of their own.
    let mut of_bob = body.clone();
    of_bob["username"] = "bob".into();
    of_bob["methodName"] = "echo".into();
    of_bob["args"] = json!({"text": "bob's"});
    let more = case(&body).request.send(&host).await;
    assert_eq!(more.status, 429, "{}", more.text);
    calls.shutdown().await;
    eventually("the calls are over", async || api.metric("mcp_gateway_calls").await == 0.0).await;
    let answer = Request::call(&of_bob).send(&host).await;
    assert!(answer.status == 200 && answer.body.contains("bob's"), "{}", answer.text);
    assert!(!api.log().contains("panicked"));
}
