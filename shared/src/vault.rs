//! The domain's view of the store: clear values outside, encrypted ones inside. Gateways and workers
//! hold one of these and never seal or open anything by themselves.

use std::{fmt, sync::Arc};

use arc_swap::ArcSwap;
use secrecy::{ExposeSecret, SecretString};

use crate::{
    crypter::{
        Crypter, CryptoError, CryptoErrorKind, KeyError, LegacyMode, Place, is_legacy, is_sealed, kid_of,
    },
    error::{ErrorCode, WorkerError, shorten},
    ids::{SecretName, ServerName, UserId},
    limits::SECRET_BYTES,
    metrics::count_integrity_failure,
    server::{ServerRecord, Transport, Variables},
    store::{Fact, Revision, SealedSecret, SealedServer, Store, StoreError, StoredTools, Versioned},
};

mod api_keys;
mod google;
mod idempotency;
mod keys;
mod opening;
mod packages;
mod pins;
mod remote;
mod rewrap;
mod texts;
mod tokens;

pub use keys::{KeyView, KeysView, KnownKey, NewKeys, RetireError};
pub use rewrap::{Left, RewrapError, RewrapReport, RewrapState, Rewrapping};
pub use texts::Census;

use opening::{check_writing_keys, make_crypter, store_id, warn_about};

/// The fact that holds the id of the key that a store was first used with.
const FIRST_KEY_FACT: &str = "first-key";

/// What opening a vault may leave behind in its store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// The check values of keys that the store has not seen, and the salt of its first passphrase.
    Use,
    /// Nothing.
    Inspect,
}

/// Where the encryption key comes from.
#[derive(Debug, Clone)]
pub enum KeySource {
    /// The text of `SECRETS_KEY`.
    Text(SecretString),
    /// The contents of a key ring file.
    RingFile(SecretString),
    /// A key ring file, and beside it the text of `SECRETS_KEY` for values in mcp-api's format, or for the line
    /// `k1:SECRETS_KEY`.
    Both {
        /// The contents of the file.
        ring: SecretString,
        /// `SECRETS_KEY`.
        text: SecretString,
    },
}

/// Why the vault did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The store did not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A stored value cannot be opened: it was changed or moved, or its key is gone.
    #[error("{what} cannot be decrypted ({})", error.kind())]
    Integrity {
        /// Which value, by names only.
        what: String,
        /// What the crypter said.
        error: CryptoError,
    },
    /// A new value cannot be encrypted.
    #[error("{what} cannot be encrypted ({})", error.kind())]
    Seal {
        /// Which value, by names only.
        what: String,
        /// What the crypter said.
        error: CryptoError,
    },
    /// The configured key could be guessed.
    #[error(transparent)]
    Weak(KeyError),
    /// The configured key is not the one that the store was first used with.
    #[error(
        "this node's key {kid} differs from the one that the stored data was encrypted with: configure that \
         key. If the data was never encrypted with another key than this one, delete `kcv:{kid}` from the \
         store's `keyring`"
    )]
    KeyMismatch {
        /// The key's id.
        kid: String,
    },
    /// Values were encrypted with a key that this node does not have.
    #[error(
        "this node lacks the key {kid}, which has been encrypting values of this store: add it to the keys of \
         this node. If nothing is left that needs it: `mcp-gateway keys retire {kid}`, on a node that has it"
    )]
    KeyMissing {
        /// The key's id.
        kid: String,
    },
    /// The key that is to encrypt was retired: nodes may have forgotten it.
    #[error(
        "the key {kid} was retired, and nodes may lack it: make another key the first one of the key ring"
    )]
    KeyRetired {
        /// The key's id.
        kid: String,
    },
    /// The configured key cannot be used.
    #[error(transparent)]
    Key(KeyError),
}

impl From<KeyError> for VaultError {
    fn from(error: KeyError) -> Self {
        match error {
            KeyError::Weak { .. } => Self::Weak(error),
            error => Self::Key(error),
        }
    }
}

impl From<VaultError> for WorkerError {
    fn from(error: VaultError) -> Self {
        match error {
            VaultError::Store(error) => error.into(),
            VaultError::Integrity { ref what, error } => {
                tracing::error!(%what, error.kind = %error.kind(), "a stored value cannot be decrypted");
                integrity_error()
            }
            VaultError::Seal { error, .. } if error.kind() == CryptoErrorKind::TooLarge => Self::new(
                ErrorCode::InvalidRequest,
                format!("A secret, variable or header may have at most {SECRET_BYTES} bytes"),
            ),
            error => Self::internal(error),
        }
    }
}

impl From<CryptoError> for WorkerError {
    /// The answer when a stored secret cannot be opened.
    fn from(error: CryptoError) -> Self {
        tracing::error!(error.kind = %error.kind(), "a stored secret cannot be decrypted");
        integrity_error()
    }
}

fn integrity_error() -> WorkerError {
    WorkerError::new(ErrorCode::SecretIntegrity, "A stored secret cannot be decrypted; set it again")
}

/// The store behind encryption. Cloning it is cheap and shares everything.
#[derive(Clone)]
pub struct Vault {
    store: Arc<dyn Store>,
    /// Exchanged as a whole when keys are read anew; whoever encrypts or decrypts waits for nobody.
    crypter: Arc<ArcSwap<Crypter>>,
    id: Option<Arc<str>>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("crypter", &self.crypter.load()).finish_non_exhaustive()
    }
}

impl Vault {
    /// Opens a store with a key. Refuses keys that are weak, and keys other than those that the store
    /// was used with before.
    ///
    /// Without `legacy`, a store that has secrets in mcp-api's format gets more of them, so that its
    /// programs can go on or come back ([`LegacyMode::Rw`]); any other store accepts none. Such a store
    /// may also be opened with mcp-api's weak key, for that format only.
    pub async fn open(
        store: Arc<dyn Store>,
        key: KeySource,
        legacy: Option<LegacyMode>,
    ) -> Result<Self, VaultError> {
        Self::open_for(Purpose::Use, store, key, legacy).await
    }

    /// Opens a store to look into it: as [`Vault::open`], but a key that the store has not seen is not
    /// recorded as one of its own.
    pub async fn inspect(
        store: Arc<dyn Store>,
        key: KeySource,
        legacy: Option<LegacyMode>,
    ) -> Result<Self, VaultError> {
        Self::open_for(Purpose::Inspect, store, key, legacy).await
    }

    async fn open_for(
        purpose: Purpose,
        store: Arc<dyn Store>,
        key: KeySource,
        legacy: Option<LegacyMode>,
    ) -> Result<Self, VaultError> {
        let crypter = make_crypter(purpose, &*store, key, legacy).await?;
        let id = store_id(purpose, store.as_ref()).await?.map(Arc::from);
        warn_about(&crypter);
        Ok(Self { store, crypter: Arc::new(ArcSwap::from_pointee(crypter)), id })
    }

    /// The store itself, for what is not encrypted.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// What tells this store from others; `None` where nobody has used it yet.
    pub fn store_id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// Records that this node encrypts with its key, before it encrypts anything: from then on a node
    /// without that key is refused. Nodes of a fleet do so when they have found that the others have it.
    pub async fn record_key(&self) -> Result<(), VaultError> {
        check_writing_keys(Purpose::Use, self.store.as_ref(), self.crypter().ring()).await
    }

    /// The crypter as it is now.
    pub fn crypter(&self) -> Arc<Crypter> {
        self.crypter.load_full()
    }

    /// The ids of this node's keys, the one that encrypts first.
    pub fn kids(&self) -> Vec<String> {
        self.crypter.load().ring().kids().map(str::to_owned).collect()
    }

    /// Whether this node has the key that a stored text names, if it names one.
    pub fn has_key_of(&self, text: &str) -> bool {
        kid_of(text).is_none_or(|kid| self.crypter.load().ring().kids().any(|own| own == kid))
    }

    fn mode(&self) -> LegacyMode {
        self.crypter.load().mode()
    }

    fn seal(&self, place: &Place<'_>, value: &SecretString) -> Result<String, CryptoError> {
        self.crypter.load().seal(place, value)
    }

    /// Opens a stored value, and counts those that cannot be opened.
    fn unseal(&self, place: &Place<'_>, text: &str) -> Result<SecretString, CryptoError> {
        let opened = self.crypter.load().open(place, text);
        opened.inspect_err(|error| count_integrity_failure(error.kind()))
    }

    /// Whether the store answers and can be written.
    pub async fn ping(&self) -> Result<(), VaultError> {
        Ok(self.store.ping().await?)
    }

    /// All servers, oldest first. One whose variables cannot be decrypted is left out and logged: it
    /// cannot run, and must not hide the others. [`Vault::server`] has its error.
    pub async fn servers(&self) -> Result<Vec<Versioned<ServerRecord>>, VaultError> {
        let mut servers = Vec::new();
        for sealed in self.store.servers().await? {
            match self.open_server(sealed) {
                Ok(server) => servers.push(server),
                Err(error) => tracing::error!(%error, "a server is left out"),
            }
        }
        Ok(servers)
    }

    /// One server.
    pub async fn server(&self, name: &ServerName) -> Result<Option<Versioned<ServerRecord>>, VaultError> {
        self.store.server(name).await?.map(|sealed| self.open_server(sealed)).transpose()
    }

    /// Adds a server, as [`Store::insert_server`].
    pub async fn insert_server(&self, server: &ServerRecord) -> Result<Revision, VaultError> {
        Ok(self.store.insert_server(&self.seal_server(server)?).await?)
    }

    /// Replaces a server that still has the revision `expected`, as [`Store::replace_server`].
    pub async fn replace_server(
        &self,
        server: &ServerRecord,
        expected: Revision,
    ) -> Result<Revision, VaultError> {
        Ok(self.store.replace_server(&self.seal_server(server)?, expected).await?)
    }

    /// Removes a server and all that belongs to it; says whether there was one.
    pub async fn delete_server(&self, name: &ServerName) -> Result<bool, VaultError> {
        Ok(self.store.delete_server(name).await?)
    }

    /// Sets a user's secret. [`StoreError::NotFound`] when its server does not exist.
    pub async fn put_secret(
        &self,
        user: &UserId,
        server: &ServerName,
        name: &SecretName,
        value: &SecretString,
    ) -> Result<(), VaultError> {
        let key = SealedSecret::key_of(server, name);
        let value = self
            .seal(&secret_place(&[user.as_str(), &key]), value)
            .map_err(|error| VaultError::Seal { what: what("secret", name.as_str(), server), error })?;
        let secret = SealedSecret {
            username: user.clone(),
            key,
            server_name: server.clone(),
            secret_name: name.clone(),
            value,
        };
        Ok(self.store.put_secret(&secret).await?)
    }

    /// Deletes a user's secret; says whether there was one.
    pub async fn delete_secret(
        &self,
        user: &UserId,
        server: &ServerName,
        name: &SecretName,
    ) -> Result<bool, VaultError> {
        Ok(self.store.delete_secret(user, server, name).await?)
    }

    /// A user's secrets for one server, still encrypted: caches may keep them like this.
    pub async fn sealed_secrets(
        &self,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Vec<SealedSecret>, VaultError> {
        Ok(self.store.secrets(user, server).await?)
    }

    /// Decrypts a secret, for as long as it is needed.
    pub fn open_secret(&self, secret: &SealedSecret) -> Result<SecretString, CryptoError> {
        // The value is bound to the key. The two names are stored beside it, and whoever can write to
        // the database must not be able to send a secret to another server by changing them alone.
        if secret.key != SealedSecret::key_of(&secret.server_name, &secret.secret_name) {
            count_integrity_failure(CryptoErrorKind::Misplaced);
            return Err(CryptoErrorKind::Misplaced.into());
        }
        self.unseal(&secret_place(&[secret.username.as_str(), &secret.key]), &secret.value)
    }

    /// How many users stored secrets for a server.
    pub async fn users_with_secrets(&self, server: &ServerName) -> Result<u64, VaultError> {
        Ok(self.store.users_with_secrets(server).await?)
    }

    /// Keeps the tools that a server listed.
    pub async fn put_tools(&self, tools: &StoredTools) -> Result<(), VaultError> {
        Ok(self.store.put_tools(tools).await?)
    }

    /// All listings of tools.
    pub async fn tools(&self) -> Result<Vec<StoredTools>, VaultError> {
        Ok(self.store.tools().await?)
    }

    fn seal_server(&self, server: &ServerRecord) -> Result<SealedServer, VaultError> {
        let mut sealed = each_variable(
            server.clone(),
            |place, value| self.seal_variable(place, value),
            |what, error| VaultError::Seal { what, error },
        )?;
        client_secret(
            &mut sealed,
            |place, value| self.seal(place, &value.into()),
            |what, error| VaultError::Seal { what, error },
        )?;
        // A record keeps the fields that its transport does not have, such as the variables that it had
        // before it became remote. Nothing reads them, and here they would be stored in clear.
        if self.mode() != LegacyMode::Rw {
            for field in texts::LEFTOVERS {
                sealed.extra.remove(field);
            }
        }
        Ok(SealedServer(sealed))
    }

    fn open_server(&self, sealed: Versioned<SealedServer>) -> Result<Versioned<ServerRecord>, VaultError> {
        let mut value = each_variable(
            sealed.value.0,
            |place, value| self.open_variable(place, value),
            |what, error| VaultError::Integrity { what, error },
        )?;
        client_secret(
            &mut value,
            |place, value| Ok(self.unseal(place, value)?.expose_secret().to_owned()),
            |what, error| VaultError::Integrity { what, error },
        )?;
        Ok(Versioned { revision: sealed.revision, value })
    }

    /// Why a value in mcp-api's format cannot be opened, if it cannot.
    pub fn refuses_legacy(&self, text: &str) -> Option<&'static str> {
        // The format knows of no place.
        let place = Place { collection: "", field: "", ids: &[] };
        self.crypter.load().open(&place, text).err().map(|error| error.kind().as_str())
    }

    pub(crate) fn seal_variable(&self, place: &Place<'_>, value: &str) -> Result<String, CryptoError> {
        // mcp-api has these in clear and could not read them otherwise. A value that looks encrypted
        // is encrypted all the same, because it would be taken for an encrypted one when it is read.
        if self.mode() == LegacyMode::Rw && !is_sealed(value) && !is_legacy(value) {
            if value.len() > SECRET_BYTES {
                return Err(CryptoErrorKind::TooLarge.into());
            }
            return Ok(value.to_owned());
        }
        self.seal(place, &value.into())
    }

    fn open_variable(&self, place: &Place<'_>, value: &str) -> Result<String, CryptoError> {
        // What has neither format is the clear text of an old database. It stops being accepted
        // together with the old format, or encryption could be undone from outside.
        if self.mode() != LegacyMode::Off && !is_sealed(value) && !is_legacy(value) {
            return Ok(value.to_owned());
        }
        Ok(self.unseal(place, value)?.expose_secret().to_owned())
    }
}

/// The place of a user's secret, by user name and key.
fn secret_place<'a>(ids: &'a [&'a str; 2]) -> Place<'a> {
    Place { collection: "secrets", field: "value", ids }
}

/// Puts the value of every environment variable or header of a server through `change`.
///
/// The place of a value has the variable's name in it, so that values cannot be exchanged between the
/// variables of one server. The collection is `servers` there: the place is part of our format and the
/// same in every store, whatever the collection is called (mcp-api's is `mcp`).
fn each_variable(
    mut record: ServerRecord,
    change: impl Fn(&Place<'_>, &str) -> Result<String, CryptoError>,
    failed: impl Fn(String, CryptoError) -> VaultError,
) -> Result<ServerRecord, VaultError> {
    let (field, kind, variables) = match &mut record.transport {
        Transport::Stdio { env, .. } => ("env", "variable", Some(env)),
        Transport::StreamableHttp { headers, .. } => ("headers", "header", headers.as_mut()),
    };
    for (name, value) in variables.into_iter().flat_map(|Variables(map)| map.iter_mut()) {
        let ids = [record.name.as_str(), name];
        *value = change(&Place { collection: "servers", field, ids: &ids }, value)
            .map_err(|error| failed(what(kind, name, &record.name), error))?;
    }
    Ok(record)
}

/// The same for what proves who we are to a remote server's authorization server. mcp-api does not have
/// the field, so that it is encrypted always.
fn client_secret(
    record: &mut ServerRecord,
    change: impl Fn(&Place<'_>, &str) -> Result<String, CryptoError>,
    failed: impl Fn(String, CryptoError) -> VaultError,
) -> Result<(), VaultError> {
    let Some(secret) = record.oauth_client.as_mut().and_then(|client| client.client_secret.as_mut()) else {
        return Ok(());
    };
    let ids = [record.name.as_str(), "clientSecret"];
    let changed = change(&Place { collection: "servers", field: "oauthClient", ids: &ids }, secret);
    *secret =
        changed.map_err(|error| failed(what("field", "oauthClient.clientSecret", &record.name), error))?;
    Ok(())
}

/// Names a value in logs, without showing it.
fn what(kind: &str, name: &str, server: &ServerName) -> String {
    format!("{kind} {} of server {}", shorten(name, 64), shorten(server.as_str(), 64))
}

/// Whether a store was ever opened with a key of our own. Without that key it is not to be used.
pub async fn was_used(store: &dyn Store) -> Result<bool, StoreError> {
    Ok(store.fact(Fact::KeyRing, FIRST_KEY_FACT).await?.is_some())
}

#[cfg(test)]
mod tests;
