//! Documents of which the store knows no more than collection, key and revision. Those of collections that
//! mcp-api has too may be its own, and it can go on using them: they have its types, and what it wrote is
//! kept.

use std::collections::HashSet;

use mongodb::{
    Collection as Rows,
    bson::{Bson, DateTime, Document, RawDocumentBuf, doc},
};
use serde_json::Value;

use super::{
    Database,
    documents::{self, REVISION, add_nulls, changed, field_value, render},
    failure::{Failure, is_duplicate},
    servers::{collect, first_revision},
};
use crate::{
    ids::ServerName,
    store::{self, ACTIVE, Collection, Revision, SERVER, StoreError, Versioned},
    timestamp::Timestamp,
};

/// The field that says when a document is of no more use.
pub(super) const EXPIRES: &str = "expireAt";
const UNREADABLE: &str = "a document cannot be read";

/// The fields that mcp-api has as dates.
fn dates(collection: Collection) -> &'static [&'static str] {
    match collection {
        Collection::Packages => &["installed", "lastUpgraded"],
        Collection::Sessions | Collection::OAuthClients => &["createdAt", "updatedAt"],
        Collection::OAuthTokens => &["createdAt", "updatedAt", "expiresAt"],
        Collection::NamedCalls => &[EXPIRES],
        Collection::PackageLocks
        | Collection::Jobs
        | Collection::OAuthLogins
        | Collection::ApiKeys
        | Collection::ToolPins => &[],
    }
}

/// Whether mcp-api has the collection too. It writes `null` for what is not set.
fn is_shared(collection: Collection) -> bool {
    match collection {
        Collection::Packages | Collection::Sessions | Collection::OAuthTokens | Collection::OAuthClients => {
            true
        }
        Collection::PackageLocks
        | Collection::Jobs
        | Collection::OAuthLogins
        | Collection::NamedCalls
        | Collection::ApiKeys
        | Collection::ToolPins => false,
    }
}

/// Whether the ids of the collection's documents are shown, as mcp-api does it.
fn shows_ids(collection: Collection) -> bool {
    collection == Collection::Packages
}

/// A document as it stands in the database.
struct Stored {
    collection: Collection,
    document: Document,
    revision: Revision,
}

impl Stored {
    /// Takes a document apart; `None` if it cannot be read.
    fn read(collection: Collection, raw: &RawDocumentBuf) -> Option<Self> {
        let document = Document::try_from(raw).ok()?;
        let revision = documents::revision(raw, &document)?;
        Some(Self { collection, document, revision })
    }

    fn value(&self) -> Versioned<store::Document> {
        let shared = is_shared(self.collection);
        let fields = self.document.iter().filter(|(field, value)| match field.as_str() {
            REVISION => false,
            "_id" => shows_ids(self.collection),
            _ => !shared || **value != Bson::Null,
        });
        let value = fields.map(|(field, value)| (field.clone(), render(value))).collect();
        Versioned { revision: self.revision, value }
    }

    fn replaced_by(&self, new: &store::Document, revision: i64) -> Document {
        let mut document = changed(&self.document, &own_fields(new), dates(self.collection));
        if is_shared(self.collection) {
            add_nulls(&self.document, &mut document);
        }
        document.insert(REVISION, revision);
        document
    }

    fn unchanged(&self) -> Document {
        documents::unchanged(&self.document, self.revision)
    }
}

/// What of a document is the caller's: the id stays what it is, and the revision is the store's.
fn own_fields(document: &store::Document) -> store::Document {
    let own = document.iter().filter(|(field, _)| !matches!(field.as_str(), "_id" | REVISION));
    own.map(|(field, value)| (field.clone(), value.clone())).collect()
}

fn new_document(collection: Collection, document: &store::Document, revision: i64) -> Document {
    let typed = |field: &str, value: &Value| field_value(field, value, dates(collection));
    let mut new = Document::new();
    if let Some(id) = document.get("_id").filter(|_| shows_ids(collection)) {
        new.insert("_id", typed("_id", id));
    }
    new.extend(own_fields(document).iter().map(|(field, value)| (field.clone(), typed(field, value))));
    new.insert(REVISION, revision);
    new
}

fn by_key(collection: Collection, key: &str) -> Document {
    doc! { collection.key(): { "$eq": key } }
}

impl Database {
    pub(super) fn documents(&self, collection: Collection) -> Rows<RawDocumentBuf> {
        self.database.collection(collection.name())
    }

    pub(super) async fn all_documents(
        &self,
        collection: Collection,
        active: bool,
    ) -> Result<Vec<Versioned<store::Document>>, Failure> {
        let filter = if active {
            doc! { ACTIVE: { "$eq": true } }
        } else {
            doc! {}
        };
        self.found_documents(collection, filter).await
    }

    pub(super) async fn documents_of(
        &self,
        collection: Collection,
        server: &ServerName,
    ) -> Result<Vec<Versioned<store::Document>>, Failure> {
        self.found_documents(collection, doc! { SERVER: { "$eq": server.as_str() } }).await
    }

    /// The ids of all documents that belong to a server, also of those that cannot be read.
    pub(super) async fn ids_of(&self, server: &ServerName) -> Result<Vec<(Collection, Vec<Bson>)>, Failure> {
        let mut all = Vec::new();
        for collection in Collection::OF_SERVERS {
            let rows = self.documents(collection).clone_with_type::<Document>();
            let ids = rows.distinct("_id", doc! { SERVER: { "$eq": server.as_str() } }).await?;
            if !ids.is_empty() {
                all.push((collection, ids));
            }
        }
        Ok(all)
    }

    /// Removes documents by their ids.
    pub(super) async fn delete_ids(&self, all: Vec<(Collection, Vec<Bson>)>) -> Result<(), Failure> {
        for (collection, ids) in all {
            self.documents(collection).delete_many(doc! { "_id": { "$in": ids } }).await?;
        }
        Ok(())
    }

    async fn found_documents(
        &self,
        collection: Collection,
        filter: Document,
    ) -> Result<Vec<Versioned<store::Document>>, Failure> {
        // The newest first, since of several with one key that is the one that counts.
        let rows = collect(self.documents(collection).find(filter).sort(doc! { "_id": -1 }).await?).await?;
        let mut keys = HashSet::new();
        let mut documents = Vec::with_capacity(rows.len());
        for row in &rows {
            let Some(key) = row.get_str(collection.key()).ok().filter(|key| !key.is_empty()) else {
                // mcp-api has such: packages whose installation failed, and which no server runs.
                let id = row.get("_id").ok().flatten();
                tracing::warn!(
                    document.collection = collection.name(), document.id = ?id,
                    "a document without a key is left out"
                );
                continue;
            };
            let left_out = match Stored::read(collection, row) {
                Some(_) if !keys.insert(key) => "a document was stored twice: the older one is left out",
                Some(stored) => {
                    documents.push(stored.value());
                    continue;
                }
                None => UNREADABLE,
            };
            tracing::error!(document.collection = collection.name(), document.key = ?key, "{left_out}");
        }
        documents.reverse();
        Ok(documents)
    }

    pub(super) async fn documents_after(
        &self,
        collection: Collection,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Option<Versioned<store::Document>>)>, Failure> {
        // What has no key, or no text for one, is no document of ours.
        let filter = doc! { collection.key(): { "$gt": after.unwrap_or_default() } };
        let documents = self.documents(collection);
        let found = documents.find(filter).sort(doc! { collection.key(): 1 });
        let rows = collect(found.limit(i64::try_from(limit).unwrap_or(i64::MAX)).await?).await?;
        let read = |row: &RawDocumentBuf| {
            let key = row.get_str(collection.key()).ok()?.to_owned();
            Some((key, Stored::read(collection, row).map(|stored| stored.value())))
        };
        Ok(rows.iter().filter_map(read).collect())
    }

    pub(super) async fn one_document(
        &self,
        collection: Collection,
        key: &str,
    ) -> Result<Option<Versioned<store::Document>>, Failure> {
        Ok(self.stored_document(collection, key).await?.map(|stored| stored.value()))
    }

    async fn stored_document(&self, collection: Collection, key: &str) -> Result<Option<Stored>, Failure> {
        let rows = self.documents(collection);
        let found = rows.find_one(by_key(collection, key)).sort(doc! { "_id": -1 }).await?;
        let Some(row) = found else { return Ok(None) };
        match Stored::read(collection, &row) {
            Some(stored) => Ok(Some(stored)),
            None => {
                let collection = collection.name();
                tracing::error!(document.collection = collection, document.key = ?key, "{UNREADABLE}");
                Err(StoreError::Corrupt { what: format!("{collection} {key}") }.into())
            }
        }
    }

    async fn has_document(&self, collection: Collection, key: &str) -> Result<bool, Failure> {
        let rows = self.documents(collection);
        let found = rows.find_one(by_key(collection, key)).projection(doc! { "_id": 1 });
        Ok(found.await?.is_some())
    }

    pub(super) async fn insert_document(
        &self,
        collection: Collection,
        document: &store::Document,
    ) -> Result<Revision, Failure> {
        let key = collection.key_in(document)?;
        let taken = || Failure::from(StoreError::AlreadyExists { existing: key.to_owned() });
        // The index would refuse it too, but only when it has got all of it, which may be long.
        if self.has_document(collection, key).await? {
            return Err(taken());
        }
        let revision = first_revision()?;
        let rows = self.documents(collection).clone_with_type::<Document>();
        match rows.insert_one(new_document(collection, document, revision)).await {
            Ok(_) => Ok(Revision(revision)),
            Err(error) if is_duplicate(&error) => Err(taken()),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn replace_document(
        &self,
        collection: Collection,
        document: &store::Document,
        expected: Revision,
    ) -> Result<Revision, Failure> {
        // As for servers: mcp-api's documents get a first number; later ones count on.
        let revision = if expected.0 < 0 { first_revision()? } else { expected.0 + 1 };
        self.rewrite_document(collection, document, expected, revision).await
    }

    pub(super) async fn reseal_document(
        &self,
        collection: Collection,
        document: &store::Document,
        expected: Revision,
    ) -> Result<(), Failure> {
        let revision = if expected.0 < 0 { first_revision()? } else { expected.0 };
        self.rewrite_document(collection, document, expected, revision).await.map(drop)
    }

    /// Writes a document in the place of one that still has the revision `expected`.
    async fn rewrite_document(
        &self,
        collection: Collection,
        document: &store::Document,
        expected: Revision,
        revision: i64,
    ) -> Result<Revision, Failure> {
        let key = collection.key_in(document)?;
        let Some(stored) = self.stored_document(collection, key).await? else {
            return Err(StoreError::NotFound.into());
        };
        if stored.revision != expected {
            return Err(StoreError::Conflict.into());
        }
        let new = stored.replaced_by(document, revision);
        let rows = self.documents(collection).clone_with_type::<Document>();
        if rows.replace_one(stored.unchanged(), new).await?.matched_count > 0 {
            return Ok(Revision(revision));
        }
        let gone = !self.has_document(collection, key).await?;
        Err(if gone { StoreError::NotFound } else { StoreError::Conflict }.into())
    }

    pub(super) async fn delete_document(
        &self,
        collection: Collection,
        key: &str,
        expected: Option<Revision>,
    ) -> Result<bool, Failure> {
        let rows = self.documents(collection);
        let Some(expected) = expected else {
            // Also older ones of the same key, which would be seen again otherwise.
            return Ok(rows.delete_many(by_key(collection, key)).await?.deleted_count > 0);
        };
        let Some(stored) = self.stored_document(collection, key).await? else { return Ok(false) };
        if stored.revision == expected && rows.delete_one(stored.unchanged()).await?.deleted_count > 0 {
            return Ok(true);
        }
        if self.has_document(collection, key).await? { Err(StoreError::Conflict.into()) } else { Ok(false) }
    }

    pub(super) async fn delete_expired(
        &self,
        collection: Collection,
        now: Timestamp,
    ) -> Result<u64, Failure> {
        let before = doc! { EXPIRES: { "$lt": DateTime::from_millis(now.millis()) } };
        Ok(self.documents(collection).delete_many(before).await?.deleted_count)
    }
}
