//! `mcp-gateway check`: the settings as they take effect, and whether this machine can serve with them.

use std::{io::Write, path::Path, process::ExitCode};

use mcp_shared::{config::Settings, store::embedded::OpenError};

use crate::node::{self, NodeError};

/// Prints settings and findings. Nothing is created that is not there already.
pub async fn check(settings: &Settings) -> ExitCode {
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
    let findings = findings(settings).await;
    let mut ok = true;
    for (what, finding) in &findings {
        let (mark, text) = match finding {
            Ok(text) => ("ok", text),
            Err(text) => {
                ok = false;
                ("FAILED", text)
            }
        };
        say(format!("{what:<12} {mark}: {text}"));
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::from(crate::EX_CONFIG) }
}

type Finding = (&'static str, Result<String, String>);

async fn findings(settings: &Settings) -> Vec<Finding> {
    let folder = &settings.data_dir;
    let mut findings: Vec<Finding> = vec![("listen", listen(settings).await)];
    if !folder.exists() {
        let writable = existing_ancestor(folder);
        findings.push((
            "data folder",
            match writable {
                Ok(ancestor) => Ok(format!("{} will be made below {}", folder.display(), ancestor.display())),
                Err(text) => Err(text),
            },
        ));
        findings.push(("store", Ok("will be made at the first start".to_owned())));
        findings.push(("key", key_without_store(settings)));
        return findings;
    }
    findings.push((
        "data folder",
        match writable(folder) {
            true => Ok(format!("{} can be written", folder.display())),
            false => Err(format!("{} cannot be written by this user", folder.display())),
        },
    ));
    if !folder.join("mcp-api.db").exists() {
        findings.push(("store", Ok("will be made at the first start".to_owned())));
        findings.push(("key", key_without_store(settings)));
        return findings;
    }
    match node::inspect(settings).await {
        Ok(None) => {
            findings.push(("store", Ok("opens, and was never used".to_owned())));
            findings.push(("key", key_without_store(settings)));
        }
        Ok(Some(vault)) => {
            let servers = vault.servers().await.map(|servers| servers.len());
            findings.push((
                "store",
                match servers {
                    Ok(count) => Ok(format!("opens, {count} servers")),
                    Err(error) => Err(error.to_string()),
                },
            ));
            let kids: Vec<_> = vault.crypter().ring().kids().map(str::to_owned).collect();
            findings.push(("key", Ok(format!("fits the data (key ids: {})", kids.join(", ")))));
        }
        Err(NodeError::Open(OpenError::Locked { .. })) => {
            findings.push(("store", Ok("in use by a running mcp-api, so not looked into".to_owned())));
        }
        Err(error @ NodeError::Key(_)) => {
            findings.push(("store", Ok("opens".to_owned())));
            findings.push(("key", Err(error.to_string())));
        }
        Err(error) => findings.push(("store", Err(node::explain(&error)))),
    }
    findings
}

async fn listen(settings: &Settings) -> Result<String, String> {
    let address = crate::address(settings);
    match tokio::net::TcpListener::bind(&address).await {
        Ok(_) => Ok(format!("{address} is free")),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Ok(format!("{address} is in use, by a running mcp-api or another program"))
        }
        Err(error) => Err(format!("{address}: {error}")),
    }
}

fn key_without_store(settings: &Settings) -> Result<String, String> {
    use mcp_shared::crypter::{KeyMaterial, KeyRing, WeakKeys};

    if let Some(key) = &settings.secrets_key {
        return match KeyMaterial::from_text(key, WeakKeys::Refuse) {
            Ok(_) => Ok("SECRETS_KEY is strong enough".to_owned()),
            Err(error) => Err(format!("SECRETS_KEY: {error}")),
        };
    }
    if let Some(path) = &settings.secrets_keys_file {
        let contents =
            std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let ring = KeyRing::from_file(&contents.into()).map_err(|error| error.to_string())?;
        return Ok(format!("{} has {} keys", path.display(), ring.kids().count()));
    }
    Ok(format!("will be generated in {}", settings.data_dir.join(node::KEY_FILE).display()))
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
