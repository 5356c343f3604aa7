//! The audit log: who did what to what, and whether it was let in.
//!
//! Lines of JSON, one file for each process, only ever added to. Each line has the hash of the line before it, so that
//! [`verify()`] finds the first one that was changed, removed or added later. (Who can write the file can write it anew
//! from some line on: the last hash has to be kept somewhere else to notice that, which is why it is logged.)
//!
//! What changes something is recorded twice: `allowed`, on the disk before the change begins, and `done` with the
//! answer's status afterwards. What cannot be recorded is not done. Lines never have a value in them, only names.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    error::{ErrorCode, WorkerError, shorten},
    ids::{RequestId, UserId},
    limits,
    timestamp::Timestamp,
};

mod chain;
mod file;
mod verify;
mod writer;

#[cfg(test)]
mod tests;

pub use verify::{Chain, Fault, Verified, chains, verify};
pub(crate) use writer::default_file;
pub use writer::{Audit, OpenError};

macro_rules! actions {
    ($($variant:ident = $text:literal, $meaning:literal;)*) => {
        /// What somebody did, or wanted to do. The set is closed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Action {
            $(#[doc = $meaning] #[serde(rename = $text)] $variant,)*
        }

        impl Action {
            /// All of them, in the order of the documentation.
            pub const ALL: &'static [Action] = &[$(Action::$variant,)*];

            /// As it stands in a line.
            pub fn as_str(self) -> &'static str {
                match self { $(Action::$variant => $text,)* }
            }

            /// What it means.
            pub fn meaning(self) -> &'static str {
                match self { $(Action::$variant => $meaning,)* }
            }
        }
    };
}

actions! {
    Opened = "audit.opened", "A process began to write the file.";
    Recovered = "audit.recovered", "The last line was cut off by a crash and was removed; `bytes` and `fragment` (its SHA-256) say what it was.";
    Closed = "audit.closed", "The process stopped in order.";
    Request = "request", "A request that was refused before it was known what it would do.";
    ToolCall = "tool.call", "A call of a tool (`AUDIT_CALLS`).";
    ToolsChanged = "tools.changed", "A server lists tools otherwise than before, with nothing changed in its record.";
    ServerCreate = "server.create", "A server was registered.";
    ServerUpdate = "server.update", "A server's record was changed.";
    ServerEnable = "server.enable", "A server was allowed to run.";
    ServerDisable = "server.disable", "A server was switched off.";
    ServerDelete = "server.delete", "A server was removed, with all that belongs to it.";
    PackageInstall = "package.install", "An installation was ordered.";
    PackageUpgrade = "package.upgrade", "Another version of a package was ordered.";
    PackageEnable = "package.enable", "A package's server was allowed to run.";
    PackageDisable = "package.disable", "A package's server was switched off.";
    PackageDelete = "package.delete", "A package was removed, with its server.";
    SecretSet = "secret.set", "A user's secret was stored.";
    SecretDelete = "secret.delete", "A user's secret was deleted.";
    TokensSet = "tokens.set", "A user's OAuth tokens were stored.";
    TokensDelete = "tokens.delete", "A user's OAuth tokens were deleted.";
    LoginBegin = "login.begin", "A login to a remote server was begun.";
    LoginFinish = "login.finish", "A login to a remote server came to its end.";
    ApiKeyCreate = "api_key.create", "An API key was made.";
    ApiKeyRevoke = "api_key.revoke", "An API key was revoked.";
    KeysRotate = "keys.rotate", "The file of a node's encryption keys was changed by a command.";
    KeysReload = "keys.reload", "A node reads its encryption keys anew.";
    KeysRewrap = "keys.rewrap", "Stored values are encrypted anew with the newest key.";
    KeysRetire = "keys.retire", "Nodes were allowed to forget an encryption key.";
    WorkerDrain = "worker.drain", "A worker was told to leave.";
    LogFilter = "log.filter", "Nodes were told to log more, or less.";
}

/// What a line says about its action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// It was let in, and begins now.
    Allowed,
    /// It was refused.
    Denied,
    /// What was let in by line `of` is over.
    Done,
    /// It happened by itself.
    Noted,
}

/// Which calls of tools are recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AuditCalls {
    /// None.
    None,
    /// Those that were refused for want of a right.
    #[default]
    Denied,
    /// All of them.
    All,
}

/// On what. Only names: what something is called is no secret, what it holds may be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Object {
    /// The server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<String>,
    /// The secret's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
    /// The package.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// The worker's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// The id of a key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Tools.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Method and pattern of the route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// The filter of logs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
}

impl Object {
    /// A server.
    pub fn server(name: impl fmt::Display) -> Self {
        Self { server: text(name), ..Self::default() }
    }

    /// A package.
    pub fn package(name: impl fmt::Display) -> Self {
        Self { package: text(name), ..Self::default() }
    }

    /// A worker.
    pub fn worker(id: impl fmt::Display) -> Self {
        Self { worker: text(id), ..Self::default() }
    }

    /// A key.
    pub fn key(id: impl fmt::Display) -> Self {
        Self { key: text(id), ..Self::default() }
    }

    /// A filter of logs.
    pub fn filter(filter: impl fmt::Display) -> Self {
        Self { filter: text(filter), ..Self::default() }
    }

    /// A route.
    pub fn route(method: impl fmt::Display, pattern: impl fmt::Display) -> Self {
        Self { route: text(format!("{method} {pattern}")), ..Self::default() }
    }

    /// With the name of a secret.
    pub fn with_secret(mut self, name: impl fmt::Display) -> Self {
        self.secret = text(name);
        self
    }

    /// With a package.
    pub fn with_package(mut self, name: impl fmt::Display) -> Self {
        self.package = text(name);
        self
    }

    /// With tools; of very many, the first.
    pub fn with_tools<T: fmt::Display>(mut self, names: impl IntoIterator<Item = T>) -> Self {
        self.tools = names.into_iter().take(limits::AUDIT_TOOLS).filter_map(text).collect();
        self
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// What it says.
    pub event: Event,
    /// About what was done.
    pub action: Action,
    /// By which credential, as it may be shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// Whose credential that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// For whom, if for somebody else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_behalf_of: Option<String>,
    /// On what.
    #[serde(default, skip_serializing_if = "Object::is_empty")]
    pub object: Object,
    /// In which request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// The line that this one ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<u64>,
    /// The answer's status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// The answer's code, if it is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// What else there is to say, in words of ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Bytes that were cut off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Their hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fragment: Option<String>,
}

impl Entry {
    /// An action of nobody in particular.
    pub fn new(event: Event, action: Action, object: Object) -> Self {
        Self {
            event,
            action,
            credential: None,
            user: None,
            on_behalf_of: None,
            object,
            request_id: None,
            of: None,
            status: None,
            code: None,
            note: None,
            bytes: None,
            fragment: None,
        }
    }

    /// By somebody.
    pub fn by(mut self, credential: impl fmt::Display, user: &UserId) -> Self {
        self.credential = text(credential);
        self.user = text(user);
        self
    }

    /// By a credential that was not known to be anybody's.
    pub fn by_credential(mut self, credential: impl fmt::Display) -> Self {
        self.credential = text(credential);
        self
    }

    /// On somebody's behalf. That of oneself goes without saying.
    pub fn on_behalf_of(mut self, user: &UserId) -> Self {
        self.on_behalf_of = text(user).filter(|user| self.user.as_ref() != Some(user));
        self
    }

    /// In a request.
    pub fn in_request(mut self, id: &RequestId) -> Self {
        self.request_id = text(id);
        self
    }

    /// Answered with a status, and a code if it is an error.
    pub fn answered(mut self, status: u16, code: Option<ErrorCode>) -> Self {
        self.status = Some(status);
        self.code = code.map(|code| code.as_str().to_owned());
        self
    }

    /// With a remark.
    pub fn note(mut self, words: impl fmt::Display) -> Self {
        self.note = text(words);
        self
    }
}

/// What may stand in a line: not long, and nothing that a terminal would do something about.
fn text(value: impl fmt::Display) -> Option<String> {
    Some(shorten(&value.to_string(), limits::AUDIT_TEXT)).filter(|text| !text.is_empty())
}

/// The log cannot be written. The cause has been logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// There is no room for it.
    #[error("the audit log cannot be written: its disk is full")]
    Full,
    /// Whatever else is wrong with it.
    #[error("the audit log cannot be written")]
    Broken,
}

impl From<Unavailable> for WorkerError {
    fn from(why: Unavailable) -> Self {
        let (code, text) = match why {
            Unavailable::Full => {
                (ErrorCode::StorageFull, "The disk of the audit log is full: nothing may be changed")
            }
            Unavailable::Broken => (
                ErrorCode::AuditUnavailable,
                "The audit log cannot be written, so that nothing may be changed",
            ),
        };
        WorkerError::new(code, text).retry_after(limits::AUDIT_RETRY)
    }
}

/// A line that says that something was let in. Whoever changes what is stored asks for one, so that nothing is changed
/// that was not recorded. When it is dropped, its end is recorded, with the status that was [answered](Self::answered).
#[must_use]
pub struct Recorded(Arc<Open>);

struct Open {
    audit: Audit,
    done: std::sync::Mutex<Option<Entry>>,
}

impl Recorded {
    fn new(audit: Audit, seq: u64, begun: &Entry) -> Self {
        let mut done = Entry { event: Event::Done, of: Some(seq), ..begun.clone() };
        // The line that it ends says the rest.
        (done.user, done.on_behalf_of, done.credential, done.object) = (None, None, None, Object::default());
        Self(Arc::new(Open { audit, done: std::sync::Mutex::new(Some(done)) }))
    }

    /// The same, for whoever knows how it ends.
    pub fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// It came to this.
    pub fn answered(&self, status: u16, code: Option<ErrorCode>) {
        let mut done = self.0.done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(done) = done.take() {
            self.0.audit.note(done.answered(status, code));
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let done = self.done.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(done) = done {
            self.audit.note(done);
        }
    }
}

/// A line without its place in the chain.
#[derive(Debug, Serialize)]
struct Line<'a> {
    seq: u64,
    time: Timestamp,
    prev: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    dropped: Option<u64>,
    #[serde(flatten)]
    entry: &'a Entry,
}
