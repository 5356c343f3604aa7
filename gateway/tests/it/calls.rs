//! Tool calls as their callers see them: limits, deadlines, cancelling, progress, errors.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use futures_util::{
    StreamExt,
    future::join_all,
    stream::{self, FuturesUnordered},
};
use mcp_shared::limits;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::deployment::{Answer, Deployment, eventually};

/// A call that the test completes with headers.
fn request(api: &Deployment, server: &str, tool: &str, args: Value) -> RequestBuilder {
    let body = json!({"serverName": server, "methodName": tool, "args": args});
    api.request(Method::POST, "/mcp/tool/call").json(&body)
}

async fn call_within(api: &Deployment, server: &str, tool: &str, args: Value, limit: &str) -> Answer {
    api.send(request(api, server, tool, args).header("X-Request-Timeout-Ms", limit)).await
}

/// The calls in flight on each of a server's processes.
async fn in_flight(api: &Deployment, server: &str) -> Vec<u64> {
    let server = api.server(server).await;
    server["instances"].as_array().unwrap().iter().map(|one| one["inFlight"].as_u64().unwrap()).collect()
}

async fn becomes_in_flight(api: &Deployment, server: &str, wanted: &[u64]) {
    eventually(&format!("{wanted:?} calls are in flight"), async || in_flight(api, server).await == wanted)
        .await;
}

/// Starts a call and leaves when it is in flight, as a client does whose connection breaks.
async fn leave(api: &Deployment, server: &str, request: RequestBuilder) {
    let before = in_flight(api, server).await[0];
    let client = tokio::spawn(async move {
        let response = request.send().await.unwrap();
        response.text().await
    });
    becomes_in_flight(api, server, &[before + 1]).await;
    client.abort();
    assert!(client.await.is_err_and(|error| error.is_cancelled()));
}

/// Leaves a call until the server has seen it and was told that nobody waits any more. (A call that is
/// left so early that it was not written yet is never made, and there is nothing to tell.) Returns how
/// long the call kept its slot.
async fn leave_until_told(api: &Deployment, server: &str, request: impl Fn() -> RequestBuilder) -> Duration {
    loop {
        leave(api, server, request()).await;
        let start = Instant::now();
        becomes_in_flight(api, server, &[0]).await;
        let held = start.elapsed();
        let told = api.call(server, "cancelled", json!({})).await.tool_text();
        match serde_json::from_str::<Vec<u64>>(&told).unwrap().len() {
            0 => {}
            count => {
                assert_eq!(count, 1);
                return held;
            }
        }
    }
}

/// The events of a stream as their names and data.
fn events(text: &str) -> Vec<(String, Value)> {
    let blocks = text.split("\n\n").filter(|block| !block.is_empty() && !block.starts_with(':'));
    blocks
        .map(|block| {
            let field = |name: &str| {
                let lines: Vec<_> = block.lines().filter_map(|line| line.strip_prefix(name)).collect();
                lines.join("\n")
            };
            (field("event: "), serde_json::from_str(&field("data: ")).unwrap())
        })
        .collect()
}

async fn stream(api: &Deployment, server: &str, tool: &str, args: Value) -> Answer {
    api.send(request(api, server, tool, args).header("Accept", "text/event-stream")).await
}

#[tokio::test]
async fn many_slow_calls_share_one_connection() {
    let api = Deployment::start().await;
    api.add_fixture("slow", &[], json!({"concurrency": 64})).await;
    let start = Instant::now();
    let calls = (0..200).map(|n| api.call("slow", "sleep", json!({"ms": 200 + n})));
    for (n, answer) in join_all(calls).await.into_iter().enumerate() {
        assert_eq!(answer.tool_text(), format!("slept {}", 200 + n));
    }
    // 200 calls in turns of 64 are four turns.
    assert!(start.elapsed() >= Duration::from_millis(800), "it took {:?}", start.elapsed());
    assert_eq!(in_flight(&api, "slow").await, [0]);
}

#[tokio::test]
async fn the_concurrency_of_a_server_is_kept() {
    let api = Deployment::start().await;
    api.add_fixture("narrow", &[], json!({"concurrency": 4})).await;
    let calls = join_all((0..16).map(|_| api.call("narrow", "sleep", json!({"ms": 250}))));
    let mut most = 0;
    let watch = async {
        loop {
            most = most.max(in_flight(&api, "narrow").await[0]);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let start = Instant::now();
    tokio::select! {
        answers = calls => answers.into_iter().for_each(|answer| drop(answer.ok())),
        () = watch => {}
    }
    assert!(start.elapsed() >= Duration::from_secs(1), "it took {:?}", start.elapsed());
    assert_eq!(most, 4);
}

#[tokio::test]
async fn several_processes_share_the_calls() {
    let api = Deployment::start().await;
    api.add_fixture("three", &["--more"], json!({"instances": 3})).await;
    let pids: BTreeSet<_> = api.pids("three").await.into_iter().collect();
    assert_eq!(pids.len(), 3);
    let ((), answers) = tokio::join!(
        becomes_in_flight(&api, "three", &[2, 2, 2]),
        join_all((0..6).map(|_| api.call("three", "sleep", json!({"ms": 1_500}))))
    );
    answers.into_iter().for_each(|answer| drop(answer.ok()));
    let mut seen = BTreeSet::new();
    for answer in join_all((0..30).map(|_| api.call("three", "pid", json!({})))).await {
        let ids: Value = serde_json::from_str(&answer.tool_text()).unwrap();
        seen.insert(i32::try_from(ids["pid"].as_i64().unwrap()).unwrap());
    }
    assert_eq!(seen, pids);
}

#[tokio::test]
async fn callers_beyond_the_queue_are_told_at_once() {
    let api = Deployment::start().await;
    // Of other servers every worker would have a queue.
    api.add_fixture("full", &["--more"], json!({"concurrency": 1, "scaling": "singleton"})).await;
    let calls: FuturesUnordered<_> = (0..1_100).map(|_| api.call("full", "hang", json!({}))).collect();
    let refused: Vec<_> = calls.take(10).collect().await;
    for answer in refused {
        let answer = answer.fails(503, "overloaded");
        assert_eq!(answer.json()["outcome"], "not_started");
        assert_eq!(answer.json()["retryable"], true);
        assert!(answer.headers.contains_key("retry-after"));
    }
    // Other servers have queues of their own, and those who waited here have left.
    api.add_fixture("free", &[], json!({})).await;
    assert_eq!(api.call("free", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
}

#[tokio::test]
async fn a_deadline_ends_a_call() {
    let api = Deployment::start().await;
    api.add_fixture("slow", &["--more"], json!({"concurrency": 1})).await;
    let sleep = json!({"ms": 1_500});
    let answer = call_within(&api, "slow", "sleep", sleep.clone(), "200").await;
    let body = answer.fails(504, "deadline_exceeded").json();
    assert_eq!((&body["outcome"], &body["serverName"]), (&json!("unknown"), &json!("slow")));
    assert_eq!(body["retryable"], true);
    // The server is still at it, and its only slot taken: a call that cannot wait was never started.
    let answer = call_within(&api, "slow", "echo", json!({"text": "hi"}), "100").await;
    assert_eq!(answer.fails(504, "deadline_exceeded").json()["outcome"], "not_started");
    assert_eq!(call_within(&api, "slow", "echo", json!({"text": "hi"}), "20000").await.tool_text(), "hi");

    api.add_fixture("record", &[], json!({"toolTimeout": 200})).await;
    let answer = api.call("record", "sleep", sleep.clone()).await.fails(504, "deadline_exceeded");
    assert!(answer.json()["error"].as_str().unwrap().contains("200 ms"), "{}", answer.text);
    // A caller cannot have more than the record allows.
    call_within(&api, "record", "sleep", sleep, "60000").await.fails(504, "deadline_exceeded");
}

#[tokio::test]
async fn the_time_that_a_caller_gives_is_checked() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let hi = json!({"text": "hi"});
    for bad in ["0", "-1", "+5", "1.5", "1e3", "", "abc", "10 000", "0x10", "18446744073709551616"] {
        call_within(&api, "echo", "echo", hi.clone(), bad).await.fails(400, "invalid_request");
    }
    for good in ["20000", "999999999", "18446744073709551615", "0020000"] {
        assert_eq!(call_within(&api, "echo", "echo", hi.clone(), good).await.tool_text(), "hi", "{good}");
    }
}

#[tokio::test]
async fn a_call_is_cancelled_when_its_caller_leaves() {
    let api = Deployment::start().await;
    api.add_fixture("plain", &["--more"], json!({"concurrency": 1})).await;
    api.add_fixture("streamed", &["--more"], json!({"concurrency": 1})).await;
    let call = |server| request(&api, server, "cancellable", json!({"ms": 50_000}));
    // A server need not answer what was cancelled; the slot is free all the same, a little later.
    tokio::join!(
        leave_until_told(&api, "plain", || call("plain")),
        leave_until_told(&api, "streamed", || call("streamed").header("Accept", "text/event-stream")),
    );
    for server in ["plain", "streamed"] {
        api.call(server, "sleep", json!({"ms": 10})).await.ok();
    }
}

#[tokio::test]
async fn a_slot_is_free_as_soon_as_a_cancelled_call_is_answered() {
    let api = Deployment::start().await;
    api.add_fixture("single", &["--more"], json!({"concurrency": 1})).await;
    let call = || request(&api, "single", "late_answer", json!({"ms": 300}));
    let held = leave_until_told(&api, "single", call).await;
    assert!(held < limits::CANCEL_GRACE, "it took {held:?}");
}

#[tokio::test]
async fn a_call_that_is_cancelled_while_it_waits_is_never_made() {
    let api = Deployment::start().await;
    api.add_fixture("single", &["--more"], json!({"concurrency": 1})).await;
    let file = api.data().path().join("touched");
    let touch = |text: &str| request(&api, "single", "touch", json!({"path": file, "text": text}));
    let (first, ()) = tokio::join!(api.call("single", "sleep", json!({"ms": 1_000})), async {
        becomes_in_flight(&api, "single", &[1]).await;
        let waiting = touch("never").timeout(Duration::from_millis(200)).send().await;
        assert!(waiting.is_err_and(|error| error.is_timeout()));
    });
    assert_eq!(first.tool_text(), "slept 1000");
    api.send(touch("once")).await.ok();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "once\n");
    assert_eq!(api.call("single", "cancelled", json!({})).await.tool_text(), "[]");
}

#[tokio::test]
async fn progress_comes_before_the_result() {
    let api = Deployment::start().await;
    api.add_fixture("steps", &["--more"], json!({})).await;
    // Several at once, so that the events of one could end up with another.
    let streams = (1..=6).map(|steps| {
        let args = json!({"steps": steps, "delayMs": 20});
        stream(&api, "steps", "progress", args)
    });
    for (at, answer) in join_all(streams).await.into_iter().enumerate() {
        let steps = at + 1;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["content-type"], "text/event-stream");
        assert_eq!(answer.headers["cache-control"], "no-store");
        assert!(answer.headers.contains_key("x-request-id"));
        let events = events(&answer.text);
        assert_eq!(events.len(), steps + 1, "{}", answer.text);
        for (step, (name, data)) in (1..=steps).zip(&events) {
            assert_eq!(name, "progress");
            assert_eq!((&data["progress"], &data["total"]), (&json!(step), &json!(steps)));
            assert_eq!(data["x-vendor"]["step"].to_string(), format!("{step}.0"));
        }
        let (name, data) = &events[steps];
        assert_eq!(name, "result");
        assert_eq!(data["success"], true);
        assert_eq!(data["data"]["content"][0]["text"], "done");
        assert_eq!(data["data"]["contentType"], "text/plain");
    }
    // Who does not ask for events gets none.
    let answer = api.call("steps", "progress", json!({"steps": 3, "delayMs": 1})).await;
    assert_eq!(answer.tool_text(), "done");
}

#[tokio::test]
async fn progress_is_sent_when_it_happens() {
    let api = Deployment::start().await;
    api.add_fixture("steps", &["--more"], json!({})).await;
    let request = request(&api, "steps", "progress", json!({"steps": 2, "delayMs": 1_000}));
    let mut response = request.header("Accept", "text/event-stream").send().await.unwrap();
    let first = response.chunk().await.unwrap().unwrap();
    let first = String::from_utf8(first.to_vec()).unwrap();
    assert!(first.contains("step 1 of 2") && !first.contains("step 2 of 2"), "{first}");
    let mut rest = first;
    while let Some(chunk) = response.chunk().await.unwrap() {
        rest.push_str(std::str::from_utf8(&chunk).unwrap());
    }
    assert_eq!(events(&rest).len(), 3);
}

#[tokio::test]
async fn a_slow_reader_loses_progress_but_not_the_result() {
    let api = Deployment::start().await;
    api.add_fixture("steps", &["--more"], json!({})).await;
    let answer = stream(&api, "steps", "progress", json!({"steps": 20_000, "delayMs": 0})).await;
    let events = events(&answer.text);
    assert_eq!(events.last().unwrap().0, "result");
    let seen: Vec<_> = events[..events.len() - 1]
        .iter()
        .map(|(name, data)| {
            assert_eq!(name, "progress");
            data["progress"].as_u64().unwrap()
        })
        .collect();
    assert!(!seen.is_empty() && seen.is_sorted());
}

#[tokio::test]
async fn a_stream_tells_errors_as_an_answer_would() {
    let api = Deployment::start().await;
    api.add_fixture("fails", &["--more"], json!({})).await;
    let error = json!({"code": -32000, "message": "no luck"});
    let answer = stream(&api, "fails", "rpc_error", error).await.ok();
    let events = events(&answer.text);
    assert_eq!(events.len(), 1);
    let (name, data) = &events[0];
    assert_eq!(name, "error");
    assert_eq!((&data["success"], &data["code"]), (&json!(false), &json!("mcp_error")));
    assert_eq!((&data["outcome"], &data["mcpCode"]), (&json!("completed"), &json!(-32000)));
    assert_eq!(data["requestId"], answer.headers["x-request-id"].to_str().unwrap());
    // What is refused before it starts is refused with its status.
    stream(&api, "nobody", "echo", json!({})).await.fails(404, "server_not_found");
    let answer = stream(&api, "fails", "crash", json!({})).await.ok();
    assert_eq!(self::events(&answer.text)[0].1["code"], "server_crashed");
}

#[tokio::test]
async fn requests_have_ids() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let with_id = |id: &str| {
        let request = request(&api, "echo", "echo", json!({"text": "hi"}));
        request.header("X-Request-Id", id)
    };
    for id in ["abc", "7b1e9c1e-7b0a-4f6a-9d3e-0d3c0a5d8f11", "a.b_c-d:e"] {
        let answer = api.send(with_id(id)).await.ok();
        assert_eq!(answer.headers["x-request-id"], id);
        let line = format!("\"request_id\":\"{id}\"");
        eventually("the request is logged", async || api.log().contains(&line)).await;
    }
    let long = "x".repeat(129);
    for id in ["", "a b", "a\tb", &long] {
        let answer = api.send(with_id(id)).await.fails(400, "invalid_request");
        assert_ne!(answer.headers["x-request-id"], id);
    }
    let mut made = BTreeSet::new();
    for _ in 0..3 {
        let answer = api.call("echo", "echo", json!({"text": "hi"})).await.ok();
        made.insert(answer.headers["x-request-id"].to_str().unwrap().to_owned());
    }
    assert_eq!(made.len(), 3);
}

#[tokio::test]
async fn a_tool_that_reports_a_failure_was_called_with_success() {
    let api = Deployment::start().await;
    api.add_fixture("tools", &["--more"], json!({})).await;
    for (tool, args, text) in [
        ("fail", json!({}), "it failed"),
        ("throw", json!({}), "boom"),
        ("nothing_of_that_name", json!({}), "MCP error -32602: Tool nothing_of_that_name not found"),
    ] {
        let answer = api.call("tools", tool, args).await;
        assert_eq!(answer.tool_text(), text);
        let body = answer.json();
        assert_eq!((&body["success"], &body["data"]["isError"]), (&json!(true), &json!(true)));
    }
    for (tool, content_type) in
        [("json_text", "application/json"), ("image", "image/png"), ("pid", "application/json")]
    {
        let answer = api.call("tools", tool, json!({})).await.ok();
        assert_eq!(answer.json()["data"]["contentType"], content_type, "{tool}");
    }
}

#[tokio::test]
async fn errors_of_the_protocol_have_their_own_statuses() {
    let api = Deployment::start().await;
    api.add_fixture("refuses", &["--more"], json!({})).await;
    for (mcp_code, status, code) in [
        (-32602, 400, "invalid_arguments"),
        (-32601, 404, "tool_not_found"),
        (-32603, 502, "mcp_error"),
        (-32000, 502, "mcp_error"),
        (1, 502, "mcp_error"),
    ] {
        let args = json!({"code": mcp_code, "message": "not like\nthis", "data": {"hidden": "detail"}});
        let answer = api.call("refuses", "rpc_error", args).await.fails(status, code);
        let body = answer.json();
        assert_eq!(body["mcpCode"], mcp_code);
        assert_eq!(body["outcome"], "completed");
        assert_eq!(body["serverName"], "refuses");
        assert_eq!(body["retryable"], false);
        assert_eq!(body["error"], format!("MCP error {mcp_code}: not like this"));
        assert!(!answer.text.contains("hidden"));
    }
    let body = api.call("nobody", "echo", json!({})).await.fails(404, "server_not_found").json();
    assert_eq!(body["outcome"], "not_started");
    assert_eq!(body["error"], "Server nobody not found");
    // None of this costs the process anything.
    assert_eq!(api.call("refuses", "count", json!({})).await.tool_text(), "1");
}

#[tokio::test]
async fn a_server_that_reads_nothing_holds_up_nobody_else() {
    let api = Deployment::start().await;
    api.add_fixture("stopped", &["--more"], json!({})).await;
    api.add_fixture("other", &[], json!({})).await;
    let pid = api.pids("stopped").await[0];
    let send = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
    send(nix::sys::signal::Signal::SIGSTOP);
    let text = "x".repeat(100_000);
    let stuck = stream::iter(0..10)
        .map(|_| call_within(&api, "stopped", "echo", json!({"text": text}), "1000"))
        .buffer_unordered(10)
        .for_each(async |answer| {
            let outcome = answer.fails(504, "deadline_exceeded").json()["outcome"].clone();
            assert!(outcome == "unknown" || outcome == "not_started", "{outcome}");
        });
    let others = join_all((0..20).map(|_| api.call("other", "echo", json!({"text": "hi"}))));
    let ((), answers) = tokio::join!(stuck, others);
    answers.into_iter().for_each(|answer| assert_eq!(answer.tool_text(), "hi"));
    send(nix::sys::signal::Signal::SIGCONT);
    assert_eq!(api.call("stopped", "echo", json!({"text": "awake"})).await.tool_text(), "awake");
    assert_eq!(api.pids("stopped").await, [pid]);
}
