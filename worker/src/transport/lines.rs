//! Lines from a server's standard output, with a cap. A line that is too long is skipped to its end,
//! and only the call that it answers fails.

use bytes::{Bytes, BytesMut};
use mcp_shared::limits;
use tokio::io::{AsyncRead, AsyncReadExt};

/// How much is read at once, at most where lines are short.
const CHUNK: usize = 64 * 1024;
/// Less than this is not worth a read. Whoever keeps a line keeps the chunk that it came in, so that a chunk serves
/// until it is full.
const ROOM: usize = 4 * 1024;

/// One step of reading.
#[derive(Debug, PartialEq)]
pub enum Line {
    /// A line without its end.
    Whole(Bytes),
    /// A line that was too long and is over now, with the request id that stands in it, if any.
    TooLong(Option<u64>),
    /// A line that is longer than any server may write: the process must go.
    Endless(Option<u64>),
}

/// Cuts a stream into lines.
pub struct Lines<R> {
    source: R,
    buffer: BytesMut,
    /// How much of `buffer` was searched for a line end already.
    searched: usize,
    skipping: Option<Skipping>,
    limit: usize,
    fatal: usize,
}

struct Skipping {
    length: usize,
    finder: IdFinder,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    /// Reads from `source` with the limits of [`limits::LINE_BYTES`] and [`limits::LINE_BYTES_FATAL`].
    pub fn new(source: R) -> Self {
        Self::with_limits(source, limits::LINE_BYTES, limits::LINE_BYTES_FATAL)
    }

    pub(super) fn with_limits(source: R, limit: usize, fatal: usize) -> Self {
        Self { source, buffer: BytesMut::new(), searched: 0, skipping: None, limit, fatal }
    }

    /// The next line; `None` at the end of the stream. A last line without an end is no line.
    pub async fn next(&mut self) -> std::io::Result<Option<Line>> {
        loop {
            if let Some(line) = self.cut() {
                return Ok(Some(line));
            }
            if self.buffer.capacity() - self.buffer.len() < ROOM {
                self.buffer.reserve(CHUNK);
            }
            if self.source.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// The next line that the buffer holds the end of, or the verdict on one that grew too long.
    fn cut(&mut self) -> Option<Line> {
        let end = memchr::memchr(b'\n', &self.buffer[self.searched..]).map(|at| self.searched + at);
        if let Some(skipping) = &mut self.skipping {
            let part = self.buffer.split_to(end.map_or(self.buffer.len(), |end| end + 1));
            self.searched = 0;
            skipping.length += part.len();
            skipping.finder.feed(&part);
            let id = skipping.finder.found();
            if end.is_some() {
                self.skipping = None;
                return Some(Line::TooLong(id));
            }
            return (skipping.length > self.fatal).then_some(Line::Endless(id));
        }
        match end {
            Some(end) if end <= self.limit => {
                let mut line = self.buffer.split_to(end + 1).freeze();
                self.searched = 0;
                line.truncate(end);
                Some(Line::Whole(line))
            }
            None if self.buffer.len() <= self.limit => {
                self.searched = self.buffer.len();
                None
            }
            _ => {
                self.searched = 0;
                self.skipping = Some(Skipping { length: 0, finder: IdFinder::default() });
                self.cut()
            }
        }
    }
}

/// The id in a line that may not be JSON.
pub(super) fn id_in(line: &[u8]) -> Option<u64> {
    let mut finder = IdFinder::default();
    finder.feed(line);
    finder.found()
}

/// Finds the value of the top-level member `id` in a JSON text that passes by in pieces, without
/// keeping it. SDKs differ in whether the id stands before or after the result.
#[derive(Default)]
struct IdFinder {
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// The start of the last string at depth 1, as far as a key could matter.
    word: Vec<u8>,
    /// Whether the member whose value is being read is `id`.
    at_id: bool,
    digits: Vec<u8>,
    /// Something in that value is no digit, so that it is no id of ours.
    foreign: bool,
    done: Option<u64>,
}

impl IdFinder {
    fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ if self.depth == 1 && self.word.len() < 3 => self.word.push(byte),
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => {
                    self.in_string = true;
                    self.word.clear();
                }
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    self.end_value();
                }
                b':' if self.depth == 1 => self.at_id = self.word == b"id",
                b',' if self.depth == 1 => self.end_value(),
                b'0'..=b'9' if self.depth == 1 && self.at_id && self.digits.len() < 20 => {
                    self.digits.push(byte);
                }
                b' ' | b'\t' | b'\r' | b'\n' => {}
                _ => self.foreign |= self.depth == 1 && self.at_id,
            }
        }
    }

    fn end_value(&mut self) {
        if self.at_id && self.depth <= 1 && !self.foreign && self.done.is_none() {
            self.done = std::str::from_utf8(&self.digits).ok().and_then(|digits| digits.parse().ok());
        }
        if self.depth <= 1 {
            self.at_id = false;
            self.foreign = false;
            self.digits.clear();
        }
    }

    fn found(&self) -> Option<u64> {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    async fn all(text: &[u8], limit: usize, fatal: usize) -> Vec<Line> {
        let mut lines = Lines::with_limits(text, limit, fatal);
        let mut out = Vec::new();
        while let Some(line) = lines.next().await.unwrap() {
            let fatal = matches!(line, Line::Endless(_));
            out.push(line);
            if fatal {
                break;
            }
        }
        out
    }

    fn whole(text: &'static str) -> Line {
        Line::Whole(Bytes::from_static(text.as_bytes()))
    }

    #[tokio::test]
    async fn cuts_lines_and_ignores_an_unfinished_one() {
        assert_eq!(all(b"a\n\nbc\nd", 10, 100).await, [whole("a"), whole(""), whole("bc")]);
    }

    #[tokio::test]
    async fn lines_that_are_kept_share_their_memory() {
        let (reader, mut writer) = tokio::io::duplex(1024);
        let mut lines = Lines::new(reader);
        let mut kept: Vec<Bytes> = Vec::new();
        for _ in 0..1000 {
            writer.write_all(&[b"x".repeat(99), b"\n".to_vec()].concat()).await.unwrap();
            let Some(Line::Whole(line)) = lines.next().await.unwrap() else { panic!("a line") };
            kept.push(line);
        }
        let apart = kept.windows(2).filter(|two| two[0].as_ptr().wrapping_add(100) != two[1].as_ptr());
        assert!(apart.count() <= 2, "100 KB are in two chunks, and not in one for each line");
    }

    #[tokio::test]
    async fn a_long_line_is_skipped_and_names_its_call() {
        let long = format!(r#"{{"jsonrpc":"2.0","result":{{"id":99,"text":"{}"}},"id":7}}"#, "x".repeat(500));
        let text = format!("a\n{long}\nb\n");
        assert_eq!(all(text.as_bytes(), 100, 10_000).await, [whole("a"), Line::TooLong(Some(7)), whole("b")]);
    }

    #[tokio::test]
    async fn a_line_without_end_is_the_end() {
        let text = format!(r#"{{"id":3,"result":"{}"#, "x".repeat(200_000));
        assert_eq!(all(text.as_bytes(), 100, 1_000).await, [Line::Endless(Some(3))]);
    }

    #[test]
    fn ids_are_found_wherever_they_stand_and_however_the_text_is_cut() {
        let cases: [(&str, Option<u64>); 11] = [
            (r#"{"id":-7,"result":1}"#, None),
            (r#"{"id":7.5,"result":1}"#, None),
            (r#"{"id":7e1,"result":1}"#, None),
            (r#"{"id":000000000000000000007,"result":1}"#, None),
            (r#"{"id":{"a":7},"id":8}"#, Some(8)),
            (r#"{"jsonrpc":"2.0","id":12,"result":{}}"#, Some(12)),
            (r#"{"result":{"id":1,"a":["id",{"id":2}]},"jsonrpc":"2.0","id": 34 }"#, Some(34)),
            (r#"{"result":"\",\"id\":5,","id":6}"#, Some(6)),
            (r#"{"id":"abc","result":1}"#, None),
            (r#"{"idx":5,"result":1}"#, None),
            ("not json at all", None),
        ];
        for (text, expected) in cases {
            for cut in 0..text.len() {
                let mut finder = IdFinder::default();
                finder.feed(&text.as_bytes()[..cut]);
                finder.feed(&text.as_bytes()[cut..]);
                assert_eq!(finder.found(), expected, "{text} cut at {cut}");
            }
        }
    }
}
