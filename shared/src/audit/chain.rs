//! How lines hang together: each ends with the hash of all that stands in it before, and has that of the line before it
//! as `prev`.

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Entry, Line};
use crate::timestamp::Timestamp;

/// The `prev` of the very first line.
const BEGINNING: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// What stands before the hash of a line, and what behind it.
const BEFORE: &str = ",\"hash\":\"";
const BEHIND: &str = "\"}";

/// The end of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tip {
    /// The number of the last line.
    pub(super) seq: u64,
    /// Its hash.
    pub(super) hash: String,
}

impl Default for Tip {
    fn default() -> Self {
        Self { seq: 0, hash: BEGINNING.to_owned() }
    }
}

/// What a line says of its place.
#[derive(Debug, Deserialize)]
pub(super) struct Place {
    pub(super) seq: u64,
    pub(super) prev: String,
}

impl Tip {
    /// The next line, with its end of line. The chain ends with it then.
    pub(super) fn extend(
        &mut self,
        entry: &Entry,
        dropped: Option<u64>,
        time: Timestamp,
    ) -> Result<String, serde_json::Error> {
        let seq = self.seq + 1;
        let mut line = serde_json::to_string(&Line { seq, time, prev: &self.hash, dropped, entry })?;
        // An object ends with a brace.
        line.pop();
        let hash = hash(line.as_bytes());
        line.push_str(BEFORE);
        line.push_str(&hash);
        line.push_str(BEHIND);
        line.push('\n');
        *self = Self { seq, hash };
        Ok(line)
    }
}

/// Reads a line without its end of line: its place, and the tip that it makes. `Err` says what is wrong with it.
pub(super) fn read(line: &[u8]) -> Result<(Place, Tip), &'static str> {
    let text = std::str::from_utf8(line).map_err(|_| "it is not text")?;
    let place: Place = serde_json::from_str(text).map_err(|_| "it is not a line of an audit log")?;
    let (said, stated) = text
        .rsplit_once(BEFORE)
        .and_then(|(said, end)| Some((said, end.strip_suffix(BEHIND)?)))
        .ok_or("it has no hash")?;
    if hash(said.as_bytes()) != stated {
        return Err("it was changed: its hash is that of something else");
    }
    let tip = Tip { seq: place.seq, hash: stated.to_owned() };
    Ok((place, tip))
}

/// SHA-256, as text.
pub(super) fn hash(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}
