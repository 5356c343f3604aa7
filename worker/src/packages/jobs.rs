//! Jobs: what is to be installed or upgraded, taken from the store by one worker at a time.
//!
//! A job is one document, and every step of its worker is a compare-and-set of it: a worker that was taken
//! for lost and goes on all the same finds at its next step that the job is another's, and leaves it. What
//! it made until then harms nobody: locks and installations are named after their contents.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use mcp_shared::{
    error::{ErrorCode, WorkerError},
    ids::{ServerName, UserId, object_id},
    limits,
    metrics::{JobEnd, JobWork},
    package::{Job, JobKind, JobState, PackageRecord, PackageRef, Runtime},
    server::{Isolation, Scaling, ServerRecord, Transport},
    store::Versioned,
    timestamp::Timestamp,
    vault::VaultError,
    worker_api::{ServerStatus, WorkerApi},
};
use secrecy::SecretString;
use tokio::{
    sync::Semaphore,
    time::{Instant, sleep},
};

use super::{folders::Installed, managers::Work};
use crate::{
    host::Host,
    instance::{Instance, Launch},
    logs::Log,
    meters::JobMeter,
};

mod progress;
mod registering;
mod upkeep;

use progress::Progress;

/// How often a record is tried again that others change at the same time.
const ATTEMPTS: usize = 5;

/// Takes jobs until the worker stops. `fleet` tells every worker of what changed.
pub async fn serve(host: Arc<Host>, fleet: Arc<dyn WorkerApi>) {
    let runner = Arc::new(Runner {
        host,
        fleet,
        looked_at: Mutex::default(),
        places: Semaphore::new(limits::INSTALLS),
    });
    let packages = Arc::clone(&runner.host.packages);
    let mut adopted = false;
    loop {
        if !adopted {
            match runner.adopt().await {
                Ok(()) => adopted = true,
                Err(error) => tracing::warn!(error.cause = %error, "packages cannot be read yet"),
            }
        }
        if !runner.host.draining.is_cancelled() {
            match runner.host.vault.jobs(true).await {
                Ok(jobs) => jobs.into_iter().for_each(|job| Runner::consider(&runner, job)),
                Err(error) => tracing::warn!(error.cause = %error, "jobs cannot be read"),
            }
            if packages.sweep_due.swap(false, Ordering::AcqRel) {
                runner.tidy().await;
            }
        }
        tokio::select! {
            () = packages.wake.notified() => {}
            () = sleep(limits::JOB_POLL) => {}
            () = runner.host.stopping.cancelled() => return,
        }
    }
}

struct Runner {
    host: Arc<Host>,
    fleet: Arc<dyn WorkerApi>,
    /// Jobs that this worker is at, or looks at.
    looked_at: Mutex<HashSet<ServerName>>,
    /// Bounds those that it is at.
    places: Semaphore,
}

/// Why a job goes no further here.
enum Stop {
    /// It failed.
    Failed(WorkerError),
    /// It is another worker's now, or this one stops.
    Left,
}

impl From<WorkerError> for Stop {
    fn from(error: WorkerError) -> Self {
        Stop::Failed(error)
    }
}

impl From<VaultError> for Stop {
    fn from(error: VaultError) -> Self {
        Stop::Failed(error.into())
    }
}

impl Runner {
    /// Takes a job if nobody is at it.
    fn consider(runner: &Arc<Self>, job: Versioned<Job>) {
        let name = job.value.server_name.clone();
        let waits = job.value.not_before.is_some_and(|then| then > Timestamp::now());
        let full = runner.places.available_permits() == 0;
        if waits || full || !lock(&runner.looked_at).insert(name.clone()) {
            return;
        }
        let taken = Arc::clone(runner);
        runner.host.tasks.spawn(async move {
            let mut ran = false;
            if taken.is_free(&job.value).await
                && let Ok(_place) = taken.places.try_acquire()
            {
                taken.run(job).await;
                ran = true;
            }
            lock(&taken.looked_at).remove(&name);
            if ran {
                // There may be more than this worker could take at once.
                taken.host.packages.sweep_later();
            }
        });
    }

    /// Whether nobody is at a job: it is queued, or its worker is lost.
    async fn is_free(&self, job: &Job) -> bool {
        match (&job.owner, &self.host.leases) {
            _ if job.state == JobState::Queued => true,
            (Some(owner), Some(leases)) if *owner != self.host.worker_id => {
                leases.outlived(owner, Instant::now() + limits::LEASE_TAKEOVER * 2).await
            }
            // It is this worker's and not under way; or on a single node, of an earlier process.
            _ => true,
        }
    }

    async fn run(&self, job: Versioned<Job>) {
        if job.value.attempts >= limits::INSTALL_ATTEMPTS {
            self.undo(&job.value).await;
        }
        let Some(progress) = Progress::claim(&self.host, job).await else { return };
        let Job { server_name: name, kind, .. } = progress.job();
        let meter = JobMeter::begin(match kind {
            JobKind::Install => JobWork::Install,
            JobKind::Upgrade => JobWork::Upgrade,
        });
        let work = async {
            let done = self.execute(&progress).await;
            progress.ended.cancel();
            done
        };
        // What is said gets into the store while the work goes on.
        let (done, ()) = tokio::join!(work, progress.tell());
        match done {
            Ok(version) => {
                meter.ended(JobEnd::Done);
                progress.finish(Ok(version)).await;
            }
            Err(Stop::Failed(error)) => {
                tracing::warn!(server = %name, %error, "a job failed");
                let again = progress.begins_again(&error);
                if !again {
                    self.undo(&progress.job()).await;
                }
                meter.ended(if again { JobEnd::Again } else { JobEnd::Failed });
                progress.finish(Err(error)).await;
            }
            Err(Stop::Left) => {
                tracing::info!(server = %name, "a job is left to others");
                meter.ended(JobEnd::Left);
                if self.host.stopping.is_cancelled() {
                    progress.give_back().await;
                }
            }
        }
    }

    /// Does what a job says. Returned is the version that is installed in the end.
    async fn execute(&self, progress: &Arc<Progress>) -> Result<String, Stop> {
        let job = progress.job();
        let packages = &self.host.packages;
        let stored = self.host.vault.package(&job.server_name).await?.map(|stored| stored.value);
        let before = match (job.kind, &job.previous) {
            (JobKind::Install, _) => None,
            // An earlier attempt came as far as the switch: what it began with counts.
            (JobKind::Upgrade, Some(previous)) => Some(previous.clone()),
            (JobKind::Upgrade, None) => Some(stored.ok_or_else(|| unknown(&job.server_name))?),
        };
        if job.kind == JobKind::Install && self.is_done(&job).await? {
            // An earlier attempt came this far.
            let record = self.host.vault.package(&job.server_name).await?;
            self.announce(&job.server_name).await?;
            return Ok(record.map(|record| record.value.version).unwrap_or_default());
        }

        progress.phase("resolving").await?;
        let lock = {
            let scratch = packages.folders.scratch().await?;
            let _place = packages.installs.acquire().await.map_err(WorkerError::internal)?;
            let work = Work {
                supervisor: &self.host.supervisor,
                say: progress.say(),
                cancelled: &progress.cancelled,
            };
            let resolved = packages.managers.resolve(&job.spec, scratch.path(), &work).await;
            progress.still_ours()?;
            resolved?
        };
        progress.note(format!("{} {} is what will be installed", lock.name, lock.version));
        for script in &lock.skipped_scripts {
            progress.note(format!("install scripts of {script} are not run"));
        }
        let reference = PackageRef {
            generation: self.host.vault.put_lock(&lock).await?,
            runtime: lock.runtime,
            path: packages.folders.documented(lock.runtime, &lock.name, &job.server_name),
        };

        progress.phase("installing").await?;
        let installed = packages.ensure(&reference, &self.host, progress.say(), &progress.cancelled).await;
        progress.still_ours()?;
        let installed = installed?;

        let old = match (job.kind, job.server.clone()) {
            (_, Some(server)) => server,
            (JobKind::Install, None) => return Err(WorkerError::internal("a job has no server").into()),
            (JobKind::Upgrade, None) => {
                let stored = self.host.vault.server(&job.server_name).await?;
                stored.ok_or_else(|| unknown(&job.server_name))?.value
            }
        };
        let (transport, entry) =
            self.transport(&job, &old.transport, before.as_ref(), &installed, &reference)?;
        let mut server = old.clone();
        server.transport = transport;
        server.package = Some(reference.clone());
        // Of what may run only once, none is started beside the one that runs.
        let alone = job.kind == JobKind::Upgrade && server.scaling == Scaling::Singleton;
        let other = server.package != old.package;
        if server.enabled
            && other
            && !alone
            && (server.isolation == Isolation::Shared || server.secret_env.is_empty())
        {
            progress.phase("starting").await?;
            self.probe(&server, &installed, progress).await?;
        }

        if let Some(before) = &before {
            progress.remember(&old, before);
        }
        progress.fence("registering").await?;
        let mut record = match before.clone() {
            Some(mut record) => {
                record.last_upgraded = Some(Timestamp::now());
                record
            }
            None => new_record(&job, &server),
        };
        record.version.clone_from(&lock.version);
        record.status = "installed".to_owned();
        record.install_path.clone_from(&reference.path);
        record.venv_path = (lock.runtime == Runtime::Python).then(|| reference.path.clone());
        record.generation = Some(reference.generation.clone());
        record.skipped_scripts.clone_from(&lock.skipped_scripts);
        record.entry = entry;
        record.job_id = Some(job.id.clone());
        if let Some(latest) = &record.latest_version {
            record.update_available =
                Some(mcp_shared::package::versions::is_newer(record.runtime, latest, &record.version));
        }
        match job.kind {
            JobKind::Install => self.register(&job, &server, &record).await?,
            JobKind::Upgrade => self.switch(&old, &server, &record).await?,
        }
        // It may have been removed meanwhile as one that nothing needs.
        self.host.vault.put_lock(&lock).await?;
        progress.phase("switching").await?;
        self.announce(&job.server_name).await?;
        if let Some(before) = before.filter(|_| alone && other && server.enabled) {
            self.confirm(&old, &server, &before).await?;
        }
        drop(installed);
        Ok(lock.version)
    }

    /// Waits until a server that could not be tried beside the old one runs, and goes back if it does not.
    async fn confirm(
        &self,
        old: &ServerRecord,
        new: &ServerRecord,
        before: &PackageRecord,
    ) -> Result<(), Stop> {
        // Whose own processes these are, only users can start.
        if new.isolation == Isolation::PerUser {
            return Ok(());
        }
        for _ in 0..ATTEMPTS {
            match self.fleet.start_server(&UserId::default(), &old.name).await {
                Ok(report) if report.status == ServerStatus::Connected => return Ok(()),
                Ok(report) if report.status == ServerStatus::Error => break,
                // Somebody is still at it, or nobody can be asked right now.
                Ok(_) | Err(_) => sleep(Duration::from_secs(1)).await,
            }
        }
        self.switch(new, old, before).await?;
        self.announce(&old.name).await?;
        let text =
            format!("Server {} does not start with the new version; it has the old one again", old.name);
        let error = WorkerError::new(ErrorCode::NotAnMcpServer, text);
        Err(error.with("serverName", old.name.as_str()).into())
    }

    async fn is_done(&self, job: &Job) -> Result<bool, Stop> {
        let Some(server) = &job.server else { return Ok(false) };
        let stored = self.host.vault.server(&server.name).await?;
        let record = self.host.vault.package(&server.name).await?;
        Ok(stored.is_some_and(|stored| stored.value.id == server.id)
            && record.is_some_and(|record| record.value.job_id.as_deref() == Some(&job.id)))
    }

    /// How the new version is started, and the entry point that was found, if one was looked for.
    fn transport(
        &self,
        job: &Job,
        current: &Transport,
        before: Option<&PackageRecord>,
        installed: &Installed,
        reference: &PackageRef,
    ) -> Result<(Transport, Option<String>), WorkerError> {
        let Transport::Stdio { command, args, env } = current else {
            return Ok((current.clone(), None));
        };
        // What an earlier installation found is looked for anew; what somebody wrote stays.
        let found = before.and_then(|record| record.entry.as_ref());
        let given = match found {
            Some(entry) if args.first() == Some(entry) => {
                Transport::Stdio { command: String::new(), args: args[1..].to_vec(), env: env.clone() }
            }
            _ => Transport::Stdio { command: command.clone(), args: args.clone(), env: env.clone() },
        };
        let look = matches!(&given, Transport::Stdio { command, .. } if command.is_empty());
        // A module's command line is the same for every version.
        if before.is_some() && reference.runtime == Runtime::Python && command.ends_with("/bin/python") {
            return Ok((current.clone(), None));
        }
        let managers = &self.host.packages.managers;
        let transport = managers.entry_point(&job.spec, &given, &installed.folder, &reference.path)?;
        let entry = match &transport {
            Transport::Stdio { args, .. } if look && reference.runtime == Runtime::Node => {
                args.first().cloned()
            }
            _ => None,
        };
        Ok((transport, entry))
    }

    /// Starts the server beside whatever runs, asks for its tools, and ends it.
    async fn probe(
        &self,
        server: &ServerRecord,
        installed: &Arc<Installed>,
        progress: &Progress,
    ) -> Result<(), Stop> {
        let Transport::Stdio { command, args, env } = &server.transport else { return Ok(()) };
        let log = Arc::<Log>::default();
        // What the server says gets into the job, which is not encrypted.
        let secrets: Vec<_> = env
            .0
            .iter()
            .filter(|(name, _)| is_secret(name))
            .map(|(_, value)| SecretString::from(value.as_str()))
            .collect();
        let launch = Launch {
            command,
            args,
            env: &env.0,
            package: server.package.as_ref().map(|reference| (reference, Arc::clone(installed))),
            secret_env: Vec::new(),
            known: log.remember(secrets.iter()),
        };
        let host = &self.host;
        let limit = server.startup_limit();
        let started =
            Instance::start(launch, limit, &progress.cancelled, &log, &host.supervisor, &host.tasks).await;
        progress.still_ours()?;
        for line in log.lines() {
            progress.note(line);
        }
        match started {
            Ok(instance) => {
                instance.stop().await;
                progress.note("it listed its tools".to_owned());
                Ok(())
            }
            Err(why) => {
                let text = format!(
                    "Package {} was installed and did not answer as an MCP server: {}",
                    server.package.as_ref().map_or("", |reference| reference.path.as_str()),
                    log.redactor().quote(why)
                );
                progress.note(text.clone());
                let error =
                    WorkerError::new(ErrorCode::NotAnMcpServer, mcp_shared::error::shorten(&text, 500));
                Err(error.with("serverName", server.name.as_str()).with("logs", log.lines()).into())
            }
        }
    }
}

fn new_record(job: &Job, server: &ServerRecord) -> PackageRecord {
    let spec = &job.spec;
    let installed = Timestamp::now();
    PackageRecord {
        name: spec.name.clone(),
        version: String::new(),
        install_path: String::new(),
        venv_path: None,
        status: "installed".to_owned(),
        installed,
        last_upgraded: None,
        mcp_server_id: server.name.clone(),
        enabled: server.enabled,
        runtime: spec.runtime,
        python_module: spec.python_module.clone(),
        python_args: spec.python_args.clone(),
        pip_dependencies: spec.pip_dependencies.clone(),
        pip_index_url: spec.pip_index_url.clone(),
        pip_extra_index_url: spec.pip_extra_index_url.clone(),
        fail_on_warning: spec.fail_on_warning,
        allow_scripts: spec.allow_scripts,
        latest_version: None,
        update_available: None,
        generation: None,
        skipped_scripts: Vec::new(),
        entry: None,
        job_id: None,
        // Lists show it. Of the stores, only MongoDB would give one by itself.
        extra: [("_id".to_owned(), object_id(installed).into())].into_iter().collect(),
    }
}

/// Whether the name of a variable says that its value is nobody's business.
fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    ["KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL", "AUTH"].iter().any(|word| name.contains(word))
}

fn changed() -> WorkerError {
    let text = "The server was changed by others at the same time; try again";
    WorkerError::new(ErrorCode::Conflict, text)
}

fn unknown(server: &ServerName) -> WorkerError {
    let text = format!("Package {server} not found");
    WorkerError::new(ErrorCode::PackageNotFound, text).with("serverName", server.as_str())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
