//! The signatures of tokens, checked by `ring`, which the program has for TLS anyway. Nothing is ever signed here.

use std::sync::Once;

use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind,
    crypto::{CryptoProvider, JwtVerifier, KeyUtils},
    errors::{Error, ErrorKind},
};
use ring::signature::{self, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm};
use signature_traits::{Error as Mismatch, Verifier};

/// What checks tokens. It knows no shared secrets: whoever could check such a signature could make one.
static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(unfit()),
    verifier_factory: |algorithm, key| Ok(Box::new(Signature::new(*algorithm, key)?)),
    key_utils: KeyUtils {
        rsa_pub_components_from_private_key: |_| Err(unfit()),
        rsa_pub_components_from_public_key: |_| Err(unfit()),
        ec_pub_components_from_private_key: |_, _| Err(unfit()),
        ed_pub_components_from_private_key: |_, _| Err(unfit()),
        compute_digest: |_, _| Err(unfit()),
    },
};

/// Has tokens checked by this. Calling it again does nothing.
pub fn install() {
    static ONCE: Once = Once::new();
    // An error says that there is one already, and that is this one: nobody else installs any.
    ONCE.call_once(|| {
        let _ = PROVIDER.install_default();
    });
}

fn unfit() -> Error {
    ErrorKind::InvalidAlgorithm.into()
}

/// A key, and how it signs.
enum Key {
    Point(&'static dyn VerificationAlgorithm, Vec<u8>),
    Rsa(&'static signature::RsaParameters, Vec<u8>, Vec<u8>),
}

struct Signature {
    algorithm: Algorithm,
    key: Key,
}

impl Signature {
    fn new(algorithm: Algorithm, key: &DecodingKey) -> Result<Self, Error> {
        // A key of one kind must never be used as one of another: with a public key as a shared secret anybody signs.
        let key = match algorithm {
            Algorithm::ES256 => point(&signature::ECDSA_P256_SHA256_FIXED, AlgorithmFamily::Ec, key),
            Algorithm::ES384 => point(&signature::ECDSA_P384_SHA384_FIXED, AlgorithmFamily::Ec, key),
            Algorithm::EdDSA => point(&signature::ED25519, AlgorithmFamily::Ed, key),
            Algorithm::RS256 => rsa(&signature::RSA_PKCS1_2048_8192_SHA256, key),
            Algorithm::RS384 => rsa(&signature::RSA_PKCS1_2048_8192_SHA384, key),
            Algorithm::RS512 => rsa(&signature::RSA_PKCS1_2048_8192_SHA512, key),
            Algorithm::PS256 => rsa(&signature::RSA_PSS_2048_8192_SHA256, key),
            Algorithm::PS384 => rsa(&signature::RSA_PSS_2048_8192_SHA384, key),
            Algorithm::PS512 => rsa(&signature::RSA_PSS_2048_8192_SHA512, key),
            _ => Err(unfit()),
        }?;
        Ok(Self { algorithm, key })
    }
}

fn point(
    how: &'static dyn VerificationAlgorithm,
    family: AlgorithmFamily,
    key: &DecodingKey,
) -> Result<Key, Error> {
    if key.family() != family {
        return Err(unfit());
    }
    Ok(Key::Point(how, key.try_get_as_bytes()?.to_vec()))
}

fn rsa(how: &'static signature::RsaParameters, key: &DecodingKey) -> Result<Key, Error> {
    match key.kind() {
        DecodingKeyKind::RsaModulusExponent { n, e } if key.family() == AlgorithmFamily::Rsa => {
            Ok(Key::Rsa(how, n.clone(), e.clone()))
        }
        _ => Err(unfit()),
    }
}

impl Verifier<Vec<u8>> for Signature {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), Mismatch> {
        let checked = match &self.key {
            Key::Point(how, key) => UnparsedPublicKey::new(*how, key).verify(message, signature),
            Key::Rsa(how, n, e) => RsaPublicKeyComponents { n, e }.verify(how, message, signature),
        };
        checked.map_err(|_| Mismatch::new())
    }
}

impl JwtVerifier for Signature {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
