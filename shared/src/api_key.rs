//! API keys: what they look like, and what is kept of them.

use std::fmt;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{
    ids::UserId,
    principal::{Credential, Principal, Reach, Scope, Scopes},
    timestamp::Timestamp,
};

/// What every key begins with, so that scanners for leaked secrets can know it.
const PREFIX: &str = "mcpk_";
/// Characters of a key's id.
const ID_CHARS: usize = 12;
/// The alphabet of ids: nothing that looks like something else.
const ID_ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// Random bytes of a key.
const SECRET_BYTES: usize = 32;
/// The longest name of a key, in characters.
const NAME_CHARS: usize = 100;
/// Servers, and tools, that one key may list.
const LISTED: usize = 256;

/// Why a key cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiKeyError {
    /// Something about it is not as it should be; the sentence says how it should.
    #[error("{0}")]
    Invalid(&'static str),
    /// The system gave no random bytes.
    #[error("the operating system gave no random bytes")]
    Random,
}

/// What is kept of a key: enough to recognise it, and not enough to use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApiKey {
    /// What it is called in lists and in the audit log. Not secret.
    pub id: String,
    /// What it is for, in its maker's words.
    pub name: String,
    /// The user whose key it is.
    pub user: UserId,
    /// What it is good for.
    pub scopes: Scopes,
    /// Where.
    #[serde(flatten)]
    pub reach: Reach,
    /// Who made it.
    pub created_by: String,
    /// When.
    pub created_at: Timestamp,
    /// Until when it works; `None`: until it is revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// SHA-256 of the whole key, in hexadecimal. The key has 256 random bits, which nobody guesses.
    hash: String,
}

/// What somebody asks for who wants a key.
#[derive(Debug, Clone)]
pub struct NewApiKey {
    /// What it is for.
    pub name: String,
    /// Whose it is.
    pub user: UserId,
    /// What it is good for.
    pub scopes: Scopes,
    /// Where.
    pub reach: Reach,
    /// Until when.
    pub expires_at: Option<Timestamp>,
}

impl ApiKey {
    /// Makes a key. It is shown once, and then only recognised.
    pub fn make(new: NewApiKey, created_by: impl fmt::Display) -> Result<(Self, SecretString), ApiKeyError> {
        check(&new)?;
        let mut random = zeroize::Zeroizing::new([0; ID_CHARS + SECRET_BYTES]);
        getrandom::fill(random.as_mut_slice()).map_err(|_| ApiKeyError::Random)?;
        let (id, secret) = random.split_at(ID_CHARS);
        let id: String = id.iter().map(|byte| char::from(ID_ALPHABET[usize::from(byte % 32)])).collect();
        let text = SecretString::from(format!("{PREFIX}{id}_{}", URL_SAFE_NO_PAD.encode(secret)));
        let key = Self {
            hash: hash(text.expose_secret()),
            id,
            name: new.name,
            user: new.user,
            scopes: new.scopes,
            reach: new.reach,
            created_by: created_by.to_string(),
            created_at: Timestamp::now(),
            expires_at: new.expires_at,
        };
        Ok((key, text))
    }

    /// The id that a text names which may be a key; `None`: it is none.
    pub fn id_of(text: &str) -> Option<&str> {
        let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
        let known = id.len() == ID_CHARS && id.bytes().all(|byte| ID_ALPHABET.contains(&byte));
        (known && secret.len() == SECRET_BYTES.div_ceil(3) * 4 - 1).then_some(id)
    }

    /// Whether a text claims to be a key.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with(PREFIX)
    }

    /// Whether a text is this key, and it still works.
    pub fn is(&self, text: &str, now: Timestamp) -> bool {
        let same: bool = hash(text).as_bytes().ct_eq(self.hash.as_bytes()).into();
        same && !self.is_over(now)
    }

    /// Whether its time is over.
    pub fn is_over(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }

    /// Who comes with it.
    pub fn principal(&self) -> Principal {
        Principal {
            user: self.user.clone(),
            credential: Credential::ApiKey { id: self.id.clone() },
            scopes: self.scopes.clone(),
            reach: self.reach.clone(),
        }
    }
}

fn hash(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

fn check(new: &NewApiKey) -> Result<(), ApiKeyError> {
    let length = new.name.chars().count();
    if new.name.trim().is_empty() || length > NAME_CHARS || new.name.chars().any(char::is_control) {
        return Err(ApiKeyError::Invalid(
            "name is required: 1 to 100 characters that say what the key is for",
        ));
    }
    if new.scopes.is_empty() {
        return Err(ApiKeyError::Invalid("scopes must have one at least"));
    }
    let reach =
        [new.reach.servers.as_ref().map(|list| list.len()), new.reach.tools.as_ref().map(|list| list.len())];
    if reach.iter().flatten().any(|listed| *listed == 0 || *listed > LISTED) {
        return Err(ApiKeyError::Invalid("servers and tools list 1 to 256 names each, or are not there"));
    }
    // Whoever registers servers and makes keys is confined by no list.
    if new.scopes.contains(&Scope::Admin) && (new.reach.servers.is_some() || new.reach.tools.is_some()) {
        return Err(ApiKeyError::Invalid(
            "a key with the scope admin reaches everything, and lists neither servers nor tools",
        ));
    }
    if new.expires_at.is_some_and(|end| end <= Timestamp::now()) {
        return Err(ApiKeyError::Invalid("expiresAt must be in the future"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(scopes: &[Scope]) -> NewApiKey {
        NewApiKey {
            name: "a test".to_owned(),
            user: UserId::parse("alice").unwrap(),
            scopes: scopes.iter().copied().collect(),
            reach: Reach::default(),
            expires_at: None,
        }
    }

    #[test]
    fn a_key_is_recognised_and_no_other() {
        let now = Timestamp::now();
        let (key, text) = ApiKey::make(new(&[Scope::Call]), "somebody").unwrap();
        let (other, other_text) = ApiKey::make(new(&[Scope::Call]), "somebody").unwrap();
        let text = text.expose_secret();
        assert_eq!(ApiKey::id_of(text), Some(key.id.as_str()));
        assert!(key.is(text, now) && !key.is(other_text.expose_secret(), now) && !other.is(text, now));
        for bad in [
            "",
            "mcpk_",
            "mcpk__",
            &text[1..],
            &text[..text.len() - 1],
            &format!("{text}x"),
            &text.to_uppercase(),
        ] {
            assert!(ApiKey::id_of(bad).is_none() || !key.is(bad, now), "{bad}");
        }
        let shown = format!("{key:?}{}", serde_json::to_string(&key).unwrap());
        assert!(!shown.contains(text.rsplit('_').next().unwrap()), "{shown}");
        let back: ApiKey = serde_json::from_str(&serde_json::to_string(&key).unwrap()).unwrap();
        assert_eq!(back, key);
    }

    #[test]
    fn keys_end() {
        let now = Timestamp::now();
        let soon = Timestamp::from_millis(now.millis() + 60_000);
        let (key, text) =
            ApiKey::make(NewApiKey { expires_at: Some(soon), ..new(&[Scope::Call]) }, "x").unwrap();
        assert!(key.is(text.expose_secret(), now));
        assert!(!key.is(text.expose_secret(), soon));
        assert!(ApiKey::make(NewApiKey { expires_at: Some(now), ..new(&[Scope::Call]) }, "x").is_err());
    }

    #[test]
    fn keys_that_make_no_sense_are_not_made() {
        let listed =
            Reach { servers: Some([crate::ids::ServerName::parse_new("a").unwrap()].into()), tools: None };
        let none = Reach { servers: Some([].into()), tools: None };
        for bad in [
            new(&[]),
            NewApiKey { name: " ".to_owned(), ..new(&[Scope::Call]) },
            NewApiKey { name: "a\nb".to_owned(), ..new(&[Scope::Call]) },
            NewApiKey { reach: none, ..new(&[Scope::Call]) },
            NewApiKey { reach: listed, ..new(&[Scope::Admin, Scope::Call]) },
        ] {
            assert!(ApiKey::make(bad.clone(), "x").is_err(), "{bad:?}");
        }
    }
}
