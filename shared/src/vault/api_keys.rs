//! API keys. What is stored of them is sealed as a whole, so that whoever can write to the database cannot
//! let themselves in.

use secrecy::ExposeSecret;
use serde_json::{Map, Value};

use super::{Vault, VaultError};
use crate::{
    api_key::ApiKey,
    crypter::{CryptoErrorKind, Place},
    metrics::count_integrity_failure,
    store::{Collection, Document, StoreError},
};

/// The field with the sealed record.
const RECORD: &str = "record";

impl Vault {
    /// All keys. One that cannot be opened lets nobody in: it is left out and logged.
    pub async fn api_keys(&self) -> Result<Vec<ApiKey>, VaultError> {
        let mut keys = Vec::new();
        for stored in self.store.documents(Collection::ApiKeys, false).await? {
            match self.open_api_key(&stored.value) {
                Ok(key) => keys.push(key),
                Err(error) => tracing::error!(%error, "an API key is left out"),
            }
        }
        Ok(keys)
    }

    /// Keeps a new key. [`StoreError::AlreadyExists`] when there is one with that id.
    pub async fn insert_api_key(&self, key: &ApiKey) -> Result<(), VaultError> {
        let seal = || -> Result<String, CryptoErrorKind> {
            let text = serde_json::to_string(key).map_err(|_| CryptoErrorKind::Format)?;
            self.crypter().seal_bound(&place(&[&key.id]), &text.into()).map_err(|error| error.kind())
        };
        let sealed = seal().map_err(|kind| VaultError::Seal { what: what(&key.id), error: kind.into() })?;
        let mut document: Document = Map::new();
        document.insert(Collection::ApiKeys.key().to_owned(), Value::from(key.id.as_str()));
        document.insert(RECORD.to_owned(), Value::from(sealed));
        self.store.insert_document(Collection::ApiKeys, &document).await?;
        Ok(())
    }

    /// Forgets a key; says whether there was one.
    pub async fn delete_api_key(&self, id: &str) -> Result<bool, VaultError> {
        Ok(self.store.delete_document(Collection::ApiKeys, id, None).await?)
    }

    fn open_api_key(&self, document: &Document) -> Result<ApiKey, VaultError> {
        let id = Collection::ApiKeys.key_in(document)?;
        let broken = || StoreError::Corrupt { what: what(id) };
        let sealed = document.get(RECORD).and_then(Value::as_str).ok_or_else(broken)?;
        let opened = self.crypter().open_bound(&place(&[id]), sealed);
        let opened = opened.inspect_err(|error| count_integrity_failure(error.kind()));
        let text = opened.map_err(|error| VaultError::Integrity { what: what(id), error })?;
        let key: ApiKey = serde_json::from_str(text.expose_secret()).map_err(|_| broken())?;
        if key.id == id { Ok(key) } else { Err(broken().into()) }
    }
}

fn place<'a>(ids: &'a [&'a str; 1]) -> Place<'a> {
    Place { collection: "apiKeys", field: RECORD, ids }
}

fn what(id: &str) -> String {
    format!("API key {}", crate::error::shorten(id, 64))
}
