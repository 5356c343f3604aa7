//! A fleet whose parts can all be harmed: a NATS server and a database of its own, and a link of each node's
//! own to both, so that a partition hits the node that it is meant for.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use mcp_shared::testing::{
    link::Link,
    services::{MongoServer, NatsServer},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::super::deployment::{Answer, Data, Deployment, Node, Program, alive, eventually, fixture};

/// A fleet.
pub struct Stage {
    /// Where the nodes have their folders.
    pub data: Data,
    /// The bus.
    pub nats: Arc<Mutex<NatsServer>>,
    /// The store.
    pub mongo: Arc<Mutex<MongoServer>>,
    /// Where gateways are, or are to be.
    pub gateways: Vec<Seat>,
    /// Where workers are, or are to be.
    pub workers: Vec<Seat>,
    client: reqwest::Client,
}

/// The place of one node. Who sits there is replaced when it was lost.
pub struct Seat {
    program: Program,
    name: String,
    env: Vec<(String, String)>,
    /// The node's way to the bus.
    pub bus: Link,
    /// The node's way to the store.
    pub store: Link,
    node: Mutex<Option<Node>>,
    base: RwLock<String>,
    /// When whoever sat there was no good.
    harm: Mutex<Vec<Harm>>,
}

/// Something that was done to a node.
struct Harm {
    fatal: bool,
    begun: Instant,
    ended: Option<Instant>,
}

impl Seat {
    fn new(program: Program, name: &str, nats: &NatsServer, mongo: &MongoServer) -> Self {
        let (bus, store) = (Link::to(nats.address()), Link::to(mongo.address()));
        let env = vec![
            ("NATS_URL".to_owned(), format!("nats://{}", bus.address())),
            ("MONGODB_URI".to_owned(), format!("mongodb://{}/?directConnection=true", store.address())),
        ];
        Self {
            program,
            name: name.to_owned(),
            env,
            bus,
            store,
            node: Mutex::default(),
            base: RwLock::default(),
            harm: Mutex::default(),
        }
    }

    /// Starts a node, if nobody sits there.
    pub async fn fill(&self, data: &Data) {
        if self.is_taken() {
            return;
        }
        let mut builder = Deployment::builder().data(data);
        for (name, value) in &self.env {
            builder = builder.env(name, value);
        }
        let node = Node::start(&builder, self.program, &self.name).await;
        self.base.write().unwrap().clone_from(&node.base);
        *self.node.lock().unwrap() = Some(node);
        self.mended();
    }

    /// Whether somebody sits there.
    pub fn is_taken(&self) -> bool {
        self.node.lock().unwrap().is_some()
    }

    /// Who sits there.
    pub fn id(&self) -> String {
        self.node.lock().unwrap().as_ref().map(|node| node.id.clone()).unwrap_or_default()
    }

    /// The process id of who sits there.
    pub fn pid(&self) -> Option<i32> {
        self.node.lock().unwrap().as_ref().map(Node::pid)
    }

    /// Where a gateway listens.
    pub fn base(&self) -> String {
        self.base.read().unwrap().clone()
    }

    /// Takes the node away, alive, to be stopped in order: that harms nobody.
    pub fn leave(&self) -> Option<Node> {
        self.node.lock().unwrap().take()
    }

    /// Kills the node.
    pub fn kill(&self) {
        self.harmed(true);
        drop(self.leave());
    }

    /// Stops the node without ending it, as a machine that hangs.
    pub fn freeze(&self) {
        self.harmed(false);
        if let Some(node) = self.node.lock().unwrap().as_ref() {
            node.signal(Signal::SIGSTOP);
        }
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        if let Some(node) = self.node.lock().unwrap().as_ref() {
            node.signal(Signal::SIGCONT);
        }
        self.mended();
    }

    fn harmed(&self, fatal: bool) {
        self.harm.lock().unwrap().push(Harm { fatal, begun: Instant::now(), ended: None });
    }

    fn mended(&self) {
        let now = Instant::now();
        for harm in self.harm.lock().unwrap().iter_mut() {
            harm.ended.get_or_insert(now);
        }
    }

    /// For how long the node could do nothing since then.
    pub fn frozen_since(&self, begun: Instant) -> Duration {
        let harm = self.harm.lock().unwrap();
        let during = |harm: &Harm| {
            harm.ended.unwrap_or_else(Instant::now).saturating_duration_since(harm.begun.max(begun))
        };
        harm.iter().filter(|harm| !harm.fatal).map(during).sum()
    }

    /// Whether the node that was asked then may have ended without an answer.
    pub fn ended_since(&self, begun: Instant) -> bool {
        let after = |harm: &Harm| harm.fatal && harm.ended.is_none_or(|ended| ended >= begun);
        self.harm.lock().unwrap().iter().any(after)
    }
}

impl Stage {
    /// Starts a fleet, and waits until all see each other. Of the workers' places the last `spare` are empty.
    ///
    /// The database keeps nothing when it ends, and does not depend on how quick the disk is.
    pub async fn start(gateways: usize, workers: usize, spare: usize) -> Self {
        Self::start_on(MongoServer::forgetful, gateways, workers, spare).await
    }

    /// The same, with a database that may be restarted.
    pub async fn lasting(gateways: usize, workers: usize, spare: usize) -> Self {
        Self::start_on(MongoServer::start, gateways, workers, spare).await
    }

    async fn start_on(database: fn() -> MongoServer, gateways: usize, workers: usize, spare: usize) -> Self {
        // The client speaks TLS with whatever the programs speak it with.
        mcp_shared::tls::install_provider();
        let started = tokio::task::spawn_blocking(move || (NatsServer::start(""), database()));
        let (nats, mongo) = started.await.unwrap();
        let seats = |program, kind: &str, count: usize| {
            (0..count)
                .map(|at| Seat::new(program, &format!("{kind}-{at}"), &nats, &mongo))
                .collect::<Vec<_>>()
        };
        let stage = Self {
            gateways: seats(Program::Gateway, "gateway", gateways),
            workers: seats(Program::Worker, "worker", workers + spare),
            data: Data::new(),
            nats: Arc::new(Mutex::new(nats)),
            mongo: Arc::new(Mutex::new(mongo)),
            // A gateway that was frozen closes connections at once when it wakes that were quiet for too long:
            // whoever keeps connections for longer loses requests.
            client: reqwest::Client::builder().pool_idle_timeout(Duration::from_secs(2)).build().unwrap(),
        };
        let nodes = stage.gateways.iter().chain(&stage.workers[..workers]);
        futures_util::future::join_all(nodes.map(|seat| seat.fill(&stage.data))).await;
        stage.whole().await;
        stage
    }

    /// Waits until every gateway sees the workers that there are, and no other.
    pub async fn whole(&self) {
        let mut there: Vec<_> = self.workers.iter().filter(|seat| seat.is_taken()).map(Seat::id).collect();
        there.sort();
        for at in (0..self.gateways.len()).filter(|at| self.gateways[*at].is_taken()) {
            eventually("every gateway sees the workers", async || {
                let fleet = self.get(at, "/fleet").await.ok().json();
                let seen = fleet["workers"].as_array().unwrap().iter();
                let mut seen: Vec<_> = seen.map(|one| one["id"].as_str().unwrap().to_owned()).collect();
                seen.sort();
                seen == there
            })
            .await;
        }
    }

    /// Where the fixture's processes write their ids.
    pub fn starts(&self) -> PathBuf {
        self.data.path().join("starts")
    }

    /// Where the tool `record` writes.
    pub fn executed(&self) -> PathBuf {
        self.data.path().join("executed")
    }

    /// What it wrote so far.
    pub fn history(&self) -> String {
        std::fs::read_to_string(self.executed()).unwrap_or_default()
    }

    /// Registers the fixture.
    pub async fn add(&self, name: &str, more: Value) {
        let starts = self.starts();
        let mut body = fixture(name, &["--more", "--start-file", starts.to_str().unwrap()]);
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.post(0, "/mcp/servers", &body).await.ok();
    }

    /// A request to one of the gateways.
    pub fn request(&self, gateway: usize, path: &str) -> reqwest::RequestBuilder {
        self.client.post(format!("{}{path}", self.gateways[gateway].base()))
    }

    /// Sends a request; a gateway that is gone is an error.
    pub async fn send(&self, request: reqwest::RequestBuilder) -> Result<Answer, reqwest::Error> {
        let response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Ok(Answer { status, headers, text: response.text().await? })
    }

    /// `GET path` of one of the gateways.
    pub async fn get(&self, gateway: usize, path: &str) -> Answer {
        self.send(self.client.get(format!("{}{path}", self.gateways[gateway].base()))).await.unwrap()
    }

    /// Whether a gateway is there and says that it is ready.
    pub async fn is_ready(&self, gateway: usize) -> bool {
        let ready = self.client.get(format!("{}/readyz", self.gateways[gateway].base()));
        self.send(ready.timeout(Duration::from_secs(2))).await.is_ok_and(|answer| answer.status == 200)
    }

    /// `POST path` to one of the gateways.
    pub async fn post(&self, gateway: usize, path: &str, body: &Value) -> Answer {
        self.send(self.request(gateway, path).json(body)).await.unwrap()
    }

    /// Calls a tool through one of the gateways.
    pub async fn call(&self, gateway: usize, user: &str, server: &str, tool: &str, args: Value) -> Answer {
        let body = json!({"username": user, "serverName": server, "methodName": tool, "args": args});
        self.post(gateway, "/mcp/tool/call", &body).await
    }

    /// The workers that have a running process of a server, as a gateway sees it.
    pub async fn owners(&self, gateway: usize, server: &str) -> Vec<String> {
        let answer = self.get(gateway, &format!("/mcp/servers/{server}")).await;
        let Some(instances) = answer.json()["server"]["instances"].as_array().cloned() else {
            return Vec::new();
        };
        let running = instances.iter().filter(|one| one["status"] == "connected");
        let mut owners: Vec<_> = running.map(|one| one["workerId"].as_str().unwrap().to_owned()).collect();
        owners.sort();
        owners.dedup();
        owners
    }

    /// The place where a worker sits.
    pub fn seat_of(&self, worker: &str) -> &Seat {
        self.workers.iter().find(|seat| seat.id() == worker).unwrap()
    }

    /// The fixture's processes that no worker of this fleet has below it.
    pub fn orphans(&self) -> Vec<i32> {
        let workers: Vec<i32> = self.workers.iter().filter_map(Seat::pid).collect();
        self.processes()
            .into_iter()
            .filter(|pid| !workers.iter().any(|worker| is_below(*pid, *worker)))
            .collect()
    }

    /// The fixture's processes that live.
    pub fn processes(&self) -> Vec<i32> {
        let started = std::fs::read_to_string(self.starts()).unwrap_or_default();
        started.lines().filter_map(|line| line.parse().ok()).filter(|pid| self.is_ours(*pid)).collect()
    }

    /// Whether a process lives and is still the one that told its number.
    fn is_ours(&self, pid: i32) -> bool {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let folder = self.data.path().to_str().unwrap();
        alive(pid) && String::from_utf8_lossy(&command).contains(folder)
    }

    /// Does something to the bus or the store, which blocks.
    pub async fn with<T: Send + 'static>(
        &self,
        service: &Arc<Mutex<T>>,
        act: impl FnOnce(&mut T) + Send + 'static,
    ) {
        let service = Arc::clone(service);
        let acting = move || act(&mut service.lock().unwrap_or_else(PoisonError::into_inner));
        tokio::task::spawn_blocking(acting).await.unwrap();
    }

    /// Stops all nodes in order, and sees to it that nothing is left.
    pub async fn stop(self) {
        let nodes = self.gateways.iter().chain(&self.workers).filter_map(Seat::leave);
        for end in futures_util::future::join_all(nodes.map(Node::stop)).await {
            assert!(end.success(), "{end}");
        }
        eventually("no process is left", async || self.processes().is_empty()).await;
    }

    /// Keeps the logs of all nodes in a folder of their own, for whoever wants to know what happened.
    pub fn keep_logs(&self, name: &str) -> PathBuf {
        let program = std::env::current_exe().unwrap();
        let kept = program.ancestors().nth(3).unwrap().join(name);
        std::fs::create_dir_all(&kept).unwrap();
        for seat in self.gateways.iter().chain(&self.workers) {
            let log = self.data.path().join(&seat.name).join("program.log");
            let _ = std::fs::copy(log, kept.join(format!("{}.log", seat.name)));
        }
        let _ = std::fs::copy(self.executed(), kept.join("executed"));
        kept
    }
}

/// The processes below one, and theirs.
pub fn descendants(pid: i32) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|one| *one != pid && is_below(*one, pid)).collect()
}

fn is_below(mut pid: i32, ancestor: i32) -> bool {
    while pid > 1 {
        if pid == ancestor {
            return true;
        }
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        pid = parent.unwrap_or(0);
    }
    false
}
