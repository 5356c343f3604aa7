//! What becomes of a server's messages, and of what it sends that nobody asked for.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mcp_shared::{json::RawJson, limits, metrics, worker_api::CallEvent};
use tokio::sync::mpsc::error::TrySendError;

use super::{Connection, Failure, Frame, Shared};
use crate::{
    logs::Log,
    transport::message::{self, Message},
};

/// Lines that are not JSON-RPC and still go to the server's log: banners are worth seeing, floods not.
const BANNER_LINES: u64 = 50;

/// Counts what a server sends that nobody asked for, and sees when that becomes a flood. Nothing of it is kept or
/// queued, so that it costs the time to read it and no memory.
#[derive(Default)]
pub(super) struct Noise {
    ignored: AtomicU64,
    lines: Rate,
    progress: Rate,
}

/// How often something happened in the current second.
#[derive(Default)]
struct Rate(Mutex<Window>);

#[derive(Default)]
struct Window {
    start: Option<Instant>,
    count: u32,
    /// Whether there were too many before.
    exceeded: bool,
}

/// What one more of its kind is.
#[derive(PartialEq, Eq)]
enum Verdict {
    Fine,
    /// Too many, for the first time.
    Flood,
    /// Too many, again.
    More,
}

impl Rate {
    fn count(&self, limit: u32) -> Verdict {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if window.start.is_none_or(|start| now - start >= Duration::from_secs(1)) {
            (window.start, window.count) = (Some(now), 0);
        }
        window.count = window.count.saturating_add(1);
        if window.count <= limit {
            Verdict::Fine
        } else if std::mem::replace(&mut window.exceeded, true) {
            Verdict::More
        } else {
            Verdict::Flood
        }
    }
}

impl Noise {
    /// Counts an answer that nobody waits for, or the like.
    pub(super) fn ignore(&self) {
        self.ignored.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes in a line that is no message. That it comes says nothing about the server's answers, so the process
    /// stays; whoever runs it is told.
    fn line(&self, line: &[u8], log: &Log) {
        if self.ignored.fetch_add(1, Ordering::Relaxed) < BANNER_LINES && !line.is_empty() {
            log.push(line);
        }
        if self.lines.count(limits::NOISE_PER_SECOND) == Verdict::Flood {
            let limit = limits::NOISE_PER_SECOND;
            log.note(&format!(
                "it writes more than {limit} lines a second to its standard output that are no messages; logs \
                 belong to standard error"
            ));
        }
    }

    /// Whether a progress report is passed on.
    fn lets_progress_pass(&self, log: &Log) -> bool {
        let verdict = self.progress.count(limits::PROGRESS_PER_SECOND);
        if verdict == Verdict::Flood {
            let limit = limits::PROGRESS_PER_SECOND;
            log.note(&format!("it reports progress more than {limit} times a second; the rest is dropped"));
        }
        verdict == Verdict::Fine
    }

    /// Says at the end how much there was.
    pub(super) fn sum_up(&self, log: &Log) {
        let ignored = self.ignored.load(Ordering::Relaxed);
        if ignored > BANNER_LINES {
            log.note(&format!("{ignored} of its messages and lines meant nothing and were ignored"));
        }
    }
}

impl Connection {
    pub(super) fn handle(&self, message: Message, line: &[u8]) {
        let shared = &self.shared;
        match message {
            Message::Response { id, body } => {
                let answer = match body {
                    Some(Ok(result)) if result.as_bytes().len() > limits::RESULT_BYTES => {
                        Err(Failure::TooLarge)
                    }
                    Some(Ok(result)) => Ok(result),
                    Some(Err(error)) => Err(Failure::Rpc(error)),
                    None => Err(Failure::Malformed),
                };
                shared.resolve(id, answer);
            }
            Message::Unreadable { id } => shared.resolve(id, Err(Failure::Unreadable)),
            Message::Notification { method, params } => match method.as_str() {
                "notifications/progress" => {
                    if let Some(params) = params {
                        report_progress(shared, params);
                    }
                }
                "notifications/tools/list_changed" => shared.tools_changed.notify_one(),
                _ => {}
            },
            Message::Request { id, method } => {
                let frame = Frame::Plain(message::answer(&id, &method));
                // A server that asks without reading the answers gets none.
                let _ = self.outbox.try_send(frame);
            }
            Message::Garbage => {
                shared.noise.line(line, &shared.log);
            }
        }
    }
}

/// Hands progress to the call whose token it carries. A slow reader loses progress, never the result.
fn report_progress(shared: &Shared, params: RawJson) {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Progress {
        progress_token: u64,
    }
    if params.as_bytes().len() > limits::PROGRESS_BYTES || !shared.noise.lets_progress_pass(&shared.log) {
        return shared.ignore();
    }
    let Ok(progress) = params.read::<Progress>() else { return shared.ignore() };
    if let Some(sender) =
        shared.table().waiting.get(&progress.progress_token).and_then(|one| one.progress.as_ref())
    {
        // A copy: a slow reader would keep the whole of what was read with it.
        let copy = RawJson::from_parsed(bytes::Bytes::copy_from_slice(params.as_bytes()));
        if let Err(TrySendError::Full(_)) = sender.try_send(CallEvent::Progress(copy)) {
            metrics::count_dropped_progress();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_seen_once_and_dropped_as_long_as_it_lasts() {
        let rate = Rate::default();
        let fine = (0..5).filter(|_| rate.count(3) == Verdict::Fine).count();
        assert_eq!(fine, 3);
        assert!(rate.count(3) == Verdict::More);
        rate.0.lock().unwrap().start = Instant::now().checked_sub(Duration::from_secs(1));
        assert!(rate.count(3) == Verdict::Fine);
    }
}
