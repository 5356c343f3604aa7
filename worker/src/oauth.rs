//! Users' logins to remote servers: their tokens, refreshed by one worker at a time, and how they get
//! them.

mod cache;
mod discovery;
mod http;
mod login;
mod refresh;
mod template;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    ids::{ServerName, UserId, WorkerId},
    limits,
    remote::{RemoteAnswer, RemoteAsk},
    server::{ServerRecord, Transport},
    store::Revision,
    vault::Vault,
};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use url::Url;

use self::{
    cache::{Cache, Key, Tokens},
    discovery::Found,
    refresh::Flight,
    template::Template,
};
use crate::{outgoing::Outgoing, remembered};

/// How long nobody tries again to refresh tokens ahead of their end, after that has failed.
const PAUSE: Duration = Duration::from_secs(5);
/// As [`PAUSE`], of tokens that have ended: their users wait.
const SHORT_PAUSE: Duration = Duration::from_secs(1);

/// An access token as it was when it was read.
#[derive(Debug, Clone)]
pub struct Bearer {
    /// The token.
    pub token: SecretString,
    /// The revision of the document that had it.
    pub revision: Revision,
}

/// Users' tokens for remote servers. Cloning it is cheap.
#[derive(Clone)]
pub struct OAuth(Arc<Inner>);

struct Inner {
    vault: Vault,
    http: Outgoing,
    worker: WorkerId,
    cache: Cache,
    /// Refreshes under way in this worker.
    flights: Mutex<HashMap<Key, Flight>>,
    /// Runs what must not end with its caller.
    tasks: TaskTracker,
    stopping: CancellationToken,
    /// After how long without a change another worker's claim is void.
    takeover: Duration,
    /// When logins that nobody finished were looked for.
    swept: Mutex<Option<Instant>>,
}

impl OAuth {
    /// Tokens of the store, refreshed through `http` by this worker. What has to be carried through whoever
    /// waits for it runs as one of `tasks`; what only waits for others ends when `stopping` is set.
    pub fn new(
        vault: Vault,
        http: Outgoing,
        worker: WorkerId,
        tasks: TaskTracker,
        stopping: CancellationToken,
    ) -> Self {
        let (cache, flights) = (Cache::new(), Mutex::default());
        let (takeover, swept) = (limits::OAUTH_REFRESH_TAKEOVER, Mutex::default());
        Self(Arc::new(Inner { vault, http, worker, cache, flights, tasks, stopping, takeover, swept }))
    }

    /// The access token for requests of a user, refreshed first if it is about to end; `None`: the user has
    /// none. An error says that the user has to log in again, or that the token cannot be had right now.
    pub async fn bearer(&self, user: &UserId, record: &ServerRecord) -> Result<Option<Bearer>, WorkerError> {
        let key = (user.clone(), record.name.clone());
        let Some(tokens) = self.0.known(&key).await? else { return Ok(None) };
        self.0.for_here(&key, record, &tokens)?;
        if !tokens.due() {
            return Ok(Some(tokens.bearer()));
        }
        if tokens.stored.value.refused.is_some() || tokens.stored.value.refresh_token.is_none() {
            if tokens.lives() {
                return Ok(Some(tokens.bearer()));
            }
            // The user may have logged in since, on a gateway of which this worker has not heard.
            return self.0.renewed(&key, record, &tokens).await.map(|tokens| Some(tokens.bearer()));
        }
        if let Some(error) = tokens.paused() {
            return if tokens.lives() { Ok(Some(tokens.bearer())) } else { Err(error) };
        }
        match self.0.renewed(&key, record, &tokens).await {
            Ok(renewed) => Ok(Some(renewed.bearer())),
            // It serves as long as it lives, whatever is wrong with the authorization server.
            Err(_) if tokens.lives() => Ok(Some(tokens.bearer())),
            Err(error) => Err(error),
        }
    }

    /// Another token in place of one that the remote server refused with 401 (`refused` is `None` where no
    /// token was sent). `challenge` is its `WWW-Authenticate`. An error is [`ErrorCode::ReauthRequired`] when
    /// the user has to log in.
    pub async fn refused(
        &self,
        user: &UserId,
        record: &ServerRecord,
        refused: Option<&Bearer>,
        challenge: Option<&str>,
    ) -> Result<Bearer, WorkerError> {
        tracing::debug!(server = %record.name, challenge = challenge.is_some(), "a remote server wants a login");
        let key = (user.clone(), record.name.clone());
        let other = |tokens: &Tokens| {
            let token = tokens.stored.value.access_token.expose_secret();
            refused.is_none_or(|refused| refused.token.expose_secret() != token) && tokens.lives()
        };
        if let Some(tokens) = self.0.cache.get(&key).and_then(remembered::Found::value)
            && other(&tokens)
        {
            return Ok(tokens.bearer());
        }
        let tokens = self.0.read(&key).await?;
        let Some(tokens) = tokens else { return Err(reauth(&key, None, "has not logged in to it")) };
        self.0.for_here(&key, record, &tokens)?;
        if other(&tokens) {
            return Ok(tokens.bearer());
        }
        if let Some(error) = tokens.paused() {
            return Err(error);
        }
        self.0.renewed(&key, record, &tokens).await.map(|tokens| tokens.bearer())
    }

    /// Takes in that a token which was given out in place of a refused one was refused as well: nobody here
    /// refreshes it for a while. Otherwise every call would, for nothing.
    pub fn spurned(
        &self,
        user: &UserId,
        record: &ServerRecord,
        refused: Option<&Bearer>,
        error: &WorkerError,
    ) {
        let tokens =
            self.0.cache.get(&(user.clone(), record.name.clone())).and_then(remembered::Found::value);
        if let (Some(tokens), Some(refused)) = (tokens, refused)
            && tokens.stored.value.access_token.expose_secret() == refused.token.expose_secret()
        {
            tokens.pause(PAUSE, error.clone());
        }
    }

    /// Whether tokens are being refreshed. What comes of it must be stored: the old ones are void by then.
    pub fn is_refreshing(&self) -> bool {
        !self.0.flights.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Forgets what is remembered of a user's tokens for a server.
    pub fn forget(&self, user: &UserId, server: &ServerName) {
        self.0.cache.forget(&(user.clone(), server.clone()));
    }

    /// Forgets everything that is remembered: changes may have been missed.
    pub fn forget_all(&self) {
        self.0.cache.forget_all();
    }

    /// Has everything read again when it is needed, as long as the store answers, which it has just done.
    pub fn doubt_all(&self) {
        self.0.cache.doubt_all();
    }

    /// Does what a gateway asks: all of [`RemoteAsk`] but the end of sessions.
    pub async fn answer(&self, ask: RemoteAsk) -> Result<RemoteAnswer, WorkerError> {
        match ask {
            RemoteAsk::Issuer { server } => {
                let record = self.0.remote(&server).await?;
                let found = self.0.authorization_server(&record).await;
                Ok(RemoteAnswer::Issuer { issuer: found.ok().map(|found| found.issuer) })
            }
            RemoteAsk::BeginLogin(begin) => self.0.begin_login(begin).await,
            RemoteAsk::FinishLogin { id } => {
                let inner = Arc::clone(&self.0);
                // A code can be used once: what it gives must not be lost because a browser went away.
                let finished = self.0.tasks.spawn(async move { inner.finish_login(&id).await });
                finished.await.map_err(WorkerError::internal)?
            }
            RemoteAsk::EndSessions { .. } => Err(WorkerError::internal("sessions are not ended by logins")),
        }
    }
}

impl Inner {
    /// The authorization server of a remote server: the one that it names, unless its record says better.
    async fn authorization_server(&self, record: &ServerRecord) -> Result<Found, WorkerError> {
        match Template::of(record, self.vault.crypter().mode()) {
            Some(template) => template.found(&self.http, record).await,
            None => discovery::discover(&self.http, url_of(record)).await,
        }
    }

    /// Refuses tokens that were given for another place than the one where the server is now.
    fn for_here(&self, key: &Key, record: &ServerRecord, tokens: &Tokens) -> Result<(), WorkerError> {
        let origin = |url: &str| Url::parse(url).ok().map(|url| url.origin());
        match &tokens.stored.value.resource {
            Some(resource) if origin(resource) != origin(url_of(record)) => {
                Err(reauth(key, None, "logged in to it where it was before"))
            }
            _ => Ok(()),
        }
    }

    /// A user's tokens as remembered, or as stored.
    async fn known(&self, key: &Key) -> Result<Option<Arc<Tokens>>, WorkerError> {
        match self.cache.get(key) {
            Some(remembered::Found::Certain(known)) => Ok(known),
            Some(remembered::Found::Doubtful(known)) => match self.read(key).await {
                // Nobody has said that they changed.
                Err(error) if error.code == ErrorCode::StoreUnavailable && !self.cache.is_outdated() => {
                    Ok(known)
                }
                read => read,
            },
            None => self.read(key).await,
        }
    }

    /// A user's tokens as stored.
    async fn read(&self, key: &Key) -> Result<Option<Arc<Tokens>>, WorkerError> {
        let stamp = self.cache.stamp(key);
        let stored = self.vault.oauth_tokens(&key.0, &key.1).await.map_err(not_started)?;
        let known = self.cache.get(key).and_then(remembered::Found::value);
        let tokens = stored.map(|stored| match known {
            // What is remembered with it stays remembered.
            Some(known) if known.stored.revision == stored.revision => known,
            _ => Tokens::new(stored),
        });
        self.cache.put(key, stamp, tokens.clone());
        Ok(tokens)
    }

    /// The record of a remote server.
    async fn remote(&self, server: &ServerName) -> Result<ServerRecord, WorkerError> {
        let record = self.vault.server(server).await?;
        let record = record.ok_or_else(|| WorkerError::server_not_found(server))?.value;
        if record.is_remote() {
            return Ok(record);
        }
        let text = format!("Server {server} is not a remote server");
        Err(WorkerError::new(ErrorCode::InvalidRequest, text).with("serverName", server.as_str()))
    }
}

/// The endpoint of a remote server.
fn url_of(record: &ServerRecord) -> &str {
    match &record.transport {
        Transport::StreamableHttp { url, .. } => url,
        Transport::Stdio { .. } => "",
    }
}

/// Whether two texts name one authorization server. Those that were typed may lack the last slash.
fn same_issuer(one: &str, other: &str) -> bool {
    one.trim_end_matches('/') == other.trim_end_matches('/')
}

/// `reauth_required`: the gateway adds where to begin.
fn reauth((user, server): &Key, issuer: Option<&str>, why: &str) -> WorkerError {
    let text = format!("Log in to server {server}: the user {why}");
    let mut error = WorkerError::new(ErrorCode::ReauthRequired, text)
        .outcome(Outcome::NotStarted)
        .with("serverName", server.as_str())
        .with("username", user.as_str());
    if let Some(issuer) = issuer {
        error = error.with("authorizationServer", issuer);
    }
    error
}

fn not_started(error: impl Into<WorkerError>) -> WorkerError {
    error.into().outcome(Outcome::NotStarted)
}
