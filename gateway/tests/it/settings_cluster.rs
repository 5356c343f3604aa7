//! Settings of clusters and of MongoDB, for both programs: what is refused, in which words and with which
//! exit status; what a start waits for; and a worker's health.

use std::{
    io::{BufRead, BufReader, Read},
    net::TcpListener,
    process::{Child, Output, Stdio},
};

use mcp_shared::{config::VARIABLES, testing::port::Port};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    deployment::{Builder, Data, Deployment, eventually},
    settings::{CONFIG, KEY, TEMPORARY, ended, run, text},
};

type Set<'a> = &'a [(&'a str, &'a str)];

fn with(settings: Set<'_>) -> Builder {
    settings.iter().fold(Deployment::builder(), |builder, (name, value)| builder.env(name, *value))
}

/// Both programs as they ended.
async fn both(settings: Set<'_>, arguments: &[&str]) -> [Output; 2] {
    let builder = with(settings);
    let worker = ended(builder.worker_command(), arguments).await;
    [run(builder, arguments).await, worker]
}

/// Asserts that both programs refuse settings, and what they complain of. Passwords and keys of these
/// tests have `canary` in them.
async fn refused(settings: Set<'_>, status: i32, expected: &[&str]) {
    for output in both(settings, &[]).await {
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{settings:?}: {said}");
        assert_eq!(text(&output.stdout), "", "{said}");
        for word in expected {
            assert!(said.contains(word), "{settings:?} without {word}: {said}");
        }
        assert!(!said.contains("canary") && !said.contains(KEY) && !said.contains("panicked"), "{said}");
    }
}

#[tokio::test]
async fn incomplete_and_unsafe_clusters_are_refused() {
    let mongo = ("MONGODB_URI", "mongodb://u:canary@127.0.0.1:1");
    let key = ("SECRETS_KEY", KEY);
    let url = ("NATS_URL", "nats://u:canary@127.0.0.1:1");
    let cases: &[(Set<'_>, &[&str])] = &[
        (&[url, key], &["NATS_URL: gateways and workers need a store", "MONGODB_URI"]),
        (&[url, mongo], &["SECRETS_KEY: a cluster needs one key", "openssl rand -hex 32"]),
        (&[url], &["NATS_URL: ", "SECRETS_KEY: "]),
        (&[("NATS_URL", "canary"), key, mongo], &["NATS_URL: the value is not valid"]),
        (&[("NATS_URL", "nats://192.0.2.1:4222"), key, mongo], &["192.0.2.1:4222", "NATS_AUTH=none"]),
        (&[url, key, mongo, ("NATS_AUTH", "off")], &["NATS_AUTH", "valid: none"]),
        (&[url, key, mongo, ("NATS_PREFIX", "a.b")], &["NATS_PREFIX"]),
        (&[url, key, mongo, ("NATS_CREDS", "no-such-file")], &["NATS_CREDS: no-such-file cannot be read"]),
        (&[url, key, mongo, ("NATS_NKEY_SEED_FILE", "no-such-file")], &["NATS_NKEY_SEED_FILE"]),
        (&[url, key, mongo, ("NATS_TLS_CA_FILE", "no-such-file")], &["NATS_TLS_CA_FILE"]),
        (&[url, key, ("MONGODB_URI", "mongodb://u:canary@")], &["MONGODB_URI: the value is not valid"]),
        (&[url, key, ("MONGO_HOST", "192.0.2.1:27017")], &["MONGO_USER: MongoDB at 192.0.2.1:27017"]),
        (&[url, key, ("MONGO_HOST", "u:canary@h:1")], &["MONGO_HOST: the value is not valid"]),
        (&[url, key, mongo, ("MONGO_DBNAME", "a b")], &["MONGO_DBNAME"]),
        (&[url, key, mongo, ("WORKER_PORT", "x")], &["WORKER_PORT"]),
        (&[url, key, mongo, ("WORKER_HOST", "127.1")], &["WORKER_HOST"]),
        (&[url, key, mongo, ("START_TIMEOUT_SECONDS", "0")], &["START_TIMEOUT_SECONDS"]),
        // All that is wrong is said at once.
        (&[url, ("NATS_PREFIX", "."), ("PORT", "x")], &["NATS_URL", "SECRETS_KEY", "NATS_PREFIX", "PORT"]),
    ];
    for (settings, expected) in cases {
        refused(settings, CONFIG, expected).await;
    }
    let alone = ended(with(&[key]).worker_command(), &[]).await;
    assert_eq!(alone.status.code(), Some(CONFIG));
    let said = text(&alone.stderr);
    assert!(said.contains("NATS_URL") && said.contains("mcp-gateway alone is the whole program"), "{said}");
}

#[tokio::test]
async fn a_store_that_stays_away_ends_the_start() {
    let nobody = Port::keep();
    let mongo = nobody.address().to_string();
    let uri = format!("mongodb://u:canary@{mongo}/?serverSelectionTimeoutMS=500");
    let expected: &[&str] = &["MongoDB", &mongo];
    let settings: Set<'_> = &[
        ("MONGODB_URI", &uri),
        ("SECRETS_KEY", KEY),
        ("NATS_URL", "nats://u:canary@127.0.0.1:1"),
        ("START_TIMEOUT_SECONDS", "1"),
    ];
    refused(settings, TEMPORARY, expected).await;
    // One node with its store in MongoDB waits for it just so.
    let alone = run(with(&[("MONGODB_URI", &uri), ("START_TIMEOUT_SECONDS", "1")]), &[]).await;
    assert_eq!(alone.status.code(), Some(TEMPORARY), "{}", text(&alone.stderr));
}

#[tokio::test]
async fn check_says_what_cannot_be_reached() {
    let kept = [Port::keep(), Port::keep()];
    let [mongo, nats] = kept.each_ref().map(|nobody| nobody.address().to_string());
    let uri = format!("mongodb://u:canary@{mongo}/?serverSelectionTimeoutMS=500");
    let url = format!("nats://u:canary@{nats}");
    let settings: Set<'_> = &[("MONGODB_URI", &uri), ("SECRETS_KEY", KEY), ("NATS_URL", &url)];
    for (output, own) in both(settings, &["check"]).await.into_iter().zip(["listen", "health"]) {
        let said = text(&output.stdout);
        assert_eq!(output.status.code(), Some(CONFIG), "{said}");
        let line = |name: &str| {
            let line = said.lines().find(|line| line.split_whitespace().next() == Some(name));
            line.unwrap_or_else(|| panic!("no {name} in {said}"))
        };
        assert!(line(own).contains("ok: 127.0.0.1:0 is free"), "{said}");
        assert!(line("store").contains("FAILED: MongoDB at ") && line("store").contains(&mongo), "{said}");
        assert!(line("bus").contains("FAILED: NATS at ") && line("bus").contains(&nats), "{said}");
        assert!(line("key").contains("ok: SECRETS_KEY is strong enough"), "{said}");
        assert!(line("NATS_PREFIX").contains("mcp") && line("NATS_URL").contains("(set, "), "{said}");
        assert!(!said.contains("canary") && !said.contains(KEY), "{said}");
        assert!(!text(&output.stderr).contains("canary"));
    }
}

#[tokio::test]
async fn a_workers_help_is_that_of_the_gateway() {
    let [gateway, worker] = both(&[], &["--help"]).await;
    assert!(gateway.status.success() && worker.status.success());
    let (gateway, worker) = (text(&gateway.stdout), text(&worker.stdout));
    for variable in VARIABLES {
        for help in [&worker, &gateway] {
            let line = help.lines().find_map(|line| line.strip_prefix("  ")?.strip_prefix(variable.name));
            assert!(line.is_some_and(|rest| rest.is_empty() || rest.starts_with(' ')), "{}", variable.name);
        }
    }
    for word in ["mcp-worker", "serve", "check", "--env-file"] {
        assert!(worker.contains(word), "{word}: {worker}");
    }
    let [_, version] = both(&[], &["--version"]).await;
    assert_eq!(text(&version.stdout).trim(), concat!("mcp-worker ", env!("CARGO_PKG_VERSION")));
    let [_, unknown] = both(&[], &["--no-such-flag"]).await;
    assert_eq!(unknown.status.code(), Some(2));
    let [_, missing] = both(&[], &["--env-file", "missing"]).await;
    assert_eq!(missing.status.code(), Some(CONFIG));
}

/// A program that waits for a store that never comes.
struct Waiting {
    child: Child,
    base: String,
    _data: Data,
    _nobody: Port,
}

impl Waiting {
    async fn start(worker: bool) -> Self {
        let (data, nobody) = (Data::new(), Port::keep());
        let uri = format!("mongodb://{}/?serverSelectionTimeoutMS=500", nobody.address());
        let settings: Set<'_> = &[
            ("MONGODB_URI", &uri),
            ("SECRETS_KEY", KEY),
            ("NATS_URL", "nats://127.0.0.1:1"),
            ("START_TIMEOUT_SECONDS", "600"),
        ];
        let node = with(settings).data(&data);
        let (mut command, event) = match worker {
            true => (node.worker_command(), "\"health\""),
            false => (node.command(), "\"starting\""),
        };
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        // Where its health is stands in the log before anything else that it does.
        let (found, lines) = tokio::task::spawn_blocking(move || {
            let mut lines = BufReader::new(stderr).lines().map(Result::unwrap);
            let line = lines.find(|line| line.contains(event)).unwrap();
            (serde_json::from_str::<Value>(&line).unwrap()["address"].as_str().unwrap().to_owned(), lines)
        })
        .await
        .unwrap();
        std::thread::spawn(move || lines.count());
        Self { child, base: format!("http://{found}"), _data: data, _nobody: nobody }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_workers_health_is_told_from_the_start() {
    let mut worker = Waiting::start(true).await;
    let get = async |path: &str| {
        let response = reqwest::get(format!("{}{path}", worker.base)).await.unwrap();
        let kind = response.headers()["content-type"].to_str().unwrap().to_owned();
        assert_eq!(kind, "application/json; charset=utf-8");
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    assert_eq!(get("/healthz").await, (200, serde_json::json!({"status": "ok"})));
    let (status, body) = get("/readyz").await;
    assert_eq!((status, &body["code"]), (503, &"store_unavailable".into()), "{body}");
    assert_eq!(body["notReady"], serde_json::json!(["store", "bus"]));
    assert_eq!((&body["success"], &body["retryable"]), (&false.into(), &true.into()), "{body}");
    assert_eq!(get("/metrics").await.0, 503, "there is nothing to measure yet");
    for path in ["/", "/mcp/servers", "/healthz/x"] {
        let (status, body) = get(path).await;
        assert_eq!((status, &body["code"]), (404, &"not_found".into()), "{path}");
        assert!(body["requestId"].is_string() && body["success"] == false, "{body}");
    }
    // Many who connect and say nothing keep nobody from asking later.
    let address = worker.base.trim_start_matches("http://").to_owned();
    let idle: Vec<_> = (0..200).filter_map(|_| std::net::TcpStream::connect(&address).ok()).collect();
    assert!(!idle.is_empty());
    drop(idle);
    eventually("health answers again", async || {
        reqwest::get(format!("{}/healthz", worker.base)).await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;

    // A signal while it waits is the end, and no failure.
    kill(Pid::from_raw(i32::try_from(worker.child.id()).unwrap()), Signal::SIGTERM).unwrap();
    let status = worker.child.wait().unwrap();
    assert!(status.success(), "{status}");
    let mut said = String::new();
    worker.child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "", "it never said that it serves");
}

#[tokio::test]
async fn a_gateways_health_is_told_from_the_start() {
    let mut gateway = Waiting::start(false).await;
    let client = reqwest::Client::new();
    let healthy = client.get(format!("{}/healthz", gateway.base)).send().await.unwrap();
    assert_eq!(healthy.status(), 200);
    for path in ["/readyz", "/mcp/servers", "/mcp/tool/call"] {
        let answer = client.post(format!("{}{path}", gateway.base)).body("{}").send().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["retry-after"]),
            (503, &"1".parse().unwrap())
        );
        let body: Value = answer.json().await.unwrap();
        assert_eq!((&body["code"], &body["success"]), (&"store_unavailable".into(), &false.into()), "{body}");
        assert_eq!(body["outcome"] == "not_started", path == "/mcp/tool/call", "{body}");
    }
    kill(Pid::from_raw(i32::try_from(gateway.child.id()).unwrap()), Signal::SIGTERM).unwrap();
    assert!(gateway.child.wait().unwrap().success());
}

#[tokio::test]
async fn a_port_in_use_is_said_clearly() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let settings: Set<'_> = &[
        ("MONGODB_URI", "mongodb://127.0.0.1:1"),
        ("SECRETS_KEY", KEY),
        ("NATS_URL", "nats://127.0.0.1:1"),
        ("WORKER_PORT", &port),
    ];
    let output = ended(with(settings).worker_command(), &[]).await;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(TEMPORARY), "{said}");
    assert!(said.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{said}");
    assert!(said.contains("WORKER_PORT"), "{said}");
}

#[tokio::test]
async fn the_fleet_of_one_machine() {
    let api = Deployment::start().await;
    let fleet = api.get("/fleet").await.ok().json();
    assert_eq!(fleet["success"], true, "{fleet}");
    let gateways = fleet["gateways"].as_array().unwrap();
    assert_eq!(gateways.len(), 1, "{fleet}");
    assert_eq!((&gateways[0]["role"], &gateways[0]["draining"]), (&"gateway".into(), &false.into()));
    assert_eq!(gateways[0]["version"], env!("CARGO_PKG_VERSION"));
    assert!(gateways[0]["id"].as_str().unwrap().starts_with("g-"), "{fleet}");
    assert!(gateways[0]["keys"].as_array().is_some_and(|keys| !keys.is_empty()), "{fleet}");
    assert!(gateways[0]["heardMs"].is_number() && gateways[0]["started"].is_string(), "{fleet}");
    for worker in fleet["workers"].as_array().unwrap() {
        assert_eq!(worker["role"], "worker", "{fleet}");
    }
    assert_eq!(api.get("/fleet").await.json()["gateways"][0]["id"], gateways[0]["id"]);
    api.post("/fleet", &Value::Null).await.fails(405, "method_not_allowed");
}
