//! npm, and pip or uv, behind one face. Each is asked for two things apart: to **resolve** what was asked
//! for to a [`Lock`], and to **build** a folder from a lock. The first installation takes the second way as
//! well, so that every other one is the same.
//!
//! Programs are run by their own command lines, without a shell, with an environment made for them, in
//! groups of their own that end with this worker.

use std::{collections::BTreeMap, path::Path, path::PathBuf, sync::Arc, time::Duration};

use mcp_shared::{
    config::PackageSettings,
    error::{ErrorCode, WorkerError, shorten},
    limits,
    package::{Latest, LatestQuery, Lock, PackageSpec, Runtime, names},
    server::Transport,
};
use tokio_util::sync::CancellationToken;

use crate::supervisor::{Supervisor, this_program};

mod clean;
mod command;
mod entry;
mod environment;
mod errors;
mod npm;
mod python;
mod requirements;
mod usage;

use command::Order;
use environment::Environment;
use python::{Indexes, Interpreter};

/// Takes the lines that a package manager says, for the log of a job. Lines hold no secrets.
pub type Say = Arc<dyn Fn(&str) + Send + Sync>;

/// What running a package manager needs.
pub struct Work<'a> {
    /// Starts processes and ends them.
    pub supervisor: &'a Supervisor,
    /// Takes what is said.
    pub say: Say,
    /// Ends the processes at once.
    pub cancelled: &'a CancellationToken,
}

/// How much a package manager may take. The default is what [`limits`] says.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// For all of a resolution, and for all of a build.
    pub time: Duration,
    /// Without a word, and without anything being written.
    pub silence: Duration,
    /// To learn which version is the latest.
    pub latest: Duration,
    /// In the folder.
    pub bytes: u64,
    /// In the folder.
    pub files: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            time: limits::INSTALL_TIMEOUT,
            silence: limits::INSTALL_SILENCE,
            latest: limits::LATEST_TIMEOUT,
            bytes: limits::INSTALL_BYTES,
            files: limits::INSTALL_FILES,
        }
    }
}

/// What programs that reach registries get of this process' environment, and nothing of ours.
pub(crate) fn passed_on() -> Vec<(String, String)> {
    let all = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let environment = Environment::of(all.collect());
    environment.variables().map(|(name, value)| (name.clone(), value.as_str().to_owned())).collect()
}

/// What can make a package's folder on this machine.
pub struct Managers {
    environment: Environment,
    bounds: Bounds,
    python_bin: Option<PathBuf>,
    indexes: Indexes,
    /// What was found out about Python, until it is gone.
    python: tokio::sync::Mutex<Option<Arc<Interpreter>>>,
}

impl Managers {
    /// Nothing is run or looked for yet.
    pub fn new(settings: &PackageSettings) -> Self {
        // Names and values that are no text cannot be settings of npm or pip.
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::with(settings, environment.collect(), Bounds::default())
    }

    /// The same with another environment than this process', and other bounds.
    pub fn with(settings: &PackageSettings, environment: BTreeMap<String, String>, bounds: Bounds) -> Self {
        Self {
            environment: Environment::of(environment),
            bounds,
            python_bin: settings.python_bin.clone(),
            indexes: Indexes::of(settings),
            python: tokio::sync::Mutex::default(),
        }
    }

    /// Resolves what was asked for. `scratch` is an empty folder, which the caller removes.
    pub async fn resolve(
        &self,
        spec: &PackageSpec,
        scratch: &Path,
        work: &Work<'_>,
    ) -> Result<Lock, WorkerError> {
        check(spec)?;
        let order = Order::new(&self.environment, self.bounds, self.bounds.time, scratch, work).await?;
        let lock = match spec.runtime {
            Runtime::Node => npm::resolve(&order, spec).await,
            Runtime::Python => self.resolve_python(&order, spec).await,
        };
        order.finish(lock).await
    }

    /// Makes what a lock says in a folder that is empty, at the path where it stays. A hash that differs
    /// is [`mcp_shared::error::ErrorCode::IntegrityMismatch`].
    pub async fn build(&self, lock: &Lock, folder: &Path, work: &Work<'_>) -> Result<(), WorkerError> {
        let order = Order::new(&self.environment, self.bounds, self.bounds.time, folder, work).await?;
        let built = match lock.runtime {
            Runtime::Node => npm::build(&order, lock).await,
            Runtime::Python => self.build_python(&order, lock).await,
        };
        order.finish(built).await
    }

    /// How the server of an installed package is started, with the documented path (`packages/...`) in
    /// place of the folder. `given` is what the request says of command, arguments and environment; its
    /// command is empty where it says nothing.
    pub fn entry_point(
        &self,
        spec: &PackageSpec,
        given: &Transport,
        folder: &Path,
        documented: &str,
    ) -> Result<Transport, WorkerError> {
        let Transport::Stdio { command, args, env } = given else { return Ok(given.clone()) };
        let (command, args) = match spec.runtime {
            Runtime::Node => entry::node(spec, (command, args), folder, documented)?,
            Runtime::Python => entry::python(spec, (command, args), folder, documented, &self.environment)?,
        };
        Ok(Transport::Stdio { command, args, env: env.clone() })
    }

    /// The latest version of a package.
    pub async fn latest(&self, query: &LatestQuery, scratch: &Path, work: &Work<'_>) -> Latest {
        let asked = async {
            if !name_is_valid(query.runtime, &query.name) {
                return Err(invalid_name(&query.name));
            }
            let order = Order::new(&self.environment, self.bounds, self.bounds.latest, scratch, work).await?;
            let latest = match query.runtime {
                Runtime::Node => npm::latest(&order, &query.name).await,
                Runtime::Python => self.latest_python(&order, query).await,
            };
            order.finish(latest).await
        };
        match asked.await {
            Ok(version) => Latest::Version(version),
            // Nobody waits longer for a word of a registry than for an answer of another kind.
            Err(error) if error.code == ErrorCode::InstallTimeout => {
                let message = "The package registry did not answer in time";
                Latest::Unknown(WorkerError { message: message.to_owned(), ..recoded(error) })
            }
            Err(error) => Latest::Unknown(error),
        }
    }

    /// What Python packages would be built for, as `3.13`; `None` for npm.
    pub async fn target(&self, runtime: Runtime) -> Option<String> {
        if runtime == Runtime::Node {
            return None;
        }
        // A supervisor of its own, which goes with it: nobody who asks this has one at hand.
        let supervisor = Supervisor::new(this_program());
        let cancelled = CancellationToken::new();
        let work = Work { supervisor: &supervisor, say: Arc::new(|_| {}), cancelled: &cancelled };
        match self.interpreter(&work).await {
            Ok(python) => Some(python.version.clone()),
            Err(error) => {
                tracing::debug!(%error, "there is no Python");
                None
            }
        }
    }
}

fn recoded(error: WorkerError) -> WorkerError {
    WorkerError { code: ErrorCode::RegistryUnavailable, ..error }
}

/// What was asked for has passed the grammar where it came in. It is looked at again where it leaves: a
/// record in the store, which others can write, may have brought it here.
fn check(spec: &PackageSpec) -> Result<(), WorkerError> {
    if !name_is_valid(spec.runtime, &spec.name) {
        return Err(invalid_name(&spec.name));
    }
    let invalid = |code: ErrorCode, what: &str, text: &str| {
        let text = shorten(text, 64);
        Err(WorkerError::new(code, format!("{text} is not {what}")))
    };
    if let Some(version) = &spec.version {
        let code = ErrorCode::InvalidVersion;
        match spec.runtime {
            Runtime::Node if !names::npm_version(version) => {
                return invalid(code, "a version, a range or a tag of npm", version);
            }
            Runtime::Python if !names::python_version(version) => {
                return invalid(code, "a version of a Python package", version);
            }
            _ => {}
        }
    }
    for dependency in spec.pip_dependencies.iter().flatten() {
        if !names::pip_dependency(dependency) {
            let what = "a specification of a Python package";
            return invalid(ErrorCode::InvalidRequest, what, dependency);
        }
    }
    for url in [&spec.pip_index_url, &spec.pip_extra_index_url].into_iter().flatten() {
        if let Err(rule) = names::index_url(url) {
            return Err(WorkerError::new(ErrorCode::InvalidRequest, format!("The index's address {rule}")));
        }
    }
    Ok(())
}

fn name_is_valid(runtime: Runtime, name: &str) -> bool {
    match runtime {
        Runtime::Node => names::npm_name(name),
        Runtime::Python => names::python_name(name),
    }
}

fn invalid_name(name: &str) -> WorkerError {
    let name = shorten(name, 64);
    WorkerError::new(ErrorCode::InvalidPackageName, format!("{name} is not the name of a package"))
}
