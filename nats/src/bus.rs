//! One node's connection to NATS.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::{Client, ConnectOptions, Event, Statistics, Subject, Subscriber, connection::State};
use bytes::Bytes;
use mcp_shared::{
    ids::WorkerId,
    metrics::{self, BusTrouble, Direction, Exposition, Metric},
};
use serde::Serialize;

use crate::{
    caller::Now,
    outbox::{Outbox, Outgoing},
    subjects::Subjects,
    wire,
};

/// Messages that may wait to be read by one subscription; what comes beyond is lost, and noticed (the client's own
/// number is 65,536). A loss costs a worker the time to read everything again, so that a burst should fit: each call
/// that is begun is two messages to its worker, and some thousand callers who come at once are overload, which is
/// refused call by call, and no reason to lose sync. These messages have some hundred bytes. The large ones are
/// asked for by those who read them, piece by piece, within `BODIES_KIB`; so what can wait here is some megabytes.
const SUBSCRIPTION: usize = 16_384;
/// Commands that may wait to be written to the connection (the client's own number is 2,048). None is larger than
/// a message may be, so that they are some megabytes too; whoever finds no place within [`SENDING`] gives up.
const OUTBOX: usize = 512;
/// How often it is logged that messages are lost. Each is counted.
const LOSS_LOGGED: Duration = Duration::from_secs(1);
/// How long a message may wait for its place before them. While there is no connection nobody makes room.
const SENDING: Duration = Duration::from_secs(1);
/// How often the connection is tried out.
const PING: Duration = Duration::from_secs(5);

/// A connection, with what everything on it needs.
#[derive(Clone)]
pub struct Bus {
    client: Client,
    outbox: Outbox,
    subjects: Arc<Subjects>,
    node: WorkerId,
    start: Instant,
    lost: Arc<AtomicU64>,
    inbox: Arc<str>,
}

/// Why something was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// It cannot be written as a message.
    #[error("a message cannot be written: {0}")]
    Write(#[from] serde_json::Error),
    /// The NATS server takes no message that is so large.
    #[error("a message was not sent: it has {bytes} bytes, and the NATS server takes {most}")]
    TooLarge {
        /// How large it is.
        bytes: usize,
        /// How large it may be.
        most: usize,
    },
    /// Too much waits to be sent already, or the connection has ended.
    #[error("a message was not sent: the connection takes no more")]
    Full,
}

impl Bus {
    /// Connects one node. `options` say where it may log in; the rest is set here.
    pub async fn connect(
        options: ConnectOptions,
        servers: Vec<async_nats::ServerAddr>,
        prefix: &str,
        node: WorkerId,
    ) -> Result<Self, async_nats::ConnectError> {
        let subjects = Arc::new(Subjects::new(prefix));
        let inbox: Arc<str> = subjects.inbox(&node).into();
        let lost = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&lost);
        let logged = Arc::new(Mutex::new(None::<Instant>));
        let client = options
            .name(node.as_str())
            .custom_inbox_prefix(format!("{inbox}.own"))
            .subscription_capacity(SUBSCRIPTION)
            .client_capacity(OUTBOX)
            .ping_interval(PING)
            .event_callback(move |event| {
                let (counter, logged) = (Arc::clone(&counter), Arc::clone(&logged));
                async move {
                    match event {
                        Event::Connected => {
                            metrics::count_bus_connection();
                            tracing::info!("connected to NATS");
                        }
                        Event::Disconnected => {
                            metrics::count_bus_disconnection();
                            tracing::warn!("the connection to NATS was lost");
                        }
                        Event::SlowConsumer(_) => {
                            let lost = counter.fetch_add(1, Ordering::AcqRel) + 1;
                            metrics::count_slow_consumer();
                            let mut logged = logged.lock().unwrap_or_else(PoisonError::into_inner);
                            if logged.is_none_or(|when| when.elapsed() >= LOSS_LOGGED) {
                                *logged = Some(Instant::now());
                                tracing::warn!(
                                    lost,
                                    "messages are lost: they come faster than they are read"
                                );
                            }
                        }
                        other => {
                            match other {
                                Event::ServerError(_) => metrics::count_bus_trouble(BusTrouble::Server),
                                Event::ClientError(_) => metrics::count_bus_trouble(BusTrouble::Client),
                                _ => {}
                            }
                            tracing::info!(event = %other, "NATS");
                        }
                    }
                }
            })
            .connect(servers)
            .await?;
        let outbox = Outbox::new(client.clone());
        Ok(Self { client, outbox, subjects, node, start: Instant::now(), lost, inbox })
    }

    /// Shows what went over the connection.
    pub(crate) fn show(&self, metrics: &Exposition) {
        let show = |metric, read: fn(&Statistics, Direction) -> u64| {
            let statistics = self.client.statistics();
            metrics.show_all(metric, move |samples| {
                for direction in Direction::ALL {
                    samples.count(&[("direction", direction.as_str())], read(&statistics, *direction));
                }
            });
        };
        show(Metric::BusMessages, |statistics, direction| match direction {
            Direction::In => statistics.in_messages.load(Ordering::Relaxed),
            Direction::Out => statistics.out_messages.load(Ordering::Relaxed),
        });
        show(Metric::BusPayload, |statistics, direction| match direction {
            Direction::In => statistics.in_bytes.load(Ordering::Relaxed),
            Direction::Out => statistics.out_bytes.load(Ordering::Relaxed),
        });
    }

    /// This node.
    pub fn node(&self) -> &WorkerId {
        &self.node
    }

    /// The subjects of the fleet.
    pub fn subjects(&self) -> &Subjects {
        &self.subjects
    }

    /// The client, for what is not ours to wrap.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Now, by this process' monotonic clock.
    pub fn now(&self) -> Now {
        self.start.elapsed()
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Whether the NATS server is one of several that pass messages on to each other.
    pub fn is_clustered(&self) -> bool {
        self.client.server_info().cluster.is_some()
    }

    /// Grows whenever messages may have been lost: with each connection, and when they came too fast.
    pub fn gaps(&self) -> u64 {
        let connects = self.client.statistics().connects.load(Ordering::Acquire);
        connects + self.lost.load(Ordering::Acquire)
    }

    /// Where answers under an id are sent.
    pub fn reply_to(&self, id: impl std::fmt::Display) -> String {
        format!("{}.{id}", self.inbox)
    }

    /// Everything that is answered to this node, but the client's own requests.
    pub async fn replies(&self) -> Result<Subscriber, async_nats::SubscribeError> {
        self.client.subscribe(format!("{}.*", self.inbox)).await
    }

    /// Sends a message.
    pub async fn send(
        &self,
        subject: String,
        message: &impl Serialize,
        body: &[u8],
    ) -> Result<(), SendError> {
        self.put(subject.into(), None, wire::encode(message, body)?).await
    }

    /// Sends a message whose answers come to a subject.
    pub async fn ask(
        &self,
        subject: String,
        reply: String,
        message: &impl Serialize,
        body: &[u8],
    ) -> Result<(), SendError> {
        self.put(subject.into(), Some(reply.into()), wire::encode(message, body)?).await
    }

    /// Sends bytes.
    pub async fn publish(&self, subject: Subject, payload: Bytes) -> Result<(), SendError> {
        self.put(subject, None, payload).await
    }

    /// Gives what is sent its place among what waits to be written, or gives it up.
    async fn put(&self, subject: Subject, reply: Option<Subject>, payload: Bytes) -> Result<(), SendError> {
        let (bytes, most) = (payload.len(), self.client.max_payload());
        if bytes > most {
            metrics::count_bus_trouble(BusTrouble::Publish);
            return Err(SendError::TooLarge { bytes, most });
        }
        let Err(message) = self.outbox.try_put(Outgoing { subject, reply, payload }) else { return Ok(()) };
        match tokio::time::timeout(SENDING, self.outbox.put(message)).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => {
                metrics::count_bus_trouble(BusTrouble::Outbox);
                Err(SendError::Full)
            }
        }
    }

    /// Waits until everything that was sent before has been written to the server.
    pub async fn flush(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.outbox.flush()).await;
    }

    /// Waits until the server has answered: everything sent before has reached it, and subscriptions
    /// made before are in force.
    pub async fn settle(&self, limit: Duration) -> bool {
        let heard = async {
            let echo = self.client.new_inbox();
            let mut own = self.client.subscribe(echo.clone()).await.ok()?;
            self.put(echo.into(), None, Bytes::new()).await.ok()?;
            futures_util::StreamExt::next(&mut own).await
        };
        matches!(tokio::time::timeout(limit, heard).await, Ok(Some(_)))
    }
}
