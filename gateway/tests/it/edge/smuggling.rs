//! Bytes that a proxy in front might read otherwise than this program: nothing that stands in one request is taken
//! for another one, and what is not clear is refused.

use reqwest::Method;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{started, unharmed};
use crate::deployment::{Deployment, PATIENCE};

/// Everything that comes back for these bytes, until the other side closes.
async fn all(api: &Deployment, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(api.address()).await.unwrap();
    // The other side may close before everything is written.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    // A reset after the answer takes nothing of it away here.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection is kept");
    String::from_utf8_lossy(&answer).into_owned()
}

/// The statuses of all answers.
fn statuses(answers: &str) -> Vec<u16> {
    let heads = answers.split("HTTP/1.1 ").skip(1);
    heads.map(|head| head[..3].parse().unwrap()).collect()
}

/// What is smuggled: it would remove the server that every test has.
const SMUGGLED: &str = "DELETE /mcp/servers/echo HTTP/1.1\r\nHost: localhost\r\nX-Ignored: x";

#[tokio::test]
async fn nothing_that_is_framed_two_ways_is_served() {
    let api = started().await;
    let body = r#"{"serverName":"echo"}"#;
    let chunked = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    // (what, lines that frame the body, what follows the head)
    let cases: Vec<(&str, &str, String)> = vec![
        ("CL.TE", "Content-Length: 4\r\nTransfer-Encoding: chunked", chunked.clone()),
        ("TE.CL", "Transfer-Encoding: chunked\r\nContent-Length: 4", chunked.clone()),
        ("TE twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", chunked.clone()),
        ("chunked is not last", "Transfer-Encoding: chunked, gzip", chunked.clone()),
        ("unknown coding", "Transfer-Encoding: cow", chunked.clone()),
        ("quoted coding", "Transfer-Encoding: \"chunked\"", chunked.clone()),
        ("prefix of a coding", "Transfer-Encoding: xchunked", chunked.clone()),
        ("empty coding", "Transfer-Encoding:", chunked.clone()),
        ("space before the colon", "Transfer-Encoding : chunked", chunked.clone()),
        ("vertical tab", "Transfer-Encoding: \x0bchunked", chunked.clone()),
        ("folded line", "X-A: b\r\n Transfer-Encoding: chunked", chunked.clone()),
        ("folded value", "Transfer-Encoding:\r\n chunked", chunked.clone()),
        ("no name", ": chunked", chunked.clone()),
        ("bare CR", "X-A: b\rTransfer-Encoding: chunked", chunked.clone()),
        ("NUL in a value", "X-A: b\0c\r\nTransfer-Encoding: chunked", chunked.clone()),
        ("two lengths", "Content-Length: 21\r\nContent-Length: 4", body.to_owned()),
        ("two lengths in one", "Content-Length: 21, 4", body.to_owned()),
        ("signed length", "Content-Length: +21", body.to_owned()),
        ("negative length", "Content-Length: -1", body.to_owned()),
        ("hexadecimal length", "Content-Length: 0x15", body.to_owned()),
        ("no length at all", "Content-Length:", body.to_owned()),
        ("a length that overflows", "Content-Length: 18446744073709551637", body.to_owned()),
        ("half a length", "Content-Length: 2.1e1", body.to_owned()),
        ("a chunk's size is no number", "Transfer-Encoding: chunked", format!("zz\r\n{body}\r\n0\r\n\r\n")),
        (
            "a chunk's size overflows",
            "Transfer-Encoding: chunked",
            format!("ffffffffffffffff1\r\n{body}\r\n0\r\n\r\n"),
        ),
        ("a chunk's size is negative", "Transfer-Encoding: chunked", format!("-1\r\n{body}\r\n0\r\n\r\n")),
        ("a chunk's size has a prefix", "Transfer-Encoding: chunked", format!("0x15\r\n{body}\r\n0\r\n\r\n")),
        ("a chunk is longer than it says", "Transfer-Encoding: chunked", format!("4\r\n{body}\r\n0\r\n\r\n")),
        ("chunks without line ends", "Transfer-Encoding: chunked", format!("15\n{body}\n0\n\n")),
        (
            "a line end within an extension",
            "Transfer-Encoding: chunked",
            format!("15;a\nb\r\n{body}\r\n0\r\n\r\n"),
        ),
    ];
    for (what, framing, rest) in cases {
        let request = format!(
            "POST /mcp/tool/call HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n{framing}\r\n\r\n{rest}\
             {SMUGGLED}\r\n\r\n",
            api.address()
        );
        let answers = all(&api, request.as_bytes()).await;
        // One answer that refuses, or none: never one to what was smuggled.
        let seen = statuses(&answers);
        assert!(seen.is_empty() || seen == [400], "{what}: {answers}");
    }
    unharmed(&api).await;
}

#[tokio::test]
async fn heads_that_proxies_read_otherwise_are_refused() {
    let api = started().await;
    let host = api.address();
    let good = format!("Connection: close\r\nHost: {host}");
    for (what, request) in [
        ("no version", format!("GET /mcp/servers\r\n{good}\r\n\r\n")),
        ("two spaces", format!("GET  /mcp/servers HTTP/1.1\r\n{good}\r\n\r\n")),
        ("a space in the path", format!("GET /mcp/ servers HTTP/1.1\r\n{good}\r\n\r\n")),
        ("version 2", format!("GET /mcp/servers HTTP/2.0\r\n{good}\r\n\r\n")),
        ("version 1.2", format!("GET /mcp/servers HTTP/1.2\r\n{good}\r\n\r\n")),
        ("the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned()),
        ("a NUL in the path", format!("GET /mcp\0/servers HTTP/1.1\r\n{good}\r\n\r\n")),
        ("a control character in the path", format!("GET /mcp\x01/servers HTTP/1.1\r\n{good}\r\n\r\n")),
        ("a line that is no field", format!("GET /mcp/servers HTTP/1.1\r\n{good}\r\nnonsense\r\n\r\n")),
        ("a space before the first field", format!("GET /mcp/servers HTTP/1.1\r\n {good}\r\n\r\n")),
        ("a space in a name", format!("GET /mcp/servers HTTP/1.1\r\n{good}\r\nX Y: z\r\n\r\n")),
        ("no host", "GET /mcp/servers HTTP/1.1\r\nConnection: close\r\n\r\n".to_owned()),
        ("no host in 1.0", "GET /mcp/servers HTTP/1.0\r\n\r\n".to_owned()),
        ("two hosts", format!("GET /mcp/servers HTTP/1.1\r\n{good}\r\n{good}\r\n\r\n")),
        (
            "another spelling of a second host",
            format!("GET /mcp/servers HTTP/1.1\r\n{good}\r\nhOST: evil.com\r\n\r\n"),
        ),
        ("an empty host", "GET /mcp/servers HTTP/1.1\r\nConnection: close\r\nHost:\r\n\r\n".to_owned()),
        (
            "a list of hosts",
            format!("GET /mcp/servers HTTP/1.1\r\nConnection: close\r\nHost: {host}, evil.com\r\n\r\n"),
        ),
        (
            "a host with a user",
            format!("GET /mcp/servers HTTP/1.1\r\nConnection: close\r\nHost: evil.com@{host}\r\n\r\n"),
        ),
        (
            "a user before an evil host",
            "GET /mcp/servers HTTP/1.1\r\nConnection: close\r\nHost: localhost@evil.com\r\n\r\n".to_owned(),
        ),
        (
            "a host with a path",
            format!("GET /mcp/servers HTTP/1.1\r\nConnection: close\r\nHost: {host}/x\r\n\r\n"),
        ),
        (
            "a host with two ports",
            "GET /mcp/servers HTTP/1.1\r\nConnection: close\r\nHost: localhost:80:80\r\n\r\n".to_owned(),
        ),
        ("a target for somebody else", format!("GET http://evil.com/mcp/servers HTTP/1.1\r\n{good}\r\n\r\n")),
        (
            "a target for us, a host for somebody else",
            format!("GET http://{host}/mcp/servers HTTP/1.1\r\nConnection: close\r\nHost: evil.com\r\n\r\n"),
        ),
        ("two of our own names", format!("GET http://localhost:1/mcp/servers HTTP/1.1\r\n{good}\r\n\r\n")),
        (
            "a target with a user",
            format!("GET http://evil.com@{host}/mcp/servers HTTP/1.1\r\n{good}\r\n\r\n"),
        ),
        (
            "a tunnel",
            "CONNECT evil.com:443 HTTP/1.1\r\nConnection: close\r\nHost: evil.com:443\r\n\r\n".to_owned(),
        ),
        ("a tunnel to us", format!("CONNECT {host} HTTP/1.1\r\n{good}\r\n\r\n")),
        ("everything at once", format!("OPTIONS * HTTP/1.1\r\n{good}\r\n\r\n")),
    ] {
        let answers = all(&api, request.as_bytes()).await;
        let seen = statuses(&answers);
        let refused = |status: &u16| matches!(status, 400 | 403 | 404 | 405 | 408 | 505);
        assert!(seen.len() <= 1 && seen.iter().all(refused), "{what}: {answers}");
        assert!(!answers.contains("\"servers\""), "{what}: {answers}");
    }
    // A body without an end: its sender has gone.
    let half = format!(
        "POST /secrets/set HTTP/1.1\r\n{good}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    );
    let mut stream = TcpStream::connect(host).await.unwrap();
    stream.write_all(half.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    let _ = timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("the connection is kept");
    assert!(answer.is_empty() || statuses(&answer) == [400], "{answer}");
    unharmed(&api).await;
}

#[tokio::test]
async fn requests_in_a_row_are_answered_in_their_order() {
    let api = started().await;
    let host = api.address().to_owned();
    let call = |text: &str, last: bool| {
        let body = json!({"serverName": "echo", "methodName": "echo", "args": {"text": text}}).to_string();
        let close = if last { "Connection: close\r\n" } else { "" };
        format!(
            "POST /mcp/tool/call HTTP/1.1\r\nHost: {host}\r\n{close}Content-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    // All of it is there before anything is answered; one in the middle is refused before its body was read.
    let wrong = format!(
        "POST /secrets/set HTTP/1.1\r\nHost: {host}\r\nContent-Type: text/plain\r\nContent-Length: 46\r\n\r\nGET /mcp/servers HTTP/1.1\r\nHost: localhost\r\n\r\n"
    );
    let requests = [call("one", false), wrong, call("two", false), call("three", true), call("four", false)];
    let mut stream = TcpStream::connect(&host).await.unwrap();
    stream.write_all(requests.concat().as_bytes()).await.unwrap();
    let mut answers = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answers)).await.expect("it closes after the last one");
    let answers = String::from_utf8_lossy(&answers).into_owned();
    assert_eq!(statuses(&answers), [200, 415, 200, 200], "{answers}");
    let order: Vec<_> =
        ["one", "two", "three"].iter().map(|text| answers.find(&format!(r#""text":"{text}""#))).collect();
    assert!(order.iter().all(Option::is_some) && order.is_sorted(), "{answers}");
    assert!(!answers.contains("four"), "{answers}");
    // Old clients say which version they speak, and get one answer.
    let old = format!(
        "GET /healthz HTTP/1.0\r\nHost: {host}\r\n\r\nGET /mcp/servers HTTP/1.0\r\nHost: {host}\r\n\r\n"
    );
    let answers = all(&api, old.as_bytes()).await;
    assert_eq!(answers.matches("HTTP/1.").count(), 1, "{answers}");
    assert!(answers.contains("200 OK"), "{answers}");
    api.send(api.request(Method::GET, "/mcp/servers/echo")).await.ok();
    unharmed(&api).await;
}
