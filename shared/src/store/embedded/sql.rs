//! The store's operations, as SQL. What needs several statements is one command, and a command is a
//! savepoint: it takes effect as a whole or not at all.

use std::sync::atomic::Ordering;

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row, params};
use serde_json::{Map, Value};

use super::{
    EmbeddedStore,
    documents::{self, DocumentRow},
    executor::Failure,
    resealing, schema,
};
use crate::{
    ids::{SecretName, ServerName, UserId},
    server::ServerRecord,
    store::{
        self, Collection, Fact, Lease, Revision, SealedSecret, SealedServer, SecretRow, Store, StoreError,
        StoredTools, Versioned,
    },
    timestamp::Timestamp,
};

#[async_trait]
impl Store for EmbeddedStore {
    async fn ping(&self) -> Result<(), StoreError> {
        let failing = self.shared.failing.load(Ordering::Relaxed);
        self.write(move |connection| {
            // Beginning a transaction shows that the file can be locked and is not read-only. Only
            // after a failure it is worth a wait for the disk to see whether it takes writes again;
            // writing the version that stands there anyway changes nothing.
            if failing {
                schema::rewrite_version(connection)?;
            }
            Ok(())
        })
        .await
    }

    async fn servers(&self) -> Result<Vec<Versioned<SealedServer>>, StoreError> {
        let rows = self
            .read(|connection| {
                let mut statement =
                    connection.prepare("SELECT name, revision, document FROM servers ORDER BY seq")?;
                let rows = statement.query_map([], ServerRow::read)?;
                Ok(rows.collect::<Result<Vec<_>, _>>()?)
            })
            .await?;
        let readable = rows.into_iter().filter_map(|row| {
            // One record that cannot be read must not keep the other servers from running.
            row.record()
                .inspect_err(|cause| {
                    tracing::error!(server.name = %row.name, error.cause = %cause, "{UNREADABLE}");
                })
                .ok()
                .map(|value| Versioned { revision: Revision(row.revision), value })
        });
        Ok(readable.collect())
    }

    async fn server(&self, name: &ServerName) -> Result<Option<Versioned<SealedServer>>, StoreError> {
        let wanted = name.clone();
        let row = self
            .read(move |connection| {
                let sql = "SELECT name, revision, document FROM servers WHERE name = ?1";
                Ok(connection.query_row(sql, [wanted.as_str()], ServerRow::read).optional()?)
            })
            .await?;
        let Some(row) = row else { return Ok(None) };
        match row.record() {
            Ok(value) => Ok(Some(Versioned { revision: Revision(row.revision), value })),
            Err(cause) => {
                tracing::error!(server.name = %name, error.cause = %cause, "{UNREADABLE}");
                Err(StoreError::Corrupt { what: format!("server {name}") })
            }
        }
    }

    async fn insert_server(&self, server: &SealedServer) -> Result<Revision, StoreError> {
        let document = document(server)?;
        let name = server.0.name.clone();
        self.write(move |connection| {
            let case_key = name.case_key();
            let existing = connection
                .query_row("SELECT name FROM servers WHERE case_key = ?1", [&case_key], |row| row.get(0))
                .optional()?;
            if let Some(existing) = existing {
                return Err(StoreError::AlreadyExists { existing }.into());
            }
            // What was stored for an earlier server of this name just after it had gone.
            documents::delete_of(connection, &name)?;
            connection.execute(
                "INSERT INTO servers (name, case_key, revision, document) VALUES (?1, ?2, 0, ?3)",
                params![name.as_str(), case_key, document],
            )?;
            // Numbers of rows are never used twice, so a revision that somebody read before the
            // server was deleted cannot fit one that was registered later under the same name.
            let revision = connection.query_row(
                "UPDATE servers SET revision = seq << 32 WHERE seq = last_insert_rowid() RETURNING revision",
                [],
                |row| row.get(0),
            )?;
            Ok(Revision(revision))
        })
        .await
    }

    async fn replace_server(
        &self,
        server: &SealedServer,
        expected: Revision,
    ) -> Result<Revision, StoreError> {
        let document = document(server)?;
        let name = server.0.name.clone();
        self.write(move |connection| {
            let replaced = connection
                .query_row(
                    "UPDATE servers SET document = ?3, revision = revision + 1 \
                     WHERE name = ?1 AND revision = ?2 RETURNING revision",
                    params![name.as_str(), expected.0, document],
                    |row| row.get(0).map(Revision),
                )
                .optional()?;
            match replaced {
                Some(revision) => Ok(revision),
                None if server_exists(connection, &name)? => Err(StoreError::Conflict.into()),
                None => Err(StoreError::NotFound.into()),
            }
        })
        .await
    }

    async fn reseal_server(&self, server: &SealedServer, expected: Revision) -> Result<(), StoreError> {
        let (document, name) = (document(server)?, server.0.name.clone());
        self.write(move |connection| resealing::server(connection, &name, &document, expected)).await
    }

    async fn delete_server(&self, name: &ServerName) -> Result<bool, StoreError> {
        let name = name.clone();
        self.write(move |connection| {
            // What belongs to the server goes even if its record is gone already.
            connection.execute("DELETE FROM secrets WHERE server_name = ?1", [name.as_str()])?;
            connection.execute("DELETE FROM tools WHERE server = ?1", [name.as_str()])?;
            documents::delete_of(connection, &name)?;
            Ok(connection.execute("DELETE FROM servers WHERE name = ?1", [name.as_str()])? > 0)
        })
        .await
    }

    async fn put_secret(&self, secret: &SealedSecret) -> Result<(), StoreError> {
        let secret = secret.clone();
        self.write(move |connection| {
            if !server_exists(connection, &secret.server_name)? {
                return Err(StoreError::NotFound.into());
            }
            // Names with dots can give two different secrets one key (`a` + `b.c`, `a.b` + `c`).
            // Overwriting would take the other server's secret away, so the newcomer is refused.
            let written = connection.execute(
                "INSERT INTO secrets (username, key, server_name, secret_name, value) \
                 VALUES (?1, ?2, ?3, ?4, ?5) \
                 ON CONFLICT (username, key) DO UPDATE SET value = excluded.value \
                 WHERE server_name = excluded.server_name AND secret_name = excluded.secret_name",
                params![
                    secret.username.as_str(),
                    secret.key,
                    secret.server_name.as_str(),
                    secret.secret_name.as_str(),
                    secret.value
                ],
            )?;
            if written == 0 { Err(StoreError::AlreadyExists { existing: secret.key }.into()) } else { Ok(()) }
        })
        .await
    }

    async fn delete_secret(
        &self,
        user: &UserId,
        server: &ServerName,
        name: &SecretName,
    ) -> Result<bool, StoreError> {
        let (user, server, name) = (user.clone(), server.clone(), name.clone());
        self.write(move |connection| {
            let deleted = connection.execute(
                "DELETE FROM secrets WHERE server_name = ?1 AND username = ?2 AND secret_name = ?3",
                [server.as_str(), user.as_str(), name.as_str()],
            )?;
            Ok(deleted > 0)
        })
        .await
    }

    async fn secrets(&self, user: &UserId, server: &ServerName) -> Result<Vec<SealedSecret>, StoreError> {
        let (user, server) = (user.clone(), server.clone());
        self.read(move |connection| {
            let mut statement = connection.prepare(
                "SELECT key, secret_name, value FROM secrets \
                 WHERE server_name = ?1 AND username = ?2 ORDER BY secret_name",
            )?;
            let rows = statement.query_map([server.as_str(), user.as_str()], |row| {
                Ok(SealedSecret {
                    username: user.clone(),
                    key: row.get(0)?,
                    server_name: server.clone(),
                    secret_name: SecretName::from_stored(row.get::<_, String>(1)?),
                    value: row.get(2)?,
                })
            })?;
            Ok(rows.collect::<Result<Vec<_>, _>>()?)
        })
        .await
    }

    async fn bare_secret(&self, _: &UserId, _: &str) -> Result<Option<SecretRow>, StoreError> {
        // mcp-api never wrote here.
        Ok(None)
    }

    async fn users_with_secrets(&self, server: &ServerName) -> Result<u64, StoreError> {
        let server = server.clone();
        self.read(move |connection| {
            let sql = "SELECT count(DISTINCT username) FROM secrets WHERE server_name = ?1";
            count(connection.query_row(sql, [server.as_str()], |row| row.get(0))?)
        })
        .await
    }

    async fn secrets_after(
        &self,
        after: Option<(&str, &str)>,
        limit: usize,
    ) -> Result<Vec<SecretRow>, StoreError> {
        let after = after.map(|(user, key)| (user.to_owned(), key.to_owned()));
        self.read(move |connection| resealing::secrets_after(connection, after, limit)).await
    }

    async fn reseal_secret(&self, row: &SecretRow, value: &str) -> Result<bool, StoreError> {
        let (row, value) = (row.clone(), value.to_owned());
        self.write(move |connection| resealing::secret(connection, row, value)).await
    }

    async fn legacy_secrets(&self) -> Result<u64, StoreError> {
        self.read(|connection| {
            // Nonce, tag and ciphertext in hexadecimal digits, with colons between them.
            let digit = "[0-9a-fA-F]";
            let head = format!("{}:{}:*", digit.repeat(24), digit.repeat(32));
            let sql = "SELECT count(*) FROM secrets \
                       WHERE value GLOB ?1 AND substr(value, 59) NOT GLOB '*[^0-9a-fA-F]*'";
            count(connection.query_row(sql, [head], |row| row.get(0))?)
        })
        .await
    }

    async fn put_tools(&self, tools: &StoredTools) -> Result<(), StoreError> {
        let tools = tools.clone();
        self.write(move |connection| {
            // Every start of a server lists its tools, and nearly always they are the same: a
            // transaction that changes no row does not wait for the disk.
            connection.execute(
                "INSERT INTO tools (server, user, tools) VALUES (?1, ?2, ?3) \
                 ON CONFLICT (server, user) DO UPDATE SET tools = excluded.tools \
                 WHERE tools <> excluded.tools",
                [tools.server.as_str(), tools.user.as_ref().map_or("", UserId::as_str), &tools.tools],
            )?;
            Ok(())
        })
        .await
    }

    async fn tools(&self) -> Result<Vec<StoredTools>, StoreError> {
        self.read(|connection| {
            let mut statement =
                connection.prepare("SELECT server, user, tools FROM tools ORDER BY server, user")?;
            let rows = statement.query_map([], |row| {
                let user: String = row.get(1)?;
                Ok(StoredTools {
                    server: ServerName::from_stored(row.get::<_, String>(0)?),
                    user: (!user.is_empty()).then(|| UserId::from_stored(user)),
                    tools: row.get(2)?,
                })
            })?;
            Ok(rows.collect::<Result<Vec<_>, _>>()?)
        })
        .await
    }

    async fn lease(&self, name: &str) -> Result<Option<Lease>, StoreError> {
        let name = name.to_owned();
        self.read(move |connection| {
            let sql = "SELECT name, owner, fence, revision FROM leases WHERE name = ?1";
            Ok(connection.query_row(sql, [name], read_lease).optional()?)
        })
        .await
    }

    async fn take_lease(&self, name: &str, owner: &str, seen: Option<Revision>) -> Result<Lease, StoreError> {
        let (name, owner) = (name.to_owned(), owner.to_owned());
        self.write(move |connection| {
            // A caller who saw a revision acts on what it saw, so nothing may have changed since. One
            // who saw none may have what nobody holds.
            let taken = match seen {
                Some(seen) => connection.query_row(
                    "UPDATE leases SET owner = ?2, fence = fence + 1, revision = revision + 1 \
                     WHERE name = ?1 AND revision = ?3 RETURNING name, owner, fence, revision",
                    params![name, owner, seen.0],
                    read_lease,
                ),
                None => connection.query_row(
                    "INSERT INTO leases (name, owner, fence, revision) VALUES (?1, ?2, 1, 1) \
                     ON CONFLICT (name) DO UPDATE \
                     SET owner = excluded.owner, fence = fence + 1, revision = revision + 1 \
                     WHERE owner IS NULL RETURNING name, owner, fence, revision",
                    params![name, owner],
                    read_lease,
                ),
            }
            .optional()?;
            taken.ok_or_else(|| StoreError::Conflict.into())
        })
        .await
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease, StoreError> {
        let lease = lease.clone();
        self.write(move |connection| {
            // Owner and fence say whose it is. The revision may be older than what is stored when the
            // answer to an earlier renewal was lost.
            let renewed = connection
                .query_row(
                    "UPDATE leases SET revision = revision + 1 \
                     WHERE name = ?1 AND owner = ?2 AND fence = ?3 RETURNING name, owner, fence, revision",
                    params![lease.name, lease.owner, lease.fence],
                    read_lease,
                )
                .optional()?;
            renewed.ok_or_else(|| StoreError::Conflict.into())
        })
        .await
    }

    async fn release_lease(&self, lease: &Lease) -> Result<(), StoreError> {
        let lease = lease.clone();
        self.write(move |connection| {
            // The row stays, so that the next owner's fence is higher than this one's.
            connection.execute(
                "UPDATE leases SET owner = NULL, revision = revision + 1 \
                 WHERE name = ?1 AND owner = ?2 AND fence = ?3",
                params![lease.name, lease.owner, lease.fence],
            )?;
            Ok(())
        })
        .await
    }

    async fn documents(
        &self,
        collection: Collection,
        active: bool,
    ) -> Result<Vec<Versioned<store::Document>>, StoreError> {
        let rows = self.read(move |connection| documents::list(connection, collection, active)).await?;
        Ok(rows.iter().filter_map(|row| row.value(collection).ok()).collect())
    }

    async fn documents_of(
        &self,
        collection: Collection,
        server: &ServerName,
    ) -> Result<Vec<Versioned<store::Document>>, StoreError> {
        let server = server.clone();
        let rows = self.read(move |connection| documents::list_of(connection, collection, &server)).await?;
        Ok(rows.iter().filter_map(|row| row.value(collection).ok()).collect())
    }

    async fn documents_after(
        &self,
        collection: Collection,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Option<Versioned<store::Document>>)>, StoreError> {
        let after = after.map(str::to_owned);
        let rows = self
            .read(move |connection| documents::list_after(connection, collection, after.as_deref(), limit));
        let rows = rows.await?;
        Ok(rows.iter().map(|row| (row.key().to_owned(), row.value(collection).ok())).collect())
    }

    async fn document(
        &self,
        collection: Collection,
        key: &str,
    ) -> Result<Option<Versioned<store::Document>>, StoreError> {
        let key = key.to_owned();
        let row = self.read(move |connection| documents::find(connection, collection, &key)).await?;
        row.map(|row: DocumentRow| row.value(collection)).transpose()
    }

    async fn insert_document(
        &self,
        collection: Collection,
        document: &store::Document,
    ) -> Result<Revision, StoreError> {
        let new = documents::New::make(collection, document)?;
        self.write(move |connection| new.insert(connection)).await
    }

    async fn replace_document(
        &self,
        collection: Collection,
        document: &store::Document,
        expected: Revision,
    ) -> Result<Revision, StoreError> {
        let new = documents::New::make(collection, document)?;
        self.write(move |connection| new.replace(connection, expected)).await
    }

    async fn reseal_document(
        &self,
        collection: Collection,
        document: &store::Document,
        expected: Revision,
    ) -> Result<(), StoreError> {
        let new = documents::New::make(collection, document)?;
        self.write(move |connection| new.reseal(connection, expected)).await
    }

    async fn delete_document(
        &self,
        collection: Collection,
        key: &str,
        expected: Option<Revision>,
    ) -> Result<bool, StoreError> {
        let key = key.to_owned();
        self.write(move |connection| documents::delete(connection, collection, &key, expected)).await
    }

    async fn delete_expired(&self, collection: Collection, now: Timestamp) -> Result<u64, StoreError> {
        self.write(move |connection| documents::delete_expired(connection, collection, now)).await
    }

    async fn put_once(&self, fact: Fact, key: &str, value: &str) -> Result<String, StoreError> {
        let (key, value) = (key.to_owned(), value.to_owned());
        self.write(move |connection| {
            connection.execute(
                "INSERT INTO facts (collection, key, value) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING",
                [fact.collection(), &key, &value],
            )?;
            Ok(connection.query_row(FACT, [fact.collection(), &key], |row| row.get(0))?)
        })
        .await
    }

    async fn fact(&self, fact: Fact, key: &str) -> Result<Option<String>, StoreError> {
        let key = key.to_owned();
        self.read(move |connection| {
            Ok(connection.query_row(FACT, [fact.collection(), &key], |row| row.get(0)).optional()?)
        })
        .await
    }
}

const UNREADABLE: &str = "a server's record cannot be read";

pub(super) const FACT: &str = "SELECT value FROM facts WHERE collection = ?1 AND key = ?2";

/// A row of `servers` before its document is understood. The text is taken as bytes: one that is not
/// UTF-8 must not fail the whole listing.
struct ServerRow {
    name: String,
    revision: i64,
    document: Vec<u8>,
}

impl ServerRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            name: String::from_utf8_lossy(row.get_ref(0)?.as_bytes()?).into_owned(),
            revision: row.get(1)?,
            document: row.get_ref(2)?.as_bytes()?.to_vec(),
        })
    }

    fn record(&self) -> Result<SealedServer, serde_json::Error> {
        let document: Map<String, Value> = serde_json::from_slice(&self.document)?;
        ServerRecord::from_document(document).map(SealedServer)
    }
}

fn document(server: &SealedServer) -> Result<String, StoreError> {
    let text = server.0.to_document().and_then(|document| serde_json::to_string(&document));
    text.map_err(|cause| StoreError::Corrupt { what: format!("server {}: {cause}", server.0.name) })
}

pub(super) fn server_exists(connection: &Connection, name: &ServerName) -> rusqlite::Result<bool> {
    connection
        .query_row("SELECT EXISTS (SELECT 1 FROM servers WHERE name = ?1)", [name.as_str()], |row| row.get(0))
}

fn read_lease(row: &Row<'_>) -> rusqlite::Result<Lease> {
    Ok(Lease { name: row.get(0)?, owner: row.get(1)?, fence: row.get(2)?, revision: Revision(row.get(3)?) })
}

fn count(rows: i64) -> Result<u64, Failure> {
    Ok(u64::try_from(rows).unwrap_or_default())
}
