//! `mcp-worker`: one worker of a cluster, as a program. (On one machine `mcp-gateway` is the whole program.)

use std::{io::Write, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use mcp_shared::{
    audit::Audit,
    check,
    config::{self, BusSettings, Settings},
    doctor,
    fleet::Role,
    healthcheck,
    lifecycle::{self, EX_CONFIG, EX_TEMPFAIL, Hangups, complain},
    node::{self, NodeError},
    trace::{self, Traces},
};
use tokio::{
    net::TcpListener,
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Boot,
    builtin::convert,
    bus::{self, Bus},
    doctor::{self as worker_doctor, DoctorArguments},
    health::{self, Health},
    supervisor,
    worker::Worker,
};

/// How long the last answers may take to leave.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// A worker of an mcp-api cluster: it runs MCP servers and takes calls from gateways over NATS.
#[derive(Parser)]
#[command(name = "mcp-worker", version, after_long_help = config::help_text(), after_help = "Settings are environment variables: --help lists them.")]
struct Arguments {
    /// A file with settings, one NAME=value a line. Without it `.env` is read if there is one.
    #[arg(long, value_name = "FILE", global = true)]
    env_file: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the fleet (the default).
    Serve,
    /// Print the effective settings, and whether store, bus and key can be used.
    Check,
    /// Look at everything that a worker stands on, and say what would mend what is wrong (exit status 1 if anything is).
    Doctor(DoctorArguments),
    /// Ask the worker that runs here with these settings whether it lives (exit status 0).
    Healthcheck {
        /// Whether it can take calls, too.
        #[arg(long)]
        ready: bool,
    },
}

/// What every program with a worker in it does before anything else: it keeps its memory to itself, and
/// becomes the supervisor of its servers, or what reads a stranger's document, when it was started as one. `Some` is
/// the end of that.
pub fn supervised() -> Option<ExitCode> {
    supervisor::protect_process();
    // The supervisor is this executable under another argument, before any thread exists.
    let asked = std::env::args_os().nth(1)?;
    if asked == convert::ARGUMENT {
        return Some(convert::run());
    }
    (asked == supervisor::ARGUMENT).then(supervisor::run)
}

/// The program.
pub fn main() -> ExitCode {
    if let Some(ended) = supervised() {
        return ended;
    }
    let arguments = Arguments::parse();
    if let Some(Command::Doctor(how)) = arguments.command {
        return doctor::run("mcp-worker", how.json, arguments.env_file, async |settings| {
            worker_doctor::look(settings, Role::Worker, how).await
        });
    }
    lifecycle::run("mcp-worker", arguments.env_file, async |settings| {
        let Some(bus) = &settings.bus else {
            complain(
                "mcp-worker cannot start with these settings:\nNATS_URL: a worker takes its calls from NATS; \
                 set it, with MONGODB_URI or MONGO_HOST and SECRETS_KEY, as the gateways have it (on one \
                 machine mcp-gateway alone is the whole program)",
            );
            return ExitCode::from(EX_CONFIG);
        };
        match arguments.command {
            Some(Command::Check) => look(settings, bus).await,
            Some(Command::Healthcheck { ready }) => {
                healthcheck::ask(&settings.worker_host, settings.worker_port, false, ready).await
            }
            Some(Command::Serve | Command::Doctor(_)) | None => serve(settings, bus).await,
        }
    })
}

/// `mcp-worker check`.
async fn look(settings: &Settings, bus: &BusSettings) -> ExitCode {
    let mut findings = vec![("health", check::listen(&settings.worker_host, settings.worker_port).await)];
    let stored = check::storage(settings).await;
    findings.extend(stored.findings);
    findings.extend(bus::check(bus, stored.node.as_ref()).await);
    check::print(settings, &findings)
}

/// Serves until a signal, and then stops in order: unready, nothing new, calls in flight, processes, the
/// last answers.
async fn serve(settings: &Settings, bus: &BusSettings) -> ExitCode {
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
    // The address first: two programs on one port is the commoner mistake.
    let address = lifecycle::address(&settings.worker_host, settings.worker_port);
    let listener = match TcpListener::bind(&address).await {
        Ok(listener) => listener,
        Err(error) => {
            complain(&format!(
                "cannot listen on {address}: {error} (WORKER_PORT and WORKER_HOST choose another address)"
            ));
            return ExitCode::from(EX_TEMPFAIL);
        }
    };
    let address = listener.local_addr().map_or(address, |address| address.to_string());
    tracing::info!(%address, "health");
    let health = Arc::new(Health::default());
    let closing = CancellationToken::new();
    // From now on, so that an orchestrator sees what a start is waiting for.
    let answering = tokio::spawn(health::serve(listener, Arc::clone(&health), closing.clone()));
    let (worker, bus, audit, traces) = match start(settings, bus, &health, &stop).await {
        Ok(started) => started,
        Err(error) => return error.report(),
    };
    let reloading = tokio::spawn(bus.reloader(settings, &worker).serve(hangups, stop.clone()));
    announce(&worker, &address);
    tokio::select! {
        () = stop.cancelled() => {}
        () = worker.asked_to_leave() => {}
    }

    reloading.abort();

    let drained = Instant::now() + settings.shutdown_timeout;
    health.drain();
    bus.drain(settings.shutdown_timeout).await;
    worker.shutdown(drained.saturating_duration_since(Instant::now())).await;
    if timeout(LAST_ANSWERS, bus.close()).await.is_err() {
        tracing::warn!("the last answers could not be sent");
    }
    closing.cancel();
    let _ = answering.await;
    audit.close().await;
    traces.close().await;
    tracing::info!("stopped");
    ExitCode::SUCCESS
}

/// Opens what a worker stands on, and then the worker.
async fn start(
    settings: &Settings,
    bus: &BusSettings,
    health: &Health,
    stop: &CancellationToken,
) -> Result<(Arc<Worker>, Bus, Audit, Traces), NodeError> {
    let vault = node::open(settings, stop).await?;
    health.store(&vault);
    let audit = Audit::open(&settings.audit, "mcp-worker")?;
    let (packages, remote, limits) = (&settings.packages, &settings.remote, &settings.limits);
    let program = supervisor::this_program();
    let recorded = Some(audit.clone());
    let worker =
        Worker::open(vault.clone(), program, Boot::OnDemand, packages, remote, limits, recorded).await?;
    health.worker(&worker);
    let traces = trace::open(settings.traces.as_ref(), "mcp-worker", worker.id().as_str());
    let bus = node::patiently(settings, stop, async || Bus::connect(bus, &worker).await).await?;
    vault.record_key().await?;
    worker.serve_jobs(bus.fleet());
    health.bus(&bus);
    tokio::select! {
        () = bus.in_step() => {}
        () = stop.cancelled() => {}
    }
    health.serving();
    Ok((worker, bus, audit, traces))
}

/// Tells a person, or the program that started this one, that calls are taken.
fn announce(worker: &Worker, address: &str) {
    tracing::info!(worker_id = %worker.id(), %address, "serving");
    let mut out = std::io::stdout().lock();
    let version = env!("CARGO_PKG_VERSION");
    let _ = writeln!(out, "mcp-worker {version} ({}) serves health on http://{address}", worker.id());
}
