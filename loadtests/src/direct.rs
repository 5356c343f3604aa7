//! The floor: the same calls made straight to the MCP server over one stdio connection.

use std::{
    collections::HashMap,
    process::Stdio,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdout, Command},
    sync::{mpsc, oneshot},
};

use crate::measure::{Sample, closed_loop};

/// An echo server of our own with one connection.
pub struct Server {
    connection: Arc<Connection>,
    process: Child,
}

struct Connection {
    next_id: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Vec<u8>>>>,
    outbox: mpsc::Sender<Vec<u8>>,
}

impl Server {
    /// Starts the server and greets it.
    pub async fn start() -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .arg("echo-server")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut input = process.stdin.take().context("no input")?;
        let output = process.stdout.take().context("no output")?;
        let (outbox, mut queue) = mpsc::channel::<Vec<u8>>(1_024);
        tokio::spawn(async move {
            let mut lines = Vec::new();
            while queue.recv_many(&mut lines, 64).await > 0 {
                let joined = lines.concat();
                lines.clear();
                if input.write_all(&joined).await.is_err() {
                    break;
                }
            }
        });
        let connection =
            Arc::new(Connection { next_id: AtomicU64::new(1), waiting: Mutex::default(), outbox });
        tokio::spawn(read(output, Arc::clone(&connection)));
        let hello = r#""initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"floor","version":"1"}}"#;
        connection.request(hello).await?;
        let ready = b"{\"jsonrpc\":\"2.0\",\"method\":\"notifications/initialized\"}\n".to_vec();
        connection.outbox.send(ready).await?;
        Ok(Self { connection, process })
    }

    /// Its process.
    pub fn process(&self) -> Option<u32> {
        self.process.id()
    }

    /// Calls `echo` from so many callers at once.
    pub async fn load(&self, callers: usize, text: &str, time: Duration) -> Result<Sample> {
        let call: Arc<str> =
            format!(r#""tools/call","params":{{"name":"echo","arguments":{{"text":"{text}"}}}}"#).into();
        let callers = vec![(Arc::clone(&self.connection), call); callers];
        closed_loop(callers, time, async |(connection, call): (Arc<Connection>, Arc<str>)| {
            let answer = connection.request(&call).await?;
            ensure!(answer.windows(9).any(|part| part == b"\"content\""), "not a result");
            Ok((connection, call))
        })
        .await
    }
}

impl Connection {
    async fn request(&self, method_and_params: &str) -> Result<Vec<u8>> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
        let line = format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":{method_and_params}}}\n");
        self.outbox.send(line.into_bytes()).await?;
        Ok(answer.await?)
    }
}

async fn read(output: ChildStdout, connection: Arc<Connection>) {
    let mut output = BufReader::with_capacity(64 * 1024, output);
    let mut line = Vec::new();
    while output.read_until(b'\n', &mut line).await.is_ok_and(|count| count > 0) {
        let whole = std::mem::take(&mut line);
        // The echo server writes the id as the second member.
        let id = std::str::from_utf8(&whole)
            .ok()
            .and_then(|text| text.split_once("\"id\":"))
            .and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u64>().ok());
        let waiting =
            id.and_then(|id| connection.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id));
        if let Some(waiting) = waiting {
            let _ = waiting.send(whole);
        }
    }
}
