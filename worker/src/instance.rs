//! One running process of a server: started, negotiated with, listed, watched and stopped.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use mcp_shared::{error::shorten, json::RawJson, limits, package::PackageRef, timestamp::Timestamp};
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
    transport::stdio::Connection,
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

/// A process that answered `initialize` and `tools/list`.
pub struct Instance {
    /// Its connection.
    pub connection: Connection,
    /// Its process id.
    pub pid: u32,
    /// Since when it is connected.
    pub since: Timestamp,
    /// The same moment on the monotonic clock.
    pub started: Instant,
    /// Calls in flight.
    pub in_flight: AtomicUsize,
    /// Slots of the pool that lead here.
    pub slots: AtomicUsize,
    tools: Mutex<RawJson>,
    stopping: AtomicBool,
    stop: CancellationToken,
    ended: watch::Receiver<Option<Exit>>,
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
        let connection = Connection::open(streams.stdin, streams.stdout, Arc::clone(log), tasks);
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
            () = given_up.cancelled() => Ok(Err(mcp::Refusal("it is no longer wanted".to_owned()))),
        };
        let tools = match greeted {
            Ok(Ok(tools)) => tools,
            failed => {
                // A process that ended explains more than the connection it closed.
                let exit = if connection.is_open() { None } else { Some(wait_for_end(&ended).await) };
                drop(guard);
                wait_for_end(&ended).await;
                let _ = timeout(LAST_OUTPUT, stderr).await;
                return Err(match (exit, failed) {
                    (Some(exit), _) => explain_exit(exit, log),
                    (None, Ok(Err(refusal))) => format!("the server was started, but {refusal}"),
                    (None, _) => {
                        format!("the server did not list its tools within {} ms", limit.as_millis())
                    }
                });
            }
        };
        drop(guard.disarm());
        Ok(Arc::new(Self {
            connection,
            pid,
            since: Timestamp::now(),
            started: Instant::now(),
            in_flight: AtomicUsize::new(0),
            slots: AtomicUsize::new(0),
            tools: Mutex::new(tools),
            stopping: AtomicBool::new(false),
            stop,
            ended,
        }))
    }

    /// The tools as last listed.
    pub fn tools(&self) -> RawJson {
        self.tools.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps a newer listing.
    pub fn set_tools(&self, tools: RawJson) {
        *self.tools.lock().unwrap_or_else(PoisonError::into_inner) = tools;
    }

    /// Whether calls can begin on it.
    pub fn is_open(&self) -> bool {
        self.connection.is_open()
    }

    /// Whether we are the ones who end it.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Exit {
        wait_for_end(&self.ended).await
    }

    /// Ends it: closes its input, then SIGTERM, then SIGKILL to its group, and waits until it is reaped.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.stop.cancel();
        self.ended().await;
    }
}

async fn wait_for_end(ended: &watch::Receiver<Option<Exit>>) -> Exit {
    match ended.clone().wait_for(Option::is_some).await {
        Ok(exit) => exit.unwrap_or(Exit::Lost),
        Err(_) => Exit::Lost,
    }
}

fn explain_exit(exit: Exit, log: &Log) -> String {
    let mut text = format!("the process {exit} before it was ready");
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
    ended: watch::Sender<Option<Exit>>,
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
    ended.send_replace(Some(exit));
}

/// Reads standard error to its end, whatever comes: a child must never block on it.
async fn keep_stderr(mut stderr: impl AsyncRead + Unpin, log: Arc<Log>) {
    let mut chunk = vec![0; 8 * 1024];
    let mut line = Vec::new();
    while let Ok(count @ 1..) = stderr.read(&mut chunk).await {
        for part in chunk[..count].split_inclusive(|byte| *byte == b'\n') {
            // The log cuts lines; what it would not look at is not collected either.
            let room = COLLECTED.saturating_sub(line.len());
            line.extend_from_slice(&part[..part.len().min(room)]);
            if part.ends_with(b"\n") {
                push_line(&mut line, &log);
            }
        }
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
