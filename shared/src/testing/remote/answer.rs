//! How answers are written: documents, and streams of events that end, break off and are taken up again.

use std::{
    io::{self, Write},
    net::TcpStream,
    sync::atomic::Ordering,
    time::Duration,
};

use super::{
    Drop,
    server::Server,
    session::{Next, Stream},
};
use crate::testing::http;

/// How long the wait for the next event takes before the client's presence is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// How the writing of a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// All of it was written.
    Over,
    /// The client went away.
    Gone,
    /// A test wanted it to break off.
    Dropped,
}

/// Whether the client has closed the connection.
pub(super) fn is_gone(stream: &TcpStream) -> bool {
    let mut byte = [0];
    let _ = stream.set_nonblocking(true);
    let peeked = stream.peek(&mut byte);
    let _ = stream.set_nonblocking(false);
    match peeked {
        Ok(count) => count == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    }
}

/// Writes a piece of a body of unknown length.
pub(super) fn chunk(out: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    let mut framed = format!("{:x}\r\n", bytes.len()).into_bytes();
    framed.extend_from_slice(bytes);
    framed.extend_from_slice(b"\r\n");
    out.write_all(&framed)
}

/// Begins a stream of events.
pub(super) fn begin_stream(out: &mut TcpStream, headers: &[(&str, &str)]) -> io::Result<()> {
    let mut all = vec![
        ("content-type", "text/event-stream"),
        ("cache-control", "no-store"),
        ("transfer-encoding", "chunked"),
    ];
    all.extend_from_slice(headers);
    out.write_all(http::head(200, &all).as_bytes())
}

/// Answers with a JSON document.
pub(super) fn json(out: &mut TcpStream, status: u16, headers: &[(&str, &str)], body: &str) -> bool {
    let mut all = vec![("content-type", "application/json")];
    all.extend_from_slice(headers);
    http::respond(out, status, &all, body.as_bytes()).is_ok()
}

/// Answers with nothing but a status.
pub(super) fn empty(out: &mut TcpStream, status: u16) -> bool {
    http::respond(out, status, &[], b"").is_ok()
}

/// Answers with a JSON-RPC error that belongs to no request.
pub(super) fn refuse(out: &mut TcpStream, status: u16, code: i64, message: &str) -> bool {
    let body = format!(r#"{{"jsonrpc":"2.0","error":{{"code":{code},"message":"{message}"}},"id":null}}"#);
    json(out, status, &[], &body)
}

impl Server {
    /// Writes the answer to a request as a document, or as a stream. Says how that ended.
    pub(super) fn answer(
        &self,
        out: &mut TcpStream,
        stream: &Stream,
        headers: &[(&str, &str)],
        is_call: bool,
        modern: bool,
        drops: u64,
    ) -> End {
        // Whether it fails decides on the status.
        let first = loop {
            match stream.next(0, LOOK) {
                Next::Event(event) => break event,
                Next::Over => return End::Dropped,
                Next::Nothing if is_gone(out) => return End::Gone,
                Next::Nothing if self.drops() != drops => return End::Dropped,
                // Something may come before the answer, and be read while that takes its time.
                Next::Nothing if !modern && !self.options.json => break String::new(),
                Next::Nothing => {}
            }
        };
        let status = match first {
            _ if !modern => 200,
            ref text if text.contains(r#""error":{"code":-32601,"#) => 404,
            ref text if text.contains(r#""error":{"code":-3202"#) => 400,
            _ => 200,
        };
        if self.options.json || status != 200 {
            return self.document(out, stream, status, headers, drops);
        }
        if begin_stream(out, headers).is_err() {
            return End::Gone;
        }
        if self.options.resumable && !modern {
            let prime = format!("id: {}-0\nretry: {}\ndata: \n\n", stream.number, self.options.retry_ms);
            if chunk(out, prime.as_bytes()).is_err() {
                return End::Gone;
            }
            match self.options.drop {
                Some(Drop::Abrupt) if is_call => return End::Dropped,
                Some(Drop::Clean) if is_call => {
                    return if out.write_all(b"0\r\n\r\n").is_ok() { End::Over } else { End::Gone };
                }
                _ => {}
            }
        }
        self.follow(out, stream, 0, self.options.resumable && !modern, drops)
    }

    fn document(
        &self,
        out: &mut TcpStream,
        stream: &Stream,
        status: u16,
        headers: &[(&str, &str)],
        drops: u64,
    ) -> End {
        let mut at = 0;
        let mut last = String::new();
        loop {
            match stream.next(at, LOOK) {
                Next::Event(event) => (at, last) = (at + 1, event),
                Next::Over if at == 0 => return End::Dropped,
                Next::Over => {
                    return if json(out, status, headers, &last) { End::Over } else { End::Gone };
                }
                Next::Nothing if is_gone(out) => return End::Gone,
                Next::Nothing if self.drops() != drops => return End::Dropped,
                Next::Nothing => {}
            }
        }
    }

    /// How often all streams were to end. Who looks before a call is written down as executed misses none.
    pub(super) fn drops(&self) -> u64 {
        self.drops.load(Ordering::Acquire)
    }

    /// Writes the events of a stream from one on, as they come, until it is over.
    pub(super) fn follow(
        &self,
        out: &mut TcpStream,
        stream: &Stream,
        from: usize,
        ids: bool,
        drops: u64,
    ) -> End {
        let mut at = from;
        loop {
            match stream.next(at, LOOK) {
                Next::Event(event) => {
                    at += 1;
                    let id = if ids { format!("id: {}-{at}\n", stream.number) } else { String::new() };
                    if chunk(out, format!("event: message\n{id}data: {event}\n\n").as_bytes()).is_err() {
                        return End::Gone;
                    }
                }
                Next::Over => {
                    return if out.write_all(b"0\r\n\r\n").is_ok() { End::Over } else { End::Gone };
                }
                Next::Nothing if self.drops() != drops => return End::Dropped,
                Next::Nothing if is_gone(out) => return End::Gone,
                Next::Nothing => {}
            }
        }
    }
}
