//! The lease of one group of processes, as this worker knows it.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use mcp_shared::{
    ids::WorkerId,
    store::{Lease, StoreError},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Denied, Leases, in_time, lock};
use crate::call::stopping;

/// How often a lease is looked at again that changes whenever it is to be taken.
const ATTEMPTS: usize = 4;
/// No life has this number.
const NOT_TAKEN: i64 = 0;

/// The lease of one group. There is one of these for each name, whatever groups come and go.
pub struct Claim {
    name: String,
    /// The number of the life in which it was taken.
    life: AtomicI64,
    /// Held while the store is asked: taking and giving back never overlap, and those who come meanwhile
    /// share what was found.
    taken: tokio::sync::Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    lease: Option<Lease>,
    /// The group that took it last.
    holder: u64,
    /// When the last attempt began, if it failed, and why.
    failed: Option<(Instant, Denied)>,
}

impl Claim {
    pub(super) fn new(name: String) -> Self {
        Self { name, life: AtomicI64::new(NOT_TAKEN), taken: tokio::sync::Mutex::default() }
    }

    /// Whether it was taken and not given back, in whichever life.
    pub(super) fn is_taken(&self) -> bool {
        self.life.load(Ordering::Acquire) != NOT_TAKEN
    }

    fn in_force(&self, leases: &Leases) -> bool {
        self.is_taken() && leases.alive() == Some(self.life.load(Ordering::Acquire))
    }

    /// Gives back what the store still says is ours, unless it was taken again in this life.
    pub(super) async fn give_back(&self, leases: &Leases) -> Result<(), StoreError> {
        let mut taken = self.taken.lock().await;
        if self.is_taken() && leases.fence() == Some(self.life.load(Ordering::Acquire)) {
            return Ok(());
        }
        self.life.store(NOT_TAKEN, Ordering::Release);
        taken.lease = None;
        match in_time(leases.store.lease(&self.name)).await? {
            Some(lease) if lease.owner.as_deref() == Some(leases.me.as_str()) => {
                in_time(leases.store.release_lease(&lease)).await
            }
            _ => Ok(()),
        }
    }

    /// Takes the lease unless a living worker has it.
    async fn acquire(self: &Arc<Self>, leases: &Leases) -> Result<(Lease, i64), Denied> {
        let silent = |error| {
            tracing::warn!(lease = %self.name, error.cause = %error, "a lease was not taken");
            Denied::unreachable()
        };
        for _ in 0..ATTEMPTS {
            let life = leases.alive().ok_or_else(Denied::unreachable)?;
            let lease = in_time(leases.store.lease(&self.name)).await.map_err(silent)?;
            if let Some(owner) = lease.as_ref().and_then(|lease| lease.owner.as_deref())
                // What says our own name is from an earlier life, or from a write whose answer was lost.
                && owner != leases.me.as_str()
            {
                let owner = WorkerId::from_stored(owner);
                if !leases.is_gone(&owner).await.map_err(silent)? {
                    return Err(Denied::Held(owner));
                }
            }
            let seen = lease.map(|lease| lease.revision);
            match in_time(leases.store.take_lease(&self.name, leases.me.as_str(), seen)).await {
                Ok(lease) => return Ok((lease, life)),
                Err(StoreError::Conflict) => {}
                Err(error) => {
                    // It may have been taken all the same.
                    lock(&leases.overdue).push(Arc::clone(self));
                    return Err(silent(error));
                }
            }
        }
        Err(Denied::unreachable())
    }
}

/// A group's hold on its lease.
pub struct Hold {
    leases: Arc<Leases>,
    claim: Arc<Claim>,
    /// Tells the group from others of the same name.
    holder: u64,
}

impl Hold {
    pub(super) fn new(leases: Arc<Leases>, claim: Arc<Claim>, holder: u64) -> Self {
        Self { leases, claim, holder }
    }

    /// Whether calls may be accepted and started at this moment. It asks no store.
    pub fn in_force(&self) -> bool {
        self.claim.in_force(&self.leases)
    }

    /// Takes the lease, or finds it taken. With `patience`, an owner that is silent is waited for until
    /// then, to see whether it is lost. To be called in a task that is carried through: a lease that was
    /// taken for nobody would keep others from what nobody runs.
    pub async fn take(
        &self,
        patience: Option<Instant>,
        retired: &CancellationToken,
        draining: &CancellationToken,
    ) -> Result<(), Denied> {
        loop {
            if draining.is_cancelled() && !self.in_force() {
                return Err(Denied::NotNow(stopping()));
            }
            match (self.try_take(retired).await, patience) {
                (Err(Denied::Held(owner)), Some(deadline)) => {
                    let gone = tokio::select! {
                        gone = self.leases.outlived(&owner, deadline) => gone,
                        () = retired.cancelled() => return Err(Denied::Retired),
                    };
                    if !gone {
                        return Err(Denied::Held(owner));
                    }
                }
                (Err(Denied::Held(owner)), None) => {
                    self.leases.suspect(&owner);
                    return Err(Denied::Held(owner));
                }
                (taken, _) => return taken,
            }
        }
    }

    async fn try_take(&self, retired: &CancellationToken) -> Result<(), Denied> {
        let asked = Instant::now();
        let mut taken = self.claim.taken.lock().await;
        // Looked at under the lock under which a retired group gives its lease back.
        if retired.is_cancelled() {
            return Err(Denied::Retired);
        }
        if self.in_force() {
            taken.holder = self.holder;
            return Ok(());
        }
        if let Some((begun, denied)) = &taken.failed
            && *begun >= asked
        {
            return Err(denied.clone());
        }
        let begun = Instant::now();
        match self.claim.acquire(&self.leases).await {
            Ok((lease, life)) => {
                *taken = Taken { lease: Some(lease), holder: self.holder, failed: None };
                self.claim.life.store(life, Ordering::Release);
                Ok(())
            }
            Err(denied) => {
                taken.failed = Some((begun, denied.clone()));
                Err(denied)
            }
        }
    }

    /// Gives the lease back if nothing runs under it; `unused` is asked when nobody can take it.
    pub async fn give_back(&self, unused: impl Fn() -> bool) {
        let mut taken = self.claim.taken.lock().await;
        if taken.holder != self.holder || !self.claim.is_taken() || !unused() {
            return;
        }
        let life = self.claim.life.swap(NOT_TAKEN, Ordering::AcqRel);
        let lease = taken.lease.take();
        let given_back = match &lease {
            Some(lease) if self.leases.alive() == Some(life) => {
                in_time(self.leases.store.release_lease(lease)).await.is_ok()
            }
            // The store does not answer, or did not a moment ago.
            _ => false,
        };
        if !given_back {
            lock(&self.leases.overdue).push(Arc::clone(&self.claim));
        }
    }
}
