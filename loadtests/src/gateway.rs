//! The program under test, started as its users start it, and called over kept-alive connections.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpStream,
    process::{Child, Command},
};

use crate::measure::{Sample, closed_loop};

/// A running gateway with an echo server registered.
pub struct Gateway {
    process: Child,
    address: String,
    _data: TempDir,
}

impl Gateway {
    /// Starts the program on a free port and an empty data folder.
    pub async fn start(program: Option<PathBuf>) -> Result<Self> {
        let program = match program {
            Some(program) => program,
            None => std::env::current_exe()?.with_file_name("mcp-gateway"),
        };
        ensure!(program.exists(), "{} is not there; build it with: cargo build --release", program.display());
        let data = tempfile::tempdir()?;
        let mut process = Command::new(&program)
            .env("PORT", "0")
            .env("DATA_DIR", data.path())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(data.path().join("gateway.log"))?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| program.display().to_string())?;
        let output = process.stdout.take().context("no output")?;
        let first = BufReader::new(output).lines().next_line().await?.context("the gateway did not start")?;
        let address = first.rsplit("http://").next().context("no address")?.to_owned();
        let gateway = Self { process, address, _data: data };
        let record = json!({"name": "echo", "command": std::env::current_exe()?, "args": ["echo-server"]});
        let mut connection = gateway.connect().await?;
        let answer =
            post(&mut connection, &gateway.address, "/mcp/servers", record.to_string().into()).await?;
        ensure!(answer.windows(11).any(|part| part == b"\"connected\""), "the echo server did not connect");
        Ok(gateway)
    }

    /// Calls `echo` from so many connections at once.
    pub async fn load(&self, callers: usize, text: &str, time: Duration) -> Result<Sample> {
        let body = json!({"serverName": "echo", "methodName": "echo", "args": {"text": text}}).to_string();
        let body = Bytes::from(body);
        let mut connections = Vec::new();
        for _ in 0..callers {
            connections.push((self.connect().await?, self.address.clone(), body.clone()));
        }
        closed_loop(connections, time, async |(mut connection, address, body): (_, String, Bytes)| {
            let answer = post(&mut connection, &address, "/mcp/tool/call", body.clone()).await?;
            ensure!(
                answer.starts_with(b"{\"success\":true"),
                "a call failed: {}",
                String::from_utf8_lossy(&answer)
            );
            Ok((connection, address, body))
        })
        .await
    }

    /// Stops the program in order.
    pub async fn stop(mut self) -> Result<()> {
        let id = self.process.id().context("it has ended")?;
        Command::new("kill").args(["-TERM", &id.to_string()]).status().await?;
        ensure!(self.process.wait().await?.success(), "the gateway did not stop in order");
        Ok(())
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let stream = TcpStream::connect(&self.address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender)
    }
}

async fn post(
    connection: &mut SendRequest<Full<Bytes>>,
    host: &str,
    path: &str,
    body: Bytes,
) -> Result<Bytes> {
    let request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header("host", host)
        .header("content-type", "application/json")
        .body(Full::new(body))?;
    connection.ready().await?;
    let response = connection.send_request(request).await?;
    Ok(response.into_body().collect().await?.to_bytes())
}
