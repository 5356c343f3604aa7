//! Remote servers that go away, come back, lose streams and take too long. What was sent is never sent again.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    deployment::{Deployment, eventually},
    remote::{add, permitting, record, remote, streamed},
};

/// No second attempt.
fn at_once() -> Value {
    json!({"reconnectionOptions": {"initialReconnectionDelay": 10, "maxRetries": 0}})
}

fn has_no_doubles(executed: &[String]) {
    let different: BTreeSet<&String> = executed.iter().collect();
    assert_eq!(different.len(), executed.len(), "{executed:?}");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said_to_be_and_comes_back_by_itself() {
    let mut remote = remote(&[]);
    let api = permitting().start().await;
    add(&api, "remote", &remote, at_once()).await;
    remote.kill();
    for _ in 0..3 {
        let answer =
            api.call("remote", "echo", json!({"text": "x"})).await.fails(502, "upstream_unavailable");
        assert_eq!(answer.json()["outcome"], "not_started", "{}", answer.text);
        assert!(answer.headers.contains_key("retry-after"), "{:?}", answer.headers);
    }
    remote.restart();
    eventually("it is back", async || {
        api.call("remote", "echo", json!({"text": "back"})).await.status == 200
    })
    .await;
    // Registered while it is away, it is there when it is.
    remote.kill();
    let added = api.post("/mcp/servers", &record("later", &remote, &at_once())).await.ok().json();
    assert_ne!(added["server"]["status"], "connected", "{added}");
    api.call("later", "echo", json!({"text": "x"})).await.fails(502, "upstream_unavailable");
    remote.restart();
    eventually("it is there", async || api.call("later", "echo", json!({"text": "x"})).await.status == 200)
        .await;
}

#[tokio::test]
async fn a_call_waits_for_a_server_that_is_just_starting() {
    let mut remote = remote(&[]);
    let api = permitting().start().await;
    let patient = json!({"reconnectionOptions": {"initialReconnectionDelay": 50, "maxReconnectionDelay": 100,
        "maxRetries": 300}});
    add(&api, "remote", &remote, patient).await;
    remote.kill();
    let call = api.call("remote", "args", json!({"n": 1}));
    let restart = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        remote.restart();
    };
    let (answer, ()) = tokio::join!(call, restart);
    assert_eq!(answer.tool_text(), r#"{"n":1}"#);
    assert_eq!(remote.executed().len(), 1, "{:?}", remote.executed());
}

#[tokio::test]
async fn restarts_under_load_repeat_nothing() {
    let files = tempfile::tempdir().unwrap();
    let sessions = files.path().join("sessions");
    for kept in [false, true] {
        let flags: Vec<&str> = if kept { vec!["--session-file", sessions.to_str().unwrap()] } else { vec![] };
        let mut remote = remote(&flags);
        let api = permitting().start().await;
        add(&api, "remote", &remote, json!({})).await;
        let (over, number) = (AtomicBool::new(false), AtomicUsize::new(0));
        let caller = async |user: String| {
            let mut done = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let n = number.fetch_add(1, Ordering::Relaxed);
                let answer = api.call_as(&user, "remote", "args", json!({"n": n, "user": user})).await;
                match answer.status {
                    200 => done.push(n),
                    502 => {
                        let (code, outcome) = (answer.code(), answer.json()["outcome"].clone());
                        let lost = code == "upstream_lost" && outcome == "unknown";
                        let away = code == "upstream_unavailable" && outcome == "not_started";
                        assert!(lost || away, "{}", answer.text);
                    }
                    _ => panic!("{}", answer.text),
                }
            }
            done
        };
        let callers = futures_util::future::join_all((0..8).map(|n| caller(format!("user-{n}"))));
        let restarts = async {
            for _ in 0..4 {
                let so_far = number.load(Ordering::Relaxed);
                eventually("calls go on", async || number.load(Ordering::Relaxed) > so_far + 40).await;
                remote.restart();
            }
            let so_far = number.load(Ordering::Relaxed);
            eventually("calls go on", async || number.load(Ordering::Relaxed) > so_far + 40).await;
            over.store(true, Ordering::Relaxed);
        };
        let (done, ()) = tokio::join!(callers, restarts);
        let done: Vec<usize> = done.into_iter().flatten().collect();
        let executed = remote.executed();
        has_no_doubles(&executed);
        for n in &done {
            let prefix = format!(r#"args {{"n":{n},"#);
            assert!(
                executed.iter().any(|line| line.starts_with(&prefix)),
                "{n} was answered but not executed"
            );
        }
        // Whose connection was being made when the server went may have to wait out the pause after that.
        for n in 0..8 {
            let user = format!("user-{n}");
            eventually("everybody is served", async || {
                api.call_as(&user, "remote", "echo", json!({"text": "x"})).await.status == 200
            })
            .await;
        }
    }
}

#[tokio::test]
async fn a_call_that_was_sent_and_lost_is_unknown_and_not_repeated() {
    let api = permitting().start().await;
    let kinds: [(&str, &[&str]); 4] = [
        ("json", &["--answer", "json"]),
        ("stream", &[]),
        ("modern", &["--era", "stateless"]),
        ("sse", &["--era", "sse-only"]),
    ];
    for (name, flags) in kinds {
        let mut remote = remote(flags);
        add(&api, name, &remote, json!({})).await;
        let answer = api.call(name, "crash", json!({"which": name})).await.fails(502, "upstream_lost");
        assert_eq!(answer.json()["outcome"], "unknown", "{}", answer.text);
        remote.restart();
        eventually("it is back", async || api.call(name, "echo", json!({"text": "x"})).await.status == 200)
            .await;
        let crashes = remote.executed().iter().filter(|line| line.starts_with("crash")).count();
        assert_eq!(crashes, 1, "{name}: {:?}", remote.executed());
    }
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_taken_up_again() {
    let api = permitting().start().await;
    for how in ["clean", "abrupt"] {
        let remote = remote(&["--resumable", "--drop", how, "--retry-ms", "30"]);
        add(&api, how, &remote, json!({})).await;
        let events = streamed(&api, how, "progress", json!({"steps": 3, "delayMs": 50})).await;
        let (last, _) = events.split_last().unwrap();
        assert_eq!(last.0, "result", "{how}: {events:?}");
        assert_eq!(events.len(), 4, "{how}: {events:?}");
        let resumed = remote.seen().iter().filter(|seen| seen.headers.contains_key("last-event-id")).count();
        assert_eq!((resumed, remote.executed().len()), (1, 1), "{how}");
    }
    // In the middle, again and again.
    let remote = remote(&["--resumable", "--retry-ms", "10"]);
    add(&api, "middle", &remote, json!({})).await;
    let call = streamed(&api, "middle", "progress", json!({"steps": 40, "delayMs": 25}));
    let drops = async {
        eventually("the call runs", async || remote.executed().len() == 1).await;
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            remote.drop_streams();
        }
    };
    let (events, ()) = tokio::join!(call, drops);
    let steps: Vec<_> = events.iter().filter_map(|(_, data)| data["progress"].as_u64()).collect();
    assert_eq!(steps, (1..=40).collect::<Vec<u64>>(), "each step once, and none is missing");
    assert_eq!(events.last().unwrap().0, "result");
    assert_eq!(remote.executed().len(), 1);
}

#[tokio::test]
async fn a_stream_that_cannot_be_taken_up_again_is_lost() {
    let api = permitting().start().await;
    let kinds: [(&str, &[&str]); 3] =
        [("stream", &[]), ("modern", &["--era", "stateless"]), ("sse", &["--era", "sse-only"])];
    for (name, flags) in kinds {
        let remote = remote(flags);
        add(&api, name, &remote, json!({})).await;
        let call = api.call(name, "sleep", json!({"ms": 20_000}));
        let cut = async {
            eventually("the call runs", async || remote.executed().len() == 1).await;
            remote.drop_streams();
        };
        let (answer, ()) = tokio::join!(call, cut);
        let answer = answer.fails(502, "upstream_lost");
        assert_eq!(answer.json()["outcome"], "unknown", "{name}: {}", answer.text);
        assert_eq!(api.call(name, "echo", json!({"text": "on"})).await.tool_text(), "on", "{name}");
        assert_eq!(remote.executed().len(), 2, "{name}: {:?}", remote.executed());
    }
}

#[tokio::test]
async fn a_call_that_takes_too_long_is_cancelled_over_there() {
    let api = permitting().start().await;
    let kinds: [(&str, &[&str]); 5] = [
        ("json", &["--answer", "json"]),
        ("stream", &[]),
        ("sse", &["--era", "sse-only"]),
        ("modern", &["--era", "stateless"]),
        ("modern-json", &["--era", "stateless", "--answer", "json"]),
    ];
    for (name, flags) in kinds {
        let remote = remote(flags);
        add(&api, name, &remote, json!({"toolTimeout": 500})).await;
        let start = Instant::now();
        let answer =
            api.call(name, "cancellable", json!({"ms": 20_000})).await.fails(504, "deadline_exceeded");
        assert!(start.elapsed() < Duration::from_secs(5), "{name}: {:?}", start.elapsed());
        assert_eq!(answer.json()["outcome"], "unknown", "{name}: {}", answer.text);
        eventually("the server was told", async || match name {
            "modern" | "modern-json" => {
                let gone = |seen: &mcp_shared::testing::remote::Seen| {
                    seen.method == "GONE" && seen.rpc.as_deref() == Some("tools/call")
                };
                remote.seen().iter().any(gone)
            }
            _ => remote.count("notifications/cancelled") == 1,
        })
        .await;
        // The fixture has understood it.
        if !name.starts_with("modern") {
            assert_ne!(api.call(name, "cancelled", json!({})).await.tool_text(), "[]", "{name}");
        }
    }
}

#[tokio::test]
async fn a_caller_who_leaves_cancels_the_call() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    add(&api, "remote", &remote, json!({})).await;
    // Leaves once the server has the call: one that was never sent needs no cancelling.
    tokio::select! {
        answer = api.call("remote", "cancellable", json!({"ms": 20_000})) => panic!("{answer:?}"),
        () = eventually("the server has the call", async || remote.count("tools/call") == 1) => {}
    }
    eventually("the server was told", async || remote.count("notifications/cancelled") == 1).await;
}

#[tokio::test]
async fn slow_answers_are_waited_for() {
    let remote = remote(&["--delay-ms", "400"]);
    let api = permitting().start().await;
    add(&api, "slow", &remote, json!({})).await;
    assert_eq!(api.call("slow", "sleep", json!({"ms": 1_000})).await.tool_text(), "slept 1000");
}

#[tokio::test]
async fn the_program_stops_while_a_remote_server_says_nothing() {
    let remote = remote(&[]);
    let api: Deployment = permitting().start().await;
    add(&api, "remote", &remote, json!({"toolTimeout": 2_000})).await;
    api.call("remote", "hang", json!({})).await.fails(504, "deadline_exceeded");
    let start = Instant::now();
    assert!(api.stop().await.success());
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}
