//! The store of a fleet: a MongoDB database, also one that mcp-api wrote and may still use.
//!
//! A write that returned `Ok` is in the journals of a majority; every read is of what a majority has.
//! There are no transactions: a write names the document as it was read, and what takes several writes
//! is arranged so that it can be repeated, and so that nobody sees what was cut short.
//!
//! Changes that mcp-api makes at the same time are seen at the next read, but they do not change the
//! revision of a document of ours.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use mongodb::{
    Client, Collection,
    bson::{Document, RawDocumentBuf, doc},
    event::{EventHandler, cmap::CmapEvent},
    options::{Acknowledgment, ClientOptions, ReadConcern, ReadPreference, SelectionCriteria, WriteConcern},
};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Semaphore;

use super::{
    Fact, Lease, Revision, SealedSecret, SealedServer, SecretRow, Store, StoreError, StoredTools, Versioned,
};
use crate::{
    ids::{SecretName, ServerName, UserId},
    limits,
    metrics::StorePool,
    timestamp::Timestamp,
};

mod adoption;
mod coordination;
mod documents;
mod examined;
mod failure;
mod generic;
mod schema;
mod secrets;
mod servers;
mod survey;
#[cfg(test)]
mod tests;

pub use examined::Examined;
use failure::{Failure, unavailable};
pub use survey::{Fate, Note, Opens};

/// The database of an mcp-api that was not told otherwise.
pub const DEFAULT_DATABASE: &str = "squad-test";
/// The collection of secrets of an mcp-api that was not told otherwise.
pub const DEFAULT_SECRETS: &str = "secrets";

const APP_NAME: &str = "mcp-api";

/// Where the database is, and how to log in to it.
#[derive(Clone)]
pub struct MongoSettings {
    /// A `mongodb://` or `mongodb+srv://` URI, or `host`, `host:port` or a list of them.
    pub address: SecretString,
    /// Overrides the user name and password of the URI.
    pub credentials: Option<(String, SecretString)>,
    /// The database; else the one in the URI, else [`DEFAULT_DATABASE`].
    pub database: Option<String>,
    /// Overrides the replica set of the URI.
    pub replica_set: Option<String>,
    /// The collection of secrets. mcp-api calls the setting `SECRETS_DBNAME`, but what it takes from it
    /// is the name of a collection in the same database.
    pub secrets: String,
}

impl MongoSettings {
    /// The settings for an address, with mcp-api's names.
    pub fn new(address: SecretString) -> Self {
        Self {
            address,
            credentials: None,
            database: None,
            replica_set: None,
            secrets: DEFAULT_SECRETS.to_owned(),
        }
    }
}

impl fmt::Debug for MongoSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoSettings")
            .field("database", &self.database)
            .field("replica_set", &self.replica_set)
            .field("secrets", &self.secrets)
            .finish_non_exhaustive()
    }
}

/// Why a database was not opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address cannot be understood. What is wrong is not repeated, since it may hold a password.
    #[error(
        "the MongoDB address cannot be understood: it must be `host:port` or a `mongodb://` URI, in which \
         `@`, `:`, `/` and `%` in user names and passwords are written as %40, %3A, %2F and %25"
    )]
    Address,
    /// The database does not do as asked.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The store in a MongoDB database.
pub struct MongoStore {
    database: Database,
    /// A place for every operation that runs or waits for a connection.
    places: Semaphore,
    timeout: Duration,
    /// Whether the last thing that was heard of the database was that it cannot be used.
    failing: AtomicBool,
}

/// The collections. What the operations are stands in the modules below.
struct Database {
    client: Client,
    database: mongodb::Database,
    servers: Collection<RawDocumentBuf>,
    secrets: Collection<RawDocumentBuf>,
    tools: Collection<RawDocumentBuf>,
    leases: Collection<Document>,
    probe: Collection<Document>,
}

impl fmt::Debug for MongoStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MongoStore").field("database", &self.database.database.name()).finish_non_exhaustive()
    }
}

impl MongoStore {
    /// Connects to a database, makes its indexes if they are missing, and resolves what stands in
    /// their way.
    pub async fn connect(settings: MongoSettings) -> Result<Arc<Self>, ConnectError> {
        let store = Self::inspect(settings).await?;
        // Building an index on a large collection may take longer than an operation.
        let indexes =
            tokio::time::timeout(limits::STORE_SCHEMA_TIMEOUT, store.database.ensure_indexes()).await;
        indexes.map_err(|_| unavailable("the indexes were not made in time"))?.map_err(StoreError::from)?;
        Ok(store)
    }

    /// Connects to a database to look into it, and leaves nothing behind.
    pub async fn inspect(settings: MongoSettings) -> Result<Arc<Self>, ConnectError> {
        let options = options(&settings).await?;
        Self::look(settings, options).await
    }

    async fn look(settings: MongoSettings, options: ClientOptions) -> Result<Arc<Self>, ConnectError> {
        let name = settings.database.or_else(|| options.default_database.clone());
        let name = name.unwrap_or_else(|| DEFAULT_DATABASE.to_owned());
        let client =
            Client::with_options(options).map_err(|error| StoreError::from(Failure::Driver(error)))?;
        let database = client.database(&name);
        let store = Self {
            database: Database {
                servers: database.collection("mcp"),
                secrets: database.collection(&settings.secrets),
                tools: database.collection("mcpTools"),
                leases: database.collection("leases"),
                probe: database.collection("probe"),
                client,
                database,
            },
            places: Semaphore::new(limits::STORE_POOL as usize + limits::STORE_QUEUE),
            timeout: limits::STORE_TIMEOUT,
            failing: AtomicBool::new(false),
        };
        store.run(store.database.check()).await?;
        StorePool::of_process().limit(limits::STORE_POOL);
        Ok(Arc::new(store))
    }

    /// Closes the connections. Operations that run are cut short.
    pub async fn close(&self) {
        self.database.client.clone().shutdown().immediate(true).await;
    }

    async fn run<T>(
        &self,
        operation: impl Future<Output = Result<T, Failure>> + Send,
    ) -> Result<T, StoreError> {
        let _place = self.places.try_acquire().map_err(|_| unavailable("queue full"))?;
        let outcome = match tokio::time::timeout(self.timeout, operation).await {
            Ok(outcome) => outcome.map_err(StoreError::from),
            // Whether a write that had begun takes effect is unknown, as after a lost connection.
            Err(_) => Err(unavailable("no answer in time")),
        };
        if let Err(error @ (StoreError::Unavailable { .. } | StoreError::Full)) = &outcome
            && !self.failing.swap(true, Ordering::Relaxed)
        {
            tracing::error!(error.cause = ?error, "the store cannot be used");
        }
        outcome
    }
}

/// The driver's options. What makes an acknowledged write last is not left to the URI.
async fn options(settings: &MongoSettings) -> Result<ClientOptions, ConnectError> {
    crate::tls::install_provider();
    let uri = uri(settings)?;
    // A name that is to be looked up first (`mongodb+srv://`) makes this wait for an answer.
    let parsed = tokio::time::timeout(limits::STORE_TIMEOUT, ClientOptions::parse(uri.expose_secret())).await;
    let parsed =
        parsed.map_err(|_| unavailable("the name of the MongoDB service was not resolved in time"))?;
    let mut options = parsed.map_err(|error| match error.kind.as_ref() {
        mongodb::error::ErrorKind::DnsResolve { .. } => {
            ConnectError::Store(unavailable("the name of the MongoDB service cannot be resolved"))
        }
        _ => ConnectError::Address,
    })?;
    if settings.replica_set.is_some() {
        options.repl_set_name.clone_from(&settings.replica_set);
    }
    options.app_name = Some(APP_NAME.to_owned());
    options.connect_timeout = Some(limits::STORE_SELECTION_TIMEOUT);
    options.server_selection_timeout = Some(limits::STORE_SELECTION_TIMEOUT);
    options.max_pool_size = Some(limits::STORE_POOL);
    options.min_pool_size = None;
    options.cmap_event_handler = Some(EventHandler::callback(count_connection));
    options.retry_reads = Some(true);
    options.retry_writes = Some(true);
    options.read_concern = Some(ReadConcern::majority());
    options.selection_criteria = Some(SelectionCriteria::ReadPreference(ReadPreference::Primary));
    options.write_concern = Some(WriteConcern::builder().w(Acknowledgment::Majority).journal(true).build());
    Ok(options)
}

/// Counts what the pool of connections does. Those that watch the servers are none of its.
fn count_connection(event: CmapEvent) {
    let pool = StorePool::of_process();
    match event {
        CmapEvent::ConnectionCreated(_) => pool.made(),
        CmapEvent::ConnectionClosed(_) => pool.closed(),
        CmapEvent::ConnectionCheckedOut(_) => pool.taken(),
        CmapEvent::ConnectionCheckedIn(_) => pool.returned(),
        CmapEvent::ConnectionCheckoutFailed(_) => pool.failed(),
        _ => {}
    }
}

/// The address as a URI with the credentials in it. The driver takes other settings of a URI that concern
/// logging in, such as the database of users, only together with these.
fn uri(settings: &MongoSettings) -> Result<SecretString, ConnectError> {
    let address = settings.address.expose_secret().trim();
    let (scheme, rest) = address.split_once("://").unwrap_or(("mongodb", address));
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, options) = rest.split_at(end);
    // With an `@` in its path it has a password with a `/`. Read on, its parts would be hosts, which
    // errors name.
    if options.split('?').next().is_some_and(|path| path.contains('@')) {
        return Err(ConnectError::Address);
    }
    let Some((user, password)) = &settings.credentials else {
        return Ok(format!("{scheme}://{rest}").into());
    };
    let hosts = authority.rsplit_once('@').map_or(authority, |(_, hosts)| hosts);
    let (user, password) = (escaped(user), escaped(password.expose_secret()));
    Ok(format!("{scheme}://{user}:{password}@{hosts}{options}").into())
}

/// A text in which nothing has a meaning in a URI.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(3 * text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

impl Database {
    /// Asks for a primary that takes writes.
    async fn check(&self) -> Result<(), Failure> {
        let hello = self.database.run_command(doc! { "hello": 1 }).await?;
        if hello.get_bool("isWritablePrimary").unwrap_or(false) {
            Ok(())
        } else {
            Err(unavailable("the database has no primary").into())
        }
    }

    /// A real write that nobody reads.
    async fn probe(&self) -> Result<(), Failure> {
        let update = doc! { "$inc": { "count": 1_i64 } };
        self.probe.update_one(doc! { "_id": "write" }, update).upsert(true).await?;
        Ok(())
    }
}

#[async_trait]
impl Store for MongoStore {
    async fn ping(&self) -> Result<(), StoreError> {
        self.run(self.database.check()).await?;
        // Only after a failure it is worth a write to see whether writes are taken again. What was
        // restored meanwhile may lack the indexes.
        if self.failing.load(Ordering::Relaxed) {
            self.run(self.database.probe()).await?;
            self.run(self.database.ensure_indexes()).await?;
            if self.failing.swap(false, Ordering::Relaxed) {
                tracing::info!("the store can be used again");
            }
        }
        Ok(())
    }

    async fn servers(&self) -> Result<Vec<Versioned<SealedServer>>, StoreError> {
        self.run(self.database.all_servers()).await
    }

    async fn server(&self, name: &ServerName) -> Result<Option<Versioned<SealedServer>>, StoreError> {
        self.run(self.database.one_server(name)).await
    }

    async fn insert_server(&self, server: &SealedServer) -> Result<Revision, StoreError> {
        self.run(self.database.insert_server(server)).await
    }

    async fn replace_server(
        &self,
        server: &SealedServer,
        expected: Revision,
    ) -> Result<Revision, StoreError> {
        self.run(self.database.replace_server(server, expected)).await
    }

    async fn reseal_server(&self, server: &SealedServer, expected: Revision) -> Result<(), StoreError> {
        self.run(self.database.reseal_server(server, expected)).await
    }

    async fn delete_server(&self, name: &ServerName) -> Result<bool, StoreError> {
        self.run(self.database.delete_server(name)).await
    }

    async fn put_secret(&self, secret: &SealedSecret) -> Result<(), StoreError> {
        self.run(self.database.put_secret(secret)).await
    }

    async fn delete_secret(
        &self,
        user: &UserId,
        server: &ServerName,
        name: &SecretName,
    ) -> Result<bool, StoreError> {
        self.run(self.database.delete_secret(user, server, name)).await
    }

    async fn secrets(&self, user: &UserId, server: &ServerName) -> Result<Vec<SealedSecret>, StoreError> {
        self.run(self.database.secrets_of(user, server)).await
    }

    async fn bare_secret(&self, user: &UserId, key: &str) -> Result<Option<SecretRow>, StoreError> {
        self.run(self.database.bare_secret(user, key)).await
    }

    async fn users_with_secrets(&self, server: &ServerName) -> Result<u64, StoreError> {
        self.run(self.database.users_with_secrets(server)).await
    }

    async fn secrets_after(
        &self,
        after: Option<(&str, &str)>,
        limit: usize,
    ) -> Result<Vec<SecretRow>, StoreError> {
        self.run(self.database.secrets_after(after, limit)).await
    }

    async fn reseal_secret(&self, row: &SecretRow, value: &str) -> Result<bool, StoreError> {
        self.run(self.database.reseal_secret(row, value)).await
    }

    async fn legacy_secrets(&self) -> Result<u64, StoreError> {
        self.run(self.database.legacy_rows()).await
    }

    async fn put_tools(&self, tools: &StoredTools) -> Result<(), StoreError> {
        self.run(self.database.put_tools(tools)).await
    }

    async fn tools(&self) -> Result<Vec<StoredTools>, StoreError> {
        self.run(self.database.all_tools()).await
    }

    async fn lease(&self, name: &str) -> Result<Option<Lease>, StoreError> {
        self.run(self.database.read_lease(name)).await
    }

    async fn take_lease(&self, name: &str, owner: &str, seen: Option<Revision>) -> Result<Lease, StoreError> {
        self.run(self.database.take_lease(name, owner, seen)).await
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease, StoreError> {
        self.run(self.database.renew_lease(lease)).await
    }

    async fn release_lease(&self, lease: &Lease) -> Result<(), StoreError> {
        self.run(self.database.release_lease(lease)).await
    }

    async fn documents(
        &self,
        collection: super::Collection,
        active: bool,
    ) -> Result<Vec<Versioned<super::Document>>, StoreError> {
        self.run(self.database.all_documents(collection, active)).await
    }

    async fn documents_of(
        &self,
        collection: super::Collection,
        server: &ServerName,
    ) -> Result<Vec<Versioned<super::Document>>, StoreError> {
        self.run(self.database.documents_of(collection, server)).await
    }

    async fn documents_after(
        &self,
        collection: super::Collection,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Option<Versioned<super::Document>>)>, StoreError> {
        self.run(self.database.documents_after(collection, after, limit)).await
    }

    async fn document(
        &self,
        collection: super::Collection,
        key: &str,
    ) -> Result<Option<Versioned<super::Document>>, StoreError> {
        self.run(self.database.one_document(collection, key)).await
    }

    async fn insert_document(
        &self,
        collection: super::Collection,
        document: &super::Document,
    ) -> Result<Revision, StoreError> {
        self.run(self.database.insert_document(collection, document)).await
    }

    async fn replace_document(
        &self,
        collection: super::Collection,
        document: &super::Document,
        expected: Revision,
    ) -> Result<Revision, StoreError> {
        self.run(self.database.replace_document(collection, document, expected)).await
    }

    async fn reseal_document(
        &self,
        collection: super::Collection,
        document: &super::Document,
        expected: Revision,
    ) -> Result<(), StoreError> {
        self.run(self.database.reseal_document(collection, document, expected)).await
    }

    async fn delete_document(
        &self,
        collection: super::Collection,
        key: &str,
        expected: Option<Revision>,
    ) -> Result<bool, StoreError> {
        self.run(self.database.delete_document(collection, key, expected)).await
    }

    async fn delete_expired(&self, collection: super::Collection, now: Timestamp) -> Result<u64, StoreError> {
        self.run(self.database.delete_expired(collection, now)).await
    }

    async fn put_once(&self, fact: Fact, key: &str, value: &str) -> Result<String, StoreError> {
        self.run(self.database.put_once(fact, key, value)).await
    }

    async fn fact(&self, fact: Fact, key: &str) -> Result<Option<String>, StoreError> {
        self.run(self.database.read_fact(fact, key)).await
    }
}
