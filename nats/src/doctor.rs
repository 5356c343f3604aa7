//! What `doctor` wants to know of a bus beyond whether a node can join it: which version answers, also where nobody
//! is let in, and whether this node's login may say and hear what its role has to.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::Event;
use futures_util::StreamExt;
use mcp_shared::{
    config::{BusServer, BusSettings},
    fleet::Role,
    ids::{ServerName, UserId, WorkerId},
};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::TcpStream,
    time::timeout,
};
use uuid::Uuid;

use crate::{
    connect::{self, OpenError},
    micro::GROUP,
    subjects::Subjects,
    wire::{self, Beat},
};

/// How long a server may take to greet.
const GREETING: Duration = Duration::from_secs(2);
/// Bytes of a greeting. It is one line, of some hundred bytes.
const GREETING_BYTES: u64 = 64 * 1024;
/// How long the server may take to say what it refuses.
const ANSWER: Duration = Duration::from_secs(3);

/// What a server says to everybody who connects.
#[derive(Debug, Deserialize)]
pub struct Greeting {
    /// Its version.
    pub version: String,
    /// Whether it asks for a login.
    #[serde(default)]
    pub auth_required: bool,
    /// Whether it asks for TLS.
    #[serde(default)]
    pub tls_required: bool,
    /// Bytes that a message may have.
    #[serde(default)]
    pub max_payload: u64,
}

impl Greeting {
    /// Why nobody should use a server of this version.
    pub fn holes(&self) -> Option<String> {
        connect::holes_of(&self.version)
    }
}

/// Connects to a server and hears what it says before anybody has said anything. `Ok(None)`: it waits for TLS first.
pub async fn greeting(server: &BusServer) -> std::io::Result<Option<Greeting>> {
    let host = server.host.trim_start_matches('[').trim_end_matches(']');
    let connecting = TcpStream::connect((host, server.port));
    let stream = timeout(GREETING, connecting).await.map_err(|_| std::io::ErrorKind::TimedOut)??;
    let mut line = String::new();
    let mut reader = BufReader::new(stream).take(GREETING_BYTES);
    match timeout(GREETING, reader.read_line(&mut line)).await {
        Ok(read) => read?,
        Err(_) => return Ok(None),
    };
    let said = line.trim().strip_prefix("INFO ").and_then(|said| serde_json::from_str(said).ok());
    said.map(Some).ok_or_else(|| std::io::Error::other("what answers there is no NATS"))
}

/// Logs in, and tries what a role has to say and to hear on subjects that nobody listens to. What is returned is what
/// the server refuses, in its words.
pub async fn refused(settings: &BusSettings, role: Role) -> Result<Vec<String>, OpenError> {
    mcp_shared::tls::install_provider();
    let node = WorkerId::from_stored(format!("doctor-{}", Uuid::new_v4().simple()));
    let subjects = Subjects::new(&settings.prefix);
    let inbox = subjects.inbox(&node);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let listener = Arc::clone(&heard);
    let client = connect::options(settings)?
        .name("mcp-api doctor")
        .custom_inbox_prefix(format!("{inbox}.own"))
        .event_callback(move |event| {
            let text = match event {
                Event::ServerError(error) => Some(error.to_string()),
                _ => None,
            };
            if let Some(text) =
                text.filter(|text| text.to_ascii_lowercase().contains("permissions violation"))
            {
                listener.lock().unwrap_or_else(PoisonError::into_inner).push(text);
            }
            async {}
        })
        .connect(connect::addresses(settings)?)
        .await
        .map_err(connect::explain)?;
    let lost = |error: &dyn std::fmt::Display| OpenError::Unreachable(error.to_string());
    let mut heard_there = vec![subjects.beats(), subjects.event("*", "*")];
    if role == Role::Worker {
        heard_there.push(subjects.worker_all(&node));
    }
    let mut open = Vec::new();
    for subject in heard_there {
        open.push(client.subscribe(subject).await?);
    }
    if role == Role::Worker {
        // Of all calls a worker may hear some; these are to a server that nobody has.
        let call = subjects.call(&ServerName::from_stored(node.as_str()), &UserId::from_stored("doctor"));
        open.push(client.queue_subscribe(call, GROUP.to_owned()).await?);
    }
    let gone = wire::encode(&Beat::Gone(node.clone()), b"").map_err(|error| lost(&error))?;
    client.publish(subjects.beat(&node), gone).await.map_err(|error| lost(&error))?;
    client.publish(subjects.worker(&node, "doctor"), "".into()).await.map_err(|error| lost(&error))?;
    // What the server refuses it says before it passes on what comes later.
    let own = format!("{inbox}.look");
    let mut answers = client.subscribe(own.clone()).await?;
    client.publish(own, "".into()).await.map_err(|error| lost(&error))?;
    let _ = timeout(ANSWER, answers.next()).await;
    drop(open);
    let mut refused = heard.lock().unwrap_or_else(PoisonError::into_inner).clone();
    refused.sort();
    refused.dedup();
    Ok(refused)
}
