//! `mcp-gateway`: parses, wires, runs.

mod admission;
mod api_keys_command;
mod app;
mod audit;
mod auth;
mod backend;
mod body;
mod caller;
mod check;
mod cluster;
mod cors;
mod doctor;
#[cfg(test)]
mod documentation;
mod edge;
mod guard;
mod install_on_start;
mod keys;
mod latest;
mod local;
mod login;
mod meters;
mod migrate;
mod nkeys;
mod pace;
mod parts;
mod problem;
mod router;
mod routes;
mod serve;
mod tls;
mod traced;
mod verify;

use std::{io::Write, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use clap::{Parser, Subcommand};
use mcp_shared::{
    audit::Audit,
    builtin,
    config::{self, Auth, Settings},
    healthcheck,
    lifecycle::{self, EX_CONFIG, EX_TEMPFAIL, Hangups, complain},
    metrics::Exposition,
    node::{self, NodeError},
    trace::{self, Traces},
    vault::Vault,
};
use mcp_worker::{doctor::DoctorArguments, program};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use admission::Admission;
use api_keys_command::ApiKeysCommand;
use app::App;
use auth::Authenticator;
use backend::Backend;
use cors::Cors;
use keys::KeysCommand;
use latest::LatestVersions;
use local::LocalArguments;
use migrate::MigrateArguments;
use routes::keys::Keys;
use serve::{Door, Scheme};

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
    /// Make, list and revoke API keys.
    #[command(subcommand)]
    ApiKeys(ApiKeysCommand),
    /// Print every route of the API, and the scope that it needs.
    Routes,
    /// Print the effective settings, and whether store, bus, key and data folder can be used.
    Check,
    /// Look at everything that this program stands on, and say what would mend what is wrong (exit status 1 if anything is).
    Doctor(DoctorArguments),
    /// Take over the database of an mcp-api: say what is kept, what is done and what cannot be kept (exit status 1 if
    /// something cannot). A start does the same by itself.
    Migrate(MigrateArguments),
    /// Start a whole cluster on this machine, and stop it: NATS, a database, a gateway and workers.
    #[command(after_help = local::HELP)]
    Cluster(LocalArguments),
    /// Ask the program that runs here with these settings whether it lives (exit status 0).
    Healthcheck {
        /// Whether it can serve, too.
        #[arg(long)]
        ready: bool,
    },
    /// Make keys for logging in to NATS: a file with the seed for each name, and the public keys as
    /// nats/nats-server.conf expects them.
    Nkeys {
        /// Whose: gateway, worker, operator, or the name of a service.
        #[arg(required = true)]
        names: Vec<String>,
        /// The folder of the files.
        #[arg(long, default_value = ".")]
        folder: PathBuf,
    },
    /// Make, list, change and retire encryption keys.
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Look at the audit log.
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
}

#[derive(Subcommand)]
enum AuditCommand {
    /// Say whether every line is as it was written, or which is the first that is not (exit status 1).
    Verify {
        /// Files, with all that were put aside before them; those of this machine if none is named.
        files: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    if let Some(ended) = program::supervised() {
        return ended;
    }
    let arguments = Arguments::parse();
    // It needs no settings.
    if let Some(Command::Nkeys { names, folder }) = &arguments.command {
        return nkeys::run(names, folder);
    }
    if let Some(Command::Doctor(how)) = arguments.command {
        return mcp_shared::doctor::run("mcp-gateway", how.json, arguments.env_file, async |settings| {
            doctor::look(settings, how).await
        });
    }
    // Those who are started by this process need what is taken out of its environment.
    let cluster = matches!(arguments.command, Some(Command::Cluster(_)));
    let environment = if cluster { std::env::vars_os().collect() } else { Vec::new() };
    let env_file = arguments.env_file.clone();
    lifecycle::run("mcp-gateway", arguments.env_file, async |settings| match arguments.command {
        Some(Command::Cluster(arguments)) => local::run(settings, &arguments, environment, env_file).await,
        Some(Command::ApiKeys(command)) => api_keys_command::run(settings, command).await,
        Some(Command::Routes) => routes_command(),
        Some(Command::Check) => check::run(settings).await,
        Some(Command::Migrate(arguments)) => migrate::run(settings, arguments).await,
        Some(Command::Healthcheck { ready }) => {
            healthcheck::ask(&settings.host, settings.port, settings.http.tls.is_some(), ready).await
        }
        Some(Command::Keys(command)) => keys::run(settings, command).await,
        Some(Command::Audit { command: AuditCommand::Verify { files } }) => verify::run(settings, &files),
        Some(Command::Serve | Command::Nkeys { .. } | Command::Doctor(_)) | None => run(settings).await,
    })
}

/// `mcp-gateway routes`.
fn routes_command() -> ExitCode {
    let mut out = std::io::stdout().lock();
    for route in router::table() {
        let _ = writeln!(out, "{:<6} {:<36} {}", route.method.as_str(), route.path, route.access.as_str());
    }
    ExitCode::SUCCESS
}

/// Serves until a signal, and then stops in order: no new connections, requests in flight, processes.
async fn run(settings: &Settings) -> ExitCode {
    let stop = match lifecycle::begin(settings) {
        Ok(stop) => stop,
        Err(status) => return status,
    };
    let door = match Door::new(settings) {
        Ok(door) => door,
        Err(error) => {
            complain(&error.to_string());
            return ExitCode::from(EX_CONFIG);
        }
    };
    let hangups = match Hangups::listen() {
        Ok(hangups) => hangups,
        Err(error) => {
            complain(&format!("signals cannot be received: {error}"));
            return ExitCode::FAILURE;
        }
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
        Cors::new(settings.http.cors_origins.clone()),
        settings.host.to_string(),
    ));
    let changes = TaskTracker::new();
    let api = serve::Api::starting(router::starting(Arc::clone(&allowed)));
    // From now on, so that an orchestrator sees what a start is waiting for.
    let closed = CancellationToken::new();
    let serving =
        tokio::spawn(serve::serve(listener, door.clone(), api.clone(), stop.clone(), closed.clone()));
    let (backend, app, traces) = match start(settings, &door, changes.clone(), &stop).await {
        Ok(started) => started,
        Err(error) => return error.report(),
    };
    let app = Arc::new(app);
    let audit = app.audit.clone();
    allowed.record_in(audit.clone());
    api.set(router::router(Arc::clone(&app), allowed));
    app.changes.spawn(Arc::clone(&app.keys.reloader).serve(hangups, stop.clone()));
    announce(settings, door.scheme(), &address);
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
    audit.close().await;
    traces.close().await;
    tracing::info!("stopped");
    ExitCode::SUCCESS
}

/// Opens what the API stands on, and puts the API before it.
async fn start(
    settings: &Settings,
    door: &Door,
    changes: TaskTracker,
    stop: &CancellationToken,
) -> Result<(Backend, App, Traces), NodeError> {
    let vault = node::open(settings, stop).await?;
    let me = backend::myself(&vault);
    let traces = trace::open(settings.traces.as_ref(), "mcp-gateway", me.id.as_str());
    warn_of_records(settings, &vault).await?;
    let audit = Audit::open(&settings.audit, "mcp-gateway")?;
    let backend = Backend::open(settings, &vault, &me, stop, &audit).await?;
    vault.record_key().await?;
    let authenticator = Arc::new(Authenticator::open(settings, &vault, stop).await?);
    let (admission, metrics) = (Admission::new(&settings.limits), Exposition::default());
    meters::show(&metrics);
    door.show(&metrics);
    admission.show(&metrics);
    backend.show(&metrics);
    let keys = Keys::new(backend.reloader(settings, &vault, &me));
    let app = App {
        vault,
        keys,
        worker: backend.worker(),
        me,
        payload_limit: settings.payload_limit,
        authenticator,
        admission,
        metrics,
        changes,
        stop: stop.clone(),
        egress: settings.remote.egress.clone(),
        latest: LatestVersions::default(),
        public_url: settings.remote.public_url.clone(),
        launch: settings.launch.clone(),
        audit,
    };
    Ok((backend, app, traces))
}

/// Servers that were registered before there were rules go on. Whoever set the rules should know.
async fn warn_of_records(settings: &Settings, vault: &Vault) -> Result<(), NodeError> {
    for server in vault.servers().await? {
        if builtin::is_builtin(&server.value.name) {
            let server = &server.value.name;
            tracing::warn!(%server, "a server is stored under the name of a built-in one; it is kept, and not used");
            continue;
        }
        if let Err(refused) = settings.launch.check(&server.value, None) {
            let (server, reason) = (&server.value.name, &refused.message);
            tracing::warn!(%server, reason, "a server is stored that could not be registered today; it goes on");
        }
    }
    Ok(())
}

/// Tells a person where the program listens and what to do first.
fn announce(settings: &Settings, scheme: Scheme, address: &str) {
    let plain = matches!(scheme, Scheme::Http);
    let scheme = scheme.as_str();
    tracing::info!(%address, data_dir = %settings.data_dir.display(), "listening");
    let asked = matches!(settings.auth, Auth::Asked(_));
    if asked && plain && !settings.host.is_loopback() {
        tracing::warn!(
            "credentials and secrets come in over plain HTTP: set TLS_CERT_FILE and TLS_KEY_FILE, or let only a proxy \
             that speaks HTTPS reach this port"
        );
    }
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "mcp-api {} listens on {scheme}://{address}", env!("CARGO_PKG_VERSION"));
    let credential = if asked { "-H 'Authorization: Bearer ...' " } else { "" };
    let _ = writeln!(out, "Try: curl {credential}{scheme}://{address}/mcp/servers");
}
