//! npm, pip and uv against a registry made by hand.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use mcp_shared::{
    config::PackageSettings,
    error::{ErrorCode, WorkerError},
    package::{Latest, LatestQuery, Lock, PackageSpec, Runtime},
    server::{Transport, Variables},
    testing::{
        registry::{Fault, Registry, Wheel, node_server, python_server},
        tools,
    },
};
use mcp_worker::{
    packages::managers::{Bounds, Managers, Work},
    supervisor::Supervisor,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

mod npm;
mod python;

/// The Python of all tests; asking for it takes longer than some of them.
static PYTHON: LazyLock<PathBuf> = LazyLock::new(tools::python);

/// Which of the two installs Python packages.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Installer {
    Pip,
    Uv,
}

/// A registry, and what installs from it.
struct Bench {
    registry: Registry,
    folder: TempDir,
    supervisor: Supervisor,
    said: Arc<Mutex<Vec<String>>>,
    cancelled: CancellationToken,
    settings: PackageSettings,
    environment: BTreeMap<String, String>,
    managers: Managers,
}

impl Bench {
    fn new() -> Self {
        Self::with(Installer::Pip, Bounds::default())
    }

    fn with(installer: Installer, bounds: Bounds) -> Self {
        let (registry, folder) = (Registry::start(), tempfile::tempdir().unwrap());
        let mut path = std::env::var("PATH").unwrap();
        // Where uv is on the machine, it must not be found by who tests pip.
        let has_uv = |folder: &PathBuf| folder.join("uv").exists();
        path = std::env::join_paths(std::env::split_paths(&path).filter(|folder| !has_uv(folder)))
            .unwrap()
            .into_string()
            .unwrap();
        if installer == Installer::Uv {
            path = format!("{}:{path}", tools::uv().display());
        }
        let environment = BTreeMap::from([
            ("PATH".to_owned(), path),
            ("HOME".to_owned(), folder.path().to_str().unwrap().to_owned()),
            ("npm_config_registry".to_owned(), registry.npm_url()),
            ("PIP_CONFIG_FILE".to_owned(), "/dev/null".to_owned()),
            ("OUR_OWN_SECRET".to_owned(), "canary".to_owned()),
        ]);
        let settings = PackageSettings {
            python_bin: Some(PYTHON.clone()),
            pip_index_url: Some(registry.pip_url().into()),
            ..PackageSettings::default()
        };
        Self {
            managers: Managers::with(&settings, environment.clone(), bounds),
            registry,
            folder,
            supervisor: Supervisor::new(std::env::current_exe().unwrap()),
            said: Arc::default(),
            cancelled: CancellationToken::new(),
            settings,
            environment,
        }
    }

    fn work(&self) -> Work<'_> {
        let said = Arc::clone(&self.said);
        Work {
            supervisor: &self.supervisor,
            say: Arc::new(move |line| said.lock().unwrap().push(line.to_owned())),
            cancelled: &self.cancelled,
        }
    }

    /// A new empty folder.
    fn empty(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    async fn resolve(&self, spec: &PackageSpec) -> Result<Lock, WorkerError> {
        let scratch = self.empty("scratch");
        let lock = self.managers.resolve(spec, &scratch, &self.work()).await;
        self.nothing_runs();
        lock
    }

    async fn build(&self, lock: &Lock) -> Result<PathBuf, WorkerError> {
        let folder = self.empty("built");
        let built = self.managers.build(lock, &folder, &self.work()).await;
        self.nothing_runs();
        built.map(|()| folder)
    }

    async fn install(&self, spec: &PackageSpec) -> (Lock, PathBuf) {
        let lock = self.resolve(spec).await.unwrap();
        let folder = self.build(&lock).await.unwrap();
        for left in [".tmp", ".cache"] {
            assert!(!folder.join(left).exists(), "{left} was left behind");
        }
        (lock, folder)
    }

    async fn latest(&self, runtime: Runtime, name: &str) -> Result<String, WorkerError> {
        let query =
            LatestQuery { name: name.into(), runtime, pip_index_url: None, pip_extra_index_url: None };
        match self.managers.latest(&query, &self.empty("scratch"), &self.work()).await {
            Latest::Version(version) => Ok(version),
            Latest::Unknown(error) => Err(error),
        }
    }

    /// No process has this bench's folder in its arguments, environment or as its own.
    fn nothing_runs(&self) {
        let own = self.folder.path().to_str().unwrap();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let path = entry.path();
            let text = |name: &str| {
                String::from_utf8_lossy(&std::fs::read(path.join(name)).unwrap_or_default()).into_owned()
            };
            let there = std::fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd.starts_with(own));
            // One that ended and was not taken in by its parent has none of these.
            assert!(
                !there && !text("environ").contains(own),
                "{} is left: {}",
                path.display(),
                text("cmdline")
            );
        }
    }

    fn entry(
        &self,
        spec: &PackageSpec,
        command: &str,
        args: &[&str],
        folder: &Path,
    ) -> Result<(String, Vec<String>), WorkerError> {
        let given = Transport::Stdio {
            command: command.to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: Variables::default(),
        };
        match self.managers.entry_point(spec, &given, folder, "packages/x")? {
            Transport::Stdio { command, args, .. } => Ok((command, args)),
            Transport::StreamableHttp { .. } => panic!("this has no command"),
        }
    }
}

fn npm(name: &str, version: Option<&str>) -> PackageSpec {
    PackageSpec { name: name.to_owned(), version: version.map(str::to_owned), ..PackageSpec::default() }
}

fn python(name: &str, version: Option<&str>) -> PackageSpec {
    PackageSpec { runtime: Runtime::Python, ..npm(name, version) }
}

/// The answer of a server to `initialize`, run in a folder.
fn ask_server(command: &Path, args: &[&str], folder: &Path) -> String {
    use std::io::{BufRead, BufReader, Write};
    let mut child = std::process::Command::new(command)
        .args(args)
        .current_dir(folder)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let question =
        r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18"}}"#;
    writeln!(child.stdin.take().unwrap(), "{question}").unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    line
}

fn details(error: &WorkerError) -> &str {
    error.details.get("details").and_then(|details| details.as_str()).unwrap_or_default()
}
