//! The documents that answer a tool call. A gateway gives them over HTTP and a worker over NATS, so they are
//! made in one place: the two cannot come to differ.

use std::borrow::Cow;

use bytes::Bytes;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value, json, value::RawValue};

use crate::{error::WorkerError, ids::RequestId, json::RawJson};

/// The document of an error: what it is, under which request the log has it, and whether trying again can
/// help. Errors of calls also say what is known about the call.
pub fn failure(error: &WorkerError, request: &RequestId) -> Value {
    let mut body = Map::new();
    body.insert("success".to_owned(), Value::Bool(false));
    body.insert("error".to_owned(), error.message.clone().into());
    body.insert("code".to_owned(), error.code.as_str().into());
    body.insert("requestId".to_owned(), request.as_str().into());
    body.insert("retryable".to_owned(), error.code.retryable().into());
    if let Some(outcome) = error.outcome {
        body.insert("outcome".to_owned(), json!(outcome));
    }
    body.extend(error.details.clone());
    Value::Object(body)
}

/// `{"success":true,"data":RESULT}` with the result's bytes as they are, and its content type added.
pub fn success(result: &RawJson) -> Bytes {
    let [before, members, after] = success_in_parts(result);
    let mut out = Vec::with_capacity(before.len() + members.len() + after.len());
    for part in [before, members, after] {
        out.extend_from_slice(&part);
    }
    out.into()
}

/// The same document in three parts, of which the large one, in the middle, is no copy of the result.
pub fn success_in_parts(result: &RawJson) -> [Bytes; 3] {
    let raw = result.bytes();
    let before = Bytes::from_static(b"{\"success\":true,\"data\":");
    let (Some(content_type), Some(members)) = (content_type(result), raw.strip_suffix(b"}")) else {
        return [before, raw.clone(), Bytes::from_static(b"}")];
    };
    let mut after = Vec::with_capacity(64);
    if members.trim_ascii_end() != b"{" {
        after.push(b',');
    }
    after.extend_from_slice(b"\"contentType\":");
    // A MIME type of the server's choosing may hold anything that a string can.
    if serde_json::to_writer(&mut after, &content_type).is_err() {
        after.extend_from_slice(b"null");
    }
    after.extend_from_slice(b"}}");
    [before, raw.slice(..members.len()), after.into()]
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
            let result_bytes = RawJson::parse(result).unwrap();
            let body = success(&result_bytes);
            assert_eq!(body, success_in_parts(&result_bytes).concat());
            let text = std::str::from_utf8(&body).unwrap();
            assert!(text.contains(result.trim_end_matches('}')), "{text}");
            let value: serde_json::Value = serde_json::from_str(text).unwrap();
            assert_eq!(value["data"]["contentType"], expected, "{result}");
        }
        let own = r#"{"content":[],"contentType":"x/y"}"#;
        let body = success(&RawJson::parse(own).unwrap());
        assert_eq!(body, format!(r#"{{"success":true,"data":{own}}}"#));
    }

    #[test]
    fn errors_say_what_is_known_and_no_more() {
        let request = RequestId::from_stored("r-1");
        let error = WorkerError::new(crate::error::ErrorCode::ServerCrashed, "It crashed");
        let plain = r#"{"success":false,"error":"It crashed","code":"server_crashed","requestId":"r-1","retryable":true}"#;
        assert_eq!(failure(&error, &request).to_string(), plain);
        let error = error.outcome(crate::error::Outcome::Unknown).with("serverName", "x");
        let document = failure(&error, &request);
        assert_eq!((&document["outcome"], &document["serverName"]), (&json!("unknown"), &json!("x")));
    }
}
