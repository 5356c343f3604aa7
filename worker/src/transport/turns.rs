//! Turns: a server that floods has its messages read, and everybody else's work goes on meanwhile.
//!
//! A task gives way only when it has to wait, and what a flooding server sends is always there already. The
//! runtime's own measure are reads, each of which may bring thousands of messages.

use tokio::task::yield_now;

/// Bytes that are worked off in one turn: about half a millisecond's work.
const TURN: usize = 64 * 1024;
/// What a message costs besides its bytes, in bytes.
const MESSAGE: usize = 64;

/// Counts what was worked off in this turn.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    done: usize,
}

impl Turns {
    /// So many bytes were worked off. Waits for the next turn when that was enough.
    pub(crate) async fn took(&mut self, bytes: usize) {
        self.done += bytes + MESSAGE;
        if self.done >= TURN {
            self.done = 0;
            yield_now().await;
        }
    }
}
