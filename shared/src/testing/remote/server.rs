//! Connections and requests: who may ask what, and which session it belongs to.

use std::{
    collections::HashMap,
    convert::Infallible,
    fs,
    io::{self, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use base64::{Engine, engine::general_purpose};
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};
use uuid::Uuid;

use super::{
    Era, Options,
    answer::{self, End},
    hostile,
    session::Session,
};
use crate::testing::{
    fixture::append_line,
    http::{self, Request},
};

/// The revision without sessions.
const MODERN: &str = "2026-07-28";
/// Those with.
const LEGACY: [&str; 4] = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"];

/// All that connections share.
pub(super) struct Server {
    pub(super) options: Options,
    pub(super) address: SocketAddr,
    sessions: Mutex<HashMap<String, Arc<Session>>>,
    /// Serves the revision without sessions.
    modern: Arc<Session>,
    /// How often all streams were to end.
    pub(super) drops: AtomicU64,
}

/// The id of a message, spelled as it came.
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
}

/// Listens, and says where.
pub(super) fn serve(options: Options) -> Result<Infallible, String> {
    let address = (Ipv4Addr::LOCALHOST, options.port);
    let listener = TcpListener::bind(address).map_err(|error| format!("cannot listen: {error}"))?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    let mut flags = options.tools.clone();
    flags.push("--modern-only".to_owned());
    let modern = Session::start(String::new(), None, &flags, false);
    let (sessions, drops) = (Mutex::default(), AtomicU64::new(0));
    let server = Arc::new(Server { options, address, sessions, modern, drops });
    server.restore();
    // Whoever started it and does not read this does not want to know.
    let _ = writeln!(io::stdout(), "listening on {}", address.port());
    loop {
        let Ok((stream, _)) = listener.accept() else { continue };
        let server = Arc::clone(&server);
        thread::spawn(move || server.connection(stream));
    }
}

impl Server {
    pub(super) fn sessions(&self) -> MutexGuard<'_, HashMap<String, Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}/mcp", self.address)
    }

    fn connection(&self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let Ok(mut out) = stream.try_clone() else { return };
        let mut reader = BufReader::new(stream);
        while let Some(request) = Request::read(&mut reader) {
            if !self.request(&request, &mut out) {
                break;
            }
        }
    }

    /// Answers one request; false if the connection is to end.
    fn request(&self, request: &Request, out: &mut TcpStream) -> bool {
        if let Some(what) = request.path.strip_prefix("/control/") {
            return self.control(what, out);
        }
        if let Some(at) = request.path.strip_prefix("/.well-known/oauth-protected-resource") {
            self.log(request, None, None);
            return self.metadata(at, out);
        }
        let message: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let rpc = message["method"].as_str();
        let user = self.user(request);
        self.log(request, rpc, user.as_ref().ok().and_then(Option::as_deref));
        let user = match user {
            Ok(user) => user,
            Err(status) => return self.challenge(status, out),
        };
        thread::sleep(self.options.delay);
        if let Some(mode) = self.hostility(request, &message) {
            if rpc == Some("tools/call") {
                self.executed(&message);
            }
            let id = serde_json::from_slice::<Head<'_>>(&request.body).ok().and_then(|head| head.id);
            return hostile::misbehave(&mode, id.map_or("null", RawValue::get), self, out);
        }
        match (request.method.as_str(), request.path.as_str(), self.options.era) {
            ("POST", "/messages", Era::Sse) => self.posted(request, &message, out),
            ("POST", "/mcp" | "/sse", Era::Sse) => answer::empty(out, self.options.sse_post),
            ("GET", "/mcp" | "/sse", Era::Sse) => self.old_stream(user, out),
            ("POST", "/mcp", era) => match self.is_modern(request, &message) {
                true if era == Era::Sessions => {
                    answer::refuse(out, 400, -32000, "Bad Request: No valid session ID provided")
                }
                true => self.stateless(request, &message, out),
                false if era == Era::Stateless && rpc != Some("initialize") => {
                    answer::refuse(out, 400, -32020, "the header MCP-Protocol-Version is missing")
                }
                false if era == Era::Stateless => self.stateless(request, &message, out),
                false => self.post(request, &message, user, out),
            },
            ("GET", "/mcp", Era::Sessions | Era::Both) if !self.options.no_get => {
                self.get(request, user, out)
            }
            ("DELETE", "/mcp", Era::Sessions | Era::Both) if !self.options.no_delete => {
                self.delete(request, out)
            }
            (_, "/mcp" | "/sse", _) => answer::empty(out, 405),
            _ => answer::empty(out, 404),
        }
    }

    /// A request of the era of sessions.
    fn post(&self, request: &Request, message: &Value, user: Option<String>, out: &mut TcpStream) -> bool {
        let accepts = request.header("accept").unwrap_or_default();
        if !accepts.contains("application/json") || !accepts.contains("text/event-stream") {
            let text = "Not Acceptable: Client must accept both application/json and text/event-stream";
            return answer::refuse(out, 406, -32000, text);
        }
        if !request.header("content-type").is_some_and(|kind| kind.starts_with("application/json")) {
            return answer::refuse(out, 415, -32000, "Unsupported Media Type");
        }
        if !message.is_object() {
            return answer::refuse(out, 400, -32700, "Parse error");
        }
        let version = request.header("mcp-protocol-version");
        if version.is_some_and(|version| !LEGACY.contains(&version)) {
            return answer::refuse(out, 400, -32000, "Bad Request: Unsupported protocol version");
        }
        let mut headers = Vec::new();
        let session = if message["method"] == "initialize" {
            let id = match self.options.no_session {
                true => String::new(),
                false => format!("session-{}", Uuid::new_v4()),
            };
            let session = Session::start(id.clone(), user, &self.options.tools, false);
            self.sessions().insert(id.clone(), Arc::clone(&session));
            headers.extend((!id.is_empty()).then_some(("mcp-session-id", id)));
            session
        } else {
            match self.session(request, user.as_deref()) {
                Ok(session) => session,
                Err(status) => return self.unknown_session(status, out),
            }
        };
        self.keep(&session, message, &request.body);
        let Some(id) = id_of(message, &request.body) else {
            session.tell(message, &request.body);
            return answer::empty(out, 202);
        };
        let (is_call, drops) = (message["method"] == "tools/call", self.drops());
        if is_call {
            self.executed(message);
        }
        let (stream, _) = session.request(message, &request.body, id);
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let end = self.answer(out, &stream, &headers, is_call, false, drops);
        self.note_end(end, request, message)
    }

    /// A request of the era without sessions.
    fn stateless(&self, request: &Request, message: &Value, out: &mut TcpStream) -> bool {
        if let Err(problem) = checked(request, message) {
            let id = &message["id"];
            let error = json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32020, "message": problem}});
            return answer::json(out, 400, &[], &error.to_string());
        }
        let Some(id) = id_of(message, &request.body) else {
            self.modern.tell(message, &request.body);
            return answer::empty(out, 202);
        };
        let (is_call, drops) = (message["method"] == "tools/call", self.drops());
        if is_call {
            self.executed(message);
        }
        let (stream, number) = self.modern.request(message, &request.body, id);
        let end = self.answer(out, &stream, &[], is_call, true, drops);
        if end == End::Gone {
            // Here that is how requests are cancelled.
            self.modern.cancel(number);
        }
        self.note_end(end, request, message)
    }

    /// What belongs to no request, or the rest of an answer.
    fn get(&self, request: &Request, user: Option<String>, out: &mut TcpStream) -> bool {
        let session = match self.session(request, user.as_deref()) {
            Ok(session) => session,
            Err(status) => return self.unknown_session(status, out),
        };
        if !request.header("accept").is_some_and(|kinds| kinds.contains("text/event-stream")) {
            return answer::refuse(out, 406, -32000, "Not Acceptable");
        }
        let last = request.header("last-event-id").and_then(|last| {
            let (stream, at) = last.split_once('-')?;
            Some((session.stream(stream.parse().ok()?)?, at.parse().ok()?))
        });
        let (stream, from) = match last {
            Some(found) => found,
            None if request.header("last-event-id").is_some() => {
                return answer::refuse(out, 400, -32000, "Invalid event ID");
            }
            // One such stream is enough, as the Node SDK sees it.
            None if session.listened.swap(true, Ordering::AcqRel) => {
                let text = "Conflict: Only one SSE stream is allowed per session";
                return answer::refuse(out, 409, -32000, text);
            }
            None => (Arc::clone(&session.main), session.main.len()),
        };
        let main = Arc::ptr_eq(&stream, &session.main);
        let end = match answer::begin_stream(out, &[]) {
            Ok(()) => self.follow(out, &stream, from, self.options.resumable, self.drops()),
            Err(_) => End::Gone,
        };
        if main {
            session.listened.store(false, Ordering::Release);
        }
        end == End::Over
    }

    fn delete(&self, request: &Request, out: &mut TcpStream) -> bool {
        let removed = request.header("mcp-session-id").and_then(|id| self.sessions().remove(id));
        match removed {
            Some(session) => {
                session.end();
                answer::empty(out, 200)
            }
            None => self.unknown_session(self.options.unknown_session, out),
        }
    }

    /// The one stream of the older transport.
    fn old_stream(&self, user: Option<String>, out: &mut TcpStream) -> bool {
        let id = format!("session-{}", Uuid::new_v4());
        let session = Session::start(id.clone(), user, &self.options.tools, true);
        self.sessions().insert(id.clone(), Arc::clone(&session));
        let first = format!("event: endpoint\ndata: /messages?sessionId={id}\n\n");
        if answer::begin_stream(out, &[]).and_then(|()| answer::chunk(out, first.as_bytes())).is_ok() {
            self.follow(out, &session.main, 0, false, self.drops());
        }
        self.sessions().remove(&id);
        session.end();
        false
    }

    /// A message of the older transport.
    fn posted(&self, request: &Request, message: &Value, out: &mut TcpStream) -> bool {
        let query = request.query();
        let id = query.iter().find(|(name, _)| name == "sessionId").map(|(_, value)| value.as_str());
        let session = id.and_then(|id| self.sessions().get(id).cloned());
        let Some(session) = session else { return answer::empty(out, 404) };
        match id_of(message, &request.body) {
            Some(id) => {
                if message["method"] == "tools/call" {
                    self.executed(message);
                }
                session.request(message, &request.body, id);
            }
            None => session.tell(message, &request.body),
        }
        http::respond(out, 202, &[("content-type", "text/plain")], b"Accepted").is_ok()
    }

    /// The session that a request names, or the status for one that is not known.
    fn session(&self, request: &Request, user: Option<&str>) -> Result<Arc<Session>, u16> {
        let id = match request.header("mcp-session-id") {
            Some(id) => id,
            None if self.options.no_session => "",
            None => return Err(400),
        };
        let session = self.sessions().get(id).cloned();
        session.filter(|session| session.user.as_deref() == user).ok_or(self.options.unknown_session)
    }

    fn unknown_session(&self, status: u16, out: &mut TcpStream) -> bool {
        match status {
            400 => answer::refuse(out, 400, -32000, "Bad Request: No valid session ID provided"),
            _ => answer::refuse(out, status, -32001, "Session not found"),
        }
    }

    /// Whether a message is one of the revision without sessions.
    fn is_modern(&self, request: &Request, message: &Value) -> bool {
        request.header("mcp-protocol-version") == Some(MODERN)
            || message["method"] == "server/discover"
            || message.pointer("/params/_meta/io.modelcontextprotocol~1protocolVersion").is_some()
    }

    fn control(&self, what: &str, out: &mut TcpStream) -> bool {
        match what {
            "forget" => {
                for (_, session) in self.sessions().drain() {
                    session.end();
                }
            }
            "drop" => {
                self.drops.fetch_add(1, Ordering::AcqRel);
            }
            "sessions" => {
                let count = self.sessions().len().to_string();
                let _ = http::respond(out, 200, &[("connection", "close")], count.as_bytes());
                return false;
            }
            _ => return answer::empty(out, 404),
        }
        let _ = http::respond(out, 200, &[("connection", "close")], b"done");
        false
    }

    /// The mode in which this request is to be answered wrongly.
    fn hostility(&self, request: &Request, message: &Value) -> Option<String> {
        let method = message["method"].as_str().unwrap_or(&request.method);
        let at = |path: &str| message.pointer(path).and_then(Value::as_str);
        let asks = method == "tools/call" && at("/params/name") == Some("hostile");
        let asked = at("/params/arguments/mode").filter(|_| asks).map(str::to_owned);
        let set = self.options.hostile.iter().find(|(_, at)| at == method).map(|(mode, _)| mode.clone());
        asked.or(set)
    }

    /// Writes a message down that a session has to know again after a restart.
    fn keep(&self, session: &Session, message: &Value, text: &[u8]) {
        let Some(path) = &self.options.session_file else { return };
        let remembers = message.pointer("/params/name").is_some_and(|name| name == "remember");
        let begins = message["method"].as_str().is_some_and(|method| method.contains("initialize"));
        if remembers || begins {
            let text = String::from_utf8_lossy(text);
            let line = json!({"session": session.id, "user": session.user, "message": text}).to_string();
            append_line(Path::new(path), &line).expect("the session file can be written");
        }
    }

    /// Begins the sessions anew that another process had.
    fn restore(&self) {
        let Some(path) = &self.options.session_file else { return };
        for line in fs::read_to_string(path).unwrap_or_default().lines() {
            let kept: Value = serde_json::from_str(line).expect("the session file has one object per line");
            let text = |name: &str| kept[name].as_str().map(str::to_owned);
            let id = text("session").expect("a session has an id");
            let fresh = || Session::start(id.clone(), text("user"), &self.options.tools, false);
            let session = Arc::clone(self.sessions().entry(id.clone()).or_insert_with(fresh));
            let body = text("message").expect("a message is text").into_bytes();
            let message: Value = serde_json::from_slice(&body).expect("it was read before");
            match id_of(&message, &body) {
                Some(id) => {
                    session.request(&message, &body, id);
                }
                None => session.tell(&message, &body),
            }
        }
    }

    fn executed(&self, message: &Value) {
        if let Some(path) = &self.options.executed {
            let (tool, args) = (&message["params"]["name"], &message["params"]["arguments"]);
            let line = format!("{} {args}", tool.as_str().unwrap_or_default());
            append_line(Path::new(path), &line).expect("the log of calls can be written");
        }
    }

    fn log(&self, request: &Request, rpc: Option<&str>, user: Option<&str>) {
        let Some(path) = &self.options.requests else { return };
        let headers: Map<String, Value> =
            request.headers.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect();
        let line = json!({"method": request.method, "path": request.path, "headers": headers, "rpc": rpc,
            "user": user});
        append_line(Path::new(path), &line.to_string()).expect("the log of requests can be written");
    }

    /// Writes down that a client did not wait for its answer; false if the connection is to end.
    fn note_end(&self, end: End, request: &Request, message: &Value) -> bool {
        if end == End::Gone {
            let gone = Request { method: "GONE".to_owned(), ..request.clone() };
            self.log(&gone, message["method"].as_str(), None);
        }
        end == End::Over
    }
}

/// The id of a request, spelled as it came; `None` for what has no answer.
fn id_of<'a>(message: &Value, body: &'a [u8]) -> Option<&'a RawValue> {
    message.get("method")?;
    serde_json::from_slice::<Head<'a>>(body).ok()?.id
}

/// Whether the headers of a request say what its body says, as SEP-2243 wants.
fn checked(request: &Request, message: &Value) -> Result<(), String> {
    let in_meta = message.pointer("/params/_meta/io.modelcontextprotocol~1protocolVersion");
    if message["method"] == "initialize" {
        return Ok(());
    }
    if in_meta.and_then(Value::as_str) != request.header("mcp-protocol-version") {
        return Err("MCP-Protocol-Version does not match the body".to_owned());
    }
    if message["method"].as_str() != request.header("mcp-method") {
        return Err("Mcp-Method does not match the body".to_owned());
    }
    if message["method"] == "tools/call" {
        let given = request.header("mcp-name").ok_or("Mcp-Name is missing")?;
        let coded = given.strip_prefix("=?base64?").and_then(|rest| rest.strip_suffix("?="));
        let name = match coded {
            Some(coded) => general_purpose::STANDARD
                .decode(coded)
                .ok()
                .and_then(|bytes| String::from_utf8(bytes).ok())
                .ok_or("Mcp-Name is not base64")?,
            None => given.to_owned(),
        };
        if message["params"]["name"] != name {
            return Err("Mcp-Name does not match the body".to_owned());
        }
    }
    if request.header("mcp-session-id").is_some() {
        return Err("there are no sessions".to_owned());
    }
    Ok(())
}

/// Writes as much as the client takes.
pub(super) fn pour(out: &mut TcpStream, bytes: &[u8], pieces: u64) {
    for _ in 0..pieces {
        if out.write_all(bytes).is_err() {
            return;
        }
    }
}
