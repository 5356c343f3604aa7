//! Names and identifiers. A value that exists is valid: each type is parsed once, at the edge.

use std::{cell::RefCell, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::timestamp::Timestamp;

/// Why a name was refused. The text says what would be valid and never repeats the input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {rule}")]
pub struct InvalidName {
    /// The API's name of the field, such as `serverName`.
    pub field: &'static str,
    /// What a valid value looks like.
    pub rule: &'static str,
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// A name read back from our own store or another node of the fleet, which checked it
            /// when it was made.
            pub fn from_stored(value: impl Into<String>) -> Self {
                Self(value.into())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

text_id! {
    /// The unique name of an MCP server. Names keep their case and are compared with it.
    ServerName
}
text_id! {
    /// Whose secrets, tokens and sessions a request concerns.
    UserId
}
text_id! {
    /// The name of a secret within one server; also the name of the argument that it becomes.
    SecretName
}
text_id! {
    /// The name of a tool, as the MCP server gave it (`methodName` in the API).
    ToolName
}
text_id! {
    /// What a caller calls a tool call that it may repeat without having it done twice.
    IdempotencyKey
}
text_id! {
    /// The id of one HTTP or bus request, given by the caller or made by us.
    RequestId
}
text_id! {
    /// The id of one worker process, new at each start.
    WorkerId
}

impl ServerName {
    /// The longest name that a new server may have, in characters.
    pub const MAX_NEW: usize = 63;

    /// Parses the name of a server to be registered: `[A-Za-z0-9][A-Za-z0-9_-]{0,62}`.
    pub fn parse_new(value: &str) -> Result<Self, InvalidName> {
        let bytes = value.as_bytes();
        let ok = !bytes.is_empty()
            && bytes.len() <= Self::MAX_NEW
            && bytes[0].is_ascii_alphanumeric()
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        if ok { Ok(Self(value.to_owned())) } else { Err(Self::invalid()) }
    }

    /// Parses a name that is only looked up. Records of an existing mcp-api database may have names
    /// that a new server may not have (dots, spaces, `@`, inner slashes); path tricks are refused.
    pub fn parse_existing(value: &str) -> Result<Self, InvalidName> {
        let ok = (1..=128).contains(&value.len())
            && value
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'@' | b'/' | b' ' | b'-'))
            && value.bytes().any(|b| b.is_ascii_alphanumeric())
            && !value.starts_with('/')
            && !value.split('/').any(|part| matches!(part, "" | "." | ".."));
        if ok { Ok(Self(value.to_owned())) } else { Err(Self::invalid()) }
    }

    /// Names that are equal under this key differ only in case, which registration refuses.
    pub fn case_key(&self) -> String {
        self.0.to_ascii_lowercase()
    }

    fn invalid() -> InvalidName {
        InvalidName {
            field: "serverName",
            rule: "must be 1 to 63 letters, digits, '_' or '-', and begin with a letter or digit",
        }
    }
}

impl UserId {
    /// The user of requests that name none.
    pub const DEFAULT: &'static str = "default";

    /// Parses a user name: 1 to 256 bytes, not blank, no control or text-direction characters.
    pub fn parse(value: &str) -> Result<Self, InvalidName> {
        if (1..=256).contains(&value.len()) && !value.trim().is_empty() && printable(value) {
            Ok(Self(value.to_owned()))
        } else {
            Err(InvalidName {
                field: "username",
                rule: "must be 1 to 256 bytes of text that is not blank, without control characters",
            })
        }
    }
}

impl Default for UserId {
    fn default() -> Self {
        Self(Self::DEFAULT.to_owned())
    }
}

impl SecretName {
    /// Parses the name of a secret: 1 to 128 bytes, no control characters and no `$`.
    pub fn parse(value: &str) -> Result<Self, InvalidName> {
        let ok = (1..=128).contains(&value.len())
            && !value.trim().is_empty()
            && !value.contains('$')
            && printable(value);
        if ok {
            Ok(Self(value.to_owned()))
        } else {
            Err(InvalidName {
                field: "secretName",
                rule: "must be 1 to 128 bytes of text that is not blank, without '$' and control characters",
            })
        }
    }
}

impl ToolName {
    /// Parses the name of a tool: 1 to 256 bytes without control characters.
    pub fn parse(value: &str) -> Result<Self, InvalidName> {
        if (1..=256).contains(&value.len()) && printable(value) {
            Ok(Self(value.to_owned()))
        } else {
            Err(InvalidName {
                field: "methodName",
                rule: "must be 1 to 256 bytes of text without control characters",
            })
        }
    }
}

impl IdempotencyKey {
    /// Parses the header `Idempotency-Key`: 1 to 255 printable ASCII characters.
    pub fn parse(value: &str) -> Result<Self, InvalidName> {
        let printable = value.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        if (1..=255).contains(&value.len()) && printable && !value.trim().is_empty() {
            Ok(Self(value.to_owned()))
        } else {
            Err(InvalidName { field: "Idempotency-Key", rule: "must be 1 to 255 printable ASCII characters" })
        }
    }
}

impl RequestId {
    /// A new id (a UUID of version 7): later ones compare greater, from one millisecond to the next.
    pub fn generate() -> Self {
        let id = match chance() {
            Some(chance) => {
                let now = u64::try_from(Timestamp::now().millis()).unwrap_or(0);
                uuid::Builder::from_unix_timestamp_millis(now, &chance).into_uuid()
            }
            None => uuid::Uuid::now_v7(),
        };
        Self(id.to_string())
    }
}

/// Random bytes, of which the system is asked for many at once: every request takes some. Nothing if it gives none.
fn chance() -> Option<[u8; 10]> {
    const MANY: usize = 1_000;
    thread_local! {
        static LEFT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    LEFT.with_borrow_mut(|left| {
        if left.is_empty() {
            left.resize(MANY, 0);
            if getrandom::fill(left).is_err() {
                left.clear();
            }
        }
        let rest = left.len().checked_sub(10)?;
        let chance = left.last_chunk().copied();
        left.truncate(rest);
        chance
    })
}

impl FromStr for RequestId {
    type Err = InvalidName;

    /// Parses a caller's `X-Request-Id`: 1 to 128 visible ASCII characters.
    fn from_str(value: &str) -> Result<Self, InvalidName> {
        if (1..=128).contains(&value.len()) && value.bytes().all(|b| b.is_ascii_graphic()) {
            Ok(Self(value.to_owned()))
        } else {
            Err(InvalidName { field: "X-Request-Id", rule: "must be 1 to 128 visible ASCII characters" })
        }
    }
}

impl WorkerId {
    /// A new id for this process.
    pub fn generate() -> Self {
        Self(format!("w-{}", uuid::Uuid::now_v7().simple()))
    }
}

/// The `_id` of a new document: 24 hexadecimal digits as MongoDB makes them, seconds and then chance.
pub fn object_id(now: Timestamp) -> String {
    let random = uuid::Uuid::now_v7().simple().to_string();
    let seconds = u32::try_from(now.millis() / 1_000).unwrap_or(u32::MAX);
    format!("{seconds:08x}{}", &random[random.len() - 16..])
}

/// Whether text has no control characters and none that reverse the direction of writing or hide.
fn printable(value: &str) -> bool {
    !value.chars().any(|c| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_server_names_follow_the_grammar() {
        for good in ["a", "echo-node", "A_9", &"x".repeat(63)] {
            assert!(ServerName::parse_new(good).is_ok(), "{good}");
        }
        let long = "x".repeat(64);
        for bad in ["", "-a", "_a", "a.b", "a b", "a/b", "..", "a\n", "ä", "a*", ">", &long] {
            assert!(ServerName::parse_new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn looked_up_names_may_be_older_but_never_paths() {
        for good in ["a.b", "@scope/name", "my server", "echo-node"] {
            assert!(ServerName::parse_existing(good).is_ok(), "{good}");
        }
        for bad in
            ["", ".", "..", "../../etc", "/abs", "a//b", "a/../b", "a\r\nPUB x 1", "a*", ">", "a\0", " "]
        {
            assert!(ServerName::parse_existing(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn users_and_secrets_have_no_hidden_characters() {
        assert!(UserId::parse("älice@example.org").is_ok());
        for bad in ["", "   ", "a\0", "a\r\n", "a\u{202e}b", "a\u{200b}", &"x".repeat(257)] {
            assert!(UserId::parse(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "$where", "a\0", "a$b"] {
            assert!(SecretName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(SecretName::parse("API_KEY").is_ok());
    }
}
