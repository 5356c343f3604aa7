//! How errors leave: the envelope, and the only mapping of codes to HTTP.

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::{HeaderName, HeaderValue, StatusCode, header};
use mcp_shared::{
    answer::failure,
    error::{ErrorCode, Outcome, WorkerError},
    ids::{InvalidName, RequestId},
    json::RawJson,
    vault::VaultError,
};
use serde_json::Value;

/// An error on its way out. The edge turns it into a document when it knows the request's id.
#[derive(Debug, Clone)]
pub struct Problem {
    error: Box<WorkerError>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// A problem with a code and a safe sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        WorkerError::new(code, message).into()
    }

    /// `invalid_request` with a sentence on what would be valid.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::InvalidRequest, message)
    }

    /// Adds a header to the answer.
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    /// Adds a field to the answer.
    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.error.details.insert(key.to_owned(), value.into());
        self
    }

    /// The code and the sentence, for answers that have several of them.
    pub fn into_parts(self) -> (ErrorCode, String) {
        (self.error.code, self.error.message)
    }

    /// States that the tool call was not started, unless more is known about it: answers to tool calls
    /// always say whether repeating them is safe.
    pub fn not_started(mut self) -> Self {
        self.error.outcome.get_or_insert(Outcome::NotStarted);
        self
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        match self.error.code {
            // Said of a call it is the remote server's name that leads there, not what the caller sent.
            ErrorCode::BlockedAddress if self.error.outcome.is_some() => StatusCode::BAD_GATEWAY,
            code => status(code),
        }
    }

    /// What went wrong.
    pub fn error(&self) -> &WorkerError {
        &self.error
    }

    /// The closed code.
    pub fn code(&self) -> ErrorCode {
        self.error.code
    }

    /// The document.
    pub fn envelope(&self, request: &RequestId) -> Value {
        failure(&self.error, request)
    }

    /// The finished answer.
    pub fn into_answer(self, request: &RequestId) -> Response {
        let status = self.status();
        let mut response = json_response(status, &self.envelope(request));
        // Who is told to come back is told when, also where nobody could say more than "not at once".
        let comes_back = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        let wait = self.error.retry_after_ms.or(comes_back.then_some(0));
        if let Some(wait) = wait {
            // Whole seconds, and never "at once".
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(wait.div_ceil(1_000).max(1)));
        }
        for (name, value) in self.headers {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

impl From<WorkerError> for Problem {
    fn from(error: WorkerError) -> Self {
        Self { error: Box::new(error), headers: Vec::new() }
    }
}

impl From<VaultError> for Problem {
    fn from(error: VaultError) -> Self {
        WorkerError::from(error).into()
    }
}

impl From<InvalidName> for Problem {
    fn from(error: InvalidName) -> Self {
        let code = if error.field == "serverName" {
            ErrorCode::InvalidServerName
        } else {
            ErrorCode::InvalidRequest
        };
        Self::new(code, error.to_string())
    }
}

impl IntoResponse for Problem {
    /// A bare response that carries the problem; the edge replaces it.
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// The HTTP status of a code.
pub fn status(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidRequest
        | ErrorCode::InvalidJson
        | ErrorCode::InvalidServerName
        | ErrorCode::InvalidPackageName
        | ErrorCode::InvalidVersion
        | ErrorCode::InvalidUrl
        | ErrorCode::InvalidHeader
        | ErrorCode::BlockedAddress
        | ErrorCode::CommandNotAllowed
        | ErrorCode::EnvNotAllowed
        | ErrorCode::InvalidState
        | ErrorCode::InvalidArguments => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized | ErrorCode::ReauthRequired => StatusCode::UNAUTHORIZED,
        ErrorCode::RateLimited | ErrorCode::UpstreamRateLimited => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::HostNotAllowed
        | ErrorCode::OriginNotAllowed
        | ErrorCode::Forbidden
        | ErrorCode::ForbiddenUser
        | ErrorCode::BuiltinServer => StatusCode::FORBIDDEN,
        ErrorCode::NotFound
        | ErrorCode::ServerNotFound
        | ErrorCode::WorkerNotFound
        | ErrorCode::ApiKeyNotFound
        | ErrorCode::ToolNotFound
        | ErrorCode::PackageNotFound
        | ErrorCode::VersionNotFound
        | ErrorCode::JobNotFound
        | ErrorCode::KeyNotFound => StatusCode::NOT_FOUND,
        ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorCode::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
        ErrorCode::ServerAlreadyExists
        | ErrorCode::ServerDisabled
        | ErrorCode::InstallInProgress
        | ErrorCode::IdempotencyInProgress
        | ErrorCode::KeysRefused
        | ErrorCode::KeyInUse
        | ErrorCode::RewrapInProgress
        | ErrorCode::Conflict => StatusCode::CONFLICT,
        ErrorCode::InstallWarnings
        | ErrorCode::InstallTooLarge
        | ErrorCode::IdempotencyKeyReused
        | ErrorCode::NoEntryPoint
        | ErrorCode::NotAnMcpServer => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorCode::IdempotencyResultGone => StatusCode::GONE,
        ErrorCode::UriTooLong => StatusCode::URI_TOO_LONG,
        ErrorCode::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        ErrorCode::PayloadTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorCode::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        ErrorCode::SecretIntegrity | ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        ErrorCode::ServerUnavailable
        | ErrorCode::ServerCrashed
        | ErrorCode::ServerStopped
        | ErrorCode::ServerProtocolError
        | ErrorCode::McpError
        | ErrorCode::LoginFailed
        | ErrorCode::UpstreamUnavailable
        | ErrorCode::UpstreamTls
        | ErrorCode::UpstreamRedirect
        | ErrorCode::UpstreamProtocolError
        | ErrorCode::UpstreamLost
        | ErrorCode::InstallFailed
        | ErrorCode::IntegrityMismatch
        | ErrorCode::RegistryUnavailable
        | ErrorCode::WorkerLost
        | ErrorCode::ResultTooLarge => StatusCode::BAD_GATEWAY,
        ErrorCode::ServerStarting
        | ErrorCode::Cancelled
        | ErrorCode::Overloaded
        | ErrorCode::NoWorker
        | ErrorCode::BusUnavailable
        | ErrorCode::RuntimeMissing
        | ErrorCode::ShuttingDown
        | ErrorCode::AuditUnavailable
        | ErrorCode::IssuerUnavailable
        | ErrorCode::StoreUnavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorCode::DeadlineExceeded | ErrorCode::InstallTimeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::StorageFull | ErrorCode::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
    }
}

/// A JSON answer.
pub fn json_response(status: StatusCode, body: &impl serde::Serialize) -> Response {
    match RawJson::of(body) {
        Ok(json) => json_bytes(status, json.bytes().clone()),
        Err(error) => WorkerErrorResponse(WorkerError::internal(error)).into_response(),
    }
}

/// A JSON answer from finished bytes.
pub fn json_bytes(status: StatusCode, body: bytes::Bytes) -> Response {
    json_body(status, body.into())
}

/// A JSON answer with this body.
pub fn json_body(status: StatusCode, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

/// An answer that could not even be written.
struct WorkerErrorResponse(WorkerError);

impl IntoResponse for WorkerErrorResponse {
    fn into_response(self) -> Response {
        Problem::from(self.0).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_429_and_503_says_when_to_come_back() {
        let request = RequestId::generate();
        for code in ErrorCode::ALL {
            let answer = Problem::new(*code, "x").into_answer(&request);
            let retry =
                answer.headers().get(header::RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned());
            let wanted = matches!(answer.status().as_u16(), 429 | 503);
            assert_eq!(retry, wanted.then(|| "1".to_owned()), "{code}");
            assert!(!wanted || code.retryable() || *code == ErrorCode::RuntimeMissing, "{code}");
            // What somebody knew is said, rounded up.
            let error = WorkerError::new(*code, "x").retry_after(std::time::Duration::from_millis(2_001));
            let answer = Problem::from(error).into_answer(&request);
            assert_eq!(answer.headers()[header::RETRY_AFTER], "3", "{code}");
        }
    }
}
