//! Errors that cross the seam between gateway and worker: a closed code and a sentence that is safe
//! to show. Causes go to the log, where they are handled.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::store::StoreError;

/// What is known about a tool call that did not return a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The server never saw the call: repeating it is safe.
    NotStarted,
    /// The server may or may not have done it.
    Unknown,
    /// The server answered.
    Completed,
}

impl Outcome {
    /// As it stands in answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::NotStarted => "not_started",
            Outcome::Unknown => "unknown",
            Outcome::Completed => "completed",
        }
    }
}

macro_rules! error_codes {
    ($($variant:ident = $text:literal, retryable $retryable:literal, $meaning:literal;)*) => {
        /// Every code that an answer of ours can carry. The set is closed: clients may match on it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ErrorCode {
            $(#[doc = $meaning] $variant,)*
        }

        impl ErrorCode {
            /// All codes, in the order of the documentation.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$variant,)*];

            /// The code as it stands in answers.
            pub fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$variant => $text,)* }
            }

            /// One sentence on what the code means.
            pub fn meaning(self) -> &'static str {
                match self { $(ErrorCode::$variant => $meaning,)* }
            }

            /// Whether the same request may succeed later without being changed.
            pub fn retryable(self) -> bool {
                match self { $(ErrorCode::$variant => $retryable,)* }
            }
        }
    };
}

error_codes! {
    InvalidRequest = "invalid_request", retryable false, "A field is missing, has the wrong type or an impossible value.";
    InvalidJson = "invalid_json", retryable false, "The body is not JSON, or is nested too deeply.";
    InvalidServerName = "invalid_server_name", retryable false, "The server's name is not one that a server can have.";
    InvalidArguments = "invalid_arguments", retryable false, "The MCP server refused the arguments (JSON-RPC -32602).";
    InvalidUrl = "invalid_url", retryable false, "A URL is not an `http` or `https` one, or has a user name, a password or a fragment.";
    InvalidHeader = "invalid_header", retryable false, "A header has a name or a value that a remote server cannot be sent.";
    BlockedAddress = "blocked_address", retryable false, "The address is private, local or reserved, and not in `EGRESS_ALLOW`.";
    InvalidState = "invalid_state", retryable false, "The login was not begun here, is over, was used before, or belongs to another browser.";
    UnsupportedMediaType = "unsupported_media_type", retryable false, "The body must be sent as `application/json`.";
    UriTooLong = "uri_too_long", retryable false, "The request's address is longer than any that the API has.";
    HeadersTooLarge = "headers_too_large", retryable false, "The request has too many headers, or too large ones.";
    PayloadTooLarge = "payload_too_large", retryable false, "The body is larger than `PAYLOAD_LIMIT`.";
    RequestTimeout = "request_timeout", retryable true, "The body did not arrive in time.";
    HostNotAllowed = "host_not_allowed", retryable false, "The `Host` header names a host that is not in `ALLOWED_HOSTS`.";
    OriginNotAllowed = "origin_not_allowed", retryable false, "The `Origin` header names a page that is not in `ALLOWED_ORIGINS`.";
    Unauthorized = "unauthorized", retryable false, "The request has no credential that is valid.";
    Forbidden = "forbidden", retryable false, "The credential does not allow this: it lacks a scope, or does not reach the server or the tool.";
    ForbiddenUser = "forbidden_user", retryable false, "The request names another user than the credential's, which may not act for others.";
    CommandNotAllowed = "command_not_allowed", retryable false, "A server may not be started by this command: a shell, or one that is not in `COMMANDS_ALLOW`.";
    EnvNotAllowed = "env_not_allowed", retryable false, "A server may not be given this environment variable: it changes which code runs.";
    ApiKeyNotFound = "api_key_not_found", retryable false, "There is no API key with that id.";
    IssuerUnavailable = "issuer_unavailable", retryable true, "Tokens cannot be checked: the keys of their issuer cannot be fetched.";
    AuditUnavailable = "audit_unavailable", retryable true, "The audit log cannot be written, so that nothing may be changed.";
    NotFound = "not_found", retryable false, "There is no such route.";
    MethodNotAllowed = "method_not_allowed", retryable false, "The route exists with other methods; `Allow` lists them.";
    ServerNotFound = "server_not_found", retryable false, "No server has that name.";
    WorkerNotFound = "worker_not_found", retryable false, "No worker of the fleet has that id; one that was started again has a new one.";
    ServerAlreadyExists = "server_already_exists", retryable false, "A server has that name, or one that differs only in case.";
    ServerDisabled = "server_disabled", retryable false, "The server is registered but switched off.";
    BuiltinServer = "builtin_server", retryable false, "Built-in servers cannot be changed or deleted.";
    InvalidPackageName = "invalid_package_name", retryable false, "The package's name is not one that its registry can have.";
    InvalidVersion = "invalid_version", retryable false, "The version is not one that the package's registry can have.";
    PackageNotFound = "package_not_found", retryable false, "No package of that name is installed, or the registry has none.";
    VersionNotFound = "version_not_found", retryable false, "The registry does not have that version of the package.";
    JobNotFound = "job_not_found", retryable false, "There is no such job, or a newer one of the same server took its place.";
    InstallInProgress = "install_in_progress", retryable true, "The server is being installed or upgraded; `jobId` names the job.";
    InstallFailed = "install_failed", retryable false, "The package manager failed; `details` has its own words.";
    InstallTimeout = "install_timeout", retryable true, "The installation took too long, or was silent for too long.";
    InstallWarnings = "install_warnings", retryable false, "The package manager warned, and `failOnWarning` is set.";
    InstallTooLarge = "install_too_large", retryable false, "The package is larger, or has more files, than an installation may have.";
    IntegrityMismatch = "integrity_mismatch", retryable false, "The registry has other bytes than those that were locked.";
    NoEntryPoint = "no_entry_point", retryable false, "The package says of nothing that it can be run; `command` can.";
    NotAnMcpServer = "not_an_mcp_server", retryable false, "The package was installed, and what it runs did not answer as an MCP server.";
    RegistryUnavailable = "registry_unavailable", retryable true, "The package registry cannot be reached or does not answer properly.";
    RuntimeMissing = "runtime_missing", retryable false, "The worker lacks what the package needs: node and npm, or Python.";
    DiskFull = "disk_full", retryable true, "The disk of the worker has no room for the package.";
    ServerStarting = "server_starting", retryable true, "The server did not finish starting within the call's time.";
    ServerUnavailable = "server_unavailable", retryable true, "The server could not be started.";
    ServerCrashed = "server_crashed", retryable true, "The server's process ended while the call was in flight.";
    ServerStopped = "server_stopped", retryable true, "The server was stopped or restarted while the call was in flight.";
    ServerProtocolError = "server_protocol_error", retryable false, "The server's answer was not a valid MCP answer.";
    ReauthRequired = "reauth_required", retryable false, "The user has to log in to the remote server (again); `loginUrl` begins that.";
    LoginFailed = "login_failed", retryable true, "The remote server or its authorization server did not go along with the login.";
    UpstreamUnavailable = "upstream_unavailable", retryable true, "The remote server cannot be reached, or said that it takes no calls right now.";
    UpstreamTls = "upstream_tls", retryable false, "The remote server's certificate is not valid for it.";
    UpstreamRateLimited = "upstream_rate_limited", retryable true, "The remote server takes no more calls of this user for a while.";
    UpstreamRedirect = "upstream_redirect", retryable false, "The remote server answered with a redirect, which is not followed.";
    UpstreamProtocolError = "upstream_protocol_error", retryable false, "The remote server's answer was not one of MCP.";
    UpstreamLost = "upstream_lost", retryable true, "The connection was lost while the call was in flight; whether the remote server did it is unknown.";
    IdempotencyKeyReused = "idempotency_key_reused", retryable false, "The `Idempotency-Key` names another call, with other arguments.";
    IdempotencyInProgress = "idempotency_in_progress", retryable true, "The call that the `Idempotency-Key` names is under way.";
    IdempotencyResultGone = "idempotency_result_gone", retryable false, "The call that the `Idempotency-Key` names was done, and its result was too large to be kept.";
    ToolNotFound = "tool_not_found", retryable false, "The MCP server has no such tool (JSON-RPC -32601).";
    McpError = "mcp_error", retryable false, "The MCP server answered with a JSON-RPC error; `mcpCode` has its code.";
    ResultTooLarge = "result_too_large", retryable false, "The server's answer was larger than a result may be.";
    DeadlineExceeded = "deadline_exceeded", retryable true, "The call did not finish in the time it was given.";
    Cancelled = "cancelled", retryable true, "The call was cancelled before it finished.";
    RateLimited = "rate_limited", retryable true, "The user has too many calls in flight or made too many lately; try again after `Retry-After` seconds.";
    Overloaded = "overloaded", retryable true, "Too much is under way; try again after `Retry-After` seconds.";
    NoWorker = "no_worker", retryable true, "No worker can take the call right now; nothing was started.";
    WorkerLost = "worker_lost", retryable true, "The worker that ran the call is gone; whether the server did it is unknown.";
    BusUnavailable = "bus_unavailable", retryable true, "The message bus between gateways and workers cannot be reached.";
    ShuttingDown = "shutting_down", retryable true, "This process is stopping.";
    KeysRefused = "keys_refused", retryable false, "The encryption keys do not fit what is stored, or those of other nodes; the old ones stay.";
    KeyNotFound = "key_not_found", retryable false, "There is no encryption key with that id.";
    KeyInUse = "key_in_use", retryable false, "The encryption key is needed: it encrypts, or stored values are encrypted with it.";
    RewrapInProgress = "rewrap_in_progress", retryable true, "What is stored is being encrypted anew already.";
    Conflict = "conflict", retryable true, "Somebody else changed the same record at the same time.";
    StoreUnavailable = "store_unavailable", retryable true, "The store did not answer.";
    StorageFull = "storage_full", retryable true, "The store's disk is full: nothing can be written.";
    SecretIntegrity = "secret_integrity", retryable false, "A stored secret cannot be decrypted; setting it again mends it.";
    Internal = "internal", retryable false, "A fault of ours; the log has the cause under the request id.";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for ErrorCode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for ErrorCode {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.as_str() == text)
            .ok_or_else(|| serde::de::Error::custom("unknown error code"))
    }
}

/// An error as a caller may see it. It crosses the bus unchanged, so that both shapes of the program
/// answer alike.
#[derive(Debug, Clone, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[error("{code}: {message}")]
#[serde(rename_all = "camelCase")]
pub struct WorkerError {
    /// The closed code.
    pub code: ErrorCode,
    /// A sentence without causes, paths, stack traces or more than 64 characters of input.
    pub message: String,
    /// What is known about the call; absent where no tool call is concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// How long to wait before trying again, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// Further fields of the answer, such as `serverName` or `mcpCode`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub details: Map<String, Value>,
}

impl WorkerError {
    /// An error with a code and a safe sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), outcome: None, retry_after_ms: None, details: Map::new() }
    }

    /// A fault of ours. The cause is logged here, once, and not shown.
    pub fn internal(cause: impl fmt::Display) -> Self {
        tracing::error!(error.cause = %cause, "internal error");
        Self::new(ErrorCode::Internal, "Internal error")
    }

    /// `Server NAME not found`, as documented.
    pub fn server_not_found(name: impl fmt::Display) -> Self {
        let name = name.to_string();
        Self::new(ErrorCode::ServerNotFound, format!("Server {} not found", shorten(&name, 64)))
            .with("serverName", shorten(&name, 64))
    }

    /// `Worker ID not found`.
    pub fn worker_not_found(id: impl fmt::Display) -> Self {
        let id = shorten(&id.to_string(), 64);
        Self::new(ErrorCode::WorkerNotFound, format!("Worker {id} not found")).with("workerId", id)
    }

    /// States what is known about the call.
    pub fn outcome(mut self, outcome: Outcome) -> Self {
        self.outcome = Some(outcome);
        self
    }

    /// States what is known about the call, unless somebody who knew better did.
    pub fn or_outcome(mut self, outcome: Outcome) -> Self {
        self.outcome.get_or_insert(outcome);
        self
    }

    /// Says when trying again makes sense.
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after_ms = Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        self
    }

    /// Adds up to a half to the time after which to come back, for each caller another: those who were refused together would
    /// come back together.
    pub fn spread(mut self) -> Self {
        self.retry_after_ms = self.retry_after_ms.map(|wait| {
            // Without random numbers all come back at once, which is no reason to refuse them otherwise.
            let drawn = getrandom::u64().unwrap_or(0);
            wait.saturating_add(drawn % (wait / 2 + 1))
        });
        self
    }

    /// Adds a field to the answer.
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.details.insert(key.to_owned(), value.into());
        self
    }
}

impl From<StoreError> for WorkerError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict => {
                Self::new(ErrorCode::Conflict, "The record was changed at the same time; try again")
            }
            StoreError::AlreadyExists { .. } => {
                Self::new(ErrorCode::Conflict, "Something else is stored under the same key")
            }
            StoreError::Full => Self::new(ErrorCode::StorageFull, "The store's disk is full"),
            StoreError::Unavailable { ref cause } => {
                tracing::error!(error.cause = %cause, "the store is unavailable");
                Self::new(ErrorCode::StoreUnavailable, "The store is not available")
                    .retry_after(Duration::from_secs(1))
            }
            other => Self::internal(other),
        }
    }
}

/// At most `max` characters of a text, on one line, without control characters: for messages that
/// repeat something another party sent.
pub fn shorten(text: &str, max: usize) -> String {
    let mut out: String = text.chars().take(max).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.chars().nth(max).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_survive_the_wire() {
        let mut seen = std::collections::HashSet::new();
        for code in ErrorCode::ALL {
            assert!(seen.insert(code.as_str()));
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(serde_json::from_str::<ErrorCode>(&json).unwrap(), *code);
        }
    }

    #[test]
    fn an_error_survives_the_wire() {
        let error = WorkerError::server_not_found("nope")
            .outcome(Outcome::NotStarted)
            .retry_after(Duration::from_secs(2))
            .with("mcpCode", -32602);
        let json = serde_json::to_string(&error).unwrap();
        assert_eq!(serde_json::from_str::<WorkerError>(&json).unwrap(), error);
    }

    #[test]
    fn messages_repeat_little() {
        assert_eq!(shorten("a\r\nb", 64), "a  b");
        assert_eq!(shorten(&"x".repeat(100), 64).chars().count(), 65);
    }
}
