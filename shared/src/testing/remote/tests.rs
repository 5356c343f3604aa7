//! The fixture as a client sees it that is written by hand, in this process.

use std::{
    io::{BufReader, Read, Write},
    net::TcpStream,
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use super::{Options, server};
use crate::testing::{authorization::Authorization, port::Port};

/// Serves on a thread of this process, which lasts as long as that does.
fn start(flags: &[&str]) -> String {
    // Whoever takes a free port tells it on standard output, which is not ours here.
    let port = Port::keep();
    let address = port.address();
    let mut all = vec!["--http".to_owned(), address.port().to_string()];
    all.extend(flags.iter().map(|flag| (*flag).to_owned()));
    let options = Options::parse(&all).unwrap();
    thread::spawn(move || (port, server::serve(options).map(|never| match never {})));
    while TcpStream::connect(address).is_err() {
        thread::sleep(Duration::from_millis(5));
    }
    address.to_string()
}

fn post(address: &str, headers: &str, message: &Value) -> (u16, Vec<(String, String)>, String) {
    let body = message.to_string();
    let request = format!(
        "POST /mcp HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         accept: application/json, text/event-stream\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    exchange(address, &request)
}

/// One exchange; what comes is read until it is whole.
fn exchange(address: &str, request: &str) -> (u16, Vec<(String, String)>, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    // The end of our side is no end of the client, or so the fixture would think.
    let mut reader = BufReader::new(stream);
    let mut text = String::new();
    let mut byte = [0; 1];
    let mut wanted = None;
    while reader.read(&mut byte).unwrap() == 1 {
        text.push(char::from(byte[0]));
        if wanted.is_none()
            && let Some((head, _)) = text.split_once("\r\n\r\n")
        {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let chunked = head.contains("transfer-encoding: chunked");
            let none = head.contains(" 204 ");
            wanted = match length {
                Some(length) => Some(head.len() + 4 + length.parse::<usize>().unwrap()),
                None if none => Some(head.len() + 4),
                None => (!chunked).then_some(usize::MAX),
            };
        }
        if wanted == Some(text.len()) || text.ends_with("\r\n0\r\n\r\n") {
            break;
        }
    }
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let headers = head.lines().filter_map(|line| line.split_once(": "));
    (status, headers.map(|(name, value)| (name.into(), value.into())).collect(), body.into())
}

fn initialize(id: u64) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "method": "initialize", "params": {"protocolVersion": "2025-06-18",
        "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}})
}

fn call(id: u64, tool: &str, args: Value) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {"name": tool, "arguments": args}})
}

fn session(address: &str, headers: &str) -> String {
    let (status, answered, body) = post(address, headers, &initialize(0));
    assert_eq!(status, 200, "{body}");
    let id = answered.into_iter().find(|(name, _)| name == "mcp-session-id").unwrap().1;
    let headers = format!("{headers}mcp-session-id: {id}\r\n");
    let ready = json!({"jsonrpc": "2.0", "method": "notifications/initialized"});
    assert_eq!(post(address, &headers, &ready).0, 202);
    headers
}

/// The data of the events of an answer, whatever chunks they came in.
fn events(body: &str) -> Vec<Value> {
    let data = body.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter(|data| !data.is_empty()).map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[test]
fn sessions_have_memories_of_their_own_and_end() {
    for flags in [&["--answer", "json"][..], &[]] {
        let address = start(flags);
        let (one, two) = (session(&address, ""), session(&address, ""));
        let told = |headers: &str, message: Value| {
            let (status, _, body) = post(&address, headers, &message);
            assert_eq!(status, 200, "{body}");
            match flags.is_empty() {
                true => events(&body).pop().unwrap(),
                false => serde_json::from_str(&body).unwrap(),
            }
        };
        told(&one, call(7, "remember", json!({"value": "x"})));
        let recalled = told(&one, call(7, "recall", json!({})));
        assert_eq!((&recalled["id"], &recalled["result"]["content"][0]["text"]), (&json!(7), &json!("x")));
        assert_eq!(told(&two, call(8, "recall", json!({})))["result"]["content"][0]["text"], "null");
        let gone = format!("DELETE /mcp HTTP/1.1\r\nhost: x\r\n{one}\r\n");
        assert_eq!(exchange(&address, &gone).0, 200);
        assert_eq!(post(&address, &one, &call(9, "recall", json!({}))).0, 404);
        assert_eq!(post(&address, "", &call(9, "recall", json!({}))).0, 400);
    }
}

#[test]
fn a_stream_that_broke_off_is_taken_up_again() {
    let address = start(&["--resumable", "--drop", "clean"]);
    let headers = session(&address, "");
    let message = json!({"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": {"name": "progress",
        "arguments": {"steps": 3, "delayMs": 20}, "_meta": {"progressToken": "t"}}});
    let (_, _, body) = post(&address, &headers, &message);
    assert!(events(&body).is_empty() && body.contains("retry: 100"), "{body}");
    let last = body.lines().find_map(|line| line.strip_prefix("id: ")).unwrap();
    let rest = |last: &str| {
        let get = format!(
            "GET /mcp HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n{headers}last-event-id: {last}\r\n\r\n"
        );
        events(&exchange(&address, &get).2)
    };
    let all = rest(last);
    assert_eq!(all.len(), 4, "{all:?}");
    assert_eq!((&all[0]["params"]["progress"], &all[3]["id"]), (&json!(1), &json!(5)));
    let number = last.split('-').next().unwrap();
    assert_eq!(rest(&format!("{number}-3")), all[3..]);
}

#[test]
fn the_era_without_sessions_wants_its_headers() {
    let address = start(&["--era", "stateless", "--answer", "json"]);
    let meta = json!({"io.modelcontextprotocol/protocolVersion": "2026-07-28"});
    let mut message = call(3, "echo", json!({"text": "hi"}));
    message["params"]["_meta"] = meta.clone();
    let headers = "mcp-protocol-version: 2026-07-28\r\nmcp-method: tools/call\r\n";
    let (status, _, body) = post(&address, headers, &message);
    assert_eq!((status, body.contains("-32020")), (400, true), "{body}");
    let (status, _, body) = post(&address, &format!("{headers}mcp-name: =?base64?ZWNobw==?=\r\n"), &message);
    assert_eq!((status, body.contains(r#""text":"hi""#)), (200, true), "{body}");
    let (status, _, body) = post(&address, "", &initialize(1));
    assert_eq!((status, body.contains("-32022")), (400, true), "{body}");
}

#[test]
fn the_older_transport_answers_on_its_stream() {
    let address = start(&["--era", "sse-only"]);
    assert_eq!(post(&address, "", &initialize(0)).0, 405);
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.write_all(b"GET /mcp HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n").unwrap();
    let mut text = String::new();
    let mut read_until = |stream: &mut TcpStream, end: &str| {
        let mut chunk = [0; 4_096];
        while !text.contains(end) {
            let read = stream.read(&mut chunk).unwrap();
            text.push_str(std::str::from_utf8(&chunk[..read]).unwrap());
        }
        text.clone()
    };
    let first = read_until(&mut stream, "\n\n");
    let to = first.lines().find_map(|line| line.strip_prefix("data: ")).unwrap().to_owned();
    let body = initialize(42).to_string();
    let request = format!("POST {to} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    assert_eq!(exchange(&address, &request).0, 202);
    assert!(read_until(&mut stream, "serverInfo").contains(r#""id":42"#));
}

#[test]
fn only_good_tokens_get_in_and_sessions_are_their_users() {
    let authorization = Authorization::start();
    let issuer = authorization.issuer();
    let address = start(&["--auth", &issuer, "--scope", "tools"]);
    let (status, headers, _) = post(&address, "", &initialize(0));
    let challenge = &headers.iter().find(|(name, _)| name == "www-authenticate").unwrap().1;
    let at = challenge.split("resource_metadata=\"").nth(1).unwrap().split('"').next().unwrap();
    assert_eq!(status, 401);
    let path = at.split(address.as_str()).nth(1).unwrap();
    let get = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    let metadata: Value = serde_json::from_str(&exchange(&address, &get).2).unwrap();
    assert_eq!(metadata["authorization_servers"][0], issuer);
    let resource = format!("http://{address}/mcp");
    assert_eq!(metadata["resource"], resource);
    let bearer = |user: &str, resource: &str| {
        format!("authorization: Bearer {}\r\n", authorization.mint("c", user, Some(resource)).access)
    };
    let alice = session(&address, &bearer("alice", &resource));
    let id = alice.lines().last().unwrap();
    assert_eq!(post(&address, &alice, &call(1, "count", json!({}))).0, 200);
    let bob = format!("{}{id}\r\n", bearer("bob", &resource));
    assert_eq!(post(&address, &bob, &call(1, "count", json!({}))).0, 404);
    assert_eq!(post(&address, &bearer("eve", "http://elsewhere/"), &initialize(0)).0, 401);
    authorization.expire_all();
    assert_eq!(post(&address, &alice, &call(1, "count", json!({}))).0, 401);
}

#[test]
fn it_answers_as_wrongly_as_it_is_asked_to() {
    let address = start(&["--other", "http://127.0.0.1:1/"]);
    let headers = session(&address, "");
    let hostile = |mode: &str| post(&address, &headers, &call(9, "hostile", json!({"mode": mode})));
    assert_eq!(hostile("500").0, 500);
    assert_eq!(hostile("redirect").0, 307);
    assert!(hostile("wrong_id").2.contains(r#""id":1000009"#));
    assert_eq!(hostile("close").0, 0);
    assert!(hostile("429").1.contains(&("retry-after".to_owned(), "7".to_owned())));
    // A gzip file of a gigabyte, whose beginning is one.
    let mut stream = TcpStream::connect(&address).unwrap();
    let body = call(9, "hostile", json!({"mode": "gzip_bomb"})).to_string();
    let length = body.len();
    let request = format!(
        "POST /mcp HTTP/1.1\r\nhost: x\r\n{headers}content-type: application/json\r\n\
         accept: application/json, text/event-stream\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert!((6_000_000..8_000_000).contains(&answer.len()), "{}", answer.len());
    let start = answer.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    assert_eq!(answer[start..start + 3], [0x1f, 0x8b, 8]);
}
