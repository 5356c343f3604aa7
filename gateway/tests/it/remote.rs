//! Remote servers: every transport and era, users' own sessions, and what outlives a restart of this program.

use std::{sync::Arc, time::Duration};

use mcp_shared::testing::remote::Remote;
use reqwest::{Method, header};
use serde_json::{Value, json};

use crate::{
    FIXTURE,
    deployment::{Answer, Builder, Deployment, eventually},
};

/// A remote server with these flags.
pub fn remote(flags: &[&str]) -> Remote {
    Remote::start(FIXTURE, flags)
}

/// A deployment that may connect to this machine.
pub fn permitting() -> Builder {
    Deployment::builder().env("EGRESS_ALLOW", "127.0.0.1")
}

/// The body that registers a remote server. Nothing is waited for long.
pub fn record(name: &str, remote: &Remote, more: &Value) -> Value {
    let mut body = json!({"name": name, "transportType": "streamable_http", "url": remote.url(),
        "reconnectionOptions": {"initialReconnectionDelay": 50, "maxReconnectionDelay": 200, "maxRetries": 2}});
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    body
}

/// Registers a remote server and asserts that it connected.
pub async fn add(api: &Deployment, name: &str, remote: &Remote, more: Value) -> Value {
    let added = api.post("/mcp/servers", &record(name, remote, &more)).await.ok().json()["server"].clone();
    assert_eq!(added["status"], "connected", "{added}");
    added
}

/// A call's events: their names and data.
pub async fn streamed(api: &Deployment, server: &str, tool: &str, args: Value) -> Vec<(String, Value)> {
    let body = json!({"serverName": server, "methodName": tool, "args": args});
    let request = api.request(Method::POST, "/mcp/tool/call").header(header::ACCEPT, "text/event-stream");
    let answer = api.send(request.json(&body)).await.ok();
    let events = answer.text.split("\n\n").filter(|event| event.contains("event:"));
    events
        .map(|event| {
            let field =
                |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            (field("event:").trim().to_owned(), serde_json::from_str(field("data:").trim()).unwrap())
        })
        .collect()
}

fn tool_names(server: &Value) -> Vec<&str> {
    server["toolsList"].as_array().unwrap().iter().map(|tool| tool["name"].as_str().unwrap()).collect()
}

/// Asserts that everything that tools can answer arrives.
async fn works(api: &Deployment, server: &str) {
    let told = api.call(server, "echo", json!({"text": "ä \u{1f600} \" \\ \n \u{7}"})).await;
    assert_eq!(told.tool_text(), "ä \u{1f600} \" \\ \n \u{7}", "{server}");
    assert_eq!(
        api.call(server, "args", json!({"n": 1.0, "t": "x"})).await.tool_text(),
        r#"{"n":1.0,"t":"x"}"#
    );
    let failed = api.call(server, "fail", json!({})).await.ok().json();
    assert_eq!(failed["data"]["isError"], true, "{failed}");
    let refused = api.call(server, "rpc_error", json!({"code": -32050, "message": "no"})).await;
    refused.fails(502, "mcp_error");
    let vendor = api.call(server, "vendor", json!({})).await.ok().text;
    assert!(vendor.contains(r#""huge":12345678901234567890,"minusZero":-0.0"#), "{vendor}");
    let big = api.call(server, "big", json!({"bytes": 3_000_000})).await.tool_text();
    assert_eq!(big.len(), 3_000_000);
    // Answers come in another order than questions.
    let slow = api.call(server, "sleep", json!({"ms": 300}));
    let quick = api.call(server, "sleep", json!({"ms": 1}));
    let (slow, quick) = tokio::join!(slow, quick);
    assert_eq!((slow.tool_text(), quick.tool_text()), ("slept 300".to_owned(), "slept 1".to_owned()));
}

#[tokio::test]
async fn every_transport_and_era_works() {
    let api = permitting().start().await;
    let kinds: [(&str, &[&str]); 9] = [
        ("json", &["--answer", "json"]),
        ("stream", &[]),
        ("resumable", &["--resumable"]),
        ("no-get", &["--no-get", "--no-delete", "--no-session"]),
        ("modern-json", &["--era", "stateless", "--answer", "json"]),
        ("modern-stream", &["--era", "stateless"]),
        ("both", &["--era", "both"]),
        ("pages", &["--pages"]),
        ("sse", &["--era", "sse-only"]),
    ];
    for (name, flags) in kinds {
        let flags: Vec<&str> = flags
            .iter()
            .flat_map(|flag| match *flag {
                "--pages" => vec!["--pages", "3"],
                flag => vec![flag],
            })
            .collect();
        let remote = remote(&flags);
        let added = add(&api, name, &remote, json!({})).await;
        let names = tool_names(&added);
        assert!(names.contains(&"echo") && names.contains(&"progress"), "{name}: {names:?}");
        works(&api, name).await;
        let seen = remote.seen();
        let calls: Vec<_> = seen.iter().filter(|seen| seen.is("tools/call")).collect();
        match name {
            "modern-json" | "modern-stream" | "both" => {
                assert!(calls.iter().all(|call| call.header("mcp-protocol-version") == "2026-07-28"));
                assert!(seen.iter().all(|seen| !seen.headers.contains_key("mcp-session-id")), "{seen:?}");
                assert_eq!(remote.count("initialize"), 0);
            }
            "no-get" => assert!(calls.iter().all(|call| !call.headers.contains_key("mcp-session-id"))),
            "sse" => assert!(calls.iter().all(|call| call.path == "/messages"), "{calls:?}"),
            _ => {
                let id = calls[0].header("mcp-session-id");
                assert!(id.starts_with("session-"), "{calls:?}");
                assert!(calls.iter().all(|call| call.header("mcp-session-id") == id), "{calls:?}");
                assert!(calls.iter().all(|call| call.header("mcp-protocol-version") == "2025-11-25"));
                assert_eq!(remote.count("initialize"), 1);
                assert_eq!(remote.count("notifications/initialized"), 1);
            }
        }
        api.delete(&format!("/mcp/servers/{name}")).await.ok();
    }
}

#[tokio::test]
async fn progress_arrives_over_every_transport() {
    let api = permitting().start().await;
    let kinds: [(&str, &[&str]); 3] =
        [("stream", &["--resumable"]), ("modern", &["--era", "stateless"]), ("sse", &["--era", "sse-only"])];
    for (name, flags) in kinds {
        let remote = remote(flags);
        add(&api, name, &remote, json!({})).await;
        let events = streamed(&api, name, "progress", json!({"steps": 4, "delayMs": 20})).await;
        let (last, progress) = events.split_last().unwrap();
        assert_eq!((last.0.as_str(), &last.1["success"]), ("result", &json!(true)), "{name}: {events:?}");
        let steps: Vec<_> = progress.iter().map(|(_, params)| params["progress"].as_u64()).collect();
        assert_eq!(steps, [Some(1), Some(2), Some(3), Some(4)], "{name}: {events:?}");
    }
}

#[tokio::test]
async fn the_older_transport_is_tried_where_the_newer_is_refused() {
    let api = permitting().start().await;
    for status in ["400", "404", "405"] {
        let remote = remote(&["--era", "sse-only", "--sse-post", status]);
        let name = format!("old-{status}");
        add(&api, &name, &remote, json!({})).await;
        assert_eq!(api.call(&name, "echo", json!({"text": status})).await.tool_text(), status);
        let asked: Value =
            serde_json::from_str(&api.call(&name, "server_request", json!({})).await.tool_text()).unwrap();
        assert!(asked["ping"]["result"].is_object(), "{asked}");
        // Its session is its stream.
        api.delete(&format!("/mcp/servers/{name}")).await.ok();
        eventually("the stream is closed", async || remote.sessions() == 0).await;
    }
    // Another refusal is one.
    let remote = remote(&["--era", "sse-only", "--sse-post", "403"]);
    let added = api.post("/mcp/servers", &record("refuses", &remote, &json!({}))).await.json();
    assert_ne!(added["server"]["status"], "connected", "{added}");
    assert!(remote.seen().iter().all(|seen| seen.method != "GET"));
}

#[tokio::test]
async fn static_headers_go_along_and_nothing_of_the_caller_does() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    let headers = json!({"X-Custom": "a value", "Authorization": "Bearer of-the-record"});
    add(&api, "remote", &remote, json!({"headers": headers})).await;
    let body = json!({"serverName": "remote", "methodName": "echo", "args": {"text": "x"}});
    let request = api
        .request(Method::POST, "/mcp/tool/call")
        .header(header::AUTHORIZATION, "Bearer of-the-caller")
        .header(header::COOKIE, "of=the-caller")
        .header("x-request-id", "given-by-the-caller");
    api.send(request.json(&body)).await.ok();
    api.delete("/mcp/servers/remote").await.ok();
    let seen = remote.seen();
    assert!(seen.iter().any(|seen| seen.method == "DELETE"), "{seen:?}");
    for request in seen {
        assert_eq!(request.header("x-custom"), "a value", "{request:?}");
        assert_eq!(request.header("authorization"), "Bearer of-the-record", "{request:?}");
        assert!(!format!("{request:?}").contains("the-caller"), "{request:?}");
    }
}

#[tokio::test]
async fn users_do_not_share_sessions() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    add(&api, "remote", &remote, json!({})).await;
    let before = remote.sessions();
    for user in ["alice", "bob", "carol"] {
        api.call_as(user, "remote", "remember", json!({"value": user})).await.ok();
    }
    for user in ["alice", "bob", "carol"] {
        assert_eq!(api.call_as(user, "remote", "recall", json!({})).await.tool_text(), user);
    }
    assert_eq!(api.call_as("dave", "remote", "recall", json!({})).await.tool_text(), "null");
    assert_eq!(remote.sessions(), before + 4);
}

#[tokio::test]
async fn a_session_outlives_this_program() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    let data = api.data();
    add(&api, "remote", &remote, json!({})).await;
    for user in ["alice", "bob"] {
        api.call_as(user, "remote", "remember", json!({"value": user})).await.ok();
    }
    let begun = remote.count("initialize");
    assert!(api.stop().await.success());
    assert!(remote.seen().iter().all(|seen| seen.method != "DELETE"), "the sessions go on");
    let api = permitting().data(&data).start().await;
    for user in ["alice", "bob"] {
        assert_eq!(api.call_as(user, "remote", "recall", json!({})).await.tool_text(), user);
    }
    api.kill().await;
    let api = permitting().data(&data).start().await;
    assert_eq!(api.call_as("bob", "remote", "recall", json!({})).await.tool_text(), "bob");
    assert_eq!(remote.count("initialize"), begun);
    // A session that is over when the program comes back is no fault.
    drop(api);
    remote.forget_sessions();
    let api = permitting().data(&data).start().await;
    assert_eq!(api.call_as("bob", "remote", "recall", json!({})).await.tool_text(), "null");
    assert_eq!(api.call_as("bob", "remote", "recall", json!({})).await.tool_text(), "null");
    assert_eq!(remote.count("initialize"), begun + 1);
    let dump: Vec<String> =
        remote.seen().iter().map(|seen| seen.header("mcp-session-id").to_owned()).collect();
    let id = dump.iter().find(|id| !id.is_empty()).unwrap();
    assert!(!api.log().contains(id.as_str()), "the id of a session is a credential");
}

#[tokio::test]
async fn a_session_that_a_caller_brings_is_gone_on_with() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    let first = permitting().start().await;
    add(&first, "first", &remote, json!({})).await;
    first.call("first", "remember", json!({"value": "kept"})).await.ok();
    let id =
        remote.seen().iter().find(|seen| seen.is("tools/call")).unwrap().header("mcp-session-id").to_owned();
    let begun = remote.count("initialize");
    add(&api, "second", &remote, json!({"sessionId": id})).await;
    assert_eq!(api.call("second", "recall", json!({})).await.tool_text(), "kept");
    assert_eq!(remote.count("initialize"), begun);
    // It is the default user's.
    assert_eq!(api.call_as("alice", "second", "recall", json!({})).await.tool_text(), "null");
    assert!(!api.get("/mcp/servers/second").await.ok().text.contains(&id));
}

#[tokio::test]
async fn a_lost_session_is_begun_anew_and_the_call_runs_once() {
    let api = permitting().start().await;
    for (name, status) in [("new", "404"), ("node", "400")] {
        let remote = remote(&["--unknown-session", status]);
        add(&api, name, &remote, json!({})).await;
        api.call(name, "remember", json!({"value": 1})).await.ok();
        remote.forget_sessions();
        assert_eq!(api.call(name, "args", json!({"n": 1})).await.tool_text(), r#"{"n":1}"#, "{name}");
        assert_eq!(api.call(name, "recall", json!({})).await.tool_text(), "null");
        assert_eq!(remote.count("initialize"), 2, "{name}");
        let runs = remote.executed().iter().filter(|line| line.starts_with("args")).count();
        assert_eq!(runs, 1, "{name}: {:?}", remote.executed());
        // Many that find it lost at once begin one new session.
        remote.forget_sessions();
        let calls = (0..20).map(|n| api.call(name, "args", json!({"turn": n})));
        for answer in futures_util::future::join_all(calls).await {
            answer.ok();
        }
        assert_eq!(remote.count("initialize"), 3, "{name}");
        let mut runs = remote.executed();
        runs.retain(|line| line.contains("turn"));
        runs.sort();
        runs.dedup();
        assert_eq!(runs.len(), 20);
    }
}

#[tokio::test]
async fn new_tools_are_noticed() {
    let api = permitting().start().await;
    let kinds: [(&str, &[&str]); 2] = [("stream", &[]), ("sse", &["--era", "sse-only"])];
    for (name, flags) in kinds {
        let remote = remote(flags);
        add(&api, name, &remote, json!({})).await;
        if name == "stream" {
            eventually("it is listened to", async || remote.seen().iter().any(|seen| seen.method == "GET"))
                .await;
        }
        assert_eq!(api.call(name, "add_tool", json!({})).await.tool_text(), "added_1");
        eventually("the new tool is listed", async || {
            tool_names(&api.server(name).await).contains(&"added_1")
        })
        .await;
        assert_eq!(api.call(name, "added_1", json!({})).await.tool_text(), "added_1");
    }
}

#[tokio::test]
async fn a_server_may_ask_for_a_sign_of_life() {
    let api = permitting().start().await;
    let remote = remote(&[]);
    add(&api, "remote", &remote, json!({})).await;
    let asked = api.call("remote", "server_request", json!({})).await.tool_text();
    let asked: Value = serde_json::from_str(&asked).unwrap();
    assert!(asked["ping"]["result"].is_object(), "{asked}");
    assert_eq!(asked["roots/list"]["error"]["code"], -32601, "{asked}");
}

#[tokio::test]
async fn sessions_end_with_their_server() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    add(&api, "remote", &remote, json!({})).await;
    for user in ["alice", "bob"] {
        api.call_as(user, "remote", "count", json!({})).await.ok();
    }
    let used: std::collections::BTreeSet<String> = remote
        .seen()
        .iter()
        .filter(|seen| seen.is("tools/call"))
        .map(|seen| seen.header("mcp-session-id").to_owned())
        .collect();
    assert_eq!(used.len(), 2);
    api.delete("/mcp/servers/remote").await.ok();
    eventually("all sessions are ended", async || remote.sessions() == 0).await;
    let ended: Vec<_> = remote.seen().into_iter().filter(|seen| seen.method == "DELETE").collect();
    for id in used {
        assert!(ended.iter().any(|seen| seen.header("mcp-session-id") == id), "{ended:?}");
    }
}

#[tokio::test]
async fn connections_without_calls_are_closed_and_sessions_kept() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    add(&api, "remote", &remote, json!({"idleTimeout": 300})).await;
    api.call_as("alice", "remote", "remember", json!({"value": "kept"})).await.ok();
    let begun = remote.count("initialize");
    eventually("nobody is connected", async || {
        let server = api.server("remote").await;
        server["instances"].as_array().unwrap().iter().all(|one| one["status"] != "connected")
    })
    .await;
    let listened = remote.seen().iter().filter(|seen| seen.method == "GET").count();
    assert_eq!(api.call_as("alice", "remote", "recall", json!({})).await.tool_text(), "kept");
    assert_eq!(remote.count("initialize"), begun, "the session was resumed");
    eventually("it is listened to again", async || {
        remote.seen().iter().filter(|seen| seen.method == "GET").count() > listened
    })
    .await;
}

#[tokio::test]
async fn what_is_not_public_is_refused() {
    let remote = Arc::new(remote(&[]));
    let strict = || Deployment::builder().env("EGRESS_ALLOW", "");
    let api = strict().start().await;
    let port = remote.port();
    let refused: Vec<String> = [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::]",
        "10.1.2.3",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00::1]",
        "sub.localhost",
    ]
    .iter()
    .map(|host| format!("http://{host}:{port}/mcp"))
    .collect();
    for url in refused {
        let body = json!({"name": "inside", "transportType": "streamable_http", "url": url});
        let answer = api.post("/mcp/servers", &body).await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "blocked_address"), "{url}");
    }
    for url in ["ftp://127.0.0.1/", "file:///etc/passwd", "http://user:pw@127.0.0.1/", "/mcp", ""] {
        let body = json!({"name": "inside", "transportType": "streamable_http", "url": url});
        assert_eq!(api.post("/mcp/servers", &body).await.status, 400, "{url}");
    }
    assert!(remote.seen().is_empty(), "{:?}", remote.seen());
    // What was registered when it was permitted is not connected to when it is not any more.
    let data = Deployment::builder().env("EGRESS_ALLOW", "127.0.0.0/8").start().await;
    add(&data, "remote", &remote, json!({})).await;
    let kept = data.data();
    assert!(data.stop().await.success());
    let seen = remote.seen().len();
    let api = strict().data(&kept).start().await;
    let answer = api.call("remote", "echo", json!({"text": "x"})).await;
    assert_eq!(
        (answer.code().as_str(), &answer.json()["outcome"]),
        ("blocked_address", &json!("not_started"))
    );
    assert_eq!(remote.seen().len(), seen);
}

#[tokio::test]
async fn proxies_of_the_environment_see_nothing() {
    let (remote, proxy) = (remote(&[]), remote(&[]));
    let through = format!("http://127.0.0.1:{}", proxy.port());
    let mut builder = permitting();
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"] {
        builder = builder.env(name, through.clone());
    }
    let api = builder.start().await;
    add(&api, "remote", &remote, json!({})).await;
    assert_eq!(api.call("remote", "echo", json!({"text": "direct"})).await.tool_text(), "direct");
    assert!(proxy.seen().is_empty(), "{:?}", proxy.seen());
}

#[tokio::test]
async fn a_change_of_the_url_ends_the_old_sessions() {
    let (one, two) = (remote(&[]), remote(&[]));
    let api = permitting().start().await;
    add(&api, "remote", &one, json!({})).await;
    api.call("remote", "remember", json!({"value": "one"})).await.ok();
    let session =
        one.seen().iter().find(|seen| seen.is("tools/call")).unwrap().header("mcp-session-id").to_owned();
    let change = json!({"transportType": "streamable_http", "url": two.url()});
    api.put("/mcp/servers/remote", Some(&change)).await.ok();
    assert_eq!(api.call("remote", "recall", json!({})).await.tool_text(), "null");
    assert!(!format!("{:?}", two.seen()).contains(&session), "another server sees nothing of it");
    eventually("the old session is ended", async || one.sessions() == 0).await;
}

#[tokio::test]
async fn a_disabled_server_is_not_connected_to() {
    let remote = remote(&[]);
    let api = permitting().start().await;
    add(&api, "remote", &remote, json!({})).await;
    api.put("/mcp/servers/remote/disable", None).await.ok();
    let seen = remote.count("tools/call");
    let answer: Answer = api.call("remote", "echo", json!({"text": "x"})).await;
    assert_eq!(answer.code(), "server_disabled");
    assert_eq!(remote.count("tools/call"), seen);
    api.put("/mcp/servers/remote/enable", None).await.ok();
    assert_eq!(api.call("remote", "echo", json!({"text": "x"})).await.tool_text(), "x");
    tokio::time::timeout(Duration::from_secs(20), api.stop()).await.expect("it stops in time");
}
