//! A connection over a child's standard input and output: one task that writes, one that reads.

use std::sync::Arc;

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroize;

use super::{
    connection::{Connection, Failure, Frame},
    lines::{Line, Lines},
    turns::Turns,
};
use crate::logs::Log;

/// Small frames are joined into writes of about this size.
const WRITE: usize = 64 * 1024;
/// Frames that are joined.
const JOINED: usize = 64;

/// Starts the two tasks of a connection on the tracker.
pub fn open(
    input: impl AsyncWrite + Send + Unpin + 'static,
    output: impl AsyncRead + Send + Unpin + 'static,
    log: Arc<Log>,
    tasks: &TaskTracker,
) -> Connection {
    let (connection, queue) = Connection::new(log);
    tasks.spawn(write(input, queue, connection.clone()));
    tasks.spawn(read(output, connection.clone()));
    connection
}

/// Ends the use of a connection whose reader or writer is gone, however that came about: one that fell over
/// a fault of ours must not leave calls waiting for what nobody reads.
struct Gone(Connection);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.break_off();
    }
}

/// Writes frames, small ones joined. Ends with the connection, which drops the child's input.
async fn write(mut input: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Frame>, connection: Connection) {
    let close: CancellationToken = connection.input_closing();
    let _gone = Gone(connection);
    let mut frames = Vec::with_capacity(JOINED);
    let mut buffer = Vec::with_capacity(WRITE);
    let work = async {
        while queue.recv_many(&mut frames, JOINED).await > 0 {
            // Whoever else is ready to run may have something to write as well: a write for each frame costs the
            // server that reads it as much as this process.
            tokio::task::yield_now().await;
            while frames.len() < JOINED
                && let Ok(frame) = queue.try_recv()
            {
                frames.push(frame);
            }
            let mut secret = false;
            for frame in frames.drain(..) {
                let Some(payload) = frame.into_payload() else { continue };
                if buffer.len() + payload.bytes.len() > WRITE && !buffer.is_empty() {
                    input.write_all(&buffer).await?;
                    empty(&mut buffer, secret);
                }
                if payload.bytes.len() > WRITE {
                    input.write_all(&payload.bytes).await?;
                } else {
                    secret |= payload.secret;
                    buffer.extend_from_slice(&payload.bytes);
                }
            }
            input.write_all(&buffer).await?;
            empty(&mut buffer, secret);
        }
        std::io::Result::Ok(())
    };
    tokio::select! {
        () = close.cancelled() => {}
        // A broken pipe: usually the process has ended, and the reader sees that too.
        _ = work => {}
    }
}

/// Empties the buffer. Wiping costs time for every byte, so it is done where it must be.
fn empty(buffer: &mut Vec<u8>, secret: bool) {
    if secret {
        buffer.as_mut_slice().zeroize();
    }
    buffer.clear();
}

/// Reads lines and hands out what they say, until the output ends.
async fn read(output: impl AsyncRead + Unpin, connection: Connection) {
    let (mut lines, mut turns) = (Lines::new(output), Turns::default());
    let _gone = Gone(connection.clone());
    loop {
        // A helper that outlives its server may keep the other end open for ever.
        let next = tokio::select! {
            next = lines.next() => next,
            () = connection.closed() => break,
        };
        match next {
            Ok(Some(Line::Whole(line))) => {
                let length = line.len();
                connection.take(line, None).await;
                turns.took(length).await;
            }
            Ok(Some(Line::TooLong(id))) => {
                connection.log().note("a line on standard output was too long and was skipped");
                if let Some(id) = id {
                    connection.resolve(id, Err(Failure::TooLarge));
                }
            }
            Ok(Some(Line::Endless(id))) => {
                connection.log().note("a line on standard output did not end; the process is stopped");
                if let Some(id) = id {
                    connection.resolve(id, Err(Failure::TooLarge));
                }
                break;
            }
            Ok(None) | Err(_) => break,
        }
    }
    connection.end_output();
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        pin::Pin,
        task::{Context, Poll},
        time::Duration,
    };

    use tokio::io::ReadBuf;

    use super::*;

    /// Something that a fault of ours hides in.
    struct Faulty;

    impl AsyncRead for Faulty {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            panic!("on purpose")
        }
    }

    impl AsyncWrite for Faulty {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            panic!("on purpose")
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_panic_in_a_connection_ends_it_and_nothing_else() {
        let tasks = TaskTracker::new();
        let patience = Duration::from_secs(20);
        let reads = open(tokio::io::sink(), Faulty, Arc::default(), &tasks);
        tokio::time::timeout(patience, reads.broken()).await.unwrap();
        assert!(!reads.is_open());
        let (silent, _kept) = tokio::io::duplex(16);
        let writes = open(Faulty, silent, Arc::default(), &tasks);
        assert!(writes.is_open());
        writes.notify("notifications/initialized", None).await.unwrap();
        tokio::time::timeout(patience, writes.broken()).await.unwrap();
    }
}
