//! Requests as bytes on a connection: most of the bad ones are such that no client library would send them.

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, tcp::OwnedReadHalf},
    time::timeout,
};

use crate::deployment::PATIENCE;

/// A request that is good but for what a case makes of it.
#[derive(Debug, Clone)]
pub struct Request {
    method: &'static str,
    target: String,
    version: &'static str,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
    chunked: bool,
}

impl Request {
    /// A request without a body.
    pub fn new(method: &'static str, target: impl Into<String>) -> Self {
        Self {
            method,
            target: target.into(),
            version: "HTTP/1.1",
            headers: vec![("Host".into(), b"{host}".to_vec()), ("Connection".into(), b"close".to_vec())],
            body: Vec::new(),
            chunked: false,
        }
    }

    /// A request whose body says that it is JSON, and may be anything.
    pub fn body(method: &'static str, target: &str, body: impl Into<Vec<u8>>) -> Self {
        let mut request = Self::new(method, target).header("Content-Type", "application/json");
        request.body = body.into();
        let length = request.body.len().to_string();
        request.header("Content-Length", length)
    }

    /// A request with a document.
    pub fn json(method: &'static str, target: &str, document: &Value) -> Self {
        Self::body(method, target, document.to_string())
    }

    /// A tool call.
    pub fn call(document: &Value) -> Self {
        Self::json("POST", "/mcp/tool/call", document)
    }

    /// Adds a header. `{host}` in its value is the address that it is sent to.
    pub fn header(mut self, name: &str, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Takes a header away.
    pub fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(other, _)| !other.eq_ignore_ascii_case(name));
        self
    }

    /// Sends the body in pieces that say how long they are, and does not say how long all of it is.
    pub fn chunked(self) -> Self {
        let mut request = self.without("Content-Length").header("Transfer-Encoding", "chunked");
        request.chunked = true;
        request
    }

    /// Speaks another version of HTTP.
    pub fn version(mut self, version: &'static str) -> Self {
        self.version = version;
        self
    }

    /// Whether it is a tool call: answers to them say what is known about the call.
    pub fn is_call(&self) -> bool {
        self.target == "/mcp/tool/call"
    }

    /// The request as it is sent.
    pub fn bytes(&self, host: &str) -> Vec<u8> {
        let target = self.target.replace("{host}", host);
        let mut bytes = format!("{} {target} {}\r\n", self.method, self.version).into_bytes();
        for (name, value) in &self.headers {
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(b": ");
            match std::str::from_utf8(value) {
                Ok(text) => bytes.extend_from_slice(text.replace("{host}", host).as_bytes()),
                Err(_) => bytes.extend_from_slice(value),
            }
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"\r\n");
        if self.chunked {
            for piece in self.body.chunks(64 * 1024) {
                bytes.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
                bytes.extend_from_slice(piece);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n\r\n");
        } else {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }

    /// Whether it leaves the connection open, so that only the other side can close it.
    fn stays(&self) -> bool {
        !self.headers.iter().any(|(name, _)| name == "Connection")
    }

    /// Sends it, and waits for the answer; without the header `Connection` until the other side closes.
    pub async fn send(&self, host: &str) -> Received {
        let (read, mut write) = TcpStream::connect(host).await.unwrap().into_split();
        let bytes = self.bytes(host);
        // Who refuses a request may do so before all of it is there, and close the connection.
        let sending = async { write.write_all(&bytes).await };
        let (_, received) = tokio::join!(sending, receive(read, self.stays()));
        received
    }
}

/// What came back.
#[derive(Debug)]
pub struct Received {
    /// The status; 0 if nothing came.
    pub status: u16,
    /// Everything, as text.
    pub text: String,
    /// What stands behind the head.
    pub body: String,
}

impl Received {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let head = self.text.split("\r\n\r\n").next().unwrap_or_default();
        head.lines()
            .skip(1)
            .filter_map(|line| line.split_once(": "))
            .find_map(|(other, value)| other.eq_ignore_ascii_case(name).then_some(value))
    }

    /// The document.
    pub fn json(&self) -> Option<Value> {
        serde_json::from_str(&self.body).ok()
    }
}

/// Reads an answer, and everything behind it if the other side has to close the connection.
async fn receive(mut stream: OwnedReadHalf, to_the_end: bool) -> Received {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    while to_the_end || !is_whole(&bytes) {
        match timeout(2 * PATIENCE, stream.read(&mut chunk)).await.expect("the connection is closed") {
            Ok(0) | Err(_) => break,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
        }
    }
    let text = String::from_utf8(bytes).expect("answers are text");
    let status = text.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default();
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    Received { status, text, body }
}

/// Whether an answer has come as far as it says that it goes.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    length.and_then(|length| length.parse::<usize>().ok()).is_some_and(|length| body.len() >= length)
}
