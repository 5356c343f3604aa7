//! Calls that their callers may repeat without having them done twice: the caller names the call, and what
//! came of it is kept under that name for a day.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    error::WorkerError,
    ids::{IdempotencyKey, ServerName, ToolName, UserId, WorkerId},
    json::RawJson,
    timestamp::Timestamp,
};

/// How long it is known what came of a call.
pub const KEPT: Duration = Duration::from_secs(24 * 3_600);
/// The largest result that is kept whole. Of a larger one it is known that there was one.
pub const RESULT_BYTES: usize = 1024 * 1024;

/// A call's name, and what it does: another call must not have the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Idempotency {
    /// The caller's name for it.
    pub key: IdempotencyKey,
    /// A hash of server, tool and arguments.
    pub fingerprint: String,
}

impl Idempotency {
    /// The name of a call. Arguments that differ in spelling only are the same.
    pub fn of(
        key: IdempotencyKey,
        server: &ServerName,
        tool: &ToolName,
        arguments: &RawJson,
    ) -> Result<Self, serde_json::Error> {
        let mut hash = Sha256::new();
        for name in [server.as_str(), tool.as_str()] {
            hash.update(name.len().to_be_bytes());
            hash.update(name);
        }
        let mut text = Vec::with_capacity(arguments.as_bytes().len());
        canonical(&arguments.read::<Value>()?, &mut text)?;
        hash.update(&text);
        Ok(Self { key, fingerprint: hex::encode(hash.finalize()) })
    }
}

/// JSON with the members of objects in one order.
fn canonical(value: &Value, out: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    match value {
        Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_unstable_by_key(|(name, _)| *name);
            out.push(b'{');
            for (name, value) in members {
                serde_json::to_writer(&mut *out, name)?;
                out.push(b':');
                canonical(value, out)?;
                out.push(b',');
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for item in items {
                canonical(item, out)?;
                out.push(b',');
            }
            out.push(b']');
        }
        plain => serde_json::to_writer(&mut *out, plain)?,
    }
    Ok(())
}

/// What is kept of a named call.
#[derive(Debug, Clone)]
pub struct NamedCall {
    /// Whose.
    pub user: UserId,
    /// Its name.
    pub key: IdempotencyKey,
    /// What it does.
    pub fingerprint: String,
    /// Who runs it, or did.
    pub worker: WorkerId,
    /// When this is forgotten.
    pub expires_at: Timestamp,
    /// How far it is.
    pub state: CallState,
}

/// How far a named call is.
#[derive(Debug, Clone)]
pub enum CallState {
    /// Its worker is at it.
    Running,
    /// It is over.
    Done(Box<Result<RawJson, WorkerError>>),
    /// It is over, and its result was too large to be kept.
    TooLarge,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(server: &str, tool: &str, arguments: &str) -> String {
        let key = IdempotencyKey::parse("k").unwrap();
        let (server, tool) = (ServerName::parse_new(server).unwrap(), ToolName::parse(tool).unwrap());
        let arguments = RawJson::parse(arguments.to_owned()).unwrap();
        Idempotency::of(key, &server, &tool, &arguments).unwrap().fingerprint
    }

    #[test]
    fn what_is_spelled_otherwise_is_the_same_and_what_differs_is_not() {
        let one = fingerprint("a", "b", r#"{"x":1,"y":{"a":[1,2],"b":"\u00e4"}}"#);
        assert_eq!(one, fingerprint("a", "b", r#"{ "y": {"b":"ä","a":[1, 2]}, "x":1 }"#));
        for (server, tool, arguments) in [
            ("a", "b", r#"{"x":1,"y":{"a":[2,1],"b":"ä"}}"#),
            ("a", "b", r#"{"x":"1","y":{"a":[1,2],"b":"ä"}}"#),
            ("a", "c", r#"{"x":1,"y":{"a":[1,2],"b":"ä"}}"#),
            ("b", "b", r#"{"x":1,"y":{"a":[1,2],"b":"ä"}}"#),
            ("a", "b", "{}"),
        ] {
            assert_ne!(one, fingerprint(server, tool, arguments), "{server} {tool} {arguments}");
        }
        assert_ne!(fingerprint("a", "bc", "{}"), fingerprint("ab", "c", "{}"));
    }
}
