//! Just enough of HTTP/1.1 for servers of tests: by hand, so that they can also answer wrongly.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::TcpStream,
    time::Duration,
};

use url::form_urlencoded;

/// The most that a request of a test may have.
const BODY_BYTES: usize = 64 * 1024 * 1024;
const HEAD_BYTES: u64 = 256 * 1024;

/// A request as it came.
#[derive(Debug, Clone, Default)]
pub(super) struct Request {
    pub(super) method: String,
    /// Without the query, as it was spelled.
    pub(super) path: String,
    pub(super) query: String,
    /// Names in lower case, in their order.
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Request {
    /// Reads the next request of a connection; `None` at its end, or when it is none.
    pub(super) fn read(stream: &mut BufReader<TcpStream>) -> Option<Self> {
        let mut head = stream.by_ref().take(HEAD_BYTES);
        let mut line = String::new();
        head.read_line(&mut line).ok().filter(|read| *read > 0)?;
        let mut words = line.split_whitespace();
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let mut request = Self { method, path: path.to_owned(), query: query.to_owned(), ..Self::default() };
        loop {
            let mut line = String::new();
            head.read_line(&mut line).ok().filter(|read| *read > 0)?;
            match line.trim_end() {
                "" => break,
                line => {
                    let (name, value) = line.split_once(':')?;
                    request.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
                }
            }
        }
        if request.header("transfer-encoding").is_some() {
            request.body = read_chunks(stream)?;
        } else if let Some(length) = request.header("content-length") {
            let length: usize = length.parse().ok().filter(|length| *length <= BODY_BYTES)?;
            request.body.resize(length, 0);
            stream.read_exact(&mut request.body).ok()?;
        }
        Some(request)
    }

    /// The value of a header.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The parameters of the query, decoded.
    pub(super) fn query(&self) -> Vec<(String, String)> {
        pairs(self.query.as_bytes())
    }

    /// The fields of a form in the body, decoded.
    pub(super) fn form(&self) -> Vec<(String, String)> {
        pairs(&self.body)
    }
}

fn pairs(text: &[u8]) -> Vec<(String, String)> {
    form_urlencoded::parse(text).into_owned().collect()
}

fn read_chunks(stream: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        stream.by_ref().take(HEAD_BYTES).read_line(&mut line).ok()?;
        let size = usize::from_str_radix(line.trim().split(';').next()?, 16).ok()?;
        let from = body.len();
        if from + size > BODY_BYTES {
            return None;
        }
        body.resize(from + size, 0);
        stream.read_exact(&mut body[from..]).ok()?;
        let mut end = [0; 2];
        stream.read_exact(&mut end).ok()?;
        if size == 0 {
            return Some(body);
        }
    }
}

/// The head of an answer, up to the empty line.
pub(super) fn head(status: u16, headers: &[(&str, &str)]) -> String {
    let mut head = format!("HTTP/1.1 {status} Answer\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    head
}

/// Writes an answer with a body of known length.
pub(super) fn respond(
    stream: &mut impl Write,
    status: u16,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<()> {
    let length = body.len().to_string();
    let mut all = headers.to_vec();
    // No answer of 204 may say how long its body is.
    if status != 204 {
        all.push(("content-length", &length));
    }
    let mut bytes = head(status, &all).into_bytes();
    bytes.extend_from_slice(body);
    stream.write_all(&bytes)
}

/// Status, headers and body of an answer.
pub(super) type Fetched = (u16, Vec<(String, String)>, String);

/// Sends a request on a connection of its own and reads to the end of that.
pub(super) fn fetch(address: &str, request: &str) -> io::Result<Fetched> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap_or(0);
    let headers = lines.filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()));
    Ok((status, headers.collect(), body.to_owned()))
}
