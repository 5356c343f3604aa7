//! The format of encrypted values.

use std::sync::LazyLock;

use secrecy::{ExposeSecret, SecretString};

use crate::{
    crypter::{
        Crypter, CryptoErrorKind, KeyMaterial, KeyRing, LegacyMode, Place, WeakKeys, is_legacy, is_sealed,
    },
    limits::SECRET_BYTES,
};

/// The golden vector of the format: sealed for [`PLACE`] with the key `k1`.
const GOLDEN: &str = "$mg1$k1$EREREREREREREREREREREb-oZSz4YC-VZF9-b_vWjkwSslhuMxiVS5Dkq_pjJ6CMIiIiIiIiIiIiIiIi5x1Sl7tcDPBK9h2bGKGDGdoNe4Il1hv3NKknySD4IxY";
/// What mcp-api encrypted with the passphrase `secret`.
const LEGACY: [&str; 2] = [
    "000102030405060708090a0b:3bd44ac43a96878a74f26e0391a6fb13:cebed4d40cbb04ecb1381bcb69372053",
    "000102030405060708090a0b:7300369bafc4766dbf0d4acd645e32dd:",
];
const PLACE: Place<'_> = Place { collection: "secrets", field: "value", ids: &["alice", "github.token"] };
const OTHERS: [Place<'_>; 4] = [
    Place { collection: "secrets", field: "value", ids: &["bob", "github.token"] },
    Place { collection: "secrets", field: "value", ids: &["aliceg", "ithub.token"] },
    Place { collection: "secrets", field: "values", ids: &["alice", "github.token"] },
    Place { collection: "servers", field: "value", ids: &["alice", "github.token"] },
];

static OURS: LazyLock<Crypter> = LazyLock::new(|| {
    let ring = KeyRing::from_file(&"k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=".into()).unwrap();
    Crypter::new(ring, LegacyMode::Off).unwrap()
});

static LEGACY_READER: LazyLock<Crypter> =
    LazyLock::new(|| match KeyMaterial::from_text(&"secret".into(), WeakKeys::LegacyOnly).unwrap() {
        KeyMaterial::Ready(ring) => Crypter::new(ring, LegacyMode::Ro).unwrap(),
        KeyMaterial::Passphrase(_) => panic!("a weak key is never stretched"),
    });

/// What opens was sealed here, for this place, and is what was sealed; nothing else opens.
pub fn sealed_secret(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let ours = OURS.open(&PLACE, &text);
    // Nobody can make a value that opens but who has the key, and no value has a second spelling.
    assert_eq!(ours.is_ok(), text == GOLDEN, "{text}");
    if let Err(error) = &ours {
        assert_eq!(error.kind() == CryptoErrorKind::LegacyOff, is_legacy(&text));
        // Whoever sent it learns nothing.
        assert_eq!(error.to_string(), "the value cannot be encrypted or decrypted");
    }
    for other in &OTHERS {
        assert!(OURS.open(other, &text).is_err(), "{text} opens at {other:?}");
    }
    // In the old format letters of hexadecimal numbers may be large.
    let old = LEGACY_READER.open(&PLACE, &text);
    assert_eq!(old.is_ok(), LEGACY.contains(&text.to_ascii_lowercase().as_str()), "{text}");
    assert!(!(is_legacy(&text) && is_sealed(&text)));

    there_and_back(&text, data);
}

/// The text as a secret of somebody's.
fn there_and_back(text: &str, data: &[u8]) {
    let sealed = match OURS.seal(&PLACE, &SecretString::from(text)) {
        Ok(sealed) => sealed,
        Err(error) => {
            assert!(text.len() > SECRET_BYTES && error.kind() == CryptoErrorKind::TooLarge);
            return;
        }
    };
    assert!(is_sealed(&sealed) && !is_legacy(&sealed));
    assert_eq!(OURS.open(&PLACE, &sealed).unwrap().expose_secret(), text);
    assert!(OURS.open(&OTHERS[data.len() % OTHERS.len()], &sealed).is_err());
    // One character of it is another one, or all from there on is missing.
    let at = data.iter().map(|byte| usize::from(*byte)).sum::<usize>() % sealed.len();
    let other = if sealed.as_bytes()[at] == b'A' { "B" } else { "A" };
    let changed = format!("{}{other}{}", &sealed[..at], &sealed[at + 1..]);
    assert!(OURS.open(&PLACE, &changed).is_err(), "{changed}");
    assert!(OURS.open(&PLACE, &sealed[..at]).is_err());
    assert!(OURS.open(&PLACE, &format!("{sealed}A")).is_err());
}
