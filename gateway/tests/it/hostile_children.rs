//! Servers that do harm: each in its own way, beside one that does not and must not notice. What the caller is told
//! is certain in every case, and nothing of such a server is left when it was removed.
//!
//! The ways stand in tables; [`mcp_shared::testing::fixture::hostile`] says what each of them does.

#![allow(clippy::print_stdout, reason = "which of them it was shows only when the test fails")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mcp_shared::limits;
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    deployment::{Answer, Deployment, alive, eventually},
    footprint::{self, processes_with},
};

/// How much larger our memory may be after a server that did its worst. (Lines of up to 17 MiB are read at once, and
/// what was given back to the allocator need not go back to the system.)
const KILOBYTES: u64 = 96 * 1024;
/// Connections that the test's own client may have opened meanwhile.
const SOCKETS: usize = 24;
/// The time that a call gets of which no answer is expected.
const SHORT: u64 = 1_000;
/// The time that others get, on a machine that may be slow.
const LONG: u64 = 25_000;

/// What a call of the tool that does harm comes to.
enum Outcome {
    /// An answer all the same, with this in its text.
    Answer(&'static str),
    /// This status, code and outcome.
    Error(u16, &'static str, &'static str),
    /// The server never came up, and why stands in its log.
    NotUp(&'static str),
}
use Outcome::{Answer as Answers, Error as Fails, NotUp};

/// One way to do harm.
struct Way {
    mode: &'static str,
    flags: &'static [&'static str],
    outcome: Outcome,
}

const fn way(mode: &'static str, outcome: Outcome) -> Way {
    Way { mode, flags: &[], outcome }
}

const ALL_THE_SAME: Outcome = Answers("answered all the same");
const CRASHED: Outcome = Fails(502, "server_crashed", "unknown");
const SILENT: Outcome = Fails(504, "deadline_exceeded", "unknown");

/// Runs a server of each kind, one after the other, beside one that behaves.
async fn none_harms_another(ways: &[Way]) {
    // One worker, so that all of them are on the same.
    let api = Deployment::builder().workers(1).start().await;
    api.add_fixture("bystander", &[], json!({})).await;
    // What is made only once is made before anything is counted.
    run(&api, &way("daemon", Answers(""))).await;
    let before = footprint::of(&api);
    for way in ways {
        run(&api, way).await;
        eventually(&format!("{}: all is as it was", way.mode), async || {
            footprint::growth(&before, &footprint::of(&api), KILOBYTES, SOCKETS).is_empty()
        })
        .await;
    }
    assert!(api.stop().await.success());
}

/// One hostile server from its registration to its removal.
async fn run(api: &Deployment, way: &Way) {
    println!("{}", way.mode);
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let mark = format!("{}-{}-{}", way.mode, std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let state = api.data().path().join(&mark);
    let mut flags = vec!["--hostile", way.mode, "--state-file", state.to_str().unwrap()];
    flags.extend(way.flags);
    let done = AtomicBool::new(false);
    let harm = async {
        let mut record = json!({"env": {"HOSTILE": mark}});
        if matches!(way.outcome, NotUp(_)) {
            record["startupTimeout"] = json!(2_000);
        }
        let server = api.register_fixture("hostile", &flags, record).await.ok().json()["server"].clone();
        let connected = server["status"] == "connected";
        assert_eq!(connected, !matches!(way.outcome, NotUp(_)), "{}: {server}", way.mode);
        if way.mode == "exit-after-list" {
            // A call that reaches it while it ends is another matter: nobody knows whether that was begun.
            eventually("its end is noticed, and another is started", async || {
                std::fs::read_to_string(&state).unwrap().lines().count() > 1
            })
            .await;
        }
        let limit = if matches!(way.outcome, Fails(504, ..)) { SHORT } else { LONG };
        let answer = misbehave(api, limit, json!({})).await;
        judge(way, &server, &answer);
        let started = started_by(way, &answer);
        // While its server runs it is nobody's business.
        assert!(started.is_none_or(alive), "{}: {}", way.mode, answer.text);
        api.delete("/mcp/servers/hostile").await.ok();
        // Neither a session of its own nor an empty environment saves what it started.
        eventually(&format!("{}: nothing of it is left", way.mode), async || {
            processes_with(&format!("HOSTILE={mark}")).is_empty() && !started.is_some_and(alive)
        })
        .await;
        done.store(true, Ordering::Relaxed);
    };
    let others = async {
        let mut count = 0;
        while !done.load(Ordering::Relaxed) {
            let text = format!("call {count} beside {}", way.mode);
            let args = json!({"text": text});
            assert_eq!(call(api, "bystander", "echo", args, LONG).await.tool_text(), text);
            count += 1;
        }
        assert!(count > 0);
    };
    tokio::join!(harm, others);
}

async fn call(api: &Deployment, server: &str, tool: &str, args: Value, limit: u64) -> Answer {
    let body = json!({"serverName": server, "methodName": tool, "args": args});
    let request = api.request(Method::POST, "/mcp/tool/call").json(&body);
    api.send(request.header("X-Request-Timeout-Ms", limit)).await
}

async fn misbehave(api: &Deployment, limit: u64, args: Value) -> Answer {
    call(api, "hostile", "misbehave", args, limit).await
}

#[track_caller]
fn judge(way: &Way, server: &Value, answer: &Answer) {
    let text = &answer.text;
    match way.outcome {
        Answers(wanted) => {
            assert_eq!(answer.status, 200, "{}: {text}", way.mode);
            assert!(text.contains(wanted), "{}: {text}", way.mode);
        }
        Fails(status, code, outcome) => {
            assert_eq!((answer.status, &*answer.code()), (status, code), "{}: {text}", way.mode);
            assert_eq!(answer.json()["outcome"], outcome, "{}: {text}", way.mode);
        }
        NotUp(why) => {
            assert!(server["logs"].to_string().contains(why), "{}: {server}", way.mode);
            assert_eq!(answer.json()["outcome"], "not_started", "{}: {text}", way.mode);
            // Which of them depends on whether the next attempt is under way already.
            let code = answer.code();
            assert!(["server_unavailable", "server_starting"].contains(&&*code), "{}: {text}", way.mode);
        }
    }
}

/// The process whose id was answered.
fn started_by(way: &Way, answer: &Answer) -> Option<i32> {
    way.mode.ends_with("daemon").then(|| answer.tool_text().parse().unwrap())
}

#[tokio::test]
async fn servers_that_do_not_come_up() {
    none_harms_another(&[
        Way { mode: "", flags: &["--exit-at-start", "7"], outcome: NotUp("exited with status 7") },
        way("exit-in-initialize", NotUp("exited with status 3 before it was ready")),
        Way { mode: "", flags: &["--never-initialize"], outcome: NotUp("within 2000 ms") },
        Way { mode: "", flags: &["--never-initialize", "--ignore-stop"], outcome: NotUp("within 2000 ms") },
        Way { mode: "", flags: &["--start-delay-ms", "60000"], outcome: NotUp("within 2000 ms") },
        way("never-list", NotUp("within 2000 ms")),
        way("many-tools", NotUp("more tools than a server may have")),
        way("leave-children", NotUp("exited with status 0 before it was ready")),
    ])
    .await;
}

#[tokio::test]
async fn servers_that_end() {
    none_harms_another(&[
        way("exit-after-list", ALL_THE_SAME),
        way("exit", CRASHED),
        way("exit-half-way", CRASHED),
        way("kill-self", CRASHED),
        way("abort", CRASHED),
        way("big-file", CRASHED),
        way("close-stdout", CRASHED),
        Way { mode: "close-stdout", flags: &["--ignore-stop"], outcome: CRASHED },
    ])
    .await;
}

#[tokio::test]
async fn servers_that_hang() {
    none_harms_another(&[
        way("hang", SILENT),
        Way { mode: "hang", flags: &["--linger"], outcome: SILENT },
        Way { mode: "hang", flags: &["--ignore-stop"], outcome: SILENT },
        way("stop-self", SILENT),
        Way { mode: "stop-self", flags: &["--wrapper"], outcome: SILENT },
        way("close-stdin", SILENT),
        way("slow-drip", SILENT),
    ])
    .await;
}

#[tokio::test]
async fn servers_whose_answers_are_none() {
    none_harms_another(&[
        way("giant-json", Fails(502, "result_too_large", "completed")),
        way("deep-json", Fails(502, "server_protocol_error", "completed")),
        way("invalid-utf8", Fails(502, "server_protocol_error", "unknown")),
        way("result-and-error", Fails(502, "mcp_error", "completed")),
        way("wrong-id", SILENT),
        way("negative-id", SILENT),
        way("string-id", SILENT),
        way("batch", SILENT),
        way("unknown-ids", ALL_THE_SAME),
        way("duplicate-answer", ALL_THE_SAME),
        way("endless-pages", ALL_THE_SAME),
    ])
    .await;
}

#[tokio::test]
async fn servers_that_flood() {
    none_harms_another(&[
        way("flood-unended", CRASHED),
        way("flood-garbage", ALL_THE_SAME),
        way("flood-notifications", ALL_THE_SAME),
        way("flood-list-changed", ALL_THE_SAME),
        way("flood-requests", ALL_THE_SAME),
        way("flood-requests-deaf", ALL_THE_SAME),
        way("flood-stderr", ALL_THE_SAME),
    ])
    .await;
}

#[tokio::test]
async fn servers_that_spread() {
    none_harms_another(&[
        way("daemon", Answers("")),
        Way { mode: "daemon", flags: &["--wrapper"], outcome: Answers("") },
        Way { mode: "daemon", flags: &["--wrapper", "--ignore-stop"], outcome: Answers("") },
        way("clean-daemon", Answers("")),
        way("fork-bomb", Answers("it begins")),
        Way { mode: "fork-bomb", flags: &["--wrapper", "--linger"], outcome: Answers("it begins") },
        way("memory-hog", Answers("268435456")),
        way("descriptors", Answers("")),
    ])
    .await;
}

/// What holds for every server: memory that runs out costs a server its life and not the worker, files have a size
/// that an accident does not exceed, and nothing leaves its memory in a file.
#[tokio::test]
async fn every_server_is_held_to_limits() {
    let api = Deployment::start().await;
    api.add_fixture("limited", &["--more"], json!({})).await;
    let server = api.pids("limited").await[0];
    let started =
        api.call("limited", "grandchild", json!({"escape": true})).await.tool_text().parse().unwrap();
    let score = |pid: i32| -> i32 {
        std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse().unwrap()
    };
    let own = api.owners().into_iter().map(score).max().unwrap();
    let limit = |pid: i32, name: &str| -> Vec<String> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{text}"));
        line.split_whitespace().take(2).map(str::to_owned).collect()
    };
    for pid in [server, started] {
        assert_eq!(score(pid), (own + limits::CHILD_OOM_SCORE).min(1_000));
        assert_eq!(limit(pid, "Max core file size"), ["0", "0"]);
        let soft: u64 = limit(pid, "Max file size")[0].parse().unwrap();
        assert!(soft <= limits::CHILD_FILE_BYTES);
    }
}

/// Calls `echo` until another process answers, and returns how those before that one ended.
async fn until_replaced(api: &Deployment, server: &str, old: i32, limit: u64) -> Vec<String> {
    let mut ends = Vec::new();
    let start = std::time::Instant::now();
    loop {
        assert!(start.elapsed() < 4 * crate::deployment::PATIENCE, "it was not replaced: {ends:?}");
        let answer = call(api, server, "echo", json!({"text": "hi"}), limit).await;
        if answer.status == 200 {
            assert_eq!(answer.tool_text(), "hi");
            assert!(!alive(old));
            return ends;
        }
        ends.push(answer.code());
    }
}

/// Whoever keeps calling a process that is stopped as a whole never lets it be idle. It is replaced all the same, and
/// before that everybody is told the truth.
#[tokio::test]
async fn a_process_that_says_nothing_any_more_is_replaced() {
    let api = Deployment::builder().workers(1).start().await;
    let flags = ["--hostile", "stop-self", "--wrapper"];
    api.add_fixture("hostile", &flags, json!({"toolTimeout": 2_000})).await;
    let old = api.pids("hostile").await[0];
    misbehave(&api, LONG, json!({})).await.fails(504, "deadline_exceeded");
    // There is always somebody who waits.
    let callers = (0..4).map(|_| until_replaced(&api, "hostile", old, 2_000));
    for ends in futures_util::future::join_all(callers).await {
        let known = ["deadline_exceeded", "server_stopped", "server_starting"];
        assert!(ends.iter().all(|end| known.contains(&&**end)), "{ends:?}");
    }
    let logs = api.server("hostile").await["logs"].to_string();
    assert!(logs.contains("the process says nothing any more"), "{logs}");
    assert_eq!(api.metric("mcp_server_exits_total{reason=\"stuck\"}").await, 1.0);
}

/// A server with one thread says nothing while a tool takes its time, and does not even answer a ping. What matters
/// is whether anybody may still wait for it.
#[tokio::test]
async fn a_process_that_is_only_busy_is_left_alone() {
    let api = Deployment::builder().workers(1).start().await;
    api.add_fixture("hostile", &["--hostile", "block"], json!({})).await;
    let old = api.pids("hostile").await;
    let longer = limits::PING_INTERVAL * (limits::PINGS_MISSED + 2);
    let millis = u64::try_from(longer.as_millis()).unwrap();
    let (busy, given_up) = tokio::join!(misbehave(&api, 2 * millis, json!({"ms": millis})), async {
        // That the call is in flight does not mean that the process has read it.
        eventually("the process is busy", async || {
            api.server("hostile").await["logs"].to_string().contains("blocked")
        })
        .await;
        // It is given up, and the process does not even hear of it.
        call(&api, "hostile", "echo", json!({"text": "hi"}), SHORT).await
    });
    given_up.fails(504, "deadline_exceeded");
    assert!(busy.ok().text.contains("answered all the same"));
    assert_eq!(api.pids("hostile").await, old);
}

/// Whoever runs a server is told what nobody else hears of.
#[tokio::test]
async fn floods_are_noted_in_their_servers_log() {
    let api = Deployment::start().await;
    api.add_fixture("noisy", &["--more"], json!({})).await;
    assert_eq!(api.call("noisy", "garbage", json!({"lines": 20_000})).await.tool_text(), "garbage");
    let body =
        json!({"serverName": "noisy", "methodName": "progress", "args": {"steps": 20_000, "delayMs": 0}});
    let request = api.request(Method::POST, "/mcp/tool/call").header("Accept", "text/event-stream");
    assert!(api.send(request.json(&body)).await.ok().text.contains("event: result"));
    let logs = api.server("noisy").await["logs"].to_string();
    for note in ["that are no messages", "reports progress more than 1000 times a second"] {
        assert!(logs.contains(note), "{note}: {logs}");
    }
    // In the end it is said how much there was.
    let pid = api.pids("noisy").await[0];
    api.call("noisy", "crash", json!({})).await.fails(502, "server_crashed");
    eventually("it is said how much was ignored", async || {
        !alive(pid)
            && api.server("noisy").await["logs"].to_string().contains("meant nothing and were ignored")
    })
    .await;
}
