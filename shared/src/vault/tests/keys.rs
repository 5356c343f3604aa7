//! Keys that are read anew, retired, or stand in two places.

use super::*;
use crate::vault::{NewKeys, RetireError};

pub(super) const NEW: &str = "k2:__79_Pv6-fj39vX08_Lx8O_u7ezr6uno5-bl5OPi4eA";

pub(super) fn ring(lines: &[&str]) -> KeySource {
    KeySource::RingFile(lines.join("\n").into())
}

/// Has a vault read its keys anew, as a node does it that nobody else has to agree with.
pub(super) async fn reload(vault: &Vault, keys: KeySource) -> Result<(), VaultError> {
    let new: NewKeys = vault.read_keys(keys).await?;
    vault.record_keys(&new).await?;
    vault.use_keys(new);
    Ok(())
}

async fn put(vault: &Vault, user: &str, value: &str) -> SealedSecret {
    let (user, one) = (UserId::from_stored(user), ServerName::from_stored("one"));
    vault.put_secret(&user, &one, &SecretName::from_stored("s"), &value.into()).await.unwrap();
    vault.sealed_secrets(&user, &one).await.unwrap().remove(0)
}

#[tokio::test]
async fn keys_are_exchanged_while_a_vault_is_used() {
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(&[RING]), None).await.unwrap();
    vault.record_key().await.unwrap();
    vault.insert_server(&stdio("one")).await.unwrap();
    // Whoever holds the same vault goes on with the new keys as well.
    let clone = vault.clone();
    let old = put(&clone, "alice", "old").await;
    assert!(old.value.starts_with("$mg1$k1$"));
    reload(&vault, ring(&[RING, NEW])).await.unwrap();
    assert_eq!(clone.kids(), ["k1", "k2"]);
    assert!(put(&clone, "bob", "x").await.value.starts_with("$mg1$k1$"));
    assert!(!store.facts().await.contains_key("writing-key:2"), "nothing is encrypted with it yet");
    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    assert_eq!(store.facts().await["writing-key:2"], "k2");
    let new = put(&clone, "bob", "new").await;
    assert!(new.value.starts_with("$mg1$k2$"));
    assert_eq!(clone.open_secret(&old).unwrap().expose_secret(), "old");
    assert_eq!(clone.open_secret(&new).unwrap().expose_secret(), "new");
    assert!(clone.has_key_of(&old.value) && clone.has_key_of("clear") && !clone.has_key_of("$mg1$k3$x"));
}

#[tokio::test]
async fn keys_that_do_not_fit_are_refused_and_the_old_ones_stay() {
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(&[RING]), None).await.unwrap();
    vault.record_key().await.unwrap();
    let facts = store.facts().await;
    let other = format!("k1:{}", NEW.split_once(':').unwrap().1);
    for (keys, expected) in [
        (ring(&[]), "the key ring has no keys"),
        (ring(&["k1"]), "line 1 of the key ring"),
        (ring(&[&other]), "this node's key k1 differs"),
        (ring(&[NEW]), "this node's key k2 differs"),
        (ring(&[NEW, "k1:SECRETS_KEY"]), "it must be `k1:SECRETS_KEY`"),
        (text("secret"), "too weak"),
    ] {
        let refused = reload(&vault, keys).await.expect_err(expected).to_string();
        assert!(refused.contains(expected), "{expected}: {refused}");
        assert_eq!((vault.kids(), store.facts().await), (vec!["k1".to_owned()], facts.clone()), "{expected}");
    }
    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    let missing = reload(&vault, ring(&[NEW])).await.unwrap_err();
    assert!(matches!(&missing, VaultError::KeyMissing { kid } if kid == "k1"), "{missing:?}");
    assert_eq!(vault.kids(), ["k2", "k1"]);
}

#[tokio::test]
async fn a_key_is_retired_when_nothing_needs_it_and_encrypts_nothing_any_more() {
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(&[RING]), None).await.unwrap();
    vault.record_key().await.unwrap();
    vault.insert_server(&stdio("one")).await.unwrap();
    put(&vault, "alice", "old").await;
    let primary = vault.retire_key("k1", true).await;
    assert!(matches!(&primary, Err(RetireError::Primary { .. })), "{primary:?}");
    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    let unknown = vault.retire_key("k3", true).await;
    assert!(matches!(&unknown, Err(RetireError::Unknown { .. })), "{unknown:?}");
    let used = vault.retire_key("k1", false).await;
    assert!(matches!(&used, Err(RetireError::InUse { values: 3, .. })), "{used:?}");
    let view = vault.keys().await.unwrap();
    let shown: Vec<_> =
        view.keys.iter().map(|key| (key.id.as_str(), key.primary, key.held, key.used, key.values)).collect();
    assert_eq!(shown, [("k2", true, true, true, 0), ("k1", false, true, true, 3)]);
    assert_eq!(view.keys[1].check_value.as_deref(), Some("555b9c5f5496a81a"));

    // By force it is what its operator wanted.
    vault.retire_key("k1", true).await.unwrap();
    vault.retire_key("k1", true).await.unwrap();
    assert!(vault.keys().await.unwrap().keys[1].retired);
    reload(&vault, ring(&[NEW])).await.unwrap();
    let lost = vault.server(&ServerName::from_stored("one")).await.unwrap_err();
    assert!(
        matches!(lost, VaultError::Integrity { error, .. } if error.kind() == CryptoErrorKind::UnknownKid)
    );
    for retired in [ring(&[RING, NEW]), ring(&[RING])] {
        let refused = reload(&vault, retired).await.unwrap_err();
        assert!(matches!(&refused, VaultError::KeyRetired { kid } if kid == "k1"), "{refused:?}");
    }
    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    assert!(vault.server(&ServerName::from_stored("one")).await.unwrap().is_some());
}

#[tokio::test]
async fn a_key_ring_takes_the_place_of_a_single_key() {
    for key in [KEY, PASSPHRASE] {
        let store = TestStore::new();
        let vault = opened(&store, key, None).await;
        vault.record_key().await.unwrap();
        round_trip(&vault, &stdio("one")).await;
        let both = |lines: &[&str]| KeySource::Both { ring: lines.join("\n").into(), text: key.into() };
        for lines in [["k1:SECRETS_KEY", NEW], [NEW, "k1: SECRETS_KEY"]] {
            let vault = Vault::open(store.store.clone(), both(&lines), None).await.unwrap();
            vault.record_key().await.unwrap();
            assert_eq!(vault.server(&stdio("one").name).await.unwrap().unwrap().value, stdio("one"));
        }
        let without = Vault::open(store.store.clone(), both(&[NEW]), None).await;
        assert!(matches!(without.unwrap_err(), VaultError::KeyMissing { .. }));
        let renamed = Vault::open(store.store.clone(), both(&[NEW, "k3:SECRETS_KEY"]), None).await;
        assert!(matches!(renamed.unwrap_err(), VaultError::Key(KeyError::Line { line: 2, .. })));
    }
}

#[tokio::test]
async fn a_weak_key_beside_a_key_ring_reads_what_is_old_and_protects_nothing() {
    let store = TestStore::old().await;
    let both = |text: &str| KeySource::Both { ring: NEW.into(), text: text.into() };
    let ro = Vault::open(store.store.clone(), both("secret"), Some(LegacyMode::Ro)).await.unwrap();
    ro.record_key().await.unwrap();
    let (alice, github) = (UserId::from_stored("alice"), ServerName::from_stored("github"));
    let old = ro.sealed_secrets(&alice, &github).await.unwrap().remove(0);
    assert_eq!(ro.open_secret(&old).unwrap().expose_secret(), "ghp_exampleToken");
    round_trip(&ro, &stdio("one")).await;
    assert!(store.stored("one").await.values().all(|value| value.starts_with("$mg1$k2$")));
    let referred = KeySource::Both { ring: "k1:SECRETS_KEY".into(), text: "secret".into() };
    let refused = Vault::open(store.store.clone(), referred, Some(LegacyMode::Ro)).await.unwrap_err();
    assert!(matches!(refused, VaultError::Weak(_)), "{refused:?}");
}
