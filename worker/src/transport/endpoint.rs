//! Requests to one remote server for one user: where to, with which headers, as whom, and what its refusals
//! mean.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use mcp_shared::{
    egress::EgressError,
    error::{ErrorCode, Outcome, WorkerError},
    ids::{ServerName, UserId},
    limits,
    server::{ServerRecord, Transport, Variables},
    store::Revision,
};
use reqwest::{Request, Response};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::connection::{Failure, Upstream};
use crate::{
    host::Host,
    logs::{Known, Log},
    oauth::Bearer,
    outgoing::{SendError, chain},
};

/// Bytes of the text of a refusal that are looked at.
const REFUSAL_BYTES: usize = 64 * 1024;
/// The longest wait that a remote server may ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// A remote server as one user reaches it.
pub struct Endpoint {
    host: Arc<Host>,
    /// Whose requests these are.
    pub user: UserId,
    /// The server as it was registered when the connection began.
    pub record: Arc<ServerRecord>,
    /// Where to.
    pub url: Url,
    headers: HeaderMap,
    log: Arc<Log>,
    /// The token that was sent last, and the guard that keeps it out of the server's log.
    token: Mutex<Option<(Revision, Known)>>,
}

impl Endpoint {
    /// The remote server of a record. The error is for the caller of a tool.
    pub fn new(
        host: Arc<Host>,
        user: UserId,
        record: Arc<ServerRecord>,
        log: Arc<Log>,
    ) -> Result<Self, WorkerError> {
        let Transport::StreamableHttp { url, headers, .. } = &record.transport else {
            return Err(WorkerError::internal("a server of another transport"));
        };
        let url = host.http.egress().check(url).map_err(|error| egress(&error))?;
        let headers = static_headers(headers.as_ref());
        Ok(Self { host, user, record, url, headers, log, token: Mutex::default() })
    }

    /// Its name.
    pub fn server(&self) -> &ServerName {
        &self.record.name
    }

    /// The values of its headers, to be kept out of its log: whole, and what follows a scheme such as `Bearer`.
    pub fn secrets(&self) -> Vec<SecretString> {
        let values = self.headers.values().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| [value, value.rsplit(' ').next().unwrap_or(value)]).map(Into::into).collect()
    }

    /// Sends a request and waits for the head of the answer. A refused token is replaced once.
    pub async fn send(
        &self,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
        body: Option<Bytes>,
    ) -> Result<Response, Failure> {
        let mut bearer = self.host.oauth.bearer(&self.user, &self.record).await.map_err(not_sent)?;
        let mut again = true;
        loop {
            let mut request = Request::new(method.clone(), url.clone());
            let all = request.headers_mut();
            for (name, value) in self.headers.iter().chain(headers) {
                all.append(name, value.clone());
            }
            if let Some(bearer) = &bearer {
                let mut value = HeaderValue::try_from(format!("Bearer {}", bearer.token.expose_secret()))
                    .map_err(|_| {
                        not_sent(unusable_token(self.server()).with("username", self.user.as_str()))
                    })?;
                value.set_sensitive(true);
                all.insert(header::AUTHORIZATION, value);
                self.remember(bearer);
            }
            *request.body_mut() = body.clone().map(Into::into);
            let response = self.host.http.send(request).await.map_err(|error| self.unsent(&error))?;
            if response.status() != StatusCode::UNAUTHORIZED {
                return Ok(response);
            }
            if !again {
                // A token that was given out a moment ago is refused as well.
                let text = format!("Server {} does not accept the user's login", self.server());
                let error = self.named(WorkerError::new(ErrorCode::ReauthRequired, text));
                let error = error.with("username", self.user.as_str()).outcome(Outcome::NotStarted);
                self.host.oauth.spurned(&self.user, &self.record, bearer.as_ref(), &error);
                return Err(not_sent(error));
            }
            again = false;
            let challenge = response.headers().get(header::WWW_AUTHENTICATE).and_then(|v| v.to_str().ok());
            let next = self.host.oauth.refused(&self.user, &self.record, bearer.as_ref(), challenge).await;
            bearer = Some(next.map_err(|error| refusal(error, Some(401)))?);
        }
    }

    /// Keeps a token out of what the server may say about it.
    fn remember(&self, bearer: &Bearer) {
        let mut token = self.token.lock().unwrap_or_else(PoisonError::into_inner);
        if token.as_ref().is_none_or(|(revision, _)| *revision != bearer.revision) {
            *token = Some((bearer.revision, self.log.remember([&bearer.token].into_iter())));
        }
    }

    /// What an answer other than 2xx means. The body is looked at by the caller if it may hold an answer.
    pub fn refused(&self, response: &Response) -> Failure {
        let status = response.status();
        let name = self.server();
        let (code, text, outcome) = match status.as_u16() {
            300..=399 => (
                ErrorCode::UpstreamRedirect,
                format!("Server {name} answered with a redirect, which is not followed"),
                Outcome::NotStarted,
            ),
            429 => (
                ErrorCode::UpstreamRateLimited,
                format!("Server {name} takes no more calls for a while"),
                Outcome::NotStarted,
            ),
            503 if response.headers().contains_key(header::RETRY_AFTER) => (
                ErrorCode::UpstreamUnavailable,
                format!("Server {name} takes no calls right now"),
                Outcome::NotStarted,
            ),
            status @ 500.. => (
                ErrorCode::UpstreamProtocolError,
                format!("Server {name} failed with HTTP status {status}"),
                Outcome::Unknown,
            ),
            status => (
                ErrorCode::UpstreamProtocolError,
                format!("Server {name} refused the request with HTTP status {status}"),
                Outcome::NotStarted,
            ),
        };
        let mut error = self.named(WorkerError::new(code, text)).outcome(outcome);
        if let Some(wait) = retry_after(response.headers()) {
            error = error.retry_after(wait);
        }
        refusal(error, Some(status.as_u16()))
    }

    /// Reads a body that is expected to be short; the rest of a longer one is not read.
    pub async fn text(mut response: Response) -> Vec<u8> {
        let mut text = Vec::new();
        while let Ok(Some(chunk)) = response.chunk().await {
            text.extend_from_slice(&chunk);
            if text.len() >= REFUSAL_BYTES {
                break;
            }
        }
        text.truncate(REFUSAL_BYTES);
        text
    }

    /// The connection was lost after the request had been sent.
    pub fn lost(&self) -> Failure {
        let text =
            format!("The connection to server {} was lost while the call was in flight", self.server());
        let error = WorkerError::new(ErrorCode::UpstreamLost, text).outcome(Outcome::Unknown);
        refusal(self.named(error), None)
    }

    /// So much came that whatever is still to come is not waited for.
    pub fn too_much(&self) -> Failure {
        let text = format!("Server {} sent more than an answer may have", self.server());
        let error = WorkerError::new(ErrorCode::ResultTooLarge, text).outcome(Outcome::Unknown);
        refusal(self.named(error), None)
    }

    /// An answer came that is none.
    pub fn malformed(&self, what: &str) -> Failure {
        let text = format!("Server {} {what}", self.server());
        let error = WorkerError::new(ErrorCode::UpstreamProtocolError, text).outcome(Outcome::Unknown);
        refusal(self.named(error), None)
    }

    fn unsent(&self, error: &SendError) -> Failure {
        tracing::debug!(server = %self.server(), error.cause = %chain(error), "a request has no answer");
        let name = self.server();
        match error {
            SendError::Egress(EgressError::Unresolved) => not_sent(
                self.named(
                    WorkerError::new(
                        ErrorCode::UpstreamUnavailable,
                        format!("Server {name} cannot be reached: the name of its host is not known"),
                    )
                    .retry_after(Duration::from_secs(5)),
                ),
            ),
            SendError::Egress(error) => not_sent(self.named(egress(error))),
            SendError::Unreachable(_) => not_sent(
                self.named(
                    WorkerError::new(
                        ErrorCode::UpstreamUnavailable,
                        format!("Server {name} cannot be reached"),
                    )
                    .retry_after(Duration::from_secs(1)),
                ),
            ),
            SendError::Tls(_) => not_sent(self.named(WorkerError::new(
                ErrorCode::UpstreamTls,
                format!("The certificate of server {name} is not valid"),
            ))),
            SendError::Lost(_) => self.lost(),
        }
    }

    fn named(&self, error: WorkerError) -> WorkerError {
        error.with("serverName", self.server().as_str())
    }
}

/// What the guard's refusal means to a caller.
fn egress(error: &EgressError) -> WorkerError {
    let code = match error {
        EgressError::Blocked(_) => ErrorCode::BlockedAddress,
        EgressError::InvalidUrl(_) => ErrorCode::InvalidUrl,
        EgressError::Unresolved => ErrorCode::UpstreamUnavailable,
    };
    WorkerError::new(code, error.to_string()).outcome(Outcome::NotStarted)
}

fn unusable_token(server: &ServerName) -> WorkerError {
    let text = format!("The stored token for server {server} cannot be sent in a header: log in again");
    WorkerError::new(ErrorCode::ReauthRequired, text).with("serverName", server.as_str())
}

fn not_sent(error: WorkerError) -> Failure {
    refusal(error.or_outcome(Outcome::NotStarted), None)
}

fn refusal(error: WorkerError, status: Option<u16>) -> Failure {
    Failure::Upstream(Box::new(Upstream { error: error.or_outcome(Outcome::NotStarted), status }))
}

/// The static headers of a record. What cannot be sent was refused at registration; in a record of mcp-api
/// it may still stand, and is left out.
fn static_headers(headers: Option<&Variables>) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in headers.iter().flat_map(|headers| &headers.0) {
        let parsed = HeaderName::from_bytes(name.as_bytes()).ok().zip(HeaderValue::from_str(value).ok());
        if let Some((name, mut value)) = parsed.filter(|(name, _)| !is_ours(name)) {
            value.set_sensitive(true);
            map.insert(name, value);
        }
    }
    map
}

/// Headers that are the transport's.
fn is_ours(name: &HeaderName) -> bool {
    let hop = [
        header::HOST,
        header::CONTENT_LENGTH,
        header::CONTENT_TYPE,
        header::CONTENT_ENCODING,
        header::TRANSFER_ENCODING,
        header::CONNECTION,
        header::UPGRADE,
        header::TE,
        header::TRAILER,
        header::ACCEPT,
        header::ACCEPT_ENCODING,
    ];
    hop.contains(name)
        || name.as_str().starts_with("mcp-")
        || matches!(name.as_str(), "keep-alive" | "last-event-id" | "traceparent" | "tracestate")
        || name.as_str().starts_with("proxy-")
}

/// How long the other side asks to be left alone, in seconds only: a date would need two clocks to agree.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
}

/// The longest body of an answer.
pub const ANSWER_BYTES: usize = limits::RESULT_BYTES + 64 * 1024;
