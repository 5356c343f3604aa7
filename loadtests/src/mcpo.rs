//! mcpo from PyPI: another program that puts an MCP server behind HTTP.

use std::{process::Stdio, time::Duration};

use anyhow::{Context, Result, ensure};
use mcp_shared::testing::{port::Port, tools};
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    time::{Instant, sleep},
};

use crate::servers::Launch;

const PATIENCE: Duration = Duration::from_secs(60);

/// mcpo in front of a server. It is killed when this is dropped.
pub struct Mcpo {
    /// Where it listens.
    pub address: String,
    process: Child,
}

impl Mcpo {
    /// Installs it below `target/test-servers` if it is not there, and says where it is.
    pub async fn install() -> Result<std::path::PathBuf> {
        tokio::task::spawn_blocking(tools::mcpo).await.context("mcpo cannot be installed")
    }

    /// Starts it.
    pub async fn start(launch: &Launch) -> Result<Self> {
        let program = Self::install().await?;
        let port = Port::keep();
        let address = port.address();
        let mut process = Command::new(program)
            .args(["--host", "127.0.0.1", "--port", &address.port().to_string(), "--"])
            .arg(&launch.command)
            .args(&launch.args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let begun = Instant::now();
        // It listens when it has asked the server for its tools.
        while TcpStream::connect(address).await.is_err() {
            ensure!(process.try_wait()?.is_none(), "mcpo has ended");
            ensure!(begun.elapsed() < PATIENCE, "mcpo does not listen");
            sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { address: address.to_string(), process })
    }

    /// Its process.
    pub fn process(&self) -> Option<u32> {
        self.process.id()
    }
}
