//! What is kept of a server's standard error, and how secrets are kept out of it.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mcp_shared::limits;
use secrecy::{ExposeSecret, SecretString};

/// How long after a call its secrets are still looked for in what the server writes.
const AFTER_CALL: Duration = Duration::from_secs(10);
/// Shorter values are not looked for: they would blot out ordinary text.
const SHORTEST: usize = 6;

/// The newest lines of one server, without the secrets that it was given.
#[derive(Default)]
pub struct Log {
    lines: Mutex<VecDeque<String>>,
    redactor: Redactor,
}

impl Log {
    /// Adds a line that the server wrote: cut to a length, secrets blotted out.
    pub fn push(&self, line: &[u8]) {
        let text = self.redactor.clean(String::from_utf8_lossy(line).into_owned());
        self.add(cut(text));
    }

    /// Adds a note of our own about the server.
    pub fn note(&self, text: &str) {
        self.add(cut(format!("[mcp-api] {text}")));
    }

    /// The lines, oldest first.
    pub fn lines(&self) -> Vec<String> {
        lock(&self.lines).iter().cloned().collect()
    }

    /// What to blot out.
    pub fn redactor(&self) -> &Redactor {
        &self.redactor
    }

    fn add(&self, line: String) {
        let mut lines = lock(&self.lines);
        if lines.len() >= limits::LOG_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

fn cut(mut line: String) -> String {
    if line.len() > limits::LOG_LINE_BYTES {
        let mut end = limits::LOG_LINE_BYTES;
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
        line.push('…');
    }
    line
}

/// The secrets that one server process may know right now.
#[derive(Default)]
pub struct Redactor {
    known: Mutex<Vec<Known>>,
}

struct Known {
    value: SecretString,
    /// `None`: the process has it for as long as it lives, or a call that uses it is in flight.
    until: Option<Instant>,
    id: u64,
}

impl Redactor {
    /// Looks for `values` from now on; [`Redactor::forget`] with the same `id` ends it.
    pub fn remember<'a>(&self, id: u64, values: impl Iterator<Item = &'a SecretString>) {
        let mut known = lock(&self.known);
        let now = Instant::now();
        known.retain(|one| one.until.is_none_or(|until| until > now));
        known.extend(values.filter(|value| value.expose_secret().len() >= SHORTEST).map(|value| Known {
            value: value.clone(),
            until: None,
            id,
        }));
    }

    /// Keeps looking for a little while, since output may be read late, and then forgets.
    pub fn forget(&self, id: u64) {
        let mut known = lock(&self.known);
        let now = Instant::now();
        for one in known.iter_mut().filter(|one| one.id == id) {
            one.until = Some(now + AFTER_CALL);
        }
        known.retain(|one| one.until.is_none_or(|until| until > now));
    }

    /// The text with every known value blotted out.
    pub fn clean(&self, mut text: String) -> String {
        let known = lock(&self.known);
        for one in known.iter() {
            let value = one.value.expose_secret();
            if text.contains(value) {
                text = text.replace(value, "[secret]");
            }
        }
        text
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_newest_lines_and_cuts_long_ones() {
        let log = Log::default();
        for n in 0..limits::LOG_LINES + 5 {
            log.push(format!("line {n}").as_bytes());
        }
        log.push("ä".repeat(limits::LOG_LINE_BYTES).as_bytes());
        let lines = log.lines();
        assert_eq!(lines.len(), limits::LOG_LINES);
        assert_eq!(lines[0], "line 6");
        assert!(lines[limits::LOG_LINES - 1].len() <= limits::LOG_LINE_BYTES + 3);
    }

    #[test]
    fn blots_out_what_the_server_was_given() {
        let log = Log::default();
        log.redactor().remember(1, [SecretString::from("s3cr3t-value"), "abc".into()].iter());
        log.push(b"got s3cr3t-value and abc");
        log.redactor().forget(1);
        log.push(b"late s3cr3t-value");
        assert_eq!(log.lines(), ["got [secret] and abc", "late [secret]"]);
    }
}
