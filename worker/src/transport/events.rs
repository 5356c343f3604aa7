//! A stream of server-sent events, bounded in size and in how long a line may take.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream::BoxStream};
use mcp_shared::limits;
use reqwest::Response;
use sse_stream::{Error, Sse, SseStream};
use tokio::time::{Instant, timeout};

use super::turns::Turns;

/// Bytes of one event.
const EVENT_BYTES: usize = limits::LINE_BYTES;
/// The shortest pause before a stream is taken up again.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);

/// Why a stream has no next event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// It ended, or the connection did.
    Ended,
    /// It has more bytes than it may.
    TooLarge,
    /// It is not a stream of events.
    Malformed,
    /// A line was begun and did not end for too long.
    Stalled,
}

/// What is counted while bytes pass.
struct Meter {
    /// Bytes of the whole stream that are left.
    left: AtomicUsize,
    /// Bytes since the last event.
    since_event: AtomicUsize,
    /// Since when a line is unfinished.
    unfinished: Mutex<Option<Instant>>,
}

/// What the byte stream ends with when it has become too long.
#[derive(Debug, thiserror::Error)]
#[error("too many bytes")]
struct TooMany;

impl Meter {
    fn count(&self, chunk: &Bytes) -> io::Result<()> {
        let less = |left: usize| left.checked_sub(chunk.len());
        let counted = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        let since = self.since_event.fetch_add(chunk.len(), Ordering::Relaxed) + chunk.len();
        if counted.is_err() || since > EVENT_BYTES {
            return Err(io::Error::other(TooMany));
        }
        let mut unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        match chunk.last() {
            Some(b'\n' | b'\r') => *unfinished = None,
            // A line break inside of the chunk began another line.
            Some(_) if memchr::memchr2(b'\n', b'\r', chunk).is_some() => *unfinished = Some(Instant::now()),
            Some(_) => {
                unfinished.get_or_insert_with(Instant::now);
            }
            None => {}
        }
        Ok(())
    }

    fn stalled(&self, limit: Duration) -> bool {
        let unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        unfinished.is_some_and(|since| since.elapsed() >= limit)
    }
}

/// The events of one answer.
pub struct Events {
    stream: BoxStream<'static, Result<Sse, Error>>,
    meter: Arc<Meter>,
    /// How long a line may take.
    stall: Duration,
    turns: Turns,
}

impl Events {
    /// The events of an answer that may have `most` bytes in all.
    pub fn of(response: Response, most: usize) -> Self {
        Self::new(
            response.bytes_stream().map(|chunk| chunk.map_err(io::Error::other)),
            most,
            limits::REMOTE_STALL,
        )
    }

    fn new(
        bytes: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
        most: usize,
        stall: Duration,
    ) -> Self {
        let meter = Arc::new(Meter {
            left: AtomicUsize::new(most),
            since_event: AtomicUsize::new(0),
            unfinished: Mutex::default(),
        });
        let counter = Arc::clone(&meter);
        let counted = bytes.map(move |chunk: io::Result<Bytes>| {
            let chunk = chunk?;
            counter.count(&chunk)?;
            io::Result::Ok(chunk)
        });
        let stream = SseStream::from_bytes_stream(counted.fuse()).boxed();
        Self { stream, meter, stall, turns: Turns::default() }
    }

    /// The next event.
    pub async fn next(&mut self) -> Result<Sse, Broken> {
        loop {
            match timeout(self.stall / 4, self.stream.next()).await {
                Ok(Some(Ok(event))) => {
                    let bytes = self.meter.since_event.swap(0, Ordering::Relaxed);
                    // Those that came with others have no bytes of their own here.
                    self.turns.took(bytes).await;
                    return Ok(event);
                }
                Ok(Some(Err(Error::Body(error)))) => {
                    return Err(match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
                        Some(inner) if inner.is::<TooMany>() => Broken::TooLarge,
                        _ => Broken::Ended,
                    });
                }
                Ok(Some(Err(_))) => return Err(Broken::Malformed),
                Ok(None) => return Err(Broken::Ended),
                // Silence is no fault: a tool may take its time.
                Err(_) if self.meter.stalled(self.stall) => return Err(Broken::Stalled),
                Err(_) => {}
            }
        }
    }
}

/// A pause that the other side asks for before the stream is taken up again, within reason: without any, a
/// server could have us ask it as fast as both can.
pub fn asked_pause(event: &Sse) -> Option<Duration> {
    event.retry.map(|millis| Duration::from_millis(millis).clamp(SHORTEST_PAUSE, Duration::from_secs(60)))
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn events(parts: &[&'static str], most: usize) -> Events {
        let parts: Vec<_> = parts.iter().map(|part| Ok(Bytes::from_static(part.as_bytes()))).collect();
        Events::new(stream::iter(parts), most, Duration::from_secs(60))
    }

    #[tokio::test]
    async fn events_come_whole_however_they_are_cut() {
        let mut events =
            events(&["id: 1\r\nda", "ta: {\"a\"", ":1}\r\n\r\n: ping\n\nretry: 500\ndata: x\n\n"], 1_000);
        let first = events.next().await.unwrap();
        assert_eq!((first.id.as_deref(), first.data.as_deref()), (Some("1"), Some("{\"a\":1}")));
        let second = events.next().await.unwrap();
        assert_eq!(
            (second.data.as_deref(), asked_pause(&second)),
            (Some("x"), Some(Duration::from_millis(500)))
        );
        assert_eq!(events.next().await.err(), Some(Broken::Ended));
    }

    #[tokio::test]
    async fn what_is_too_long_or_no_stream_of_events_ends_it() {
        let mut long = events(&["data: 0123456789", "0123456789", "\n\n"], 20);
        assert_eq!(long.next().await.err(), Some(Broken::TooLarge));
        let mut page = events(&["<html>\n", "</html>\n\n"], 1_000);
        assert_eq!(page.next().await.err(), Some(Broken::Malformed));
        let mut comments = events(&[": x\n\n"; 10], 30);
        assert_eq!(comments.next().await.err(), Some(Broken::TooLarge));
    }

    #[tokio::test]
    async fn a_line_that_does_not_end_is_given_up_and_silence_is_not() {
        let stall = Duration::from_millis(200);
        let drip = stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Some((Ok(Bytes::from_static(b"d")), ()))
        });
        assert_eq!(Events::new(drip, 1_000_000, stall).next().await.err(), Some(Broken::Stalled));
        let slow = stream::once(async move {
            tokio::time::sleep(4 * stall).await;
            Ok(Bytes::from_static(b"data: x\n\n"))
        });
        assert!(Events::new(slow, 1_000, stall).next().await.is_ok());
    }
}
