//! Overload: whatever is too much is refused at once, says when to come back, and is counted; what is not too much goes on.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
};

use crate::deployment::{Answer, Deployment, eventually};

/// Gateways of a deployment. Each has limits of its own, and gets every so many-th request.
const GATEWAYS: usize = if crate::CLUSTER { 2 } else { 1 };

/// Calls that are made and not waited for. They are cancelled with this.
struct Calls(JoinSet<reqwest::Result<reqwest::Response>>);

impl Calls {
    /// Begins as many calls at each gateway, which end when they are cancelled.
    fn begin(api: &Deployment, count: usize, body: &Value) -> Self {
        let mut calls = JoinSet::new();
        for _ in 0..count * GATEWAYS {
            calls.spawn(api.request(Method::POST, "/mcp/tool/call").json(body).send());
        }
        Self(calls)
    }

    /// Cancels them, and waits until that has arrived.
    async fn end(mut self, api: &Deployment) {
        self.0.shutdown().await;
        eventually("the calls are over", async || api.metric("mcp_gateway_calls").await == 0.0).await;
    }
}

fn sleeping(server: &str) -> Value {
    json!({"serverName": server, "methodName": "sleep", "args": {"ms": 60_000}})
}

/// Asserts that an answer is a refusal that was given before anything was done, and returns its `Retry-After`.
#[track_caller]
fn refused(answer: Answer, status: u16, code: &str) -> (u64, Answer) {
    let answer = answer.fails(status, code);
    assert_eq!(answer.json()["outcome"], "not_started", "{}", answer.text);
    assert_eq!(answer.json()["retryable"], true, "{}", answer.text);
    let wait = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
    (wait, answer)
}

async fn refusals(api: &Deployment, reason: &str) -> f64 {
    api.metric(&format!("mcp_refused_total{{reason=\"{reason}\"}}")).await
}

#[tokio::test]
async fn a_gateway_has_so_many_calls_in_flight_and_no_more() {
    let api = Deployment::builder().env("MAX_CALLS", "2").start().await;
    api.add_fixture("echo", &[], json!({})).await;
    assert_eq!(api.metric("mcp_gateway_calls_limit").await, 2.0 * GATEWAYS as f64);
    let calls = Calls::begin(&api, 2, &sleeping("echo"));
    let all = 2.0 * GATEWAYS as f64;
    eventually("the calls are in flight", async || api.metric("mcp_gateway_calls").await == all).await;
    for _ in 0..GATEWAYS {
        let answer = api.call("echo", "echo", json!({"text": "one more"})).await;
        assert_eq!(refused(answer, 503, "overloaded").0, 1);
        // Nothing but calls is limited by it.
        api.get("/mcp/servers").await.ok();
    }
    assert_eq!(refusals(&api, "gateway_calls").await, GATEWAYS as f64);
    calls.end(&api).await;
    assert_eq!(api.call("echo", "echo", json!({"text": "again"})).await.tool_text(), "again");
}

#[tokio::test]
async fn a_gateway_has_so_many_bytes_of_bodies_in_its_memory_and_no_more() {
    let api = Deployment::builder().env("MAX_BODY_BYTES", "1mb").env("PAYLOAD_LIMIT", "1mb").start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    let mut large = sleeping("echo");
    large["args"]["padding"] = "x".repeat(600_000).into();
    let calls = Calls::begin(&api, 1, &large);
    let all = 600_000.0 * GATEWAYS as f64;
    eventually("the bodies are there", async || api.metric("mcp_gateway_body_bytes").await >= all).await;
    let body = json!({"serverName": "echo", "methodName": "args", "args": {"padding": "x".repeat(600_000)}});
    let whole = Bytes::from(body.to_string());
    for _ in 0..GATEWAYS {
        let answer = api.post("/mcp/tool/call", &body).await;
        assert_eq!(refused(answer, 503, "overloaded").0, 1);
        assert_eq!(api.call("echo", "echo", json!({"text": "small"})).await.tool_text(), "small");
    }
    // A body that does not say how long it is takes its room as it comes. Other requests have bodies too.
    for path in ["/mcp/tool/call", "/mcp/servers"] {
        for _ in 0..GATEWAYS {
            let parts: Vec<_> =
                whole.chunks(10_000).map(|part| Ok::<_, std::io::Error>(whole.slice_ref(part))).collect();
            let stream = reqwest::Body::wrap_stream(futures_util::stream::iter(parts));
            let request = api.request(Method::POST, path).header("content-type", "application/json");
            api.send(request.body(stream)).await.fails(503, "overloaded");
        }
    }
    assert_eq!(refusals(&api, "gateway_body_bytes").await, 3.0 * GATEWAYS as f64);
    calls.end(&api).await;
    assert_eq!(api.metric("mcp_gateway_body_bytes").await, 0.0);
    api.post("/mcp/tool/call", &body).await.ok();
}

#[tokio::test]
async fn a_user_has_so_many_calls_in_flight_and_others_have_theirs() {
    let api = Deployment::builder().env("USER_MAX_CALLS", "1").start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let mut of_alice = sleeping("echo");
    of_alice["username"] = "alice".into();
    let calls = Calls::begin(&api, 1, &of_alice);
    let all = GATEWAYS as f64;
    eventually("the calls run", async || api.metric("mcp_worker_running_calls").await == all).await;
    for _ in 0..GATEWAYS {
        let answer = api.call_as("alice", "echo", "echo", json!({"text": "x"})).await;
        let (wait, answer) = refused(answer, 429, "rate_limited");
        assert_eq!(wait, 1);
        assert_eq!(answer.headers["ratelimit-policy"], "\"calls\";q=1;qu=\"concurrent-requests\"");
        assert_eq!(answer.headers["ratelimit"], "\"calls\";r=0");
        assert_eq!(api.call_as("bob", "echo", "echo", json!({"text": "bob's"})).await.tool_text(), "bob's");
    }
    assert_eq!(refusals(&api, "user_calls").await, GATEWAYS as f64);
    calls.end(&api).await;
    api.call_as("alice", "echo", "echo", json!({"text": "x"})).await.ok();
}

#[tokio::test]
async fn a_user_makes_so_many_calls_in_a_second() {
    // One in a thousand seconds: no machine is so slow that the second one is let in.
    let api = Deployment::builder().env("USER_MAX_RATE", "0.001").start().await;
    api.add_fixture("echo", &[], json!({})).await;
    assert_eq!(api.metric("mcp_user_rate_limit").await, 0.001 * GATEWAYS as f64);
    for _ in 0..GATEWAYS {
        api.call_as("alice", "echo", "echo", json!({"text": "x"})).await.ok();
    }
    for gateway in 0..GATEWAYS {
        let answer = api.call_as("alice", "echo", "echo", json!({"text": "x"})).await;
        let (wait, answer) = refused(answer, 429, "rate_limited");
        assert!((900..=1_000).contains(&wait), "{wait}");
        assert_eq!(answer.headers["ratelimit-policy"], "\"rate\";q=1;w=1000");
        assert_eq!(answer.headers["ratelimit"], format!("\"rate\";r=0;t={wait}"));
        api.call_as(&format!("bob-{gateway}"), "echo", "echo", json!({"text": "x"})).await.ok();
    }
    assert_eq!(refusals(&api, "user_rate").await, GATEWAYS as f64);
}

#[tokio::test]
async fn a_worker_looks_after_so_many_calls_and_no_more() {
    let api = Deployment::builder().env("WORKER_MAX_CALLS", "2").workers(1).start().await;
    api.add_fixture("echo", &[], json!({"concurrency": 1})).await;
    assert_eq!(api.metric("mcp_worker_calls_limit").await, 2.0);
    // Two in all. What comes then is one too many, at whichever gateway.
    let calls = Calls::begin(&api, 2 / GATEWAYS, &sleeping("echo"));
    eventually("the calls are there", async || api.metric("mcp_worker_calls").await == 2.0).await;
    for _ in 0..GATEWAYS {
        assert_eq!(refused(api.call("echo", "echo", json!({"text": "x"})).await, 503, "overloaded").0, 1);
    }
    assert!(refusals(&api, "worker_calls").await >= GATEWAYS as f64);
    calls.end(&api).await;
    eventually("there is room", async || api.metric("mcp_worker_calls").await == 0.0).await;
    assert_eq!(api.call("echo", "echo", json!({"text": "again"})).await.tool_text(), "again");
}

#[tokio::test]
async fn so_many_calls_wait_for_a_server_and_no_more() {
    let api = Deployment::builder().env("SERVER_QUEUE", "1").start().await;
    let single = json!({"concurrency": 1, "scaling": "singleton"});
    api.add_fixture("slow", &[], single).await;
    api.add_fixture("other", &[], json!({})).await;
    let mut calls = Calls::begin(&api, 1, &sleeping("slow"));
    if !crate::CLUSTER {
        calls.0.spawn(api.request(Method::POST, "/mcp/tool/call").json(&sleeping("slow")).send());
    }
    eventually("one call runs and one waits", async || {
        api.metric("mcp_worker_running_calls").await == 1.0
            && api.metric("mcp_worker_waiting_calls").await == 1.0
            && api.metric("mcp_worker_longest_wait_seconds").await > 0.0
    })
    .await;
    for _ in 0..GATEWAYS {
        let (wait, _) = refused(api.call("slow", "echo", json!({"text": "x"})).await, 503, "overloaded");
        // As long as those will take that wait.
        assert!((1..=30).contains(&wait), "{wait}");
        assert_eq!(api.call("other", "echo", json!({"text": "other"})).await.tool_text(), "other");
    }
    assert!(refusals(&api, "server_queue").await >= GATEWAYS as f64);
    calls.end(&api).await;
    eventually("the slot is free", async || api.metric("mcp_worker_calls").await == 0.0).await;
    assert_eq!(api.call("slow", "echo", json!({"text": "again"})).await.tool_text(), "again");
}

/// The most memory that a process has had, in bytes.
fn peak_memory(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")).unwrap();
    peak.parse::<u64>().unwrap() * 1024
}

/// The soft limit on open files of a process.
fn open_files(pid: i32) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Calls a tool on a connection of its own, as cheaply as possible: what a crowd costs here is not there for the programs.
/// Returns the status, the code of an error, and whether the answer says when to come back.
async fn call_once(address: String, body: String) -> (u16, String, bool) {
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let head = "POST /mcp/tool/call HTTP/1.1\r\ncontent-type: application/json\r\nconnection: close";
    let request = format!("{head}\r\nhost: {address}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let document: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("no document: {answer}"));
    (status, document["code"].as_str().unwrap_or_default().to_owned(), head.contains("\r\nretry-after: "))
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stdout, reason = "what came of it is worth reading")]
async fn five_thousand_callers_of_one_slot_harm_nobody_else() {
    const CALLERS: usize = 5_000;
    /// For the sockets of this test, and less than the programs may have.
    const FILES: u64 = 16_384;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    assert!(most > FILES, "this test needs {FILES} open files, and may have {most}");
    setrlimit(Resource::RLIMIT_NOFILE, FILES, most).unwrap();

    let api = Deployment::start().await;
    // However slow this machine is, whoever waits is served in the end.
    let single = json!({"concurrency": 1, "scaling": "singleton", "toolTimeout": 600_000});
    api.add_fixture("slow", &[], single).await;
    api.add_fixture("other", &[], json!({})).await;
    // Programs take as many files as they can have, and leave their servers what they were given.
    assert!(api.programs().into_iter().all(|pid| open_files(pid) == most));
    for pid in api.pids("other").await {
        assert_eq!(open_files(pid), FILES);
    }

    let mut crowd = JoinSet::new();
    let body = json!({"serverName": "slow", "methodName": "sleep", "args": {"ms": 2}}).to_string();
    for _ in 0..CALLERS {
        crowd.spawn(call_once(api.address().to_owned(), body.clone()));
    }
    let over = AtomicBool::new(false);
    let (answers, others) = tokio::join!(
        async {
            let mut answers = BTreeMap::<_, usize>::new();
            while let Some(answer) = crowd.join_next().await {
                *answers.entry(answer.unwrap()).or_default() += 1;
            }
            over.store(true, Ordering::Relaxed);
            answers
        },
        async {
            let mut calls = 0;
            while !over.load(Ordering::Relaxed) {
                let text = format!("call {calls}");
                assert_eq!(api.call("other", "echo", json!({"text": text})).await.tool_text(), text);
                calls += 1;
            }
            calls
        }
    );
    println!("answers {answers:?}; meanwhile {others} calls of the other server");
    assert_eq!(answers.values().sum::<usize>(), CALLERS);
    let good = (200, String::new(), false);
    // Whoever found a place in the queue was served; everybody else was told to come back.
    assert!(answers[&good] >= 1_024, "{answers:?}");
    let bad = (503, "overloaded".to_owned(), true);
    assert!(answers.keys().all(|answer| *answer == good || *answer == bad), "{answers:?}");
    assert!(answers.contains_key(&bad) && others > 0, "{answers:?}, {others}");
    for pid in api.programs() {
        let peak = peak_memory(pid);
        println!("process {pid}: {} MB at most", peak >> 20);
        assert!(peak < 512 << 20, "process {pid} had {peak} bytes");
    }

    eventually("nothing is left", async || {
        api.metric("mcp_worker_calls").await == 0.0 && api.metric("mcp_gateway_calls").await == 0.0
    })
    .await;
    assert_eq!(api.metric("mcp_gateway_body_bytes").await, 0.0);
    assert_eq!(api.call("slow", "echo", json!({"text": "again"})).await.tool_text(), "again");
}
