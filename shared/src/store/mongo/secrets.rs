//! Users' secrets. A row is mcp-api's (`username`, `key`, `value`); ours say beside it which server and
//! which secret the key means, and which incarnation of the server the secret was set for. A row of an
//! incarnation that is gone is not seen by anybody.

use std::collections::HashSet;

use mongodb::bson::{Bson, Document, RawDocumentBuf, doc};

use super::{
    Database,
    documents::same,
    failure::{Failure, is_duplicate},
    servers::{collect, exactly},
};
use crate::{
    ids::{SecretName, ServerName, UserId},
    limits,
    store::{SealedSecret, SecretRow, StoreError},
};

const SERVER: &str = "serverName";
const NAME: &str = "secretName";
const INCARNATION: &str = "_incarnation";
/// The first versions of mcp-api had the server in a field of this name, and no later one reads such
/// rows. They are left alone.
pub(super) const ANCIENT: &str = "server";

/// How often a write is tried anew when others write the same key.
const ATTEMPTS: usize = 5;
/// How many documents one deletion names.
const BATCH: usize = 1_000;
/// A sealed value is longer than the clear one, but never so much. Longer ones are not passed on.
const VALUE_BYTES: usize = 4 * limits::SECRET_BYTES;

/// mcp-api's encrypted values: nonce, tag and ciphertext. The end is that of the text, not of a line.
pub(super) const LEGACY_VALUE: &str = "^[0-9a-fA-F]{24}:[0-9a-fA-F]{32}:([0-9a-fA-F]{2})*$(?!\\n)";

/// A row as far as it can be understood.
#[derive(Debug)]
pub(super) struct Row {
    id: Bson,
    pub(super) username: String,
    pub(super) key: String,
    /// The server and the name, in rows of ours.
    pub(super) owner: Option<(String, String)>,
    incarnation: Option<Bson>,
    pub(super) value: Option<String>,
}

impl Row {
    pub(super) fn read(raw: &RawDocumentBuf) -> Option<Self> {
        let owner = match (raw.get_str(SERVER), raw.get_str(NAME)) {
            (Ok(server), Ok(name)) => Some((server.to_owned(), name.to_owned())),
            _ => None,
        };
        let bson = |field: &str| raw.get(field).ok().flatten().and_then(|value| Bson::try_from(value).ok());
        Some(Self {
            id: bson("_id")?,
            username: raw.get_str("username").ok()?.to_owned(),
            key: raw.get_str("key").ok()?.to_owned(),
            owner,
            incarnation: bson(INCARNATION),
            value: raw.get_str("value").ok().filter(|value| value.len() <= VALUE_BYTES).map(str::to_owned),
        })
    }

    /// What follows `server.` in the key.
    fn after<'a>(&'a self, server: &str) -> Option<&'a str> {
        self.key.strip_prefix(server)?.strip_prefix('.').filter(|rest| !rest.is_empty())
    }

    /// The name of the secret if it is one of this server's. The key of a row of mcp-api belongs to the
    /// longest registered name that it begins with; `registered` has those longer than `server`.
    fn name_for(&self, server: &str, registered: &HashSet<String>) -> Option<&str> {
        match &self.owner {
            Some((owner, name)) => (owner == server).then_some(name),
            None => {
                let longer = longer_names(&self.key, server).any(|name| registered.contains(name));
                self.after(server).filter(|_| !longer)
            }
        }
    }

    fn is_of(&self, incarnation: &Bson) -> bool {
        self.incarnation.as_ref().is_none_or(|own| same(own, incarnation))
    }
}

impl From<Row> for SecretRow {
    fn from(row: Row) -> Self {
        Self { username: row.username, key: row.key, value: row.value.unwrap_or_default() }
    }
}

/// The names of servers that a key could begin with and that are longer than `server`.
fn longer_names<'a>(key: &'a str, server: &str) -> impl Iterator<Item = &'a str> + use<'a> {
    let start = server.len() + 1;
    key.char_indices().filter(move |(at, c)| *c == '.' && *at > start).map(|(at, _)| &key[..at])
}

/// A filter for all keys that begin with `server.`: the character after `.` is `/`.
fn keys_of(user: Option<&UserId>, server: &str) -> Document {
    let mut filter = doc! {};
    if let Some(user) = user {
        filter.insert("username", doc! { "$eq": user.as_str() });
    }
    filter.insert("key", doc! { "$gte": format!("{server}."), "$lt": format!("{server}/") });
    filter.insert(ANCIENT, doc! { "$exists": false });
    filter
}

fn by_key(user: &UserId, key: &str) -> Document {
    doc! { "username": { "$eq": user.as_str() }, "key": { "$eq": key }, ANCIENT: { "$exists": false } }
}

impl Database {
    /// The rows of a server's secrets by its name, whichever incarnation they were set for.
    pub(super) async fn rows_of(
        &self,
        user: Option<&UserId>,
        server: &ServerName,
    ) -> Result<Vec<Row>, Failure> {
        let filter = keys_of(user, server.as_str());
        let found = match user {
            Some(_) => self.secrets.find(filter).await?,
            // Only to be counted or deleted.
            None => self.secrets.find(filter).projection(doc! { "value": 0 }).await?,
        };
        let mut rows: Vec<Row> = collect(found).await?.iter().filter_map(Row::read).collect();
        let registered = self.longer_registered(&rows, server.as_str()).await?;
        rows.retain(|row| row.name_for(server.as_str(), &registered).is_some());
        Ok(rows)
    }

    async fn longer_registered(&self, rows: &[Row], server: &str) -> Result<HashSet<String>, Failure> {
        let unclear = rows.iter().filter(|row| row.owner.is_none());
        let candidates: HashSet<String> =
            unclear.flat_map(|row| longer_names(&row.key, server)).map(str::to_owned).collect();
        Ok(self.registered(candidates.into_iter().collect()).await?.into_iter().collect())
    }

    pub(super) async fn delete_rows(&self, rows: &[Row]) -> Result<(), Failure> {
        let mut left: Vec<&Row> = rows.iter().collect();
        while let Some(first) = left.first().map(|row| row.incarnation.clone()) {
            let (now, later) = left.into_iter().partition::<Vec<_>, _>(|row| row.incarnation == first);
            left = later;
            for batch in now.chunks(BATCH) {
                let ids: Vec<Bson> = batch.iter().map(|row| row.id.clone()).collect();
                // A row that was set anew since it was read belongs to somebody else now.
                let filter = doc! { "_id": { "$in": ids }, INCARNATION: exactly(first.as_ref()) };
                self.secrets.delete_many(filter).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn delete_rows_of_incarnation(
        &self,
        server: &ServerName,
        incarnation: &Bson,
    ) -> Result<(), Failure> {
        let mut filter = keys_of(None, server.as_str());
        filter.insert(SERVER, doc! { "$eq": server.as_str() });
        filter.insert(INCARNATION, doc! { "$eq": incarnation.clone() });
        self.secrets.delete_many(filter).await?;
        Ok(())
    }

    pub(super) async fn put_secret(&self, secret: &SealedSecret) -> Result<(), Failure> {
        let server = secret.server_name.as_str();
        let Some(incarnation) = self.incarnation(server).await? else {
            return Err(StoreError::NotFound.into());
        };
        for _ in 0..ATTEMPTS {
            if !self.write_secret(secret, &incarnation).await? {
                // Another write of this key, or a server that was made anew since.
                if !self.is_current(server, &incarnation).await? {
                    return Err(StoreError::NotFound.into());
                }
                continue;
            }
            // The server may have been deleted before the write, and its secrets with it.
            if self.is_current(server, &incarnation).await? {
                return Ok(());
            }
            let mut filter = by_key(&secret.username, &secret.key);
            filter.insert(INCARNATION, doc! { "$eq": incarnation });
            self.secrets.delete_many(filter).await?;
            return Err(StoreError::NotFound.into());
        }
        Err(StoreError::Conflict.into())
    }

    async fn is_current(&self, server: &str, incarnation: &Bson) -> Result<bool, Failure> {
        Ok(self.incarnation(server).await?.is_some_and(|now| same(&now, incarnation)))
    }

    /// Writes a secret unless another one has its key; says whether it did or somebody else came first.
    async fn write_secret(&self, secret: &SealedSecret, incarnation: &Bson) -> Result<bool, Failure> {
        let (server, name) = (secret.server_name.as_str(), secret.secret_name.as_str());
        let key = by_key(&secret.username, &secret.key);
        let set = doc! { "$set": {
            SERVER: server, NAME: name, "value": &secret.value, INCARNATION: incarnation.clone(),
        } };
        let mut own = key.clone();
        own.insert(SERVER, doc! { "$eq": server });
        own.insert(NAME, doc! { "$eq": name });
        // What was set for a server made since is not replaced by what was meant for its predecessor.
        own.insert(INCARNATION, doc! { "$eq": incarnation.clone() });
        if self.secrets.update_one(own, set.clone()).await?.matched_count > 0 {
            return Ok(true);
        }

        let taken = || StoreError::AlreadyExists { existing: secret.key.clone() };
        let Some(row) = self.secrets.find_one(key).await? else {
            let row = doc! {
                "username": secret.username.as_str(), "key": &secret.key, "value": &secret.value,
                SERVER: server, NAME: name, INCARNATION: incarnation.clone(),
            };
            return match self.secrets.clone_with_type::<Document>().insert_one(row).await {
                Ok(_) => Ok(true),
                Err(error) if is_duplicate(&error) => Ok(false),
                Err(error) => Err(error.into()),
            };
        };
        let row = Row::read(&row).ok_or_else(taken)?;
        let mut found =
            doc! { "_id": { "$eq": row.id.clone() }, INCARNATION: exactly(row.incarnation.as_ref()) };
        match &row.owner {
            // Somebody else wrote it since we looked first; or an earlier server of the name left it.
            Some((owner, secret_name)) if owner == server && secret_name == name => {
                if row.is_of(incarnation) || !self.is_current(server, incarnation).await? {
                    return Ok(false);
                }
                found.insert(SERVER, doc! { "$eq": owner });
            }
            // Names with dots can give two different secrets one key (`a` + `b.c`, `a.b` + `c`).
            // Overwriting would take the other server's secret away, unless that server is gone.
            Some((owner, _)) => {
                let now = self.incarnation(owner).await?;
                if now.is_some_and(|now| row.is_of(&now)) {
                    return Err(taken().into());
                }
                found.insert(SERVER, doc! { "$eq": owner });
            }
            None => {
                let rows = std::slice::from_ref(&row);
                let registered = self.longer_registered(rows, server).await?;
                if row.name_for(server, &registered) != Some(name) {
                    return Err(taken().into());
                }
                found.insert(SERVER, doc! { "$exists": false });
            }
        }
        Ok(self.secrets.update_one(found, set).await?.matched_count > 0)
    }

    pub(super) async fn delete_secret(
        &self,
        user: &UserId,
        server: &ServerName,
        name: &SecretName,
    ) -> Result<bool, Failure> {
        let key = SealedSecret::key_of(server, name);
        let found = self.secrets.find_one(by_key(user, &key)).await?;
        let Some(row) = found.as_ref().and_then(Row::read) else { return Ok(false) };
        let registered = self.longer_registered(std::slice::from_ref(&row), server.as_str()).await?;
        if row.name_for(server.as_str(), &registered) != Some(name.as_str()) {
            return Ok(false);
        }
        let mut filter = by_key(user, &key);
        filter.insert(SERVER, exactly(row.owner.as_ref().map(|(owner, _)| owner.as_str().into()).as_ref()));
        let deleted = self.secrets.delete_many(filter).await?.deleted_count > 0;
        // One that an earlier server left behind was not there for anybody.
        let now = self.incarnation(server.as_str()).await?;
        Ok(deleted && now.is_none_or(|now| row.is_of(&now)))
    }

    pub(super) async fn secrets_of(
        &self,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Vec<SealedSecret>, Failure> {
        let (rows, now) =
            tokio::try_join!(self.rows_of(Some(user), server), self.incarnation(server.as_str()))?;
        let Some(now) = now else { return Ok(Vec::new()) };
        let mut secrets: Vec<SealedSecret> = rows
            .into_iter()
            .filter(|row| row.is_of(&now))
            .filter_map(|row| {
                let name = match &row.owner {
                    Some((_, name)) => name.clone(),
                    None => row.after(server.as_str())?.to_owned(),
                };
                // Without its value the secret is still one: leaving it out would let a tool be called
                // without it. An empty value cannot be decrypted, and says so where it is needed.
                let value = row.value.unwrap_or_else(|| {
                    tracing::error!(server.name = %server, secret.name = ?name, "a stored secret cannot be read");
                    String::new()
                });
                Some(SealedSecret {
                    username: user.clone(),
                    key: row.key,
                    server_name: server.clone(),
                    secret_name: SecretName::from_stored(name),
                    value,
                })
            })
            .collect();
        secrets.sort_by(|a, b| a.secret_name.cmp(&b.secret_name));
        Ok(secrets)
    }

    pub(super) async fn bare_secret(&self, user: &UserId, key: &str) -> Result<Option<SecretRow>, Failure> {
        // A row that says which server it is for is none of mcp-api's.
        let mut filter = by_key(user, key);
        filter.insert(SERVER, doc! { "$exists": false });
        let found = self.secrets.find_one(filter).await?;
        Ok(found.as_ref().and_then(Row::read).map(SecretRow::from))
    }

    pub(super) async fn users_with_secrets(&self, server: &ServerName) -> Result<u64, Failure> {
        let (rows, now) = tokio::try_join!(self.rows_of(None, server), self.incarnation(server.as_str()))?;
        let Some(now) = now else { return Ok(0) };
        let users: HashSet<&str> =
            rows.iter().filter(|row| row.is_of(&now)).map(|row| row.username.as_str()).collect();
        Ok(u64::try_from(users.len()).unwrap_or(u64::MAX))
    }

    pub(super) async fn secrets_after(
        &self,
        after: Option<(&str, &str)>,
        limit: usize,
    ) -> Result<Vec<SecretRow>, Failure> {
        // Rows whose names are no texts are nobody's.
        let mut filter = match after {
            None => doc! { "username": { "$gte": "" }, "key": { "$gte": "" } },
            Some((user, key)) => doc! { "$or": [
                { "username": { "$gt": user } },
                { "username": { "$eq": user }, "key": { "$gt": key } },
            ] },
        };
        filter.insert(ANCIENT, doc! { "$exists": false });
        let found = self.secrets.find(filter).sort(doc! { "username": 1, "key": 1 });
        let rows = collect(found.limit(i64::try_from(limit).unwrap_or(i64::MAX)).await?).await?;
        Ok(rows.iter().filter_map(Row::read).map(SecretRow::from).collect())
    }

    pub(super) async fn reseal_secret(&self, row: &SecretRow, value: &str) -> Result<bool, Failure> {
        let filter = doc! {
            "username": { "$eq": &row.username }, "key": { "$eq": &row.key }, "value": { "$eq": &row.value },
            ANCIENT: { "$exists": false },
        };
        let set = doc! { "$set": { "value": value } };
        Ok(self.secrets.update_one(filter, set).await?.matched_count > 0)
    }

    pub(super) async fn legacy_secrets(&self) -> Result<u64, Failure> {
        Ok(self.secrets.count_documents(doc! { "value": { "$regex": LEGACY_VALUE } }).await?)
    }
}
