//! Traces: which call a piece of work belongs to, as W3C Trace Context says it, and spans of our own.
//!
//! What a caller says of its trace is read strictly, ignored where it is not well-formed, and passed on whether or
//! not this program records anything itself (its module `span`).

use std::{
    fmt,
    num::{NonZeroU64, NonZeroU128},
    str::FromStr,
    sync::Arc,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

mod export;
mod span;

pub use export::{Export, Traces, open};
pub use span::{Key, Kind, Sampler, Span, Value, begin};

/// The header, and the member of `_meta`, that names a span.
pub const TRACEPARENT: &str = "traceparent";
/// Where tracing systems keep what is theirs.
pub const TRACESTATE: &str = "tracestate";
/// What a caller wants all that follow to know.
pub const BAGGAGE: &str = "baggage";

/// Characters of a `traceparent` as we write it.
const PARENT_CHARS: usize = 55;
/// Bytes and members of a `tracestate`.
const STATE: (usize, usize) = (512, 32);
/// Bytes and members of a `baggage`.
const BAGGAGE_MOST: (usize, usize) = (8_192, 64);
/// The flag of a trace that is recorded.
const SAMPLED: u8 = 1;
/// Flags that version 00 knows: sampled, and that the trace's id is random.
const KNOWN_FLAGS: u8 = 0b11;

/// One span, as others name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanContext {
    trace: NonZeroU128,
    span: NonZeroU64,
    flags: u8,
}

impl SpanContext {
    /// The trace's id.
    pub fn trace(self) -> NonZeroU128 {
        self.trace
    }

    /// The span's id.
    pub fn span(self) -> NonZeroU64 {
        self.span
    }

    /// Whether whoever made it records its trace.
    pub fn is_sampled(self) -> bool {
        self.flags & SAMPLED != 0
    }
}

/// As a `traceparent` is written.
impl fmt::Display for SpanContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.span, self.flags)
    }
}

/// It is no `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl FromStr for SpanContext {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bytes = text.as_bytes();
        if bytes.len() < PARENT_CHARS || [2, 35, 52].iter().any(|at| bytes[*at] != b'-') {
            return Err(Malformed);
        }
        let version = hex(&bytes[..2])?;
        // Later versions may say more behind it.
        let ends = bytes.len() == PARENT_CHARS || version > 0 && bytes[PARENT_CHARS] == b'-';
        if version == 0xff || !ends {
            return Err(Malformed);
        }
        let span = u64::try_from(hex(&bytes[36..52])?).map_err(|_| Malformed)?;
        let flags = u8::try_from(hex(&bytes[53..PARENT_CHARS])?).map_err(|_| Malformed)?;
        Ok(Self {
            trace: NonZeroU128::new(hex(&bytes[3..35])?).ok_or(Malformed)?,
            span: NonZeroU64::new(span).ok_or(Malformed)?,
            flags: flags & KNOWN_FLAGS,
        })
    }
}

/// Lower-case hexadecimal digits, as the standard wants them.
fn hex(digits: &[u8]) -> Result<u128, Malformed> {
    digits.iter().try_fold(0_u128, |number, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return Err(Malformed),
        };
        Ok(number << 4 | u128::from(digit))
    })
}

impl Serialize for SpanContext {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SpanContext {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(|Malformed| serde::de::Error::custom("not a traceparent"))
    }
}

/// Where a piece of work belongs: the span that caused it, and what goes along with its trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace {
    /// The span that caused it.
    pub parent: SpanContext,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state: Option<State>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    baggage: Option<Baggage>,
}

impl Trace {
    /// What a message says in its headers, each of which may be there several times, in whatever bytes. `None`: not
    /// one well-formed `traceparent`. The rest counts only with it, and as far as it is well-formed itself.
    pub fn received<'a, V: Iterator<Item = &'a [u8]>>(header: impl Fn(&'static str) -> V) -> Option<Self> {
        let mut parents = header(TRACEPARENT);
        let parent = std::str::from_utf8(parents.next()?).ok()?.trim_matches([' ', '\t']).parse().ok()?;
        if parents.next().is_some() {
            return None;
        }
        let state = joined(header(TRACESTATE), STATE.0).and_then(|text| State::parse(&text));
        let baggage = joined(header(BAGGAGE), BAGGAGE_MOST.0).and_then(|text| Baggage::parse(&text));
        Some(Self { parent, state, baggage })
    }

    /// What is caused by that span, with nothing that goes along.
    pub fn of(parent: SpanContext) -> Self {
        Self { parent, state: None, baggage: None }
    }

    /// The same trace from another span on.
    pub fn with_parent(&self, parent: SpanContext) -> Self {
        Self { parent, ..self.clone() }
    }

    /// The `tracestate`, if there is one.
    pub fn state(&self) -> Option<&str> {
        self.state.as_ref().map(|state| &*state.0)
    }

    /// The `baggage`, if there is one.
    pub fn baggage(&self) -> Option<&str> {
        self.baggage.as_ref().map(|baggage| &*baggage.0)
    }

    /// The same without the baggage, for strangers: it may tell of whom the caller works for.
    pub fn without_baggage(self) -> Self {
        Self { baggage: None, ..self }
    }
}

/// The values of a header that may stand in several fields, as the one list that they are.
fn joined<'a>(values: impl Iterator<Item = &'a [u8]>, most: usize) -> Option<String> {
    let mut text = String::new();
    for value in values {
        let value = std::str::from_utf8(value).ok()?;
        if text.len() + value.len() > most {
            return None;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(value);
    }
    Some(text)
}

/// The members of a list without white space around them; `None` if there are too many or none.
fn members(text: &str, (bytes, most): (usize, usize)) -> Option<Vec<&str>> {
    let members: Vec<_> =
        text.split(',').map(|one| one.trim_matches([' ', '\t'])).filter(|one| !one.is_empty()).collect();
    let fits = text.len() <= bytes && (1..=most).contains(&members.len());
    fits.then_some(members)
}

macro_rules! checked_text {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        struct $name(Arc<str>);

        impl TryFrom<String> for $name {
            type Error = &'static str;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                Self::parse(&text).ok_or("not well-formed")
            }
        }

        impl From<$name> for String {
            fn from(text: $name) -> String {
                text.0.as_ref().to_owned()
            }
        }
    };
}

checked_text! {
    /// A well-formed `tracestate`.
    State
}
checked_text! {
    /// A well-formed `baggage`.
    Baggage
}

impl State {
    fn parse(text: &str) -> Option<Self> {
        let members = members(text, STATE)?;
        let mut keys = Vec::with_capacity(members.len());
        for member in &members {
            let (key, value) = member.split_once('=')?;
            let printable = |b: u8| (0x20..=0x7e).contains(&b) && !matches!(b, b',' | b'=');
            let of_key = |b: u8| {
                b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-' | b'*' | b'/' | b'@')
            };
            let begins = key.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
            let good = begins
                && key.len() <= 256
                && key.bytes().all(of_key)
                && key.bytes().filter(|b| *b == b'@').count() <= 1
                && (1..=256).contains(&value.len())
                && value.bytes().all(printable);
            if !good || keys.contains(&key) {
                return None;
            }
            keys.push(key);
        }
        Some(Self(members.join(",").into()))
    }
}

impl Baggage {
    fn parse(text: &str) -> Option<Self> {
        let members = members(text, BAGGAGE_MOST)?;
        // Tokens and percent-encoded values: nothing that would have to be escaped in JSON.
        let plain = |b: u8| matches!(b, 0x21 | 0x23..=0x2b | 0x2d..=0x5b | 0x5d..=0x7e | b' ' | b'\t');
        let good = members.iter().all(|member| {
            let key = member.split_once('=').map_or("", |(key, _)| key.trim_end_matches([' ', '\t']));
            let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
            !key.is_empty() && key.bytes().all(token) && member.bytes().all(plain)
        });
        good.then(|| Self(members.join(",").into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn received(headers: &[(&str, &str)]) -> Option<Trace> {
        Trace::received(|name| {
            headers.iter().filter(move |(one, _)| *one == name).map(|(_, value)| value.as_bytes())
        })
    }

    #[test]
    fn a_parent_is_read_strictly_and_written_as_it_came() {
        let context: SpanContext = PARENT.parse().unwrap();
        assert!(context.is_sampled());
        assert_eq!(context.to_string(), PARENT);
        let unknown = PARENT.replace("-01", "-ff").parse::<SpanContext>().unwrap();
        assert!(unknown.to_string().ends_with("-03"));
        // Of later versions what this one has is understood.
        for later in [PARENT.replacen("00", "cc", 1), PARENT.replacen("00", "01", 1) + "-what-follows"] {
            assert_eq!(later.parse::<SpanContext>().unwrap().to_string(), PARENT);
        }
        for bad in [
            String::new(),
            PARENT[..54].to_owned(),
            PARENT.to_owned() + "-",
            PARENT.to_owned() + "-00",
            PARENT.to_uppercase(),
            PARENT.replacen("00", "ff", 1),
            PARENT.replacen("00", "01", 1) + "x",
            PARENT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            PARENT.replace("b7ad6b7169203331", &"0".repeat(16)),
            PARENT.replace("b7ad", "b7ag"),
            PARENT.replace('-', "_"),
            PARENT.replace("b7ad", "b7ä"),
            PARENT.replace("-01", "- 1"),
            PARENT.replace("-01", "-+1"),
        ] {
            assert_eq!(bad.parse::<SpanContext>(), Err(Malformed), "{bad}");
        }
    }

    #[test]
    fn what_goes_along_counts_as_far_as_it_is_well_formed() {
        let trace = received(&[
            ("traceparent", PARENT),
            ("tracestate", "congo=t61rcWkgMzE, "),
            ("tracestate", "a@b=\"x\\"),
            ("baggage", "user=al%20ice;p=1 , k = v"),
        ])
        .unwrap();
        assert_eq!(trace.state(), Some("congo=t61rcWkgMzE,a@b=\"x\\"));
        assert_eq!(trace.baggage(), Some("user=al%20ice;p=1,k = v"));
        assert_eq!(trace.clone().without_baggage().baggage(), None);
        let text = serde_json::to_string(&trace).unwrap();
        assert_eq!(serde_json::from_str::<Trace>(&text).unwrap(), trace);

        let (long, many) = (format!("a={}", "x".repeat(257)), "a=1,".repeat(2));
        let crowd: String = (0..33).map(|at| format!("k{at}=v,")).collect();
        for bad in
            ["", " , ", "a", "=b", "A=b", "a=", "a=b=c", "a=ä", "a=\u{7}", "a@b@c=d", &long, &many, &crowd]
        {
            let trace = received(&[("traceparent", PARENT), ("tracestate", bad)]).unwrap();
            assert_eq!(trace.state(), None, "{bad}");
        }
        let long = format!("a={}", "x".repeat(8_192));
        let crowd: String = (0..65).map(|at| format!("k{at}=v,")).collect();
        for bad in ["", "a", "=b", "a b=c", "a=\"b\"", "a=\\", "a=ä", &long, &crowd] {
            let trace = received(&[("traceparent", PARENT), ("baggage", bad)]).unwrap();
            assert_eq!(trace.baggage(), None, "{bad}");
        }
    }

    #[test]
    fn one_parent_or_none() {
        assert!(received(&[("traceparent", &format!(" {PARENT}\t"))]).is_some());
        assert_eq!(received(&[("tracestate", "a=b"), ("baggage", "a=b")]), None);
        assert_eq!(received(&[("traceparent", PARENT), ("traceparent", PARENT)]), None);
        assert_eq!(received(&[("traceparent", "nonsense")]), None);
    }

    #[test]
    fn nodes_tell_each_other_only_what_is_well_formed() {
        assert!(serde_json::from_str::<Trace>(&format!(r#"{{"parent":"{PARENT}","other":1}}"#)).is_ok());
        for bad in [
            r#"{"parent":"x"}"#.to_owned(),
            format!(r#"{{"parent":"{PARENT}","state":"A"}}"#),
            format!(r#"{{"parent":"{PARENT}","baggage":"\""}}"#),
        ] {
            assert!(serde_json::from_str::<Trace>(&bad).is_err(), "{bad}");
        }
    }
}
