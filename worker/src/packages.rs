//! Packages on this worker: the folders that they are installed in, the jobs that install them, and what
//! npm and pip are told to do.
//!
//! A job resolves what was asked for to a lock, which is stored, and from then on every worker that runs
//! the server makes its folder from that lock alone ([`Packages::ensure`]): the first one in no other way
//! than the last.

use std::{
    collections::HashSet,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use lru::LruCache;
use mcp_shared::{
    config::PackageSettings,
    error::{ErrorCode, WorkerError},
    limits,
    package::{Generation, Latest, LatestQuery, Lock, PackageRef},
};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use self::{
    folders::{Folders, Installed},
    managers::{Managers, Say, Work},
};
use crate::host::Host;

pub mod folders;
mod jobs;
pub mod launch;
pub mod managers;

pub use jobs::serve;

/// Latest versions that are remembered.
const REMEMBERED: usize = 1_024;

/// How long it is remembered that a registry did not say.
const UNKNOWN_MEMORY: Duration = Duration::from_secs(2);

/// One worker's packages.
pub struct Packages {
    folders: Folders,
    managers: Managers,
    /// Bounds what is resolved and built at the same time.
    installs: Semaphore,
    /// Bounds registries that are asked for the latest version.
    lookups: Semaphore,
    latest: Mutex<LruCache<LatestQuery, (Instant, Latest)>>,
    /// A job may wait for somebody.
    wake: Notify,
    /// There may be installations that nothing runs any more.
    sweep_due: AtomicBool,
}

impl Packages {
    /// Packages in the folders that the settings name. Nothing is made yet.
    pub fn new(settings: &PackageSettings) -> Self {
        let remembered = NonZeroUsize::new(REMEMBERED).unwrap_or(NonZeroUsize::MIN);
        Self {
            folders: Folders::new(settings),
            managers: Managers::new(settings),
            installs: Semaphore::new(limits::INSTALLS),
            lookups: Semaphore::new(limits::LATEST_LOOKUPS),
            latest: Mutex::new(LruCache::new(remembered)),
            wake: Notify::new(),
            sweep_due: AtomicBool::new(true),
        }
    }

    /// Looks for jobs now.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Looks before long for installations that nothing runs any more.
    pub fn sweep_later(&self) {
        self.sweep_due.store(true, Ordering::Release);
        self.wake();
    }

    /// The installation that a server runs: there already, or made from its lock. What was begun is brought
    /// to an end that leaves nothing half done, whether or not the caller still waits.
    pub async fn ensure(
        &self,
        reference: &PackageRef,
        host: &Arc<Host>,
        say: Say,
        cancelled: &CancellationToken,
    ) -> Result<Arc<Installed>, WorkerError> {
        let task = {
            let (reference, means, cancelled) = (reference.clone(), Arc::clone(host), cancelled.clone());
            host.tasks
                .spawn(async move { means.packages.ensure_now(&reference, &means, say, &cancelled).await })
        };
        let installed = tokio::select! {
            installed = task => installed.map_err(WorkerError::internal)??,
            () = cancelled.cancelled() => return Err(given_up()),
        };
        self.folders.link(reference, &installed);
        Ok(installed)
    }

    async fn ensure_now(
        &self,
        reference: &PackageRef,
        host: &Host,
        say: Say,
        cancelled: &CancellationToken,
    ) -> Result<Arc<Installed>, WorkerError> {
        let build = self.folders.acquire(&reference.generation, async |folder| {
            let lock =
                host.vault.lock(&reference.generation).await?.ok_or_else(|| lost(&reference.generation))?;
            // What stands under the name of a hash must have that hash.
            if lock.generation().ok().as_ref() != Some(&reference.generation) {
                let text = "The stored lock of the package was changed";
                return Err(WorkerError::new(ErrorCode::IntegrityMismatch, text));
            }
            self.build(&lock, folder, host, say, cancelled).await
        });
        build.await
    }

    async fn build(
        &self,
        lock: &Lock,
        folder: &std::path::Path,
        host: &Host,
        say: Say,
        cancelled: &CancellationToken,
    ) -> Result<(), WorkerError> {
        let _place = self.installs.acquire().await.map_err(WorkerError::internal)?;
        if cancelled.is_cancelled() {
            return Err(given_up());
        }
        tracing::info!(package.name = %lock.name, package.version = %lock.version, "installing a package");
        let work = Work { supervisor: &host.supervisor, say, cancelled };
        self.managers.build(lock, folder, &work).await
    }

    /// The latest versions of packages, looked up side by side and remembered for a while.
    pub async fn latest(&self, queries: Vec<LatestQuery>, host: &Host) -> Vec<Latest> {
        let asked = queries.into_iter().map(async |query| {
            // One that waits for its turn for too long is as good as unknown.
            let limit = 2 * limits::LATEST_TIMEOUT;
            match tokio::time::timeout(limit, self.latest_of(query, host)).await {
                Ok(latest) => latest,
                Err(_) => {
                    let text = "The registries were not asked in time";
                    Latest::Unknown(WorkerError::new(ErrorCode::RegistryUnavailable, text))
                }
            }
        });
        futures_util::future::join_all(asked).await
    }

    async fn latest_of(&self, query: LatestQuery, host: &Host) -> Latest {
        let known = self.latest.lock().unwrap_or_else(PoisonError::into_inner).get(&query).cloned();
        let memory = |latest: &Latest| match latest {
            Latest::Version(_) => limits::LATEST_MEMORY,
            // Who could not say may be able to soon.
            Latest::Unknown(_) => UNKNOWN_MEMORY,
        };
        if let Some((_, latest)) = known.filter(|(when, latest)| when.elapsed() < memory(latest)) {
            return latest;
        }
        let Ok(_place) = self.lookups.acquire().await else { return Latest::Unknown(given_up()) };
        let scratch = match self.folders.scratch().await {
            Ok(scratch) => scratch,
            Err(error) => return Latest::Unknown(error),
        };
        let work = Work { supervisor: &host.supervisor, say: Arc::new(|_| {}), cancelled: &host.stopping };
        let latest = self.managers.latest(&query, scratch.path(), &work).await;
        let mut known = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        known.put(query, (Instant::now(), latest.clone()));
        latest
    }

    /// Removes installations that no server of the store has.
    pub async fn sweep(self: &Arc<Self>, keep: HashSet<Generation>) {
        let packages = Arc::clone(self);
        let swept = tokio::task::spawn_blocking(move || packages.folders.sweep(&keep));
        if let Err(error) = swept.await {
            tracing::error!(error.cause = %error, "old installations were not removed");
        }
    }
}

fn lost(generation: &Generation) -> WorkerError {
    tracing::error!(%generation, "the lock of a package is not in the store");
    WorkerError::new(
        ErrorCode::InstallFailed,
        "The lock of the package is not in the store; upgrade it to mend that",
    )
}

fn given_up() -> WorkerError {
    WorkerError::new(ErrorCode::InstallFailed, "The installation is no longer wanted")
}
