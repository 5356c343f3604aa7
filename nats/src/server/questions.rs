//! Questions that are no tool calls, each worked on in a task of its own, with signs of life.

use std::{sync::Arc, time::Duration};

use async_nats::Subject;
use bytes::Bytes;
use mcp_shared::error::{ErrorCode, WorkerError};
use serde::Serialize;
use tokio::{
    sync::Semaphore,
    time::{MissedTickBehavior, interval},
};

use super::{Inner, OPEN_QUESTIONS, lock};
use crate::{
    callee::Ending,
    frames::{self, WINDOW},
    wire::{Ask, CallId, ToRouter},
};

/// How often a sign of life is given.
const SIGN: Duration = Duration::from_millis(400);

impl Inner {
    pub(super) async fn question(self: &Arc<Self>, id: CallId, ask: Ask, reply: Subject) {
        let credit = Arc::new(Semaphore::new(usize::try_from(WINDOW).unwrap_or(1)));
        let refused = {
            let mut questions = lock(&self.questions);
            if questions.contains_key(&id) {
                // It was asked again because no sign had come.
                Some(ToRouter::Alive)
            } else if questions.len() >= OPEN_QUESTIONS {
                if matches!(ask, Ask::Invalidate { .. }) {
                    // The change stands in the store whatever is answered here.
                    self.lose_sync();
                }
                let error = WorkerError::new(ErrorCode::Overloaded, "This worker has too much to do");
                Some(ToRouter::Failed(error.retry_after(Duration::from_secs(1))))
            } else {
                questions.insert(id, Arc::clone(&credit));
                None
            }
        };
        if let Some(refused) = refused {
            return self.say(&reply, &refused).await;
        }
        let inner = Arc::clone(self);
        self.tasks.spawn(async move {
            let mut signs = interval(SIGN);
            signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut work = std::pin::pin!(inner.answer(ask));
            let ending = loop {
                tokio::select! {
                    biased;
                    ending = &mut work => break ending,
                    _ = signs.tick() => inner.say(&reply, &ToRouter::Alive).await,
                    () = inner.stopping.cancelled() => return,
                }
            };
            match ending {
                Ok(answer) if frames::is_single(&answer) => {
                    inner.say_ending(&reply, Ending::Answer(answer), &Semaphore::new(1)).await;
                }
                Ok(answer) => inner.say_ending(&reply, Ending::Answer(answer), &credit).await,
                Err(error) => inner.say(&reply, &ToRouter::Failed(error)).await,
            }
            lock(&inner.questions).remove(&id);
        });
    }

    async fn answer(&self, ask: Ask) -> Result<Bytes, WorkerError> {
        match ask {
            Ask::Start { user, server } => written(&self.host.start_server(&user, &server).await?),
            Ask::Restart { user, server } => written(&self.host.restart_server(&user, &server).await?),
            Ask::Report { server } => written(&self.host.report(&server).await?),
            Ask::Reports => written(&self.host.reports().await?),
            Ask::Wake => written(&self.host.wake().await?),
            Ask::Latest { packages } => written(&self.host.latest(packages).await?),
            Ask::Drain => written(&self.host.release_worker(self.bus.node()).await?),
            Ask::Remote { ask } => written(&self.host.remote(ask).await?),
            Ask::Invalidate { change } => {
                if let Err(error) = self.host.announce(change).await {
                    // What could not be read now is read before the next call: nothing is started with what
                    // was known before, so whoever made the change need not wait for it.
                    tracing::warn!(%error, "a change was not taken in");
                    self.lose_sync();
                }
                written(&())
            }
        }
    }
}

fn written(value: &impl Serialize) -> Result<Bytes, WorkerError> {
    serde_json::to_vec(value).map(Bytes::from).map_err(WorkerError::internal)
}
