//! `mcp-gateway cluster`: NATS, a database, a gateway and workers as one command.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use mcp_shared::testing::services;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::deployment::{Data, Deployment, PATIENCE, alive, client, eventually, fixture};

/// Settings that no restart mends.
const CONFIG: i32 = 78;
/// What may pass.
const TEMPORARY: i32 = 75;

/// The command, with everything that it starts.
struct Cluster {
    child: Child,
    base: String,
    /// What it said when it was ready.
    said: Vec<String>,
    log: PathBuf,
    client: reqwest::Client,
}

fn command(data: &Data, arguments: &[&str]) -> Command {
    let mut command = Deployment::builder().data(data).command();
    command
        .arg("cluster")
        .args(arguments)
        .env("NATS_SERVER_BIN", services::nats_binary())
        .env("MONGOD_BIN", services::mongo_binary());
    command
}

impl Cluster {
    async fn start(data: &Data, arguments: &[&str]) -> Self {
        let log = data.path().join("cluster.log");
        let stderr = fs::File::create(&log).unwrap();
        let mut child = command(data, arguments).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut cluster =
            Self { child, base: String::new(), said: Vec::new(), log: log.clone(), client: client() };
        let read = tokio::task::spawn_blocking(move || {
            let mut said = Vec::new();
            for line in lines.map_while(Result::ok) {
                let last = line.starts_with("Ctrl-C");
                said.push(line);
                if last {
                    break;
                }
            }
            said
        });
        cluster.said = tokio::time::timeout(2 * PATIENCE, read).await.unwrap().unwrap();
        let first = cluster.said.first().unwrap_or_else(|| panic!("not started: {}", cluster.log()));
        cluster.base = first.split_whitespace().last().unwrap().to_owned();
        assert!(cluster.base.starts_with("http://127.0.0.1:"), "{first}");
        cluster
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The processes that it started, by the names of their programs.
    fn parts(&self, program: &str) -> Vec<i32> {
        let named = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(program)
        };
        children(self.pid()).into_iter().filter(named).collect()
    }

    /// It and everything below it.
    fn family(&self) -> BTreeSet<i32> {
        let mut family = BTreeSet::from([self.pid()]);
        let mut new: Vec<i32> = family.iter().copied().collect();
        while let Some(pid) = new.pop() {
            new.extend(children(pid).into_iter().filter(|pid| family.insert(*pid)));
        }
        family
    }

    async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.client.post(format!("{}{path}", self.base)).json(body).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    async fn echoes(&self) -> bool {
        let call = json!({"serverName": "echo", "methodName": "echo", "args": {"text": "here"}});
        let (status, answer) = self.post("/mcp/tool/call", &call).await;
        status == 200 && answer["data"]["content"][0]["text"] == "here"
    }

    async fn workers(&self) -> usize {
        let fleet = self.client.get(format!("{}/fleet", self.base)).send().await.unwrap();
        fleet.json::<Value>().await.unwrap()["workers"].as_array().map_or(0, Vec::len)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits for its end, and until nothing of `family` is left.
    async fn ended(mut self, family: BTreeSet<i32>) -> (ExitStatus, String) {
        let log = self.log.clone();
        let waiting = tokio::task::spawn_blocking(move || self.child.wait().unwrap());
        let status = tokio::time::timeout(2 * PATIENCE, waiting).await.expect("it ends").unwrap();
        eventually("nothing is left of the cluster", async || !family.iter().any(|pid| alive(*pid))).await;
        (status, fs::read_to_string(log).unwrap())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

#[tokio::test]
async fn a_cluster_starts_serves_and_stops_as_one() {
    let data = Data::new();
    let cluster = Cluster::start(&data, &["--workers", "2"]).await;
    let (status, answer) = cluster.post("/mcp/servers", &fixture("echo", &[])).await;
    assert_eq!(status, 200, "{answer}");
    assert!(cluster.echoes().await);
    assert_eq!(cluster.workers().await, 2);
    let root = data.path().join("data/cluster");
    for own in ["worker-1", "worker-2", "gateway", "store"] {
        assert!(root.join(own).is_dir(), "{own}");
    }
    for secret in ["secrets.key", "keys/gateway.nk", "keys/worker.nk", "keys/service.nk"] {
        let mode = root.join(secret).metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{secret}");
    }

    // Nobody speaks on the bus without a key; a service does with the one that was made for services.
    let shown = cluster.said.iter().find(|line| line.contains("nats://")).unwrap();
    let bus = shown.split_whitespace().find(|word| word.starts_with("nats://")).unwrap();
    assert!(bus.starts_with("nats://127.0.0.1:"), "{shown}");
    assert!(async_nats::connect(bus).await.is_err(), "a stranger was let in");
    let seed = fs::read_to_string(root.join("keys/service.nk")).unwrap();
    let service = async_nats::ConnectOptions::with_nkey(seed.trim().to_owned())
        .custom_inbox_prefix("_INBOX.service")
        .connect(bus)
        .await
        .unwrap();
    let body = r#"{"tool":"echo","args":{"text":"by the bus"}}"#;
    let reply = service.request("mcp.v1.call.echo.default", body.into()).await.unwrap();
    let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
    assert_eq!(reply["data"]["content"][0]["text"], "by the bus", "{reply}");

    // A second one in the same folder would write the first one's files.
    let second = command(&data, &[]).output().unwrap();
    assert_eq!(second.status.code(), Some(TEMPORARY));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another `mcp-gateway cluster` uses"));

    // A worker that is lost comes back, and calls go on.
    let lost = cluster.parts("mcp-worker")[0];
    kill(Pid::from_raw(lost), Signal::SIGKILL).unwrap();
    eventually("the loss is told", async || cluster.log().contains("was ended by SIGKILL")).await;
    eventually("there are two workers again", async || {
        cluster.parts("mcp-worker").len() == 2 && cluster.workers().await == 2
    })
    .await;
    eventually("calls go on", async || cluster.echoes().await).await;

    let family = cluster.family();
    assert!(family.len() >= 8, "with supervisors and the server: {family:?}");
    cluster.signal(Signal::SIGINT);
    let (status, log) = cluster.ended(family).await;
    assert!(status.success(), "{status}: {log}");
    let at = |text: &str| log.find(text).unwrap_or_else(|| panic!("no {text:?}: {log}"));
    let order = ["stopping the workers", "stopping the gateway", "stopping NATS", "stopping the database"];
    assert!(order.map(at).is_sorted(), "{log}");
    assert!(log.trim_end().ends_with("cluster  | stopped"), "{log}");
    assert!(!log.contains("did not stop in time"), "{log}");

    // Everything is there again the next time; and nothing of it stays when the command is killed.
    let cluster = Cluster::start(&data, &["--workers", "1"]).await;
    eventually("the server runs again", async || cluster.echoes().await).await;
    let family = cluster.family();
    cluster.signal(Signal::SIGKILL);
    cluster.ended(family).await;
}

#[tokio::test]
async fn a_cluster_ends_when_a_part_is_lost_that_all_need() {
    let data = Data::new();
    let cluster = Cluster::start(&data, &["--workers", "1"]).await;
    let family = cluster.family();
    let bus = cluster.parts("nats-server")[0];
    kill(Pid::from_raw(bus), Signal::SIGKILL).unwrap();
    let (status, log) = cluster.ended(family).await;
    assert_eq!(status.code(), Some(TEMPORARY), "{log}");
    assert!(log.contains("nats was ended by SIGKILL, and nothing works without it"), "{log}");
}

#[tokio::test]
async fn a_cluster_that_cannot_start_says_why_and_leaves_nothing() {
    let script = |data: &Data, name: &str, text: &str| {
        let path = data.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    };
    let no_programs = |_: &Data, command: &mut Command| {
        command.env("PATH", "/nowhere").env_remove("NATS_SERVER_BIN").env_remove("MONGOD_BIN");
    };
    let no_database = |_: &Data, command: &mut Command| {
        command.env("PATH", "/nowhere").env_remove("MONGOD_BIN");
    };
    let no_such_file = |_: &Data, command: &mut Command| {
        command.env("MONGOD_BIN", "/no/such/mongod");
    };
    let broken_bus = |data: &Data, command: &mut Command| {
        command.env("NATS_SERVER_BIN", script(data, "broken", "echo 'out of order' >&2; exit 3"));
    };
    // A wrapper that would leave what it started behind.
    let mute_store = |data: &Data, command: &mut Command| {
        command.env(
            "MONGOD_BIN",
            script(data, "mute", &format!("sleep 600.25 & echo $! >{}/sleeper; wait", data.path().display())),
        );
        command.env("START_TIMEOUT_SECONDS", "4");
    };
    let weak_key = |_: &Data, command: &mut Command| {
        command.env("SECRETS_KEY", "secret");
    };
    type Change<'a> = &'a dyn Fn(&Data, &mut Command);
    let cases: [(Change<'_>, i32, &[&str]); 6] = [
        (&no_programs, CONFIG, &["nats-server was not found", "NATS_SERVER_BIN", "NATS_URL"]),
        (&no_database, CONFIG, &["no database was found", "MONGODB_URI", "MONGOD_BIN"]),
        (&no_such_file, CONFIG, &["MONGOD_BIN", "/no/such/mongod"]),
        (
            &broken_bus,
            TEMPORARY,
            &["nats ended with exit status 3 before the cluster was ready", "out of order"],
        ),
        (
            &mute_store,
            TEMPORARY,
            &["not ready within 4 s", "START_TIMEOUT_SECONDS", "the database at 127.0.0.1"],
        ),
        (&weak_key, CONFIG, &["ended with exit status 78 before the cluster was ready", "weak"]),
    ];
    for (change, status, said) in cases {
        let data = Data::new();
        let mut command = command(&data, &["--workers", "1"]);
        change(&data, &mut command);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap());
        let output = tokio::time::timeout(Duration::from_secs(60), output).await.unwrap().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{said:?}: {text}");
        for words in said {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(output.stdout, b"", "{said:?}");
        if let Ok(pid) = fs::read_to_string(data.path().join("sleeper")) {
            let pid = pid.trim().parse().unwrap();
            eventually("what a wrapper started is gone", async || !alive(pid)).await;
        }
    }
}
