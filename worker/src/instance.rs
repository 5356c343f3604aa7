//! One running process of a server, or one connection to a remote one: started, negotiated with, listed, watched
//! and stopped.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use mcp_shared::{
    error::shorten, json::RawJson, limits, metrics::Gone, package::PackageRef, timestamp::Timestamp,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroizing;

use crate::{
    logs::{COLLECTED, Known, Log},
    mcp,
    packages::{folders::Installed, launch::localized},
    supervisor::{Child, Exit, SpawnSpec, Supervisor},
    transport::{connection::Connection, http::Http, stdio, turns::Turns},
};

/// Variables of ours that a child gets. Everything else of our environment, above all our own secrets,
/// stays here; what a server needs beyond these stands in its record.
const INHERITED: &[&str] = &[
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LOGNAME",
    "PATH",
    "SHELL",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TERM",
    "TMPDIR",
    "TZ",
    "USER",
];

/// How often a process is told to end that has not ended.
const KILL_ATTEMPTS: usize = 5;
/// How long the output of an ended process may still be read.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// What an instance is.
pub enum Origin {
    /// A process of this machine.
    Process {
        /// Its id.
        pid: u32,
    },
    /// A connection to another machine.
    Remote(Arc<Http>),
    /// A part of this program.
    Builtin,
}

/// How an instance ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its process did.
    Process(Exit),
    /// The remote server ended the session, or the one stream that it had.
    Remote,
    /// What is part of this program did.
    Builtin,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Process(exit) => write!(f, "the process {exit}"),
            End::Remote => f.write_str("the remote server ended the session"),
            End::Builtin => f.write_str("the built-in server ended"),
        }
    }
}

/// What answered `initialize` and `tools/list`.
pub struct Instance {
    /// Its connection.
    pub connection: Connection,
    /// What it is.
    pub origin: Origin,
    /// Since when it is connected.
    pub since: Timestamp,
    /// The same moment on the monotonic clock.
    pub started: Instant,
    /// Calls in flight.
    pub in_flight: AtomicUsize,
    /// Slots of the pool that lead here.
    pub slots: AtomicUsize,
    /// Calls that were cancelled and that it did not give up in time. Each may still keep it busy.
    pub ignored_cancels: AtomicUsize,
    /// The latest deadline of all calls so far, in milliseconds since `started`.
    last_deadline: AtomicU64,
    tools: Mutex<RawJson>,
    leaving: AtomicBool,
    stopping: AtomicBool,
    /// Why, where there is more to say.
    stopped_for: OnceLock<Gone>,
    stop: CancellationToken,
    ended: watch::Receiver<Option<End>>,
}

/// What starts a process.
pub struct Launch<'a> {
    /// The program.
    pub command: &'a str,
    /// Its arguments.
    pub args: &'a [String],
    /// The record's variables, in clear.
    pub env: &'a BTreeMap<String, String>,
    /// The installed package that it is of, and where that is.
    pub package: Option<(&'a PackageRef, Arc<Installed>)>,
    /// Variables made of a user's secrets; they win over the record's.
    pub secret_env: Vec<(String, Zeroizing<String>)>,
    /// Keeps these values out of the log while the process lives.
    pub known: Known,
}

impl Launch<'_> {
    fn spec(self) -> (SpawnSpec, Known, Option<Arc<Installed>>) {
        let (mut command, mut args) = (self.command.to_owned(), self.args.to_vec());
        let mut own = self.env.clone();
        if let Some((reference, installed)) = &self.package {
            let path = std::env::var("PATH").ok();
            let local = localized(reference, &installed.folder, &command, &args, &own, path.as_deref());
            (command, args, own) = (local.command, local.args, local.env);
        }
        let mut env: BTreeMap<String, Zeroizing<String>> = INHERITED
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), Zeroizing::new(std::env::var(name).ok()?))))
            .collect();
        env.extend(own.into_iter().map(|(name, value)| (name, Zeroizing::new(value))));
        env.extend(self.secret_env);
        let installed = self.package.map(|(_, installed)| installed);
        (
            SpawnSpec { program: command, args, env: env.into_iter().collect(), folder: None },
            self.known,
            installed,
        )
    }
}

impl Instance {
    /// Starts a process and waits until it listed its tools, at most for `limit` and no longer than
    /// until `given_up`. The error is a sentence for people; the process is gone then.
    pub async fn start(
        launch: Launch<'_>,
        limit: Duration,
        given_up: &CancellationToken,
        log: &Arc<Log>,
        supervisor: &Supervisor,
        tasks: &TaskTracker,
    ) -> Result<Arc<Self>, String> {
        let deadline = Instant::now() + limit;
        let (spec, known, installed) = launch.spec();
        let (child, streams) = tokio::time::timeout_at(deadline, supervisor.spawn(spec))
            .await
            .map_err(|_| "the process was not started in time".to_owned())??;
        let pid = child.pid;
        let connection = stdio::open(streams.stdin, streams.stdout, Arc::clone(log), tasks);
        let (words, closed) = (keep_stderr(streams.stderr, Arc::clone(log)), connection.clone());
        let stderr = tasks.spawn(async move {
            // As with the output: not longer than the server, and the last words.
            let over = async {
                closed.closed().await;
                tokio::time::sleep(LAST_OUTPUT).await;
            };
            tokio::select! {
                () = words => {}
                () = over => {}
            }
        });
        let stop = CancellationToken::new();
        let (ended_sender, ended) = watch::channel(None);
        // From here on the guard ends the process if this start is given up.
        let guard = stop.clone().drop_guard();
        let watch = watch_over(child, connection.clone(), stop.clone(), ended_sender);
        tasks.spawn(async move {
            watch.await;
            drop((known, installed));
        });

        let greet = async {
            mcp::negotiate(&connection).await?;
            mcp::list_tools(&connection).await
        };
        let greeted = tokio::select! {
            greeted = tokio::time::timeout_at(deadline, greet) => greeted,
            () = given_up.cancelled() => Ok(Err(mcp::Refusal::new("it is no longer wanted"))),
        };
        let tools = match greeted {
            Ok(Ok(tools)) => tools,
            failed => {
                // A process that ended explains more than the connection it closed.
                let end = if connection.is_open() { None } else { Some(wait_for_end(&ended).await) };
                drop(guard);
                wait_for_end(&ended).await;
                let _ = timeout(LAST_OUTPUT, stderr).await;
                return Err(match (end, failed) {
                    (Some(end), _) => explain_end(end, log),
                    (None, Ok(Err(refusal))) => format!("the server was started, but {refusal}"),
                    (None, _) => {
                        format!("the server did not list its tools within {} ms", limit.as_millis())
                    }
                });
            }
        };
        drop(guard.disarm());
        Ok(Self::new(connection, Origin::Process { pid }, tools, stop, ended))
    }

    /// An instance that runs from now on. `stop` asks it to end, `ended` tells when it did.
    pub fn new(
        connection: Connection,
        origin: Origin,
        tools: RawJson,
        stop: CancellationToken,
        ended: watch::Receiver<Option<End>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            connection,
            origin,
            since: Timestamp::now(),
            started: Instant::now(),
            in_flight: AtomicUsize::new(0),
            slots: AtomicUsize::new(0),
            ignored_cancels: AtomicUsize::new(0),
            last_deadline: AtomicU64::new(0),
            tools: Mutex::new(tools),
            leaving: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            stopped_for: OnceLock::new(),
            stop,
            ended,
        })
    }

    /// Its process id, if it is a process.
    pub fn pid(&self) -> Option<u32> {
        match self.origin {
            Origin::Process { pid } => Some(pid),
            Origin::Remote(_) | Origin::Builtin => None,
        }
    }

    /// The tools as last listed.
    pub fn tools(&self) -> RawJson {
        self.tools.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps a newer listing.
    pub fn set_tools(&self, tools: RawJson) {
        if let Origin::Remote(http) = &self.origin {
            http.set_tools(&tools);
        }
        *self.tools.lock().unwrap_or_else(PoisonError::into_inner) = tools;
    }

    /// Notes until when somebody may wait for a call that is about to begin.
    pub fn expect_until(&self, deadline: Instant) {
        let time = deadline.saturating_duration_since(self.started).as_millis();
        self.last_deadline.fetch_max(u64::try_from(time).unwrap_or(u64::MAX), Ordering::AcqRel);
    }

    /// When all calls that were begun so far have had their time.
    pub fn last_deadline(&self) -> Instant {
        self.started + Duration::from_millis(self.last_deadline.load(Ordering::Acquire))
    }

    /// Whether no call is in flight.
    pub fn is_idle(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) == 0
    }

    /// Whether calls can begin on it.
    pub fn is_open(&self) -> bool {
        self.connection.is_open() && !self.is_leaving()
    }

    /// Lets no more calls begin. Says whether that was so already.
    pub fn leave(&self) -> bool {
        self.leaving.swap(true, Ordering::SeqCst)
    }

    /// Whether no more calls may begin, although it runs.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::SeqCst)
    }

    /// Whether we are the ones who end it.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Waits for its end.
    pub async fn ended(&self) -> End {
        wait_for_end(&self.ended).await
    }

    /// Why it is gone, by how it ended and by whether we are the ones who ended it.
    pub fn gone(&self, end: End) -> Gone {
        match end {
            End::Process(Exit::Excess(_)) => Gone::TooLarge,
            _ if self.is_stopping() => self.stopped_for.get().copied().unwrap_or(Gone::Stopped),
            End::Process(Exit::Code(_)) => Gone::Exited,
            End::Process(Exit::Signal(_)) => Gone::Killed,
            End::Process(Exit::Lost) => Gone::Lost,
            End::Remote | End::Builtin => Gone::Disconnected,
        }
    }

    /// Ends it as [`Instance::stop`] does, for another reason than that it is not wanted any more.
    pub async fn stop_for(&self, why: Gone) {
        let _ = self.stopped_for.set(why);
        self.stop().await;
    }

    /// Ends it: closes a process' input, then SIGTERM, then SIGKILL to its group, and waits until it is reaped. The
    /// session of a remote server stays, to be resumed.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.stop.cancel();
        self.ended().await;
    }
}

async fn wait_for_end(ended: &watch::Receiver<Option<End>>) -> End {
    match ended.clone().wait_for(Option::is_some).await {
        Ok(end) => end.unwrap_or(End::Process(Exit::Lost)),
        Err(_) => End::Process(Exit::Lost),
    }
}

fn explain_end(end: End, log: &Log) -> String {
    let mut text = format!("{end} before it was ready");
    // Its own last words are usually the reason.
    if let Some(line) =
        log.lines().iter().rev().find(|line| !line.trim().is_empty() && !line.starts_with("[mcp-api]"))
    {
        text.push_str(": ");
        text.push_str(&shorten(line.trim(), 300));
    }
    text
}

/// Kills a process and waits for its end. One that not even the kernel can end is given up.
async fn kill(child: &mut Child) -> Exit {
    for _ in 0..KILL_ATTEMPTS {
        child.kill();
        if let Ok(exit) = timeout(LAST_OUTPUT, child.exited()).await {
            return exit;
        }
    }
    Exit::Lost
}

/// Waits for the end of a process, or brings it about, and then tells everybody.
async fn watch_over(
    mut child: Child,
    connection: Connection,
    stop: CancellationToken,
    ended: watch::Sender<Option<End>>,
) {
    let exit = tokio::select! {
        exit = child.exited() => exit,
        () = connection.broken() => {
            // A server that closed its input or its output is of no more use. Most are just ending.
            match timeout(LAST_OUTPUT, child.exited()).await {
                Ok(exit) => exit,
                Err(_) => kill(&mut child).await,
            }
        }
        () = stop.cancelled() => {
            connection.close_input();
            match timeout(limits::STOP_EOF, child.exited()).await {
                Ok(exit) => exit,
                Err(_) => {
                    child.terminate();
                    match timeout(limits::STOP_TERM, child.exited()).await {
                        Ok(exit) => exit,
                        Err(_) => kill(&mut child).await,
                    }
                }
            }
        }
    };
    // Answers that it wrote before it ended still count.
    let _ = timeout(LAST_OUTPUT, connection.output_ended()).await;
    connection.close();
    ended.send_replace(Some(End::Process(exit)));
}

/// Reads standard error to its end, whatever comes: a child must never block on it.
async fn keep_stderr(mut stderr: impl AsyncRead + Unpin, log: Arc<Log>) {
    let mut chunk = vec![0; 8 * 1024];
    let (mut line, mut turns) = (Vec::new(), Turns::default());
    while let Ok(count @ 1..) = stderr.read(&mut chunk).await {
        for part in chunk[..count].split_inclusive(|byte| *byte == b'\n') {
            // The log cuts lines; what it would not look at is not collected either.
            let room = COLLECTED.saturating_sub(line.len());
            line.extend_from_slice(&part[..part.len().min(room)]);
            if part.ends_with(b"\n") {
                push_line(&mut line, &log);
            }
        }
        turns.took(count).await;
    }
    push_line(&mut line, &log);
}

fn push_line(line: &mut Vec<u8>, log: &Log) {
    let text = line.trim_ascii_end();
    if !text.is_empty() {
        log.push(text);
    }
    line.clear();
}
