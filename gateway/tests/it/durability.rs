//! What was acknowledged is there after the program was killed at any moment, and what was not is either
//! there whole or not at all.

#![allow(clippy::print_stdout, reason = "the harness shows it when the test fails")]

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use reqwest::{Client, Method};
use serde_json::{Value, json};

use crate::deployment::{Data, Deployment, PATIENCE, alive, eventually, fixture};

const ROUNDS: usize = 15;
const WRITERS: usize = 4;

/// Names that one writer uses; nobody else writes them, so what it saw is the whole truth about them.
const SERVERS: usize = 2;
const SECRETS: usize = 3;

/// A generator of numbers that a printed seed repeats.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        // The constants of Knuth's MMIX; the upper bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % end
    }
}

/// What a value may be: what was acknowledged last, or what was being written when the program died.
#[derive(Debug, Clone)]
struct Truth {
    acknowledged: Option<String>,
    attempted: Option<Option<String>>,
}

impl Truth {
    fn is(acknowledged: Option<String>) -> Self {
        Self { acknowledged, attempted: None }
    }

    fn allows(&self, found: &Option<String>) -> bool {
        self.acknowledged == *found || self.attempted.as_ref() == Some(found)
    }
}

/// What one writer knows: descriptions of its servers, values of its user's secrets for the server that
/// always stays.
#[derive(Debug, Default)]
struct Known {
    servers: BTreeMap<String, Truth>,
    secrets: BTreeMap<String, Truth>,
}

/// What a request is to bring about: a place in what is known, and what stands there afterwards.
struct Write {
    method: Method,
    path: String,
    body: Value,
    secret: bool,
    name: String,
    after: Option<String>,
}

fn choose(known: &Known, writer: usize, chance: &mut Chance, turn: usize) -> Write {
    if chance.below(2) == 0 {
        let name = format!("S{}", chance.below(SECRETS));
        let user = format!("user-{writer}");
        let mut body = json!({"username": user, "serverName": "stays", "secretName": name});
        if chance.below(4) == 0 {
            return Write {
                method: Method::POST,
                path: "/secrets/delete".into(),
                body,
                secret: true,
                name,
                after: None,
            };
        }
        let value = format!("value-{writer}-{turn}");
        body["secretValue"] = json!(value);
        return Write {
            method: Method::POST,
            path: "/secrets/set".into(),
            body,
            secret: true,
            name,
            after: Some(value),
        };
    }
    let name = format!("server-{writer}-{}", chance.below(SERVERS));
    let text = format!("description-{writer}-{turn}");
    let exists = known.servers.get(&name).is_some_and(|truth| truth.acknowledged.is_some());
    let path = format!("/mcp/servers/{name}");
    if !exists {
        let mut body = fixture(&name, &[]);
        // A variable, so that there is something encrypted in the record as well.
        body.as_object_mut().unwrap().extend(
            json!({"enabled": false, "description": text, "env": {"TEXT": text}})
                .as_object()
                .unwrap()
                .clone(),
        );
        return Write {
            method: Method::POST,
            path: "/mcp/servers".into(),
            body,
            secret: false,
            name,
            after: Some(text),
        };
    }
    if chance.below(3) == 0 {
        return Write { method: Method::DELETE, path, body: json!({}), secret: false, name, after: None };
    }
    let body = json!({"description": text, "env": {"TEXT": text}});
    Write { method: Method::PUT, path, body, secret: false, name, after: Some(text) }
}

/// Writes until the program is gone.
async fn write_until_killed(
    base: String,
    writer: usize,
    mut known: Known,
    seed: u64,
    done: Arc<AtomicUsize>,
) -> Known {
    let client = Client::new();
    let mut chance = Chance(seed);
    for turn in 0.. {
        let write = choose(&known, writer, &mut chance, turn);
        let places = if write.secret { &mut known.secrets } else { &mut known.servers };
        let truth = places.entry(write.name.clone()).or_insert(Truth::is(None));
        truth.attempted = Some(write.after.clone());
        let request = client.request(write.method, format!("{base}{}", write.path)).json(&write.body);
        // Whatever cuts the answer off, the write may have happened and was not acknowledged.
        let Ok(answer) = request.timeout(PATIENCE).send().await else { return known };
        let status = answer.status();
        let Ok(text) = answer.text().await else { return known };
        assert!(status.is_success(), "{status}: {text}");
        *truth = Truth::is(write.after);
        done.fetch_add(1, Ordering::Relaxed);
    }
    known
}

/// Compares everything with what the writers know, and makes what was found the truth.
async fn verify(api: &Deployment, writer: usize, known: &mut Known) {
    let all = api.get("/mcp/servers").await.ok().json();
    for (name, truth) in &mut known.servers {
        let listed = all["servers"].as_array().unwrap().iter().find(|server| server["name"] == **name);
        let found = listed.map(|server| {
            // Half a change would be one without the other. The variable was encrypted, too.
            assert_eq!(server["description"], server["env"]["TEXT"], "{server}");
            server["description"].as_str().unwrap().to_owned()
        });
        assert!(truth.allows(&found), "{name}: found {found:?}, known {truth:?}");
        if found.is_some() {
            assert_eq!(api.server(name).await["name"], **name);
        }
        *truth = Truth::is(found);
    }
    let text = api.call_as(&format!("user-{writer}"), "stays", "args", json!({})).await.tool_text();
    let secrets: Value = serde_json::from_str(&text).unwrap();
    for (name, truth) in &mut known.secrets {
        let found = secrets[name.as_str()].as_str().map(str::to_owned);
        assert!(truth.allows(&found), "{name} of user-{writer}: found {found:?}, known {truth:?}");
        *truth = Truth::is(found);
    }
}

#[tokio::test]
async fn acknowledged_writes_survive_a_kill_at_any_moment() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(now.as_secs());
    // Shown when the test fails: with it in the variable of that name the same writes come again.
    println!("SEED={seed}");
    let mut chance = Chance(seed);
    let data = Data::new();
    let mut known: Vec<Known> = (0..WRITERS).map(|_| Known::default()).collect();
    let api = Deployment::builder().data(&data).start().await;
    api.add_fixture("stays", &[], json!({})).await;
    api.kill().await;
    let done = Arc::new(AtomicUsize::new(0));
    for round in 0..ROUNDS {
        let api = Deployment::builder().data(&data).start().await;
        for (writer, known) in known.iter_mut().enumerate() {
            verify(&api, writer, known).await;
        }
        let writers: Vec<_> = std::mem::take(&mut known)
            .into_iter()
            .enumerate()
            .map(|(writer, known)| {
                let seed = u64::try_from(chance.below(usize::MAX >> 1)).unwrap();
                let done = Arc::clone(&done);
                tokio::spawn(write_until_killed(api.base().to_owned(), writer, known, seed, done))
            })
            .collect();
        // After so many writes, and not after some time: how many those are depends on the machine.
        let (before, more) = (done.load(Ordering::Relaxed), 11 + chance.below(100));
        eventually("some writes were made", async || done.load(Ordering::Relaxed) >= before + more).await;
        let pause = chance.below(21);
        println!("round {round}: killed {pause} ms after {more} writes");
        // Not to wait for something: the moment is what the test is about.
        tokio::time::sleep(Duration::from_millis(u64::try_from(pause).unwrap())).await;
        api.kill().await;
        for writer in writers {
            known.push(writer.await.unwrap());
        }
    }
    let api = Deployment::builder().data(&data).start().await;
    for (writer, known) in known.iter_mut().enumerate() {
        verify(&api, writer, known).await;
    }
    assert!(api.stop().await.success());
}

#[tokio::test]
async fn a_registration_that_was_cut_off_leaves_a_usable_record() {
    let data = Data::new();
    let starts = data.path().join("starts");
    let api = Deployment::builder().data(&data).start().await;
    let mut body = fixture("slow", &["--start-delay-ms", "1500", "--start-file", starts.to_str().unwrap()]);
    body["description"] = json!("was being started");
    let request = api.request(Method::POST, "/mcp/servers").json(&body);
    let waiting = tokio::spawn(request.send());
    eventually("the server is being started", async || starts.exists()).await;
    assert!(!waiting.is_finished());
    let child: i32 = std::fs::read_to_string(&starts).unwrap().trim().parse().unwrap();
    api.kill().await;
    assert!(waiting.await.unwrap().is_err(), "nobody acknowledged it");
    eventually("its process goes with the program", async || !alive(child)).await;

    let api = Deployment::builder().data(&data).start().await;
    assert_eq!(api.server("slow").await["description"], "was being started");
    // The call waits for the start.
    assert_eq!(api.call("slow", "echo", json!({"text": "up"})).await.tool_text(), "up");
    api.set_secret("alice", "slow", "K", "v").await.ok();
    assert_eq!(api.call_as("alice", "slow", "args", json!({})).await.tool_text(), r#"{"K":"v"}"#);
    api.register_fixture("slow", &[], json!({})).await.fails(409, "server_already_exists");
    api.delete("/mcp/servers/slow").await.ok();
    api.get("/mcp/servers/slow").await.fails(404, "server_not_found");
}

#[tokio::test]
async fn a_kill_between_two_starts_loses_no_tools() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let data = api.data();
    // The listing is stored soon after the answer; a kill must not tear it.
    let pids = api.pids("echo").await;
    api.kill().await;
    for pid in pids {
        eventually("the server goes with the program", async || !alive(pid)).await;
    }
    let api = Deployment::builder().data(&data).start().await;
    eventually("the tools are listed", async || {
        let tools = api.get("/mcp/tools").await.ok().json();
        tools["tools"][0]["echo"][0]["name"] == "echo"
    })
    .await;
}
