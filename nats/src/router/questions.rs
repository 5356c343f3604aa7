//! Questions that are no tool calls: start, report, invalidate. The worker gives signs of life while it
//! works on one.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use mcp_shared::{
    error::{ErrorCode, WorkerError},
    ids::{ServerName, UserId, WorkerId},
    limits,
    package::{Latest, LatestQuery},
    remote::{RemoteAnswer, RemoteAsk},
    worker_api::{ServerReport, ServerStatus},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};

use super::{Inner, lock};
use crate::{
    caller::{Wish, bus_unavailable, no_worker},
    frames::{Assembled, Assembly},
    wire::{Ask, CallId, Frame, ToRouter, ToWorker},
};

/// How long a worker may be silent about a question.
const PATIENCE: Duration = Duration::from_millis(3_500);
/// How long a question that only reads may take.
const READING: Duration = Duration::from_secs(5);
/// Bytes of an answer.
const ANSWER_BYTES: usize = 64 * 1024 * 1024;
/// Messages about one question that may wait to be read.
const WAITING: usize = 64;

/// What was heard about a question.
#[derive(Debug)]
pub(super) enum Heard {
    Alive,
    Part(Frame, Bytes),
    Failed(WorkerError),
    Nobody,
}

/// Why a question has no answer.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// The worker says why.
    Failed(WorkerError),
    /// Nobody has its subject.
    Gone,
    /// It said nothing (more) in time.
    Silent,
}

/// How often and how long a question is asked.
pub(super) struct Manners {
    /// Asked again after this long without a sign, within `first`.
    pub again: Option<Duration>,
    /// How long the first sign may take.
    pub first: Duration,
    /// How long all of it may take.
    pub whole: Duration,
}

const READ: Manners = Manners { again: None, first: PATIENCE, whole: READING };

impl Inner {
    /// Puts a question to one worker.
    pub(super) async fn question(
        self: &Arc<Self>,
        worker: &WorkerId,
        ask: &Ask,
        manners: &Manners,
    ) -> Result<Bytes, Unanswered> {
        let id = self.ids.next();
        let (heard, mut answers) = mpsc::channel(WAITING);
        lock(&self.questions).insert(id, heard);
        let _listed = Listed { inner: self, id };
        let message = ToWorker::Ask(ask.clone());
        let end = Instant::now() + manners.whole;
        let mut patience = Instant::now() + manners.first;
        let mut again = Instant::now();
        let mut signed = false;
        let mut assembly = Assembly::default();
        loop {
            if !signed && Instant::now() >= again {
                self.tell(worker, id, &message, &[]).await.map_err(|_| Unanswered::Silent)?;
                again = manners.again.map_or(end, |again| Instant::now() + again);
            }
            let until = if signed { patience } else { patience.min(again) }.min(end);
            let heard = match timeout_at(until, answers.recv()).await {
                Ok(Some(heard)) => heard,
                Ok(None) => return Err(Unanswered::Silent),
                Err(_) if Instant::now() >= patience.min(end) => return Err(Unanswered::Silent),
                Err(_) => continue,
            };
            signed = true;
            patience = Instant::now() + PATIENCE;
            match heard {
                Heard::Alive => {}
                Heard::Nobody => return Err(Unanswered::Gone),
                Heard::Failed(error) => return Err(Unanswered::Failed(error)),
                Heard::Part(frame, part) => match assembly.take(&frame, part, ANSWER_BYTES) {
                    Assembled::Whole(answer) => return Ok(answer),
                    Assembled::Partly => {
                        let _ = self.tell(worker, id, &ToWorker::Credit(1), &[]).await;
                    }
                    Assembled::Broken | Assembled::TooLarge => return Err(Unanswered::Silent),
                },
            }
        }
    }

    /// Passes on what was said about a question; says whether there is one of that id.
    pub(super) fn heard_about_question(&self, id: CallId, said: &ToRouter, body: &Bytes) -> bool {
        let questions = lock(&self.questions);
        let Some(question) = questions.get(&id) else { return false };
        let heard = match said {
            ToRouter::Answer(frame) => Heard::Part(frame.clone(), body.clone()),
            ToRouter::Failed(error) => Heard::Failed(error.clone()),
            _ => Heard::Alive,
        };
        // One that is full has signs enough; a part that is lost makes it fail in time.
        let _ = question.try_send(heard);
        true
    }

    pub(super) fn nobody_for_question(&self, id: CallId) -> bool {
        let questions = lock(&self.questions);
        let Some(question) = questions.get(&id) else { return false };
        let _ = question.try_send(Heard::Nobody);
        true
    }

    /// Sees to it that a server runs somewhere.
    pub(super) async fn start(
        self: &Arc<Self>,
        user: &UserId,
        server: &ServerName,
    ) -> Result<ServerReport, WorkerError> {
        let ask = Ask::Start { user: user.clone(), server: server.clone() };
        let mut wish = Wish::default();
        let manners = Manners { again: None, first: PATIENCE, whole: 2 * limits::STARTUP_TIMEOUT_MAX };
        let mut refused = None;
        for _ in 0..5 {
            if !self.is_up() {
                return Err(bus_unavailable());
            }
            let choice = self.fleet().choose(self.bus.now(), server, user, &wish, |end| self.draw(end));
            let Some(choice) = choice else { break };
            let worker = choice.worker.clone();
            match self.question(&worker, &ask, &manners).await {
                Ok(answer) => {
                    let report = serde_json::from_slice(&answer).map_err(WorkerError::internal)?;
                    return Ok(self.joined(server, report).await);
                }
                Err(Unanswered::Failed(error)) => {
                    // The owner that a lease names is the one to ask.
                    match error.details.get("workerId").and_then(|owner| owner.as_str()) {
                        Some(owner) if wish.owner.is_none() => {
                            wish.owner = Some(WorkerId::from_stored(owner));
                        }
                        _ => return Err(error),
                    }
                    refused = Some(error);
                }
                Err(Unanswered::Gone) => {
                    self.fleet_mut().silent(&worker);
                    wish.owner = None;
                }
                Err(Unanswered::Silent) => {
                    wish.avoid.push(worker);
                    wish.owner = None;
                }
            }
        }
        Err(refused.unwrap_or_else(no_worker))
    }

    /// Stops a server wherever it runs, and starts it again.
    pub(super) async fn restart(
        self: &Arc<Self>,
        user: &UserId,
        server: &ServerName,
    ) -> Result<ServerReport, WorkerError> {
        let owners = self.fleet().owners(self.bus.now(), server);
        let ask = Ask::Restart { user: user.clone(), server: server.clone() };
        let manners = Manners { again: None, first: PATIENCE, whole: 2 * limits::STARTUP_TIMEOUT_MAX };
        let answers = join_all(owners.iter().map(|owner| self.question(owner, &ask, &manners))).await;
        for answer in answers {
            if let Err(Unanswered::Failed(error)) = answer {
                return Err(error);
            }
        }
        self.start(user, server).await
    }

    /// What all workers know about one server.
    pub(super) async fn report(self: &Arc<Self>, server: &ServerName) -> Result<ServerReport, WorkerError> {
        let ask = Ask::Report { server: server.clone() };
        let answers = self.ask_all(&ask).await?;
        let mut reports = Vec::new();
        let mut failed = None;
        for answer in answers {
            match answer {
                Ok(answer) => reports.push(serde_json::from_slice(&answer).map_err(WorkerError::internal)?),
                Err(Unanswered::Failed(error)) => failed = Some(error),
                Err(_) => {}
            }
        }
        merge(reports).ok_or_else(|| failed.unwrap_or_else(no_worker))
    }

    /// What all workers know about all servers.
    pub(super) async fn reports(self: &Arc<Self>) -> Result<Vec<ServerReport>, WorkerError> {
        let answers = self.ask_all(&Ask::Reports).await?;
        let mut by_name: HashMap<ServerName, Vec<ServerReport>> = HashMap::new();
        for answer in answers.into_iter().flatten() {
            let reports: Vec<ServerReport> =
                serde_json::from_slice(&answer).map_err(WorkerError::internal)?;
            for report in reports {
                by_name.entry(report.name.clone()).or_default().push(report);
            }
        }
        Ok(by_name.into_values().filter_map(merge).collect())
    }

    /// Tells all workers that a job waits, and whoever else listens.
    pub(super) async fn wake(self: &Arc<Self>) -> Result<(), WorkerError> {
        let event = self.bus.subjects().event("job", "queued");
        if let Err(error) = self.bus.publish(event.into(), Bytes::new()).await {
            tracing::debug!(error.cause = %error, "an event was not sent");
        }
        self.ask_all(&Ask::Wake).await.map(|_| ())
    }

    /// Asks one worker for the latest versions of packages, and another one if that says nothing.
    pub(super) async fn latest(
        self: &Arc<Self>,
        packages: Vec<LatestQuery>,
    ) -> Result<Vec<Latest>, WorkerError> {
        self.ask_one(&Ask::Latest { packages }, 4 * limits::LATEST_TIMEOUT, true).await
    }

    /// Asks a worker to leave in order.
    pub(super) async fn release_worker(self: &Arc<Self>, worker: &WorkerId) -> Result<(), WorkerError> {
        if !self.is_up() {
            return Err(bus_unavailable());
        }
        if !self.fleet().live(self.bus.now()).contains(worker) {
            return Err(WorkerError::worker_not_found(worker));
        }
        match self.question(worker, &Ask::Drain, &READ).await {
            Ok(_) => Ok(()),
            Err(Unanswered::Failed(error)) => Err(error),
            Err(Unanswered::Gone) => {
                self.fleet_mut().silent(worker);
                Err(WorkerError::worker_not_found(worker))
            }
            Err(Unanswered::Silent) => {
                Err(WorkerError::new(ErrorCode::WorkerLost, "The worker did not answer"))
            }
        }
    }

    /// Has one worker do something about a remote server. What may be done only once is not asked again of
    /// another worker when one has said nothing.
    pub(super) async fn remote(self: &Arc<Self>, ask: RemoteAsk) -> Result<RemoteAnswer, WorkerError> {
        let again = !matches!(ask, RemoteAsk::FinishLogin { .. });
        self.ask_one(&Ask::Remote { ask }, limits::REMOTE_ASK_TIMEOUT, again).await
    }

    /// Asks one worker, and another one if nobody answers in its name, or (with `again`) if it says nothing.
    async fn ask_one<T: DeserializeOwned>(
        self: &Arc<Self>,
        ask: &Ask,
        whole: Duration,
        again: bool,
    ) -> Result<T, WorkerError> {
        if !self.is_up() {
            return Err(bus_unavailable());
        }
        let mut workers = self.fleet().staying(self.bus.now());
        let manners = Manners { again: None, first: PATIENCE, whole };
        while !workers.is_empty() {
            let worker = workers.swap_remove(self.draw(workers.len()));
            match self.question(&worker, ask, &manners).await {
                Ok(answer) => return serde_json::from_slice(&answer).map_err(WorkerError::internal),
                Err(Unanswered::Failed(error)) => return Err(error),
                Err(Unanswered::Gone) => self.fleet_mut().silent(&worker),
                Err(Unanswered::Silent) if again => {}
                Err(Unanswered::Silent) => break,
            }
        }
        Err(no_worker())
    }

    async fn ask_all(self: &Arc<Self>, ask: &Ask) -> Result<Vec<Result<Bytes, Unanswered>>, WorkerError> {
        if !self.is_up() {
            return Err(bus_unavailable());
        }
        let workers = self.fleet().live(self.bus.now());
        Ok(join_all(workers.iter().map(|worker| async move {
            let answer = self.question(worker, ask, &READ).await;
            if matches!(answer, Err(Unanswered::Gone)) {
                self.fleet_mut().silent(worker);
            }
            answer
        }))
        .await)
    }

    /// One worker's report on a start, with what the others run.
    async fn joined(self: &Arc<Self>, server: &ServerName, report: ServerReport) -> ServerReport {
        let others = self.fleet().owners(self.bus.now(), server);
        let own: Vec<_> = report.instances.iter().map(|instance| instance.worker_id.clone()).collect();
        if others.iter().all(|owner| own.contains(owner)) {
            return report;
        }
        let mut reports = vec![report.clone()];
        reports.extend(self.report(server).await.ok());
        let mut joined = merge(reports).unwrap_or(report);
        let mut seen = std::collections::HashSet::new();
        joined.instances.retain(|instance| seen.insert((instance.worker_id.clone(), instance.pid)));
        joined
    }
}

/// Takes a question off the list when nobody waits for it any more.
struct Listed<'a> {
    inner: &'a Inner,
    id: CallId,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        lock(&self.inner.questions).remove(&self.id);
    }
}

/// One report out of those of several workers: the best status, everything that runs, the newest
/// listing, and the lines of those that had something to say.
pub(super) fn merge(mut reports: Vec<ServerReport>) -> Option<ServerReport> {
    reports.sort_by(|a, b| b.status.cmp(&a.status).then_with(|| b.listed.cmp(&a.listed)));
    let mut reports = reports.into_iter();
    let mut merged = reports.next()?;
    for report in reports {
        if report.tools.is_some() && (merged.tools.is_none() || report.listed > merged.listed) {
            merged.tools = report.tools;
            merged.listed = report.listed;
        }
        merged.instances.extend(report.instances);
        if merged.logs != report.logs {
            merged.logs.extend(report.logs);
        }
    }
    let spare = merged.logs.len().saturating_sub(limits::LOG_LINES);
    merged.logs.drain(..spare);
    // An owner that failed is worth more than a worker that merely does not run it.
    if merged.status == ServerStatus::Disconnected
        && merged.instances.iter().any(|instance| instance.status == ServerStatus::Error)
    {
        merged.status = ServerStatus::Error;
    }
    Some(merged)
}
