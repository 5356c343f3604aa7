//! A connection to a remote server: over streamable HTTP, where every request is a POST and its answer a
//! document or a stream; or over the older HTTP+SSE, where all answers come on one stream ([`super::sse`]).

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use mcp_shared::{
    error::ErrorCode,
    json::RawJson,
    limits,
    remote::Reconnection,
    trace::{TRACEPARENT, TRACESTATE, Trace},
};
use reqwest::Response;
use secrecy::SecretString;
use sse_stream::Sse;
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_util::task::TaskTracker;
use url::Url;

use super::{
    connection::{Connection, Failure, Frame, Payload, Ticket},
    endpoint::{ANSWER_BYTES, Endpoint},
    events::{Broken, Events, asked_pause},
    headers::{ParamHeaders, standard},
    message::{self, Message},
};
use crate::logs::Log;

/// The id of a session.
pub const SESSION: HeaderName = HeaderName::from_static("mcp-session-id");
/// The version of MCP that was agreed upon.
const VERSION: HeaderName = HeaderName::from_static("mcp-protocol-version");
const LAST_EVENT: HeaderName = HeaderName::from_static("last-event-id");
/// Notifications and answers to a server's own requests that are on their way at once.
const ASIDE: usize = 16;
/// How many of them may wait for that. A server that asks faster gets no answers.
const ASIDE_QUEUE: usize = 1_024;
/// The longest session id that is taken.
const SESSION_BYTES: usize = 1_024;
/// The longest id of an event that is sent back.
const EVENT_ID_BYTES: usize = 4_096;

/// Says in headers where a request belongs, for whoever it passes through on its way.
fn add_trace(trace: &Trace, headers: &mut HeaderMap) {
    let parent = HeaderValue::from_str(&trace.parent.to_string()).ok();
    let state = trace.state().and_then(|state| HeaderValue::from_str(state).ok());
    for (name, value) in [(TRACEPARENT, parent), (TRACESTATE, state)] {
        if let Some(value) = value {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

/// What was agreed upon with the server.
#[derive(Clone, Default)]
struct Dialect {
    session: Option<HeaderValue>,
    version: Option<HeaderValue>,
    /// Every request says all that the server has to know.
    stateless: bool,
}

/// The HTTP side of one connection.
pub struct Http {
    /// Where requests go and as whom.
    pub endpoint: Endpoint,
    connection: Connection,
    dialect: Mutex<Dialect>,
    /// Where messages are posted to on the older transport, once the server has said it.
    pub(super) messages: OnceLock<Url>,
    /// Arguments that are sent as headers too.
    params: Mutex<ParamHeaders>,
    /// A request got an answer: the server is there.
    answered: Notify,
    aside: Semaphore,
    aside_queue: Semaphore,
    /// The server gave a session id that cannot be one.
    bad_session: AtomicBool,
    tasks: TaskTracker,
}

impl Http {
    /// Starts the task of a connection on the tracker.
    pub fn open(endpoint: Endpoint, log: Arc<Log>, tasks: &TaskTracker) -> (Arc<Self>, Connection) {
        let (connection, queue) = Connection::new(log);
        let http = Arc::new(Self {
            endpoint,
            connection: connection.clone(),
            dialect: Mutex::default(),
            messages: OnceLock::new(),
            params: Mutex::default(),
            answered: Notify::new(),
            aside: Semaphore::new(ASIDE),
            aside_queue: Semaphore::new(ASIDE_QUEUE),
            bad_session: AtomicBool::new(false),
            tasks: tasks.clone(),
        });
        tasks.spawn(drive(Arc::clone(&http), queue));
        (http, connection)
    }

    /// Goes on with a session that the server gave earlier, whoever asked for it.
    pub fn resume(&self, session: HeaderValue, version: Option<&str>) {
        let mut dialect = self.dialect();
        dialect.session = Some(session);
        dialect.version = version.and_then(|version| HeaderValue::from_str(version).ok());
    }

    /// Speaks without sessions from now on.
    pub fn be_stateless(&self, version: &str) {
        self.connection.cancel_by_closing();
        let mut dialect = self.dialect();
        dialect.stateless = true;
        dialect.session = None;
        dialect.version = HeaderValue::from_str(version).ok();
    }

    /// Back to a beginning, after something was tried that the server does not speak.
    pub fn forget_dialect(&self) {
        self.connection.cancel_by_telling();
        *self.dialect() = Dialect::default();
    }

    /// The version that was agreed upon, which every further request names.
    pub fn set_version(&self, version: &str) {
        self.dialect().version = HeaderValue::from_str(version).ok();
    }

    /// The session that the server keeps, if it keeps one.
    pub fn session(&self) -> Option<HeaderValue> {
        self.dialect().session.clone()
    }

    /// Whether the server gave a session id that cannot be sent back.
    pub fn has_bad_session(&self) -> bool {
        self.bad_session.load(Ordering::Acquire)
    }

    /// The version that was agreed upon.
    pub fn version(&self) -> Option<String> {
        self.dialect().version.as_ref().and_then(|version| version.to_str().ok()).map(str::to_owned)
    }

    /// Learns from the tools as listed which of their arguments are sent as headers too.
    pub fn set_tools(&self, tools: &RawJson) {
        if self.dialect().stateless {
            let params = ParamHeaders::of(tools);
            *self.params.lock().unwrap_or_else(PoisonError::into_inner) = params;
        }
    }

    /// Listens to what the server says by itself, until the connection ends: a server of sessions may offer a
    /// stream for it.
    pub fn listen(self: &Arc<Self>) {
        if self.dialect().stateless || self.messages.get().is_some() {
            return;
        }
        let http = Arc::clone(self);
        self.tasks.spawn(async move {
            tokio::select! {
                () = http.listening() => {}
                () = http.connection.closed() => {}
                () = http.connection.broken() => {}
            }
        });
    }

    /// Tells the server that the session is over.
    pub async fn end_session(&self) {
        let Some(session) = self.session() else { return };
        let headers = HeaderMap::from_iter([(SESSION, session)]);
        let ended = self.endpoint.send(Method::DELETE, &self.endpoint.url, &headers, None);
        if timeout(limits::REMOTE_FAREWELL, ended).await.is_err() {
            tracing::debug!(server = %self.endpoint.server(), "a session was not ended in time");
        }
    }

    async fn listening(&self) {
        let reconnection = self.endpoint.record.reconnection();
        let mut last: Option<HeaderValue> = None;
        let mut attempt = 0;
        loop {
            let mut asked = None;
            match self.stream(last.as_ref(), usize::MAX).await {
                Ok(mut events) => {
                    while let Ok(event) = events.next().await {
                        attempt = 0;
                        asked = asked_pause(&event).or(asked);
                        last = event_id(&event).or(last);
                        self.take(event, None).await;
                    }
                }
                Err(Failure::SessionLost) => return self.connection.break_off(),
                // It offers no such stream, which it need not.
                Err(Failure::Upstream(upstream))
                    if matches!(upstream.status, Some(300..=428 | 430..=499)) =>
                {
                    return;
                }
                Err(_) => {}
            }
            if attempt >= reconnection.max_retries {
                // It is not there, as it seems. Somebody else will find out when it is back.
                self.answered.notified().await;
                attempt = 0;
            }
            sleep(asked.unwrap_or_else(|| reconnection.pause(attempt))).await;
            attempt += 1;
        }
    }

    /// Opens a stream of what the server says by itself, or of the rest of an answer.
    async fn stream(&self, last: Option<&HeaderValue>, most: usize) -> Result<Events, Failure> {
        let mut headers = self.headers();
        headers.insert(header::ACCEPT, HeaderValue::from_static("text/event-stream"));
        if let Some(last) = last {
            headers.insert(LAST_EVENT, last.clone());
        }
        let response = self.endpoint.send(Method::GET, &self.endpoint.url, &headers, None).await?;
        match response.status() {
            StatusCode::OK if is_type(&response, "text/event-stream") => Ok(Events::of(response, most)),
            StatusCode::NOT_FOUND if self.session().is_some() => Err(Failure::SessionLost),
            StatusCode::OK => Err(self.endpoint.malformed("answered with something else than a stream")),
            _ => Err(self.endpoint.refused(&response)),
        }
    }

    /// Sends one request and hands on what is answered to it. Returned is why there is no answer.
    async fn exchange(&self, id: u64, payload: Payload) -> Result<(), Failure> {
        let streamable = self.messages.get().is_none();
        let (headers, body) = self.prepare(payload);
        let response = self.post(headers, body).await?;
        self.answered.notify_one();
        if response.status().is_success() && !streamable {
            // The answer comes on the one stream.
            return Ok(());
        }
        if response.headers().contains_key(header::CONTENT_ENCODING) {
            return Err(self.endpoint.malformed("answered in an encoding that nobody asked for"));
        }
        match response.status() {
            StatusCode::OK if is_type(&response, "text/event-stream") => {
                self.keep_session(&response)?;
                self.read_stream(id, Events::of(response, limits::REMOTE_ANSWER_BYTES)).await
            }
            StatusCode::OK if is_type(&response, "application/json") => {
                self.keep_session(&response)?;
                self.read_document(id, response).await
            }
            status if status.is_success() => {
                Err(self.endpoint.malformed("did not answer with JSON or a stream"))
            }
            status @ (StatusCode::BAD_REQUEST | StatusCode::NOT_FOUND) => {
                self.read_refusal(id, status, response).await
            }
            _ => Err(self.endpoint.refused(&response)),
        }
    }

    /// Sends a request. A server that cannot be reached may just be starting again: it is tried as often as the
    /// record says, and has seen nothing of the request meanwhile.
    async fn post(&self, headers: HeaderMap, body: Bytes) -> Result<Response, Failure> {
        let reconnection = self.endpoint.record.reconnection();
        let mut attempt = 0;
        loop {
            let sent = self.endpoint.send(Method::POST, self.target(), &headers, Some(body.clone())).await;
            match sent {
                Err(Failure::Upstream(upstream))
                    if upstream.error.code == ErrorCode::UpstreamUnavailable
                        && upstream.status.is_none()
                        && attempt < reconnection.max_retries => {}
                sent => return sent,
            }
            sleep(reconnection.pause(attempt)).await;
            attempt += 1;
        }
    }

    /// Says that the answer to `initialize` was understood, and waits until the server has heard it: requests
    /// are sent side by side, and none may come before that.
    pub async fn initialized(&self) -> Result<(), Failure> {
        let bytes = message::notification("notifications/initialized", None);
        self.tell(Payload::plain(bytes)).await
    }

    /// Sends what has no answer.
    async fn tell(&self, payload: Payload) -> Result<(), Failure> {
        let (headers, body) = self.prepare(payload);
        let response = self.endpoint.send(Method::POST, self.target(), &headers, Some(body)).await?;
        if response.status().is_success() { Ok(()) } else { Err(self.endpoint.refused(&response)) }
    }

    /// Sends what has no answer and what nobody waits for, in its turn among others, if it comes soon.
    async fn tell_aside(&self, payload: Payload) {
        let Ok(_place) = self.aside_queue.try_acquire() else { return };
        let told = async {
            let _permit = self.aside.acquire().await;
            self.tell(payload).await
        };
        tokio::select! {
            told = timeout(limits::REMOTE_FAREWELL, told) => {
                if !matches!(told, Ok(Ok(()))) {
                    tracing::debug!(server = %self.endpoint.server(), "a notification was not taken");
                }
            }
            () = self.connection.closed() => {}
        }
    }

    fn prepare(&self, mut payload: Payload) -> (HeaderMap, Bytes) {
        let mut headers = self.headers();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json, text/event-stream"));
        if self.dialect().stateless {
            let params = self.params.lock().unwrap_or_else(PoisonError::into_inner);
            standard(&payload.bytes, &params, &mut headers);
        }
        if let Some(trace) = payload.trace.take() {
            add_trace(&trace, &mut headers);
        }
        // The line break of the other transport.
        if payload.bytes.last() == Some(&b'\n') {
            payload.bytes.pop();
        }
        (headers, Bytes::from_owner(payload))
    }

    fn headers(&self) -> HeaderMap {
        let dialect = self.dialect();
        let mut headers = HeaderMap::new();
        if let Some(version) = &dialect.version {
            headers.insert(VERSION, version.clone());
        }
        if let Some(session) = &dialect.session {
            headers.insert(SESSION, session.clone());
        }
        headers
    }

    fn target(&self) -> &Url {
        self.messages.get().unwrap_or(&self.endpoint.url)
    }

    /// Notes the session that a server begins with its first answer.
    fn keep_session(&self, response: &Response) -> Result<(), Failure> {
        let Some(given) = response.headers().get(SESSION) else { return Ok(()) };
        let mut dialect = self.dialect();
        if dialect.stateless || dialect.session.is_some() {
            return Ok(());
        }
        match session_id(given.as_bytes()) {
            Some(session) => {
                dialect.session = Some(session);
                Ok(())
            }
            None => {
                self.bad_session.store(true, Ordering::Release);
                Err(self.endpoint.malformed("gave a session id that cannot be one"))
            }
        }
    }

    async fn read_document(&self, id: u64, mut response: Response) -> Result<(), Failure> {
        let mut body = BytesMut::new();
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() > ANSWER_BYTES => return Err(Failure::TooLarge),
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Ok(None) => break,
                Err(_) => return Err(self.endpoint.lost()),
            }
        }
        if std::str::from_utf8(&body).is_err() {
            return Err(self.endpoint.malformed("did not answer with text"));
        }
        self.connection.take(body.freeze(), Some(id)).await;
        if self.connection.awaits(id) {
            return Err(self.endpoint.malformed("did not answer the request that it was sent"));
        }
        Ok(())
    }

    /// Reads a stream until it has answered the request, and takes it up again where it broke off, as far as the
    /// server can do that.
    async fn read_stream(&self, id: u64, mut events: Events) -> Result<(), Failure> {
        let reconnection = self.endpoint.record.reconnection();
        let mut last: Option<HeaderValue> = None;
        let mut asked: Option<Duration> = None;
        let mut attempt = 0;
        loop {
            let broken = loop {
                match events.next().await {
                    Ok(event) => {
                        attempt = 0;
                        asked = asked_pause(&event).or(asked);
                        last = event_id(&event).or(last);
                        self.take(event, Some(id)).await;
                        if !self.connection.awaits(id) {
                            return Ok(());
                        }
                    }
                    Err(broken) => break broken,
                }
            };
            match broken {
                Broken::TooLarge => return Err(self.endpoint.too_much()),
                Broken::Malformed => {
                    return Err(self.endpoint.malformed("sent a stream that cannot be read"));
                }
                Broken::Stalled => return Err(self.endpoint.lost()),
                Broken::Ended => {}
            }
            events = self.reopened(last.as_ref(), &mut attempt, asked, &reconnection).await?;
        }
    }

    /// The rest of an answer whose stream ended before it was there.
    async fn reopened(
        &self,
        last: Option<&HeaderValue>,
        attempt: &mut u32,
        asked: Option<Duration>,
        reconnection: &Reconnection,
    ) -> Result<Events, Failure> {
        let Some(last) = last.filter(|_| !self.dialect().stateless) else { return Err(self.endpoint.lost()) };
        loop {
            if *attempt >= reconnection.max_retries {
                return Err(self.endpoint.lost());
            }
            sleep(asked.unwrap_or_else(|| reconnection.pause(*attempt))).await;
            *attempt += 1;
            match self.stream(Some(last), limits::REMOTE_ANSWER_BYTES).await {
                Ok(events) => return Ok(events),
                // The request was taken; who lost the session lost the answer with it.
                Err(Failure::SessionLost) => return Err(self.endpoint.lost()),
                Err(Failure::Upstream(upstream)) if upstream.status.is_some_and(|status| status < 500) => {
                    return Err(self.endpoint.lost());
                }
                Err(_) => {}
            }
        }
    }

    /// Tells a lost session from an answer in JSON-RPC and from a plain refusal.
    async fn read_refusal(&self, id: u64, status: StatusCode, response: Response) -> Result<(), Failure> {
        let refused = self.endpoint.refused(&response);
        let has_session = self.session().is_some();
        if status == StatusCode::NOT_FOUND && has_session {
            return Err(Failure::SessionLost);
        }
        let text = Bytes::from(Endpoint::text(response).await);
        // Servers of several SDKs say 400 where they mean that they do not know the session.
        let speaks_of_session = || String::from_utf8_lossy(&text).to_ascii_lowercase().contains("session");
        if status == StatusCode::BAD_REQUEST && has_session && speaks_of_session() {
            return Err(Failure::SessionLost);
        }
        match Message::parse(&text) {
            Message::Response { id: of, body: Some(Err(error)) } if of == id => Err(Failure::Rpc(error)),
            _ => Err(refused),
        }
    }

    pub(super) async fn take(&self, event: Sse, only: Option<u64>) {
        let Some(data) = event.data.filter(|data| !data.is_empty()) else { return };
        if event.event.as_deref().is_none_or(|name| name == "message") {
            self.connection.take(Bytes::from(data), only).await;
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    fn dialect(&self) -> MutexGuard<'_, Dialect> {
        self.dialect.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends what the connection has to send, each request in a task of its own. Calls are bounded by slots.
async fn drive(http: Arc<Http>, mut queue: mpsc::Receiver<Frame>) {
    let connection = http.connection.clone();
    loop {
        let frame = tokio::select! {
            frame = queue.recv() => frame,
            () = connection.closed() => None,
        };
        match frame {
            Some(Frame::Request(ticket)) => {
                if let Some(payload) = ticket.take() {
                    http.tasks.spawn(request(Arc::clone(&http), ticket, payload));
                }
            }
            Some(Frame::Plain(bytes)) => {
                let http = Arc::clone(&http);
                let payload = Payload::plain(bytes);
                http.tasks.clone().spawn(async move { http.tell_aside(payload).await });
            }
            None => return,
        }
    }
}

async fn request(http: Arc<Http>, ticket: Arc<Ticket>, payload: Payload) {
    let id = ticket.id;
    let failure = tokio::select! {
        exchanged = http.exchange(id, payload) => match exchanged {
            Ok(()) => return,
            Err(failure) => failure,
        },
        // Nobody waits, or the server is to see by the end of its stream that nobody does.
        () = ticket.gone() => Failure::Closed { written: true },
        () = http.connection.closed() => Failure::Closed { written: true },
    };
    if failure == Failure::SessionLost {
        http.connection.break_off();
    }
    http.connection.resolve(id, Err(failure));
}

/// A session id as it can be sent back; `None` if it cannot.
pub fn session_id(text: &[u8]) -> Option<HeaderValue> {
    let visible = text.iter().all(u8::is_ascii_graphic) && (1..=SESSION_BYTES).contains(&text.len());
    let mut value = HeaderValue::from_bytes(text).ok().filter(|_| visible)?;
    value.set_sensitive(true);
    Some(value)
}

/// The text of a session id.
pub fn session_text(session: &HeaderValue) -> SecretString {
    String::from_utf8_lossy(session.as_bytes()).into_owned().into()
}

fn event_id(event: &Sse) -> Option<HeaderValue> {
    let id = event.id.as_ref().filter(|id| !id.is_empty() && id.len() <= EVENT_ID_BYTES)?;
    HeaderValue::from_str(id).ok()
}

pub(super) fn is_type(response: &Response, wanted: &str) -> bool {
    let value = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = value.and_then(|value| value.split(';').next()).unwrap_or_default();
    kind.trim().eq_ignore_ascii_case(wanted)
}
