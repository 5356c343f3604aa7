//! NATS as the repository's own configuration sets it up, and plain clients that try what they may.

use std::time::Duration;

use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, Message, ServerError, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use mcp_shared::testing::services::NatsServer;
use tokio::{sync::mpsc, time::timeout};

/// The configuration that operators copy.
const CONFIGURATION: &str = include_str!("../../nats-server.conf");
/// How long a test waits for what has to come. It only matters when it does not come.
pub const LONG: Duration = Duration::from_secs(20);

/// Users of the configuration, each with the variable that has the password.
const USERS: [(&str, &str); 4] = [
    ("gateway", "MCP_GATEWAY_PASSWORD"),
    ("worker", "MCP_WORKER_PASSWORD"),
    ("operator", "MCP_OPERATOR_PASSWORD"),
    ("svc-billing", "MCP_BILLING_PASSWORD"),
];

/// A user's password in these tests.
pub fn password(user: &str) -> String {
    format!("{user}-password")
}

/// A server with the repository's configuration, but for where it listens, and with `more` users.
pub fn guarded(more: &str) -> NatsServer {
    let lines = CONFIGURATION.lines().filter(|line| !line.starts_with("listen:"));
    let configuration: Vec<&str> = lines.collect();
    assert_eq!(configuration.len() + 1, CONFIGURATION.lines().count(), "it says once where to listen");
    let configuration = configuration.join("\n").replacen("users = [", &format!("users = [\n{more}"), 1);
    let passwords = USERS.map(|(user, variable)| (variable, password(user)));
    let environment: Vec<(&str, &str)> =
        passwords.iter().map(|(variable, password)| (*variable, password.as_str())).collect();
    NatsServer::start_with(&configuration, &environment)
}

/// Another service, which the configuration knows only in tests.
pub const OTHER_SERVICE: &str = r#"{
    user: svc-payroll, password: svc-payroll-password
    permissions { publish: ["mcp.v1.call.payroll.svc-payroll"], subscribe: ["_INBOX.payroll.>"] }
}"#;

/// A client that is logged in, and what the server forbids it.
pub struct Login {
    pub client: Client,
    forbidden: mpsc::Receiver<String>,
}

impl Login {
    /// Logs in as a user, to be answered below an inbox prefix.
    pub async fn new(server: &NatsServer, user: &str, inbox: &str) -> Self {
        let (tell, forbidden) = mpsc::channel(1_024);
        let client = ConnectOptions::with_user_and_password(user.to_owned(), password(user))
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
