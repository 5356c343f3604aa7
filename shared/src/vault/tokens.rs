//! Tokens of a new login in place of those of an old one.

use super::{Vault, VaultError};
use crate::{remote::OAuthTokens, store::StoreError};

/// How often a write is tried anew when others write the same document.
const ATTEMPTS: usize = 5;

impl Vault {
    /// Stores a user's tokens in place of whatever was stored, and forgets the session of the old login.
    pub async fn replace_oauth_tokens(&self, mut tokens: OAuthTokens) -> Result<(), VaultError> {
        let mut stored = Ok(());
        for _ in 0..ATTEMPTS {
            let expected = match self.oauth_tokens(&tokens.user, &tokens.server).await {
                Ok(Some(old)) => {
                    tokens.extra = old.value.extra;
                    Some(old.revision)
                }
                Ok(None) => None,
                // What cannot be read any more is in the way of what can.
                Err(VaultError::Integrity { .. }) => {
                    self.delete_oauth_tokens(&tokens.user, &tokens.server, None).await?;
                    None
                }
                Err(error) => return Err(error),
            };
            stored = self.put_oauth_tokens(&tokens, expected).await.map(|_| ());
            match &stored {
                Err(VaultError::Store(
                    StoreError::Conflict | StoreError::NotFound | StoreError::AlreadyExists { .. },
                )) => {}
                _ => break,
            }
        }
        stored?;
        self.delete_session(&tokens.user, &tokens.server, None).await?;
        Ok(())
    }
}
