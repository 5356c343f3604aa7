//! One tool call, from its slot to its end.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError, shorten},
    hosting::{CallOffer, Refusal},
    ids::UserId,
    json::RawJson,
    limits,
    metrics::{CallEnd, Carrier, Stage},
    trace::{Key, Kind, Span, Trace},
    worker_api::CallEvent,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::{
    google,
    group::{Group, NoSlot, current},
    host::Host,
    idempotency::{self, Begun},
    leases::no_worker,
    logs::Known,
    meters::{self, Stages},
    registry::Entry,
    secrets,
    transport::{RpcError, connection::Failure},
};

/// How often a call that was provably not started is tried again here.
const ATTEMPTS: usize = 3;
/// Characters of a tool's name in a span.
const TOOL_CHARS: usize = 128;

/// A call on its way.
pub struct Call {
    /// The worker's means.
    pub host: Arc<Host>,
    /// The server.
    pub entry: Arc<Entry>,
    /// Whose secrets apply.
    pub user: UserId,
    /// What is called.
    pub offer: CallOffer,
    /// Where it belongs, if it is traced.
    pub trace: Option<Trace>,
    /// When it must be over.
    pub deadline: Instant,
    /// The time that it was given, for messages.
    pub limit: Duration,
    /// The caller is gone.
    pub cancelled: CancellationToken,
    /// Where progress goes.
    pub events: mpsc::Sender<CallEvent>,
    /// It may be made again when nobody knows what became of it.
    pub repeatable: bool,
}

/// What a call still waits for when it has a slot.
pub struct Go {
    /// Hears of the first slot.
    pub held: Option<oneshot::Sender<Result<(), Refusal>>>,
    /// What comes then.
    pub arguments: oneshot::Receiver<RawJson>,
    /// The server does not start here, and may do so elsewhere.
    pub unable: bool,
    /// The whole call, if it is recorded.
    pub span: Span,
}

impl Call {
    /// Runs the call to its end. Whatever the server still does with a call that was given up is
    /// looked after by another task, which keeps the slot until then.
    pub async fn run(self, mut go: Go) -> Result<RawJson, WorkerError> {
        let ended = self.run_named(&mut go).await;
        meters::call_ended(&ended);
        let span = std::mem::take(&mut go.span);
        match &ended {
            Ok(result) => answered(span, result),
            Err(_) => conclude(span, &ended),
        }
        // Only now: a call that has a name has given it back, so that another worker can take it.
        if let (Err(error), true, Some(held)) = (&ended, go.unable, go.held.take()) {
            let _ = held.send(Err(Refusal::Busy { error: error.clone() }));
        }
        ended
    }

    async fn run_named(&self, go: &mut Go) -> Result<RawJson, WorkerError> {
        let Some(name) = &self.offer.idempotency else { return self.run_now(go).await };
        let begun = tokio::select! {
            // A name that was taken is looked at first, so that it is given back when nobody waits any more.
            biased;
            begun = timeout_at(self.deadline, idempotency::begin_for(&self.host, &self.user, name)) => begun,
            () = self.cancelled.cancelled() => return Err(cancelled(Outcome::NotStarted)),
        };
        match begun.unwrap_or_else(|_| Err(self.late(Outcome::NotStarted)))? {
            Begun::First(claim) => {
                let ended = self.run_now(go).await;
                claim.end(&ended).await;
                ended
            }
            Begun::Before(ended) => self.replay(go, ended).await,
        }
    }

    /// Answers with what came of the call when it was made for the first time.
    async fn replay(&self, go: &mut Go, ended: Result<RawJson, WorkerError>) -> Result<RawJson, WorkerError> {
        // Whoever brings the call has to go through its steps before it takes an answer.
        if let Some(held) = go.held.take() {
            let _ = held.send(Ok(()));
        }
        self.wait_for_arguments(go).await?;
        let _ = self.events.try_send(CallEvent::Replayed);
        meters::replayed();
        ended
    }

    async fn run_now(&self, go: &mut Go) -> Result<RawJson, WorkerError> {
        let mut may_have_run = false;
        let ended = self.attempts(go, &mut may_have_run).await;
        ended.map_err(|error| match error.outcome {
            // The last attempt came to nothing, and one before it perhaps did not.
            Some(Outcome::NotStarted) if may_have_run => error.outcome(Outcome::Unknown),
            _ => error,
        })
    }

    async fn attempts(&self, go: &mut Go, may_have_run: &mut bool) -> Result<RawJson, WorkerError> {
        let mut attempts = 0;
        let mut arguments = None;
        loop {
            match self.attempt(go, &mut arguments, attempts).await {
                Ok(result) => return Ok(result),
                Err(Attempt::Lost(error)) => {
                    attempts += 1;
                    *may_have_run = true;
                    let goes_on = self.repeatable && !self.cancelled.is_cancelled();
                    if !goes_on || attempts == ATTEMPTS || Instant::now() >= self.deadline {
                        return Err(error);
                    }
                    tracing::debug!(server = %self.entry.name, "a call that may be repeated is made again");
                }
                Err(Attempt::Failed(error)) => return Err(error),
                // The process was gone before it saw the call.
                Err(Attempt::Again) => {
                    attempts += 1;
                    if attempts == ATTEMPTS {
                        if current(&self.entry.record).is_remote() {
                            return Err(self.unreachable());
                        }
                        return Err(self.crashed(Outcome::NotStarted));
                    }
                }
                // It is being replaced: the call waits, and goes to the new one. In a cluster, what
                // leaves with its worker comes up elsewhere.
                Err(Attempt::Replaced) if self.host.leases.is_some() && self.host.draining.is_cancelled() => {
                    return Err(stopping());
                }
                Err(Attempt::Replaced) => {
                    let settled = tokio::select! {
                        settled = timeout_at(self.deadline, self.entry.settled()) => settled.is_ok(),
                        () = self.cancelled.cancelled() => return Err(cancelled(Outcome::NotStarted)),
                    };
                    if !settled || Instant::now() >= self.deadline {
                        return Err(self.late(Outcome::NotStarted));
                    }
                }
            }
        }
    }

    async fn attempt(
        &self,
        go: &mut Go,
        given: &mut Option<RawJson>,
        before: usize,
    ) -> Result<RawJson, Attempt> {
        let group = self.entry.group(&self.user, &self.host)?;
        let carrier = Carrier::of(current(&self.entry.record).is_remote());
        let mut stages = Stages::begin(Stage::Queue, carrier);
        let waiting = go.span.child(Kind::Internal, "queue");
        let slot = tokio::select! {
            slot = group.slot(self.deadline) => slot.map_err(|no_slot| match no_slot {
                NoSlot::Retired => Attempt::Replaced,
                NoSlot::Denied(denied) => Attempt::Failed(denied.into_error()),
                NoSlot::Unable(error) => {
                    go.unable = true;
                    Attempt::Failed(error)
                }
                NoSlot::Error(error) => Attempt::Failed(error),
            }),
            () = self.cancelled.cancelled() => Err(cancelled(Outcome::NotStarted).into()),
        };
        let slot = match slot {
            Ok(slot) => {
                waiting.end();
                slot
            }
            Err(attempt) => {
                waiting.fail(attempt.code());
                return Err(attempt);
            }
        };
        stages.enter(Stage::Handshake);
        self.check_lease(&group)?;
        if let Some(held) = go.held.take() {
            // Who does not care for the slot has sent the arguments already.
            let _ = held.send(Ok(()));
        }
        let arguments = match given {
            Some(arguments) => arguments,
            None => given.insert(self.wait_for_arguments(go).await?),
        };
        let instance = Arc::clone(&slot.instance);
        instance.expect_until(self.deadline);
        let busy = Busy::new(&group, &slot.instance);
        if slot.instance.is_leaving() {
            return Err(Attempt::Again);
        }
        stages.enter(Stage::Secrets);
        let prepared = async {
            let mut adding = go.span.child(Kind::Internal, "secrets");
            let added = self.with_secrets(arguments, &group).await;
            adding.say(Key::Secrets, || added.as_ref().is_ok_and(|added| added.merged.is_some()));
            conclude(adding, &added);
            let Arguments { merged, known } = added?;
            stages.enter(Stage::Server);
            let arguments = merged.as_deref().map_or(arguments.as_bytes(), Vec::as_slice);
            let progress = self.offer.progress.then(|| self.events.clone());
            let tool = self.offer.tool.as_str();
            self.check_lease(&group)?;
            let asking = self.asking(&go.span, before);
            let trace = self.trace_from(&asking);
            let begun =
                instance.connection.call_tool(tool, arguments, merged.is_some(), progress, trace).await;
            match begun {
                Ok(in_flight) => Ok((in_flight, known, asking)),
                Err(_) => {
                    asking.fail(Attempt::Again.code());
                    Err(Attempt::Again)
                }
            }
        };
        let (mut in_flight, known, asking) = tokio::select! {
            prepared = timeout_at(self.deadline, prepared) => match prepared {
                Ok(prepared) => prepared?,
                // The store is silent, or the server has not read its input for so long that nothing more
                // fits in.
                Err(_) => return Err(self.late(Outcome::NotStarted).into()),
            },
            () = self.cancelled.cancelled() => return Err(cancelled(Outcome::NotStarted).into()),
        };
        let given_up = tokio::select! {
            answer = timeout_at(self.deadline, in_flight.answer()) => match answer {
                Ok(answer) => {
                    let ended = self.conclude(answer, &group, instance.is_stopping());
                    match &ended {
                        Ok(result) => answered(asking, result),
                        Err(attempt) => asking.fail(attempt.code()),
                    }
                    return ended;
                }
                Err(_) => "deadline",
            },
            // Whoever named the call will come back for what came of it.
            () = self.cancelled.cancelled(), if self.offer.idempotency.is_none() => "client",
        };
        asking.fail(
            if given_up == "client" { ErrorCode::Cancelled } else { ErrorCode::DeadlineExceeded }.as_str(),
        );
        let outcome = if in_flight.cancel(given_up) { Outcome::Unknown } else { Outcome::NotStarted };
        if outcome == Outcome::Unknown {
            // The slot stays taken until the server is done with the call, or has had time enough.
            self.host.tasks.spawn(async move {
                if timeout(limits::CANCEL_GRACE, in_flight.answer()).await.is_err() {
                    slot.instance.ignored_cancels.fetch_add(1, Ordering::AcqRel);
                    meters::cancel_ignored();
                }
                drop((slot, busy, known));
            });
        }
        Err(match given_up {
            "client" => cancelled(outcome),
            _ => self.late(outcome),
        }
        .into())
    }

    /// The span of one request to the server.
    fn asking(&self, whole: &Span, before: usize) -> Span {
        let mut asking = whole.child(Kind::Client, "tools/call");
        asking.say(Key::McpMethod, || "tools/call");
        asking.say(Key::Server, || self.entry.name.as_str().to_owned());
        asking.say(Key::Tool, || shorten(self.offer.tool.as_str(), TOOL_CHARS));
        asking.say(Key::Transport, || if current(&self.entry.record).is_remote() { "tcp" } else { "pipe" });
        if before > 0 {
            asking.say(Key::Attempt, || i64::try_from(before + 1).unwrap_or(i64::MAX));
        }
        asking
    }

    /// What the server is told of the trace. Whom the caller works for is nothing for servers elsewhere.
    fn trace_from(&self, asking: &Span) -> Option<Trace> {
        let trace = self.trace.as_ref()?;
        let trace = match asking.context() {
            Some(context) => trace.with_parent(context),
            None => trace.clone(),
        };
        let elsewhere = trace.baggage().is_some() && current(&self.entry.record).is_remote();
        Some(if elsewhere { trace.without_baggage() } else { trace })
    }

    /// Waits, with a slot, for what the call is to be started with. Nothing was started when it never
    /// comes.
    async fn wait_for_arguments(&self, go: &mut Go) -> Result<RawJson, WorkerError> {
        if let Ok(arguments) = go.arguments.try_recv() {
            return Ok(arguments);
        }
        tokio::select! {
            arguments = timeout_at(self.deadline, &mut go.arguments) => match arguments {
                Ok(Ok(arguments)) => Ok(arguments),
                Ok(Err(_)) => Err(cancelled(Outcome::NotStarted)),
                Err(_) => Err(self.late(Outcome::NotStarted)),
            },
            () = self.cancelled.cancelled() => Err(cancelled(Outcome::NotStarted)),
        }
    }

    /// What may run only once takes calls only while this worker is known to be the one that runs it.
    fn check_lease(&self, group: &Group) -> Result<(), WorkerError> {
        if group.may_run() {
            return Ok(());
        }
        Err(self
            .named(no_worker("This worker is not sure any more that it is the only one to run the server")))
    }

    /// The arguments with the user's secrets, and the guard that keeps these out of logs.
    async fn with_secrets(&self, arguments: &RawJson, group: &Arc<Group>) -> Result<Arguments, WorkerError> {
        if self.entry.is_builtin() {
            // It has nobody's secrets, whatever an older program has stored for its name.
            return Ok(Arguments { merged: None, known: None });
        }
        let record = current(&self.entry.record);
        let not_started = |error: WorkerError| error.outcome(Outcome::NotStarted);
        let mut secrets = self.host.secrets.for_call(&self.user, &record).await.map_err(not_started)?;
        let hidden =
            google::hidden(&self.host, &self.user, &record, &self.offer.tool).await.map_err(not_started)?;
        let within: Vec<_> = hidden.iter().flat_map(|document| google::secrets_in(&document.value)).collect();
        secrets.extend(hidden);
        if secrets.is_empty() {
            return Ok(Arguments { merged: None, known: None });
        }
        let merged = secrets::merge(arguments, &secrets).map_err(|_| {
            WorkerError::new(ErrorCode::InvalidRequest, "args must be a JSON object")
                .outcome(Outcome::NotStarted)
        })?;
        let known = group.log().remember(secrets.iter().map(|secret| &secret.value).chain(&within));
        Ok(Arguments { merged: Some(merged), known: Some(known) })
    }

    fn conclude(
        &self,
        answer: Result<RawJson, Failure>,
        group: &Group,
        stopping: bool,
    ) -> Result<RawJson, Attempt> {
        match answer {
            Ok(result) if result.is_object() => Ok(result),
            Ok(_) | Err(Failure::Malformed) => Err(self.malformed(Outcome::Completed).into()),
            // What cannot be read does not say what was done.
            Err(Failure::Unreadable) => Err(self.malformed(Outcome::Unknown).into()),
            Err(Failure::Rpc(error)) => {
                let message = group.log().redactor().quote(error.message);
                Err(self.refused(&RpcError { message, ..error }).into())
            }
            Err(Failure::TooLarge) => {
                let text = format!("The answer of server {} was too large", self.entry.name);
                Err(WorkerError::new(ErrorCode::ResultTooLarge, text).outcome(Outcome::Completed).into())
            }
            Err(Failure::Upstream(upstream)) => {
                let error = self.named(upstream.error);
                Err(match error.code {
                    ErrorCode::UpstreamLost if error.outcome == Some(Outcome::Unknown) => {
                        Attempt::Lost(error)
                    }
                    _ => Attempt::Failed(error),
                })
            }
            Err(Failure::Closed { written: false } | Failure::SessionLost) => Err(Attempt::Again),
            Err(Failure::Closed { written: true }) if stopping => {
                let text = format!("Server {} was stopped while the call was in flight", self.entry.name);
                let error = self.named(WorkerError::new(ErrorCode::ServerStopped, text));
                Err(Attempt::Lost(error.outcome(Outcome::Unknown)))
            }
            Err(Failure::Closed { written: true }) if current(&self.entry.record).is_remote() => {
                Err(Attempt::Lost(self.lost()))
            }
            Err(Failure::Closed { written: true }) => Err(Attempt::Lost(self.crashed(Outcome::Unknown))),
        }
    }

    /// What the server's own error means to the caller.
    fn refused(&self, error: &RpcError) -> WorkerError {
        let code = match error.code {
            -32602 => ErrorCode::InvalidArguments,
            -32601 => ErrorCode::ToolNotFound,
            _ => ErrorCode::McpError,
        };
        let text = format!("MCP error {}: {}", error.code, error.message);
        self.named(WorkerError::new(code, text)).with("mcpCode", error.code).outcome(Outcome::Completed)
    }

    fn late(&self, outcome: Outcome) -> WorkerError {
        let text = format!("The call did not finish within {} ms", self.limit.as_millis());
        self.named(WorkerError::new(ErrorCode::DeadlineExceeded, text)).outcome(outcome)
    }

    fn crashed(&self, outcome: Outcome) -> WorkerError {
        let text = format!("Server {} ended while the call was in flight", self.entry.name);
        self.named(WorkerError::new(ErrorCode::ServerCrashed, text)).outcome(outcome)
    }

    fn lost(&self) -> WorkerError {
        let text =
            format!("The connection to server {} was lost while the call was in flight", self.entry.name);
        self.named(WorkerError::new(ErrorCode::UpstreamLost, text)).outcome(Outcome::Unknown)
    }

    fn unreachable(&self) -> WorkerError {
        let text = format!("The connection to server {} ends before calls are sent", self.entry.name);
        self.named(WorkerError::new(ErrorCode::UpstreamUnavailable, text)).outcome(Outcome::NotStarted)
    }

    fn malformed(&self, outcome: Outcome) -> WorkerError {
        let text = format!("Server {} did not answer with a tool result", self.entry.name);
        self.named(WorkerError::new(ErrorCode::ServerProtocolError, text)).outcome(outcome)
    }

    fn named(&self, error: WorkerError) -> WorkerError {
        error.with("serverName", self.entry.name.as_str())
    }
}

/// How one attempt ended without a result.
pub enum Attempt {
    /// It was not started, and another process may take it.
    Again,
    /// It was not started, and the server's processes are just being replaced.
    Replaced,
    /// Whoever had it is gone, and perhaps it was done.
    Lost(WorkerError),
    /// For the caller.
    Failed(WorkerError),
}

impl Attempt {
    /// In one word, for spans.
    fn code(&self) -> &'static str {
        match self {
            Attempt::Again => "made_again",
            Attempt::Replaced => "server_replaced",
            Attempt::Lost(error) | Attempt::Failed(error) => error.code.as_str(),
        }
    }
}

/// Ends a span of a call that was answered. The answer may be that the tool failed.
fn answered(span: Span, result: &RawJson) {
    if span.is_recorded() && result.says_error() {
        span.fail(CallEnd::ToolError.as_str());
    } else {
        span.end();
    }
}

/// Ends a span with what came of its work.
fn conclude<T>(mut span: Span, ended: &Result<T, WorkerError>) {
    match ended {
        Ok(_) => span.end(),
        Err(error) => {
            if let Some(outcome) = error.outcome {
                span.say(Key::Outcome, || outcome.as_str());
            }
            span.fail(error.code.as_str());
        }
    }
}

impl From<WorkerError> for Attempt {
    fn from(error: WorkerError) -> Self {
        Self::Failed(error)
    }
}

/// The end of a call that was not started before its worker began to stop.
pub fn stopping() -> WorkerError {
    WorkerError::new(ErrorCode::ShuttingDown, "This worker is stopping")
        .outcome(Outcome::NotStarted)
        .retry_after(Duration::from_secs(1))
}

fn cancelled(outcome: Outcome) -> WorkerError {
    WorkerError::new(ErrorCode::Cancelled, "The call was cancelled").outcome(outcome)
}

/// Counts a call in flight on an instance.
struct Busy {
    group: Arc<Group>,
    instance: Arc<crate::instance::Instance>,
}

impl Busy {
    fn new(group: &Arc<Group>, instance: &Arc<crate::instance::Instance>) -> Self {
        // In one order with the mark of a process that takes no more calls, for all who look.
        instance.in_flight.fetch_add(1, Ordering::SeqCst);
        Self { group: Arc::clone(group), instance: Arc::clone(instance) }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.instance.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.group.call_ended();
    }
}

/// What a call sends.
struct Arguments {
    /// The arguments with secrets in them; `None`: as the caller sent them.
    merged: Option<Zeroizing<Vec<u8>>>,
    known: Option<Known>,
}
