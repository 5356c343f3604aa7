//! The DevTools protocol over the pipe that Chromium gives to whoever starts it: JSON with a NUL after each message. There
//! is no port that another program could connect to.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    sync::{mpsc, oneshot},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::transport::turns::Turns;

/// Bytes of one message.
const MESSAGE: u64 = 64 * 1024 * 1024;
/// Messages that may wait to be written.
const OUTBOX: usize = 256;
/// Events of one page that may wait to be read.
const EVENTS: usize = 4 * 1024;

/// A browser, as its protocol shows it. Cloning it is cheap.
#[derive(Clone)]
pub struct Cdp {
    outbox: mpsc::Sender<Vec<u8>>,
    shared: Arc<Shared>,
}

struct Shared {
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Result<Value, CdpError>>>>,
    sessions: Mutex<HashMap<String, mpsc::Sender<Event>>>,
    gone: CancellationToken,
}

/// Why there is no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CdpError {
    /// The browser is gone.
    #[error("the browser is gone")]
    Gone,
    /// The browser refuses.
    #[error("the browser says: {0}")]
    Refused(String),
}

/// What happens in a page, as far as it is of interest.
#[derive(Debug)]
pub enum Event {
    /// A frame's document came to another point of its life.
    Lifecycle { frame: String, name: String },
    /// A document is asked for.
    Requested { frame: String, request: String, url: String },
    /// It is answered.
    Answered { frame: String, url: String, status: u16, kind: String },
    /// It does not come.
    Failed { request: String, error: String },
    /// The page wants an answer of a person.
    Dialog,
    /// The page's process is gone.
    Crashed,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Message<'a> {
    id: Option<u64>,
    method: Option<String>,
    session_id: Option<String>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    // Read when somebody waits for it: strings of pages may be no Unicode, and are then that page's trouble only.
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    message: String,
}

/// The members of all events that are looked at.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Params {
    #[serde(default)]
    frame_id: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    request_id: String,
    #[serde(default)]
    error_text: String,
    #[serde(rename = "type", default)]
    kind: String,
    request: Option<Asked>,
    response: Option<Response>,
}

#[derive(Deserialize)]
struct Asked {
    url: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    url: String,
    status: u16,
    mime_type: String,
}

/// Forgets a question that nobody waits for any more.
struct Waiting<'a>(&'a Shared, u64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.0.waiting).remove(&self.1);
    }
}

impl Cdp {
    /// Speaks over these ends of the pipe.
    pub fn new(
        mut input: impl AsyncWrite + Send + Unpin + 'static,
        output: impl AsyncRead + Send + Unpin + 'static,
        tasks: &TaskTracker,
    ) -> Self {
        let (outbox, mut queue) = mpsc::channel::<Vec<u8>>(OUTBOX);
        let shared = Arc::new(Shared {
            next: AtomicU64::new(1),
            waiting: Mutex::default(),
            sessions: Mutex::default(),
            gone: CancellationToken::new(),
        });
        let gone = shared.gone.clone();
        tasks.spawn(async move {
            let write = async {
                while let Some(message) = queue.recv().await {
                    if input.write_all(&message).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = write => {}
                () = gone.cancelled() => {}
            }
        });
        let reader = Arc::clone(&shared);
        tasks.spawn(async move {
            tokio::select! {
                () = read(output, &reader) => {}
                () = reader.gone.cancelled() => {}
            }
            reader.end();
        });
        Self { outbox, shared }
    }

    /// Asks the browser, or one of its pages. The caller sees to the time.
    pub async fn call(&self, session: Option<&str>, method: &str, params: Value) -> Result<Value, CdpError> {
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        lock(&self.shared.waiting).insert(id, answer);
        let _waiting = Waiting(&self.shared, id);
        if self.shared.gone.is_cancelled() {
            return Err(CdpError::Gone);
        }
        let mut message = json!({"id": id, "method": method, "params": params});
        if let (Some(session), Some(message)) = (session, message.as_object_mut()) {
            message.insert("sessionId".to_owned(), session.into());
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.outbox.send(bytes).await.map_err(|_| CdpError::Gone)?;
        answered.await.unwrap_or(Err(CdpError::Gone))
    }

    /// Hears what happens in a page.
    pub fn listen(&self, session: &str) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel(EVENTS);
        lock(&self.shared.sessions).insert(session.to_owned(), sender);
        receiver
    }

    /// Hears no more of it.
    pub fn forget(&self, session: &str) {
        lock(&self.shared.sessions).remove(session);
    }

    /// To be called when the browser has ended.
    pub fn end(&self) {
        self.shared.end();
    }

    /// Waits until the browser is gone.
    pub async fn gone(&self) {
        self.shared.gone.cancelled().await;
    }

    /// Whether it is.
    pub fn is_gone(&self) -> bool {
        self.shared.gone.is_cancelled()
    }
}

/// Reads messages until the pipe ends, or what comes is none. One that is too long is passed over: it is what a page
/// has made so long, and whoever waits for it gives up in time.
async fn read(output: impl AsyncRead + Unpin, shared: &Shared) {
    let mut output = BufReader::with_capacity(64 * 1024, output);
    let (mut message, mut turns) = (Vec::new(), Turns::default());
    loop {
        message.clear();
        let count = (&mut output).take(MESSAGE).read_until(0, &mut message).await;
        turns.took(message.len()).await;
        match (count, message.pop()) {
            (Ok(_), Some(0)) => {
                let Ok(message) = serde_json::from_slice::<Message<'_>>(&message) else { return };
                shared.take(message);
            }
            (Ok(_), Some(_)) if message.len() as u64 + 1 == MESSAGE => {
                message = Vec::new();
                if !skip(&mut output, &mut turns).await {
                    return;
                }
            }
            _ => return,
        }
    }
}

/// Reads to the end of a message, and says whether it has one.
async fn skip(output: &mut (impl AsyncBufRead + Unpin), turns: &mut Turns) -> bool {
    loop {
        let Ok(bytes) = output.fill_buf().await else { return false };
        let (end, count) = (memchr::memchr(0, bytes), bytes.len());
        if count == 0 {
            return false;
        }
        output.consume(end.map_or(count, |end| end + 1));
        if end.is_some() {
            return true;
        }
        turns.took(count).await;
    }
}

/// What a question was answered with.
fn read_result(result: Option<&RawValue>) -> Result<Value, CdpError> {
    let Some(result) = result else { return Ok(Value::Null) };
    serde_json::from_str(result.get())
        .map_err(|_| CdpError::Refused("something that is no Unicode".to_owned()))
}

impl Shared {
    fn take(&self, message: Message<'_>) {
        if let Some(id) = message.id {
            let answer = match message.error {
                Some(Refusal { message }) => Err(CdpError::Refused(message)),
                None => read_result(message.result),
            };
            if let Some(waiting) = lock(&self.waiting).remove(&id) {
                let _ = waiting.send(answer);
            }
            return;
        }
        let (Some(method), Some(session)) = (message.method, message.session_id) else { return };
        let Some(event) = event(&method, message.params) else { return };
        let mut sessions = lock(&self.sessions);
        // A page that has more to tell than anybody can read is heard no more.
        if sessions.get(&session).is_some_and(|page| page.try_send(event).is_err()) {
            sessions.remove(&session);
        }
    }

    fn end(&self) {
        self.gone.cancel();
        lock(&self.waiting).clear();
        lock(&self.sessions).clear();
    }
}

fn event(method: &str, params: Option<&RawValue>) -> Option<Event> {
    match method {
        "Inspector.targetCrashed" => return Some(Event::Crashed),
        "Page.javascriptDialogOpening" => return Some(Event::Dialog),
        "Page.lifecycleEvent"
        | "Network.requestWillBeSent"
        | "Network.responseReceived"
        | "Network.loadingFailed" => {}
        _ => return None,
    }
    let params: Params = serde_json::from_str(params?.get()).ok()?;
    let frame = params.frame_id;
    if method == "Page.lifecycleEvent" {
        return Some(Event::Lifecycle { frame, name: params.name });
    }
    if params.kind != "Document" {
        return None;
    }
    if method == "Network.loadingFailed" {
        return Some(Event::Failed { request: params.request_id, error: params.error_text });
    }
    match (params.request, params.response) {
        (Some(Asked { url }), None) => Some(Event::Requested { frame, request: params.request_id, url }),
        (_, Some(Response { url, status, mime_type })) => {
            Some(Event::Answered { frame, url, status, kind: mime_type.to_ascii_lowercase() })
        }
        (None, None) => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{io::duplex, time::timeout};

    use super::*;

    #[tokio::test]
    async fn what_a_page_makes_unreadable_is_its_own_trouble() {
        let (ours, mut browser) = duplex(1024 * 1024);
        let (output, input) = tokio::io::split(ours);
        let cdp = Cdp::new(input, output, &TaskTracker::new());
        let answers = tokio::spawn(async move {
            browser.write_all(b"{\"id\":1,\"result\":{\"value\":\"a\\ud800b\"}}\0").await.unwrap();
            // One that is longer than any may be, and then one that is as it should be.
            browser.write_all(b"{\"method\":\"").await.unwrap();
            let part = vec![b'x'; 1024 * 1024];
            for _ in 0..=MESSAGE / part.len() as u64 {
                browser.write_all(&part).await.unwrap();
            }
            browser.write_all(b"\"}\0{\"id\":2,\"result\":{\"ok\":true}}\0").await.unwrap();
            browser
        });
        let asked =
            async { tokio::join!(cdp.call(None, "one", json!({})), cdp.call(None, "two", json!({}))) };
        let (one, two) = timeout(Duration::from_secs(60), asked).await.unwrap();
        assert!(matches!(one, Err(CdpError::Refused(_))), "{one:?}");
        assert_eq!(two.unwrap(), json!({"ok": true}));
        assert!(!cdp.is_gone());
        drop(answers.await.unwrap());
        timeout(Duration::from_secs(60), cdp.gone()).await.unwrap();
    }
}
