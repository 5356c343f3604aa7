//! Sessions, tokens, clients and logins.

use super::*;
use crate::{
    ids::WorkerId,
    remote::{GivenClient, LOGIN_TIME, Login, LoginId, OAuthClient, OAuthTokens, Session},
    store::{Collection, Document},
    timestamp::Timestamp,
};

pub(super) const ISSUER: &str = "https://issuer.example";
pub(super) const CANARY: &str = "canary";

pub(super) fn user(name: &str) -> UserId {
    UserId::from_stored(name)
}

pub(super) fn server(name: &str) -> ServerName {
    ServerName::from_stored(name)
}

pub(super) fn session(who: &str, with: &str) -> Session {
    Session {
        user: user(who),
        server: server(with),
        url: "https://mcp.example/mcp".to_owned(),
        id: format!("{CANARY}-session-{who}").into(),
        protocol_version: Some("2025-06-18".to_owned()),
        updated_at: Timestamp::from_millis(1_795_366_109_287),
    }
}

pub(super) fn tokens(who: &str, with: &str) -> OAuthTokens {
    OAuthTokens {
        user: user(who),
        server: server(with),
        issuer: Some(ISSUER.to_owned()),
        resource: Some("https://remote.example/mcp".to_owned()),
        token_type: "Bearer".to_owned(),
        access_token: format!("{CANARY}-access-{who}").into(),
        refresh_token: Some(format!("{CANARY}-refresh").into()),
        expires_at: Some(Timestamp::from_millis(1_795_366_109_287)),
        scopes: vec!["a".to_owned(), "b".to_owned()],
        client_id: Some("client".to_owned()),
        client_secret: Some(format!("{CANARY}-client").into()),
        redirect_uri: Some("https://here.example/callback".to_owned()),
        code_verifier: Some(format!("{CANARY}-verifier").into()),
        refreshing: Some(WorkerId::from_stored("w")),
        refused: Some("invalid_grant".to_owned()),
        extra: json!({"unknown": {"list": [1]}}).as_object().unwrap().clone(),
    }
}

pub(super) fn login(state: &str) -> Login {
    Login {
        id: LoginId::of(state),
        user: user("alice"),
        server: server("one"),
        browser: "hash of a cookie".to_owned(),
        begun_at: Timestamp::now(),
        code: None,
        answered_by: None,
        proof: format!("{{\"verifier\":\"{CANARY}\"}}").into(),
    }
}

/// All that is in a value, also what it does not print.
pub(super) fn whole_session(session: &Session) -> String {
    format!("{session:?} {}", session.id.expose_secret())
}

pub(super) fn whole_tokens(tokens: &OAuthTokens) -> String {
    let OAuthTokens { access_token, refresh_token, client_secret, code_verifier, .. } = tokens;
    let secrets: Vec<_> = [Some(access_token), refresh_token.as_ref(), client_secret.as_ref()]
        .into_iter()
        .chain([code_verifier.as_ref()])
        .map(|secret| secret.map(|secret| secret.expose_secret().to_owned()))
        .collect();
    let mut shown = tokens.clone();
    shown.extra.remove("createdAt");
    format!("{shown:?} {secrets:?}")
}

pub(super) fn whole_login(login: &Login) -> String {
    let code = login.code.as_ref().map(|code| code.expose_secret().to_owned());
    format!("{login:?} {code:?} {}", login.proof.expose_secret())
}

impl TestStore {
    /// The only document of a collection.
    pub(super) async fn only(&self, collection: Collection) -> Versioned<Document> {
        let mut all = self.store.documents(collection, false).await.unwrap();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    /// Changes the only document of a collection; gives it back as it was.
    pub(super) async fn tamper_document(
        &self,
        collection: Collection,
        change: impl FnOnce(&mut Document),
    ) -> Versioned<Document> {
        let before = self.only(collection).await;
        let mut changed = before.value.clone();
        change(&mut changed);
        let key = before.value[collection.key()].as_str().unwrap();
        self.store.delete_document(collection, key, None).await.unwrap();
        self.store.insert_document(collection, &changed).await.unwrap();
        before
    }
}

fn store_error(error: VaultError) -> StoreError {
    match error {
        VaultError::Store(error) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_session_is_kept_encrypted_and_changes_at_its_revision() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let (alice, one) = (user("alice"), server("one"));
    assert!(vault.session(&alice, &one).await.unwrap().is_none());
    let first = vault.put_session(&session("alice", "one"), None).await.unwrap();
    let read = vault.session(&alice, &one).await.unwrap().unwrap();
    assert_eq!((read.revision, whole_session(&read.value)), (first, whole_session(&session("alice", "one"))));
    let stored = store.only(Collection::Sessions).await.value;
    assert!(!serde_json::to_string(&stored).unwrap().contains(CANARY), "{stored:?}");
    assert!(!format!("{:?}", read.value).contains(CANARY));

    let again = vault.put_session(&session("alice", "one"), None).await.unwrap_err();
    assert!(matches!(store_error(again), StoreError::AlreadyExists { .. }));
    let missing = vault.put_session(&session("bob", "one"), Some(first)).await.unwrap_err();
    assert!(matches!(store_error(missing), StoreError::NotFound));
    let mut changed = session("alice", "one");
    changed.id = "second".into();
    changed.protocol_version = None;
    changed.updated_at = Timestamp::from_millis(1_795_366_109_288);
    let second = vault.put_session(&changed, Some(first)).await.unwrap();
    let late = vault.put_session(&session("alice", "one"), Some(first)).await.unwrap_err();
    assert!(matches!(store_error(late), StoreError::Conflict));
    let read = vault.session(&alice, &one).await.unwrap().unwrap();
    assert_eq!((read.revision, whole_session(&read.value)), (second, whole_session(&changed)));
    assert_eq!(store.only(Collection::Sessions).await.value["createdAt"], "2026-11-22T16:48:29.287Z");

    vault.put_session(&session("bob", "one"), None).await.unwrap();
    vault.put_session(&session("alice", "two"), None).await.unwrap();
    let mut users: Vec<_> =
        vault.sessions_of(&one).await.unwrap().into_iter().map(|session| session.value.user).collect();
    users.sort();
    assert_eq!(users, [alice.clone(), user("bob")]);
    let late = vault.delete_session(&alice, &one, Some(first)).await.unwrap_err();
    assert!(matches!(store_error(late), StoreError::Conflict));
    assert!(vault.delete_session(&alice, &one, Some(second)).await.unwrap());
    assert!(!vault.delete_session(&alice, &one, None).await.unwrap());
    assert!(vault.session(&alice, &server("two")).await.unwrap().is_some());
}

#[tokio::test]
async fn tokens_are_kept_encrypted_with_what_nobody_knows() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let (alice, one) = (user("alice"), server("one"));
    let first = vault.put_oauth_tokens(&tokens("alice", "one"), None).await.unwrap();
    let read = vault.oauth_tokens(&alice, &one).await.unwrap().unwrap();
    assert_eq!((read.revision, whole_tokens(&read.value)), (first, whole_tokens(&tokens("alice", "one"))));
    let stored = store.only(Collection::OAuthTokens).await.value;
    assert!(!serde_json::to_string(&stored).unwrap().contains(CANARY), "{stored:?}");
    assert!(!format!("{:?}", read.value).contains(CANARY));
    let created = stored["createdAt"].clone();

    let mut bare = read.value;
    bare.issuer = None;
    (bare.refresh_token, bare.client_secret, bare.code_verifier) = (None, None, None);
    (bare.expires_at, bare.client_id, bare.redirect_uri) = (None, None, None);
    (bare.refreshing, bare.refused, bare.scopes) = (None, None, Vec::new());
    let second = vault.put_oauth_tokens(&bare, Some(first)).await.unwrap();
    let late = vault.put_oauth_tokens(&bare, Some(first)).await.unwrap_err();
    assert!(matches!(store_error(late), StoreError::Conflict));
    let read = vault.oauth_tokens(&alice, &one).await.unwrap().unwrap();
    assert_eq!((read.revision, whole_tokens(&read.value)), (second, whole_tokens(&bare)));
    let stored = store.only(Collection::OAuthTokens).await.value;
    assert_eq!(stored["createdAt"], created);
    assert!(!stored.contains_key("refreshToken") && !stored.contains_key("refused"), "{stored:?}");

    vault.put_oauth_tokens(&tokens("bob", "one"), None).await.unwrap();
    vault.put_oauth_tokens(&tokens("bob", "two"), None).await.unwrap();
    assert_eq!(vault.users_with_tokens(&one).await.unwrap(), 2);
    assert!(vault.delete_oauth_tokens(&alice, &one, Some(second)).await.unwrap());
    assert!(!vault.delete_oauth_tokens(&alice, &one, Some(second)).await.unwrap());
    assert_eq!(vault.users_with_tokens(&one).await.unwrap(), 1);
}

#[tokio::test]
async fn what_was_changed_or_moved_in_the_store_is_not_used() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let (alice, bob, one) = (user("alice"), user("bob"), server("one"));
    let moved_to_bob = |document: &mut Document| {
        document.insert("key".to_owned(), r#"["one","bob"]"#.into());
        document.insert("username".to_owned(), "bob".into());
    };
    let under_bobs_key = |document: &mut Document| {
        document.insert("key".to_owned(), r#"["one","bob"]"#.into());
    };
    let set = |field: &'static str, value: &'static str| {
        move |document: &mut Document| drop(document.insert(field.to_owned(), value.into()))
    };
    let reset = async |collection: Collection, before: Versioned<Document>| {
        let key = store.only(collection).await.value["key"].as_str().unwrap().to_owned();
        store.store.delete_document(collection, &key, None).await.unwrap();
        store.store.insert_document(collection, &before.value).await.unwrap();
    };

    vault.put_session(&session("alice", "one"), None).await.unwrap();
    let sessions = Collection::Sessions;
    let before = store.tamper_document(sessions, moved_to_bob).await;
    assert!(matches!(vault.session(&bob, &one).await, Err(VaultError::Integrity { .. })));
    assert!(vault.sessions_of(&one).await.unwrap().is_empty());
    reset(sessions, before).await;
    let before = store.tamper_document(sessions, under_bobs_key).await;
    assert!(
        matches!(vault.session(&bob, &one).await, Err(VaultError::Integrity { error, .. }) if error.kind() == CryptoErrorKind::Misplaced)
    );
    reset(sessions, before).await;
    for value in ["clear", LEGACY, "$mg1$k1$AAAA"] {
        let before = store.tamper_document(sessions, set("sessionId", value)).await;
        let error = vault.session(&alice, &one).await.unwrap_err();
        assert!(matches!(error, VaultError::Integrity { .. }), "{error:?}");
        reset(sessions, before).await;
    }
    assert!(vault.session(&alice, &one).await.unwrap().is_some());

    vault.put_oauth_tokens(&tokens("alice", "one"), None).await.unwrap();
    let all = Collection::OAuthTokens;
    let before = store.tamper_document(all, moved_to_bob).await;
    assert!(matches!(vault.oauth_tokens(&bob, &one).await, Err(VaultError::Integrity { .. })));
    reset(all, before).await;
    let exchanged = |document: &mut Document| {
        let refresh = document["refreshToken"].clone();
        document.insert("accessToken".to_owned(), refresh);
    };
    let before = store.tamper_document(all, exchanged).await;
    assert!(matches!(vault.oauth_tokens(&alice, &one).await, Err(VaultError::Integrity { .. })));
    reset(all, before).await;
    // What was given by one authorization server is not for another one, nor for one that nobody named.
    for (field, value) in [("issuer", "https://other.example"), ("issuer", ""), ("accessToken", LEGACY)] {
        let before = store.tamper_document(all, set(field, value)).await;
        let error = vault.oauth_tokens(&alice, &one).await.unwrap_err();
        assert_eq!(WorkerError::from(error).code, ErrorCode::SecretIntegrity);
        reset(all, before).await;
    }
    assert!(vault.oauth_tokens(&alice, &one).await.unwrap().is_some());
}

#[tokio::test]
async fn tokens_of_mcp_api_are_read_and_kept_whole() {
    let store = TestStore::old().await;
    let vault = opened(&store, "secret", None).await;
    let (alice, one) = (user("alice"), server("one"));
    let key = r#"["one","alice"]"#;
    for (expires, millis) in [
        (json!("2026-11-22T16:48:29.287Z"), Some(1_795_366_109_287)),
        (json!(1_795_366_109_287_i64), Some(1_795_366_109_287)),
        (json!(1_795_366_109_287.0), Some(1_795_366_109_287)),
        (json!(1_795_366_109), Some(1_795_366_109_000)),
        (json!(1e300), None),
        (json!("soon"), None),
        (Value::Null, None),
    ] {
        for scopes in [json!("read  write"), json!(["read", "write"]), json!(["read write", 7])] {
            let document = json!({
                "key": key, "serverName": "one", "username": "alice", "accessToken": LEGACY,
                "refreshToken": LEGACY, "clientSecret": null, "codeVerifier": "", "tokenType": null,
                "expiresAt": expires, "scopes": scopes, "clientId": "client", "redirectUri": null,
                "createdAt": "2026-11-22T16:48:29.287Z", "rank": 7,
            });
            let document = document.as_object().unwrap();
            store.store.insert_document(Collection::OAuthTokens, document).await.unwrap();
            let read = vault.oauth_tokens(&alice, &one).await.unwrap().unwrap();
            let tokens = &read.value;
            assert_eq!(tokens.access_token.expose_secret(), "ghp_exampleToken");
            assert_eq!(tokens.refresh_token.as_ref().unwrap().expose_secret(), "ghp_exampleToken");
            assert_eq!(tokens.expires_at.map(Timestamp::millis), millis);
            assert_eq!(
                (tokens.scopes.join(" ").as_str(), tokens.token_type.as_str()),
                ("read write", "Bearer")
            );
            assert!(
                tokens.client_secret.is_none() && tokens.code_verifier.is_none() && tokens.issuer.is_none()
            );

            vault.put_oauth_tokens(tokens, Some(read.revision)).await.unwrap();
            let again = vault.oauth_tokens(&alice, &one).await.unwrap().unwrap().value;
            assert_eq!(whole_tokens(&again), whole_tokens(tokens));
            let stored = store.only(Collection::OAuthTokens).await.value;
            assert!(is_legacy(stored["accessToken"].as_str().unwrap()), "mcp-api could not go on");
            assert_eq!((&stored["rank"], &stored["createdAt"]), (&json!(7), &document["createdAt"]));
            assert!(vault.delete_oauth_tokens(&alice, &one, None).await.unwrap());
        }
    }
    for (id, clear) in [(LEGACY, "ghp_exampleToken"), ("clear-id", "clear-id")] {
        let document = json!({"key": key, "serverName": "one", "username": "alice", "sessionId": id});
        store.store.insert_document(Collection::Sessions, document.as_object().unwrap()).await.unwrap();
        let read = vault.session(&alice, &one).await.unwrap().unwrap().value;
        assert_eq!((read.id.expose_secret(), read.url.as_str()), (clear, ""));
        assert!(vault.delete_session(&alice, &one, None).await.unwrap());
    }
}

#[tokio::test]
async fn a_client_is_known_to_one_issuer_and_address() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let mut client = OAuthClient {
        issuer: ISSUER.to_owned(),
        redirect_uri: "https://here.example/callback".to_owned(),
        client_id: "first".to_owned(),
        client_secret: Some(CANARY.into()),
    };
    assert!(vault.oauth_client(ISSUER, &client.redirect_uri).await.unwrap().is_none());
    vault.put_oauth_client(&client).await.unwrap();
    let stored = store.only(Collection::OAuthClients).await.value;
    assert!(!serde_json::to_string(&stored).unwrap().contains(CANARY), "{stored:?}");
    let read = vault.oauth_client(ISSUER, &client.redirect_uri).await.unwrap().unwrap();
    assert_eq!((read.client_id.as_str(), read.client_secret.unwrap().expose_secret()), ("first", CANARY));
    assert!(vault.oauth_client("https://other.example", &client.redirect_uri).await.unwrap().is_none());
    assert!(vault.oauth_client(ISSUER, "https://elsewhere.example").await.unwrap().is_none());

    store
        .tamper_document(Collection::OAuthClients, |document| {
            document.insert("issuer".to_owned(), "https://evil.example".into());
            document.insert(
                "key".to_owned(),
                json!(["https://evil.example", client.redirect_uri]).to_string().into(),
            );
            document.insert("unknown".to_owned(), 7.into());
        })
        .await;
    let error = vault.oauth_client("https://evil.example", &client.redirect_uri).await.unwrap_err();
    assert!(matches!(error, VaultError::Integrity { .. }), "{error:?}");
    // What cannot be read can be replaced.
    (client.issuer, client.client_id, client.client_secret) =
        ("https://evil.example".to_owned(), "second".to_owned(), None);
    vault.put_oauth_client(&client).await.unwrap();
    let read = vault.oauth_client(&client.issuer, &client.redirect_uri).await.unwrap().unwrap();
    assert_eq!((read.client_id.as_str(), read.client_secret.is_none()), ("second", true));
    assert_eq!(store.only(Collection::OAuthClients).await.value["unknown"], 7);
    assert!(vault.delete_oauth_client(&client.issuer, &client.redirect_uri).await.unwrap());
    assert!(!vault.delete_oauth_client(&client.issuer, &client.redirect_uri).await.unwrap());
}

#[tokio::test]
async fn a_login_is_one_users_and_is_used_once() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let mut begun = login("state");
    let first = vault.put_login(&begun, None).await.unwrap();
    begun.code = Some(format!("{CANARY}-code").into());
    begun.answered_by = Some(ISSUER.to_owned());
    let second = vault.put_login(&begun, Some(first)).await.unwrap();
    let read = vault.login(&begun.id).await.unwrap().unwrap();
    assert_eq!((read.revision, whole_login(&read.value)), (second, whole_login(&begun)));
    let stored = store.only(Collection::OAuthLogins).await.value;
    let text = serde_json::to_string(&stored).unwrap();
    assert!(!text.contains(CANARY) && !text.contains("\"state\""), "{text}");

    for (field, value) in
        [("username", "mallory"), ("serverName", "two"), ("browser", "other"), ("code", LEGACY)]
    {
        let tampered = |document: &mut Document| drop(document.insert(field.to_owned(), value.into()));
        let before = store.tamper_document(Collection::OAuthLogins, tampered).await;
        let error = vault.login(&begun.id).await.unwrap_err();
        assert!(matches!(error, VaultError::Integrity { .. }), "{error:?}");
        store.tamper_document(Collection::OAuthLogins, |document| *document = before.value).await;
    }
    let now = vault.login(&begun.id).await.unwrap().unwrap().revision;
    assert!(vault.delete_login(&begun.id, Some(now)).await.unwrap());
    assert!(!vault.delete_login(&begun.id, Some(now)).await.unwrap());
    assert!(vault.login(&begun.id).await.unwrap().is_none());
}

#[tokio::test]
async fn logins_that_nobody_finished_are_removed() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let now = Timestamp::now().millis();
    let time = LOGIN_TIME.as_millis() as i64;
    for (state, begun) in [("old", now - time - 60_000), ("new", now - 60_000), ("odd", now + time + 60_000)]
    {
        let login = Login { begun_at: Timestamp::from_millis(begun), ..login(state) };
        vault.put_login(&login, None).await.unwrap();
    }
    assert_eq!(vault.sweep_logins().await.unwrap(), 2);
    assert_eq!(vault.sweep_logins().await.unwrap(), 0);
    assert!(vault.login(&LoginId::of("new")).await.unwrap().is_some());
}

#[tokio::test]
async fn the_secret_of_a_given_client_is_encrypted_in_every_mode() {
    for legacy in [Some(LegacyMode::Rw), None] {
        let store = TestStore::new();
        let vault = opened(&store, KEY, legacy).await;
        let mut server =
            record("one", json!({"transportType": "streamable_http", "url": "https://x.example/"}));
        let client = GivenClient {
            client_id: "id".to_owned(),
            client_secret: Some(CANARY.to_owned()),
            scopes: vec!["a".to_owned()],
        };
        server.oauth_client = Some(client);
        round_trip(&vault, &server).await;
        let stored = store.sealed("one").await;
        let sealed = stored.value.0.oauth_client.unwrap().client_secret.unwrap();
        assert!(is_sealed(&sealed) || is_legacy(&sealed), "{sealed}");
        assert!(!format!("{server:?}").contains(CANARY));

        let mut clear = store.sealed("one").await;
        clear.value.0.oauth_client.as_mut().unwrap().client_secret = Some("clear".to_owned());
        store.store.replace_server(&clear.value, clear.revision).await.unwrap();
        let error = vault.server(&server.name).await.unwrap_err();
        assert!(matches!(error, VaultError::Integrity { .. }), "{error:?}");
    }
}
