//! Changes of the store, told to every worker before they are answered.

use std::{sync::Arc, time::Duration};

use futures_util::future::{join, join_all};
use mcp_shared::{error::WorkerError, ids::WorkerId, limits, worker_api::Change};
use tokio::time::{Instant, sleep, sleep_until};

use super::{
    Inner,
    questions::{Manners, Unanswered},
};
use crate::{caller::bus_unavailable, wire::Ask};

/// A worker that has said nothing for so long starts nothing until it has read everything again: it is
/// frozen, cut off or dead.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_millis(1_100);
/// A worker that is cut off from this node by a split of the NATS servers has noticed it after this time, and read
/// what is stored.
const NOTICED_WITHIN: Duration = Duration::from_secs(6);
/// How often it is asked meanwhile.
const ASKED_AGAIN: Duration = Duration::from_millis(300);
/// How long the server may take to take in what this node sends.
const SETTLED_WITHIN: Duration = Duration::from_secs(3);

/// What became of telling a worker.
enum Told {
    /// It has taken the change in, or is gone.
    Done,
    /// It said nothing in time.
    Silent,
}

impl Inner {
    /// Tells all workers, and waits until they have taken it in. A worker that gives no sign is waited
    /// out: it uses nothing that it knew before until it has heard from the fleet again.
    pub(super) async fn announce(self: &Arc<Self>, change: Change) -> Result<(), WorkerError> {
        if !self.is_up() {
            return Err(bus_unavailable());
        }
        let noun = match &change {
            Change::Server { .. } => "server",
            Change::Secret { .. } => "secret",
            Change::Login { .. } => "login",
        };
        let ask = Ask::Invalidate { change: change.clone() };
        let manners = Manners {
            again: Some(Duration::from_millis(300)),
            first: ACKNOWLEDGED_WITHIN,
            whole: 2 * limits::STARTUP_TIMEOUT_MAX,
        };
        let workers = self.fleet().workers();
        let telling = join_all(workers.iter().map(|worker| self.tell_change(worker, &ask, &manners)));
        // The silence of a worker means something from when the server had what was sent: what is stuck here
        // leaves the worker as it was, and at work.
        let settling = async { self.bus.settle(SETTLED_WITHIN).await.then(Instant::now) };
        let (told, settled) = join(telling, settling).await;
        if let Err(error) = self.bus.send(self.bus.subjects().event(noun, "changed"), &change, &[]).await {
            tracing::debug!(error.cause = %error, "an event was not sent");
        }
        let told = told.into_iter().collect::<Result<Vec<_>, _>>()?;
        if told.iter().any(|told| matches!(told, Told::Silent)) {
            let settled = settled.ok_or_else(bus_unavailable)?;
            sleep_until(settled + ACKNOWLEDGED_WITHIN).await;
        }
        Ok(())
    }

    async fn tell_change(
        self: &Arc<Self>,
        worker: &WorkerId,
        ask: &Ask,
        manners: &Manners,
    ) -> Result<Told, WorkerError> {
        let (told, silence) = match self.question(worker, ask, manners).await {
            Ok(_) => return Ok(Told::Done),
            Err(Unanswered::Failed(error)) => return Err(error),
            Err(Unanswered::Gone) => {
                // Whoever has no subscription hears nothing else either, and reads everything again
                // before it starts anything.
                let silence = self.fleet().silence(self.bus.now(), worker);
                self.fleet_mut().silent(worker);
                (Told::Done, silence)
            }
            Err(Unanswered::Silent) => {
                tracing::warn!(%worker, "a worker did not acknowledge a change in time");
                (Told::Silent, self.fleet().silence(self.bus.now(), worker))
            }
        };
        if !self.bus.is_clustered() {
            return Ok(told);
        }
        // Or NATS servers have lost each other, and it is at work on the other side. It is asked until it has had
        // time to notice that it misses somebody, and to read what is stored: for less than that it need not have
        // noticed anything.
        let left = NOTICED_WITHIN.saturating_sub(silence.unwrap_or(NOTICED_WITHIN));
        let end = Instant::now() + left;
        while Instant::now() < end {
            sleep(ASKED_AGAIN).await;
            match self.question(worker, ask, manners).await {
                Ok(_) => return Ok(Told::Done),
                Err(Unanswered::Failed(error)) => return Err(error),
                Err(Unanswered::Gone | Unanswered::Silent) => {}
            }
        }
        Ok(told)
    }
}
