//! The keys of a node while it runs: read anew, looked at, and retired.

use std::path::Path;

use serde::Serialize;

use super::{
    Census, KeySource, Purpose, Vault, VaultError,
    opening::{
        check_fact, check_keys, check_writing_keys, is_retired, make_crypter, retired_fact, warn_about,
        writing_fact,
    },
};
use crate::{
    crypter::Crypter,
    store::{
        Fact, StoreError,
        embedded::{EmbeddedStore, OpenError},
    },
    timestamp::Timestamp,
};

/// Keys that were read and fit the store. Nothing uses them yet.
pub struct NewKeys(Crypter);

impl NewKeys {
    /// The ids of the keys, the one that will encrypt first.
    pub fn kids(&self) -> Vec<String> {
        self.0.ring().kids().map(str::to_owned).collect()
    }
}

/// A key as it stands in this node and in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyView {
    /// Its id.
    pub id: String,
    /// Whether this node encrypts with it.
    pub primary: bool,
    /// Whether this node has it.
    pub held: bool,
    /// By which nodes find out whether they have the same key; it does not help to guess it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check_value: Option<String>,
    /// Whether it ever encrypted something here, so that nodes must have it.
    pub used: bool,
    /// Whether nodes may forget it.
    pub retired: bool,
    /// Stored values that are encrypted with it.
    pub values: u64,
}

/// All keys that this node has or the store knows of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeysView {
    /// `rw`, `ro` or `off`.
    pub legacy_mode: &'static str,
    /// This node's keys, the one that encrypts first, and then those that it does not have.
    pub keys: Vec<KeyView>,
    /// Stored values in mcp-api's format.
    pub legacy_values: u64,
    /// Stored values in clear.
    pub clear_values: u64,
    /// What is stored and none of these.
    pub broken_values: u64,
}

/// Why a key was not retired.
#[derive(Debug, thiserror::Error)]
pub enum RetireError {
    /// Nobody knows it.
    #[error("there is no key {kid}")]
    Unknown {
        /// The key's id.
        kid: String,
    },
    /// It encrypts.
    #[error("{kid} is the key that encrypts: make another key the first one of the key ring before")]
    Primary {
        /// The key's id.
        kid: String,
    },
    /// What needs it would be lost.
    #[error("{values} stored values need the key {kid}: rewrap them before")]
    InUse {
        /// The key's id.
        kid: String,
        /// How many.
        values: u64,
    },
    /// The store did not do it.
    #[error(transparent)]
    Vault(#[from] VaultError),
}

impl From<StoreError> for RetireError {
    fn from(error: StoreError) -> Self {
        Self::Vault(error.into())
    }
}

impl Vault {
    /// Reads keys as [`Vault::open`] does, and refuses them for the same reasons. This node goes on with those
    /// that it has.
    pub async fn read_keys(&self, key: KeySource) -> Result<NewKeys, VaultError> {
        make_crypter(Purpose::Inspect, &*self.store, key, Some(self.mode())).await.map(NewKeys)
    }

    /// Records the key that is to encrypt, before it does: from then on nodes without it are refused.
    pub async fn record_keys(&self, new: &NewKeys) -> Result<(), VaultError> {
        check_keys(Purpose::Use, &*self.store, new.0.ring()).await?;
        check_writing_keys(Purpose::Use, &*self.store, new.0.ring()).await
    }

    /// Goes on with other keys, which were recorded. What is being encrypted or decrypted right now is finished
    /// with those that it was begun with.
    pub fn use_keys(&self, new: NewKeys) {
        warn_about(&new.0);
        self.crypter.store(std::sync::Arc::new(new.0));
    }

    /// The keys, and how much is encrypted with each of them. It reads everything that is encrypted.
    pub async fn keys(&self) -> Result<KeysView, VaultError> {
        let census = self.census().await?;
        let crypter = self.crypter();
        let ring = crypter.ring();
        let mut used = Vec::new();
        for number in 1.. {
            match self.store.fact(Fact::KeyRing, &writing_fact(number)).await? {
                Some(kid) => used.push(kid),
                None => break,
            }
        }
        let mut ids: Vec<String> = ring.kids().map(str::to_owned).collect();
        for kid in used.iter().chain(census.by_key.keys()) {
            if !ids.contains(kid) {
                ids.push(kid.clone());
            }
        }
        let mut keys = Vec::with_capacity(ids.len());
        for id in ids {
            let stored = self.store.fact(Fact::KeyRing, &check_fact(&id)).await?;
            keys.push(KeyView {
                primary: ring.primary_kid() == Some(id.as_str()),
                held: ring.kids().any(|kid| kid == id),
                check_value: ring.check_value(&id).or(stored),
                used: used.contains(&id),
                retired: is_retired(&*self.store, &id).await?,
                values: census.of(&id),
                id,
            });
        }
        let Census { legacy, clear, broken, .. } = census;
        Ok(KeysView {
            legacy_mode: crypter.mode().as_str(),
            keys,
            legacy_values: legacy,
            clear_values: clear,
            broken_values: broken,
        })
    }

    /// Says that nothing needs a key any more, so that nodes may forget it. It cannot be taken back: with `force`
    /// what needs it all the same is lost as soon as the key is.
    pub async fn retire_key(&self, kid: &str, force: bool) -> Result<(), RetireError> {
        let keys = self.keys().await?.keys;
        let Some(key) = keys.iter().find(|key| key.id == kid) else {
            return Err(RetireError::Unknown { kid: crate::error::shorten(kid, 16) });
        };
        if key.primary {
            return Err(RetireError::Primary { kid: kid.to_owned() });
        }
        if key.values > 0 && !force {
            return Err(RetireError::InUse { kid: kid.to_owned(), values: key.values });
        }
        self.store.put_once(Fact::KeyRing, &retired_fact(kid), &Timestamp::now().to_string()).await?;
        Ok(())
    }

    /// What the store says of a key id.
    pub async fn known_key(&self, kid: &str) -> Result<KnownKey, VaultError> {
        let seen = self.store.fact(Fact::KeyRing, &check_fact(kid)).await?.is_some();
        Ok(KnownKey { seen, retired: is_retired(&*self.store, kid).await? })
    }
}

/// What a store says of a key id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownKey {
    /// A node had a key of that id once.
    pub seen: bool,
    /// Nodes may forget it.
    pub retired: bool,
}

impl KnownKey {
    /// Looks into the store of a single node while its program runs.
    pub fn peek(data_dir: &Path, kid: &str) -> Result<Self, OpenError> {
        let is_there = |fact: &str| Ok(EmbeddedStore::peek(data_dir, Fact::KeyRing, fact)?.is_some());
        Ok(Self { seen: is_there(&check_fact(kid))?, retired: is_there(&retired_fact(kid))? })
    }
}
