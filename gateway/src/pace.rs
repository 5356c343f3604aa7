//! The pace of a connection: a client may be silent between two requests for a good while, as balancers and pools
//! are, but a head that has begun has to end soon.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use mcp_shared::limits;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

/// Whether a request of the connection is being served: from its whole head until its body is taken in and its
/// answer is sent.
#[derive(Debug, Clone, Default)]
pub struct Serving(Arc<State>);

#[derive(Debug, Default)]
struct State {
    holds: AtomicUsize,
    /// Heads that have come whole.
    heads: AtomicU64,
}

impl Serving {
    /// A head has come whole. What is read is its body, or waits for its answer, until nobody has the hold any more.
    pub fn begin(&self) -> Hold {
        self.0.heads.fetch_add(1, Ordering::AcqRel);
        self.0.holds.fetch_add(1, Ordering::AcqRel);
        Hold(Arc::clone(&self.0))
    }

    fn is_set(&self) -> bool {
        self.0.holds.load(Ordering::Acquire) > 0
    }

    fn heads(&self) -> u64 {
        self.0.heads.load(Ordering::Acquire)
    }
}

/// Says that a request is being served, until it is dropped.
#[derive(Debug)]
pub struct Hold(Arc<State>);

impl Clone for Hold {
    fn clone(&self) -> Self {
        self.0.holds.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.holds.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The body of a request or of its answer.
#[derive(Debug)]
pub struct Held<B> {
    body: B,
    _hold: Hold,
}

impl<B> Held<B> {
    /// A body that has the request served as long as it is there.
    pub fn new(body: B, hold: Hold) -> Self {
        Self { body, _hold: hold }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Held<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that ends when a head takes too long.
pub struct Paced<S> {
    stream: S,
    serving: Serving,
    /// Heads that had come whole when something was read last.
    heads: u64,
    /// When the head began that is being read: its first byte, or the connection.
    began: Option<Instant>,
    /// Wakes the connection when that is too long ago; made only when a head comes in parts.
    due: Option<Pin<Box<Sleep>>>,
}

impl<S> Paced<S> {
    /// Watches over a connection.
    pub fn new(stream: S, serving: Serving) -> Self {
        Self { stream, serving, heads: 0, began: Some(Instant::now()), due: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(context, buffer);
        let heads = this.serving.heads();
        if heads != this.heads {
            // The head that was being read is here.
            (this.heads, this.began, this.due) = (heads, None, None);
        }
        if this.serving.is_set() {
            return read;
        }
        if buffer.filled().len() > before {
            this.began.get_or_insert_with(Instant::now);
        }
        let (Poll::Pending, Some(began)) = (&read, this.began) else { return read };
        let end = began + limits::HEADER_TIMEOUT;
        let due = this.due.get_or_insert_with(|| Box::pin(sleep_until(end)));
        match due.as_mut().poll(context) {
            Poll::Ready(()) => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the head took too long")))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
