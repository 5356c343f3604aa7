//! What a node of either program stands on: its store and its key.

use std::{io, path::PathBuf, process::ExitCode, time::Duration};

use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Settings, StoreSettings},
    lifecycle::{EX_CONFIG, EX_TEMPFAIL, complain, explain},
    store::{
        Store, StoreError,
        embedded::OpenError,
        open::{self, Access, ConnectError, Opened},
    },
    vault::{self, KeySource, Vault, VaultError},
};

mod keys;

pub use keys::{KEY_FILE, KeyPlace, Reloader, make_key};

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
    /// The audit log cannot be written.
    #[error(transparent)]
    Audit(#[from] crate::audit::OpenError),
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
            NodeError::Key(_) | NodeError::BusUnfit { .. } | NodeError::Audit(_) => true,
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
        self.status()
    }

    /// The exit status, for whoever has told already.
    pub fn status(&self) -> ExitCode {
        ExitCode::from(if self.is_configuration() { EX_CONFIG } else { EX_TEMPFAIL })
    }
}

impl From<VaultError> for NodeError {
    fn from(error: VaultError) -> Self {
        match error {
            VaultError::Weak { .. }
            | VaultError::KeyMismatch { .. }
            | VaultError::KeyMissing { .. }
            | VaultError::KeyRetired { .. }
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
                let place = KeyPlace::of(settings);
                let path = place.generate()?;
                tracing::info!(path = %path.display(), "a new key was generated; without this file stored secrets cannot be read");
                let read = place.read()?;
                read.ok_or_else(|| NodeError::Key(format!("{}: it is gone again", path.display())))?
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

/// An error about the key says which one is meant.
fn named(settings: &Settings, error: VaultError) -> NodeError {
    named_by(&KeyPlace::of(settings), error)
}

fn named_by(place: &KeyPlace, error: VaultError) -> NodeError {
    match NodeError::from(error) {
        NodeError::Key(text) => NodeError::Key(format!("{}: {text}", place.shown())),
        other => other,
    }
}

/// The key from the settings, else the one that was generated here. `None`: nothing was ever encrypted
/// here, so that a new key takes nothing away.
async fn key(settings: &Settings, store: &dyn Store) -> Result<Option<KeySource>, NodeError> {
    if let Some(key) = KeyPlace::of(settings).read()? {
        return Ok(Some(key));
    }
    let path = settings.data_dir.join(KEY_FILE);
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
