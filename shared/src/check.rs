//! The command `check`: the settings as they take effect, and whether a program can serve with them. Nothing
//! is created that is not there already.

use std::{io::Write, path::Path, process::ExitCode};

use crate::{
    config::{ListenHost, Settings, StoreSettings},
    crypter::{KeyMaterial, KeyRing, RingText, WeakKeys},
    fleet::{NodeReport, Role},
    ids::WorkerId,
    lifecycle::{EX_CONFIG, address, explain},
    node::{self, Inspected, NodeError},
    store::{embedded::OpenError, open::ConnectError},
    vault::Vault,
};

/// What was looked at, and how it is.
pub type Finding = (&'static str, Result<String, String>);

/// Prints settings and findings, and says by the exit status whether all is well.
pub fn print(settings: &Settings, findings: &[Finding]) -> ExitCode {
    let mut out = std::io::stdout().lock();
    let mut say = |text: String| {
        // Somebody who closed the pipe has read enough.
        let _ = writeln!(out, "{text}");
    };
    say("settings".to_owned());
    for (name, value, origin) in settings.effective() {
        say(format!("  {name:<26} {value:<40} {origin}"));
    }
    for warning in &settings.warnings {
        say(format!("  warning: {warning}"));
    }
    say(String::new());
    let mut ok = true;
    for (what, finding) in findings {
        let (mark, text) = match finding {
            Ok(text) => ("ok", text),
            Err(text) => {
                ok = false;
                ("FAILED", text)
            }
        };
        say(format!("{what:<12} {mark}: {text}"));
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::from(EX_CONFIG) }
}

/// Whether an address can be listened on.
pub async fn listen(host: &ListenHost, port: u16) -> Result<String, String> {
    let address = address(host, port);
    match tokio::net::TcpListener::bind(&address).await {
        Ok(_) => Ok(format!("{address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Ok(format!("{address} is in use, by a running mcp-api or another program"))
        }
        Err(error) => Err(format!("{address}: {error}")),
    }
}

/// What the checks of store and key found.
pub struct Stored {
    /// The lines.
    pub findings: Vec<Finding>,
    /// This node as it would introduce itself to others, where the store could be looked into.
    pub node: Option<NodeReport>,
    /// The store with its keys, where both could be opened to look into them.
    pub vault: Option<Vault>,
}

/// Data folder, store and key.
pub async fn storage(settings: &Settings) -> Stored {
    let mut opened = None;
    let findings = look(settings, &mut opened).await;
    let id = WorkerId::from_stored("check");
    let node = opened.as_ref().map(|vault| NodeReport::of(id, Role::Gateway, (0, 0), vault));
    Stored { findings, node, vault: opened }
}

async fn look(settings: &Settings, opened: &mut Option<Vault>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let own_key = settings.secrets_key.is_none() && settings.secrets_keys_file.is_none();
    let embedded = matches!(settings.store, StoreSettings::Embedded);
    // With MongoDB and a key of the operator's nothing is kept on this machine.
    if embedded || own_key {
        findings.push(("data folder", data_folder(&settings.data_dir)));
    }
    if embedded && !settings.data_dir.join("mcp-api.db").exists() {
        findings.push(("store", Ok("will be made at the first start".to_owned())));
        findings.push(("key", key_without_store(settings)));
        return findings;
    }
    match node::inspect(settings).await {
        Ok(Inspected { description, vault }) => {
            if let Ok(Some(vault)) = &vault {
                *opened = Some(vault.clone());
            }
            let (store, key) = inspected(settings, &description, vault).await;
            findings.push(("store", store));
            findings.extend(key.map(|key| ("key", key)));
        }
        Err(NodeError::Open(ConnectError::Embedded(OpenError::Locked { .. }))) => {
            findings.push(("store", Ok("in use by a running mcp-api, so not looked into".to_owned())));
        }
        Err(error) => {
            findings.push(("store", Err(explain(&error))));
            if !embedded {
                findings.push(("key", key_without_store(settings)));
            }
        }
    }
    findings
}

type Line = Result<String, String>;

async fn inspected(
    settings: &Settings,
    description: &str,
    vault: Result<Option<Vault>, NodeError>,
) -> (Line, Option<Line>) {
    match vault {
        Ok(None) => {
            (Ok(format!("{description} opens, and was never used")), Some(key_without_store(settings)))
        }
        Ok(Some(vault)) => {
            let store = match vault.servers().await {
                Ok(servers) => Ok(format!("{description} opens, {} servers", servers.len())),
                Err(error) => Err(format!("{description}: {error}")),
            };
            let kids = vault.kids();
            let whose = if settings.bus.is_some() { "agrees with the fleet's" } else { "fits the data" };
            (store, Some(Ok(format!("{whose} (key ids: {})", kids.join(", ")))))
        }
        Err(error @ NodeError::Key(_)) => (Ok(format!("{description} opens")), Some(Err(error.to_string()))),
        Err(error) => (Err(explain(&error)), None),
    }
}

fn key_without_store(settings: &Settings) -> Result<String, String> {
    if let (Some(key), None) = (&settings.secrets_key, &settings.secrets_keys_file) {
        return match KeyMaterial::from_text(key, WeakKeys::Refuse) {
            Ok(_) => Ok("SECRETS_KEY is strong enough".to_owned()),
            Err(error) => Err(format!("SECRETS_KEY: {error}")),
        };
    }
    if let Some(path) = &settings.secrets_keys_file {
        let contents =
            std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let ring = RingText::new(contents.into());
        // Without the store nothing is known of the key of SECRETS_KEY but that it is there.
        if settings.secrets_key.is_none() {
            KeyRing::from_file(ring.contents()).map_err(|error| error.to_string())?;
        }
        return Ok(format!("{} has {} keys", path.display(), ring.kids().len()));
    }
    let path = settings.data_dir.join(node::KEY_FILE);
    if path.exists() {
        return Ok(format!("{} is there", path.display()));
    }
    Ok(format!("will be generated in {}", path.display()))
}

/// Whether the data folder can be used, or made.
pub fn data_folder(folder: &Path) -> Result<String, String> {
    if !folder.exists() {
        let ancestor = existing_ancestor(folder)?;
        return Ok(format!("{} will be made below {}", folder.display(), ancestor.display()));
    }
    if writable(folder) {
        Ok(format!("{} can be written", folder.display()))
    } else {
        Err(format!("{} cannot be written by this user", folder.display()))
    }
}

/// The nearest folder that exists above a path, if it can be written.
fn existing_ancestor(path: &Path) -> Result<&Path, String> {
    let parent =
        path.ancestors().skip(1).map(|one| if one.as_os_str().is_empty() { Path::new(".") } else { one });
    let ancestor = parent.into_iter().find(|one| one.exists()).unwrap_or(Path::new("."));
    if writable(ancestor) {
        Ok(ancestor)
    } else {
        Err(format!(
            "{} cannot be made: {} cannot be written by this user",
            path.display(),
            ancestor.display()
        ))
    }
}

/// Whether this user may make files in a folder: tried, since modes do not tell all.
fn writable(folder: &Path) -> bool {
    let probe = folder.join(format!(".mcp-api-check-{}", std::process::id()));
    let made = std::fs::OpenOptions::new().write(true).create_new(true).open(&probe).is_ok();
    made && std::fs::remove_file(&probe).is_ok()
}
