//! What all parts of one worker share.

use std::path::PathBuf;

use mcp_shared::{
    ids::{SecretName, UserId, WorkerId},
    server::ServerRecord,
    vault::Vault,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroizing;

use crate::{secrets::SecretCache, supervisor::Supervisor};

/// Servers that are started side by side in the background: at boot, and after failures.
const BACKGROUND_STARTS: usize = 8;

/// One worker's means.
pub struct Host {
    /// This worker.
    pub worker_id: WorkerId,
    /// What is stored.
    pub vault: Vault,
    /// Secrets at hand, still encrypted.
    pub secrets: SecretCache,
    /// Starts processes and ends them.
    pub supervisor: Supervisor,
    /// Every task of this worker.
    pub tasks: TaskTracker,
    /// Set when the worker stops.
    pub stopping: CancellationToken,
    /// Bounds starts that nobody waits for.
    pub background_starts: Semaphore,
}

/// What a user's own process gets in its environment.
#[derive(Default)]
pub struct SecretEnv {
    /// The variables.
    pub variables: Vec<(String, Zeroizing<String>)>,
    /// The same values, to be kept out of logs.
    pub values: Vec<SecretString>,
    /// Names of secrets that the user has not set. Whether it can do without is the server's business.
    pub missing: Vec<String>,
}

impl Host {
    /// A worker's means. `executable` can be run as a supervisor.
    pub fn new(vault: Vault, executable: PathBuf) -> Self {
        Self {
            worker_id: WorkerId::generate(),
            secrets: SecretCache::new(vault.clone()),
            vault,
            supervisor: Supervisor::new(executable),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
            background_starts: Semaphore::new(BACKGROUND_STARTS),
        }
    }

    /// The secrets that the record's `secretEnv` puts into the environment of a user's own process,
    /// read from the store at this moment. The error is a sentence for people.
    pub async fn secret_env(
        &self,
        user: Option<&UserId>,
        record: &ServerRecord,
    ) -> Result<SecretEnv, String> {
        let mut env = SecretEnv::default();
        let Some(user) = user.filter(|_| !record.secret_env.is_empty()) else { return Ok(env) };
        let stored = self.vault.sealed_secrets(user, &record.name).await.map_err(|error| {
            tracing::error!(server = %record.name, error.cause = %error, "secrets cannot be read");
            "the user's secrets cannot be read".to_owned()
        })?;
        for (variable, name) in &record.secret_env {
            let Some(sealed) = stored.iter().find(|secret| secret.secret_name == *name) else {
                env.missing.push(name.to_string());
                continue;
            };
            let value = self.vault.open_secret(sealed).map_err(|error| integrity(name, &error))?;
            env.variables.push((variable.clone(), Zeroizing::new(value.expose_secret().to_owned())));
            env.values.push(value);
        }
        Ok(env)
    }
}

fn integrity(name: &SecretName, error: &impl std::fmt::Display) -> String {
    tracing::error!(secret = %name, error.cause = %error, "a stored secret cannot be decrypted");
    format!("the stored secret {name} cannot be decrypted; set it again")
}
