//! The floor of a cluster: what messages there and back cost on the same NATS server.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::Client;
use futures_util::StreamExt;
use tokio::time::timeout;

use crate::own::{Own, input_ended};

const PATIENCE: Duration = Duration::from_secs(30);

/// A process that answers on NATS what it is sent.
pub struct Responder {
    process: Own,
    /// What it listens to.
    pub subject: &'static str,
}

impl Responder {
    /// Starts the process, which answers on a subject that nobody else listens to.
    pub async fn start(url: &str, subject: &'static str) -> Result<Self> {
        let process = Own::start(&["nats-responder", url, subject]).await?;
        ensure!(process.said == "ready", "the responder did not start: {}", process.said);
        Ok(Self { process, subject })
    }

    /// The process that answers.
    pub fn process(&self) -> Option<u32> {
        self.process.process()
    }
}

/// Answers until standard input ends.
pub async fn respond(url: &str, subject: String) -> Result<()> {
    let mut ended = input_ended();
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

/// Connects to NATS.
pub async fn connect(url: &str) -> Result<Client> {
    mcp_shared::tls::install_provider();
    timeout(PATIENCE, async_nats::connect(url)).await.context("NATS does not answer")?.context("NATS")
}
