//! The barest way to an MCP server: raw lines over its standard input and output, one connection for all callers.

use std::{
    collections::HashMap,
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{mpsc, oneshot},
};

use crate::servers::Launch;

/// Calls that wait to be written; more wait where they are made.
const QUEUE: usize = 1_024;
/// Most bytes that are read at once.
const CHUNK: usize = 64 * 1_024;

/// A server with one connection. Its process is killed when this is dropped.
pub struct Server {
    /// The connection, which all callers share.
    pub connection: Arc<Connection>,
    process: Child,
}

/// A table of who waits for what, and the way to the server.
pub struct Connection {
    next_id: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Vec<u8>>>>,
    outbox: mpsc::Sender<Vec<u8>>,
}

/// One line from the server.
pub struct Answer(Vec<u8>);

#[derive(Deserialize)]
struct Identified {
    id: u64,
}

#[derive(Deserialize)]
struct Successful<'a> {
    #[serde(borrow)]
    result: &'a RawValue,
}

impl Server {
    /// Starts a server and greets it.
    pub async fn start(launch: &Launch) -> Result<Self> {
        let mut process = Command::new(&launch.command)
            .args(&launch.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| launch.command.clone())?;
        let input = process.stdin.take().context("no input")?;
        let output = process.stdout.take().context("no output")?;
        let (outbox, queue) = mpsc::channel(QUEUE);
        let connection =
            Arc::new(Connection { next_id: AtomicU64::new(1), waiting: Mutex::default(), outbox });
        tokio::spawn(write(input, queue));
        tokio::spawn(read(output, Arc::clone(&connection)));
        let client = r#"{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"floor","version":"1"}}"#;
        connection.request(&format!(r#""initialize","params":{client}"#)).await?;
        let ready = b"{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"}\n".to_vec();
        connection.outbox.send(ready).await?;
        Ok(Self { connection, process })
    }

    /// Its process.
    pub fn process(&self) -> Option<u32> {
        self.process.id()
    }
}

impl Connection {
    /// Calls a tool. The arguments are a JSON object without line breaks.
    pub async fn call(&self, tool: &str, arguments: &str) -> Result<Answer> {
        self.request(&format!(r#""tools/call","params":{{"name":"{tool}","arguments":{arguments}}}"#)).await
    }

    async fn request(&self, method_and_params: &str) -> Result<Answer> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
        let line = format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":{method_and_params}}}\n");
        self.outbox.send(line.into_bytes()).await?;
        Ok(Answer(answer.await.context("the server has ended")?))
    }
}

impl Answer {
    /// The bytes of the result.
    pub fn result(&self) -> Result<&str> {
        let successful: Successful<'_> = serde_json::from_slice(&self.0).context("not a result")?;
        Ok(successful.result.get())
    }

    /// Whether it is the result of a tool, at a glance.
    pub fn is_result(&self) -> bool {
        self.0.windows(9).any(|part| part == b"\"content\"")
    }
}

/// Writes what there is at once.
async fn write(mut input: ChildStdin, mut queue: mpsc::Receiver<Vec<u8>>) {
    let mut lines = Vec::new();
    while queue.recv_many(&mut lines, 64).await > 0 {
        let joined = if lines.len() == 1 { lines.pop().unwrap_or_default() } else { lines.concat() };
        lines.clear();
        if input.write_all(&joined).await.is_err() {
            break;
        }
    }
}

async fn read(output: ChildStdout, connection: Arc<Connection>) {
    let mut output = BufReader::with_capacity(CHUNK, output);
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line).await.is_ok_and(|count| count > 0) {
        let whole = std::mem::take(&mut line);
        let waiting = || connection.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiting) = id_of(&whole).and_then(|id| waiting().remove(&id)) {
            let _ = waiting.send(whole);
        }
    }
    // Nobody waits for ever.
    connection.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// The id of an answer. Where it stands first nothing else is read.
fn id_of(line: &[u8]) -> Option<u64> {
    let Some(rest) = line.strip_prefix(br#"{"jsonrpc":"2.0","id":"#) else {
        return serde_json::from_slice::<Identified>(line).ok().map(|answer| answer.id);
    };
    let end = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&rest[..end]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_id_wherever_it_stands() {
        assert_eq!(id_of(br#"{"jsonrpc":"2.0","id":17,"result":{}}"#), Some(17));
        assert_eq!(id_of(br#"{"result":{"id":3},"jsonrpc":"2.0","id":18}"#), Some(18));
        assert_eq!(id_of(br#"{"jsonrpc":"2.0","method":"notifications/message"}"#), None);
        assert_eq!(id_of(b"no JSON"), None);
    }
}
