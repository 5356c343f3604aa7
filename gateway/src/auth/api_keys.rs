//! API keys as a gateway knows them: all of them in memory, read again every few moments, so that no call
//! waits for the store and a key that was revoked elsewhere is of no more use soon.

use std::{
    collections::HashMap,
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Arc, RwLock},
    time::Duration,
};

use mcp_shared::{
    api_key::{ApiKey, ApiKeyError, NewApiKey},
    config::Settings,
    error::{ErrorCode, WorkerError},
    ids::UserId,
    limits,
    node::NodeError,
    principal::{Principal, Reach, Scope},
    store::Fact,
    timestamp::Timestamp,
    vault::{Vault, VaultError},
};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::problem::Problem;

/// The file with the first key, below `DATA_DIR`.
const FIRST_KEY_FILE: &str = "admin.key";
/// The fact that somebody made the first key.
const FIRST_KEY: &str = "first-api-key";
/// How often keys are read at most because one is not known.
const MISSED: Duration = Duration::from_millis(500);

/// The keys, as they were read last.
#[derive(Default)]
struct Known {
    keys: HashMap<String, Arc<ApiKey>>,
    /// When the last reading began.
    read_at: Option<Instant>,
    /// When one was made or revoked here.
    changed_at: Option<Instant>,
}

/// When a reading began, and how it ended.
#[derive(Default)]
struct Missed {
    at: Option<Instant>,
    failed: bool,
}

/// All keys.
pub struct ApiKeys {
    vault: Vault,
    known: RwLock<Known>,
    /// The last reading because of one that is not known.
    missed: Mutex<Missed>,
}

impl ApiKeys {
    /// Reads them, and goes on doing so until `stop`. The first start makes one that may do everything.
    pub async fn open(
        settings: &Settings,
        vault: &Vault,
        stop: &CancellationToken,
    ) -> Result<Arc<Self>, NodeError> {
        first_key(settings, vault).await?;
        let keys =
            Arc::new(Self { vault: vault.clone(), known: RwLock::default(), missed: Mutex::default() });
        keys.read().await?;
        let (again, stop) = (Arc::clone(&keys), stop.clone());
        tokio::spawn(async move {
            while tokio::select! { () = sleep(limits::API_KEYS_REREAD) => true, () = stop.cancelled() => false }
            {
                if let Err(error) = again.read().await {
                    tracing::warn!(error.cause = %error, "API keys cannot be read");
                }
            }
        });
        Ok(keys)
    }

    /// Who comes with a key; `None`: nobody.
    pub async fn recognise(&self, text: &str) -> Result<Option<Principal>, Problem> {
        let Some(id) = ApiKey::id_of(text) else { return Ok(None) };
        let now = Timestamp::now();
        let (mut key, age) = self.look(id);
        if age.is_none_or(|age| age > limits::API_KEYS_TRUST) {
            return Err(unknown());
        }
        // It may have been made a moment ago, at another gateway.
        if key.is_none() {
            let asked = Instant::now();
            let mut last = self.missed.lock().await;
            if last.at.is_none_or(|at| at < asked) {
                // Who tries keys waits, and the store has no work with it.
                if let Some(at) = last.at {
                    sleep_until(at + MISSED).await;
                }
                *last = Missed { at: Some(Instant::now()), failed: true };
                match self.read().await {
                    Ok(()) => last.failed = false,
                    Err(error) => tracing::warn!(error.cause = %error, "API keys cannot be read"),
                }
            }
            key = self.look(id).0;
            if key.is_none() && last.failed {
                return Err(unknown());
            }
        }
        Ok(key.filter(|key| key.is(text, now)).map(|key| key.principal()))
    }

    /// All of them, as the store has them now.
    pub async fn list(&self) -> Result<Vec<ApiKey>, VaultError> {
        self.vault.api_keys().await
    }

    /// Makes a key, which works here at once, and elsewhere when somebody comes with it.
    pub async fn create(&self, new: NewApiKey, by: &Principal) -> Result<(ApiKey, SecretString), Problem> {
        let (key, text) = ApiKey::make(new, &by.credential).map_err(|error| match error {
            ApiKeyError::Invalid(rule) => Problem::invalid(rule),
            ApiKeyError::Random => WorkerError::internal(error).into(),
        })?;
        self.vault.insert_api_key(&key).await?;
        self.change(|keys| {
            keys.insert(key.id.clone(), Arc::new(key.clone()));
        });
        Ok((key, text))
    }

    /// Ends a key: here at once, and at other gateways within moments. Says whether there was one.
    pub async fn revoke(&self, id: &str) -> Result<bool, Problem> {
        let was = self.vault.delete_api_key(id).await?;
        self.change(|keys| {
            keys.remove(id);
        });
        Ok(was)
    }

    async fn read(&self) -> Result<(), VaultError> {
        let at = Instant::now();
        let read = timeout(limits::API_KEYS_TRUST, self.vault.api_keys()).await;
        let keys = read.unwrap_or_else(|_| {
            Err(mcp_shared::store::StoreError::Unavailable { cause: "no answer in time".to_owned() }.into())
        })?;
        let keys = keys.into_iter().map(|key| (key.id.clone(), Arc::new(key))).collect();
        let mut known = self.known.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Whoever changed something meanwhile knows better than what was read before that.
        if known.read_at.max(known.changed_at).is_none_or(|newer| newer < at) {
            (known.keys, known.read_at) = (keys, Some(at));
        }
        Ok(())
    }

    fn look(&self, id: &str) -> (Option<Arc<ApiKey>>, Option<Duration>) {
        let known = self.known.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        (known.keys.get(id).cloned(), known.read_at.map(|at| at.elapsed()))
    }

    fn change(&self, change: impl FnOnce(&mut HashMap<String, Arc<ApiKey>>)) {
        let mut known = self.known.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        change(&mut known.keys);
        // A reading that began before this must not undo it.
        known.changed_at = Some(Instant::now());
    }
}

fn unknown() -> Problem {
    let text = "API keys cannot be checked while the store does not answer";
    WorkerError::new(ErrorCode::StoreUnavailable, text).retry_after(limits::API_KEYS_REREAD).into()
}

/// On the first start with keys there is none, and nobody could make one: this makes a key that may do
/// everything, where only the owner of the files can read it. Of several nodes one does.
async fn first_key(settings: &Settings, vault: &Vault) -> Result<(), NodeError> {
    let store = vault.store();
    if store.fact(Fact::AppState, FIRST_KEY).await?.is_some() {
        return Ok(());
    }
    let none = vault.api_keys().await?.is_empty();
    let new = NewApiKey {
        name: "made on the first start".to_owned(),
        user: UserId::default(),
        scopes: Scope::ALL.iter().copied().collect(),
        reach: Reach::default(),
        expires_at: None,
    };
    let (key, text) = ApiKey::make(new, "the program").map_err(|error| NodeError::Key(error.to_string()))?;
    if !none || store.put_once(Fact::AppState, FIRST_KEY, &key.id).await? != key.id {
        return Ok(());
    }
    let path = settings.data_dir.join(FIRST_KEY_FILE);
    write(&path, &text).map_err(|source| NodeError::File { path: path.clone(), source })?;
    vault.insert_api_key(&key).await?;
    tracing::warn!(path = %path.display(), "a first API key was made, which may do everything; make others with it, revoke it, and remove the file");
    Ok(())
}

fn write(path: &Path, text: &SecretString) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    writeln!(file, "{}", text.expose_secret())?;
    file.sync_all()
}
