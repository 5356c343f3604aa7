//! The floor of a cluster: what messages there and back cost on the same NATS server.

use std::{io::Read, process::Stdio, time::Duration};

use anyhow::{Context, Result, ensure};
use async_nats::Client;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::oneshot,
    time::timeout,
};

use crate::measure::{Sample, closed_loop};

const PATIENCE: Duration = Duration::from_secs(30);

/// One connection to NATS, and a process on another that answers what it is sent.
pub struct Responder {
    client: Client,
    subject: &'static str,
    process: Child,
}

impl Responder {
    /// Starts the process, which answers on a subject that nobody else listens to, and connects.
    pub async fn start(url: &str, subject: &'static str) -> Result<Self> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["nats-responder", url, subject])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(process.stdout.take().context("no output")?).lines();
        let first = timeout(PATIENCE, lines.next_line()).await.context("no responder in time")??;
        ensure!(first.as_deref() == Some("ready"), "the responder did not start: {first:?}");
        Ok(Self { client: connect(url).await?, subject, process })
    }

    /// The process that answers.
    pub fn process(&self) -> Option<u32> {
        self.process.id()
    }

    /// Makes so many round trips in sequence for each call, from so many callers at once.
    pub async fn load(
        &self,
        callers: usize,
        trips: usize,
        payload: &Bytes,
        time: Duration,
    ) -> Result<Sample> {
        let subject = self.subject;
        let callers = vec![(self.client.clone(), payload.clone()); callers];
        closed_loop(callers, time, move |(client, payload): (Client, Bytes)| async move {
            for _ in 0..trips {
                let answer = client.request(subject, payload.clone()).await?;
                ensure!(answer.payload.len() == payload.len(), "not what was sent");
            }
            Ok((client, payload))
        })
        .await
    }
}

/// Answers until standard input ends.
pub async fn respond(url: &str, subject: String) -> Result<()> {
    let (sender, mut ended) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = sender.send(());
    });
    let client = connect(url).await?;
    let mut requests = client.subscribe(subject).await?;
    client.flush().await?;
    println!("ready");
    loop {
        tokio::select! {
            request = requests.next() => {
                let request = request.context("the subscription ended")?;
                let reply = request.reply.context("nobody waits for an answer")?;
                client.publish(reply, request.payload).await?;
            }
            _ = &mut ended => return Ok(()),
        }
    }
}

async fn connect(url: &str) -> Result<Client> {
    mcp_shared::tls::install_provider();
    timeout(PATIENCE, async_nats::connect(url)).await.context("NATS does not answer")?.context("NATS")
}
