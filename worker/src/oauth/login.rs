//! A user's way to tokens: authorization code with PKCE. What has to be kept between its two halves is in
//! the store, so that any worker can do the second.

use std::{sync::PoisonError, time::Duration};

use mcp_shared::{
    error::{ErrorCode, WorkerError},
    limits,
    remote::{BeginLogin, LOGIN_TIME, Login, LoginId, OAuthClient, OAuthTokens, RemoteAnswer},
    server::ServerRecord,
    store::StoreError,
    timestamp::Timestamp,
    vault::VaultError,
};
use rmcp::transport::auth::{InMemoryStateStore, StateStore, StoredAuthorizationState};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};
use url::Url;

use super::{
    Inner,
    cache::Key,
    discovery::{Found, Granted, failed, login_failed},
    same_issuer, url_of,
};

/// What authorization servers show to users who log in.
const CLIENT_NAME: &str = "mcp-api";
/// How often a worker looks for logins that nobody finished.
const SWEEP: Duration = Duration::from_secs(60);

/// What the second half of a login needs to know of the first.
#[derive(Serialize, Deserialize)]
struct Proof {
    /// The PKCE verifier, and what the library checks an answer by.
    state: StoredAuthorizationState,
    /// The authorization server.
    issuer: String,
    /// The remote server's endpoint.
    url: String,
    redirect_uri: String,
    client_id: String,
    client_secret: Option<String>,
}

/// What an authorization server is told of who we are.
struct Client {
    id: String,
    secret: Option<SecretString>,
}

impl Inner {
    /// The first half: where the browser has to go.
    pub async fn begin_login(&self, begin: BeginLogin) -> Result<RemoteAnswer, WorkerError> {
        let record = self.remote(&begin.server).await?;
        self.sweep().await;
        let named = |error: WorkerError| {
            WorkerError { outcome: None, ..error }.with("serverName", begin.server.as_str())
        };
        let url = url_of(&record).to_owned();
        let mut found = self.authorization_server(&record).await.map_err(named)?;
        let given = record.oauth_client.as_ref().map(|given| given.scopes.clone());
        let scopes = match given.filter(|scopes| !scopes.is_empty()) {
            Some(scopes) => scopes,
            None => found.manager.select_initial_scopes(&[]).await,
        };
        let scopes: Vec<_> = scopes.iter().map(String::as_str).collect();
        let client = self.client(&mut found, &record, &begin, &scopes).await.map_err(named)?;
        found.speak_as(&client.id, client.secret.as_ref(), &begin.redirect_uri).map_err(named)?;
        let states = InMemoryStateStore::new();
        found.manager.set_state_store(states.clone());
        let address = found.manager.get_authorization_url(&scopes).await;
        let address = address.map_err(|error| named(failed(&found.http, &error)))?;
        let (address, state) = without_state(&address)?;
        let state = states.load(&state).await.ok().flatten();
        let proof = Proof {
            state: state.ok_or_else(|| WorkerError::internal("the library kept no state of a login"))?,
            issuer: found.issuer,
            url,
            redirect_uri: begin.redirect_uri,
            client_id: client.id,
            client_secret: client.secret.map(|secret| secret.expose_secret().to_owned()),
        };
        let proof = serde_json::to_string(&proof).map_err(WorkerError::internal)?;
        let login = Login {
            id: begin.id,
            user: begin.user,
            server: begin.server,
            browser: begin.browser,
            begun_at: Timestamp::now(),
            code: None,
            answered_by: None,
            proof: proof.into(),
        };
        self.vault.put_login(&login, None).await?;
        Ok(RemoteAnswer::Login { url: address.into() })
    }

    /// Removes logins that nobody finished, now and then.
    async fn sweep(&self) {
        {
            let mut swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner);
            if swept.is_some_and(|swept| swept.elapsed() < SWEEP) {
                return;
            }
            *swept = Some(Instant::now());
        }
        match self.vault.sweep_logins().await {
            Ok(swept) if swept > 0 => tracing::debug!(swept, "logins that nobody finished were removed"),
            Ok(_) => {}
            Err(error) => tracing::debug!(error.cause = %error, "old logins could not be removed"),
        }
    }

    /// What an authorization server knows us by: as an operator says, as it can read, as it was told before,
    /// or as it is told now.
    async fn client(
        &self,
        found: &mut Found,
        record: &ServerRecord,
        begin: &BeginLogin,
        scopes: &[&str],
    ) -> Result<Client, WorkerError> {
        if let Some(given) = &record.oauth_client {
            let secret = given.client_secret.clone().map(Into::into);
            return Ok(Client { id: given.client_id.clone(), secret });
        }
        let document = begin.client_document.as_ref().filter(|_| found.reads_documents());
        if let Some(document) = document.filter(|document| document.starts_with("https://")) {
            return Ok(Client { id: document.clone(), secret: None });
        }
        let known = self.vault.oauth_client(&found.issuer, &begin.redirect_uri).await;
        match known {
            Ok(Some(known)) => {
                return Ok(Client { id: known.client_id, secret: known.client_secret });
            }
            Ok(None) => {}
            Err(VaultError::Integrity { what, .. }) => {
                tracing::warn!(what, "a client's registration cannot be decrypted; there will be a new one");
            }
            Err(error) => return Err(error.into()),
        }
        let config = timeout(
            limits::OAUTH_TIMEOUT,
            found.manager.register_client(CLIENT_NAME, &begin.redirect_uri, scopes),
        )
        .await;
        let config = config
            .map_err(|_| login_failed("The authorization server does not answer in time"))?
            .map_err(|error| failed(&found.http, &error))?;
        let secret: Option<SecretString> = config.client_secret.map(Into::into);
        let client = OAuthClient {
            issuer: found.issuer.clone(),
            redirect_uri: begin.redirect_uri.clone(),
            client_id: config.client_id.clone(),
            client_secret: secret.clone(),
        };
        self.vault.put_oauth_client(&client).await?;
        Ok(Client { id: config.client_id, secret })
    }

    /// The second half: tokens for the code that is stored with the login.
    pub async fn finish_login(&self, id: &LoginId) -> Result<RemoteAnswer, WorkerError> {
        let Some(stored) = self.vault.login(id).await? else { return Err(invalid_state()) };
        // Whoever takes it away may go on, and nobody after that.
        match self.vault.delete_login(id, Some(stored.revision)).await {
            Ok(true) => {}
            Ok(false) | Err(VaultError::Store(StoreError::Conflict | StoreError::NotFound)) => {
                return Err(invalid_state());
            }
            Err(error) => return Err(error.into()),
        }
        let login = stored.value;
        let age = Timestamp::now().millis().abs_diff(login.begun_at.millis());
        let (Some(code), false) = (&login.code, u128::from(age) > LOGIN_TIME.as_millis()) else {
            return Err(invalid_state());
        };
        let proof: Proof = serde_json::from_str(login.proof.expose_secret()).map_err(|_| invalid_state())?;
        let record = self.remote(&login.server).await?;
        let named = |error: WorkerError| {
            WorkerError { outcome: None, ..error }.with("serverName", login.server.as_str())
        };
        if url_of(&record) != proof.url {
            return Err(named(login_failed("The server's address was changed while the user logged in")));
        }
        let mut found = self.authorization_server(&record).await.map_err(named)?;
        if !same_issuer(&found.issuer, &proof.issuer) {
            return Err(named(login_failed("The remote server names another authorization server now")));
        }
        let secret: Option<SecretString> = proof.client_secret.map(Into::into);
        found.speak_as(&proof.client_id, secret.as_ref(), &proof.redirect_uri).map_err(named)?;
        let (asked_for, state) = (proof.state.requested_scopes.clone(), proof.state.csrf_token.clone());
        let states = InMemoryStateStore::new();
        states.save(&state, proof.state).await.map_err(|_| invalid_state())?;
        found.manager.set_state_store(states);
        let asked = Timestamp::now();
        let exchange = found.manager.exchange_code_for_token_with_issuer(
            code.expose_secret(),
            &state,
            login.answered_by.as_deref(),
        );
        let granted = match timeout(limits::OAUTH_TIMEOUT, exchange).await {
            Ok(Ok(answer)) => Granted::of(&answer).map_err(named)?,
            Ok(Err(_)) | Err(_) => {
                let refusal = found.http.refusal();
                tracing::info!(server = %login.server, oauth.error = refusal, "a login was refused");
                if refusal.as_deref() == Some("invalid_client") {
                    // It has forgotten us. The next login registers us again.
                    let _ = self.vault.delete_oauth_client(&proof.issuer, &proof.redirect_uri).await;
                }
                let text = "The authorization server did not give tokens for the login; begin it again";
                return Err(named(found.http.trouble().unwrap_or_else(|| login_failed(text))));
            }
        };
        let tokens = OAuthTokens {
            user: login.user.clone(),
            server: login.server.clone(),
            issuer: Some(found.issuer),
            resource: Some(proof.url),
            token_type: "Bearer".to_owned(),
            expires_at: granted.ends(asked),
            scopes: granted.scopes().unwrap_or(asked_for),
            access_token: granted.access_token.into(),
            refresh_token: granted.refresh_token.map(Into::into),
            client_id: Some(proof.client_id),
            client_secret: secret,
            redirect_uri: Some(proof.redirect_uri),
            code_verifier: None,
            refreshing: None,
            refused: None,
            extra: serde_json::Map::new(),
        };
        self.vault.replace_oauth_tokens(tokens).await?;
        let key: Key = (login.user, login.server);
        self.cache.forget(&key);
        let (user, server) = key;
        Ok(RemoteAnswer::LoggedIn { user, server })
    }
}

/// The library's address without its `state`, and that.
fn without_state(address: &str) -> Result<(Url, String), WorkerError> {
    let mut url = Url::parse(address).map_err(WorkerError::internal)?;
    let (states, others): (Vec<_>, Vec<_>) =
        url.query_pairs().into_owned().partition(|(name, _)| name == "state");
    url.query_pairs_mut().clear().extend_pairs(others);
    match states.into_iter().next() {
        Some((_, state)) => Ok((url, state)),
        None => Err(WorkerError::internal("the library's address has no state")),
    }
}

fn invalid_state() -> WorkerError {
    WorkerError::new(ErrorCode::InvalidState, "This login is over, or was not begun here; begin it again")
}
