//! Request bodies: read within limits, screened, taken apart into named fields with errors that say
//! which field is wrong.

use std::{
    borrow::Cow,
    mem,
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use mcp_shared::{
    error::{ErrorCode, shorten},
    json::{self, RawJson},
    limits,
};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{runtime::Handle, time::timeout};

use crate::{admission::Room, problem::Problem};

/// A request's body whose rest is still taken in, and thrown away, when a handler has answered without
/// it. A connection that is closed while the client still sends takes the answer with it: the client
/// would see a broken pipe, and never why its request was refused.
pub struct Discarding {
    body: Body,
    ended: bool,
}

impl Discarding {
    /// Wraps the body of a request with these headers, if there is one.
    pub fn wrap(headers: &HeaderMap, body: Body) -> Body {
        // A client that asks before it sends is told "no" by the answer alone.
        if headers.contains_key(header::EXPECT) || body.is_end_stream() {
            return body;
        }
        Body::new(Self { body, ended: false })
    }
}

impl http_body::Body for Discarding {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        self.ended |= matches!(polled, Poll::Ready(None | Some(Err(_))));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Discarding {
    fn drop(&mut self) {
        if self.ended || self.body.is_end_stream() {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(timeout(limits::BODY_TIMEOUT, discard(mem::take(&mut self.body))));
        }
    }
}

async fn discard(mut body: Body) {
    let mut taken = 0;
    while let Some(Ok(frame)) = body.frame().await {
        taken += frame.data_ref().map_or(0, Bytes::len);
        if taken > limits::DISCARDED_BYTES {
            return;
        }
    }
}

/// Reads a JSON body of at most `limit` bytes, for which `room` is taken.
pub async fn read(headers: &HeaderMap, body: Body, limit: usize, room: &mut Room) -> Result<Bytes, Problem> {
    let declared =
        headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > limit) {
        return Err(too_large(limit));
    }
    let is_json =
        headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(is_json);
    if !is_json && !body.is_end_stream() {
        let text = "The body must be sent with Content-Type: application/json";
        return Err(Problem::new(ErrorCode::UnsupportedMediaType, text));
    }
    // Before the first byte of it, if its sender says how long it is.
    room.grow_to(declared.unwrap_or(0))?;
    let bytes = timeout(limits::BODY_TIMEOUT, collect(body, declared.unwrap_or(0), limit, room))
        .await
        .map_err(|_| Problem::new(ErrorCode::RequestTimeout, "The body did not arrive in time"))??;
    if bytes.is_empty() {
        return Err(Problem::invalid("A JSON object is required as the body"));
    }
    json::screen(&bytes).map_err(|refused| {
        Problem::new(ErrorCode::InvalidJson, format!("The body is not acceptable JSON: {refused}"))
    })?;
    Ok(bytes)
}

/// The bytes of a body, of which so many are expected. Room is taken as they come, as far as there is none yet.
async fn collect(body: Body, expected: usize, limit: usize, room: &mut Room) -> Result<Bytes, Problem> {
    let unreadable = || Problem::invalid("The body could not be read to its end");
    let mut body = Limited::new(body, limit);
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            Err(error) if error.is::<LengthLimitError>() => return Err(too_large(limit)),
            Err(_) => return Err(unreadable()),
        };
        let Ok(part) = frame.into_data() else { continue };
        room.grow_to(first.len() + whole.len() + part.len())?;
        if first.is_empty() && whole.is_empty() {
            // Most bodies are one piece, which need not be copied.
            first = part;
            continue;
        }
        if whole.is_empty() {
            // All of it at once: what grows takes up to twice as much. (What is not written to is not there yet.)
            whole.reserve(expected.max(first.len() + part.len()));
            whole.extend_from_slice(&std::mem::take(&mut first));
        }
        whole.extend_from_slice(&part);
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

fn too_large(limit: usize) -> Problem {
    Problem::new(ErrorCode::PayloadTooLarge, format!("The body is larger than {limit} bytes"))
}

/// The members of a JSON object, each still as its text.
pub struct Fields<'a> {
    whole: &'a Bytes,
    members: Vec<(Cow<'a, str>, &'a RawValue)>,
}

/// One member, where "not there" and `null` may mean different things.
#[derive(Debug, Clone, PartialEq)]
pub enum Field<T> {
    /// Not there.
    Absent,
    /// There, and `null`.
    Null,
    /// There.
    Value(T),
}

impl<T> Field<T> {
    /// The value, if there is one.
    pub fn value(self) -> Option<T> {
        match self {
            Field::Value(value) => Some(value),
            Field::Absent | Field::Null => None,
        }
    }
}

impl<'a> Fields<'a> {
    /// Takes a body apart.
    pub fn parse(whole: &'a Bytes) -> Result<Self, Problem> {
        let members = json::members(whole, limits::BODY_FIELDS);
        let members = members.map_err(|error| match error.classify() {
            serde_json::error::Category::Data => Problem::invalid("The body must be a JSON object"),
            // The parser's own words can repeat the input; the position cannot.
            _ => Problem::new(
                ErrorCode::InvalidJson,
                format!("The body is not JSON: line {}, column {}", error.line(), error.column()),
            ),
        })?;
        if members.len() > limits::BODY_FIELDS {
            return Err(Problem::invalid(format!("The body has more than {} fields", limits::BODY_FIELDS)));
        }
        for (at, (name, _)) in members.iter().enumerate() {
            if members[..at].iter().any(|(earlier, _)| earlier == name) {
                return Err(Problem::invalid(format!("{} appears twice in the body", shorten(name, 64))));
            }
        }
        for (name, value) in &members {
            // The arguments of a call go to its server byte for byte, who reads them as it will.
            let read_here = name != "args" && value.get().starts_with(['{', '[']);
            if read_here && !json::is_unambiguous(value.get().as_bytes()) {
                let name = shorten(name, 64);
                return Err(Problem::invalid(format!("something appears twice in {name}")));
            }
        }
        Ok(Self { whole, members })
    }

    /// A member as its text.
    pub fn raw(&self, name: &str) -> Field<RawJson> {
        match self.members.iter().find(|(member, _)| member == name) {
            None => Field::Absent,
            Some((_, value)) if value.get() == "null" => Field::Null,
            Some((_, value)) => Field::Value(RawJson::slice_of(self.whole, value)),
        }
    }

    /// A member of a type; `rule` says what the value must be.
    pub fn get<T: for<'de> Deserialize<'de>>(&self, name: &str, rule: &str) -> Result<Field<T>, Problem> {
        Ok(match self.raw(name) {
            Field::Absent => Field::Absent,
            Field::Null => Field::Null,
            Field::Value(raw) => {
                Field::Value(raw.read().map_err(|_| Problem::invalid(format!("{name} {rule}")))?)
            }
        })
    }

    /// A member that is a string.
    pub fn text(&self, name: &str) -> Result<Field<String>, Problem> {
        self.get(name, "must be a string")
    }

    /// A string that must be there and not be empty.
    pub fn required(&self, name: &str) -> Result<String, Problem> {
        match self.text(name)? {
            Field::Value(text) if !text.is_empty() => Ok(text),
            _ => Err(Problem::invalid(format!("{name} is required and must be a string that is not empty"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails(text: &str) -> (ErrorCode, String) {
        let bytes = Bytes::from(text.to_owned());
        let problem = match Fields::parse(&bytes) {
            Ok(fields) => fields.required("serverName").err().unwrap(),
            Err(problem) => problem,
        };
        let envelope = problem.envelope(&mcp_shared::ids::RequestId::generate());
        (problem.code(), envelope["error"].as_str().unwrap().to_owned())
    }

    #[test]
    fn says_what_is_wrong_without_repeating_it() {
        assert_eq!(fails(r#"{"serverName":"#).0, ErrorCode::InvalidJson);
        assert_eq!(fails(r#"{"a":1} x"#).0, ErrorCode::InvalidJson);
        assert_eq!(fails("[1,2]"), (ErrorCode::InvalidRequest, "The body must be a JSON object".to_owned()));
        assert_eq!(fails("\"str\"").0, ErrorCode::InvalidRequest);
        assert_eq!(fails(r#"{"serverName":"a","serverName":"b"}"#).1, "serverName appears twice in the body");
        assert_eq!(fails(r#"{"env":{"A":"b","\u0041":"c"}}"#).1, "something appears twice in env");
        assert_eq!(fails(r#"{"serverName":{"$ne":null}}"#).1, "serverName must be a string");
        assert!(fails(r#"{"serverName":null}"#).1.starts_with("serverName is required"));
    }
}
