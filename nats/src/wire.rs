//! The messages between routers and workers: one line of JSON, then the bytes that it announces.
//!
//! What a worker is told is a pair of an id and a message; what a router is answered is a message alone,
//! because the id stands in the subject. A message is an object with one member, whose name says what it
//! is. Unknown members inside are passed over, so that neighbouring versions understand each other.
//! Bodies stay the bytes that somebody sent.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use mcp_shared::{
    error::WorkerError,
    fleet::NodeReport,
    hosting::{CallOffer, Refusal},
    ids::{RequestId, ServerName, UserId, WorkerId},
    package::LatestQuery,
    remote::RemoteAsk,
    trace::Trace,
    worker_api::Change,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

/// The oldest and the newest version that this program speaks.
pub const VERSIONS: (u32, u32) = (1, 1);

/// One attempt at a call, or one question. Unique in the fleet: half of it is drawn by the asking
/// process, the other half counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CallId(pub u128);

impl std::fmt::Display for CallId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl std::str::FromStr for CallId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(());
        }
        u128::from_str_radix(text, 16).map(Self).map_err(|_| ())
    }
}

impl Serialize for CallId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CallId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(|()| serde::de::Error::custom("not a call id"))
    }
}

/// The offer of a call. The arguments follow when it was accepted.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Offer {
    /// The wire version that the router writes.
    pub version: u32,
    /// The request that it belongs to, for logs.
    pub request: RequestId,
    /// Whose secrets apply.
    pub user: UserId,
    /// The limit that the caller asked for, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Milliseconds of the call's time that are gone already.
    pub spent_ms: u64,
    /// Bytes of the arguments.
    pub size: usize,
    /// Who asks. Calls of a router that is not heard of any more are given up.
    pub router: WorkerId,
    /// What is called.
    pub call: CallOffer,
    /// Where it belongs, if it is traced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<Trace>,
}

/// Which part of a body a message has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// Counted from 0.
    #[serde(rename = "n", default)]
    pub number: u32,
    /// Bytes of the whole body.
    pub total: usize,
    /// SHA-256 of the whole body in hex, with the last of several frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// A question that is no tool call.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Start a server and wait until it listed its tools or failed.
    Start {
        /// For whom, where users have processes of their own.
        user: UserId,
        /// Which server.
        server: ServerName,
    },
    /// Stop it and start it again.
    Restart {
        /// For whom.
        user: UserId,
        /// Which server.
        server: ServerName,
    },
    /// What is known about one server.
    Report {
        /// Which server.
        server: ServerName,
    },
    /// What is known about all.
    Reports,
    /// A job was queued in the store.
    Wake,
    /// The latest versions of packages.
    Latest {
        /// Which ones.
        packages: Vec<LatestQuery>,
    },
    /// Do something about a remote server.
    Remote {
        /// What.
        ask: RemoteAsk,
    },
    /// Leave the fleet in order.
    Drain,
    /// Something was changed in the store.
    Invalidate {
        /// What.
        change: Change,
    },
}

/// What a worker is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToWorker {
    /// Will you take this call?
    Offer(Offer),
    /// Start it. The body is the arguments, or a part of them.
    Go(Frame),
    /// Give it up.
    Cancel,
    /// So many more frames of the answer may come.
    Credit(u32),
    /// Are you there, and what of these calls? Sent under an id of its own.
    Probe {
        /// Who asks: calls of a router that asks no more are given up.
        router: WorkerId,
        /// Calls that nothing was heard of for a while.
        open: Vec<CallId>,
        /// Calls whose answers have arrived, and may be forgotten.
        done: Vec<CallId>,
    },
    /// Something else.
    Ask(Ask),
    /// The worker's own, which shows it how old the messages are that it reads.
    Pulse {
        /// When it was sent, in milliseconds of the worker's clock.
        at_ms: u64,
    },
}

impl ToWorker {
    /// The last token of the subject.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Offer(_) => "offer",
            Self::Go(_) => "go",
            Self::Cancel => "cancel",
            Self::Credit(_) => "credit",
            Self::Probe { .. } => "probe",
            Self::Ask(_) => "ask",
            Self::Pulse { .. } => "pulse",
        }
    }
}

/// What a router is answered. The id stands in the subject.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToRouter {
    /// The call waits for its turn, or for its server to start. `Accept` or a refusal follows.
    Wait {
        /// The call's whole time, in milliseconds, counted from the request.
        limit_ms: u64,
    },
    /// The call has its place for two seconds, and the worker has room for all of its arguments.
    Accept {
        /// The call's whole time, in milliseconds, counted from the request.
        limit_ms: u64,
        /// It may be offered to another worker when this one is lost while it runs.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        repeatable: bool,
    },
    /// It was not started, and will not be.
    Refuse(Refusal),
    /// The body is the `params` of a progress notification.
    Progress,
    /// What follows came of the call when it was made for the first time, under the same name.
    Replayed,
    /// The body is the answer, or a part of it.
    Answer(Frame),
    /// There is no answer.
    Failed(WorkerError),
    /// The worker is there, and at work.
    Alive,
}

/// What a node says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Beat {
    /// It is there.
    Here(NodeReport),
    /// It is new, and wants to hear of everybody.
    Hello(NodeReport),
    /// It leaves.
    Gone(WorkerId),
    /// Everybody who hears it is to log by this filter, or without one as its own settings say.
    Log(Option<String>),
}

/// Why a message cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// There is no line, or one that is not ours.
    #[error("a message on the bus is not understood: {0}")]
    Line(String),
}

/// The longest line.
const LINE_BYTES: usize = 1024 * 1024;

/// A message with its body behind it.
pub fn encode(message: &impl Serialize, body: &[u8]) -> Result<Bytes, serde_json::Error> {
    let mut out = BytesMut::with_capacity(256 + body.len()).writer();
    serde_json::to_writer(&mut out, message)?;
    let mut out = out.into_inner();
    out.put_u8(b'\n');
    out.put_slice(body);
    Ok(out.freeze())
}

/// A message and its body.
pub fn decode<T: DeserializeOwned>(payload: &Bytes) -> Result<(T, Bytes), Malformed> {
    let head = &payload[..payload.len().min(LINE_BYTES)];
    let end = head
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or_else(|| Malformed::Line("it has no line of its own".to_owned()))?;
    let message =
        serde_json::from_slice(&payload[..end]).map_err(|error| Malformed::Line(error.to_string()))?;
    Ok((message, payload.slice(end + 1..)))
}

/// A duration as it travels.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
