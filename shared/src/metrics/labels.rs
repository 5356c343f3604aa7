//! The labels: each has a closed set of values, so that the number of time series is known from the code. No label names
//! users, servers or tools: what these can be is not bounded.

use super::table::Closed;
use crate::{
    audit::Event,
    crypter::CryptoErrorKind,
    error::{ErrorCode, Outcome, WorkerError},
    json::RawJson,
    store::StoreError,
};

macro_rules! closed {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal, $meaning:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $(#[doc = $meaning] $variant,)*
        }

        impl $name {
            /// All of them.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            /// As the label has it.
            pub fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }

            /// What it means.
            pub fn meaning(self) -> &'static str {
                match self { $($name::$variant => $meaning,)* }
            }
        }

        impl Closed for $name {
            fn all() -> &'static [Self] {
                Self::ALL
            }

            fn index(self) -> usize {
                self as usize
            }

            fn text(self) -> &'static str {
                self.as_str()
            }
        }
    };
}

impl Closed for ErrorCode {
    fn all() -> &'static [Self] {
        Self::ALL
    }

    fn index(self) -> usize {
        self as usize
    }

    fn text(self) -> &'static str {
        self.as_str()
    }
}

impl Closed for Event {
    fn all() -> &'static [Self] {
        &[Event::Allowed, Event::Denied, Event::Done, Event::Noted]
    }

    fn index(self) -> usize {
        self as usize
    }

    fn text(self) -> &'static str {
        match self {
            Event::Allowed => "allowed",
            Event::Denied => "denied",
            Event::Done => "done",
            Event::Noted => "noted",
        }
    }
}

impl Closed for CryptoErrorKind {
    fn all() -> &'static [Self] {
        &Self::ALL
    }

    fn index(self) -> usize {
        self as usize
    }

    fn text(self) -> &'static str {
        self.as_str()
    }
}

closed! {
    /// A limit that a call, or a client, can meet.
    Limit {
        Connections = "gateway_connections", "Connections to a gateway (`MAX_CONNECTIONS`).";
        GatewayCalls = "gateway_calls", "Calls in flight at a gateway (`MAX_CALLS`).";
        GatewayBodies = "gateway_body_bytes", "Bytes of request bodies in flight at a gateway (`MAX_BODY_BYTES`).";
        UserCalls = "user_calls", "Calls in flight of one user (`USER_MAX_CALLS`).";
        UserRate = "user_rate", "Calls per second of one user (`USER_MAX_RATE`).";
        WorkerCalls = "worker_calls", "Calls that one worker looks after (`WORKER_MAX_CALLS`).";
        ServerQueue = "server_queue", "Calls that wait for a free slot of one server (`SERVER_QUEUE`).";
        Crowd = "crowd", "Calls that a gateway refused by itself: workers refused many of their server within a second, one of them less than 50 ms ago.";
        ServiceCalls = "service_calls", "Calls of services on NATS that one worker sees to.";
    }
}

closed! {
    /// What came of a call of a tool.
    CallEnd {
        Ok = "ok", "It has a result.";
        ToolError = "tool_error", "It has a result of which the tool says that it is an error (`isError`).";
        Completed = "completed", "The server answered, and not with a result.";
        Unknown = "unknown", "Nobody knows whether the server did it.";
        NotStarted = "not_started", "The server never saw it: refused, too late, or the server does not run.";
        Left = "left", "Its caller did not wait for the end.";
    }
}

impl CallEnd {
    /// That of an error.
    pub fn of_error(error: &WorkerError) -> Self {
        match (error.code, error.outcome) {
            (ErrorCode::Cancelled, _) => CallEnd::Left,
            (_, Some(Outcome::NotStarted)) => CallEnd::NotStarted,
            (_, Some(Outcome::Completed)) => CallEnd::Completed,
            (_, Some(Outcome::Unknown) | None) => CallEnd::Unknown,
        }
    }

    /// That of a result.
    pub fn of_result(result: &RawJson) -> Self {
        if result.says_error() { CallEnd::ToolError } else { CallEnd::Ok }
    }
}

closed! {
    /// How the end of a call reaches its caller.
    Reply {
        Json = "json", "As one document.";
        Events = "events", "As the last event of a stream.";
    }
}

closed! {
    /// Which way something goes, as seen from the node.
    Direction {
        In = "in", "To the node.";
        Out = "out", "From the node.";
    }
}

closed! {
    /// How a server is reached.
    Carrier {
        Stdio = "stdio", "It is a process of the worker's.";
        Http = "http", "It is a remote server.";
    }
}

impl Carrier {
    /// That of a server that is a remote one, or is not.
    pub fn of(is_remote: bool) -> Self {
        if is_remote { Carrier::Http } else { Carrier::Stdio }
    }
}

closed! {
    /// What a call does at a worker.
    Stage {
        Queue = "queue", "It waits for a free slot of its server, and for the server's start if it does not run.";
        Handshake = "handshake", "It has a slot, and waits for its gateway to say GO and send the arguments.";
        Secrets = "secrets", "Its user's secrets are read, decrypted and merged into the arguments.";
        Server = "server", "The server has it.";
    }
}

closed! {
    /// Where a user's secrets for a call came from.
    SecretSource {
        Memory = "memory", "They were read before.";
        Store = "store", "They were read now.";
        Doubtful = "doubtful", "They were read before and may have changed since, and the store does not answer.";
    }
}

closed! {
    /// What came of refreshing a user's tokens for a remote server.
    Refreshed {
        Ok = "ok", "There are new ones.";
        LoginNeeded = "login_needed", "The user has to log in again.";
        Failed = "failed", "The authorization server could not be asked, or gave no answer that counts.";
    }
}

closed! {
    /// What came of a start.
    Started {
        Ok = "ok", "It listed its tools.";
        Failed = "failed", "It did not come up, or not in time.";
    }
}

closed! {
    /// Why a server that ran does so no more.
    Gone {
        Exited = "exited", "Its process ended by itself.";
        Killed = "killed", "A signal ended its process that was none of ours: it crashed, or the system had no memory.";
        TooLarge = "too_large", "It took more memory or processes than a server may (`SERVER_MAX_MEMORY`, `SERVER_MAX_PROCESSES`).";
        Disconnected = "disconnected", "A remote server ended the session, or the connection was lost.";
        Lost = "lost", "Its end was not seen.";
        Idle = "idle", "Nobody called it for as long as its record says, and it was stopped.";
        Stuck = "stuck", "It went on with calls that were cancelled, or said nothing any more, and was replaced.";
        Stopped = "stopped", "It was stopped: its record was changed or removed, or its worker leaves.";
    }
}

closed! {
    /// What a server of a worker does.
    Status {
        Connected = "connected", "It runs and listed its tools.";
        Connecting = "connecting", "It is being started.";
        Error = "error", "It could not be started, or died.";
        Disconnected = "disconnected", "It does not run here, and need not.";
        Disabled = "disabled", "It is switched off.";
    }
}

closed! {
    /// What is done with the store.
    StoreWork {
        Ping = "ping", "It is asked whether it answers.";
        Read = "read", "Something is read.";
        Write = "write", "Something is written.";
        Lease = "lease", "A lease is taken, renewed or given back.";
    }
}

closed! {
    /// What came of an operation of the store.
    StoreEnd {
        Ok = "ok", "It was done.";
        Exists = "already_exists", "There is one of that name already.";
        NotFound = "not_found", "There is none.";
        Conflict = "conflict", "Somebody else was faster.";
        Full = "full", "The disk is full.";
        Unavailable = "unavailable", "The store did not answer.";
        Corrupt = "corrupt", "What is stored cannot be read.";
    }
}

impl StoreEnd {
    /// That of an operation.
    pub fn of<T>(done: &Result<T, StoreError>) -> Self {
        match done {
            Ok(_) => StoreEnd::Ok,
            Err(StoreError::AlreadyExists { .. }) => StoreEnd::Exists,
            Err(StoreError::NotFound) => StoreEnd::NotFound,
            Err(StoreError::Conflict) => StoreEnd::Conflict,
            Err(StoreError::Full) => StoreEnd::Full,
            Err(StoreError::Unavailable { .. }) => StoreEnd::Unavailable,
            Err(StoreError::Corrupt { .. }) => StoreEnd::Corrupt,
        }
    }
}

closed! {
    /// A connection of the store's pool.
    Pooled {
        Idle = "idle", "It is open and waits for an operation.";
        InUse = "in_use", "It has an operation.";
    }
}

closed! {
    /// What went wrong with the bus.
    BusTrouble {
        Server = "server", "The NATS server said that something is an error, such as a permission that is lacking.";
        Client = "client", "The connection could not be used or made.";
        Outbox = "outbox", "A message found no place among those that wait to be sent.";
        Publish = "publish", "A message was not taken by the connection.";
    }
}

closed! {
    /// What a job does.
    JobWork {
        Install = "install", "It installs a package.";
        Upgrade = "upgrade", "It installs another version.";
    }
}

closed! {
    /// What came of a worker's turn at a job.
    JobEnd {
        Done = "done", "It is done.";
        Failed = "failed", "It failed for good.";
        Again = "again", "It failed, and is begun again in a moment.";
        Left = "left", "It is another worker's now, or the worker leaves.";
    }
}

closed! {
    /// Why a span did not get to the collector of traces.
    SpanLoss {
        QueueFull = "queue_full", "More came than could be sent.";
        Failed = "export_failed", "The collector could not be reached, or did not take the batch.";
        Rejected = "rejected", "The collector took the batch, but not this.";
    }
}

closed! {
    /// How requests were answered, by the first digit of the status.
    StatusClass {
        Success = "2xx", "It was done.";
        Redirection = "3xx", "It is elsewhere.";
        Client = "4xx", "The client has to change something.";
        Server = "5xx", "Something here, or behind it, does not work.";
    }
}

impl StatusClass {
    /// That of a status.
    pub fn of(status: u16) -> Self {
        match status {
            ..300 => StatusClass::Success,
            300..400 => StatusClass::Redirection,
            400..500 => StatusClass::Client,
            500.. => StatusClass::Server,
        }
    }
}
