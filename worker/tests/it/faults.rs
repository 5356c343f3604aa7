//! A store whose link can be cut: a fault injector around the real one.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use mcp_shared::{
    ids::{SecretName, ServerName, UserId},
    store::{
        Collection, Document, Fact, Lease, Revision, SealedSecret, SealedServer, SecretRow, Store,
        StoreError, StoredTools, Versioned,
    },
    timestamp::Timestamp,
};
use tokio::sync::watch;

/// What happens to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// It is carried out.
    Whole,
    /// It fails at once.
    Cut,
    /// It waits until the link is whole, and is carried out then, whoever still waits for it.
    Frozen,
}

/// One worker's link to the store.
pub struct Faulty {
    store: Arc<dyn Store>,
    link: watch::Sender<Link>,
    leases: AtomicUsize,
}

impl Faulty {
    pub fn new(store: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self { store, link: watch::Sender::new(Link::Whole), leases: AtomicUsize::new(0) })
    }

    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }

    /// How many operations on leases there were.
    pub fn lease_operations(&self) -> usize {
        self.leases.load(Ordering::Acquire)
    }

    async fn pass<T, F>(&self, operation: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let operation = operation(Arc::clone(&self.store));
        let mut link = self.link.subscribe();
        let state = *link.borrow();
        match state {
            Link::Whole => operation.await,
            Link::Cut => Err(StoreError::Unavailable { cause: "the test cut the link".to_owned() }),
            Link::Frozen => {
                let late = tokio::spawn(async move {
                    let _ = link.wait_for(|link| *link != Link::Frozen).await;
                    operation.await
                });
                late.await.unwrap()
            }
        }
    }
}

#[async_trait]
impl Store for Faulty {
    async fn ping(&self) -> Result<(), StoreError> {
        self.pass(|store| async move { store.ping().await }).await
    }

    async fn servers(&self) -> Result<Vec<Versioned<SealedServer>>, StoreError> {
        self.pass(|store| async move { store.servers().await }).await
    }

    async fn server(&self, name: &ServerName) -> Result<Option<Versioned<SealedServer>>, StoreError> {
        let name = name.clone();
        self.pass(|store| async move { store.server(&name).await }).await
    }

    async fn insert_server(&self, server: &SealedServer) -> Result<Revision, StoreError> {
        let server = server.clone();
        self.pass(|store| async move { store.insert_server(&server).await }).await
    }

    async fn replace_server(
        &self,
        server: &SealedServer,
        expected: Revision,
    ) -> Result<Revision, StoreError> {
        let server = server.clone();
        self.pass(move |store| async move { store.replace_server(&server, expected).await }).await
    }

    async fn reseal_server(&self, server: &SealedServer, expected: Revision) -> Result<(), StoreError> {
        let server = server.clone();
        self.pass(move |store| async move { store.reseal_server(&server, expected).await }).await
    }

    async fn delete_server(&self, name: &ServerName) -> Result<bool, StoreError> {
        let name = name.clone();
        self.pass(|store| async move { store.delete_server(&name).await }).await
    }

    async fn put_secret(&self, secret: &SealedSecret) -> Result<(), StoreError> {
        let secret = secret.clone();
        self.pass(|store| async move { store.put_secret(&secret).await }).await
    }

    async fn delete_secret(
        &self,
        user: &UserId,
        server: &ServerName,
        name: &SecretName,
    ) -> Result<bool, StoreError> {
        let (user, server, name) = (user.clone(), server.clone(), name.clone());
        self.pass(|store| async move { store.delete_secret(&user, &server, &name).await }).await
    }

    async fn secrets(&self, user: &UserId, server: &ServerName) -> Result<Vec<SealedSecret>, StoreError> {
        let (user, server) = (user.clone(), server.clone());
        self.pass(|store| async move { store.secrets(&user, &server).await }).await
    }

    async fn bare_secret(&self, user: &UserId, key: &str) -> Result<Option<SecretRow>, StoreError> {
        let (user, key) = (user.clone(), key.to_owned());
        self.pass(|store| async move { store.bare_secret(&user, &key).await }).await
    }

    async fn users_with_secrets(&self, server: &ServerName) -> Result<u64, StoreError> {
        let server = server.clone();
        self.pass(|store| async move { store.users_with_secrets(&server).await }).await
    }

    async fn secrets_after(
        &self,
        after: Option<(&str, &str)>,
        limit: usize,
    ) -> Result<Vec<SecretRow>, StoreError> {
        let after = after.map(|(user, key)| (user.to_owned(), key.to_owned()));
        let page = move |store: Arc<dyn Store>| async move {
            let after = after.as_ref().map(|(user, key)| (user.as_str(), key.as_str()));
            store.secrets_after(after, limit).await
        };
        self.pass(page).await
    }

    async fn reseal_secret(&self, row: &SecretRow, value: &str) -> Result<bool, StoreError> {
        let (row, value) = (row.clone(), value.to_owned());
        self.pass(move |store| async move { store.reseal_secret(&row, &value).await }).await
    }

    async fn legacy_secrets(&self) -> Result<u64, StoreError> {
        self.pass(|store| async move { store.legacy_secrets().await }).await
    }

    async fn put_tools(&self, tools: &StoredTools) -> Result<(), StoreError> {
        let tools = tools.clone();
        self.pass(|store| async move { store.put_tools(&tools).await }).await
    }

    async fn tools(&self) -> Result<Vec<StoredTools>, StoreError> {
        self.pass(|store| async move { store.tools().await }).await
    }

    async fn lease(&self, name: &str) -> Result<Option<Lease>, StoreError> {
        self.leases.fetch_add(1, Ordering::AcqRel);
        let name = name.to_owned();
        self.pass(|store| async move { store.lease(&name).await }).await
    }

    async fn take_lease(&self, name: &str, owner: &str, seen: Option<Revision>) -> Result<Lease, StoreError> {
        self.leases.fetch_add(1, Ordering::AcqRel);
        let (name, owner) = (name.to_owned(), owner.to_owned());
        self.pass(move |store| async move { store.take_lease(&name, &owner, seen).await }).await
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease, StoreError> {
        self.leases.fetch_add(1, Ordering::AcqRel);
        let lease = lease.clone();
        self.pass(|store| async move { store.renew_lease(&lease).await }).await
    }

    async fn release_lease(&self, lease: &Lease) -> Result<(), StoreError> {
        self.leases.fetch_add(1, Ordering::AcqRel);
        let lease = lease.clone();
        self.pass(|store| async move { store.release_lease(&lease).await }).await
    }

    async fn documents(
        &self,
        collection: Collection,
        active: bool,
    ) -> Result<Vec<Versioned<Document>>, StoreError> {
        self.pass(move |store| async move { store.documents(collection, active).await }).await
    }

    async fn documents_of(
        &self,
        collection: Collection,
        server: &ServerName,
    ) -> Result<Vec<Versioned<Document>>, StoreError> {
        let server = server.clone();
        self.pass(move |store| async move { store.documents_of(collection, &server).await }).await
    }

    async fn documents_after(
        &self,
        collection: Collection,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Option<Versioned<Document>>)>, StoreError> {
        let after = after.map(str::to_owned);
        self.pass(
            move |store| async move { store.documents_after(collection, after.as_deref(), limit).await },
        )
        .await
    }

    async fn document(
        &self,
        collection: Collection,
        key: &str,
    ) -> Result<Option<Versioned<Document>>, StoreError> {
        let key = key.to_owned();
        self.pass(move |store| async move { store.document(collection, &key).await }).await
    }

    async fn insert_document(
        &self,
        collection: Collection,
        document: &Document,
    ) -> Result<Revision, StoreError> {
        let document = document.clone();
        self.pass(move |store| async move { store.insert_document(collection, &document).await }).await
    }

    async fn replace_document(
        &self,
        collection: Collection,
        document: &Document,
        expected: Revision,
    ) -> Result<Revision, StoreError> {
        let document = document.clone();
        self.pass(move |store| async move { store.replace_document(collection, &document, expected).await })
            .await
    }

    async fn reseal_document(
        &self,
        collection: Collection,
        document: &Document,
        expected: Revision,
    ) -> Result<(), StoreError> {
        let document = document.clone();
        self.pass(move |store| async move { store.reseal_document(collection, &document, expected).await })
            .await
    }

    async fn delete_document(
        &self,
        collection: Collection,
        key: &str,
        expected: Option<Revision>,
    ) -> Result<bool, StoreError> {
        let key = key.to_owned();
        self.pass(move |store| async move { store.delete_document(collection, &key, expected).await }).await
    }

    async fn delete_expired(&self, collection: Collection, now: Timestamp) -> Result<u64, StoreError> {
        self.pass(move |store| async move { store.delete_expired(collection, now).await }).await
    }

    async fn put_once(&self, fact: Fact, key: &str, value: &str) -> Result<String, StoreError> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.pass(move |store| async move { store.put_once(fact, &key, &value).await }).await
    }

    async fn fact(&self, fact: Fact, key: &str) -> Result<Option<String>, StoreError> {
        let key = key.to_owned();
        self.pass(move |store| async move { store.fact(fact, &key).await }).await
    }
}
