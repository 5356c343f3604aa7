//! What a node of either program stands on: its store and its key.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Settings, StoreSettings},
    crypter::{KeyError, generate_key_line},
    lifecycle::{EX_CONFIG, EX_TEMPFAIL, complain, explain},
    store::{
        Store, StoreError,
        embedded::OpenError,
        open::{self, Access, ConnectError, Opened},
    },
    vault::{self, KeySource, Vault, VaultError},
};

/// The file with the generated key, below `DATA_DIR`.
pub const KEY_FILE: &str = "secrets.key";

/// How long to wait before trying again to reach what does not answer yet; also how often the log says so.
const AGAIN: Duration = Duration::from_secs(1);

/// Why a node cannot start. No message has a secret in it.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store does not open.
    #[error(transparent)]
    Open(#[from] ConnectError),
    /// NATS does not answer, which may pass.
    #[error("NATS at {servers} cannot be reached: {cause}")]
    BusUnreachable {
        /// Where it should be.
        servers: String,
        /// What happened.
        cause: String,
    },
    /// NATS answers, and does not let this node in or is not fit for it.
    #[error("NATS at {servers} cannot be used: {cause}")]
    BusUnfit {
        /// Where it is.
        servers: String,
        /// What is wrong, and what would mend it.
        cause: String,
    },
    /// The key is weak, missing or another one than the data was encrypted with.
    #[error("{0}")]
    Key(String),
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The store opened and then failed.
    #[error("the store failed: {0}")]
    Store(#[from] StoreError),
    /// What is stored cannot be read.
    #[error("{0}")]
    Vault(VaultError),
    /// A signal came while the node was still starting.
    #[error("stopped before the start was complete")]
    Stopped,
}

impl NodeError {
    /// Whether the settings are to blame, so that starting again changes nothing.
    pub fn is_configuration(&self) -> bool {
        match self {
            NodeError::Key(_) | NodeError::BusUnfit { .. } => true,
            NodeError::Open(error) => match error {
                // Another program may go away; a damaged file and missing rights do not mend themselves.
                ConnectError::Embedded(error) => !matches!(error, OpenError::Locked { .. }),
                ConnectError::Unreachable { .. } => false,
                ConnectError::Login { .. } | ConnectError::Unfit { .. } => true,
            },
            _ => false,
        }
    }

    /// Whether something on the network does not answer yet. Orchestrators start everything at once, so
    /// a start waits for that.
    fn may_come_up(&self) -> bool {
        matches!(
            self,
            NodeError::Open(ConnectError::Unreachable { .. })
                | NodeError::BusUnreachable { .. }
                | NodeError::Store(StoreError::Unavailable { .. })
        )
    }

    /// Tells the person who started the program, and returns its exit status.
    pub fn report(&self) -> ExitCode {
        if matches!(self, NodeError::Stopped) {
            return ExitCode::SUCCESS;
        }
        complain(&explain(self));
        ExitCode::from(if self.is_configuration() { EX_CONFIG } else { EX_TEMPFAIL })
    }
}

impl From<VaultError> for NodeError {
    fn from(error: VaultError) -> Self {
        match error {
            VaultError::Weak { .. }
            | VaultError::KeyMismatch { .. }
            | VaultError::KeyMissing { .. }
            | VaultError::Key(_) => NodeError::Key(error.to_string()),
            VaultError::Store(error) => NodeError::Store(error),
            other => NodeError::Vault(other),
        }
    }
}

/// Tries until it succeeds, fails for good, or `START_TIMEOUT_SECONDS` are over. A signal ends it too. A
/// single attempt has a limit of its own.
pub async fn patiently<T>(
    settings: &Settings,
    stop: &CancellationToken,
    mut attempt: impl AsyncFnMut() -> Result<T, NodeError>,
) -> Result<T, NodeError> {
    let deadline = Instant::now() + settings.start_timeout;
    let trying = async {
        let mut last = match attempt().await {
            Err(error) if error.may_come_up() => error,
            result => return result,
        };
        loop {
            if Instant::now() + AGAIN >= deadline {
                return Err(last);
            }
            tracing::warn!(error.cause = %explain(&last), "waiting");
            sleep(AGAIN).await;
            match timeout_at(deadline, attempt()).await {
                Err(_) => return Err(last),
                Ok(Err(error)) if error.may_come_up() => last = error,
                Ok(result) => return result,
            }
        }
    };
    tokio::select! {
        result = trying => result,
        () = stop.cancelled() => Err(NodeError::Stopped),
    }
}

/// Opens store and vault, and makes a key on the first start of a single node.
pub async fn open(settings: &Settings, stop: &CancellationToken) -> Result<Vault, NodeError> {
    patiently(settings, stop, async || {
        let Opened { store, description } = open::open(settings, Access::Use).await?;
        let key = match key(settings, &*store).await? {
            Some(key) => key,
            None => {
                let path = settings.data_dir.join(KEY_FILE);
                generate(&path)?;
                tracing::info!(path = %path.display(), "a new key was generated; without this file stored secrets cannot be read");
                read(settings, &path)?
            }
        };
        let opened = Vault::open(store, key, settings.legacy).await;
        let vault = opened.map_err(|error| named(settings, error))?;
        tracing::info!(store = %description, "store opened");
        Ok(vault)
    })
    .await
}

/// What looking into a store showed.
pub struct Inspected {
    /// What the store is, for people.
    pub description: String,
    /// `None`: it was never used, and the first start will make a key.
    pub vault: Result<Option<Vault>, NodeError>,
}

/// Opens a store that is there already to look into it, and adds nothing.
pub async fn inspect(settings: &Settings) -> Result<Inspected, NodeError> {
    let Opened { store, description } = open::open(settings, Access::Inspect).await?;
    let vault = async {
        let Some(key) = key(settings, &*store).await? else { return Ok(None) };
        let opened = Vault::inspect(store, key, settings.legacy).await;
        opened.map(Some).map_err(|error| named(settings, error))
    };
    Ok(Inspected { description, vault: vault.await })
}

/// Where the key comes from, for messages about it.
pub fn key_source(settings: &Settings) -> String {
    match (&settings.secrets_key, &settings.secrets_keys_file) {
        (Some(_), _) => "SECRETS_KEY".to_owned(),
        (None, Some(path)) => format!("SECRETS_KEYS_FILE ({})", path.display()),
        (None, None) => settings.data_dir.join(KEY_FILE).display().to_string(),
    }
}

/// An error about the key says which one is meant.
fn named(settings: &Settings, error: VaultError) -> NodeError {
    match NodeError::from(error) {
        NodeError::Key(text) => NodeError::Key(format!("{}: {text}", key_source(settings))),
        other => other,
    }
}

/// The key from the settings, else the one that was generated here. `None`: nothing was ever encrypted
/// here, so that a new key takes nothing away.
async fn key(settings: &Settings, store: &dyn Store) -> Result<Option<KeySource>, NodeError> {
    if let Some(key) = &settings.secrets_key {
        return Ok(Some(KeySource::Text(key.clone())));
    }
    if let Some(path) = &settings.secrets_keys_file {
        return read(settings, path).map(Some);
    }
    let path = settings.data_dir.join(KEY_FILE);
    if path.exists() {
        return read(settings, &path).map(Some);
    }
    if vault::was_used(store).await? {
        return Err(NodeError::Key(format!(
            "the data in {} was encrypted with a key that is not here: put {} back, or set SECRETS_KEY or \
             SECRETS_KEYS_FILE to the key that was used",
            match &settings.store {
                StoreSettings::Embedded => settings.data_dir.display().to_string(),
                StoreSettings::Mongo(mongo) => format!("MongoDB at {}", mongo.hosts),
            },
            path.display(),
        )));
    }
    Ok(None)
}

/// Reads a key ring. One that cannot be read is a mistake in the settings, not a fault that passes.
fn read(settings: &Settings, path: &Path) -> Result<KeySource, NodeError> {
    let contents = std::fs::read_to_string(path).map(SecretString::from);
    contents
        .map(KeySource::RingFile)
        .map_err(|error| NodeError::Key(format!("{} cannot be read: {error}", key_source(settings))))
}

/// Writes a new key where only the owner can read it. It is complete under its name or not there.
fn generate(path: &Path) -> Result<(), NodeError> {
    let line = generate_key_line().map_err(|error: KeyError| NodeError::Key(error.to_string()))?;
    let staged = path.with_extension("new");
    let write = || -> io::Result<()> {
        // The embedded store has made its folder; with MongoDB the key may be the first thing in it.
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let _ = std::fs::remove_file(&staged);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged)?;
        writeln!(file, "{}", line.expose_secret())?;
        file.sync_all()?;
        std::fs::rename(&staged, path)?;
        match path.parent() {
            Some(folder) => std::fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(|source| NodeError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(seconds: &str) -> Settings {
        let env = [("START_TIMEOUT_SECONDS".to_owned(), seconds.to_owned())];
        Settings::load(env.into_iter(), None).unwrap()
    }

    fn unreachable() -> NodeError {
        NodeError::BusUnreachable { servers: "nats://h:1".to_owned(), cause: "refused".to_owned() }
    }

    #[tokio::test]
    async fn what_may_come_up_is_waited_for() {
        let mut attempts = 0;
        let (settings, stop) = (settings("30"), CancellationToken::new());
        let result = patiently(&settings, &stop, async || {
            attempts += 1;
            if attempts < 3 { Err(unreachable()) } else { Ok(attempts) }
        });
        assert_eq!(result.await.unwrap(), 3);
    }

    #[tokio::test]
    async fn waiting_ends() {
        let (settings, hasty, stop) = (settings("30"), settings("1"), CancellationToken::new());
        let late = patiently(&hasty, &stop, async || Err::<(), _>(unreachable())).await;
        assert!(matches!(late, Err(NodeError::BusUnreachable { .. })));
        let mut attempts = 0;
        let wrong = patiently(&settings, &stop, async || {
            attempts += 1;
            Err::<(), _>(NodeError::Key("weak".to_owned()))
        });
        assert!(matches!(wrong.await, Err(NodeError::Key(_))));
        assert_eq!(attempts, 1, "settings do not change by waiting");
        stop.cancel();
        let stopped = patiently(&settings, &stop, async || {
            sleep(Duration::from_secs(600)).await;
            Ok(())
        });
        assert!(matches!(stopped.await, Err(NodeError::Stopped)));
    }

    #[test]
    fn exit_statuses_say_whether_to_try_again() {
        assert!(!unreachable().is_configuration());
        let unfit = NodeError::BusUnfit { servers: String::new(), cause: String::new() };
        assert!(unfit.is_configuration());
        let login = ConnectError::Login { hosts: String::new(), cause: String::new() };
        assert!(NodeError::Open(login).is_configuration());
    }
}
