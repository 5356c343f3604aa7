//! What the fleet says of itself, and what happens when parts of it come and go.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::deployment::{Data, Deployment, eventually};

#[tokio::test]
async fn the_fleet_shows_its_nodes() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let owner = api.owners_of("echo").await;
    assert_eq!(owner.len(), 1, "one owner is enough for a server that nobody calls");
    eventually("the owner is shown", async || {
        let fleet = api.get("/fleet").await.ok().json();
        let workers = fleet["workers"].as_array().unwrap().clone();
        assert_eq!(workers.len(), 2, "{fleet}");
        assert_eq!(fleet["gateways"].as_array().unwrap().len(), 2, "{fleet}");
        for node in workers.iter().chain(fleet["gateways"].as_array().unwrap()) {
            assert_eq!(node["version"], env!("CARGO_PKG_VERSION"));
            assert_eq!(node["wire"], json!([1, 1]));
            assert!(node["started"].as_str().is_some_and(|text| text.ends_with('Z')), "{node}");
            assert!(node["heardMs"].as_u64().is_some_and(|heard| heard < 3_000), "{node}");
            assert_eq!(node["draining"], false);
        }
        let owned: Vec<_> = workers
            .iter()
            .filter(|worker| worker["servers"].as_array().unwrap().iter().any(|load| load["name"] == "echo"))
            .collect();
        owned.len() == 1
            && owned[0]["id"] == owner[0].as_str()
            && owned[0]["servers"][0]["status"] == "connected"
            && owned[0]["servers"][0]["slots"] == 64
    })
    .await;
}

/// Runs a program of the deployment's to its end, with settings of its own.
async fn ended(api: &Deployment, env: &[(&str, &str)], argument: &str) -> (Option<i32>, String) {
    let mut node = Deployment::builder().data(&api.data());
    for (name, value) in env {
        node = node.env(name, *value);
    }
    let mut command = node.command();
    command.arg(argument);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    (output.status.code(), said)
}

#[tokio::test]
async fn a_node_that_is_not_of_this_fleet_is_refused() {
    let mut api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let rings = |name: &str, lines: &[&str]| {
        let path = api.data().path().join(name);
        std::fs::write(&path, lines.join("\n")).unwrap();
        path.to_str().unwrap().to_owned()
    };
    // The fleet's key is k1 there.
    let (old, new) =
        ("k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", "k2:__79_Pv6-fj39vX08_Lx8O_u7ezr6uno5-bl5OPi4eA");
    let (hasty, known) = (rings("hasty", &[new, old]), rings("known", &[old, new]));
    let other = format!("{}-other", api.data().name());
    let cases: [(&[(&str, &str)], &str); 3] = [
        (&[("MONGO_DBNAME", &other)], "uses another database"),
        (&[("SECRETS_KEY", ""), ("SECRETS_KEYS_FILE", &hasty)], "this node would encrypt with the key k2"),
        (&[("SECRETS_KEY", "ff01020304050607ff090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f")], "differs"),
    ];
    for (settings, expected) in cases {
        for argument in ["check", "serve"] {
            let (status, said) = ended(&api, settings, argument).await;
            assert_eq!(status, Some(78), "{argument}: {said}");
            assert!(said.contains(expected), "{argument}: {said}");
        }
    }
    // A new key that stands behind the old one harms nobody.
    let ring: &[(&str, &str)] = &[("SECRETS_KEY", ""), ("SECRETS_KEYS_FILE", &known)];
    let (status, said) = ended(&api, ring, "check").await;
    assert_eq!(status, Some(0), "{said}");
    let agrees = "gateways heard: 2, workers heard: 2; they have this node's store and keys";
    assert!(said.contains(agrees), "{said}");
    // Nothing of it is left behind that would keep others from joining.
    api.add_worker().await;
    assert_eq!(api.call("echo", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    drop_database(api.data().mongo(), &other).await;
}

async fn drop_database(mongo: &str, name: &str) {
    let client = mongodb::Client::with_uri_str(mongo).await.unwrap();
    client.database(name).drop().await.unwrap();
}

#[tokio::test]
async fn a_lost_worker_is_noticed_and_its_call_answered_honestly() {
    let mut api = Deployment::start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    let owner = api.owners_of("echo").await.remove(0);
    let lost = api.take_worker(&owner);
    // Until the server has seen the call it may still be given to another worker.
    let started = api.data().path().join("started");
    let sleep = json!({"ms": 20_000, "started": started});
    let (answer, killed) = tokio::join!(api.call("echo", "sleep", sleep), async {
        eventually("the call is in flight", async || started.exists()).await;
        lost.signal(Signal::SIGKILL);
        Instant::now()
    });
    let took = killed.elapsed();
    let answer = answer.fails(502, "worker_lost").json();
    assert_eq!(answer["outcome"], "unknown");
    assert!(took < Duration::from_secs(3), "it took {took:?}");
    // The other worker takes the server over, and calls go on meanwhile.
    assert_eq!(api.call("echo", "echo", json!({"text": "still here"})).await.tool_text(), "still here");
    let owners = api.owners_of("echo").await;
    assert!(owners.len() == 1 && owners[0] != owner, "{owners:?}");
}

#[tokio::test]
async fn a_server_is_run_again_although_nobody_calls() {
    let mut api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let owner = api.owners_of("echo").await.remove(0);
    let start = Instant::now();
    drop(api.take_worker(&owner));
    eventually("another worker runs it", async || {
        let owners = api.owners_of("echo").await;
        !owners.is_empty() && owners[0] != owner
    })
    .await;
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?}", start.elapsed());
}

/// A worker that hangs is not one that died: its connection stands, and it may come back.
#[tokio::test]
async fn a_frozen_worker_is_lost_and_does_nothing_stale_when_it_wakes() {
    let api = Deployment::start().await;
    let file = api.data().path().join("touched");
    api.add_fixture("echo", &["--more"], json!({})).await;
    let owner = api.owners_of("echo").await.remove(0);
    let frozen = api.workers().into_iter().find(|worker| worker.id == owner).unwrap();
    frozen.signal(Signal::SIGSTOP);
    let start = Instant::now();
    let touch = |text: String| {
        let (api, file) = (&api, &file);
        async move { api.call("echo", "touch", json!({"path": file, "text": text})).await }
    };
    let answers = futures_util::future::join_all((0..8).map(|at| touch(format!("call {at}")))).await;
    assert!(start.elapsed() < Duration::from_secs(15), "it took {:?}", start.elapsed());
    frozen.signal(Signal::SIGCONT);
    eventually("the worker is back", async || {
        let fleet = api.get("/fleet").await.ok().json();
        fleet["workers"].as_array().unwrap().len() == 2
    })
    .await;
    for at in 0..20 {
        touch(format!("after {at}")).await.ok();
    }
    let lines = std::fs::read_to_string(&file).unwrap();
    for (at, answer) in answers.into_iter().enumerate() {
        let times = lines.lines().filter(|line| *line == format!("call {at}")).count();
        let outcome = match answer.status {
            200 => "completed".to_owned(),
            _ => answer.json()["outcome"].as_str().unwrap_or_default().to_owned(),
        };
        match outcome.as_str() {
            "completed" => assert_eq!(times, 1, "call {at}"),
            "not_started" => assert_eq!(times, 0, "call {at}"),
            other => assert!(other == "unknown" && times <= 1, "call {at}: {other}, {times} times"),
        }
    }
}

#[tokio::test]
async fn a_rolling_restart_of_workers_fails_no_call() {
    let mut api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let stop = tokio_util::sync::CancellationToken::new();
    let address = api.base().to_owned();
    let client = reqwest::Client::new();
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let (client, address, stop) = (client.clone(), address.clone(), stop.clone());
            tokio::spawn(async move {
                let mut answers = Vec::new();
                while !stop.is_cancelled() {
                    let body = json!({"serverName": "echo", "methodName": "sleep", "args": {"ms": 20}});
                    let answer =
                        client.post(format!("{address}/mcp/tool/call")).json(&body).send().await.unwrap();
                    let (status, text) = (answer.status().as_u16(), answer.text().await.unwrap());
                    if status != 200 {
                        answers.push(text);
                    }
                }
                answers
            })
        })
        .collect();
    for _ in 0..2 {
        let oldest = api.workers()[0].id.clone();
        let leaving = api.take_worker(&oldest);
        assert!(leaving.stop().await.success());
        api.add_worker().await;
    }
    stop.cancel();
    for caller in callers {
        assert_eq!(caller.await.unwrap(), [""; 0]);
    }
}

#[tokio::test]
async fn a_worker_leaves_in_order_when_it_is_asked_to() {
    let mut api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let owner = api.owners_of("echo").await[0].clone();
    let slow = api.call("echo", "sleep", json!({"ms": 1_500}));
    let leaving = async {
        eventually("the call runs", async || {
            let server = api.server("echo").await;
            server["instances"].as_array().unwrap().iter().any(|one| one["inFlight"] == 1)
        })
        .await;
        let asked = api.post(&format!("/fleet/workers/{owner}/drain"), &json!({})).await;
        assert_eq!(asked.status, 202, "{}", asked.text);
        // Others take the calls that come.
        assert_eq!(api.call("echo", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    };
    let (slow, ()) = tokio::join!(slow, leaving);
    slow.ok();
    assert!(api.take_worker(&owner).ended().await.success(), "it ends by itself");
    eventually("it is gone", async || {
        let fleet = api.get("/fleet").await.ok().json();
        fleet["workers"].as_array().unwrap().iter().all(|worker| worker["id"] != owner.as_str())
    })
    .await;
    assert!(!api.owners_of("echo").await.contains(&owner));
    let again = api.post(&format!("/fleet/workers/{owner}/drain"), &json!({})).await;
    again.fails(404, "worker_not_found");
}

#[tokio::test]
async fn a_named_call_whose_worker_is_lost_is_never_made_again() {
    let mut api = Deployment::start().await;
    api.add_fixture("s", &["--more"], json!({})).await;
    let owner = api.owners_of("s").await[0].clone();
    let named = || {
        let body = json!({"serverName": "s", "methodName": "sleep", "args": {"ms": 20_000}});
        let request = api.request(reqwest::Method::POST, "/mcp/tool/call");
        request.header("Idempotency-Key", "once").json(&body)
    };
    let first = api.send(named());
    let kill = async {
        eventually("the call runs", async || {
            let server = api.server("s").await;
            server["instances"].as_array().unwrap().iter().any(|one| one["inFlight"] == 1)
        })
        .await;
        api.workers().into_iter().find(|worker| worker.id == owner).unwrap().signal(Signal::SIGKILL);
    };
    let (first, ()) = tokio::join!(first, kill);
    assert_eq!(first.fails(502, "worker_lost").json()["outcome"], "unknown");
    // Until the worker is known to be lost, the call counts as being under way.
    eventually("its end is known", async || {
        let again = api.send(named()).await;
        match again.status {
            409 => {
                again.fails(409, "idempotency_in_progress");
                false
            }
            _ => {
                assert!(again.headers.contains_key("idempotency-replayed"));
                assert_eq!(again.fails(502, "worker_lost").json()["outcome"], "unknown");
                true
            }
        }
    })
    .await;
    drop(api.take_worker(&owner));
}

#[tokio::test]
async fn without_a_worker_there_is_an_answer_at_once() {
    let mut api = Deployment::builder().workers(1).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    assert_eq!(api.get("/readyz").await.status, 200);
    let only = api.workers()[0].id.clone();
    drop(api.take_worker(&only));
    eventually("nobody is there", async || {
        api.call("echo", "echo", json!({"text": "x"})).await.code() == "no_worker"
    })
    .await;
    let start = Instant::now();
    let answer = api.call("echo", "echo", json!({"text": "x"})).await.fails(503, "no_worker");
    assert!(start.elapsed() < Duration::from_millis(500), "it took {:?}", start.elapsed());
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(answer.json()["outcome"], "not_started");
    let unready = api.get("/readyz").await.fails(503, "no_worker").json();
    assert_eq!(unready["notReady"], json!(["worker"]));
    api.add_worker().await;
    eventually("calls are taken again", async || {
        api.call("echo", "echo", json!({"text": "x"})).await.status == 200
    })
    .await;
}

/// Everything that a restart of NATS interrupts goes on afterwards.
#[tokio::test]
async fn nats_may_restart() {
    let mut nats =
        tokio::task::spawn_blocking(|| mcp_shared::testing::services::NatsServer::start("")).await.unwrap();
    let api = Deployment::builder().env("NATS_URL", nats.url()).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let in_flight = api.call("echo", "sleep", json!({"ms": 4_000}));
    let (answer, nats) = tokio::join!(in_flight, async {
        eventually("the call is in flight", async || {
            api.server("echo").await["instances"][0]["inFlight"] == 1
        })
        .await;
        let restart = move || {
            nats.restart();
            nats
        };
        tokio::task::spawn_blocking(restart).await.unwrap()
    });
    assert_eq!(answer.tool_text(), "slept 4000", "a call waits for the bus to come back");
    eventually("calls go on", async || {
        let answer: Value = match api.call("echo", "echo", json!({"text": "x"})).await {
            answer if answer.status == 200 => return true,
            answer => answer.json(),
        };
        assert_eq!(answer["outcome"], "not_started", "{answer}");
        false
    })
    .await;
    drop(nats);
}

#[tokio::test]
async fn a_trusted_call_whose_worker_is_lost_is_made_elsewhere() {
    let mut api = Deployment::start().await;
    let data = Data::new();
    for (server, trusted) in [("plain", false), ("trusted", true)] {
        api.add_worker().await;
        let more = json!({"trustAnnotations": trusted});
        api.add_fixture(server, &["--more", "--read-only"], more).await;
        let path = data.path().join(server);
        let owner = api.owners_of(server).await[0].clone();
        let call = api.call(server, "touch", json!({"path": path, "text": "x", "hangUntil": 1}));
        let killing = async {
            eventually("the call runs", async || path.exists()).await;
            api.workers().iter().find(|worker| worker.id == owner).unwrap().signal(Signal::SIGKILL);
        };
        let (answer, ()) = tokio::join!(call, killing);
        let ran = std::fs::read_to_string(&path).unwrap().lines().count();
        if trusted {
            assert_eq!(answer.ok().tool_text(), "touched");
            assert_eq!(ran, 2);
        } else {
            assert_eq!(answer.fails(502, "worker_lost").json()["outcome"], "unknown");
            assert_eq!(ran, 1);
        }
        drop(api.take_worker(&owner));
    }
}
