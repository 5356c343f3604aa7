//! One machine: the embedded store, a key of its own, the worker in process.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use mcp_shared::{
    config::Settings,
    crypter::KeyError,
    store::{
        Store, StoreError,
        embedded::{EmbeddedStore, OpenError},
    },
    vault::{self, KeySource, Vault, VaultError},
};

use secrecy::{ExposeSecret, SecretString};

/// The file with the generated key, below `DATA_DIR`.
pub const KEY_FILE: &str = "secrets.key";

/// Why the program cannot start here.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The store does not open.
    #[error(transparent)]
    Open(#[from] OpenError),
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
}

impl NodeError {
    /// Whether the settings are to blame, so that starting again changes nothing.
    pub fn is_configuration(&self) -> bool {
        match self {
            NodeError::Key(_) => true,
            // Another program may go away; a damaged file and missing rights do not mend themselves.
            NodeError::Open(error) => !matches!(error, OpenError::Locked { .. }),
            _ => false,
        }
    }
}

/// An error with its causes, in one line.
pub fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

impl From<VaultError> for NodeError {
    fn from(error: VaultError) -> Self {
        match error {
            VaultError::Weak { .. } | VaultError::KeyMismatch { .. } | VaultError::Key(_) => {
                NodeError::Key(error.to_string())
            }
            VaultError::Store(error) => NodeError::Store(error),
            other => NodeError::Vault(other),
        }
    }
}

/// Opens store and vault below `DATA_DIR`, and makes a key on the first start.
pub async fn open(settings: &Settings) -> Result<Vault, NodeError> {
    let store = EmbeddedStore::open(&settings.data_dir)?;
    let key = match key(settings, &*store).await? {
        Some(key) => key,
        None => {
            let path = settings.data_dir.join(KEY_FILE);
            generate(&path)?;
            tracing::info!(path = %path.display(), "a new key was generated; without this file stored secrets cannot be read");
            read(settings, &path)?
        }
    };
    Vault::open(store as Arc<dyn Store>, key, settings.legacy).await.map_err(|error| named(settings, error))
}

/// Opens a store that is there already to look into it, and adds nothing. `None`: it was never used, and
/// the first start will make a key.
pub async fn inspect(settings: &Settings) -> Result<Option<Vault>, NodeError> {
    let store = EmbeddedStore::open(&settings.data_dir)?;
    let Some(key) = key(settings, &*store).await? else { return Ok(None) };
    let opened = Vault::inspect(store as Arc<dyn Store>, key, settings.legacy).await;
    opened.map(Some).map_err(|error| named(settings, error))
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
            settings.data_dir.display(),
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
    let line = mcp_shared::crypter::generate_key_line()
        .map_err(|error: KeyError| NodeError::Key(error.to_string()))?;
    let staged = path.with_extension("new");
    let write = || -> io::Result<()> {
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
