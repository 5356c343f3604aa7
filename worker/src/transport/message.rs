//! JSON-RPC envelopes. Only the envelope is read; results, parameters and errors stay raw.

use std::{borrow::Cow, io::Write};

use bytes::Bytes;
use mcp_shared::{json::RawJson, limits, trace::Trace};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::lines;

/// An error that a server answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RpcError {
    /// JSON-RPC's code.
    pub code: i64,
    /// The server's words as they came. They may repeat a user's secret, so they are cleaned and then
    /// shortened before anybody sees them: the other way round would leave half a secret.
    pub message: String,
}

/// What one line says.
pub(super) enum Message {
    /// An answer to the request `id`. A body that is neither a result nor an error is `None`.
    Response { id: u64, body: Option<Result<RawJson, RpcError>> },
    /// What seems to be an answer to the request `id`, and cannot be read.
    Unreadable { id: u64 },
    /// Something the server tells.
    Notification { method: String, params: Option<RawJson> },
    /// Something the server asks, with its id as it spelled it.
    Request { id: RawJson, method: String },
    /// Not JSON-RPC, or an answer to an id that we never use.
    Garbage,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    jsonrpc: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    method: Option<Cow<'a, str>>,
    #[serde(borrow)]
    params: Option<&'a RawValue>,
    #[serde(borrow)]
    result: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ErrorBody<'a> {
    code: i64,
    #[serde(borrow, default)]
    message: Cow<'a, str>,
}

impl Message {
    /// Reads one line. Nothing is copied out of it but methods and error texts.
    pub(super) fn parse(line: &Bytes) -> Self {
        // An array could be read as an envelope, too: one whose members have no names.
        if !line.trim_ascii_start().starts_with(b"{") {
            return Message::Garbage;
        }
        let Ok(envelope) = serde_json::from_slice::<Envelope<'_>>(line) else { return Self::broken(line) };
        let raw = |value: &RawValue| RawJson::slice_of(line, value);
        match (envelope.method, envelope.id) {
            (Some(_), Some(id)) if id.get().len() > limits::REQUEST_ID_BYTES => Message::Garbage,
            (Some(method), Some(id)) => Message::Request { id: raw(id), method: method.into_owned() },
            (Some(method), None) => {
                Message::Notification { method: method.into_owned(), params: envelope.params.map(raw) }
            }
            (None, Some(id)) => {
                let Ok(id) = id.get().parse() else { return Message::Garbage };
                let body = match (envelope.result, envelope.error) {
                    (Some(result), None) => Some(Ok(raw(result))),
                    (_, Some(error)) => serde_json::from_str::<ErrorBody<'_>>(error.get())
                        .ok()
                        .map(|body| Err(RpcError { code: body.code, message: body.message.into_owned() })),
                    // A line of a log can be JSON and have an id, too.
                    (None, None) if envelope.jsonrpc.is_none() => return Message::Garbage,
                    (None, None) => None,
                };
                Message::Response { id, body }
            }
            (None, None) => Message::Garbage,
        }
    }
}

impl Message {
    /// What a line is that should be JSON-RPC and cannot be read: the answer to the call that it names,
    /// which then need not wait for its deadline.
    fn broken(line: &[u8]) -> Self {
        // A banner may well quote a request of ours.
        let has = |part: &[u8]| memchr::memmem::find(line, part).is_some();
        let meant = has(b"\"jsonrpc\"") && !has(b"\"method\"");
        match lines::id_in(line).filter(|_| meant) {
            Some(id) => Message::Unreadable { id },
            None => Message::Garbage,
        }
    }
}

/// A request as one line.
pub(super) fn request(id: u64, method: &str, params: &str) -> Vec<u8> {
    format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"{method}\",\"params\":{params}}}\n").into_bytes()
}

/// A notification as one line.
pub(super) fn notification(method: &str, params: Option<&str>) -> Vec<u8> {
    match params {
        Some(params) => {
            format!("{{\"jsonrpc\":\"2.0\",\"method\":\"{method}\",\"params\":{params}}}\n").into_bytes()
        }
        None => format!("{{\"jsonrpc\":\"2.0\",\"method\":\"{method}\"}}\n").into_bytes(),
    }
}

/// The answer to a request of the server: `{}` to `ping`, otherwise that there is no such method.
pub(super) fn answer(id: &RawJson, method: &str) -> Vec<u8> {
    let body = if method == "ping" {
        "\"result\":{}"
    } else {
        "\"error\":{\"code\":-32601,\"message\":\"Method not found\"}"
    };
    let mut line = b"{\"jsonrpc\":\"2.0\",\"id\":".to_vec();
    line.extend_from_slice(id.as_bytes());
    line.push(b',');
    line.extend_from_slice(body.as_bytes());
    line.extend_from_slice(b"}\n");
    line
}

/// The `_meta` of a call.
#[derive(Default)]
pub(super) struct Meta<'a> {
    /// Members that the protocol wants, without braces.
    pub(super) members: &'a str,
    /// Progress is to be reported.
    pub(super) progress: bool,
    /// Where the server's work belongs.
    pub(super) trace: Option<&'a Trace>,
}

impl Meta<'_> {
    /// Bytes of what is traced, at most.
    fn room(&self) -> usize {
        let texts =
            |trace: &Trace| 2 * trace.state().map_or(0, str::len) + trace.baggage().map_or(0, str::len) + 112;
        self.trace.map_or(0, texts)
    }

    fn push(&self, line: &mut Vec<u8>, id: u64) {
        if !self.progress && self.members.is_empty() && self.trace.is_none() {
            return;
        }
        line.extend_from_slice(b",\"_meta\":{");
        let mut first = true;
        let mut member = |line: &mut Vec<u8>, name: &str| {
            if !std::mem::take(&mut first) {
                line.push(b',');
            }
            line.extend_from_slice(name.as_bytes());
        };
        if !self.members.is_empty() {
            member(line, self.members);
        }
        if self.progress {
            member(line, "\"progressToken\":");
            line.extend_from_slice(id.to_string().as_bytes());
        }
        if let Some(trace) = self.trace {
            member(line, "\"traceparent\":\"");
            // Writing to memory does not fail.
            let _ = write!(line, "{}\"", trace.parent);
            if let Some(state) = trace.state() {
                member(line, "\"tracestate\":");
                push_string(line, state);
            }
            if let Some(baggage) = trace.baggage() {
                member(line, "\"baggage\":");
                push_string(line, baggage);
            }
        }
        line.push(b'}');
    }
}

/// A `tools/call` as one line. `arguments` is a JSON object.
pub(super) fn tool_call(id: u64, tool: &str, arguments: &[u8], meta: &Meta<'_>) -> Vec<u8> {
    let room = arguments.len() + tool.len() + meta.members.len() + meta.room() + 128;
    let mut line = Vec::with_capacity(room);
    line.extend_from_slice(b"{\"jsonrpc\":\"2.0\",\"id\":");
    line.extend_from_slice(id.to_string().as_bytes());
    line.extend_from_slice(b",\"method\":\"tools/call\",\"params\":{\"name\":");
    push_string(&mut line, tool);
    line.extend_from_slice(b",\"arguments\":");
    let start = line.len();
    line.extend_from_slice(arguments);
    // A line must stay one line. Between the tokens of JSON a line break is white space like any other,
    // and inside a string it cannot stand.
    if memchr::memchr2(b'\n', b'\r', arguments).is_some() {
        for byte in &mut line[start..] {
            if matches!(byte, b'\n' | b'\r') {
                *byte = b' ';
            }
        }
    }
    meta.push(&mut line, id);
    line.extend_from_slice(b"}}\n");
    line
}

/// Appends a string as JSON.
pub(crate) fn push_string(out: &mut Vec<u8>, text: &str) {
    if text.bytes().any(|byte| byte < 0x20 || matches!(byte, b'"' | b'\\')) {
        // Writing to memory does not fail.
        let _ = serde_json::to_writer(out, text);
    } else {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_one_line_whatever_its_arguments_look_like() {
        let arguments = "{\n  \"text\": \"a\\nb\",\r\n  \"n\": 1.0\n}";
        let trace = Trace::received(|name| {
            let value = match name {
                "traceparent" => "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                "tracestate" => "a=\"b\\",
                _ => "user=alice",
            };
            std::iter::once(value.as_bytes())
        });
        let meta = Meta { members: r#""x/y":{"z":1}"#, progress: true, trace: trace.as_ref() };
        let line = tool_call(7, "say \"hi\"", arguments.as_bytes(), &meta);
        assert!(line.capacity() < 600, "one piece of memory is enough: {}", line.capacity());
        let text = String::from_utf8(line).unwrap();
        assert_eq!(text.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["params"]["name"], "say \"hi\"");
        assert_eq!(value["params"]["arguments"]["text"], "a\nb");
        let traced = serde_json::json!({"x/y": {"z": 1}, "progressToken": 7, "tracestate": "a=\"b\\",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "baggage": "user=alice"});
        assert_eq!(value["params"]["_meta"], traced);
        let plain = tool_call(7, "t", b"{}", &Meta::default());
        assert!(plain.ends_with(b"\"arguments\":{}}}\n"), "{plain:?}");
        assert!(text.contains("1.0"));
    }

    #[test]
    fn only_the_envelope_is_read() {
        let line = Bytes::from_static(br#"{"result":{"n":1.0e2,"x":[]},"jsonrpc":"2.0","id":5}"#);
        let Message::Response { id: 5, body: Some(Ok(result)) } = Message::parse(&line) else { panic!() };
        assert_eq!(result.as_bytes(), br#"{"n":1.0e2,"x":[]}"#);
        for garbage in [
            "hello",
            "{}",
            "[]",
            r#"{"id":"x","result":{}}"#,
            r#"{"id":-1,"result":{}}"#,
            "{\"id\":1",
            r#"{"id":1,"level":"info"}"#,
        ] {
            assert!(matches!(Message::parse(&Bytes::from(garbage)), Message::Garbage), "{garbage}");
        }
        let odd = Bytes::from_static(br#"{"jsonrpc":"2.0","id":1}"#);
        assert!(matches!(Message::parse(&odd), Message::Response { id: 1, body: None }));
        let broken = Bytes::from_static(br#"{"jsonrpc":"2.0","id":1,"result":{]}"#);
        assert!(matches!(Message::parse(&broken), Message::Unreadable { id: 1 }));
        let banner = Bytes::from_static(br#"{"jsonrpc":"2.0","id":1,"method":"tools/call", ...}"#);
        assert!(matches!(Message::parse(&banner), Message::Garbage));
    }
}
