//! Encryption keys of one machine: changed while the program runs, and while it does not; what is encrypted with
//! them; and what an operator is told.

use std::{
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    deployment::{Data, Deployment, eventually},
    secrets::arguments,
    settings::{CONFIG, TEMPORARY, run, text},
};

fn key_file(data: &Data) -> PathBuf {
    data.path().join("data").join("secrets.key")
}

/// Runs `keys` with arguments on some data; gives the exit status, and all that was said.
async fn keys(data: &Data, arguments: &[&str]) -> (i32, String) {
    let arguments: Vec<&str> = std::iter::once("keys").chain(arguments.iter().copied()).collect();
    let output = run(Deployment::builder().data(data), &arguments).await;
    (output.status.code().unwrap(), format!("{}{}", text(&output.stdout), text(&output.stderr)))
}

/// The same of a command that succeeds.
async fn keys_ok(data: &Data, arguments: &[&str]) -> String {
    let (status, said) = keys(data, arguments).await;
    assert_eq!(status, 0, "{arguments:?}: {said}");
    said
}

/// Asserts that a text has no key of a file in it.
fn shows_no_key(data: &Data, text: &str) {
    for line in std::fs::read_to_string(key_file(data)).unwrap().lines() {
        let (_, key) = line.split_once(':').unwrap();
        assert!(!text.contains(key), "{text}");
    }
}

async fn with_secrets(api: &Deployment, count: usize) {
    api.add_fixture("echo", &[], json!({"env": {"A": "a-variable"}})).await;
    for number in 0..count {
        let user = format!("user-{number}");
        api.set_secret(&user, "echo", "K", &format!("key-of-{user}")).await.ok();
    }
}

async fn all_is_there(api: &Deployment, count: usize) {
    for number in 0..count {
        let user = format!("user-{number}");
        let expected = json!({"K": format!("key-of-{user}")});
        assert_eq!(arguments(api, &user, "echo", json!({})).await, expected);
    }
    assert_eq!(api.server("echo").await["env"], json!({"A": "a-variable"}));
}

/// Ids and numbers of values.
fn values(listed: &Value) -> Vec<(String, u64)> {
    let keys = listed["keys"].as_array().unwrap().iter();
    keys.map(|key| (key["id"].as_str().unwrap().to_owned(), key["values"].as_u64().unwrap())).collect()
}

fn pairs(expected: &[(&str, u64)]) -> Vec<(String, u64)> {
    expected.iter().map(|(id, values)| ((*id).to_owned(), *values)).collect()
}

async fn rewrapped(api: &Deployment, body: &Value) -> Value {
    let answer = api.post("/admin/keys/rewrap", body).await;
    assert_eq!(answer.status, 202, "{}", answer.text);
    eventually("all is encrypted anew", async || {
        let run = api.get("/admin/keys/rewrap").await.ok().json()["rewrap"].clone();
        run["state"] != "running"
    })
    .await;
    api.get("/admin/keys/rewrap").await.ok().json()["rewrap"].clone()
}

#[tokio::test]
async fn keys_are_changed_while_the_program_runs_and_nobody_notices() {
    const USERS: usize = 20;
    let api = Arc::new(Deployment::start().await);
    with_secrets(&api, USERS).await;
    let data = api.data();
    let over = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let load: Vec<_> = (0..3)
        .map(|caller| {
            let (api, over, done) = (Arc::clone(&api), Arc::clone(&over), Arc::clone(&done));
            tokio::spawn(async move {
                for round in 0_usize.. {
                    if over.load(Ordering::SeqCst) {
                        break;
                    }
                    let user = format!("user-{}", (round + caller) % USERS);
                    let told = arguments(&api, &user, "echo", json!({})).await;
                    assert_eq!(told, json!({"K": format!("key-of-{user}")}));
                    let (own, value) = (format!("caller-{caller}"), format!("value-{round}"));
                    api.set_secret(&own, "echo", "OWN", &value).await.ok();
                    assert_eq!(arguments(&api, &own, "echo", json!({})).await, json!({"OWN": value}));
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    eventually("there is load", async || done.load(Ordering::SeqCst) > 5).await;

    let (status, said) = keys(&data, &["list"]).await;
    assert_eq!(status, TEMPORARY, "{said}");
    assert!(said.contains("has it to itself") && said.contains("/admin/keys"), "{said}");
    keys_ok(&data, &["rotate", "--add"]).await;
    let reloaded = api.post("/admin/keys/reload", &json!({})).await.ok();
    assert_eq!(reloaded.json()["keys"], json!(["k1", "k2"]));
    keys_ok(&data, &["rotate", "--to", "k2"]).await;
    api.signal(Signal::SIGHUP);
    eventually("the new key encrypts", async || {
        api.get("/fleet").await.json()["gateways"][0]["keys"] == json!(["k2", "k1"])
    })
    .await;
    let run = rewrapped(&api, &json!({"rate": 500})).await;
    assert_eq!(
        (&run["state"], &run["key"], &run["leftCount"]),
        (&json!("done"), &json!("k2"), &json!(0)),
        "{run}"
    );
    let listed = api.get("/admin/keys").await.ok();
    // 20 users, 3 callers, and the server's variable.
    assert_eq!(values(&listed.json()), pairs(&[("k2", 24), ("k1", 0)]), "{}", listed.text);
    shows_no_key(&data, &listed.text);
    // What is taken out of the file is lost.
    let (status, said) = keys(&data, &["rotate", "--drop", "k1"]).await;
    assert_eq!(status, CONFIG, "{said}");
    assert!(said.contains("k1 is not retired"), "{said}");
    api.post("/admin/keys/retire", &json!({"id": "k1"})).await.ok();
    keys_ok(&data, &["rotate", "--drop", "k1"]).await;
    let reloaded = api.post("/admin/keys/reload", &json!({})).await.ok();
    assert_eq!(reloaded.json()["keys"], json!(["k2"]));
    let before = done.load(Ordering::SeqCst);
    eventually("calls went on", async || done.load(Ordering::SeqCst) > before + 5).await;
    over.store(true, Ordering::SeqCst);
    for caller in load {
        caller.await.unwrap();
    }
    shows_no_key(&data, &api.log());
    let mode = key_file(&data).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    Arc::into_inner(api).unwrap().stop().await;
    let api = Deployment::builder().data(&data).start().await;
    all_is_there(&api, USERS).await;
    assert_eq!(api.metric("mcp_integrity_failures_total{kind=\"unknown_kid\"}").await, 0.0);
}

#[tokio::test]
async fn keys_are_changed_in_one_step_while_the_program_is_stopped() {
    let api = Deployment::start().await;
    with_secrets(&api, 5).await;
    let data = api.data();
    api.stop().await;
    let said = keys_ok(&data, &["list"]).await;
    assert!(said.contains("encrypts") && said.lines().any(|line| line.starts_with("k1 ")), "{said}");
    shows_no_key(&data, &said);
    for round in 2..4 {
        let said = keys_ok(&data, &["rotate"]).await;
        assert!(said.contains(&format!("6 values were encrypted anew with k{round}")), "{said}");
        shows_no_key(&data, &said);
    }
    let (status, said) = keys(&data, &["rotate", "--drop", "k1"]).await;
    assert_eq!(status, CONFIG, "{said}");
    assert!(said.contains("keys retire k1"), "{said}");
    for (arguments, expected) in
        [(["retire", "k3"], "k3 is the key that encrypts"), (["retire", "k9"], "there is no key k9")]
    {
        let (status, said) = keys(&data, &arguments).await;
        assert_eq!(status, CONFIG, "{said}");
        assert!(said.contains(expected), "{said}");
    }
    for kid in ["k1", "k2"] {
        keys_ok(&data, &["retire", kid]).await;
        keys_ok(&data, &["rotate", "--drop", kid]).await;
    }
    let ring = std::fs::read_to_string(key_file(&data)).unwrap();
    assert_eq!(ring.lines().count(), 1, "{ring}");
    assert!(ring.starts_with("k3:"), "{ring}");
    let api = Deployment::builder().data(&data).start().await;
    all_is_there(&api, 5).await;
    // An id that was used once is not used again.
    api.stop().await;
    std::fs::write(key_file(&data), ring.replace("k3:", "main:")).unwrap();
    let (status, said) = keys(&data, &["list"]).await;
    assert_eq!(status, CONFIG, "{said}");
    std::fs::write(key_file(&data), &ring).unwrap();
    let said = keys_ok(&data, &["rotate", "--add"]).await;
    assert!(said.starts_with("k4 was added"), "{said}");
}

#[tokio::test]
async fn a_killed_rewrapping_is_resumed() {
    const USERS: usize = 60;
    let api = Deployment::start().await;
    with_secrets(&api, USERS).await;
    let data = api.data();
    keys_ok(&data, &["rotate"]).await;
    api.post("/admin/keys/reload", &json!({})).await.ok();
    assert_eq!(api.post("/admin/keys/rewrap", &json!({"rate": 20})).await.status, 202);
    api.post("/admin/keys/rewrap", &json!({})).await.fails(409, "rewrap_in_progress");
    eventually("it has begun", async || {
        let run = api.get("/admin/keys/rewrap").await.ok().json();
        run["rewrap"]["rewrapped"].as_u64().is_some_and(|count| count > 5)
    })
    .await;
    api.kill().await;
    let api = Deployment::builder().data(&data).start().await;
    let half = values(&api.get("/admin/keys").await.ok().json());
    assert!(half.iter().all(|(_, values)| *values > 0), "{half:?}");
    assert_eq!(half.iter().map(|(_, values)| values).sum::<u64>(), 61, "{half:?}");
    all_is_there(&api, USERS).await;
    let run = rewrapped(&api, &json!({"rate": 5_000})).await;
    let left = half.iter().find(|(id, _)| id == "k1").unwrap().1;
    assert_eq!((&run["state"], run["rewrapped"].as_u64()), (&json!("done"), Some(left)), "{run}");
    assert_eq!(values(&api.get("/admin/keys").await.ok().json()), pairs(&[("k2", 61), ("k1", 0)]));
    all_is_there(&api, USERS).await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let api = Deployment::start().await;
    with_secrets(&api, 2).await;
    let data = api.data();
    for (path, body) in [
        ("rewrap", json!({"rate": 0})),
        ("rewrap", json!({"rate": 10_001})),
        ("rewrap", json!({"rate": "fast"})),
        ("rewrap", json!([1])),
        ("retire", json!({})),
        ("retire", json!({"id": ""})),
        ("retire", json!({"id": {"$ne": null}})),
        ("retire", json!({"id": "k1", "force": "yes"})),
    ] {
        api.post(&format!("/admin/keys/{path}"), &body).await.fails(400, "invalid_request");
    }
    api.post("/admin/keys/retire", &json!({"id": "k9"})).await.fails(404, "key_not_found");
    let long = "x".repeat(5_000);
    let answer = api.post("/admin/keys/retire", &json!({"id": long})).await.fails(404, "key_not_found");
    assert!(answer.text.len() < 1_000, "{}", answer.text);
    api.post("/admin/keys/retire", &json!({"id": "k1", "force": true})).await.fails(409, "key_in_use");
    api.post("/admin/keys", &json!({})).await.fails(405, "method_not_allowed");
    assert_eq!(api.get("/admin/keys/rewrap").await.ok().json()["rewrap"], Value::Null);

    let good = std::fs::read_to_string(key_file(&data)).unwrap();
    for bad in ["", "nonsense", "k1:AAAA\n", "k2:Zm9ydHkgdHdvIGJ5dGVzIG9mIG5vIG1lYW5pbmchISE=\n"] {
        std::fs::write(key_file(&data), bad).unwrap();
        let refused = api.post("/admin/keys/reload", &json!({})).await.fails(409, "keys_refused");
        assert!(bad.is_empty() || !refused.text.contains(bad.trim()), "{}", refused.text);
        api.signal(Signal::SIGHUP);
        all_is_there(&api, 2).await;
    }
    eventually("the log says why", async || api.log().contains("the old ones stay")).await;
    std::fs::remove_file(key_file(&data)).unwrap();
    api.post("/admin/keys/reload", &json!({})).await.fails(409, "keys_refused");
    std::fs::write(key_file(&data), good).unwrap();
    api.post("/admin/keys/reload", &json!({})).await.ok();
    all_is_there(&api, 2).await;
}

#[tokio::test]
async fn lines_for_key_rings_are_made_and_a_single_key_cannot_be_rotated() {
    let data = Data::new();
    let (one, two) = (keys_ok(&data, &["generate"]).await, keys_ok(&data, &["generate", "--id", "k2"]).await);
    assert!(one.starts_with("k1:") && two.starts_with("k2:") && one.lines().count() == 1, "{one}{two}");
    assert_ne!(one[3..], two[3..]);
    let (status, said) = keys(&data, &["generate", "--id", "No Good"]).await;
    assert_eq!(status, CONFIG, "{said}");
    let key = "8f1d2c3b4a5968778695a4b3c2d1e0f00f1e2d3c4b5a69788796a5b4c3d2e1f0";
    let with_key = || Deployment::builder().data(&data).env("SECRETS_KEY", key);
    let api = with_key().start().await;
    with_secrets(&api, 3).await;
    api.post("/admin/keys/reload", &json!({})).await.fails(409, "keys_refused");
    api.stop().await;
    let output = run(with_key(), &["keys", "rotate"]).await;
    assert_eq!(output.status.code(), Some(CONFIG));
    assert!(text(&output.stderr).contains("k1:SECRETS_KEY"), "{}", text(&output.stderr));
    // The way out that it names.
    let ring = data.path().join("ring");
    std::fs::write(&ring, "k1:SECRETS_KEY\n").unwrap();
    let with_both = || with_key().env("SECRETS_KEYS_FILE", ring.display().to_string());
    let output = run(with_both(), &["keys", "rotate"]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    for arguments in [["keys", "retire", "k1"].as_slice(), &["keys", "rotate", "--drop", "k1"]] {
        let output = run(with_both(), arguments).await;
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    let with_ring = Deployment::builder().data(&data).env("SECRETS_KEYS_FILE", ring.display().to_string());
    all_is_there(&with_ring.start().await, 3).await;
}
