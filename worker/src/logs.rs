//! What is kept of a server's standard error, and how secrets are kept out of it.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mcp_shared::{error::shorten, limits};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

/// How long after a call its secrets are still looked for in what the server writes.
const AFTER_CALL: Duration = Duration::from_secs(10);
/// Shorter values are not looked for: they would blot out ordinary text.
const SHORTEST: usize = 6;
/// How much of a line is looked at, and so need be collected. It is more than is kept, so that a secret
/// in what is kept is seen whole, unless it is very long.
pub const COLLECTED: usize = 2 * limits::LOG_LINE_BYTES;
/// The most characters of a server's words in an answer of ours.
const QUOTED: usize = 1_000;
/// What tokens of services begin with that mark theirs, and ours.
const MARKS: [&str; 11] =
    ["ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-", "xoxb-", "xoxp-", "mcpk_"];
/// Shorter words are no tokens.
const CREDENTIAL: usize = 20;
/// What stands where a secret stood.
const BLOT: &str = "[secret]";

/// The newest lines of one server, without the secrets that it was given.
#[derive(Default)]
pub struct Log {
    lines: Mutex<VecDeque<String>>,
    redactor: Redactor,
}

impl Log {
    /// Adds a line that the server wrote: cut to a length, secrets blotted out.
    pub fn push(&self, line: &[u8]) {
        let kept = &line[..line.len().min(COLLECTED)];
        let mut text = self.redactor.clean(String::from_utf8_lossy(kept).into_owned());
        if line.len() >= COLLECTED {
            self.redactor.clean_end(&mut text);
        }
        self.add(cut(text));
    }

    /// Adds a note of our own about the server, which may repeat what it said.
    pub fn note(&self, text: &str) {
        self.add(cut(self.redactor.clean(format!("[mcp-api] {text}"))));
    }

    /// The lines, oldest first.
    pub fn lines(&self) -> Vec<String> {
        lock(&self.lines).iter().cloned().collect()
    }

    /// Keeps values out of the log for as long as the returned guard lives, and a little longer.
    pub fn remember<'a>(self: &Arc<Self>, values: impl Iterator<Item = &'a SecretString>) -> Known {
        Known { log: Arc::clone(self), keys: self.redactor.remember(values) }
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

/// Secrets that a call or a process has, for as long as their server may still speak of them.
pub struct Known {
    log: Arc<Log>,
    keys: Vec<u64>,
}

impl Drop for Known {
    fn drop(&mut self) {
        self.log.redactor.forget(&self.keys);
    }
}

/// The secrets that one server's processes may know right now.
#[derive(Default)]
pub struct Redactor {
    known: Mutex<Values>,
    hasher: RandomState,
}

/// Values by their hash: calls of one user bring the same ones again and again.
#[derive(Default)]
struct Values {
    by_hash: HashMap<u64, Value>,
    swept: Option<Instant>,
}

struct Value {
    /// The spellings to look for.
    spellings: Vec<SecretString>,
    /// Calls and processes that have it.
    holders: usize,
    /// When it is forgotten, once nobody has it.
    until: Instant,
}

impl Redactor {
    fn remember<'a>(&self, values: impl Iterator<Item = &'a SecretString>) -> Vec<u64> {
        let mut known = lock(&self.known);
        let now = Instant::now();
        if known.swept.is_none_or(|swept| now - swept > AFTER_CALL) {
            known.by_hash.retain(|_, value| value.holders > 0 || value.until > now);
            known.swept = Some(now);
        }
        values
            .map(|value| {
                let key = self.hasher.hash_one(value.expose_secret());
                let known = known.by_hash.entry(key).or_insert_with(|| Value {
                    spellings: spellings(value),
                    holders: 0,
                    until: now,
                });
                known.holders += 1;
                key
            })
            .collect()
    }

    /// Output may be read late: what nobody has any more is looked for a little longer.
    fn forget(&self, keys: &[u64]) {
        let mut known = lock(&self.known);
        let until = Instant::now() + AFTER_CALL;
        for key in keys {
            if let Some(value) = known.by_hash.get_mut(key) {
                value.holders = value.holders.saturating_sub(1);
                value.until = until;
            }
        }
    }

    /// The text with every known value blotted out.
    pub fn clean(&self, mut text: String) -> String {
        let known = lock(&self.known);
        let mut found: Vec<&str> = known
            .by_hash
            .values()
            .flat_map(|one| &one.spellings)
            .map(|spelling| spelling.expose_secret())
            .filter(|spelling| text.contains(spelling))
            .collect();
        // The longest first: one value may be a part of another, whose rest would stay.
        found.sort_unstable_by_key(|spelling| std::cmp::Reverse(spelling.len()));
        for spelling in found {
            text = text.replace(spelling, BLOT);
        }
        drop(known);
        without_credentials(text)
    }

    /// A server's words for an answer of ours: cleaned, and then on one line and shortened.
    pub fn quote(&self, text: String) -> String {
        shorten(&self.clean(text), QUOTED)
    }

    /// Blots out the beginning of a value at the end of a text that was cut there.
    fn clean_end(&self, text: &mut String) {
        // Half of a character at the cut hides what stands before it.
        text.truncate(text.trim_end_matches(char::REPLACEMENT_CHARACTER).len());
        for spelling in lock(&self.known).by_hash.values().flat_map(|one| &one.spellings) {
            let value = spelling.expose_secret();
            let longest = value.len().min(text.len());
            let begun = (SHORTEST..=longest)
                .rev()
                .find(|length| value.get(..*length).is_some_and(|begin| text.ends_with(begin)));
            if let Some(length) = begun {
                text.truncate(text.len() - length);
                text.push_str(BLOT);
            }
        }
    }
}

/// Blots out what is a credential by its looks, whoever it was given by: tokens of services that mark theirs, and
/// signed tokens of JSON (`eyJ...`).
fn without_credentials(mut text: String) -> String {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let mut from = 0;
    while let Some(start) = text[from..].find(is_part).map(|at| from + at) {
        let end = text[start..].find(|c| !is_part(c)).map_or(text.len(), |at| start + at);
        if is_credential(&text[start..end]) {
            text.replace_range(start..end, BLOT);
            from = start + BLOT.len();
        } else {
            from = end;
        }
    }
    text
}

/// Whether a word is a credential by its looks.
fn is_credential(word: &str) -> bool {
    if word.len() < CREDENTIAL {
        return false;
    }
    let signed = || {
        let mut parts = word.split('.');
        word.starts_with("eyJ") && parts.clone().count() == 3 && parts.all(|part| part.len() >= SHORTEST)
    };
    MARKS.iter().any(|mark| word.starts_with(mark)) || signed()
}

/// How a value may stand in a line: as it is, as JSON spells it, and, since a log has lines, each line of
/// it by itself.
fn spellings(value: &SecretString) -> Vec<SecretString> {
    let value = value.expose_secret();
    let mut spellings: Vec<SecretString> =
        value.lines().filter(|line| line.len() >= SHORTEST).map(SecretString::from).collect();
    if let Ok(json) = serde_json::to_string(value) {
        let json = Zeroizing::new(json);
        let inner = &json[1..json.len() - 1];
        if inner != value && inner.len() >= SHORTEST {
            // Before its parts, which could otherwise be blotted out of it and leave the rest.
            spellings.insert(0, inner.into());
        }
    }
    spellings
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
        let log = Arc::new(Log::default());
        let known = log.remember([SecretString::from("s3cr3t-value"), "abc".into()].iter());
        log.push(b"got s3cr3t-value and abc");
        drop(known);
        log.push(b"late s3cr3t-value");
        assert_eq!(log.lines(), ["got [secret] and abc", "late [secret]"]);
    }

    #[test]
    fn blots_out_what_looks_like_a_credential() {
        let log = Log::default();
        for (line, kept) in [
            ("token=ghp_0123456789abcdefghij0123456789abcdef, next", "token=[secret], next"),
            ("\"Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl\"", "\"Bearer [secret]\""),
            ("two glpat-0123456789abcdefghij sk-0123456789abcdefghij", "two [secret] [secret]"),
            ("ghp_short sk-8 eyJ.a.b", "ghp_short sk-8 eyJ.a.b"),
            ("a-long-name.of-something.that-is-no-token", "a-long-name.of-something.that-is-no-token"),
            ("žlutý ghp_0123456789abcdefghij kůň", "žlutý [secret] kůň"),
            ("", ""),
        ] {
            log.push(line.as_bytes());
            assert_eq!(log.lines().last().unwrap(), kept);
        }
    }

    #[test]
    fn blots_out_values_that_a_line_spells_otherwise_or_cuts() {
        let log = Arc::new(Log::default());
        let key = "-----BEGIN KEY-----\nMIIEvQIBADAN\n-----END KEY-----\n";
        let long = "0123456789abcdef".repeat(2_000);
        let _known =
            log.remember([key.into(), SecretString::from("say \"friend\""), long.clone().into()].iter());
        log.push(b"MIIEvQIBADAN");
        log.push(format!("{:?}", key).as_bytes());
        log.push(br#"{"word":"say \"friend\""}"#);
        log.push(format!("got {long}").as_bytes());
        log.push(&format!("got {long}").as_bytes()[..COLLECTED]);
        log.note("it said say \"friend\"");
        assert_eq!(
            log.lines(),
            [
                "[secret]",
                "\"[secret]\"",
                r#"{"word":"[secret]"}"#,
                "got [secret]",
                "got [secret]",
                "[mcp-api] it said [secret]",
            ]
        );
    }
}
