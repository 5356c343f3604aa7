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

/// The fact that holds the salt of the passphrase.
const SALT_FACT: &str = "argon2-salt";
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
        let crypter = Crypter::new(ring, mode)?;
        warn_about(&crypter);
        Ok(Self { store, crypter: Arc::new(crypter) })
    }

    /// The store itself, for what is not encrypted.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
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
        let value = each_variable(
            sealed.value.0,
            |place, value| self.open_variable(place, value),
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
            return Err(VaultError::KeyMismatch { kid: TEXT_KID.to_owned() });
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
    // A new key stands beside an old one until nothing needs that any more. With new keys alone nothing
    // that is stored could be read.
    if let (Some((kid, _)), false) = (new.first(), known)
        && was_used(store).await?
    {
        return Err(VaultError::KeyMismatch { kid: (*kid).to_owned() });
    }
    if purpose == Purpose::Use {
        for (kid, own) in new {
            // Another node may have been faster, with another key.
            if store.put_once(Fact::KeyRing, &fact(kid), &own).await? != own {
                return Err(VaultError::KeyMismatch { kid: kid.to_owned() });
            }
        }
        if let Some(first) = ring.kids().next() {
            store.put_once(Fact::KeyRing, FIRST_KEY_FACT, first).await?;
        }
    }
    // A weak key has no check value, which would help to guess it. Where a strong one has been used,
    // a weak one is certainly another.
    if !ring.can_protect() && store.fact(Fact::KeyRing, &fact(TEXT_KID)).await?.is_some() {
        return Err(VaultError::KeyMismatch { kid: TEXT_KID.to_owned() });
    }
    Ok(())
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
mod tests {
    use std::{
        collections::BTreeMap,
        sync::{Mutex, MutexGuard},
    };

    use async_trait::async_trait;
    use serde_json::{Value, json};

    use super::*;
    use crate::store::Lease;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const OTHER_KEY: &str = "f00102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    const RING: &str = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    const PASSPHRASE: &str = "four little ducks went out on a windy day";
    /// `ghp_exampleToken`, encrypted by mcp-api with the key `secret`.
    const LEGACY: &str =
        "000102030405060708090a0b:3bd44ac43a96878a74f26e0391a6fb13:cebed4d40cbb04ecb1381bcb69372053";

    /// As much of a store as a vault needs.
    #[derive(Default)]
    struct MemoryStore(Mutex<State>);

    #[derive(Default)]
    struct State {
        servers: Vec<Versioned<SealedServer>>,
        secrets: Vec<SealedSecret>,
        facts: BTreeMap<String, String>,
    }

    impl MemoryStore {
        fn state(&self) -> MutexGuard<'_, State> {
            self.0.lock().unwrap()
        }
    }

    #[async_trait]
    impl Store for MemoryStore {
        async fn ping(&self) -> Result<(), StoreError> {
            Ok(())
        }

        async fn servers(&self) -> Result<Vec<Versioned<SealedServer>>, StoreError> {
            Ok(self.state().servers.clone())
        }

        async fn server(&self, name: &ServerName) -> Result<Option<Versioned<SealedServer>>, StoreError> {
            Ok(self.state().servers.iter().find(|server| server.value.0.name == *name).cloned())
        }

        async fn insert_server(&self, server: &SealedServer) -> Result<Revision, StoreError> {
            self.state().servers.push(Versioned { revision: Revision(1), value: server.clone() });
            Ok(Revision(1))
        }

        async fn replace_server(
            &self,
            server: &SealedServer,
            expected: Revision,
        ) -> Result<Revision, StoreError> {
            let mut state = self.state();
            let stored = state.servers.iter_mut().find(|stored| stored.value.0.name == server.0.name);
            let stored = stored.ok_or(StoreError::NotFound)?;
            if stored.revision != expected {
                return Err(StoreError::Conflict);
            }
            *stored = Versioned { revision: Revision(expected.0 + 1), value: server.clone() };
            Ok(stored.revision)
        }

        async fn delete_server(&self, name: &ServerName) -> Result<bool, StoreError> {
            let mut state = self.state();
            let before = state.servers.len();
            state.servers.retain(|server| server.value.0.name != *name);
            Ok(state.servers.len() < before)
        }

        async fn put_secret(&self, secret: &SealedSecret) -> Result<(), StoreError> {
            let mut state = self.state();
            state.secrets.retain(|old| (&old.username, &old.key) != (&secret.username, &secret.key));
            state.secrets.push(secret.clone());
            Ok(())
        }

        async fn delete_secret(
            &self,
            user: &UserId,
            server: &ServerName,
            name: &SecretName,
        ) -> Result<bool, StoreError> {
            let mut state = self.state();
            let (before, key) = (state.secrets.len(), SealedSecret::key_of(server, name));
            state.secrets.retain(|secret| (&secret.username, &secret.key) != (user, &key));
            Ok(state.secrets.len() < before)
        }

        async fn secrets(&self, user: &UserId, server: &ServerName) -> Result<Vec<SealedSecret>, StoreError> {
            let mine = |secret: &&SealedSecret| secret.username == *user && secret.server_name == *server;
            Ok(self.state().secrets.iter().filter(mine).cloned().collect())
        }

        async fn users_with_secrets(&self, _: &ServerName) -> Result<u64, StoreError> {
            Ok(0)
        }

        async fn legacy_secrets(&self) -> Result<u64, StoreError> {
            Ok(u64::try_from(self.state().secrets.iter().filter(|s| is_legacy(&s.value)).count()).unwrap())
        }

        async fn put_tools(&self, _: &StoredTools) -> Result<(), StoreError> {
            Ok(())
        }

        async fn tools(&self) -> Result<Vec<StoredTools>, StoreError> {
            Ok(Vec::new())
        }

        async fn lease(&self, _: &str) -> Result<Option<Lease>, StoreError> {
            Ok(None)
        }

        async fn take_lease(&self, _: &str, _: &str, _: Option<Revision>) -> Result<Lease, StoreError> {
            Err(StoreError::Conflict)
        }

        async fn renew_lease(&self, _: &Lease) -> Result<Lease, StoreError> {
            Err(StoreError::Conflict)
        }

        async fn release_lease(&self, _: &Lease) -> Result<(), StoreError> {
            Ok(())
        }

        async fn put_once(&self, _: Fact, key: &str, value: &str) -> Result<String, StoreError> {
            Ok(self.state().facts.entry(key.to_owned()).or_insert(value.to_owned()).clone())
        }

        async fn fact(&self, _: Fact, key: &str) -> Result<Option<String>, StoreError> {
            Ok(self.state().facts.get(key).cloned())
        }
    }

    fn text(key: &str) -> KeySource {
        KeySource::Text(key.into())
    }

    async fn opened(store: &Arc<MemoryStore>, key: &str, legacy: Option<LegacyMode>) -> Vault {
        Vault::open(store.clone(), text(key), legacy).await.unwrap()
    }

    async fn refusal(store: &Arc<MemoryStore>, key: KeySource, legacy: Option<LegacyMode>) -> VaultError {
        Vault::open(store.clone(), key, legacy).await.expect_err("it was opened")
    }

    /// A store that has a secret in mcp-api's format.
    fn old_store() -> Arc<MemoryStore> {
        let store = Arc::new(MemoryStore::default());
        store.state().secrets.push(SealedSecret {
            username: UserId::from_stored("alice"),
            key: "github.token".to_owned(),
            server_name: ServerName::from_stored("github"),
            secret_name: SecretName::from_stored("token"),
            value: LEGACY.to_owned(),
        });
        store
    }

    fn record(name: &str, transport: Value) -> ServerRecord {
        let mut document = json!({
            "_id": "6b031cdd6c5c3ee8dbcb20dd", "name": name,
            "createdAt": "2026-11-22T16:48:29.287Z", "updatedAt": "2026-11-22T16:48:29.287Z",
        });
        let Value::Object(map) = &mut document else { panic!("not an object") };
        let Value::Object(transport) = transport else { panic!("not an object") };
        map.extend(transport);
        let mut record = ServerRecord::from_document(map.clone()).unwrap();
        record.extra.clear();
        record
    }

    fn stdio(name: &str) -> ServerRecord {
        record(name, json!({"command": "node", "env": {"A": "value-a", "B": "value-b"}}))
    }

    /// The variables or headers of a record, to look at and to tamper with.
    fn variables(record: &mut ServerRecord) -> &mut BTreeMap<String, String> {
        match &mut record.transport {
            Transport::Stdio { env, .. } => &mut env.0,
            Transport::StreamableHttp { headers, .. } => &mut headers.as_mut().unwrap().0,
        }
    }

    fn tamper(store: &MemoryStore, index: usize, change: impl FnOnce(&mut BTreeMap<String, String>)) {
        change(variables(&mut store.state().servers[index].value.0));
    }

    fn stored(store: &MemoryStore, index: usize) -> BTreeMap<String, String> {
        variables(&mut store.state().servers[index].value.0).clone()
    }

    #[tokio::test]
    async fn variables_and_headers_are_clear_outside_and_encrypted_inside() {
        let store = Arc::new(MemoryStore::default());
        let vault = opened(&store, KEY, None).await;
        let http = json!({"transportType": "streamable_http", "url": "https://example.org/mcp",
            "headers": {"Authorization": "value-c"}});
        let servers = [stdio("one"), record("two", http), record("three", json!({"command": "node"}))];
        for (index, server) in servers.iter().enumerate() {
            let revision = vault.insert_server(server).await.unwrap();
            assert!(stored(&store, index).values().all(|value| is_sealed(value)));
            let read = vault.server(&server.name).await.unwrap().unwrap();
            assert_eq!(read, Versioned { revision, value: server.clone() });
        }
        let listed = vault.servers().await.unwrap();
        assert!(listed.iter().map(|server| &server.value).eq(&servers));

        let mut changed = servers[0].clone();
        variables(&mut changed).insert("A".to_owned(), "new".to_owned());
        let revision = vault.replace_server(&changed, Revision(1)).await.unwrap();
        let read = vault.server(&changed.name).await.unwrap().unwrap();
        assert_eq!(read, Versioned { revision, value: changed.clone() });
        let late = vault.replace_server(&changed, Revision(1)).await;
        assert!(matches!(late, Err(VaultError::Store(StoreError::Conflict))));
        assert!(vault.delete_server(&changed.name).await.unwrap());
        assert_eq!(vault.server(&changed.name).await.unwrap(), None);
    }

    #[tokio::test]
    async fn no_part_of_a_stored_document_has_a_value_in_clear() {
        let store = Arc::new(MemoryStore::default());
        let vault = opened(&store, KEY, None).await;
        let mut server = stdio("one");
        server.extra.insert("env".to_owned(), json!({"A": "value-a"}));
        server.extra.insert("headers".to_owned(), json!({"H": "value-h"}));
        server.extra.insert("catalogProvider".to_owned(), "kept".into());
        vault.insert_server(&server).await.unwrap();
        let document = store.state().servers[0].value.0.to_document().unwrap();
        let written = serde_json::to_string(&document).unwrap();
        assert!(!written.contains("value-") && written.contains("$mg1$k1$"), "{written}");
        assert_eq!(document["catalogProvider"], "kept");
    }

    #[tokio::test]
    async fn a_server_whose_values_were_moved_hides_no_other() {
        let store = Arc::new(MemoryStore::default());
        let vault = opened(&store, KEY, None).await;
        for name in ["one", "two", "three", "four"] {
            vault.insert_server(&stdio(name)).await.unwrap();
        }
        let from_two = stored(&store, 1)["A"].clone();
        tamper(&store, 0, |map| drop(map.insert("A".to_owned(), from_two)));
        tamper(&store, 2, |map| {
            let (a, b) = (map["A"].clone(), map["B"].clone());
            map.extend([("A".to_owned(), b), ("B".to_owned(), a)]);
        });
        tamper(&store, 3, |map| drop(map.insert("B".to_owned(), "clear".to_owned())));
        let names: Vec<_> = vault.servers().await.unwrap().into_iter().map(|s| s.value.name).collect();
        assert_eq!(names, [ServerName::from_stored("two")]);
        for (name, expected) in [
            ("one", CryptoErrorKind::TagMismatch),
            ("three", CryptoErrorKind::TagMismatch),
            ("four", CryptoErrorKind::Format),
        ] {
            let error = vault.server(&ServerName::from_stored(name)).await.unwrap_err();
            assert!(error.to_string().contains(&format!("of server {name}")), "{error}");
            assert!(matches!(error, VaultError::Integrity { error, .. } if error.kind() == expected));
            assert_eq!(WorkerError::from(error).code, ErrorCode::SecretIntegrity);
        }
    }

    #[tokio::test]
    async fn variables_stay_clear_for_as_long_as_mcp_api_needs_them() {
        let store = Arc::new(MemoryStore::default());
        let rw = opened(&store, KEY, Some(LegacyMode::Rw)).await;
        let mut server = stdio("one");
        variables(&mut server).insert("L".to_owned(), LEGACY.to_owned());
        variables(&mut server).insert("S".to_owned(), "$mg1$k1$".to_owned());
        round_trip(&rw, &server).await;
        let clear = stored(&store, 0);
        assert_eq!((clear["A"].as_str(), clear["B"].as_str()), ("value-a", "value-b"));
        // These would be taken for encrypted ones.
        assert!(["L", "S"].iter().all(|name| is_legacy(&clear[*name]) && clear[*name] != LEGACY));

        let ro = opened(&store, KEY, Some(LegacyMode::Ro)).await;
        let read = ro.server(&server.name).await.unwrap().unwrap();
        assert_eq!(read.value, server);
        ro.replace_server(&read.value, read.revision).await.unwrap();
        assert!(stored(&store, 0).values().all(|value| is_sealed(value)));
        for mode in [LegacyMode::Rw, LegacyMode::Ro, LegacyMode::Off] {
            let read = opened(&store, KEY, Some(mode)).await.server(&server.name).await.unwrap().unwrap();
            assert_eq!(read.value, server);
        }
    }

    async fn round_trip(vault: &Vault, server: &ServerRecord) {
        vault.insert_server(server).await.unwrap();
        assert_eq!(vault.server(&server.name).await.unwrap().unwrap().value, *server);
    }

    #[tokio::test]
    async fn a_secret_opens_for_its_user_and_server_only() {
        let store = Arc::new(MemoryStore::default());
        let vault = opened(&store, KEY, None).await;
        let (alice, github) = (UserId::from_stored("alice"), ServerName::from_stored("github"));
        let token = SecretName::from_stored("token");
        vault.put_secret(&alice, &github, &token, &"ghp_exampleToken".into()).await.unwrap();
        let sealed = vault.sealed_secrets(&alice, &github).await.unwrap().remove(0);
        assert!(is_sealed(&sealed.value));
        assert_eq!(vault.open_secret(&sealed).unwrap().expose_secret(), "ghp_exampleToken");

        let other = ServerName::from_stored("other");
        for moved in [
            SealedSecret { username: UserId::from_stored("bob"), ..sealed.clone() },
            SealedSecret { server_name: other.clone(), ..sealed.clone() },
            SealedSecret { server_name: other, key: "other.token".to_owned(), ..sealed.clone() },
            SealedSecret { secret_name: SecretName::from_stored("TOKEN"), ..sealed.clone() },
            SealedSecret { value: LEGACY.to_owned(), ..sealed.clone() },
            SealedSecret { value: "ghp_exampleToken".to_owned(), ..sealed.clone() },
        ] {
            let error = WorkerError::from(vault.open_secret(&moved).map(|_| ()).expect_err("it was opened"));
            assert_eq!(error.code, ErrorCode::SecretIntegrity);
            assert_eq!(error.message, "A stored secret cannot be decrypted; set it again");
        }
        assert!(vault.delete_secret(&alice, &github, &token).await.unwrap());
        assert!(vault.sealed_secrets(&alice, &github).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn values_that_are_too_large_are_the_callers_fault() {
        for mode in [LegacyMode::Rw, LegacyMode::Off] {
            let vault = opened(&Arc::new(MemoryStore::default()), KEY, Some(mode)).await;
            let mut server = stdio("one");
            let large = "x".repeat(SECRET_BYTES + 1);
            let (user, secret) = (UserId::default(), SecretName::from_stored("s"));
            let put = vault.put_secret(&user, &server.name, &secret, &large.clone().into()).await;
            variables(&mut server).insert("A".to_owned(), large);
            let insert = vault.insert_server(&server).await.map(|_| ());
            for error in [put, insert] {
                assert_eq!(WorkerError::from(error.unwrap_err()).code, ErrorCode::InvalidRequest);
            }
        }
    }

    #[tokio::test]
    async fn an_old_database_is_used_as_mcp_api_would() {
        let store = old_store();
        let vault = opened(&store, "secret", None).await;
        assert_eq!(vault.crypter().mode(), LegacyMode::Rw);
        let (alice, github) = (UserId::from_stored("alice"), ServerName::from_stored("github"));
        let old = vault.sealed_secrets(&alice, &github).await.unwrap().remove(0);
        assert_eq!(vault.open_secret(&old).unwrap().expose_secret(), "ghp_exampleToken");
        vault.put_secret(&alice, &github, &SecretName::from_stored("new"), &"x".into()).await.unwrap();
        assert!(store.state().secrets.iter().all(|secret| is_legacy(&secret.value)));
        round_trip(&vault, &stdio("one")).await;
        assert!(store.state().facts.is_empty());
        // A strong key there is used for both formats.
        let strong = opened(&store, KEY, None).await;
        assert_eq!((strong.crypter().mode(), strong.crypter().ring().kids().count()), (LegacyMode::Rw, 1));
    }

    #[tokio::test]
    async fn weak_keys_are_refused_unless_there_is_something_old_to_read() {
        let new = Arc::new(MemoryStore::default());
        for (store, legacy) in [
            (&new, None),
            (&new, Some(LegacyMode::Rw)),
            (&new, Some(LegacyMode::Ro)),
            (&new, Some(LegacyMode::Off)),
            (&old_store(), Some(LegacyMode::Off)),
        ] {
            let error = refusal(store, text("secret"), legacy).await;
            assert!(matches!(error, VaultError::Weak(_)), "{error:?}");
            assert!(store.state().facts.is_empty());
        }
        assert!(matches!(refusal(&old_store(), text(""), None).await, VaultError::Weak(_)));
        let ro = opened(&old_store(), "secret", Some(LegacyMode::Ro)).await;
        assert!(matches!(ro.insert_server(&stdio("one")).await, Err(VaultError::Seal { .. })));
    }

    #[tokio::test]
    async fn a_key_ring_needs_nothing_old_in_the_store() {
        let ring = || KeySource::RingFile(RING.into());
        let store = Arc::new(MemoryStore::default());
        let vault = Vault::open(store.clone(), ring(), None).await.unwrap();
        round_trip(&vault, &stdio("one")).await;
        for legacy in [None, Some(LegacyMode::Rw), Some(LegacyMode::Ro)] {
            let error = refusal(&old_store(), ring(), legacy).await;
            assert!(matches!(error, VaultError::Key(KeyError::NoLegacyKey)), "{error:?}");
        }
        assert!(Vault::open(old_store(), ring(), Some(LegacyMode::Off)).await.is_ok());
        let broken = refusal(&store, KeySource::RingFile("k1".into()), None).await;
        assert!(matches!(broken, VaultError::Key(KeyError::Line { line: 1, .. })), "{broken:?}");
    }

    #[tokio::test]
    async fn another_key_than_the_stores_is_refused() {
        let store = Arc::new(MemoryStore::default());
        opened(&store, KEY, None).await;
        assert_eq!(
            store.state().facts,
            BTreeMap::from([
                ("kcv:k1".to_owned(), "555b9c5f5496a81a".to_owned()),
                (FIRST_KEY_FACT.to_owned(), "k1".to_owned()),
            ])
        );
        opened(&store, KEY, None).await;
        store.state().secrets = old_store().state().secrets.clone();
        for key in [OTHER_KEY, "secret"] {
            let error = refusal(&store, text(key), None).await;
            assert!(matches!(&error, VaultError::KeyMismatch { kid } if kid == "k1"), "{error:?}");
            assert!(error.to_string().starts_with("this node's key k1 differs"), "{error}");
        }
        // A new key under a new name is welcome beside the old one, which is compared as well.
        store.state().secrets.clear();
        let new = "k2:__79_Pv6-fj39vX08_Lx8O_u7ezr6uno5-bl5OPi4eA";
        let error = refusal(&store, KeySource::RingFile(new.into()), None).await;
        assert!(matches!(&error, VaultError::KeyMismatch { kid } if kid == "k2"), "{error:?}");
        let ring = format!("{new}\n{RING}");
        let facts = store.state().facts.clone();
        Vault::inspect(store.clone(), KeySource::RingFile(ring.as_str().into()), None).await.unwrap();
        let error = refusal(&store, text(PASSPHRASE), None).await;
        assert!(matches!(error, VaultError::KeyMismatch { .. }), "{error:?}");
        assert_eq!(store.state().facts, facts, "looking and being refused leave nothing behind");
        Vault::open(store.clone(), KeySource::RingFile(ring.as_str().into()), None).await.unwrap();
        assert!(store.state().facts.contains_key("kcv:k2"));
        let swapped = ring.replace("k1", "k3").replace("k2", "k1");
        let error = refusal(&store, KeySource::RingFile(swapped.into()), None).await;
        assert!(matches!(&error, VaultError::KeyMismatch { kid } if kid == "k1"), "{error:?}");
    }

    #[tokio::test]
    async fn nodes_with_the_same_passphrase_share_its_salt() {
        let store = Arc::new(MemoryStore::default());
        let first = opened(&store, PASSPHRASE, None).await;
        first.insert_server(&stdio("one")).await.unwrap();
        let second = opened(&store, PASSPHRASE, None).await;
        assert_eq!(second.servers().await.unwrap()[0].value, stdio("one"));
        let other = refusal(&store, text(&PASSPHRASE.replace("four", "five")), None).await;
        assert!(matches!(other, VaultError::KeyMismatch { .. }), "{other:?}");
        store.state().facts.insert(SALT_FACT.to_owned(), "junk".to_owned());
        let damaged = refusal(&store, text(PASSPHRASE), None).await;
        assert!(matches!(damaged, VaultError::Key(KeyError::Salt)), "{damaged:?}");
    }

    #[tokio::test]
    async fn debug_output_shows_no_keys() {
        let vault = opened(&Arc::new(MemoryStore::default()), KEY, None).await;
        let shown = format!("{vault:?} {:?} {:?}", text(KEY), KeySource::RingFile(RING.into()));
        assert!(!shown.contains("000102") && !shown.contains("AAECA"), "{shown}");
    }
}
