//! What came of calls that their callers named. Results are users' data, and encrypted.

use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Vault, VaultError};
use crate::{
    crypter::{CryptoError, CryptoErrorKind, Place},
    error::WorkerError,
    idempotency::{CallState, NamedCall, RESULT_BYTES},
    ids::{IdempotencyKey, UserId, WorkerId},
    json::RawJson,
    store::{Collection, Document, Revision, StoreError, Versioned},
    timestamp::Timestamp,
};

/// The field with the caller's name for the call, which documents of earlier versions lack.
pub(super) const NAME: &str = "name";
/// Bytes of one encrypted part of a result. A part is less than a secret may have.
const PART: usize = 48 * 1024;

impl Vault {
    /// What is known of a user's named call.
    pub async fn named_call(
        &self,
        user: &UserId,
        key: &IdempotencyKey,
    ) -> Result<Option<Versioned<NamedCall>>, VaultError> {
        let stored = self.store.document(Collection::NamedCalls, &key_of(user, key)).await?;
        let Some(stored) = stored else { return Ok(None) };
        let value = self.open_named(user, key, &stored.value)?;
        Ok(Some(Versioned { revision: stored.revision, value }))
    }

    /// Writes down how far a named call is: a new one, or in place of what still has the revision `expected`.
    pub async fn put_named_call(
        &self,
        call: &NamedCall,
        expected: Option<Revision>,
    ) -> Result<Revision, VaultError> {
        let document = self.seal_named(call)?;
        Ok(match expected {
            None => self.store.insert_document(Collection::NamedCalls, &document).await?,
            Some(expected) => {
                self.store.replace_document(Collection::NamedCalls, &document, expected).await?
            }
        })
    }

    /// Forgets a named call that came to nothing.
    pub async fn delete_named_call(
        &self,
        user: &UserId,
        key: &IdempotencyKey,
        expected: Revision,
    ) -> Result<bool, VaultError> {
        let key = key_of(user, key);
        Ok(self.store.delete_document(Collection::NamedCalls, &key, Some(expected)).await?)
    }

    /// Forgets what was kept for long enough. Says of how many calls.
    pub async fn sweep_named_calls(&self) -> Result<u64, VaultError> {
        Ok(self.store.delete_expired(Collection::NamedCalls, Timestamp::now()).await?)
    }

    fn seal_named(&self, call: &NamedCall) -> Result<Document, VaultError> {
        let (state, text) = match &call.state {
            CallState::Running => ("running", None),
            CallState::TooLarge => ("too_large", None),
            CallState::Done(ended) => match ended.as_ref() {
                Ok(result) if result.as_bytes().len() > RESULT_BYTES => ("too_large", None),
                Ok(result) => ("result", Some(String::from_utf8_lossy(result.as_bytes()).into_owned())),
                Err(error) => ("error", Some(serde_json::to_string(error).unwrap_or_default())),
            },
        };
        let parts = match text {
            None => Vec::new(),
            Some(text) => self
                .seal_parts(call, &text)
                .map_err(|error| VaultError::Seal { what: "the result of a named call".to_owned(), error })?,
        };
        let document = json!({
            Collection::NamedCalls.key(): key_of(&call.user, &call.key),
            "username": call.user,
            // What the parts are bound to: without it they could not be encrypted anew under another key.
            NAME: call.key,
            "fingerprint": call.fingerprint,
            "worker": call.worker,
            "expireAt": call.expires_at,
            "state": state,
            "parts": parts,
        });
        match document {
            Value::Object(document) => Ok(document),
            _ => Err(StoreError::Corrupt { what: "a named call".to_owned() }.into()),
        }
    }

    fn seal_parts(&self, call: &NamedCall, text: &str) -> Result<Vec<String>, CryptoError> {
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() || parts.is_empty() {
            let mut end = rest.len().min(PART);
            while !rest.is_char_boundary(end) {
                end -= 1;
            }
            let (part, more) = rest.split_at(end);
            let number = part_number(parts.len(), more.is_empty());
            let ids = [call.user.as_str(), call.key.as_str(), number.as_str()];
            parts.push(self.seal(&place(&ids), &part.into())?);
            rest = more;
        }
        Ok(parts)
    }

    fn open_named(
        &self,
        user: &UserId,
        key: &IdempotencyKey,
        document: &Document,
    ) -> Result<NamedCall, VaultError> {
        let broken = || VaultError::Store(StoreError::Corrupt { what: "a named call".to_owned() });
        let text = |field: &str| document.get(field).and_then(Value::as_str).ok_or_else(broken);
        let state = match text("state")? {
            "running" => CallState::Running,
            "too_large" => CallState::TooLarge,
            kind => {
                let parts = document.get("parts").and_then(Value::as_array).ok_or_else(broken)?;
                let whole = self.open_parts(user, key, parts).map_err(|error| VaultError::Integrity {
                    what: "the result of a named call".to_owned(),
                    error,
                })?;
                let whole = whole.expose_secret();
                CallState::Done(Box::new(match kind {
                    "result" => Ok(RawJson::parse(whole.to_owned()).map_err(|_| broken())?),
                    "error" => Err(serde_json::from_str::<WorkerError>(whole).map_err(|_| broken())?),
                    _ => return Err(broken()),
                }))
            }
        };
        Ok(NamedCall {
            user: user.clone(),
            key: key.clone(),
            fingerprint: text("fingerprint")?.to_owned(),
            worker: WorkerId::from_stored(text("worker")?),
            expires_at: document
                .get("expireAt")
                .and_then(|at| serde_json::from_value(at.clone()).ok())
                .ok_or_else(broken)?,
            state,
        })
    }

    fn open_parts(
        &self,
        user: &UserId,
        key: &IdempotencyKey,
        parts: &[Value],
    ) -> Result<SecretString, CryptoError> {
        let mut whole = String::new();
        for (number, part) in parts.iter().enumerate() {
            let sealed = part.as_str().ok_or(CryptoErrorKind::Format)?;
            let number = part_number(number, number + 1 == parts.len());
            let ids = [user.as_str(), key.as_str(), number.as_str()];
            whole.push_str(self.unseal(&place(&ids), sealed)?.expose_secret());
        }
        Ok(whole.into())
    }
}

/// The key of a named call's document. Callers' names may be long, and look like anything.
pub(super) fn key_of(user: &UserId, key: &IdempotencyKey) -> String {
    let mut hash = Sha256::new();
    for part in [user.as_str(), key.as_str()] {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())
}

/// Where a part belongs, and whether it is the last: none can be left out or exchanged.
pub(super) fn part_number(number: usize, last: bool) -> String {
    format!("{number}{}", if last { "." } else { "" })
}

pub(super) fn place<'a>(ids: &'a [&'a str; 3]) -> Place<'a> {
    Place { collection: "idem", field: "result", ids }
}
