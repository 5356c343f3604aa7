//! Real MCP servers to test against, obtained once per target folder.
//!
//! A fixture proves that we understand the protocol as we read it; other people's servers prove that
//! they read it the same way. Each is pinned, installed by its ecosystem's own client into
//! `<target>/test-servers/<name>-<version>/` on first use and kept there, so only the first test run
//! needs the network. Several test processes may ask at once: one installs, the others wait for it.
//!
//! The target folder is `CARGO_TARGET_DIR` if that is set for the test, else the nearest folder above
//! the running program in which Cargo left its `CACHEDIR.TAG`.
//!
//! What cannot be obtained is a panic that says what to install: a test that needs a real server and
//! silently passes without it would be worse.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "this is test support: a failure should end the test loudly"
)]

use std::{
    env, fs,
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The Node server that shows every feature of the protocol.
pub const SERVER_EVERYTHING: &str = "@modelcontextprotocol/server-everything";
/// The version of [`SERVER_EVERYTHING`] that tests run.
pub const SERVER_EVERYTHING_VERSION: &str = "2026.8.31";
/// A small Python server with two tools.
pub const SERVER_TIME: &str = "mcp-server-time";
/// The version of [`SERVER_TIME`] that tests run.
pub const SERVER_TIME_VERSION: &str = "2026.10.19";
/// The library that most Python servers are made with.
pub const FASTMCP: &str = "fastmcp";
/// The version of [`FASTMCP`] that tests run.
pub const FASTMCP_VERSION: &str = "4.1.2";

/// Another program that puts MCP servers behind HTTP.
pub const MCPO: &str = "mcpo";
/// The version of [`MCPO`] that load tests run.
pub const MCPO_VERSION: &str = "0.0.20";

/// The version of uv that tests install Python packages with.
pub const UV_VERSION: &str = "0.13.9";

/// The oldest Node.js and Python that the servers run on.
const NODE_AT_LEAST: (u32, u32) = (20, 0);
const PYTHON_AT_LEAST: (u32, u32) = (3, 10);

const NODE_NEEDED: &str = "Node.js 20 or newer with npm is needed to test against real MCP servers: install it and see that \
     `node` and `npm` are in PATH.";
const PYTHON_NEEDED: &str =
    "Python 3.10 or newer is needed to run test servers: install it and see that `python3` is in PATH.";
const VENV_NEEDED: &str = "Python's venv module is needed to run test servers: install it (the package `python3-venv` \
     on Debian and Ubuntu).";
const REGISTRY_NEEDED: &str = "It is installed from its registry on first use, which needs the network \
     (or a mirror in the settings of npm or pip).";

/// Says that a folder is complete.
const MARKER: &str = "complete";

/// How to start a real MCP server that speaks over standard input and output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RealServer {
    /// The absolute path of the interpreter.
    pub command: String,
    /// Its arguments, with absolute paths.
    pub args: Vec<String>,
    /// The version of the package.
    pub version: &'static str,
}

/// The Node server [`SERVER_EVERYTHING`]: 13 tools, among them `echo(message)` and `get-sum(a, b)`.
///
/// # Panics
///
/// Says what to install when it cannot be obtained.
pub fn server_everything() -> RealServer {
    let node = program(&["node"], NODE_AT_LEAST).unwrap_or_else(|| panic!("{NODE_NEEDED}"));
    let home = installed("server-everything", SERVER_EVERYTHING_VERSION, |home| {
        // Built next to its place and moved there whole. The lock makes the name ours.
        let staging = home.with_file_name(format!("server-everything-{SERVER_EVERYTHING_VERSION}.partial"));
        remove(&staging);
        fs::create_dir_all(&staging).expect("the target folder can be written");
        fs::write(staging.join("package.json"), r#"{"name":"test-server","private":true}"#)
            .expect("the target folder can be written");
        let npm = found("npm").unwrap_or_else(|| panic!("{NODE_NEEDED}"));
        let mut command = Command::new(npm);
        command
            .args(["install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"])
            .arg(format!("{SERVER_EVERYTHING}@{SERVER_EVERYTHING_VERSION}"))
            .current_dir(&staging);
        must_run(command, &format!("npm could not install {SERVER_EVERYTHING}. {REGISTRY_NEEDED}"));
        fs::rename(&staging, home).expect("a folder can be renamed inside the target folder");
    });
    let script = home.join("node_modules").join(SERVER_EVERYTHING).join("dist").join("index.js");
    RealServer { command: text(&node), args: vec![text(&script)], version: SERVER_EVERYTHING_VERSION }
}

/// The Python server [`SERVER_TIME`]: the tools `get_current_time(timezone)` and `convert_time`.
///
/// # Panics
///
/// Says what to install when it cannot be obtained.
pub fn server_time() -> RealServer {
    let home = python_package(SERVER_TIME, SERVER_TIME_VERSION);
    RealServer {
        command: text(&venv_python(&home)),
        args: vec!["-m".to_owned(), "mcp_server_time".to_owned()],
        version: SERVER_TIME_VERSION,
    }
}

/// A server made with [`FASTMCP`], to be served over HTTP at the port in `PORT`. Its tools are `echo(text)`,
/// `steps(count)`, which reports progress, and `total(n)`, which adds up in the process. The transport is
/// its argument: `http`, at `/mcp`, or `sse`, at `/sse`.
///
/// # Panics
///
/// Says what to install when it cannot be obtained.
pub fn fastmcp_server() -> RealServer {
    let home = python_package(FASTMCP, FASTMCP_VERSION);
    RealServer {
        command: text(&venv_python(&home)),
        args: vec!["-c".to_owned(), include_str!("tools/fastmcp.py.txt").to_owned()],
        version: FASTMCP_VERSION,
    }
}

/// The program [`MCPO`], which load tests are compared with.
///
/// # Panics
///
/// Says what to install when it cannot be obtained.
pub fn mcpo() -> PathBuf {
    // It does not start with newer ones of these.
    python_packages(MCPO, MCPO_VERSION, &["mcp<2", "fastapi==0.128.*", "starlette<1"]).join("bin").join(MCPO)
}

/// The folder in which `uv` is, and nothing else that matters in `PATH`.
///
/// # Panics
///
/// Says what to install when it cannot be obtained.
pub fn uv() -> PathBuf {
    let home = python_package("uv", UV_VERSION);
    let alone = home.join("alone");
    if fs::create_dir(&alone).is_ok() || !alone.join("uv").exists() {
        // Whoever makes it first; the other finds it there.
        let _ = std::os::unix::fs::symlink(home.join("bin").join("uv"), alone.join("uv"));
    }
    alone
}

/// The Python that test servers run on, by its own path and not that of a launcher.
///
/// # Panics
///
/// Says what to install when there is none.
pub fn python() -> PathBuf {
    let python =
        program(&["python3", "python"], PYTHON_AT_LEAST).unwrap_or_else(|| panic!("{PYTHON_NEEDED}"));
    let output = Command::new(python).args(["-c", "import sys; print(sys.executable)"]).output();
    PathBuf::from(String::from_utf8_lossy(&output.expect("Python runs").stdout).trim())
}

/// The virtual environment of a package from PyPI.
pub(super) fn python_package(name: &str, version: &str) -> PathBuf {
    python_packages(name, version, &[])
}

/// The same with what else pip is to be told.
fn python_packages(name: &str, version: &str, more: &[&str]) -> PathBuf {
    installed(name, version, |home| {
        let python =
            program(&["python3", "python"], PYTHON_AT_LEAST).unwrap_or_else(|| panic!("{PYTHON_NEEDED}"));
        // A virtual environment holds its own path and does not move, so it is built in its place; the
        // marker tells a whole one from one whose making was interrupted.
        let mut venv = Command::new(python);
        venv.args(["-m", "venv"]).arg(home);
        must_run(venv, VENV_NEEDED);
        let mut pip = Command::new(venv_python(home));
        pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"])
            .arg(format!("{name}=={version}"))
            .args(more);
        must_run(pip, &format!("pip could not install {name}. {REGISTRY_NEEDED}"));
    })
}

fn venv_python(home: &Path) -> PathBuf {
    home.join("bin").join("python")
}

/// The folder of a server, made by `install` if no process has completed it yet. Only one process at a
/// time gets here for one folder, and what an interrupted one left is removed first.
fn installed(name: &str, version: &str, install: impl FnOnce(&Path)) -> PathBuf {
    installed_in(&target_folder().join("test-servers"), name, version, install)
}

fn installed_in(parent: &Path, name: &str, version: &str, install: impl FnOnce(&Path)) -> PathBuf {
    fs::create_dir_all(parent).expect("the target folder can be written");
    let home = parent.join(format!("{name}-{version}"));
    let marker = home.join(MARKER);
    if marker.exists() {
        return home;
    }
    // The lock goes with the process that holds it, however that ends. It is not inside the folder,
    // because the folder comes and goes.
    let lock = File::create(parent.join(format!("{name}-{version}.lock")))
        .expect("the target folder can be written");
    lock.lock().expect("files in the target folder can be locked");
    if !marker.exists() {
        remove(&home);
        install(&home);
        File::create(&marker).expect("the target folder can be written");
    }
    home
}

/// Where Cargo builds to. A relative `CARGO_TARGET_DIR` does not help: it counts from where Cargo was
/// called, which a test does not know.
pub(super) fn target_folder() -> PathBuf {
    if let Some(folder) = env::var_os("CARGO_TARGET_DIR").map(PathBuf::from).filter(|path| path.is_absolute())
    {
        return folder;
    }
    let program = env::current_exe().expect("a test has a path");
    let target = program.ancestors().skip(1).find(|folder| folder.join("CACHEDIR.TAG").is_file());
    target.expect("tests run from Cargo's target folder; otherwise set CARGO_TARGET_DIR").to_owned()
}

/// The first of these programs in `PATH` that is new enough, by its absolute path.
fn program(names: &[&str], at_least: (u32, u32)) -> Option<PathBuf> {
    names.iter().filter_map(|name| found(name)).find(|path| {
        let output = Command::new(path).arg("--version").stdin(Stdio::null()).output();
        output.is_ok_and(|output| version_of(&String::from_utf8_lossy(&output.stdout)) >= Some(at_least))
    })
}

/// The absolute path of a program in `PATH`. Links are kept: launchers of version managers look at the
/// name that they are called by.
fn found(name: &str) -> Option<PathBuf> {
    let here = env::current_dir().ok()?;
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| here.join(folder).join(name))
        .find(|path| path.is_file())
}

/// The first two numbers in what `--version` says: `v20.11.1`, `Python 3.12.3`.
fn version_of(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().trim_start_matches(|c: char| !c.is_ascii_digit()).split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Runs a program to its end and panics with `sentence` and its last lines if it fails.
fn must_run(mut command: Command, sentence: &str) {
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => return,
        Ok(output) => output,
        Err(error) => panic!("{sentence}\n{error}"),
    };
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    let lines: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    panic!("{sentence} ({})\n{}", output.status, lines[lines.len().saturating_sub(15)..].join("\n"));
}

fn remove(folder: &Path) {
    if folder.exists() {
        fs::remove_dir_all(folder).expect("a half-made folder can be removed");
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("the path of the target folder is Unicode").to_owned()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn installs_once_and_again_after_an_interruption() {
        let parent = tempfile::tempdir().unwrap();
        let half_made = parent.path().join("x-1");
        fs::create_dir_all(half_made.join("rubble")).unwrap();
        let installs = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let home = installed_in(parent.path(), "x", "1", |home| {
                        assert!(!home.exists());
                        fs::create_dir(home).unwrap();
                        installs.fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(home.join(MARKER).is_file() && !home.join("rubble").exists());
                });
            }
        });
        assert_eq!(installs.into_inner(), 1);
    }

    #[test]
    fn reads_versions() {
        assert_eq!(version_of("v20.11.1\n"), Some((20, 11)));
        assert_eq!(version_of("Python 3.12.3"), Some((3, 12)));
        assert_eq!(version_of("nothing"), None);
        assert!(version_of("Python 3.9.1") < Some(PYTHON_AT_LEAST));
    }

    #[test]
    fn finds_programs_and_the_target_folder() {
        assert!(found("sh").unwrap().is_absolute());
        assert_eq!(found("no-such-program-anywhere"), None);
        assert!(target_folder().is_absolute() && target_folder().is_dir());
    }
}
