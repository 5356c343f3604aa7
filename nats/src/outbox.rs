//! Messages on their way to the connection, joined.
//!
//! What is ready to be sent at the same time goes to the client together, and so to the NATS server in one write:
//! a write for each message costs this node, and the server that reads it, more than everything else about it.

use async_nats::{Client, Subject};
use bytes::Bytes;
use mcp_shared::metrics::{self, BusTrouble};
use tokio::sync::{mpsc, oneshot};

/// Messages that may wait for the client. None is larger than a message may be.
const WAITING: usize = 512;
/// Messages that are handed to the client at once.
const JOINED: usize = 128;

/// A way to the connection that keeps the order. It ends with its last clone.
#[derive(Clone)]
pub(crate) struct Outbox {
    queue: mpsc::Sender<Item>,
}

/// A message.
pub(crate) struct Outgoing {
    pub(crate) subject: Subject,
    pub(crate) reply: Option<Subject>,
    pub(crate) payload: Bytes,
}

enum Item {
    Message(Outgoing),
    /// Whoever waits here learns that everything before it is with the server.
    Flush(oneshot::Sender<()>),
}

impl Outbox {
    /// An outbox with a task of its own.
    pub(crate) fn new(client: Client) -> Self {
        let (queue, items) = mpsc::channel(WAITING);
        tokio::spawn(run(client, items));
        Self { queue }
    }

    /// Gives a message its place, and waits for one if there is none. False when the connection has ended.
    pub(crate) async fn put(&self, message: Outgoing) -> bool {
        self.queue.send(Item::Message(message)).await.is_ok()
    }

    /// Gives a message its place if there is one; else it comes back.
    pub(crate) fn try_put(&self, message: Outgoing) -> Result<(), Outgoing> {
        match self.queue.try_reserve() {
            Ok(place) => {
                place.send(Item::Message(message));
                Ok(())
            }
            Err(_) => Err(message),
        }
    }

    /// Waits until everything that was put before has been written to the server.
    pub(crate) async fn flush(&self) {
        let (done, written) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).await.is_ok() {
            let _ = written.await;
        }
    }
}

async fn run(client: Client, mut items: mpsc::Receiver<Item>) {
    let mut joined = Vec::with_capacity(JOINED);
    while items.recv_many(&mut joined, JOINED).await > 0 {
        // Whoever else is ready to run may have something to send as well.
        tokio::task::yield_now().await;
        while joined.len() < JOINED
            && let Ok(item) = items.try_recv()
        {
            joined.push(item);
        }
        for item in joined.drain(..) {
            match item {
                Item::Message(Outgoing { subject, reply, payload }) => {
                    let sent = match reply {
                        Some(reply) => client.publish_with_reply(subject, reply, payload).await,
                        None => client.publish(subject, payload).await,
                    };
                    if let Err(error) = sent {
                        metrics::count_bus_trouble(BusTrouble::Publish);
                        tracing::warn!(error.cause = %error, "a message was not sent");
                    }
                }
                Item::Flush(done) => {
                    let _ = client.flush().await;
                    let _ = done.send(());
                }
            }
        }
    }
}
