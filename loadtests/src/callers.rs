//! Those who call: one at the end of each path, with one call under way at a time.

use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use serde_json::json;
use tokio::time::sleep;

use crate::{client::Client, stdio::Connection};

/// Calls that were refused for want of room, and made again. Their time counts from the first attempt.
pub static REFUSED: AtomicU64 = AtomicU64::new(0);
/// How often a call is made again, and after which time.
const TRIES: u32 = 20;
const AGAIN: Duration = Duration::from_millis(50);

/// What is called.
#[derive(Debug, Clone)]
pub struct Call {
    /// The name that the server is registered with.
    pub server: String,
    /// One of its tools.
    pub tool: &'static str,
    /// A JSON object.
    pub arguments: String,
}

impl Call {
    /// A text there and back.
    pub fn echo(bytes: usize) -> Self {
        let arguments = json!({"text": "x".repeat(bytes)}).to_string();
        Self { server: "echo".to_owned(), tool: "echo", arguments }
    }

    /// A call that takes its time.
    pub fn sleep(ms: u64) -> Self {
        Self { server: "echo".to_owned(), tool: "sleep", arguments: json!({"ms": ms}).to_string() }
    }

    /// The same of a server with another name.
    pub fn at(mut self, server: &str) -> Self {
        server.clone_into(&mut self.server);
        self
    }

    /// The body of `POST /mcp/tool/call`.
    pub fn body(&self) -> Bytes {
        let Self { server, tool, arguments } = self;
        format!(r#"{{"serverName":"{server}","methodName":"{tool}","args":{arguments}}}"#).into()
    }
}

/// What is sent: the body, and what the answer must have in it.
pub type Make = Arc<dyn Fn(u64) -> (Bytes, String) + Send + Sync>;

/// One caller.
pub enum Caller {
    /// Straight to the server.
    Direct(Arc<Connection>, Arc<Call>),
    /// By HTTP, as mcp-api has it.
    Http(Client, Bytes),
    /// By HTTP, as mcpo has it.
    Mcpo(Client, String, Bytes),
    /// By HTTP, something else each time: where to, what, and the number of the next one among all callers.
    Varied(Client, &'static str, Make, Arc<AtomicU64>),
    /// Over NATS there and back, as often as said.
    Nats(async_nats::Client, &'static str, Bytes, usize),
}

impl Caller {
    /// Calls, and sees that the answer is one.
    pub async fn call(&mut self) -> Result<()> {
        match self {
            Self::Direct(connection, call) => {
                let answer = connection.call(call.tool, &call.arguments).await?;
                ensure!(answer.is_result(), "not a result");
            }
            Self::Http(client, body) => {
                let mut tries = 0;
                loop {
                    let answer = client.post("/mcp/tool/call", body.clone()).await?;
                    if answer.starts_with(b"{\"success\":true") {
                        break;
                    }
                    let refused = contains(&answer, "\"retryable\":true,\"outcome\":\"not_started\"");
                    if !refused || tries == TRIES {
                        bail!("a call failed: {}", shown(&answer));
                    }
                    tries += 1;
                    REFUSED.fetch_add(1, Ordering::Relaxed);
                    sleep(AGAIN).await;
                }
            }
            Self::Mcpo(client, path, body) => {
                let answer = client.post(path, body.clone()).await?;
                // The text alone.
                if !answer.starts_with(b"\"") {
                    bail!("a call of mcpo failed: {}", shown(&answer));
                }
            }
            Self::Varied(client, path, make, next) => {
                let (body, expected) = make(next.fetch_add(1, Ordering::Relaxed));
                let answer = client.post(path, body).await?;
                ensure!(contains(&answer, &expected), "{expected} is not in an answer: {}", shown(&answer));
            }
            Self::Nats(client, subject, payload, trips) => {
                for _ in 0..*trips {
                    let answer = client.request(*subject, payload.clone()).await?;
                    ensure!(answer.payload.len() == payload.len(), "not what was sent");
                }
            }
        }
        Ok(())
    }
}

/// So many callers of a deployment who send something else each time.
pub async fn varied(
    addresses: &[String],
    callers: usize,
    path: &'static str,
    make: Make,
) -> Result<Vec<Caller>> {
    let next = Arc::default();
    let mut all = Vec::with_capacity(callers);
    for address in addresses.iter().cycle().take(callers) {
        let client = Client::connect(address).await?;
        all.push(Caller::Varied(client, path, Arc::clone(&make), Arc::clone(&next)));
    }
    Ok(all)
}

/// Whether an answer has this in it.
pub fn contains(answer: &[u8], text: &str) -> bool {
    answer.windows(text.len()).any(|part| part == text.as_bytes())
}

/// The beginning of an answer.
pub fn shown(answer: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(&answer[..answer.len().min(500)])
}
