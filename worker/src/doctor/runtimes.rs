//! The programs that install MCP servers and run them.

use std::{
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use mcp_shared::{
    config::Settings,
    doctor::{Area, Finding},
    error::shorten,
};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::packages::managers::passed_on;

/// How long a program may take to say its version.
const PATIENCE: Duration = Duration::from_secs(4);
/// How long a registry may take to answer.
const REGISTRY: Duration = Duration::from_secs(7);
/// How often it is looked whether it has.
const PAUSE: Duration = Duration::from_millis(10);
/// Bytes of what it says.
const SAID: u64 = 4_096;
/// The oldest Node that runs what is in the registry today.
const NODE: u64 = 18;
/// The oldest Python that does.
const PYTHON: u64 = 9;

/// Says what Python it is, if it can make virtual environments.
const PROBE: &str = "import sys, venv, ensurepip; print('%d.%d.%d' % sys.version_info[:3])";

/// Looks for them all, side by side.
pub async fn look(settings: &Settings, network: bool) -> Vec<Finding> {
    let python = settings.packages.python_bin.clone().unwrap_or_else(|| "python3".into());
    let mut looks = vec![
        tokio::task::spawn_blocking(node),
        tokio::task::spawn_blocking(npm),
        tokio::task::spawn_blocking({
            let python = python.clone();
            move || self::python(&python)
        }),
        tokio::task::spawn_blocking(uv),
    ];
    if network {
        looks.push(tokio::task::spawn_blocking(npm_registry));
        looks.push(tokio::task::spawn_blocking(move || python_index(&python)));
    }
    let mut findings = Vec::new();
    for look in looks {
        findings.extend(look.await);
    }
    findings
}

fn node() -> Finding {
    let remedy = format!("install Node.js {NODE} or newer, for packages from npm");
    match ask("node".as_ref(), &["--version"], PATIENCE) {
        Ok(version) => {
            let major =
                version.trim_start_matches('v').split('.').next().and_then(|major| major.parse::<u64>().ok());
            match major {
                Some(major) if major >= NODE => Finding::ok(Area::Runtimes, "node", version),
                _ => Finding::warning(Area::Runtimes, "node", format!("{version} is old"), remedy),
            }
        }
        Err(why) => Finding::warning(Area::Runtimes, "node", why, remedy),
    }
}

fn npm() -> Finding {
    match ask("npm".as_ref(), &["--version"], PATIENCE) {
        Ok(version) => Finding::ok(Area::Runtimes, "npm", version),
        Err(why) => Finding::warning(Area::Runtimes, "npm", why, "install npm, for packages from npm"),
    }
}

fn python(program: &Path) -> Finding {
    let what = "python";
    let remedy = format!(
        "install Python 3.{PYTHON} or newer with venv (python3-venv), or name one in PYTHON_BIN, for Python packages"
    );
    match ask(program, &["-c", PROBE], PATIENCE) {
        Ok(version) => {
            let mut numbers = version.split('.').map_while(|part| part.parse::<u64>().ok());
            if (numbers.next(), numbers.next()) >= (Some(3), Some(PYTHON)) {
                Finding::ok(Area::Runtimes, what, format!("{version}, with venv"))
            } else {
                Finding::warning(Area::Runtimes, what, format!("{version} is old"), remedy)
            }
        }
        Err(why) => Finding::warning(Area::Runtimes, what, why, remedy),
    }
}

fn uv() -> Finding {
    match ask("uv".as_ref(), &["--version"], PATIENCE) {
        Ok(version) => Finding::ok(Area::Runtimes, "uv", version.trim_start_matches("uv ").to_owned()),
        Err(_) => Finding::ok(Area::Runtimes, "uv", "not found; pip does its work, more slowly"),
    }
}

fn npm_registry() -> Finding {
    match ask("npm".as_ref(), &["ping", "--fetch-retries=0"], REGISTRY) {
        Ok(_) => Finding::ok(Area::Reach, "npm registry", "answers"),
        Err(why) => Finding::warning(
            Area::Reach,
            "npm registry",
            why,
            "let this machine reach it, or set npm_config_registry to one that it reaches",
        ),
    }
}

fn python_index(program: &Path) -> Finding {
    let arguments =
        ["-m", "pip", "index", "versions", "pip", "--retries", "0", "--disable-pip-version-check"];
    match ask(program, &arguments, REGISTRY) {
        Ok(_) => Finding::ok(Area::Reach, "Python index", "answers"),
        Err(why) => Finding::warning(
            Area::Reach,
            "Python index",
            why,
            "let this machine reach it, or set PIP_INDEX_URL to one that it reaches",
        ),
    }
}

/// Runs a program and hears the first line that it says. It gets nothing of ours, and ends within its time.
fn ask(program: &Path, arguments: &[&str], patience: Duration) -> Result<String, String> {
    let shown = || shorten(&program.display().to_string(), 64);
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(passed_on())
        .current_dir(PathBuf::from("/"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => format!("{} was not found", shown()),
            _ => format!("{} was not started: {error}", shown()),
        })?;
    let end = Instant::now() + patience;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Ok(None) if Instant::now() < end => std::thread::sleep(PAUSE),
            _ => break None,
        }
    };
    let Some(status) = status else {
        if let Ok(pid) = i32::try_from(child.id()) {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = child.wait();
        return Err(format!("{} did not answer within {} s", shown(), patience.as_secs()));
    };
    if !status.success() {
        return Err(format!("{} {} failed ({status})", shown(), shorten(&arguments.join(" "), 40)));
    }
    let mut said = String::new();
    if let Some(out) = child.stdout.take() {
        let _ = out.take(SAID).read_to_string(&mut said);
    }
    let line = said.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    Ok(shorten(line, 80))
}
