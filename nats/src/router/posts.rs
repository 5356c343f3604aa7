//! What calls have workers told, as messages.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use mcp_shared::{
    hosting::{CallOffer, Placing},
    ids::WorkerId,
};

use super::{Inner, calls::Call, lock};
use crate::{
    caller::Now,
    frames,
    wire::{CallId, Frame, Offer, ToWorker, VERSIONS, millis},
};

/// A message that is to be sent.
pub(super) enum Post {
    Offer { worker: WorkerId, attempt: CallId, placing: Placing, spent: Now },
    Go { worker: WorkerId, attempt: CallId },
    Cancel { worker: WorkerId, attempt: CallId },
    Credit { worker: WorkerId, attempt: CallId, frames: u32 },
}

/// How long a worker may take to hear that an attempt was given up: longer than calls wait for the bus.
const REPEATED_WITHIN: Now = Now::from_secs(15);
/// Attempts that are remembered for it.
const REPEATED: usize = 4_096;

/// Attempts that were given up lately. A worker that was not told, since the bus was just then away, would go
/// on with them.
#[derive(Default)]
pub(super) struct Cancelled(Mutex<VecDeque<(Now, WorkerId, CallId)>>);

impl Cancelled {
    pub(super) fn note(&self, now: Now, worker: &WorkerId, attempt: CallId) {
        let mut latest = lock(&self.0);
        if latest.len() == REPEATED {
            latest.pop_front();
        }
        latest.push_back((now, worker.clone(), attempt));
    }

    fn take(&self, now: Now) -> Vec<(WorkerId, CallId)> {
        let latest = std::mem::take(&mut *lock(&self.0));
        let young = latest.into_iter().filter(|(at, ..)| now.saturating_sub(*at) < REPEATED_WITHIN);
        young.map(|(_, worker, attempt)| (worker, attempt)).collect()
    }
}

impl Inner {
    /// The bus is back: workers are told once more what was given up while it was on its way out.
    pub(super) fn cancel_again(self: &Arc<Self>) {
        let cancelled = self.cancelled.take(self.bus.now());
        if cancelled.is_empty() {
            return;
        }
        let inner = Arc::clone(self);
        self.send_later(async move {
            for (worker, attempt) in cancelled {
                if inner.tell(&worker, attempt, &ToWorker::Cancel, &[]).await.is_err() {
                    inner.cancelled.note(inner.bus.now(), &worker, attempt);
                }
            }
        });
    }

    /// Sends messages about a call, in order.
    pub(super) async fn post(self: &Arc<Self>, call: &Arc<Call>, post: Vec<Post>) {
        for message in post {
            let sent = match message {
                Post::Offer { worker, attempt, placing, spent } => {
                    let offer = ToWorker::Offer(Offer {
                        version: VERSIONS.1,
                        request: call.context.request_id.clone(),
                        user: call.context.user.clone(),
                        timeout_ms: call.context.timeout.map(millis),
                        spent_ms: millis(spent),
                        size: call.request.arguments.as_bytes().len(),
                        router: self.bus.node().clone(),
                        call: CallOffer {
                            server: call.request.server.clone(),
                            tool: call.request.tool.clone(),
                            progress: call.request.progress,
                            placing,
                            idempotency: call.request.idempotency.clone(),
                        },
                        trace: call.context.trace.clone(),
                    });
                    self.tell(&worker, attempt, &offer, &[]).await
                }
                Post::Go { worker, attempt } => {
                    let arguments = call.request.arguments.bytes().clone();
                    if frames::is_single(&arguments) {
                        let frame = Frame { number: 0, total: arguments.len(), sha256: None };
                        self.tell(&worker, attempt, &ToWorker::Go(frame), &arguments).await
                    } else {
                        let inner = Arc::clone(self);
                        self.tasks.spawn(async move {
                            for (frame, part) in frames::split(&arguments) {
                                if let Err(error) =
                                    inner.tell(&worker, attempt, &ToWorker::Go(frame), &part).await
                                {
                                    tracing::warn!(error.cause = %error, "arguments were not sent");
                                    return;
                                }
                            }
                        });
                        Ok(())
                    }
                }
                Post::Cancel { worker, attempt } => self.tell(&worker, attempt, &ToWorker::Cancel, &[]).await,
                Post::Credit { worker, attempt, frames } => {
                    self.tell(&worker, attempt, &ToWorker::Credit(frames), &[]).await
                }
            };
            if let Err(error) = sent {
                // The watch finds out what became of the call.
                tracing::warn!(error.cause = %error, "a message was not sent");
            }
        }
    }

    /// Tells a worker something about an attempt or a question.
    pub(super) async fn tell(
        &self,
        worker: &WorkerId,
        id: CallId,
        message: &ToWorker,
        body: &[u8],
    ) -> Result<(), crate::bus::SendError> {
        let subject = self.bus.subjects().worker(worker, message.verb());
        // Nobody has to hear that a worker is gone which was told to stop. And a worker that is gone before
        // the credit for its answer comes has run the call: that must not look as if nobody took the GO.
        if matches!(message, ToWorker::Cancel | ToWorker::Credit(_)) {
            return self.bus.send(subject, &(id, message), body).await;
        }
        self.bus.ask(subject, self.bus.reply_to(id), &(id, message), body).await
    }
}
