//! The program as its users have it: started as a process, reached over HTTP, ended by signals.

use std::{
    collections::BTreeMap,
    fs::File,
    future::Future,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use mcp_shared::testing::services;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::{Method, RequestBuilder, header::HeaderMap};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything that a test waits for may take. Generous: machines are slow and shared, and a
/// passing test never waits that long.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Data that outlives a deployment, so that another can be started on it: a folder, and for a cluster a
/// database, subjects and a key of its own as well.
#[derive(Clone)]
pub struct Data(Arc<Place>);

struct Place {
    folder: TempDir,
    /// The name of the database, and the first token of every subject.
    name: String,
    /// Where a cluster's database is, once somebody has asked.
    mongo: OnceLock<services::Mongo>,
}

impl Data {
    /// Empty data.
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(Arc::new(Place {
            folder: tempfile::Builder::new().prefix("mcp-api-test-").tempdir().unwrap(),
            name: format!("t{}-{count}", std::process::id()),
            mongo: OnceLock::new(),
        }))
    }

    /// Where the folder is. `data/` below it is the `DATA_DIR` of a program on one machine.
    pub fn path(&self) -> &Path {
        self.0.folder.path()
    }

    /// Where the database is.
    pub fn mongo(&self) -> &str {
        self.0.mongo.get_or_init(services::mongo_for_a_test).uri()
    }

    /// The name of the database and of the subjects.
    pub fn name(&self) -> &str {
        &self.0.name
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(mongo) = self.mongo.take() {
            let name = self.name.clone();
            // The place may go in the middle of a test, on a thread that runs a runtime already.
            let dropped = std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    if let Ok(client) = mongodb::Client::with_uri_str(mongo.uri()).await {
                        let _ = client.database(&name).drop().await;
                    }
                });
            });
            let _ = dropped.join();
        }
    }
}

/// Which of the programs a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// Answers HTTP; alone it is everything.
    Gateway,
    /// Owns servers.
    Worker,
}

/// How a deployment is to be started.
pub struct Builder {
    data: Data,
    env: BTreeMap<String, String>,
    key: Option<String>,
    gateways: usize,
    workers: usize,
}

impl Builder {
    /// Sets an environment variable of the programs.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.insert(name.to_owned(), value.into());
        self
    }

    /// Has requests made with an API key.
    pub fn key(mut self, key: &str) -> Self {
        self.key = Some(key.to_owned());
        self
    }

    /// Uses data that an earlier deployment used.
    pub fn data(mut self, data: &Data) -> Self {
        self.data = data.clone();
        self
    }

    /// The data that will be used.
    pub fn place(&self) -> Data {
        self.data.clone()
    }

    /// How many workers a cluster has.
    #[allow(dead_code, reason = "only tests of clusters ask for a number")]
    pub fn workers(mut self, count: usize) -> Self {
        self.workers = count;
        self
    }

    /// One program on a MongoDB, without a bus.
    #[allow(dead_code, reason = "there is a MongoDB where clusters are tested")]
    pub fn alone(mut self) -> Self {
        self.gateways = 1;
        self.workers = 0;
        self.env("NATS_URL", "")
    }

    /// The command that starts the program, with nothing of the test's environment but the search path.
    #[allow(dead_code, reason = "a cluster's tests start gateways by the builder")]
    pub fn command(&self) -> Command {
        self.node_command(Program::Gateway, "")
    }

    /// The command that starts a worker with the same settings.
    #[allow(dead_code, reason = "a cluster's tests start workers by the builder")]
    pub fn worker_command(&self) -> Command {
        self.node_command(Program::Worker, "")
    }

    fn node_command(&self, program: Program, name: &str) -> Command {
        let folder = self.data.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let mut command = Command::new(match program {
            Program::Gateway => env!("CARGO_BIN_EXE_mcp-gateway"),
            Program::Worker => env!("CARGO_BIN_EXE_mcp-worker"),
        });
        command
            .current_dir(&folder)
            .env_clear()
            .env("PATH", std::env::var("PATH").unwrap_or_default())
            .env("HOME", self.data.path())
            .env("PORT", "0")
            .env("WORKER_PORT", "0")
            .env("LOG_FORMAT", "json")
            // No test may depend on a registry that it did not start.
            .env("INSTALL_ON_START", "none")
            // What tests reach listens on this machine, and nothing else may be reached.
            .env("EGRESS_ALLOW", "127.0.0.0/8,::1,localhost")
            .stdin(Stdio::null());
        if crate::CLUSTER {
            command
                .env("NATS_URL", services::shared_nats().url())
                .env("NATS_PREFIX", self.data.name())
                .env("MONGODB_URI", self.data.mongo())
                .env("MONGO_DBNAME", self.data.name())
                .env("SECRETS_KEY", CLUSTER_KEY);
        }
        command.envs(&self.env);
        command
    }

    /// Starts the programs and waits until they say where they listen, and see each other.
    pub async fn start(self) -> Deployment {
        let mut names = vec![(Program::Gateway, String::new())];
        if crate::CLUSTER {
            names = (0..self.gateways).map(|at| (Program::Gateway, format!("gateway-{at}"))).collect();
            names.extend((0..self.workers).map(|at| (Program::Worker, format!("worker-{at}"))));
        }
        let data = self.data.clone();
        // The client of the tests speaks TLS with whatever the programs speak it with.
        mcp_shared::tls::install_provider();
        let nodes = futures_util::future::join_all(
            names.iter().map(|(program, name)| Node::start(&self, *program, name)),
        )
        .await;
        let api = Deployment {
            nodes,
            data,
            client: client(),
            turn: AtomicUsize::new(0),
            builder: Builder {
                data: self.data.clone(),
                env: self.env.clone(),
                key: self.key.clone(),
                ..self
            },
        };
        if crate::CLUSTER && api.builder.workers > 0 {
            api.sees(api.builder.workers).await;
        }
        api
    }
}

/// A file for programs and clients of tests that speak TLS.
pub fn tls_file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/tls").join(name)
}

/// A client that trusts the certificates of tests, and no others.
pub fn client() -> reqwest::Client {
    let trusted = ["authority.pem", "renewed.pem"]
        .map(|name| reqwest::Certificate::from_pem(&std::fs::read(tls_file(name)).unwrap()).unwrap());
    reqwest::Client::builder().tls_certs_only(trusted).build().unwrap()
}

/// One process of a deployment.
pub struct Node {
    child: Child,
    program: Program,
    /// `http://127.0.0.1:PORT`, or with `https`.
    pub base: String,
    /// What it calls itself in the fleet; empty for a gateway.
    #[allow(dead_code, reason = "only tests of clusters tell workers apart")]
    pub id: String,
    log: PathBuf,
}

impl Node {
    /// Starts one, and waits until it says where it listens.
    pub async fn start(builder: &Builder, program: Program, name: &str) -> Self {
        let mut command = builder.node_command(program, name);
        let log = builder.data.path().join(name).join("program.log");
        let stderr = File::options().create(true).append(true).open(&log).unwrap();
        let child = command.stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        // From here on it ends with the node, also if another node of the deployment does not start.
        let mut node = Self { child, program, base: String::new(), id: String::new(), log: log.clone() };
        let mut lines = BufReader::new(node.child.stdout.take().unwrap()).lines();
        let first = tokio::task::spawn_blocking(move || lines.next()).await.unwrap();
        let first = first.and_then(Result::ok).unwrap_or_else(|| {
            panic!("the program did not start:\n{}", std::fs::read_to_string(&log).unwrap_or_default())
        });
        node.base = first.split_whitespace().last().unwrap().to_owned();
        assert!(node.base.starts_with("http://") || node.base.starts_with("https://"), "{first}");
        node.id = first.split(['(', ')']).nth(1).unwrap_or_default().to_owned();
        node
    }

    /// The process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    /// What it shows of a metric.
    pub async fn metric(&self, client: &reqwest::Client, name: &str) -> Option<f64> {
        let answer = client.get(format!("{}/metrics", self.base)).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let kind = answer.headers()["content-type"].to_str().unwrap().to_owned();
        assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
        let text = answer.text().await.unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        Some(value.parse().unwrap())
    }

    /// Sends a signal.
    #[allow(dead_code, reason = "only tests of clusters signal single nodes")]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Stops it in order and waits for its end.
    #[allow(dead_code, reason = "only tests of clusters stop single nodes")]
    pub async fn stop(self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended().await
    }

    /// Waits for its end.
    #[allow(dead_code, reason = "only tests of clusters wait for single nodes")]
    pub async fn ended(mut self) -> ExitStatus {
        let waiting = tokio::task::spawn_blocking(move || self.child.wait().unwrap());
        tokio::time::timeout(2 * PATIENCE, waiting).await.expect("the program did not end").unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The key of all clusters of tests.
pub const CLUSTER_KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// The programs of one deployment. Dropping it kills them, and with them every server that they started.
pub struct Deployment {
    nodes: Vec<Node>,
    data: Data,
    client: reqwest::Client,
    /// Requests go to the gateways in turn.
    turn: AtomicUsize,
    builder: Builder,
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body as it came.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("not JSON: {}", self.text))
    }

    /// The `code` of an error answer; empty for any other.
    pub fn code(&self) -> String {
        let body: Value = serde_json::from_str(&self.text).unwrap_or_default();
        body["code"].as_str().unwrap_or_default().to_owned()
    }

    /// Asserts that the answer is 200.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.status, 200, "{}", self.text);
        self
    }

    /// Asserts that the answer is an error in the documented envelope, with this status and code.
    #[track_caller]
    pub fn fails(self, status: u16, code: &str) -> Self {
        assert_eq!(self.status, status, "{}", self.text);
        let body = self.json();
        assert_eq!(body["code"], code, "{}", self.text);
        assert_eq!(body["success"], false, "{}", self.text);
        assert!(body["error"].as_str().is_some_and(|text| !text.is_empty()), "{}", self.text);
        assert!(body["retryable"].is_boolean(), "{}", self.text);
        assert_eq!(body["requestId"], self.headers["x-request-id"].to_str().unwrap(), "{}", self.text);
        self
    }

    /// The text of the only content block of a tool result.
    #[track_caller]
    pub fn tool_text(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()["data"]["content"][0]["text"]
            .as_str()
            .unwrap_or_else(|| panic!("{}", self.text))
            .to_owned()
    }
}

impl Deployment {
    /// A program with default settings and an empty data folder.
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// A program with settings of the test's own.
    pub fn builder() -> Builder {
        // For the clients of all tests: they have TLS, and nobody else says with which cryptography.
        mcp_shared::tls::install_provider();
        Builder { data: Data::new(), env: BTreeMap::new(), key: None, gateways: 2, workers: 2 }
    }

    /// `http://127.0.0.1:PORT` of a gateway: each of them in turn.
    pub fn base(&self) -> &str {
        let gateways: Vec<_> = self.of(Program::Gateway).collect();
        &gateways[self.turn.fetch_add(1, Ordering::Relaxed) % gateways.len()].base
    }

    /// `127.0.0.1:PORT` of a gateway.
    pub fn address(&self) -> &str {
        self.base().split("//").last().unwrap_or_default()
    }

    fn of(&self, program: Program) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(move |node| node.program == program)
    }

    /// The processes that own servers.
    pub fn owners(&self) -> Vec<i32> {
        let owner = if crate::CLUSTER { Program::Worker } else { Program::Gateway };
        self.of(owner).map(Node::pid).collect()
    }

    /// The gateways, in the order in which they were started.
    #[allow(dead_code, reason = "only tests of clusters tell gateways apart")]
    pub fn gateways(&self) -> Vec<&Node> {
        self.of(Program::Gateway).collect()
    }

    /// The workers, in the order in which they were started.
    #[allow(dead_code, reason = "only tests of clusters tell workers apart")]
    pub fn workers(&self) -> Vec<&Node> {
        self.of(Program::Worker).collect()
    }

    /// Starts one more worker, and waits until all gateways see it.
    #[allow(dead_code, reason = "only tests of clusters add workers")]
    pub async fn add_worker(&mut self) {
        self.add_worker_with(&[]).await;
    }

    /// The same, for a worker with settings of its own.
    #[allow(dead_code, reason = "only tests of clusters add workers")]
    pub async fn add_worker_with(&mut self, env: &[(&str, &str)]) {
        let name = format!("worker-{}", self.nodes.len());
        let mut builder = Builder {
            data: self.data.clone(),
            env: self.builder.env.clone(),
            key: self.builder.key.clone(),
            ..self.builder
        };
        builder.env.extend(env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let node = Node::start(&builder, Program::Worker, &name).await;
        self.nodes.push(node);
        self.sees(self.workers().len()).await;
    }

    /// Takes a gateway out of the deployment, as [`Deployment::take_worker`] takes a worker.
    #[allow(dead_code, reason = "only tests of clusters take gateways away")]
    pub fn take_gateway(&mut self, at: usize) -> Node {
        let at = self.nodes.iter().enumerate().filter(|(_, node)| node.program == Program::Gateway).nth(at);
        let at = at.unwrap().0;
        self.nodes.remove(at)
    }

    /// Takes a worker out of the deployment: its process goes on until the test ends it.
    #[allow(dead_code, reason = "only tests of clusters take workers away")]
    pub fn take_worker(&mut self, id: &str) -> Node {
        let at = self.nodes.iter().position(|node| node.id == id).unwrap();
        self.nodes.remove(at)
    }

    /// The worker that owns a process of a server.
    #[allow(dead_code, reason = "only tests of clusters ask who owns what")]
    pub async fn owners_of(&self, server: &str) -> Vec<String> {
        let server = self.server(server).await;
        let instances = server["instances"].as_array().unwrap();
        let mut owners: Vec<_> = instances
            .iter()
            .filter(|one| one["status"] == "connected")
            .map(|one| one["workerId"].as_str().unwrap().to_owned())
            .collect();
        owners.sort();
        owners.dedup();
        owners
    }

    /// Waits until every gateway sees so many workers, or, where this may not look at them, is ready.
    pub async fn sees(&self, workers: usize) {
        let get = |address: String| match self.key() {
            Some(key) => self.client.get(address).bearer_auth(key).send(),
            None => self.client.get(address).send(),
        };
        for gateway in self.of(Program::Gateway) {
            eventually("the gateways see all workers", async || {
                let fleet = get(format!("{}/fleet", gateway.base)).await.unwrap();
                if matches!(fleet.status().as_u16(), 401 | 403) {
                    return get(format!("{}/readyz", gateway.base)).await.unwrap().status() == 200;
                }
                let fleet: Value = fleet.json().await.unwrap();
                fleet["workers"].as_array().is_some_and(|seen| seen.len() == workers)
            })
            .await;
        }
    }

    /// The data folder.
    pub fn data(&self) -> Data {
        self.data.clone()
    }

    /// Waits until a program has logged this. Lines are written some milliseconds after what they tell of.
    pub async fn logged(&self, text: &str) {
        eventually(&format!("the log has {text:?}"), async || self.log().contains(text)).await;
    }

    /// What the programs logged so far.
    pub fn log(&self) -> String {
        self.nodes.iter().map(|node| std::fs::read_to_string(&node.log).unwrap()).collect()
    }

    /// All processes of the programs.
    pub fn programs(&self) -> Vec<i32> {
        self.nodes.iter().map(Node::pid).collect()
    }

    /// What the programs show of a metric, added up. `name` has its labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let mut sum = 0.0;
        for node in &self.nodes {
            sum += node.metric(&self.client, name).await.unwrap_or(0.0);
        }
        sum
    }

    /// The API key that requests are made with.
    pub fn key(&self) -> Option<&str> {
        self.builder.key.as_deref()
    }

    /// A request to be completed by the test.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.request_with(self.builder.key.as_deref(), method, path)
    }

    /// The same with another credential than the deployment's, or with none.
    pub fn request_with(&self, credential: Option<&str>, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base()));
        match credential {
            Some(credential) => request.bearer_auth(credential),
            None => request,
        }
    }

    /// Sends a request.
    pub async fn send(&self, request: RequestBuilder) -> Answer {
        let response = request.timeout(2 * PATIENCE).send().await.unwrap();
        Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            text: response.text().await.unwrap(),
        }
    }

    /// `GET path`.
    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// `POST path` with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    /// `PUT path` with a JSON body, or without one.
    pub async fn put(&self, path: &str, body: Option<&Value>) -> Answer {
        let request = self.request(Method::PUT, path);
        self.send(match body {
            Some(body) => request.json(body),
            None => request,
        })
        .await
    }

    /// `DELETE path`.
    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// Registers the fixture server with arguments of its own and further fields of the record, and
    /// asserts that it connected.
    pub async fn add_fixture(&self, name: &str, arguments: &[&str], more: Value) -> Value {
        let server = self.register_fixture(name, arguments, more).await.ok().json()["server"].clone();
        assert_eq!(server["status"], "connected", "{server}");
        server
    }

    /// Registers the fixture server, whatever comes of it.
    pub async fn register_fixture(&self, name: &str, arguments: &[&str], more: Value) -> Answer {
        let mut body = fixture(name, arguments);
        body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
        self.post("/mcp/servers", &body).await
    }

    /// Calls a tool for the default user.
    pub async fn call(&self, server: &str, tool: &str, args: Value) -> Answer {
        self.post("/mcp/tool/call", &json!({"serverName": server, "methodName": tool, "args": args})).await
    }

    /// Calls a tool for a user.
    pub async fn call_as(&self, user: &str, server: &str, tool: &str, args: Value) -> Answer {
        let body = json!({"username": user, "serverName": server, "methodName": tool, "args": args});
        self.post("/mcp/tool/call", &body).await
    }

    /// Stores a secret.
    pub async fn set_secret(&self, user: &str, server: &str, name: &str, value: &str) -> Answer {
        let body = json!({"username": user, "serverName": server, "secretName": name, "secretValue": value});
        self.post("/secrets/set", &body).await
    }

    /// The server's document.
    pub async fn server(&self, name: &str) -> Value {
        self.get(&format!("/mcp/servers/{name}")).await.ok().json()["server"].clone()
    }

    /// The process ids of a server's instances.
    pub async fn pids(&self, name: &str) -> Vec<i32> {
        let server = self.server(name).await;
        let instances = server["instances"].as_array().unwrap();
        instances.iter().filter_map(|one| i32::try_from(one["pid"].as_i64()?).ok()).collect()
    }

    /// Sends a signal to every program.
    pub fn signal(&self, signal: Signal) {
        for node in &self.nodes {
            kill(Pid::from_raw(node.pid()), signal).unwrap();
        }
    }

    /// Has the gateways read again what may have changed (SIGHUP).
    pub fn hang_up(&self) {
        self.of(Program::Gateway).for_each(|node| kill(Pid::from_raw(node.pid()), Signal::SIGHUP).unwrap());
    }

    /// Stops the programs in order and waits for their end.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait().await
    }

    /// Kills the programs without warning and waits until they are gone.
    pub async fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.wait().await;
    }

    /// Waits for the end of all programs. The status is that of one that failed, if one did.
    pub async fn wait(&mut self) -> ExitStatus {
        let nodes = std::mem::take(&mut self.nodes);
        let waiting =
            nodes.into_iter().map(|mut node| tokio::task::spawn_blocking(move || node.child.wait().unwrap()));
        let waiting = futures_util::future::try_join_all(waiting);
        let ends =
            tokio::time::timeout(2 * PATIENCE, waiting).await.expect("the program did not end").unwrap();
        ends.iter().find(|end| !end.success()).copied().unwrap_or(ends[0])
    }
}

/// The body that registers the fixture server.
pub fn fixture(name: &str, arguments: &[&str]) -> Value {
    let program = std::env::current_exe().unwrap();
    let arguments: Vec<&str> = std::iter::once(crate::FIXTURE).chain(arguments.iter().copied()).collect();
    json!({"name": name, "command": program, "args": arguments})
}

/// Whether a process exists and is more than an entry that nobody reaped.
pub fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !matches!(rest.trim_start().chars().next(), Some('Z' | 'X')))
}

/// Waits until something is so, and fails the test with `what` if it never is.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
