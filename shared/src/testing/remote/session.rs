//! Sessions: each is a server of the fixture, fed from requests; what it writes goes to the streams of the
//! requests that it answers.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Read, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, Receiver, SyncSender},
    },
    thread,
    time::Duration,
};

use serde_json::{Value, value::RawValue};

use crate::testing::fixture;

/// Lines that may wait for the fixture to read them.
const LINES: usize = 16_384;

/// Events of one stream that wait to be read or to be read again.
#[derive(Default)]
pub(super) struct Stream {
    /// What ids of its events begin with.
    pub(super) number: u64,
    state: Mutex<Events>,
    changed: Condvar,
}

#[derive(Default)]
struct Events {
    all: Vec<String>,
    over: bool,
}

/// What a reader of a stream finds.
pub(super) enum Next {
    Event(String),
    Over,
    Nothing,
}

impl Stream {
    fn lock(&self) -> MutexGuard<'_, Events> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: String) {
        self.lock().all.push(event);
        self.changed.notify_all();
    }

    pub(super) fn finish(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// How many events there were so far.
    pub(super) fn len(&self) -> usize {
        self.lock().all.len()
    }

    /// The event at a place, waited for a short time.
    pub(super) fn next(&self, at: usize, wait: Duration) -> Next {
        let missing = |events: &mut Events| events.all.len() <= at && !events.over;
        let (events, _) = self
            .changed
            .wait_timeout_while(self.lock(), wait, missing)
            .unwrap_or_else(PoisonError::into_inner);
        match events.all.get(at) {
            Some(event) => Next::Event(event.clone()),
            None if events.over => Next::Over,
            None => Next::Nothing,
        }
    }
}

/// A request that has no answer yet.
struct Pending {
    /// The id as the client spelled it. Inside, ids are our own: a client that goes on with a session after
    /// it was started again counts from the beginning.
    id: String,
    token: Option<String>,
    stream: Arc<Stream>,
}

#[derive(Default)]
struct Routes {
    pending: BTreeMap<u64, Pending>,
    streams: HashMap<u64, Arc<Stream>>,
}

/// One client's conversation.
pub(super) struct Session {
    pub(super) id: String,
    /// Whose token began it.
    pub(super) user: Option<String>,
    /// What belongs to no request.
    pub(super) main: Arc<Stream>,
    /// Answers go to the one stream, too.
    one_stream: bool,
    feed: Mutex<Option<SyncSender<Vec<u8>>>>,
    routes: Mutex<Routes>,
    /// Somebody reads what belongs to no request.
    pub(super) listened: AtomicBool,
    next: AtomicU64,
}

impl Session {
    /// Starts one.
    pub(super) fn start(id: String, user: Option<String>, flags: &[String], one_stream: bool) -> Arc<Self> {
        let (feed, lines) = mpsc::sync_channel(LINES);
        let session = Arc::new(Self {
            id,
            user,
            main: Arc::default(),
            one_stream,
            feed: Mutex::new(Some(feed)),
            routes: Mutex::default(),
            listened: AtomicBool::new(false),
            next: AtomicU64::new(1),
        });
        let output = Lines { session: Arc::downgrade(&session), rest: Vec::new() };
        let flags = flags.to_vec();
        thread::spawn(move || fixture::serve(&flags, Feed { lines, rest: Vec::new() }, output));
        session
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a request in, and returns the stream of its answer and what it is called inside.
    pub(super) fn request(&self, message: &Value, text: &[u8], id: &RawValue) -> (Arc<Stream>, u64) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let stream = match self.one_stream {
            true => Arc::clone(&self.main),
            false => Arc::new(Stream { number, ..Stream::default() }),
        };
        let token = message.pointer("/params/_meta/progressToken").map(Value::to_string);
        let pending = Pending { id: id.get().to_owned(), token, stream: Arc::clone(&stream) };
        {
            let mut routes = self.routes();
            routes.pending.insert(number, pending);
            routes.streams.insert(number, Arc::clone(&stream));
        }
        self.send(renamed(text, number));
        (stream, number)
    }

    /// Hands in what has no answer. A cancellation names its request as it is called inside.
    pub(super) fn tell(&self, message: &Value, text: &[u8]) {
        if message["method"] == "notifications/cancelled" {
            let named = message["params"]["requestId"].to_string();
            let known = self.routes().pending.iter().find(|(_, one)| one.id == named).map(|(id, _)| *id);
            // A request that is over cannot be cancelled any more.
            return if let Some(id) = known {
                self.cancel(id)
            };
        }
        self.send(one_line(text));
    }

    /// Tells the fixture that nobody waits for a request any more.
    pub(super) fn cancel(&self, id: u64) {
        let line = format!(
            r#"{{"jsonrpc":"2.0","method":"notifications/cancelled","params":{{"requestId":{id}}}}}"#
        );
        self.send(line.into_bytes());
    }

    /// A stream whose rest is asked for.
    pub(super) fn stream(&self, number: u64) -> Option<Arc<Stream>> {
        if number == 0 {
            return Some(Arc::clone(&self.main));
        }
        self.routes().streams.get(&number).cloned()
    }

    /// Ends it, with all of its streams.
    pub(super) fn end(&self) {
        self.feed.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.main.finish();
        for stream in self.routes().streams.values() {
            stream.finish();
        }
    }

    fn send(&self, mut line: Vec<u8>) {
        line.push(b'\n');
        if let Some(feed) = &*self.feed.lock().unwrap_or_else(PoisonError::into_inner) {
            // A fixture that has left answers nothing, as its requests see.
            let _ = feed.send(line);
        }
    }

    /// Takes a line that the fixture wrote to where it belongs.
    fn route(&self, line: &str) {
        let message: Value = serde_json::from_str(line).unwrap_or_default();
        let id = message["id"].as_u64();
        let mut routes = self.routes();
        if message["method"].is_null()
            && let Some(number) = id
            && let Some(pending) = routes.pending.remove(&number)
        {
            let inside = format!(r#"{{"jsonrpc":"2.0","id":{number},"#);
            let rest = line.strip_prefix(&inside).expect("answers begin so");
            pending.stream.push(format!(r#"{{"jsonrpc":"2.0","id":{},{rest}"#, pending.id));
            if !self.one_stream {
                pending.stream.finish();
            }
            return;
        }
        let token = (message["method"] == "notifications/progress")
            .then(|| message["params"]["progressToken"].to_string());
        let about = routes.pending.values().find(|one| token.is_some() && one.token == token);
        // Whatever else belongs to a request does not say to which.
        let newest = || routes.pending.values().next_back();
        let general = message["method"] == "notifications/tools/list_changed";
        match about.or_else(|| if general { None } else { newest() }) {
            Some(pending) => pending.stream.push(line.to_owned()),
            None => self.main.push(line.to_owned()),
        }
    }
}

/// The request under another id.
fn renamed(text: &[u8], id: u64) -> Vec<u8> {
    let mut members: BTreeMap<String, Box<RawValue>> =
        serde_json::from_slice(text).expect("the message was read before");
    members.insert("id".to_owned(), RawValue::from_string(id.to_string()).expect("a number is JSON"));
    one_line(&serde_json::to_vec(&members).expect("what was read can be written"))
}

/// White space between tokens may be line breaks; inside of strings there are none.
fn one_line(text: &[u8]) -> Vec<u8> {
    text.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect()
}

/// The fixture's standard input.
struct Feed {
    lines: Receiver<Vec<u8>>,
    rest: Vec<u8>,
}

impl Read for Feed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            self.rest = self.lines.recv().unwrap_or_default();
        }
        let count = self.rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.rest[..count]);
        self.rest.drain(..count);
        Ok(count)
    }
}

/// The fixture's standard output.
struct Lines {
    session: std::sync::Weak<Session>,
    rest: Vec<u8>,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let session = self.session.upgrade().ok_or(io::ErrorKind::BrokenPipe)?;
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            session.route(String::from_utf8_lossy(&line).trim_end());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
