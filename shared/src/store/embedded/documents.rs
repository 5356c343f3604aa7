//! Documents of which the store knows no more than collection, key and revision. Their text is made and
//! read outside the store's thread, which nobody else could use meanwhile: some have several megabytes.

use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::Value;

use super::executor::Failure;
use crate::{
    ids::ServerName,
    store::{ACTIVE, Collection, Document, Revision, SERVER, StoreError, Versioned},
    timestamp::Timestamp,
};

/// A row before its document is understood. The text is taken as bytes: one that is not UTF-8 must not
/// fail the whole listing.
pub(super) struct DocumentRow {
    key: String,
    revision: i64,
    document: Vec<u8>,
}

impl DocumentRow {
    pub(super) fn key(&self) -> &str {
        &self.key
    }

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            key: String::from_utf8_lossy(row.get_ref(0)?.as_bytes()?).into_owned(),
            revision: row.get(1)?,
            document: row.get_ref(2)?.as_bytes()?.to_vec(),
        })
    }

    /// The document. Why it cannot be read is logged here.
    pub(super) fn value(&self, collection: Collection) -> Result<Versioned<Document>, StoreError> {
        match serde_json::from_slice(&self.document) {
            Ok(value) => Ok(Versioned { revision: Revision(self.revision), value }),
            Err(cause) => {
                let collection = collection.name();
                tracing::error!(
                    document.collection = collection, document.key = ?self.key, error.cause = %cause,
                    "a document cannot be read"
                );
                Err(StoreError::Corrupt { what: format!("{collection} {}", self.key) })
            }
        }
    }
}

/// A document that is to be written.
pub(super) struct New {
    collection: Collection,
    key: String,
    active: bool,
    server: Option<String>,
    document: String,
}

impl New {
    pub(super) fn make(collection: Collection, document: &Document) -> Result<Self, StoreError> {
        let key = collection.key_in(document)?.to_owned();
        let text = serde_json::to_string(document)
            .map_err(|cause| StoreError::Corrupt { what: format!("{} {key}: {cause}", collection.name()) })?;
        let active = document.get(ACTIVE) == Some(&Value::Bool(true));
        let server = document.get(SERVER).and_then(Value::as_str).map(str::to_owned);
        Ok(Self { collection, key, active, server, document: text })
    }

    pub(super) fn insert(&self, connection: &Connection) -> Result<Revision, Failure> {
        if exists(connection, self.collection, &self.key)? {
            return Err(StoreError::AlreadyExists { existing: self.key.clone() }.into());
        }
        connection.execute(
            "INSERT INTO documents (collection, key, active, revision, document, server) \
             VALUES (?1, ?2, ?3, 0, ?4, ?5)",
            params![self.collection.name(), self.key, self.active, self.document, self.server],
        )?;
        // As for servers: a revision of a document that was deleted fits none that comes later.
        let revision = connection.query_row(
            "UPDATE documents SET revision = seq << 32 WHERE seq = last_insert_rowid() RETURNING revision",
            [],
            |row| row.get(0),
        )?;
        Ok(Revision(revision))
    }

    pub(super) fn replace(&self, connection: &Connection, expected: Revision) -> Result<Revision, Failure> {
        let replaced = connection
            .query_row(
                "UPDATE documents SET active = ?4, document = ?5, server = ?6, revision = revision + 1 \
                 WHERE collection = ?1 AND key = ?2 AND revision = ?3 RETURNING revision",
                params![
                    self.collection.name(),
                    self.key,
                    expected.0,
                    self.active,
                    self.document,
                    self.server
                ],
                |row| row.get(0).map(Revision),
            )
            .optional()?;
        match replaced {
            Some(revision) => Ok(revision),
            None if exists(connection, self.collection, &self.key)? => Err(StoreError::Conflict.into()),
            None => Err(StoreError::NotFound.into()),
        }
    }

    /// As [`New::replace`], with the revision left as it is.
    pub(super) fn reseal(&self, connection: &Connection, expected: Revision) -> Result<(), Failure> {
        let written = connection.execute(
            "UPDATE documents SET document = ?4 WHERE collection = ?1 AND key = ?2 AND revision = ?3",
            params![self.collection.name(), self.key, expected.0, self.document],
        )?;
        match written {
            0 if exists(connection, self.collection, &self.key)? => Err(StoreError::Conflict.into()),
            0 => Err(StoreError::NotFound.into()),
            _ => Ok(()),
        }
    }
}

pub(super) fn list(
    connection: &Connection,
    collection: Collection,
    active: bool,
) -> Result<Vec<DocumentRow>, Failure> {
    let mut statement = connection.prepare(
        "SELECT key, revision, document FROM documents WHERE collection = ?1 AND active >= ?2 ORDER BY seq",
    )?;
    let rows = statement.query_map(params![collection.name(), active], DocumentRow::read)?;
    Ok(rows.collect::<Result<Vec<_>, _>>()?)
}

pub(super) fn list_of(
    connection: &Connection,
    collection: Collection,
    server: &ServerName,
) -> Result<Vec<DocumentRow>, Failure> {
    let mut statement = connection.prepare(
        "SELECT key, revision, document FROM documents WHERE collection = ?1 AND server = ?2 ORDER BY seq",
    )?;
    let rows = statement.query_map([collection.name(), server.as_str()], DocumentRow::read)?;
    Ok(rows.collect::<Result<Vec<_>, _>>()?)
}

/// A page of a collection, in the order of its keys.
pub(super) fn list_after(
    connection: &Connection,
    collection: Collection,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<DocumentRow>, Failure> {
    let mut statement = connection.prepare(
        "SELECT key, revision, document FROM documents WHERE collection = ?1 AND key > ?2 ORDER BY key LIMIT ?3",
    )?;
    // No key is empty.
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let rows = statement
        .query_map(params![collection.name(), after.unwrap_or_default(), limit], DocumentRow::read)?;
    Ok(rows.collect::<Result<Vec<_>, _>>()?)
}

/// Removes what belongs to a server.
pub(super) fn delete_of(connection: &Connection, server: &ServerName) -> Result<(), Failure> {
    for collection in Collection::OF_SERVERS {
        connection.execute(
            "DELETE FROM documents WHERE collection = ?1 AND server = ?2",
            [collection.name(), server.as_str()],
        )?;
    }
    Ok(())
}

pub(super) fn find(
    connection: &Connection,
    collection: Collection,
    key: &str,
) -> Result<Option<DocumentRow>, Failure> {
    let sql = "SELECT key, revision, document FROM documents WHERE collection = ?1 AND key = ?2";
    Ok(connection.query_row(sql, [collection.name(), key], DocumentRow::read).optional()?)
}

pub(super) fn delete(
    connection: &Connection,
    collection: Collection,
    key: &str,
    expected: Option<Revision>,
) -> Result<bool, Failure> {
    let deleted = connection.execute(
        "DELETE FROM documents WHERE collection = ?1 AND key = ?2 AND revision = ifnull(?3, revision)",
        params![collection.name(), key, expected.map(|revision| revision.0)],
    )?;
    if deleted == 0 && exists(connection, collection, key)? {
        return Err(StoreError::Conflict.into());
    }
    Ok(deleted > 0)
}

pub(super) fn delete_expired(
    connection: &Connection,
    collection: Collection,
    now: Timestamp,
) -> Result<u64, Failure> {
    // Stamps are texts of one length, which are in order as their moments are.
    let sql = "DELETE FROM documents WHERE collection = ?1 AND json_extract(document, '$.expireAt') < ?2";
    let deleted = connection.execute(sql, params![collection.name(), now.to_string()])?;
    Ok(u64::try_from(deleted).unwrap_or(u64::MAX))
}

fn exists(connection: &Connection, collection: Collection, key: &str) -> rusqlite::Result<bool> {
    connection.query_row(
        "SELECT EXISTS (SELECT 1 FROM documents WHERE collection = ?1 AND key = ?2)",
        [collection.name(), key],
        |row| row.get(0),
    )
}
