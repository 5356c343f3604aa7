//! The keys that a vault is opened with: made of what the settings have, and held against what the store says of
//! the keys that it was used with.

use super::{FIRST_KEY_FACT, KeySource, Purpose, VaultError, was_used};
use crate::{
    crypter::{
        Crypter, KeyError, KeyMaterial, KeyRing, LegacyMode, Passphrase, RingText, Salt, TEXT_KID, WeakKeys,
    },
    store::{Fact, Store, StoreError},
};

/// The fact that holds the salt of the passphrase.
pub(super) const SALT_FACT: &str = "argon2-salt";
/// The fact that tells this store from others.
pub(super) const STORE_FACT: &str = "store-id";

/// Makes the keys of a node and holds them against what the store says of keys.
pub(super) async fn make_crypter(
    purpose: Purpose,
    store: &dyn Store,
    key: KeySource,
    legacy: Option<LegacyMode>,
) -> Result<Crypter, VaultError> {
    let legacy_rows = store.legacy_secrets().await?;
    let mode = legacy.unwrap_or(if legacy_rows > 0 { LegacyMode::Rw } else { LegacyMode::Off });
    let needs_legacy = legacy_rows > 0 && mode != LegacyMode::Off;
    let weak = if needs_legacy { WeakKeys::LegacyOnly } else { WeakKeys::Refuse };
    let ring = match key {
        KeySource::RingFile(contents) => KeyRing::from_file(&contents)?,
        KeySource::Text(text) => ready(purpose, store, KeyMaterial::from_text(&text, weak)?).await?,
        KeySource::Both { ring, text } => {
            let contents = RingText::new(ring);
            let beside = if contents.refers_to_text() {
                ready(purpose, store, KeyMaterial::from_text(&text, WeakKeys::Refuse)?).await?
            } else {
                // It protects nothing, so that it may be as weak as mcp-api's was.
                KeyMaterial::from_text(&text, WeakKeys::LegacyOnly)?.into_legacy()
            };
            KeyRing::from_file_and_text(contents.contents(), Some(beside))?
        }
    };
    // Without this, every call that needs such a secret would fail instead of the start.
    if needs_legacy && !ring.has_legacy() {
        return Err(KeyError::NoLegacyKey.into());
    }
    check_keys(purpose, store, &ring).await?;
    if legacy_rows > 0 && mode == LegacyMode::Off {
        tracing::warn!(
            secrets = legacy_rows,
            "legacy mode off: the store has secrets in mcp-api's format, which cannot be read: start with \
             LEGACY_SECRETS=ro and rewrap them"
        );
    }
    Ok(Crypter::new(ring, mode)?)
}

/// The keys that `SECRETS_KEY` gives.
async fn ready(purpose: Purpose, store: &dyn Store, material: KeyMaterial) -> Result<KeyRing, VaultError> {
    match material {
        KeyMaterial::Ready(ring) => Ok(ring),
        KeyMaterial::Passphrase(passphrase) => stretch(purpose, store, passphrase).await,
    }
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
pub(super) async fn check_keys(
    purpose: Purpose,
    store: &dyn Store,
    ring: &KeyRing,
) -> Result<(), VaultError> {
    let mut known = false;
    let mut new = Vec::new();
    for kid in ring.kids() {
        let own = ring.check_value(kid).ok_or(KeyError::Derivation)?;
        match store.fact(Fact::KeyRing, &check_fact(kid)).await? {
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
            if store.put_once(Fact::KeyRing, &check_fact(kid), &own).await? != own {
                return Err(VaultError::KeyMismatch { kid: kid.to_owned() });
            }
        }
    }
    // A weak key has no check value, which would help to guess it. Where a strong one has been used,
    // a weak one is certainly another.
    if !ring.can_protect() && store.fact(Fact::KeyRing, &check_fact(TEXT_KID)).await?.is_some() {
        return Err(VaultError::KeyMismatch { kid: TEXT_KID.to_owned() });
    }
    Ok(())
}

/// Sees to it that this node has every key that ever encrypted something here, and that its own stands
/// among them. They are numbered in the order in which they came into use.
pub(super) async fn check_writing_keys(
    purpose: Purpose,
    store: &dyn Store,
    ring: &KeyRing,
) -> Result<(), VaultError> {
    let own = ring.primary_kid();
    // Whoever forgot it after it was retired could not read what is encrypted with it from now on.
    if let Some(own) = own
        && is_retired(store, own).await?
    {
        return Err(VaultError::KeyRetired { kid: own.to_owned() });
    }
    let mut recorded = false;
    for number in 1.. {
        let name = writing_fact(number);
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
        if missing && !is_retired(store, &kid).await? {
            return Err(VaultError::KeyMissing { kid });
        }
    }
    Ok(())
}

/// Whether nodes may have forgotten a key.
pub(super) async fn is_retired(store: &dyn Store, kid: &str) -> Result<bool, StoreError> {
    Ok(store.fact(Fact::KeyRing, &retired_fact(kid)).await?.is_some())
}

/// The fact that names the key that was the first, the second, ... to encrypt something here.
pub(super) fn writing_fact(number: u32) -> String {
    if number == 1 { FIRST_KEY_FACT.to_owned() } else { format!("writing-key:{number}") }
}

/// The fact that holds a key's check value.
pub(super) fn check_fact(kid: &str) -> String {
    format!("kcv:{kid}")
}

/// The fact that nothing needs a key any more.
pub(super) fn retired_fact(kid: &str) -> String {
    format!("retired:{kid}")
}

/// The id of a store, made by the node that opens it first.
pub(super) async fn store_id(purpose: Purpose, store: &dyn Store) -> Result<Option<String>, VaultError> {
    if purpose == Purpose::Inspect {
        return Ok(store.fact(Fact::KeyRing, STORE_FACT).await?);
    }
    let new = uuid::Uuid::new_v4().simple().to_string();
    Ok(Some(store.put_once(Fact::KeyRing, STORE_FACT, &new).await?))
}

/// Says at each start what is not as safe as it could be.
pub(super) fn warn_about(crypter: &Crypter) {
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
