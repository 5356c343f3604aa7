//! The list of bad inputs: each is answered in the words that the list has for it, and leaves nothing behind.
//!
//! Cases stand in `bad_inputs/rows_*.rs`, by the number that their row has in the list. This runs them and looks
//! at what must be true of all: the answer is a document of ours with a closed code, short, and repeats little; no
//! fault is ours; a tool call was not started; the next good request is answered; nothing panicked, nothing was
//! stored, started, or said on the bus under a name that somebody made up; and memory stays what it was.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use futures_util::StreamExt;
use mcp_shared::testing::{
    authorization::{Authorization, Settings},
    registry::Fault,
    services::NatsServer,
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use self::{
    case::{Case, Place},
    request::Request,
    rows_servers::{Login, STARTS_NOTHING},
};
use crate::{
    deployment::{Data, Deployment, alive, eventually},
    logins::{Begun, local, open},
    packages, stored,
};

#[path = "bad_inputs/case.rs"]
pub mod case;
#[path = "bad_inputs/credentials.rs"]
mod credentials;
#[path = "bad_inputs/limits.rs"]
mod limits;
#[path = "bad_inputs/request.rs"]
pub mod request;
#[path = "bad_inputs/rows_http.rs"]
mod rows_http;
#[path = "bad_inputs/rows_names.rs"]
mod rows_names;
#[path = "bad_inputs/rows_servers.rs"]
mod rows_servers;

/// How much a gateway's memory may grow.
const GROWTH: u64 = 32 << 20;
/// Programs that nobody may start because of a name. They stand before the real ones in the search path.
const TRAPPED: [&str; 14] = [
    "npm", "npx", "node", "python", "python3", "pip", "pip3", "uv", "sh", "bash", "id", "touch", "git",
    "curl",
];

/// A deployment, and what is watched while it is sent bad inputs.
struct Guarded {
    api: Deployment,
    /// What the trapped programs write into when somebody starts them.
    trap: PathBuf,
    bus: Option<Bus>,
}

/// A NATS server of the deployment's own, and every subject that anything was published to.
struct Bus {
    server: NatsServer,
    listener: JoinHandle<()>,
    subjects: std::sync::Arc<std::sync::Mutex<BTreeSet<String>>>,
}

impl Bus {
    async fn start() -> Self {
        let server = tokio::task::spawn_blocking(|| NatsServer::start("")).await.unwrap();
        let client = async_nats::connect(server.url()).await.unwrap();
        let mut everything = client.subscribe(">").await.unwrap();
        client.flush().await.unwrap();
        let subjects = std::sync::Arc::<std::sync::Mutex<BTreeSet<String>>>::default();
        let seen = subjects.clone();
        let listener = tokio::spawn(async move {
            while let Some(message) = everything.next().await {
                seen.lock().unwrap().insert(message.subject.to_string());
            }
        });
        Self { server, listener, subjects }
    }

    fn url(&self) -> String {
        self.server.url()
    }

    /// The subjects, as far as their tokens are words and not ids of nodes and requests.
    fn words(&self) -> BTreeSet<String> {
        let seen = self.subjects.lock().unwrap();
        seen.iter()
            .map(|subject| {
                let tokens = subject.split('.').map(|token| {
                    let plain = token.len() < 20 && !token.bytes().any(|byte| byte.is_ascii_uppercase());
                    if plain { token } else { "ID" }
                });
                tokens.collect::<Vec<_>>().join(".")
            })
            .collect()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl Guarded {
    async fn start() -> Self {
        let data = Data::new();
        let (path, trap) = (data.path().join("trapped"), data.path().join("started"));
        lay_traps(&path, &trap);
        let search = format!("{}:{}", path.display(), std::env::var("PATH").unwrap_or_default());
        let mut builder = Deployment::builder()
            .data(&data)
            .env("EGRESS_ALLOW", "")
            .env("PATH", search)
            .env("RUST_LOG", "debug");
        let bus = if crate::CLUSTER { Some(Bus::start().await) } else { None };
        if let Some(bus) = &bus {
            builder = builder.env("NATS_URL", bus.url());
        }
        let api = builder.start().await;
        api.add_fixture("echo", &["--more"], json!({"concurrency": 8})).await;
        api.register_fixture("off", &[], json!({"enabled": false})).await.ok();
        let remote = |name: &str, url: &str, enabled: bool| json!({"name": name, "transportType": "streamable_http", "url": url, "enabled": enabled});
        api.post("/mcp/servers", &remote("web", "https://mcp.example.org/mcp", false)).await.ok();
        let inward = format!("http://{}:9/mcp", own_name());
        api.post("/mcp/servers", &remote("inward", &inward, true)).await.ok();
        api.set_secret("alice", "echo", "K", "kept").await.ok();
        Self { api, trap, bus }
    }

    /// A call that is made, one that is repeated, and one that is under way until the returned task ends.
    async fn make_calls(&self) -> JoinHandle<reqwest::Result<reqwest::Response>> {
        let api = &self.api;
        let named = |body: &Value, key: &str| {
            let request = api.request(reqwest::Method::POST, "/mcp/tool/call");
            request.header("Idempotency-Key", key).json(body)
        };
        api.send(named(&rows_names::used(), rows_names::USED)).await.ok();
        let under_way = tokio::spawn(named(&rows_names::in_flight(), rows_names::IN_FLIGHT).send());
        eventually("the call is under way", async || {
            let server = api.server("echo").await;
            server["instances"].as_array().unwrap().iter().any(|one| one["inFlight"] == 1)
        })
        .await;
        under_way
    }

    /// Everything that must be as it was.
    async fn state(&self) -> Value {
        let get = async |path: &str| self.api.get(path).await.ok().json();
        let servers = get("/mcp/servers").await;
        let names: Vec<_> =
            servers["servers"].as_array().unwrap().iter().map(|server| server["name"].clone()).collect();
        json!({
            "servers": names,
            "packages": get("/packages").await,
            "jobs": get("/packages/jobs").await,
            "impact": get("/mcp/servers/echo/delete-impact").await["impact"]["usersWithSavedSecrets"],
            "stored": stored::settled(&self.api.data()).await,
        })
    }

    fn started(&self) -> String {
        std::fs::read_to_string(&self.trap).unwrap_or_default()
    }

    fn children(&self) -> BTreeSet<i32> {
        descendants(&self.api.programs())
    }
}

/// Puts a program in the place of each of [`TRAPPED`] that writes down that it was started.
fn lay_traps(folder: &Path, trap: &Path) {
    std::fs::create_dir(folder).unwrap();
    for name in TRAPPED {
        let script = format!("#!/bin/sh\necho \"{name} $*\" >> '{}'\nexit 1\n", trap.display());
        std::fs::write(folder.join(name), script).unwrap();
        std::fs::set_permissions(folder.join(name), PermissionsExt::from_mode(0o755)).unwrap();
    }
}

/// A name of this machine that no URL betrays: it is in the list of names that the system itself has, so that nobody
/// else is asked for it.
fn own_name() -> String {
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    let names = hosts.lines().filter(|line| line.starts_with("127.") || line.starts_with("::1"));
    let mut names =
        names.flat_map(|line| line.split_whitespace().skip(1)).filter(|name| !name.starts_with("localhost"));
    // Without one there is the one that systems agree upon, which leads inward as well or nowhere.
    names.next().unwrap_or("ip6-loopback").to_owned()
}

/// The processes that these have started, and those that they have.
fn descendants(programs: &[i32]) -> BTreeSet<i32> {
    let mut parents = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let rest = stat.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
        if let Some(parent) = rest.split_whitespace().nth(1).and_then(|parent| parent.parse::<i32>().ok()) {
            parents.insert(pid, parent);
        }
    }
    let is_ours = |mut pid: i32| {
        while let Some(parent) = parents.get(&pid) {
            if programs.contains(parent) {
                return true;
            }
            pid = *parent;
        }
        false
    };
    parents.keys().copied().filter(|pid| is_ours(*pid) && alive(*pid)).collect()
}

/// What a process has of memory now, and the most that it has had.
fn memory(pid: i32) -> (u64, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        line.unwrap().parse::<u64>().unwrap() * 1024
    };
    (of("VmRSS:"), of("VmHWM:"))
}

/// Somebody who logs in, and a package that is being installed.
struct Busy {
    api: Deployment,
    login: Login,
    _authorization: Authorization,
    _registry: mcp_shared::testing::registry::Registry,
}

impl Busy {
    async fn start() -> Self {
        let registry = packages::registry();
        let api = packages::from(&registry).start().await;
        let authorization =
            Authorization::start_with(Settings { subject: "alice".to_owned(), ..Settings::default() });
        let url = format!("{}/mcp", authorization.issuer());
        let remote =
            json!({"name": "remote", "transportType": "streamable_http", "url": url, "enabled": false});
        api.post("/mcp/servers", &remote).await.ok();
        let begun = Begun::at(&api, "/auth/remote/login?username=alice").await;
        let back = local(&authorization.browse(&begun.location));
        open(&api, &back, Some(begun.cookie())).await.ok();
        let other = Begun::at(&api, "/auth/remote/login?username=mallory").await;
        let login = Login {
            back,
            cookie: begun.cookie().to_owned(),
            other: other.cookie().to_owned(),
            other_back: local(&authorization.browse(&other.location)),
        };
        registry.fault(Fault::Hang);
        let body = json!({"name": "@acme/clock", "serverName": "clock"});
        let request =
            api.request(reqwest::Method::POST, "/packages/install").header("Prefer", "respond-async");
        let accepted = api.send(request.json(&body)).await;
        assert_eq!(accepted.status, 202, "{}", accepted.text);
        let path = accepted.headers["location"].to_str().unwrap().to_owned();
        eventually("a worker is at it", async || {
            api.get(&path).await.ok().json()["job"]["state"] == "running"
        })
        .await;
        api.add_fixture("echo", &[], json!({})).await;
        Self { api, login, _authorization: authorization, _registry: registry }
    }
}

/// Sends a case, and after it something good to the same gateway. Returns what is wrong.
async fn run(api: &Deployment, case: &Case) -> Vec<String> {
    let host = api.address().to_owned();
    let received = case.request.send(&host).await;
    let mut faults = case.faults(&host, &received);
    let good =
        Request::call(&json!({"serverName": "echo", "methodName": "echo", "args": {"text": "still here"}}));
    let next = good.send(&host).await;
    if next.status != 200 || !next.body.contains("still here") {
        faults.push(format!("the next request: {}", next.text));
    }
    if !faults.is_empty() {
        faults.push(received.text.chars().take(600).collect());
    }
    faults
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stdout, reason = "how much was sent is worth reading")]
async fn every_bad_input_is_answered_as_the_list_says() {
    let (guarded, busy) = tokio::join!(Guarded::start(), Busy::start());
    let under_way = guarded.make_calls().await;
    let before = guarded.state().await;
    let programs = guarded.api.programs();
    let resident: Vec<u64> = programs.iter().map(|pid| memory(*pid).0).collect();
    let (mut started, children) = (guarded.started(), guarded.children());
    let words = guarded.bus.as_ref().map(Bus::words);

    let mut cases = rows_http::rows();
    cases.extend(rows_names::rows());
    cases.extend(rows_servers::rows(&busy.login));
    let mut faults = Vec::new();
    for case in &cases {
        let api = match case.place {
            Place::Guarded => &guarded.api,
            Place::Busy => &busy.api,
        };
        let wrong = run(api, case).await;
        if !wrong.is_empty() {
            faults.push(format!("row {} ({}): {}", case.row, case.name, wrong.join("; ")));
        }
        let now = guarded.started();
        if STARTS_NOTHING.contains(&case.row) && now != started {
            let new = now.trim_start_matches(started.as_str());
            faults.push(format!("row {} ({}) started {new:.200}", case.row, case.name));
        }
        started = now;
    }
    println!("{} bad inputs", cases.len());
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), cases.len(), faults.join("\n"));

    assert_eq!(guarded.children(), children, "processes came or went");
    let after = guarded.state().await;
    assert_eq!(after, before, "something was stored");
    if let (Some(bus), Some(words)) = (&guarded.bus, words) {
        let new: Vec<_> = bus.words().difference(&words).cloned().collect();
        let invented = new.iter().filter(|subject| !is_usual(subject));
        assert_eq!(invented.count(), 0, "new subjects: {new:?}");
    }
    for (pid, resident) in programs.into_iter().zip(resident) {
        let (now, peak) = memory(pid);
        println!("process {pid}: {} KB, then {} KB, {} KB at most", resident >> 10, now >> 10, peak >> 10);
        assert!(now < resident + GROWTH, "process {pid} grew from {resident} to {now} bytes");
    }
    for api in [&guarded.api, &busy.api] {
        let log = api.log();
        for word in ["panicked", "internal error"] {
            let line = log.lines().find(|line| line.contains(word));
            assert_eq!(line, None, "{word}");
        }
    }
    under_way.abort();
}

/// Whether a subject is one that good requests lead to as well, though none has before.
fn is_usual(subject: &str) -> bool {
    let rest = subject.split_once(".v1.").map(|(_, rest)| rest).unwrap_or_default();
    let kind = rest.split('.').next().unwrap_or_default();
    let plain = subject.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-=$".contains(&byte));
    plain && matches!(kind, "worker" | "beat" | "event" | "inbox")
}
