//! Users' secrets: whose calls get them, when a change takes effect, and where they must never show up.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};

use crate::deployment::{Answer, Deployment, alive, eventually};

/// What the fixture's tool `args` got as its arguments.
pub async fn arguments(api: &Deployment, user: &str, server: &str, args: Value) -> Value {
    serde_json::from_str(&api.call_as(user, server, "args", args).await.tool_text()).unwrap()
}

async fn delete_secret(api: &Deployment, user: &str, server: &str, name: &str) -> Answer {
    let body = json!({"username": user, "serverName": server, "secretName": name});
    api.post("/secrets/delete", &body).await
}

/// The process that serves a user.
async fn pid_of(api: &Deployment, user: &str, server: &str) -> i32 {
    let text = api.call_as(user, server, "pid", json!({})).await.tool_text();
    let ids: Value = serde_json::from_str(&text).unwrap();
    i32::try_from(ids["pid"].as_i64().unwrap()).unwrap()
}

/// A server that reads its key from the environment, as most servers do.
fn keyed() -> Value {
    json!({"isolation": "per_user", "secretEnv": {"SERVICE_KEY": "API_KEY"}})
}

#[tokio::test]
async fn a_secret_reaches_only_its_users_calls_of_its_server() {
    let api = Deployment::start().await;
    api.add_fixture("one", &[], json!({})).await;
    api.add_fixture("two", &[], json!({})).await;
    api.set_secret("alice", "one", "API_KEY", "alices-key").await.ok();
    api.set_secret("alice", "two", "API_KEY", "alices-other-key").await.ok();
    api.set_secret("bob", "one", "API_KEY", "bobs-key").await.ok();

    assert_eq!(arguments(&api, "alice", "one", json!({})).await, json!({"API_KEY": "alices-key"}));
    assert_eq!(arguments(&api, "alice", "two", json!({})).await, json!({"API_KEY": "alices-other-key"}));
    assert_eq!(arguments(&api, "bob", "one", json!({})).await, json!({"API_KEY": "bobs-key"}));
    for nobody in ["bob2", "Alice", "alice ", "default"] {
        assert_eq!(arguments(&api, nobody, "two", json!({})).await, json!({}), "{nobody}");
    }
    // Whoever is named by no request is one user like any other.
    let body = json!({"serverName": "two", "secretName": "K", "secretValue": "nobodys-key"});
    api.post("/secrets/set", &body).await.ok();
    assert_eq!(api.call("two", "args", json!({})).await.tool_text(), r#"{"K":"nobodys-key"}"#);
    assert_eq!(arguments(&api, "default", "two", json!({})).await, json!({"K": "nobodys-key"}));
}

#[tokio::test]
async fn a_secret_wins_over_an_argument_and_leaves_the_others_as_they_were() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let value = "quotes \" and \\ and\nlines and ä and 😀";
    api.set_secret("alice", "echo", "API_KEY", value).await.ok();
    let mine = json!({"a": 1, "API_KEY": "forged", "nested": {"API_KEY": "kept"}});
    assert_eq!(
        arguments(&api, "alice", "echo", mine.clone()).await,
        json!({"a": 1, "API_KEY": value, "nested": {"API_KEY": "kept"}})
    );
    assert_eq!(arguments(&api, "bob", "echo", mine.clone()).await, mine);
    // A call without arguments has the secret as its only one.
    let body = json!({"username": "alice", "serverName": "echo", "methodName": "args"});
    let told: Value = serde_json::from_str(&api.post("/mcp/tool/call", &body).await.tool_text()).unwrap();
    assert_eq!(told, json!({"API_KEY": value}));
}

#[tokio::test]
async fn secret_names_choose_what_is_injected() {
    let api = Deployment::start().await;
    let pid = {
        api.add_fixture("echo", &["--more"], json!({"secretNames": ["A", "MISSING"]})).await;
        pid_of(&api, "alice", "echo").await
    };
    for name in ["A", "B"] {
        api.set_secret("alice", "echo", name, &format!("value-{name}")).await.ok();
    }
    let all = json!({"A": "value-A", "B": "value-B"});
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({"A": "value-A"}));
    for (change, expected) in [
        (json!({"secretNames": []}), all.clone()),
        (json!({"secretNames": ["B"]}), json!({"B": "value-B"})),
        (json!({"secretNames": null}), all.clone()),
        // The field of older clients, which know one name only.
        (json!({"secretName": "A"}), json!({"A": "value-A"})),
        (json!({"description": "says nothing about secrets"}), json!({"A": "value-A"})),
    ] {
        api.put("/mcp/servers/echo", Some(&change)).await.ok();
        assert_eq!(arguments(&api, "alice", "echo", json!({})).await, expected, "{change}");
    }
    assert_eq!(api.server("echo").await["secretNames"], json!(["A"]));
    assert_eq!(pid_of(&api, "alice", "echo").await, pid, "names of secrets need no new process");

    api.add_fixture("old", &[], json!({"secretName": "B"})).await;
    for name in ["A", "B"] {
        api.set_secret("alice", "old", name, "x").await.ok();
    }
    assert_eq!(arguments(&api, "alice", "old", json!({})).await, json!({"B": "x"}));
}

#[tokio::test]
async fn a_change_is_seen_by_every_call_that_starts_after_it() {
    const CHANGES: usize = 200;
    let value = |change: usize| if change % 5 == 4 { Value::Null } else { json!(format!("value-{change}")) };
    let api = Arc::new(Deployment::start().await);
    api.add_fixture("echo", &[], json!({})).await;
    api.set_secret("alice", "echo", "KEY", "value-0").await.ok();

    let (issued, acknowledged) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let over = Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (api, issued, acknowledged, over) =
                (Arc::clone(&api), Arc::clone(&issued), Arc::clone(&acknowledged), Arc::clone(&over));
            tokio::spawn(async move {
                let mut calls = 0;
                while !over.load(Ordering::SeqCst) {
                    let oldest = acknowledged.load(Ordering::SeqCst);
                    let seen = arguments(&api, "alice", "echo", json!({})).await["KEY"].clone();
                    let newest = issued.load(Ordering::SeqCst);
                    assert!(
                        (oldest..=newest).any(|change| value(change) == seen),
                        "saw {seen} although change {oldest} was acknowledged and {newest} was the newest"
                    );
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    for change in 1..=CHANGES {
        issued.store(change, Ordering::SeqCst);
        match value(change) {
            Value::String(value) => api.set_secret("alice", "echo", "KEY", &value).await.ok(),
            _ => delete_secret(&api, "alice", "echo", "KEY").await.ok(),
        };
        acknowledged.store(change, Ordering::SeqCst);
        assert_eq!(
            arguments(&api, "alice", "echo", json!({})).await["KEY"],
            value(change),
            "change {change}"
        );
    }
    over.store(true, Ordering::SeqCst);
    for reader in readers {
        assert!(reader.await.unwrap() > 0, "the readers never got to read");
    }
}

/// Stores a secret of Alice's as clients of newer mcp-api versions do.
pub async fn set(api: &Deployment, name: &str, value: &str) -> Answer {
    let body = json!({"username": "alice", "secretName": name, "secretValue": value});
    api.post("/secrets/set", &body).await
}

#[tokio::test]
async fn a_name_with_the_server_before_a_dot_is_understood() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    set(&api, "echo.API_KEY", "one").await.ok();
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({"API_KEY": "one"}));
    set(&api, "nobody.API_KEY", "x").await.fails(404, "server_not_found");
    set(&api, "API_KEY", "x").await.fails(400, "invalid_request");
    set(&api, "echo.", "x").await.fails(400, "invalid_request");
    set(&api, "../x.API_KEY", "x").await.fails(400, "invalid_server_name");
    let body = json!({"username": "alice", "secretName": "echo.API_KEY"});
    api.post("/secrets/delete", &body).await.ok();
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({}));
}

#[tokio::test]
async fn bad_secrets_are_refused_and_change_nothing() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let good = json!({"username": "alice", "serverName": "echo", "secretName": "K", "secretValue": "kept"});
    api.post("/secrets/set", &good).await.ok();
    let cases = [
        ("secretValue", json!("x".repeat(65 * 1024 + 1)), "invalid_request"),
        ("secretValue", json!("x".repeat(64 * 1024 + 1)), "invalid_request"),
        ("secretValue", json!(""), "invalid_request"),
        ("secretValue", json!("a\0b"), "invalid_request"),
        ("secretValue", json!(7), "invalid_request"),
        ("secretValue", json!({"$ne": null}), "invalid_request"),
        ("secretValue", json!(["a"]), "invalid_request"),
        ("secretValue", Value::Null, "invalid_request"),
        ("secretName", json!(""), "invalid_request"),
        ("secretName", json!("  "), "invalid_request"),
        ("secretName", json!("$where"), "invalid_request"),
        ("secretName", json!("a$b"), "invalid_request"),
        ("secretName", json!("a\0"), "invalid_request"),
        ("secretName", json!("a\u{202e}b"), "invalid_request"),
        ("secretName", json!("n".repeat(129)), "invalid_request"),
        ("secretName", json!({"$gt": ""}), "invalid_request"),
        ("serverName", json!(["a"]), "invalid_request"),
        ("serverName", json!({"$ne": null}), "invalid_request"),
        ("serverName", json!("../../etc"), "invalid_server_name"),
        ("serverName", json!(""), "invalid_server_name"),
        ("username", json!({"$ne": null}), "invalid_request"),
        ("username", json!(""), "invalid_request"),
        ("username", json!("   "), "invalid_request"),
        ("username", json!("u".repeat(300)), "invalid_request"),
        ("username", json!("a\r\nb"), "invalid_request"),
    ];
    for (field, value, code) in cases {
        let mut body = good.clone();
        body[field] = value.clone();
        let shown = format!("{field} {:.40}", value.to_string());
        assert_eq!(api.post("/secrets/set", &body).await.fails(400, code).code(), code, "{shown}");
        if field != "secretValue" {
            assert_eq!(api.post("/secrets/delete", &body).await.fails(400, code).code(), code, "{shown}");
        }
    }
    for path in ["/secrets/set", "/secrets/delete"] {
        let mut body = good.clone();
        body["serverName"] = json!("nobody");
        api.post(path, &body).await.fails(404, "server_not_found");
        // A pattern is a name like any other: it fits nothing else.
        body["serverName"] = json!("echo");
        body["secretName"] = json!(".*");
        if path == "/secrets/delete" {
            api.post(path, &body).await.ok();
        }
    }
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({"K": "kept"}));
    let largest = "y".repeat(64 * 1024);
    api.set_secret("alice", "echo", "K", &largest).await.ok();
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await["K"], largest);
}

#[tokio::test]
async fn an_unmodified_server_serves_two_users_with_their_own_keys() {
    let api = Deployment::start().await;
    api.register_fixture("keyed", &["--more"], keyed()).await.ok();
    for user in ["alice", "bob"] {
        api.set_secret(user, "keyed", "API_KEY", &format!("key-of-{user}")).await.ok();
    }
    let key = async |user: &str| {
        api.call_as(user, "keyed", "env", json!({"name": "SERVICE_KEY"})).await.tool_text()
    };
    assert_eq!(key("alice").await, "key-of-alice");
    assert_eq!(key("bob").await, "key-of-bob");
    let (alice, bob) = (pid_of(&api, "alice", "keyed").await, pid_of(&api, "bob", "keyed").await);
    assert_ne!(alice, bob);
    // What is in the environment is not in the arguments as well.
    assert_eq!(arguments(&api, "alice", "keyed", json!({"q": 1})).await, json!({"q": 1}));
    // Nothing of one user is in the other's process, and nothing of ours in any.
    let environment = api.call_as("alice", "keyed", "env", json!({})).await.tool_text();
    assert!(!environment.contains("key-of-bob"), "{environment}");
    let server = api.server("keyed").await;
    let users: BTreeSet<_> = server["instances"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|instance| instance["username"].as_str())
        .collect();
    assert_eq!(users, BTreeSet::from(["alice", "bob"]));

    // A new value is in a new process before the change is acknowledged; nobody else is disturbed.
    for round in 0..3 {
        let before = pid_of(&api, "alice", "keyed").await;
        api.set_secret("alice", "keyed", "API_KEY", &format!("new-key-{round}")).await.ok();
        assert!(!alive(before), "the process with the old key outlived the change");
        assert_eq!(key("alice").await, format!("new-key-{round}"));
        assert_ne!(pid_of(&api, "alice", "keyed").await, before);
        assert_eq!(pid_of(&api, "bob", "keyed").await, bob);
    }
    // A secret that no variable holds is an argument and needs no new process.
    let before = pid_of(&api, "alice", "keyed").await;
    api.set_secret("alice", "keyed", "OTHER", "an argument").await.ok();
    assert_eq!(arguments(&api, "alice", "keyed", json!({})).await, json!({"OTHER": "an argument"}));
    assert_eq!(pid_of(&api, "alice", "keyed").await, before);
    // Taking the key away ends the process that knows it.
    delete_secret(&api, "alice", "keyed", "API_KEY").await.ok();
    assert!(!alive(before));
    let answer = api.call_as("alice", "keyed", "env", json!({"name": "SERVICE_KEY"})).await;
    assert_eq!(answer.tool_text(), "SERVICE_KEY is not set");
}

#[tokio::test]
async fn a_missing_secret_is_named() {
    let api = Deployment::start().await;
    let flags = ["--more", "--env-required", "SERVICE_KEY"];
    let server = api.register_fixture("keyed", &flags, keyed()).await.ok().json()["server"].clone();
    assert_eq!(server["status"], "disconnected", "nobody can connect yet, and that is no error: {server}");
    assert_eq!(server.get("toolsList"), None);

    let refused = api.call_as("alice", "keyed", "pid", json!({})).await.fails(502, "server_unavailable");
    let text = refused.json()["error"].as_str().unwrap().to_owned();
    assert!(text.contains("API_KEY") && text.contains("not set for this user"), "{text}");
    assert_eq!(refused.json()["outcome"], "not_started");

    // The moment it is set, the next call works: nobody waits out the pause after a failed start.
    api.set_secret("alice", "keyed", "API_KEY", "alices-key").await.ok();
    let answer = api.call_as("alice", "keyed", "env", json!({"name": "SERVICE_KEY"})).await;
    assert_eq!(answer.tool_text(), "alices-key");
    // The first user who connects fills the listing that everybody sees.
    assert_eq!(api.server("keyed").await["toolsList"][0]["name"], "echo");
    let change = json!({"username": "alice", "description": "now it connects"});
    let server = api.put("/mcp/servers/keyed", Some(&change)).await.ok().json()["server"].clone();
    assert_eq!(server["status"], "connected", "{server}");
    api.call_as("bob", "keyed", "pid", json!({})).await.fails(502, "server_unavailable");
}

#[tokio::test]
async fn an_idle_users_process_stops_and_wakes_with_its_key() {
    let api = Deployment::start().await;
    let mut record = keyed();
    record["idleTimeout"] = json!(300);
    api.register_fixture("keyed", &["--more"], record).await.ok();
    api.set_secret("alice", "keyed", "API_KEY", "alices-key").await.ok();
    let before = pid_of(&api, "alice", "keyed").await;
    eventually("the idle process stops", async || !alive(before)).await;
    eventually("nothing runs", async || api.pids("keyed").await.is_empty()).await;
    let answer = api.call_as("alice", "keyed", "env", json!({"name": "SERVICE_KEY"})).await;
    assert_eq!(answer.tool_text(), "alices-key");
    // A call keeps it awake for as long as it takes.
    assert_eq!(api.call_as("alice", "keyed", "sleep", json!({"ms": 900})).await.tool_text(), "slept 900");
}

#[tokio::test]
async fn deleting_a_server_deletes_its_secrets() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    api.add_fixture("other", &[], json!({})).await;
    api.set_secret("alice", "echo", "K", "of echo").await.ok();
    api.set_secret("alice", "other", "K", "of other").await.ok();
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({"K": "of echo"}));
    let impact = api.get("/mcp/servers/echo/delete-impact").await.ok().json();
    assert_eq!(impact["impact"]["usersWithSavedSecrets"], 1);
    api.delete("/mcp/servers/echo").await.ok();
    api.set_secret("alice", "echo", "K", "too late").await.fails(404, "server_not_found");
    api.add_fixture("echo", &[], json!({})).await;
    assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({}));
    assert_eq!(arguments(&api, "alice", "other", json!({})).await, json!({"K": "of other"}));
}

#[tokio::test]
async fn a_name_that_is_deleted_and_registered_at_once_is_a_new_server() {
    let api = Deployment::start().await;
    for round in 0..30 {
        api.add_fixture("echo", &[], json!({})).await;
        api.set_secret("alice", "echo", "K", "of the old server").await.ok();
        assert_eq!(arguments(&api, "alice", "echo", json!({})).await["K"], "of the old server");
        let delete = api.delete("/mcp/servers/echo");
        let register = async {
            // Refused until the old one is gone from the store, and then at once in its place.
            loop {
                let answer = api.register_fixture("echo", &[], json!({})).await;
                if answer.status != 409 {
                    return answer;
                }
                // As fast as a client may try, and not faster than the store can say no.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let (deleted, registered) = tokio::join!(delete, register);
        deleted.ok();
        let server = registered.ok().json()["server"].clone();
        assert_eq!(server["status"], "connected", "round {round}: {server}");
        assert_eq!(arguments(&api, "alice", "echo", json!({})).await, json!({}), "round {round}");
        api.delete("/mcp/servers/echo").await.ok();
    }
}

/// Secrets of every shape that must be found nowhere.
fn canaries() -> Vec<(&'static str, String)> {
    let chance = |bytes: usize| -> String {
        let mut random = vec![0; bytes];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut random).unwrap();
        random.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let lines: Vec<_> = (0..4).map(|_| chance(24)).collect();
    vec![
        ("token", format!("ghp_{}", chance(18))),
        ("quoted", format!("\"{}\\{}\"", chance(8), chance(8))),
        ("pem", format!("-----BEGIN KEY-----\n{}\n-----END KEY-----\n", lines.join("\n"))),
        ("long", chance(15_000)),
        ("umlaut", format!("ä{}ß", chance(16))),
    ]
}

/// Texts by which a value betrays itself: its long parts, as they are and as JSON spells them, and in
/// base64 wherever it begins.
fn traces(value: &str) -> Vec<Vec<u8>> {
    let mut traces = Vec::new();
    let escaped = serde_json::to_string(value).unwrap();
    let parts = value.lines().chain(value.split(['"', '\\', '\n'])).chain([escaped.trim_matches('"')]);
    for part in parts.filter(|part| part.len() >= 12 && !part.starts_with("-----")) {
        let part = &part.as_bytes()[..part.len().min(64)];
        traces.push(part.to_vec());
        for skipped in 0..3 {
            traces.push(base64(&part[skipped..]));
        }
    }
    traces
}

/// Base64 of the whole groups of three bytes.
fn base64(bytes: &[u8]) -> Vec<u8> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = Vec::new();
    for group in bytes.chunks_exact(3) {
        let bits = usize::from(group[0]) << 16 | usize::from(group[1]) << 8 | usize::from(group[2]);
        out.extend([18, 12, 6, 0].map(|shift| DIGITS[bits >> shift & 63]));
    }
    out
}

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
    found
}

#[tokio::test]
async fn secret_values_show_up_nowhere() {
    let api = Deployment::builder().env("RUST_LOG", "trace").start().await;
    let canaries = canaries();
    api.add_fixture("shared", &["--more"], json!({})).await;
    api.register_fixture("keyed", &["--more", "--env-required", "ABSENT"], keyed()).await.ok();
    api.register_fixture("own", &["--more"], keyed()).await.ok();
    let mut answers = Vec::new();
    for (user, value) in &canaries {
        // The names are arguments of the fixture's tools, so that these speak the values out loud.
        for name in ["token", "message", "text", "line"] {
            answers.push(api.set_secret(user, "shared", name, value).await.ok());
        }
        for server in ["keyed", "own"] {
            answers.push(api.set_secret(user, server, "API_KEY", value).await.ok());
        }
    }
    for (user, value) in &canaries {
        let call = async |server: &str, tool: &str, args: Value| api.call_as(user, server, tool, args).await;
        // The server itself returned these: the values are in the results, and have to be.
        assert!(call("shared", "args", json!({})).await.tool_text().len() > value.len());
        assert_eq!(call("own", "env", json!({"name": "SERVICE_KEY"})).await.tool_text(), *value);
        // No other answer may have them.
        for (server, tool, args) in [
            ("shared", "log_secret", json!({})),
            ("shared", "stderr", json!({"lines": 3})),
            ("shared", "fail", json!({})),
            ("shared", "raw", json!({"answer": true})),
            ("shared", "rpc_error", json!({"code": -32000, "data": {"x": 1}})),
            ("shared", "rpc_error", json!({"code": -32602})),
            ("shared", "no_such_tool", json!({})),
            ("shared", "remember", json!({"value": "x"})),
            ("shared", "crash", json!({})),
            ("keyed", "pid", json!({})),
            ("own", "crash", json!({})),
        ] {
            answers.push(call(server, tool, args).await);
        }
        let body = json!({"username": user, "serverName": "shared", "methodName": "hang"});
        let late = api.request(reqwest::Method::POST, "/mcp/tool/call").json(&body);
        answers.push(api.send(late.header("X-Request-Timeout-Ms", "100")).await);
    }
    for path in
        ["/mcp/servers", "/mcp/servers/shared", "/mcp/servers/own", "/mcp/servers/keyed", "/mcp/tools"]
    {
        answers.push(api.get(path).await.ok());
    }
    for (user, _) in &canaries {
        let body = json!({"username": user, "serverName": "shared", "secretName": "$", "secretValue": "v"});
        answers.push(api.post("/secrets/set", &body).await);
    }
    let logs = api.server("shared").await["logs"].to_string();
    assert!(logs.contains("[secret]"), "the server's words are kept without the values: {logs}");

    let mut places: Vec<(String, Vec<u8>)> = Vec::new();
    for (at, answer) in answers.iter().enumerate() {
        places.push((format!("answer {at}"), format!("{:?} {}", answer.headers, answer.text).into_bytes()));
    }
    for process in std::fs::read_dir("/proc").unwrap() {
        let path = process.unwrap().path().join("cmdline");
        if let Ok(words) = std::fs::read(&path) {
            places.push((path.display().to_string(), words));
        }
    }
    let folder = api.data();
    // Once while it runs, with the log of the database, and once after everything was written back.
    places.extend(files(folder.path()));
    api.stop().await;
    places.extend(files(folder.path()));
    assert!(places.iter().any(|(place, _)| place.ends_with("program.log")));
    for (user, value) in &canaries {
        for trace in traces(value) {
            for (place, bytes) in &places {
                let at = bytes.windows(trace.len()).position(|window| window == trace);
                let context = at.map(|at| {
                    let range = at.saturating_sub(200)..(at + trace.len()).min(bytes.len());
                    String::from_utf8_lossy(&bytes[range]).into_owned()
                });
                assert_eq!(context, None, "the secret of {user} is in {place}");
            }
        }
    }
}
