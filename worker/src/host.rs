//! What all parts of one worker share.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    path::PathBuf,
    sync::Arc,
};

use mcp_shared::{
    audit::Audit,
    config::{GoogleCredentials, LimitSettings, PackageSettings, RemoteSettings},
    ids::{SecretName, UserId, WorkerId},
    server::{Isolation, Scaling, ServerRecord},
    store::SealedSecret,
    vault::Vault,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{Semaphore, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroizing;

use crate::{
    builtin::WebTools,
    idempotency::NamedCalls,
    leases::{Hold, Leases},
    oauth::OAuth,
    outgoing::Outgoing,
    packages::Packages,
    secrets::SecretCache,
    supervisor::{Caps, Supervisor},
};

/// Servers that are started side by side in the background: at boot, and after failures.
const BACKGROUND_STARTS: usize = 8;

/// What a worker starts by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// Every enabled server, at once: there is no other worker.
    Everything,
    /// Nothing: in a cluster, servers are placed here or taken. What may run only once runs under a
    /// lease in the store.
    OnDemand,
}

/// One worker's means.
pub struct Host {
    /// This worker.
    pub worker_id: WorkerId,
    /// What is stored.
    pub vault: Vault,
    /// Secrets at hand, still encrypted.
    pub secrets: SecretCache,
    /// Starts processes and ends them.
    pub supervisor: Arc<Supervisor>,
    /// What is installed here.
    pub packages: Arc<Packages>,
    /// Named calls that run here.
    pub named_calls: NamedCalls,
    /// Sends requests to other machines.
    pub http: Outgoing,
    /// The built-in tools for the web.
    pub web_tools: Arc<WebTools>,
    /// Users' tokens for remote servers.
    pub oauth: OAuth,
    /// The application's credentials at Google.
    pub google: Option<GoogleCredentials>,
    /// Every task of this worker.
    pub tasks: TaskTracker,
    /// Set when the worker takes no more calls.
    pub draining: CancellationToken,
    /// Set when the worker stops, whatever is still in flight.
    pub stopping: CancellationToken,
    /// What may run here and only here; `None` on a single node, where everything may.
    pub leases: Option<Arc<Leases>>,
    /// Tells that ownership, status or draining may have changed.
    pub changed: watch::Sender<()>,
    /// Bounds starts that nobody waits for.
    pub background_starts: Semaphore,
    /// What is taken in at once.
    pub limits: LimitSettings,
    /// Where it is recorded what happens.
    pub audit: Option<Audit>,
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
    /// Changes when any of the secrets is set or deleted.
    pub fingerprint: u64,
}

impl Host {
    /// A worker's means. `executable` can be run as a supervisor.
    pub fn new(
        vault: Vault,
        executable: PathBuf,
        boot: Boot,
        packages: &PackageSettings,
        remote: &RemoteSettings,
        limits: &LimitSettings,
        audit: Option<Audit>,
    ) -> Self {
        let http = Outgoing::new(remote.egress.clone());
        let worker_id = WorkerId::generate();
        let tasks = TaskTracker::new();
        let leases = (boot == Boot::OnDemand)
            .then(|| Leases::new(Arc::clone(vault.store()), worker_id.clone(), tasks.clone()));
        let stopping = CancellationToken::new();
        let oauth =
            OAuth::new(vault.clone(), http.clone(), worker_id.clone(), tasks.clone(), stopping.clone());
        let supervisor = Supervisor::new(executable.clone())
            .with_caps(Caps { processes: limits.server_processes, memory: limits.server_memory });
        let supervisor = Arc::new(supervisor);
        // Of their own: what the browser may take is said by `CHROMIUM_MAX_MEMORY`, and what servers may take is less.
        let web_tools = WebTools::new(
            remote.web_tools.clone(),
            http.clone(),
            executable.clone(),
            Arc::new(Supervisor::new(executable)),
            (tasks.clone(), stopping.clone()),
        );
        Self {
            worker_id,
            secrets: SecretCache::new(vault.clone()),
            named_calls: NamedCalls::default(),
            supervisor,
            web_tools,
            packages: Arc::new(Packages::new(packages)),
            oauth,
            google: remote.google.clone(),
            http,
            vault,
            tasks,
            draining: CancellationToken::new(),
            stopping,
            leases,
            changed: watch::Sender::new(()),
            background_starts: Semaphore::new(BACKGROUND_STARTS),
            limits: limits.clone(),
            audit,
        }
    }

    /// What is to be asked before a group of processes runs; `None`: nothing.
    pub fn hold(&self, record: &ServerRecord, user: Option<&UserId>) -> Option<Hold> {
        let leases = self.leases.as_ref().filter(|_| runs_once(record));
        leases.map(|leases| leases.hold(&record.name, user))
    }

    /// To be called when ownership, status or draining may have changed.
    pub fn note_change(&self) {
        self.changed.send_replace(());
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
        env.fingerprint = fingerprint(record, &stored);
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

/// Whether what serves a call of one user may run at one worker only.
pub fn runs_once(record: &ServerRecord) -> bool {
    // Any number of workers may be connected to a remote server for one user.
    let own_process = record.isolation == Isolation::PerUser && !record.is_remote();
    own_process || record.scaling == Scaling::Singleton
}

/// Tells secrets of a process's environment from others, as they are stored: a value that is set again is
/// encrypted anew.
pub fn fingerprint(record: &ServerRecord, stored: &[SealedSecret]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for name in record.secret_env.values() {
        let sealed = stored.iter().find(|secret| secret.secret_name == *name);
        (name, sealed.map(|secret| &secret.value)).hash(&mut hasher);
    }
    hasher.finish()
}

fn integrity(name: &SecretName, error: &impl std::fmt::Display) -> String {
    tracing::error!(secret = %name, error.cause = %error, "a stored secret cannot be decrypted");
    format!("the stored secret {name} cannot be decrypted; set it again")
}
