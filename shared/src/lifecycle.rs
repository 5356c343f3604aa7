//! What every program of ours does the same way: read its settings, start logging, stop at a signal, and
//! say by its exit status whether starting it again could help.

mod environment;

use std::{io::Write, path::PathBuf, process::ExitCode, sync::OnceLock};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{self, Settings},
    telemetry,
};

/// The exit status for settings that no restart mends (`EX_CONFIG` of sysexits.h).
pub const EX_CONFIG: u8 = 78;
/// The exit status for something that may pass, such as a data folder that is in use (`EX_TEMPFAIL`).
pub const EX_TEMPFAIL: u8 = 75;

/// The number of open files that this process was started with, if it was changed since.
static OPEN_FILES: OnceLock<u64> = OnceLock::new();

/// Allows this process as many open files as the system lets it have: each client is one, and the usual 1024 are
/// few. What is started as somebody else's program gets [`open_files_before`] back, because programs that close or count
/// all descriptors that they might have become very slow with a huge number.
pub fn raise_open_files() {
    // Where that is not allowed there are as many as there are.
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok()
    {
        let _ = OPEN_FILES.set(soft);
    }
}

/// The number of open files that this process was started with, if it has more now.
pub fn open_files_before() -> Option<u64> {
    OPEN_FILES.get().copied()
}

/// Reads the settings, starts logging and a runtime, and runs `main` in it. `program` is the name that
/// complaints begin with.
pub fn run(
    program: &str,
    env_file: Option<PathBuf>,
    main: impl AsyncFnOnce(&Settings) -> ExitCode,
) -> ExitCode {
    raise_open_files();
    let env_file = config::env_file(env_file);
    let settings = match Settings::load(config::process_environment(), env_file.as_deref()) {
        Ok(settings) => settings,
        Err(errors) => {
            complain(&format!("{program} cannot start with these settings:\n{errors}"));
            return ExitCode::from(EX_CONFIG);
        }
    };
    // They are in the settings now, and nowhere that a process list shows.
    environment::blank(|name| config::find(name).is_some_and(|variable| variable.secret));
    if let Err(error) = telemetry::init(settings.log_format, settings.debug, settings.log_filter.as_deref()) {
        complain(&error.to_string());
        return ExitCode::FAILURE;
    }
    let ended = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(settings.threads)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime.block_on(main(&settings)),
        Err(error) => {
            complain(&format!("the runtime did not start: {error}"));
            ExitCode::FAILURE
        }
    };
    telemetry::flush();
    ended
}

/// What a program that serves does first: it logs what is odd about its settings, and listens for signals.
/// The token is cancelled by the first signal, which asks for a stop in order; a second one ends the program
/// at once. `Err` is the exit status.
pub fn begin(settings: &Settings) -> Result<CancellationToken, ExitCode> {
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    for name in settings.later.keys() {
        tracing::warn!("{name} is set, but this version does not use it");
    }
    let stop = CancellationToken::new();
    match stop_on_signals(stop.clone()) {
        Ok(()) => Ok(stop),
        Err(error) => {
            complain(&format!("signals cannot be received: {error}"));
            Err(ExitCode::FAILURE)
        }
    }
}

fn stop_on_signals(stop: CancellationToken) -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        for name in ["stopping", "stopping at once"] {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            tracing::info!("{name}");
            if stop.is_cancelled() {
                telemetry::flush();
                // The supervisor ends the servers when this process is gone.
                std::process::exit(130);
            }
            stop.cancel();
        }
    });
    Ok(())
}

/// What a SIGHUP is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hangup {
    /// Somebody wants files read anew.
    Signal,
    /// The terminal that the program was started from is gone.
    Terminal,
}

/// The SIGHUPs of this process, from the moment of [`Hangups::listen`] on. One that comes before somebody waits
/// for it is kept.
pub struct Hangups {
    signal: Signal,
    /// The program goes when its terminal does: it has one, and was not started by `nohup`.
    attached: bool,
}

impl Hangups {
    /// Listens from now on. Without this the signal ends the program.
    pub fn listen() -> std::io::Result<Self> {
        // What the program was started with, before that is changed.
        let attached = has_terminal() && !ignores_hangups();
        Ok(Self { signal: signal(SignalKind::hangup())?, attached })
    }

    /// The next one.
    pub async fn next(&mut self) -> Hangup {
        if self.signal.recv().await.is_none() {
            return std::future::pending().await;
        }
        if self.attached && !has_terminal() { Hangup::Terminal } else { Hangup::Signal }
    }
}

/// Whether the process has a terminal that can be spoken to.
fn has_terminal() -> bool {
    std::fs::File::open("/dev/tty").is_ok()
}

/// Whether somebody saw to it that SIGHUP does nothing, as `nohup` does.
fn ignores_hangups() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // The signals are bits, of which SIGHUP, the number 1, is the last.
    ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

/// `host:port` as a socket address is written.
pub fn address(host: &config::ListenHost, port: u16) -> String {
    let host = host.to_string();
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Tells the person who started the program why it ends.
pub fn complain(text: &str) {
    // After what was logged before.
    telemetry::flush();
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// An error with its causes, in one line.
pub fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
