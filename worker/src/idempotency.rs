//! Calls that their callers named: the first one runs, and what comes of it is what every later one of the
//! same name is answered with.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    idempotency::{CallState, Idempotency, KEPT, NamedCall},
    ids::{IdempotencyKey, UserId},
    json::RawJson,
    store::{Revision, StoreError, Versioned},
    timestamp::Timestamp,
    vault::VaultError,
};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep},
};

use crate::host::Host;

/// How often a name is looked at again that changed hands in between.
const ATTEMPTS: usize = 4;
/// How often it is tried to write down what came of a call.
const WRITES: usize = 10;
/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(500);

/// How often old names are looked for.
const SWEEP: Duration = Duration::from_secs(600);

/// What a named call begins with.
pub enum Begun {
    /// It is the first of its name, and runs.
    First(Claim),
    /// It was done before; this came of it.
    Before(Result<RawJson, WorkerError>),
}

/// The right to run a named call.
pub struct Claim {
    host: Arc<Host>,
    call: NamedCall,
    revision: Revision,
    _running: Running,
}

/// The names of calls that are being looked up or run here, and by how many. Whoever takes a name stands here
/// before it stands in the store.
#[derive(Default, Clone)]
pub struct NamedCalls(Arc<Mutex<HashMap<(UserId, IdempotencyKey), usize>>>);

/// One who looks a name up or runs its call, until this is dropped.
struct Running(NamedCalls, (UserId, IdempotencyKey));

impl NamedCalls {
    fn enter(&self, user: &UserId, key: &IdempotencyKey) -> Running {
        let name = (user.clone(), key.clone());
        *self.names().entry(name.clone()).or_default() += 1;
        Running(self.clone(), name)
    }

    fn names(&self) -> MutexGuard<'_, HashMap<(UserId, IdempotencyKey), usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running {
    /// Whether nobody else here may be running the call.
    fn is_alone(&self) -> bool {
        self.0.names().get(&self.1).is_none_or(|count| *count <= 1)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut names = self.0.names();
        if let Some(count) = names.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                names.remove(&self.1);
            }
        }
    }
}

/// Forgets, now and then, what was kept for long enough, until the worker stops.
pub async fn sweep(host: Arc<Host>) {
    loop {
        tokio::select! {
            () = sleep(SWEEP) => {}
            () = host.stopping.cancelled() => return,
        }
        match host.vault.sweep_named_calls().await {
            Ok(0) => {}
            Ok(forgotten) => tracing::debug!(forgotten, "old named calls are forgotten"),
            Err(error) => tracing::debug!(error.cause = %error, "old named calls are kept"),
        }
    }
}

/// As [`begin`], for a caller who may give up meanwhile: a name that was taken for nobody is given back, so that
/// nobody takes the call for one that was lost.
pub async fn begin_for(host: &Arc<Host>, user: &UserId, name: &Idempotency) -> Result<Begun, WorkerError> {
    let (sender, begun) = oneshot::channel();
    let (means, user, name) = (Arc::clone(host), user.clone(), name.clone());
    host.tasks.spawn(async move {
        let begun = begin(&means, &user, &name).await;
        if let Err(Ok(Begun::First(claim))) = sender.send(begun) {
            let given_up = WorkerError::new(ErrorCode::Cancelled, "The call was cancelled");
            claim.end(&Err(given_up.outcome(Outcome::NotStarted))).await;
        }
    });
    begun.await.map_err(WorkerError::internal)?
}

/// Takes a name for a call, or finds what came of the call that has it. An error: the call must not run.
async fn begin(host: &Arc<Host>, user: &UserId, name: &Idempotency) -> Result<Begun, WorkerError> {
    let call = NamedCall {
        user: user.clone(),
        key: name.key.clone(),
        fingerprint: name.fingerprint.clone(),
        worker: host.worker_id.clone(),
        expires_at: Timestamp::from_millis(
            Timestamp::now().millis() + i64::try_from(KEPT.as_millis()).unwrap_or(i64::MAX),
        ),
        state: CallState::Running,
    };
    let running = host.named_calls.enter(user, &name.key);
    for _ in 0..ATTEMPTS {
        match host.vault.put_named_call(&call, None).await {
            Ok(revision) => {
                return Ok(Begun::First(Claim { host: Arc::clone(host), call, revision, _running: running }));
            }
            Err(VaultError::Store(StoreError::AlreadyExists { .. })) => {}
            Err(error) => return Err(WorkerError::from(error).outcome(Outcome::NotStarted)),
        }
        let stored = host.vault.named_call(user, &name.key).await;
        match stored.map_err(|error| WorkerError::from(error).outcome(Outcome::NotStarted))? {
            None => {}
            Some(stored) if stored.value.expires_at < Timestamp::now() => {
                let forgotten = host.vault.delete_named_call(user, &name.key, stored.revision).await;
                if let Err(error) = forgotten {
                    tracing::debug!(error.cause = %error, "an old name of a call is still there");
                }
            }
            Some(stored) => {
                if let Some(begun) = met(host, stored, name, &running).await? {
                    return Ok(begun);
                }
            }
        }
    }
    Err(in_progress())
}

/// What the call means that has the name; `None`: it has changed.
async fn met(
    host: &Arc<Host>,
    stored: Versioned<NamedCall>,
    name: &Idempotency,
    running: &Running,
) -> Result<Option<Begun>, WorkerError> {
    let Versioned { revision, value } = stored;
    if value.fingerprint != name.fingerprint {
        let text = "The Idempotency-Key names another call: use a new one for other arguments";
        return Err(WorkerError::new(ErrorCode::IdempotencyKeyReused, text).outcome(Outcome::NotStarted));
    }
    match value.state {
        CallState::Done(ended) => Ok(Some(Begun::Before(*ended))),
        CallState::TooLarge => {
            let text = "The call was done, and its result was too large to be kept";
            let error = WorkerError::new(ErrorCode::IdempotencyResultGone, text).outcome(Outcome::Completed);
            Ok(Some(Begun::Before(Err(error))))
        }
        CallState::Running if value.worker == host.worker_id && !running.is_alone() => Err(in_progress()),
        CallState::Running => {
            let lost = match &host.leases {
                // Whoever ran on this machine before is gone, and what this worker could not write down is
                // known to nobody.
                _ if value.worker == host.worker_id => true,
                None => true,
                // One look; whoever comes again finds out.
                Some(leases) => leases.outlived(&value.worker, Instant::now()).await,
            };
            if !lost {
                return Err(in_progress());
            }
            let text = "The worker that ran the call was lost";
            let error = WorkerError::new(ErrorCode::WorkerLost, text).outcome(Outcome::Unknown);
            let ended = NamedCall { state: CallState::Done(Box::new(Err(error.clone()))), ..value };
            match host.vault.put_named_call(&ended, Some(revision)).await {
                Ok(_) => Ok(Some(Begun::Before(Err(error)))),
                Err(VaultError::Store(StoreError::Conflict | StoreError::NotFound)) => Ok(None),
                Err(error) => Err(WorkerError::from(error).outcome(Outcome::NotStarted)),
            }
        }
    }
}

impl Claim {
    /// Writes down what came of the call, or, if nothing was started, gives the name back.
    pub async fn end(mut self, ended: &Result<RawJson, WorkerError>) {
        let not_started = matches!(ended, Err(error) if error.outcome == Some(Outcome::NotStarted));
        if !not_started {
            self.call.state = CallState::Done(Box::new(ended.clone()));
        }
        let vault = &self.host.vault;
        for _ in 0..WRITES {
            let written = if not_started {
                vault.delete_named_call(&self.call.user, &self.call.key, self.revision).await.map(drop)
            } else {
                vault.put_named_call(&self.call, Some(self.revision)).await.map(drop)
            };
            match written {
                Ok(()) => return,
                // Somebody took this worker for lost, and that is what callers are told.
                Err(VaultError::Store(StoreError::Conflict | StoreError::NotFound)) => return,
                Err(error) => {
                    tracing::warn!(error.cause = %error, "what came of a named call is not stored yet")
                }
            }
            tokio::select! {
                () = sleep(PAUSE) => {}
                () = self.host.stopping.cancelled() => {}
            }
        }
        tracing::error!("what came of a named call could not be stored: its name says that it is under way");
    }
}

fn in_progress() -> WorkerError {
    let text = "The call that the Idempotency-Key names is under way";
    WorkerError::new(ErrorCode::IdempotencyInProgress, text)
        .outcome(Outcome::NotStarted)
        .retry_after(Duration::from_secs(1))
}
