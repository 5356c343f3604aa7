//! The door for services: plain JSON in and out, answered by any worker of the fleet.

use std::{sync::Arc, time::Duration};

use async_nats::{HeaderMap, service::Request};
use bytes::Bytes;
use futures_util::StreamExt;
use mcp_shared::{
    answer,
    error::{ErrorCode, Outcome, WorkerError},
    ids::{RequestId, ServerName, ToolName, UserId},
    json::RawJson,
    limits,
    metrics::{self, Limit},
    trace::{self, Key, Kind, Trace},
    worker_api::{CallContext, ToolCall, WorkerApi},
};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::Inner;
use crate::{
    micro,
    subjects::{Subjects, token},
};

/// Calls of services that one worker sees to at once; and refusals of further ones that may wait to be sent.
const OPEN: usize = 1_024;
/// What a reply may have around it.
const AROUND: usize = 1_024;

/// A service's request.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Call {
    tool: Option<String>,
    #[serde(default)]
    args: Option<RawJson>,
    /// The server's name, where it is no safe token.
    server: Option<String>,
    /// The user's name, where it is no safe token.
    user: Option<String>,
    timeout_ms: Option<u64>,
    request_id: Option<String>,
}

/// Opens the door. The micro-service protocol shows it to `nats micro ls`.
pub(super) async fn open(inner: &Arc<Inner>) {
    let built = micro::register(&inner.bus, "mcp-worker").await;
    let opened = match built {
        Ok(service) => {
            let endpoint = service.endpoint_builder().name("call").queue_group(micro::GROUP);
            endpoint.add(inner.bus.subjects().front_door()).await.map(|endpoint| (service, endpoint))
        }
        Err(error) => Err(error),
    };
    let (service, mut endpoint) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            tracing::error!(error.cause = %error, "services cannot call: the front door did not open");
            return;
        }
    };
    let door = Arc::clone(inner);
    inner.tasks.spawn(async move {
        let (room, refusals) = (Arc::new(Semaphore::new(OPEN)), Arc::new(Semaphore::new(OPEN)));
        loop {
            let request = tokio::select! {
                request = endpoint.next() => request,
                () = door.stopping.cancelled() => break,
            };
            let Some(request) = request else { break };
            // An answer must not be sent to where nodes are answered, as if a node had sent it.
            if !request.message.reply.as_ref().is_some_and(|reply| door.bus.subjects().is_foreign(reply)) {
                continue;
            }
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
                door.turn_away(request, &refusals);
                continue;
            };
            let inner = Arc::clone(&door);
            door.tasks.spawn(async move {
                let reply = inner.serve(&request).await;
                if let Err(error) = request.respond(Ok(reply)).await {
                    tracing::warn!(error.cause = %error, "a service was not answered");
                }
                drop(permit);
            });
        }
        let _ = tokio::time::timeout(Duration::from_secs(1), service.stop()).await;
    });
}

impl Inner {
    /// Refuses a request. Where not even refusals are taken by the connection, it is dropped.
    fn turn_away(self: &Arc<Self>, request: Request, refusals: &Arc<Semaphore>) {
        metrics::count_refusal(Limit::ServiceCalls);
        let permit = Arc::clone(refusals).try_acquire_owned();
        // Only the address is kept while the refusal waits: requests can be large.
        let (Ok(permit), Some(reply)) = (permit, request.message.reply) else { return };
        let inner = Arc::clone(self);
        self.tasks.spawn(async move {
            let error = WorkerError::new(ErrorCode::Overloaded, "Too many services are calling")
                .outcome(Outcome::NotStarted)
                .retry_after(Duration::from_secs(1));
            let refusal = failure(&error, &RequestId::generate());
            if let Err(error) = inner.bus.publish(reply, refusal).await {
                tracing::debug!(error.cause = %error, "a service was not answered");
            }
            drop(permit);
        });
    }

    async fn serve(&self, request: &Request) -> Bytes {
        let id = RequestId::generate();
        let (id, result) =
            match read(self.bus.subjects(), &request.message.subject, &request.message.payload, id.clone()) {
                Ok((mut context, call)) => {
                    let id = context.request_id.clone();
                    let received = request.message.headers.as_ref().and_then(received);
                    let (mut span, trace) = trace::begin(received, Kind::Server, || "call".into());
                    span.say(Key::Messaging, || "nats");
                    context.trace = trace;
                    let result = self.call(context, call).await;
                    match &result {
                        Ok(_) => span.end(),
                        Err(error) => span.fail(error.code.as_str()),
                    }
                    (id, result)
                }
                Err(error) => (id, Err(error.outcome(Outcome::NotStarted))),
            };
        match result {
            Ok(result) => {
                let reply = answer::success(&result);
                let limit = self.bus.client().max_payload().saturating_sub(AROUND);
                if reply.len() <= limit {
                    return reply;
                }
                let text = format!(
                    "The answer is larger than a message of this NATS server may be ({limit} bytes); ask by HTTP"
                );
                let error = WorkerError::new(ErrorCode::ResultTooLarge, text).outcome(Outcome::Completed);
                failure(&error, &id)
            }
            Err(error) => failure(&error, &id),
        }
    }

    async fn call(&self, context: CallContext, call: ToolCall) -> Result<RawJson, WorkerError> {
        let not_started = |error: WorkerError| error.or_outcome(Outcome::NotStarted);
        let _entered = self.host.enter(&context.user).map_err(not_started)?;
        self.host.record_call(&context, &call);
        let stream = self.router.call_tool(context, call).await.map_err(not_started)?;
        stream.result().await.map_err(|error| error.or_outcome(Outcome::Unknown))
    }
}

/// Where a service says that its call belongs.
fn received(headers: &HeaderMap) -> Option<Trace> {
    // Libraries spell them in several ways, and NATS leaves them so.
    Trace::received(|name| {
        let fields =
            headers.iter().filter(move |(field, _)| AsRef::<str>::as_ref(*field).eq_ignore_ascii_case(name));
        fields.flat_map(|(_, values)| values).map(|value| value.as_str().as_bytes())
    })
}

/// What a service wants, by the subject and the body of its request.
pub(crate) fn read(
    subjects: &Subjects,
    subject: &str,
    payload: &Bytes,
    id: RequestId,
) -> Result<(CallContext, ToolCall), WorkerError> {
    let invalid = |text: &str| WorkerError::new(ErrorCode::InvalidRequest, text);
    let (server, user) =
        subjects.called(subject).ok_or_else(|| invalid("The subject names no server and user"))?;
    mcp_shared::json::screen(payload)
        .map_err(|_| WorkerError::new(ErrorCode::InvalidJson, "The request is not JSON"))?;
    let call: Call = serde_json::from_slice(payload)
        .map_err(|_| invalid("A request is {\"tool\":\"...\",\"args\":{...}}"))?;
    // A permission on the subject confines a service: what it says in the body cannot undo that.
    let server = named(server, call.server, "server")?;
    let user = named(user, call.user, "user")?;
    let server = ServerName::parse_existing(&server)
        .map_err(|error| WorkerError::new(ErrorCode::InvalidServerName, error.to_string()))?;
    let user = UserId::parse(&user).map_err(|error| invalid(&error.to_string()))?;
    let tool = call.tool.ok_or_else(|| invalid("tool is required"))?;
    let tool = ToolName::parse(&tool).map_err(|error| invalid(&error.to_string()))?;
    let arguments = match call.args {
        None => RawJson::empty_object(),
        Some(args) if args.as_bytes() == b"null" => RawJson::empty_object(),
        Some(args) if args.is_object() => args,
        Some(_) => return Err(invalid("args must be a JSON object")),
    };
    let request_id = match call.request_id {
        Some(own) => {
            own.parse().map_err(|_| invalid("requestId must be 1 to 128 visible ASCII characters"))?
        }
        None => id,
    };
    let timeout = match call.timeout_ms {
        Some(0) => return Err(invalid("timeoutMs must be above 0")),
        Some(millis) => Some(Duration::from_millis(millis).min(limits::TOOL_TIMEOUT_MAX)),
        None => None,
    };
    let context = CallContext { request_id, user, timeout, spent: Duration::ZERO, trace: None };
    Ok((context, ToolCall { server, tool, arguments, progress: false, idempotency: None }))
}

/// The name behind a token: the token itself, or the name in the body that has this token.
fn named(token_: &str, name: Option<String>, what: &str) -> Result<String, WorkerError> {
    let name = name.unwrap_or_else(|| token_.to_owned());
    if token(&name) == token_ {
        return Ok(name);
    }
    let text = format!("The subject and the request name different things as {what}");
    Err(WorkerError::new(ErrorCode::InvalidRequest, text))
}

/// The document that a gateway would answer with, and what it would say in the header `Retry-After`.
fn failure(error: &WorkerError, id: &RequestId) -> Bytes {
    let mut document = answer::failure(error, id);
    if let (Some(wait), Some(fields)) = (error.retry_after_ms, document.as_object_mut()) {
        fields.insert("retryAfterMs".to_owned(), wait.into());
    }
    serde_json::to_vec(&document).map(Bytes::from).unwrap_or_default()
}
