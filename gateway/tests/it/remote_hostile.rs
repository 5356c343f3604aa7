//! Remote servers that answer what none should: each mode ends in its documented error within the deadline,
//! other servers' calls go on, and the program stays as large as it was.

use std::{
    fs,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use mcp_shared::testing::remote::Remote;
use serde_json::json;

use crate::{
    deployment::{Deployment, eventually},
    remote::{add, permitting, record, remote},
};

/// By how much the program may grow.
const GROWTH: u64 = 64 * 1024 * 1024;
/// What a call of a hostile server is given.
const LIMIT: Duration = Duration::from_millis(4_000);
/// What it may take, with all of the machine's other work.
const PATIENCE: Duration = Duration::from_millis(4_000 + 4_000);

const PROTOCOL: &[&str] = &["upstream_protocol_error"];
const LARGE: &[&str] = &["result_too_large"];
/// A stream that is read slowly may not have reached its limit by the deadline.
const LARGE_OR_LATE: &[&str] = &["result_too_large", "deadline_exceeded"];
const LATE: &[&str] = &["deadline_exceeded"];
const LOST: &[&str] = &["upstream_lost"];
const REDIRECT: &[&str] = &["upstream_redirect"];
/// What is no HTTP is either.
const BROKEN: &[&str] = &["upstream_lost", "upstream_protocol_error"];
const FINE: &[&str] = &[];

const MODES: &[(&str, &[&str])] = &[
    ("endless_comments", LARGE_OR_LATE),
    ("endless_events", LARGE_OR_LATE),
    ("endless_notifications", LARGE_OR_LATE),
    ("endless_junk", &["result_too_large", "deadline_exceeded", "upstream_protocol_error"]),
    ("giant_event", LARGE),
    ("big_body", LARGE),
    ("big_chunks", LARGE),
    ("gzip_bomb", PROTOCOL),
    ("gzip_small", PROTOCOL),
    ("wrong_id", PROTOCOL),
    ("text_id", PROTOCOL),
    ("null_id", PROTOCOL),
    ("double", FINE),
    ("others_first", FINE),
    ("redirect", REDIRECT),
    ("redirect_get", REDIRECT),
    ("redirect_blocked", REDIRECT),
    ("drip", LATE),
    ("drip_json", LATE),
    ("html", PROTOCOL),
    ("not_json", PROTOCOL),
    ("no_type", PROTOCOL),
    ("empty_json", PROTOCOL),
    ("batch", PROTOCOL),
    ("deep", PROTOCOL),
    ("bad_utf8", PROTOCOL),
    ("bad_utf8_stream", PROTOCOL),
    ("accepted", PROTOCOL),
    ("no_content", PROTOCOL),
    ("400", PROTOCOL),
    ("403", PROTOCOL),
    ("418", PROTOCOL),
    ("500", PROTOCOL),
    ("503", &["upstream_unavailable"]),
    ("503_plain", PROTOCOL),
    ("429", &["upstream_rate_limited"]),
    ("429_plain", &["upstream_rate_limited"]),
    ("hang", LATE),
    ("hang_stream", LATE),
    ("reset", LOST),
    ("close", LOST),
    ("truncated", LOST),
    ("truncated_chunks", LOST),
    ("stream_end", LOST),
    ("header_flood", BROKEN),
    ("long_header", BROKEN),
    ("interim_flood", &["upstream_lost", "upstream_protocol_error", "deadline_exceeded"]),
    ("no_http", BROKEN),
];

fn status_of(code: &str) -> u16 {
    match code {
        "deadline_exceeded" => 504,
        "upstream_rate_limited" => 429,
        _ => 502,
    }
}

/// The most memory that processes have had since they were last asked, in bytes.
fn peak(pids: &[i32]) -> u64 {
    let one = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1_024
    };
    let most = pids.iter().map(one).max().unwrap();
    for pid in pids {
        fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
    }
    most
}

/// Calls a well-behaved server again and again while something else goes on; each call has to succeed.
async fn undisturbed<T>(api: &Deployment, work: impl Future<Output = T>) -> T {
    let (over, calls) = (AtomicBool::new(false), AtomicUsize::new(0));
    let good = async {
        while !over.load(Ordering::Relaxed) {
            let start = Instant::now();
            assert_eq!(api.call("good", "echo", json!({"text": "fine"})).await.tool_text(), "fine");
            assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
            calls.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let work = async {
        let done = work.await;
        over.store(true, Ordering::Relaxed);
        done
    };
    let (done, ()) = tokio::join!(work, good);
    assert!(calls.into_inner() > 0);
    done
}

/// A deployment with a good server, and the place where redirects of the bad ones go.
async fn beset() -> (Deployment, Remote, Remote) {
    let (good, other) = (remote(&[]), remote(&[]));
    let api = permitting().start().await;
    add(&api, "good", &good, json!({})).await;
    (api, good, other)
}

async fn every_mode(flags: &[&str]) {
    let (api, _good, other) = beset().await;
    let to = other.url();
    let flags: Vec<&str> = flags.iter().copied().chain(["--other", &to]).collect();
    let bad = remote(&flags);
    let limit = u64::try_from(LIMIT.as_millis()).unwrap();
    add(&api, "bad", &bad, json!({"toolTimeout": limit})).await;
    let owners = api.owners();
    let mut failures = Vec::new();
    peak(&owners);
    let before = peak(&owners);
    for (mode, codes) in MODES {
        let start = Instant::now();
        let answer = undisturbed(&api, api.call("bad", "hostile", json!({"mode": mode}))).await;
        let took = start.elapsed();
        let mut wrong = |what: String| {
            failures.push(format!("{mode}: {what}: {}", &answer.text[..answer.text.len().min(300)]))
        };
        if took > PATIENCE {
            wrong(format!("took {took:?}"));
        }
        let grown = peak(&owners).saturating_sub(before);
        if grown > GROWTH {
            wrong(format!("grew by {} MiB", grown / 1024 / 1024));
        }
        if codes.is_empty() {
            if answer.status != 200 {
                wrong(format!("status {}", answer.status));
            }
        } else {
            let code = answer.code();
            if !codes.contains(&code.as_str()) || answer.status != status_of(&code) {
                wrong(format!("{} {code}, not {codes:?}", answer.status));
            }
        }
        if answer.text.contains("secret-of-the-remote") || answer.text.contains("stolen") {
            wrong("repeats what it was told".to_owned());
        }
        let runs = bad.executed().iter().filter(|line| line.contains(&format!("\"{mode}\""))).count();
        if runs != 1 {
            wrong(format!("was sent {runs} times"));
        }
        let retry = answer.headers.get("retry-after").and_then(|value| value.to_str().ok());
        if matches!(*mode, "429" | "503") && retry != Some("7") {
            wrong(format!("retry-after {retry:?}"));
        }
        let outcome = (answer.status != 200).then(|| answer.json()["outcome"].clone());
        let expected = match *mode {
            "429" | "503" | "redirect" | "redirect_blocked" => Some(json!("not_started")),
            "close" | "reset" | "truncated" | "hang" | "500" => Some(json!("unknown")),
            _ => outcome.clone(),
        };
        if outcome != expected {
            wrong(format!("outcome {outcome:?}"));
        }
    }
    assert!(failures.is_empty(), "\n{}\n", failures.join("\n"));
    assert!(other.seen().is_empty(), "a redirect was followed: {:?}", other.seen());
    assert_eq!(api.call("bad", "echo", json!({"text": "still"})).await.tool_text(), "still");
}

#[tokio::test]
async fn hostile_answers_harm_nobody() {
    every_mode(&[]).await;
}

#[tokio::test]
async fn hostile_answers_of_the_era_without_sessions_harm_nobody() {
    every_mode(&["--era", "stateless"]).await;
}

#[tokio::test]
async fn hostile_answers_to_the_first_request_harm_nobody() {
    let (api, _good, other) = beset().await;
    let to = other.url();
    let owners = api.owners();
    peak(&owners);
    let before = peak(&owners);
    let mut failures = Vec::new();
    let modes = [
        "endless_comments",
        "giant_event",
        "big_body",
        "gzip_bomb",
        "wrong_id",
        "redirect",
        "redirect_blocked",
        "drip",
        "html",
        "500",
        "503",
        "429",
        "hang",
        "hang_stream",
        "reset",
        "close",
        "truncated_chunks",
        "header_flood",
        "no_http",
        "session_control",
        "session_long",
    ];
    for (n, mode) in modes.iter().enumerate() {
        let bad = remote(&["--hostile", &format!("{mode}@initialize"), "--other", &to]);
        let name = format!("bad-{n}");
        let body = record(&name, &bad, &json!({"startupTimeout": 3_000}));
        let start = Instant::now();
        let added = undisturbed(&api, api.post("/mcp/servers", &body)).await;
        let answer = undisturbed(&api, api.call(&name, "echo", json!({"text": "x"}))).await;
        let mut wrong = |what: String| failures.push(format!("{mode}: {what}: {}", answer.text));
        if added.status != 200 || added.json()["server"]["status"] == "connected" {
            wrong(format!("registered: {}", added.text));
        }
        if answer.status < 429 || answer.status == 500 || answer.json()["outcome"] != "not_started" {
            wrong(format!("status {}", answer.status));
        }
        if start.elapsed() > Duration::from_secs(20) {
            wrong(format!("took {:?}", start.elapsed()));
        }
        let grown = peak(&owners).saturating_sub(before);
        if grown > GROWTH {
            wrong(format!("grew by {} MiB", grown / 1024 / 1024));
        }
        api.delete(&format!("/mcp/servers/{name}")).await.ok();
    }
    assert!(failures.is_empty(), "\n{}\n", failures.join("\n"));
    assert!(other.seen().is_empty(), "a redirect was followed: {:?}", other.seen());
}

#[tokio::test]
async fn a_hostile_stream_of_notifications_harms_nobody() {
    let (api, _good, _other) = beset().await;
    let owners = api.owners();
    peak(&owners);
    let before = peak(&owners);
    for mode in
        ["endless_comments", "endless_notifications", "giant_event", "html", "close", "500", "redirect"]
    {
        let bad = remote(&["--hostile", &format!("{mode}@GET"), "--other", "http://127.0.0.1:1/"]);
        add(&api, mode, &bad, json!({})).await;
        eventually("it is listened to", async || bad.seen().iter().any(|seen| seen.method == "GET")).await;
        let answered = undisturbed(&api, async {
            for n in 0..20 {
                let answer = api.call(mode, "args", json!({"n": n})).await;
                assert_eq!(answer.tool_text(), format!(r#"{{"n":{n}}}"#), "{mode}");
            }
        });
        answered.await;
        api.delete(&format!("/mcp/servers/{mode}")).await.ok();
        let grown = peak(&owners).saturating_sub(before);
        assert!(grown < GROWTH, "{mode}: grew by {} MiB", grown / 1024 / 1024);
        // Nobody who is refused asks again and again without a pause.
        let asked = bad.seen().iter().filter(|seen| seen.method == "GET").count();
        assert!(asked < 40, "{mode}: asked {asked} times");
    }
}

#[tokio::test]
async fn a_server_that_does_not_answer_to_discovery_is_connected_to() {
    let api = permitting().start().await;
    for mode in ["hang", "close", "html", "500", "no_content", "wrong_id"] {
        let bad = remote(&["--hostile", &format!("{mode}@server/discover")]);
        add(&api, mode, &bad, json!({})).await;
        assert_eq!(api.call(mode, "echo", json!({"text": mode})).await.tool_text(), mode);
    }
}
