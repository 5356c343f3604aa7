//! NATS as the repository's own configuration sets it up, and plain clients that try what they may.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, Message, ServerError, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use mcp_shared::testing::services::NatsServer;
use nkeys::KeyPair;
use tokio::{sync::mpsc, time::timeout};

/// The configuration that operators copy.
const CONFIGURATION: &str = include_str!("../../nats-server.conf");
/// How long a test waits for what has to come. It only matters when it does not come.
pub const LONG: Duration = Duration::from_secs(20);

/// Users of the configuration, each with the variable that has the public key.
const USERS: [(&str, &str); 4] = [
    ("gateway", "MCP_GATEWAY_NKEY"),
    ("worker", "MCP_WORKER_NKEY"),
    ("operator", "MCP_OPERATOR_NKEY"),
    ("svc-billing", "MCP_SVC_BILLING_NKEY"),
];

/// A user's key in these tests: the seed and the public key.
fn key(user: &str) -> (String, String) {
    static KEYS: Mutex<BTreeMap<String, (String, String)>> = Mutex::new(BTreeMap::new());
    let made = || {
        let key = KeyPair::new_user();
        (key.seed().unwrap(), key.public_key())
    };
    KEYS.lock().unwrap().entry(user.to_owned()).or_insert_with(made).clone()
}

/// The seed of a user's key.
pub fn seed(user: &str) -> String {
    key(user).0
}

/// A server with the repository's configuration, but for where it listens, and with `more` users.
pub fn guarded(more: &str) -> NatsServer {
    started(&configuration(more), &[])
}

/// The same with the TLS that the configuration has in a comment, and a certificate of the tests.
pub fn guarded_tls(certificate: &str, verify: bool) -> NatsServer {
    let configuration = configuration("");
    let mut inside = false;
    let lines = configuration.lines().map(|line| {
        inside |= line == "#tls {";
        let uncommented = line.strip_prefix('#').filter(|_| inside).unwrap_or(line);
        inside &= line != "#}";
        uncommented.to_owned()
    });
    let configuration = lines.collect::<Vec<_>>().join("\n");
    assert!(configuration.contains("\ntls {") && configuration.contains("verify: true"));
    let configuration =
        if verify { configuration } else { configuration.replace("verify: true", "verify: false") };
    let file = |name: &str| tls_file(name).display().to_string();
    let files = [
        ("MCP_NATS_CERT_FILE", file(certificate)),
        ("MCP_NATS_KEY_FILE", file("server.key")),
        ("MCP_NATS_CA_FILE", file("authority.pem")),
    ];
    started(&configuration, &files.each_ref().map(|(name, file)| (*name, file.as_str())))
}

/// A file of the tests' own authority.
pub fn tls_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/tls").join(name)
}

fn configuration(more: &str) -> String {
    let lines = CONFIGURATION.lines().filter(|line| !line.starts_with("listen:"));
    let configuration: Vec<&str> = lines.collect();
    assert_eq!(configuration.len() + 1, CONFIGURATION.lines().count(), "it says once where to listen");
    configuration.join("\n").replacen("users = [", &format!("users = [\n{more}"), 1)
}

fn started(configuration: &str, more: &[(&str, &str)]) -> NatsServer {
    let keys = USERS.map(|(user, variable)| (variable, key(user).1));
    let mut environment: Vec<(&str, &str)> =
        keys.iter().map(|(variable, key)| (*variable, key.as_str())).collect();
    environment.extend(more);
    NatsServer::start_with(configuration, &environment)
}

/// Another service, which the configuration knows only in tests.
pub fn other_service() -> String {
    format!(
        r#"{{
            nkey: {}
            permissions {{ publish: ["mcp.v1.call.payroll.svc-payroll"], subscribe: ["_INBOX.payroll.>"] }}
        }}"#,
        key("svc-payroll").1
    )
}

/// A client that is logged in, and what the server forbids it.
pub struct Login {
    pub client: Client,
    forbidden: mpsc::Receiver<String>,
}

impl Login {
    /// Logs in as a user, to be answered below an inbox prefix.
    pub async fn new(server: &NatsServer, user: &str, inbox: &str) -> Self {
        let (tell, forbidden) = mpsc::channel(1_024);
        let client = ConnectOptions::with_nkey(seed(user))
            .custom_inbox_prefix(inbox)
            .event_callback(move |event| {
                if let Event::ServerError(ServerError::Other(error)) = event {
                    // The test may be over.
                    let _ = tell.try_send(error.to_lowercase());
                }
                async {}
            })
            .connect(server.url())
            .await
            .unwrap();
        Self { client, forbidden }
    }

    /// The service of the configuration.
    pub async fn billing(server: &NatsServer) -> Self {
        Self::new(server, "svc-billing", "_INBOX.billing").await
    }

    /// Waits until the server has said that something is forbidden, and for nothing else.
    async fn is_forbidden(&mut self, what: &str, subject: &str) {
        let violation = format!("permissions violation for {what} to \"{}\"", subject.to_lowercase());
        let said = timeout(LONG, self.forbidden.recv()).await;
        let said = said.unwrap_or_else(|_| panic!("{violation}: the server allows it")).unwrap();
        assert!(said.contains(&violation), "{violation}: {said}");
    }

    /// Publishes what it must not.
    pub async fn cannot_publish(&mut self, subject: &str) {
        self.client.publish(subject.to_owned(), Bytes::from_static(b"forged")).await.unwrap();
        self.is_forbidden("publish", subject).await;
    }

    /// Subscribes to what it must not, and returns the subscription that does not exist.
    pub async fn cannot_subscribe(&mut self, subject: &str) -> Subscriber {
        let subscriber = self.client.subscribe(subject.to_owned()).await.unwrap();
        self.is_forbidden("subscription", subject).await;
        subscriber
    }

    /// Subscribes in a group in which it must not.
    pub async fn cannot_join(&mut self, subject: &str, group: &str) -> Subscriber {
        let subscriber = self.client.queue_subscribe(subject.to_owned(), group.to_owned()).await.unwrap();
        self.is_forbidden("subscription", subject).await;
        subscriber
    }

    /// Subscribes to what it may. The subscription is in force when this returns.
    pub async fn listen(&self, subject: &str) -> Subscriber {
        let subscriber = self.client.subscribe(subject.to_owned()).await.unwrap();
        self.in_force().await;
        subscriber
    }

    /// Subscribes in a group in which it may.
    pub async fn join(&self, subject: &str, group: &str) -> Subscriber {
        let subscriber = self.client.queue_subscribe(subject.to_owned(), group.to_owned()).await.unwrap();
        self.in_force().await;
        subscriber
    }

    /// The server takes commands in order: a subscription is in force when one made after it has heard
    /// what this client says to itself.
    async fn in_force(&self) {
        let mark = self.client.new_inbox();
        let mut echo = self.client.subscribe(mark.clone()).await.unwrap();
        self.client.publish(mark, Bytes::new()).await.unwrap();
        next(&mut echo).await;
    }

    /// A request as a service makes it.
    pub async fn request(&self, subject: &str, body: &'static str) -> Message {
        let reply = self.client.request(subject.to_owned(), Bytes::from_static(body.as_bytes()));
        timeout(LONG, reply).await.unwrap().unwrap()
    }

    /// Whether everything that the server forbade was expected.
    pub fn had_no_other_refusals(&mut self) {
        assert_eq!(self.forbidden.try_recv().ok(), None);
    }
}

/// The next message, which has to come.
pub async fn next(subscriber: &mut Subscriber) -> Message {
    timeout(LONG, subscriber.next()).await.expect("a message comes").expect("the subscription stands")
}

/// That nothing has come. Something that was sent later has to have come to the same connection.
pub fn nothing_came(subscriber: &mut Subscriber) {
    assert!(subscriber.next().now_or_never().flatten().is_none());
}

/// Why a login is refused.
pub async fn refused(server: &NatsServer, options: ConnectOptions) -> ConnectErrorKind {
    options.connect(server.url()).await.map(drop).unwrap_err().kind()
}
