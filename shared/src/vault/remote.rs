//! Users' sessions with remote servers, their tokens and their logins. Ids of sessions, tokens and what
//! proves who we are, are encrypted and bound to user, server and issuer.

use super::{Vault, VaultError};
use crate::{
    ids::{ServerName, UserId},
    remote::{Login, LoginId, OAuthClient, OAuthTokens, Session},
    store::{Revision, Versioned},
};

#[allow(unused_variables, clippy::todo, missing_docs)]
impl Vault {
    /// A user's session with a server.
    pub async fn session(
        &self,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Option<Versioned<Session>>, VaultError> {
        todo!()
    }

    /// All sessions of a server. Those that cannot be read are logged and left out.
    pub async fn sessions_of(&self, server: &ServerName) -> Result<Vec<Versioned<Session>>, VaultError> {
        todo!()
    }

    /// Stores a session: a new one, or in place of the one that still has the revision `expected`
    /// (`Conflict` or `NotFound` if it has not, `AlreadyExists` if there is one and none was expected).
    pub async fn put_session(
        &self,
        session: &Session,
        expected: Option<Revision>,
    ) -> Result<Revision, VaultError> {
        todo!()
    }

    /// Forgets a session; with `expected` only if it still has that revision. Says whether there was one.
    pub async fn delete_session(
        &self,
        user: &UserId,
        server: &ServerName,
        expected: Option<Revision>,
    ) -> Result<bool, VaultError> {
        todo!()
    }

    /// A user's tokens for a server.
    pub async fn oauth_tokens(
        &self,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Option<Versioned<OAuthTokens>>, VaultError> {
        todo!()
    }

    /// How many users have tokens for a server.
    pub async fn users_with_tokens(&self, server: &ServerName) -> Result<u64, VaultError> {
        todo!()
    }

    /// Stores tokens, as [`Vault::put_session`] stores sessions.
    pub async fn put_oauth_tokens(
        &self,
        tokens: &OAuthTokens,
        expected: Option<Revision>,
    ) -> Result<Revision, VaultError> {
        todo!()
    }

    /// Forgets a user's tokens; with `expected` only if they still have that revision.
    pub async fn delete_oauth_tokens(
        &self,
        user: &UserId,
        server: &ServerName,
        expected: Option<Revision>,
    ) -> Result<bool, VaultError> {
        todo!()
    }

    /// What an authorization server knows us by, for one address to come back to.
    pub async fn oauth_client(
        &self,
        issuer: &str,
        redirect_uri: &str,
    ) -> Result<Option<OAuthClient>, VaultError> {
        todo!()
    }

    /// Keeps what an authorization server knows us by, in place of what it knew us by before.
    pub async fn put_oauth_client(&self, client: &OAuthClient) -> Result<(), VaultError> {
        todo!()
    }

    /// Forgets it: the authorization server does not know it any more.
    pub async fn delete_oauth_client(&self, issuer: &str, redirect_uri: &str) -> Result<bool, VaultError> {
        todo!()
    }

    /// A login that was begun.
    pub async fn login(&self, id: &LoginId) -> Result<Option<Versioned<Login>>, VaultError> {
        todo!()
    }

    /// Stores a login, as [`Vault::put_session`] stores sessions.
    pub async fn put_login(&self, login: &Login, expected: Option<Revision>) -> Result<Revision, VaultError> {
        todo!()
    }

    /// Uses a login up: of several who do so with the revision that they saw, one succeeds.
    pub async fn delete_login(&self, id: &LoginId, expected: Option<Revision>) -> Result<bool, VaultError> {
        todo!()
    }

    /// Removes logins that nobody finished in time. Says how many.
    pub async fn sweep_logins(&self) -> Result<u64, VaultError> {
        todo!()
    }
}
