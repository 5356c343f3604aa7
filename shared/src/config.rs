//! Settings from the environment and a `.env` file.
//!
//! Everything that is wrong is reported together, and what is unsafe is refused rather than warned about.
//! Loading reads nothing global, so that every rule can be tested.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;

use crate::{crypter::LegacyMode, error::shorten, launch::LaunchRules, trace::Export};

mod audit;
mod auth;
mod bus;
mod dotenv;
mod http;
mod launch;
mod limits;
mod mongo;
mod packages;
mod parse;
mod programs;
mod remote;
mod table;
mod traces;
mod variables;
mod web_tools;

#[cfg(test)]
mod tests;

pub use audit::AuditSettings;
pub use auth::{Auth, AuthSettings, JwtAlgorithm, JwtSettings};
pub use bus::{BusLogin, BusServer, BusSettings, BusTls};
pub use http::{HttpSettings, TlsFiles};
pub use limits::{LimitSettings, MOST_CALLS, UserLimits};
pub use mongo::{MongoLogin, MongoSettings, StoreSettings};
pub use packages::{InstallOnStart, PackageSettings};
pub use parse::ListenHost;
pub use programs::ProgramSettings;
pub use remote::{GoogleCredentials, RemoteSettings};
pub use table::VARIABLES;
pub use variables::{Group, Since, Variable, dotenv_example, find, help_text, markdown_table};
pub use web_tools::{BrowserChoice, Sandbox, SearxngUrl, WebToolSettings};

/// The file that is read when it exists and no other is named.
pub const DEFAULT_ENV_FILE: &str = ".env";

/// How long balancers have to see that one of several gateways is about to stop, where nobody says otherwise.
const NOTICE: Duration = Duration::from_secs(3);

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Pretty on a terminal, else JSON.
    Auto,
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

/// Where a setting's value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The table of variables.
    Default,
    /// The environment of the process.
    Environment,
    /// The `.env` file.
    EnvFile,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `pad` lets a caller align columns.
        f.pad(match self {
            Origin::Default => "default",
            Origin::Environment => "environment",
            Origin::EnvFile => ".env",
        })
    }
}

/// The settings of one process. `Debug` and [`Settings::effective`] show no secrets.
pub struct Settings {
    /// Where to listen.
    pub host: ListenHost,
    /// The port to listen on; 0 for any free one.
    pub port: u16,
    /// Who is let in.
    pub auth: Auth,
    /// Hosts that requests may be addressed to besides loopback names, as `host` (any port) or
    /// `host:port`, in lower case, IPv6 addresses in brackets.
    pub allowed_hosts: Vec<String>,
    /// Origins that may send requests besides those on loopback names, as browsers write them.
    pub allowed_origins: Vec<String>,
    /// TLS, and web pages that may read answers.
    pub http: HttpSettings,
    /// Bytes that the body of a request may have.
    pub payload_limit: usize,
    /// What is taken in at once.
    pub limits: LimitSettings,
    /// Threads that run the program's tasks.
    pub threads: usize,
    /// How long calls in flight have to finish when the program stops.
    pub shutdown_timeout: Duration,
    /// How long requests are still taken before that, so that others can see it coming.
    pub shutdown_notice: Duration,
    /// Folder of everything that this machine keeps.
    pub data_dir: PathBuf,
    /// Which store.
    pub store: StoreSettings,
    /// The bus between gateways and workers; without one the worker runs in the gateway's process.
    pub bus: Option<BusSettings>,
    /// Programs of others that a cluster on one machine is made of.
    pub programs: ProgramSettings,
    /// How long a start waits for a store or bus on the network.
    pub start_timeout: Duration,
    /// Where a worker serves its health.
    pub worker_host: ListenHost,
    /// The port of a worker's health; 0 for any free one.
    pub worker_port: u16,
    /// The key for secrets. Whether it is strong enough is for the key ring to say.
    pub secrets_key: Option<SecretString>,
    /// A key ring's file. Beside it `secrets_key` is for values in the earlier format, and for the line
    /// `k1:SECRETS_KEY` of the file.
    pub secrets_keys_file: Option<PathBuf>,
    /// What to do with secrets in the earlier format, where the operator said so.
    pub legacy: Option<LegacyMode>,
    /// How packages are installed.
    pub packages: PackageSettings,
    /// Remote servers, and logins to them.
    pub remote: RemoteSettings,
    /// What may be started as a server.
    pub launch: LaunchRules,
    /// The audit log.
    pub audit: AuditSettings,
    /// Whether to log at debug level.
    pub debug: bool,
    /// How log lines look.
    pub log_format: LogFormat,
    /// `RUST_LOG`, known to be a valid filter.
    pub log_filter: Option<String>,
    /// How traces are exported, if they are.
    pub traces: Option<Export>,
    /// Values that were set for variables which this version does not use yet, as they stood. Some are
    /// credentials: see [`Variable::secret`].
    pub later: BTreeMap<&'static str, String>,
    /// What looks like a mistake but may be another program's business; to be logged at start.
    pub warnings: Vec<String>,
    effective: Vec<(&'static str, String, Origin)>,
}

/// One thing that is wrong: the variable (or file) and what would be valid. It never has a secret's value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: {message}")]
pub struct ConfigError {
    subject: String,
    message: String,
}

impl ConfigError {
    fn new(subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self { subject: subject.into(), message: message.into() }
    }

    /// The variable, or the file, that it is about.
    pub fn subject(&self) -> &str {
        &self.subject
    }
}

/// Everything that is wrong with the settings; shown one problem a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// The problems, in the order in which they were found.
    pub fn problems(&self) -> &[ConfigError] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// The process environment for [`Settings::load`]. Unlike `std::env::vars` it does not panic at values that
/// are no text; `load` reports them.
pub fn process_environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
}

/// The file to load: the one that was asked for, which must exist then, or `.env` in the working folder if
/// there is one.
pub fn env_file(asked: Option<PathBuf>) -> Option<PathBuf> {
    asked.or_else(|| {
        let default = PathBuf::from(DEFAULT_ENV_FILE);
        // A link to nowhere counts as there: its target was meant to be read.
        default.symlink_metadata().is_ok().then_some(default)
    })
}

impl Settings {
    /// Reads settings. The process environment wins over the file, and an empty value is as good as none.
    /// `dotenv` must exist when it is given; see [`env_file`].
    pub fn load(
        env: impl Iterator<Item = (String, String)>,
        dotenv: Option<&Path>,
    ) -> Result<Self, ConfigErrors> {
        let mut reader = Reader::default();
        reader.take_environment(env);
        if let Some(path) = dotenv {
            reader.take_file(path);
        }

        let host = reader.required("HOST", parse::host);
        let port = reader.required("PORT", parse::port);
        let auth = reader.auth();
        let allowed_hosts = reader.optional("ALLOWED_HOSTS", parse::allowed_hosts).unwrap_or_default();
        let allowed_origins = reader.optional("ALLOWED_ORIGINS", parse::allowed_origins).unwrap_or_default();
        let http = reader.http();
        let payload_limit = reader.required("PAYLOAD_LIMIT", parse::size);
        let limits = reader.limits(payload_limit, matches!(auth, Auth::Asked(_)));
        let threads = reader.optional("RUNTIME_THREADS", limits::threads);
        let shutdown_timeout = reader.required("SHUTDOWN_TIMEOUT_SECONDS", parse::seconds);
        let shutdown_notice = reader.optional("SHUTDOWN_NOTICE_SECONDS", parse::seconds_or_none);
        let data_dir = reader.required("DATA_DIR", parse::path);
        let secrets_key = reader.raw("SECRETS_KEY").map(SecretString::from);
        let secrets_keys_file = reader.optional("SECRETS_KEYS_FILE", parse::path);
        let legacy = reader.optional("LEGACY_SECRETS", parse::legacy);
        let debug = reader.required("DEBUG", parse::boolean);
        let log_format = reader.required("LOG_FORMAT", parse::log_format);
        let log_filter = reader.optional("RUST_LOG", parse::log_filter);
        let traces = reader.traces();

        let start_timeout = reader.required("START_TIMEOUT_SECONDS", parse::seconds);
        let worker_host = reader.required("WORKER_HOST", parse::host);
        let worker_port = reader.required("WORKER_PORT", parse::port);
        let store = reader.store();
        let bus = reader.bus();
        let programs = reader.programs();
        let packages = reader.packages(data_dir.as_deref());
        let launch = reader.launch();
        let audit = reader.audit(data_dir.as_deref());

        if let Some(host) = host.as_ref().filter(|host| !host.is_loopback() && auth == Auth::Unset) {
            let message = format!(
                "listening on {} is refused without authentication: anyone who can reach it could start \
                 programs here; set AUTH=keys or AUTH=jwt, keep 127.0.0.1, or set AUTH=none if something in front \
                 authenticates",
                shorten(&host.to_string(), 64)
            );
            reader.problem("HOST", message);
        }

        let remote = reader.remote();
        let (
            Some(host),
            Some(port),
            Some(payload_limit),
            Some(limits),
            Some(shutdown_timeout),
            Some(data_dir),
            Some(debug),
            Some(log_format),
            Some(start_timeout),
            Some(worker_host),
            Some(worker_port),
            Some(store),
            Some(programs),
            Some(packages),
            Some(audit),
            true,
        ) = (
            host,
            port,
            payload_limit,
            limits,
            shutdown_timeout,
            data_dir,
            debug,
            log_format,
            start_timeout,
            worker_host,
            worker_port,
            store,
            programs,
            packages,
            audit,
            reader.problems.is_empty(),
        )
        else {
            return Err(ConfigErrors(reader.problems));
        };
        Ok(Self {
            host,
            port,
            auth,
            allowed_hosts,
            allowed_origins,
            http,
            payload_limit,
            limits,
            threads: threads.unwrap_or_else(|| limits::usual_threads(bus.is_some())),
            shutdown_timeout,
            shutdown_notice: shutdown_notice.unwrap_or(if bus.is_some() { NOTICE } else { Duration::ZERO }),
            data_dir,
            store,
            bus,
            programs,
            start_timeout,
            worker_host,
            worker_port,
            secrets_key,
            secrets_keys_file,
            legacy,
            packages,
            remote,
            launch,
            audit,
            debug,
            log_format,
            log_filter,
            traces,
            later: reader.later(),
            effective: reader.effective(),
            warnings: reader.warnings,
        })
    }

    /// Every variable with the value in effect and where it came from, secrets masked.
    pub fn effective(&self) -> Vec<(&'static str, String, Origin)> {
        self.effective.clone()
    }

    /// Whether a variable was given a value, here or in the file.
    pub fn is_set(&self, name: &str) -> bool {
        self.shown(name).is_some()
    }

    /// What people are shown of the value that a variable was given.
    pub fn shown(&self, name: &str) -> Option<&str> {
        let found = self.effective.iter().find(|(known, _, _)| *known == name);
        found.filter(|(_, _, origin)| *origin != Origin::Default).map(|(_, value, _)| value.as_str())
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.effective.iter().map(|(name, shown, _)| (name, shown))).finish()
    }
}

/// Variables of other programs that are spelled almost like one of ours.
const FOREIGN: &[&str] = &["MONGO_PORT", "NATS_USER", "PYTHON_DIR", "PYTHON_LIB"];

/// Families of variables of which other programs that share the file may use more than this one.
const FAMILIES: &[&str] = &["OTEL_"];

/// Values as they were found, and what was wrong with them.
#[derive(Default)]
struct Reader {
    values: BTreeMap<&'static str, (String, Origin)>,
    problems: Vec<ConfigError>,
    warnings: Vec<String>,
}

impl Reader {
    fn problem(&mut self, subject: impl Into<String>, message: impl Into<String>) {
        self.problems.push(ConfigError::new(subject, message));
    }

    fn set(&mut self, variable: &'static Variable, value: String, origin: Origin) {
        if value.contains(char::REPLACEMENT_CHARACTER) {
            self.problem(variable.name, "the value is not UTF-8 text");
        }
        // Spaces around a value are a slip, except in a credential, where they may belong to it.
        let value = if variable.secret { value } else { value.trim().to_owned() };
        if !value.trim().is_empty() {
            self.values.entry(variable.name).or_insert((value, origin));
        }
    }

    fn take_environment(&mut self, env: impl Iterator<Item = (String, String)>) {
        for (name, value) in env {
            if let Some(variable) = find(&name) {
                self.set(variable, value, Origin::Environment);
            } else if let Some(meant) = nearest(&name, 2)
                && name.len() > 5
                && meant.len() > 5
                && same_initial(&name, meant)
                && !FOREIGN.contains(&name.as_str())
            {
                let name = shorten(&name, 64);
                self.warnings.push(format!("{name}: not a setting of this program; did you mean {meant}?"));
            }
        }
        // The order of an environment is arbitrary, and logs should not be.
        self.warnings.sort();
    }

    fn take_file(&mut self, path: &Path) {
        for entry in dotenv::read(path, &mut self.problems) {
            if let Some(variable) = find(&entry.name) {
                self.set(variable, entry.value, Origin::EnvFile);
            } else if !FAMILIES.iter().any(|family| entry.name.starts_with(family)) {
                let hint = match nearest(&entry.name, (entry.name.len() / 3).clamp(1, 3)) {
                    Some(meant) => format!("did you mean {meant}?"),
                    None => "remove it, or see --help for the settings".to_owned(),
                };
                let line = entry.line;
                let file = shorten(&path.display().to_string(), 64);
                let message = format!("not a setting of this program (line {line} of {file}); {hint}");
                self.problem(dotenv::subject(&entry.name, &file), message);
            }
        }
    }

    fn raw(&self, name: &str) -> Option<String> {
        self.values.get(name).map(|(value, _)| value.clone())
    }

    /// A value that may be absent; `None` also after a problem.
    fn optional<T>(
        &mut self,
        name: &'static str,
        read: impl Fn(&str) -> Result<T, parse::Valid>,
    ) -> Option<T> {
        let value = self.raw(name)?;
        self.read(name, &value, read)
    }

    /// A value whose default stands in the table; `None` only after a problem.
    fn required<T>(
        &mut self,
        name: &'static str,
        read: impl Fn(&str) -> Result<T, parse::Valid>,
    ) -> Option<T> {
        let default = find(name).map(|variable| variable.default).unwrap_or_default();
        let value = self.raw(name).unwrap_or_else(|| default.to_owned());
        self.read(name, &value, read)
    }

    fn read<T>(
        &mut self,
        name: &'static str,
        value: &str,
        read: impl Fn(&str) -> Result<T, parse::Valid>,
    ) -> Option<T> {
        match read(value) {
            Ok(value) => Some(value),
            Err(valid) if find(name).is_some_and(|variable| variable.secret) => {
                self.problem(name, format!("the value is not valid; valid: {valid}"));
                None
            }
            Err(valid) => {
                self.problem(name, format!("`{}` is not valid; valid: {valid}", show(value, 64)));
                None
            }
        }
    }

    fn later(&self) -> BTreeMap<&'static str, String> {
        let later = VARIABLES.iter().filter(|variable| variable.used == Since::Later);
        later.filter_map(|variable| Some((variable.name, self.raw(variable.name)?))).collect()
    }

    fn effective(&self) -> Vec<(&'static str, String, Origin)> {
        let entry = |variable: &Variable| match self.values.get(variable.name) {
            Some((value, origin)) if variable.secret => {
                (variable.name, format!("(set, {} characters)", value.chars().count()), *origin)
            }
            Some((value, origin)) => (variable.name, show(value, 256), *origin),
            None if variable.default.is_empty() => (variable.name, "unset".to_owned(), Origin::Default),
            None => (variable.name, variable.default.to_owned(), Origin::Default),
        };
        VARIABLES.iter().map(entry).collect()
    }
}

/// A value for people: short, on one line, and without the user and password that a URL may have.
fn show(value: &str, max: usize) -> String {
    if let Some((before, after)) = value.rsplit_once('@')
        && before.contains(':')
    {
        let scheme = before.find("://").map_or("", |index| &before[..index + 3]);
        return shorten(&format!("{scheme}***@{after}"), max);
    }
    shorten(value, max)
}

/// The variable that a misspelled name most likely means, at most `max` edits away.
fn nearest(name: &str, max: usize) -> Option<&'static str> {
    // Far longer names are never near, and measuring them takes time.
    if name.len() > 40 {
        return None;
    }
    let upper = name.to_ascii_uppercase();
    VARIABLES
        .iter()
        .map(|variable| (strsim::damerau_levenshtein(&upper, variable.name), variable.name))
        .filter(|(distance, _)| *distance <= max)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

fn same_initial(one: &str, other: &str) -> bool {
    one.bytes().next().map(|b| b.to_ascii_uppercase()) == other.bytes().next()
}
