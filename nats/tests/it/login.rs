//! How a node logs in, and which NATS it does not use.

use mcp_nats::{
    bus::Bus,
    connect::{OpenError, check},
};
use mcp_shared::{
    config::{BusLogin, BusServer, BusSettings, BusTls},
    ids::WorkerId,
    testing::services::NatsServer,
};
use nkeys::KeyPair;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
};

use crate::client::{guarded, guarded_tls, seed, tls_file};

/// Settings for a server. An open one is not allowed.
pub fn settings(server: &NatsServer, login: BusLogin) -> BusSettings {
    let address = server.address();
    BusSettings {
        servers: vec![BusServer { tls: false, host: address.ip().to_string(), port: address.port() }],
        login,
        tls: BusTls::default(),
        prefix: "mcp".to_owned(),
        open_allowed: false,
    }
}

/// A login with the seed of a key.
pub fn key(seed: &str) -> BusLogin {
    BusLogin::NKey(seed.into())
}

/// A login with a password.
fn user(name: &str, password: &str) -> BusLogin {
    BusLogin::Password { user: name.to_owned(), password: password.into() }
}

async fn open(settings: &BusSettings) -> Result<Bus, OpenError> {
    Bus::open(settings, WorkerId::generate()).await
}

fn unfit(opened: Result<Bus, OpenError>) -> String {
    match opened {
        Err(OpenError::Unfit(why)) => why,
        Err(OpenError::Unreachable(why)) => panic!("unreachable: {why}"),
        Ok(_) => panic!("it was let in"),
    }
}

#[tokio::test]
async fn a_wrong_login_is_no_reason_to_try_again() {
    // Who keeps to passwords has them in the place of keys.
    let with_password = r#"{
        user: gateway-2, password: gateway-password
        permissions { publish: ["mcp.v1.inbox.>"], subscribe: ["mcp.v1.inbox.>"] }
    }"#;
    let server = guarded(with_password);
    for login in [key(&seed("gateway")), user("gateway-2", "gateway-password")] {
        let bus = open(&settings(&server, login)).await.unwrap();
        assert!(bus.settle(crate::client::LONG).await, "it hears itself");
    }

    let stranger = KeyPair::new_user().seed().unwrap();
    for login in [user("gateway-2", "worker-password"), user("gateway", "gateway-password"), key(&stranger)] {
        let why = unfit(open(&settings(&server, login)).await);
        assert!(why.contains("authorization"), "{why}");
        assert!(!why.contains("worker-password") && !why.contains(&stranger), "{why}");
    }
    unfit(open(&settings(&server, BusLogin::None)).await);
    unfit(open(&settings(&server, BusLogin::Token("gateway-password".into()))).await);
    unfit(open(&settings(&server, key("SUANOSEED"))).await);
}

/// Settings that ask for TLS, with these files of the tests' authority.
fn over_tls(server: &NatsServer, authority: &str, identity: Option<&str>) -> BusSettings {
    let identity = identity.map(|name| (tls_file(&format!("{name}.pem")), tls_file(&format!("{name}.key"))));
    let tls = BusTls { required: true, ca: Some(tls_file(authority)), identity };
    BusSettings { tls, ..settings(server, key(&seed("gateway"))) }
}

#[tokio::test]
async fn nobody_listens_on_the_way() {
    let server = guarded_tls("server.pem", false);
    let bus = open(&over_tls(&server, "authority.pem", None)).await.unwrap();
    assert!(bus.settle(crate::client::LONG).await);
    // Somebody in the middle has another authority's word, or an old or somebody else's certificate.
    unfit(open(&over_tls(&server, "other.pem", None)).await);
    for certificate in ["expired.pem", "elsewhere.pem"] {
        let impostor = guarded_tls(certificate, false);
        unfit(open(&over_tls(&impostor, "authority.pem", None)).await);
    }
    // In clear, where TLS was asked for, nothing is said.
    let plain = guarded("");
    unfit(open(&over_tls(&plain, "authority.pem", None)).await);
}

#[tokio::test]
async fn nodes_may_have_to_have_certificates() {
    let server = guarded_tls("server.pem", true);
    let bus = open(&over_tls(&server, "authority.pem", Some("node"))).await.unwrap();
    assert!(bus.settle(crate::client::LONG).await);
    // The key of the login alone is not enough, and neither is a certificate that anybody can make.
    for identity in [None, Some("stranger")] {
        assert!(open(&over_tls(&server, "authority.pem", identity)).await.is_err(), "{identity:?}");
    }
    // Nor is the certificate without a key of the file.
    let mut settings = over_tls(&server, "authority.pem", Some("node"));
    settings.login = BusLogin::None;
    unfit(open(&settings).await);
}

/// A server that says it is of another version, and nothing else.
async fn pretending(version: &str) -> BusSettings {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let greeting = format!(
        "INFO {{\"server_id\":\"x\",\"version\":\"{version}\",\"max_payload\":1048576,\"headers\":true,\
         \"auth_required\":true,\"proto\":1}}\r\n"
    );
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            client.write_all(greeting.as_bytes()).await.unwrap();
            let mut lines = BufReader::new(client).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if line == "PING" {
                    let _ = lines.get_mut().write_all(b"PONG\r\n").await;
                }
            }
        }
    });
    BusSettings {
        servers: vec![BusServer { tls: false, host: "127.0.0.1".to_owned(), port }],
        login: BusLogin::None,
        tls: BusTls::default(),
        prefix: "mcp".to_owned(),
        open_allowed: false,
    }
}

#[tokio::test]
async fn versions_with_known_holes_are_told() {
    for version in ["2.12.6", "2.12.10", "2.15.1", "3.0.0"] {
        let (said, _) = check(&pretending(version).await).await.unwrap();
        assert!(said.contains(version), "{said}");
    }
    for version in ["2.12.5", "2.11.20", "2.10.0", "2.12.6-RC.1"] {
        let settings = pretending(version).await;
        let Err(OpenError::Unfit(why)) = check(&settings).await else { panic!("{version} is well") };
        assert!(why.contains(version) && why.contains("2.12.6"), "{why}");
        // A fleet that has one is not stopped by it.
        open(&settings).await.unwrap();
    }
    for version in ["2.9.25", "1.4.1", ""] {
        let why = unfit(open(&pretending(version).await).await);
        assert!(why.contains("older than 2.10"), "{why}");
    }
}

#[tokio::test]
async fn a_key_is_a_login() {
    let pair = KeyPair::new_user();
    let user = format!(
        r#"{{ nkey: {}, permissions: {{ publish: ["mcp.v1.inbox.>"], subscribe: ["mcp.v1.inbox.>"] }} }}"#,
        pair.public_key()
    );
    let server = guarded(&user);
    let seed = pair.seed().unwrap();
    // Files have a line end.
    for seed in [seed.clone(), format!("{seed}\n")] {
        let bus = open(&settings(&server, BusLogin::NKey(seed.into()))).await.unwrap();
        assert!(bus.settle(crate::client::LONG).await);
    }
    unfit(open(&settings(&server, BusLogin::NKey(KeyPair::new_user().seed().unwrap().into()))).await);
}

#[tokio::test]
async fn a_server_that_lets_everybody_in_is_used_only_where_that_is_allowed() {
    let server = NatsServer::start("");
    let mut settings = settings(&server, BusLogin::None);
    let why = unfit(open(&settings).await);
    assert!(why.contains("asks nobody for a login"), "{why}");
    // A login that nobody checks changes nothing.
    settings.login = user("gateway", "any");
    unfit(open(&settings).await);
    settings.open_allowed = true;
    open(&settings).await.unwrap();
    settings.login = BusLogin::None;
    open(&settings).await.unwrap();
}

#[tokio::test]
async fn who_does_not_answer_may_answer_later() {
    let mut server = guarded("");
    let settings = settings(&server, key(&seed("gateway")));
    server.kill();
    assert!(matches!(open(&settings).await, Err(OpenError::Unreachable(_))));
    server.restart();
    open(&settings).await.unwrap();
}
