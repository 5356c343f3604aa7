//! Everything encrypted anew.

use tokio_util::sync::CancellationToken;

use super::{
    keys::{NEW, reload, ring},
    remote::{CANARY, ISSUER, login, session, tokens, whole_login, whole_session, whole_tokens},
    *,
};
use crate::{
    api_key::{ApiKey, NewApiKey},
    error::ErrorCode,
    idempotency::{CallState, NamedCall},
    ids::{IdempotencyKey, WorkerId},
    json::RawJson,
    limits::REWRAP_RATE_MAX,
    package::{Job, JobKind, PackageSpec},
    principal::{Reach, Scope},
    remote::{GivenClient, OAuthClient},
    store::{Collection, Document, SecretRow},
    timestamp::Timestamp,
    vault::{Census, RewrapError, RewrapReport, RewrapState},
};

async fn run(vault: &Vault) -> RewrapReport {
    let rewrap = vault.begin_rewrap("test").await.unwrap();
    let seen = rewrap.seen();
    assert_eq!(seen.report().state, RewrapState::Running);
    rewrap.run(REWRAP_RATE_MAX, &CancellationToken::new()).await;
    seen.report()
}

/// One of everything that has something to hide.
async fn fill(vault: &Vault) {
    vault.insert_server(&stdio("one")).await.unwrap();
    let http = json!({"transportType": "streamable_http", "url": "https://example.org/mcp",
        "headers": {"Authorization": CANARY}});
    let mut two = record("two", http);
    let client_secret = Some(CANARY.to_owned());
    two.oauth_client = Some(GivenClient { client_id: "id".to_owned(), client_secret, scopes: Vec::new() });
    vault.insert_server(&two).await.unwrap();
    for user in ["alice", "bob"] {
        let (user, one) = (UserId::from_stored(user), ServerName::from_stored("one"));
        for name in ["a", "b"] {
            vault.put_secret(&user, &one, &SecretName::from_stored(name), &CANARY.into()).await.unwrap();
        }
    }
    vault.put_session(&session("alice", "one"), None).await.unwrap();
    vault.put_oauth_tokens(&tokens("alice", "one"), None).await.unwrap();
    let anonymous = OAuthTokensWithoutIssuer::of("bob");
    vault.put_oauth_tokens(&anonymous, None).await.unwrap();
    vault.put_oauth_client(&client()).await.unwrap();
    let mut begun = login("state");
    begun.code = Some(CANARY.into());
    vault.put_login(&begun, None).await.unwrap();
    let spec = PackageSpec { name: "package".to_owned(), ..PackageSpec::default() };
    let job = Job::new(JobKind::Install, ServerName::from_stored("job"), spec, Some(stdio("job")));
    vault.insert_job(&job).await.unwrap();
    vault.put_named_call(&call(), None).await.unwrap();
    let new = NewApiKey {
        name: "a test's".to_owned(),
        user: UserId::from_stored("alice"),
        scopes: [Scope::Call].into(),
        reach: Reach::default(),
        expires_at: None,
    };
    vault.insert_api_key(&ApiKey::make(new, "a test").unwrap().0).await.unwrap();
}

struct OAuthTokensWithoutIssuer;

impl OAuthTokensWithoutIssuer {
    fn of(who: &str) -> crate::remote::OAuthTokens {
        crate::remote::OAuthTokens { issuer: None, ..tokens(who, "one") }
    }
}

fn client() -> OAuthClient {
    OAuthClient {
        issuer: ISSUER.to_owned(),
        redirect_uri: "https://here.example/callback".to_owned(),
        client_id: "id".to_owned(),
        client_secret: Some(CANARY.into()),
    }
}

/// A call whose result has several parts.
fn call() -> NamedCall {
    let result = json!({"canary": CANARY, "long": "x".repeat(100_000)}).to_string();
    NamedCall {
        user: UserId::from_stored("alice"),
        key: IdempotencyKey::parse("order 1").unwrap(),
        fingerprint: "f".to_owned(),
        worker: WorkerId::from_stored("w"),
        expires_at: Timestamp::from_millis(Timestamp::now().millis() + 3_600_000),
        state: CallState::Done(Box::new(Ok(RawJson::parse(result).unwrap()))),
    }
}

/// All that [`fill`] put there, as it is read. Revisions are part of it.
async fn everything(vault: &Vault) -> Vec<String> {
    let (alice, bob) = (UserId::from_stored("alice"), UserId::from_stored("bob"));
    let one = ServerName::from_stored("one");
    let mut all = Vec::new();
    for server in vault.servers().await.unwrap() {
        let mut value = server.value.clone();
        let variables: Vec<_> = match &mut value.transport {
            Transport::StreamableHttp { headers: None, .. } => Vec::new(),
            _ => variables(&mut value).iter().map(|(name, value)| format!("{name}={value}")).collect(),
        };
        let client = value.oauth_client.as_ref().and_then(|client| client.client_secret.clone());
        all.push(format!("{:?} {} {variables:?} {client:?}", server.revision, value.name));
    }
    for user in [&alice, &bob] {
        for secret in vault.sealed_secrets(user, &one).await.unwrap() {
            let value = vault.open_secret(&secret).unwrap();
            all.push(format!("{} {} {}", secret.username, secret.key, value.expose_secret()));
        }
        let stored = vault.oauth_tokens(user, &one).await.unwrap().unwrap();
        all.push(format!("{:?} {}", stored.revision, whole_tokens(&stored.value)));
    }
    let stored = vault.session(&alice, &one).await.unwrap().unwrap();
    all.push(format!("{:?} {}", stored.revision, whole_session(&stored.value)));
    let stored = vault.oauth_client(ISSUER, &client().redirect_uri).await.unwrap().unwrap();
    all.push(stored.client_secret.unwrap().expose_secret().to_owned());
    let stored = vault.login(&login("state").id).await.unwrap().unwrap();
    all.push(format!(
        "{:?} {}",
        stored.revision,
        whole_login(&stored.value).split_once("begun_at").unwrap().0
    ));
    let stored = vault.job(&ServerName::from_stored("job")).await.unwrap().unwrap();
    let mut server = stored.value.server.unwrap();
    all.push(format!("{:?} {:?}", stored.revision, variables(&mut server)));
    all.extend(vault.api_keys().await.unwrap().iter().map(|key| format!("{key:?}")));
    let stored = vault.named_call(&alice, &call().key).await.unwrap().unwrap();
    let CallState::Done(result) = stored.value.state else { panic!("it is not done") };
    all.push(format!("{:?} {}", stored.revision, String::from_utf8_lossy(result.unwrap().as_bytes())));
    all
}

/// How many encrypted texts [`fill`] leaves.
const TEXTS: u64 = 2 + 2 + 4 + 1 + 2 * 4 + 1 + 2 + 2 + 3 + 1;

#[tokio::test]
async fn everything_is_encrypted_anew_and_reads_as_before() {
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(&[RING]), None).await.unwrap();
    vault.record_key().await.unwrap();
    fill(&vault).await;
    let before = everything(&vault).await;
    assert_eq!(vault.census().await.unwrap().by_key, BTreeMap::from([("k1".to_owned(), TEXTS)]));

    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    let report = run(&vault).await;
    assert_eq!(
        (report.state, report.rewrapped, report.overtaken),
        (RewrapState::Done, TEXTS, 0),
        "{report:?}"
    );
    assert_eq!((report.left_count, report.expiring, report.key.as_str()), (0, 0, "k2"));
    let all = Census { by_key: BTreeMap::from([("k2".to_owned(), TEXTS)]), ..Census::default() };
    assert_eq!(vault.census().await.unwrap(), all);
    assert_eq!(everything(&vault).await, before, "also the revisions are what they were");
    // Nothing is left to be done, and nothing needs the old key.
    assert_eq!(run(&vault).await.rewrapped, 0);
    vault.retire_key("k1", false).await.unwrap();
    let fresh = Vault::open(store.store.clone(), ring(&[NEW]), None).await.unwrap();
    assert_eq!(everything(&fresh).await, before);
}

#[tokio::test]
async fn what_mcp_api_left_is_encrypted_in_our_format() {
    let store = TestStore::old().await;
    let open = async |mode| {
        let keys = KeySource::Both { ring: RING.into(), text: "secret".into() };
        Vault::open(store.store.clone(), keys, Some(mode)).await.unwrap()
    };
    let rw = open(LegacyMode::Rw).await;
    fill(&rw).await;
    let census = rw.census().await.unwrap();
    // Variables of servers, and of what a job registers, stand there in clear, and the id of a session.
    assert_eq!((census.clear, census.broken), (2 + 2 + 1 + 2 + 1, 0), "{census:?}");
    // mcp-api has no API keys.
    assert_eq!(census.by_key, BTreeMap::from([("k1".to_owned(), 1)]));
    let refused = rw.begin_rewrap("test").await.err().unwrap();
    assert!(matches!(refused, RewrapError::Legacy), "{refused:?}");
    let before = everything(&rw).await;

    let ro = open(LegacyMode::Ro).await;
    let report = run(&ro).await;
    assert_eq!((report.state, report.left_count), (RewrapState::Done, 0), "{report:?}");
    assert_eq!(report.rewrapped, census.clear + census.legacy);
    let off = open(LegacyMode::Off).await;
    assert_eq!(everything(&off).await, before);
    assert_eq!(store.store.legacy_secrets().await.unwrap(), 0);
    let (alice, github) = (UserId::from_stored("alice"), ServerName::from_stored("github"));
    let old = off.sealed_secrets(&alice, &github).await.unwrap().remove(0);
    assert_eq!(off.open_secret(&old).unwrap().expose_secret(), "ghp_exampleToken");
}

#[tokio::test]
async fn what_was_changed_or_moved_is_named_and_left_as_it_is() {
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(&[RING]), None).await.unwrap();
    fill(&vault).await;
    let (alice, one) = (UserId::from_stored("alice"), ServerName::from_stored("one"));
    let secrets = vault.sealed_secrets(&alice, &one).await.unwrap();
    let exchanged = SealedSecret { value: secrets[1].value.clone(), ..secrets[0].clone() };
    store.store.put_secret(&exchanged).await.unwrap();
    let cut = SealedSecret { value: secrets[1].value[..40].to_owned(), ..secrets[1].clone() };
    store.store.put_secret(&cut).await.unwrap();
    store.tamper("one", |map| drop(map.insert("A".to_owned(), "clear".to_owned()))).await;
    store
        .tamper_document(Collection::Sessions, |document| {
            document.insert("username".to_owned(), "mallory".into());
        })
        .await;
    store
        .tamper_document(Collection::NamedCalls, |document| {
            document["parts"].as_array_mut().unwrap().swap(0, 1);
        })
        .await;
    // Whoever knows mcp-api's key must not become an administrator.
    let legacy = |document: &mut Document| drop(document.insert("record".to_owned(), LEGACY.into()));
    store.tamper_document(Collection::ApiKeys, legacy).await;
    let session = store.only(Collection::Sessions).await.value;
    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    let report = run(&vault).await;
    let record = store.only(Collection::ApiKeys).await.value;
    let record = format!("apiKeys {}", record["key"].as_str().unwrap());
    let left: Vec<_> = report.left.iter().map(|left| (left.what.as_str(), left.reason)).collect();
    assert_eq!(report.left_count, 7, "{left:?}");
    for expected in [
        ("value of secrets alice, one.a", "tag_mismatch"),
        ("value of secrets alice, one.b", "format"),
        ("env of servers one, A", "format"),
        ("mcpUserSessions [\"one\",\"alice\"]", "misplaced"),
        (record.as_str(), "format"),
        ("result of idem alice, order 1, 0", "tag_mismatch"),
        ("result of idem alice, order 1, 1", "tag_mismatch"),
    ] {
        assert!(left.contains(&expected), "{expected:?} in {left:?}");
    }
    assert_eq!(report.rewrapped, TEXTS - 7);
    assert_eq!(store.stored("one").await["A"], "clear");
    assert_eq!(store.only(Collection::Sessions).await.value, session);
    assert_eq!(vault.sealed_secrets(&alice, &one).await.unwrap(), [exchanged, cut]);
    let error = WorkerError::from(vault.server(&one).await.unwrap_err());
    assert_eq!(error.code, ErrorCode::SecretIntegrity);
}

#[tokio::test]
async fn calls_of_an_earlier_version_are_left_to_be_forgotten() {
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(&[RING]), None).await.unwrap();
    vault.put_named_call(&call(), None).await.unwrap();
    store.tamper_document(Collection::NamedCalls, |document| drop(document.remove("name"))).await;
    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    let report = run(&vault).await;
    assert_eq!((report.expiring, report.left_count, report.rewrapped), (3, 0, 0), "{report:?}");
    assert_eq!(vault.census().await.unwrap().of("k1"), 3);
    let user = UserId::from_stored("alice");
    assert!(vault.named_call(&user, &call().key).await.unwrap().is_some(), "it can still be read");
}

#[tokio::test]
async fn one_run_at_a_time_and_what_users_write_meanwhile_stays() {
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(&[RING]), None).await.unwrap();
    let (one, name) = (ServerName::from_stored("one"), SecretName::from_stored("s"));
    vault.insert_server(&stdio("one")).await.unwrap();
    let users: Vec<_> = (0..40).map(|number| UserId::from_stored(format!("user-{number}"))).collect();
    for user in &users {
        vault.put_secret(user, &one, &name, &"old".into()).await.unwrap();
    }
    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    let rewrap = vault.begin_rewrap("first").await.unwrap();
    let busy = tokio::time::timeout(std::time::Duration::from_secs(2), vault.begin_rewrap("second")).await;
    assert!(busy.is_err(), "a holder that may be alive is waited for");
    let seen = rewrap.seen();
    let (stop, writer) = (CancellationToken::new(), vault.clone());
    let (users_too, one_too, name_too) = (users.clone(), one.clone(), name.clone());
    let writing = tokio::spawn(async move {
        for user in users_too.iter().rev() {
            writer.put_secret(user, &one_too, &name_too, &"new".into()).await.unwrap();
        }
    });
    rewrap.run(2_000, &stop).await;
    writing.await.unwrap();
    assert_eq!(seen.report().state, RewrapState::Done);
    for user in &users {
        let secret = vault.sealed_secrets(user, &one).await.unwrap().remove(0);
        assert_eq!(vault.open_secret(&secret).unwrap().expose_secret(), "new", "{user}");
    }
    assert_eq!(vault.census().await.unwrap().of("k1"), 0);
    // The lease was given back.
    assert_eq!(run(&vault).await.state, RewrapState::Done);
    let row = SecretRow { username: "user-1".to_owned(), key: "one.s".to_owned(), value: "other".to_owned() };
    assert!(!store.store.reseal_secret(&row, "x").await.unwrap());
}

#[tokio::test]
async fn a_run_that_is_stopped_is_resumed_by_another() {
    let store = TestStore::new();
    let vault = Vault::open(store.store.clone(), ring(&[RING]), None).await.unwrap();
    let (one, name) = (ServerName::from_stored("one"), SecretName::from_stored("s"));
    vault.insert_server(&stdio("one")).await.unwrap();
    for number in 0..30 {
        let user = UserId::from_stored(format!("user-{number}"));
        vault.put_secret(&user, &one, &name, &"old".into()).await.unwrap();
    }
    reload(&vault, ring(&[NEW, RING])).await.unwrap();
    let rewrap = vault.begin_rewrap("first").await.unwrap();
    let (seen, stop) = (rewrap.seen(), CancellationToken::new());
    let running = tokio::spawn({
        let stop = stop.clone();
        async move { rewrap.run(20, &stop).await }
    });
    while seen.report().rewrapped < 5 {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    stop.cancel();
    running.await.unwrap();
    let first = seen.report();
    assert_eq!(first.state, RewrapState::Stopped);
    assert!(first.rewrapped < 32, "{first:?}");
    let second = run(&vault).await;
    assert_eq!((second.state, first.rewrapped + second.rewrapped), (RewrapState::Done, 32));
}
