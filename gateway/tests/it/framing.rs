//! What a server writes, however it writes it: the right bytes reach the right caller, and nothing else
//! reaches anybody.

use futures_util::future::join_all;
use mcp_shared::testing::fixture::VENDOR_RESULT;
use reqwest::Method;
use serde_json::{Value, json};

use crate::deployment::{Answer, Deployment, alive, eventually};

const MIB: usize = 1024 * 1024;

/// Calls `args` for several callers at once; each must get its own answer.
async fn others_are_served(api: &Deployment, server: &str) {
    let calls = (0..40).map(|n| api.call(server, "args", json!({"n": n})));
    for (n, answer) in join_all(calls).await.into_iter().enumerate() {
        assert_eq!(answer.tool_text(), format!(r#"{{"n":{n}}}"#));
    }
}

/// Calls a tool with a body whose spelling is the test's own.
async fn call_spelled(api: &Deployment, server: &str, tool: &str, args: &str) -> Answer {
    let body = format!(r#"{{"serverName":"{server}","methodName":"{tool}","args":{args}}}"#);
    let request = api.request(Method::POST, "/mcp/tool/call").header("Content-Type", "application/json");
    api.send(request.body(body)).await
}

async fn logs(api: &Deployment, server: &str) -> Vec<String> {
    let server = api.server(server).await;
    server["logs"].as_array().unwrap().iter().map(|line| line.as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn noise_reaches_nobody() {
    let api = Deployment::start().await;
    api.add_fixture("noisy", &["--more", "--banner", "5"], json!({})).await;
    assert!(logs(&api, "noisy").await.iter().any(|line| line.contains("Welcome to the fixture, line 1")));
    let pid = api.pids("noisy").await;
    for (tool, args, expected) in [
        ("garbage", json!({"lines": 20_000}), "garbage"),
        ("flood", json!({"notifications": 20_000}), "flooded"),
        ("unknown_ids", json!({"n": 5_000}), "known"),
        ("duplicate_answer", json!({}), "first"),
    ] {
        let ((), answer, ()) = tokio::join!(
            others_are_served(&api, "noisy"),
            api.call("noisy", tool, args),
            others_are_served(&api, "noisy"),
        );
        assert_eq!(answer.tool_text(), expected, "{tool}");
    }
    others_are_served(&api, "noisy").await;
    // Banners are worth seeing, floods are not.
    assert!(logs(&api, "noisy").await.len() <= 100);
    assert_eq!(api.pids("noisy").await, pid);
}

#[tokio::test]
async fn lines_that_are_almost_answers_reach_nobody() {
    let api = Deployment::start().await;
    api.add_fixture("odd", &["--more"], json!({})).await;
    for line in [
        "",
        " ",
        "{}",
        "[]",
        "null",
        "true",
        "\u{0}",
        "{\"jsonrpc\":\"2.0\",\"id\":",
        r#"{"jsonrpc":"2.0","id":999999,"result":{"content":[]}}"#,
        r#"{"jsonrpc":"2.0","id":-1,"result":{"content":[]}}"#,
        r#"{"jsonrpc":"2.0","id":1.5,"result":{"content":[]}}"#,
        r#"{"jsonrpc":"2.0","id":"3","result":{"content":[]}}"#,
        r#"{"jsonrpc":"2.0","id":null,"error":{"code":-32700,"message":"Parse error"}}"#,
        r#"{"jsonrpc":"2.0","id":18446744073709551616,"result":{}}"#,
        r#"{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":3,"progress":1}}"#,
        r#"{"jsonrpc":"2.0","method":"notifications/progress","params":[]}"#,
        r#"{"jsonrpc":"2.0","method":"notifications/unknown"}"#,
        r#"[{"jsonrpc":"2.0","id":3,"result":{"content":[]}}]"#,
        "Größe \u{2028} \u{feff}",
    ] {
        let ((), answer) =
            tokio::join!(others_are_served(&api, "odd"), api.call("odd", "raw", json!({"line": line})),);
        assert_eq!(answer.tool_text(), "raw", "{line}");
    }
    others_are_served(&api, "odd").await;
    assert_eq!(api.pids("odd").await.len(), 1);
}

/// A first call has the id 3: `initialize` and `tools/list` come before it.
#[tokio::test]
async fn an_answer_that_is_none_fails_its_own_call() {
    let api = Deployment::start().await;
    let deep = format!(r#"{{"jsonrpc":"2.0","id":3,"result":{}{}}}"#, "[".repeat(50_000), "]".repeat(50_000));
    for (name, line) in [
        ("text", r#"{"jsonrpc":"2.0","id":3,"result":"done"}"#),
        ("nothing", r#"{"jsonrpc":"2.0","id":3}"#),
        ("null", r#"{"jsonrpc":"2.0","id":3,"result":null}"#),
        ("list", r#"{"jsonrpc":"2.0","id":3,"result":[]}"#),
        ("error", r#"{"jsonrpc":"2.0","id":3,"error":"no object"}"#),
        ("deep", &deep),
        ("broken", r#"{"jsonrpc":"2.0","id":3,"result":{]}"#),
    ] {
        api.add_fixture(name, &["--more"], json!({})).await;
        let answer = api.call(name, "raw", json!({"line": line, "answer": false})).await;
        let body = answer.fails(502, "server_protocol_error").json();
        // What can be read shows that the server has answered; what cannot be read shows nothing.
        let outcome = if name == "broken" { "unknown" } else { "completed" };
        assert_eq!(body["outcome"], outcome, "{name}");
        others_are_served(&api, name).await;
    }
}

#[tokio::test]
async fn a_late_answer_reaches_nobody() {
    let api = Deployment::start().await;
    api.add_fixture("late", &["--more"], json!({})).await;
    let body = json!({"serverName": "late", "methodName": "late_answer", "args": {"ms": 600}});
    let request = api.request(Method::POST, "/mcp/tool/call").header("X-Request-Timeout-Ms", 100).json(&body);
    let answer = api.send(request).await.fails(504, "deadline_exceeded");
    assert_eq!(answer.json()["outcome"], "unknown");
    // The answer arrives while these are in flight.
    let sleeping = (0..20).map(|_| api.call("late", "sleep", json!({"ms": 1_000})));
    for answer in join_all(sleeping).await {
        assert_eq!(answer.tool_text(), "slept 1000");
    }
}

#[tokio::test]
async fn standard_error_is_drained_and_the_newest_of_it_kept() {
    let api = Deployment::start().await;
    api.add_fixture("chatty", &["--more"], json!({})).await;
    let flood = json!({"lines": 5_000, "bytes": 6_000, "text": "flood "});
    let ((), answer) =
        tokio::join!(others_are_served(&api, "chatty"), api.call("chatty", "stderr", flood.clone()));
    assert_eq!(answer.tool_text(), "written");
    api.call("chatty", "stderr", json!({"lines": 3, "text": "the end"})).await.ok();
    eventually("the last line is kept", async || {
        logs(&api, "chatty").await.iter().filter(|line| *line == "the end").count() == 3
    })
    .await;
    let lines = logs(&api, "chatty").await;
    assert_eq!(lines.len(), 200);
    assert!(lines[0].starts_with("flood xxx"));
    // The cut itself shows as one more character.
    assert!(lines.iter().all(|line| line.len() <= 4 * 1024 + '…'.len_utf8()));
    assert!(lines[0].len() >= 4 * 1024);
}

#[tokio::test]
async fn a_server_may_ask_and_gets_short_answers() {
    let api = Deployment::start().await;
    api.add_fixture("asks", &["--more"], json!({})).await;
    let ((), answer) =
        tokio::join!(others_are_served(&api, "asks"), api.call("asks", "server_request", json!({})));
    let heard: Value = serde_json::from_str(&answer.tool_text()).unwrap();
    assert_eq!(heard["ping"], json!({"result": {}}));
    assert_eq!(heard["roots/list"]["error"]["code"], -32601);
    // Ids are the server's own, whatever they look like.
    let odd = r#"{"jsonrpc":"2.0","id":{"a":[1.0]},"method":"ping"}"#;
    assert_eq!(api.call("asks", "raw", json!({"line": odd})).await.tool_text(), "raw");
}

#[tokio::test]
async fn large_results_pass_and_too_large_ones_fail_alone() {
    let api = Deployment::start().await;
    api.add_fixture("big", &["--more"], json!({})).await;
    let pid = api.pids("big").await;
    let large = 15 * MIB;
    let text = api.call("big", "big", json!({"bytes": large})).await.tool_text();
    assert!(text.len() == large && text.bytes().all(|byte| byte == b'x'));

    // Larger than a result may be, larger than a line may be.
    for bytes in [16 * MIB + 1, 18 * MIB] {
        let ((), answer, other) = tokio::join!(
            others_are_served(&api, "big"),
            api.call("big", "big", json!({"bytes": bytes})),
            api.call("big", "big", json!({"bytes": 2 * MIB})),
        );
        let body = answer.fails(502, "result_too_large").json();
        assert_eq!(body["outcome"], "completed");
        assert_eq!(other.tool_text().len(), 2 * MIB);
    }
    others_are_served(&api, "big").await;
    assert_eq!(api.pids("big").await, pid);
}

#[tokio::test]
async fn a_line_without_end_costs_the_process_its_life() {
    let api = Deployment::start().await;
    api.add_fixture("endless", &["--more", "--linger"], json!({})).await;
    let pid = api.pids("endless").await[0];
    // From here on nothing has to be read before a call goes to its server.
    others_are_served(&api, "endless").await;
    let (other, answer) = tokio::join!(api.call("endless", "sleep", json!({"ms": 50_000})), async {
        eventually("the other call is in flight", async || {
            api.server("endless").await["instances"][0]["inFlight"] == 1
        })
        .await;
        api.call("endless", "unended", json!({"bytes": 70 * MIB})).await
    });
    answer.fails(502, "result_too_large");
    assert_eq!(other.fails(502, "server_crashed").json()["outcome"], "unknown");
    // Not a single call goes to the process that is on its way out.
    others_are_served(&api, "endless").await;
    assert!(!alive(pid));
    assert!(logs(&api, "endless").await.iter().any(|line| line.contains("did not end")));
}

#[tokio::test]
async fn a_call_after_an_endless_line_goes_to_a_new_process() {
    let api = Deployment::start().await;
    api.add_fixture("endless", &["--more", "--linger"], json!({})).await;
    let pid = api.pids("endless").await[0];
    api.call("endless", "unended", json!({"bytes": 70 * MIB})).await.fails(502, "result_too_large");
    others_are_served(&api, "endless").await;
    assert!(!alive(pid));
}

#[tokio::test]
async fn results_reach_the_client_unchanged() {
    let api = Deployment::start().await;
    api.add_fixture("vendor", &["--more"], json!({})).await;
    let members = VENDOR_RESULT.strip_suffix('}').unwrap();
    let answer = api.call("vendor", "vendor", json!({})).await.ok();
    assert!(answer.text.contains(members), "{}", answer.text);
    assert_eq!(answer.json()["data"]["contentType"], "application/json");
    let request = api.request(Method::POST, "/mcp/tool/call").header("Accept", "text/event-stream");
    let body = json!({"serverName": "vendor", "methodName": "vendor"});
    let streamed = api.send(request.json(&body)).await.ok();
    assert!(streamed.text.contains(members), "{}", streamed.text);
    // Tools are listed as the server wrote them, too.
    assert!(api.get("/mcp/tools").await.ok().text.contains(r#""x-vendor":{"kept":1.0}"#));
}

#[tokio::test]
async fn arguments_reach_the_server_as_they_were_spelled() {
    let api = Deployment::start().await;
    api.add_fixture("args", &[], json!({})).await;
    for args in [
        r#"{"z":1,"a":2,"m":{"y":1,"b":2}}"#,
        r#"{"exact":1.0,"thousand":1e3,"E":1E+2,"minusZero":-0.0,"tiny":1e-7}"#,
        r#"{"huge":123456789012345678901234567890,"long":0.10000000000000000000000000001}"#,
        r#"{"text":"\u00e4 ß \/ \ud83d\ude00 \t","empty":"","":0}"#,
        r#"{"a":[],"b":{},"c":[[],{}],"d":null,"e":true}"#,
        "{}",
    ] {
        assert_eq!(call_spelled(&api, "args", "args", args).await.tool_text(), args);
    }
    // White space between tokens may change, white space within strings may not.
    let pretty = "{\n  \"list\": [\r\n    1.0,\n\t2\n  ],\n  \"text\": \"a  b\\n\"\n}";
    let told = call_spelled(&api, "args", "args", pretty).await.tool_text();
    assert_eq!(told, r#"{"list":[1.0,2],"text":"a  b\n"}"#);
    // The line of a call must stay one line: a forged message inside it stays a string.
    let forged = r#"{"text":"\n{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n"}"#;
    assert_eq!(call_spelled(&api, "args", "args", forged).await.tool_text(), forged);
}

#[tokio::test]
async fn large_arguments_reach_the_server() {
    let api = Deployment::builder().env("PAYLOAD_LIMIT", "8mb").start().await;
    api.add_fixture("args", &[], json!({})).await;
    let text = "0123456789".repeat(6 * MIB / 10);
    let large = json!({"text": text});
    let ((), answer, other) = tokio::join!(
        others_are_served(&api, "args"),
        api.call("args", "echo", large.clone()),
        api.call("args", "echo", large),
    );
    assert!(answer.tool_text() == text && other.tool_text() == text);
    let answer = api.call("args", "echo", json!({"text": "x".repeat(9 * MIB)})).await;
    answer.fails(413, "payload_too_large");
}
