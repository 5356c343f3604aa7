//! Everything that a remote server should not answer.
//!
//! | mode | the answer |
//! |---|---|
//! | `endless_comments`, `endless_events`, `endless_notifications`, `endless_junk` | a stream without end: comments, empty events, notifications, events that are no JSON |
//! | `giant_event` | a stream of one event of 1 GiB |
//! | `big_body`, `big_chunks` | a document of 1 GiB, with its length or in chunks |
//! | `gzip_bomb` | 7 MB of gzip that are 1 GiB, although nobody asked for gzip |
//! | `gzip_small` | a right answer that says that it is gzip |
//! | `wrong_id`, `text_id`, `null_id` | a result for another request |
//! | `double`, `others_first` | the answer twice, and answers for other requests before it |
//! | `redirect`, `redirect_blocked`, `redirect_get` | 307 to `--other`, 307 to a metadata address, 303 to `--other` |
//! | `drip`, `drip_json` | one byte per second of a stream or a document |
//! | `html`, `not_json`, `no_type`, `empty_json`, `batch`, `deep`, `bad_utf8`, `bad_utf8_stream` | 200 with that |
//! | `accepted`, `no_content` | 202 and 204 to a request |
//! | `400`, `403`, `404`, `418`, `500`, `503`, `503_plain`, `429`, `429_plain` | the status; 503 and 429 with `Retry-After: 7` |
//! | `hang`, `hang_stream` | nothing; the head of a stream and then nothing |
//! | `reset`, `close`, `truncated`, `truncated_chunks`, `stream_end` | the end of the connection at that point |
//! | `header_flood`, `long_header`, `interim_flood`, `no_http` | heads that are none |
//! | `session_control`, `session_long`, `session_split` | a session id that none can be, with a right answer |

use std::{
    io::Write,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt::Linger};

use super::{
    answer::{self, begin_stream, chunk, is_gone, json},
    server::{Server, pour},
};
use crate::testing::http;

const GIB: u64 = 1024 * 1024 * 1024;

/// How long something is kept up that has no end of its own.
const PERSISTENCE: Duration = Duration::from_secs(120);

/// Answers a request in a mode. False if the connection is to end.
pub(super) fn misbehave(mode: &str, id: &str, server: &Server, out: &mut TcpStream) -> bool {
    let result = |id: &str, text: &str| {
        format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{{"content":[{{"type":"text","text":"{text}"}}]}}}}"#)
    };
    let event = |data: &str| format!("event: message\ndata: {data}\n\n");
    let other = |plus: u64| id.parse::<u64>().map_or(plus, |id| id + plus).to_string();
    match mode {
        "endless_comments" => endless(out, ": still here\n\n"),
        "endless_events" => endless(out, "data: \n\n"),
        "endless_junk" => endless(out, "data: no json\n\n"),
        "endless_notifications" => endless(
            out,
            &event(
                r#"{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":1}}"#,
            ),
        ),
        "giant_event" => {
            let _ = begin_stream(out, &[]).and_then(|()| chunk(out, b"data: "));
            let piece = [b"10000\r\n".as_slice(), &[b'x'; 65_536], b"\r\n"].concat();
            pour(out, &piece, GIB / 65_536);
            false
        }
        "big_body" => {
            let length = GIB.to_string();
            let head = [("content-type", "application/json"), ("content-length", length.as_str())];
            let _ = out.write_all(http::head(200, &head).as_bytes());
            let _ = out.write_all(br#"{"jsonrpc":"2.0","result":""#);
            pour(out, &[b'x'; 65_536], GIB / 65_536);
            false
        }
        "big_chunks" => {
            let head = [("content-type", "application/json"), ("transfer-encoding", "chunked")];
            let _ = out.write_all(http::head(200, &head).as_bytes());
            pour(out, &[b"10000\r\n".as_slice(), &[b' '; 65_536], b"\r\n"].concat(), GIB / 65_536);
            false
        }
        "gzip_bomb" => {
            let head =
                [("content-type", "application/json"), ("content-encoding", "gzip"), ("connection", "close")];
            let _ = out.write_all(http::head(200, &head).as_bytes());
            let (start, repeated, count) = bomb();
            let _ = out.write_all(&start);
            pour(out, &repeated, count);
            false
        }
        "gzip_small" => json(out, 200, &[("content-encoding", "gzip")], &result(id, "not packed")),
        "wrong_id" => json(out, 200, &[], &result(&other(1_000_000), "for somebody else")),
        "text_id" => json(out, 200, &[], &result(&format!(r#""{id}""#), "with a text as id")),
        "null_id" => json(out, 200, &[], &result("null", "for nobody")),
        "double" => stream(out, &[event(&result(id, "first")), event(&result(id, "second"))]),
        "others_first" => {
            let others = (1..=64).map(|plus| event(&result(&other(plus), "stolen")));
            let all: Vec<String> = others.chain([event(&result(id, "own"))]).collect();
            stream(out, &all)
        }
        "redirect" => redirect(out, 307, &server.options.other),
        "redirect_get" => redirect(out, 303, &server.options.other),
        "redirect_blocked" => redirect(out, 307, "http://169.254.169.254/latest/meta-data/"),
        "drip" => {
            let _ = begin_stream(out, &[]);
            drip(out, &event(&result(id, &"x".repeat(400))), |byte| {
                [b"1\r\n".as_slice(), &[byte], b"\r\n"].concat()
            })
        }
        "drip_json" => {
            let body = result(id, &"x".repeat(400));
            let length = body.len().to_string();
            let head = [("content-type", "application/json"), ("content-length", length.as_str())];
            let _ = out.write_all(http::head(200, &head).as_bytes());
            drip(out, &body, |byte| vec![byte])
        }
        "html" => document(out, "text/html", b"<!doctype html><html><body>Welcome</body></html>"),
        "not_json" => document(out, "application/json", b"surprise"),
        "no_type" => http::respond(out, 200, &[], result(id, "untyped").as_bytes()).is_ok(),
        "empty_json" => document(out, "application/json", b""),
        "batch" => document(out, "application/json", format!("[{}]", result(id, "batch")).as_bytes()),
        "deep" => document(out, "application/json", &[b"[".repeat(500_000), b"]".repeat(500_000)].concat()),
        "bad_utf8" => document(out, "application/json", &spoilt(&result(id, "@"))),
        "bad_utf8_stream" => {
            let _ = begin_stream(out, &[]);
            let _ = chunk(out, &spoilt(&event(&result(id, "@"))));
            out.write_all(b"0\r\n\r\n").is_ok()
        }
        "accepted" => answer::empty(out, 202),
        "no_content" => answer::empty(out, 204),
        "400" | "403" | "404" | "418" | "500" => {
            let status = mode.parse().unwrap_or(500);
            http::respond(out, status, &[("content-type", "text/plain")], b"secret-of-the-remote").is_ok()
        }
        "503" | "429" => json(out, mode.parse().unwrap_or(503), &[("retry-after", "7")], "{}"),
        "503_plain" | "429_plain" => json(out, mode[..3].parse().unwrap_or(503), &[], "{}"),
        "hang" => linger(out),
        "hang_stream" => begin_stream(out, &[]).is_ok() && linger(out),
        "reset" => {
            // Closing it with this set resets the connection.
            let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(out, Linger, &linger).expect("a socket can be told so");
            false
        }
        "close" => false,
        "truncated" => {
            let head = [("content-type", "application/json"), ("content-length", "1000")];
            let _ = out.write_all(http::head(200, &head).as_bytes());
            let _ = out.write_all(&result(id, "cut").as_bytes()[..30]);
            false
        }
        "truncated_chunks" => {
            let head = [("content-type", "application/json"), ("transfer-encoding", "chunked")];
            let _ = out.write_all(http::head(200, &head).as_bytes());
            let _ = out.write_all(b"ffff\r\n{\"jsonrpc\":");
            false
        }
        "stream_end" => stream(out, &[]),
        "header_flood" => {
            let _ = out.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n");
            pour(out, &b"x-flood: 0123456789\r\n".repeat(1_000), 100_000);
            false
        }
        "long_header" => {
            let _ = out.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-long: ");
            pour(out, &[b'x'; 65_536], GIB / 65_536);
            false
        }
        "interim_flood" => {
            pour(out, &b"HTTP/1.1 103 Early Hints\r\n\r\n".repeat(1_000), 100_000);
            false
        }
        "no_http" => {
            let _ = out.write_all(b"220 mail.example ESMTP ready\r\n");
            false
        }
        "session_control" => with_session(out, "a\u{1}b", id),
        "session_long" => with_session(out, &"s".repeat(16_000), id),
        "session_split" => with_session(out, "a\r\nx-injected: yes", id),
        unknown => panic!("there is no mode {unknown}"),
    }
}

fn document(out: &mut TcpStream, kind: &str, body: &[u8]) -> bool {
    http::respond(out, 200, &[("content-type", kind)], body).is_ok()
}

fn redirect(out: &mut TcpStream, status: u16, to: &str) -> bool {
    http::respond(out, status, &[("location", to)], b"").is_ok()
}

fn stream(out: &mut TcpStream, events: &[String]) -> bool {
    let written = begin_stream(out, &[]).and_then(|()| match events.concat().as_str() {
        "" => Ok(()),
        all => chunk(out, all.as_bytes()),
    });
    written.and_then(|()| out.write_all(b"0\r\n\r\n")).is_ok()
}

fn endless(out: &mut TcpStream, event: &str) -> bool {
    let _ = begin_stream(out, &[]);
    let until = Instant::now() + PERSISTENCE;
    let many = event.repeat(1_000);
    while Instant::now() < until && chunk(out, many.as_bytes()).is_ok() {}
    false
}

fn drip(out: &mut TcpStream, text: &str, framed: impl Fn(u8) -> Vec<u8>) -> bool {
    for byte in text.bytes() {
        if out.write_all(&framed(byte)).is_err() || is_gone(out) {
            break;
        }
        thread::sleep(Duration::from_secs(1));
    }
    false
}

/// Keeps quiet until the client leaves.
fn linger(out: &mut TcpStream) -> bool {
    let until = Instant::now() + PERSISTENCE;
    while Instant::now() < until && !is_gone(out) {
        thread::sleep(Duration::from_millis(50));
    }
    false
}

/// The text with a byte that is no UTF-8 in place of each `@`.
fn spoilt(text: &str) -> Vec<u8> {
    text.bytes().map(|byte| if byte == b'@' { 0xff } else { byte }).collect()
}

fn with_session(out: &mut TcpStream, session: &str, id: &str) -> bool {
    let body = format!(
        r#"{{"jsonrpc":"2.0","id":{id},"result":{{"protocolVersion":"2025-06-18","capabilities":{{"tools":{{}}}},"serverInfo":{{"name":"x","version":"1"}}}}}}"#
    );
    json(out, 200, &[("mcp-session-id", session)], &body)
}

/// A gzip file of 1 GiB of one letter: how it begins, and what is repeated how often. One block of fixed
/// codes: a literal, then again and again "the last byte 258 times", which takes 13 bits.
fn bomb() -> (Vec<u8>, Vec<u8>, u64) {
    let mut bits = Bits::default();
    // The last block, with fixed codes; the letter x.
    bits.push(0b1, 1);
    bits.push(0b01, 2);
    bits.code(0x30 + u32::from(b'x'), 8);
    let copy = |bits: &mut Bits| {
        // The longest length, then the distance 1.
        bits.code(0b1100_0101, 8);
        bits.code(0, 5);
    };
    // Copies until the bits fill whole bytes, so that what follows repeats.
    while bits.bits != 0 {
        copy(&mut bits);
    }
    let header = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff];
    let start = [header.as_slice(), &bits.bytes].concat();
    let mut repeated = Bits::default();
    for _ in 0..8 * 512 {
        copy(&mut repeated);
    }
    (start, repeated.bytes, GIB / (258 * 8 * 512))
}

/// Bits in the order in which deflate packs them.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    last: u8,
    bits: u32,
}

impl Bits {
    fn push(&mut self, value: u32, count: u32) {
        for bit in 0..count {
            self.last |= u8::from(value >> bit & 1 == 1) << self.bits;
            self.bits += 1;
            if self.bits == 8 {
                self.bytes.push(std::mem::take(&mut self.last));
                self.bits = 0;
            }
        }
    }

    /// A code, which is packed from its other end.
    fn code(&mut self, code: u32, count: u32) {
        for bit in (0..count).rev() {
            self.push(code >> bit & 1, 1);
        }
    }
}
