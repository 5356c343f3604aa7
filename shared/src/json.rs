//! Raw JSON: text that is known to be valid and is passed on byte for byte.

use std::{borrow::Cow, collections::HashSet};

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::value::RawValue;

use crate::limits::JSON_DEPTH;

/// One valid JSON document as the bytes that somebody sent. Cloning it copies no bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct RawJson(Bytes);

impl std::fmt::Debug for RawJson {
    /// Says how long the text is, never what it is: arguments and results may hold secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RawJson({} bytes)", self.0.len())
    }
}

impl RawJson {
    /// Takes bytes that were just read as JSON by a parser.
    pub fn from_parsed(bytes: Bytes) -> Self {
        Self(bytes)
    }

    /// Checks and takes a text.
    pub fn parse(bytes: impl Into<Bytes>) -> Result<Self, serde_json::Error> {
        let bytes = bytes.into();
        serde_json::from_slice::<&RawValue>(&bytes)?;
        Ok(Self(bytes))
    }

    /// The part of `whole` that a parser lent out as `part`; no bytes are copied.
    pub fn slice_of(whole: &Bytes, part: &RawValue) -> Self {
        Self(whole.slice_ref(part.get().as_bytes()))
    }

    /// Writes a value as JSON.
    pub fn of(value: &impl Serialize) -> Result<Self, serde_json::Error> {
        serde_json::to_vec(value).map(|bytes| Self(bytes.into()))
    }

    /// `{}`.
    pub fn empty_object() -> Self {
        Self(Bytes::from_static(b"{}"))
    }

    /// The text.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The text, shared.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }

    /// Whether this is a tool's result that says of itself that it is an error (`isError`).
    ///
    /// Nearly all results say so of nothing, which a search tells at the speed of memory. A member of that name may stand
    /// further in as well, so that one that is found has to be read.
    pub fn says_error(&self) -> bool {
        #[derive(Deserialize)]
        struct Says {
            #[serde(rename = "isError", default)]
            is_error: bool,
        }
        let is_true = |rest: &[u8]| {
            let value = rest.trim_ascii_start().strip_prefix(b":");
            value.is_some_and(|value| value.trim_ascii_start().starts_with(b"true"))
        };
        const NAME: &[u8] = b"\"isError\"";
        let mut found = memchr::memmem::find_iter(&self.0, NAME);
        found.any(|at| is_true(&self.0[at + NAME.len()..]))
            && serde_json::from_slice::<Says>(&self.0).is_ok_and(|says| says.is_error)
    }

    /// Whether the document is an object. (Parsers keep no white space around a raw value.)
    pub fn is_object(&self) -> bool {
        self.0.first() == Some(&b'{')
    }

    /// Reads it as a typed value.
    pub fn read<'a, T: Deserialize<'a>>(&'a self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.0)
    }
}

impl Serialize for RawJson {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let raw: &RawValue = serde_json::from_slice(&self.0).map_err(serde::ser::Error::custom)?;
        raw.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for RawJson {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        Ok(Self(Bytes::from(String::from(Box::<str>::from(raw)).into_bytes())))
    }
}

/// The members of an object in their order, with their values unread; an error for anything that is no
/// object. At most `limit` + 1 are kept, the last of which shows that there are more.
pub fn members(object: &[u8], limit: usize) -> Result<Vec<(Cow<'_, str>, &RawValue)>, serde_json::Error> {
    struct Members(usize);

    impl<'de> de::Visitor<'de> for Members {
        type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            #[derive(Deserialize)]
            struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

            let mut members = Vec::with_capacity(4);
            while let Some((Key(name), value)) = map.next_entry()? {
                if members.len() <= self.0 {
                    members.push((name, value));
                }
            }
            Ok(members)
        }
    }

    let mut reader = serde_json::Deserializer::from_slice(object);
    let members = reader.deserialize_map(Members(limit))?;
    reader.end()?;
    Ok(members)
}

/// Whether no object in a document has a member twice, at any depth: readers differ in which of the two they
/// take, so that what one of them has checked may not be what another one uses.
pub fn is_unambiguous(document: &[u8]) -> bool {
    serde_json::from_slice::<Unambiguous>(document).is_ok()
}

/// A document that is read for nothing but [`is_unambiguous`].
struct Unambiguous;

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Unambiguous)
    }
}

impl<'de> de::Visitor<'de> for Unambiguous {
    type Value = Self;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a document without repeated members")
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Unambiguous>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut seen = HashSet::new();
        while let Some((name, Unambiguous)) = map.next_entry::<String, Unambiguous>()? {
            if !seen.insert(name) {
                return Err(de::Error::custom("a member appears twice"));
            }
        }
        Ok(self)
    }
}

/// Why a text was refused although its grammar may be that of JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Nested deeper than [`JSON_DEPTH`].
    #[error("nested more than {JSON_DEPTH} levels deep")]
    TooDeep,
    /// An escape such as `\ud800` without its other half.
    #[error("a string has half of a surrogate pair")]
    LoneSurrogate,
    /// A number such as `1e400`.
    #[error("a number is out of range")]
    NumberOutOfRange,
}

/// Refuses what a raw pass-through would hand to others although no typed reader would take it:
/// great depth, halves of surrogate pairs, numbers without a value. One pass, no allocation; the
/// grammar itself is the parser's business.
pub fn screen(text: &[u8]) -> Result<(), Refused> {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        match byte {
            b'"' => at = screen_string(text, at + 1)?,
            b'{' | b'[' => {
                depth += 1;
                if depth > JSON_DEPTH {
                    return Err(Refused::TooDeep);
                }
                at += 1;
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                at += 1;
            }
            b'-' | b'0'..=b'9' => {
                let end = text[at..]
                    .iter()
                    .position(|b| !matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E'))
                    .map_or(text.len(), |length| at + length);
                let number = &text[at..end];
                // Without an exponent it takes more than 300 digits to leave the range.
                if number.len() > 300 || number.iter().any(|b| matches!(b, b'e' | b'E')) {
                    let value = std::str::from_utf8(number).ok().and_then(|n| n.parse::<f64>().ok());
                    if value.is_some_and(f64::is_infinite) {
                        return Err(Refused::NumberOutOfRange);
                    }
                }
                at = end;
            }
            _ => at += 1,
        }
    }
    Ok(())
}

/// Screens a string from behind its opening quote; returns where to go on.
fn screen_string(text: &[u8], mut at: usize) -> Result<usize, Refused> {
    let mut high = false;
    while let Some(&byte) = text.get(at) {
        let escape = (byte == b'\\').then(|| text.get(at + 1).copied()).flatten();
        let unit = match escape {
            Some(b'u') => text
                .get(at + 2..at + 6)
                .and_then(|digits| std::str::from_utf8(digits).ok())
                .and_then(|digits| u16::from_str_radix(digits, 16).ok()),
            _ => None,
        };
        let low = unit.is_some_and(|unit| (0xDC00..0xE000).contains(&unit));
        if high != low {
            return Err(Refused::LoneSurrogate);
        }
        high = unit.is_some_and(|unit| (0xD800..0xDC00).contains(&unit));
        match (byte, escape) {
            (b'"', _) => return Ok(at + 1),
            (b'\\', Some(b'u')) => at += 6,
            (b'\\', _) => at += 2,
            _ => at += 1,
        }
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_results_that_are_errors() {
        let says = |text: &str| RawJson::parse(text.to_owned()).unwrap().says_error();
        for error in [
            r#"{"isError":true}"#,
            r#"{"content":[],"isError" : true}"#,
            r#"{"isError":true,"a":{"isError":false}}"#,
        ] {
            assert!(says(error), "{error}");
        }
        for good in [
            "{}",
            r#"{"isError":false}"#,
            r#"{"structuredContent":{"isError":true},"isError":false}"#,
            r#"{"structuredContent":{"isError":true}}"#,
            r#"{"content":[{"type":"text","text":"\"isError\":true"}]}"#,
            r#"{"isError":"true"}"#,
            r#"{"isError":null}"#,
        ] {
            assert!(!says(good), "{good}");
        }
    }

    #[test]
    fn keeps_every_byte() {
        let text = r#"{"n":1.0e2,"big":123456789012345678901234567890,"s":"\u00e4"}"#;
        let raw = RawJson::parse(text).unwrap();
        assert_eq!(raw.as_bytes(), text.as_bytes());
        assert_eq!(serde_json::to_string(&raw).unwrap(), text);
        assert_eq!(serde_json::from_str::<RawJson>(text).unwrap(), raw);
        assert!(!format!("{raw:?}").contains("big"));
    }

    #[test]
    fn members_that_are_there_twice_are_seen_at_any_depth() {
        for good in [r#"{"a":{"a":[{"a":1},{"a":2}]},"b":null,"c":"\u0061","d":-1.5}"#, "[]", "7", "true"] {
            assert!(is_unambiguous(good.as_bytes()), "{good}");
        }
        for bad in [r#"{"a":1,"a":1}"#, r#"{"x":{"a":1,"\u0061":2}}"#, r#"[[{"a":1,"b":2,"a":3}]]"#, "{", ""]
        {
            assert!(!is_unambiguous(bad.as_bytes()), "{bad}");
        }
    }

    #[test]
    fn screens_depth_surrogates_and_numbers() {
        let deep = |n: usize| [vec![b'['; n], vec![b']'; n]].concat();
        assert_eq!(screen(&deep(JSON_DEPTH)), Ok(()));
        assert_eq!(screen(&deep(JSON_DEPTH + 1)), Err(Refused::TooDeep));
        assert_eq!(screen(&deep(100_000)), Err(Refused::TooDeep));
        for good in [r#""[[[ \" \\ \ud83d\ude00""#, "[1e300,-1.5E-400,0]", r#""\\ud800""#] {
            assert_eq!(screen(good.as_bytes()), Ok(()), "{good}");
        }
        for lone in [r#""\ud800""#, r#""\ude00""#, r#""\ud800x""#, r#""\ud800\n""#, r#""\ud800\ud800""#] {
            assert_eq!(screen(lone.as_bytes()), Err(Refused::LoneSurrogate), "{lone}");
        }
        for huge in ["1e400", "[-1E999]", &"9".repeat(400)] {
            assert_eq!(screen(huge.as_bytes()), Err(Refused::NumberOutOfRange), "{huge}");
        }
    }
}
