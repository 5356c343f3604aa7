//! The supervisor: a small process of our own, one for each worker, that starts every MCP server and
//! outlives the worker by the moment it takes to kill what the worker left behind.
//!
//! A worker that is killed with SIGKILL cannot clean up after itself, and the kernel's parent-death
//! signal reaches direct children only: a server behind `npx` would live on. The supervisor is a *child
//! subreaper*: whatever its children start comes back to it when its parent dies, so it can end all of
//! them. It is the same executable, started again with [`ARGUMENT`], and it has no threads and no
//! secrets of ours in its environment.
//!
//! The worker and the supervisor share a socket. Frames are a length and JSON; the file descriptors of a
//! new child's standard streams travel with the length. When the socket closes, the worker is gone.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
};

use mcp_shared::lifecycle;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};
use tokio::{
    net::unix::pipe,
    sync::{oneshot, watch},
};
use zeroize::Zeroizing;

mod process;
mod restrictions;
mod usage;

pub use process::run;
pub use usage::{Caps, Excess};

/// The argument that makes our executable a supervisor. What follows is what a server may take ([`Caps`]) and, where
/// that has to be said, the number of files that it may have open. Every program that uses a worker must call
/// [`run`] when it finds it, before anything else.
pub const ARGUMENT: &str = "__supervise-children";

/// The variable by which the supervisor recognises descendants that left their process group.
const MARKER: &str = "MCP_API_INSTANCE";

/// Frames that may wait to be sent to the supervisor.
const OUTBOX: usize = 1_024;

/// The running executable, also when its file was replaced or removed by an upgrade meanwhile.
pub fn this_program() -> PathBuf {
    let running = PathBuf::from("/proc/self/exe");
    if running.exists() { running } else { std::env::current_exe().unwrap_or(running) }
}

/// Keeps this process' memory and environment, in which our secrets are, from other processes of the same
/// user, and from core files. To be called first thing: it holds for what comes after.
pub fn protect_process() {
    // Where a system has neither, there is nothing that could be done about it.
    #[cfg(target_os = "linux")]
    let _ = nix::sys::prctl::set_dumpable(false);
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
}

/// What to start.
pub struct SpawnSpec {
    /// The program; a name without a slash is looked up in the child's `PATH`.
    pub program: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its whole environment.
    pub env: Vec<(String, Zeroizing<String>)>,
    /// Where it runs; `None` where the worker does.
    pub folder: Option<PathBuf>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It returned this status.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It was ended because it took more than a server may.
    Excess(Excess),
    /// Its end was not seen, since the supervisor itself was lost.
    Lost,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exited with status {code}"),
            Exit::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(name) => write!(f, "was ended by {name}"),
                Err(_) => write!(f, "was ended by signal {signal}"),
            },
            Exit::Excess(Excess::Processes) => {
                f.write_str("was ended: it had more processes than a server may (SERVER_MAX_PROCESSES)")
            }
            Exit::Excess(Excess::Memory) => {
                f.write_str("was ended: it took more memory than a server may (SERVER_MAX_MEMORY)")
            }
            Exit::Lost => f.write_str("was lost"),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// Three descriptors travel with it: standard input, output and error of the child.
    Spawn { id: u64, program: String, args: Vec<String>, env: Vec<(String, String)>, folder: Option<PathBuf> },
    /// Signals the child's process group and what it started elsewhere.
    Signal { id: u64, kill: bool },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Event {
    Started { id: u64, pid: u32 },
    Failed { id: u64, error: String },
    Exited { id: u64, exit: Exit },
}

/// The worker's end. It starts the supervisor process at the first child, and again should it be lost.
pub struct Supervisor {
    executable: PathBuf,
    caps: Caps,
    link: Mutex<Option<Arc<Link>>>,
    next_id: AtomicU64,
}

/// A started child. Dropping it kills the process and everything that it started.
pub struct Child {
    /// Its process id, which is its process group's id too.
    pub pid: u32,
    id: u64,
    link: Arc<Link>,
    exit: watch::Receiver<Option<Exit>>,
}

/// The worker's ends of a child's standard streams.
pub struct Streams {
    /// To the child.
    pub stdin: pipe::Sender,
    /// From the child.
    pub stdout: pipe::Receiver,
    /// From the child.
    pub stderr: pipe::Receiver,
}

struct Link {
    outbox: mpsc::SyncSender<Outgoing>,
    children: Mutex<Children>,
}

#[derive(Default)]
struct Children {
    lost: bool,
    by_id: HashMap<u64, Tracked>,
}

struct Tracked {
    started: Option<oneshot::Sender<Result<u32, String>>>,
    exit: watch::Sender<Option<Exit>>,
}

struct Outgoing {
    frame: Zeroizing<Vec<u8>>,
    descriptors: Vec<OwnedFd>,
}

impl Supervisor {
    /// Nothing is started yet. `executable` is run with [`ARGUMENT`] when the first child is wanted.
    pub fn new(executable: PathBuf) -> Self {
        Self { executable, caps: Caps::default(), link: Mutex::new(None), next_id: AtomicU64::new(1) }
    }

    /// Holds each child to this.
    pub fn with_caps(mut self, caps: Caps) -> Self {
        self.caps = caps;
        self
    }

    /// Starts a child in a process group of its own. The error is a sentence for people.
    pub async fn spawn(&self, spec: SpawnSpec) -> Result<(Child, Streams), String> {
        let link = self.link().map_err(|error| format!("the supervisor process did not start: {error}"))?;
        let (child_ends, streams) =
            streams().map_err(|error| format!("no pipes for the process: {error}"))?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (started, answer) = oneshot::channel();
        let (exit_sender, exit) = watch::channel(None);
        {
            let mut children = link.children();
            if children.lost {
                return Err("the supervisor process was lost; try again".to_owned());
            }
            children.by_id.insert(id, Tracked { started: Some(started), exit: exit_sender });
        }
        // From here on dropping the child kills it, also when the caller gives up waiting.
        let mut child = Child { pid: 0, id, link, exit };
        let env = spec.env.iter().map(|(name, value)| (name.clone(), value.to_string())).collect();
        let SpawnSpec { program, args, folder, .. } = spec;
        child.link.send(&Request::Spawn { id, program, args, env, folder }, child_ends)?;
        child.pid = answer.await.map_err(|_| "the supervisor process was lost".to_owned())??;
        Ok((child, streams))
    }

    /// The running supervisor, or a new one.
    fn link(&self) -> io::Result<Arc<Link>> {
        let mut slot = lock(&self.link);
        if let Some(link) = slot.as_ref().filter(|link| !link.children().lost) {
            return Ok(Arc::clone(link));
        }
        let link = Link::open(&self.executable, self.caps)?;
        *slot = Some(Arc::clone(&link));
        Ok(link)
    }
}

impl Child {
    /// Sends SIGTERM to the process group.
    pub fn terminate(&self) {
        self.signal(false);
    }

    /// Sends SIGKILL to the process group and to what left it.
    pub fn kill(&self) {
        self.signal(true);
    }

    /// Waits for the end. The supervisor has then killed the rest of the group and reaped the child.
    pub async fn exited(&mut self) -> Exit {
        match self.exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::Lost),
            Err(_) => Exit::Lost,
        }
    }

    fn signal(&self, kill: bool) {
        if self.exit.borrow().is_none() {
            // A full outbox means that the supervisor is stuck: then there is nobody to tell.
            let _ = self.link.send(&Request::Signal { id: self.id, kill }, Vec::new());
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Link {
    /// Starts a supervisor process with the other end of a new socket as its standard input.
    fn open(executable: &PathBuf, caps: Caps) -> io::Result<Arc<Self>> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut process = Command::new(executable)
            .arg0("mcp-supervisor")
            .arg(ARGUMENT)
            .args(caps.arguments())
            .args(lifecycle::open_files_before().map(|count| count.to_string()))
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            // Ctrl-C in a terminal signals the whole foreground group; the supervisor must stay until
            // the worker has stopped its servers.
            .process_group(0)
            .spawn()?;
        let (outbox, queue) = mpsc::sync_channel(OUTBOX);
        let link = Arc::new(Self { outbox, children: Mutex::default() });
        let mut reader = ours.try_clone()?;
        std::thread::Builder::new().name("supervisor-out".to_owned()).spawn(move || {
            for outgoing in queue {
                if write_frame(&ours, outgoing).is_err() {
                    break;
                }
            }
            // No more children will be asked for: the supervisor sees the end and leaves.
            let _ = ours.shutdown(std::net::Shutdown::Both);
        })?;
        // The reader must not keep the link alive: its outbox is what ends the supervisor.
        let weak = Arc::downgrade(&link);
        std::thread::Builder::new().name("supervisor-in".to_owned()).spawn(move || {
            while let Ok(event) = read_frame::<Event>(&mut reader) {
                if let Some(link) = weak.upgrade() {
                    link.children().apply(event);
                }
            }
            if let Some(link) = weak.upgrade() {
                link.children().lose_all();
            }
            let ended = process.wait();
            // It leaves by itself when nothing is left. Otherwise it was killed in the middle.
            if !ended.is_ok_and(|status| status.success()) {
                process::end_left_behind(process.id());
            }
        })?;
        Ok(link)
    }

    fn children(&self) -> MutexGuard<'_, Children> {
        lock(&self.children)
    }

    fn send(&self, request: &Request, descriptors: Vec<OwnedFd>) -> Result<(), String> {
        let frame = serde_json::to_vec(request).map_err(|error| error.to_string())?;
        let outgoing = Outgoing { frame: Zeroizing::new(frame), descriptors };
        self.outbox.try_send(outgoing).map_err(|_| "the supervisor process does not answer".to_owned())
    }
}

impl Children {
    fn apply(&mut self, event: Event) {
        match event {
            Event::Started { id, pid } => {
                if let Some(started) = self.by_id.get_mut(&id).and_then(|child| child.started.take()) {
                    let _ = started.send(Ok(pid));
                }
            }
            Event::Failed { id, error } => {
                if let Some(child) = self.by_id.remove(&id) {
                    child.exit.send_replace(Some(Exit::Lost));
                    if let Some(started) = child.started {
                        let _ = started.send(Err(error));
                    }
                }
            }
            Event::Exited { id, exit } => {
                if let Some(child) = self.by_id.remove(&id) {
                    child.exit.send_replace(Some(exit));
                }
            }
        }
    }

    fn lose_all(&mut self) {
        self.lost = true;
        for (_, child) in self.by_id.drain() {
            child.exit.send_replace(Some(Exit::Lost));
        }
    }
}

/// Three pipes: the child's ends, and ours for the runtime.
fn streams() -> io::Result<(Vec<OwnedFd>, Streams)> {
    let (stdin_read, stdin_write) = io::pipe()?;
    let (stdout_read, stdout_write) = io::pipe()?;
    let (stderr_read, stderr_write) = io::pipe()?;
    let ours = Streams {
        stdin: pipe::Sender::from_owned_fd(nonblocking(stdin_write.into())?)?,
        stdout: pipe::Receiver::from_owned_fd(nonblocking(stdout_read.into())?)?,
        stderr: pipe::Receiver::from_owned_fd(nonblocking(stderr_read.into())?)?,
    };
    Ok((vec![stdin_read.into(), stdout_write.into(), stderr_write.into()], ours))
}

fn nonblocking(descriptor: OwnedFd) -> io::Result<OwnedFd> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(&descriptor, FcntlArg::F_GETFL)?);
    fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(descriptor)
}

fn write_frame(mut socket: &UnixStream, outgoing: Outgoing) -> io::Result<()> {
    let length = u32::try_from(outgoing.frame.len()).map_err(io::Error::other)?.to_le_bytes();
    let raw: Vec<_> = outgoing.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[io::IoSlice::new(&length)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    socket.write_all(&length[sent..])?;
    socket.write_all(&outgoing.frame)
}

fn read_frame<T: for<'de> Deserialize<'de>>(socket: &mut UnixStream) -> io::Result<T> {
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let mut frame = vec![0; usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?];
    socket.read_exact(&mut frame)?;
    serde_json::from_slice(&frame).map_err(io::Error::other)
}

/// Locks a mutex whose guarded value stays sound even if a holder panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
