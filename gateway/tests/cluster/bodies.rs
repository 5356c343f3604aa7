//! Bodies that are larger than any message of a stock NATS server.

use serde_json::{Value, json};

use crate::deployment::Deployment;

#[tokio::test]
async fn large_arguments_and_results_pass_a_stock_nats_server() {
    let api = Deployment::builder().env("PAYLOAD_LIMIT", "8mb").start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    // Around the sizes of frames and messages, and up to 6 MB.
    let kib = 1024;
    for size in [256 * kib - 200, 256 * kib, 256 * kib + 1, kib * kib, 3 * kib * kib + 7, 6_000_000] {
        let text: String = (0..size).map(|at| char::from(b'a' + u8::try_from(at % 23).unwrap())).collect();
        assert_eq!(api.call("echo", "echo", json!({"text": text})).await.tool_text(), text, "{size} bytes");
    }
    for size in [kib * kib, 16 * kib * kib - 200] {
        let answer = api.call("echo", "big", json!({"bytes": size})).await.tool_text();
        assert_eq!(answer.len(), size);
    }
    let error = api.call("echo", "big", json!({"bytes": 16 * kib * kib + 1})).await;
    assert_eq!(error.fails(502, "result_too_large").json()["outcome"], "completed");
    // The worker is none the worse for it.
    assert_eq!(api.call("echo", "echo", json!({"text": "x"})).await.tool_text(), "x");
}

#[tokio::test]
async fn many_large_bodies_at_once_arrive_whole() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    let calls = (0..16_usize).map(|at| {
        let api = &api;
        async move {
            if at % 2 == 0 {
                let text = format!("{at}").repeat(2_000_000 / 2);
                let answer = api.call("echo", "args", json!({"text": text})).await.tool_text();
                let args: Value = serde_json::from_str(&answer).unwrap();
                assert!(args["text"] == text.as_str(), "call {at}");
            } else {
                let answer = api.call("echo", "big", json!({"bytes": 8_000_000 + at})).await.tool_text();
                assert_eq!(answer.len(), 8_000_000 + at);
            }
        }
    });
    futures_util::future::join_all(calls).await;
}
