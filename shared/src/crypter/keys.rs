//! Keys: how they are read from settings, which of them are refused, and what is derived from them.

use std::fmt;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use base64::{
    Engine,
    engine::{GeneralPurpose, general_purpose as b64},
};
use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a key.
pub(super) const KEY_BYTES: usize = 32;
/// The id of the only key that `SECRETS_KEY` gives, and of the first key of a new key ring.
pub const TEXT_KID: &str = "k1";
/// What stands in the place of a key in a line of a key ring that means the one of `SECRETS_KEY`.
pub(super) const TEXT_REFERENCE: &str = "SECRETS_KEY";
/// What such a line must be.
const REFERENCE_RULE: &str =
    "means the key of SECRETS_KEY: it must be `k1:SECRETS_KEY`, with SECRETS_KEY set as well";
/// The shortest passphrase, in characters.
const PASSPHRASE_CHARS: usize = 32;
/// How many different characters (of a passphrase) or bytes (of a key) there must be. Random bytes
/// always pass: 32 of them have fewer different ones less than once in 10^30 keys.
const DIFFERENT: usize = 8;
/// How much of a passphrase must be left when everything that placeholders are made of is taken out.
const OWN_CHARS: usize = 16;

/// What placeholders and guesses are made of; longer words stand before those that they contain.
#[rustfmt::skip]
const PLACEHOLDERS: &[&str] = &[
    "abcdefghijklmnopqrstuvwxyz", "correcthorsebatterystaple", "0123456789abcdef", "development",
    "placeholder", "0123456789", "1234567890", "characters", "encryption", "passphrase", "production",
    "qwertyuiop", "123456789", "asdfghjkl", "12345678", "abcdefgh", "changeit", "changeme", "deadbeef",
    "password", "default", "example", "letmein", "private", "replace", "secrets", "testing", "welcome",
    "123456", "abcdef", "change", "insert", "mcpapi", "please", "qwerty", "random", "sample", "secret",
    "string", "admin", "bytes", "dummy", "super", "token", "value", "here", "must", "pass", "test",
    "this", "with", "your", "key", "mcp", "the",
];

/// A key in memory; it is overwritten when dropped.
pub(super) type Key = Zeroizing<[u8; KEY_BYTES]>;

/// Why a key was refused. No message repeats any part of a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It could be guessed.
    #[error(
        "the encryption key is too weak: it {reason}. A valid key is 32 random bytes in hexadecimal or base64, \
         or a passphrase of at least 32 characters, 8 of them different, that is no placeholder. \
         Make a key with `openssl rand -hex 32`"
    )]
    Weak {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A line of the key ring is not understood.
    #[error("line {line} of the key ring {reason}")]
    Line {
        /// Counted from one.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A key id that no key can have.
    #[error("a key id has 1 to 16 lower-case letters and digits")]
    Kid,
    /// A change of the key ring that makes no sense.
    #[error("the key ring {what}")]
    Ring {
        /// What is the matter with it.
        what: String,
    },
    /// There is no key in the key ring.
    #[error("the key ring has no keys; a line looks like `k1:<32 random bytes in base64>`")]
    EmptyRing,
    /// Values in mcp-api's format are to be read or written, and the key they need is missing.
    #[error(
        "values in mcp-api's format can only be read and written with its SECRETS_KEY: set that beside the key \
         ring, or switch the legacy mode off"
    )]
    NoLegacyKey,
    /// The stored salt is damaged.
    #[error("the stored salt of the passphrase is not 32 hexadecimal digits")]
    Salt,
    /// No key could be derived from the passphrase.
    #[error("the key could not be derived from the passphrase; this takes 64 MiB of memory")]
    Derivation,
    /// The system gave no random bytes.
    #[error("the operating system gave no random bytes")]
    Random,
}

/// What happens to a weak key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeakKeys {
    /// It is an error.
    Refuse,
    /// It gives a ring that knows mcp-api's format only, so that an existing database can be read. It
    /// never protects a value in our own format. An empty text is an error all the same.
    LegacyOnly,
}

/// The salt of a passphrase, made once for each store. It is not secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Salt([u8; 16]);

impl Salt {
    /// A new random salt.
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|_| KeyError::Random)?;
        Ok(Self(bytes))
    }

    /// Reads a stored salt.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| KeyError::Salt)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// What `SECRETS_KEY` turned out to be.
#[derive(Debug)]
pub enum KeyMaterial {
    /// Keys that can be used as they are.
    Ready(KeyRing),
    /// A passphrase, which needs the store's salt and some time to become a key.
    Passphrase(Passphrase),
}

impl KeyMaterial {
    /// Reads the text of `SECRETS_KEY`.
    pub fn from_text(text: &SecretString, weak: WeakKeys) -> Result<Self, KeyError> {
        let exposed = text.expose_secret();
        // mcp-api hashes the text exactly as it is set, so white space around it counts.
        let legacy = Key::new(Sha256::digest(exposed.as_bytes()).into());
        let kek = match check_text(exposed) {
            Err(error) if weak == WeakKeys::Refuse || exposed.trim().is_empty() => return Err(error),
            Err(_) => {
                return Ok(Self::Ready(KeyRing { keys: Vec::new(), legacy: Some(legacy) }));
            }
            Ok(kek) => kek,
        };
        Ok(match kek {
            Some(kek) => Self::Ready(KeyRing::single(kek, legacy)),
            None => Self::Passphrase(Passphrase { text: text.clone(), legacy }),
        })
    }

    /// What it has for values in mcp-api's format, and no more.
    pub fn into_legacy(self) -> KeyRing {
        let legacy = match self {
            Self::Ready(ring) => ring.legacy,
            Self::Passphrase(passphrase) => Some(passphrase.legacy),
        };
        KeyRing { keys: Vec::new(), legacy }
    }
}

/// A passphrase that is good enough to derive a key from.
pub struct Passphrase {
    text: SecretString,
    legacy: Key,
}

impl Passphrase {
    /// Derives the key with Argon2id (64 MiB, 3 passes). This takes a good part of a second, so
    /// asynchronous callers put it on a thread of its own.
    pub fn derive(self, salt: &Salt) -> Result<KeyRing, KeyError> {
        let params = Params::new(64 * 1024, 3, 1, Some(KEY_BYTES)).map_err(|_| KeyError::Derivation)?;
        let mut memory: Vec<Block> = Vec::new();
        memory.try_reserve_exact(params.block_count()).map_err(|_| KeyError::Derivation)?;
        memory.resize(params.block_count(), Block::new());
        let mut kek = Key::default();
        let derived = Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into_with_memory(
                self.text.expose_secret().as_bytes(),
                &salt.0,
                kek.as_mut_slice(),
                &mut memory,
            );
        // The key can be computed from the last blocks.
        for block in &mut memory {
            block.as_mut().zeroize();
        }
        derived.map_err(|_| KeyError::Derivation)?;
        Ok(KeyRing::single(kek, self.legacy))
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase")
    }
}

/// One key of the ring.
pub(super) struct RingKey {
    pub(super) kid: String,
    pub(super) kek: Key,
}

/// The keys that this process has: the first encrypts, all decrypt.
pub struct KeyRing {
    keys: Vec<RingKey>,
    legacy: Option<Key>,
}

impl KeyRing {
    /// Reads a key ring: lines `kid:base64(32 bytes)`, the primary key first. Blank lines and lines
    /// that begin with `#` are passed over.
    pub fn from_file(contents: &SecretString) -> Result<Self, KeyError> {
        Self::from_file_and_text(contents, None)
    }

    /// Reads a key ring that stands beside a `SECRETS_KEY`: `text_ring` is what that gave. The line
    /// `k1:SECRETS_KEY` says at which place its key stands; without that line it only reads (and in mode `rw`
    /// writes) values in mcp-api's format.
    pub fn from_file_and_text(contents: &SecretString, text_ring: Option<Self>) -> Result<Self, KeyError> {
        let mut keys: Vec<RingKey> = Vec::new();
        for (index, line) in contents.expose_secret().lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let refuse = |reason| KeyError::Line { line: index + 1, reason };
            let (kid, text) =
                line.split_once(':').ok_or_else(|| refuse("must be `kid:` and 32 bytes in base64"))?;
            if !is_kid(kid) {
                return Err(refuse("has a key id that is not 1 to 16 lower-case letters and digits"));
            }
            if keys.iter().any(|key| key.kid == kid) {
                return Err(refuse("repeats the key id of a line before it"));
            }
            let key = text.trim();
            if key == TEXT_REFERENCE {
                let own = text_key(kid, text_ring.as_ref());
                let kek = own.ok_or_else(|| refuse(REFERENCE_RULE))?;
                keys.push(RingKey { kid: kid.to_owned(), kek });
                continue;
            }
            let kek = from_base64(key).ok_or_else(|| refuse("has a key that is not 32 bytes in base64"))?;
            if !varied(&kek) {
                return Err(refuse("has a key that is not random; make one with `openssl rand -base64 32`"));
            }
            keys.push(RingKey { kid: kid.to_owned(), kek });
        }
        if keys.is_empty() {
            return Err(KeyError::EmptyRing);
        }
        Ok(Self { keys, legacy: text_ring.and_then(|ring| ring.legacy) })
    }

    fn single(kek: Key, legacy: Key) -> Self {
        Self { keys: vec![RingKey { kid: TEXT_KID.to_owned(), kek }], legacy: Some(legacy) }
    }

    /// The ids of all keys, the primary first. Empty when the key was too weak.
    pub fn kids(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|key| key.kid.as_str())
    }

    /// Whether there is a key for values in our own format. There is none when it was too weak.
    pub fn can_protect(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Whether there is a key for values in mcp-api's format.
    pub fn has_legacy(&self) -> bool {
        self.legacy.is_some()
    }

    /// The check value of a key, by which nodes find out whether they have the same one:
    /// the first 8 bytes of HMAC-SHA256(key, "mcpgw-kcv") in hexadecimal.
    pub fn check_value(&self, kid: &str) -> Option<String> {
        let key = self.key(kid)?;
        let mut mac = Hmac::<Sha256>::new_from_slice(key.kek.as_slice()).ok()?;
        mac.update(b"mcpgw-kcv");
        mac.finalize().into_bytes().get(..8).map(hex::encode)
    }

    /// The id of the key that encrypts; there is none when it was too weak.
    pub fn primary_kid(&self) -> Option<&str> {
        self.primary().map(|key| key.kid.as_str())
    }

    pub(super) fn primary(&self) -> Option<&RingKey> {
        self.keys.first()
    }

    pub(super) fn key(&self, kid: &str) -> Option<&RingKey> {
        self.keys.iter().find(|key| key.kid == kid)
    }

    pub(super) fn legacy(&self) -> Option<&Key> {
        self.legacy.as_ref()
    }
}

impl fmt::Debug for KeyRing {
    /// Says which keys there are, never what they are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing")
            .field("kids", &self.kids().collect::<Vec<_>>())
            .field("legacy", &self.has_legacy())
            .finish()
    }
}

/// The key of `SECRETS_KEY`, if a line with this id can mean it.
fn text_key(kid: &str, text_ring: Option<&KeyRing>) -> Option<Key> {
    Some(text_ring?.key(kid)?.kek.clone())
}

/// A line for a key ring: a key's id and 32 random bytes in base64.
pub fn generate_key_line(kid: &str) -> Result<SecretString, KeyError> {
    if !is_kid(kid) {
        return Err(KeyError::Kid);
    }
    let mut key = Key::default();
    getrandom::fill(key.as_mut_slice()).map_err(|_| KeyError::Random)?;
    // Room for the whole line from the start, so that no part of it stays behind in freed memory.
    let mut line = String::with_capacity(kid.len() + 1 + KEY_BYTES.div_ceil(3) * 4);
    line.push_str(kid);
    line.push(':');
    b64::STANDARD.encode_string(key.as_slice(), &mut line);
    Ok(line.into())
}

/// Whether a text can be the id of a key.
pub(super) fn is_kid(text: &str) -> bool {
    (1..=16).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// The key that a text of `SECRETS_KEY` spells out; `None` when it is a passphrase.
fn check_text(text: &str) -> Result<Option<Key>, KeyError> {
    let weak = |reason| Err(KeyError::Weak { reason });
    let text = text.trim();
    if text.is_empty() {
        return weak("is empty");
    }
    // Before the length is looked at, so that a text such as "secret" is called what it is.
    if is_placeholder(text) {
        return weak("is short or made of words that placeholders are made of");
    }
    if let Some(kek) = from_hex(text).or_else(|| from_base64(text)) {
        return if varied(&kek) { Ok(Some(kek)) } else { weak("repeats few bytes") };
    }
    if text.chars().count() < PASSPHRASE_CHARS {
        return weak("is shorter than 32 characters");
    }
    let mut different: Zeroizing<Vec<char>> = Zeroizing::new(text.chars().collect());
    different.sort_unstable();
    different.dedup();
    if different.len() < DIFFERENT {
        return weak("repeats few characters");
    }
    Ok(None)
}

/// Whether little is left of a text without the words of placeholders, whatever joins them.
fn is_placeholder(text: &str) -> bool {
    let mut rest = Zeroizing::new(String::with_capacity(text.len()));
    rest.extend(
        text.chars()
            .filter(|c| !c.is_whitespace() && !matches!(c, '-' | '_' | '.' | '<' | '>' | '!'))
            .map(|c| c.to_ascii_lowercase()),
    );
    for word in PLACEHOLDERS {
        while let Some(at) = rest.find(word) {
            rest.replace_range(at..at + word.len(), "");
        }
    }
    rest.chars().count() < OWN_CHARS
}

/// Whether a key has enough different bytes to have been made at random.
fn varied(key: &Key) -> bool {
    let mut bytes = key.clone();
    bytes.sort_unstable();
    1 + bytes.windows(2).filter(|pair| pair[0] != pair[1]).count() >= DIFFERENT
}

/// 32 bytes from 64 hexadecimal digits.
fn from_hex(text: &str) -> Option<Key> {
    let mut key = Key::default();
    hex::decode_to_slice(text, key.as_mut_slice()).ok()?;
    Some(key)
}

/// 32 bytes from base64 in the standard or the URL alphabet, padded or not.
fn from_base64(text: &str) -> Option<Key> {
    const ENGINES: [GeneralPurpose; 2] = [b64::STANDARD_PAD_INDIFFERENT, b64::URL_SAFE_PAD_INDIFFERENT];
    // The decoder wants room for whole groups of three bytes.
    let mut buffer = Zeroizing::new([0; KEY_BYTES.div_ceil(3) * 3]);
    for engine in ENGINES {
        if engine.decode_slice(text, buffer.as_mut_slice()) == Ok(KEY_BYTES) {
            let mut key = Key::default();
            key.copy_from_slice(&buffer[..KEY_BYTES]);
            return Some(key);
        }
    }
    None
}

#[cfg(test)]
mod tests;
