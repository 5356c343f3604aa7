//! `/mcp/tool/call` and `/mcp/tools`.

use std::{borrow::Cow, collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, StatusCode, header};
use mcp_shared::{
    error::{Outcome, WorkerError},
    ids::{RequestId, ServerName, ToolName},
    json::RawJson,
    worker_api::{CallContext, CallEvent, CallStream, ToolCall},
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use crate::{
    app::{App, Id, context, user},
    body::{Field, Fields},
    problem::{Problem, json_bytes},
};

/// How often a silent event stream shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// `POST /mcp/tool/call`.
pub async fn call(
    State(app): State<Arc<App>>,
    Id(id): Id,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let (context, call) = read_call(&app, id.clone(), &headers, body).await.map_err(Problem::not_started)?;
    let progress = call.progress;
    let stream = app.worker.call_tool(context, call).await;
    let stream = stream.map_err(|error| error.or_outcome(Outcome::NotStarted))?;
    if progress {
        return Ok(events(stream, id));
    }
    // Dropping this future, which the HTTP server does when the client goes away, cancels the call.
    let result = stream.result().await.map_err(|error| error.or_outcome(Outcome::Unknown))?;
    Ok(json_bytes(StatusCode::OK, success(&result)))
}

/// What is called, and on whose behalf. Whatever is wrong here, the call was not started.
async fn read_call(
    app: &App,
    id: RequestId,
    headers: &HeaderMap,
    body: Body,
) -> Result<(CallContext, ToolCall), Problem> {
    let body = app.body(headers, body).await?;
    let fields = Fields::parse(&body)?;
    let context = context(id, user(&fields)?, headers)?;
    let server = ServerName::parse_existing(&fields.required("serverName")?)?;
    let tool = ToolName::parse(&fields.required("methodName")?)?;
    let arguments = match fields.raw("args") {
        Field::Value(arguments) if arguments.is_object() => arguments,
        Field::Value(_) => return Err(Problem::invalid("args must be a JSON object")),
        Field::Absent | Field::Null => RawJson::empty_object(),
    };
    Ok((context, ToolCall { server, tool, arguments, progress: wants_events(headers) }))
}

/// `GET /mcp/tools`: the tools of all enabled servers, also of those that do not run right now.
pub async fn list(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let servers = app.vault.servers().await?;
    let reports = app.worker.reports().await?;
    let tools: HashMap<_, _> = reports.into_iter().map(|report| (report.name, report.tools)).collect();
    let mut out = b"{\"success\":true,\"tools\":[".to_vec();
    for (at, server) in servers.iter().filter(|server| server.value.enabled).enumerate() {
        if at > 0 {
            out.push(b',');
        }
        out.push(b'{');
        serde_json::to_writer(&mut out, &server.value.name).map_err(WorkerError::internal)?;
        out.push(b':');
        match tools.get(&server.value.name).and_then(Option::as_ref) {
            Some(tools) => out.extend_from_slice(tools.as_bytes()),
            None => out.extend_from_slice(b"[]"),
        }
        out.push(b'}');
    }
    out.extend_from_slice(b"]}");
    Ok(json_bytes(StatusCode::OK, out.into()))
}

fn wants_events(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).any(|accept| {
        accept.split(',').any(|one| {
            one.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
        })
    })
}

/// Progress as it comes, then the same document that a plain answer would have had.
fn events(stream: CallStream, id: RequestId) -> Response {
    let events = stream::unfold(Some((stream, id)), async |state| {
        let (mut stream, id) = state?;
        let (name, data, rest) = match stream.next().await {
            Some(CallEvent::Progress(params)) => ("progress", text(params.bytes()), Some((stream, id))),
            Some(CallEvent::Done(Ok(result))) => ("result", text(&success(&result)), None),
            Some(CallEvent::Done(Err(error))) => {
                let error = error.or_outcome(Outcome::Unknown);
                ("error", Problem::from(error).envelope(&id).to_string(), None)
            }
            None => {
                let error = WorkerError::internal("a call ended without a result").outcome(Outcome::Unknown);
                ("error", Problem::from(error).envelope(&id).to_string(), None)
            }
        };
        Some((Ok::<_, Infallible>(Event::default().event(name).data(data)), rest))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// JSON is UTF-8, and on one line as servers send it; an event's data may not have bare returns.
fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).replace('\r', " ")
}

/// `{"success":true,"data":RESULT}` with the result's bytes as they are, and its content type added.
fn success(result: &RawJson) -> Bytes {
    let content_type = content_type(result);
    let raw = result.as_bytes();
    let mut out = Vec::with_capacity(raw.len() + 96);
    out.extend_from_slice(b"{\"success\":true,\"data\":");
    match (content_type, raw.strip_suffix(b"}")) {
        (Some(content_type), Some(members)) => {
            out.extend_from_slice(members);
            if members.trim_ascii_end() != b"{" {
                out.push(b',');
            }
            out.extend_from_slice(b"\"contentType\":");
            // A MIME type of the server's choosing may hold anything that a string can.
            if serde_json::to_writer(&mut out, &content_type).is_err() {
                out.extend_from_slice(b"null");
            }
            out.push(b'}');
        }
        _ => out.extend_from_slice(raw),
    }
    out.push(b'}');
    out.into()
}

/// The MIME type of a result; `None` when the result says it itself.
fn content_type(result: &RawJson) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct View<'a> {
        #[serde(borrow)]
        content: Option<&'a RawValue>,
        structured_content: Option<IgnoredAny>,
        content_type: Option<IgnoredAny>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Block<'a> {
        #[serde(borrow, rename = "type")]
        kind: Cow<'a, str>,
        #[serde(borrow)]
        text: Option<Cow<'a, str>>,
        #[serde(borrow)]
        mime_type: Option<Cow<'a, str>>,
    }

    const JSON: Cow<'_, str> = Cow::Borrowed("application/json");
    let Ok(view) = result.read::<View<'_>>() else { return Some(JSON) };
    if view.content_type.is_some() {
        return None;
    }
    if view.structured_content.is_some() {
        return Some(JSON);
    }
    let blocks: Option<Vec<&RawValue>> =
        view.content.and_then(|content| serde_json::from_str(content.get()).ok());
    let [block] = blocks.as_deref().unwrap_or_default() else { return Some(JSON) };
    let Ok(block) = serde_json::from_str::<Block<'_>>(block.get()) else { return Some(JSON) };
    Some(match (block.kind.as_ref(), block.text, block.mime_type) {
        ("text", Some(text), _) if is_document(&text) => JSON,
        ("text", Some(_), _) => Cow::Borrowed("text/plain"),
        ("image" | "audio", _, Some(mime_type)) => mime_type,
        _ => JSON,
    })
}

/// Whether a text is one JSON document, by which an object or an array is meant: a number or a word in
/// quotes is text to people.
fn is_document(text: &str) -> bool {
    text.trim_start().starts_with(['{', '[']) && serde_json::from_str::<IgnoredAny>(text).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_their_bytes_and_get_a_content_type() {
        let cases = [
            (r#"{"content":[{"type":"text","text":"hi"}]}"#, "text/plain"),
            (r#"{"content":[{"type":"text","text":"42"}]}"#, "text/plain"),
            (r#"{"content":[{"type":"text","text":" {\"a\":1}"}]}"#, "application/json"),
            (r#"{"content":[{"type":"text","text":"{a"}]}"#, "text/plain"),
            (r#"{"content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#, "application/json"),
            (r#"{"content":[{"type":"image","data":"","mimeType":"image/png"}]}"#, "image/png"),
            (r#"{"content":[{"type":"video","x":1.0}]}"#, "application/json"),
            (r#"{"content":[{"type":"text","text":"x"}],"structuredContent":{"n":1e3}}"#, "application/json"),
            (r#"{"content":"odd"}"#, "application/json"),
            ("{}", "application/json"),
            ("{ }", "application/json"),
        ];
        for (result, expected) in cases {
            let body = success(&RawJson::parse(result).unwrap());
            let text = std::str::from_utf8(&body).unwrap();
            assert!(text.contains(result.trim_end_matches('}')), "{text}");
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            assert_eq!(value["data"]["contentType"], expected, "{result}");
        }
        let own = r#"{"content":[],"contentType":"x/y"}"#;
        let body = success(&RawJson::parse(own).unwrap());
        assert_eq!(body, format!(r#"{{"success":true,"data":{own}}}"#));
    }
}
