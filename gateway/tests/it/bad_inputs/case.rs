//! One bad input of the list, and what is true of every answer to one.

use std::collections::HashSet;

use mcp_shared::error::ErrorCode;

use super::request::{Received, Request};

/// The most of a client's words that an answer may repeat.
const ECHOED: usize = 64;
/// The most bytes of an answer.
const ANSWER_BYTES: usize = 1_024;
/// How much of a request is compared with what came back.
const COMPARED: usize = 256 * 1_024;
/// What callers are told when something of ours is away. No other fault is ours to have.
const AWAY: [&str; 3] = ["no_worker", "bus_unavailable", "store_unavailable"];

/// Which of the two deployments a case is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It permits no private address.
    Guarded,
    /// It may connect to this machine, and has a login and an installation under way.
    Busy,
}

/// What must come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// A status and a code, in a document.
    Refused(u16, &'static str),
    /// A status without a document: the HTTP parser could not read as far as a request.
    Unread(u16),
    /// It is no bad input after all.
    Fine,
    /// The call was made, and the server itself says that it is wrong.
    Told,
}

/// A bad input.
pub struct Case {
    /// Its row in the list: a number, or `extra`.
    pub row: &'static str,
    /// What is sent, in a few words.
    pub name: String,
    /// Where to.
    pub place: Place,
    /// The request.
    pub request: Request,
    /// What must come back.
    pub expected: Expected,
    /// A header that must be there, and what it must say; an empty text stands for anything.
    pub header: Option<(&'static str, String)>,
}

/// The cases of one row.
pub struct Row {
    number: &'static str,
    place: Place,
    cases: Vec<Case>,
}

impl Row {
    /// A row without cases.
    pub fn new(number: &'static str) -> Self {
        Self { number, place: Place::Guarded, cases: Vec::new() }
    }

    /// Its further cases are for a deployment.
    pub fn at(mut self, place: Place) -> Self {
        self.place = place;
        self
    }

    /// Adds an input that is refused.
    pub fn refused(self, name: impl Into<String>, request: Request, status: u16, code: &'static str) -> Self {
        self.add(name, request, Expected::Refused(status, code))
    }

    /// Adds an input that is good.
    pub fn fine(self, name: impl Into<String>, request: Request) -> Self {
        self.add(name, request, Expected::Fine)
    }

    /// Adds an input with anything that may come back.
    pub fn add(mut self, name: impl Into<String>, request: Request, expected: Expected) -> Self {
        let (row, place, name) = (self.number, self.place, name.into());
        self.cases.push(Case { row, name, place, request, expected, header: None });
        self
    }

    /// The answer to the last case has this header.
    pub fn with(mut self, header: &'static str, value: impl Into<String>) -> Self {
        self.cases.last_mut().unwrap().header = Some((header, value.into()));
        self
    }

    /// Its cases.
    pub fn cases(self) -> Vec<Case> {
        self.cases
    }
}

impl Case {
    /// What is wrong with an answer; nothing, if it is as it should be.
    pub fn faults(&self, host: &str, received: &Received) -> Vec<String> {
        let mut faults = Vec::new();
        let mut must = |so: bool, what: String| {
            if !so {
                faults.push(what);
            }
        };
        let answers = received.text.matches("HTTP/1.1 ").count();
        must(answers <= 1, format!("{answers} answers"));
        let document = received.json();
        let code =
            document.as_ref().and_then(|document| document["code"].as_str()).unwrap_or_default().to_owned();
        let away = received.status == 503 && AWAY.contains(&code.as_str());
        // The list itself has this one: the address is known when it is connected to.
        let blocked = (received.status, code.as_str()) == (502, "blocked_address");
        must(received.status < 500 || away || blocked, format!("status {}", received.status));
        if let Some((name, value)) = &self.header {
            let said = received.header(name);
            must(said.is_some_and(|said| value.is_empty() || said == value), format!("{name}: {said:?}"));
        }
        let (status, wanted) = match self.expected {
            Expected::Refused(status, code) => (status, code),
            Expected::Unread(status) => {
                // What is too large may be cut off in the middle of sending it.
                let cut_off = received.text.is_empty() && self.request.bytes(host).len() > COMPARED;
                must(received.status == status || cut_off, format!("not {status}"));
                must(received.body.is_empty(), "a body".to_owned());
                return faults;
            }
            Expected::Fine | Expected::Told => {
                must(received.status == 200, "not 200".to_owned());
                let told = document.is_some_and(|document| document["data"]["isError"] == true);
                must(told == (self.expected == Expected::Told), "told otherwise".to_owned());
                return faults;
            }
        };
        must((received.status, code.as_str()) == (status, wanted), format!("not {status} {wanted}"));
        must(received.body.len() < ANSWER_BYTES, format!("{} bytes", received.body.len()));
        let Some(document) = document else {
            must(false, "no document".to_owned());
            return faults;
        };
        let known = ErrorCode::ALL.iter().any(|known| known.as_str() == code);
        must(known, format!("the code {code}"));
        must(document["success"] == false, "success".to_owned());
        must(document["error"].as_str().is_some_and(|text| !text.is_empty()), "no sentence".to_owned());
        must(document["retryable"].is_boolean(), "no retryable".to_owned());
        let id = document["requestId"].as_str();
        must(id.is_some() && id == received.header("x-request-id"), format!("the request's id {id:?}"));
        let kind = received.header("content-type").unwrap_or_default();
        must(kind.starts_with("application/json"), format!("the type {kind}"));
        if self.request.is_call() {
            must(document["outcome"] == "not_started", format!("the outcome {}", document["outcome"]));
        }
        let comes_back = matches!(status, 429 | 503);
        must(!comes_back || received.header("retry-after").is_some(), "no Retry-After".to_owned());
        let sent = self.request.bytes(host);
        let longest = echo(&sent[..sent.len().min(COMPARED)], received.body.as_bytes());
        must(longest.is_none(), format!("repeats {longest:?}"));
        faults
    }
}

/// More characters of what was sent than an answer may repeat.
fn echo(sent: &[u8], answer: &[u8]) -> Option<String> {
    let said: HashSet<&[u8]> = answer.windows(ECHOED + 1).collect();
    let found = sent.windows(ECHOED + 1).find(|window| said.contains(window));
    found.map(|found| String::from_utf8_lossy(found).into_owned())
}
