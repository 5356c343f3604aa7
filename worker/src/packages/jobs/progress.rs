//! A job as its worker has it: what was said, how far it is, and whether it is still this worker's.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use mcp_shared::{
    error::{ErrorCode, WorkerError},
    ids::WorkerId,
    limits,
    package::{Job, JobState, PackageRecord},
    server::ServerRecord,
    store::{Revision, StoreError, Versioned},
    timestamp::Timestamp,
    vault::VaultError,
};
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{ATTEMPTS, Stop, lock};
use crate::{host::Host, packages::managers::Say};

/// How often what was said is written to the store.
const TELL: Duration = Duration::from_millis(500);
/// How often it is looked whether a job is still this worker's when nothing is said.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// A job that this worker is at.
pub(super) struct Progress {
    host: Arc<Host>,
    job: Mutex<Told>,
    /// Held while the store is asked.
    revision: tokio::sync::Mutex<Revision>,
    /// Something was said that is not in the store yet.
    said: Notify,
    /// The job is another's, or the worker stops.
    pub(super) cancelled: CancellationToken,
    /// The work is over.
    pub(super) ended: CancellationToken,
}

struct Told {
    job: Job,
    /// The store has it as it is here.
    written: bool,
}

impl Progress {
    /// Makes a job this worker's; `None` if another one was faster or it has failed often enough.
    pub(super) async fn claim(host: &Arc<Host>, stored: Versioned<Job>) -> Option<Arc<Self>> {
        let mut job = stored.value;
        let lost = job.owner.take().filter(|_| job.state == JobState::Running);
        if let Some(worker) = &lost {
            job.note(format!("{worker} was lost; what it had begun is begun again"));
        }
        job.attempts += 1;
        job.state = JobState::Running;
        job.owner = Some(host.worker_id.clone());
        job.updated = Timestamp::now();
        job.not_before = None;
        let spent = job.attempts > limits::INSTALL_ATTEMPTS;
        if spent {
            let text = format!(
                "The job was begun {} times, and each time its worker was lost",
                limits::INSTALL_ATTEMPTS
            );
            close(&mut job, Err(WorkerError::new(ErrorCode::InstallFailed, text)));
        }
        let revision = match host.vault.replace_job(&job, stored.revision).await {
            Ok(revision) => revision,
            Err(VaultError::Store(StoreError::Conflict | StoreError::NotFound)) => return None,
            Err(error) => {
                tracing::warn!(job = %job.id, error.cause = %error, "a job was not taken");
                return None;
            }
        };
        if spent {
            return None;
        }
        tracing::info!(job = %job.id, attempt = job.attempts, "a job was taken");
        Some(Arc::new(Self {
            cancelled: host.stopping.child_token(),
            ended: CancellationToken::new(),
            host: Arc::clone(host),
            job: Mutex::new(Told { job, written: true }),
            revision: tokio::sync::Mutex::new(revision),
            said: Notify::new(),
        }))
    }

    pub(super) fn job(&self) -> Job {
        lock(&self.job).job.clone()
    }

    pub(super) fn note(&self, line: String) {
        let mut told = lock(&self.job);
        told.job.note(line);
        told.written = false;
        self.said.notify_one();
    }

    /// Takes what package managers say.
    pub(super) fn say(self: &Arc<Self>) -> Say {
        let progress = Arc::clone(self);
        Arc::new(move |line: &str| progress.note(line.to_owned()))
    }

    pub(super) async fn phase(&self, phase: &str) -> Result<(), Stop> {
        lock(&self.job).job.phase = phase.to_owned();
        self.note(format!("{phase} ..."));
        self.write().await
    }

    /// Goes on only when the store has the job as this worker's at this moment.
    pub(super) async fn fence(&self, phase: &str) -> Result<(), Stop> {
        self.phase(phase).await?;
        for _ in 0..ATTEMPTS {
            if lock(&self.job).written {
                return self.still_ours();
            }
            sleep(TELL).await;
            self.write().await?;
        }
        Err(WorkerError::new(ErrorCode::StoreUnavailable, "The store did not answer").into())
    }

    /// Keeps what an upgrade may have to go back to.
    pub(super) fn remember(&self, server: &ServerRecord, package: &PackageRecord) {
        let mut told = lock(&self.job);
        told.job.server = Some(server.clone());
        told.job.previous = Some(package.clone());
        told.written = false;
    }

    pub(super) fn still_ours(&self) -> Result<(), Stop> {
        if self.cancelled.is_cancelled() { Err(Stop::Left) } else { Ok(()) }
    }

    /// Writes what was said, every now and then, until the work is over.
    pub(super) async fn tell(&self) {
        loop {
            tokio::select! {
                () = self.ended.cancelled() => return,
                () = self.said.notified() => {}
                // A package manager may be silent for a while, and the job another worker's by then.
                () = sleep(HEARTBEAT) => lock(&self.job).written = false,
            }
            let written = lock(&self.job).written;
            if !written && self.write().await.is_err() {
                return;
            }
            tokio::select! {
                () = self.ended.cancelled() => return,
                () = sleep(TELL) => {}
            }
        }
    }

    /// Writes the job as it is here. A job that is another's is left.
    async fn write(&self) -> Result<(), Stop> {
        let mut revision = self.revision.lock().await;
        let job = {
            let mut told = lock(&self.job);
            told.job.updated = Timestamp::now();
            told.written = true;
            told.job.clone()
        };
        match self.host.vault.replace_job(&job, *revision).await {
            Ok(new) => {
                *revision = new;
                Ok(())
            }
            Err(VaultError::Store(StoreError::Conflict)) if self.is_mine(&mut revision).await => Ok(()),
            Err(VaultError::Store(StoreError::Conflict | StoreError::NotFound)) => {
                self.cancelled.cancel();
                Err(Stop::Left)
            }
            Err(error) => {
                // The store may come back before the next step.
                lock(&self.job).written = false;
                tracing::warn!(job = %job.id, error.cause = %error, "a job was not written");
                Ok(())
            }
        }
    }

    /// Whether the store still has the job as this worker's: a write whose answer was lost counts.
    async fn is_mine(&self, revision: &mut Revision) -> bool {
        let (server, id) = {
            let told = lock(&self.job);
            (told.job.server_name.clone(), told.job.id.clone())
        };
        match self.host.vault.job(&server).await {
            Ok(Some(stored)) if stored.value.id == id && stored.value.owner.as_ref() == Some(self.me()) => {
                *revision = stored.revision;
                lock(&self.job).written = false;
                self.said.notify_one();
                true
            }
            _ => false,
        }
    }

    fn me(&self) -> &WorkerId {
        &self.host.worker_id
    }

    /// This worker stops: another one may begin the job at once.
    pub(super) async fn give_back(&self) {
        {
            let mut told = lock(&self.job);
            let job = &mut told.job;
            job.note(format!("{} stops; another worker begins again", self.me()));
            job.state = JobState::Queued;
            job.phase = "queued".to_owned();
            job.owner = None;
            job.attempts = job.attempts.saturating_sub(1);
        }
        let _ = self.write().await;
    }

    /// Whether the job is begun again after this.
    pub(super) fn begins_again(&self, error: &WorkerError) -> bool {
        may_pass(error) && lock(&self.job).job.attempts < limits::INSTALL_ATTEMPTS
    }

    /// Ends the job, or has it begun again later.
    pub(super) async fn finish(&self, result: Result<String, WorkerError>) {
        {
            let mut told = lock(&self.job);
            let job = &mut told.job;
            match result {
                Err(error) if may_pass(&error) && job.attempts < limits::INSTALL_ATTEMPTS => {
                    let pause = limits::INSTALL_RETRY * job.attempts;
                    job.note(format!(
                        "failed: {}; it is begun again in {} s",
                        error.message,
                        pause.as_secs()
                    ));
                    job.state = JobState::Queued;
                    job.phase = "waiting".to_owned();
                    job.owner = None;
                    job.not_before = Some(Timestamp::from_millis(
                        Timestamp::now().millis() + i64::try_from(pause.as_millis()).unwrap_or(0),
                    ));
                    job.error = Some(error);
                    let host = Arc::clone(&self.host);
                    self.host.tasks.spawn(async move {
                        tokio::select! {
                            () = sleep(pause) => host.packages.wake(),
                            () = host.stopping.cancelled() => {}
                        }
                    });
                }
                result => close(job, result),
            }
        }
        for attempt in 0..ATTEMPTS {
            let _ = self.write().await;
            if lock(&self.job).written || self.cancelled.is_cancelled() {
                return;
            }
            sleep(TELL * u32::try_from(attempt + 1).unwrap_or(1)).await;
        }
    }
}

/// Whether the same may succeed in a moment.
fn may_pass(error: &WorkerError) -> bool {
    matches!(
        error.code,
        ErrorCode::RegistryUnavailable
            | ErrorCode::InstallTimeout
            | ErrorCode::StoreUnavailable
            | ErrorCode::Conflict
    )
}

fn close(job: &mut Job, result: Result<String, WorkerError>) {
    let now = Timestamp::now();
    job.active = false;
    job.updated = now;
    job.finished = Some(now);
    // The draft has become the server, or never will.
    job.server = None;
    job.previous = None;
    match result {
        Ok(version) => {
            job.state = JobState::Done;
            job.phase = "done".to_owned();
            job.note(format!("version {version} is installed"));
            job.version = Some(version);
            job.error = None;
        }
        Err(error) => {
            job.state = JobState::Failed;
            job.phase = "failed".to_owned();
            job.note(format!("failed: {}", error.message));
            job.error = Some(error.with("jobId", job.id.as_str()));
        }
    }
}
