//! The domain's view of the store: clear values outside, encrypted ones inside. Gateways and workers
//! hold one of these and never seal or open anything by themselves.

use std::{fmt, sync::Arc};

use secrecy::{ExposeSecret, SecretString};

use crate::{
    crypter::{
        Crypter, CryptoError, CryptoErrorKind, KeyError, KeyMaterial, KeyRing, LegacyMode, Passphrase, Place,
        Salt, TEXT_KID, WeakKeys, is_legacy, is_sealed,
    },
    error::{ErrorCode, WorkerError, shorten},
    ids::{SecretName, ServerName, UserId},
    limits::SECRET_BYTES,
    server::{ServerRecord, Transport, Variables},
    store::{Fact, Revision, SealedSecret, SealedServer, Store, StoreError, StoredTools, Versioned},
};

mod idempotency;
mod packages;
mod remote;
mod tokens;

/// The fact that holds the salt of the passphrase.
const SALT_FACT: &str = "argon2-salt";
/// The fact that holds the id of the key that a store was first used with.
const FIRST_KEY_FACT: &str = "first-key";
/// The fact that tells this store from others.
const STORE_FACT: &str = "store-id";

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
         this node. If nothing is left that needs it, put `retired:{kid}` into the store's `keyring`"
    )]
    KeyMissing {
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
    crypter: Arc<Crypter>,
    id: Option<Arc<str>>,
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("crypter", &self.crypter).finish_non_exhaustive()
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
        let has_legacy_rows = store.legacy_secrets().await? > 0;
        let mode = legacy.unwrap_or(if has_legacy_rows { LegacyMode::Rw } else { LegacyMode::Off });
        let needs_legacy = has_legacy_rows && mode != LegacyMode::Off;
        let ring = match key {
            KeySource::RingFile(contents) => KeyRing::from_file(&contents)?,
            KeySource::Text(text) => {
                let weak = if needs_legacy { WeakKeys::LegacyOnly } else { WeakKeys::Refuse };
                match KeyMaterial::from_text(&text, weak)? {
                    KeyMaterial::Ready(ring) => ring,
                    KeyMaterial::Passphrase(passphrase) => {
                        stretch(purpose, store.as_ref(), passphrase).await?
                    }
                }
            }
        };
        // Without this, every call that needs such a secret would fail instead of the start.
        if needs_legacy && !ring.has_legacy() {
            return Err(KeyError::NoLegacyKey.into());
        }
        check_keys(purpose, store.as_ref(), &ring).await?;
        let id = store_id(purpose, store.as_ref()).await?.map(Arc::from);
        let crypter = Crypter::new(ring, mode)?;
        warn_about(&crypter);
        Ok(Self { store, crypter: Arc::new(crypter), id })
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
        check_writing_keys(Purpose::Use, self.store.as_ref(), self.crypter.ring()).await
    }

    /// The crypter, for values that are kept elsewhere.
    pub fn crypter(&self) -> &Arc<Crypter> {
        &self.crypter
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
            .crypter
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
            return Err(CryptoErrorKind::Format.into());
        }
        self.crypter.open(&secret_place(&[secret.username.as_str(), &secret.key]), &secret.value)
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
            |place, value| self.crypter.seal(place, &value.into()),
            |what, error| VaultError::Seal { what, error },
        )?;
        // A record keeps the fields that its transport does not have, such as the variables that it had
        // before it became remote. Nothing reads them, and here they would be stored in clear.
        if self.crypter.mode() != LegacyMode::Rw {
            for field in ["env", "headers"] {
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
            |place, value| Ok(self.crypter.open(place, value)?.expose_secret().to_owned()),
            |what, error| VaultError::Integrity { what, error },
        )?;
        Ok(Versioned { revision: sealed.revision, value })
    }

    fn seal_variable(&self, place: &Place<'_>, value: &str) -> Result<String, CryptoError> {
        // mcp-api has these in clear and could not read them otherwise. A value that looks encrypted
        // is encrypted all the same, because it would be taken for an encrypted one when it is read.
        if self.crypter.mode() == LegacyMode::Rw && !is_sealed(value) && !is_legacy(value) {
            if value.len() > SECRET_BYTES {
                return Err(CryptoErrorKind::TooLarge.into());
            }
            return Ok(value.to_owned());
        }
        self.crypter.seal(place, &value.into())
    }

    fn open_variable(&self, place: &Place<'_>, value: &str) -> Result<String, CryptoError> {
        // What has neither format is the clear text of an old database. It stops being accepted
        // together with the old format, or encryption could be undone from outside.
        if self.crypter.mode() != LegacyMode::Off && !is_sealed(value) && !is_legacy(value) {
            return Ok(value.to_owned());
        }
        Ok(self.crypter.open(place, value)?.expose_secret().to_owned())
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

/// Turns a passphrase into a key with the store's salt, which the first node makes.
async fn stretch(purpose: Purpose, store: &dyn Store, passphrase: Passphrase) -> Result<KeyRing, VaultError> {
    let salt = match store.fact(Fact::KeyRing, SALT_FACT).await? {
        Some(salt) => salt,
        // It was used without a passphrase, so this one is not its key and leaves nothing behind.
        None if was_used(store).await? => {
            // Unless another node has just made the salt, in the middle of its first start.
            let made = store.fact(Fact::KeyRing, SALT_FACT).await?;
            made.ok_or_else(|| VaultError::KeyMismatch { kid: TEXT_KID.to_owned() })?
        }
        None => {
            let new = Salt::generate()?.to_string();
            match purpose {
                Purpose::Use => store.put_once(Fact::KeyRing, SALT_FACT, &new).await?,
                Purpose::Inspect => new,
            }
        }
    };
    let salt = Salt::parse(&salt)?;
    let ring = tokio::task::spawn_blocking(move || passphrase.derive(&salt)).await;
    Ok(ring.map_err(|_| KeyError::Derivation)??)
}

/// Compares this node's keys with those that the store was used with before, and records new ones. A
/// node with another key would write what the rest of the fleet cannot read.
async fn check_keys(purpose: Purpose, store: &dyn Store, ring: &KeyRing) -> Result<(), VaultError> {
    let fact = |kid: &str| format!("kcv:{kid}");
    let mut known = false;
    let mut new = Vec::new();
    for kid in ring.kids() {
        let own = ring.check_value(kid).ok_or(KeyError::Derivation)?;
        match store.fact(Fact::KeyRing, &fact(kid)).await? {
            Some(stored) if stored == own => known = true,
            Some(_) => return Err(VaultError::KeyMismatch { kid: kid.to_owned() }),
            None => new.push((kid, own)),
        }
    }
    // The first key that was ever used here. Of several nodes that start at the same time, one was first.
    let first = match (purpose, ring.kids().next()) {
        (Purpose::Use, Some(own)) => Some(store.put_once(Fact::KeyRing, FIRST_KEY_FACT, own).await?),
        _ => store.fact(Fact::KeyRing, FIRST_KEY_FACT).await?,
    };
    // A new key stands beside an old one until nothing needs that any more. With new keys alone nothing
    // that is stored could be read. (The first key has no check value where a first start was cut short.)
    if let (Some((kid, _)), false, Some(first)) = (new.first(), known, &first)
        && !ring.kids().any(|kid| kid == first)
    {
        return Err(VaultError::KeyMismatch { kid: (*kid).to_owned() });
    }
    check_writing_keys(Purpose::Inspect, store, ring).await?;
    if purpose == Purpose::Use {
        for (kid, own) in new {
            // Another node may have been faster, with another key.
            if store.put_once(Fact::KeyRing, &fact(kid), &own).await? != own {
                return Err(VaultError::KeyMismatch { kid: kid.to_owned() });
            }
        }
    }
    // A weak key has no check value, which would help to guess it. Where a strong one has been used,
    // a weak one is certainly another.
    if !ring.can_protect() && store.fact(Fact::KeyRing, &fact(TEXT_KID)).await?.is_some() {
        return Err(VaultError::KeyMismatch { kid: TEXT_KID.to_owned() });
    }
    Ok(())
}

/// Sees to it that this node has every key that ever encrypted something here, and that its own stands
/// among them. They are numbered in the order in which they came into use.
async fn check_writing_keys(purpose: Purpose, store: &dyn Store, ring: &KeyRing) -> Result<(), VaultError> {
    let own = ring.kids().next();
    let mut recorded = false;
    let mut name = FIRST_KEY_FACT.to_owned();
    for number in 2.. {
        let kid = match (store.fact(Fact::KeyRing, &name).await?, own) {
            (Some(kid), _) => kid,
            (None, Some(own)) if !recorded && purpose == Purpose::Use => {
                store.put_once(Fact::KeyRing, &name, own).await?
            }
            (None, _) => break,
        };
        recorded |= own == Some(kid.as_str());
        // A ring without any key reads mcp-api's values alone; that it may is decided elsewhere.
        let missing = own.is_some() && !ring.kids().any(|own| own == kid);
        if missing && store.fact(Fact::KeyRing, &format!("retired:{kid}")).await?.is_none() {
            return Err(VaultError::KeyMissing { kid });
        }
        name = format!("writing-key:{number}");
    }
    Ok(())
}

/// The id of a store, made by the node that opens it first.
async fn store_id(purpose: Purpose, store: &dyn Store) -> Result<Option<String>, VaultError> {
    if purpose == Purpose::Inspect {
        return Ok(store.fact(Fact::KeyRing, STORE_FACT).await?);
    }
    let new = uuid::Uuid::new_v4().simple().to_string();
    Ok(Some(store.put_once(Fact::KeyRing, STORE_FACT, &new).await?))
}

/// Says at each start what is not as safe as it could be.
fn warn_about(crypter: &Crypter) {
    if !crypter.ring().can_protect() {
        tracing::warn!(
            "the encryption key is weak: it is accepted only because the store has secrets in mcp-api's \
             format, and used for nothing else; whoever has the database can guess it"
        );
    }
    match crypter.mode() {
        LegacyMode::Rw => tracing::warn!(
            "legacy mode rw: secrets are written in mcp-api's format, and variables of servers in clear, so \
             that mcp-api can use them; values are not bound to their user and server until this ends"
        ),
        LegacyMode::Ro => tracing::warn!(
            "legacy mode ro: values in mcp-api's format are still accepted, which are not bound to their \
             user and server"
        ),
        LegacyMode::Off => {}
    }
}

#[cfg(test)]
mod tests;
