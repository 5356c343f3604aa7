//! The life of a server: started once however many call, listed, replaced when it dies, left alone
//! where nothing asks for a new process, stopped when nobody needs it.

use std::{collections::BTreeSet, path::Path, time::Instant};

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::deployment::{Answer, Deployment, alive, eventually};

/// Far above what an answer "at once" takes on a busy machine, far below every time limit that a test
/// would otherwise run into.
const SOON: std::time::Duration = std::time::Duration::from_secs(10);

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().count()
}

async fn status(api: &Deployment, server: &str) -> String {
    api.server(server).await["status"].as_str().unwrap().to_owned()
}

async fn becomes(api: &Deployment, server: &str, wanted: &str) {
    eventually(&format!("{server} is {wanted}"), async || status(api, server).await == wanted).await;
}

async fn logs(api: &Deployment, server: &str) -> String {
    api.server(server).await["logs"].to_string()
}

/// The names of a server's tools as `GET /mcp/tools` lists them.
async fn listed(api: &Deployment, server: &str) -> Vec<String> {
    let all = api.get("/mcp/tools").await.ok().json();
    let of_server = all["tools"].as_array().unwrap().iter().find_map(|one| one.get(server));
    let tools = of_server.unwrap_or(&Value::Null).as_array().cloned().unwrap_or_default();
    tools.iter().map(|tool| tool["name"].as_str().unwrap().to_owned()).collect()
}

/// Calls `echo` with a time limit in milliseconds.
async fn echo_within(api: &Deployment, server: &str, millis: u64) -> Answer {
    let body = json!({"serverName": server, "methodName": "echo", "args": {"text": "hi"}});
    let request = api.request(Method::POST, "/mcp/tool/call").json(&body);
    api.send(request.header("X-Request-Timeout-Ms", millis)).await
}

async fn echoes(api: &Deployment, server: &str) {
    assert_eq!(api.call(server, "echo", json!({"text": "hi"})).await.tool_text(), "hi");
}

#[tokio::test]
async fn callers_at_once_share_one_start() {
    let api = Deployment::start().await;
    let starts = api.data().path().join("starts");
    let flags = ["--start-file", starts.to_str().unwrap(), "--start-delay-ms", "300"];
    api.add_fixture("idle", &flags, json!({"idleTimeout": 1_000})).await;
    becomes(&api, "idle", "disconnected").await;
    assert_eq!(lines(&starts), 1);
    let calls = (0..50).map(|n| api.call("idle", "args", json!({"n": n})));
    for (n, answer) in join_all(calls).await.into_iter().enumerate() {
        assert_eq!(answer.tool_text(), format!(r#"{{"n":{n}}}"#));
    }
    assert_eq!(lines(&starts), 2);
}

#[tokio::test]
async fn an_idle_server_sleeps_until_it_is_called() {
    let api = Deployment::start().await;
    api.add_fixture("idle", &[], json!({"idleTimeout": 300})).await;
    let first = api.pids("idle").await;
    becomes(&api, "idle", "disconnected").await;
    eventually("the process is gone", async || !alive(first[0])).await;
    // Its tools can still be looked at, which does not wake it.
    assert_eq!(listed(&api, "idle").await.len(), 5);
    assert_eq!(api.server("idle").await["instances"], json!([]));
    // A call keeps it awake for as long as it takes.
    assert_eq!(api.call("idle", "sleep", json!({"ms": 1_000})).await.tool_text(), "slept 1000");
    echoes(&api, "idle").await;
    becomes(&api, "idle", "disconnected").await;
    let server = api.server("idle").await;
    assert!(!server["logs"].to_string().contains("exited"), "sleeping is no failure: {server}");
}

#[tokio::test]
async fn tools_are_listed_page_by_page() {
    let api = Deployment::start().await;
    let whole = api.add_fixture("whole", &["--more"], json!({})).await;
    let paged = api.add_fixture("paged", &["--more", "--pages", "3"], json!({})).await;
    assert_eq!(whole["toolsList"].as_array().unwrap().len(), 36);
    assert_eq!(whole["toolsList"], paged["toolsList"]);
    assert_eq!(listed(&api, "whole").await, listed(&api, "paged").await);
    let none = api.add_fixture("none", &["--no-tools"], json!({})).await;
    assert_eq!(none["toolsList"], json!([]));
}

#[tokio::test]
async fn a_new_tool_shows_up_by_itself() {
    let api = Deployment::start().await;
    api.add_fixture("grows", &["--more"], json!({})).await;
    for n in 1..=3 {
        let name = api.call("grows", "add_tool", json!({})).await.tool_text();
        assert_eq!(name, format!("added_{n}"));
        eventually("the new tool is listed", async || listed(&api, "grows").await.contains(&name)).await;
        assert_eq!(api.call("grows", &name, json!({})).await.tool_text(), name);
    }
    assert_eq!(listed(&api, "grows").await.len(), 39);
}

#[tokio::test]
async fn a_crash_ends_its_calls_at_once_and_only_them() {
    let api = Deployment::start().await;
    api.add_fixture("crashes", &["--more"], json!({})).await;
    api.add_fixture("other", &[], json!({})).await;
    let first = api.pids("crashes").await;
    // From here on nothing has to be read before a call goes to its server.
    echoes(&api, "crashes").await;
    let start = Instant::now();
    let (sleeping, crashing, other) = tokio::join!(
        api.call("crashes", "sleep", json!({"ms": 50_000})),
        async {
            eventually("the other call is in flight", async || {
                api.server("crashes").await["instances"][0]["inFlight"] == 1
            })
            .await;
            api.call("crashes", "crash", json!({})).await
        },
        api.call("other", "sleep", json!({"ms": 500})),
    );
    for answer in [sleeping, crashing] {
        let body = answer.fails(502, "server_crashed").json();
        assert_eq!(body["outcome"], "unknown");
        assert_eq!(body["serverName"], "crashes");
    }
    assert!(start.elapsed() < SOON, "it took {:?}", start.elapsed());
    assert_eq!(other.tool_text(), "slept 500");

    echoes(&api, "crashes").await;
    let server = api.server("crashes").await;
    assert_eq!(server["status"], "connected");
    assert_ne!(api.pids("crashes").await, first);
    assert!(server["logs"].to_string().contains("exited with status 3"), "{server}");
    let last = server["instances"][0]["lastError"].as_str().unwrap_or_default();
    assert!(last.contains("exited with status 3"), "{server}");
}

#[tokio::test]
async fn a_call_beside_a_crash_is_answered_or_honestly_lost() {
    let api = Deployment::start().await;
    api.add_fixture("crashes", &["--more"], json!({})).await;
    for _ in 0..3 {
        // The process dies in the middle of these, so that some find it gone and some find it dying.
        let calls = (0..20).map(|n| {
            let tool = if n == 10 { "answer_then_crash" } else { "echo" };
            api.call("crashes", tool, json!({"text": "hi"}))
        });
        for answer in join_all(calls).await {
            if answer.status != 200 {
                assert_eq!(answer.fails(502, "server_crashed").json()["outcome"], "unknown");
            }
        }
    }
    echoes(&api, "crashes").await;
}

#[tokio::test]
async fn the_last_answer_of_a_dying_server_is_delivered() {
    let api = Deployment::start().await;
    api.add_fixture("dying", &["--more"], json!({})).await;
    let pid = api.pids("dying").await[0];
    let answer = api.call("dying", "answer_then_crash", json!({})).await;
    assert_eq!(answer.tool_text(), "last words");
    eventually("it is replaced", async || {
        let pids = api.pids("dying").await;
        pids.len() == 1 && pids[0] != pid
    })
    .await;
    echoes(&api, "dying").await;
}

#[tokio::test]
async fn a_server_that_cannot_start_is_kept_and_says_why() {
    let api = Deployment::start().await;
    let starts = api.data().path().join("starts");
    let flags = ["--exit-at-start", "7", "--start-file", starts.to_str().unwrap()];
    let server = api.register_fixture("broken", &flags, json!({})).await.ok().json()["server"].clone();
    assert_eq!(server["status"], "error");
    assert_eq!(server["enabled"], true);
    assert!(server["logs"].to_string().contains("cannot start: missing setting"), "{server}");
    let error = server["instances"][0]["lastError"].as_str().unwrap();
    assert!(error.contains("status 7") && error.contains("missing setting"), "{error}");

    // It is tried again, less and less often.
    eventually("it was tried again", async || lines(&starts) >= 3).await;
    let start = Instant::now();
    let answer = api.call("broken", "echo", json!({"text": "hi"})).await.fails(502, "server_unavailable");
    assert!(start.elapsed() < SOON, "it took {:?}", start.elapsed());
    assert_eq!(answer.json()["outcome"], "not_started");
    let wait: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    assert_eq!(status(&api, "broken").await, "error");

    // Whoever mends it need not wait for the next attempt.
    let args = crate::deployment::fixture("broken", &[])["args"].clone();
    let server = api.put("/mcp/servers/broken", Some(&json!({"args": args}))).await.ok().json();
    assert_eq!(server["server"]["status"], "connected", "{server}");
    echoes(&api, "broken").await;
}

#[tokio::test]
async fn a_crash_loop_is_slowed_down() {
    let api = Deployment::start().await;
    let starts = api.data().path().join("starts");
    let flags = ["--crash-after", "0", "--start-file", starts.to_str().unwrap()];
    api.add_fixture("loops", &flags, json!({})).await;
    // The first one is replaced without a pause, the others after a growing one.
    for _ in 0..2 {
        let answer = echo_within(&api, "loops", 20_000).await.fails(502, "server_crashed");
        assert_eq!(answer.json()["outcome"], "unknown");
    }
    eventually("a call cannot wait for the next start", async || {
        let answer = echo_within(&api, "loops", 50).await;
        match answer.code().as_str() {
            "server_unavailable" => {
                assert_eq!(answer.json()["outcome"], "not_started");
                assert!(answer.headers.contains_key("retry-after"));
                true
            }
            code => {
                assert!(["server_crashed", "server_starting", "deadline_exceeded"].contains(&code), "{code}");
                false
            }
        }
    })
    .await;
    // One that can wait does.
    echo_within(&api, "loops", 20_000).await.fails(502, "server_crashed");
    let tries = lines(&starts);
    assert!(tries < 10, "{tries} starts");
}

#[tokio::test]
async fn a_server_that_failed_once_recovers_by_itself() {
    let api = Deployment::start().await;
    let state = api.data().path().join("state");
    let flags = ["--fail-first", "1", "--state-file", state.to_str().unwrap()];
    let server = api.register_fixture("moody", &flags, json!({})).await.ok().json()["server"].clone();
    assert_eq!(server["status"], "error");
    assert!(server["logs"].to_string().contains("failure 1 of 1"), "{server}");
    becomes(&api, "moody", "connected").await;
    assert_eq!(listed(&api, "moody").await.len(), 5);
    echoes(&api, "moody").await;
    assert!(logs(&api, "moody").await.contains("failure 1 of 1"), "what happened can still be read");
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let api = Deployment::start().await;
    let starts = api.data().path().join("starts");
    let flags = ["--never-initialize", "--start-file", starts.to_str().unwrap()];
    let start = Instant::now();
    let answer = api.register_fixture("silent", &flags, json!({"startupTimeout": 500})).await.ok();
    assert!(start.elapsed() < SOON, "it took {:?}", start.elapsed());
    let server = answer.json()["server"].clone();
    assert_eq!(server["status"], "error");
    assert!(server["logs"].to_string().contains("within 500 ms"), "{server}");
    let first: i32 = std::fs::read_to_string(&starts).unwrap().lines().next().unwrap().parse().unwrap();
    assert!(!alive(first));
}

#[tokio::test]
async fn a_refused_listing_is_an_error() {
    let api = Deployment::start().await;
    let answer = api.register_fixture("refuses", &["--list-error"], json!({})).await.ok();
    let server = answer.json()["server"].clone();
    assert_eq!(server["status"], "error");
    assert!(server["logs"].to_string().contains("The tools cannot be listed"), "{server}");
}

#[tokio::test]
async fn a_call_waits_for_a_slow_start_within_its_time() {
    let api = Deployment::start().await;
    let flags = ["--start-delay-ms", "6000"];
    api.add_fixture("slow", &flags, json!({"idleTimeout": 300})).await;
    becomes(&api, "slow", "disconnected").await;
    let answer = echo_within(&api, "slow", 2_000).await.fails(503, "server_starting");
    assert_eq!(answer.json()["outcome"], "not_started");
    assert_eq!(answer.json()["retryable"], true);
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(echo_within(&api, "slow", 20_000).await.tool_text(), "hi");
}

#[tokio::test]
async fn only_what_concerns_the_process_restarts_it() {
    let api = Deployment::start().await;
    api.add_fixture("kept", &["--more"], json!({})).await;
    let first = api.pids("kept").await;
    api.call("kept", "remember", json!({"value": "mine"})).await.ok();
    for change in [
        json!({"description": "other"}),
        json!({"displayName": "Kept"}),
        json!({"secretNames": ["TOKEN"]}),
        json!({"toolTimeout": 20_000, "startupTimeout": 30_000}),
        json!({"idleTimeout": 600_000}),
        json!({}),
    ] {
        let server = api.put("/mcp/servers/kept", Some(&change)).await.ok().json()["server"].clone();
        assert_eq!(server["status"], "connected");
        assert_eq!(api.pids("kept").await, first, "{change}");
    }
    api.put("/mcp/servers/kept/enable", None).await.ok();
    assert_eq!(api.pids("kept").await, first, "it was enabled before");
    assert_eq!(api.call("kept", "recall", json!({})).await.tool_text(), "mine");

    let mut last = first;
    let args = crate::deployment::fixture("kept", &["--more", "--pages", "2"])["args"].clone();
    for change in [json!({"args": args}), json!({"env": {"A": "1"}}), json!({"concurrency": 3})] {
        let server = api.put("/mcp/servers/kept", Some(&change)).await.ok().json()["server"].clone();
        assert_eq!(server["status"], "connected", "{server}");
        let now = api.pids("kept").await;
        assert_ne!(now, last, "{change}");
        assert!(!alive(last[0]));
        last = now;
    }
    assert_eq!(api.call("kept", "recall", json!({})).await.tool_text(), "null");
}

#[tokio::test]
async fn a_restart_loses_no_call() {
    let api = Deployment::start().await;
    api.add_fixture("busy", &[], json!({})).await;
    let changes = async {
        for n in 0..4 {
            let change = json!({"env": {"N": n.to_string()}});
            let server = api.put("/mcp/servers/busy", Some(&change)).await.ok().json()["server"].clone();
            assert_eq!(server["status"], "connected", "{server}");
        }
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    let callers = join_all((0..8).map(|_| async {
        let mut count = 0;
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            assert_eq!(api.call("busy", "sleep", json!({"ms": 20})).await.tool_text(), "slept 20");
            count += 1;
        }
        count
    }));
    let (counts, ()) = tokio::join!(callers, async {
        changes.await;
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}

#[tokio::test]
async fn disabled_servers_answer_409_until_they_are_enabled() {
    let api = Deployment::start().await;
    api.add_fixture("switched", &[], json!({})).await;
    let server = api.put("/mcp/servers/switched/disable", None).await.ok().json()["server"].clone();
    assert_eq!((&server["enabled"], &server["status"]), (&json!(false), &json!("disconnected")));
    assert_eq!(server["instances"], json!([]));
    let answer = api.call("switched", "echo", json!({"text": "hi"})).await.fails(409, "server_disabled");
    assert_eq!(answer.json()["outcome"], "not_started");
    assert!(!api.get("/mcp/tools").await.ok().text.contains("switched"));
    let server = api.put("/mcp/servers/switched/enable", None).await.ok().json()["server"].clone();
    assert_eq!((&server["enabled"], &server["status"]), (&json!(true), &json!("connected")));
    echoes(&api, "switched").await;

    // One that is registered as disabled is not started.
    let answer = api.register_fixture("off", &[], json!({"enabled": false})).await.ok();
    assert_eq!(answer.json()["server"]["status"], "disconnected");
    assert!(api.pids("off").await.is_empty());
}

#[tokio::test]
async fn a_server_of_the_stateless_protocol_works() {
    let api = Deployment::start().await;
    let flags = ["--modern-only", "--more", "--pages", "2"];
    let server = api.add_fixture("modern", &flags, json!({})).await;
    assert_eq!(server["toolsList"].as_array().unwrap().len(), 36);
    echoes(&api, "modern").await;
    let answer = api.call("modern", "args", json!({"n": 1.0})).await;
    assert_eq!(answer.json()["data"]["resultType"], "complete");
    assert_eq!(answer.tool_text(), r#"{"n":1.0}"#);
}

#[tokio::test]
async fn tools_are_known_before_their_server_is_up() {
    let api = Deployment::start().await;
    api.add_fixture("slow", &["--start-delay-ms", "2000"], json!({})).await;
    api.add_fixture("off", &[], json!({})).await;
    api.put("/mcp/servers/off/disable", None).await.ok();
    let data = api.data();
    api.stop().await;

    let api = Deployment::builder().data(&data).start().await;
    assert_eq!(listed(&api, "slow").await.len(), 5);
    let server = api.server("slow").await;
    assert_eq!(server["toolsList"].as_array().unwrap().len(), 5);
    assert_ne!(server["status"], "connected");
    becomes(&api, "slow", "connecting").await;
    // What is disabled is not offered, but can be looked at.
    assert!(listed(&api, "off").await.is_empty());
    assert_eq!(api.server("off").await["toolsList"].as_array().unwrap().len(), 5);
    assert!(api.pids("off").await.is_empty());
    // A call waits for the start that is under way.
    echoes(&api, "slow").await;
}

#[tokio::test]
async fn reports_say_what_runs() {
    let api = Deployment::start().await;
    api.add_fixture("seen", &[], json!({"instances": 2})).await;
    let before = api.server("seen").await["instances"].clone();
    let (answer, ()) = tokio::join!(api.call("seen", "sleep", json!({"ms": 1_000})), async {
        eventually("one call is in flight", async || {
            let instances = api.server("seen").await["instances"].clone();
            let counts: Vec<_> =
                instances.as_array().unwrap().iter().map(|one| one["inFlight"].as_u64()).collect();
            assert!(counts.iter().all(Option::is_some), "{instances}");
            counts.iter().flatten().sum::<u64>() == 1
        })
        .await;
    });
    answer.ok();
    let server = api.server("seen").await;
    let instances = server["instances"].as_array().unwrap();
    assert_eq!(instances.len(), 2);
    let pids: BTreeSet<_> = instances.iter().map(|one| one["pid"].as_i64().unwrap()).collect();
    assert_eq!(pids.len(), 2);
    for (one, before) in instances.iter().zip(before.as_array().unwrap()) {
        assert_eq!(one["status"], "connected");
        assert_eq!(one["inFlight"], 0);
        assert_eq!(one["since"], before["since"]);
        assert!(one["since"].as_str().unwrap().ends_with('Z'), "{one}");
        assert_eq!(one["workerId"], instances[0]["workerId"]);
        assert!(!one["workerId"].as_str().unwrap().is_empty());
        assert_eq!(one.get("lastError"), None);
    }
    let all = api.get("/mcp/servers").await.ok().json();
    assert_eq!(all["servers"][0]["instances"].as_array().unwrap().len(), 2);
    assert_eq!(all["servers"][0]["status"], "connected");
}

#[tokio::test]
async fn one_of_several_processes_is_replaced_while_the_others_serve() {
    let api = Deployment::start().await;
    api.add_fixture("three", &["--more"], json!({"instances": 3})).await;
    let before: BTreeSet<_> = api.pids("three").await.into_iter().collect();
    assert_eq!(before.len(), 3);
    api.call("three", "crash", json!({})).await.fails(502, "server_crashed");
    for _ in 0..20 {
        echoes(&api, "three").await;
    }
    eventually("there are three again", async || {
        api.pids("three").await.iter().filter(|pid| alive(**pid)).count() == 3
    })
    .await;
    let after: BTreeSet<_> = api.pids("three").await.into_iter().collect();
    assert_eq!(before.intersection(&after).count(), 2);
}

/// A process can close its standard input and live on. It would never see another call.
#[tokio::test]
async fn a_server_that_stops_reading_for_good_is_replaced() {
    let api = Deployment::builder().env("COMMANDS_ALLOW", "*,sh").start().await;
    let starts = api.data().path().join("starts");
    let script = r#"
        echo start >>"$STARTS"
        read -r initialize
        echo '{"jsonrpc":"2.0","id":1,"result":{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"sh","version":"1"}}}'
        read -r initialized
        read -r list
        echo '{"jsonrpc":"2.0","id":2,"result":{"tools":[]}}'
        if [ "$(wc -l <"$STARTS")" -eq 1 ]; then exec 0<&-; exec sleep 300; fi
        read -r call
        echo '{"jsonrpc":"2.0","id":3,"result":{"content":[{"type":"text","text":"from the second"}]}}'
        read -r end
    "#;
    let body = json!({"name": "deaf", "command": "sh", "args": ["-c", script], "env": {"STARTS": starts}});
    let server = api.post("/mcp/servers", &body).await.ok().json()["server"].clone();
    assert_eq!(server["status"], "connected", "{server}");
    let input = format!("/proc/{}/fd/0", api.pids("deaf").await[0]);
    eventually("its input is closed", async || !Path::new(&input).exists()).await;
    eventually("a call works", async || api.call("deaf", "any", json!({})).await.status == 200).await;
    assert_eq!(lines(&starts), 2);
}

/// Sends a request without a body, and leaves the answer to whoever holds the connection.
async fn begin(api: &Deployment, method: &str, path: &str) -> tokio::net::TcpStream {
    use tokio::io::AsyncWriteExt;

    let mut stream = tokio::net::TcpStream::connect(api.address()).await.unwrap();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

/// A sender who hangs up in the middle of a change, here while a server takes its time to stop, leaves no
/// server behind that can neither be used nor brought back.
#[tokio::test]
async fn a_sender_who_hangs_up_leaves_no_half_change() {
    let api = Deployment::start().await;
    api.add_fixture("slow", &["--ignore-stop"], json!({})).await;
    let old = api.pids("slow").await[0];
    let sender = begin(&api, "PUT", "/mcp/servers/slow/disable").await;
    eventually("the change is stored", async || api.server("slow").await["enabled"] == false).await;
    assert!(alive(old), "the server left before anybody could hang up");
    drop(sender);
    api.put("/mcp/servers/slow/enable", None).await.ok();
    assert_eq!(api.call("slow", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    assert!(!alive(old));

    let new = api.pids("slow").await[0];
    let sender = begin(&api, "DELETE", "/mcp/servers/slow").await;
    eventually("it is deleted", async || api.get("/mcp/servers/slow").await.status == 404).await;
    drop(sender);
    eventually("its process is gone", async || !alive(new)).await;
    api.call("slow", "echo", json!({"text": "hi"})).await.fails(404, "server_not_found");
}

/// A server that may run only once has one process, whatever the load and the record ask for, and its
/// successor starts when it is gone.
#[tokio::test]
async fn a_singleton_runs_once() {
    let api = Deployment::start().await;
    let starts = api.data().path().join("starts");
    let starts = starts.to_str().unwrap();
    let arguments = ["--more", "--ignore-stop", "--start-file", starts];
    let record = json!({"scaling": "singleton", "instances": 4, "concurrency": 2});
    let server = api.add_fixture("only", &arguments, record).await;
    assert_eq!(server["scaling"], "singleton");
    let pid = api.pids("only").await;
    assert_eq!(pid.len(), 1);
    let calls = (0..20).map(|_| api.call("only", "sleep", json!({"ms": 20})));
    for answer in futures_util::future::join_all(calls).await {
        answer.ok();
    }
    assert_eq!(api.pids("only").await, pid);

    // The old one does not want to leave. Calls that come meanwhile wait for the new one.
    let changed = json!({"env": {"CHANGED": "yes"}});
    let (update, call) = tokio::join!(api.put("/mcp/servers/only", Some(&changed)), async {
        eventually("the old one is being stopped", async || {
            api.server("only").await["status"] != "connected" || !alive(pid[0])
        })
        .await;
        let call = api.call("only", "pid", json!({})).await;
        assert!(!alive(pid[0]), "two of them ran at once");
        call
    });
    update.ok();
    let new = api.pids("only").await;
    assert_eq!(new.len(), 1);
    assert!(call.tool_text().contains(&new[0].to_string()), "{}", call.text);
    assert_eq!(std::fs::read_to_string(starts).unwrap().lines().count(), 2);
}

/// A process that was told three times that nobody waits, and goes on, is replaced once nobody else uses it.
#[tokio::test]
async fn a_process_that_gives_no_call_up_is_replaced() {
    let api = Deployment::start().await;
    api.add_fixture("stubborn", &["--more"], json!({})).await;
    let first = api.pids("stubborn").await;
    for calls in [2, 1] {
        assert_eq!(api.pids("stubborn").await, first);
        let hang = async || {
            let body = json!({"serverName": "stubborn", "methodName": "hang", "args": {}});
            let request = api.request(reqwest::Method::POST, "/mcp/tool/call").json(&body);
            api.send(request.header("X-Request-Timeout-Ms", "300")).await.fails(504, "deadline_exceeded");
        };
        futures_util::future::join_all((0..calls).map(|_| hang())).await;
        eventually("the slots are free again", async || {
            let server = api.server("stubborn").await;
            server["instances"].as_array().unwrap().iter().all(|one| one["inFlight"] == 0)
        })
        .await;
    }
    eventually("another process serves", async || {
        let now = api.pids("stubborn").await;
        now.len() == 1 && now != first && !alive(first[0])
    })
    .await;
    assert_eq!(api.call("stubborn", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    let logs = api.server("stubborn").await["logs"].to_string();
    assert!(logs.contains("it is replaced"), "{logs}");
}
