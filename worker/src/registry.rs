//! The servers that this worker knows: each one's record as stored, and the groups that run it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak},
    time::Duration,
};

use mcp_shared::{
    builtin,
    error::{ErrorCode, Outcome, WorkerError},
    google::GoogleFlow,
    ids::{SecretName, ServerName, ToolName, UserId},
    json::RawJson,
    limits,
    metrics::{Carrier, Status},
    server::{Isolation, Scaling, ServerRecord},
    store::StoredTools,
    timestamp::Timestamp,
    worker_api::{ServerReport, ServerStatus},
};

use tokio::time::Instant;

use self::annotations::Repeatable;
use crate::{
    group::{CurrentRecord, Group, current},
    host::Host,
    logs::Log,
    packages::managers::Say,
};

mod annotations;
mod owning;
mod pins;

/// How often a new version is tried that does not start while the old one serves.
const BESIDE_ATTEMPTS: usize = 3;
/// The pause before it is tried again.
const BESIDE_PAUSE: Duration = Duration::from_secs(2);

/// One server.
pub struct Entry {
    /// Its name.
    pub name: ServerName,
    /// Its record, replaced when it changes.
    pub record: Arc<CurrentRecord>,
    groups: Mutex<Groups>,
    listing: Mutex<Listing>,
    log: Arc<Log>,
    /// Held while a listing is compared with the one before.
    pinning: tokio::sync::Mutex<()>,
    /// When it was last said that its tools changed.
    said_changed: Mutex<Option<Instant>>,
    /// Held while processes are replaced. Calls that find a retired group wait for it.
    changing: tokio::sync::Mutex<()>,
}

/// What everybody sees as a server's tools.
struct Listing {
    tools: Option<RawJson>,
    /// When they were listed here; `None`: they are what the store had.
    listed: Option<Timestamp>,
    /// Whose they are; `None`: everybody's, or nobody has listed them here.
    of: Option<UserId>,
    /// What they say of themselves.
    repeatable: Repeatable,
}

/// What a server does at a worker, as it is counted.
pub struct Standing {
    /// The best state of what runs, or why nothing does.
    pub status: Status,
    /// Processes or connections, those that are on their way out among them.
    pub instances: usize,
    /// Which of the two.
    pub carrier: Carrier,
}

#[derive(Default)]
struct Groups {
    removed: bool,
    shared: Option<Arc<Group>>,
    users: HashMap<UserId, Arc<Group>>,
    /// Old versions that finish their calls.
    leaving: Vec<Arc<Group>>,
}

impl Entry {
    /// A server that does not run yet. `tools`: what it listed the last time.
    pub fn new(record: ServerRecord, tools: Option<RawJson>) -> Arc<Self> {
        Arc::new(Self {
            name: record.name.clone(),
            record: Arc::new(RwLock::new(Arc::new(record))),
            groups: Mutex::default(),
            listing: Mutex::new(Listing {
                repeatable: Repeatable::of(tools.as_ref()),
                tools,
                listed: None,
                of: None,
            }),
            log: Arc::default(),
            pinning: tokio::sync::Mutex::new(()),
            said_changed: Mutex::new(None),
            changing: tokio::sync::Mutex::new(()),
        })
    }

    /// A server that is part of the program, with the tools that it has here.
    pub fn builtin(record: ServerRecord, tools: RawJson) -> Arc<Self> {
        let entry = Self::new(record, Some(tools));
        lock(&entry.listing).listed = Some(Timestamp::now());
        entry
    }

    /// Whether it is part of the program: it is as it is, whatever is stored.
    pub fn is_builtin(&self) -> bool {
        builtin::is_builtin(&self.name)
    }

    /// The processes that serve a user. They need not run yet.
    pub fn group(self: &Arc<Self>, user: &UserId, host: &Arc<Host>) -> Result<Arc<Group>, WorkerError> {
        let mut groups = self.groups();
        // Read under the lock under which it is replaced: a group always fits its record.
        let record = current(&self.record);
        self.check_enabled(&record)?;
        if groups.removed {
            return Err(WorkerError::server_not_found(&self.name).outcome(Outcome::NotStarted));
        }
        if !record.is_per_user() {
            return Ok(Arc::clone(groups.shared.get_or_insert_with(|| self.new_group(None, host))));
        }
        if let Some(group) = groups.users.get(user) {
            return Ok(Arc::clone(group));
        }
        let limit = if record.is_remote() { limits::REMOTE_USERS } else { limits::PER_USER_PROCESSES };
        if groups.users.len() >= limit {
            // Users whose process sleeps make room.
            groups.users.retain(|_, group| !group.dismiss());
        }
        if groups.users.len() >= limit {
            let text = format!("Server {} runs for as many users as it may", self.name);
            return Err(WorkerError::new(ErrorCode::Overloaded, text)
                .outcome(Outcome::NotStarted)
                .retry_after(Duration::from_secs(10)));
        }
        let group = self.new_group(Some(user.clone()), host);
        groups.users.insert(user.clone(), Arc::clone(&group));
        Ok(group)
    }

    /// Refuses what a disabled server cannot do.
    pub fn check_enabled(&self, record: &ServerRecord) -> Result<(), WorkerError> {
        if record.enabled {
            return Ok(());
        }
        let text = format!("Server {} is disabled", self.name);
        Err(WorkerError::new(ErrorCode::ServerDisabled, text)
            .with("serverName", self.name.as_str())
            .outcome(Outcome::NotStarted))
    }

    /// Starts what runs whether or not somebody calls: a shared server that is enabled.
    pub fn want_running(self: &Arc<Self>, host: &Arc<Host>) {
        let record = current(&self.record);
        if record.enabled
            && !record.is_per_user()
            && let Ok(group) = self.group(&UserId::default(), host)
        {
            group.want_running();
        }
    }

    /// Waits until a change of processes that is under way is over.
    pub async fn settled(&self) {
        drop(self.changing.lock().await);
    }

    /// Brings the server in line with what is stored now. Returns when no process of the old kind is
    /// left. Changes that come together are applied one after the other, each as found in the store, so
    /// that the newest stands at the end. A change that has begun is carried through, whether or not
    /// whoever asked for it still waits.
    pub async fn refresh(self: &Arc<Self>, host: &Arc<Host>) -> Result<(), WorkerError> {
        let (entry, means) = (Arc::clone(self), Arc::clone(host));
        let change = host.tasks.spawn(async move { entry.refresh_now(&means).await });
        change.await.map_err(WorkerError::internal)?
    }

    async fn refresh_now(self: &Arc<Self>, host: &Arc<Host>) -> Result<(), WorkerError> {
        let _changing = self.changing.lock().await;
        let stored = host.vault.server(&self.name).await?.map(|stored| stored.value);
        let old = current(&self.record);
        // A name that was deleted and registered again is another server, which has nothing of this
        // one: no process, no log, no tools and above all no secrets.
        let stored = stored.filter(|new| new.id == old.id);
        let keep = match &stored {
            None => {
                self.groups().removed = true;
                host.secrets.forget_server(&self.name);
                false
            }
            Some(new) => {
                // What is read of users' secrets depends on it.
                if GoogleFlow::of(new).is_some() != GoogleFlow::of(&old).is_some() {
                    host.secrets.forget_server(&self.name);
                }
                new.enabled && !old.needs_restart(new)
            }
        };
        let other_package =
            stored.as_ref().is_none_or(|new| new.package != old.package) && old.package.is_some();
        let upgraded = stored.as_ref().is_some_and(|new| new.enabled && new.package != old.package);
        let beside = stored.as_ref().is_some_and(|new| may_run_beside(&old, new)) && self.runs_shared();
        if let Some(new) = &stored
            && !keep
            && !beside
            && self.load().is_some()
        {
            self.install_ahead(new, host).await;
        }
        if let Some(new) = stored {
            let _groups = self.groups();
            *self.record.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(new);
        }
        let again = host.leases.is_none() || self.runs_shared();
        if beside {
            self.replace_beside(host).await;
        } else if !keep {
            let next = current(&self.record);
            let again = again && next.enabled && !next.is_per_user();
            let same_lease =
                |group: &Group| again && group.user.is_none() && next.scaling == Scaling::Singleton;
            // An upgrade is no reason to cut a call short that takes no longer than most may.
            let drain = if upgraded { limits::TOOL_TIMEOUT } else { limits::STOP_DRAIN };
            self.retire(|_| true, drain, same_lease).await;
        }
        if other_package {
            host.packages.sweep_later();
        }
        // In a cluster it may run elsewhere, or be placed by somebody who knows better.
        if again {
            self.want_running(host);
        }
        host.note_change();
        Ok(())
    }

    /// Starts the new version beside the old, and lets the old one finish its calls when the new one is up.
    async fn replace_beside(self: &Arc<Self>, host: &Arc<Host>) {
        let next = self.new_group(None, host);
        let limit = current(&self.record).startup_limit() + limits::INSTALL_TIMEOUT;
        let mut up = false;
        // It was tried where it was installed. What is in its way here may pass, and the old one serves.
        for _ in 0..BESIDE_ATTEMPTS {
            let started = tokio::select! {
                started = next.ensure_running(Instant::now() + limit, true) => started,
                () = host.stopping.cancelled() => {
                    next.retire(Duration::ZERO).await;
                    return;
                }
            };
            up = started.is_ok();
            if up {
                break;
            }
            tokio::time::sleep(BESIDE_PAUSE).await;
        }
        let old = if up || host.leases.is_none() {
            self.groups().shared.replace(next)
        } else {
            // Other workers may have it: nothing of it is owned here until somebody asks for it.
            next.retire(Duration::ZERO).await;
            self.groups().shared.take()
        };
        if !up {
            tracing::error!(server = %self.name, "the new version of a package does not start on this worker");
        }
        let Some(old) = old else { return };
        self.groups().leaving.push(Arc::clone(&old));
        let (entry, host) = (Arc::clone(self), Arc::clone(host));
        let tasks = host.tasks.clone();
        tasks.spawn(async move {
            old.retire(limits::TOOL_TIMEOUT_MAX).await;
            old.rest().await;
            entry.groups().leaving.retain(|group| !Arc::ptr_eq(group, &old));
            host.packages.sweep_later();
            host.note_change();
        });
    }

    /// Has the package of a server's next process installed while the old one still serves.
    async fn install_ahead(&self, new: &ServerRecord, host: &Arc<Host>) {
        let Some(reference) = new.package.as_ref().filter(|_| new.enabled) else { return };
        let log = Arc::clone(&self.log);
        let say: Say = Arc::new(move |line| log.note(line));
        if let Err(error) = host.packages.ensure(reference, host, say, &host.stopping).await {
            self.log.note(&format!("its package cannot be installed here: {}", error.message));
        }
    }

    /// Whether the server is gone from the store. There may be a new one of the same name.
    pub fn is_removed(&self) -> bool {
        self.groups().removed
    }

    /// Takes in that a user's secret has changed: a process that has it in its environment goes.
    pub async fn secret_changed(self: &Arc<Self>, user: &UserId, name: &SecretName, host: &Host) {
        let record = current(&self.record);
        if record.isolation == Isolation::PerUser && record.secret_env.values().any(|secret| secret == name) {
            self.stop(Some(user.clone()), host).await;
        }
    }

    /// Ends all processes and starts again what runs whether or not somebody calls.
    pub async fn restart(self: &Arc<Self>, host: &Arc<Host>) {
        let (entry, means) = (Arc::clone(self), Arc::clone(host));
        let restart = host.tasks.spawn(async move {
            let _changing = entry.changing.lock().await;
            let again = current(&entry.record).enabled;
            entry.retire(|_| true, limits::STOP_DRAIN, |group| again && group.user.is_none()).await;
            entry.want_running(&means);
        });
        if let Err(error) = restart.await {
            tracing::error!(server = %self.name, error.cause = %error, "processes were not restarted in order");
        }
    }

    /// Ends all processes, or those of one user, to be started again by whoever wants them.
    pub async fn stop(self: &Arc<Self>, user: Option<UserId>, host: &Host) {
        let entry = Arc::clone(self);
        let stop = host.tasks.spawn(async move {
            let _changing = entry.changing.lock().await;
            entry.retire(|group| user.is_none() || group.user == user, limits::STOP_DRAIN, |_| false).await;
        });
        if let Err(error) = stop.await {
            tracing::error!(server = %self.name, error.cause = %error, "processes were not stopped in order");
        }
    }

    /// What it does here, in short.
    pub fn standing(&self) -> Standing {
        let record = current(&self.record);
        let groups = self.groups();
        let (mut best, mut instances) = (None, 0);
        for group in groups.shared.iter().chain(groups.users.values()).chain(&groups.leaving) {
            let (status, running) = group.standing();
            instances += running;
            // It is neither a process nor a connection to anywhere.
            if self.is_builtin() {
                instances = 0;
            }
            // As in its report: what merely sleeps says nothing.
            best = best.max(Some(status).filter(|status| *status != ServerStatus::Disconnected));
        }
        let status = match best {
            _ if !record.enabled => Status::Disabled,
            Some(ServerStatus::Error) => Status::Error,
            None | Some(ServerStatus::Disconnected) => Status::Disconnected,
            Some(ServerStatus::Connecting) => Status::Connecting,
            Some(ServerStatus::Connected) => Status::Connected,
        };
        Standing { status, instances, carrier: Carrier::of(record.is_remote()) }
    }

    /// What is known about it.
    pub fn report(&self) -> ServerReport {
        let groups = self.groups();
        let mut statuses = Vec::new();
        let mut instances = Vec::new();
        for group in groups.shared.iter().chain(groups.users.values()) {
            let (status, reports) = group.report();
            statuses.push(status);
            instances.extend(reports);
        }
        // The best of those that run or should; what merely sleeps says nothing.
        let awake = statuses.into_iter().filter(|status| *status != ServerStatus::Disconnected);
        let status = match awake.max().unwrap_or(ServerStatus::Disconnected) {
            // It takes calls from the first moment on.
            ServerStatus::Connecting | ServerStatus::Disconnected if self.is_builtin() => {
                ServerStatus::Connected
            }
            status => status,
        };
        let (tools, listed) = {
            let listing = lock(&self.listing);
            (listing.tools.clone(), listing.listed)
        };
        ServerReport { name: self.name.clone(), status, tools, logs: self.log.lines(), instances, listed }
    }

    /// Retires the groups that match. They stay in their place until their processes are gone, so that
    /// nobody starts another beside one that may run only once. Their leases go back unless `kept` says
    /// that the next group of the name is about to be made.
    async fn retire(&self, matches: impl Fn(&Group) -> bool, drain: Duration, kept: impl Fn(&Group) -> bool) {
        let retiring: Vec<_> = {
            let groups = self.groups();
            groups
                .shared
                .iter()
                .chain(groups.users.values())
                .chain(&groups.leaving)
                .filter(|group| matches(group))
                .cloned()
                .collect()
        };
        for group in retiring.iter().filter(|group| kept(group)) {
            group.hand_lease_on();
        }
        let retire = retiring.iter().map(async |group| {
            group.retire(drain).await;
            group.rest().await;
        });
        futures_util::future::join_all(retire).await;
        // Groups that were made meanwhile are of the new kind, and stay.
        let retired = |group: &Arc<Group>| retiring.iter().any(|one| Arc::ptr_eq(one, group));
        let mut groups = self.groups();
        groups.shared = groups.shared.take().filter(|group| !retired(group));
        groups.users.retain(|_, group| !retired(group));
    }

    fn new_group(self: &Arc<Self>, user: Option<UserId>, host: &Arc<Host>) -> Arc<Group> {
        let entry = Arc::downgrade(self);
        let on_tools = {
            let (user, host) = (user.clone(), Arc::downgrade(host));
            Box::new(move |tools: &RawJson| {
                if let (Some(entry), Some(host)) = (Weak::upgrade(&entry), Weak::upgrade(&host)) {
                    entry.listed(user.as_ref(), tools, &host);
                }
            })
        };
        Group::new(user, Arc::clone(&self.record), Arc::clone(host), Arc::clone(&self.log), on_tools)
    }

    /// Keeps a listing, so that it can be shown when nothing runs. What everybody sees is the listing
    /// of the shared server, or of the first user who is connected here, as it is now.
    fn listed(self: &Arc<Self>, user: Option<&UserId>, tools: &RawJson, host: &Arc<Host>) {
        if self.is_builtin() {
            // They were known before, and every worker has its own: with a search engine or without.
            return;
        }
        let mut keep = Vec::new();
        {
            let mut listing = lock(&self.listing);
            if user.is_none() || listing.of.is_none() || listing.of.as_ref() == user {
                listing.of = user.cloned();
                listing.listed = Some(Timestamp::now());
                if listing.tools.as_ref() != Some(tools) {
                    listing.repeatable = Repeatable::of(Some(tools));
                    listing.tools = Some(tools.clone());
                    keep.push(None);
                }
            }
        }
        if let Some(user) = user {
            keep.push(Some(user.clone()));
        }
        let (vault, server, tools) = (host.vault.clone(), self.name.clone(), tools.clone());
        let (entry, means, of) = (Arc::clone(self), Arc::clone(host), user.cloned());
        host.tasks.spawn(async move {
            entry.pin(of.as_ref(), &tools, &means).await;
            for user in keep {
                let Ok(text) = std::str::from_utf8(tools.as_bytes()) else { return };
                let stored = StoredTools { server: server.clone(), user, tools: text.to_owned() };
                if let Err(error) = vault.put_tools(&stored).await {
                    tracing::warn!(server = %server, error.cause = %error, "the listed tools were not stored");
                }
            }
        });
    }

    /// Whether a call of a tool may be made again when nobody knows what became of it: an administrator trusts
    /// what the server says of its tools, and it says so.
    pub fn is_repeatable(&self, tool: &ToolName) -> bool {
        current(&self.record).trust_annotations && lock(&self.listing).repeatable.contains(tool)
    }

    fn groups(&self) -> MutexGuard<'_, Groups> {
        lock(&self.groups)
    }
}

/// Whether the only thing that keeps old processes from staying is another version of their package, and
/// both versions may run at the same time.
fn may_run_beside(old: &ServerRecord, new: &ServerRecord) -> bool {
    let alike = |record: &ServerRecord| {
        record.enabled && !record.is_per_user() && record.scaling == Scaling::Replicated
    };
    alike(old) && alike(new) && new.package.is_some() && old.package != new.package
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
