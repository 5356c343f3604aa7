use super::*;

const KEK: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const OTHER_KEK: &str = "f00102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const PLAIN: &str = "ghp_exampleToken";
const GOLDEN: &str = "$mg1$k1$EREREREREREREREREREREb-oZSz4YC-VZF9-b_vWjkwSslhuMxiVS5Dkq_pjJ6CMIiIiIiIiIiIiIiIi5x1Sl7tcDPBK9h2bGKGDGdoNe4Il1hv3NKknySD4IxY";
const GOLDEN_AAD: &str = "6d637067772d616561642d7631000000026b3100000007736563726574730000000576616c756500000005616c6963650000000c6769746875622e746f6b656e";
const LEGACY: &str =
    "000102030405060708090a0b:3bd44ac43a96878a74f26e0391a6fb13:cebed4d40cbb04ecb1381bcb69372053";
const LEGACY_EMPTY: &str = "000102030405060708090a0b:7300369bafc4766dbf0d4acd645e32dd:";
const LEGACY_UNICODE: &str = "000102030405060708090a0b:0cfc898650d89a0f62c62c5c797117b7:bff445090bed644c4c2d0c874a92e1ef26ba099c2023c8080386";

const PLACE: Place<'_> = Place { collection: "secrets", field: "value", ids: &["alice", "github.token"] };

fn crypter(key: &str, mode: LegacyMode) -> Crypter {
    let material = KeyMaterial::from_text(&key.into(), WeakKeys::LegacyOnly).unwrap();
    let KeyMaterial::Ready(ring) = material else { panic!("a passphrase") };
    Crypter::new(ring, mode).unwrap()
}

fn kind(result: Result<SecretString, CryptoError>) -> CryptoErrorKind {
    result.map(|_| ()).expect_err("it was opened").kind()
}

#[test]
fn the_golden_vector_is_exact() {
    let crypter = crypter(KEK, LegacyMode::Off);
    assert_eq!(hex::encode(PLACE.additional_data("k1").unwrap()), GOLDEN_AAD);
    let sealed = crypter.seal_with(&PLACE, &PLAIN.into(), [0x11; 16], [0x22; 12]).unwrap();
    assert_eq!(sealed, GOLDEN);
    assert_eq!(crypter.open(&PLACE, GOLDEN).unwrap().expose_secret(), PLAIN);
}

#[test]
fn a_value_opens_in_its_own_place_only() {
    let crypter = crypter(KEK, LegacyMode::Off);
    let place = |collection, field, ids| Place { collection, field, ids };
    for other in [
        place("secrets", "value", &["bob", "github.token"]),
        place("secrets", "value", &["alice", "github.token2"]),
        place("secrets", "value", &["aliceg", "ithub.token"]),
        place("secrets", "value", &["alicegithub.token"]),
        place("secrets", "value", &["alice", "github.token", ""]),
        place("secrets", "value", &[]),
        place("secrets", "values", &["alice", "github.token"]),
        place("secretsvalue", "", &["alice", "github.token"]),
        place("servers", "value", &["alice", "github.token"]),
    ] {
        assert_eq!(kind(crypter.open(&other, GOLDEN)), CryptoErrorKind::TagMismatch, "{other:?}");
    }
}

#[test]
fn a_wrong_or_missing_key_is_recognised() {
    let other = crypter(OTHER_KEK, LegacyMode::Off);
    assert_eq!(kind(other.open(&PLACE, GOLDEN)), CryptoErrorKind::CommitMismatch);
    let renamed = GOLDEN.replacen("k1", "k2", 1);
    let own = crypter(KEK, LegacyMode::Off);
    assert_eq!(kind(own.open(&PLACE, &renamed)), CryptoErrorKind::UnknownKid);
    // The same bytes under another name: the name is part of what is committed to.
    let ring = KeyRing::from_file(&"k2:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=".into()).unwrap();
    let same_bytes = Crypter::new(ring, LegacyMode::Off).unwrap();
    assert_eq!(kind(same_bytes.open(&PLACE, &renamed)), CryptoErrorKind::CommitMismatch);
}

#[test]
fn older_keys_open_and_the_primary_key_seals() {
    let old = crypter(KEK, LegacyMode::Off).seal(&PLACE, &PLAIN.into()).unwrap();
    let ring =
        "k2:__79_Pv6-fj39vX08_Lx8O_u7ezr6uno5-bl5OPi4eA\nk1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let crypter = Crypter::new(KeyRing::from_file(&ring.into()).unwrap(), LegacyMode::Off).unwrap();
    assert_eq!(crypter.open(&PLACE, &old).unwrap().expose_secret(), PLAIN);
    let new = crypter.seal(&PLACE, &PLAIN.into()).unwrap();
    assert!(new.starts_with("$mg1$k2$"));
    assert_eq!(crypter.open(&PLACE, &new).unwrap().expose_secret(), PLAIN);
}

#[test]
fn every_value_has_its_own_salt_and_nonce() {
    for mode in [LegacyMode::Rw, LegacyMode::Off] {
        let crypter = crypter(KEK, mode);
        let sealed = |_| crypter.seal(&PLACE, &PLAIN.into()).unwrap();
        let all: std::collections::HashSet<String> = (0..100).map(sealed).collect();
        assert_eq!(all.len(), 100);
    }
}

#[test]
fn values_of_all_sizes_survive_and_larger_ones_are_refused() {
    let largest = "x".repeat(SECRET_BYTES);
    for mode in [LegacyMode::Rw, LegacyMode::Off] {
        let crypter = crypter(KEK, mode);
        for value in ["", "a", "ab", "abc", "žluťoučký kůň 🔐\0\n", "$mg1$k1$x", LEGACY, &largest] {
            let sealed = crypter.seal(&PLACE, &value.into()).unwrap();
            assert_eq!(crypter.open(&PLACE, &sealed).unwrap().expose_secret(), value);
        }
        let too_large = crypter.seal(&PLACE, &format!("{largest}x").into()).unwrap_err();
        assert_eq!(too_large.kind(), CryptoErrorKind::TooLarge);
    }
}

#[test]
fn stored_values_that_are_too_large_are_refused_unread() {
    let crypter = crypter(KEK, LegacyMode::Ro);
    for extra in [1, 2, 3, 4, 16 * 1024 * 1024] {
        let body = vec![0; HEAD_BYTES + SECRET_BYTES + TAG_BYTES + extra];
        let sealed = format!("$mg1$k1${}", URL_SAFE_NO_PAD.encode(body));
        assert_eq!(kind(crypter.open(&PLACE, &sealed)), CryptoErrorKind::TooLarge, "{extra}");
        let legacy = format!("{LEGACY_EMPTY}{}", "00".repeat(SECRET_BYTES + extra));
        assert_eq!(kind(crypter.open(&PLACE, &legacy)), CryptoErrorKind::TooLarge, "{extra}");
    }
}

#[test]
fn no_changed_bit_goes_unnoticed() {
    let crypter = crypter(KEK, LegacyMode::Ro);
    for original in [GOLDEN, LEGACY] {
        for (at, bit) in (0..original.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            let mut bytes = original.as_bytes().to_vec();
            bytes[at] ^= 1 << bit;
            // The store holds texts, so that what is no text cannot be read from it.
            let Ok(text) = String::from_utf8(bytes) else {
                continue;
            };
            // The case of a hexadecimal digit says nothing.
            if original == LEGACY && text.eq_ignore_ascii_case(original) {
                continue;
            }
            let result = crypter.open(&PLACE, &text);
            assert!(result.is_err(), "byte {at}, bit {bit}: {text}");
        }
    }
}

#[test]
fn every_part_of_the_binary_value_is_protected() {
    let crypter = crypter(KEK, LegacyMode::Off);
    let bytes = URL_SAFE_NO_PAD.decode(&GOLDEN[8..]).unwrap();
    for (at, bit) in (0..bytes.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << bit;
        let text = format!("$mg1$k1${}", URL_SAFE_NO_PAD.encode(changed));
        let expected = if at < SALT_BYTES + COMMIT_BYTES {
            CryptoErrorKind::CommitMismatch
        } else {
            CryptoErrorKind::TagMismatch
        };
        assert_eq!(kind(crypter.open(&PLACE, &text)), expected, "byte {at}, bit {bit}");
    }
}

#[test]
fn every_truncation_and_addition_fails() {
    let crypter = crypter(KEK, LegacyMode::Ro);
    for original in [GOLDEN, LEGACY, LEGACY_EMPTY] {
        for end in 0..original.len() {
            assert!(crypter.open(&PLACE, &original[..end]).is_err(), "{}", &original[..end]);
        }
        for junk in ["A", "AA", "AAA", "AAAA", "00", "=", "==", "\n", " ", ":", ":00", "$", "$k1", "\0", "é"]
        {
            assert!(crypter.open(&PLACE, &format!("{original}{junk}")).is_err(), "{original}{junk}");
            assert!(crypter.open(&PLACE, &format!("{junk}{original}")).is_err(), "{junk}{original}");
        }
    }
}

#[test]
fn what_is_no_sealed_value_is_refused_by_format() {
    let crypter = crypter(KEK, LegacyMode::Ro);
    let (_, body) = GOLDEN.rsplit_once('$').unwrap();
    for text in [
        "",
        "plain",
        "$",
        "$mg1$",
        "$mg1$$",
        "$mg1$k1",
        "$mg1$k1$",
        "$mg1$k1$AAAA",
        "$mg2$k1$AAAA",
        "$MG1$k1$AAAA",
        "$mg1$k1$!!!!",
        "::",
        &format!("$mg1$${body}"),
        &format!("$mg1$K1${body}"),
        &format!("$mg1$k 1${body}"),
        &format!("$mg1${}${body}", "k".repeat(17)),
        &format!("$mg1$k1${body}="),
        &GOLDEN.replace('-', "+").replace('_', "/"),
        // The unused bits of the last character must be zero, so that there is one text for a value.
        &format!("{}Z", &GOLDEN[..GOLDEN.len() - 1]),
    ] {
        assert_eq!(kind(crypter.open(&PLACE, text)), CryptoErrorKind::Format, "{text}");
    }
}

#[test]
fn values_of_mcp_api_are_read_and_written_exactly() {
    for (key, text, plain) in [
        ("secret", LEGACY, PLAIN),
        ("secret", &LEGACY.to_uppercase(), PLAIN),
        ("secret", LEGACY_EMPTY, ""),
        ("пароль-🔑", LEGACY_UNICODE, "žluťoučký kůň 🔐\0\n"),
    ] {
        let crypter = crypter(key, LegacyMode::Rw);
        assert_eq!(crypter.open(&PLACE, text).unwrap().expose_secret(), plain);
        let iv = std::array::from_fn(|i| u8::try_from(i).unwrap());
        assert_eq!(crypter.seal_legacy_with(&plain.into(), iv).unwrap(), text.to_lowercase());
    }
    let wrong = crypter("wrong", LegacyMode::Rw);
    assert_eq!(kind(wrong.open(&PLACE, LEGACY)), CryptoErrorKind::TagMismatch);
}

#[test]
fn the_old_format_is_taken_strictly() {
    for good in [LEGACY, LEGACY_EMPTY, LEGACY_UNICODE, &LEGACY.to_uppercase()] {
        assert!(is_legacy(good) && !is_sealed(good), "{good}");
    }
    assert!(is_sealed(GOLDEN) && !is_legacy(GOLDEN));
    let crypter = crypter("secret", LegacyMode::Ro);
    for bad in [
        // mcp-api would take the first three: a short tag, a long one, and an odd digit at the end.
        "000102030405060708090a0b:3bd44ac4:cebed4d40cbb04ecb1381bcb69372053",
        "000102030405060708090a0b:3bd44ac43a96878a74f26e0391a6fb1300:cebed4d40cbb04ecb1381bcb69372053",
        &format!("{LEGACY}0"),
        &format!("{LEGACY}zz"),
        &format!("{LEGACY}:"),
        &format!(" {LEGACY}"),
        &format!("{LEGACY}\n"),
        &LEGACY[2..],
        &LEGACY.replace(':', ""),
        &LEGACY.replacen("00", "é", 1),
        "::",
        "",
    ] {
        assert!(!is_legacy(bad), "{bad}");
        assert_eq!(kind(crypter.open(&PLACE, bad)), CryptoErrorKind::Format, "{bad}");
    }
}

#[test]
fn the_mode_says_what_is_read_and_written() {
    let [rw, ro, off] = [LegacyMode::Rw, LegacyMode::Ro, LegacyMode::Off].map(|mode| crypter(KEK, mode));
    let legacy = rw.seal(&PLACE, &PLAIN.into()).unwrap();
    assert!(is_legacy(&legacy));
    for crypter in [&ro, &off] {
        assert!(is_sealed(&crypter.seal(&PLACE, &PLAIN.into()).unwrap()));
    }
    for crypter in [&rw, &ro] {
        assert_eq!(crypter.open(&PLACE, &legacy).unwrap().expose_secret(), PLAIN);
        assert_eq!(crypter.open(&PLACE, GOLDEN).unwrap().expose_secret(), PLAIN);
    }
    assert_eq!(kind(off.open(&PLACE, &legacy)), CryptoErrorKind::LegacyOff);
    assert_eq!(off.open(&PLACE, GOLDEN).unwrap().expose_secret(), PLAIN);
}

#[test]
fn a_weak_key_never_meets_our_own_format() {
    let rw = crypter("secret", LegacyMode::Rw);
    assert!(is_legacy(&rw.seal(&PLACE, &PLAIN.into()).unwrap()));
    assert_eq!(kind(rw.open(&PLACE, GOLDEN)), CryptoErrorKind::UnknownKid);
    let ro = crypter("secret", LegacyMode::Ro);
    assert_eq!(ro.open(&PLACE, LEGACY).unwrap().expose_secret(), PLAIN);
    assert_eq!(ro.seal(&PLACE, &PLAIN.into()).unwrap_err().kind(), CryptoErrorKind::UnknownKid);
    let material = KeyMaterial::from_text(&"secret".into(), WeakKeys::LegacyOnly).unwrap();
    let KeyMaterial::Ready(ring) = material else { panic!("a passphrase") };
    assert!(matches!(Crypter::new(ring, LegacyMode::Off), Err(KeyError::Weak { .. })));
}

#[test]
fn a_key_ring_cannot_write_for_mcp_api() {
    let ring = || KeyRing::from_file(&"k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=".into()).unwrap();
    assert_eq!(Crypter::new(ring(), LegacyMode::Rw).unwrap_err(), KeyError::NoLegacyKey);
    let ro = Crypter::new(ring(), LegacyMode::Ro).unwrap();
    assert_eq!(kind(ro.open(&PLACE, LEGACY)), CryptoErrorKind::UnknownKid);
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    let crypter = crypter("secret", LegacyMode::Ro);
    let mut body = [0xff, 0xfe];
    let tag = encrypt(crypter.ring.legacy().unwrap().as_slice(), &[0; 12], b"", &mut body).unwrap();
    let text = format!("{}:{}:{}", hex::encode([0; 12]), hex::encode(tag), hex::encode(body));
    assert_eq!(kind(crypter.open(&PLACE, &text)), CryptoErrorKind::Format);
}

#[test]
fn all_errors_read_the_same() {
    let crypter = crypter(KEK, LegacyMode::Off);
    let sentences: std::collections::HashSet<String> =
        ["junk", LEGACY, &GOLDEN.replacen("k1", "k2", 1), &GOLDEN.replacen("ERE", "ERF", 1)]
            .into_iter()
            .map(|text| crypter.open(&PLACE, text).map(|_| ()).unwrap_err().to_string())
            .collect();
    assert_eq!(sentences.len(), 1);
}

#[test]
fn debug_output_shows_no_secrets() {
    let crypter = crypter(KEK, LegacyMode::Rw);
    let shown = format!("{crypter:?} {:?}", crypter.open(&PLACE, GOLDEN).unwrap());
    assert!(
        shown.contains(r#"Crypter { ring: KeyRing { kids: ["k1"], legacy: true }, mode: Rw }"#),
        "{shown}"
    );
    assert!(!shown.contains(PLAIN) && !shown.contains("000102"), "{shown}");
}
