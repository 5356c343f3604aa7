//! Packages from npm and PyPI: what is asked for, what is installed, and the jobs between the two.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::{
    error::WorkerError,
    ids::{ServerName, WorkerId},
    server::ServerRecord,
    timestamp::Timestamp,
};

pub mod names;
pub mod versions;

/// What runs a package, and so which registry it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runtime {
    /// Node, from npm.
    #[default]
    Node,
    /// Python, from PyPI.
    Python,
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Runtime::Node => "node",
            Runtime::Python => "python",
        })
    }
}

/// A package as it was asked for. Every text in it has passed the grammar of [`names`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PackageSpec {
    /// Its name in the registry: npm's, with its scope; or PyPI's, with extras.
    pub name: String,
    /// npm: a version, a range or a tag. PyPI: a version. `None`: the latest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What runs it.
    #[serde(default)]
    pub runtime: Runtime,
    /// The module that `python -m` runs, unless there is a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub python_module: Option<String>,
    /// Arguments behind the module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub python_args: Option<Vec<String>>,
    /// Specifications that are installed together with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_dependencies: Option<Vec<String>>,
    /// Where it comes from instead of PyPI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_index_url: Option<String>,
    /// Where else it may come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_extra_index_url: Option<String>,
    /// Whether a warning of npm or pip fails the installation.
    #[serde(default)]
    pub fail_on_warning: bool,
    /// Whether install scripts of npm packages are run, and Python packages are built from source.
    #[serde(default)]
    pub allow_scripts: bool,
}

/// What exactly is to be installed: every file by its hash. Workers make the same folder of it, whenever
/// and wherever they do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lock {
    /// What runs it.
    pub runtime: Runtime,
    /// The package's name, without extras.
    pub name: String,
    /// Its exact version.
    pub version: String,
    /// The files that the package manager reads: `package.json` and `package-lock.json`, or
    /// `requirements.txt` with hashes.
    pub files: BTreeMap<String, String>,
    /// Whether scripts may run.
    #[serde(default)]
    pub allow_scripts: bool,
    /// Packages that have install scripts, which were not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_scripts: Vec<String>,
    /// Where Python packages come from instead of PyPI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_index_url: Option<String>,
    /// Where else they may come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_extra_index_url: Option<String>,
    /// The version of Python that the hashes were resolved for, as `3.13`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub python: Option<String>,
}

/// The name of an installed lock: the hash of its contents. What has the same name is the same.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(String);

impl Generation {
    /// The name as text: `node-` or `python-`, and 24 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Reads a name; `None` if it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("node-").or_else(|| text.strip_prefix("python-"))?;
        let valid = digits.len() == 24 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        valid.then(|| Self(text.to_owned()))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Lock {
    /// Its name.
    pub fn generation(&self) -> Result<Generation, serde_json::Error> {
        // Fields in their order, and maps by their keys: the same lock is always the same text.
        let digest = Sha256::digest(serde_json::to_vec(self)?);
        let digits: String = digest.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        Ok(Generation(format!("{}-{digits}", self.runtime)))
    }
}

/// Which installation a server runs. It stands in the server's record, so that one write switches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PackageRef {
    /// The installation.
    pub generation: Generation,
    /// What runs it.
    pub runtime: Runtime,
    /// The documented path: `packages/<folder>`, or that of a virtual environment. Command and arguments
    /// that begin with it mean the installation.
    pub path: String,
}

/// An installed package, by the server that it runs. Field names are those of mcp-api's `packages`
/// collection; what we do not know is kept in `extra` and written back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PackageRecord {
    /// Its name in the registry.
    pub name: String,
    /// The version that is installed.
    pub version: String,
    /// The documented path, below `DATA_DIR` unless it is absolute.
    pub install_path: String,
    /// The same, for Python.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub venv_path: Option<String>,
    /// `installed`; records of mcp-api may say `installing` or `error`.
    pub status: String,
    /// When it was installed.
    pub installed: Timestamp,
    /// When it was last upgraded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_upgraded: Option<Timestamp>,
    /// The server that it runs.
    pub mcp_server_id: ServerName,
    /// Whether that may run.
    pub enabled: bool,
    /// What runs it.
    #[serde(default)]
    pub runtime: Runtime,
    /// See [`PackageSpec`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub python_module: Option<String>,
    /// See [`PackageSpec`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub python_args: Option<Vec<String>>,
    /// See [`PackageSpec`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_dependencies: Option<Vec<String>>,
    /// See [`PackageSpec`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_index_url: Option<String>,
    /// See [`PackageSpec`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_extra_index_url: Option<String>,
    /// See [`PackageSpec`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fail_on_warning: bool,
    /// See [`PackageSpec`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_scripts: bool,
    /// The latest version, when somebody last asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latest_version: Option<String>,
    /// Whether that is newer than the installed one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_available: Option<bool>,
    /// The installation. Records of mcp-api have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// Packages that have install scripts, which were not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped_scripts: Vec<String>,
    /// The argument that was found to start the server, to be found anew in another version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// The job that installed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_id: Option<String>,
    /// Fields that this version does not use.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl PackageRecord {
    /// What to ask for when it is installed anew in some version.
    pub fn spec(&self, version: Option<String>) -> PackageSpec {
        PackageSpec {
            name: self.name.clone(),
            version,
            runtime: self.runtime,
            python_module: self.python_module.clone(),
            python_args: self.python_args.clone(),
            pip_dependencies: self.pip_dependencies.clone(),
            pip_index_url: self.pip_index_url.clone(),
            pip_extra_index_url: self.pip_extra_index_url.clone(),
            fail_on_warning: self.fail_on_warning,
            allow_scripts: self.allow_scripts,
        }
    }
}

/// What a job is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// Install a package and register its server.
    Install,
    /// Install another version of it, and switch to that.
    Upgrade,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// It waits for a worker.
    Queued,
    /// A worker is at it.
    Running,
    /// It is done.
    Done,
    /// It failed for good.
    Failed,
}

impl JobState {
    /// Whether it will not change any more.
    pub fn is_over(self) -> bool {
        matches!(self, JobState::Done | JobState::Failed)
    }
}

/// An installation under way, or the last one of a server. There is one job for each server, so that no two
/// can be active; a new one takes the place of one that is over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Job {
    /// `<serverName>~<chance>`.
    pub id: String,
    /// The server that is installed or upgraded.
    pub server_name: ServerName,
    /// What it does.
    pub kind: JobKind,
    /// What is to be installed.
    pub spec: PackageSpec,
    /// The server to be registered, with an empty command where that follows from the package. Only for
    /// installations. Its variables are encrypted as those of servers are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerRecord>,
    /// For upgrades that may have to be taken back: the package as it was, and in `server` its server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<PackageRecord>,
    /// How far it is.
    pub state: JobState,
    /// Whether it is queued or running.
    pub active: bool,
    /// What it is doing, for people: `resolving`, `installing`, `starting`, ...
    #[serde(default)]
    pub phase: String,
    /// The worker that is at it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<WorkerId>,
    /// How often it was begun.
    pub attempts: u32,
    /// When it was ordered.
    pub created: Timestamp,
    /// When it was last heard of.
    pub updated: Timestamp,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Timestamp>,
    /// Not before this moment it is begun again after a failed attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before: Option<Timestamp>,
    /// What was said so far; the oldest lines go first when there are too many.
    #[serde(default)]
    pub log: Vec<String>,
    /// How many lines went.
    #[serde(default)]
    pub log_dropped: u64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WorkerError>,
    /// The version that was installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

impl Job {
    /// A job that nobody has begun.
    pub fn new(
        kind: JobKind,
        server_name: ServerName,
        spec: PackageSpec,
        server: Option<ServerRecord>,
    ) -> Self {
        let now = Timestamp::now();
        let chance = uuid::Uuid::new_v4().simple().to_string();
        Self {
            id: format!("{server_name}~{}", &chance[..12]),
            server_name,
            kind,
            spec,
            server,
            previous: None,
            state: JobState::Queued,
            active: true,
            phase: "queued".to_owned(),
            owner: None,
            attempts: 0,
            created: now,
            updated: now,
            finished: None,
            not_before: None,
            log: Vec::new(),
            log_dropped: 0,
            error: None,
            version: None,
        }
    }

    /// The server that a job's id names; `None` if it is no id.
    pub fn server_of(id: &str) -> Option<ServerName> {
        let (server, _) = id.rsplit_once('~')?;
        ServerName::parse_existing(server).ok()
    }

    /// Adds a line to the log.
    pub fn note(&mut self, line: impl Into<String>) {
        self.log.push(crate::error::shorten(&line.into(), crate::limits::JOB_LINE_BYTES));
        while self.log.len() > crate::limits::JOB_LOG_LINES {
            self.log.remove(0);
            self.log_dropped += 1;
        }
    }
}

/// Which package's latest version is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LatestQuery {
    /// Its name, without extras.
    pub name: String,
    /// Which registry.
    pub runtime: Runtime,
    /// Where a Python package comes from instead of PyPI.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_index_url: Option<String>,
    /// Where else it may come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pip_extra_index_url: Option<String>,
}

/// The latest version of a package, or why it is not known.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Latest {
    /// This one.
    Version(String),
    /// The registry did not say.
    Unknown(WorkerError),
}
