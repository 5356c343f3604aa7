//! Which web pages may read answers (CORS). No page may, unless `CORS_ORIGINS` names its origin.
//!
//! It is a part of the edge and no layer of its own: errors are made into documents there, and a page has to be
//! able to read those as well; and what an origin may is decided in one place. Cookies are nobody's credentials
//! here, so pages are never told that they may send them.

use std::time::Duration;

use axum::{extract::Request, response::Response};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use mcp_shared::{error::ErrorCode, limits};

use crate::problem::Problem;

/// Asked by browsers when a page of a public network wants something of a private one.
const PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-request-private-network");

const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, PUT, DELETE");

/// The headers that mean something here.
const REQUEST_HEADERS: HeaderValue = HeaderValue::from_static(
    "Accept, Authorization, Content-Type, Idempotency-Key, Last-Event-ID, MCP-Protocol-Version, Mcp-Session-Id, \
     Prefer, traceparent, tracestate, X-Request-Id, X-Request-Timeout-Ms",
);

/// The headers of answers that a page would not see otherwise.
const ANSWER_HEADERS: HeaderValue = HeaderValue::from_static(
    "Idempotency-Replayed, Location, Mcp-Session-Id, RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, \
     X-Request-Id",
);

/// The origins whose pages may read answers.
#[derive(Debug, Default)]
pub struct Cors {
    origins: Vec<String>,
}

/// A request's origin, if its page may read the answer.
#[derive(Debug, Clone)]
pub struct Reader(HeaderValue);

impl Cors {
    /// These origins, as browsers write them.
    pub fn new(origins: Vec<String>) -> Self {
        Self { origins }
    }

    /// Whether an origin is one of them.
    pub fn has(&self, origin: &str) -> bool {
        self.origins.iter().any(|one| one.eq_ignore_ascii_case(origin))
    }

    /// The page that reads the answer to a request, if it may.
    pub fn reader(&self, headers: &HeaderMap) -> Option<Reader> {
        let mut origins = headers.get_all(header::ORIGIN).iter();
        let origin = origins.next().filter(|_| origins.next().is_none())?;
        self.has(origin.to_str().ok()?).then(|| Reader(origin.clone()))
    }

    /// Says in an answer who may read it.
    pub fn mark(&self, reader: Option<Reader>, headers: &mut HeaderMap) {
        if self.origins.is_empty() {
            return;
        }
        headers.append(header::VARY, HeaderValue::from_name(header::ORIGIN));
        if let Some(Reader(origin)) = reader {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, ANSWER_HEADERS);
        }
    }
}

impl Reader {
    /// The answer to what a browser asks before a request that a form could not send; `None` if this is not
    /// such a question.
    pub fn preflight(&self, request: &Request) -> Option<Result<Response, Problem>> {
        let headers = request.headers();
        if request.method() != Method::OPTIONS || !headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
        {
            return None;
        }
        if headers.contains_key(PRIVATE_NETWORK) {
            return Some(Err(Problem::new(
                ErrorCode::OriginNotAllowed,
                "Pages of a public network may not send requests into this one",
            )));
        }
        let mut response = Response::default();
        *response.status_mut() = StatusCode::NO_CONTENT;
        let answer = response.headers_mut();
        answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
        answer.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, REQUEST_HEADERS);
        answer.insert(header::ACCESS_CONTROL_MAX_AGE, seconds(limits::CORS_MEMORY));
        Some(Ok(response))
    }
}

fn seconds(time: Duration) -> HeaderValue {
    HeaderValue::from(time.as_secs())
}
