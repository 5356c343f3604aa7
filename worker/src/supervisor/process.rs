//! The supervisor process itself: one thread, one loop over the worker's socket and SIGCHLD.

// Starting a child with a parent-death signal, and taking ownership of descriptors that arrive over a
// socket, have no safe form. Both places say why they are sound.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    io::{self, IoSliceMut, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, killpg, sigaction},
        socket::{ControlMessageOwned, MsgFlags, recvmsg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::Pid,
};

use super::{
    Event, Exit, MARKER, Request,
    restrictions::{self, Restrictions},
    usage::{Caps, Excess, Watch},
};

/// How long what a lost worker left behind has to leave by itself after SIGTERM.
const GRACE: Duration = Duration::from_millis(500);
/// When the supervisor gives up on processes that not even SIGKILL ends (stuck in the kernel).
const GIVE_UP: Duration = Duration::from_secs(10);

/// Runs the supervisor until the worker is gone and nothing that it started is left. The socket to the
/// worker is the standard input.
pub fn run() -> ExitCode {
    limit_open_files();
    match Supervised::new().and_then(|mut supervised| supervised.serve()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The worker's log is this process' standard error.
            let _ = writeln!(io::stderr(), "mcp-api supervisor: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The worker may have more open files than programs of others can live with.
fn limit_open_files() {
    let before = std::env::args().nth(4).and_then(|count| count.parse().ok());
    if let (Some(before), Ok((_, hard))) = (before, getrlimit(Resource::RLIMIT_NOFILE)) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, before, hard);
    }
}

struct Supervised {
    socket: UnixStream,
    children: HashMap<u64, Pid>,
    /// Marks descendants as ours, and apart from those of any other supervisor.
    mark: String,
    signals: SigSet,
    watch: Watch,
    /// Children that were ended because they took too much, until they are gone.
    over: HashMap<u64, Excess>,
}

impl Supervised {
    fn new() -> io::Result<Self> {
        // SAFETY: descriptor 0 is open, since the worker started us with a socket there, and nothing
        // else in this process uses it.
        let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(0) });
        close_inherited();
        become_subreaper()?;
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        signals.thread_block()?;
        // Service managers and terminals signal more processes than the one that they started. The
        // worker decides when the servers go; its own end is what ends this process.
        SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]).thread_block()?;
        let watch = Watch::new(Caps::from_arguments(std::env::args().skip(2)));
        let mark = std::process::id().to_string();
        Ok(Self { socket, children: HashMap::new(), mark, signals, watch, over: HashMap::new() })
    }

    fn serve(&mut self) -> io::Result<()> {
        let served = self.follow();
        // However it came to this, nothing of the worker may stay.
        self.end_everything();
        served
    }

    /// Does what the worker asks, until it is gone.
    fn follow(&mut self) -> io::Result<()> {
        let signal = ChildSignal::new(&self.signals)?;
        loop {
            let mut ready = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(signal.as_fd(), PollFlags::POLLIN),
            ];
            let pause = self.watch.pause(&self.children);
            let pause = pause.map_or(PollTimeout::NONE, |pause| pause.try_into().unwrap_or(PollTimeout::MAX));
            match poll(&mut ready, pause) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            let [from_worker, from_children] = ready.map(|one| one.revents().is_some_and(|r| !r.is_empty()));
            if from_children {
                signal.clear();
                self.reap();
            }
            self.end_excess();
            if from_worker {
                match self.receive() {
                    Ok(Some((request, descriptors))) => self.handle(request, descriptors),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(None) | Err(_) => return Ok(()),
                }
            }
        }
    }

    /// One request with its descriptors; `None` when the worker is gone.
    fn receive(&mut self) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
        let mut length = [0; 4];
        let mut space = nix::cmsg_space!([RawFd; 3]);
        let mut descriptors = Vec::new();
        let received = {
            let mut parts = [IoSliceMut::new(&mut length)];
            let message = recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut parts,
                Some(&mut space),
                MsgFlags::MSG_CMSG_CLOEXEC,
            )?;
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    for descriptor in raw {
                        // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
                        descriptors.push(unsafe { OwnedFd::from_raw_fd(descriptor) });
                    }
                }
            }
            message.bytes
        };
        if received == 0 {
            return Ok(None);
        }
        self.socket.read_exact(&mut length[received..])?;
        let mut frame = vec![0; usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?];
        self.socket.read_exact(&mut frame)?;
        let request = serde_json::from_slice(&frame).map_err(io::Error::other);
        frame.fill(0);
        request.map(|request| Some((request, descriptors)))
    }

    fn handle(&mut self, request: Request, descriptors: Vec<OwnedFd>) {
        match request {
            Request::Spawn { id, program, args, env, folder } => {
                let event = match self.spawn(id, (&program, &args, folder), env, descriptors) {
                    Ok(pid) => Event::Started { id, pid },
                    Err(error) => Event::Failed { id, error: describe(&program, &error) },
                };
                self.tell(&event);
            }
            Request::Signal { id, kill } => {
                if let Some(pid) = self.children.get(&id) {
                    let signal = if kill { Signal::SIGKILL } else { Signal::SIGTERM };
                    // A process can leave the group that it led. It is not reaped, so its id is its own.
                    if killpg(*pid, signal).is_err() || kill {
                        let _ = nix::sys::signal::kill(*pid, signal);
                    }
                }
            }
        }
    }

    fn spawn(
        &mut self,
        id: u64,
        (program, args, folder): (&str, &[String], Option<PathBuf>),
        env: Vec<(String, String)>,
        descriptors: Vec<OwnedFd>,
    ) -> io::Result<u32> {
        let [stdin, stdout, stderr]: [OwnedFd; 3] =
            descriptors.try_into().map_err(|_| io::Error::other("the standard streams are missing"))?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .envs(env)
            .env(MARKER, self.mark_of(id))
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::from(stdout))
            .stderr(Stdio::from(stderr))
            .process_group(0);
        if let Some(folder) = folder {
            command.current_dir(folder);
        }
        let restrictions = Restrictions::of(std::process::id(), id);
        // SAFETY: the closures run between fork and exec, and make a few system calls; this process has
        // no other thread that could have left anything half done. Should this process be killed, its
        // direct children go with it. And a child must not inherit the signals that are blocked or ignored
        // here: one that starts processes itself would never hear of their end.
        unsafe {
            command.pre_exec(die_with_parent).pre_exec(reset_signals);
            command.pre_exec(move || restrictions.apply());
        }
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        self.children.insert(id, Pid::from_raw(pid));
        Ok(child.id())
    }

    fn mark_of(&self, id: u64) -> String {
        format!("{}:{id}", self.mark)
    }

    /// Tells the worker. One that is gone hears nothing, and the end of its socket is seen next.
    fn tell(&self, event: &Event) {
        let write = || -> io::Result<()> {
            let frame = serde_json::to_vec(event).map_err(io::Error::other)?;
            let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
            (&self.socket).write_all(&length.to_le_bytes())?;
            (&self.socket).write_all(&frame)
        };
        let _ = write();
    }

    /// Takes in every process that ended: children of ours, and orphans that came to us.
    fn reap(&mut self) {
        let mut exits = Vec::new();
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
        // Looked at before it is reaped: until then its id, and so its group's, cannot be used again.
        while let Ok(status) = waitid(Id::All, flags | WaitPidFlag::WNOWAIT) {
            let Some(pid) = status.pid() else { break };
            if let Some((&id, _)) = self.children.iter().find(|(_, child)| **child == pid) {
                let _ = killpg(pid, Signal::SIGKILL);
                self.children.remove(&id);
                let over = self.over.remove(&id);
                let exit = match (over, status) {
                    (Some(excess), _) => Exit::Excess(excess),
                    (None, WaitStatus::Exited(_, code)) => Exit::Code(code),
                    (None, WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal as i32),
                    _ => Exit::Lost,
                };
                exits.push(Event::Exited { id, exit });
            }
            let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
        }
        self.end_orphans();
        for event in exits {
            self.tell(&event);
        }
    }

    /// Ends children that took more than they may.
    fn end_excess(&mut self) {
        let prefix = format!("{}:", self.mark);
        let owner_of = |pid| mark(pid)?.strip_prefix(&prefix)?.parse().ok();
        let over = self.watch.look(&self.children, owner_of);
        self.over.extend(over);
    }

    /// Kills descendants of children that ended, wherever they went. Those of a child that lives are
    /// left alone: a server may well start a helper that detaches itself.
    fn end_orphans(&self) {
        let living: Vec<String> = self.children.keys().map(|id| self.mark_of(*id)).collect();
        for pid in direct_children() {
            if self.children.values().any(|child| *child == pid) {
                continue;
            }
            if let Some(mark) = mark(pid).filter(|mark| mark.starts_with(&format!("{}:", self.mark)))
                && !living.contains(&mark)
            {
                // Its own children become ours by its death, which the next SIGCHLD tells us.
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
    }

    /// The worker is gone: nothing of it may stay.
    fn end_everything(&mut self) {
        let start = Instant::now();
        for pid in self.children.values() {
            if killpg(*pid, Signal::SIGTERM).is_err() {
                let _ = kill(*pid, Signal::SIGTERM);
            }
        }
        while start.elapsed() < GIVE_UP {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Err(Errno::ECHILD) => return,
                Ok(WaitStatus::StillAlive) => {
                    if start.elapsed() >= GRACE {
                        for pid in self.children.values() {
                            let _ = killpg(*pid, Signal::SIGKILL);
                        }
                        for pid in direct_children() {
                            let _ = kill(pid, Signal::SIGKILL);
                        }
                    }
                    std::thread::sleep(Duration::from_millis(10));
                }
                // What is left of its group comes to us as orphans, and goes with the other children.
                Ok(status) => self.children.retain(|_, child| Some(*child) != status.pid()),
                Err(_) => {}
            }
        }
    }
}

/// Kills what a supervisor that was lost had started: its direct children died with it, but what they
/// had started went to the system. Only their marks tell whose they are.
pub(super) fn end_left_behind(supervisor: u32) {
    let prefix = format!("{supervisor}:");
    // What is killed may just have started another: one more look, until there is nothing to see.
    for _ in 0..100 {
        let found = all_processes().filter(|pid| mark(*pid).is_some_and(|mark| mark.starts_with(&prefix)));
        if found.filter(|pid| kill(*pid, Signal::SIGKILL).is_ok()).count() == 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn describe(program: &str, error: &io::Error) -> String {
    let program = mcp_shared::error::shorten(program, 200);
    match error.kind() {
        io::ErrorKind::NotFound => format!("{program}: no such program"),
        io::ErrorKind::PermissionDenied => format!("{program}: not executable, or no permission"),
        _ => format!("{program}: {error}"),
    }
}

/// The processes whose parent is this one.
fn direct_children() -> Vec<Pid> {
    let me = std::process::id();
    all_processes().filter(|pid| parent(*pid) == Some(me)).collect()
}

pub(super) fn all_processes() -> impl Iterator<Item = Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw))
}

/// The parent of a process, by `/proc/PID/stat`: the second field after the name in parentheses, which
/// may itself hold anything.
fn parent(pid: Pid) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// What marks a process as a child's: a limit that it inherited, or the marker in its environment.
fn mark(pid: Pid) -> Option<String> {
    if let Some((supervisor, id)) = restrictions::marked(pid) {
        return Some(format!("{supervisor}:{id}"));
    }
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let prefix = format!("{MARKER}=");
    environment.split(|byte| *byte == 0).find_map(|entry| {
        entry.strip_prefix(prefix.as_bytes()).map(|mark| String::from_utf8_lossy(mark).into_owned())
    })
}

/// Undoes what this process was started with, or did, about signals. (`nohup` has SIGHUP ignored, for one.)
fn reset_signals() -> io::Result<()> {
    let usual = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in Signal::iterator().filter(|signal| !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP)) {
        // SAFETY: no handler is put in place, and this process is about to become another program.
        unsafe { sigaction(signal, &usual) }?;
    }
    SigSet::empty().thread_set_mask().map_err(io::Error::from)
}

/// Closes whatever whoever started us left open by accident: it is nothing that a server should have. Standard input,
/// output and error stay.
fn close_inherited() {
    let open = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<RawFd> = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // Among them is that of the folder just read, which is closed already.
        let _ = nix::unistd::close(number);
    }
}

fn become_subreaper() -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)
}

fn die_with_parent() -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)
}

/// SIGCHLD as something to poll.
struct ChildSignal(nix::sys::signalfd::SignalFd);

impl ChildSignal {
    fn new(signals: &SigSet) -> io::Result<Self> {
        use nix::sys::signalfd::{SfdFlags, SignalFd};
        Ok(Self(SignalFd::with_flags(signals, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn clear(&self) {
        while let Ok(Some(_)) = self.0.read_signal() {}
    }
}
