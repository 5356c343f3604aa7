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
    servers::collect,
};
use crate::store::StoreError;

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
        for _ in 0..ATTEMPTS {
            match self.secrets.create_index(index("secret_unique", fields.clone(), unique.clone())).await {
                Ok(_) => break,
                Err(error) if is_duplicate(&error) => self.resolve_duplicates().await?,
                Err(error) => return Err(error.into()),
            }
        }
        self.ensure_plain(&self.tools, "server").await
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

    /// Of several rows for one secret the newest stays, which is also the one that mcp-api reads.
    async fn resolve_duplicates(&self) -> Result<(), Failure> {
        let fields = doc! { "username": 1, "key": 1, "server": 1 };
        let rows =
            collect(self.secrets.find(doc! {}).projection(fields).sort(doc! { "_id": 1 }).await?).await?;
        let mut newest: BTreeMap<[String; 3], Bson> = BTreeMap::new();
        for row in rows {
            let row = Document::try_from(&row)
                .map_err(|_| StoreError::Corrupt { what: "a row of the secrets".to_owned() })?;
            let part = |field: &str| row.get(field).map_or_else(String::new, |value| format!("{value:?}"));
            let id = row.get("_id").cloned().unwrap_or(Bson::Null);
            let Some(older) = newest.insert([part("username"), part("key"), part("server")], id) else {
                continue;
            };
            tracing::warn!(
                secret.user = ?row.get_str("username").unwrap_or_default(),
                secret.key = ?row.get_str("key").unwrap_or_default(),
                "a secret was stored twice: the older value is removed"
            );
            self.secrets.delete_one(doc! { "_id": { "$eq": older } }).await?;
        }
        Ok(())
    }
}

fn index(name: &str, keys: Document, mut options: IndexOptions) -> IndexModel {
    options.name = Some(name.to_owned());
    IndexModel::builder().keys(keys).options(options).build()
}
