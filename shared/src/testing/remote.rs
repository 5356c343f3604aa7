//! A hand-written remote MCP server, made to behave and to misbehave: the tools of [`super::fixture`] over
//! streamable HTTP, in both of its eras, and over the older HTTP+SSE. Every session is one of that
//! fixture's servers, so that a session's memory is its own.
//!
//! It runs as a process ([`Remote`]), which a test can kill and start again on the same port. Its flags come
//! behind `--http PORT` (0: any); flags that it does not know are the fixture's.
//!
//! | flag | effect |
//! |---|---|
//! | `--era 2025\|stateless\|both\|sse-only` | what it speaks (`2025`) |
//! | `--answer json\|sse` | how answers to POST come (`sse`) |
//! | `--unknown-session STATUS` | the answer to a session that it does not know (404) |
//! | `--no-get`, `--no-delete` | answers 405 to these methods |
//! | `--no-session` | gives no session ids: one session for all |
//! | `--session-file P` | sessions and what they remember outlive the process |
//! | `--resumable` | streams have event ids and a `retry:`, and can be taken up again |
//! | `--retry-ms N` | that `retry:` (100) |
//! | `--drop clean\|abrupt` | with `--resumable`: the stream of each call ends before its answer |
//! | `--sse-post STATUS` | with `sse-only`: the answer to POST where the stream is (405) |
//! | `--auth ISSUER` | wants tokens that this authorization server knows |
//! | `--bare-challenge` | says nothing of its metadata in its 401 |
//! | `--metadata-at root\|path\|none` | where its protected-resource metadata is (`path`) |
//! | `--resource URL` | the `resource` of that metadata, where it is not its own |
//! | `--scope S` | the scope that tokens must have; others get 403 |
//! | `--delay-ms N` | waits for that time before every answer |
//! | `--requests P` | writes one JSON object per request: `method`, `path`, `headers`, `rpc`, `user` |
//! | `--executed P` | writes a line per executed call: the tool, a space, its arguments |
//! | `--hostile MODE@METHOD` | misbehaves at requests of that JSON-RPC method, or at `GET` |
//! | `--other URL` | where hostile redirects go |
//!
//! The tool `hostile` with the argument `mode` misbehaves in answer to that one call. See `hostile.rs` for
//! the modes.
//!
//! `POST /control/forget` forgets all sessions; `/control/drop` ends all streams; `GET /control/sessions` says
//! how many there are.

use std::time::Duration;

mod answer;
mod guard;
mod hostile;
mod process;
mod server;
mod session;
#[cfg(test)]
mod tests;

pub use process::{Remote, Seen};

/// What is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Era {
    #[default]
    Sessions,
    Stateless,
    Both,
    Sse,
}

/// How a stream ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Drop {
    Clean,
    Abrupt,
}

/// How to behave, from the command line.
#[derive(Debug, Default)]
struct Options {
    port: u16,
    era: Era,
    json: bool,
    unknown_session: u16,
    no_get: bool,
    no_delete: bool,
    no_session: bool,
    session_file: Option<String>,
    resumable: bool,
    retry_ms: u64,
    drop: Option<Drop>,
    sse_post: u16,
    auth: Option<String>,
    bare_challenge: bool,
    metadata_at: String,
    resource: Option<String>,
    scope: Option<String>,
    delay: Duration,
    requests: Option<String>,
    executed: Option<String>,
    hostile: Vec<(String, String)>,
    other: String,
    /// The fixture's own flags.
    tools: Vec<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Self {
            unknown_session: 404,
            retry_ms: 100,
            sse_post: 405,
            metadata_at: "path".to_owned(),
            tools: vec!["--more".to_owned()],
            ..Self::default()
        };
        let mut args = args.iter();
        while let Some(flag) = args.next() {
            let mut value = || args.next().cloned().ok_or_else(|| format!("{flag} needs a value"));
            let number = |text: String| text.parse::<u64>().map_err(|_| format!("{flag} needs a number"));
            let status = |text: String| text.parse::<u16>().map_err(|_| format!("{flag} needs a status"));
            match flag.as_str() {
                "--http" => options.port = status(value()?)?,
                "--era" => {
                    options.era = match value()?.as_str() {
                        "2025" => Era::Sessions,
                        "stateless" => Era::Stateless,
                        "both" => Era::Both,
                        "sse-only" => Era::Sse,
                        other => return Err(format!("unknown era {other}")),
                    }
                }
                "--answer" => options.json = value()? == "json",
                "--unknown-session" => options.unknown_session = status(value()?)?,
                "--no-get" => options.no_get = true,
                "--no-delete" => options.no_delete = true,
                "--no-session" => options.no_session = true,
                "--session-file" => options.session_file = Some(value()?),
                "--resumable" => options.resumable = true,
                "--retry-ms" => options.retry_ms = number(value()?)?,
                "--drop" => {
                    options.drop = Some(if value()? == "clean" { Drop::Clean } else { Drop::Abrupt });
                }
                "--sse-post" => options.sse_post = status(value()?)?,
                "--auth" => options.auth = Some(value()?),
                "--bare-challenge" => options.bare_challenge = true,
                "--metadata-at" => options.metadata_at = value()?,
                "--resource" => options.resource = Some(value()?),
                "--scope" => options.scope = Some(value()?),
                "--delay-ms" => options.delay = Duration::from_millis(number(value()?)?),
                "--requests" => options.requests = Some(value()?),
                "--executed" => options.executed = Some(value()?),
                "--hostile" => {
                    let text = value()?;
                    let (mode, method) = text.split_once('@').unwrap_or((&text, "tools/call"));
                    options.hostile.push((mode.to_owned(), method.to_owned()));
                }
                "--other" => options.other = value()?,
                _ => options.tools.push(flag.clone()),
            }
        }
        Ok(options)
    }
}

/// Serves until the process is killed; returns only if it cannot begin. `args` are the flags of the module's
/// table. It says on standard output on which port it listens.
pub(super) fn run(args: &[String]) -> i32 {
    match Options::parse(args).and_then(server::serve) {
        Ok(never) => match never {},
        Err(error) => {
            super::fixture::complain(&error);
            2
        }
    }
}
