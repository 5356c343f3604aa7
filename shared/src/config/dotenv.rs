//! Reading a `.env` file so that each value means what it meant to mcp-api.
//!
//! `dotenvy` alone would not do: in values without quotes it drops quotation marks and backslashes, which
//! destroys credentials pasted as JSON, and it replaces `$NAME` from the process environment, which
//! changes keys and passwords. So each line is put into a form that it repeats exactly: a value without
//! quotes is taken as it stands, and `$` never has a meaning. Where programs differ in what a value means,
//! the line is refused, because a key that is quietly another key loses secrets.

use std::path::Path;

use super::ConfigError;
use crate::error::shorten;

/// A line that sets something.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) line: usize,
    pub(super) name: String,
    pub(super) value: String,
}

/// Reads a file. What cannot be understood is added to `problems`, without repeating any value.
pub(super) fn read(path: &Path, problems: &mut Vec<ConfigError>) -> Vec<Entry> {
    let shown = shorten(&path.display().to_string(), 64);
    match std::fs::read(path).map(String::from_utf8) {
        Ok(Ok(text)) => parse(&text, &shown, problems),
        Ok(Err(_)) => {
            problems.push(ConfigError::new(shown, "the file is not UTF-8 text"));
            Vec::new()
        }
        Err(error) => {
            problems.push(ConfigError::new(shown, format!("the file cannot be read: {}", error.kind())));
            Vec::new()
        }
    }
}

fn parse(text: &str, file: &str, problems: &mut Vec<ConfigError>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for (index, raw) in text.trim_start_matches('\u{feff}').lines().enumerate() {
        let (line, raw) = (index + 1, raw.trim());
        if raw.is_empty() || raw.starts_with('#') {
            continue;
        }
        match parse_line(raw) {
            Ok((name, value)) => {
                if let Some(earlier) = entries.iter().find(|entry| entry.name == name) {
                    let message = format!("set twice, in lines {} and {line}; keep one", earlier.line);
                    problems.push(ConfigError::new(subject(&name, file), message));
                } else {
                    entries.push(Entry { line, name, value });
                }
            }
            Err((name, what)) => {
                let message = format!("{what} (line {line} of {file})");
                problems.push(ConfigError::new(subject(&name, file), message));
            }
        }
    }
    entries
}

/// What a problem is about: the name, or the file where the name does not look like one. A file that is no
/// `.env` file, such as a private key, may have lines with an equals sign, and those must not be shown.
pub(super) fn subject(name: &str, file: &str) -> String {
    let plausible = |c: u8| c.is_ascii_uppercase() || c.is_ascii_digit() || c == b'_' || c == b'.';
    let upper = name.to_ascii_uppercase();
    let one_case = upper == name || name.to_ascii_lowercase() == name;
    if one_case && (1..=40).contains(&name.len()) && upper.bytes().all(plausible) {
        name.to_owned()
    } else {
        file.to_owned()
    }
}

type Refused = (String, &'static str);

fn parse_line(raw: &str) -> Result<(String, String), Refused> {
    const SHAPE: &str = "not of the form NAME=value";
    const TWO_LINES: &str = "the value's closing quote is missing on its line";
    let Some((left, right)) = raw.split_once('=') else {
        return Err((String::new(), SHAPE));
    };
    let left = left.trim();
    let name = match left.strip_prefix("export") {
        Some(rest) if rest.starts_with([' ', '\t']) => rest.trim(),
        _ => left,
    };
    let refuse = |what| (name.to_owned(), what);
    let right = right.trim();
    let value = match right.chars().next() {
        Some('`') => return Err(refuse("backquotes are not understood; use ' or \"")),
        Some('\'') => {
            let body = &right[1..];
            let end = body.find('\'').ok_or_else(|| refuse(TWO_LINES))?;
            check_rest(&body[end + 1..]).map_err(refuse)?;
            format!("'{}'", &body[..end])
        }
        Some('"') => {
            let body = &right[1..];
            let end = closing_quote(body).ok_or_else(|| refuse(TWO_LINES))?;
            check_rest(&body[end + 1..]).map_err(refuse)?;
            format!("\"{}\"", escape_dollars(&body[..end]))
        }
        _ => format!("\"{}\"", escape_all(unquoted(right).map_err(refuse)?)),
    };
    let line = format!("{name}={value}");
    match dotenvy::from_read_iter(line.as_bytes()).next() {
        Some(Ok(pair)) => Ok(pair),
        // The error of the library repeats the line, and with it the value.
        _ if value.starts_with('"') && value.contains('\\') => {
            Err(refuse("not understood; within double quotes only \\\\, \\\", \\$ and \\n are escapes"))
        }
        _ => Err(refuse(SHAPE)),
    }
}

/// A value without quotes: everything up to a comment.
fn unquoted(text: &str) -> Result<&str, &'static str> {
    let end = text.find('#').unwrap_or(text.len());
    let (value, comment) = text.split_at(end);
    if !comment.is_empty() && !value.is_empty() && !value.ends_with([' ', '\t']) {
        // Some programs read a comment here and others a part of the value.
        return Err("a value with # in it must be quoted");
    }
    Ok(value.trim_end())
}

fn closing_quote(body: &str) -> Option<usize> {
    let mut escaped = false;
    body.char_indices().find_map(|(index, c)| {
        let found = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        found.then_some(index)
    })
}

/// After a closing quote only a comment may follow; anything else means that the quotes were part of the
/// value.
fn check_rest(rest: &str) -> Result<(), &'static str> {
    let comment = rest.trim_start();
    if comment.is_empty() || comment.starts_with('#') {
        Ok(())
    } else {
        Err("text after the closing quote; put a value with quotes in it between the other kind of quotes")
    }
}

fn escape_all(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 8);
    for c in value.chars() {
        if matches!(c, '\\' | '"' | '$') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn escape_dollars(body: &str) -> String {
    let mut out = String::with_capacity(body.len() + 8);
    let mut escaped = false;
    for c in body.chars() {
        if c == '$' && !escaped {
            out.push('\\');
        }
        escaped = c == '\\' && !escaped;
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_mean_what_they_meant() {
        for (line, value) in [
            ("A=b", "b"),
            ("  A = b ", "b"),
            ("export A=b", "b"),
            ("export\tA=b", "b"),
            ("A=", ""),
            ("A= # nothing", ""),
            ("A=b # comment", "b"),
            ("A=two words", "two words"),
            ("A='#1 $HOME \\n'", "#1 $HOME \\n"),
            ("A=\"#1 $HOME \\\"x\\\" \\\\ \\n\" # c", "#1 $HOME \"x\" \\ \n"),
            ("A=\"\\$x\"", "$x"),
            ("A=pa$word", "pa$word"),
            ("A=${HOME}", "${HOME}"),
            ("A=back\\slash", "back\\slash"),
            ("A=it's", "it's"),
            ("A={\"web\":{\"id\":\"x\\ny\"}}", "{\"web\":{\"id\":\"x\\ny\"}}"),
            ("A=b==", "b=="),
            ("A='ž🔑'", "ž🔑"),
        ] {
            let mut problems = Vec::new();
            let entries = parse(line, ".env", &mut problems);
            assert!(problems.is_empty(), "{line}: {problems:?}");
            assert_eq!((entries[0].name.as_str(), entries[0].value.as_str()), ("A", value), "{line}");
        }
    }

    #[test]
    fn what_is_ambiguous_is_refused_and_not_repeated() {
        for (line, says) in [
            ("SECRETS_KEY", ".env: not of the form NAME=value (line 2 of .env)"),
            ("=canary", "not of the form"),
            ("1A=canary", "1A: not of the form"),
            ("A B=canary", "not of the form"),
            ("A='canary", "A: the value's closing quote"),
            ("A=\"canary\\\"", "A: the value's closing quote"),
            ("A=canary#canary", "A: a value with # in it must be quoted"),
            ("A=`canary`", "A: backquotes"),
            ("A=\"{\"canary\":1}\"", "A: text after the closing quote"),
            ("A=\"canary\\t\"", "A: not understood"),
        ] {
            let mut problems = Vec::new();
            let entries = parse(&format!("# first\r\n{line}\r\nB=1\r\n"), ".env", &mut problems);
            assert_eq!((entries.len(), entries[0].line, entries[0].name.as_str()), (1, 3, "B"), "{line}");
            let text = problems[0].to_string();
            assert!(text.contains(says) && text.ends_with("(line 2 of .env)"), "{line}: {text}");
            assert!(!text.contains("canary"), "{text}");
        }
    }

    #[test]
    fn only_what_looks_like_a_name_is_shown() {
        assert_eq!(subject("SECRET_KEY", ".env"), "SECRET_KEY");
        assert_eq!(subject("port", ".env"), "port");
        assert_eq!(subject("MIIEvQIBADANBgkqhkiG9w0BAQEFAA", ".env"), ".env");
        assert_eq!(subject(&"A".repeat(41), ".env"), ".env");
    }

    #[test]
    fn a_name_is_set_once() {
        let mut problems = Vec::new();
        parse("\u{feff}A=1\n\nA=2\n", ".env", &mut problems);
        assert_eq!(problems[0].to_string(), "A: set twice, in lines 1 and 3; keep one");
    }
}
