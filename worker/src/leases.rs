//! Leases: in a cluster, what may run only once (a `singleton`, a user's own process) runs where the
//! store says that it does.
//!
//! A worker renews **one** lease, `worker/<id>`, which says that it lives. The lease of a group says only
//! whose it is, and is in force while its owner lives; so a worker may own thousands. No wall clocks are
//! compared. A worker counts itself alive for [`limits::LEASE_VALID`] from the *start* of its last
//! successful renewal. Another one calls it lost when it has seen the same revision for
//! [`limits::LEASE_TAKEOVER`], which is longer, and then takes the lost worker's own lease first: from
//! then on no renewal of that worker can succeed, and its groups may be taken one by one.
//!
//! Every taking of a worker's own lease begins a new life, numbered by the fence. What was taken in an
//! earlier life is void.
//!
//! A worker that the fleet cannot reach renews nothing either: what it alone may run is to be run by one that
//! can be called. It goes on where it was if it is back before anybody has taken over.

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use lru::LruCache;
use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    hosting::Refusal,
    ids::{ServerName, UserId, WorkerId},
    limits, metrics,
    store::{Lease, Store, StoreError},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{claim::Claim, takeover::Sighting};

mod claim;
mod takeover;

pub use claim::Hold;

/// How often claims are dropped from memory that nobody has any more, in renewals.
const SWEEP: u32 = 16;

/// Why a worker may not run something.
#[derive(Debug, Clone)]
pub enum Denied {
    /// Another worker does.
    Held(WorkerId),
    /// This one may not right now: the store is silent, or the worker is about to stop.
    NotNow(WorkerError),
    /// The group that asked is about to end.
    Retired,
}

impl Denied {
    /// The store did not say in time whose it is.
    pub fn unreachable() -> Self {
        let text = "This worker cannot reach the store, which says who runs this server";
        Self::NotNow(no_worker(text))
    }

    /// As the answer to an offer.
    pub fn into_refusal(self) -> Refusal {
        match self {
            Denied::Held(owner) => Refusal::NotOwner { owner: Some(owner) },
            Denied::NotNow(error) => Refusal::Busy { error },
            Denied::Retired => Refusal::NotOwner { owner: None },
        }
    }

    /// For a call that was admitted already, or somebody who asked for a start.
    pub fn into_error(self) -> WorkerError {
        match self {
            Denied::Held(owner) => {
                no_worker("Another worker runs this server").with("workerId", owner.as_str())
            }
            Denied::NotNow(error) => error,
            Denied::Retired => no_worker("This worker does not run this server any more"),
        }
    }
}

/// The end of a call whose lease is not in force any more. It was not started.
pub fn no_worker(text: &str) -> WorkerError {
    WorkerError::new(ErrorCode::NoWorker, text)
        .outcome(Outcome::NotStarted)
        .retry_after(Duration::from_secs(1))
}

/// How a worker lost its own lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Another worker took it, and may run by now what this one ran.
    Taken,
    /// It could not be renewed for so long that another worker may take it.
    Silence,
}

/// The leases of one worker.
pub struct Leases {
    store: Arc<dyn Store>,
    me: WorkerId,
    own: Mutex<Own>,
    claims: Mutex<HashMap<String, Arc<Claim>>>,
    next_holder: AtomicU64,
    /// Claims of which the store may say that they are ours although they are not: to be given back.
    overdue: Mutex<Vec<Arc<Claim>>>,
    /// Other workers' own leases as last seen.
    sightings: Mutex<LruCache<WorkerId, Sighting>>,
    /// Workers that are being watched, to see whether they are lost.
    watches: Mutex<HashMap<WorkerId, watch::Receiver<Option<bool>>>>,
    /// Whether the fleet reaches this worker. Without it nobody else is there who could.
    reached: OnceLock<Box<dyn Fn() -> bool + Send + Sync>>,
    tasks: TaskTracker,
    closed: CancellationToken,
}

/// A worker's own lease.
struct Own {
    /// `None`: this worker is not alive, and may own nothing that needs a lease.
    lease: Option<Lease>,
    /// The start of the last renewal that succeeded.
    renewed: Instant,
}

impl Leases {
    /// The leases of a worker that is not alive yet.
    pub fn new(store: Arc<dyn Store>, me: WorkerId, tasks: TaskTracker) -> Arc<Self> {
        let sightings = NonZeroUsize::new(limits::LEASE_SIGHTINGS).unwrap_or(NonZeroUsize::MIN);
        Arc::new(Self {
            store,
            me,
            own: Mutex::new(Own { lease: None, renewed: Instant::now() }),
            claims: Mutex::default(),
            next_holder: AtomicU64::new(1),
            overdue: Mutex::default(),
            sightings: Mutex::new(LruCache::new(sightings)),
            watches: Mutex::default(),
            reached: OnceLock::new(),
            tasks,
            closed: CancellationToken::new(),
        })
    }

    /// From now on this worker owns things only while the fleet reaches it, which `reached` tells.
    pub fn only_while(&self, reached: impl Fn() -> bool + Send + Sync + 'static) {
        // A worker joins one fleet, once.
        let _ = self.reached.set(Box::new(reached));
    }

    fn is_cut_off(&self) -> bool {
        self.reached.get().is_some_and(|reached| !reached())
    }

    /// What one group of processes has to ask before it runs.
    pub fn hold(self: &Arc<Self>, server: &ServerName, user: Option<&UserId>) -> Hold {
        let name = group_name(server, user);
        let claim =
            Arc::clone(lock(&self.claims).entry(name.clone()).or_insert_with(|| Arc::new(Claim::new(name))));
        Hold::new(Arc::clone(self), claim, self.next_holder.fetch_add(1, Ordering::Relaxed))
    }

    /// Begins a life. Leases of an earlier one are given back first: once this worker is seen alive,
    /// nobody else would take them.
    pub async fn enter(&self) -> Result<(), StoreError> {
        self.give_back_overdue().await?;
        let name = worker_name(&self.me);
        let seen = in_time(self.store.lease(&name)).await?.map(|lease| lease.revision);
        let renewed = Instant::now();
        let lease = in_time(self.store.take_lease(&name, self.me.as_str(), seen)).await?;
        *lock(&self.own) = Own { lease: Some(lease), renewed };
        Ok(())
    }

    /// Stays alive until the leases are closed. `retire` ends what runs under a lease, and is called when
    /// this worker is not alive any more, before it begins a new life.
    pub async fn keep<F: Future<Output = ()>>(self: Arc<Self>, retire: impl Fn(Loss) -> F) {
        let work = async {
            loop {
                if self.fence().is_some() {
                    let loss = self.renew().await;
                    lock(&self.own).lease = None;
                    metrics::count_lost_lease();
                    tracing::warn!(?loss, "this worker does not own any more what may run only once");
                    retire(loss).await;
                    self.overdue_all();
                }
                while self.is_cut_off() {
                    sleep(limits::LEASE_WATCH).await;
                }
                if let Err(error) = self.enter().await {
                    tracing::warn!(error.cause = %error, "this worker cannot take its lease yet");
                    sleep(limits::LEASE_RENEWAL).await;
                }
            }
        };
        tokio::select! {
            () = work => {}
            () = self.closed.cancelled() => {}
        }
    }

    /// Renews the worker's own lease for as long as that works.
    async fn renew(self: &Arc<Self>) -> Loss {
        let (mut begun, mut cut_off) = (Instant::now(), false);
        // When the store last said that the lease is still this worker's.
        let mut certain = begun;
        for turn in 1_u32.. {
            // A worker that is back is to be known for alive soon.
            sleep_until(begun + if cut_off { limits::LEASE_WATCH } else { limits::LEASE_RENEWAL }).await;
            begun = Instant::now();
            cut_off = self.is_cut_off();
            let (lease, renewed) = {
                let own = lock(&self.own);
                let Some(lease) = own.lease.clone() else { break };
                (lease, own.renewed.max(certain))
            };
            // The last attempt ends when it is time to end the processes. A worker that was frozen for
            // longer still has one, since nobody need have noticed.
            let left = (renewed + limits::LEASE_RETIREMENT).saturating_duration_since(begun);
            let limit = left.clamp(limits::LEASE_RENEWAL, limits::LEASE_STORE_TIMEOUT);
            let renewal = async {
                if cut_off { self.still(&lease).await } else { self.store.renew_lease(&lease).await }
            };
            match timeout(limit, renewal).await {
                Ok(Ok(_)) if cut_off => certain = begun,
                Ok(Ok(lease)) => {
                    *lock(&self.own) = Own { lease: Some(lease), renewed: begun };
                    self.sweep(turn);
                    continue;
                }
                Ok(Err(StoreError::Conflict)) => return Loss::Taken,
                Ok(Err(error)) => tracing::warn!(error.cause = %error, "this worker's lease was not renewed"),
                Err(_) => tracing::warn!("this worker's lease was not renewed in time"),
            }
            if renewed.max(certain).elapsed() >= limits::LEASE_RETIREMENT {
                break;
            }
        }
        Loss::Silence
    }

    /// The worker's own lease, unless another worker has taken it.
    async fn still(&self, lease: &Lease) -> Result<Lease, StoreError> {
        let stored = self.store.lease(&lease.name).await?;
        stored.filter(|stored| stored.revision == lease.revision).ok_or(StoreError::Conflict)
    }

    /// Tidies up, now that the store answers.
    fn sweep(self: &Arc<Self>, turn: u32) {
        if turn.is_multiple_of(SWEEP) {
            lock(&self.claims).retain(|_, claim| Arc::strong_count(claim) > 1 || claim.is_taken());
        }
        if !lock(&self.overdue).is_empty() {
            let leases = Arc::clone(self);
            self.tasks.spawn(async move {
                if let Err(error) = leases.give_back_overdue().await {
                    tracing::warn!(error.cause = %error, "a lease was not given back yet");
                }
            });
        }
    }

    /// Gives everything back. To be called when all processes are gone.
    pub async fn close(&self) {
        self.closed.cancel();
        self.overdue_all();
        let own = lock(&self.own).lease.take();
        let back = async {
            self.give_back_overdue().await?;
            match &own {
                Some(lease) => self.store.release_lease(lease).await,
                None => Ok(()),
            }
        };
        if let Err(error) = in_time(back).await {
            tracing::warn!(error.cause = %error, "leases were not given back; others wait until they run out");
        }
    }

    /// Nothing that was taken so far is used any more.
    fn overdue_all(&self) {
        let claims: Vec<_> = lock(&self.claims).values().filter(|claim| claim.is_taken()).cloned().collect();
        lock(&self.overdue).extend(claims);
    }

    /// Gives back what the store may take for ours and is not.
    async fn give_back_overdue(&self) -> Result<(), StoreError> {
        while let Some(claim) = self.next_overdue() {
            if let Err(error) = claim.give_back(self).await {
                lock(&self.overdue).push(claim);
                return Err(error);
            }
        }
        Ok(())
    }

    fn next_overdue(&self) -> Option<Arc<Claim>> {
        lock(&self.overdue).pop()
    }

    /// The number of this life, alive or not; `None` between two lives.
    fn fence(&self) -> Option<i64> {
        lock(&self.own).lease.as_ref().map(|lease| lease.fence)
    }

    /// The number of this life, if this worker counts as alive at this moment.
    fn alive(&self) -> Option<i64> {
        let own = lock(&self.own);
        own.lease.as_ref().filter(|_| own.renewed.elapsed() < limits::LEASE_VALID).map(|lease| lease.fence)
    }
}

/// Nobody waits for the store for longer than a lease can wait.
async fn in_time<T>(operation: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    match timeout(limits::LEASE_STORE_TIMEOUT, operation).await {
        Ok(done) => done,
        Err(_) => Err(StoreError::Unavailable { cause: "it did not answer in time".to_owned() }),
    }
}

/// The lease by which a worker shows that it lives.
fn worker_name(worker: &WorkerId) -> String {
    format!("worker/{}", escape(worker.as_str()))
}

/// The lease of a group.
fn group_name(server: &ServerName, user: Option<&UserId>) -> String {
    let server = escape(server.as_str());
    match user {
        None => format!("server/{server}"),
        Some(user) => format!("server/{server}/user/{}", escape(user.as_str())),
    }
}

/// A name without slashes. Different names stay different.
fn escape(name: &str) -> String {
    name.replace('%', "%25").replace('/', "%2F")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_leases_never_collide() {
        let name = |server: &str, user: Option<&str>| {
            group_name(&ServerName::from_stored(server), user.map(UserId::from_stored).as_ref())
        };
        assert_eq!(name("echo", None), "server/echo");
        assert_eq!(name("echo", Some("ann@example.org")), "server/echo/user/ann@example.org");
        let all = [
            name("a", Some("b")),
            name("a/user/b", None),
            name("a%2Fuser%2Fb", None),
            name("a/user", Some("b")),
            name("a", Some("user/b")),
            name("a", Some("user%2Fb")),
        ];
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len(), "{all:?}");
    }

    #[test]
    fn a_worker_stops_accepting_before_another_may_take_over() {
        assert!(limits::LEASE_VALID + limits::LEASE_RENEWAL < limits::LEASE_TAKEOVER);
        assert!(limits::LEASE_RENEWAL * 2 < limits::LEASE_VALID);
    }
}
