//! What went wrong, from what package managers say. They have few exit codes and many sentences.

use mcp_shared::error::{ErrorCode, WorkerError, shorten};

use super::command::Ran;
use crate::supervisor::Exit;

/// Lines of a tool's own words in an error.
const WORDS: usize = 20;
/// The most characters of them.
const WORDS_LENGTH: usize = 2_000;

/// What an error is about.
pub(super) struct Asked<'a> {
    /// The package's name.
    pub(super) name: &'a str,
    /// The version that was asked for; `None`: any.
    pub(super) version: Option<&'a str>,
    /// What else was asked for by name, in canonical form.
    pub(super) others: Vec<String>,
}

/// Adds the last words of a tool to an error.
pub(super) fn with_words(error: WorkerError, said: &[String]) -> WorkerError {
    let useful: Vec<&String> = said.iter().filter(|line| !is_noise(line)).collect();
    let mut length = 0;
    let mut last: Vec<&str> = useful
        .iter()
        .rev()
        .take(WORDS)
        .take_while(|line| {
            length += line.chars().count() + 1;
            length <= WORDS_LENGTH
        })
        .map(|line| line.as_str())
        .collect();
    last.reverse();
    if last.is_empty() { error } else { error.with("details", last.join("\n")) }
}

/// Lines that explain nothing.
fn is_noise(line: &str) -> bool {
    let text = line.trim_start_matches("npm error").trim_start_matches("npm ERR!").trim();
    text.is_empty()
        || text.starts_with("A complete log of this run")
        || text.starts_with("Log files were not written")
        || text.starts_with("You can rerun the command with `--loglevel")
        // It only suggests what is not allowed here.
        || text.starts_with("404 Note that you can also install")
        || text.starts_with("404 tarball, folder, http url")
        || text == "404"
        || text.starts_with("Looking in links:")
        || text.starts_with("WARNING: pip index is currently an experimental")
        || (text.starts_with("npm warn Unknown ") && text.contains(" config "))
}

/// A file of ours could not be written or read.
pub(super) fn of_file(error: &std::io::Error) -> WorkerError {
    use std::io::ErrorKind;
    tracing::warn!(%error, "a file of an installation");
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => disk_full(),
        _ => WorkerError::new(
            ErrorCode::InstallFailed,
            "The worker cannot write or read a file of the installation",
        )
        .with("details", clean_io(error)),
    }
}

fn clean_io(error: &std::io::Error) -> String {
    super::clean::line(error.to_string().as_bytes())
}

fn disk_full() -> WorkerError {
    WorkerError::new(ErrorCode::DiskFull, "The worker's disk has no room for the package")
}

/// npm failed.
pub(super) fn npm(asked: &Asked<'_>, ran: &Ran) -> WorkerError {
    let code = ran.said.iter().find_map(|line| {
        let rest = line.strip_prefix("npm error code ").or_else(|| line.strip_prefix("npm ERR! code "))?;
        Some(rest.trim().to_owned())
    });
    let any = |text: &str| ran.said.iter().any(|line| line.contains(text));
    let code = code.as_deref().unwrap_or_default();
    let label = asked.label();
    let error = match code {
        _ if any("ENOSPC") || any("EDQUOT") || ran.exit == Exit::Code(228) => disk_full(),
        _ if any("EFBIG") => {
            WorkerError::new(ErrorCode::InstallTooLarge, format!("A file of {label} is too large"))
        }
        "E404" => asked.missing(npm_subject(&ran.said), ErrorCode::PackageNotFound),
        "ETARGET" | "ENOVERSIONS" => asked.missing(npm_subject(&ran.said), ErrorCode::VersionNotFound),
        "EINTEGRITY" | "TAR_BAD_ARCHIVE" | "Z_DATA_ERROR" | "ESHASUM" => integrity(&label),
        "E401" | "E403" | "ENEEDAUTH" => failed(format!("The registry refused access to {label}")),
        "EALLOWGIT" | "EALLOWREMOTE" | "EALLOWFILE" | "EALLOWDIRECTORY" => failed(format!(
            "{label} needs something that is not in the registry (an address, a repository or a folder), \
             which is not installed"
        )),
        "EBADENGINE" | "EBADPLATFORM" => failed(format!("{label} is not for this system")),
        "ERESOLVE" => failed(format!("What {label} needs contradicts itself")),
        "EUSAGE" => failed(format!("The lock of {label} does not fit it")),
        "EACCES" | "EPERM" | "EROFS" => failed(format!("npm may not write the files of {label}")),
        code if is_network(code) => unavailable(code),
        _ if any("npm error command failed") || any("npm ERR! command failed") => {
            failed(format!("A script of {label} failed"))
        }
        _ => failed(format!("npm could not install {label}{}", ending(ran.exit))),
    };
    with_words(error, &ran.said)
}

/// Codes of Node, of npm's client and of the registry, that say that it cannot be reached or is ill.
fn is_network(code: &str) -> bool {
    let status = code.strip_prefix('E').and_then(|digits| digits.parse::<u16>().ok());
    status.is_some_and(|status| status >= 500 || status == 429 || status == 408)
        || is_certificate(code)
        || matches!(
            code,
            "ECONNREFUSED"
                | "ECONNRESET"
                | "ECONNABORTED"
                | "ENOTFOUND"
                | "EAI_AGAIN"
                | "ETIMEDOUT"
                | "ESOCKETTIMEDOUT"
                | "EHOSTUNREACH"
                | "ENETUNREACH"
                | "EPIPE"
                | "EPROTO"
                | "FETCH_ERROR"
                | "EJSONPARSE"
                | "EINVALIDTYPE"
        )
        || code.starts_with("ERR_SOCKET")
        || code.starts_with("ERR_SSL")
        || code.starts_with("ERR_INVALID_URL")
}

fn is_certificate(code: &str) -> bool {
    code.contains("CERT") || code.starts_with("UNABLE_TO_")
}

/// The name in `'NAME@VERSION'` or `NAME@VERSION.` of npm's sentences, or else in the address that it asked.
fn npm_subject(said: &[String]) -> Option<String> {
    const BEFORE: [&str; 3] = ["No matching version found for ", "The requested resource '", "404  '"];
    let named = said.iter().find_map(|line| {
        let text = BEFORE.iter().find_map(|before| Some(line.split_once(before)?.1))?;
        // The first character may be a scope's.
        let end = text.char_indices().skip(1).find(|(_, c)| matches!(c, '@' | '\''))?.0;
        // It may be the address of a file, of which more is known below.
        Some(text[..end].to_owned()).filter(|name| !name.contains("://"))
    });
    named.or_else(|| {
        said.iter().find_map(|line| {
            let (_, address) = line.split_once(" 404 ")?.1.split_once(" - GET ")?;
            let address = url::Url::parse(address.split_whitespace().next()?).ok()?;
            let path = address.path().replace("%2f", "/").replace("%2F", "/");
            let mut parts = path.split("/-/").next()?.rsplit('/');
            let name = parts.next().filter(|name| !name.is_empty())?;
            match parts.next().filter(|scope| scope.starts_with('@')) {
                Some(scope) => Some(format!("{scope}/{name}")),
                None => Some(name.to_owned()),
            }
        })
    })
}

/// pip or uv failed. `log` is pip's own, which says what it keeps to itself.
pub(super) fn python(asked: &Asked<'_>, ran: &Ran, log: &str) -> WorkerError {
    let any = |text: &str| ran.said.iter().any(|line| line.contains(text));
    let logged = |text: &str| log.contains(text);
    let label = asked.label();
    let subject = python_subject(&ran.said);
    let unreachable = any("Request failed after")
        || any("error sending request")
        || any("error reading a body from connection")
        || logged("IncompleteRead")
        || logged("Connection broken")
        || any("HTTP status server error")
        || any("429 Too Many Requests")
        || any("onnection refused")
        || any("failed to lookup address")
        || any("invalid peer certificate")
        || any("unexpected JSON")
        || any("JSONDecodeError")
        || any("timed out")
        || any("Failed to fetch")
        || logged("Max retries exceeded")
        || logged("connection error:")
        || logged("Server Error")
        || logged("Read timed out")
        || logged("SSLError");
    let error = if any("No space left on device") || any("Disk quota exceeded") || any("[Errno 28]") {
        disk_full()
    } else if any("DO NOT MATCH THE HASHES") || any("Hash mismatch") || any("Bad CRC") || any("BadZipFile") {
        integrity(&label)
    } else if any("401 Unauthorized")
        || any("403 Forbidden")
        || logged("401 Client Error")
        || logged("403 Client Error")
    {
        failed(format!("The registry refused access to {label}"))
    } else if unreachable {
        let certificate = any("peer certificate") || logged("CERTIFICATE_VERIFY_FAILED");
        unavailable(if certificate { "CERT" } else { "" })
    } else if needs_other_python(subject.as_ref(), &ran.said, log) {
        failed(format!(
            "{label} or something that it needs is for another version of Python than the worker's"
        ))
    } else if lacks_wheel(subject.as_ref(), &ran.said, log) {
        failed(format!(
            "{label} or something that it needs has no ready-made wheel for this system; `allowScripts` \
             lets it be built from its source, which runs the package's own code"
        ))
    } else if let Some(subject) = subject {
        let code = if subject.exists { ErrorCode::VersionNotFound } else { ErrorCode::PackageNotFound };
        asked.missing(Some(subject.name), code)
    } else if any("ResolutionImpossible") || any("conflicting dependencies") || any("No solution found") {
        failed(format!("What {label} needs contradicts itself"))
    } else if any("ailed to build")
        || any("subprocess to install build dependencies")
        || any("metadata-generation-failed")
    {
        failed(format!("{label} or something that it needs could not be built"))
    } else {
        failed(format!("{label} could not be installed{}", ending(ran.exit)))
    };
    with_words(error, &ran.said)
}

/// A package that pip or uv did not find.
struct Subject {
    name: String,
    /// The version that it had to be, as far as that is said.
    version: Option<String>,
    /// Whether other versions of it are there.
    exists: bool,
}

/// Which package is missing.
fn python_subject(said: &[String]) -> Option<Subject> {
    let subject = |text: &str, exists: bool| {
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_' | '.'));
        let (name, rest) = text.split_at(end.unwrap_or(text.len()));
        let version = rest.strip_prefix("==").and_then(|version| version.split(' ').next());
        let version = version.map(str::to_owned);
        let name = name.trim_end_matches('.').to_owned();
        (!name.is_empty()).then_some(Subject { name, version, exists })
    };
    let missing = said.iter().find_map(|line| {
        if let Some((_, rest)) = line.split_once("that satisfies the requirement ") {
            return subject(rest, !rest.contains("(from versions: none)"));
        }
        if let Some((before, _)) = line.split_once(" was not found in the package registry") {
            return subject(before.rsplit(' ').next()?, false);
        }
        if let Some((_, rest)) = line.split_once("there is no version of ") {
            return subject(rest, true);
        }
        let (before, _) = line.split_once(" is available").or_else(|| line.split_once(" are available"))?;
        let (_, rest) = before.split_once("only ")?;
        subject(rest, true)
    });
    missing.or_else(|| {
        let (_, rest) =
            said.iter().find_map(|line| line.split_once("No matching distribution found for "))?;
        subject(rest, false)
    })
}

/// Whether what is missing is there, but only as a source. Pip says that to its log alone, and there of
/// everything that it did not take.
fn lacks_wheel(subject: Option<&Subject>, said: &[String], log: &str) -> bool {
    let uv = ["has no usable wheels", "no wheels with a matching"];
    said.iter().any(|line| uv.iter().any(|text| line.contains(text)))
        || subject.is_some_and(|subject| subject.passed_over(log, "No sources permitted"))
}

/// Whether what is missing is there, but for another Python.
fn needs_other_python(subject: Option<&Subject>, said: &[String], log: &str) -> bool {
    said.iter().any(|line| line.contains("does not satisfy Python"))
        || subject.is_some_and(|subject| subject.passed_over(log, "Link requires a different Python"))
}

impl Subject {
    /// Whether pip's log says that files were passed over for a reason which would have been what was
    /// missing.
    fn passed_over(&self, log: &str, reason: &str) -> bool {
        let name = canonical(&self.name);
        let passed = |line: &str| {
            // `...: https://index/path/name-1.0-py3-none-any.whl (from ...)`
            let file = line.split(": ").flat_map(|part| part.split(' ')).find(|part| part.contains("://"))?;
            let file = file.split(['#', '?']).next()?.rsplit('/').next()?;
            let (theirs, version) = match file.strip_suffix(".whl") {
                Some(wheel) => {
                    let mut parts = wheel.split('-');
                    (parts.next()?, parts.next()?)
                }
                None => file.rsplit_once('-')?,
            };
            let version = [".tar.gz", ".zip", ".tar.bz2", ".tgz"]
                .iter()
                .find_map(|ending| version.strip_suffix(ending))
                .unwrap_or(version);
            let wanted = match &self.version {
                Some(wanted) => wanted == version,
                // Anything would have done, so all that there is was passed over.
                None => !self.exists,
            };
            (wanted && canonical(theirs) == name).then_some(())
        };
        log.lines().filter(|line| line.contains(reason)).any(|line| passed(line).is_some())
    }
}

impl Asked<'_> {
    /// The package with its version.
    pub(super) fn label(&self) -> String {
        let name = shorten(self.name, 64);
        match self.version {
            Some(version) => format!("{name}@{}", shorten(version, 64)),
            None => name,
        }
    }

    /// A package or version that the registry does not have: what was asked for, or something that it
    /// needs.
    fn missing(&self, subject: Option<String>, code: ErrorCode) -> WorkerError {
        let subject = subject.unwrap_or_else(|| self.name.to_owned());
        let is_main = canonical(&subject) == canonical(self.name) || subject == self.name;
        let subject = shorten(&subject, 64);
        let what = match code {
            ErrorCode::VersionNotFound => "a fitting version of ",
            _ => "",
        };
        if is_main {
            let message = match code {
                ErrorCode::VersionNotFound => format!("The registry has no {}", self.label()),
                _ => format!("The registry has no package {subject}"),
            };
            return WorkerError::new(code, message);
        }
        if self.others.contains(&canonical(&subject)) {
            return WorkerError::new(code, format!("The registry does not have {what}{subject}"));
        }
        failed(format!("{} needs {what}{subject}, which the registry does not have", self.label()))
    }
}

/// A name of a Python package as PyPI spells it.
pub(super) fn canonical(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for c in name.chars() {
        match c {
            '-' | '_' | '.' if out.ends_with('-') => {}
            '-' | '_' | '.' => out.push('-'),
            c => out.push(c.to_ascii_lowercase()),
        }
    }
    out
}

/// Something failed for which there is no better code.
pub(super) fn failed(message: impl Into<String>) -> WorkerError {
    WorkerError::new(ErrorCode::InstallFailed, message)
}

fn integrity(label: &str) -> WorkerError {
    WorkerError::new(
        ErrorCode::IntegrityMismatch,
        format!(
            "The registry has other bytes for {label}, or for something that it needs, than were promised"
        ),
    )
}

fn unavailable(code: &str) -> WorkerError {
    let message = if is_certificate(code) {
        "The package registry's certificate is not trusted here"
    } else {
        "The package registry cannot be reached or does not answer properly"
    };
    WorkerError::new(ErrorCode::RegistryUnavailable, message)
}

/// How a program ended, where that was not by its own decision.
fn ending(exit: Exit) -> String {
    match exit {
        Exit::Code(_) => String::new(),
        exit => format!(": the program {exit}"),
    }
}
