//! One connection to an MCP server, whatever carries it: a table of calls in flight, and an outbox that a
//! transport empties.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use mcp_shared::{error::WorkerError, json::RawJson, limits, trace::Trace, worker_api::CallEvent};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroize;

use self::incoming::Noise;
use super::message::{self, Message, Meta, RpcError};
use crate::logs::Log;

mod incoming;

/// Frames that may wait for the transport. Calls are bounded by slots; the rest is for notifications.
const OUTBOX: usize = 2 * limits::CONCURRENCY_MAX as usize;
/// Messages above this size are parsed on another thread, so that they hold up no other connection.
pub(super) const PARSE_INLINE: usize = 256 * 1024;

/// Why there is no result.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// The server answered with an error.
    Rpc(RpcError),
    /// The answer was longer than an answer may be.
    TooLarge,
    /// The answer was not one.
    Malformed,
    /// There was an answer, and nobody can say which.
    Unreadable,
    /// The connection ended. `written`: the request may have reached the server.
    Closed {
        /// Whether the request was handed over.
        written: bool,
    },
    /// A remote server, or the way to it, did not go along.
    Upstream(Box<Upstream>),
    /// The remote server does not know the session any more, and did nothing.
    SessionLost,
}

/// What a remote server's refusal means to a caller.
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    /// The error, with what is known about the call.
    pub error: WorkerError,
    /// The HTTP status, if there was an answer.
    pub status: Option<u16>,
}

/// A connection. All clones are the same one.
#[derive(Clone)]
pub struct Connection {
    shared: Arc<Shared>,
    outbox: mpsc::Sender<Frame>,
}

struct Shared {
    table: Mutex<Table>,
    next_id: AtomicU64,
    /// Members of `_meta` that the negotiated protocol wants on every request.
    meta: OnceLock<String>,
    log: Arc<Log>,
    tools_changed: Notify,
    /// No call is waited for any more.
    closed: CancellationToken,
    /// Ends the writer, which closes the child's input.
    close_input: CancellationToken,
    /// The child's output has ended.
    output_ended: CancellationToken,
    /// The child's input or output has ended: nothing more can be asked and answered.
    broken: CancellationToken,
    /// Giving a request up is said by closing the stream of its answer, and not by a notification.
    cancel_by_closing: AtomicBool,
    /// Nothing is waited for any more on a connection that is broken.
    emptied: Notify,
    /// Messages that came, whatever they said.
    heard: AtomicU64,
    noise: Noise,
}

#[derive(Default)]
struct Table {
    closed: bool,
    waiting: HashMap<u64, Waiting>,
}

struct Waiting {
    answer: oneshot::Sender<Result<RawJson, Failure>>,
    progress: Option<mpsc::Sender<CallEvent>>,
    ticket: Arc<Ticket>,
}

/// The frame of a request, until the writer takes it or its caller takes it back. A server that reads
/// nothing cannot make frames pile up that nobody waits for.
pub(super) struct Ticket {
    /// The request's id.
    pub(super) id: u64,
    payload: Mutex<Option<Payload>>,
    taken: AtomicBool,
    /// Nobody waits for the answer any more.
    gone: Notify,
}

impl Ticket {
    /// Waits until nobody waits for the answer any more. For one task only.
    pub(super) async fn gone(&self) {
        self.gone.notified().await;
    }

    pub(super) fn take(&self) -> Option<Payload> {
        let mut payload = self.payload();
        self.taken.fetch_or(payload.is_some(), Ordering::AcqRel);
        payload.take()
    }

    /// Takes the frame back; false when the writer has it already.
    fn revoke(&self) -> bool {
        self.payload().take().is_some()
    }

    fn taken(&self) -> bool {
        self.taken.load(Ordering::Acquire)
    }

    fn payload(&self) -> MutexGuard<'_, Option<Payload>> {
        self.payload.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes of one line.
pub(super) struct Payload {
    pub(super) bytes: Vec<u8>,
    /// They carry somebody's secrets, which are wiped when they are gone.
    pub(super) secret: bool,
    /// Where what is asked for belongs.
    pub(super) trace: Option<Trace>,
}

impl Payload {
    /// One without secrets.
    pub(super) fn plain(bytes: Vec<u8>) -> Self {
        Self { bytes, secret: false, trace: None }
    }
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        if self.secret {
            self.bytes.as_mut_slice().zeroize();
        }
    }
}

/// What waits for the transport.
pub(super) enum Frame {
    /// A request, which may be taken back.
    Request(Arc<Ticket>),
    /// Anything else.
    Plain(Vec<u8>),
}

impl Frame {
    pub(super) fn into_payload(self) -> Option<Payload> {
        match self {
            Frame::Request(ticket) => ticket.take(),
            Frame::Plain(bytes) => Some(Payload::plain(bytes)),
        }
    }
}

/// A request whose answer is awaited. Dropping it forgets the answer but tells the server nothing:
/// [`InFlight::cancel`] does.
pub struct InFlight {
    id: u64,
    connection: Connection,
    answer: oneshot::Receiver<Result<RawJson, Failure>>,
    ticket: Arc<Ticket>,
}

impl Connection {
    /// A connection, and what its transport has to send.
    pub(super) fn new(log: Arc<Log>) -> (Self, mpsc::Receiver<Frame>) {
        let (outbox, queue) = mpsc::channel(OUTBOX);
        let shared = Arc::new(Shared {
            table: Mutex::default(),
            next_id: AtomicU64::new(1),
            meta: OnceLock::new(),
            log,
            tools_changed: Notify::new(),
            closed: CancellationToken::new(),
            close_input: CancellationToken::new(),
            output_ended: CancellationToken::new(),
            broken: CancellationToken::new(),
            cancel_by_closing: AtomicBool::new(false),
            emptied: Notify::new(),
            heard: AtomicU64::new(0),
            noise: Noise::default(),
        });
        (Self { shared, outbox }, queue)
    }

    /// Sends a request and waits for its result.
    pub async fn request(&self, method: &str, params: &str) -> Result<RawJson, Failure> {
        self.begin(None, |id| Payload::plain(message::request(id, method, params))).await?.answer().await
    }

    /// Sends a tool call. `arguments` is a JSON object; `secret` says that secrets are among them; `trace`, where the
    /// server's work belongs.
    pub async fn call_tool(
        &self,
        tool: &str,
        arguments: &[u8],
        secret: bool,
        progress: Option<mpsc::Sender<CallEvent>>,
        trace: Option<Trace>,
    ) -> Result<InFlight, Failure> {
        let wanted = progress.is_some();
        self.begin(progress, |id| {
            let meta = Meta { members: self.meta(), progress: wanted, trace: trace.as_ref() };
            let bytes = message::tool_call(id, tool, arguments, &meta);
            Payload { bytes, secret, trace }
        })
        .await
    }

    /// Sends a notification.
    pub async fn notify(&self, method: &str, params: Option<&str>) -> Result<(), Failure> {
        let frame = Frame::Plain(message::notification(method, params));
        self.outbox.send(frame).await.map_err(|_| Failure::Closed { written: false })
    }

    /// Sets what the protocol wants in every request's `_meta`, as JSON members without braces.
    pub fn set_meta(&self, members: String) {
        let _ = self.shared.meta.set(members);
    }

    /// What the protocol wants in every request's `_meta`.
    pub fn meta(&self) -> &str {
        self.shared.meta.get().map_or("", String::as_str)
    }

    /// How many messages the server has sent so far: it lives if there are more than before.
    pub fn heard(&self) -> u64 {
        self.shared.heard.load(Ordering::Relaxed)
    }

    /// Waits until the server says that its tools have changed.
    pub async fn tools_changed(&self) {
        self.shared.tools_changed.notified().await;
    }

    /// From now on a request is given up by closing the stream of its answer.
    pub(super) fn cancel_by_closing(&self) {
        self.shared.cancel_by_closing.store(true, Ordering::Release);
    }

    /// From now on a request is given up by a notification.
    pub(super) fn cancel_by_telling(&self) {
        self.shared.cancel_by_closing.store(false, Ordering::Release);
    }

    /// Lets no new call begin. Those in flight may end.
    pub(super) fn break_off(&self) {
        self.shared.broken.cancel();
    }

    /// Waits, once the connection is broken, until no call is in flight.
    pub async fn emptied(&self) {
        loop {
            let mut emptied = std::pin::pin!(self.shared.emptied.notified());
            emptied.as_mut().enable();
            if self.shared.table().waiting.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Gives a request its answer.
    pub(super) fn resolve(&self, id: u64, answer: Result<RawJson, Failure>) {
        self.shared.resolve(id, answer);
    }

    /// Whether the answer to a request is still awaited.
    pub(super) fn awaits(&self, id: u64) -> bool {
        self.shared.table().waiting.contains_key(&id)
    }

    /// The server's log.
    pub(super) fn log(&self) -> &Arc<Log> {
        &self.shared.log
    }

    /// Waits until the input is to be closed.
    pub(super) fn input_closing(&self) -> CancellationToken {
        self.shared.close_input.clone()
    }

    /// For the transport: the output has ended.
    pub(super) fn end_output(&self) {
        self.shared.noise.sum_up(&self.shared.log);
        self.shared.broken.cancel();
        self.shared.output_ended.cancel();
    }

    /// Takes in a message of the server. `only`: of answers, none but the one to this request counts.
    pub(super) async fn take(&self, line: Bytes, only: Option<u64>) {
        self.shared.heard.fetch_add(1, Ordering::Relaxed);
        let message = if line.len() <= PARSE_INLINE {
            Message::parse(&line)
        } else {
            let copy = line.clone();
            match tokio::task::spawn_blocking(move || Message::parse(&copy)).await {
                Ok(message) => message,
                Err(_) => return,
            }
        };
        if let (Message::Response { id, .. } | Message::Unreadable { id }, Some(only)) = (&message, only)
            && *id != only
        {
            return self.shared.ignore();
        }
        self.handle(message, &line);
    }

    /// Closes the server's input, which asks it to leave.
    pub fn close_input(&self) {
        self.shared.close_input.cancel();
    }

    /// Waits for the end of the server's output.
    pub async fn output_ended(&self) {
        self.shared.output_ended.cancelled().await;
    }

    /// Waits until the server closed its input or its output.
    pub async fn broken(&self) {
        self.shared.broken.cancelled().await;
    }

    /// Ends all calls in flight and lets no new one begin.
    pub fn close(&self) {
        self.shared.close_input.cancel();
        let waiting = {
            let mut table = self.shared.table();
            table.closed = true;
            std::mem::take(&mut table.waiting)
        };
        for (_, one) in waiting {
            // Taking the frame back and finding it taken are the two honest outcomes.
            let written = !one.ticket.revoke() && one.ticket.taken();
            let _ = one.answer.send(Err(Failure::Closed { written }));
        }
        self.shared.closed.cancel();
    }

    /// Waits until the connection is closed.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }

    /// Whether calls can begin.
    pub fn is_open(&self) -> bool {
        let shared = &self.shared;
        !shared.table().closed && !shared.close_input.is_cancelled() && !shared.broken.is_cancelled()
    }

    async fn begin(
        &self,
        progress: Option<mpsc::Sender<CallEvent>>,
        line: impl FnOnce(u64) -> Payload,
    ) -> Result<InFlight, Failure> {
        let not_begun = Failure::Closed { written: false };
        let room = self.outbox.reserve().await.map_err(|_| not_begun.clone())?;
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let payload = Mutex::new(Some(line(id)));
        let ticket = Arc::new(Ticket { id, payload, taken: AtomicBool::new(false), gone: Notify::new() });
        let (sender, answer) = oneshot::channel();
        {
            let mut table = self.shared.table();
            if table.closed {
                return Err(not_begun);
            }
            let one = Waiting { answer: sender, progress, ticket: Arc::clone(&ticket) };
            table.waiting.insert(id, one);
        }
        let in_flight = InFlight { id, connection: self.clone(), answer, ticket: Arc::clone(&ticket) };
        room.send(Frame::Request(ticket));
        Ok(in_flight)
    }
}

impl InFlight {
    /// Waits for the answer. Safe to call again after it was cancelled.
    pub async fn answer(&mut self) -> Result<RawJson, Failure> {
        match (&mut self.answer).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::Closed { written: self.ticket.taken() }),
        }
    }

    /// Gives the request up. `false`: it was taken back before the server could see it. `true`: the
    /// server may be working on it and has been told that nobody waits.
    pub fn cancel(&self, reason: &str) -> bool {
        if self.ticket.revoke() {
            return false;
        }
        if self.connection.shared.cancel_by_closing.load(Ordering::Acquire) {
            self.ticket.gone.notify_one();
            return true;
        }
        let params = format!(r#"{{"requestId":{},"reason":"{reason}"}}"#, self.id);
        let frame = Frame::Plain(message::notification("notifications/cancelled", Some(&params)));
        // A full outbox belongs to a server that reads nothing; it would not read this either.
        let _ = self.connection.outbox.try_send(frame);
        true
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let shared = &self.connection.shared;
        let mut table = shared.table();
        table.waiting.remove(&self.id);
        let empty = table.waiting.is_empty();
        drop(table);
        self.ticket.gone.notify_one();
        if empty && shared.broken.is_cancelled() {
            shared.emptied.notify_waiters();
        }
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn resolve(&self, id: u64, answer: Result<RawJson, Failure>) {
        // Ids are ours and never used twice: an answer to any other belongs to nobody.
        match self.table().waiting.remove(&id) {
            Some(one) => {
                let _ = one.answer.send(answer);
            }
            None => self.ignore(),
        }
    }

    fn ignore(&self) {
        self.noise.ignore();
    }
}
