//! `mcp-gateway`: parses, wires, runs.

mod app;
mod body;
mod check;
#[cfg(test)]
mod documentation;
mod edge;
mod node;
mod problem;
mod router;
mod routes;
mod serve;

use std::{io::Write, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use mcp_shared::{
    config::{self, Settings},
    telemetry,
    worker_api::WorkerApi,
};
use mcp_worker::{Boot, Worker, supervisor};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The exit status for settings that no restart mends (`EX_CONFIG` of sysexits.h).
pub const EX_CONFIG: u8 = 78;
/// The exit status for something that may pass, such as a data folder that is in use (`EX_TEMPFAIL`).
const EX_TEMPFAIL: u8 = 75;
/// How long answers may take to leave after the last server was stopped.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// MCP servers behind one HTTP API, with every user's secrets encrypted and injected into calls.
#[derive(Parser)]
#[command(name = "mcp-gateway", version, after_long_help = config::help_text(), after_help = "Settings are environment variables: --help lists them.")]
struct Arguments {
    /// A file with settings, one NAME=value a line. Without it `.env` is read if there is one.
    #[arg(long, value_name = "FILE", global = true)]
    env_file: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the API (the default).
    Serve,
    /// Print the effective settings, and whether store, key and data folder can be used.
    Check,
}

fn main() -> ExitCode {
    supervisor::protect_process();
    // The supervisor is this executable under another argument, before any thread exists.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == supervisor::ARGUMENT) {
        return supervisor::run();
    }
    let arguments = Arguments::parse();
    let env_file = config::env_file(arguments.env_file);
    let settings = match Settings::load(config::process_environment(), env_file.as_deref()) {
        Ok(settings) => settings,
        Err(errors) => {
            complain(&format!("mcp-gateway cannot start with these settings:\n{errors}"));
            return ExitCode::from(EX_CONFIG);
        }
    };
    if let Err(error) = telemetry::init(settings.log_format, settings.debug, settings.log_filter.as_deref()) {
        complain(&error.to_string());
        return ExitCode::FAILURE;
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("the runtime did not start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        match arguments.command {
            Some(Command::Check) => check::check(&settings).await,
            Some(Command::Serve) | None => run(&settings).await,
        }
    })
}

/// Serves until a signal, and then stops in order: no new connections, requests in flight, processes.
async fn run(settings: &Settings) -> ExitCode {
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    for name in settings.later.keys() {
        tracing::warn!("{name} is set, but this version does not use it");
    }
    let stop = CancellationToken::new();
    if let Err(error) = stop_on_signals(stop.clone()) {
        complain(&format!("signals cannot be received: {error}"));
        return ExitCode::FAILURE;
    }
    // The address first: two programs on one port is the commoner mistake.
    let address = address(settings);
    let listener = match TcpListener::bind(&address).await {
        Ok(listener) => listener,
        Err(error) => {
            complain(&format!("cannot listen on {address}: {error} (PORT and HOST choose another address)"));
            return ExitCode::from(EX_TEMPFAIL);
        }
    };
    let changes = TaskTracker::new();
    let (worker, router) = match start(settings, changes.clone()).await {
        Ok(started) => started,
        Err(error) => {
            complain(&node::explain(&error));
            return ExitCode::from(if error.is_configuration() { EX_CONFIG } else { EX_TEMPFAIL });
        }
    };
    announce(settings, &listener);
    let open = serve::serve(listener, router, stop).await;
    let drained = Instant::now() + settings.shutdown_timeout;
    let mut answered = std::pin::pin!(open.shutdown());
    let late = timeout_at(drained, &mut answered).await.is_err();
    if late {
        tracing::warn!("requests were still open when the time to stop was over");
    }
    // Changes whose callers are gone are carried through all the same.
    changes.close();
    let _ = timeout_at(drained, changes.wait()).await;
    worker.shutdown(drained.saturating_duration_since(Instant::now())).await;
    if late {
        // Calls that ended because their server was stopped have answers too.
        let _ = timeout(LAST_ANSWERS, answered).await;
    }
    tracing::info!("stopped");
    ExitCode::SUCCESS
}

/// The program on one machine: this is the only place that knows the worker behind the API.
async fn start(
    settings: &Settings,
    changes: TaskTracker,
) -> Result<(Arc<Worker>, axum::Router), node::NodeError> {
    let vault = node::open(settings).await?;
    let worker = Worker::open(vault.clone(), supervisor::this_program(), Boot::Everything).await?;
    let app = app::App {
        vault,
        worker: Arc::clone(&worker) as Arc<dyn WorkerApi>,
        payload_limit: settings.payload_limit,
        changes,
    };
    let allowed = edge::Allowed::new(
        settings.allowed_hosts.clone(),
        settings.allowed_origins.clone(),
        settings.host.to_string(),
    );
    Ok((worker, router::router(Arc::new(app), Arc::new(allowed))))
}

/// `HOST:PORT` as a socket address is written.
fn address(settings: &Settings) -> String {
    let host = settings.host.to_string();
    if host.contains(':') {
        format!("[{host}]:{}", settings.port)
    } else {
        format!("{host}:{}", settings.port)
    }
}

/// Tells a person where the program listens and what to do first.
fn announce(settings: &Settings, listener: &TcpListener) {
    let address = listener.local_addr().map_or_else(|_| address(settings), |address| address.to_string());
    tracing::info!(%address, data_dir = %settings.data_dir.display(), "listening");
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "mcp-api {} listens on http://{address}", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(out, "Try: curl http://{address}/mcp/servers");
}

/// The first signal stops in order; a second one ends the program at once.
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
                // The supervisor ends the servers when this process is gone.
                std::process::exit(130);
            }
            stop.cancel();
        }
    });
    Ok(())
}

fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
