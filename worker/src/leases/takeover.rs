//! Other workers, as far as their leases tell: whether they live, and how one that does not is put out
//! for good.

use std::sync::Arc;

use mcp_shared::{
    ids::WorkerId,
    limits,
    store::{Lease, Revision, StoreError},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout_at},
};

use super::{Leases, in_time, lock, worker_name};

/// A worker's own lease as last seen.
#[derive(Clone, Copy)]
pub(super) struct Sighting {
    revision: Revision,
    /// When this revision was seen for the first time.
    since: Instant,
}

impl Leases {
    /// Whether a worker has given its own lease back or lost it, so that what it ran is free.
    pub(super) async fn is_gone(&self, other: &WorkerId) -> Result<bool, StoreError> {
        Ok(self.look_at(other).await?.is_none())
    }

    /// Waits until it is certain whether a worker is lost, at most until the deadline; `true`: it is, and
    /// can never renew again. All who ask about one worker share one look at it.
    pub async fn outlived(self: &Arc<Self>, other: &WorkerId, deadline: Instant) -> bool {
        let mut verdict = self.suspect(other);
        let decided = timeout_at(deadline, async {
            let gone = verdict.wait_for(Option::is_some).await.map(|gone| *gone == Some(true));
            gone.unwrap_or_else(|_| {
                // Whoever looked is gone without a word; the next one begins anew.
                lock(&self.watches).remove(other);
                false
            })
        });
        decided.await.unwrap_or(false)
    }

    /// Begins to look whether a worker is lost, unless somebody looks already. An owner may be cut off from
    /// the store while it still answers on the bus, where nobody takes it for lost.
    pub(super) fn suspect(self: &Arc<Self>, other: &WorkerId) -> watch::Receiver<Option<bool>> {
        let mut watches = lock(&self.watches);
        let watch = watches.entry(other.clone()).or_insert_with(|| {
            let (sender, receiver) = watch::channel(None);
            let (leases, other) = (Arc::clone(self), other.clone());
            self.tasks.spawn(async move {
                let gone = tokio::select! {
                    gone = leases.watch(&other) => gone,
                    () = leases.closed.cancelled() => false,
                };
                lock(&leases.watches).remove(&other);
                sender.send_replace(Some(gone));
            });
            receiver
        });
        watch.clone()
    }

    /// Looks at a worker until its lease changes or has been the same for too long.
    async fn watch(&self, other: &WorkerId) -> bool {
        let end = Instant::now() + limits::LEASE_TAKEOVER * 2;
        let mut first = None;
        while Instant::now() < end {
            let mut pause = limits::LEASE_WATCH;
            match self.look_at(other).await {
                Ok(None) => return true,
                Ok(Some((lease, _))) if *first.get_or_insert(lease.revision) != lease.revision => {
                    return false;
                }
                Ok(Some((lease, since))) => {
                    let silent = since.elapsed();
                    // To one that is cut off itself, the silence of others says nothing.
                    if self.is_cut_off() {
                        return false;
                    }
                    if silent >= limits::LEASE_TAKEOVER {
                        // Whatever comes of this, the next look tells.
                        let taken =
                            self.store.take_lease(&lease.name, self.me.as_str(), Some(lease.revision));
                        if in_time(taken).await.is_ok() {
                            tracing::warn!(worker = %other, "a worker is lost; what it ran is taken over");
                        }
                        continue;
                    }
                    pause = pause.min(limits::LEASE_TAKEOVER - silent);
                }
                Err(error) => tracing::warn!(error.cause = %error, "a worker's lease cannot be read"),
            }
            sleep(pause).await;
        }
        false
    }

    /// A worker's own lease and since when it has been seen like this; `None` if it has none.
    async fn look_at(&self, other: &WorkerId) -> Result<Option<(Lease, Instant)>, StoreError> {
        let lease = in_time(self.store.lease(&worker_name(other))).await?;
        let lease = lease.filter(|lease| lease.owner.as_deref() == Some(other.as_str()));
        let mut sightings = lock(&self.sightings);
        let Some(lease) = lease else {
            sightings.pop(other);
            return Ok(None);
        };
        let seen = sightings.get(other).copied().filter(|seen| seen.revision == lease.revision);
        // The moment after the answer: the revision was written before it.
        let seen = seen.unwrap_or_else(|| Sighting { revision: lease.revision, since: Instant::now() });
        sightings.put(other.clone(), seen);
        Ok(Some((lease, seen.since)))
    }
}
