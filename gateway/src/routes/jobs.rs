//! `/packages/jobs`: installations under way, and the last one of each server. How they are ordered and
//! waited for.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::{Path, State},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use mcp_shared::{
    audit::Recorded,
    error::{ErrorCode, WorkerError, shorten},
    ids::{RequestId, ServerName},
    limits,
    package::{Job, JobState},
    store::{Revision, StoreError},
    vault::{Vault, VaultError},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    app::{App, Id, wants_events},
    problem::{Problem, json_response},
    routes::package_view,
};

/// How often an order is tried again when somebody else changes the same job.
const ATTEMPTS: usize = 5;
/// How often in a row a job may be unreadable while somebody waits for it.
const BLINKS: usize = 5;
/// How often a silent event stream shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// `GET /packages/jobs`: what they said is in the document of each.
pub async fn list(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let jobs = app.vault.jobs(false).await?;
    let jobs = jobs.iter().map(|job| package_view::job(&job.value, false)).collect::<Result<Vec<_>, _>>()?;
    Ok(json_response(StatusCode::OK, &json!({"success": true, "jobs": jobs})))
}

/// `GET /packages/jobs/:id`, as a document or as events.
pub async fn get(
    State(app): State<Arc<App>>,
    Id(request): Id,
    id: Result<Path<String>, axum::extract::rejection::PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Path(id) = id.map_err(|_| not_found(""))?;
    let server = Job::server_of(&id).ok_or_else(|| not_found(&id))?;
    let job = app.job(&server, &id).await?;
    if wants_events(&headers) {
        return Ok(events(app, request, job, first_line(&headers)));
    }
    Ok(json_response(StatusCode::OK, &document(&job)?))
}

/// The answer to somebody who does not wait.
pub fn accepted(job: &Job) -> Result<Response, Problem> {
    let body = json!({"success": true, "jobId": job.id, "job": package_view::job(job, true)?});
    let mut response = json_response(StatusCode::ACCEPTED, &body);
    let location = format!("/packages/jobs/{}", job.id.replace(' ', "%20").replace('/', "%2F"));
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    let applied = HeaderValue::from_static("respond-async");
    response.headers_mut().insert(HeaderName::from_static("preference-applied"), applied);
    Ok(response)
}

/// Whether the caller does not want to wait (`Prefer: respond-async`).
pub fn respond_async(headers: &HeaderMap) -> bool {
    headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok()).any(|prefer| {
        prefer.split(',').any(|one| {
            one.split(';').next().is_some_and(|word| word.trim().eq_ignore_ascii_case("respond-async"))
        })
    })
}

impl App {
    /// Orders a job, unless one of the same server is under way, and tells the workers. It is carried
    /// through when the caller goes away meanwhile.
    pub async fn order(&self, recorded: &Recorded, job: Job) -> Result<Job, Problem> {
        let (vault, worker, recorded) = (self.vault.clone(), Arc::clone(&self.worker), recorded.share());
        let step = self.changes.spawn(async move {
            put(&vault, &job).await?;
            if let Err(error) = worker.wake().await {
                tracing::debug!(%error, job = %job.id, "workers will find a job by themselves");
            }
            drop(recorded);
            Ok(job)
        });
        step.await.map_err(WorkerError::internal)?
    }

    /// Refuses what cannot be done while a server is installed or upgraded. Returns the revision of its
    /// last job, if it had one.
    pub async fn no_job(&self, server: &ServerName) -> Result<Option<Revision>, Problem> {
        match self.vault.job(server).await? {
            Some(job) if job.value.active => Err(in_progress(&job.value)),
            job => Ok(job.map(|job| job.revision)),
        }
    }

    /// One job, as it is now.
    async fn job(&self, server: &ServerName, id: &str) -> Result<Job, Problem> {
        match self.vault.job(server).await? {
            Some(job) if job.value.id == id => Ok(job.value),
            _ => Err(not_found(id)),
        }
    }

    /// Waits for the end of a job. `Err` is why it failed, or why nobody waits any longer.
    pub async fn ended(&self, job: Job) -> Result<Job, Problem> {
        let id = job.id.clone();
        let mut watch = Watch::new(job);
        let job = loop {
            match watch.step(self).await {
                Step::Changed | Step::Same if watch.job.state.is_over() => break watch.job,
                Step::Changed | Step::Same => {}
                Step::Gone => return self.outcome_of_gone(watch.job).await,
                Step::Failed(problem) => return Err(problem.with("jobId", &id)),
                Step::Over => {
                    let error = WorkerError::new(
                        ErrorCode::InstallTimeout,
                        "The installation is not over yet; it goes on, and its job shows how far it is",
                    );
                    return Err(error.with("jobId", id).into());
                }
                Step::Stopping => {
                    let error = WorkerError::new(
                        ErrorCode::ShuttingDown,
                        "This process is stopping; the installation goes on, and its job shows how far it is",
                    );
                    return Err(error.with("jobId", id).into());
                }
            }
        };
        match (job.state, &job.error) {
            (JobState::Done, _) => Ok(job),
            (_, Some(error)) => Err(error.clone().with("jobId", id).into()),
            (_, None) => Err(WorkerError::internal("a job failed and does not say why").into()),
        }
    }

    /// A job whose place another one took was over before; whether it did what it should, its package says.
    async fn outcome_of_gone(&self, mut job: Job) -> Result<Job, Problem> {
        let package = self.vault.package(&job.server_name).await?;
        match package.filter(|package| package.value.job_id.as_ref() == Some(&job.id)) {
            Some(package) => {
                job.version = Some(package.value.version);
                job.state = JobState::Done;
                Ok(job)
            }
            None => Err(not_found(&job.id)),
        }
    }
}

/// Somebody's look at a job that goes on.
struct Watch {
    job: Job,
    until: Instant,
    blinks: usize,
    first: bool,
}

/// What the next look showed.
enum Step {
    /// Something new.
    Changed,
    /// Nothing new.
    Same,
    /// The job is not there any more.
    Gone,
    /// The store does not say, again and again.
    Failed(Problem),
    /// Nobody waits any longer than this.
    Over,
    /// This program stops.
    Stopping,
}

impl Watch {
    fn new(job: Job) -> Self {
        Self { job, until: Instant::now() + limits::INSTALL_WAIT, blinks: 0, first: true }
    }

    /// Looks again, after a pause.
    async fn step(&mut self, app: &App) -> Step {
        // What is known already is looked at first.
        if std::mem::take(&mut self.first) {
            return Step::Changed;
        }
        if Instant::now() >= self.until {
            return Step::Over;
        }
        tokio::select! {
            () = sleep(limits::JOB_WATCH) => {}
            () = app.stop.cancelled() => return Step::Stopping,
        }
        match app.vault.job(&self.job.server_name).await {
            Ok(Some(found)) if found.value.id == self.job.id => {
                self.blinks = 0;
                let changed = found.value != self.job;
                self.job = found.value;
                if changed { Step::Changed } else { Step::Same }
            }
            Ok(_) => Step::Gone,
            // The job goes on while the store is away for a moment.
            Err(VaultError::Store(StoreError::Unavailable { .. })) if self.blinks < BLINKS => {
                self.blinks += 1;
                Step::Same
            }
            Err(error) => Step::Failed(error.into()),
        }
    }
}

/// Writes a job in the place of one that is over, or where none is.
async fn put(vault: &Vault, job: &Job) -> Result<(), Problem> {
    for _ in 0..ATTEMPTS {
        let written = match vault.job(&job.server_name).await? {
            Some(other) if other.value.active => return Err(in_progress(&other.value)),
            Some(over) => vault.replace_job(job, over.revision).await,
            None => vault.insert_job(job).await,
        };
        match written {
            Ok(_) => return Ok(()),
            Err(VaultError::Store(
                StoreError::Conflict | StoreError::NotFound | StoreError::AlreadyExists { .. },
            )) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(WorkerError::from(StoreError::Conflict).into())
}

/// What is said, until its end: `log` for each line, `phase`, and `done` or `failed`.
fn events(app: Arc<App>, request: RequestId, job: Job, first_line: u64) -> Response {
    struct Telling {
        app: Arc<App>,
        request: RequestId,
        watch: Watch,
        line: u64,
        phase: String,
    }
    let watch = Watch::new(job);
    let telling = Telling { app, request, watch, line: first_line, phase: String::new() };
    let batches = stream::unfold(Some(telling), async |telling| {
        let mut telling = telling?;
        let mut batch = Vec::new();
        match telling.watch.step(&telling.app).await {
            Step::Changed => {
                let job = &telling.watch.job;
                for (number, line) in (job.log_dropped..).zip(&job.log) {
                    if number >= telling.line {
                        let event = Event::default().event("log").id(number.to_string());
                        batch.push(event.data(one_line(line)));
                        telling.line = number + 1;
                    }
                }
                if job.phase != telling.phase {
                    telling.phase.clone_from(&job.phase);
                    batch.push(Event::default().event("phase").data(one_line(&job.phase)));
                }
                if job.state.is_over() {
                    let name = if job.state == JobState::Done { "done" } else { "failed" };
                    // A document that cannot be written has been logged; the state alone is worth saying.
                    let body = document(job).unwrap_or_else(|_| json!({"success": true}));
                    batch.push(Event::default().event(name).data(body.to_string()));
                    return Some((batch, None));
                }
            }
            Step::Same => {}
            Step::Gone => {
                let gone = not_found(&telling.watch.job.id).envelope(&telling.request);
                batch.push(Event::default().event("failed").data(gone.to_string()));
                return Some((batch, None));
            }
            // The client asks again, and says which line it has seen.
            Step::Failed(_) | Step::Over | Step::Stopping => return None,
        }
        Some((batch, Some(telling)))
    });
    let events = batches.flat_map(stream::iter).map(Ok::<_, Infallible>);
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// The line behind the one that a client has seen last, by its `Last-Event-ID`.
fn first_line(headers: &HeaderMap) -> u64 {
    let seen = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse::<u64>().ok());
    seen.map_or(0, |seen| seen.saturating_add(1))
}

/// The data of an event may not have returns.
fn one_line(text: &str) -> String {
    shorten(text, limits::JOB_LINE_BYTES)
}

fn document(job: &Job) -> Result<Value, Problem> {
    Ok(json!({"success": true, "job": package_view::job(job, true)?}))
}

fn in_progress(job: &Job) -> Problem {
    let text = format!("{} is being installed or upgraded", shorten(job.server_name.as_str(), 64));
    WorkerError::new(ErrorCode::InstallInProgress, text)
        .with("serverName", job.server_name.as_str())
        .with("jobId", job.id.as_str())
        .retry_after(limits::INSTALL_RETRY)
        .into()
}

fn not_found(id: &str) -> Problem {
    Problem::new(ErrorCode::JobNotFound, format!("Job {} not found", shorten(id, 128)))
}
