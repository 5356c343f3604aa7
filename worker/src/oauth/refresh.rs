//! Refreshing: one request in the whole fleet, however many workers meet tokens that end. A refresh token
//! that is rotated can be used once; a second use of it makes good authorization servers void both.
//!
//! In one worker, all who wait share one task, which ends when it is done and not when they leave. Among
//! workers, whoever wins the compare-and-set that puts its name into the tokens' own document refreshes,
//! and the others look at the document until it changes.

use std::{
    collections::HashMap,
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use mcp_shared::{
    error::{Outcome, WorkerError},
    limits,
    metrics::Refreshed as Renewal,
    remote::OAuthTokens,
    server::ServerRecord,
    store::{Revision, StoreError, Versioned},
    timestamp::Timestamp,
    vault::VaultError,
};
use rmcp::transport::auth::{CredentialStore, InMemoryCredentialStore, StoredCredentials};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use super::{
    Inner, PAUSE, SHORT_PAUSE,
    cache::{Key, Tokens},
    discovery::{Granted, login_failed},
    not_started, reauth, same_issuer, url_of,
};
use crate::meters;

/// How often tokens are looked at that another worker refreshes.
const WATCH: Duration = Duration::from_millis(100);
/// How often it is tried to store what a refresh gave.
const ATTEMPTS: usize = 20;
/// The pause between two attempts.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(500);

/// What a refresh ends with.
type Refreshed = Result<Arc<Tokens>, WorkerError>;
/// A refresh that may have many waiting for it.
pub type Flight = Shared<BoxFuture<'static, Refreshed>>;

/// Why an authorization server gave no tokens.
enum Refusal {
    /// It never will for these: the code says why.
    Final(String),
    /// They are none of its business.
    Foreign {
        /// What it calls itself.
        issuer: String,
    },
    /// It may later.
    Passing(WorkerError),
}

/// Takes a refresh off the list when it is over, whichever way.
struct Listed(Arc<Inner>, Key);

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.flights().remove(&self.1);
    }
}

impl Inner {
    /// Other tokens in place of these.
    pub async fn renewed(self: &Arc<Self>, key: &Key, record: &ServerRecord, old: &Tokens) -> Refreshed {
        let stale = &old.stored.value.access_token;
        let renewed = self.flight(key, record, stale).await?;
        if renewed.stored.value.access_token.expose_secret() != stale.expose_secret() {
            return Ok(renewed);
        }
        // The flight that was joined had begun before these tokens were known to be of no use.
        self.flight(key, record, stale).await
    }

    fn flight(self: &Arc<Self>, key: &Key, record: &ServerRecord, stale: &SecretString) -> Flight {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(key) {
            return flight.clone();
        }
        let (record, stale) = (record.clone(), stale.clone());
        let listed = Listed(Arc::clone(self), key.clone());
        let task = self.tasks.spawn(async move { listed.0.refresh(&listed.1, &record, &stale).await });
        let flight: Flight = task
            .map(|ended| ended.unwrap_or_else(|error| Err(WorkerError::internal(error))))
            .boxed()
            .shared();
        flights.insert(key.clone(), flight.clone());
        flight
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<Key, Flight>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refreshes the tokens, or waits until another worker has.
    async fn refresh(&self, key: &Key, record: &ServerRecord, stale: &SecretString) -> Refreshed {
        let mut watched: Option<(Revision, Instant)> = None;
        loop {
            let Some(tokens) = self.read(key).await? else {
                return Err(reauth(key, None, "has not logged in to it"));
            };
            let stored = &tokens.stored;
            let value = &stored.value;
            if value.access_token.expose_secret() != stale.expose_secret() && tokens.lives() {
                return Ok(tokens);
            }
            let issuer = value.issuer.as_deref();
            if value.refused.is_some() {
                return Err(reauth(key, issuer, "is not logged in to it any more"));
            }
            if value.refresh_token.is_none() {
                return Err(reauth(key, issuer, "has a token that has ended and cannot be refreshed"));
            }
            // A claim of this worker's own is left from a task that could not take it back.
            if value.refreshing.as_ref().is_some_and(|claimant| *claimant != self.worker) {
                let since = match watched {
                    Some((revision, since)) if revision == stored.revision => since,
                    _ => {
                        let now = Instant::now();
                        watched = Some((stored.revision, now));
                        now
                    }
                };
                if since.elapsed() < self.takeover {
                    tokio::select! {
                        () = sleep(WATCH) => continue,
                        () = self.stopping.cancelled() => return Err(crate::call::stopping()),
                    }
                }
                tracing::warn!(server = %key.1, "a worker that began to refresh tokens is lost; this one does");
            }
            let mut claimed = value.clone();
            claimed.refreshing = Some(self.worker.clone());
            match self.vault.put_oauth_tokens(&claimed, Some(stored.revision)).await {
                Ok(revision) => {
                    return self.exchange(key, record, Versioned { revision, value: claimed }).await;
                }
                Err(error) if is_overtaken(&error) => {}
                Err(error) => return Err(not_started(error)),
            }
        }
    }

    /// Asks the authorization server, and writes down what came of it.
    async fn exchange(&self, key: &Key, record: &ServerRecord, claimed: Versioned<OAuthTokens>) -> Refreshed {
        let issuer = claimed.value.issuer.as_deref();
        match self.ask(record, &claimed.value).await {
            Ok(new) => {
                meters::refreshed(Renewal::Ok);
                tracing::debug!(server = %key.1, "tokens were refreshed");
                self.keep(key, claimed, new).await
            }
            Err(Refusal::Final(code)) => {
                meters::refreshed(Renewal::LoginNeeded);
                tracing::info!(server = %key.1, oauth.error = code, "tokens cannot be refreshed any more");
                let error = reauth(key, issuer, "is not logged in to it any more");
                if let ("invalid_client", Some(issuer), Some(redirect_uri)) =
                    (code.as_str(), issuer, &claimed.value.redirect_uri)
                {
                    // It has forgotten us. The next login registers us again.
                    let _ = self.vault.delete_oauth_client(issuer, redirect_uri).await;
                }
                self.release(key, claimed, Some(code), &error).await;
                Err(error)
            }
            Err(Refusal::Foreign { issuer: other }) => {
                meters::refreshed(Renewal::LoginNeeded);
                let named = mcp_shared::error::shorten(&other, 128);
                tracing::warn!(server = %key.1, named, "a remote server names another authorization server");
                let error =
                    reauth(key, issuer, "has tokens of an authorization server that it does not name");
                self.release(key, claimed, None, &error).await;
                Err(error)
            }
            Err(Refusal::Passing(error)) => {
                meters::refreshed(Renewal::Failed);
                let error = error.or_outcome(Outcome::NotStarted).with("serverName", key.1.as_str());
                self.release(key, claimed, None, &error).await;
                Err(error)
            }
        }
    }

    /// The request itself. Nothing is sent to an authorization server other than the one that gave the
    /// tokens.
    async fn ask(&self, record: &ServerRecord, tokens: &OAuthTokens) -> Result<OAuthTokens, Refusal> {
        let given = record.oauth_client.as_ref();
        let (client_id, client_secret) = match (&tokens.client_id, given) {
            (Some(id), _) => (id.clone(), tokens.client_secret.clone()),
            (None, Some(given)) => (given.client_id.clone(), given.client_secret.clone().map(Into::into)),
            (None, None) => return Err(Refusal::Final("no clientId is stored with the tokens".to_owned())),
        };
        let url = url_of(record);
        let mut found = self.authorization_server(record).await.map_err(Refusal::Passing)?;
        // Tokens of mcp-api's do not say who gave them; its record of the server may.
        let giver = tokens
            .issuer
            .as_deref()
            .or_else(|| record.extra.get("oauthTemplate")?.get("authorizationServerIssuer")?.as_str());
        if giver.is_some_and(|issuer| !same_issuer(issuer, &found.issuer)) {
            return Err(Refusal::Foreign { issuer: found.issuer });
        }
        let redirect_uri = tokens.redirect_uri.as_deref().unwrap_or(url);
        found
            .speak_as(&client_id, client_secret.as_ref(), redirect_uri)
            .or_else(|_| found.speak_as(&client_id, client_secret.as_ref(), url))
            .map_err(Refusal::Passing)?;
        let passing =
            || Refusal::Passing(login_failed("The authorization server refreshes no tokens right now"));
        let credentials: StoredCredentials = serde_json::from_value(json!({
            "client_id": client_id,
            "token_response": {
                "access_token": tokens.access_token.expose_secret(),
                "token_type": "bearer",
                "refresh_token": tokens.refresh_token.as_ref().map(ExposeSecret::expose_secret),
            },
            "granted_scopes": tokens.scopes,
        }))
        .map_err(|_| passing())?;
        let store = InMemoryCredentialStore::new();
        store.save(credentials).await.map_err(|_| passing())?;
        found.manager.set_credential_store(store);
        let asked = Timestamp::now();
        let answer = timeout(limits::OAUTH_TIMEOUT, found.manager.refresh_token()).await;
        let Ok(Ok(answer)) = answer else {
            return Err(match (found.http.refusal(), found.http.trouble()) {
                (Some(code), _) => Refusal::Final(code),
                (None, Some(trouble)) => Refusal::Passing(trouble),
                (None, None) => passing(),
            });
        };
        let granted = Granted::of(&answer).map_err(Refusal::Passing)?;
        let mut new = tokens.clone();
        new.issuer = Some(found.issuer);
        new.expires_at = granted.ends(asked);
        new.scopes = granted.scopes().unwrap_or(new.scopes);
        new.access_token = granted.access_token.into();
        new.refresh_token = granted.refresh_token.map(Into::into).or(new.refresh_token);
        new.client_id = Some(client_id);
        new.client_secret = client_secret;
        new.refreshing = None;
        new.refused = None;
        Ok(new)
    }

    /// Stores new tokens. They are worth some patience: the old ones are of no use any more.
    async fn keep(&self, key: &Key, claimed: Versioned<OAuthTokens>, new: OAuthTokens) -> Refreshed {
        let mut expected = claimed.revision;
        for _ in 0..ATTEMPTS {
            let stamp = self.cache.stamp(key);
            match self.vault.put_oauth_tokens(&new, Some(expected)).await {
                Ok(revision) => {
                    let tokens = Tokens::new(Versioned { revision, value: new });
                    self.cache.put(key, stamp, Some(Arc::clone(&tokens)));
                    return Ok(tokens);
                }
                Err(error) if is_overtaken(&error) => match self.read(key).await {
                    // Another worker took this one for lost. What it sends will be refused.
                    Ok(Some(other)) if same_tokens(&other.stored.value, &claimed.value) => {
                        expected = other.stored.revision;
                    }
                    // Somebody logged in meanwhile, or this write did succeed after all.
                    Ok(Some(other)) => return Ok(other),
                    Ok(None) => return Err(reauth(key, None, "is not logged in to it any more")),
                    Err(_) => sleep(ATTEMPT_PAUSE).await,
                },
                Err(error) => {
                    tracing::warn!(server = %key.1, error.cause = %error, "new tokens cannot be stored yet");
                    sleep(ATTEMPT_PAUSE).await;
                }
            }
        }
        tracing::error!(server = %key.1, "new tokens could not be stored; the user will have to log in again");
        let stamp = self.cache.stamp(key);
        let tokens = Tokens::new(Versioned { revision: expected, value: new });
        self.cache.put(key, stamp, Some(Arc::clone(&tokens)));
        Ok(tokens)
    }

    /// Takes a claim back, and has nobody here try again for a while. Where that does not succeed, the claim
    /// is void after some time.
    async fn release(
        &self,
        key: &Key,
        claimed: Versioned<OAuthTokens>,
        refused: Option<String>,
        error: &WorkerError,
    ) {
        let mut released = claimed.value.clone();
        released.refreshing = None;
        released.refused.clone_from(&refused);
        let mut expected = claimed.revision;
        for _ in 0..3 {
            let stamp = self.cache.stamp(key);
            match self.vault.put_oauth_tokens(&released, Some(expected)).await {
                Ok(revision) => {
                    let tokens = Tokens::new(Versioned { revision, value: released });
                    tokens.pause(if tokens.lives() { PAUSE } else { SHORT_PAUSE }, error.clone());
                    self.cache.put(key, stamp, Some(tokens));
                    return;
                }
                Err(error) if is_overtaken(&error) && refused.is_some() => match self.read(key).await {
                    Ok(Some(other)) if same_tokens(&other.stored.value, &claimed.value) => {
                        expected = other.stored.revision;
                    }
                    _ => break,
                },
                Err(error) => {
                    tracing::debug!(server = %key.1, error.cause = %error, "a claim is left to run out");
                    break;
                }
            }
        }
        // The next one reads what is stored now.
        self.cache.forget(key);
    }
}

/// Whether somebody else wrote first.
fn is_overtaken(error: &VaultError) -> bool {
    matches!(
        error,
        VaultError::Store(StoreError::Conflict | StoreError::NotFound | StoreError::AlreadyExists { .. })
    )
}

fn same_tokens(one: &OAuthTokens, other: &OAuthTokens) -> bool {
    let refresh =
        |tokens: &OAuthTokens| tokens.refresh_token.as_ref().map(|token| token.expose_secret().to_owned());
    one.access_token.expose_secret() == other.access_token.expose_secret() && refresh(one) == refresh(other)
}
