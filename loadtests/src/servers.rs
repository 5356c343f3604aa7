//! The MCP servers that are called: the same two tools in Rust, Node and Python.

use anyhow::{Context, Result};
use clap::ValueEnum;
use mcp_shared::testing::tools;

/// How to start a server.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub command: String,
    /// Its arguments.
    pub args: Vec<String>,
}

impl From<Vec<String>> for Launch {
    /// The program first.
    fn from(words: Vec<String>) -> Self {
        let mut words = words.into_iter();
        Self { command: words.next().unwrap_or_default(), args: words.collect() }
    }
}

/// What a server is written in. All have `echo(text)` and `sleep(ms)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// The test fixture: hardly anything but the echo.
    Rust,
    /// The official SDK for TypeScript, on Node.js.
    Node,
    /// The official SDK for Python.
    Python,
}

impl Language {
    /// As the tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rust => "Rust",
            Self::Node => "Node",
            Self::Python => "Python",
        }
    }

    /// How to start the echo server in this language. The SDK is installed below `target/test-servers` on first use.
    pub async fn launch(self) -> Result<Launch> {
        let launch = match self {
            Self::Rust => {
                let own = std::env::current_exe()?.display().to_string();
                return Ok(Launch { command: own, args: vec!["echo-server".to_owned()] });
            }
            Self::Node => || {
                let node = tools::server_everything();
                // The SDK is what that server is made with.
                let script = include_str!("../servers/echo.js").to_owned();
                Launch { command: node.command, args: vec!["-e".to_owned(), script, node.args.concat()] }
            },
            Self::Python => || {
                let python = tools::server_time();
                let script = include_str!("../servers/echo.py").to_owned();
                Launch { command: python.command, args: vec!["-c".to_owned(), script] }
            },
        };
        tokio::task::spawn_blocking(launch).await.context("an SDK was not installed")
    }
}
