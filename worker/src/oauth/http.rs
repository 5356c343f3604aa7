//! What the OAuth library's requests go through: the guard, limits, and a memory of what went wrong, which
//! the library's own errors do not keep.

use std::{
    error::Error,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use http::{Method, Response, StatusCode, header};
use mcp_shared::{
    egress::EgressError,
    error::{ErrorCode, Outcome, WorkerError},
    limits,
};
use rmcp::transport::auth::{OAuthHttpClient, OAuthHttpClientError, OAuthHttpClientFuture, OAuthHttpRequest};
use serde::Deserialize;
use tokio::time::timeout;
use url::Url;

use crate::outgoing::{Outgoing, SendError, chain};

/// The codes by which a token endpoint says that asking again with the same credentials is of no use.
const FINAL: [&str; 4] = ["invalid_grant", "invalid_client", "unauthorized_client", "unsupported_grant_type"];

/// The requests of one login or refresh. They are sent one at a time.
pub struct Http {
    outgoing: Outgoing,
    /// The remote server.
    base: Url,
    /// It answered a request without token with 401.
    challenged: AtomicBool,
    last: Mutex<Last>,
}

/// What the last request came to.
#[derive(Default)]
struct Last {
    /// Why it has no answer.
    error: Option<WorkerError>,
    /// The OAuth error code of its answer.
    refusal: Option<String>,
}

/// Why an answer was not read.
#[derive(Debug, thiserror::Error)]
enum HttpError {
    #[error(transparent)]
    Send(#[from] SendError),
    #[error("the answer did not come in time")]
    Slow,
    #[error("the answer is too large")]
    TooLarge,
    #[error("the answer broke off")]
    Broken(#[source] reqwest::Error),
}

/// The error document of a token endpoint.
#[derive(Deserialize)]
struct Refusal {
    error: String,
}

impl Http {
    /// Requests that concern a remote server.
    pub fn new(outgoing: Outgoing, base: Url) -> Self {
        Self { outgoing, base, challenged: AtomicBool::new(false), last: Mutex::default() }
    }

    /// Whether the remote server asked for a login.
    pub fn challenged(&self) -> bool {
        self.challenged.load(Ordering::Acquire)
    }

    /// Why the last request has no answer, for a caller of ours.
    pub fn trouble(&self) -> Option<WorkerError> {
        self.last().error.clone()
    }

    /// The code with which the last request was refused for good.
    pub fn refusal(&self) -> Option<String> {
        self.last().refusal.clone().filter(|code| FINAL.contains(&code.as_str()))
    }

    /// Whether requests may go to a URL, as far as it says so itself.
    pub fn check(&self, url: &str) -> Result<Url, WorkerError> {
        self.outgoing.egress().check(url).map_err(|error| self.explained(&error.into()))
    }

    /// Opens a session without a token, as a client does that does not know yet that it needs one; says
    /// with which challenge it was refused. Some servers refuse nothing else.
    pub async fn knock(&self) -> Option<String> {
        let body =
            br#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18",
            "capabilities":{},"clientInfo":{"name":"mcp-api","version":"1"}}}"#;
        let mut request = reqwest::Request::new(Method::POST, self.base.clone());
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        headers.insert(header::ACCEPT, http::HeaderValue::from_static("application/json, text/event-stream"));
        *request.body_mut() = Some(body.as_slice().into());
        let answer = timeout(limits::OAUTH_TIMEOUT, self.outgoing.send(request)).await.ok()?.ok()?;
        if answer.status() != StatusCode::UNAUTHORIZED {
            return None;
        }
        self.challenged.store(true, Ordering::Release);
        let challenge = answer.headers().get(header::WWW_AUTHENTICATE)?;
        challenge.to_str().ok().map(str::to_owned)
    }

    async fn sent(&self, request: http::Request<Vec<u8>>) -> Result<Response<Vec<u8>>, HttpError> {
        let own = request.method() == Method::GET && request.uri() == self.base.as_str();
        let request = reqwest::Request::try_from(request).map_err(|_| {
            SendError::Egress(EgressError::InvalidUrl("is not one that a request can be sent to"))
        })?;
        let mut answer = self.outgoing.send(request).await?;
        if own && answer.status() == StatusCode::UNAUTHORIZED {
            self.challenged.store(true, Ordering::Release);
        }
        let mut body = Vec::new();
        // A remote server may take the question for a client that listens, and then never ends.
        let endless = answer
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().to_ascii_lowercase().starts_with(b"text/event-stream"));
        while !endless && let Some(part) = answer.chunk().await.map_err(HttpError::Broken)? {
            if body.len() + part.len() > limits::OAUTH_ANSWER_BYTES {
                return Err(HttpError::TooLarge);
            }
            body.extend_from_slice(&part);
        }
        let mut whole = Response::new(body);
        *whole.status_mut() = answer.status();
        *whole.headers_mut() = std::mem::take(answer.headers_mut());
        Ok(whole)
    }

    fn explained(&self, error: &HttpError) -> WorkerError {
        let host = self.base.host_str().unwrap_or_default();
        tracing::debug!(server = host, error.cause = %chain(error), "a request of a login has no answer");
        let (code, text) = match error {
            HttpError::Send(SendError::Egress(EgressError::Blocked(address))) => (
                ErrorCode::BlockedAddress,
                format!("Blocked private or local address: {}", mcp_shared::error::shorten(address, 64)),
            ),
            HttpError::Send(SendError::Egress(EgressError::InvalidUrl(why))) => {
                (ErrorCode::LoginFailed, format!("The remote server names an address that {why}"))
            }
            HttpError::Send(SendError::Tls(_)) => (
                ErrorCode::UpstreamTls,
                "The certificate of the remote server or of its authorization server is not valid".to_owned(),
            ),
            error => (
                ErrorCode::UpstreamUnavailable,
                format!("The remote server or its authorization server cannot be asked: {error}"),
            ),
        };
        WorkerError::new(code, text).outcome(Outcome::NotStarted)
    }

    fn last(&self) -> std::sync::MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<EgressError> for HttpError {
    fn from(error: EgressError) -> Self {
        Self::Send(SendError::Egress(error))
    }
}

impl OAuthHttpClient for Http {
    /// Sends a request. Redirects are handed back: the library follows those of discovery within one
    /// origin itself, and nothing else is followed.
    fn execute(&self, request: OAuthHttpRequest) -> OAuthHttpClientFuture<'_> {
        Box::pin(async move {
            *self.last() = Last::default();
            let answer = timeout(limits::OAUTH_TIMEOUT, self.sent(request.request)).await;
            match answer.unwrap_or(Err(HttpError::Slow)) {
                Ok(answer) => {
                    if answer.status().is_client_error() {
                        let refusal = serde_json::from_slice::<Refusal>(answer.body()).ok();
                        self.last().refusal = refusal.map(|refusal| refusal.error);
                    }
                    Ok(answer)
                }
                Err(error) => {
                    let explained = self.explained(&error);
                    self.last().error = Some(explained);
                    let error: Box<dyn Error + Send + Sync> = error.into();
                    Err(error as OAuthHttpClientError)
                }
            }
        })
    }
}
