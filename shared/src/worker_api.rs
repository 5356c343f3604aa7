//! The seam between gateway and worker. A gateway holds `Arc<dyn WorkerApi>`: the worker of its own
//! process, or the whole fleet behind the bus. Everything that crosses is serialisable.

use std::{any::Any, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    error::WorkerError,
    fleet::Fleet,
    idempotency::Idempotency,
    ids::{RequestId, ServerName, ToolName, UserId, WorkerId},
    json::RawJson,
    package::{Latest, LatestQuery},
    remote::{RemoteAnswer, RemoteAsk},
    timestamp::Timestamp,
    trace::Trace,
};

/// On whose behalf, and within which time, something is asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CallContext {
    /// The request that this belongs to, for logs.
    pub request_id: RequestId,
    /// Whose secrets apply.
    pub user: UserId,
    /// The time that the caller gives it, counted from the moment that this value was made. The
    /// server's record may allow less. It is a duration, never an instant: clocks differ.
    pub timeout: Option<Duration>,
    /// How much of its time is gone already, on the way here.
    #[serde(default)]
    pub spent: Duration,
    /// Where it belongs, if its caller or this program traces it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<Trace>,
}

/// One tool call.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ToolCall {
    /// Which server.
    pub server: ServerName,
    /// Which of its tools.
    pub tool: ToolName,
    /// A JSON object, without the secrets.
    pub arguments: RawJson,
    /// Whether the caller wants to hear about progress.
    pub progress: bool,
    /// The call's name, if its caller may repeat it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency: Option<Idempotency>,
}

/// What a running call says: any number of progress reports, then one end.
#[derive(Debug)]
pub enum CallEvent {
    /// The `params` of one `notifications/progress`, unchanged.
    Progress(RawJson),
    /// What follows came of the call when it was made for the first time, under the same name.
    Replayed,
    /// The server's `CallToolResult`, unchanged; or why there is none.
    Done(Result<RawJson, WorkerError>),
}

/// A running call. Dropping it cancels the call; the worker finishes its book-keeping by itself.
pub struct CallStream {
    events: mpsc::Receiver<CallEvent>,
    _cancel: Box<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for CallStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CallStream")
    }
}

impl CallStream {
    /// Joins the receiving end of a call's events with the guard that cancels it when it is dropped.
    pub fn new(events: mpsc::Receiver<CallEvent>, cancel: impl Send + Sync + 'static) -> Self {
        Self { events, _cancel: Box::new(cancel) }
    }

    /// The next event; `None` after the end.
    pub async fn next(&mut self) -> Option<CallEvent> {
        self.events.recv().await
    }

    /// The error of a call that ended before it was started.
    pub(crate) fn poll_end(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<WorkerError> {
        use std::task::Poll;
        loop {
            return match self.events.poll_recv(context) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(Some(CallEvent::Progress(_) | CallEvent::Replayed)) => continue,
                Poll::Ready(Some(CallEvent::Done(Err(error)))) => Poll::Ready(error),
                Poll::Ready(Some(CallEvent::Done(Ok(_))) | None) => {
                    Poll::Ready(WorkerError::internal("a call ended before it was started"))
                }
            };
        }
    }

    /// Waits for the end and passes over progress.
    pub async fn result(mut self) -> Result<RawJson, WorkerError> {
        while let Some(event) = self.events.recv().await {
            if let CallEvent::Done(result) = event {
                return result;
            }
        }
        Err(WorkerError::internal("a call ended without a result").outcome(crate::error::Outcome::Unknown))
    }
}

/// The state of a server or of one of its instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServerStatus {
    /// It could not be started, or died.
    Error,
    /// It does not run, and need not.
    Disconnected,
    /// It is being started.
    Connecting,
    /// It runs and listed its tools.
    Connected,
}

/// One process (or session) of a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceReport {
    /// The worker that runs it.
    pub worker_id: WorkerId,
    /// Its process id there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The user that it belongs to, where every user has their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<UserId>,
    /// Its state.
    pub status: ServerStatus,
    /// Calls in flight on it.
    pub in_flight: usize,
    /// Since when it has this state.
    pub since: Timestamp,
    /// What went wrong last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// What the workers know about one server.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerReport {
    /// Which server.
    pub name: ServerName,
    /// The best state of its instances.
    pub status: ServerStatus,
    /// Its tools as it listed them, a JSON array; `None` until it did.
    pub tools: Option<RawJson>,
    /// The newest lines of its standard error and of our notes about it.
    pub logs: Vec<String>,
    /// Its processes.
    pub instances: Vec<InstanceReport>,
    /// When it listed its tools, by the worker's clock; `None`: not since the worker started. Of several
    /// reports the newest listing counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listed: Option<Timestamp>,
}

/// What was changed in the store, and which workers must hear of before the change is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Change {
    /// A server was added, changed or removed.
    Server {
        /// Its name.
        server: ServerName,
    },
    /// A user's secret for a server was set or deleted.
    Secret {
        /// Whose.
        user: UserId,
        /// For which server.
        server: ServerName,
        /// Under which name.
        name: crate::ids::SecretName,
    },
    /// A user's tokens for a remote server were set or removed by somebody, or the user's session was: what
    /// is connected for that user is of another login.
    Login {
        /// Whose.
        user: UserId,
        /// For which server.
        server: ServerName,
    },
}

/// What a gateway asks of workers. One implementation runs in process, the other speaks over NATS;
/// both give the same answers and the same errors.
#[async_trait]
pub trait WorkerApi: Send + Sync + 'static {
    /// Starts a tool call. An error means that the call was not started.
    async fn call_tool(&self, context: CallContext, call: ToolCall) -> Result<CallStream, WorkerError>;

    /// Sees to it that an enabled server runs, and waits until it listed its tools or failed, at most
    /// for the record's start-up time. Callers that ask at once share one start. The error of a start
    /// that failed is in the report, not in the result. `user` matters for per-user servers only.
    async fn start_server(&self, user: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError>;

    /// Stops a server's processes and starts them again; otherwise as [`WorkerApi::start_server`].
    async fn restart_server(&self, user: &UserId, server: &ServerName) -> Result<ServerReport, WorkerError>;

    /// Tells every worker that something changed in the store. When this returns, no worker uses the
    /// old state for a call that starts later: processes of a removed or disabled server are gone,
    /// those that a change concerns are replaced or will be at their next use.
    async fn announce(&self, change: Change) -> Result<(), WorkerError>;

    /// What is known about one server.
    async fn report(&self, server: &ServerName) -> Result<ServerReport, WorkerError>;

    /// What is known about all servers.
    async fn reports(&self) -> Result<Vec<ServerReport>, WorkerError>;

    /// Has every other node that is heard log by this filter from now on, or by its own settings again. Whether they
    /// do is not waited for. A node that starts later knows nothing of it.
    async fn filter_logs(&self, filter: Option<&str>) -> Result<(), WorkerError>;

    /// Whether calls can be taken; the error says what is missing.
    async fn ready(&self) -> Result<(), WorkerError>;

    /// Tells workers that a job was queued in the store. It is a hint: they look there by themselves too.
    async fn wake(&self) -> Result<(), WorkerError>;

    /// The latest versions of packages, looked up side by side, in the order of the questions.
    async fn latest(&self, packages: Vec<LatestQuery>) -> Result<Vec<Latest>, WorkerError>;

    /// Has a worker, whichever, do something about a remote server.
    async fn remote(&self, ask: RemoteAsk) -> Result<RemoteAnswer, WorkerError>;

    /// Has one worker leave the fleet in order, as at SIGTERM: it takes nothing new, hands over what it runs,
    /// finishes its calls and ends. It has only begun when this returns.
    async fn release_worker(&self, worker: &WorkerId) -> Result<(), WorkerError>;

    /// The nodes that are heard.
    async fn fleet(&self) -> Result<Fleet, WorkerError>;
}
