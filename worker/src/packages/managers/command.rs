//! Runs one program of a package manager to its end, within bounds.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mcp_shared::error::{ErrorCode, WorkerError};
use nix::{sys::signal::killpg, unistd::Pid};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::{Instant, sleep, sleep_until, timeout},
};
use zeroize::Zeroizing;

use super::{Bounds, Work, clean, environment::Environment, errors, usage};
use crate::supervisor::{Child, Exit, SpawnSpec, Streams};

/// Where programs put what they need only while they run; inside the folder, so that it counts and goes
/// with it.
const TEMPORARY: &str = ".tmp";
/// The same for what they download.
const CACHE: &str = ".cache";
/// How often the folder is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How long a killed process may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a killed group is looked for.
const LOOK_FOR_GROUP: Duration = Duration::from_millis(5);
/// How long the output of an ended process may still be read.
const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// How long a program may take that only says something.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(20);
/// Lines that are kept for the explanation of a failure.
const LINES: usize = 400;
/// The most that is taken of what a program answers.
const ANSWER: usize = 32 * 1024 * 1024;
/// How often the number of requests is said.
const COUNT_EVERY: Duration = Duration::from_secs(2);

/// One resolution, build or question, of one or several programs.
pub(super) struct Order<'a> {
    pub(super) environment: &'a Environment,
    pub(super) folder: &'a Path,
    pub(super) work: &'a Work<'a>,
    bounds: Bounds,
    deadline: Instant,
    /// Whether the folder is this order's, and so is looked at.
    owns_folder: bool,
}

/// What to run.
pub(super) struct Program {
    /// An absolute path.
    pub(super) path: PathBuf,
    pub(super) args: Vec<String>,
    /// Variables on top of the common ones.
    pub(super) env: Vec<(&'static str, Zeroizing<String>)>,
    /// Whether the standard output is an answer, and not something to be said.
    pub(super) answers: bool,
}

/// How it went.
pub(super) struct Ran {
    pub(super) exit: Exit,
    /// The standard output, if it is an answer.
    pub(super) answer: String,
    /// The last lines that were said, fit to be shown.
    pub(super) said: Vec<String>,
}

impl Ran {
    /// Whether it returned 0.
    pub(super) fn succeeded(&self) -> bool {
        self.exit == Exit::Code(0)
    }
}

impl<'a> Order<'a> {
    /// An order that needs no folder.
    fn question(environment: &'a Environment, work: &'a Work<'a>) -> Self {
        let (folder, deadline) = (Path::new("/"), Instant::now() + QUESTION_TIMEOUT);
        Self { environment, folder, work, bounds: Bounds::default(), deadline, owns_folder: false }
    }

    /// Prepares the folder.
    pub(super) async fn new(
        environment: &'a Environment,
        bounds: Bounds,
        time: Duration,
        folder: &'a Path,
        work: &'a Work<'a>,
    ) -> Result<Self, WorkerError> {
        for inner in [TEMPORARY, CACHE] {
            tokio::fs::create_dir_all(folder.join(inner)).await.map_err(|error| errors::of_file(&error))?;
        }
        let deadline = Instant::now() + time;
        Ok(Self { environment, folder, work, bounds, deadline, owns_folder: true })
    }

    /// Removes what was needed only meanwhile, and looks at what stays: a quick program may have made too
    /// much of it between two looks. Of a folder that failed everything goes anyway.
    pub(super) async fn finish<T>(&self, result: Result<T, WorkerError>) -> Result<T, WorkerError> {
        let done = result?;
        for inner in [TEMPORARY, CACHE] {
            if let Err(error) = tokio::fs::remove_dir_all(self.folder.join(inner)).await {
                tracing::debug!(%error, "what an installation needed meanwhile was not removed");
            }
        }
        let usage = self.usage().await.unwrap_or_default();
        self.too_large(usage).map_or(Ok(done), Err)
    }

    /// What is in the folder.
    async fn usage(&self) -> Option<usage::Usage> {
        let (folder, most) = (self.folder.to_owned(), self.bounds.files);
        tokio::task::spawn_blocking(move || usage::measure(&folder, most)).await.ok()
    }

    fn too_large(&self, usage: usage::Usage) -> Option<WorkerError> {
        let (bytes, files) = (self.bounds.bytes, self.bounds.files);
        let megabytes = bytes / (1024 * 1024);
        (usage.bytes > bytes || usage.files > files).then(|| {
            WorkerError::new(
                ErrorCode::InstallTooLarge,
                format!("The installation has more than {megabytes} MiB or {files} files"),
            )
        })
    }

    /// Where downloads are kept meanwhile.
    pub(super) fn cache(&self) -> PathBuf {
        self.folder.join(CACHE)
    }

    /// Writes a file into the folder.
    pub(super) async fn write(&self, name: &str, text: &str) -> Result<(), WorkerError> {
        tokio::fs::write(self.folder.join(name), text).await.map_err(|error| errors::of_file(&error))
    }

    /// Reads a file of the folder that a package manager wrote.
    pub(super) async fn read(&self, name: &str) -> Result<String, WorkerError> {
        tokio::fs::read_to_string(self.folder.join(name)).await.map_err(|error| errors::of_file(&error))
    }

    /// Runs a program in the folder to its end. The error is that it could not be run to its end; whether
    /// it succeeded is the caller's to see. Nothing of it runs any more afterwards.
    pub(super) async fn run(&self, program: Program) -> Result<Ran, WorkerError> {
        let mut env: Vec<(String, Zeroizing<String>)> =
            self.environment.variables().map(|(name, value)| (name.clone(), value.clone())).collect();
        if self.owns_folder {
            let temporary = self.folder.join(TEMPORARY).to_string_lossy().into_owned();
            env.push(("TMPDIR".to_owned(), Zeroizing::new(temporary)));
        }
        env.extend(program.env.into_iter().map(|(name, value)| (name.to_owned(), value)));
        let spec = SpawnSpec {
            program: program.path.to_string_lossy().into_owned(),
            args: program.args,
            env,
            folder: Some(self.folder.to_owned()),
        };
        let (mut child, streams) = tokio::select! {
            biased;
            () = self.work.cancelled.cancelled() => return Err(cancelled()),
            started = self.work.supervisor.spawn(spec) => started.map_err(|error| {
                tracing::warn!(%error, "a package manager was not started");
                let error = clean::line(error.as_bytes());
                WorkerError::new(ErrorCode::RuntimeMissing, "The package manager could not be started")
                    .with("details", error)
            })?,
        };
        let output = Output::new(self.work, program.answers);
        let outcome = tokio::select! {
            biased;
            stopped = self.watch(&output) => Err(stopped),
            exit = follow(&mut child, streams, &output) => Ok(exit),
        };
        if outcome.is_err() {
            child.kill();
        }
        if timeout(KILL_TIMEOUT, all_gone(&mut child)).await.is_err() {
            tracing::error!(pid = child.pid, "a package manager could not be ended");
        }
        match outcome {
            Ok(exit) => Ok(output.end(exit)),
            Err(error) => Err(errors::with_words(error, &output.end(Exit::Lost).said)),
        }
    }

    /// Waits until there is a reason to stop the program.
    async fn watch(&self, output: &Output) -> WorkerError {
        tokio::select! {
            biased;
            () = self.work.cancelled.cancelled() => cancelled(),
            () = sleep_until(self.deadline) => {
                WorkerError::new(ErrorCode::InstallTimeout, "The installation took too long")
            }
            error = self.watch_folder(output), if self.owns_folder => error,
        }
    }

    /// Waits until the folder is too large, or nothing was said or written for too long.
    async fn watch_folder(&self, output: &Output) -> WorkerError {
        let look = LOOK.min(self.bounds.silence / 4);
        let mut pause = look;
        let (mut known, mut changed) = (usage::Usage::default(), Instant::now());
        loop {
            sleep(pause).await;
            let began = Instant::now();
            let usage = self.usage().await.unwrap_or(known);
            // Looking at many files takes time, which the program needs too.
            pause = look.max(began.elapsed() * 10);
            if let Some(error) = self.too_large(usage) {
                return error;
            }
            if usage != known {
                (known, changed) = (usage, Instant::now());
            }
            let silence = changed.elapsed().min(output.silence());
            if silence >= self.bounds.silence {
                let seconds = self.bounds.silence.as_secs();
                return WorkerError::new(
                    ErrorCode::InstallTimeout,
                    format!("The package manager did nothing for {seconds} seconds"),
                );
            }
        }
    }
}

/// Runs a program that only says something.
pub(super) async fn ask(
    environment: &Environment,
    program: Program,
    work: &Work<'_>,
) -> Result<Ran, WorkerError> {
    Order::question(environment, work).run(program).await
}

fn cancelled() -> WorkerError {
    WorkerError::new(ErrorCode::Cancelled, "The installation was cancelled")
}

/// Waits until a program and all of its group are gone: what was killed may still be about to write a file
/// into the folder, which the caller removes.
async fn all_gone(child: &mut Child) {
    child.exited().await;
    let Ok(group) = i32::try_from(child.pid).map(Pid::from_raw) else { return };
    while killpg(group, None).is_ok() {
        sleep(LOOK_FOR_GROUP).await;
    }
}

/// Reads what a program writes until it ends.
async fn follow(child: &mut Child, streams: Streams, output: &Output) -> Exit {
    let Streams { stdin, mut stdout, mut stderr } = streams;
    // It has nothing to ask.
    drop(stdin);
    let read = async {
        tokio::join!(
            pump(&mut stdout, |bytes| output.stdout(bytes)),
            pump(&mut stderr, |bytes| output.stderr(bytes)),
        )
    };
    tokio::pin!(read);
    tokio::select! {
        exit = child.exited() => {
            // What it started may hold the pipes a moment longer.
            let _ = timeout(LAST_OUTPUT, read).await;
            exit
        }
        _ = &mut read => child.exited().await,
    }
}

async fn pump(stream: &mut (impl AsyncRead + Unpin), take: impl Fn(&[u8])) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read) = stream.read(&mut buffer).await {
        if read == 0 {
            return;
        }
        take(&buffer[..read]);
    }
}

/// What a program wrote so far.
struct Output {
    say: super::Say,
    answers: bool,
    began: Instant,
    /// When it last wrote, in milliseconds since it began.
    last: AtomicU64,
    state: Mutex<Written>,
}

#[derive(Default)]
struct Written {
    stdout: clean::Lines,
    stderr: clean::Lines,
    answer: Vec<u8>,
    said: std::collections::VecDeque<String>,
    requests: u64,
    counted: Option<Instant>,
}

impl Output {
    fn new(work: &Work<'_>, answers: bool) -> Self {
        Self {
            say: Arc::clone(&work.say),
            answers,
            began: Instant::now(),
            last: AtomicU64::new(0),
            state: Mutex::default(),
        }
    }

    fn silence(&self) -> Duration {
        self.began.elapsed().saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }

    fn stdout(&self, bytes: &[u8]) {
        self.take(bytes, |written| &mut written.stdout, self.answers);
    }

    fn stderr(&self, bytes: &[u8]) {
        self.take(bytes, |written| &mut written.stderr, false);
    }

    fn take(&self, bytes: &[u8], lines: impl Fn(&mut Written) -> &mut clean::Lines, answer: bool) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last.store(now, Ordering::Relaxed);
        let mut written = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if answer {
            let room = ANSWER.saturating_sub(written.answer.len());
            written.answer.extend(&bytes[..bytes.len().min(room)]);
            return;
        }
        let mut cut = std::mem::take(lines(&mut written));
        cut.feed(bytes, |line| written.add(line, &self.say));
        *lines(&mut written) = cut;
    }

    fn end(self, exit: Exit) -> Ran {
        let mut written = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        for mut lines in [std::mem::take(&mut written.stdout), std::mem::take(&mut written.stderr)] {
            lines.end(|line| written.add(line, &self.say));
        }
        let answer = String::from_utf8_lossy(&written.answer).into_owned();
        Ran { exit, answer, said: written.said.into() }
    }
}

impl Written {
    fn add(&mut self, raw: &[u8], say: &super::Say) {
        let line = clean::line(raw);
        if is_request(&line) {
            // Hundreds of these would push out of the log what matters.
            self.requests += 1;
            if self.counted.is_none_or(|counted| counted.elapsed() >= COUNT_EVERY) {
                self.counted = Some(Instant::now());
                say(&format!("npm: answers of the registry: {}", self.requests));
            }
            return;
        }
        say(&line);
        if self.said.len() >= LINES {
            self.said.pop_front();
        }
        self.said.push_back(line);
    }
}

/// Whether a line of npm's only says that the registry, or the cache, gave what was asked for.
fn is_request(line: &str) -> bool {
    let answered = |status: &str| line.starts_with("npm http fetch ") && line.contains(status);
    line.starts_with("npm http cache ") || answered(" 200 ") || answered(" 304 ")
}
