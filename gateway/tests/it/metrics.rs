//! What `/metrics` shows: all of the table and nothing else, bounded whatever callers say; and that it moves by the right
//! numbers.

use std::collections::{BTreeMap, BTreeSet};

use mcp_shared::metrics::{Closed, Metric, Nodes, StatusClass};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::{Method, header};
use serde_json::{Value, json};

use crate::{
    deployment::{Answer, Builder, Deployment, eventually, tls_file},
    packages, remote,
};

#[path = "metrics/observability.rs"]
mod observability;
#[path = "metrics/shown.rs"]
mod shown;

use shown::{Shown, Sums, moves};

/// Gateways of a deployment. Each has limits of its own, and gets every so many-th request.
const GATEWAYS: usize = if crate::CLUSTER { 2 } else { 1 };

/// The routes of the program, as it prints them.
fn routes() -> BTreeSet<(String, String)> {
    let printed = Deployment::builder().command().arg("routes").output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    let routes = printed.lines().map(|line| {
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap())
    });
    let routes: BTreeSet<_> = routes.chain([("other".to_owned(), "other".to_owned())]).collect();
    assert!(routes.len() > 40, "{printed}");
    routes
}

/// What a node of these kinds has to show.
fn expected(is_gateway: bool, is_worker: bool) -> BTreeSet<Metric> {
    let shows = |metric: &&Metric| match metric.nodes() {
        Nodes::Gateways | Nodes::GatewaysIfSet => is_gateway,
        Nodes::Workers => is_worker,
        Nodes::Cluster => crate::CLUSTER,
        Nodes::All => true,
    };
    Metric::ALL.iter().filter(shows).copied().collect()
}

/// With whatever a metric is shown of only where it is set.
fn with_all_settings() -> Builder {
    let path = |name| tls_file(name).to_str().unwrap().to_owned();
    Deployment::builder()
        .env("USER_MAX_CALLS", "100")
        .env("USER_MAX_RATE", "1000")
        .env("TLS_CERT_FILE", path("localhost.pem"))
        .env("TLS_KEY_FILE", path("localhost.key"))
}

#[tokio::test]
async fn every_node_shows_what_the_table_says_and_nothing_else() {
    let api = with_all_settings().start().await;
    let routes = routes();
    let gateways = api.gateways().into_iter().map(|node| (node, true, !crate::CLUSTER));
    let workers = api.workers().into_iter().map(|node| (node, false, true));
    for (node, is_gateway, is_worker) in gateways.chain(workers) {
        let shown = Shown::by(&api, node).await;
        let expected = expected(is_gateway, is_worker);
        let kinds: BTreeMap<String, String> = expected
            .iter()
            .map(|metric| {
                let name = metric.name();
                let family = name.strip_suffix("_total").unwrap_or(&name).to_owned();
                (family, metric.kind().as_str().to_owned())
            })
            .collect();
        assert_eq!(shown.kinds, kinds);
        let of_series: BTreeMap<String, Metric> = expected
            .iter()
            .flat_map(|metric| metric.series().into_iter().map(|name| (name, *metric)))
            .collect();
        let mut seen: BTreeMap<Metric, BTreeSet<Vec<&str>>> = BTreeMap::new();
        for sample in &shown.samples {
            let metric = of_series[&sample.name];
            let mut labels = sample.labels.clone();
            assert_eq!(labels.remove("le").is_some(), sample.name.ends_with("_bucket"), "{}", sample.name);
            let names: BTreeSet<_> = metric.labels().iter().map(|label| label.name).collect();
            assert_eq!(labels.keys().map(String::as_str).collect::<BTreeSet<_>>(), names, "{}", sample.name);
            for label in metric.labels() {
                let value = labels[label.name].as_str();
                match (label.values, label.name) {
                    (Some(values), _) => assert!(values().contains(&value), "{}: {value}", sample.name),
                    (None, "version") => assert_eq!(value, env!("CARGO_PKG_VERSION")),
                    (None, "method" | "route") => {
                        let route = (labels["method"].clone(), labels["route"].clone());
                        assert!(routes.contains(&route), "{route:?}");
                    }
                    (None, other) => panic!("nothing is known of {other}"),
                }
            }
            let values = metric.labels().iter().map(|label| sample.labels[label.name].as_str()).collect();
            seen.entry(metric).or_default().insert(values);
        }
        shown.buckets_are_whole();
        // Whatever a label can say is there from the start.
        for metric in expected {
            let own = metric.labels().iter().any(|label| label.name == "route");
            let count = |label: &mcp_shared::metrics::Label| label.values.map_or(1, |values| values().len());
            let all =
                metric.labels().iter().map(count).product::<usize>() * if own { routes.len() } else { 1 };
            assert_eq!(seen.get(&metric).map_or(0, BTreeSet::len), all, "{}", metric.name());
        }
    }
}

#[tokio::test]
async fn what_callers_say_makes_no_time_series() {
    let api = Deployment::start().await;
    let before = Shown::all(&api).await;
    api.add_fixture("oddserver", &["--more"], json!({})).await;
    let user = "odd user \"of\" {a=\"b\"} ü";
    api.set_secret(user, "oddserver", "odd-secret", "oddvalue").await.ok();
    for _ in 0..GATEWAYS {
        api.call_as(user, "oddserver", "echo", json!({"text": "odd"})).await.ok();
        api.call_as(user, "oddserver", "odd\"tool\u{e9}", json!({"odd": "odd"})).await;
        api.call_as(user, "oddother", "echo", json!({})).await.fails(404, "server_not_found");
        api.get("/odd/path?odd=odd").await.fails(404, "not_found");
        api.get("/mcp/servers/oddserver").await.ok();
        api.send(api.request(Method::from_bytes(b"ODD").unwrap(), "/mcp/servers/oddserver")).await;
    }
    let after = Shown::all(&api).await;
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.series(), after.series());
        assert!(!after.text.to_ascii_lowercase().contains("odd"), "{}", after.text);
    }
}

async fn streamed(api: &Deployment, tool: &str, args: Value) -> Answer {
    let body = json!({"serverName": "echo", "methodName": tool, "args": args});
    let request = api.request(Method::POST, "/mcp/tool/call").header(header::ACCEPT, "text/event-stream");
    api.send(request.json(&body)).await.ok()
}

#[tokio::test]
async fn what_becomes_of_calls_is_counted() {
    let api = Deployment::builder().env("USER_MAX_CALLS", "1").workers(1).start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    let before = Sums::of(&api).await;
    let mut answers = Vec::new();
    for at in 0..3 {
        answers.push(api.call("echo", "echo", json!({"text": format!("{at}")})).await.ok());
    }
    for _ in 0..2 {
        answers.push(api.call("echo", "fail", json!({})).await);
    }
    answers.push(api.call("echo", "rpc_error", json!({"code": -32000, "message": "no"})).await);
    answers.push(api.call("nobody", "echo", json!({})).await.fails(404, "server_not_found"));
    answers.push(api.call("echo", "echo", json!("no object")).await.fails(400, "invalid_request"));
    let hang = json!({"serverName": "echo", "methodName": "hang", "args": {}});
    let late = api.request(Method::POST, "/mcp/tool/call").header("X-Request-Timeout-Ms", "300");
    answers.push(api.send(late.json(&hang)).await.fails(504, "deadline_exceeded"));
    answers.push(streamed(&api, "echo", json!({"text": "a"})).await);
    answers.push(streamed(&api, "rpc_error", json!({"code": -32000, "message": "no"})).await);
    // Somebody's only call is under way, and so a second one is refused.
    let mut of_alice = hang;
    of_alice["username"] = "alice".into();
    let mut open = tokio::task::JoinSet::new();
    for _ in 0..GATEWAYS {
        open.spawn(api.request(Method::POST, "/mcp/tool/call").json(&of_alice).send());
    }
    let running = GATEWAYS as f64;
    eventually("the calls run", async || api.metric("mcp_gateway_calls").await == running).await;
    eventually("they hold slots", async || {
        // The one that was too late holds its slot until its server has had time to give it up.
        api.metric("mcp_worker_running_calls").await >= running
            && Sums::of(&api).await.since(&before, "mcp_call_body_bytes_count{direction=in}")
                == answers.len() as f64 + running
    })
    .await;
    for _ in 0..GATEWAYS {
        answers.push(api.call_as("alice", "echo", "echo", json!({})).await.fails(429, "rate_limited"));
    }
    let after = Sums::of(&api).await;
    let moved = |series: &str| after.since(&before, series) as usize;
    let ends = |ends: &[(&str, usize)], name: &str| {
        for (outcome, count) in ends {
            assert_eq!(moved(&format!("{name}{{outcome={outcome}}}")), *count, "{name} {outcome}");
        }
    };
    ends(
        &[("ok", 4), ("tool_error", 2), ("completed", 2), ("unknown", 1), ("not_started", 2 + GATEWAYS)],
        "mcp_calls_total",
    );
    // What the gateway refused by itself has not come here, and nor has a server that nobody knows.
    ends(&[("ok", 4), ("tool_error", 2), ("completed", 2), ("not_started", 0)], "mcp_server_calls_total");
    for (code, count) in [
        ("mcp_error", 2),
        ("server_not_found", 1),
        ("invalid_request", 1),
        ("deadline_exceeded", 1),
        ("rate_limited", GATEWAYS),
        ("internal", 0),
    ] {
        assert_eq!(moved(&format!("mcp_errors_total{{code={code}}}")), count, "{code}");
    }
    assert_eq!(moved("mcp_server_call_errors_total{code=mcp_error}"), 2);
    assert_eq!(moved("mcp_refused_total{reason=user_calls}"), GATEWAYS);
    for class in StatusClass::ALL {
        let count = answers.iter().filter(|answer| StatusClass::of(answer.status) == *class).count();
        let series =
            format!("mcp_http_requests_total{{method=POST,route=/mcp/tool/call,status={}}}", class.text());
        assert_eq!(moved(&series), count, "{series}");
    }
    let json = answers.len() - 2;
    assert_eq!(moved("mcp_call_duration_seconds_count{reply=json}"), json);
    assert_eq!(moved("mcp_call_duration_seconds_count{reply=events}"), 2);
    assert_eq!(moved("mcp_call_body_bytes_count{direction=in}"), answers.len() + GATEWAYS);
    assert_eq!(moved("mcp_call_body_bytes_count{direction=out}"), 6);
    let bytes = after.since(&before, "mcp_call_body_bytes_sum{direction=out}");
    assert!(bytes > 6.0 * 20.0 && bytes < 6.0 * 500.0, "{bytes}");
    // Those that hang have a slot, their arguments and their secrets, and the server still has them.
    let came = 9;
    for stage in ["queue", "handshake", "secrets"] {
        let series = format!("mcp_call_stage_duration_seconds_count{{stage={stage},transport=stdio}}");
        moves(&api, &before, &series, came + GATEWAYS).await;
    }
    moves(&api, &before, "mcp_call_stage_duration_seconds_count{stage=server,transport=stdio}", came).await;
    assert_eq!(moved("mcp_call_stage_duration_seconds_count{stage=queue,transport=http}"), 0);
    let after = Sums::of(&api).await;
    let late = after.since(&before, "mcp_call_stage_duration_seconds_sum{stage=server,transport=stdio}");
    assert!((0.2..5.0).contains(&late), "the call that was too late took {late} s");

    open.shutdown().await;
    moves(&api, &before, "mcp_calls_total{outcome=left}", GATEWAYS).await;
    // Whether the one that was too late was ended by its worker or by its gateway, nobody can say.
    eventually("the calls are over at the worker as well", async || {
        let now = Sums::of(&api).await;
        let of = |outcome: &str| now.since(&before, &format!("mcp_server_calls_total{{outcome={outcome}}}"));
        of("left") + of("unknown") == 1.0 + running && of("left") >= running
    })
    .await;
    moves(
        &api,
        &before,
        "mcp_call_stage_duration_seconds_count{stage=server,transport=stdio}",
        came + GATEWAYS,
    )
    .await;
}

#[tokio::test]
async fn starts_and_ends_of_servers_are_counted_by_their_reasons() {
    let remote = remote::remote(&[]);
    let api = remote::permitting().workers(1).start().await;
    let before = Sums::of(&api).await;
    let exits = |reason: &str| format!("mcp_server_exits_total{{reason={reason}}}");
    let starts = |transport: &str, result: &str| {
        format!("mcp_server_starts_total{{result={result},transport={transport}}}")
    };
    api.add_fixture("one", &["--more"], json!({})).await;
    moves(&api, &before, &starts("stdio", "ok"), 1).await;
    api.call("one", "crash", json!({})).await.fails(502, "server_crashed");
    moves(&api, &before, &exits("exited"), 1).await;
    moves(&api, &before, &starts("stdio", "ok"), 2).await;
    eventually("it runs", async || api.server("one").await["status"] == "connected").await;
    kill(Pid::from_raw(api.pids("one").await[0]), Signal::SIGKILL).unwrap();
    moves(&api, &before, &exits("killed"), 1).await;
    moves(&api, &before, &starts("stdio", "ok"), 3).await;
    api.add_fixture("idle", &[], json!({"idleTimeout": 100})).await;
    moves(&api, &before, &exits("idle"), 1).await;
    api.put("/mcp/servers/one/disable", None).await.ok();
    moves(&api, &before, &exits("stopped"), 1).await;
    remote::add(&api, "remote", &remote, json!({})).await;
    moves(&api, &before, &starts("http", "ok"), 1).await;
    let gone = json!({"name": "gone", "command": "/nowhere/at/all", "args": []});
    api.post("/mcp/servers", &gone).await;
    eventually("a start has failed", async || {
        Sums::of(&api).await.since(&before, &starts("stdio", "failed")) >= 1.0
    })
    .await;
    let now = Sums::of(&api).await;
    assert_eq!(now.since(&before, &starts("http", "failed")), 0.0);
    assert_eq!(now.since(&before, &starts("stdio", "ok")), 4.0);
    assert_eq!(now.since(&before, "mcp_server_start_duration_seconds_count{transport=http}"), 1.0);
    assert_eq!(now.get("mcp_server_instances{transport=http}"), 1.0);
    assert_eq!(now.get("mcp_server_instances{transport=stdio}"), 0.0);
    // The built-in server is one of them at every worker.
    let builtin = api.owners().len() as f64;
    for (status, count) in [("connected", 1.0 + builtin), ("disabled", 1.0), ("disconnected", 1.0)] {
        assert_eq!(now.get(&format!("mcp_servers{{status={status}}}")), count, "{status}");
    }
    let all = ["exited", "killed", "too_large", "disconnected", "lost", "idle", "stuck", "stopped"];
    let ends: f64 = all.iter().map(|reason| now.since(&before, &exits(reason))).sum();
    assert_eq!(ends, 4.0, "each start has one end");
}

#[tokio::test]
async fn where_secrets_come_from_and_calls_that_were_made_before_are_counted() {
    let api = Deployment::builder().workers(1).start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    api.set_secret("alice", "echo", "KEY", "value").await.ok();
    let before = Sums::of(&api).await;
    let from = |source: &str| format!("mcp_secret_reads_total{{source={source}}}");
    for _ in 0..3 {
        api.call_as("alice", "echo", "args", json!({})).await.ok();
    }
    let now = Sums::of(&api).await;
    assert_eq!([now.since(&before, &from("store")), now.since(&before, &from("memory"))], [1.0, 2.0]);
    let body = json!({"serverName": "echo", "methodName": "count", "args": {}});
    let mut said = Vec::new();
    for _ in 0..2 {
        let named = api.request(Method::POST, "/mcp/tool/call").header("Idempotency-Key", "one");
        said.push(api.send(named.json(&body)).await.tool_text());
    }
    assert_eq!(said[0], said[1]);
    let now = Sums::of(&api).await;
    assert_eq!(now.since(&before, "mcp_calls_replayed_total"), 1.0);
    assert_eq!(now.since(&before, "mcp_calls_total{outcome=ok}"), 5.0);
}

#[tokio::test]
async fn jobs_are_counted_by_what_came_of_them() {
    let registry = packages::registry();
    let api = packages::from(&registry).workers(1).start().await;
    let before = Sums::of(&api).await;
    let jobs = |kind: &str, outcome: &str| format!("mcp_install_jobs_total{{kind={kind},outcome={outcome}}}");
    let clock = json!({"name": "@acme/clock", "version": "old", "serverName": "clock"});
    packages::install(&api, clock).await.ok();
    api.put("/packages/clock/upgrade", None).await.ok();
    let nothing = json!({"name": "@acme/nothing", "serverName": "nothing"});
    packages::install(&api, nothing).await.fails(404, "package_not_found");
    let now = Sums::of(&api).await;
    for (kind, outcome, count) in [
        ("install", "done", 1.0),
        ("upgrade", "done", 1.0),
        ("install", "failed", 1.0),
        ("upgrade", "failed", 0.0),
    ] {
        assert_eq!(now.since(&before, &jobs(kind, outcome)), count, "{kind} {outcome}");
    }
    assert_eq!(now.since(&before, "mcp_install_job_duration_seconds_count{kind=install}"), 2.0);
    eventually("none is under way", async || api.metric("mcp_install_jobs_running").await == 0.0).await;
}

#[tokio::test]
async fn store_and_bus_are_counted() {
    let api = Deployment::start().await;
    let before = Sums::of(&api).await;
    for _ in 0..GATEWAYS {
        api.get("/readyz").await.ok();
    }
    let done =
        |work: &str, end: &str| format!("mcp_store_operations_total{{operation={work},outcome={end}}}");
    assert_eq!(Sums::of(&api).await.since(&before, &done("ping", "ok")), GATEWAYS as f64);
    api.add_fixture("echo", &[], json!({})).await;
    api.register_fixture("echo", &[], json!({})).await.fails(409, "server_already_exists");
    let now = Sums::of(&api).await;
    let count = |work: &str, end: &str| now.since(&before, &done(work, end));
    assert!(count("write", "ok") >= 1.0 && count("read", "ok") >= 1.0);
    assert_eq!(count("write", "already_exists"), 1.0);
    assert_eq!(count("write", "unavailable") + count("read", "unavailable"), 0.0);
    assert!(now.since(&before, "mcp_store_operation_duration_seconds_count{operation=write}") >= 2.0);
    if crate::CLUSTER {
        assert_eq!(now.get("mcp_bus_connected"), 4.0);
        assert_eq!(now.get("mcp_fleet_workers"), 8.0, "each of four nodes hears two workers");
        for direction in ["in", "out"] {
            assert!(now.since(&before, &format!("mcp_bus_messages_total{{direction={direction}}}")) > 0.0);
            assert!(now.get(&format!("mcp_bus_payload_bytes_total{{direction={direction}}}")) > 0.0);
        }
        let connections =
            now.get("mcp_store_connections{state=idle}") + now.get("mcp_store_connections{state=in_use}");
        assert!((1.0..=4.0 * 32.0).contains(&connections), "{connections}");
        assert_eq!(now.get("mcp_store_connections_limit"), 4.0 * 32.0);
    }
    // What happened before it was looked at for the first time was the start of each node's own log.
    let (was, is) =
        (before.get("mcp_audit_lines_total{event=noted}"), now.get("mcp_audit_lines_total{event=noted}"));
    assert!(was >= GATEWAYS as f64 && is == was, "{was} {is}");
    for event in ["allowed", "done"] {
        moves(&api, &before, &format!("mcp_audit_lines_total{{event={event}}}"), 2).await;
    }
    assert!(now.get("process_resident_memory_bytes") > 1e6);
    assert!(now.get("process_open_fds") > 5.0 && now.get("mcp_runtime_tasks") > 1.0);
    assert!(now.since(&before, "mcp_runtime_busy_seconds_total") > 0.0);
}
