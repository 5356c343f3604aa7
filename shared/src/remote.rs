//! Remote servers: what is kept of users' sessions, tokens and logins, and what workers are asked about
//! them.

use std::{fmt, time::Duration};

use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    ids::{ServerName, UserId, WorkerId},
    timestamp::Timestamp,
};

/// A session that a remote server keeps for a user. Its id is a credential.
#[derive(Debug, Clone)]
pub struct Session {
    /// Whose.
    pub user: UserId,
    /// With which server.
    pub server: ServerName,
    /// The endpoint that gave it: another one does not know it.
    pub url: String,
    /// What the server knows it by.
    pub id: SecretString,
    /// The MCP version that was agreed upon; `None`: whoever stored it did not say.
    pub protocol_version: Option<String>,
    /// When it was stored.
    pub updated_at: Timestamp,
}

/// A user's OAuth tokens for a remote server, and what is needed to refresh them.
#[derive(Debug, Clone)]
pub struct OAuthTokens {
    /// Whose.
    pub user: UserId,
    /// For which server.
    pub server: ServerName,
    /// The authorization server that gave them, and the only one that gets to see the refresh token;
    /// `None`: whoever stored them did not say, and nobody has found out yet.
    pub issuer: Option<String>,
    /// The endpoint that they are for. They are sent to no other origin; `None`: whoever stored them did not
    /// say.
    pub resource: Option<String>,
    /// `Bearer`.
    pub token_type: String,
    /// What requests are authorized with.
    pub access_token: SecretString,
    /// What gets the next access token.
    pub refresh_token: Option<SecretString>,
    /// When the access token ends; `None`: nobody said.
    pub expires_at: Option<Timestamp>,
    /// What was granted.
    pub scopes: Vec<String>,
    /// What the authorization server knows us by.
    pub client_id: Option<String>,
    /// What proves it.
    pub client_secret: Option<SecretString>,
    /// Where the authorization server sent the user back to.
    pub redirect_uri: Option<String>,
    /// What proved that the login was begun by the same party; kept because mcp-api keeps it.
    pub code_verifier: Option<SecretString>,
    /// Who refreshes them right now. The claim is void when the document has not changed for longer than
    /// a refresh may take.
    pub refreshing: Option<WorkerId>,
    /// Why they cannot be refreshed any more: the user has to log in again.
    pub refused: Option<String>,
    /// Fields of mcp-api that this version does not use.
    pub extra: Map<String, Value>,
}

/// What this deployment is known by to an authorization server.
#[derive(Debug, Clone)]
pub struct OAuthClient {
    /// The authorization server.
    pub issuer: String,
    /// Where it sends users back to.
    pub redirect_uri: String,
    /// The id that it gave.
    pub client_id: String,
    /// What proves the id, if it gave such.
    pub client_secret: Option<SecretString>,
}

/// A login that was begun. It is used once.
#[derive(Debug, Clone)]
pub struct Login {
    /// Made of the `state` that travels through the browser; see [`LoginId::of`].
    pub id: LoginId,
    /// Who logs in.
    pub user: UserId,
    /// To which server.
    pub server: ServerName,
    /// Hash of the cookie of the browser in which it was begun.
    pub browser: String,
    /// When it was begun.
    pub begun_at: Timestamp,
    /// The authorization server's answer, once it is there.
    pub code: Option<SecretString>,
    /// The `iss` of that answer.
    pub answered_by: Option<String>,
    /// What the worker that began it needs to finish it: PKCE verifier, issuer, client. It is a JSON text.
    pub proof: SecretString,
}

/// A login's name in the store: a hash, so that who reads the store cannot finish anybody's login.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LoginId(String);

impl LoginId {
    /// The id of the login whose `state` this is.
    pub fn of(state: &str) -> Self {
        use sha2::Digest;
        Self(hex::encode(sha2::Sha256::digest(state.as_bytes())))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// An id that is stored.
    pub fn from_stored(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

/// How long a login may take, from its link to its callback.
pub const LOGIN_TIME: Duration = Duration::from_secs(600);

/// What a worker, whichever, is asked about remote servers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case", rename_all_fields = "camelCase")]
pub enum RemoteAsk {
    /// Which authorization server a remote server names.
    Issuer {
        /// The remote server.
        server: ServerName,
    },
    /// Begin a login, and keep it in the store.
    BeginLogin(BeginLogin),
    /// Take the tokens for the code that is stored with a login, and keep them.
    FinishLogin {
        /// The login.
        id: LoginId,
    },
    /// Tell a remote server that its sessions of all users are over, as far as that goes in a few seconds.
    EndSessions {
        /// The remote server.
        server: ServerName,
    },
}

/// A login that is to be begun.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BeginLogin {
    /// The name to keep it under.
    pub id: LoginId,
    /// Who logs in.
    pub user: UserId,
    /// To which server.
    pub server: ServerName,
    /// Hash of the browser's cookie.
    pub browser: String,
    /// Where the authorization server is to send the browser back to.
    pub redirect_uri: String,
    /// Where it may read about us instead of registering us, if that is an https URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_document: Option<String>,
}

/// What a worker answers to a [`RemoteAsk`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case", rename_all_fields = "camelCase")]
pub enum RemoteAnswer {
    /// The authorization server; `None`: the remote server has none, or cannot be asked right now.
    Issuer {
        /// Its issuer identifier.
        issuer: Option<String>,
    },
    /// Where the browser has to go. The parameter `state` is for the gateway to set.
    Login {
        /// The authorization server's address, with its parameters.
        url: String,
    },
    /// The user is logged in.
    LoggedIn {
        /// Who.
        user: UserId,
        /// To which server.
        server: ServerName,
    },
    /// It is done.
    Done,
}

/// A credential that was given for a remote server by an operator.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GivenClient {
    /// What the authorization server knows us by.
    pub client_id: String,
    /// What proves it. It is encrypted in the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_secret: Option<String>,
    /// What is asked for; empty: what the server names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scopes: Vec<String>,
}

impl fmt::Debug for GivenClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GivenClient").field("client_id", &self.client_id).finish_non_exhaustive()
    }
}

/// How often and when a broken stream of a remote server is taken up again. Field names are those of the
/// MCP SDK that mcp-api uses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reconnection {
    /// The longest pause, in milliseconds.
    pub max_delay: Duration,
    /// The first pause.
    pub initial_delay: Duration,
    /// How much longer each next pause is.
    pub growth: f64,
    /// Attempts in a row.
    pub max_retries: u32,
}

/// Without any pause, a server that ends its streams at once could have us ask it as fast as both can.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);

impl Default for Reconnection {
    fn default() -> Self {
        Self {
            max_delay: Duration::from_secs(30),
            initial_delay: Duration::from_secs(1),
            growth: 1.5,
            max_retries: 2,
        }
    }
}

impl Reconnection {
    /// What a record says, and the defaults for the rest. A value that makes no sense counts as not said.
    pub fn of(options: Option<&Map<String, Value>>) -> Self {
        let default = Self::default();
        let number = |name: &str| {
            options.and_then(|options| options.get(name)?.as_f64()).filter(|n| n.is_finite() && *n >= 0.0)
        };
        let millis = |name: &str, or: Duration| {
            number(name).map_or(or, |n| Duration::from_secs_f64((n / 1_000.0).min(86_400.0)))
        };
        Self {
            max_delay: millis("maxReconnectionDelay", default.max_delay),
            initial_delay: millis("initialReconnectionDelay", default.initial_delay),
            growth: number("reconnectionDelayGrowFactor").map_or(default.growth, |n| n.clamp(1.0, 100.0)),
            max_retries: options
                .and_then(|options| options.get("maxRetries")?.as_u64())
                .map_or(default.max_retries, |n| u32::try_from(n).unwrap_or(u32::MAX)),
        }
    }

    /// The pause before an attempt, counted from 0. There always is one.
    pub fn pause(&self, attempt: u32) -> Duration {
        let factor = self.growth.powi(i32::try_from(attempt.min(64)).unwrap_or(64));
        let pause = self.initial_delay.as_secs_f64() * factor;
        Duration::from_secs_f64(pause.min(self.max_delay.as_secs_f64())).max(SHORTEST_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pauses_grow_as_the_record_says() {
        let options = json!({"maxReconnectionDelay": 4_000, "initialReconnectionDelay": 500,
            "reconnectionDelayGrowFactor": 2, "maxRetries": 7});
        let reconnection = Reconnection::of(options.as_object());
        let pauses: Vec<_> = (0..5).map(|n| reconnection.pause(n).as_millis()).collect();
        assert_eq!(pauses, [500, 1_000, 2_000, 4_000, 4_000]);
        assert_eq!(reconnection.max_retries, 7);
        let odd = json!({"maxReconnectionDelay": "soon", "initialReconnectionDelay": -1,
            "reconnectionDelayGrowFactor": 0, "maxRetries": -1});
        let odd = Reconnection::of(odd.as_object());
        assert_eq!((odd.max_delay, odd.initial_delay), (Duration::from_secs(30), Duration::from_secs(1)));
        assert_eq!((odd.growth, odd.max_retries), (1.0, 2));
        assert_eq!(Reconnection::default().pause(1_000), Duration::from_secs(30));
    }
}
