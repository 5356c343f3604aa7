//! What a worker offers to whoever brings it calls in steps: admission first, arguments when a slot is
//! held. In process the steps follow each other at once; over the bus there are messages in between.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::{
    error::{ErrorCode, Outcome, WorkerError},
    fleet::NodeReport,
    idempotency::Idempotency,
    ids::{ServerName, ToolName, UserId, WorkerId},
    json::RawJson,
    users::Entered,
    worker_api::{CallContext, CallStream, ToolCall, WorkerApi},
};

/// How far a worker may go to take a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placing {
    /// Only if it owns the server (for per-user servers: the user's process) already.
    Owned,
    /// It becomes the owner, unless a lease says that somebody else is.
    Take,
    /// As [`Placing::Take`]; the owner that the lease names is lost, so it waits until the lease has run
    /// out, and takes it then.
    TakeOver,
}

/// A call as it is offered: everything but the arguments.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CallOffer {
    /// Which server.
    pub server: ServerName,
    /// Which of its tools.
    pub tool: ToolName,
    /// Whether the caller wants to hear about progress.
    pub progress: bool,
    /// Whether the worker may become the owner.
    pub placing: Placing,
    /// The call's name, if its caller may repeat it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency: Option<Idempotency>,
}

/// Why an offer is not taken. In every case the call was not started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum Refusal {
    /// Another worker owns what the call needs, or nobody does and the offer did not allow to take it.
    NotOwner {
        /// Who does, where a lease says so.
        owner: Option<WorkerId>,
    },
    /// This worker has no room; another may.
    Busy {
        /// For the caller, if all workers say so.
        error: WorkerError,
    },
    /// This worker is about to stop.
    Draining,
    /// It would be the same on every worker.
    Error {
        /// For the caller.
        error: WorkerError,
    },
}

impl Refusal {
    /// What a caller is told who can ask nobody else.
    pub fn into_error(self) -> WorkerError {
        let second = Duration::from_secs(1);
        match self {
            Refusal::Busy { error } | Refusal::Error { error } => error,
            Refusal::NotOwner { .. } => {
                WorkerError::new(ErrorCode::NoWorker, "No worker runs this server right now")
                    .retry_after(second)
            }
            Refusal::Draining => {
                WorkerError::new(ErrorCode::ShuttingDown, "This worker is stopping").retry_after(second)
            }
        }
        .or_outcome(Outcome::NotStarted)
    }
}

/// A call that was admitted. Dropping it gives it up; nothing was started then.
#[derive(Debug)]
pub struct Reservation {
    held: oneshot::Receiver<Result<(), Refusal>>,
    arguments: oneshot::Sender<RawJson>,
    stream: CallStream,
    limit: Duration,
    repeatable: bool,
    alone: bool,
}

impl Reservation {
    /// Joins the ends that the worker's call task has the other sides of. `limit` is the call's whole time.
    pub fn new(
        held: oneshot::Receiver<Result<(), Refusal>>,
        arguments: oneshot::Sender<RawJson>,
        stream: CallStream,
        limit: Duration,
    ) -> Self {
        Self { held, arguments, stream, limit, repeatable: false, alone: false }
    }

    /// States whether the call may be made again, elsewhere, when nobody knows what became of it.
    pub fn repeatable(mut self, repeatable: bool) -> Self {
        self.repeatable = repeatable;
        self
    }

    /// Whether it may.
    pub fn is_repeatable(&self) -> bool {
        self.repeatable
    }

    /// States whether nobody but this worker may take the call. Then there is no point in asking others, above all
    /// not when a crowd would do it.
    pub fn alone(mut self, alone: bool) -> Self {
        self.alone = alone;
        self
    }

    /// The call's whole time: what its caller asked for and what the server's record allows.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Waits, within the call's time, until the call holds a slot. An error is the call's end: it could
    /// not be started.
    pub async fn held(&mut self) -> Result<(), Refusal> {
        if let Ok(held) = (&mut self.held).await {
            return held;
        }
        let ended = std::future::poll_fn(|context| self.stream.poll_end(context)).await;
        let error = ended.or_outcome(Outcome::NotStarted);
        // What this worker lost between admission and slot, or never had, another may have.
        Err(match error.code {
            ErrorCode::Overloaded if self.alone => Refusal::Error { error },
            ErrorCode::NoWorker | ErrorCode::Overloaded | ErrorCode::ShuttingDown => Refusal::Busy { error },
            _ => Refusal::Error { error },
        })
    }

    /// Starts the call with its arguments, a JSON object. It may be called before a slot is held.
    pub fn go(self, arguments: RawJson) -> CallStream {
        // A call that has ended meanwhile says so in its stream.
        let _ = self.arguments.send(arguments);
        self.stream
    }
}

/// A worker as the bus sees it.
#[async_trait]
pub trait Hosting: WorkerApi {
    /// Admits a call, or says at once why not. It returns without waiting, except where a lease has to
    /// be looked up in the store; with [`Placing::TakeOver`] it waits until the lease has run out, within
    /// the call's time. The call's time counts from here.
    async fn reserve(&self, context: CallContext, offer: CallOffer) -> Result<Reservation, Refusal>;

    /// Whether one more call could be looked after right now; the error says that it could not. It is cheaper than
    /// [`Hosting::reserve`], which decides.
    fn room(&self) -> Result<(), WorkerError> {
        Ok(())
    }

    /// Lets a service's call in on behalf of its user, as far as one user may have so many. It counts until what is
    /// returned is dropped.
    fn enter(&self, _user: &UserId) -> Result<Entered, WorkerError> {
        Ok(Entered::default())
    }

    /// Records that a service calls, where calls are recorded.
    fn record_call(&self, _context: &CallContext, _call: &ToolCall) {}

    /// What this worker says of itself.
    fn describe(&self) -> NodeReport;

    /// Becomes the owner of an enabled server and starts it, without waiting for it. Nothing happens if
    /// a lease says that another worker owns it, unless that one turns out to be lost. A server whose
    /// users have processes of their own has no owner as a whole: nothing happens.
    async fn place(&self, server: &ServerName) -> Result<(), WorkerError>;

    /// Gives up a server that other workers own as well, if no call is in flight or waiting; says
    /// whether it did. What a lease covers is never owned by others as well, and stays.
    async fn give_up(&self, server: &ServerName) -> bool;

    /// The enabled servers of the store that run whether or not somebody calls, as this worker knows
    /// them, and whether it owns them. Servers with an `idleTimeout` are not among them: nobody could
    /// tell one that sleeps from one whose worker was lost.
    fn wanted(&self) -> Vec<(ServerName, bool)>;

    /// Reads everything again. `missed`: changes may have been missed, so that nothing that was known before may
    /// be used any more; else it is a precaution, and what is known serves where the store does not answer.
    async fn resync(&self, missed: bool) -> Result<(), WorkerError>;

    /// Takes no more calls from now on, and gives back the leases of what no call uses any more.
    fn drain(&self);

    /// Tells when what [`Hosting::describe`] says of ownership, status or draining may have changed.
    /// (Counts and waits change with every call and are not told.)
    fn changed(&self) -> watch::Receiver<()>;
}
