//! Encryption at rest: AES-256-GCM under a fresh key for every value, bound to the place where the
//! value is stored, and the format of mcp-api for as long as its programs use the same database.
//!
//! A sealed value is `$mg1$<kid>$<base64url(salt ‖ commitment ‖ nonce ‖ ciphertext ‖ tag)>`. The key id's
//! key and the salt give, by HKDF, the value's own key and a commitment to it, which shows a wrong key
//! before anything is decrypted. The documents have the details and a golden vector.

use std::fmt;

use aes_gcm::{
    Aes256Gcm, Nonce,
    aead::{AeadInOut, KeyInit, Tag, inout::InOutBuf},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hkdf::Hkdf;
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::limits::SECRET_BYTES;

mod keys;
mod ring_text;

use keys::{KEY_BYTES, Key, is_kid};
pub use keys::{KeyError, KeyMaterial, KeyRing, Passphrase, Salt, TEXT_KID, WeakKeys, generate_key_line};
pub use ring_text::RingText;

/// What every sealed value begins with. Values of mcp-api are hexadecimal and cannot have it.
const PREFIX: &str = "$mg1$";
const SALT_BYTES: usize = 16;
const COMMIT_BYTES: usize = 32;
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
/// Bytes before the ciphertext.
const HEAD_BYTES: usize = SALT_BYTES + COMMIT_BYTES + NONCE_BYTES;
/// Characters of the base64 part of the longest value.
const BODY_CHARS: usize = (HEAD_BYTES + SECRET_BYTES + TAG_BYTES).div_ceil(3) * 4;

/// Why a value could not be sealed or opened. Whoever sent the value learns nothing from it: the
/// sentence is the same for all kinds. [`CryptoError::kind`] is for logs and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value cannot be encrypted or decrypted")]
pub struct CryptoError {
    kind: CryptoErrorKind,
}

impl CryptoError {
    /// What went wrong, for logs and metrics only.
    pub fn kind(&self) -> CryptoErrorKind {
        self.kind
    }
}

impl From<CryptoErrorKind> for CryptoError {
    fn from(kind: CryptoErrorKind) -> Self {
        Self { kind }
    }
}

/// The kinds of [`CryptoError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CryptoErrorKind {
    /// The text is not a sealed value.
    Format,
    /// This process does not have the key that the value names.
    UnknownKid,
    /// The key with that name is not the one that sealed the value.
    CommitMismatch,
    /// The value was changed, or belongs to another place.
    TagMismatch,
    /// The value has mcp-api's format, which is not accepted any more.
    LegacyOff,
    /// The document that has the value stands under another key than the names in it give.
    Misplaced,
    /// The value is larger than a secret may be.
    TooLarge,
    /// The operating system gave no random bytes, or the cipher refused to work.
    Internal,
}

impl CryptoErrorKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Format,
        Self::UnknownKid,
        Self::CommitMismatch,
        Self::TagMismatch,
        Self::LegacyOff,
        Self::Misplaced,
        Self::TooLarge,
        Self::Internal,
    ];

    /// The kind as a label of a metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Format => "format",
            Self::UnknownKid => "unknown_kid",
            Self::CommitMismatch => "commit_mismatch",
            Self::TagMismatch => "tag_mismatch",
            Self::LegacyOff => "legacy_off",
            Self::Misplaced => "misplaced",
            Self::TooLarge => "too_large",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for CryptoErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is done with values in mcp-api's format, which are bound to no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegacyMode {
    /// Values are read in both formats and written in mcp-api's, because its programs still run on
    /// the same database or may have to again.
    Rw,
    /// Values are read in both formats and written in ours.
    Ro,
    /// A value in mcp-api's format is an error.
    Off,
}

impl LegacyMode {
    /// The mode as settings spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rw => "rw",
            Self::Ro => "ro",
            Self::Off => "off",
        }
    }
}

/// Where a value is stored. It can be opened in this place only.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The collection of the document.
    pub collection: &'a str,
    /// The field of the document.
    pub field: &'a str,
    /// What tells the document (and the entry, where the field is a map) from all others.
    pub ids: &'a [&'a str],
}

impl Place<'_> {
    /// The additional data of the cipher. Every part has its length before it, so that no two places
    /// give the same bytes: ("alice", "g...") and ("aliceg", "...") differ.
    fn additional_data(&self, kid: &str) -> Result<Vec<u8>, CryptoError> {
        let mut out = b"mcpgw-aead-v1".to_vec();
        for part in [kid, self.collection, self.field].into_iter().chain(self.ids.iter().copied()) {
            push_prefixed(&mut out, part)?;
        }
        Ok(out)
    }
}

/// Appends a text with its length in four bytes before it.
fn push_prefixed(out: &mut Vec<u8>, part: &str) -> Result<(), CryptoError> {
    let length = u32::try_from(part.len()).map_err(|_| CryptoErrorKind::TooLarge)?;
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(part.as_bytes());
    Ok(())
}

/// Whether a text claims to be a sealed value of ours. It may still be damaged.
pub fn is_sealed(text: &str) -> bool {
    text.starts_with(PREFIX)
}

/// The id of the key that a sealed value names; `None` for any other text.
pub fn kid_of(text: &str) -> Option<&str> {
    let (kid, _) = text.strip_prefix(PREFIX)?.split_once('$')?;
    is_kid(kid).then_some(kid)
}

/// Whether a text has exactly the format of mcp-api's encrypted values.
pub fn is_legacy(text: &str) -> bool {
    LegacyParts::split(text).is_some()
}

/// The parts of a value in mcp-api's format, in hexadecimal. mcp-api itself also takes short tags and
/// trailing junk, which make forging easier; nothing it writes has them.
struct LegacyParts<'a> {
    iv: &'a str,
    tag: &'a str,
    ciphertext: &'a str,
}

impl<'a> LegacyParts<'a> {
    fn split(text: &'a str) -> Option<Self> {
        let (iv, rest) = text.split_once(':')?;
        let (tag, ciphertext) = rest.split_once(':')?;
        let hex = |part: &str| part.bytes().all(|b| b.is_ascii_hexdigit());
        let ok = iv.len() == 2 * NONCE_BYTES
            && tag.len() == 2 * TAG_BYTES
            && ciphertext.len().is_multiple_of(2)
            && hex(iv)
            && hex(tag)
            && hex(ciphertext);
        ok.then_some(Self { iv, tag, ciphertext })
    }
}

/// Seals values and opens them.
pub struct Crypter {
    ring: KeyRing,
    mode: LegacyMode,
}

impl Crypter {
    /// A crypter that has these keys. Refused are a ring that could not do anything in this mode, and
    /// one that could not write what the mode says.
    pub fn new(ring: KeyRing, mode: LegacyMode) -> Result<Self, KeyError> {
        if mode == LegacyMode::Rw && !ring.has_legacy() {
            return Err(KeyError::NoLegacyKey);
        }
        if mode == LegacyMode::Off && !ring.can_protect() {
            return Err(KeyError::Weak { reason: "can only be used to read values of mcp-api" });
        }
        Ok(Self { ring, mode })
    }

    /// What is done with values in mcp-api's format.
    pub fn mode(&self) -> LegacyMode {
        self.mode
    }

    /// The keys; only their names and check values can be seen.
    pub fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// Encrypts a value for its place.
    pub fn seal(&self, place: &Place<'_>, value: &SecretString) -> Result<String, CryptoError> {
        if self.mode == LegacyMode::Rw {
            self.seal_legacy_with(value, random()?)
        } else {
            self.seal_with(place, value, random()?, random()?)
        }
    }

    /// Decrypts a value that was sealed for this place.
    pub fn open(&self, place: &Place<'_>, text: &str) -> Result<SecretString, CryptoError> {
        if let Some(rest) = text.strip_prefix(PREFIX) {
            return self.open_sealed(place, rest);
        }
        let parts = LegacyParts::split(text).ok_or(CryptoErrorKind::Format)?;
        if self.mode == LegacyMode::Off {
            return Err(CryptoErrorKind::LegacyOff.into());
        }
        self.open_legacy(&parts)
    }

    /// As [`Crypter::seal`], and always in our own format: for what must be bound to its place, and what
    /// mcp-api does not have.
    pub fn seal_bound(&self, place: &Place<'_>, value: &SecretString) -> Result<String, CryptoError> {
        self.seal_with(place, value, random()?, random()?)
    }

    /// Opens what [`Crypter::seal_bound`] made, and nothing else.
    pub fn open_bound(&self, place: &Place<'_>, text: &str) -> Result<SecretString, CryptoError> {
        let rest = text.strip_prefix(PREFIX).ok_or(CryptoErrorKind::Format)?;
        self.open_sealed(place, rest)
    }

    fn seal_with(
        &self,
        place: &Place<'_>,
        value: &SecretString,
        salt: [u8; SALT_BYTES],
        nonce: [u8; NONCE_BYTES],
    ) -> Result<String, CryptoError> {
        let value = within_limit(value)?;
        let key = self.ring.primary().ok_or(CryptoErrorKind::UnknownKid)?;
        let derived = ValueKeys::derive(&key.kek, &key.kid, &salt)?;
        let aad = place.additional_data(&key.kid)?;
        // Room for all of it from the start, so that no clear text stays behind in freed memory.
        let mut body = Zeroizing::new(Vec::with_capacity(HEAD_BYTES + value.len() + TAG_BYTES));
        body.extend_from_slice(&salt);
        body.extend_from_slice(derived.commitment());
        body.extend_from_slice(&nonce);
        body.extend_from_slice(value.as_bytes());
        let tag = encrypt(derived.cipher_key(), &nonce, &aad, &mut body[HEAD_BYTES..])?;
        body.extend_from_slice(&tag);
        Ok(format!("{PREFIX}{}${}", key.kid, URL_SAFE_NO_PAD.encode(body.as_slice())))
    }

    /// Opens what follows the prefix. The checks come in the order of their price, and the commitment
    /// before the cipher: a wrong key is told from a changed value.
    fn open_sealed(&self, place: &Place<'_>, rest: &str) -> Result<SecretString, CryptoError> {
        let (kid, body) = rest.split_once('$').ok_or(CryptoErrorKind::Format)?;
        if !is_kid(kid) {
            return Err(CryptoErrorKind::Format.into());
        }
        if body.len() > BODY_CHARS {
            return Err(CryptoErrorKind::TooLarge.into());
        }
        let body = URL_SAFE_NO_PAD.decode(body).map_err(|_| CryptoErrorKind::Format)?;
        let (salt, body) = body.split_first_chunk::<SALT_BYTES>().ok_or(CryptoErrorKind::Format)?;
        let (commitment, body) = body.split_first_chunk::<COMMIT_BYTES>().ok_or(CryptoErrorKind::Format)?;
        let (nonce, body) = body.split_first_chunk::<NONCE_BYTES>().ok_or(CryptoErrorKind::Format)?;
        let (ciphertext, tag) = body.split_last_chunk::<TAG_BYTES>().ok_or(CryptoErrorKind::Format)?;
        // The number of characters alone lets one or two bytes too many pass.
        if ciphertext.len() > SECRET_BYTES {
            return Err(CryptoErrorKind::TooLarge.into());
        }
        let key = self.ring.key(kid).ok_or(CryptoErrorKind::UnknownKid)?;
        let derived = ValueKeys::derive(&key.kek, kid, salt)?;
        if !bool::from(derived.commitment().ct_eq(commitment.as_slice())) {
            return Err(CryptoErrorKind::CommitMismatch.into());
        }
        let aad = place.additional_data(kid)?;
        decrypt(derived.cipher_key(), nonce, &aad, Zeroizing::new(ciphertext.to_vec()), tag)
    }

    fn seal_legacy_with(&self, value: &SecretString, iv: [u8; NONCE_BYTES]) -> Result<String, CryptoError> {
        let value = within_limit(value)?;
        let key = self.ring.legacy().ok_or(CryptoErrorKind::UnknownKid)?;
        let mut body = Zeroizing::new(value.as_bytes().to_vec());
        let tag = encrypt(key.as_slice(), &iv, b"", &mut body)?;
        Ok(format!("{}:{}:{}", hex::encode(iv), hex::encode(tag), hex::encode(body.as_slice())))
    }

    fn open_legacy(&self, parts: &LegacyParts<'_>) -> Result<SecretString, CryptoError> {
        if parts.ciphertext.len() > 2 * SECRET_BYTES {
            return Err(CryptoErrorKind::TooLarge.into());
        }
        let key = self.ring.legacy().ok_or(CryptoErrorKind::UnknownKid)?;
        let (mut iv, mut tag) = ([0; NONCE_BYTES], [0; TAG_BYTES]);
        hex::decode_to_slice(parts.iv, &mut iv).map_err(|_| CryptoErrorKind::Format)?;
        hex::decode_to_slice(parts.tag, &mut tag).map_err(|_| CryptoErrorKind::Format)?;
        let body = hex::decode(parts.ciphertext).map_err(|_| CryptoErrorKind::Format)?;
        decrypt(key.as_slice(), &iv, b"", Zeroizing::new(body), &tag)
    }
}

impl fmt::Debug for Crypter {
    /// Says which keys there are, never what they are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crypter").field("ring", &self.ring).field("mode", &self.mode).finish()
    }
}

/// What is derived for one value: the key of its cipher, and the commitment to it.
struct ValueKeys(Zeroizing<[u8; KEY_BYTES + COMMIT_BYTES]>);

impl ValueKeys {
    fn derive(kek: &Key, kid: &str, salt: &[u8; SALT_BYTES]) -> Result<Self, CryptoError> {
        let mut info = b"mcpgw/v1/secret".to_vec();
        push_prefixed(&mut info, kid)?;
        let mut out = Zeroizing::new([0; KEY_BYTES + COMMIT_BYTES]);
        Hkdf::<Sha256>::new(Some(salt), kek.as_slice())
            .expand(&info, out.as_mut_slice())
            .map_err(|_| CryptoErrorKind::Internal)?;
        Ok(Self(out))
    }

    fn cipher_key(&self) -> &[u8] {
        &self.0[..KEY_BYTES]
    }

    fn commitment(&self) -> &[u8] {
        &self.0[KEY_BYTES..]
    }
}

fn within_limit(value: &SecretString) -> Result<&str, CryptoError> {
    let value = value.expose_secret();
    if value.len() > SECRET_BYTES { Err(CryptoErrorKind::TooLarge.into()) } else { Ok(value) }
}

fn random<const N: usize>() -> Result<[u8; N], CryptoError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| CryptoErrorKind::Internal)?;
    Ok(bytes)
}

/// Encrypts in place and returns the tag.
fn encrypt(
    key: &[u8],
    nonce: &[u8; NONCE_BYTES],
    aad: &[u8],
    text: &mut [u8],
) -> Result<[u8; TAG_BYTES], CryptoError> {
    let cipher = Aes256Gcm::new_from_slice(key).map_err(|_| CryptoErrorKind::Internal)?;
    let tag = cipher
        .encrypt_inout_detached(&Nonce::from(*nonce), aad, InOutBuf::from(text))
        .map_err(|_| CryptoErrorKind::Internal)?;
    Ok(tag.into())
}

/// Decrypts into a text. The buffer is overwritten when this returns.
fn decrypt(
    key: &[u8],
    nonce: &[u8; NONCE_BYTES],
    aad: &[u8],
    mut buffer: Zeroizing<Vec<u8>>,
    tag: &[u8; TAG_BYTES],
) -> Result<SecretString, CryptoError> {
    let cipher = Aes256Gcm::new_from_slice(key).map_err(|_| CryptoErrorKind::Internal)?;
    let tag = Tag::<Aes256Gcm>::from(*tag);
    cipher
        .decrypt_inout_detached(&Nonce::from(*nonce), aad, InOutBuf::from(buffer.as_mut_slice()), &tag)
        .map_err(|_| CryptoErrorKind::TagMismatch)?;
    // Only texts are ever sealed, so other bytes come from another program with the same key.
    let text = std::str::from_utf8(&buffer).map_err(|_| CryptoErrorKind::Format)?;
    Ok(text.into())
}

#[cfg(test)]
mod tests;
