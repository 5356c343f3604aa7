//! The floors: programs that do the least that has to be done for a call, and nothing else. No limits, no secrets, no
//! answer to a failure, no log.
//!
//! * `floor-http`: axum in front of one connection to the server's standard input and output.
//! * `floor-front` and `floor-back`: axum, one NATS request, and the same connection in a second process.

use std::{borrow::Cow, sync::Arc};

use anyhow::{Context, Result};
use async_nats::Client;
use axum::{
    Router,
    extract::{DefaultBodyLimit, State},
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt,
};
use bytes::Bytes;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{
    bus::connect,
    own::{Own, input_ended},
    servers::Launch,
    stdio::{Connection, Server},
};

/// Largest body.
const BODY: usize = 16 * 1_024 * 1_024;
/// Calls at once.
const CALLS: usize = 1_024;

/// The body of `POST /mcp/tool/call`. Whatever else is in it is passed over.
#[derive(Deserialize)]
struct Call<'a> {
    #[serde(rename = "methodName")]
    tool: Cow<'a, str>,
    #[serde(borrow)]
    args: &'a RawValue,
}

/// Passes a call on, and makes its answer what mcp-api's is.
async fn relay(server: &Connection, body: &[u8]) -> Result<Vec<u8>> {
    let call: Call<'_> = serde_json::from_slice(body)?;
    let answer = server.call(&call.tool, call.args.get()).await?;
    let result = answer.result()?.strip_suffix('}').context("not an object")?;
    let (before, after) = (r#"{"success":true,"data":"#, r#","contentType":"text/plain"}}"#);
    let mut whole = Vec::with_capacity(before.len() + result.len() + after.len());
    for part in [before, result, after] {
        whole.extend_from_slice(part.as_bytes());
    }
    Ok(whole)
}

fn answer(result: Result<impl Into<axum::body::Body>>) -> Response {
    match result {
        Ok(body) => ([(CONTENT_TYPE, "application/json")], body.into()).into_response(),
        Err(error) => (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response(),
    }
}

/// `floor-http`: with the server in this process's care.
pub async fn http(launch: Launch) -> Result<()> {
    let server = Server::start(&launch).await?;
    let call = async |State(server): State<Arc<Connection>>, body: Bytes| answer(relay(&server, &body).await);
    serve(Router::new().route("/mcp/tool/call", post(call)).with_state(Arc::clone(&server.connection))).await
}

/// `floor-front`: what is called is on the other side of NATS.
pub async fn front(url: &str, subject: String) -> Result<()> {
    let state = (connect(url).await?, subject);
    let call = async |State((nats, subject)): State<(Client, String)>, body: Bytes| {
        answer(nats.request(subject, body).await.map(|reply| reply.payload).map_err(Into::into))
    };
    serve(Router::new().route("/mcp/tool/call", post(call)).with_state(state)).await
}

/// `floor-back`: that other side.
pub async fn back(url: &str, subject: String, launch: Launch) -> Result<()> {
    let server = Server::start(&launch).await?;
    let nats = connect(url).await?;
    let mut requests = nats.subscribe(subject).await?;
    nats.flush().await?;
    println!("ready");
    let calls = Arc::new(Semaphore::new(CALLS));
    let mut ended = input_ended();
    loop {
        let request = tokio::select! {
            request = requests.next() => request.context("the subscription ended")?,
            _ = &mut ended => return Ok(()),
        };
        let place = Arc::clone(&calls).acquire_owned().await?;
        let (nats, server) = (nats.clone(), Arc::clone(&server.connection));
        tokio::spawn(async move {
            if let (Some(reply), Ok(answer)) = (request.reply, relay(&server, &request.payload).await) {
                let _ = nats.publish(reply, answer.into()).await;
            }
            drop(place);
        });
    }
}

async fn serve(calls: Router) -> Result<()> {
    // What as many bytes cost that nobody has to gather: the floor of a listing.
    let bytes = async |axum::extract::Path(length): axum::extract::Path<usize>| {
        answer(Ok(vec![b'x'; length.min(BODY)]))
    };
    let app = calls.route("/bytes/{length}", get(bytes)).layer(DefaultBodyLimit::max(BODY));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}", listener.local_addr()?);
    let listener = listener.tap_io(|stream| {
        // Otherwise small answers wait for those before them to be acknowledged.
        let _ = stream.set_nodelay(true);
    });
    tokio::select! {
        served = axum::serve(listener, app).into_future() => Ok(served?),
        _ = input_ended() => Ok(()),
    }
}

/// A floor that runs: its processes, the one that listens first.
pub struct Floor {
    processes: Vec<Own>,
    /// Where it listens.
    pub address: String,
}

impl Floor {
    /// Starts `floor-http`.
    pub async fn http(launch: &Launch) -> Result<Self> {
        let mut args = vec!["floor-http", "--", launch.command.as_str()];
        args.extend(launch.args.iter().map(String::as_str));
        Self::of(vec![Own::start(&args).await?])
    }

    /// Starts `floor-front` and `floor-back`, on a subject of their own.
    pub async fn cluster(launch: &Launch, url: &str, subject: &str) -> Result<Self> {
        let mut args = vec!["floor-back", url, subject, "--", launch.command.as_str()];
        args.extend(launch.args.iter().map(String::as_str));
        let back = Own::start(&args).await?;
        let front = Own::start(&["floor-front", url, subject]).await?;
        Self::of(vec![front, back])
    }

    fn of(processes: Vec<Own>) -> Result<Self> {
        let said = processes.first().map(|front| front.said.clone()).context("no process")?;
        let address = said.strip_prefix("http://").with_context(|| format!("not an address: {said}"))?;
        Ok(Self { address: address.to_owned(), processes })
    }

    /// Its processes.
    pub fn processes(&self) -> Vec<u32> {
        self.processes.iter().filter_map(Own::process).collect()
    }
}
