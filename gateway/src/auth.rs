//! Who is asking: API keys, tokens of an OIDC issuer, and login links.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, header};
use mcp_shared::{
    api_key::ApiKey,
    config::{Auth, Settings},
    error::ErrorCode,
    ids::{ServerName, UserId},
    node::NodeError,
    principal::Principal,
    vault::Vault,
};
use tokio_util::sync::CancellationToken;

use crate::problem::Problem;

pub mod api_keys;
mod jwks;
mod signatures;
pub mod tickets;
mod tokens;

use api_keys::ApiKeys;
use tickets::Tickets;
use tokens::Tokens;

/// What requests without a credential are told that there is.
const CHALLENGE: &str = "Bearer realm=\"mcp-api\"";

/// Finds out who is asking.
pub struct Authenticator {
    kinds: Option<Kinds>,
    tickets: Tickets,
}

/// Which credentials are accepted.
struct Kinds {
    keys: Option<Arc<ApiKeys>>,
    tokens: Option<Tokens>,
}

impl Authenticator {
    /// As the settings say. Keys are read now, and kept up to date until `stop`.
    pub async fn open(
        settings: &Settings,
        vault: &Vault,
        stop: &CancellationToken,
    ) -> Result<Self, NodeError> {
        let tickets = Tickets::new(vault);
        let Auth::Asked(asked) = &settings.auth else { return Ok(Self { kinds: None, tickets }) };
        // Login links and what is kept of keys are sealed. A key that cannot protect them lets anybody in.
        if !vault.crypter().ring().can_protect() {
            let text = "AUTH=keys and AUTH=jwt need a SECRETS_KEY that nobody can guess; the one that is set reads mcp-api's \
                        values and does nothing else";
            return Err(NodeError::Key(text.to_owned()));
        }
        let keys = if asked.keys { Some(ApiKeys::open(settings, vault, stop).await?) } else { None };
        let tokens = asked.jwt.clone().map(Tokens::new).transpose().map_err(NodeError::Key)?;
        Ok(Self { kinds: Some(Kinds { keys, tokens }), tickets })
    }

    /// Whether anybody is asked for anything.
    pub fn asks(&self) -> bool {
        self.kinds.is_some()
    }

    /// The API keys of this node, where there are any.
    pub fn keys(&self) -> Option<&Arc<ApiKeys>> {
        self.kinds.as_ref().and_then(|kinds| kinds.keys.as_ref())
    }

    /// Who sent a request with these headers.
    pub async fn authenticate(&self, headers: &HeaderMap) -> Result<Principal, Problem> {
        let Some(kinds) = &self.kinds else { return Ok(Principal::anybody()) };
        let credential = bearer(headers)?.ok_or_else(|| {
            refused("This needs a credential: Authorization: Bearer and an API key or a token", CHALLENGE)
        })?;
        let principal = match (&kinds.keys, &kinds.tokens) {
            (Some(keys), _) if ApiKey::is_meant(credential) => keys.recognise(credential).await?,
            (_, Some(tokens)) if !ApiKey::is_meant(credential) => tokens.recognise(credential).await?,
            _ => None,
        };
        principal.ok_or_else(invalid)
    }

    /// Who has the login link with these parameters; `None`: it is no such link.
    pub fn ticket(&self, query: Option<&str>) -> Result<Option<Principal>, Problem> {
        self.tickets.holder(query)
    }

    /// What makes an address a login link of a user and a server; `None` where nobody is asked.
    pub fn link(&self, user: &UserId, server: &ServerName) -> Result<Option<String>, Problem> {
        if self.asks() { self.tickets.issue(user, server).map(Some) } else { Ok(None) }
    }
}

/// What stands in `Authorization` after `Bearer`.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::invalid("The authorization header appears twice"));
    }
    let text = value.to_str().ok().and_then(|text| text.split_once(' '));
    match text {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("bearer") => Ok(Some(rest.trim())),
        _ => Err(refused("The Authorization header must be: Bearer, and an API key or a token", CHALLENGE)),
    }
}

/// All that is said to somebody with a credential that is wrong, over or revoked.
fn invalid() -> Problem {
    refused(
        "The credential is not valid, or not any more",
        "Bearer realm=\"mcp-api\", error=\"invalid_token\"",
    )
}

fn refused(text: &str, challenge: &'static str) -> Problem {
    Problem::new(ErrorCode::Unauthorized, text)
        .header(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge))
}
