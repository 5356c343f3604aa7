//! `mcp-gateway cluster`: NATS, a database, a gateway and workers on this machine, as one command.
//!
//! Every part is a process of its own, started as somebody would start it by hand, and dies with this process
//! however that ends. A worker that is lost is started again; what all others need (NATS, the database, the
//! gateway) is not: when that is lost the command ends everything and says why, since a person who watches it
//! wants to see that, and a service manager starts it again.

mod output;
mod part;
mod plan;
mod services;

use std::{
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use mcp_shared::{
    config::Settings,
    lifecycle::{self, EX_CONFIG, EX_TEMPFAIL, Hangup, Hangups, complain},
};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use output::Output;
use part::{Event, Kind, Launch, Part};
use plan::Plan;

/// Most workers of one machine. Each is a program of its own with a share of the processors.
const WORKERS_MAX: u16 = 64;
/// How often it is looked whether something answers.
const LOOK: Duration = Duration::from_millis(50);
/// How long one look may take.
const ONE_LOOK: Duration = Duration::from_secs(2);
/// The first pause before a lost worker is started again; each further one is twice as long.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A worker that ran this long did not die of its start.
const SETTLED: Duration = Duration::from_secs(60);
/// How long a part may take to stop beyond what it gives its own calls, before it is killed.
const GRACE: Duration = Duration::from_secs(10);
/// How long what was killed may take to be gone.
const GONE: Duration = Duration::from_secs(5);
/// How long the last lines of parts that ended may take to be read.
const LAST_LINES: Duration = Duration::from_secs(1);

/// What can be said on the command line.
#[derive(Debug, Args)]
pub struct LocalArguments {
    /// How many workers.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=i64::from(WORKERS_MAX)))]
    workers: u16,
    /// The port of NATS on loopback; without it any free one.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    nats_port: Option<u16>,
    /// The port of the database on loopback; without it any free one.
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    store_port: Option<u16>,
}

/// What stands below the options in the help.
pub const HELP: &str = "\
Everything that the cluster keeps is below DATA_DIR/cluster. NATS listens on loopback only and asks everybody for a key
of that folder. A NATS of your own is used if NATS_URL names it, and a MongoDB of your own if MONGODB_URI or MONGO_HOST
does; else nats-server (NATS_SERVER_BIN) and mongod or secantusd-py (MONGOD_BIN) are looked for on PATH.

Ctrl-C or SIGTERM stops workers first, which finish their calls, then the gateway, NATS and the database; a second one
ends all at once. SIGHUP goes to gateway and workers. A worker that is lost is started again after 1 to 30 s; one that
was asked to leave is not. If NATS, the database or the gateway is lost, everything ends (exit status 75; 78 if the
settings are to blame).";

/// Why the cluster ends although nobody asked it to.
struct Failure {
    status: u8,
    text: String,
}

impl Failure {
    fn temporary(text: String) -> Self {
        Self { status: EX_TEMPFAIL, text }
    }

    fn configuration(text: String) -> Self {
        Self { status: EX_CONFIG, text }
    }
}

/// Starts everything, and stops it. `environment` is that of this process before secrets were removed from it, and
/// `env_file` the file with further settings: the parts get both.
pub async fn run(
    settings: &Settings,
    arguments: &LocalArguments,
    environment: Vec<(OsString, OsString)>,
    env_file: Option<PathBuf>,
) -> ExitCode {
    let stop = match lifecycle::begin(settings) {
        Ok(stop) => stop,
        Err(status) => return status,
    };
    let hangups = match Hangups::listen() {
        Ok(hangups) => hangups,
        Err(error) => {
            complain(&format!("signals cannot be received: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let plan = match Plan::make(settings, arguments, &environment, env_file) {
        Ok(plan) => plan,
        Err(failure) => {
            complain(&failure.text);
            return ExitCode::from(failure.status);
        }
    };
    let names = plan.parts.iter().map(|(_, name, _)| name.len()).max().unwrap_or(0);
    let output = Output::new(names);
    let (sender, events) = mpsc::channel(64);
    let mut cluster = Cluster {
        parts: plan.parts.iter().map(|(kind, name, launch)| Part::new(*kind, name, launch.clone())).collect(),
        plan,
        output,
        sender,
        events,
        stop,
        hangups,
        start_timeout: settings.start_timeout,
        patience: settings.shutdown_timeout + settings.shutdown_notice + GRACE,
    };
    let ended = cluster.serve().await;
    cluster.shut_down().await;
    match ended {
        Ok(()) => {
            cluster.output.say("stopped");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            complain(&failure.text);
            ExitCode::from(failure.status)
        }
    }
}

struct Cluster {
    plan: Plan,
    parts: Vec<Part>,
    output: Output,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    stop: CancellationToken,
    hangups: Hangups,
    start_timeout: Duration,
    patience: Duration,
}

/// What came of waiting while a cluster starts.
enum Waited<T> {
    For(T),
    Stopped,
}

impl Cluster {
    /// Starts the parts in the order in which they need each other, and watches them until a signal.
    async fn serve(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + self.start_timeout;
        for kind in [Kind::Nats, Kind::Store] {
            self.start_all(kind)?;
        }
        for address in self.plan.listening.clone() {
            let what = format!("{} at {}", address.0, address.1);
            if let Waited::Stopped = self.until(deadline, &what, accepts(&address.1)).await? {
                return Ok(());
            }
        }
        for kind in [Kind::Worker, Kind::Gateway] {
            self.start_all(kind)?;
        }
        // Parts say so by a line of their own, once they take calls.
        while let Some(silent) = self.parts.iter().find(|part| part.announces() && part.said().is_none()) {
            let what = silent.name().to_owned();
            if let Waited::Stopped = self.until(deadline, &what, std::future::pending::<()>()).await? {
                return Ok(());
            }
        }
        let base = self.base();
        if let Waited::Stopped = self.until(deadline, "the gateway's workers", ready(&base)).await? {
            return Ok(());
        }
        self.announce(&base);
        self.watch().await
    }

    fn start_all(&mut self, kind: Kind) -> Result<(), Failure> {
        for at in 0..self.parts.len() {
            if self.parts[at].kind() == kind {
                self.start(at)?;
            }
        }
        Ok(())
    }

    fn start(&mut self, at: usize) -> Result<(), Failure> {
        let part = &mut self.parts[at];
        part.start(at, &self.output, &self.sender).map_err(|error| {
            let text = format!("{} was not started: {error}", part.name());
            // Of processes or memory there may be enough again in a moment.
            match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => Failure::temporary(text),
                _ => Failure::configuration(text),
            }
        })
    }

    /// Waits for something while parts start. A line that one prints ends the wait as well; one that ends is the
    /// end of the start.
    async fn until<T>(
        &mut self,
        deadline: Instant,
        what: &str,
        wanted: impl Future<Output = T>,
    ) -> Result<Waited<Option<T>>, Failure> {
        let mut wanted = std::pin::pin!(wanted);
        loop {
            tokio::select! {
                found = &mut wanted => return Ok(Waited::For(Some(found))),
                () = self.stop.cancelled() => return Ok(Waited::Stopped),
                () = sleep_until(deadline) => {
                    let seconds = self.start_timeout.as_secs();
                    return Err(Failure::temporary(format!(
                        "the cluster was not ready within {seconds} s (START_TIMEOUT_SECONDS): waited for {what}"
                    )));
                }
                event = self.events.recv() => match event {
                    Some(Event::Said { part, run, line }) => {
                        self.parts[part].hear(run, line);
                        return Ok(Waited::For(None));
                    }
                    Some(Event::Ended { part, run }) => {
                        if let Some(end) = self.parts[part].reap(run) {
                            let part = &self.parts[part];
                            return Err(Failure {
                                status: end.status(),
                                text: format!("{} {end} before the cluster was ready{}", part.name(), part.last_words()),
                            });
                        }
                    }
                    None => return Ok(Waited::Stopped),
                },
            }
        }
    }

    /// `http://127.0.0.1:8080`, as the gateway said it.
    fn base(&self) -> String {
        let gateway = self.parts.iter().find(|part| part.kind() == Kind::Gateway);
        let line = gateway.and_then(Part::said).unwrap_or_default();
        line.split_whitespace().last().unwrap_or_default().to_owned()
    }

    fn announce(&self, base: &str) {
        let workers = self.parts.iter().filter(|part| part.kind() == Kind::Worker).count();
        let plural = if workers == 1 { "" } else { "s" };
        let mut out = std::io::stdout().lock();
        // Somebody who closed the pipe has read enough.
        let _ = writeln!(
            out,
            "mcp-api {}: a cluster of 1 gateway and {workers} worker{plural} serves on {base}",
            env!("CARGO_PKG_VERSION")
        );
        for line in &self.plan.shown {
            let _ = writeln!(out, "  {line}");
        }
        let _ = writeln!(out, "Ctrl-C stops all of it. Try: curl {base}/mcp/servers");
    }

    /// Keeps the workers running until a signal, or until something is lost that all need.
    async fn watch(&mut self) -> Result<(), Failure> {
        loop {
            let again =
                self.parts.iter().enumerate().filter_map(|(at, part)| Some((part.again()?, at))).min();
            let due = async {
                match again {
                    Some((moment, at)) => {
                        sleep_until(moment).await;
                        at
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                at = due => self.start(at)?,
                hangup = self.hangups.next() => match hangup {
                    Hangup::Terminal => return Ok(()),
                    Hangup::Signal => self.hang_up(),
                },
                event = self.events.recv() => match event {
                    Some(Event::Said { part, run, line }) => self.parts[part].hear(run, line),
                    Some(Event::Ended { part, run }) => self.lost(part, run)?,
                    None => return Ok(()),
                },
            }
        }
    }

    /// Has nodes read again what may have changed.
    fn hang_up(&self) {
        for part in self.parts.iter().filter(|part| part.announces()) {
            part.signal(Signal::SIGHUP);
        }
    }

    fn lost(&mut self, at: usize, run: u64) -> Result<(), Failure> {
        let part = &mut self.parts[at];
        let Some(end) = part.reap(run) else { return Ok(()) };
        if part.kind() == Kind::Worker && end.in_order() {
            self.output.say(&format!("{} was asked to leave and did; it is not started again", part.name()));
            return Ok(());
        }
        if part.kind() == Kind::Worker && !end.is_configuration() {
            let pause = part.start_later();
            let text = format!("{} {end}; it is started again in {} s", part.name(), pause.as_secs());
            self.output.say(&text);
            return Ok(());
        }
        let words = part.last_words();
        Err(Failure {
            status: end.status(),
            text: format!("{} {end}, and nothing works without it: the cluster ends{words}", part.name()),
        })
    }

    /// Ends the parts in the order in which they need each other, each kind when the one before is gone.
    async fn shut_down(&mut self) {
        for kind in [Kind::Worker, Kind::Gateway, Kind::Nats, Kind::Store] {
            if self.signal(kind, Signal::SIGTERM) == 0 {
                continue;
            }
            self.output.say(&format!("stopping {}", kind.plural()));
            self.gone(kind, self.patience).await;
            if self.signal(kind, Signal::SIGKILL) > 0 {
                self.output.say(&format!("{} did not stop in time and are killed", kind.plural()));
                self.gone(kind, GONE).await;
            }
        }
        let read = Instant::now() + LAST_LINES;
        while self.parts.iter().any(Part::is_read) && Instant::now() < read {
            sleep(LOOK).await;
        }
    }

    /// Sends a signal to those that run, and says how many these are.
    fn signal(&self, kind: Kind, signal: Signal) -> usize {
        self.parts.iter().filter(|part| part.kind() == kind && part.signal(signal)).count()
    }

    async fn gone(&mut self, kind: Kind, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.parts.iter().any(|part| part.kind() == kind && part.runs()) {
            match timeout_at(deadline, self.events.recv()).await {
                Ok(Some(Event::Ended { part, run })) => drop(self.parts[part].reap(run)),
                Ok(Some(Event::Said { .. })) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

/// Waits until connections to an address are accepted.
async fn accepts(address: &str) {
    while !matches!(timeout(ONE_LOOK, TcpStream::connect(address)).await, Ok(Ok(_))) {
        sleep(LOOK).await;
    }
}

/// Waits until a gateway says that it can serve. One that speaks TLS is believed: its certificate is for the names
/// that its users know.
async fn ready(base: &str) {
    let Some(address) = base.strip_prefix("http://") else { return };
    let address = address.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:");
    while !matches!(timeout(ONE_LOOK, is_ready(&address)).await, Ok(Ok(true))) {
        sleep(LOOK).await;
    }
}

async fn is_ready(address: &str) -> std::io::Result<bool> {
    let mut connection = TcpStream::connect(address).await?;
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut head = [0; 12];
    connection.read_exact(&mut head).await?;
    Ok(&head == b"HTTP/1.1 200")
}
