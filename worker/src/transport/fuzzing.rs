//! A target of the fuzzer: what a child writes on its standard output.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "this is test support: a failure should end the test loudly"
)]

use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use mcp_shared::json::RawJson;
use serde_json::Value;
use tokio::io::{AsyncRead, ReadBuf};

use super::{
    lines::{Line, Lines, id_in},
    message::{Message, Meta, answer, tool_call},
};

/// Limits of this target, in bytes: small, so that small inputs meet them.
const LIMIT: usize = 80;
const FATAL: usize = 400;

/// Lines are cut where they end, however they arrive; a line that is too long is never kept; and every line has one
/// meaning. The first byte says in how large pieces the rest arrives.
pub fn child_output(data: &[u8]) {
    let Some((first, stream)) = data.split_first() else { return };
    let whole = read(stream, usize::MAX);
    assert_eq!(read(stream, usize::from(*first % 32) + 1).0, expected(stream), "in pieces");
    assert_eq!(whole.0, expected(stream), "at once");
    for line in whole.1 {
        means_one_thing(&line);
    }
    if !stream.contains(&b'\n') {
        means_one_thing(&Bytes::copy_from_slice(stream));
    }
    if let Ok(arguments) = RawJson::parse(stream.to_vec())
        && arguments.is_object()
    {
        call_is_one_line(&arguments);
    }
}

/// A line as far as it does not matter how it arrives.
#[derive(Debug, PartialEq)]
enum Cut {
    Whole(Vec<u8>),
    /// With the request that it answers.
    TooLong(Option<u64>),
    /// Nothing is read after it.
    Fatal,
}

/// What must come of a stream.
fn expected(stream: &[u8]) -> Vec<Cut> {
    let mut cut = Vec::new();
    let mut parts = stream.split(|byte| *byte == b'\n').peekable();
    while let Some(part) = parts.next() {
        let ended = parts.peek().is_some();
        cut.push(match part.len() {
            // Its end may be seen before it is too long for any line, or after.
            length if length + usize::from(ended) > FATAL => Cut::Fatal,
            length if ended && length <= LIMIT => Cut::Whole(part.to_vec()),
            _ if ended => Cut::TooLong(id_in(part)),
            _ => break,
        });
        if cut.last() == Some(&Cut::Fatal) {
            break;
        }
    }
    cut
}

/// What comes of a stream that arrives in pieces of at most so many bytes; and the lines in it.
fn read(stream: &[u8], piece: usize) -> (Vec<Cut>, Vec<Bytes>) {
    let mut lines = Lines::with_limits(Pieces { rest: stream, piece }, LIMIT, FATAL);
    let (mut cut, mut whole) = (Vec::new(), Vec::new());
    let mut read = 0;
    loop {
        let Poll::Ready(next) = pin!(lines.next()).poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("it waits although there is more")
        };
        let Some(line) = next.expect("nothing fails to be read") else { break };
        let start = read;
        read +=
            stream[start..].iter().position(|byte| *byte == b'\n').map_or(stream.len() - start, |at| at + 1);
        match line {
            Line::Whole(line) => {
                cut.push(Cut::Whole(line.to_vec()));
                whole.push(line);
            }
            Line::TooLong(_) | Line::Endless(_) if read - start > FATAL => {
                cut.push(Cut::Fatal);
                break;
            }
            Line::TooLong(id) => cut.push(Cut::TooLong(id)),
            Line::Endless(_) => panic!("a line of {} bytes costs a process its life", read - start),
        }
    }
    (cut, whole)
}

struct Pieces<'a> {
    rest: &'a [u8],
    piece: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (now, rest) = self.rest.split_at(self.rest.len().min(self.piece).min(buffer.remaining()));
        buffer.put_slice(now);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}

/// That both readers of a line, the one of JSON and the one of lines that are too long or broken, see the same id;
/// and that what is answered to a line is one line of JSON with the id that was sent.
fn means_one_thing(line: &Bytes) {
    let document = serde_json::from_slice::<Value>(line).ok();
    let escaped = line.contains(&b'\\');
    match Message::parse(line) {
        Message::Response { id, .. } => {
            assert!(document.is_none_or(|document| document["id"].as_u64() == Some(id)));
            // A name that is spelled with escapes is seen by the first one only.
            assert!(escaped || id_in(line) == Some(id));
        }
        Message::Unreadable { id } => assert_eq!(id_in(line), Some(id)),
        Message::Request { id, method } => {
            let answered = answer(&id, &method);
            assert_eq!(answered.iter().position(|byte| *byte == b'\n'), Some(answered.len() - 1));
            // A number may be too large for this reader, and is sent back all the same.
            if let Ok(id) = id.read::<Value>() {
                let answered: Value = serde_json::from_slice(&answered).expect("an answer is JSON");
                assert_eq!(answered["id"], id);
                assert!(answered.get("result").is_some() != answered.get("error").is_some());
            }
        }
        Message::Notification { method, .. } => {
            assert!(document.is_none_or(|document| document["method"] == method));
        }
        Message::Garbage => {}
    }
    // Where there is only one `id`, both see that one or none.
    if let (Some(Value::Object(object)), Some(found)) = (&document_without_twins(line), id_in(line)) {
        assert!(escaped || object.get("id").and_then(Value::as_u64) == Some(found));
    }
}

/// The document in a line, unless some member is there twice.
fn document_without_twins(line: &[u8]) -> Option<Value> {
    mcp_shared::json::is_unambiguous(line).then(|| serde_json::from_slice(line).ok()).flatten()
}

fn call_is_one_line(arguments: &RawJson) {
    let meta = Meta { progress: true, ..Meta::default() };
    let line = tool_call(7, "a \"tool\"", arguments.as_bytes(), &meta);
    assert_eq!(line.iter().position(|byte| matches!(byte, b'\n' | b'\r')), Some(line.len() - 1));
    let Ok(sent) = arguments.read::<Value>() else { return };
    let call = match serde_json::from_slice::<Value>(&line) {
        Ok(call) => call,
        // The call has two levels more.
        Err(error) => return assert!(error.to_string().contains("recursion"), "{error}"),
    };
    assert_eq!(call["params"]["arguments"], sent);
    assert_eq!(call["id"], 7);
    assert_eq!(call["params"]["name"], "a \"tool\"");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_children() {
        mcp_shared::testing::fuzz::run("child_output", child_output);
    }
}
