//! The program as its users have it: started as a process, reached over HTTP, ended by signals.

use std::{
    collections::BTreeMap,
    fs::File,
    future::Future,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

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

/// A folder for data that outlives a deployment, so that another can be started on it.
#[derive(Clone)]
pub struct Data(Arc<TempDir>);

impl Data {
    /// A new, empty folder.
    pub fn new() -> Self {
        Self(Arc::new(tempfile::Builder::new().prefix("mcp-api-test-").tempdir().unwrap()))
    }

    /// Where it is. `data/` below it is the program's `DATA_DIR`.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// How a deployment is to be started.
pub struct Builder {
    data: Data,
    env: BTreeMap<String, String>,
}

impl Builder {
    /// Sets an environment variable of the program.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.insert(name.to_owned(), value.into());
        self
    }

    /// Uses a folder that an earlier deployment used.
    pub fn data(mut self, data: &Data) -> Self {
        self.data = data.clone();
        self
    }

    /// The command that starts the program, with nothing of the test's environment but the search path.
    pub fn command(&self) -> Command {
        self.program(env!("CARGO_BIN_EXE_mcp-gateway"))
    }

    /// The command that starts a worker with the same settings.
    pub fn worker_command(&self) -> Command {
        self.program(env!("CARGO_BIN_EXE_mcp-worker"))
    }

    fn program(&self, path: &str) -> Command {
        let mut command = Command::new(path);
        command
            .current_dir(self.data.path())
            .env_clear()
            .env("PATH", std::env::var("PATH").unwrap_or_default())
            .env("HOME", self.data.path())
            .env("PORT", "0")
            .env("WORKER_PORT", "0")
            .env("LOG_FORMAT", "json")
            .envs(&self.env)
            .stdin(Stdio::null());
        command
    }

    /// Starts the program and waits until it says where it listens.
    pub async fn start(self) -> Deployment {
        let log = self.data.path().join("gateway.log");
        let stderr = File::options().create(true).append(true).open(&log).unwrap();
        let mut child = self.command().stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = tokio::task::spawn_blocking(move || lines.next()).await.unwrap();
        let first = first.and_then(Result::ok).unwrap_or_else(|| {
            panic!("the program did not start:\n{}", std::fs::read_to_string(&log).unwrap_or_default())
        });
        let base = first.split_whitespace().last().unwrap().to_owned();
        assert!(base.starts_with("http://"), "{first}");
        Deployment { child: Some(child), base, data: self.data, log, client: reqwest::Client::new() }
    }
}

/// A running program. Dropping it kills it, and with it every server that it started.
pub struct Deployment {
    child: Option<Child>,
    base: String,
    data: Data,
    log: PathBuf,
    client: reqwest::Client,
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

    /// The `code` of an error answer.
    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
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
        Builder { data: Data::new(), env: BTreeMap::new() }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    /// The data folder.
    pub fn data(&self) -> Data {
        self.data.clone()
    }

    /// What the program logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// The program's process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().unwrap().id()).unwrap()
    }

    /// A request to be completed by the test.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.base))
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

    /// Sends a signal to the program.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Stops the program in order and waits for its end.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait().await
    }

    /// Kills the program without warning and waits until it is gone.
    pub async fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.wait().await;
    }

    /// Waits for the program's end.
    pub async fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let waiting = tokio::task::spawn_blocking(move || child.wait().unwrap());
        tokio::time::timeout(2 * PATIENCE, waiting).await.expect("the program did not end").unwrap()
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
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
