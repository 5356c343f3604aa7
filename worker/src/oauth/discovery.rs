//! Which authorization server a remote server trusts (RFC 9728, RFC 8414), by the rules of MCP's
//! authorization specification.

use std::sync::Arc;

use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError, shorten},
    limits,
    timestamp::Timestamp,
};
use rmcp::transport::auth::{AuthError, AuthorizationManager, AuthorizationMetadata, OAuthHttpClient};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;
use url::Url;

use super::http::Http;
use crate::outgoing::Outgoing;

/// The longest life of an access token, in milliseconds. One that is said to live for longer has a date
/// that nothing could write.
const MAX_LIFE: i64 = 100 * 365 * 24 * 3_600 * 1_000;

/// An authorization server, and the means to speak to it about one remote server.
pub struct Found {
    /// The library's side of it.
    pub manager: AuthorizationManager,
    /// What its requests go through.
    pub http: Arc<Http>,
    /// What it calls itself; for a server of the time before discovery, the origin of the remote server.
    pub issuer: String,
    /// What it says of itself.
    pub metadata: AuthorizationMetadata,
}

/// What a token endpoint gave.
#[derive(Deserialize)]
pub struct Granted {
    /// What requests are authorized with.
    pub access_token: String,
    /// What gets the next one.
    #[serde(default)]
    pub refresh_token: Option<String>,
    /// Seconds until the access token ends.
    #[serde(default)]
    pub expires_in: Option<u64>,
    /// What was granted, separated by spaces; absent: what was asked for.
    #[serde(default)]
    pub scope: Option<String>,
}

impl Granted {
    /// Reads the library's answer.
    pub fn of(answer: &impl serde::Serialize) -> Result<Self, WorkerError> {
        // The error could repeat what it read.
        let read = serde_json::to_value(answer).and_then(serde_json::from_value::<Self>);
        read.map_err(|_| login_failed("The authorization server did not answer with tokens"))
    }

    /// When the access token ends that was asked for at this moment.
    pub fn ends(&self, asked: Timestamp) -> Option<Timestamp> {
        let life = i64::try_from(self.expires_in?.saturating_mul(1_000)).unwrap_or(i64::MAX);
        Some(Timestamp::from_millis(asked.millis().saturating_add(life.min(MAX_LIFE))))
    }

    /// The scopes that were granted, if the answer says so.
    pub fn scopes(&self) -> Option<Vec<String>> {
        let scope = self.scope.as_deref()?;
        Some(scope.split_ascii_whitespace().map(str::to_owned).collect())
    }
}

/// Finds the authorization server of the remote server at `url`.
pub async fn discover(outgoing: &Outgoing, url: &str) -> Result<Found, WorkerError> {
    let base = at(outgoing, url)?;
    let http = Arc::new(Http::new(outgoing.clone(), base.clone()));
    let found = timeout(limits::OAUTH_TIMEOUT, find(base, &http)).await;
    found.unwrap_or_else(|_| {
        let text = "The remote server or its authorization server does not answer in time";
        Err(WorkerError::new(ErrorCode::UpstreamUnavailable, text).outcome(Outcome::NotStarted))
    })
}

/// The address of a remote server, if it is one that may be spoken to.
pub fn at(outgoing: &Outgoing, url: &str) -> Result<Url, WorkerError> {
    outgoing.egress().check(url).map_err(|error| {
        WorkerError::new(ErrorCode::BlockedAddress, shorten(&error.to_string(), 128))
            .outcome(Outcome::NotStarted)
    })
}

async fn find(base: Url, http: &Arc<Http>) -> Result<Found, WorkerError> {
    let client = Arc::clone(http) as Arc<dyn OAuthHttpClient>;
    let mut manager = AuthorizationManager::new_with_oauth_http_client(base.clone(), client)
        .await
        .map_err(|error| failed(http, &error))?;
    let mut resolved = manager.resolve_metadata_from_challenge(None).await;
    if resolved.as_ref().is_ok_and(|resolved| !resolved.source.is_discovered()) {
        // Some servers ask for a login only where a session begins.
        let challenge = http.knock().await;
        if challenge.is_some() {
            resolved = manager.resolve_metadata_from_challenge(challenge.as_deref()).await;
        }
    }
    let resolved = resolved.map_err(|error| failed(http, &error))?;
    let issuer = match (&resolved.metadata.issuer, resolved.source.is_discovered()) {
        (Some(issuer), true) => issuer.clone(),
        (None, true) => return Err(login_failed("The authorization server does not say what it is called")),
        // Servers of 2025-03-26 may name nothing, and have endpoints of fixed names. Only one that asks for
        // a login is taken for such.
        (_, false) if http.challenged() => base.origin().ascii_serialization(),
        (_, false) => {
            return Err(login_failed(
                "The remote server neither names an authorization server nor asks for a login",
            ));
        }
    };
    let metadata = resolved.metadata;
    encrypts(&issuer, &metadata)?;
    manager.set_metadata(metadata.clone());
    Ok(Found { manager, http: Arc::clone(http), issuer, metadata })
}

/// Refuses an authorization server with TLS that has secrets sent to it without.
pub fn encrypts(issuer: &str, metadata: &AuthorizationMetadata) -> Result<(), WorkerError> {
    let endpoints = [Some(&metadata.token_endpoint), metadata.registration_endpoint.as_ref()];
    let in_clear = |endpoint: &String| issuer.starts_with("https:") && !endpoint.starts_with("https:");
    if endpoints.into_iter().flatten().any(in_clear) {
        return Err(login_failed("The authorization server wants secrets sent without encryption"));
    }
    Ok(())
}

impl Found {
    /// Whether the authorization server reads about its clients at the address that they are called by.
    pub fn reads_documents(&self) -> bool {
        let field = self.metadata.additional_fields.get("client_id_metadata_document_supported");
        field.and_then(Value::as_bool).unwrap_or(false)
    }

    /// Has the library speak in the name of a client.
    pub fn speak_as(
        &mut self,
        client_id: &str,
        client_secret: Option<&SecretString>,
        redirect_uri: &str,
    ) -> Result<(), WorkerError> {
        let mut config = rmcp::transport::auth::OAuthClientConfig::new(client_id, redirect_uri)
            .with_application_type("web");
        if let Some(secret) = client_secret {
            config = config.with_client_secret(secret.expose_secret());
        }
        self.manager.configure_client(config).map_err(|error| failed(&self.http, &error))
    }
}

/// What a failure of discovery or registration means to our caller. Nothing secret is part of either.
pub fn failed(http: &Http, error: &AuthError) -> WorkerError {
    let cause = match error {
        // It repeats what it could not read.
        AuthError::RegistrationFailed(_) => "it does not register clients, or not us".to_owned(),
        error => shorten(&error.to_string(), 300),
    };
    tracing::info!(error.cause = cause, "an authorization server cannot be used");
    if let Some(trouble) = http.trouble() {
        return trouble;
    }
    let text = match error {
        AuthError::AuthorizationServersUnavailable { authorization_servers, .. } => {
            let blocked = authorization_servers.iter().find_map(|url| http.check(url).err());
            if let Some(blocked) = blocked {
                return blocked;
            }
            // The library has a guard of its own, which knows nothing of what operators permit. It looks at
            // addresses, and not at what names stand for.
            let bare = |url: &String| Url::parse(url).is_ok_and(|url| url.domain().is_none());
            if authorization_servers.iter().any(bare) {
                return login_failed(
                    "The authorization server cannot be used, perhaps because it is named by a private \
                     address; a host name would do",
                );
            }
            "The authorization server that the remote server names says nothing of itself"
        }
        AuthError::DiscoveryRequestFailed { .. } => {
            let text = "The remote server or its authorization server cannot say right now how to log in";
            return WorkerError::new(ErrorCode::UpstreamUnavailable, text).outcome(Outcome::NotStarted);
        }
        AuthError::PkceUnsupported => "The authorization server does not support PKCE with S256",
        AuthError::AuthorizationServerMismatch { .. }
        | AuthError::AuthorizationServerMissingIssuer { .. } => {
            "The authorization server calls itself differently from what it should be called"
        }
        AuthError::ProtectedResourceMetadataInvalid { .. } => {
            "What the remote server says about how to log in is not valid"
        }
        AuthError::RegistrationFailed(_) => {
            "The authorization server does not register us; an operator can register a client there and \
             name it in the server's oauthClient"
        }
        _ => "The remote server or its authorization server did not go along with the login",
    };
    login_failed(text)
}

/// `login_failed`.
pub fn login_failed(text: &str) -> WorkerError {
    WorkerError::new(ErrorCode::LoginFailed, text).outcome(Outcome::NotStarted)
}
