//! Encryption keys of a fleet: changed twice while it works, by nodes that may each be a step behind.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::deployment::{Answer, Builder, Data, Deployment, eventually};

const K1: &str = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const K2: &str = "k2:__79_Pv6-fj39vX08_Lx8O_u7ezr6uno5-bl5OPi4eA=";
const K3: &str = "k3:Zm9ydHkgdHdvIGJ5dGVzIG9mIG5vIG1lYW5pbmchISE=";
/// The folders of the nodes, and that of commands.
const NODES: [&str; 5] = ["gateway-0", "gateway-1", "worker-0", "worker-1", "."];

/// Gives nodes a key ring.
fn rings(data: &Data, nodes: &[&str], lines: &[&str]) {
    for node in nodes {
        let folder = data.path().join(node);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("ring"), lines.join("\n")).unwrap();
    }
}

fn fleet_of(data: &Data) -> Builder {
    // Each node has a file of its own, in its own folder.
    Deployment::builder().data(data).env("SECRETS_KEY", "").env("SECRETS_KEYS_FILE", "ring")
}

async fn start(data: &Data, lines: &[&str]) -> Deployment {
    rings(data, &NODES, lines);
    fleet_of(data).start().await
}

/// Waits until every node says that it has these keys, the first of which encrypts.
async fn all_have(api: &Deployment, kids: &[&str]) {
    eventually("all nodes have the keys", async || {
        let fleet = api.get("/fleet").await.ok().json();
        let nodes = ["gateways", "workers"].into_iter().flat_map(|kind| fleet[kind].as_array().unwrap());
        nodes.clone().count() == 4 && nodes.into_iter().all(|node| node["keys"] == json!(kids))
    })
    .await;
}

/// The next step of a change: every node has these lines, and reads them.
async fn take(api: &Deployment, lines: &[&str]) {
    rings(&api.data(), &NODES, lines);
    api.signal(Signal::SIGHUP);
    let kids: Vec<&str> = lines.iter().map(|line| line.split_once(':').unwrap().0).collect();
    all_have(api, &kids).await;
}

async fn to_first(api: &Deployment, path: &str, body: &Value) -> Answer {
    let base = &api.gateways()[0].base;
    api.send(reqwest::Client::new().post(format!("{base}{path}")).json(body)).await
}

async fn rewrap(api: &Deployment, rate: u32) -> Value {
    let base = api.gateways()[0].base.clone();
    let begun = to_first(api, "/admin/keys/rewrap", &json!({"rate": rate})).await;
    assert_eq!(begun.status, 202, "{}", begun.text);
    let client = reqwest::Client::new();
    let run = async || {
        let answer = api.send(client.get(format!("{base}/admin/keys/rewrap"))).await.ok();
        answer.json()["rewrap"].clone()
    };
    eventually("all is encrypted anew", async || run().await["state"] != "running").await;
    run().await
}

async fn values(api: &Deployment) -> Vec<(String, u64)> {
    let listed = api.get("/admin/keys").await.ok().json();
    let keys = listed["keys"].as_array().unwrap().iter();
    keys.map(|key| (key["id"].as_str().unwrap().to_owned(), key["values"].as_u64().unwrap())).collect()
}

async fn told(api: &Deployment, user: &str) -> Value {
    let answer = api.call_as(user, "echo", "args", json!({})).await;
    serde_json::from_str(&answer.tool_text()).unwrap()
}

/// Calls that use secrets, and secrets being set, until it is over.
struct Load {
    over: AtomicBool,
    done: AtomicUsize,
}

impl Load {
    async fn caller(self: Arc<Self>, api: Arc<Deployment>, number: usize) {
        let own = format!("caller-{number}");
        for round in 0_usize.. {
            if self.over.load(Ordering::SeqCst) {
                return;
            }
            let user = format!("user-{}", (round + number) % 10);
            assert_eq!(told(&api, &user).await, json!({"K": format!("key-of-{user}")}));
            let value = format!("value-{round}");
            api.set_secret(&own, "echo", "OWN", &value).await.ok();
            assert_eq!(told(&api, &own).await, json!({"OWN": value}));
            self.done.fetch_add(1, Ordering::SeqCst);
        }
    }

    async fn goes_on(&self) {
        let before = self.done.load(Ordering::SeqCst);
        eventually("calls go on", async || self.done.load(Ordering::SeqCst) > before + 10).await;
    }
}

async fn with_secrets(api: &Deployment, count: usize) {
    api.add_fixture("echo", &[], json!({"env": {"A": "a-variable"}})).await;
    for number in 0..count {
        let user = format!("user-{number}");
        api.set_secret(&user, "echo", "K", &format!("key-of-{user}")).await.ok();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_changed_twice_under_load_and_no_request_fails() {
    let data = Data::new();
    let api = Arc::new(start(&data, &[K1]).await);
    with_secrets(&api, 10).await;
    let load = Arc::new(Load { over: AtomicBool::new(false), done: AtomicUsize::new(0) });
    let callers: Vec<_> =
        (0..4).map(|number| tokio::spawn(Arc::clone(&load).caller(Arc::clone(&api), number))).collect();
    load.goes_on().await;

    // A key that others lack encrypts nothing.
    rings(&data, &["gateway-0"], &[K2, K1]);
    let hasty = to_first(&api, "/admin/keys/reload", &json!({})).await.fails(409, "keys_refused");
    assert!(hasty.text.contains("this node would encrypt with the key k2"), "{}", hasty.text);
    all_have(&api, &["k1"]).await;
    for (old, new, old_id, new_id) in [(K1, K2, "k1", "k2"), (K2, K3, "k2", "k3")] {
        take(&api, &[old, new]).await;
        let listed = api.get("/admin/keys").await.ok().json();
        assert!(listed["keys"].as_array().unwrap().iter().any(|key| key["id"] == old_id));
        take(&api, &[new, old]).await;
        load.goes_on().await;
        let run = rewrap(&api, 1_000).await;
        assert_eq!((&run["state"], &run["leftCount"]), (&json!("done"), &json!(0)), "{run}");
        let counted = values(&api).await;
        // 10 users, 4 callers, and the server's variable.
        assert!(counted.contains(&(new_id.to_owned(), 15)), "{counted:?}");
        assert!(counted.contains(&(old_id.to_owned(), 0)), "{counted:?}");
        api.post("/admin/keys/retire", &json!({"id": new_id})).await.fails(409, "key_in_use");
        // What it needs is not forgotten by mistake.
        rings(&data, &["gateway-0"], &[new]);
        to_first(&api, "/admin/keys/reload", &json!({})).await.fails(409, "keys_refused");
        api.post("/admin/keys/retire", &json!({"id": old_id})).await.ok();
        take(&api, &[new]).await;
        load.goes_on().await;
    }
    load.over.store(true, Ordering::SeqCst);
    for caller in callers {
        caller.await.unwrap();
    }
    for kind in ["unknown_kid", "tag_mismatch", "commit_mismatch", "format"] {
        assert_eq!(
            api.metric(&format!("mcp_integrity_failures_total{{kind=\"{kind}\"}}")).await,
            0.0,
            "{kind}"
        );
    }
    let log = api.log();
    for key in [K1, K2, K3] {
        assert!(!log.contains(key.split_once(':').unwrap().1), "the log has a key");
    }
    Arc::into_inner(api).unwrap().stop().await;
    // The retired keys are needed by nobody, and encrypt nothing any more.
    let api = fleet_of(&data).start().await;
    for number in 0..10 {
        let user = format!("user-{number}");
        assert_eq!(told(&api, &user).await, json!({"K": format!("key-of-{user}")}));
    }
    rings(&data, &["gateway-0"], &[K2, K3]);
    let retired = to_first(&api, "/admin/keys/reload", &json!({})).await.fails(409, "keys_refused");
    assert!(retired.text.contains("the key k2 was retired"), "{}", retired.text);
}

#[tokio::test]
async fn the_rewrapping_of_a_gateway_that_was_killed_is_resumed_by_another() {
    let data = Data::new();
    let mut api = start(&data, &[K1]).await;
    with_secrets(&api, 60).await;
    take(&api, &[K1, K2]).await;
    take(&api, &[K2, K1]).await;
    let begun = to_first(&api, "/admin/keys/rewrap", &json!({"rate": 10})).await;
    assert_eq!(begun.status, 202, "{}", begun.text);
    eventually("it has begun", async || values(&api).await.iter().all(|(_, values)| *values > 3)).await;
    let second = api.gateways()[1].base.clone();
    let request = reqwest::Client::new().post(format!("{second}/admin/keys/rewrap")).json(&json!({}));
    api.send(request).await.fails(409, "rewrap_in_progress");
    let first = api.take_gateway(0);
    first.signal(Signal::SIGKILL);
    first.ended().await;
    let half = values(&api).await;
    assert!(half.iter().any(|(id, values)| id == "k1" && *values > 0), "{half:?}");
    // Its lease runs out, and the next one goes on.
    let run = rewrap(&api, 1_000).await;
    assert_eq!((&run["state"], &run["leftCount"]), (&json!("done"), &json!(0)), "{run}");
    assert_eq!(values(&api).await, [("k2".to_owned(), 61), ("k1".to_owned(), 0)]);
    for number in 0..60 {
        let user = format!("user-{number}");
        assert_eq!(told(&api, &user).await, json!({"K": format!("key-of-{user}")}));
    }
}

async fn command(data: &Data, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = fleet_of(data).command();
    command.arg("keys").args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    (output.status.code(), said)
}

#[tokio::test]
async fn commands_work_beside_a_running_fleet() {
    let data = Data::new();
    let api = start(&data, &["# of the fleet", K1]).await;
    with_secrets(&api, 5).await;
    let ok = async |arguments: &[&str]| {
        let (status, said) = command(&data, arguments).await;
        assert_eq!(status, Some(0), "{arguments:?}: {said}");
        said
    };
    let refused = async |arguments: &[&str], expected: &str| {
        let (status, said) = command(&data, arguments).await;
        assert_eq!(status, Some(78), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    };
    let listed = ok(&["list"]).await;
    let nodes = listed.lines().filter(|line| line.ends_with(" has k1")).count();
    assert_eq!(nodes, 4, "{listed}");
    refused(&["rotate"], "keys rotate --add").await;
    assert!(ok(&["rotate", "--add"]).await.starts_with("k2 was added"));
    refused(&["rotate", "--to", "k2"], "does not have the key k2 yet").await;
    let ring = std::fs::read_to_string(data.path().join("ring")).unwrap();
    let spread = |ring: &str| {
        for node in &NODES[..4] {
            std::fs::write(Path::new(data.path()).join(node).join("ring"), ring).unwrap();
        }
        api.signal(Signal::SIGHUP);
    };
    spread(&ring);
    all_have(&api, &["k1", "k2"]).await;
    ok(&["rotate", "--to", "k2"]).await;
    // The command would encrypt with a key with which nobody else does.
    refused(&["rewrap"], "still encrypts with k1").await;
    let ring = std::fs::read_to_string(data.path().join("ring")).unwrap();
    assert!(ring.starts_with("# of the fleet\nk2:"), "comments stay where they were");
    spread(&ring);
    all_have(&api, &["k2", "k1"]).await;
    refused(&["retire", "k1"], "stored values need the key k1").await;
    let done = ok(&["rewrap", "--rate", "1000"]).await;
    assert!(done.contains("6 values were encrypted anew with k2"), "{done}");
    ok(&["retire", "k1"]).await;
    ok(&["rotate", "--drop", "k1"]).await;
    spread(&std::fs::read_to_string(data.path().join("ring")).unwrap());
    all_have(&api, &["k2"]).await;
    for number in 0..5 {
        let user = format!("user-{number}");
        assert_eq!(told(&api, &user).await, json!({"K": format!("key-of-{user}")}));
    }
}
