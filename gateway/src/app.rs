//! What handlers share.

use std::{sync::Arc, time::Duration};

use axum::{body::Body, extract::FromRequestParts};
use bytes::Bytes;
use http::{HeaderMap, request::Parts};
use mcp_shared::{
    error::{ErrorCode, WorkerError},
    ids::{RequestId, ServerName, UserId},
    limits,
    vault::Vault,
    worker_api::{CallContext, WorkerApi},
};

use crate::{
    body::{self, Field, Fields},
    problem::Problem,
};

/// The state of the HTTP side.
pub struct App {
    /// What is stored.
    pub vault: Vault,
    /// Who does the work.
    pub worker: Arc<dyn WorkerApi>,
    /// The largest body, in bytes.
    pub payload_limit: usize,
}

/// The id that the edge gave the request.
pub struct Id(pub RequestId);

impl<S: Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        parts
            .extensions
            .get::<RequestId>()
            .cloned()
            .map(Id)
            .ok_or_else(|| WorkerError::internal("a request came past the edge").into())
    }
}

/// The server named in the path.
pub struct Server(pub ServerName);

impl<S: Send + Sync> FromRequestParts<S> for Server {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let invalid =
            || Problem::new(ErrorCode::InvalidServerName, "The server's name in the path is not valid");
        let path =
            axum::extract::Path::<String>::from_request_parts(parts, state).await.map_err(|_| invalid())?;
        ServerName::parse_existing(&path).map(Server).map_err(|_| invalid())
    }
}

impl App {
    /// Reads a JSON body within this program's limit.
    pub async fn body(&self, headers: &HeaderMap, body: Body) -> Result<Bytes, Problem> {
        body::read(headers, body, self.payload_limit).await
    }
}

/// The user that a body names, or the default one.
pub fn user(fields: &Fields<'_>) -> Result<UserId, Problem> {
    match fields.text("username")? {
        Field::Value(name) => Ok(UserId::parse(&name)?),
        Field::Absent | Field::Null => Ok(UserId::default()),
    }
}

/// On whose behalf a call is made, and in which time.
pub fn context(id: RequestId, user: UserId, headers: &HeaderMap) -> Result<CallContext, Problem> {
    let timeout = match headers.get("x-request-timeout-ms") {
        None => None,
        Some(value) => {
            let millis = value
                .to_str()
                .ok()
                .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|text| text.parse::<u64>().ok())
                .filter(|millis| *millis > 0)
                .ok_or_else(|| {
                    Problem::invalid("X-Request-Timeout-Ms must be a whole number of milliseconds above 0")
                })?;
            Some(Duration::from_millis(millis).min(limits::TOOL_TIMEOUT_MAX))
        }
    };
    Ok(CallContext { request_id: id, user, timeout })
}
