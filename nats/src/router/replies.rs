//! Everything that is answered to this node, in one place and in order.

use std::sync::{Arc, atomic::Ordering};

use async_nats::{Message, StatusCode, Subscriber};
use futures_util::StreamExt;

use super::{Inner, lock};
use crate::wire::{self, CallId, ToRouter, ToWorker};

/// The id under which a node hears itself.
pub(super) const ECHO: &str = "echo";

impl Inner {
    /// Reads answers until the router leaves.
    pub(super) async fn listen(self: Arc<Self>, mut replies: Subscriber) {
        loop {
            let message = tokio::select! {
                message = replies.next() => message,
                () = self.stopping.cancelled() => return,
            };
            match message {
                Some(message) => self.reply(message).await,
                None => return,
            }
        }
    }

    async fn reply(self: &Arc<Self>, message: Message) {
        let Some(token) = message.subject.rsplit('.').next() else { return };
        let Ok(id) = token.parse::<CallId>() else {
            if token == ECHO {
                self.echo.store(wire::millis(self.bus.now()), Ordering::Release);
            }
            return;
        };
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            return self.no_responders(id).await;
        }
        let (said, body) = match wire::decode::<ToRouter>(&message.payload) {
            Ok(read) => read,
            Err(error) => {
                tracing::warn!(%error, "an answer was passed over");
                return;
            }
        };
        let probed = lock(&self.probes).remove(&id);
        if let Some(worker) = probed {
            let now = self.bus.now();
            self.fleet_mut().heard(now, &worker);
        } else if !self.heard_about_question(id, &said, &body) {
            self.answered(id, said, body).await;
        }
    }

    async fn no_responders(self: &Arc<Self>, id: CallId) {
        let probed = lock(&self.probes).remove(&id);
        if let Some(worker) = probed {
            // While connections are being made again, a worker may be missing for a moment.
            if self.is_settled() {
                self.worker_lost(&worker);
            }
        } else if !self.nobody_for_question(id) {
            self.nobody_there(id).await;
        }
    }

    /// Asks a worker whether it is there, and about calls.
    pub(super) fn probe(self: &Arc<Self>, worker: &mcp_shared::ids::WorkerId, open: Vec<CallId>) {
        let done = lock(&self.done).remove(worker).unwrap_or_default();
        let id = self.ids.next();
        lock(&self.probes).insert(id, worker.clone());
        let probe = ToWorker::Probe { router: self.bus.node().clone(), open, done };
        let (inner, worker) = (Arc::clone(self), worker.clone());
        self.send_later(async move {
            if let Err(error) = inner.tell(&worker, id, &probe, &[]).await {
                tracing::debug!(error.cause = %error, "a probe was not sent");
            }
        });
    }
}
