//! One call at the worker: its place, its arguments, its progress, its end.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use async_nats::Subject;
use futures_util::FutureExt;
use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    hosting::Refusal,
    json::RawJson,
    limits,
    worker_api::{CallContext, CallEvent, CallStream},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{BODIES_KIB, Inner, lock};
use crate::{
    callee::Ending,
    frames::{self, FRAME_BYTES, WINDOW},
    wire::{CallId, Offer, ToRouter, millis},
};

/// A call that has no place after this is said to wait.
const WAITS: Duration = Duration::from_millis(100);
/// How long the sender of a large answer waits for the reader.
const CREDIT: Duration = Duration::from_secs(10);

/// A call that was let in.
pub(super) struct Admission {
    pub id: CallId,
    pub offer: Offer,
    pub reply: Subject,
    pub go: oneshot::Receiver<RawJson>,
    pub cancelled: CancellationToken,
}

/// The end of a call whose task panicked. The panic itself was logged.
fn panicked() -> Ending {
    Ending::Failed(WorkerError::new(ErrorCode::Internal, "Internal error").outcome(Outcome::Unknown))
}

/// How a call ended whose task may have panicked.
fn flat(
    ending: std::thread::Result<Result<Option<Ending>, Refusal>>,
) -> Result<Option<Ending>, Box<Refusal>> {
    match ending {
        Ok(ended) => ended.map_err(Box::new),
        Err(_) => Ok(Some(panicked())),
    }
}

/// The most time that a call may have, as far as its offer says. The server's record may say less.
pub(super) fn longest(offer: &Offer) -> Duration {
    let asked = offer.timeout_ms.map(Duration::from_millis);
    asked.unwrap_or(limits::TOOL_TIMEOUT_MAX).min(limits::TOOL_TIMEOUT_MAX)
}

impl Inner {
    /// Looks for a place, waits for the arguments, and runs the call.
    pub(super) async fn admit(self: Arc<Self>, call: Admission) {
        let cancelled = call.cancelled.clone();
        let (id, reply) = (call.id, call.reply.clone());
        tokio::select! {
            // Giving up drops the place or the running call, whichever it is.
            () = cancelled.cancelled() => {}
            ending = AssertUnwindSafe(self.run(call)).catch_unwind() => match flat(ending) {
                Ok(Some(ending)) => {
                    let (wanted, refused) = {
                        let mut table = self.table();
                        let wanted = table.desk.ended(self.bus.now(), id, &ending);
                        (wanted, !wanted && table.desk.refused(id))
                    };
                    if wanted {
                        self.end(id, &reply, ending).await;
                    } else if refused {
                        // It never came to a start.
                        let error = WorkerError::new(ErrorCode::Internal, "Internal error");
                        self.say(&reply, &ToRouter::Refuse(Refusal::Error { error })).await;
                    }
                }
                Ok(None) => {}
                Err(refusal) => {
                    let wanted = self.table().desk.refused(id);
                    if wanted {
                        self.say(&reply, &ToRouter::Refuse(*refusal)).await;
                    }
                }
            },
        }
        self.table().live.remove(&id);
        self.ended.notify_waiters();
    }

    async fn run(self: &Arc<Self>, call: Admission) -> Result<Option<Ending>, Refusal> {
        let Admission { id, offer, reply, go, .. } = call;
        // What the record says is not known before the call is let in. Until then its router counts with
        // more, and this worker ends the call in time.
        let longest_ms = millis(longest(&offer));
        let context = CallContext {
            request_id: offer.request,
            user: offer.user,
            timeout: offer.timeout_ms.map(Duration::from_millis),
            spent: Duration::from_millis(offer.spent_ms),
            trace: offer.trace,
        };
        let mut reservation = {
            let mut reserved = self.host.reserve(context, offer.call);
            tokio::select! {
                biased;
                reservation = &mut reserved => reservation?,
                // The lease of an owner that was lost has to run out first, for example.
                () = sleep(WAITS) => {
                    self.say(&reply, &ToRouter::Wait { limit_ms: longest_ms }).await;
                    reserved.await?
                }
            }
        };
        let limit_ms = millis(reservation.limit());
        if let Some(live) = self.table().live.get_mut(&id) {
            live.limit = reservation.limit();
        }
        let room = {
            let mut place = std::pin::pin!(async {
                reservation.held().await?;
                self.room(offer.size).await
            });
            tokio::select! {
                biased;
                room = &mut place => room?,
                () = sleep(WAITS) => {
                    self.say(&reply, &ToRouter::Wait { limit_ms }).await;
                    place.await?
                }
            }
        };
        if !self.table().desk.held(self.bus.now(), id) {
            return Ok(None);
        }
        let repeatable = reservation.is_repeatable();
        if let Some(live) = self.table().live.get_mut(&id) {
            live.repeatable = repeatable;
        }
        self.say(&reply, &ToRouter::Accept { limit_ms, repeatable }).await;
        let Ok(arguments) = go.await else { return Ok(None) };
        // They are here: others may come.
        drop(room);
        Ok(Some(self.stream(&reply, reservation.go(arguments)).await))
    }

    /// Passes progress on until the end.
    async fn stream(&self, reply: &Subject, mut stream: CallStream) -> Ending {
        while let Some(event) = stream.next().await {
            match event {
                CallEvent::Progress(params) => {
                    self.say_with(reply, &ToRouter::Progress, params.as_bytes()).await;
                }
                CallEvent::Replayed => self.say(reply, &ToRouter::Replayed).await,
                CallEvent::Done(Ok(result)) => return Ending::Answer(result.bytes().clone()),
                CallEvent::Done(Err(error)) => return Ending::Failed(error),
            }
        }
        panicked()
    }

    /// Room for large arguments. Small ones need none.
    async fn room(&self, size: usize) -> Result<Option<OwnedSemaphorePermit>, Refusal> {
        if size <= FRAME_BYTES {
            return Ok(None);
        }
        // One that is larger than all the room there is has it to itself.
        let kib = u32::try_from(size.div_ceil(1024).min(BODIES_KIB)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.bodies).acquire_many_owned(kib).await;
        Ok(room.ok())
    }

    /// Sends the end of a call. Whoever asks for it again gets it from its first part on, and what was
    /// being sent stops: credit belongs to the latest.
    pub(super) async fn end(&self, id: CallId, to: &Subject, ending: Ending) {
        let single = match &ending {
            Ending::Answer(answer) => frames::is_single(answer),
            Ending::Failed(_) => true,
        };
        let credit = Arc::new(Semaphore::new(usize::try_from(WINDOW).unwrap_or(1)));
        if single {
            return self.say_ending(to, ending, &credit).await;
        }
        if let Some(before) = lock(&self.sending).insert(id, Arc::clone(&credit)) {
            before.close();
        }
        self.say_ending(to, ending, &credit).await;
        let mut sending = lock(&self.sending);
        if sending.get(&id).is_some_and(|latest| Arc::ptr_eq(latest, &credit)) {
            sending.remove(&id);
        }
    }

    /// Sends the end of a call, in parts as the reader lets them come.
    pub(super) async fn say_ending(&self, to: &Subject, ending: Ending, credit: &Semaphore) {
        let answer = match ending {
            Ending::Answer(answer) => answer,
            Ending::Failed(error) => return self.say(to, &ToRouter::Failed(error)).await,
        };
        for (frame, part) in frames::split(&answer) {
            match timeout(CREDIT, credit.acquire()).await {
                Ok(Ok(permit)) => permit.forget(),
                // The reader is gone, or has asked again.
                _ => return,
            }
            self.say_with(to, &ToRouter::Answer(frame), &part).await;
        }
    }
}
