//! Users' tokens for Google.

use secrecy::SecretString;

use super::{Vault, VaultError, secret_place};
use crate::{
    crypter::CryptoError,
    google,
    ids::{SecretName, ServerName, UserId},
    store::SealedSecret,
};

impl Vault {
    /// The tokens for Google that mcp-api keeps for a user, as if they had been stored for this server.
    pub async fn google_tokens_of_mcp_api(
        &self,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Option<SealedSecret>, VaultError> {
        let row = self.store.bare_secret(user, google::TOKENS_OF_MCP_API).await?;
        Ok(row.map(|row| SealedSecret {
            username: user.clone(),
            key: row.key,
            server_name: server.clone(),
            secret_name: SecretName::from_stored(google::TOKENS_SECRET),
            value: row.value,
        }))
    }

    /// Decrypts a user's tokens for Google: those of one server, or those that mcp-api has for all. Only servers that
    /// declare that they need them may be given these.
    pub fn open_google_tokens(&self, secret: &SealedSecret) -> Result<SecretString, CryptoError> {
        if secret.key == google::TOKENS_OF_MCP_API && secret.secret_name.as_str() == google::TOKENS_SECRET {
            return self.unseal(&secret_place(&[secret.username.as_str(), &secret.key]), &secret.value);
        }
        self.open_secret(secret)
    }
}
