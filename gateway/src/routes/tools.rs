//! `/mcp/tool/call` and `/mcp/tools`.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use mcp_shared::{
    answer::{failure, success},
    error::{Outcome, WorkerError},
    idempotency::Idempotency,
    ids::{IdempotencyKey, RequestId, ServerName, ToolName},
    json::RawJson,
    listing::tame,
    trace::{Key, Span},
    users::Entered,
    worker_api::{CallContext, CallEvent, CallStream, ToolCall},
};

use crate::{
    admission::{InFlight, Room},
    app::{App, context, wants_events},
    body::{Field, Fields},
    caller::Caller,
    login::Invitation,
    meters::CallMeter,
    parts,
    problem::{Problem, json_bytes},
};

/// Says that an answer is that of an earlier call of the same `Idempotency-Key`.
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
/// How often a silent event stream shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// `POST /mcp/tool/call`.
pub async fn call(
    State(app): State<Arc<App>>,
    caller: Caller,
    invitation: Invitation,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let mut meter = CallMeter::begin();
    let admitted = admitted(&app, &caller, &headers, body, &meter).await.map_err(Problem::not_started);
    let (place, context, call) = admitted.inspect_err(|problem| meter.failed(problem.error()))?;
    let progress = call.progress;
    let stream = app.worker.call_tool(context, call).await;
    let stream = stream.map_err(|error| error.or_outcome(Outcome::NotStarted));
    let stream = stream.inspect_err(|error| meter.failed(error)).map_err(|error| invitation.invite(error))?;
    if progress {
        let span = caller.traced.map(|traced| traced.take()).unwrap_or_default();
        return Ok(events(stream, caller.request, invitation, place, (meter, span)));
    }
    // Dropping this future, which the HTTP server does when the client goes away, cancels the call.
    let (result, replayed) = ended(stream).await;
    meter.ended(&result);
    let replayed = replayed.then(|| HeaderValue::from_static("true"));
    match result {
        Ok(result) => {
            let mut answer = parts::answer(&result);
            answer.headers_mut().extend(replayed.map(|value| (REPLAYED, value)));
            Ok(answer)
        }
        Err(error) => {
            let problem = invitation.invite(error.or_outcome(Outcome::Unknown)).into();
            Err(replayed.into_iter().fold(problem, |problem: Problem, value| problem.header(REPLAYED, value)))
        }
    }
}

/// The end of a call, and whether it is what came of the call when it was made for the first time.
async fn ended(mut stream: CallStream) -> (Result<RawJson, WorkerError>, bool) {
    let mut replayed = false;
    while let Some(event) = stream.next().await {
        match event {
            CallEvent::Progress(_) => {}
            CallEvent::Replayed => replayed = true,
            CallEvent::Done(result) => return (result, replayed),
        }
    }
    (Err(WorkerError::internal("a call ended without a result")), replayed)
}

/// What a call takes up of this gateway, for as long as it is not over.
struct Place {
    _call: InFlight,
    _body: Room,
    _user: Entered,
}

/// Reads a call, as far as there is room for it. Whatever is wrong here, it was not started.
///
/// The gateway's own limits come first, before a byte of the body is read. Whom the call is for stands in the body, so
/// that the user's limits come last.
async fn admitted(
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    body: Body,
    meter: &CallMeter,
) -> Result<(Place, CallContext, ToolCall), Problem> {
    let in_flight = app.admission.call()?;
    let body = app.body(headers, body).await?;
    meter.body(body.len());
    let (context, call) = read_call(caller, headers, &body)?;
    let user = app.admission.user(&context)?;
    caller.record_call(app, &context, &call);
    Ok((Place { _call: in_flight, _body: body.room, _user: user }, context, call))
}

/// What is called, and on whose behalf.
fn read_call(caller: &Caller, headers: &HeaderMap, body: &Bytes) -> Result<(CallContext, ToolCall), Problem> {
    let fields = Fields::parse(body)?;
    let context = context(caller, caller.user(&fields)?, headers)?;
    let server = ServerName::parse_existing(&fields.required("serverName")?)?;
    let tool = ToolName::parse(&fields.required("methodName")?)?;
    caller.may_call(&server, &tool)?;
    let arguments = match fields.raw("args") {
        Field::Value(arguments) if arguments.is_object() => arguments,
        Field::Value(_) => return Err(Problem::invalid("args must be a JSON object")),
        Field::Absent | Field::Null => RawJson::empty_object(),
    };
    let idempotency = match headers.get("idempotency-key") {
        None => None,
        Some(value) => {
            let key = IdempotencyKey::parse(value.to_str().unwrap_or_default())?;
            let name = Idempotency::of(key, &server, &tool, &arguments).map_err(WorkerError::internal)?;
            Some(name)
        }
    };
    Ok((context, ToolCall { server, tool, arguments, progress: wants_events(headers), idempotency }))
}

/// `GET /mcp/tools`: the tools of all enabled servers, also of those that do not run right now.
pub async fn list(State(app): State<Arc<App>>, caller: Caller) -> Result<Response, Problem> {
    let (servers, reports) = tokio::join!(app.servers(), app.reports());
    let (servers, reports) = (servers?, reports?);
    let mut out = b"{\"success\":true,\"tools\":[".to_vec();
    let seen = servers.iter().filter(|server| server.enabled && caller.reach.has_server(&server.name));
    for (at, server) in seen.enumerate() {
        if at > 0 {
            out.push(b',');
        }
        out.push(b'{');
        serde_json::to_writer(&mut out, &server.name).map_err(WorkerError::internal)?;
        out.push(b':');
        match reports.get(&server.name).and_then(|report| report.tools.as_ref()) {
            Some(tools) => out.extend_from_slice(tame(tools).as_bytes()),
            None => out.extend_from_slice(b"[]"),
        }
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
    Ok(json_bytes(StatusCode::OK, out.into()))
}

/// Progress as it comes, then the same document that a plain answer would have had.
fn events(
    stream: CallStream,
    id: RequestId,
    invitation: Invitation,
    place: Place,
    told: (CallMeter, Span),
) -> Response {
    let (mut meter, span) = told;
    meter.as_events();
    let events = stream::unfold(Some((stream, id, invitation, meter, span)), async |state| {
        let (mut stream, id, invitation, mut meter, mut span) = state?;
        let ended = || Err(WorkerError::internal("a call ended without a result"));
        let (name, data, rest) = match stream.next().await.unwrap_or_else(|| CallEvent::Done(ended())) {
            CallEvent::Progress(params) => {
                ("progress", text(params.bytes()), Some((stream, id, invitation, meter, span)))
            }
            CallEvent::Replayed => ("replayed", "{}".to_owned(), Some((stream, id, invitation, meter, span))),
            CallEvent::Done(result) => {
                meter.ended(&result);
                span.say(Key::Status, || 200);
                match result {
                    Ok(result) => {
                        span.end();
                        ("result", text(&success(&result)), None)
                    }
                    Err(error) => {
                        span.fail(error.code.as_str());
                        let error = invitation.invite(error.or_outcome(Outcome::Unknown));
                        ("error", failure(&error, &id).to_string(), None)
                    }
                }
            }
        };
        Some((Ok::<_, Infallible>(Event::default().event(name).data(data)), rest))
    });
    // The call is over for its place when nobody reads any more.
    let events = events.map(move |event| {
        let _held = &place;
        event
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// JSON is UTF-8, and on one line as servers send it; an event's data may not have bare returns.
fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).replace('\r', " ")
}
