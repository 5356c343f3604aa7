//! A database that mcp-api wrote.

use mongodb::bson::{Bson, DateTime, oid::ObjectId};

use super::*;
use crate::{
    server::{Scaling, Transport},
    testing::store_contract::{secret, server},
    timestamp::Timestamp,
    vault::{KeySource, Vault},
};

const CREATED: i64 = 1_795_366_109_287;

/// As mcp-api 1.11 stores a server.
fn written_by_mcp_api(name: &str) -> Document {
    doc! {
        "_id": ObjectId::parse_str("6b031cdd6c5c3ee8dbcb20dd").unwrap(),
        "name": name, "displayName": name, "description": "", "source": "platform", "authMode": "none",
        "secretFields": [], "homepageUrl": Bson::Null, "createdBy": Bson::Null,
        "createdAt": DateTime::from_millis(CREATED), "updatedAt": DateTime::from_millis(CREATED),
        "transportType": "stdio", "command": "node", "args": ["server.js", ""],
        "env": { "KEY.with.dots": "clear" }, "secretName": "TOKEN", "status": "connected", "enabled": true,
        "startupTimeout": 180_000.0,
        // What JSON does not have.
        "lastSeen": DateTime::from_millis(5), "owner": ObjectId::from_bytes([7; 12]),
        "blob": Bson::Binary(mongodb::bson::Binary {
            subtype: mongodb::bson::spec::BinarySubtype::Generic, bytes: vec![1, 2],
        }),
        "limits": { "big": 5_000_000_000_i64, "half": 0.5 },
    }
}

fn name(name: &str) -> ServerName {
    ServerName::from_stored(name)
}

fn user(name: &str) -> UserId {
    UserId::from_stored(name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_are_picked_up_and_keep_what_nobody_knows() {
    let (settings, own) = fresh().await;
    let mcp = own.0.collection::<Document>("mcp");
    mcp.insert_one(written_by_mcp_api("Echo")).await.unwrap();
    let store = MongoStore::connect(settings).await.unwrap();
    let read = store.server(&name("Echo")).await.unwrap().unwrap();
    let record = &read.value.0;
    assert_eq!(record.id, "6b031cdd6c5c3ee8dbcb20dd");
    assert_eq!(record.created_at, Timestamp::from_millis(CREATED));
    assert_eq!(record.startup_timeout, Some(180_000));
    assert_eq!(record.scaling, Scaling::Singleton);
    assert_eq!(record.secret_names, Some(vec![SecretName::from_stored("TOKEN")]));
    let Transport::Stdio { env, .. } = &record.transport else { panic!("{record:?}") };
    assert_eq!(env.0["KEY.with.dots"], "clear");
    assert_eq!(store.servers().await.unwrap(), std::slice::from_ref(&read));
    // Its name is taken, in any case.
    for taken in ["Echo", "eCHO"] {
        match store.insert_server(&server(taken)).await {
            Err(StoreError::AlreadyExists { existing }) => assert_eq!(existing, "Echo"),
            other => panic!("{other:?}"),
        }
    }

    let mut changed = read.value.clone();
    changed.0.description = "changed".to_owned();
    let second = store.replace_server(&changed, read.revision).await.unwrap();
    let stale = store.replace_server(&read.value, read.revision).await;
    assert!(matches!(stale, Err(StoreError::Conflict)), "{stale:?}");
    let again = store.server(&name("Echo")).await.unwrap().unwrap();
    assert_eq!(again, Versioned { revision: second, value: changed });

    let stored = mcp.find_one(doc! {}).await.unwrap().unwrap();
    for (field, value) in written_by_mcp_api("Echo") {
        match field.as_str() {
            "description" => assert_eq!(stored.get_str("description").unwrap(), "changed"),
            "secretName" => assert_eq!(stored.get_array("secretNames").unwrap(), &["TOKEN".into()]),
            // It is a whole number now, as far as MongoDB tells them apart.
            "startupTimeout" => assert_eq!(documents::whole(&stored["startupTimeout"]), Some(180_000)),
            field => assert_eq!(stored.get(field), Some(&value), "{field}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_by_mcp_api_is_noticed() {
    let (settings, own) = fresh().await;
    let mcp = own.0.collection::<Document>("mcp");
    mcp.insert_one(written_by_mcp_api("echo")).await.unwrap();
    let store = MongoStore::connect(settings).await.unwrap();
    let read = store.server(&name("echo")).await.unwrap().unwrap();
    assert_eq!(store.server(&name("echo")).await.unwrap().unwrap().revision, read.revision);
    mcp.update_one(doc! {}, doc! { "$set": { "enabled": false } }).await.unwrap();
    let outcome = store.replace_server(&read.value, read.revision).await;
    assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
    let now = store.server(&name("echo")).await.unwrap().unwrap();
    assert!(!now.value.0.enabled && now.revision != read.revision);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_oldest_documents_are_understood_and_damaged_ones_hide_no_other() {
    let (settings, own) = fresh().await;
    let mcp = own.0.collection::<Document>("mcp");
    let id = ObjectId::parse_str("6b031cdd6c5c3ee8dbcb20dd").unwrap();
    let old = doc! { "_id": id, "name": "old", "command": "npx", "args": [], "env": {}, "status": "error" };
    let damaged = doc! { "name": "damaged", "command": 7 };
    let nameless = doc! { "command": "x" };
    let odd = doc! { "name": "odd", "command": "x", "_revision": "one" };
    let twin = doc! { "name": "old", "command": "other" };
    mcp.insert_many([old, damaged, nameless, odd, twin]).await.unwrap();
    let store = MongoStore::connect(settings).await.unwrap();
    let servers = store.servers().await.unwrap();
    assert_eq!(servers.len(), 1);
    let record = &servers[0].value.0;
    assert_eq!(record.created_at.millis(), id.timestamp().timestamp_millis());
    assert!(matches!(&record.transport, Transport::Stdio { command, .. } if command == "npx"));
    assert_eq!(store.server(&name("old")).await.unwrap().as_ref(), Some(&servers[0]));
    for bad in ["damaged", "odd"] {
        match store.server(&name(bad)).await {
            Err(StoreError::Corrupt { what }) => assert_eq!(what, format!("server {bad}")),
            other => panic!("{other:?}"),
        }
        // It can be deleted.
        assert!(store.delete_server(&name(bad)).await.unwrap());
    }
    assert!(store.delete_server(&name("old")).await.unwrap());
    assert!(store.server(&name("old")).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_picked_up_in_both_formats() {
    // The key of a database that was never told one, and what it encrypts with it.
    const OLD: &str =
        "000102030405060708090a0b:3bd44ac43a96878a74f26e0391a6fb13:cebed4d40cbb04ecb1381bcb69372053";
    let (mut settings, own) = fresh().await;
    settings.secrets = "userSecrets".to_owned();
    own.0.collection::<Document>("mcp").insert_one(written_by_mcp_api("git.hub")).await.unwrap();
    let rows = own.0.collection::<Document>("userSecrets");
    rows.insert_many([
        doc! { "username": "alice", "key": "git.hub.TOKEN", "value": OLD },
        doc! { "username": "alice", "key": "git.hub.", "value": "no name" },
        doc! { "username": "alice", "key": "UNPREFIXED", "value": "of no server" },
        doc! { "username": "alice", "server": "git.hub", "key": "git.hub.OLDEST", "value": "of the first version" },
        doc! { "username": "bob", "key": "git.hub.TOKEN", "value": 7 },
        doc! { "username": "carol", "key": "git.hub.HUGE", "value": "x".repeat(1_000_000) },
    ])
    .await
    .unwrap();
    let store = MongoStore::connect(settings).await.unwrap();
    let hub = name("git.hub");
    let token = SecretName::from_stored("TOKEN");
    // With the variable in clear.
    assert_eq!(store.legacy_secrets().await.unwrap(), 2);
    assert_eq!(store.users_with_secrets(&hub).await.unwrap(), 3);

    let vault = Vault::open(Arc::clone(&store) as Arc<dyn Store>, KeySource::Text("secret".into()), None);
    let vault = vault.await.unwrap();
    let read = vault.sealed_secrets(&user("alice"), &hub).await.unwrap();
    assert_eq!(read, [secret(&user("alice"), &hub, "TOKEN", OLD)]);
    assert_eq!(vault.open_secret(&read[0]).unwrap().expose_secret(), "ghp_exampleToken");
    // What cannot be read is an error where it is needed, and nothing else.
    for (who, what) in [("bob", "TOKEN"), ("carol", "HUGE")] {
        let read = vault.sealed_secrets(&user(who), &hub).await.unwrap();
        assert_eq!(read, [secret(&user(who), &hub, what, "")]);
        assert!(vault.open_secret(&read[0]).is_err());
    }

    // mcp-api finds by user and key what is written here, and the other way round.
    vault.put_secret(&user("alice"), &hub, &token, &"new".into()).await.unwrap();
    let alice = doc! { "username": "alice", "key": "git.hub.TOKEN" };
    assert_eq!(rows.count_documents(alice.clone()).await.unwrap(), 1);
    rows.update_one(alice, doc! { "$set": { "username": "alice", "key": "git.hub.TOKEN", "value": OLD } })
        .await
        .unwrap();
    let read = vault.sealed_secrets(&user("alice"), &hub).await.unwrap();
    assert_eq!(vault.open_secret(&read[0]).unwrap().expose_secret(), "ghp_exampleToken");
    assert!(store.delete_secret(&user("bob"), &hub, &token).await.unwrap());
    assert_eq!(store.users_with_secrets(&hub).await.unwrap(), 2);
    // With the server goes what is its own, and nothing else.
    assert!(store.delete_server(&hub).await.unwrap());
    let left = rows.distinct("key", doc! {}).await.unwrap();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_belongs_to_the_longest_name() {
    let (settings, own) = fresh().await;
    let store = MongoStore::connect(settings).await.unwrap();
    for name in ["a", "a.b"] {
        store.insert_server(&server(name)).await.unwrap();
    }
    let rows = own.0.collection::<Document>("secrets");
    for key in ["a.K", "a.b.c", "a.x.y", "a.b.c.d", "ab.c"] {
        rows.insert_one(doc! { "username": "u", "key": key, "value": key }).await.unwrap();
    }
    let listed = async |name: &str| -> Vec<String> {
        let secrets = store.secrets(&user("u"), &ServerName::from_stored(name)).await.unwrap();
        secrets.iter().map(|secret| secret.secret_name.to_string()).collect()
    };
    assert_eq!(listed("a").await, ["K", "x.y"]);
    assert_eq!(listed("a.b").await, ["c", "c.d"]);
    // The shorter server cannot take what is the longer one's.
    let taken = store.put_secret(&secret(&user("u"), &name("a"), "b.c", "mine")).await;
    assert!(matches!(taken, Err(StoreError::AlreadyExists { .. })), "{taken:?}");
    assert!(!store.delete_secret(&user("u"), &name("a"), &SecretName::from_stored("b.c")).await.unwrap());
    assert!(store.delete_server(&name("a")).await.unwrap());
    assert_eq!(listed("a.b").await, ["c", "c.d"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_secrets_stored_twice_the_newest_stays() {
    let (settings, own) = fresh().await;
    own.0.collection::<Document>("mcp").insert_one(written_by_mcp_api("echo")).await.unwrap();
    let rows = own.0.collection::<Document>("secrets");
    for value in ["first", "second", "third"] {
        for who in ["u", "v"] {
            rows.insert_one(doc! { "username": who, "key": "echo.K", "value": value }).await.unwrap();
        }
    }
    rows.insert_one(doc! { "username": "u", "key": "echo.L", "value": "only" }).await.unwrap();
    let store = MongoStore::connect(settings).await.unwrap();
    assert_eq!(rows.count_documents(doc! {}).await.unwrap(), 3);
    let values: Vec<_> = store.secrets(&user("u"), &name("echo")).await.unwrap();
    assert_eq!(values.iter().map(|secret| secret.value.as_str()).collect::<Vec<_>>(), ["third", "only"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crash_left_of_a_deleted_server_is_not_inherited() {
    let (settings, own) = fresh().await;
    let store = MongoStore::connect(settings).await.unwrap();
    let (rows, mcp) = (own.0.collection::<Document>("secrets"), own.0.collection::<Document>("mcp"));
    for left in ["by us", "by mcp-api"] {
        store.insert_server(&server("echo")).await.unwrap();
        store.put_secret(&secret(&user("u"), &name("echo"), "K", "old")).await.unwrap();
        if left == "by mcp-api" {
            rows.insert_one(doc! { "username": "v", "key": "echo.K", "value": "old" }).await.unwrap();
        }
        mcp.delete_many(doc! {}).await.unwrap();
        store.insert_server(&server("echo")).await.unwrap();
        for who in ["u", "v"] {
            assert_eq!(store.secrets(&user(who), &name("echo")).await.unwrap(), [], "{left}");
        }
        assert_eq!(rows.count_documents(doc! {}).await.unwrap(), 0);
        assert!(store.delete_server(&name("echo")).await.unwrap());
    }
    // A row that appears after all, as that of a call that was cut short, is nobody's.
    store.insert_server(&server("echo")).await.unwrap();
    store.insert_server(&server("echo.x")).await.unwrap();
    let ghost = doc! {
        "username": "u", "key": "echo.x.K", "value": "old",
        "serverName": "echo", "secretName": "x.K", "_incarnation": 5_i64,
    };
    rows.insert_one(ghost).await.unwrap();
    assert_eq!(store.secrets(&user("u"), &name("echo")).await.unwrap(), []);
    assert_eq!(store.users_with_secrets(&name("echo")).await.unwrap(), 0);
    assert!(!store.delete_secret(&user("u"), &name("echo.x"), &SecretName::from_stored("K")).await.unwrap());
    store.put_secret(&secret(&user("u"), &name("echo.x"), "K", "new")).await.unwrap();
    assert_eq!(store.secrets(&user("u"), &name("echo.x")).await.unwrap().len(), 1);
}

/// As mcp-api stores a user's tokens.
fn tokens_of_mcp_api(user: &str, access: &str) -> Document {
    doc! {
        "serverName": "echo", "username": user, "tokenType": "Bearer", "accessToken": access,
        "refreshToken": Bson::Null, "expiresAt": DateTime::from_millis(CREATED), "scopes": ["a", "b"],
        "clientId": "client", "clientSecret": Bson::Null, "codeVerifier": Bson::Null, "redirectUri": "https://x/",
        "createdAt": DateTime::from_millis(CREATED), "updatedAt": DateTime::from_millis(CREATED),
        "owner": ObjectId::from_bytes([7; 12]),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_tokens_and_clients_get_the_key_that_theirs_lack() {
    // `ghp_exampleToken` and nothing at all, with the key of a database that was never told one.
    const OLD: &str =
        "000102030405060708090a0b:3bd44ac43a96878a74f26e0391a6fb13:cebed4d40cbb04ecb1381bcb69372053";
    const NONE: &str = "000102030405060708090a0b:7300369bafc4766dbf0d4acd645e32dd:";
    let (settings, own) = fresh().await;
    own.0.collection::<Document>("mcp").insert_one(written_by_mcp_api("echo")).await.unwrap();
    let secret = doc! { "username": "alice", "key": "echo.TOKEN", "value": OLD };
    own.0.collection::<Document>("secrets").insert_one(secret).await.unwrap();
    let tokens = own.0.collection::<Document>("mcpOAuthTokens");
    let mut newest = tokens_of_mcp_api("bob", OLD);
    newest.insert("updatedAt", DateTime::from_millis(CREATED + 1));
    tokens
        .insert_many([
            tokens_of_mcp_api("alice", OLD),
            // Of two the one that was written last stays, else the one that was added last.
            newest,
            tokens_of_mcp_api("bob", NONE),
            tokens_of_mcp_api("carol", NONE),
            tokens_of_mcp_api("carol", OLD),
            doc! { "serverName": "echo", "accessToken": OLD },
        ])
        .await
        .unwrap();
    let session = doc! { "serverName": "echo", "username": "alice", "sessionId": OLD };
    own.0.collection::<Document>("mcpUserSessions").insert_one(session).await.unwrap();
    let client =
        doc! { "issuer": "https://i", "redirectUri": "https://x/", "clientId": "c", "clientSecret": OLD };
    own.0.collection::<Document>("mcpDcrClients").insert_one(client).await.unwrap();

    let store = MongoStore::connect(settings.clone()).await.unwrap();
    let open = async |store: &Arc<MongoStore>| {
        let store = Arc::clone(store) as Arc<dyn Store>;
        Vault::open(store, KeySource::Text("secret".into()), None).await.unwrap()
    };
    let vault = open(&store).await;
    let (alice, echo) = (user("alice"), name("echo"));
    for who in ["alice", "bob", "carol"] {
        let read = vault.oauth_tokens(&user(who), &echo).await.unwrap().unwrap().value;
        assert_eq!(read.access_token.expose_secret(), "ghp_exampleToken", "{who}");
        assert_eq!((read.scopes.join(" ").as_str(), read.expires_at.unwrap().millis()), ("a b", CREATED));
    }
    let read = vault.session(&alice, &echo).await.unwrap().unwrap();
    assert_eq!(read.value.id.expose_secret(), "ghp_exampleToken");
    assert_eq!(vault.sessions_of(&echo).await.unwrap().len(), 1);
    let read = vault.oauth_client("https://i", "https://x/").await.unwrap().unwrap();
    assert_eq!(read.client_secret.unwrap().expose_secret(), "ghp_exampleToken");
    // What says not whose it is stays where it is.
    assert_eq!(tokens.count_documents(doc! {}).await.unwrap(), 4);

    // mcp-api finds what is written here, with its types.
    let mut read = vault.oauth_tokens(&alice, &echo).await.unwrap().unwrap();
    read.value.expires_at = Some(Timestamp::from_millis(CREATED + 5));
    vault.put_oauth_tokens(&read.value, Some(read.revision)).await.unwrap();
    let of_alice = doc! { "serverName": "echo", "username": "alice" };
    let stored = tokens.find_one(of_alice.clone()).await.unwrap().unwrap();
    assert_eq!(stored["expiresAt"], DateTime::from_millis(CREATED + 5).into());
    assert_eq!(stored["createdAt"], DateTime::from_millis(CREATED).into());
    assert_eq!(
        (&stored["owner"], &stored["clientSecret"]),
        (&ObjectId::from_bytes([7; 12]).into(), &Bson::Null)
    );
    let by_mcp_api =
        doc! { "$set": { "accessToken": NONE, "expiresAt": DateTime::from_millis(CREATED + 9) } };
    tokens.update_one(of_alice, by_mcp_api).await.unwrap();
    let read = vault.oauth_tokens(&alice, &echo).await.unwrap().unwrap().value;
    assert_eq!(read.expires_at.unwrap().millis(), CREATED + 9);

    // What it adds while we run is picked up at the next start.
    let mut late = tokens_of_mcp_api("alice", NONE);
    late.insert("updatedAt", DateTime::from_millis(CREATED + 1_000_000_000_000));
    late.insert("clientId", "late");
    tokens.insert_many([late, tokens_of_mcp_api("dave", OLD)]).await.unwrap();
    let vault = open(&MongoStore::connect(settings).await.unwrap()).await;
    let read = vault.oauth_tokens(&alice, &echo).await.unwrap().unwrap().value;
    assert_eq!(read.client_id.as_deref(), Some("late"));
    assert_eq!(vault.users_with_tokens(&echo).await.unwrap(), 4);
    assert!(store.delete_server(&echo).await.unwrap());
    assert_eq!(tokens.count_documents(doc! {}).await.unwrap(), 0);
    assert!(vault.sessions_of(&echo).await.unwrap().is_empty());
}
