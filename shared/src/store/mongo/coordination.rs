//! Leases and facts. A write names the document as it was read, and its count says whether it fitted:
//! so what the document is afterwards is known without reading it again.

use mongodb::bson::{Bson, Document, doc};

use super::{
    Database,
    documents::whole,
    failure::{Failure, is_duplicate},
};
use crate::store::{Fact, INSTALLED_ON_START, Lease, Revision, StoreError, UNINSTALLED};

impl Database {
    pub(super) async fn read_lease(&self, name: &str) -> Result<Option<Lease>, Failure> {
        let Some(found) = self.leases.find_one(doc! { "_id": { "$eq": name } }).await? else {
            return Ok(None);
        };
        let number = |field| found.get(field).and_then(whole);
        let owner = match found.get("owner") {
            Some(Bson::String(owner)) => Some(Some(owner.clone())),
            Some(Bson::Null) | None => Some(None),
            Some(_) => None,
        };
        match (owner, number("fence"), number("revision")) {
            (Some(owner), Some(fence), Some(revision)) => {
                Ok(Some(Lease { name: name.to_owned(), owner, fence, revision: Revision(revision) }))
            }
            _ => Err(StoreError::Corrupt { what: format!("lease {name}") }.into()),
        }
    }

    pub(super) async fn take_lease(
        &self,
        name: &str,
        owner: &str,
        seen: Option<Revision>,
    ) -> Result<Lease, Failure> {
        let conflict = || Failure::from(StoreError::Conflict);
        let now = match (self.read_lease(name).await?, seen) {
            (None, Some(_)) => return Err(conflict()),
            (None, None) => {
                let row = doc! { "_id": name, "owner": owner, "fence": 1_i64, "revision": 1_i64 };
                return match self.leases.insert_one(row).await {
                    Ok(_) => Ok(Lease {
                        name: name.to_owned(),
                        owner: Some(owner.to_owned()),
                        fence: 1,
                        revision: Revision(1),
                    }),
                    Err(error) if is_duplicate(&error) => Err(conflict()),
                    Err(error) => Err(error.into()),
                };
            }
            (Some(lease), None) if lease.owner.is_none() => lease,
            (Some(lease), Some(seen)) if lease.revision == seen => lease,
            _ => return Err(conflict()),
        };
        let next = Lease {
            name: name.to_owned(),
            owner: Some(owner.to_owned()),
            fence: now.fence + 1,
            revision: Revision(now.revision.0 + 1),
        };
        let filter = doc! { "_id": { "$eq": name }, "revision": { "$eq": now.revision.0 } };
        let set = doc! { "owner": owner, "fence": next.fence, "revision": next.revision.0 };
        let taken = self.leases.update_one(filter, doc! { "$set": set }).await?;
        if taken.matched_count > 0 { Ok(next) } else { Err(conflict()) }
    }

    pub(super) async fn renew_lease(&self, lease: &Lease) -> Result<Lease, Failure> {
        let Some(own) = held_by(lease) else { return Err(StoreError::Conflict.into()) };
        // One round trip where nobody else wrote it.
        let mut filter = own.clone();
        filter.insert("revision", doc! { "$eq": lease.revision.0 });
        let next = Lease { revision: Revision(lease.revision.0 + 1), ..lease.clone() };
        let set = doc! { "$set": { "revision": next.revision.0 } };
        if self.leases.update_one(filter, set).await?.matched_count > 0 {
            return Ok(next);
        }
        // An earlier renewal may have been made although its answer was lost.
        if self.leases.update_one(own, doc! { "$inc": { "revision": 1_i64 } }).await?.matched_count == 0 {
            return Err(StoreError::Conflict.into());
        }
        match self.read_lease(&lease.name).await? {
            Some(now) if now.owner == lease.owner && now.fence == lease.fence => Ok(now),
            _ => Err(StoreError::Conflict.into()),
        }
    }

    pub(super) async fn release_lease(&self, lease: &Lease) -> Result<(), Failure> {
        // The document stays, so that the next owner's fence is higher than this one's.
        if let Some(own) = held_by(lease) {
            let update = doc! { "$set": { "owner": Bson::Null }, "$inc": { "revision": 1_i64 } };
            self.leases.update_one(own, update).await?;
        }
        Ok(())
    }

    pub(super) async fn put_once(&self, fact: Fact, key: &str, value: &str) -> Result<String, Failure> {
        if let Some(known) = self.read_fact(fact, key).await? {
            return Ok(known);
        }
        let facts = self.database.collection::<Document>(fact.collection());
        match facts.insert_one(doc! { "_id": key, "value": value }).await {
            Ok(_) => Ok(value.to_owned()),
            Err(error) if is_duplicate(&error) => {
                // Facts stay once they are written.
                let known = self.read_fact(fact, key).await?;
                known.ok_or_else(|| StoreError::Conflict.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn read_fact(&self, fact: Fact, key: &str) -> Result<Option<String>, Failure> {
        let facts = self.database.collection::<Document>(fact.collection());
        let Some(found) = facts.find_one(doc! { "_id": { "$eq": key } }).await? else {
            return self.fact_of_mcp_api(fact, key).await;
        };
        match found.get_str("value") {
            Ok(value) => Ok(Some(value.to_owned())),
            Err(_) => Err(StoreError::Corrupt { what: format!("{} {key}", fact.collection()) }.into()),
        }
    }
}

impl Database {
    /// What mcp-api notes in a document of its own: that it has installed what is installed on the first
    /// start, and which of the packages its users have removed since.
    async fn fact_of_mcp_api(&self, fact: Fact, key: &str) -> Result<Option<String>, Failure> {
        let removed = key.strip_prefix(UNINSTALLED);
        let filter = match (fact, removed) {
            (Fact::AppState, Some(server)) => doc! {
                "installedPackages": { "$elemMatch": { "serverName": { "$eq": server }, "uninstalled": true } },
            },
            (Fact::AppState, None) if key == INSTALLED_ON_START => doc! { "firstRunCompleted": true },
            _ => return Ok(None),
        };
        let facts = self.database.collection::<Document>(fact.collection());
        Ok(facts.find_one(filter).await?.map(|_| "mcp-api".to_owned()))
    }
}

/// The lease as long as its holder has it; nobody holds one that was given back.
fn held_by(lease: &Lease) -> Option<Document> {
    let owner = lease.owner.as_deref()?;
    Some(doc! {
        "_id": { "$eq": &lease.name }, "owner": { "$eq": owner }, "fence": { "$eq": lease.fence },
    })
}
