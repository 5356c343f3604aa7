//! Python: a virtual environment, filled by uv where there is one, and by pip otherwise.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use mcp_shared::{
    config::PackageSettings,
    error::{ErrorCode, WorkerError},
    package::{LatestQuery, Lock, PackageSpec, Runtime, names},
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::{
    Managers, Work,
    command::{self, Order, Program, Ran},
    errors::{self, Asked, canonical, failed},
    requirements::{self, Pinned},
};

/// The file with what is wanted.
const WANTED: &str = "requirements.in";
/// The file of a lock.
const LOCK: &str = "requirements.txt";
/// What pip says in detail.
const LOG: &str = ".tmp/pip.log";
/// What pip would install.
const REPORT: &str = ".tmp/report.json";

/// Says what a Python is. The current folder is taken out of where modules are looked for.
const PROBE: &str = "\
import sys
sys.path = [path for path in sys.path if path]
import json, platform
try:
    import pip
    pip = pip.__version__
except Exception:
    pip = ''
print(json.dumps({
    'executable': sys.executable,
    'version': '%d.%d' % sys.version_info[:2],
    'platform': sys.platform + ' ' + platform.machine(),
    'pip': pip,
}))";

/// The Python that makes virtual environments.
#[derive(Debug, Deserialize)]
pub(super) struct Interpreter {
    /// Itself, behind whatever starts it.
    executable: PathBuf,
    /// Such as `3.13`.
    pub(super) version: String,
    /// Such as `linux x86_64`.
    platform: String,
    /// The version of its pip; empty if it has none.
    pip: String,
}

impl Interpreter {
    /// Whether its pip can install into the environment of another.
    fn has_pip(&self) -> bool {
        let mut numbers = self.pip.split('.').map_while(|part| part.parse::<u32>().ok());
        (numbers.next(), numbers.next()) >= (Some(22), Some(3))
    }
}

/// Where packages come from.
#[derive(Clone, Default)]
pub(super) struct Indexes {
    main: Option<SecretString>,
    extra: Option<SecretString>,
}

impl Indexes {
    /// What the operator set.
    pub(super) fn of(settings: &PackageSettings) -> Self {
        Self { main: settings.pip_index_url.clone(), extra: settings.pip_extra_index_url.clone() }
    }

    /// What is used for a package: who names an index for it gets nothing from another one.
    fn or_given(&self, main: Option<&String>, extra: Option<&String>) -> Self {
        let given = |url: Option<&String>| url.map(|url| SecretString::from(url.as_str()));
        match (given(main), given(extra)) {
            (None, None) => self.clone(),
            (None, extra) => Self { main: self.main.clone(), extra },
            (main, extra) => Self { main, extra },
        }
    }

    /// As variables, since everybody can read the arguments of processes and these may hold passwords.
    fn variables(&self) -> Vec<(&'static str, Zeroizing<String>)> {
        let mut all = Vec::new();
        for (url, names) in [
            (&self.main, ["PIP_INDEX_URL", "UV_DEFAULT_INDEX"]),
            (&self.extra, ["PIP_EXTRA_INDEX_URL", "UV_INDEX"]),
        ] {
            if let Some(url) = url {
                all.extend(names.map(|name| (name, Zeroizing::new(url.expose_secret().to_owned()))));
            }
        }
        all
    }
}

/// What a question or an installation is done with.
struct Tools<'a> {
    order: &'a Order<'a>,
    python: Arc<Interpreter>,
    uv: Option<PathBuf>,
    indexes: Indexes,
}

impl Managers {
    /// Which Python there is.
    pub(super) async fn interpreter(&self, work: &Work<'_>) -> Result<Arc<Interpreter>, WorkerError> {
        let mut known = self.python.lock().await;
        if let Some(python) = known.as_ref().filter(|python| python.executable.exists()) {
            return Ok(Arc::clone(python));
        }
        let found = match &self.python_bin {
            Some(path) if path.components().count() > 1 => Some(path.clone()),
            Some(name) => name.to_str().and_then(|name| self.environment.find(name)),
            None => self.environment.find("python3").or_else(|| self.environment.find("python")),
        };
        let missing = |why: &str| WorkerError::new(ErrorCode::RuntimeMissing, why);
        let path = found.ok_or_else(|| missing("This worker has no Python in PATH"))?;
        let args = vec!["-c".to_owned(), PROBE.to_owned()];
        let program = Program { path, args, env: Vec::new(), answers: true };
        let ran = command::ask(&self.environment, program, work).await?;
        let python: Interpreter = serde_json::from_str(&ran.answer)
            .map_err(|_| errors::with_words(missing("This worker's Python does not work"), &ran.said))?;
        let python = Arc::new(python);
        *known = Some(Arc::clone(&python));
        Ok(python)
    }

    pub(super) async fn resolve_python(
        &self,
        order: &Order<'_>,
        spec: &PackageSpec,
    ) -> Result<Lock, WorkerError> {
        let tools = self.tools(order, spec.pip_index_url.as_ref(), spec.pip_extra_index_url.as_ref()).await?;
        let (name, _) = names::split_extras(&spec.name).unwrap_or((&spec.name, ""));
        let dependencies = spec.pip_dependencies.as_deref().unwrap_or_default();
        let others = dependencies.iter().map(|wanted| canonical(requirements::name(wanted))).collect();
        let asked = Asked { name, version: spec.version.as_deref(), others };
        let main = match &spec.version {
            Some(version) => format!("{}=={version}", spec.name),
            None => spec.name.clone(),
        };
        let wanted: Vec<&str> =
            std::iter::once(main.as_str()).chain(dependencies.iter().map(String::as_str)).collect();
        order.write(WANTED, &(wanted.join("\n") + "\n")).await?;
        let (ran, pinned) = match &tools.uv {
            Some(uv) => tools.resolve_with_uv(uv, spec.allow_scripts, &asked).await?,
            None => tools.resolve_with_pip(spec.allow_scripts, &asked).await?,
        };
        if spec.fail_on_warning {
            refuse_warnings(&ran, &asked)?;
        }
        let version = pinned
            .iter()
            .find(|pinned| pinned.name == canonical(name))
            .map(|pinned| pinned.version.clone())
            .ok_or_else(|| failed(format!("The resolution does not have {}", asked.label())))?;
        let made_for = format!("Python {}, {}", tools.python.version, tools.python.platform);
        Ok(Lock {
            runtime: Runtime::Python,
            name: name.to_owned(),
            version,
            files: BTreeMap::from([(LOCK.to_owned(), requirements::render(&pinned, &made_for))]),
            allow_scripts: spec.allow_scripts,
            skipped_scripts: Vec::new(),
            pip_index_url: spec.pip_index_url.clone(),
            pip_extra_index_url: spec.pip_extra_index_url.clone(),
            python: Some(tools.python.version.clone()),
        })
    }

    pub(super) async fn build_python(&self, order: &Order<'_>, lock: &Lock) -> Result<(), WorkerError> {
        let tools = self.tools(order, lock.pip_index_url.as_ref(), lock.pip_extra_index_url.as_ref()).await?;
        let text = lock.files.get(LOCK).ok_or_else(|| failed("The stored lock has no requirements"))?;
        let asked = Asked { name: &lock.name, version: Some(&lock.version), others: Vec::new() };
        // What is stored may have been changed by somebody else: it is held to the same rules.
        requirements::read(text).filter(|pinned| !pinned.is_empty()).ok_or_else(|| {
            failed(format!("The stored lock of {} is not one of versions and hashes", asked.label()))
        })?;
        order.write(LOCK, text).await?;
        let python = tools.environment(tools.uv.is_none()).await?;
        let ran = match &tools.uv {
            Some(uv) => {
                let mut args = vec!["pip", "install", "--compile-bytecode", "--require-hashes", "--no-deps"];
                args.extend(["--link-mode=hardlink", "--python", &python]);
                tools.uv(uv, &args, lock.allow_scripts, LOCK, false).await?
            }
            None => {
                let mut args = vec!["install", "--require-hashes", "--no-deps"];
                args.extend(only_wheels(lock.allow_scripts));
                args.extend(["-r", LOCK]);
                tools.pip(Some(&python), &args, false).await?
            }
        };
        if ran.succeeded() {
            // Which uv leaves there.
            let _ = tokio::fs::remove_file(order.folder.join(".lock")).await;
            return Ok(());
        }
        let error = errors::python(&asked, &ran, &tools.log().await);
        let ours = &tools.python.version;
        let theirs = lock.python.as_ref().filter(|theirs| *theirs != ours);
        let made_for = requirements::made_for(text);
        let here = format!("Python {ours}, {}", tools.python.platform);
        // Another Python, or another machine, takes other files, whose hashes the lock may not have.
        let other = matches!(
            error.code,
            ErrorCode::IntegrityMismatch
                | ErrorCode::InstallFailed
                | ErrorCode::VersionNotFound
                | ErrorCode::PackageNotFound
        ) && (theirs.is_some() || made_for.as_ref().is_some_and(|made_for| *made_for != here));
        if !other {
            return Err(error);
        }
        let made_for = made_for.unwrap_or_else(|| format!("Python {}", theirs.cloned().unwrap_or_default()));
        Err(WorkerError {
            code: ErrorCode::InstallFailed,
            message: format!(
                "{} was resolved for {made_for}, and this worker has {here}: the same files do not fit here",
                asked.label()
            ),
            ..error
        })
    }

    pub(super) async fn latest_python(
        &self,
        order: &Order<'_>,
        query: &LatestQuery,
    ) -> Result<String, WorkerError> {
        let (main, extra) = (query.pip_index_url.as_ref(), query.pip_extra_index_url.as_ref());
        let tools = self.tools(order, main, extra).await?;
        let (name, _) = names::split_extras(&query.name).unwrap_or((&query.name, ""));
        let asked = Asked { name, version: None, others: Vec::new() };
        let unclear = || {
            WorkerError::new(
                ErrorCode::RegistryUnavailable,
                format!("The registry did not say which version of {} is the latest", asked.label()),
            )
        };
        if let Some(uv) = &tools.uv {
            order.write(WANTED, &format!("{name}\n")).await?;
            let python = tools.python.executable.to_string_lossy().into_owned();
            let args = ["pip", "compile", "--no-deps", "--no-header", "--no-annotate", "--python", &python];
            let ran = tools.uv(uv, &args, true, WANTED, true).await?;
            if !ran.succeeded() {
                return Err(errors::python(&asked, &ran, ""));
            }
            let line = ran.answer.lines().find_map(|line| line.split_once("=="));
            return line.map(|(_, version)| version.trim().to_owned()).ok_or_else(unclear);
        }
        let own = match tools.python.pip.is_empty() {
            true => Some(tools.environment_at(".tmp/venv", true).await?),
            false => None,
        };
        let ran = tools.pip(own.as_deref(), &["index", "versions", "--", name], true).await?;
        if !ran.succeeded() {
            return Err(errors::python(&asked, &ran, &tools.log().await));
        }
        // `NAME (VERSION)`, and then all of them.
        let line = ran.answer.lines().find_map(|line| line.trim().strip_suffix(')')?.rsplit_once('('));
        line.map(|(_, version)| version.trim().to_owned()).ok_or_else(unclear)
    }

    async fn tools<'a>(
        &'a self,
        order: &'a Order<'a>,
        main: Option<&String>,
        extra: Option<&String>,
    ) -> Result<Tools<'a>, WorkerError> {
        Ok(Tools {
            order,
            python: self.interpreter(order.work).await?,
            uv: self.environment.find("uv"),
            indexes: self.indexes.or_given(main, extra),
        })
    }
}

impl Tools<'_> {
    async fn resolve_with_uv(
        &self,
        uv: &std::path::Path,
        allow_scripts: bool,
        asked: &Asked<'_>,
    ) -> Result<(Ran, Vec<Pinned>), WorkerError> {
        let python = self.python.executable.to_string_lossy().into_owned();
        let mut args = vec!["pip", "compile", "--generate-hashes", "--no-header", "--no-annotate"];
        args.extend(["--python", &python]);
        let ran = self.uv(uv, &args, allow_scripts, WANTED, true).await?;
        if !ran.succeeded() {
            return Err(errors::python(asked, &ran, ""));
        }
        let pinned = requirements::read(&ran.answer).ok_or_else(|| {
            failed(format!("{} needs something that is not in the registry", asked.label()))
        })?;
        Ok((ran, pinned))
    }

    async fn resolve_with_pip(
        &self,
        allow_scripts: bool,
        asked: &Asked<'_>,
    ) -> Result<(Ran, Vec<Pinned>), WorkerError> {
        // An environment of its own, so that nothing that is installed already has a say.
        let python = self.environment_at(".tmp/venv", true).await?;
        let mut args = vec!["install", "--dry-run", "--ignore-installed", "--report", REPORT];
        args.extend(only_wheels(allow_scripts));
        args.extend(["-r", WANTED]);
        let ran = self.pip(Some(&python), &args, false).await?;
        if !ran.succeeded() {
            return Err(errors::python(asked, &ran, &self.log().await));
        }
        let report = self.order.read(REPORT).await?;
        let pinned = requirements::of_report(&report).ok_or_else(|| {
            failed(format!("{} needs something that is not in the registry", asked.label()))
        })?;
        Ok((ran, pinned))
    }

    /// Makes a virtual environment of the folder; its Python.
    async fn environment(&self, with_pip: bool) -> Result<String, WorkerError> {
        self.environment_at(".", with_pip).await
    }

    /// Makes a virtual environment in the folder; its Python. Where the worker's Python has no pip to fill
    /// it with, it gets one of its own.
    async fn environment_at(&self, place: &str, with_pip: bool) -> Result<String, WorkerError> {
        let mut args = vec!["-m", "venv"];
        if !with_pip || self.python.has_pip() {
            args.push("--without-pip");
        }
        args.push(place);
        let ran = self.python(&args, false).await?;
        if !ran.succeeded() {
            let disk = ran.said.iter().any(|line| line.contains("No space left on device"));
            let (code, message) = match disk {
                true => (ErrorCode::DiskFull, "The worker's disk has no room for a virtual environment"),
                false => (
                    ErrorCode::RuntimeMissing,
                    "This worker's Python cannot make virtual environments, or has no pip",
                ),
            };
            return Err(errors::with_words(WorkerError::new(code, message), &ran.said));
        }
        let place = self.order.folder.join(place).join("bin").join("python");
        Ok(place.to_string_lossy().into_owned())
    }

    /// Runs pip: that of the worker's Python, or that of the environment if only it has one.
    async fn pip(&self, python: Option<&str>, args: &[&str], answers: bool) -> Result<Ran, WorkerError> {
        let mut all = vec!["-m", "pip"];
        let mut path = self.python.executable.clone();
        if let Some(python) = python {
            if self.python.has_pip() {
                all.extend(["--python", python]);
            } else {
                path = PathBuf::from(python);
            }
        }
        all.extend(["--no-input", "--disable-pip-version-check", "--no-color", "--log", LOG]);
        all.extend(["--retries", "1", "--timeout", "30", "--no-cache-dir"]);
        let (command, rest) = args.split_first().unwrap_or((&"", &[]));
        all.push(command);
        if *command == "install" {
            all.extend(["--progress-bar", "off", "--root-user-action", "ignore", "--no-user"]);
        }
        all.extend(rest);
        self.run(path, &all, answers).await
    }

    async fn python(&self, args: &[&str], answers: bool) -> Result<Ran, WorkerError> {
        self.run(self.python.executable.clone(), args, answers).await
    }

    async fn uv(
        &self,
        uv: &std::path::Path,
        args: &[&str],
        allow_scripts: bool,
        file: &str,
        answers: bool,
    ) -> Result<Ran, WorkerError> {
        let mut all = args.to_vec();
        let cache = self.order.cache().to_string_lossy().into_owned();
        all.extend(["--no-config", "--no-progress", "--color=never", "--no-python-downloads"]);
        // As pip does, so that both find the same.
        all.extend(["--index-strategy=unsafe-best-match", "--cache-dir", &cache]);
        all.extend(only_wheels(allow_scripts));
        if args.get(1) == Some(&"install") {
            all.push("-r");
        }
        all.push(file);
        self.run(uv.to_owned(), &all, answers).await
    }

    async fn run(&self, path: PathBuf, args: &[&str], answers: bool) -> Result<Ran, WorkerError> {
        let mut env = self.indexes.variables();
        for (name, value) in [("UV_HTTP_TIMEOUT", "30"), ("UV_HTTP_RETRIES", "1"), ("PYTHONUNBUFFERED", "1")]
        {
            env.push((name, Zeroizing::new(value.to_owned())));
        }
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        self.order.run(Program { path, args, env, answers }).await
    }

    /// What pip wrote about its last run, as far as it can matter.
    async fn log(&self) -> String {
        self.order.read(LOG).await.unwrap_or_default()
    }
}

/// What keeps packages from being built, which runs their code.
fn only_wheels(allow_scripts: bool) -> &'static [&'static str] {
    if allow_scripts { &[] } else { &["--only-binary", ":all:"] }
}

/// Warnings of pip and uv about packages. That something was tried again is none.
fn refuse_warnings(ran: &Ran, asked: &Asked<'_>) -> Result<(), WorkerError> {
    let warnings: Vec<String> = ran
        .said
        .iter()
        .filter(|line| {
            let text = line.trim_start();
            text.starts_with("WARNING:") || text.starts_with("DEPRECATION:") || text.starts_with("warning:")
        })
        .filter(|line| !line.contains("Retrying"))
        .cloned()
        .collect();
    if warnings.is_empty() {
        return Ok(());
    }
    let message = format!("pip or uv warned about {}", asked.label());
    Err(errors::with_words(WorkerError::new(ErrorCode::InstallWarnings, message), &warnings))
}
