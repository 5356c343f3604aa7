//! The indexes, and what stands in their way.

use std::collections::BTreeMap;

use mongodb::{
    Collection, IndexModel,
    bson::{Bson, Document, RawDocumentBuf, doc},
    options::IndexOptions,
};

use super::{
    Database,
    documents::CASE_KEY,
    failure::{Failure, is_duplicate, is_other_name},
    generic::EXPIRES,
    servers::collect,
};
use crate::store::{self, ACTIVE, SERVER, StoreError};

/// How often duplicates are removed while mcp-api may write new ones.
const ATTEMPTS: usize = 3;

impl Database {
    /// Makes the indexes that are missing. Where mcp-api has the same one, it has the same name, so
    /// that neither program is in the other's way.
    pub(super) async fn ensure_indexes(&self) -> Result<(), Failure> {
        self.ensure_plain(&self.servers, "name").await?;
        let mut unique = IndexOptions::default();
        unique.unique = Some(true);
        let mut partial = unique.clone();
        // Only documents of ours have the field; those of mcp-api may break the rule.
        partial.partial_filter_expression = Some(doc! { CASE_KEY: { "$exists": true } });
        let case_keys = index("caseKey_unique", doc! { CASE_KEY: 1 }, partial);
        self.servers.create_index(case_keys).await?;

        self.ensure_plain(&self.secrets, "key").await?;
        // Not the fields of mcp-api's own index, which is not unique: one could not stand beside the
        // other. (`server` is missing in all but the oldest rows, where the key alone is not unique.)
        let fields = doc! { "username": 1, "key": 1, "server": 1 };
        ensure_unique(&self.secrets, index("secret_unique", fields, unique.clone())).await?;
        self.ensure_plain(&self.tools, "server").await?;

        self.adopt().await?;
        for collection in store::Collection::ALL {
            let (rows, key) = (self.documents(collection), collection.key());
            let mut named = unique.clone();
            // What has no key is no document of ours: mcp-api has packages without a server. The condition
            // has this form because MongoDB sees from it that the index serves searches for a key.
            named.partial_filter_expression = Some(doc! { key: { "$gt": "" } });
            ensure_unique(&rows, index(&format!("{key}_unique"), doc! { key: 1 }, named)).await?;
        }
        for collection in store::Collection::OF_SERVERS {
            self.ensure_plain(&self.documents(collection), SERVER).await?;
        }
        // Only jobs have the field, and every worker looks for the active ones again and again.
        self.ensure_plain(&self.documents(store::Collection::Jobs), ACTIVE).await?;
        self.ensure_plain(&self.documents(store::Collection::NamedCalls), EXPIRES).await
    }

    /// An index that only makes searching fast, with the name of its field as mcp-api does it. One that
    /// an operator made under another name does as well.
    async fn ensure_plain(
        &self,
        collection: &Collection<RawDocumentBuf>,
        field: &str,
    ) -> Result<(), Failure> {
        match collection.create_index(index(field, doc! { field: 1 }, IndexOptions::default())).await {
            Err(error) if !is_other_name(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// An index of which a collection can have only one row for each key. The rows that stand in its way go.
async fn ensure_unique(rows: &Collection<RawDocumentBuf>, index: IndexModel) -> Result<(), Failure> {
    for _ in 0..ATTEMPTS {
        match rows.create_index(index.clone()).await {
            Ok(_) => return Ok(()),
            Err(error) if is_duplicate(&error) => resolve_duplicates(rows, &index).await?,
            Err(error) => return Err(error.into()),
        }
    }
    rows.create_index(index).await?;
    Ok(())
}

/// Of several rows for one key the newest stays. Of secrets that is also the one that mcp-api reads.
async fn resolve_duplicates(rows: &Collection<RawDocumentBuf>, index: &IndexModel) -> Result<(), Failure> {
    let condition = index.options.as_ref().and_then(|options| options.partial_filter_expression.clone());
    let found = rows.find(condition.unwrap_or_default()).projection(index.keys.clone());
    let mut newest: BTreeMap<Vec<String>, Bson> = BTreeMap::new();
    for row in collect(found.sort(doc! { "_id": 1 }).await?).await? {
        let row = Document::try_from(&row)
            .map_err(|_| StoreError::Corrupt { what: format!("a row of {}", rows.name()) })?;
        let part = |field: &String| row.get(field).map_or_else(String::new, |value| format!("{value:?}"));
        let key: Vec<String> = index.keys.keys().map(part).collect();
        let id = row.get("_id").cloned().unwrap_or(Bson::Null);
        let Some(older) = newest.insert(key.clone(), id) else { continue };
        tracing::warn!(
            row.collection = rows.name(), row.key = ?key,
            "a row was stored twice: the older one is removed"
        );
        rows.delete_one(doc! { "_id": { "$eq": older } }).await?;
    }
    Ok(())
}

fn index(name: &str, keys: Document, mut options: IndexOptions) -> IndexModel {
    options.name = Some(name.to_owned());
    IndexModel::builder().keys(keys).options(options).build()
}
