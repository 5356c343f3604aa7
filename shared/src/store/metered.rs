//! A store whose operations are counted and measured, whichever it is.

use std::sync::Arc;

use async_trait::async_trait;

use super::{
    Collection, Document, Fact, Lease, Revision, SealedSecret, SealedServer, SecretRow, Store, StoreError,
    StoredTools, Versioned,
};
use crate::{
    ids::{SecretName, ServerName, UserId},
    metrics::{StoreWork, of_store},
    timestamp::Timestamp,
};

/// The store behind it does the work.
pub struct Metered(Arc<dyn Store>);

impl Metered {
    /// Counts what is done with a store.
    pub fn of(store: Arc<dyn Store>) -> Arc<dyn Store> {
        Arc::new(Self(store))
    }
}

macro_rules! metered {
    ($($work:ident $name:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl Store for Metered {
            $(async fn $name(&self, $($argument: $kind),*) -> Result<$answer, StoreError> {
                of_store(StoreWork::$work, self.0.$name($($argument),*)).await
            })*
        }
    };
}

metered! {
    Ping ping() -> ();
    Read servers() -> Vec<Versioned<SealedServer>>;
    Read server(name: &ServerName) -> Option<Versioned<SealedServer>>;
    Write insert_server(server: &SealedServer) -> Revision;
    Write replace_server(server: &SealedServer, expected: Revision) -> Revision;
    Write reseal_server(server: &SealedServer, expected: Revision) -> ();
    Write delete_server(name: &ServerName) -> bool;
    Write put_secret(secret: &SealedSecret) -> ();
    Write delete_secret(user: &UserId, server: &ServerName, name: &SecretName) -> bool;
    Read secrets(user: &UserId, server: &ServerName) -> Vec<SealedSecret>;
    Read bare_secret(user: &UserId, key: &str) -> Option<SecretRow>;
    Read users_with_secrets(server: &ServerName) -> u64;
    Read secrets_after(after: Option<(&str, &str)>, limit: usize) -> Vec<SecretRow>;
    Write reseal_secret(row: &SecretRow, value: &str) -> bool;
    Read legacy_secrets() -> u64;
    Write put_tools(tools: &StoredTools) -> ();
    Read tools() -> Vec<StoredTools>;
    Lease lease(name: &str) -> Option<Lease>;
    Lease take_lease(name: &str, owner: &str, seen: Option<Revision>) -> Lease;
    Lease renew_lease(lease: &Lease) -> Lease;
    Lease release_lease(lease: &Lease) -> ();
    Read documents(collection: Collection, active: bool) -> Vec<Versioned<Document>>;
    Read documents_of(collection: Collection, server: &ServerName) -> Vec<Versioned<Document>>;
    Read documents_after(collection: Collection, after: Option<&str>, limit: usize) -> Vec<(String, Option<Versioned<Document>>)>;
    Read document(collection: Collection, key: &str) -> Option<Versioned<Document>>;
    Write insert_document(collection: Collection, document: &Document) -> Revision;
    Write replace_document(collection: Collection, document: &Document, expected: Revision) -> Revision;
    Write reseal_document(collection: Collection, document: &Document, expected: Revision) -> ();
    Write delete_document(collection: Collection, key: &str, expected: Option<Revision>) -> bool;
    Write delete_expired(collection: Collection, now: Timestamp) -> u64;
    Write put_once(fact: Fact, key: &str, value: &str) -> String;
    Read fact(fact: Fact, key: &str) -> Option<String>;
}
