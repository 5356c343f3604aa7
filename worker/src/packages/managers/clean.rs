//! What package managers say, without what is nobody's business: names and passwords in addresses, and
//! where things are on this machine.

/// The longest line that is kept.
const LINE: usize = 512;

/// One line, fit to be shown.
pub(super) fn line(raw: &[u8]) -> String {
    let text = String::from_utf8_lossy(&raw[..raw.len().min(4 * LINE)]);
    let text = without_paths(&without_userinfo(&text));
    mcp_shared::error::shorten(text.trim_end(), LINE)
}

/// Replaces what stands before the `@` in addresses.
fn without_userinfo(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let end = after
            .find(|c: char| c.is_whitespace() || matches!(c, '/' | '?' | '#' | '"' | '\'' | '`' | '<' | '>'))
            .unwrap_or(after.len());
        // A password may hold what ends an address; then the `@` comes behind it, before any blank.
        let word = after.find(char::is_whitespace).unwrap_or(after.len());
        rest = match after[..end].rfind('@').or_else(|| secret_end(&after[..word])) {
            Some(at) => {
                out.push_str("[secret]");
                &after[at..]
            }
            None => after,
        };
    }
    out + rest
}

/// Where a password ends that holds a `/`: at an `@` behind a `:` that no port follows.
fn secret_end(word: &str) -> Option<usize> {
    // That of an address by number is no password's.
    let (user, rest) = word.split_once(':').filter(|_| !word.starts_with('['))?;
    let first = rest.split('/').next().unwrap_or_default();
    let is_port = !first.is_empty() && first.bytes().all(|byte| byte.is_ascii_digit());
    (!user.contains('/') && !is_port).then(|| word.rfind('@')).flatten()
}

/// Replaces absolute paths by their last parts.
fn without_paths(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut previous = ' ';
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let begins = c == '/'
            && (previous.is_whitespace() || matches!(previous, '"' | '\'' | '`' | '(' | '=' | '<' | '['));
        if begins {
            let end = rest
                .find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | ')' | '>' | ',' | ';'))
                .unwrap_or(rest.len());
            let (path, after) = rest.split_at(end);
            let inner = path.trim_matches(|c| c == '/' || c == ':' || c == '.');
            if let Some((_, last)) = inner.rsplit_once('/') {
                out.push('…');
                out.push('/');
                out.push_str(last);
                if path.ends_with(':') {
                    out.push(':');
                }
                previous = 'x';
                rest = after;
                continue;
            }
        }
        out.push(c);
        previous = c;
        rest = &rest[c.len_utf8()..];
    }
    out
}

/// Cuts a stream into lines, of which each is bounded.
#[derive(Default)]
pub(super) struct Lines {
    line: Vec<u8>,
}

impl Lines {
    /// Takes a piece of the stream and gives the lines that end in it. Empty ones are left out.
    pub(super) fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        for part in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let (text, ends) = match part.split_last() {
                Some((b'\n' | b'\r', text)) => (text, true),
                _ => (part, false),
            };
            let room = (8 * LINE).saturating_sub(self.line.len());
            self.line.extend(&text[..text.len().min(room)]);
            if ends {
                self.end(&mut each);
            }
        }
    }

    /// Gives the last line, if it had no end.
    pub(super) fn end(&mut self, mut each: impl FnMut(&[u8])) {
        if !self.line.trim_ascii().is_empty() {
            each(&self.line);
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        for (said, shown) in [
            ("GET https://u:p@host/x?y=a@b", "GET https://[secret]@host/x?y=a@b"),
            ("a https://u@host b http://x:1/@scope/n", "a https://[secret]@host b http://x:1/@scope/n"),
            ("https://u:p/w@host/x", "https://[secret]@host/x"),
            ("https://host/@scope/name", "https://host/@scope/name"),
            ("https://[::1]:80/@scope", "https://[::1]:80/@scope"),
            ("x://", "x://"),
        ] {
            assert_eq!(without_userinfo(said), shown);
        }
    }

    #[test]
    fn places_on_this_machine_are_not_shown() {
        for (said, shown) in [
            ("open '/var/lib/x/package.json'", "open '…/package.json'"),
            ("/a/b/c: no", "…/c: no"),
            ("GET https://host/a/b", "GET https://host/a/b"),
            ("@scope/name a/b 1 / 2 /x", "@scope/name a/b 1 / 2 /x"),
            ("(from /a/b/) path=/x/y", "(from …/b) path=…/y"),
        ] {
            assert_eq!(without_paths(said), shown);
        }
        assert_eq!(line(b"a\x1b[1m\xff  \n"), "a [1m\u{fffd}");
    }

    #[test]
    fn lines_are_bounded() {
        let (mut lines, mut got) = (Lines::default(), Vec::new());
        lines.feed(b"a\r\n\nb", |line| got.push(line.len()));
        lines.feed(&[b'x'; 100_000], |line| got.push(line.len()));
        lines.feed(b"\nc", |line| got.push(line.len()));
        lines.end(|line| got.push(line.len()));
        assert_eq!(got, [1, 8 * LINE, 1]);
    }
}
