//! The command `doctor`: looks at everything that a program stands on, side by side and each for a few seconds, and
//! says of each thing how it is and what would mend it. Nothing is changed, and no secret is shown.
//!
//! What is here is common to both programs; each adds what only it has.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use serde::Serialize;
use tokio::time::timeout;

use crate::{
    config::{self, ConfigErrors, LogFormat, Settings},
    error::shorten,
    lifecycle::complain,
    telemetry,
};

mod machine;
mod stored;

pub use machine::machine;
pub use stored::{Looked, stored};

/// How long one look may take. What it waits for is worse than slow then.
pub const LOOK: Duration = Duration::from_secs(8);

/// Characters of a finding that people are shown; drivers say more than anybody reads, and `--json` has it.
const SHOWN: usize = 280;

/// The exit status when something is wrong.
const FOUND: u8 = 1;

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and somebody should look at it.
    Warning,
    /// The program does not start with it, or does not work.
    Error,
}

/// What a finding is about, in the order in which they are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Area {
    /// What the program was told.
    Settings,
    /// Which programs it stands on.
    Versions,
    /// What it can speak to.
    Reach,
    /// Whether clocks agree.
    Clocks,
    /// What it may do.
    Permissions,
    /// What secrets are encrypted with.
    Keys,
    /// Room for data.
    Disk,
    /// What runs MCP servers.
    Runtimes,
    /// What the system lets a process have.
    Limits,
    /// Certificates.
    Tls,
}

impl Area {
    fn as_str(self) -> &'static str {
        match self {
            Self::Settings => "settings",
            Self::Versions => "versions",
            Self::Reach => "reach",
            Self::Clocks => "clocks",
            Self::Permissions => "permissions",
            Self::Keys => "keys",
            Self::Disk => "disk",
            Self::Runtimes => "runtimes",
            Self::Limits => "limits",
            Self::Tls => "tls",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What it is about.
    pub area: Area,
    /// What was looked at.
    pub what: String,
    /// How it is.
    pub level: Level,
    /// What was seen.
    pub text: String,
    /// What would mend it; always there unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(area: Area, what: impl Into<String>, text: impl Into<String>) -> Self {
        Self { area, what: what.into(), level: Level::Ok, text: text.into(), remedy: None }
    }

    /// Somebody should look at it.
    pub fn warning(
        area: Area,
        what: impl Into<String>,
        text: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::bad(Level::Warning, area, what.into(), text.into(), remedy.into())
    }

    /// The program does not work with it.
    pub fn error(
        area: Area,
        what: impl Into<String>,
        text: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::bad(Level::Error, area, what.into(), text.into(), remedy.into())
    }

    fn bad(level: Level, area: Area, what: String, text: String, remedy: String) -> Self {
        Self { area, what, level, text, remedy: Some(remedy) }
    }
}

/// Reads the settings as a program does and looks. With settings that are wrong that is what is found, together with
/// what can be seen without them. `json`: print one object for machines. The exit status is 1 if anything is an error.
pub fn run(
    program: &'static str,
    json: bool,
    env_file: Option<PathBuf>,
    look: impl AsyncFnOnce(&Settings) -> Vec<Finding>,
) -> ExitCode {
    let env_file = config::env_file(env_file);
    let loaded = Settings::load(config::process_environment(), env_file.as_deref());
    let filter = loaded.as_ref().ok().and_then(|settings| settings.log_filter.clone());
    // What is found is said by the findings, and nothing else unless somebody asks for it.
    let logged = telemetry::init(LogFormat::Auto, false, Some(filter.as_deref().unwrap_or("off")));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = match (logged, runtime) {
        (Ok(()), Ok(runtime)) => runtime,
        (Err(error), _) => {
            complain(&error.to_string());
            return ExitCode::FAILURE;
        }
        (_, Err(error)) => {
            complain(&format!("the runtime did not start: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let mut findings = vec![Finding::ok(Area::Versions, program, env!("CARGO_PKG_VERSION"))];
    findings.extend(env_file.as_deref().and_then(machine::env_file));
    match &loaded {
        Ok(settings) => {
            findings.extend(machine::settings(settings));
            findings.extend(runtime.block_on(look(settings)));
        }
        Err(errors) => findings.extend(refused(errors)),
    }
    // What did not end in time is not waited for.
    runtime.shutdown_background();
    telemetry::flush();
    findings.sort_by_key(|finding| finding.area);
    print(program, json, &findings);
    let found = findings.iter().any(|finding| finding.level == Level::Error);
    if found { ExitCode::from(FOUND) } else { ExitCode::SUCCESS }
}

fn refused(errors: &ConfigErrors) -> Vec<Finding> {
    let mut findings: Vec<Finding> = errors
        .problems()
        .iter()
        .map(|problem| {
            let text = problem.to_string();
            let text = text.strip_prefix(&format!("{}: ", problem.subject())).unwrap_or(&text).to_owned();
            Finding::error(
                Area::Settings,
                problem.subject(),
                text,
                "change the setting; --help explains each",
            )
        })
        .collect();
    findings.push(Finding::warning(
        Area::Settings,
        "everything else",
        "was not looked at, because that depends on the settings",
        "run doctor again when the settings are right",
    ));
    findings
}

/// Waits for a look, and not for longer than it may take.
pub async fn limited(area: Area, what: &str, look: impl Future<Output = Vec<Finding>>) -> Vec<Finding> {
    match timeout(LOOK, look).await {
        Ok(findings) => findings,
        Err(_) => vec![Finding::error(
            area,
            what,
            format!("nothing was heard within {} s", LOOK.as_secs()),
            "see whether it is overloaded, or packets to it are dropped",
        )],
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report<'a> {
    program: &'a str,
    version: &'a str,
    ok: bool,
    errors: usize,
    warnings: usize,
    findings: &'a [Finding],
}

fn print(program: &str, json: bool, findings: &[Finding]) {
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let (errors, warnings) = (count(Level::Error), count(Level::Warning));
    let version = env!("CARGO_PKG_VERSION");
    let mut out = std::io::stdout().lock();
    // Somebody who closed the pipe has read enough.
    if json {
        let report = Report { program, version, ok: errors == 0, errors, warnings, findings };
        let _ = serde_json::to_writer_pretty(&mut out, &report);
        let _ = writeln!(out);
        return;
    }
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colours = out.is_terminal() && !plain;
    let width = findings.iter().map(|finding| finding.what.chars().count()).max().unwrap_or(0).min(28);
    let mut area = None;
    for finding in findings {
        if area != Some(finding.area) {
            let _ = writeln!(out, "{}", finding.area.as_str());
            area = Some(finding.area);
        }
        let (mark, colour) = match finding.level {
            Level::Ok => ("ok     ", 32),
            Level::Warning => ("WARNING", 33),
            Level::Error => ("ERROR  ", 31),
        };
        let mark = if colours { format!("\x1b[{colour}m{mark}\x1b[0m") } else { mark.to_owned() };
        let text = shorten(&finding.text, SHOWN);
        let _ = writeln!(out, "  {mark} {:<width$}  {text}", finding.what);
        if let Some(remedy) = &finding.remedy {
            let _ = writeln!(out, "          -> {remedy}");
        }
    }
    let plural = |count: usize| if count == 1 { "" } else { "s" };
    let _ = writeln!(
        out,
        "{} ok, {warnings} warning{}, {errors} error{}",
        findings.len() - warnings - errors,
        plural(warnings),
        plural(errors)
    );
}
