//! Which parts a cluster has, and with which settings each is started.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use mcp_shared::{
    config::{LogFormat, Settings, StoreSettings},
    node,
};
use nix::fcntl::{Flock, FlockArg};

use super::{Failure, Kind, Launch, LocalArguments, services};
use crate::nkeys;

/// The folder below `DATA_DIR` that is this command's own.
const FOLDER: &str = "cluster";

/// The parts of a cluster, not started yet.
pub struct Plan {
    /// What each is for, what it is called, and how it is started; in the order of their starts.
    pub parts: Vec<(Kind, String, Launch)>,
    /// What has to accept connections before the nodes are started, and where.
    pub listening: Vec<(&'static str, String)>,
    /// What people are told once it serves.
    pub shown: Vec<String>,
    /// Held as long as the cluster has its folder.
    _lock: Flock<File>,
}

/// What the nodes are told beside the settings of this process.
#[derive(Default)]
struct Told(Vec<(OsString, OsString)>);

impl Told {
    fn add(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.0.push((name.into(), value.as_ref().to_owned()));
    }
}

impl Plan {
    /// Looks for the programs, and makes folders, keys and configuration.
    pub fn make(
        settings: &Settings,
        arguments: &LocalArguments,
        environment: &[(OsString, OsString)],
        env_file: Option<PathBuf>,
    ) -> Result<Self, Failure> {
        let gateway = std::env::current_exe()
            .map_err(|error| Failure::temporary(format!("this program cannot be found: {error}")))?;
        let worker = beside(&gateway)?;
        // Everything that may be missing is looked for before anything is made.
        let nats = settings.bus.is_none().then(|| services::nats_server(settings)).transpose()?;
        let store = match &settings.store {
            StoreSettings::Embedded => Some(services::Database::find(settings)?),
            StoreSettings::Mongo(_) => None,
        };
        let root = settings.data_dir.join(FOLDER);
        let failed = |error: io::Error| Failure::configuration(format!("{}: {error}", root.display()));
        make_folder(&root).map_err(failed)?;
        let lock = lock(&root)?;

        let (mut parts, mut listening, mut shown) = (Vec::new(), Vec::new(), Vec::new());
        let (mut told, mut gateway_key, mut worker_key) = (Told::default(), None, None);
        if let Some(program) = nats {
            let keys = root.join("keys");
            make_folder(&keys).map_err(failed)?;
            let port = port(arguments.nats_port)?;
            let mut env = services::plain_environment(environment);
            for role in services::ROLES {
                let path = keys.join(format!("{role}.nk"));
                let key = nkeys::key(&path)
                    .map_err(|error| Failure::configuration(format!("{}: {error}", path.display())))?;
                env.push((services::variable(role).into(), key.public_key().into()));
            }
            let config = root.join("nats-server.conf");
            let prefix = &settings.programs.prefix;
            write(&config, &services::nats_config(port, prefix)).map_err(failed)?;
            let args = vec!["-c".into(), config.into()];
            parts.push((Kind::Nats, "nats".to_owned(), Launch { program, args, env }));
            let address = format!("127.0.0.1:{port}");
            told.add("NATS_URL", format!("nats://{address}"));
            (gateway_key, worker_key) = (Some(keys.join("gateway.nk")), Some(keys.join("worker.nk")));
            let service = keys.join("service.nk");
            shown.push(format!(
                "NATS      nats://{address} (services: nats --nkey {} --inbox-prefix _INBOX.service)",
                service.display()
            ));
            listening.push(("NATS", address));
        } else if let Some(bus) = &settings.bus {
            shown.push(format!("NATS      {} (your own)", bus.shown()));
        }
        if let Some(database) = store {
            let folder = root.join("store");
            make_folder(&folder).map_err(failed)?;
            let port = port(arguments.store_port)?;
            let env = services::plain_environment(environment);
            shown.push(format!(
                "database  mongodb://127.0.0.1:{port} ({}, in {})",
                database.program.display(),
                folder.display()
            ));
            parts.push((Kind::Store, "store".to_owned(), database.launch(port, &folder, env)));
            let address = format!("127.0.0.1:{port}");
            told.add("MONGODB_URI", format!("mongodb://{address}/?directConnection=true"));
            listening.push(("the database", address));
        } else if let StoreSettings::Mongo(mongo) = &settings.store {
            shown.push(format!("database  {} at {} (your own)", mongo.database, mongo.hosts));
        }
        if settings.secrets_key.is_none() && settings.secrets_keys_file.is_none() {
            let path = root.join(node::KEY_FILE);
            node::make_key(&path).map_err(|error| Failure::configuration(error.to_string()))?;
            shown.push(format!("key       {} (without it stored secrets cannot be read)", path.display()));
            told.add("SECRETS_KEYS_FILE", path);
        }
        // What the parts say comes through a pipe, and is read by people if it is shown on a terminal.
        if settings.log_format == LogFormat::Auto && io::IsTerminal::is_terminal(&io::stderr()) {
            told.add("LOG_FORMAT", "pretty");
        }
        shown.push(format!("data      {}", root.display()));

        let args: Vec<OsString> =
            env_file.into_iter().flat_map(|file| ["--env-file".into(), file.into_os_string()]).collect();
        let node = |name: &str, program: &Path, key: &Option<PathBuf>, more: &[(&str, &str)]| {
            let folder = root.join(name);
            make_folder(&folder).map_err(failed)?;
            let mut env = environment.to_vec();
            let mut set = |name: &OsStr, value: &OsStr| {
                env.retain(|(known, _)| known != name);
                env.push((name.to_owned(), value.to_owned()));
            };
            told.0.iter().for_each(|(name, value)| set(name, value));
            set("DATA_DIR".as_ref(), folder.as_ref());
            if let Some(key) = key {
                set("NATS_NKEY_SEED_FILE".as_ref(), key.as_ref());
            }
            more.iter().for_each(|(name, value)| set(name.as_ref(), value.as_ref()));
            Ok(Launch { program: program.to_owned(), args: args.clone(), env })
        };
        for number in 1..=arguments.workers {
            let name = format!("worker-{number}");
            let launch = node(&name, &worker, &worker_key, &[("WORKER_PORT", "0")])?;
            parts.push((Kind::Worker, name, launch));
        }
        // Nobody balances between gateways here who would have to notice that this one stops.
        let asked = settings.is_set("SHUTDOWN_NOTICE_SECONDS");
        let notice: &[_] = if asked { &[] } else { &[("SHUTDOWN_NOTICE_SECONDS", "0")] };
        let launch = node("gateway", &gateway, &gateway_key, notice)?;
        parts.push((Kind::Gateway, "gateway".to_owned(), launch));
        Ok(Self { parts, listening, shown, _lock: lock })
    }
}

/// The worker's program: it is built and installed together with this one.
fn beside(gateway: &Path) -> Result<PathBuf, Failure> {
    let worker = gateway.with_file_name("mcp-worker");
    if worker.is_file() {
        return Ok(worker);
    }
    Err(Failure::configuration(format!(
        "{} is not there: a cluster needs the worker's program beside this one (cargo build --release makes both)",
        worker.display()
    )))
}

fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Two clusters in one folder would write each other's files.
fn lock(root: &Path) -> Result<Flock<File>, Failure> {
    let path = root.join("lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = file.map_err(|error| Failure::configuration(format!("{}: {error}", path.display())))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
        Failure::temporary(format!(
            "another `mcp-gateway cluster` uses {}: stop it, or set DATA_DIR to another folder",
            root.display()
        ))
    })
}

/// Writes a file for this user's eyes, as a whole.
fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
}

/// The port that was asked for, or one that is free now.
fn port(asked: Option<u16>) -> Result<u16, Failure> {
    if let Some(port) = asked {
        return Ok(port);
    }
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    free.map(|address| address.port())
        .map_err(|error| Failure::temporary(format!("there is no free port on loopback: {error}")))
}
