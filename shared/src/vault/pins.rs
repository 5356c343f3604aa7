//! What servers' tools were when they were first seen.

use super::{Vault, VaultError, packages};
use crate::{
    ids::{ServerName, UserId},
    listing::ToolPins,
    store::{Collection, Revision, StoreError, Versioned},
};

impl Vault {
    /// The pinned tools of a server, or, where every user has a listing, those of a user's. What cannot be read is as
    /// good as not there.
    pub async fn tool_pins(
        &self,
        server: &ServerName,
        user: Option<&UserId>,
    ) -> Result<Option<Versioned<ToolPins>>, VaultError> {
        let stored = self.store.document(Collection::ToolPins, &key(server, user)).await?;
        Ok(stored.and_then(|stored| packages::readable("pinned tools", stored)))
    }

    /// All pinned tools of a server.
    pub async fn tool_pins_of(&self, server: &ServerName) -> Result<Vec<Versioned<ToolPins>>, VaultError> {
        let stored = self.store.documents_of(Collection::ToolPins, server).await?;
        Ok(stored.into_iter().filter_map(|stored| packages::readable("pinned tools", stored)).collect())
    }

    /// Keeps pinned tools: in the place of those with the revision `expected`, or where none are.
    pub async fn put_tool_pins(
        &self,
        pins: &ToolPins,
        expected: Option<Revision>,
    ) -> Result<Revision, VaultError> {
        let mut document = packages::write(pins)?;
        let key = key(&pins.server_name, pins.username.as_ref());
        document.insert(Collection::ToolPins.key().to_owned(), key.clone().into());
        if let Some(expected) = expected {
            return Ok(self.store.replace_document(Collection::ToolPins, &document, expected).await?);
        }
        match self.store.insert_document(Collection::ToolPins, &document).await {
            // One that could not be read stands in the way.
            Err(StoreError::AlreadyExists { .. })
                if self.tool_pins(&pins.server_name, pins.username.as_ref()).await?.is_none() =>
            {
                self.store.delete_document(Collection::ToolPins, &key, None).await?;
                Ok(self.store.insert_document(Collection::ToolPins, &document).await?)
            }
            inserted => Ok(inserted?),
        }
    }
}

fn key(server: &ServerName, user: Option<&UserId>) -> String {
    Collection::key_of(&[server.as_str(), user.map_or("", UserId::as_str)])
}
