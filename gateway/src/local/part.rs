//! One process of the cluster: started so that it dies with this one, listened to, and taken in when it ended.

// What happens between fork and exec has no safe form; the place says why it is sound.
#![allow(unsafe_code)]

use std::{
    collections::VecDeque,
    ffi::OsString,
    fmt, io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use mcp_shared::lifecycle::{EX_CONFIG, EX_TEMPFAIL};
use nix::{
    errno::Errno,
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, kill, killpg},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Pid, getppid},
};
use tokio::{
    sync::mpsc,
    time::{Duration, Instant},
};

use super::{LONGEST_PAUSE, PAUSE, SETTLED, output::Output};

/// Lines that are repeated when a part ended badly.
const TAIL: usize = 8;

/// What a part is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The bus.
    Nats,
    /// The database.
    Store,
    /// Owns MCP servers.
    Worker,
    /// Answers HTTP.
    Gateway,
}

impl Kind {
    /// All of the kind, for people.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Nats => "NATS",
            Self::Store => "the database",
            Self::Worker => "the workers",
            Self::Gateway => "the gateway",
        }
    }
}

/// How a process is started. It gets this environment and no other.
#[derive(Clone)]
pub struct Launch {
    /// The program's file.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its variables; some are secrets.
    pub env: Vec<(OsString, OsString)>,
}

/// What happened to a part.
#[derive(Debug)]
pub enum Event {
    /// It printed its first line.
    Said {
        /// Which part.
        part: usize,
        /// Which of its processes.
        run: u64,
        /// The line.
        line: String,
    },
    /// Its process ended, and waits to be taken in.
    Ended {
        /// Which part.
        part: usize,
        /// Which of its processes.
        run: u64,
    },
}

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub struct End(Option<ExitStatus>);

impl End {
    /// Whether it ended as if it had been asked to.
    pub fn in_order(self) -> bool {
        self.0.is_some_and(|status| status.success())
    }

    /// Whether it said that starting it again changes nothing.
    pub fn is_configuration(self) -> bool {
        self.0.and_then(|status| status.code()) == Some(i32::from(EX_CONFIG))
    }

    /// What this command's exit status is then.
    pub fn status(self) -> u8 {
        if self.is_configuration() { EX_CONFIG } else { EX_TEMPFAIL }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(status) = self.0 else { return f.write_str("ended") };
        match (status.code(), status.signal().and_then(|number| Signal::try_from(number).ok())) {
            (Some(code), _) => write!(f, "ended with exit status {code}"),
            (None, Some(signal)) => write!(f, "was ended by {signal}"),
            (None, None) => f.write_str("was ended by a signal"),
        }
    }
}

/// A part, with its process while it has one.
pub struct Part {
    kind: Kind,
    name: String,
    launch: Launch,
    run: Option<Run>,
    /// The number of the latest process.
    runs: u64,
    tail: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<JoinHandle<()>>,
    /// The pause before the last restart.
    pause: Option<Duration>,
    again: Option<Instant>,
}

struct Run {
    id: u64,
    child: Child,
    pid: Pid,
    since: Instant,
    said: Option<String>,
}

impl Part {
    /// A part that does not run yet.
    pub fn new(kind: Kind, name: &str, launch: Launch) -> Self {
        Self {
            kind,
            name: name.to_owned(),
            launch,
            run: None,
            runs: 0,
            tail: Arc::default(),
            readers: Vec::new(),
            pause: None,
            again: None,
        }
    }

    /// What it is for.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it prints a line when it serves.
    pub fn announces(&self) -> bool {
        matches!(self.kind, Kind::Gateway | Kind::Worker)
    }

    /// The line by which it said that it serves.
    pub fn said(&self) -> Option<&str> {
        self.run.as_ref()?.said.as_deref()
    }

    /// Whether it has a process.
    pub fn runs(&self) -> bool {
        self.run.is_some()
    }

    /// When it is to be started again.
    pub fn again(&self) -> Option<Instant> {
        self.again
    }

    /// Starts it. To be called on the thread that lives as long as this process: the system ends the part with the
    /// thread that started it.
    pub fn start(&mut self, number: usize, output: &Output, events: &mpsc::Sender<Event>) -> io::Result<()> {
        self.again = None;
        let mut command = Command::new(&self.launch.program);
        command
            .args(&self.launch.args)
            .env_clear()
            .envs(self.launch.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A terminal's Ctrl-C is for this process, which stops the parts in order.
            .process_group(0);
        let parent = Pid::this();
        // SAFETY: the closure makes two system calls and touches no memory that another thread could have left
        // half changed. Should this process be killed, the part goes with it.
        unsafe {
            command.pre_exec(move || {
                set_pdeathsig(Signal::SIGKILL)?;
                // It may have been killed before that was said.
                if getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
            });
        }
        let mut child = command.spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", self.launch.program.display()))
        })?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        self.runs += 1;
        let (part, run) = (number, self.runs);
        self.readers.retain(|reader| !reader.is_finished());
        let mut follow = |stream: Box<dyn io::Read + Send>, mut first: Option<mpsc::Sender<Event>>| {
            let (output, name, tail) = (output.clone(), self.name.clone(), Arc::clone(&self.tail));
            let read = move || {
                output.follow(&name, number, stream, |line| {
                    if let Some(events) = first.take() {
                        let _ = events.blocking_send(Event::Said { part, run, line: line.to_owned() });
                    }
                    let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
                    tail.truncate(TAIL - 1);
                    tail.push_front(line.to_owned());
                });
            };
            let reader = thread::Builder::new().name("part-output".to_owned()).spawn(read);
            reader.map(|reader| self.readers.push(reader))
        };
        let (out, err, events) = (child.stdout.take(), child.stderr.take(), events.clone());
        let first = matches!(self.kind, Kind::Gateway | Kind::Worker).then(|| events.clone());
        let followed = (|| {
            if let Some(out) = out {
                follow(Box::new(out), first)?;
            }
            if let Some(err) = err {
                follow(Box::new(err), None)?;
            }
            thread::Builder::new().name("part-ended".to_owned()).spawn(move || {
                // It stays in the process table, and so its id its own, until it is taken in.
                let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
                while waitid(Id::Pid(pid), flags) == Err(Errno::EINTR) {}
                let _ = events.blocking_send(Event::Ended { part, run });
            })
        })();
        if let Err(error) = followed {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        self.run = Some(Run { id: run, child, pid, since: Instant::now(), said: None });
        Ok(())
    }

    /// Takes note of the first line of a process.
    pub fn hear(&mut self, id: u64, line: String) {
        if let Some(run) = self.run.as_mut().filter(|run| run.id == id) {
            run.said = Some(line);
        }
    }

    /// Sends a signal to the process; says whether there is one.
    pub fn signal(&self, signal: Signal) -> bool {
        let Some(run) = &self.run else { return false };
        // Programs of others may have started more. Ours have a supervisor that ends what they started, and which
        // a signal to all of them would take away.
        let sent = match (self.announces(), signal) {
            (false, Signal::SIGKILL) => killpg(run.pid, signal),
            _ => kill(run.pid, signal),
        };
        let _ = sent;
        true
    }

    /// Takes in a process that ended; nothing if that was done already.
    pub fn reap(&mut self, id: u64) -> Option<End> {
        let mut run = self.run.take_if(|run| run.id == id)?;
        if !self.announces() {
            // What it left in its group.
            let _ = killpg(run.pid, Signal::SIGKILL);
        }
        if run.since.elapsed() >= SETTLED {
            self.pause = None;
        }
        Some(End(run.child.wait().ok()))
    }

    /// Has it started again, and says in how long.
    pub fn start_later(&mut self) -> Duration {
        let pause = self.pause.map_or(PAUSE, |last| (2 * last).min(LONGEST_PAUSE));
        self.pause = Some(pause);
        self.again = Some(Instant::now() + pause);
        pause
    }

    /// Whether something that it said may still be on its way.
    pub fn is_read(&self) -> bool {
        self.readers.iter().any(|reader| !reader.is_finished())
    }

    /// What it said last, to be appended to a message.
    pub fn last_words(&self) -> String {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.is_empty() {
            return String::new();
        }
        let lines: Vec<String> = tail.iter().rev().map(|line| format!("\n  {line}")).collect();
        format!("; it said last:{}", lines.concat())
    }
}
