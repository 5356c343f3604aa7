//! Every subject, and nothing else spells one.
//!
//! A token is the name itself where that is a safe token, else `=` and a hash of it: `=` is in no name
//! that may stand for itself, so that no two names share a token. Names travel in messages as well.

use mcp_shared::ids::{ServerName, UserId, WorkerId};
use sha2::{Digest, Sha256};

/// The longest name that is its own token.
const TOKEN_BYTES: usize = 64;

/// The subjects of one fleet.
#[derive(Debug, Clone)]
pub struct Subjects {
    prefix: String,
}

impl Subjects {
    /// Subjects below a first token, which the settings have checked.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// The first token.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Calls by services, whatever server and user they name.
    pub fn front_door(&self) -> String {
        format!("{}.v1.call.*.*", self.prefix)
    }

    /// A call by a service.
    pub fn call(&self, server: &ServerName, user: &UserId) -> String {
        format!("{}.v1.call.{}.{}", self.prefix, token(server.as_str()), token(user.as_str()))
    }

    /// What one worker is told.
    pub fn worker(&self, worker: &WorkerId, verb: &str) -> String {
        format!("{}.v1.worker.{worker}.{verb}", self.prefix)
    }

    /// Everything that one worker is told.
    pub fn worker_all(&self, worker: &WorkerId) -> String {
        self.worker(worker, ">")
    }

    /// A node's beat.
    pub fn beat(&self, node: &WorkerId) -> String {
        format!("{}.v1.beat.{node}", self.prefix)
    }

    /// All beats.
    pub fn beats(&self) -> String {
        format!("{}.v1.beat.*", self.prefix)
    }

    /// That something was changed in the store.
    pub fn event(&self, noun: &str, verb: &str) -> String {
        format!("{}.v1.event.{noun}.{verb}", self.prefix)
    }

    /// Where a node is answered. A permission on it keeps others from listening.
    pub fn inbox(&self, node: &WorkerId) -> String {
        format!("{}.v1.inbox.{node}", self.prefix)
    }

    /// Whether a subject may be where a service is answered: it is none of the fleet's own, and none of
    /// those by which NATS itself is told what to do. Workers may say more than services.
    pub fn is_foreign(&self, subject: &str) -> bool {
        !subject.starts_with('$')
            && subject.strip_prefix(self.prefix.as_str()).is_none_or(|rest| !rest.starts_with(".v1."))
    }

    /// The names that stand in the subject of a service's call, as tokens.
    pub fn called<'a>(&self, subject: &'a str) -> Option<(&'a str, &'a str)> {
        let rest = subject.strip_prefix(self.prefix.as_str())?.strip_prefix(".v1.call.")?;
        let (server, user) = rest.split_once('.')?;
        (!user.contains('.')).then_some((server, user))
    }
}

/// A name as one token of a subject.
pub fn token(name: &str) -> String {
    let safe = (1..=TOKEN_BYTES).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if safe {
        return name.to_owned();
    }
    let hash = Sha256::digest(name.as_bytes());
    format!("={}", hex::encode(&hash[..16]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_safe_and_differ() {
        let names = ["a", "A", "a.b", "a-b", "a b", "*", ">", "$SYS", "=x", "", "ä", "a\r\nPUB x 1"];
        let long = "x".repeat(65);
        let mut seen = std::collections::HashSet::new();
        for name in names.into_iter().chain([long.as_str()]) {
            let token = token(name);
            assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_=".contains(&b)), "{token}");
            assert!(!token.is_empty() && token.len() <= TOKEN_BYTES);
            assert!(seen.insert(token), "{name}");
        }
        assert_eq!(token("everything"), "everything");
    }

    #[test]
    fn a_call_names_server_and_user() {
        let subjects = Subjects::new("mcp");
        let subject =
            subjects.call(&ServerName::from_stored("everything"), &UserId::from_stored("anna@example.org"));
        let (server, user) = subjects.called(&subject).unwrap();
        assert_eq!(server, "everything");
        assert_eq!(user, token("anna@example.org"));
        assert_eq!(subjects.called("mcp.v1.call.a"), None);
        assert_eq!(subjects.called("mcp.v1.call.a.b.c"), None);
        assert_eq!(subjects.called("other.v1.call.a.b"), None);
    }
}
