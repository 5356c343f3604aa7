use std::collections::BTreeMap;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    opening::{SALT_FACT, STORE_FACT},
    *,
};
use crate::store::embedded::EmbeddedStore;

mod keys;
mod packages;
mod remote;
mod rewrap;

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const OTHER_KEY: &str = "f00102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const RING: &str = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const PASSPHRASE: &str = "four little ducks went out on a windy day";
/// `ghp_exampleToken`, encrypted by mcp-api with the key `secret`.
const LEGACY: &str =
    "000102030405060708090a0b:3bd44ac43a96878a74f26e0391a6fb13:cebed4d40cbb04ecb1381bcb69372053";

/// A store in a folder of its own, with what the tests do to it behind a vault's back.
struct TestStore {
    store: Arc<EmbeddedStore>,
    _dir: TempDir,
}

impl TestStore {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        Self { store: EmbeddedStore::open(dir.path()).unwrap(), _dir: dir }
    }

    /// A store that has a secret in mcp-api's format.
    async fn old() -> Self {
        let store = Self::new();
        store.add_legacy_secret().await;
        store
    }

    /// Adds alice's token for the server `github`, both as mcp-api writes them.
    async fn add_legacy_secret(&self) {
        self.store.insert_server(&SealedServer(stdio("github"))).await.unwrap();
        let secret = SealedSecret {
            username: UserId::from_stored("alice"),
            key: "github.token".to_owned(),
            server_name: ServerName::from_stored("github"),
            secret_name: SecretName::from_stored("token"),
            value: LEGACY.to_owned(),
        };
        self.store.put_secret(&secret).await.unwrap();
    }

    /// A server as it is stored.
    async fn sealed(&self, name: &str) -> Versioned<SealedServer> {
        self.store.server(&ServerName::from_stored(name)).await.unwrap().unwrap()
    }

    /// The stored variables or headers of a server.
    async fn stored(&self, name: &str) -> BTreeMap<String, String> {
        variables(&mut self.sealed(name).await.value.0).clone()
    }

    /// Changes the stored variables or headers of a server.
    async fn tamper(&self, name: &str, change: impl FnOnce(&mut BTreeMap<String, String>)) {
        let mut sealed = self.sealed(name).await;
        change(variables(&mut sealed.value.0));
        self.store.replace_server(&sealed.value, sealed.revision).await.unwrap();
    }

    /// All facts that a vault with one of the keys here can have written.
    async fn facts(&self) -> BTreeMap<String, String> {
        let mut facts = BTreeMap::new();
        for key in [SALT_FACT, FIRST_KEY_FACT, STORE_FACT, "kcv:k1", "kcv:k2", "kcv:k3", "writing-key:2"] {
            if let Some(value) = self.store.fact(Fact::KeyRing, key).await.unwrap() {
                facts.insert(key.to_owned(), value);
            }
        }
        facts
    }
}

fn text(key: &str) -> KeySource {
    KeySource::Text(key.into())
}

async fn opened(store: &TestStore, key: &str, legacy: Option<LegacyMode>) -> Vault {
    Vault::open(store.store.clone(), text(key), legacy).await.unwrap()
}

async fn refusal(store: &TestStore, key: KeySource, legacy: Option<LegacyMode>) -> VaultError {
    Vault::open(store.store.clone(), key, legacy).await.expect_err("it was opened")
}

fn record(name: &str, transport: Value) -> ServerRecord {
    let mut document = json!({
        "_id": "6b031cdd6c5c3ee8dbcb20dd", "name": name,
        "createdAt": "2026-11-22T16:48:29.287Z", "updatedAt": "2026-11-22T16:48:29.287Z",
    });
    let Value::Object(map) = &mut document else { panic!("not an object") };
    let Value::Object(transport) = transport else { panic!("not an object") };
    map.extend(transport);
    let mut record = ServerRecord::from_document(map.clone()).unwrap();
    record.extra.clear();
    record
}

fn stdio(name: &str) -> ServerRecord {
    record(name, json!({"command": "node", "env": {"A": "value-a", "B": "value-b"}}))
}

/// The variables or headers of a record, to look at and to tamper with.
fn variables(record: &mut ServerRecord) -> &mut BTreeMap<String, String> {
    match &mut record.transport {
        Transport::Stdio { env, .. } => &mut env.0,
        Transport::StreamableHttp { headers, .. } => &mut headers.as_mut().unwrap().0,
    }
}

#[tokio::test]
async fn variables_and_headers_are_clear_outside_and_encrypted_inside() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let http = json!({"transportType": "streamable_http", "url": "https://example.org/mcp",
        "headers": {"Authorization": "value-c"}});
    let servers = [stdio("one"), record("two", http), record("three", json!({"command": "node"}))];
    for server in &servers {
        let revision = vault.insert_server(server).await.unwrap();
        assert!(store.stored(server.name.as_str()).await.values().all(|value| is_sealed(value)));
        let read = vault.server(&server.name).await.unwrap().unwrap();
        assert_eq!(read, Versioned { revision, value: server.clone() });
    }
    let listed = vault.servers().await.unwrap();
    assert!(listed.iter().map(|server| &server.value).eq(&servers));

    let mut changed = servers[0].clone();
    variables(&mut changed).insert("A".to_owned(), "new".to_owned());
    let seen = listed[0].revision;
    let revision = vault.replace_server(&changed, seen).await.unwrap();
    let read = vault.server(&changed.name).await.unwrap().unwrap();
    assert_eq!(read, Versioned { revision, value: changed.clone() });
    let late = vault.replace_server(&changed, seen).await;
    assert!(matches!(late, Err(VaultError::Store(StoreError::Conflict))));
    assert!(vault.delete_server(&changed.name).await.unwrap());
    assert_eq!(vault.server(&changed.name).await.unwrap(), None);
}

#[tokio::test]
async fn no_part_of_a_stored_document_has_a_value_in_clear() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let mut server = stdio("one");
    server.extra.insert("env".to_owned(), json!({"A": "value-a"}));
    server.extra.insert("headers".to_owned(), json!({"H": "value-h"}));
    server.extra.insert("catalogProvider".to_owned(), "kept".into());
    vault.insert_server(&server).await.unwrap();
    let document = store.sealed("one").await.value.0.to_document().unwrap();
    let written = serde_json::to_string(&document).unwrap();
    assert!(!written.contains("value-") && written.contains("$mg1$k1$"), "{written}");
    assert_eq!(document["catalogProvider"], "kept");
}

#[tokio::test]
async fn a_server_whose_values_were_moved_hides_no_other() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    for name in ["one", "two", "three", "four"] {
        vault.insert_server(&stdio(name)).await.unwrap();
    }
    let from_two = store.stored("two").await["A"].clone();
    store.tamper("one", |map| drop(map.insert("A".to_owned(), from_two))).await;
    store
        .tamper("three", |map| {
            let (a, b) = (map["A"].clone(), map["B"].clone());
            map.extend([("A".to_owned(), b), ("B".to_owned(), a)]);
        })
        .await;
    store.tamper("four", |map| drop(map.insert("B".to_owned(), "clear".to_owned()))).await;
    let names: Vec<_> = vault.servers().await.unwrap().into_iter().map(|s| s.value.name).collect();
    assert_eq!(names, [ServerName::from_stored("two")]);
    for (name, expected) in [
        ("one", CryptoErrorKind::TagMismatch),
        ("three", CryptoErrorKind::TagMismatch),
        ("four", CryptoErrorKind::Format),
    ] {
        let error = vault.server(&ServerName::from_stored(name)).await.unwrap_err();
        assert!(error.to_string().contains(&format!("of server {name}")), "{error}");
        assert!(matches!(error, VaultError::Integrity { error, .. } if error.kind() == expected));
        assert_eq!(WorkerError::from(error).code, ErrorCode::SecretIntegrity);
    }
}

#[tokio::test]
async fn variables_stay_clear_for_as_long_as_mcp_api_needs_them() {
    let store = TestStore::new();
    let rw = opened(&store, KEY, Some(LegacyMode::Rw)).await;
    let mut server = stdio("one");
    variables(&mut server).insert("L".to_owned(), LEGACY.to_owned());
    variables(&mut server).insert("S".to_owned(), "$mg1$k1$".to_owned());
    round_trip(&rw, &server).await;
    let clear = store.stored("one").await;
    assert_eq!((clear["A"].as_str(), clear["B"].as_str()), ("value-a", "value-b"));
    // These would be taken for encrypted ones.
    assert!(["L", "S"].iter().all(|name| is_legacy(&clear[*name]) && clear[*name] != LEGACY));

    let ro = opened(&store, KEY, Some(LegacyMode::Ro)).await;
    let read = ro.server(&server.name).await.unwrap().unwrap();
    assert_eq!(read.value, server);
    ro.replace_server(&read.value, read.revision).await.unwrap();
    assert!(store.stored("one").await.values().all(|value| is_sealed(value)));
    for mode in [LegacyMode::Rw, LegacyMode::Ro, LegacyMode::Off] {
        let read = opened(&store, KEY, Some(mode)).await.server(&server.name).await.unwrap().unwrap();
        assert_eq!(read.value, server);
    }
}

async fn round_trip(vault: &Vault, server: &ServerRecord) {
    vault.insert_server(server).await.unwrap();
    assert_eq!(vault.server(&server.name).await.unwrap().unwrap().value, *server);
}

#[tokio::test]
async fn a_secret_opens_for_its_user_and_server_only() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let (alice, github) = (UserId::from_stored("alice"), ServerName::from_stored("github"));
    let token = SecretName::from_stored("token");
    vault.insert_server(&stdio("github")).await.unwrap();
    vault.put_secret(&alice, &github, &token, &"ghp_exampleToken".into()).await.unwrap();
    let sealed = vault.sealed_secrets(&alice, &github).await.unwrap().remove(0);
    assert!(is_sealed(&sealed.value));
    assert_eq!(vault.open_secret(&sealed).unwrap().expose_secret(), "ghp_exampleToken");

    let other = ServerName::from_stored("other");
    for moved in [
        SealedSecret { username: UserId::from_stored("bob"), ..sealed.clone() },
        SealedSecret { server_name: other.clone(), ..sealed.clone() },
        SealedSecret { server_name: other, key: "other.token".to_owned(), ..sealed.clone() },
        SealedSecret { secret_name: SecretName::from_stored("TOKEN"), ..sealed.clone() },
        SealedSecret { value: LEGACY.to_owned(), ..sealed.clone() },
        SealedSecret { value: "ghp_exampleToken".to_owned(), ..sealed.clone() },
    ] {
        let error = WorkerError::from(vault.open_secret(&moved).map(|_| ()).expect_err("it was opened"));
        assert_eq!(error.code, ErrorCode::SecretIntegrity);
        assert_eq!(error.message, "A stored secret cannot be decrypted; set it again");
    }
    assert!(vault.delete_secret(&alice, &github, &token).await.unwrap());
    assert!(vault.sealed_secrets(&alice, &github).await.unwrap().is_empty());
}

#[tokio::test]
async fn values_that_are_too_large_are_the_callers_fault() {
    for mode in [LegacyMode::Rw, LegacyMode::Off] {
        let store = TestStore::new();
        let vault = opened(&store, KEY, Some(mode)).await;
        let mut server = stdio("one");
        let large = "x".repeat(SECRET_BYTES + 1);
        let (user, secret) = (UserId::default(), SecretName::from_stored("s"));
        let put = vault.put_secret(&user, &server.name, &secret, &large.clone().into()).await;
        variables(&mut server).insert("A".to_owned(), large);
        let insert = vault.insert_server(&server).await.map(|_| ());
        for error in [put, insert] {
            assert_eq!(WorkerError::from(error.unwrap_err()).code, ErrorCode::InvalidRequest);
        }
    }
}

#[tokio::test]
async fn an_old_database_is_used_as_mcp_api_would() {
    let store = TestStore::old().await;
    let vault = opened(&store, "secret", None).await;
    assert_eq!(vault.crypter().mode(), LegacyMode::Rw);
    let (alice, github) = (UserId::from_stored("alice"), ServerName::from_stored("github"));
    let old = vault.sealed_secrets(&alice, &github).await.unwrap().remove(0);
    assert_eq!(vault.open_secret(&old).unwrap().expose_secret(), "ghp_exampleToken");
    vault.put_secret(&alice, &github, &SecretName::from_stored("new"), &"x".into()).await.unwrap();
    let secrets = store.store.secrets(&alice, &github).await.unwrap();
    assert_eq!(secrets.len(), 2);
    assert!(secrets.iter().all(|secret| is_legacy(&secret.value)));
    round_trip(&vault, &stdio("one")).await;
    assert_eq!(
        store.facts().await.into_keys().collect::<Vec<_>>(),
        [STORE_FACT],
        "nothing that helps to guess"
    );
    // A strong key there is used for both formats.
    let strong = opened(&store, KEY, None).await;
    assert_eq!((strong.crypter().mode(), strong.crypter().ring().kids().count()), (LegacyMode::Rw, 1));
}

#[tokio::test]
async fn weak_keys_are_refused_unless_there_is_something_old_to_read() {
    let (new, old) = (TestStore::new(), TestStore::old().await);
    for (store, legacy) in [
        (&new, None),
        (&new, Some(LegacyMode::Rw)),
        (&new, Some(LegacyMode::Ro)),
        (&new, Some(LegacyMode::Off)),
        (&old, Some(LegacyMode::Off)),
    ] {
        let error = refusal(store, text("secret"), legacy).await;
        assert!(matches!(error, VaultError::Weak(_)), "{error:?}");
        assert!(store.facts().await.is_empty());
    }
    assert!(matches!(refusal(&TestStore::old().await, text(""), None).await, VaultError::Weak(_)));
    let store = TestStore::old().await;
    let ro = opened(&store, "secret", Some(LegacyMode::Ro)).await;
    assert!(matches!(ro.insert_server(&stdio("one")).await, Err(VaultError::Seal { .. })));
}

#[tokio::test]
async fn a_key_ring_needs_nothing_old_in_the_store() {
    let ring = || KeySource::RingFile(RING.into());
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(), None).await.unwrap();
    round_trip(&vault, &stdio("one")).await;
    for legacy in [None, Some(LegacyMode::Rw), Some(LegacyMode::Ro)] {
        let error = refusal(&TestStore::old().await, ring(), legacy).await;
        assert!(matches!(error, VaultError::Key(KeyError::NoLegacyKey)), "{error:?}");
    }
    let old = TestStore::old().await;
    assert!(Vault::open(old.store.clone(), ring(), Some(LegacyMode::Off)).await.is_ok());
    let broken = refusal(&store, KeySource::RingFile("k1".into()), None).await;
    assert!(matches!(broken, VaultError::Key(KeyError::Line { line: 1, .. })), "{broken:?}");
}

#[tokio::test]
async fn another_key_than_the_stores_is_refused() {
    let store = TestStore::new();
    let id = opened(&store, KEY, None).await;
    assert_eq!(
        store.facts().await,
        BTreeMap::from([
            ("kcv:k1".to_owned(), "555b9c5f5496a81a".to_owned()),
            (FIRST_KEY_FACT.to_owned(), "k1".to_owned()),
            (STORE_FACT.to_owned(), id.store_id().unwrap().to_owned()),
        ])
    );
    opened(&store, KEY, None).await;
    store.add_legacy_secret().await;
    for key in [OTHER_KEY, "secret"] {
        let error = refusal(&store, text(key), None).await;
        assert!(matches!(&error, VaultError::KeyMismatch { kid } if kid == "k1"), "{error:?}");
        assert!(error.to_string().starts_with("this node's key k1 differs"), "{error}");
    }
    // A new key under a new name is welcome beside the old one, which is compared as well.
    assert!(store.store.delete_server(&ServerName::from_stored("github")).await.unwrap());
    assert_eq!(store.store.legacy_secrets().await.unwrap(), 0);
    let new = "k2:__79_Pv6-fj39vX08_Lx8O_u7ezr6uno5-bl5OPi4eA";
    let error = refusal(&store, KeySource::RingFile(new.into()), None).await;
    assert!(matches!(&error, VaultError::KeyMismatch { kid } if kid == "k2"), "{error:?}");
    let ring = format!("{new}\n{RING}");
    let facts = store.facts().await;
    Vault::inspect(store.store.clone(), KeySource::RingFile(ring.as_str().into()), None).await.unwrap();
    let error = refusal(&store, text(PASSPHRASE), None).await;
    assert!(matches!(error, VaultError::KeyMismatch { .. }), "{error:?}");
    assert_eq!(store.facts().await, facts, "looking and being refused leave nothing behind");
    let vault =
        Vault::open(store.store.clone(), KeySource::RingFile(ring.as_str().into()), None).await.unwrap();
    assert!(store.facts().await.contains_key("kcv:k2"));
    opened(&store, KEY, None).await.record_key().await.unwrap();
    vault.record_key().await.unwrap();
    vault.record_key().await.unwrap();
    let log: Vec<_> = store.facts().await.into_iter().filter(|(key, _)| key.starts_with("writing")).collect();
    assert_eq!(log, [("writing-key:2".to_owned(), "k2".to_owned())]);
    // Now values may need either of them.
    let error = refusal(&store, text(KEY), None).await;
    assert!(matches!(&error, VaultError::KeyMissing { kid } if kid == "k2"), "{error:?}");
    let error = refusal(&store, KeySource::RingFile(new.into()), None).await;
    assert!(matches!(&error, VaultError::KeyMissing { kid } if kid == "k1"), "{error:?}");
    store.store.put_once(Fact::KeyRing, "retired:k1", "by hand").await.unwrap();
    Vault::open(store.store.clone(), KeySource::RingFile(new.into()), None).await.unwrap();
    let swapped = ring.replace("k1", "k3").replace("k2", "k1");
    let error = refusal(&store, KeySource::RingFile(swapped.into()), None).await;
    assert!(matches!(&error, VaultError::KeyMismatch { kid } if kid == "k1"), "{error:?}");
}

#[tokio::test]
async fn nodes_with_the_same_passphrase_share_its_salt() {
    let store = TestStore::new();
    let first = opened(&store, PASSPHRASE, None).await;
    first.insert_server(&stdio("one")).await.unwrap();
    let second = opened(&store, PASSPHRASE, None).await;
    assert_eq!(second.servers().await.unwrap()[0].value, stdio("one"));
    let other = refusal(&store, text(&PASSPHRASE.replace("four", "five")), None).await;
    assert!(matches!(other, VaultError::KeyMismatch { .. }), "{other:?}");
    // A store never overwrites a fact, so the damage is done to a copy.
    let copy = TestStore::new();
    copy.store.put_once(Fact::KeyRing, SALT_FACT, "junk").await.unwrap();
    let facts = store.facts().await;
    for (key, value) in &facts {
        copy.store.put_once(Fact::KeyRing, key, value).await.unwrap();
    }
    assert_eq!((facts.len(), copy.facts().await.len()), (4, 4));
    let damaged = refusal(&copy, text(PASSPHRASE), None).await;
    assert!(matches!(damaged, VaultError::Key(KeyError::Salt)), "{damaged:?}");
}

#[tokio::test]
async fn debug_output_shows_no_keys() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let shown = format!("{vault:?} {:?} {:?}", text(KEY), KeySource::RingFile(RING.into()));
    assert!(!shown.contains("000102") && !shown.contains("AAECA"), "{shown}");
}
