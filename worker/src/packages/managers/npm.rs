//! npm, by its own command line.

use std::collections::{BTreeMap, BTreeSet};

use mcp_shared::{
    error::{ErrorCode, WorkerError},
    package::{Lock, PackageSpec, Runtime},
};
use serde_json::{Value, json};

use super::{
    command::{Order, Program, Ran},
    errors::{self, Asked, failed},
};

/// The file that says what is wanted.
const MANIFEST: &str = "package.json";
/// The file that says what that is exactly.
const LOCK: &str = "package-lock.json";
/// What the folder is called in its own manifest: no package of a registry, since that could not need
/// itself.
const FOLDER: &str = "mcp-api.installation";

/// Options of every command. Nothing is asked, nothing is sent that is not needed, and nothing comes from
/// elsewhere than the registry.
const OPTIONS: &[&str] = &[
    "--no-audit",
    "--no-fund",
    "--no-update-notifier",
    "--no-progress",
    "--color=false",
    "--logs-max=0",
    // Every answer of the registry is a line, which shows that something is going on.
    "--loglevel=http",
    "--fetch-retries=1",
    "--fetch-retry-mintimeout=500",
    "--fetch-retry-maxtimeout=2000",
    "--allow-git=none",
    "--allow-remote=none",
    "--allow-file=none",
    "--allow-directory=none",
    "--no-global",
    "--no-dry-run",
    // Workers may use other mirrors: the lock says what, and not where.
    "--omit-lockfile-registry-resolved",
];

/// Metadata comes soon or not at all.
const METADATA_TIMEOUT: &str = "--fetch-timeout=45000";

/// Resolves names and versions to a lock, without installing anything.
pub(super) async fn resolve(order: &Order<'_>, spec: &PackageSpec) -> Result<Lock, WorkerError> {
    let wanted = spec.version.as_deref().unwrap_or("latest");
    order.write(MANIFEST, &manifest(&spec.name, wanted)?).await?;
    let mut args = vec!["install", "--package-lock-only", METADATA_TIMEOUT];
    args.push("--ignore-scripts");
    let ran = run(order, &args).await?;
    let asked = Asked { name: &spec.name, version: spec.version.as_deref(), others: Vec::new() };
    if !ran.succeeded() {
        return Err(errors::npm(&asked, &ran));
    }
    let text = order.read(LOCK).await?;
    let mut lock: Value =
        serde_json::from_str(&text).map_err(|_| failed("npm wrote a lock file that is not JSON"))?;
    let resolved = read(&lock, &spec.name, &asked.label())?;
    if spec.fail_on_warning {
        refuse_warnings(&ran, resolved.deprecated, &asked)?;
    }
    lock["packages"][""]["dependencies"][&spec.name] = resolved.version.as_str().into();
    let lock = serde_json::to_string_pretty(&lock).map_err(WorkerError::internal)?;
    let files = BTreeMap::from([
        (MANIFEST.to_owned(), manifest(&spec.name, &resolved.version)?),
        (LOCK.to_owned(), lock + "\n"),
    ]);
    Ok(Lock {
        runtime: Runtime::Node,
        name: spec.name.clone(),
        version: resolved.version,
        files,
        allow_scripts: spec.allow_scripts,
        skipped_scripts: if spec.allow_scripts { Vec::new() } else { resolved.scripts },
        pip_index_url: None,
        pip_extra_index_url: None,
        python: None,
    })
}

/// Makes the folder that a lock describes.
pub(super) async fn build(order: &Order<'_>, lock: &Lock) -> Result<(), WorkerError> {
    for name in [MANIFEST, LOCK] {
        let text = lock.files.get(name).ok_or_else(|| failed(format!("The stored lock has no {name}")))?;
        order.write(name, text).await?;
    }
    // What is stored may have been changed by somebody else: it is held to the same rules.
    let stored: Value =
        serde_json::from_str(&lock.files[LOCK]).map_err(|_| failed("The stored lock file is not JSON"))?;
    let asked = Asked { name: &lock.name, version: Some(&lock.version), others: Vec::new() };
    read(&stored, &lock.name, &asked.label())?;
    let mut args = vec!["ci"];
    if lock.allow_scripts {
        // The second is what newer npms want, and older ones do not know.
        args.extend(["--no-ignore-scripts", "--dangerously-allow-all-scripts"]);
    } else {
        args.push("--ignore-scripts");
    }
    let ran = run(order, &args).await?;
    if ran.succeeded() { Ok(()) } else { Err(errors::npm(&asked, &ran)) }
}

/// The version with the tag `latest`.
pub(super) async fn latest(order: &Order<'_>, name: &str) -> Result<String, WorkerError> {
    let mut program = program(order, &["view", "--json", METADATA_TIMEOUT])?;
    program.args.extend(["--", name, "dist-tags"].map(str::to_owned));
    program.answers = true;
    let ran = order.run(program).await?;
    let asked = Asked { name, version: None, others: Vec::new() };
    if !ran.succeeded() {
        return Err(errors::npm(&asked, &ran));
    }
    let tags: Value = serde_json::from_str(&ran.answer).unwrap_or_default();
    match tags.get("latest").and_then(Value::as_str) {
        Some(version) => Ok(version.to_owned()),
        None => Err(WorkerError::new(
            ErrorCode::VersionNotFound,
            format!("The registry names no latest version of {}", asked.label()),
        )),
    }
}

async fn run(order: &Order<'_>, args: &[&str]) -> Result<Ran, WorkerError> {
    order.run(program(order, args)?).await
}

fn program(order: &Order<'_>, args: &[&str]) -> Result<Program, WorkerError> {
    let missing = |name: &str| {
        WorkerError::new(ErrorCode::RuntimeMissing, format!("This worker has no `{name}` in PATH"))
    };
    order.environment.find("node").ok_or_else(|| missing("node"))?;
    let path = order.environment.find("npm").ok_or_else(|| missing("npm"))?;
    let mut args: Vec<String> = args.iter().chain(OPTIONS).map(|&arg| arg.to_owned()).collect();
    args.push(format!("--cache={}", order.cache().display()));
    Ok(Program { path, args, env: Vec::new(), answers: false })
}

/// A manifest that wants one package.
fn manifest(name: &str, version: &str) -> Result<String, WorkerError> {
    let manifest = json!({"name": FOLDER, "private": true, "dependencies": {name: version}});
    serde_json::to_string_pretty(&manifest).map(|text| text + "\n").map_err(WorkerError::internal)
}

/// What a lock file says.
#[derive(Debug)]
struct Resolved {
    version: String,
    scripts: Vec<String>,
    deprecated: Vec<String>,
}

/// Reads a lock file. One that is not of files of a registry with hashes is refused: what the options of
/// npm that say so do not mean to an older npm.
fn read(lock: &Value, name: &str, label: &str) -> Result<Resolved, WorkerError> {
    let packages = lock.get("packages").and_then(Value::as_object);
    let packages = packages.ok_or_else(|| failed("npm is too old: its lock file has no `packages`"))?;
    let (mut scripts, mut deprecated) = (BTreeSet::new(), Vec::new());
    for (path, entry) in packages.iter().filter(|(path, _)| !path.is_empty()) {
        let flag = |key: &str| entry.get(key).and_then(Value::as_bool).unwrap_or_default();
        let inner = path.rsplit("node_modules/").next().unwrap_or(path);
        if flag("link") || !path.starts_with("node_modules/") || path.split('/').any(|part| part == "..") {
            return Err(failed(format!("{label} needs {inner}, which is not in the registry")));
        }
        // What comes inside of another package's archive is covered by its hash.
        if !flag("inBundle") && entry.get("integrity").and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err(failed(format!(
                "{label} needs {inner}, of which the registry gives no hash: it could not be told from another"
            )));
        }
        if entry.get("resolved").is_some() {
            return Err(failed(format!("{label} needs {inner} from an address outside of the registry")));
        }
        if flag("hasInstallScript") {
            scripts.insert(inner.to_owned());
        }
        if let Some(text) = entry.get("deprecated").and_then(Value::as_str) {
            deprecated.push(format!("{inner} is deprecated: {text}"));
        }
    }
    let version = packages
        .get(&format!("node_modules/{name}"))
        .and_then(|entry| entry.get("version"))
        .and_then(Value::as_str)
        .ok_or_else(|| failed(format!("npm's lock file does not have {label}")))?;
    Ok(Resolved { version: version.to_owned(), scripts: scripts.into_iter().collect(), deprecated })
}

/// Warnings of npm about packages. What it says of its settings is not about them.
fn refuse_warnings(ran: &Ran, deprecated: Vec<String>, asked: &Asked<'_>) -> Result<(), WorkerError> {
    let mut warnings: Vec<String> = ran
        .said
        .iter()
        .filter(|line| line.starts_with("npm warn ") || line.starts_with("npm WARN "))
        .filter(|line| !line.contains(" Unknown "))
        .cloned()
        .collect();
    if warnings.is_empty() {
        warnings = deprecated;
    }
    if warnings.is_empty() {
        return Ok(());
    }
    let message = format!("npm warned about {}", asked.label());
    Err(errors::with_words(WorkerError::new(ErrorCode::InstallWarnings, message), &warnings))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(entries: Value) -> Value {
        let mut lock =
            json!({"packages": {"": {}, "node_modules/a": {"version": "1.0.0", "integrity": "sha512-x"}}});
        for (path, entry) in entries.as_object().unwrap() {
            lock["packages"][path] = entry.clone();
        }
        lock
    }

    #[test]
    fn a_lock_holds_files_of_the_registry_with_hashes() {
        let good = lock(json!({
            "node_modules/@s/b": {"version": "2.0.0", "integrity": "sha512-y", "hasInstallScript": true},
            "node_modules/@s/b/node_modules/c": {"version": "2.0.0", "integrity": "x", "hasInstallScript": true},
            "node_modules/a/node_modules/d": {"version": "1.0.0", "inBundle": true},
        }));
        let read_good = read(&good, "a", "a").unwrap();
        assert_eq!(
            (read_good.version.as_str(), read_good.scripts),
            ("1.0.0", vec!["@s/b".into(), "c".into()])
        );
        for bad in [
            json!({"node_modules/b": {"version": "1.0.0"}}),
            json!({"node_modules/b": {"version": "1.0.0", "integrity": ""}}),
            json!({"node_modules/b": {"link": true, "integrity": "x"}}),
            json!({"node_modules/b": {"integrity": "x", "resolved": "https://elsewhere/b.tgz"}}),
            json!({"../etc": {"integrity": "x"}}),
            json!({"node_modules/../../etc": {"integrity": "x"}}),
        ] {
            let error = read(&lock(bad.clone()), "a", "a").unwrap_err();
            assert_eq!(error.code, ErrorCode::InstallFailed, "{bad}");
        }
        assert!(read(&good, "b", "b").is_err() && read(&json!({}), "a", "a").is_err());
    }
}
