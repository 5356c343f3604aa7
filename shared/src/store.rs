//! The durable truth: what is stored, as one trait. Its implementations pass one contract suite
//! (`testing::store_contract`). One document is the unit of atomicity.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{SecretName, ServerName, UserId},
    server::ServerRecord,
    timestamp::Timestamp,
};

pub mod embedded;
mod metered;
pub mod mongo;
pub mod open;

/// The number of a document's version. It changes with every write of the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub i64);

/// A document with the revision it was read at.
#[derive(Debug, Clone, PartialEq)]
pub struct Versioned<T> {
    /// The revision, for compare-and-set.
    pub revision: Revision,
    /// The document.
    pub value: T,
}

/// A server's record as stored: the values of `env` and `headers` are encrypted. [`crate::vault`]
/// makes these and opens them.
#[derive(Debug, Clone, PartialEq)]
pub struct SealedServer(pub ServerRecord);

/// A user's secret as stored.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SealedSecret {
    /// Whose.
    pub username: UserId,
    /// `serverName.secretName`, unique for a user: mcp-api's key.
    pub key: String,
    /// For which server.
    pub server_name: ServerName,
    /// Under which name.
    pub secret_name: SecretName,
    /// The encrypted value.
    pub value: String,
}

impl SealedSecret {
    /// The key under which mcp-api stores a secret.
    pub fn key_of(server: &ServerName, name: &SecretName) -> String {
        format!("{server}.{name}")
    }
}

impl std::fmt::Debug for SealedSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SealedSecret").field("username", &self.username).field("key", &self.key).finish()
    }
}

/// A stored secret as far as encryption is concerned, whatever else is known of it.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretRow {
    /// Whose.
    pub username: String,
    /// The key, which names server and secret.
    pub key: String,
    /// The encrypted value; empty where what is stored is none.
    pub value: String,
}

impl std::fmt::Debug for SecretRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretRow").field("username", &self.username).field("key", &self.key).finish()
    }
}

/// The tools that a server listed, kept so that they can be shown while it does not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTools {
    /// Which server.
    pub server: ServerName,
    /// For whom, where listings differ by user; `None`: the one that everybody sees.
    pub user: Option<UserId>,
    /// The JSON array, byte for byte.
    pub tools: String,
}

/// A lease: who may run something that may run only once. The fence grows with every new owner, the
/// revision with every renewal; nobody compares clocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// What is leased.
    pub name: String,
    /// Who holds it; `None` when it was given back.
    pub owner: Option<String>,
    /// Grows with every owner. Work done under an older fence is void.
    pub fence: i64,
    /// Grows with every write.
    pub revision: Revision,
}

/// Small facts that are written once and then stay: the first writer wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fact {
    /// Check values of encryption keys, by key id (`keyring`).
    KeyRing,
    /// What the program did once (`appState`).
    AppState,
}

impl Fact {
    /// The collection's name.
    pub fn collection(self) -> &'static str {
        match self {
            Fact::KeyRing => "keyring",
            Fact::AppState => "appState",
        }
    }
}

/// The fact that what is installed on the first start was ordered.
pub const INSTALLED_ON_START: &str = "install-on-start";
/// What the fact begins with that the package of a server was removed; the server's name follows.
pub const UNINSTALLED: &str = "uninstalled:";

/// Documents of ours that have a key and a revision, and no more structure for the store than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Collection {
    /// Installed packages, by the server that each runs (`packages`, which mcp-api has too).
    Packages,
    /// What exactly is to be installed, by its hash (`packageLocks`).
    PackageLocks,
    /// The installation under way, or the last one, of each server (`jobs`).
    Jobs,
    /// Users' sessions with remote servers (`mcpUserSessions`, which mcp-api has too).
    Sessions,
    /// Users' OAuth tokens for remote servers (`mcpOAuthTokens`, which mcp-api has too).
    OAuthTokens,
    /// What this deployment is known by to authorization servers (`mcpDcrClients`, which mcp-api has too).
    OAuthClients,
    /// Logins that were begun (`oauthLogins`).
    OAuthLogins,
    /// What came of calls that their callers named (`idem`).
    NamedCalls,
    /// Who may use the API (`apiKeys`).
    ApiKeys,
    /// What servers' tools were when they were first seen (`toolPins`).
    ToolPins,
}

impl Collection {
    /// All of them.
    pub const ALL: [Collection; 10] = [
        Collection::Packages,
        Collection::PackageLocks,
        Collection::Jobs,
        Collection::Sessions,
        Collection::OAuthTokens,
        Collection::OAuthClients,
        Collection::OAuthLogins,
        Collection::NamedCalls,
        Collection::ApiKeys,
        Collection::ToolPins,
    ];

    /// Those whose documents belong to a server, which their field `serverName` names, and go with it.
    pub(crate) const OF_SERVERS: [Collection; 4] =
        [Collection::Sessions, Collection::OAuthTokens, Collection::OAuthLogins, Collection::ToolPins];

    /// Its name in the database.
    pub fn name(self) -> &'static str {
        match self {
            Collection::Packages => "packages",
            Collection::PackageLocks => "packageLocks",
            Collection::Jobs => "jobs",
            Collection::Sessions => "mcpUserSessions",
            Collection::OAuthTokens => "mcpOAuthTokens",
            Collection::OAuthClients => "mcpDcrClients",
            Collection::OAuthLogins => "oauthLogins",
            Collection::NamedCalls => "idem",
            Collection::ApiKeys => "apiKeys",
            Collection::ToolPins => "toolPins",
        }
    }

    /// The field that holds the key, as text.
    pub fn key(self) -> &'static str {
        match self {
            Collection::Packages => "mcpServerId",
            Collection::PackageLocks => "generation",
            Collection::Jobs => "serverName",
            Collection::Sessions
            | Collection::OAuthTokens
            | Collection::OAuthClients
            | Collection::OAuthLogins
            | Collection::NamedCalls
            | Collection::ApiKeys
            | Collection::ToolPins => "key",
        }
    }

    /// One key for several parts, another one for any others: a JSON array.
    pub(crate) fn key_of(parts: &[&str]) -> String {
        serde_json::Value::from(parts).to_string()
    }

    /// The key that a document of it holds. One without a key could never be found again.
    pub(crate) fn key_in(self, document: &Document) -> Result<&str, StoreError> {
        let key = document.get(self.key()).and_then(serde_json::Value::as_str).filter(|key| !key.is_empty());
        key.ok_or_else(|| StoreError::Corrupt {
            what: format!("a document without {} for {}", self.key(), self.name()),
        })
    }
}

/// The field of a [`Document`] that says which server it is about.
pub(crate) const SERVER: &str = "serverName";

/// The field by which mcp-api tells registrations with one authorization server apart, beside those of their key.
pub(crate) const ORIGIN: &str = "publicApiOrigin";

/// The field of a [`Document`] that says whether it is active. It counts only where it is `true`.
pub(crate) const ACTIVE: &str = "active";

/// A document of a [`Collection`]. Fields of packages that are `null` are as good as missing: mcp-api
/// writes that for what is not set, so a store may leave them out.
pub type Document = serde_json::Map<String, serde_json::Value>;

/// Why the store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A document with that key exists; for servers also one whose name differs only in case.
    #[error("{existing} already exists")]
    AlreadyExists {
        /// The name of the existing document.
        existing: String,
    },
    /// There is no such document.
    #[error("no such document")]
    NotFound,
    /// The document changed since it was read, or somebody else holds the lease.
    #[error("the document has changed since it was read")]
    Conflict,
    /// The disk is full: reads go on, writes are refused.
    #[error("the disk of the store is full")]
    Full,
    /// It did not answer in time, or cannot be reached.
    #[error("the store is not available")]
    Unavailable {
        /// For the log.
        cause: String,
    },
    /// A stored document cannot be understood. It is left as it is.
    #[error("a stored document cannot be read: {what}")]
    Corrupt {
        /// Which one.
        what: String,
    },
}

/// The store. Every write that returned `Ok` survives a crash of the process and of the machine.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Whether the store answers and can be written.
    async fn ping(&self) -> Result<(), StoreError>;

    /// All servers, oldest first.
    async fn servers(&self) -> Result<Vec<Versioned<SealedServer>>, StoreError>;

    /// One server.
    async fn server(&self, name: &ServerName) -> Result<Option<Versioned<SealedServer>>, StoreError>;

    /// Adds a server. [`StoreError::AlreadyExists`] when its name is taken, also in other case.
    async fn insert_server(&self, server: &SealedServer) -> Result<Revision, StoreError>;

    /// Replaces a server that still has the revision `expected`; else [`StoreError::Conflict`], or
    /// [`StoreError::NotFound`] when it is gone.
    async fn replace_server(&self, server: &SealedServer, expected: Revision)
    -> Result<Revision, StoreError>;

    /// As [`Store::replace_server`], for a record that means the same: the revision stays, so that nobody who
    /// has read it takes it for another one. (A record that has no revision of ours yet gets one.)
    async fn reseal_server(&self, server: &SealedServer, expected: Revision) -> Result<(), StoreError>;

    /// Removes a server and all that belongs to it: users' secrets, tokens and sessions, and listed tools.
    /// Says whether there was one. Repeating it after a crash completes it.
    async fn delete_server(&self, name: &ServerName) -> Result<bool, StoreError>;

    /// Sets a secret. [`StoreError::NotFound`] when its server does not exist;
    /// [`StoreError::AlreadyExists`] when another server's secret has the same key.
    async fn put_secret(&self, secret: &SealedSecret) -> Result<(), StoreError>;

    /// Deletes a secret; says whether there was one.
    async fn delete_secret(
        &self,
        user: &UserId,
        server: &ServerName,
        name: &SecretName,
    ) -> Result<bool, StoreError>;

    /// A user's secrets for one server, by name.
    async fn secrets(&self, user: &UserId, server: &ServerName) -> Result<Vec<SealedSecret>, StoreError>;

    /// A user's secret that mcp-api keeps under a key of its own, which names no server.
    async fn bare_secret(&self, user: &UserId, key: &str) -> Result<Option<SecretRow>, StoreError>;

    /// How many users stored secrets for a server.
    async fn users_with_secrets(&self, server: &ServerName) -> Result<u64, StoreError>;

    /// The secrets of all users after this user and key, in the order of both; at most `limit`.
    async fn secrets_after(
        &self,
        after: Option<(&str, &str)>,
        limit: usize,
    ) -> Result<Vec<SecretRow>, StoreError>;

    /// Puts another text for the same value in the place of the one in `row`; says whether that still stood
    /// there.
    async fn reseal_secret(&self, row: &SecretRow, value: &str) -> Result<bool, StoreError>;

    /// How many values there are that only mcp-api would have written: in its format, or in clear where it has them so.
    async fn legacy_secrets(&self) -> Result<u64, StoreError>;

    /// Keeps the tools that a server listed.
    async fn put_tools(&self, tools: &StoredTools) -> Result<(), StoreError>;

    /// All listings.
    async fn tools(&self) -> Result<Vec<StoredTools>, StoreError>;

    /// A lease as it stands; `None` when nobody ever took it.
    async fn lease(&self, name: &str) -> Result<Option<Lease>, StoreError>;

    /// Takes a lease that nobody has (`seen` is `None` and none exists), that was given back, or whose
    /// revision `seen` has not changed for longer than its holder may be silent, which the caller
    /// judged by its own clock. [`StoreError::Conflict`] when it changed meanwhile.
    async fn take_lease(&self, name: &str, owner: &str, seen: Option<Revision>) -> Result<Lease, StoreError>;

    /// Shows that the owner lives. [`StoreError::Conflict`] when the lease is lost.
    async fn renew_lease(&self, lease: &Lease) -> Result<Lease, StoreError>;

    /// Gives a lease back; nothing happens when it was lost already.
    async fn release_lease(&self, lease: &Lease) -> Result<(), StoreError>;

    /// The documents of a collection, in the order in which they were added; with `active` only those whose
    /// field of that name is `true`. One that cannot be read is logged and left out.
    async fn documents(
        &self,
        collection: Collection,
        active: bool,
    ) -> Result<Vec<Versioned<Document>>, StoreError>;

    /// The documents of a collection whose field `serverName` is this one.
    async fn documents_of(
        &self,
        collection: Collection,
        server: &ServerName,
    ) -> Result<Vec<Versioned<Document>>, StoreError>;

    /// The documents of a collection whose keys come after this one, in the order of the keys; at most `limit`.
    /// Of one that cannot be read there is the key only.
    async fn documents_after(
        &self,
        collection: Collection,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Option<Versioned<Document>>)>, StoreError>;

    /// One document by its key.
    async fn document(
        &self,
        collection: Collection,
        key: &str,
    ) -> Result<Option<Versioned<Document>>, StoreError>;

    /// Adds a document, which holds its key. [`StoreError::AlreadyExists`] when there is one with that key.
    async fn insert_document(
        &self,
        collection: Collection,
        document: &Document,
    ) -> Result<Revision, StoreError>;

    /// Replaces a document that still has the revision `expected`; else [`StoreError::Conflict`], or
    /// [`StoreError::NotFound`] when it is gone.
    async fn replace_document(
        &self,
        collection: Collection,
        document: &Document,
        expected: Revision,
    ) -> Result<Revision, StoreError>;

    /// As [`Store::replace_document`], for a document that means the same: see [`Store::reseal_server`].
    async fn reseal_document(
        &self,
        collection: Collection,
        document: &Document,
        expected: Revision,
    ) -> Result<(), StoreError>;

    /// Removes a document; with `expected` only one that still has that revision, else
    /// [`StoreError::Conflict`]. Says whether there was one.
    async fn delete_document(
        &self,
        collection: Collection,
        key: &str,
        expected: Option<Revision>,
    ) -> Result<bool, StoreError>;

    /// Removes the documents of a collection whose field `expireAt` is before `now`; says how many.
    async fn delete_expired(&self, collection: Collection, now: Timestamp) -> Result<u64, StoreError>;

    /// Writes a fact unless it is written already; returns what stands there now.
    async fn put_once(&self, fact: Fact, key: &str, value: &str) -> Result<String, StoreError>;

    /// Reads a fact.
    async fn fact(&self, fact: Fact, key: &str) -> Result<Option<String>, StoreError>;
}
