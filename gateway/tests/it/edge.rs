//! The HTTP edge: what is refused, in which words, and that nothing a client sends does more than that.

use reqwest::{Method, header};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::deployment::{Answer, Deployment, PATIENCE};

#[path = "edge/bodies.rs"]
mod bodies;
#[path = "edge/heads.rs"]
mod heads;
#[path = "edge/names.rs"]
mod names;
#[path = "edge/pace.rs"]
mod pace;
#[path = "edge/pages.rs"]
mod pages;
#[path = "edge/smuggling.rs"]
mod smuggling;
#[path = "edge/tls.rs"]
mod tls;

/// Every route of the program with the methods that it has, as `Allow` lists them.
const ROUTES: &[(&str, &[&str])] = &[
    ("/fleet", &["GET", "HEAD"]),
    ("/healthz", &["GET", "HEAD"]),
    ("/readyz", &["GET", "HEAD"]),
    ("/mcp/tool/call", &["POST"]),
    ("/mcp/tools", &["GET", "HEAD"]),
    ("/mcp/servers", &["GET", "HEAD", "POST"]),
    ("/mcp/servers/{name}", &["GET", "HEAD", "PUT", "DELETE"]),
    ("/mcp/servers/{name}/enable", &["PUT"]),
    ("/mcp/servers/{name}/disable", &["PUT"]),
    ("/mcp/servers/{name}/delete-impact", &["GET", "HEAD"]),
    ("/secrets/set", &["POST"]),
    ("/secrets/delete", &["POST"]),
];

/// Routes that read a JSON body, with a method.
const BODIES: &[(&str, &str)] = &[
    ("POST", "/mcp/tool/call"),
    ("POST", "/mcp/servers"),
    ("PUT", "/mcp/servers/echo"),
    ("POST", "/secrets/set"),
    ("POST", "/secrets/delete"),
    ("PUT", "/admin/log"),
];

/// The most of a client's words that an answer may repeat.
const ECHOED: usize = 64;

fn method(name: &str) -> Method {
    Method::from_bytes(name.as_bytes()).unwrap()
}

/// A deployment with one server, and what must be true after anything that was sent to it.
async fn started() -> Deployment {
    let api = Deployment::start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    api
}

async fn unharmed(api: &Deployment) {
    assert_eq!(api.call("echo", "echo", json!({"text": "still here"})).await.tool_text(), "still here");
    let log = api.log();
    assert!(!log.contains("panicked"), "{log}");
    assert!(!log.contains("internal error"), "{log}");
}

/// Sends bytes as they are and reads what comes back until the other side closes or falls silent.
async fn raw(api: &Deployment, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(api.address()).await.unwrap();
    // The other side may close before everything is written, and answer all the same.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match timeout(PATIENCE, stream.read(&mut chunk)).await.expect("no answer") {
            Ok(0) | Err(_) => break,
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
        }
        if complete(&answer) {
            break;
        }
    }
    String::from_utf8(answer).unwrap()
}

/// Whether an answer with a length is there whole.
fn complete(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    length.is_some_and(|length| length.parse().is_ok_and(|length: usize| body.len() >= length))
}

#[track_caller]
fn raw_fails(answer: &str, status: u16, code: &str) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    assert!(answer.contains(&format!(r#""code":"{code}""#)), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("x-request-id: "), "{answer}");
}

/// Sends a body to a route of [`BODIES`].
async fn send_body(api: &Deployment, route: (&str, &str), body: impl Into<reqwest::Body>) -> Answer {
    let request = api.request(method(route.0), route.1).header(header::CONTENT_TYPE, "application/json");
    api.send(request.body(body)).await
}
