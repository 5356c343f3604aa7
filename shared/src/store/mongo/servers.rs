//! Servers and the tools that they listed.

use std::collections::HashSet;

use mongodb::{
    Cursor,
    bson::{Bson, Document, RawDocumentBuf, doc},
};

use super::{
    Database,
    documents::{self, CASE_KEY, INCARNATION, StoredServer},
    failure::{Failure, is_duplicate, unavailable},
};
use crate::{
    ids::{ServerName, UserId},
    store::{Revision, SealedServer, StoreError, StoredTools, Versioned},
};

/// Documents that are asked for at once where all are read. (By default it is a hundred, and then the rest.)
const BATCH: u32 = 1_000;
const UNREADABLE: &str = "a server's record cannot be read";
/// What users have installed of servers that they brought; only mcp-api writes it.
pub(super) const INSTALLS: &str = "mcpUserServerInstalls";

impl Database {
    pub(super) async fn all_servers(&self) -> Result<Vec<Versioned<SealedServer>>, Failure> {
        let mut rows = collect(self.servers.find(doc! {}).batch_size(BATCH).await?).await?;
        // The older before the newer. (Listings read all of them, and sorting costs this program nothing.)
        rows.sort_by_key(|row| row.get_object_id("_id").map(|id| id.bytes()).unwrap_or_default());
        let mut servers: Vec<Versioned<SealedServer>> = Vec::with_capacity(rows.len());
        let mut names = HashSet::with_capacity(rows.len());
        for row in rows {
            // One record that cannot be read must not keep the other servers from running.
            let read = StoredServer::read(&row).and_then(|stored| match stored.record() {
                Ok(value) => Ok(Versioned { revision: stored.revision, value }),
                Err(cause) => Err(format!("server {}: {cause}", row.get_str("name").unwrap_or_default())),
            });
            match read {
                Ok(server) if !names.insert(server.value.0.name.clone()) => {
                    // Nothing in mcp-api's database prevents two. The older one is the one that counts.
                    tracing::error!(
                        server.name = %server.value.0.name, server.id = %server.value.0.id,
                        "two servers have one name: the newer is left out"
                    );
                }
                Ok(server) => servers.push(server),
                Err(what) => tracing::error!(error.cause = %what, "{UNREADABLE}"),
            }
        }
        servers.sort_by_key(|server| server.value.0.created_at);
        Ok(servers)
    }

    pub(super) async fn one_server(
        &self,
        name: &ServerName,
    ) -> Result<Option<Versioned<SealedServer>>, Failure> {
        let Some(stored) = self.stored_server(name).await? else { return Ok(None) };
        match stored.record() {
            Ok(value) => Ok(Some(Versioned { revision: stored.revision, value })),
            Err(cause) => {
                tracing::error!(server.name = %name, error.cause = %cause, "{UNREADABLE}");
                Err(StoreError::Corrupt { what: format!("server {name}") }.into())
            }
        }
    }

    async fn stored_server(&self, name: &ServerName) -> Result<Option<StoredServer>, Failure> {
        let row = self.servers.find_one(by_name(name)).sort(doc! { "_id": 1 }).await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(StoredServer::read(&row).map_err(|what| StoreError::Corrupt { what })?))
    }

    /// Which of all servers that ever had the name has it now.
    pub(super) async fn incarnation(&self, name: &str) -> Result<Option<Bson>, Failure> {
        let servers = self.servers.clone_with_type::<Document>();
        let found = servers
            .find_one(doc! { "name": { "$eq": name } })
            .sort(doc! { "_id": 1 })
            .projection(doc! { "_id": 1, INCARNATION: 1 })
            .await?;
        Ok(found.as_ref().map(documents::incarnation))
    }

    /// The registered ones of these names.
    pub(super) async fn registered(&self, names: Vec<String>) -> Result<Vec<String>, Failure> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let filter = doc! { "name": { "$in": names } };
        let rows = collect(self.servers.find(filter).projection(doc! { "name": 1 }).await?).await?;
        Ok(rows.iter().filter_map(|row| row.get_str("name").ok().map(str::to_owned)).collect())
    }

    pub(super) async fn insert_server(&self, server: &SealedServer) -> Result<Revision, Failure> {
        let name = &server.0.name;
        // Read before it is known that no server has the name: so they belong to none that comes later.
        let left = self.rows_of(None, name).await?;
        let left_documents = self.ids_of(name).await?;
        if let Some(existing) = self.name_like(name).await? {
            return Err(StoreError::AlreadyExists { existing }.into());
        }
        if !left.is_empty() {
            tracing::warn!(
                server.name = %name, secrets = left.len(),
                "secrets of an earlier server of this name are removed"
            );
            self.delete_rows(&left).await?;
        }
        self.delete_ids(left_documents).await?;
        let revision = first_revision()?;
        let document = documents::new_document(server, revision)?;
        match self.servers.clone_with_type::<Document>().insert_one(document).await {
            Ok(_) => Ok(Revision(revision)),
            Err(error) if is_duplicate(&error) => {
                let existing = self.name_like(name).await?.unwrap_or_else(|| server.0.id.clone());
                Err(StoreError::AlreadyExists { existing }.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The registered name that differs from a name at most in case.
    async fn name_like(&self, name: &ServerName) -> Result<Option<String>, Failure> {
        let case_key = name.case_key();
        let filter = doc! { "$or": [
            { CASE_KEY: { "$eq": &case_key } },
            // mcp-api's documents have no such field. Nobody adds any while we look, except mcp-api.
            { CASE_KEY: { "$exists": false } },
        ] };
        let rows = collect(self.servers.find(filter).projection(doc! { "name": 1 }).await?).await?;
        let mut names = rows.iter().filter_map(|row| row.get_str("name").ok());
        Ok(names.find(|other| other.to_ascii_lowercase() == case_key).map(str::to_owned))
    }

    pub(super) async fn replace_server(
        &self,
        server: &SealedServer,
        expected: Revision,
    ) -> Result<Revision, Failure> {
        // mcp-api's documents get a first number; later ones count on.
        let revision = if expected.0 < 0 { first_revision()? } else { expected.0 + 1 };
        self.rewrite_server(server, expected, revision).await
    }

    pub(super) async fn reseal_server(
        &self,
        server: &SealedServer,
        expected: Revision,
    ) -> Result<(), Failure> {
        let revision = if expected.0 < 0 { first_revision()? } else { expected.0 };
        self.rewrite_server(server, expected, revision).await.map(drop)
    }

    /// Writes a server in the place of one that still has the revision `expected`.
    async fn rewrite_server(
        &self,
        server: &SealedServer,
        expected: Revision,
        revision: i64,
    ) -> Result<Revision, Failure> {
        let name = &server.0.name;
        let Some(stored) = self.stored_server(name).await? else {
            return Err(StoreError::NotFound.into());
        };
        if stored.revision != expected {
            return Err(StoreError::Conflict.into());
        }
        let document = stored.replaced_by(server, revision)?;
        let servers = self.servers.clone_with_type::<Document>();
        let replaced = servers.replace_one(stored.unchanged(), document).await?;
        if replaced.matched_count > 0 {
            return Ok(Revision(revision));
        }
        match self.incarnation(name.as_str()).await? {
            Some(_) => Err(StoreError::Conflict.into()),
            None => Err(StoreError::NotFound.into()),
        }
    }

    /// The record goes after what belongs to it: who repeats a deletion that was cut short still finds
    /// the server and completes it. What others put meanwhile is looked for again at the end, and a
    /// secret that is overlooked even so belongs to an incarnation that never comes back.
    pub(super) async fn delete_server(&self, name: &ServerName) -> Result<bool, Failure> {
        let rows = self.rows_of(None, name).await?;
        let documents = self.servers.clone_with_type::<Document>();
        let found = documents.find(by_name(name)).projection(doc! { "_id": 1, INCARNATION: 1 }).await?;
        let records: Vec<Document> = collect_documents(found).await?;
        self.delete_rows(&rows).await?;
        self.delete_tools(name).await?;
        self.delete_ids(self.ids_of(name).await?).await?;
        let mut existed = false;
        for record in &records {
            let mut filter = doc! { "_id": { "$eq": record.get("_id").cloned() } };
            filter.insert(INCARNATION, exactly(record.get(INCARNATION)));
            existed |= documents.delete_one(filter).await?.deleted_count > 0;
        }
        if existed {
            self.delete_installs(name).await?;
        }
        for record in &records {
            self.delete_rows_of_incarnation(name, &documents::incarnation(record)).await?;
        }
        // Read before it is known that no server has the name: so they belong to none that comes later.
        let left = self.ids_of(name).await?;
        if self.incarnation(name.as_str()).await?.is_none() {
            self.delete_tools(name).await?;
            self.delete_ids(left).await?;
        }
        Ok(existed)
    }

    /// Removes what users of mcp-api have installed of a server, as that does: they may hold secrets of its clients.
    async fn delete_installs(&self, name: &ServerName) -> Result<(), Failure> {
        let installs = self.database.collection::<Document>(INSTALLS);
        installs.delete_many(doc! { "serverName": { "$eq": name.as_str() } }).await?;
        Ok(())
    }

    async fn delete_tools(&self, name: &ServerName) -> Result<(), Failure> {
        self.tools.delete_many(doc! { "server": { "$eq": name.as_str() } }).await?;
        Ok(())
    }

    pub(super) async fn put_tools(&self, tools: &StoredTools) -> Result<(), Failure> {
        let user = tools.user.as_ref().map_or("", UserId::as_str);
        // Neither part can have a line end, so no two listings share an id.
        let id = format!("{}\n{user}", tools.server);
        let filter = doc! { "_id": { "$eq": id } };
        // Every start of a server lists its tools, and nearly always they are the same.
        let known = self.tools.find_one(filter.clone()).await?;
        if known.is_some_and(|known| known.get_str("tools").is_ok_and(|known| known == tools.tools)) {
            return Ok(());
        }
        let fields = doc! { "server": tools.server.as_str(), "user": user, "tools": &tools.tools };
        let update = || self.tools.update_one(filter.clone(), doc! { "$set": fields.clone() }).upsert(true);
        match update().await {
            // Another one was faster to insert it; now it is there to be updated.
            Err(error) if is_duplicate(&error) => update().await?,
            outcome => outcome?,
        };
        Ok(())
    }

    pub(super) async fn all_tools(&self) -> Result<Vec<StoredTools>, Failure> {
        let rows = collect(self.tools.find(doc! {}).batch_size(BATCH).await?).await?;
        let readable = rows.iter().filter_map(|row| match (row.get_str("server"), row.get_str("tools")) {
            (Ok(server), Ok(tools)) => {
                let user = row.get_str("user").ok().filter(|user| !user.is_empty());
                Some(StoredTools {
                    server: ServerName::from_stored(server),
                    user: user.map(UserId::from_stored),
                    tools: tools.to_owned(),
                })
            }
            _ => {
                let id = row.get_str("_id").unwrap_or_default();
                tracing::error!(listing = ?id, "a listing of tools cannot be read");
                None
            }
        });
        let mut tools: Vec<_> = readable.collect();
        tools.sort_by(|a, b| (&a.server, &a.user).cmp(&(&b.server, &b.user)));
        Ok(tools)
    }
}

fn by_name(name: &ServerName) -> Document {
    doc! { "name": { "$eq": name.as_str() } }
}

/// A condition for a field to be as it was read, or to be missing as it was.
pub(super) fn exactly(value: Option<&Bson>) -> Document {
    match value {
        Some(value) => doc! { "$eq": value.clone() },
        None => doc! { "$exists": false },
    }
}

/// A number from which revisions count up. It is drawn, so that none of a deleted document fits a
/// later one, and below 2^52, so that JavaScript does not change it.
pub(super) fn first_revision() -> Result<i64, StoreError> {
    let drawn = getrandom::u64().map_err(|_| unavailable("the system gives no random numbers"))?;
    Ok(i64::try_from(drawn >> 13).unwrap_or_default() + 1)
}

pub(super) async fn collect(mut cursor: Cursor<RawDocumentBuf>) -> Result<Vec<RawDocumentBuf>, Failure> {
    let mut rows = Vec::new();
    while cursor.advance().await? {
        rows.push(cursor.current().to_owned());
    }
    Ok(rows)
}

async fn collect_documents(mut cursor: Cursor<Document>) -> Result<Vec<Document>, Failure> {
    let mut rows = Vec::new();
    while cursor.advance().await? {
        rows.push(cursor.deserialize_current()?);
    }
    Ok(rows)
}
