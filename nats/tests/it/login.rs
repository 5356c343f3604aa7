//! How a node logs in, and which NATS it does not use.

use mcp_nats::{bus::Bus, connect::OpenError};
use mcp_shared::{
    config::{BusLogin, BusServer, BusSettings, BusTls},
    ids::WorkerId,
    testing::services::NatsServer,
};
use nkeys::KeyPair;

use crate::client::{guarded, password};

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

/// A user's login with a password.
pub fn user(name: &str, password: String) -> BusLogin {
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
async fn a_wrong_password_is_no_reason_to_try_again() {
    let server = guarded("");
    let bus = open(&settings(&server, user("gateway", password("gateway")))).await.unwrap();
    assert!(bus.settle(crate::client::LONG).await, "it hears itself");

    let why = unfit(open(&settings(&server, user("gateway", password("worker")))).await);
    assert!(why.contains("authorization"), "{why}");
    assert!(!why.contains("worker-password"), "{why}");
    unfit(open(&settings(&server, BusLogin::None)).await);
    unfit(open(&settings(&server, BusLogin::Token("gateway-password".into()))).await);
    unfit(open(&settings(&server, BusLogin::NKey(KeyPair::new_user().seed().unwrap().into()))).await);
}

#[tokio::test]
async fn a_key_is_a_login() {
    let key = KeyPair::new_user();
    let user = format!(
        r#"{{ nkey: {}, permissions: {{ publish: ["mcp.v1.inbox.>"], subscribe: ["mcp.v1.inbox.>"] }} }}"#,
        key.public_key()
    );
    let server = guarded(&user);
    let seed = key.seed().unwrap();
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
    settings.login = user("gateway", "any".to_owned());
    unfit(open(&settings).await);
    settings.open_allowed = true;
    open(&settings).await.unwrap();
    settings.login = BusLogin::None;
    open(&settings).await.unwrap();
}

#[tokio::test]
async fn who_does_not_answer_may_answer_later() {
    let mut server = guarded("");
    let settings = settings(&server, user("gateway", password("gateway")));
    server.kill();
    assert!(matches!(open(&settings).await, Err(OpenError::Unreachable(_))));
    server.restart();
    open(&settings).await.unwrap();
}
