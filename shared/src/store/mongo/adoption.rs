//! Users' sessions and tokens that mcp-api stored. It finds them by the fields that ours have as one key,
//! which its own lack: they get it when the database is opened.

use mongodb::bson::{Bson, Document, doc};

use super::{
    Database,
    failure::{Failure, is_duplicate},
    servers::collect,
};
use crate::store::{Collection, ORIGIN, StoreError};

/// The fields of which mcp-api's collections have one document each.
pub(super) fn parts(collection: Collection) -> Option<[&'static str; 2]> {
    match collection {
        Collection::Sessions | Collection::OAuthTokens => Some(["serverName", "username"]),
        Collection::OAuthClients => Some(["issuer", "redirectUri"]),
        Collection::Packages
        | Collection::PackageLocks
        | Collection::Jobs
        | Collection::OAuthLogins
        | Collection::NamedCalls
        | Collection::ApiKeys
        | Collection::ToolPins => None,
    }
}

/// A further field by which mcp-api tells documents apart that have the same parts.
pub(super) fn distinguished_by(collection: Collection) -> Option<&'static str> {
    (collection == Collection::OAuthClients).then_some(ORIGIN)
}

impl Database {
    /// Gives a key to every document that has none. Of several for one key the one that was written last
    /// has it, and the others go; but those that are not the same to mcp-api stay, under keys that nobody here
    /// looks for.
    pub(super) async fn adopt(&self) -> Result<(), Failure> {
        for collection in Collection::ALL {
            if let Some(parts) = parts(collection) {
                self.adopt_documents(collection, parts).await?;
            }
        }
        Ok(())
    }

    async fn adopt_documents(&self, collection: Collection, parts: [&str; 2]) -> Result<(), Failure> {
        let rows = self.documents(collection).clone_with_type::<Document>();
        let field = collection.key();
        let mut shown = doc! { parts[0]: 1, parts[1]: 1, "updatedAt": 1 };
        let further = distinguished_by(collection);
        shown.extend(further.map(|field| (field.to_owned(), Bson::Int32(1))));
        // It fits a field that is missing, too.
        let keyless = doc! { field: Bson::Null };
        let raw = self.documents(collection);
        let found = raw.find(keyless).projection(shown.clone());
        for row in collect(found.sort(doc! { "_id": 1 }).await?).await? {
            let row = Document::try_from(&row)
                .map_err(|_| StoreError::Corrupt { what: format!("a row of {}", rows.name()) })?;
            let part = |field: &str| row.get_str(field).ok().filter(|text| !text.is_empty());
            let (Some(first), Some(second)) = (part(parts[0]), part(parts[1])) else {
                tracing::warn!(
                    row.collection = rows.name(), row.id = ?row.get("_id"),
                    "a row of mcp-api does not say whose it is, and is left alone"
                );
                continue;
            };
            let key = Collection::key_of(&[first, second]);
            if let Some(other) =
                rows.find_one(doc! { field: { "$eq": &key } }).projection(shown.clone()).await?
            {
                let other_stays = written(&other) > written(&row);
                let (stays, goes) = if other_stays { (&other, &row) } else { (&row, &other) };
                let third = |row: &Document| row.get_str(further?).ok().map(str::to_owned);
                let aside = third(goes).filter(|_| third(goes) != third(stays));
                let aside = aside.map(|third| Collection::key_of(&[first, second, &third]));
                if !Self::set_aside(&rows, goes, field, aside).await? {
                    tracing::warn!(
                        row.collection = rows.name(), row.key = ?key,
                        "a row was stored twice: the older one is removed"
                    );
                    rows.delete_one(by_id(goes)).await?;
                }
                if other_stays {
                    continue;
                }
            }
            let mut without = by_id(&row);
            without.insert(field, Bson::Null);
            match rows.update_one(without, doc! { "$set": { field: key } }).await {
                // Somebody stored a document with the key just now. It is the newer one, and the next start
                // removes this one.
                Err(error) if !is_duplicate(&error) => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    /// Gives a row another key than the one that its fields give it; says whether there is one for it.
    async fn set_aside(
        rows: &mongodb::Collection<Document>,
        row: &Document,
        field: &str,
        key: Option<String>,
    ) -> Result<bool, Failure> {
        let Some(key) = key else { return Ok(false) };
        match rows.update_one(by_id(row), doc! { "$set": { field: key } }).await {
            Err(error) if is_duplicate(&error) => Ok(false),
            outcome => Ok(outcome.map(|_| true)?),
        }
    }
}

fn by_id(row: &Document) -> Document {
    doc! { "_id": { "$eq": row.get("_id").cloned().unwrap_or(Bson::Null) } }
}

/// When a row was written, and as which one: the id has the moment at which it was added.
fn written(row: &Document) -> (i64, String) {
    let moment = row.get_datetime("updatedAt").map_or(i64::MIN, |moment| moment.timestamp_millis());
    (moment, row.get("_id").map_or_else(String::new, ToString::to_string))
}
