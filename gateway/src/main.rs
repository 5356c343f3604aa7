//! `mcp-gateway`: parses, wires, runs.

mod admission;
mod app;
mod backend;
mod body;
mod check;
mod cluster;
#[cfg(test)]
mod documentation;
mod edge;
mod install_on_start;
mod latest;
mod login;
mod pace;
mod problem;
mod router;
mod routes;
mod serve;

use std::{io::Write, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use mcp_shared::{
    config::{self, Settings},
    lifecycle::{self, EX_TEMPFAIL, complain},
    metrics::Exposition,
    node::{self, NodeError},
};
use mcp_worker::program;
use tokio::{
    net::TcpListener,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use admission::Admission;
use app::App;
use backend::Backend;
use latest::LatestVersions;

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
    /// Print the effective settings, and whether store, bus, key and data folder can be used.
    Check,
}

fn main() -> ExitCode {
    if let Some(ended) = program::supervised() {
        return ended;
    }
    let arguments = Arguments::parse();
    lifecycle::run("mcp-gateway", arguments.env_file, async |settings| match arguments.command {
        Some(Command::Check) => check::run(settings).await,
        Some(Command::Serve) | None => run(settings).await,
    })
}

/// Serves until a signal, and then stops in order: no new connections, requests in flight, processes.
async fn run(settings: &Settings) -> ExitCode {
    let stop = match lifecycle::begin(settings) {
        Ok(stop) => stop,
        Err(status) => return status,
    };
    // The address first: two programs on one port is the commoner mistake.
    let address = lifecycle::address(&settings.host, settings.port);
    let listener = match TcpListener::bind(&address).await {
        Ok(listener) => listener,
        Err(error) => {
            complain(&format!("cannot listen on {address}: {error} (PORT and HOST choose another address)"));
            return ExitCode::from(EX_TEMPFAIL);
        }
    };
    let address = listener.local_addr().map_or(address, |address| address.to_string());
    tracing::info!(%address, "starting");
    let allowed = Arc::new(edge::Allowed::new(
        settings.allowed_hosts.clone(),
        settings.allowed_origins.clone(),
        settings.host.to_string(),
    ));
    let changes = TaskTracker::new();
    let api = serve::Api::starting(router::starting(Arc::clone(&allowed)));
    // From now on, so that an orchestrator sees what a start is waiting for.
    let closed = CancellationToken::new();
    let serving = tokio::spawn(serve::serve(listener, api.clone(), stop.clone(), closed.clone()));
    let (backend, app) = match start(settings, changes.clone(), &stop).await {
        Ok(started) => started,
        Err(error) => return error.report(),
    };
    let app = Arc::new(app);
    api.set(router::router(Arc::clone(&app), allowed));
    announce(settings, &address);
    // Nothing waits for it: it may take long, and fail, while calls are taken.
    tokio::spawn(install_on_start::run(app, settings.packages.install_on_start.clone()));
    stop.cancelled().await;
    let notice = settings.shutdown_notice;
    if !notice.is_zero() {
        tracing::info!(seconds = notice.as_secs(), "requests are still taken until others have noticed");
        sleep(notice).await;
    }
    closed.cancel();

    let Ok(open) = serving.await else { return ExitCode::FAILURE };
    let drained = Instant::now() + settings.shutdown_timeout;
    let mut answered = std::pin::pin!(open.shutdown());
    let late = timeout_at(drained, &mut answered).await.is_err();
    if late {
        tracing::warn!("requests were still open when the time to stop was over");
    }
    // Changes whose callers are gone are carried through all the same.
    changes.close();
    let _ = timeout_at(drained, changes.wait()).await;
    backend.shutdown(drained.saturating_duration_since(Instant::now())).await;
    if late {
        // Calls that ended because their server was stopped have answers too.
        let _ = timeout(LAST_ANSWERS, answered).await;
    }
    tracing::info!("stopped");
    ExitCode::SUCCESS
}

/// Opens what the API stands on, and puts the API before it.
async fn start(
    settings: &Settings,
    changes: TaskTracker,
    stop: &CancellationToken,
) -> Result<(Backend, App), NodeError> {
    let vault = node::open(settings, stop).await?;
    let me = backend::myself(&vault);
    let backend = Backend::open(settings, &vault, &me, stop).await?;
    vault.record_key().await?;
    let (admission, mut metrics) = (Admission::new(&settings.limits), Exposition::default());
    admission.show(&mut metrics);
    backend.show(&mut metrics);
    let app = App {
        vault,
        worker: backend.worker(),
        me,
        payload_limit: settings.payload_limit,
        admission,
        metrics,
        changes,
        stop: stop.clone(),
        egress: settings.remote.egress.clone(),
        latest: LatestVersions::default(),
        public_url: settings.remote.public_url.clone(),
    };
    Ok((backend, app))
}

/// Tells a person where the program listens and what to do first.
fn announce(settings: &Settings, address: &str) {
    tracing::info!(%address, data_dir = %settings.data_dir.display(), "listening");
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "mcp-api {} listens on http://{address}", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(out, "Try: curl http://{address}/mcp/servers");
}
