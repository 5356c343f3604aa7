//! Lines of the log on their way out: whoever logs leaves a line here and goes on, and a thread writes what has
//! gathered.
//!
//! A write for each line costs a busy node as much as a call does, and a reader of the log who is slow would
//! stop every thread that logs. What finds no room is dropped and counted.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing_subscriber::fmt::MakeWriter;

use crate::metrics;

/// Bytes that may wait to be written.
const ROOM: usize = 4 * 1024 * 1024;
/// How long lines gather before they are written together.
const GATHER: Duration = Duration::from_millis(2);
/// Memory that is kept for the next lines.
const KEPT: usize = 256 * 1024;

/// Where lines are left. All clones are the same place.
#[derive(Clone)]
pub(super) struct Lines(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// The writer has something to do.
    work: Condvar,
    /// The writer has written what there was.
    written: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// The writer waits for the first line.
    idle: bool,
    /// Bytes are being written.
    busy: bool,
    /// Somebody waits for all of it to be written.
    hurry: bool,
}

impl Lines {
    /// Lines that a thread of its own writes to `out`, until the process ends.
    pub(super) fn to(out: impl Write + Send + 'static) -> io::Result<Self> {
        let shared =
            Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), written: Condvar::new() });
        let lines = Self(Arc::clone(&shared));
        thread::Builder::new().name("log".to_owned()).spawn(move || shared.write_to(out))?;
        Ok(lines)
    }

    /// Waits until everything that was left here has been written, for `limit` at most.
    pub(super) fn flush(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = self.0.state();
        while !state.waiting.is_empty() || state.busy {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state.hurry = true;
            self.0.work.notify_one();
            state = self.0.written.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn put(&self, line: &[u8]) {
        let mut state = self.0.state();
        if state.waiting.len() + line.len() > ROOM {
            drop(state);
            metrics::count_dropped_line();
            return;
        }
        state.waiting.extend_from_slice(line);
        if std::mem::take(&mut state.idle) {
            drop(state);
            self.0.work.notify_one();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_to(&self, mut out: impl Write) {
        let mut lines = Vec::new();
        loop {
            let mut state = self.state();
            while state.waiting.is_empty() {
                state.idle = true;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.idle = false;
            let gathered = Instant::now() + GATHER;
            while !state.hurry {
                let left = gathered.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                state = self.work.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            (state.hurry, state.busy) = (false, true);
            std::mem::swap(&mut state.waiting, &mut lines);
            drop(state);
            // Nobody can be told that the log cannot be written.
            let _ = out.write_all(&lines).and_then(|()| out.flush());
            lines.clear();
            lines.shrink_to(KEPT);
            self.state().busy = false;
            self.written.notify_all();
        }
    }
}

/// One line: the formatter writes it in one piece.
pub(super) struct Line<'a>(&'a Lines);

impl Write for Line<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line(self)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Writes when it is let.
    struct Gate {
        open: mpsc::Receiver<()>,
        out: mpsc::SyncSender<Vec<u8>>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.open.recv();
            let _ = self.out.send(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn lines_come_out_whole_and_in_order_and_a_flush_waits_for_them() {
        let (open, gate) = mpsc::sync_channel(2_000);
        let (out, written) = mpsc::sync_channel(2_000);
        let lines = Lines::to(Gate { open: gate, out }).unwrap();
        for _ in 0..1_000 {
            open.send(()).unwrap();
        }
        let mut expected = Vec::new();
        for at in 0..1_000 {
            let line = format!("line {at}\n");
            lines.put(line.as_bytes());
            expected.extend_from_slice(line.as_bytes());
        }
        lines.flush(LONG);
        assert_eq!(written.try_iter().flatten().collect::<Vec<_>>(), expected);
        // There is nothing to wait for.
        lines.flush(LONG);
    }

    #[test]
    fn a_reader_who_is_slow_stops_nobody_and_what_finds_no_room_is_left_out() {
        let (open, gate) = mpsc::sync_channel(2_000);
        let (out, written) = mpsc::sync_channel(2_000);
        let lines = Lines::to(Gate { open: gate, out }).unwrap();
        lines.put(b"first\n");
        while !lines.0.state().busy {
            thread::yield_now();
        }
        let line = vec![b'x'; 1024 * 1024];
        for _ in 0..10 {
            lines.put(&line);
        }
        drop(open);
        lines.flush(LONG);
        let out: Vec<u8> = written.try_iter().flatten().collect();
        assert!(out.starts_with(b"first\n"));
        assert_eq!(out.len(), 6 + ROOM / line.len() * line.len());
    }
}
