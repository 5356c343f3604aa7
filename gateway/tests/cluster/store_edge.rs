//! The store as something that others may reach: logins, TLS, and rows that somebody has changed.

use std::{net::SocketAddr, process::Stdio, sync::Arc};

use mcp_shared::testing::services::MongoServer;
use mongodb::bson::{Document, doc};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::deployment::{Builder, Data, Deployment, tls_file};

/// A start that must be refused for good; returns what it complained of.
async fn refused(builder: Builder) -> String {
    let mut command = builder.command();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(78), "{said}");
    said
}

async fn is_used(api: &Deployment) {
    api.add_fixture("echo", &[], json!({})).await;
    api.set_secret("alice", "echo", "K", "hers").await.ok();
    assert_eq!(api.call_as("alice", "echo", "args", json!({})).await.tool_text(), r#"{"K":"hers"}"#);
}

#[tokio::test]
async fn a_store_asks_for_a_login_and_gets_it() {
    let password = "p@ss/w:rd%";
    let server = tokio::task::spawn_blocking(move || MongoServer::guarded("mcp", password)).await.unwrap();
    let address = server.address().to_string();
    let with = |user: &str, password: &str| {
        let builder = Deployment::builder().alone().env("MONGODB_URI", "");
        builder.env("MONGO_HOST", &address).env("MONGO_USER", user).env("MONGO_PASS", password)
    };
    let api = with("mcp", password).start().await;
    is_used(&api).await;
    assert!(!api.log().contains(password), "the password is in the log");
    assert!(api.stop().await.success());
    // In a URI the same, with what has a meaning there written otherwise.
    let uri = format!("mongodb://mcp:p%40ss%2Fw%3Ard%25@{address}/?directConnection=true&authSource=admin");
    let api = Deployment::builder().alone().env("MONGODB_URI", uri).start().await;
    is_used(&api).await;
    drop(api);
    for builder in [
        with("mcp", "wrong-canary"),
        with("nobody", password),
        Deployment::builder()
            .alone()
            .env("MONGODB_URI", format!("mongodb://{address}/?directConnection=true")),
    ] {
        let said = refused(builder).await;
        assert!(said.contains("refuses the login"), "{said}");
        assert!(!said.contains("wrong-canary") && !said.contains(password), "{said}");
    }
}

/// Speaks TLS in front of a server, with one of the tests' certificates. Returned is its port.
async fn in_front_of(server: SocketAddr, certificate: &str) -> u16 {
    mcp_shared::tls::install_provider();
    let certificate = CertificateDer::from_pem_file(tls_file(certificate)).unwrap();
    let key = PrivateKeyDer::from_pem_file(tls_file("localhost.key")).unwrap();
    let config =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(mut client) = acceptor.accept(client).await {
                    let mut server = TcpStream::connect(server).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn a_store_behind_tls_is_the_one_that_was_meant() {
    let server = tokio::task::spawn_blocking(MongoServer::forgetful).await.unwrap();
    let authority = tls_file("authority.pem").display().to_string();
    let uri = |port: u16, ca: &str| {
        format!("mongodb://localhost:{port}/?directConnection=true&tls=true&tlsCAFile={ca}")
    };
    let with = |uri: String| Deployment::builder().alone().env("MONGODB_URI", uri);
    let port = in_front_of(server.address(), "localhost.pem").await;
    let api = with(uri(port, &authority)).start().await;
    is_used(&api).await;
    drop(api);
    // Another authority, and certificates that have ended or are of another name.
    let other = tls_file("renewed.pem").display().to_string();
    let expired = in_front_of(server.address(), "expired.pem").await;
    let elsewhere = in_front_of(server.address(), "elsewhere.pem").await;
    for uri in
        [uri(port, &other), uri(expired, &authority), uri(elsewhere, &authority), uri(port, "/no/such/file")]
    {
        let said = refused(with(uri.clone())).await;
        assert!(said.contains("MongoDB at localhost"), "{uri}: {said}");
    }
}

/// Whoever can write to the database cannot have a secret sent somewhere else, or as somebody else's.
#[tokio::test]
async fn rows_that_were_moved_or_cut_fail_closed() {
    let data = Data::new();
    let api = Deployment::builder().data(&data).env("LEGACY_SECRETS", "off").start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    api.add_fixture("other", &["--more"], json!({})).await;
    api.add_fixture("variables", &[], json!({"env": {"ONE": "first value", "TWO": "second value"}})).await;
    let victims = ["alice", "bob", "cut", "flipped", "emptied", "cleared", "downgraded", "renamed"];
    for user in victims.into_iter().chain(["carol"]) {
        api.set_secret(user, "echo", "K", &format!("key-of-{user}")).await.ok();
    }
    api.set_secret("dave", "other", "K", "daves key").await.ok();
    assert!(api.stop().await.success());

    let client = mongodb::Client::with_uri_str(data.mongo()).await.unwrap();
    let database = client.database(data.name());
    let secrets = database.collection::<Document>("secrets");
    let value = async |user: &str| -> String {
        let row = secrets.find_one(doc! { "username": user }).await.unwrap().unwrap();
        row.get_str("value").unwrap().to_owned()
    };
    let put = async |user: &str, field: &str, value: &str| {
        let changed = secrets.update_one(doc! { "username": user }, doc! { "$set": { field: value } });
        assert_eq!(changed.await.unwrap().modified_count, 1, "{user}");
    };
    let (of_alice, of_bob) = (value("alice").await, value("bob").await);
    put("alice", "value", &of_bob).await;
    put("bob", "value", &of_alice).await;
    let cut = value("cut").await;
    put("cut", "value", &cut[..cut.len() - 6]).await;
    let flipped = value("flipped").await;
    let at = flipped.len() - 30;
    let other = if flipped.as_bytes()[at] == b'A' { "B" } else { "A" };
    put("flipped", "value", &format!("{}{other}{}", &flipped[..at], &flipped[at + 1..])).await;
    put("emptied", "value", "").await;
    put("cleared", "value", "in clear").await;
    // What mcp-api wrote is bound to no place, so it would be worth something to whoever has one.
    let legacy = "000102030405060708090a0b:3bd44ac43a96878a74f26e0391a6fb13:cebed4d40cbb04ecb1381bcb69372053";
    put("downgraded", "value", legacy).await;
    // A secret is not sent to another server, or under another name, by changing what stands beside it.
    for (user, fields) in [
        ("dave", doc! { "serverName": "echo", "key": "echo.K" }),
        ("renamed", doc! { "secretName": "OTHER", "key": "echo.OTHER" }),
    ] {
        let servers = database.collection::<Document>("mcp");
        let echo = servers.find_one(doc! { "name": "echo" }).await.unwrap().unwrap();
        let mut fields = fields;
        fields.insert("_incarnation", echo.get("_incarnation").unwrap().clone());
        let changed = secrets.update_one(doc! { "username": user }, doc! { "$set": fields }).await.unwrap();
        assert_eq!(changed.modified_count, 1, "{user}");
    }
    let servers = database.collection::<Document>("mcp");
    let record = servers.find_one(doc! { "name": "variables" }).await.unwrap().unwrap();
    let env = record.get_document("env").unwrap();
    let swapped = doc! { "ONE": env.get("TWO").cloned(), "TWO": env.get("ONE").cloned() };
    servers.update_one(doc! { "name": "variables" }, doc! { "$set": { "env": swapped } }).await.unwrap();

    let api = Deployment::builder().data(&data).env("LEGACY_SECRETS", "off").start().await;
    for user in victims.into_iter().chain(["dave"]) {
        let refused = api.call_as(user, "echo", "count", json!({})).await.fails(500, "secret_integrity");
        assert_eq!(refused.json()["outcome"], "not_started", "{user}");
        assert_eq!(refused.json()["retryable"], false, "{user}");
    }
    // Only the calls that need such a value fail, and none of them reached the server.
    assert_eq!(api.call_as("carol", "echo", "count", json!({})).await.tool_text(), "1");
    assert_eq!(api.call_as("carol", "echo", "args", json!({})).await.tool_text(), r#"{"K":"key-of-carol"}"#);
    api.get("/mcp/servers/variables").await.fails(500, "secret_integrity");
    let log = api.log();
    assert!(!log.contains("key-of-") && !log.contains("daves key") && !log.contains("first value"), "{log}");
    // Setting the secret again mends it.
    api.set_secret("alice", "echo", "K", "mended").await.ok();
    assert_eq!(api.call_as("alice", "echo", "args", json!({})).await.tool_text(), r#"{"K":"mended"}"#);
}
