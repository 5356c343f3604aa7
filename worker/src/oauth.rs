//! Users' logins to remote servers: their tokens, refreshed by one worker at a time, and how they get
//! them.

use mcp_shared::{
    config::RemoteSettings,
    error::WorkerError,
    ids::{ServerName, UserId, WorkerId},
    remote::{RemoteAnswer, RemoteAsk},
    server::ServerRecord,
    store::Revision,
    vault::Vault,
};
use secrecy::SecretString;

use crate::outgoing::Outgoing;

/// An access token as it was when it was read.
#[derive(Debug, Clone)]
pub struct Bearer {
    /// The token.
    pub token: SecretString,
    /// The revision of the document that had it.
    pub revision: Revision,
}

/// Users' tokens for remote servers.
pub struct OAuth {}

#[allow(unused_variables, clippy::todo, dead_code)]
impl OAuth {
    /// Tokens of the store, refreshed through `http` by this worker.
    pub fn new(vault: Vault, http: Outgoing, worker: WorkerId, settings: &RemoteSettings) -> Self {
        Self {}
    }

    /// The access token for requests of a user, refreshed first if it is about to end; `None`: the user has
    /// none. An error says that the user has to log in again, or that the token cannot be had right now.
    pub async fn bearer(&self, user: &UserId, record: &ServerRecord) -> Result<Option<Bearer>, WorkerError> {
        Ok(None)
    }

    /// Another token in place of one that the remote server refused with 401 (`refused` is `None` where no
    /// token was sent). `challenge` is its `WWW-Authenticate`. An error is [`ErrorCode::ReauthRequired`] when
    /// the user has to log in.
    ///
    /// [`ErrorCode::ReauthRequired`]: mcp_shared::error::ErrorCode::ReauthRequired
    pub async fn refused(
        &self,
        user: &UserId,
        record: &ServerRecord,
        refused: Option<&Bearer>,
        challenge: Option<&str>,
    ) -> Result<Bearer, WorkerError> {
        Err(WorkerError::new(mcp_shared::error::ErrorCode::ReauthRequired, "log in"))
    }

    /// Forgets what is remembered of a user's tokens for a server.
    pub fn forget(&self, user: &UserId, server: &ServerName) {}

    /// Forgets everything that is remembered: changes may have been missed.
    pub fn forget_all(&self) {}

    /// Does what a gateway asks: all of [`RemoteAsk`] but the end of sessions.
    pub async fn answer(&self, ask: RemoteAsk) -> Result<RemoteAnswer, WorkerError> {
        todo!()
    }
}
