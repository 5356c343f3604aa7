use super::*;

const HEX: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const BASE64: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const URL_SAFE: &str = "__79_Pv6-fj39vX08_Lx8O_u7ezr6uno5-bl5OPi4eA";
const STANDARD: &str = "//79/Pv6+fj39vX08/Lx8O/u7ezr6uno5+bl5OPi4eA";
const PASSPHRASE: &str = "four little ducks went out on a windy day";

fn text(text: &str) -> Result<KeyMaterial, KeyError> {
    KeyMaterial::from_text(&text.into(), WeakKeys::Refuse)
}

fn ring(lines: &str) -> Result<KeyRing, KeyError> {
    KeyRing::from_file(&lines.into())
}

fn kek(material: KeyMaterial) -> [u8; 32] {
    let KeyMaterial::Ready(ring) = material else { panic!("a passphrase") };
    assert_eq!(ring.kids().collect::<Vec<_>>(), ["k1"]);
    *ring.primary().unwrap().kek
}

#[test]
fn keys_are_read_in_hexadecimal_and_base64() {
    let ascending: [u8; 32] = std::array::from_fn(|i| u8::try_from(i).unwrap());
    for spelling in [HEX, &HEX.to_uppercase(), BASE64, BASE64.trim_end_matches('='), &format!(" {HEX}\n")] {
        assert_eq!(kek(text(spelling).unwrap()), ascending, "{spelling}");
    }
    let descending = ascending.map(|byte| 255 - byte);
    for spelling in [URL_SAFE, STANDARD, &format!("{URL_SAFE}="), &format!("{STANDARD}=")] {
        assert_eq!(kek(text(spelling).unwrap()), descending, "{spelling}");
    }
}

#[test]
fn a_passphrase_is_stretched_with_the_stores_salt() {
    let salt = Salt::parse("000102030405060708090a0b0c0d0e0f").unwrap();
    let KeyMaterial::Passphrase(passphrase) = text(PASSPHRASE).unwrap() else { panic!("not a passphrase") };
    let ring = passphrase.derive(&salt).unwrap();
    // Computed with another implementation of Argon2.
    let expected = "8541ea2997263236ce3bd5c0814c849c82d5717f559c7e4a5bee2ea53e4bb3c9";
    assert_eq!(hex::encode(*ring.primary().unwrap().kek), expected);
    assert_eq!(ring.check_value("k1").as_deref(), Some("63f24a68b26a4982"));
    assert!(ring.has_legacy());
}

#[test]
fn salts_are_random_and_survive_the_store() {
    let salt = Salt::generate().unwrap();
    assert_ne!(salt, Salt::generate().unwrap());
    assert_eq!(Salt::parse(&salt.to_string()), Ok(salt));
    for bad in ["", "00", "zz0102030405060708090a0b0c0d0e0f", "000102030405060708090a0b0c0d0e0f00"] {
        assert_eq!(Salt::parse(bad), Err(KeyError::Salt), "{bad}");
    }
}

#[test]
fn weak_keys_are_refused_with_advice_and_without_being_repeated() {
    let zeros = "00".repeat(32);
    let zeros64 = format!("{}=", "A".repeat(43));
    let few = "zyxwvut".repeat(6);
    let words = "your-random-key-".repeat(4);
    let digits = "0123456789abcdef".repeat(4);
    for weak in [
        "",
        " \n",
        "secret",
        "SECRET",
        "changeme",
        "password",
        "secrets-key-here",
        "your-random-key",
        "example-key-for-development-only",
        "replace_this_with_your_own_secret_key!",
        "this-is-a-super-secret-key-change-me-in-production",
        "secretsecretsecretsecretsecretsecretsecret",
        "Xq7!pL2#",
        "a-bit-too-short-for-this-task!!",
        &zeros,
        &zeros64,
        &few,
        &words,
        &digits,
    ] {
        let error = text(weak).expect_err(weak);
        let KeyError::Weak { reason } = error else { panic!("{weak}: {error:?}") };
        let message = error.to_string();
        assert!(message.contains("openssl rand -hex 32") && message.contains(reason), "{message}");
        assert!(weak.trim().len() < 7 || !message.contains(weak), "{weak}: {message}");
    }
}

#[test]
fn a_weak_key_gives_a_ring_for_the_old_format_only_and_only_when_asked() {
    let weak = KeyMaterial::from_text(&"secret".into(), WeakKeys::LegacyOnly).unwrap();
    let KeyMaterial::Ready(ring) = weak else { panic!("a passphrase") };
    assert!(ring.has_legacy() && !ring.can_protect());
    assert_eq!((ring.kids().count(), ring.check_value("k1")), (0, None));
    let empty = KeyMaterial::from_text(&" ".into(), WeakKeys::LegacyOnly).unwrap_err();
    assert_eq!(empty, KeyError::Weak { reason: "is empty" });
}

#[test]
fn good_passphrases_pass() {
    for good in [
        PASSPHRASE,
        "2f6e0c4b9a8d7e5f1c3b2a4d6e8f0a1b",
        "žluťoučký kůň úpěl ďábelské ódy a šel",
        "My secret for production: nine blue whales, 3 gulls",
        "%^&*()[]{};:'/?+=~`@#$|\\,%^&*()[]{};",
    ] {
        assert!(matches!(text(good), Ok(KeyMaterial::Passphrase(_))), "{good}");
    }
}

#[test]
fn a_key_ring_has_a_primary_key_and_older_ones() {
    let ring = ring(&format!("# new\r\n\r\nk2:{URL_SAFE}\r\n  k1: {BASE64}  \n")).unwrap();
    assert_eq!(ring.kids().collect::<Vec<_>>(), ["k2", "k1"]);
    assert_eq!(ring.primary().unwrap().kid, "k2");
    assert_eq!(ring.check_value("k1").as_deref(), Some("555b9c5f5496a81a"));
    assert_eq!(ring.check_value("k3"), None);
    assert!(!ring.has_legacy());
}

#[test]
fn mistakes_in_a_key_ring_are_named_by_line() {
    let zeros = format!("k1:{}=", "A".repeat(43));
    let long_kid = format!("{}:{BASE64}", "k".repeat(17));
    for (lines, line) in [
        ("k1", 1),
        ("\n# x\nk1:", 3),
        (&format!("K1:{BASE64}"), 1),
        (&format!(":{BASE64}"), 1),
        (&format!("k-1:{BASE64}"), 1),
        (&long_kid, 1),
        (&format!("k1:{HEX}"), 1),
        (&format!("k1:{BASE64}junk"), 1),
        (&format!("k1:{BASE64} # note"), 1),
        (&format!("k1:{BASE64}\nk2:{URL_SAFE}\nk1:{URL_SAFE}"), 3),
        ("k1:c2hvcnQ=", 1),
        (&zeros, 1),
    ] {
        let error = ring(lines).expect_err(lines);
        assert!(matches!(error, KeyError::Line { line: at, .. } if at == line), "{lines}: {error:?}");
        assert!(!error.to_string().contains("AAEC"), "{error}");
    }
    for empty in ["", "\n# only a comment\n"] {
        assert_eq!(ring(empty).unwrap_err(), KeyError::EmptyRing);
    }
}

#[test]
fn a_new_key_line_is_a_key_ring() {
    let line = generate_key_line("k1").unwrap();
    assert_ne!(line.expose_secret(), generate_key_line("k1").unwrap().expose_secret());
    assert_eq!(KeyRing::from_file(&line).unwrap().kids().collect::<Vec<_>>(), ["k1"]);
}

#[test]
fn debug_output_names_keys_and_shows_none() {
    let passphrase = format!("{:?}", text(PASSPHRASE).unwrap());
    assert_eq!(passphrase, "Passphrase(Passphrase)");
    let ready = format!("{:?}", text(HEX).unwrap());
    assert_eq!(ready, r#"Ready(KeyRing { kids: ["k1"], legacy: true })"#);
}
