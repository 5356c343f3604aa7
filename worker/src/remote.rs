//! Connecting to a remote server for one user: with the session that the user has, if the server still
//! knows it, or in the newest way that both sides speak.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use http::HeaderValue;
use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    ids::UserId,
    json::RawJson,
    limits,
    remote::Session,
    server::{ServerRecord, Transport},
    store::{Revision, StoreError},
    timestamp::Timestamp,
    vault::VaultError,
};
use secrecy::ExposeSecret;
use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    group::{CurrentRecord, current},
    host::Host,
    instance::{End, Instance, Origin},
    logs::{Known, Log},
    mcp::{self, Refusal},
    transport::{
        connection::{Connection, Failure},
        endpoint::Endpoint,
        http::{Http, session_id, session_text},
        sse,
    },
};

/// How long a server may think about a question of the newest protocol. Some that do not know it never
/// answer.
const DISCOVERY: Duration = Duration::from_secs(10);
/// How long the store may take to forget a session.
const FORGETTING: Duration = Duration::from_secs(1);
/// Sessions of a removed server that are ended side by side.
const FAREWELLS: usize = 16;

/// Who is to be connected to what.
pub struct Target<'a> {
    /// The worker's means.
    pub host: &'a Arc<Host>,
    /// For whom.
    pub user: UserId,
    /// The server.
    pub record: &'a Arc<ServerRecord>,
    /// The server as it will be later.
    pub current: &'a Arc<CurrentRecord>,
    /// What happens is noted here.
    pub log: &'a Arc<Log>,
    /// Set when nobody wants it any more.
    pub given_up: &'a CancellationToken,
}

/// A server that answered.
struct Met {
    http: Arc<Http>,
    connection: Connection,
    tools: RawJson,
    /// The stored session that it goes on with.
    resumed: Option<Revision>,
}

/// Closes a connection that came to nothing.
struct Attempt(Option<Connection>);

impl Attempt {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(connection) = &self.0 {
            connection.close();
        }
    }
}

/// Connects, and waits until the server listed its tools, at most for the record's start-up time. The error is
/// for the caller of a tool.
pub async fn connect(target: Target<'_>) -> Result<Arc<Instance>, WorkerError> {
    let limit = target.record.startup_limit();
    let deadline = Instant::now() + limit;
    let known = remember(&target)?;
    let met = tokio::select! {
        met = timeout_at(deadline, meet(&target)) => met.map_err(|_| {
            let text = format!("Server {} did not list its tools within {} ms", target.record.name, limit.as_millis());
            WorkerError::new(ErrorCode::UpstreamUnavailable, text).with("serverName", target.record.name.as_str())
        })?,
        () = target.given_up.cancelled() => Err(Refusal::new("it is no longer wanted")),
    };
    let met = met.map_err(|refusal| explain(&target, refusal))?;
    let kept = keep_session(&target, &met).await;
    met.http.set_tools(&met.tools);
    met.http.listen();
    let stop = CancellationToken::new();
    let (ended_sender, ended) = watch::channel(None);
    let watcher = Watcher {
        host: Arc::clone(target.host),
        http: Arc::clone(&met.http),
        connection: met.connection.clone(),
        current: Arc::clone(target.current),
        kept,
        known,
    };
    target.host.tasks.spawn(watcher.watch(stop.clone(), ended_sender));
    Ok(Instance::new(met.connection, Origin::Remote(met.http), met.tools, stop, ended))
}

/// Keeps what the server is sent out of its log.
fn remember(target: &Target<'_>) -> Result<Known, WorkerError> {
    let endpoint = endpoint(target)?;
    Ok(target.log.remember(endpoint.secrets().iter()))
}

fn endpoint(target: &Target<'_>) -> Result<Endpoint, WorkerError> {
    Endpoint::new(
        Arc::clone(target.host),
        target.user.clone(),
        Arc::clone(target.record),
        Arc::clone(target.log),
    )
}

fn open(target: &Target<'_>) -> Result<(Arc<Http>, Connection, Attempt), Refusal> {
    let endpoint = endpoint(target).map_err(|error| Refusal::new(error.message))?;
    let (http, connection) = Http::open(endpoint, Arc::clone(target.log), &target.host.tasks);
    let attempt = Attempt(Some(connection.clone()));
    Ok((http, connection, attempt))
}

async fn meet(target: &Target<'_>) -> Result<Met, Refusal> {
    if let Some((session, revision)) = stored_session(target).await {
        let (http, connection, attempt) = open(target)?;
        let id = session_id(session.id.expose_secret().as_bytes());
        if let Some(id) = id {
            http.resume(id, session.protocol_version.as_deref());
            match mcp::list_tools(&connection).await {
                Ok(tools) => {
                    tracing::info!(server = %target.record.name, "a session is resumed");
                    attempt.keep();
                    return Ok(Met { http, connection, tools, resumed: revision });
                }
                Err(refusal) if !is_about_session(&refusal) => return Err(refusal),
                Err(_) => {
                    target.log.note("the server does not know its session any more: a new one is begun")
                }
            }
        }
        forget(target, revision).await;
    }
    let (http, connection, attempt) = begin(target).await?;
    if http.has_bad_session() {
        return Err(Refusal::new("it gave a session id that cannot be one"));
    }
    let tools = mcp::list_tools(&connection).await?;
    attempt.keep();
    Ok(Met { http, connection, tools, resumed: None })
}

/// Begins to talk: the newest protocol first, then that of sessions, then the oldest transport.
async fn begin(target: &Target<'_>) -> Result<(Arc<Http>, Connection, Attempt), Refusal> {
    let (http, connection, attempt) = open(target)?;
    http.be_stateless(mcp::stateless_version());
    match timeout(DISCOVERY, mcp::discover(&connection)).await {
        Ok(Ok(())) => return Ok((http, connection, attempt)),
        Ok(Err(refusal)) if is_final(&refusal) => return Err(refusal),
        Ok(Err(_)) | Err(_) => http.forget_dialect(),
    }
    let refused = match mcp::initialize(&connection).await {
        Ok(version) => {
            http.set_version(&version);
            initialized(&http).await?;
            return Ok((http, connection, attempt));
        }
        Err(refusal) => refusal,
    };
    let status = match &refused.failure {
        Some(Failure::Upstream(upstream)) => upstream.status,
        _ => None,
    };
    if !matches!(status, Some(400 | 404 | 405)) {
        return Err(refused);
    }
    let (http, connection, attempt) = open(target)?;
    match sse::open(&http, &target.host.tasks).await {
        Ok(()) => {}
        // It speaks neither: what it said to the newer one says more.
        Err(Failure::Upstream(upstream)) if upstream.status.is_some_and(|status| status < 500) => {
            return Err(refused);
        }
        Err(failure) => return Err(Refusal { text: refused.text, failure: Some(failure) }),
    }
    mcp::initialize(&connection).await?;
    initialized(&http).await?;
    Ok((http, connection, attempt))
}

async fn initialized(http: &Http) -> Result<(), Refusal> {
    http.initialized().await.map_err(|failure| Refusal::of("notifications/initialized", failure))
}

/// Whether a refusal would be the same in any dialect.
fn is_final(refusal: &Refusal) -> bool {
    match &refusal.failure {
        Some(Failure::Upstream(upstream)) => {
            !matches!(upstream.error.code, ErrorCode::UpstreamProtocolError | ErrorCode::UpstreamLost)
        }
        _ => false,
    }
}

/// Whether a server refused because it does not know the session.
fn is_about_session(refusal: &Refusal) -> bool {
    match &refusal.failure {
        Some(Failure::SessionLost) => true,
        Some(Failure::Upstream(upstream)) => matches!(upstream.status, Some(400 | 404 | 405 | 410)),
        Some(Failure::Rpc(_)) => true,
        _ => false,
    }
}

/// What a caller is told of a server that cannot be connected to.
fn explain(target: &Target<'_>, refusal: Refusal) -> WorkerError {
    let name = &target.record.name;
    if let Some(Failure::Upstream(upstream)) = refusal.failure {
        let error = match upstream.error.code {
            // No call was in flight yet.
            ErrorCode::UpstreamLost => WorkerError {
                code: ErrorCode::UpstreamUnavailable,
                message: format!("The connection to server {name} was lost while it was made"),
                ..upstream.error
            },
            _ => upstream.error,
        };
        return error.outcome(Outcome::NotStarted);
    }
    // It may repeat the server's own words.
    let text = target.log.redactor().quote(refusal.text);
    WorkerError::new(ErrorCode::ServerUnavailable, format!("Server {name} is not available: {text}"))
        .with("serverName", name.as_str())
        .outcome(Outcome::NotStarted)
}

/// The session that the user has with the server, and where it is stored.
async fn stored_session(target: &Target<'_>) -> Option<(Session, Option<Revision>)> {
    let Transport::StreamableHttp { url, session_id, .. } = &target.record.transport else { return None };
    match target.host.vault.session(&target.user, &target.record.name).await {
        // mcp-api does not say which endpoint gave a session.
        Ok(Some(stored)) if stored.value.url == *url || stored.value.url.is_empty() => {
            Some((stored.value, Some(stored.revision)))
        }
        // Records of mcp-api have one of their own.
        Ok(_) => session_id.as_ref().filter(|_| target.user == UserId::default()).map(|id| {
            let session = Session {
                user: target.user.clone(),
                server: target.record.name.clone(),
                url: url.clone(),
                id: id.as_str().into(),
                protocol_version: None,
                updated_at: Timestamp::now(),
            };
            (session, None)
        }),
        // Without the store a new session will do.
        Err(error) => {
            tracing::warn!(server = %target.record.name, error.cause = %error, "a session was not looked up");
            None
        }
    }
}

async fn forget(target: &Target<'_>, revision: Option<Revision>) {
    if let Some(revision) = revision {
        let (user, server) = (&target.user, &target.record.name);
        let forgotten = target.host.vault.delete_session(user, server, Some(revision)).await;
        if let Err(error) = forgotten {
            tracing::debug!(server = %server, error.cause = %error, "a session was not forgotten");
        }
    }
}

/// Stores a session that was begun; returned is where the one in use is stored. A worker that finds that
/// another one was faster keeps its own for itself.
async fn keep_session(target: &Target<'_>, met: &Met) -> Option<Revision> {
    if met.resumed.is_some() {
        return met.resumed;
    }
    let session = met.http.session()?;
    let Transport::StreamableHttp { url, .. } = &target.record.transport else { return None };
    let (user, server) = (target.user.clone(), target.record.name.clone());
    let vault = &target.host.vault;
    // One of another address is of no more use.
    let stored = vault.session(&user, &server).await.ok().flatten();
    let expected = match stored {
        Some(stored) if stored.value.url == *url => return None,
        other => other.map(|stored| stored.revision),
    };
    let session = Session {
        user,
        server,
        url: url.clone(),
        id: session_text(&session),
        protocol_version: met.http.version(),
        updated_at: Timestamp::now(),
    };
    match vault.put_session(&session, expected).await {
        Ok(revision) => Some(revision),
        Err(VaultError::Store(
            StoreError::Conflict | StoreError::AlreadyExists { .. } | StoreError::NotFound,
        )) => None,
        Err(error) => {
            tracing::warn!(server = %session.server, error.cause = %error, "a session was not stored");
            None
        }
    }
}

/// Sees a connection to its end.
struct Watcher {
    host: Arc<Host>,
    http: Arc<Http>,
    connection: Connection,
    current: Arc<CurrentRecord>,
    /// Where its session is stored.
    kept: Option<Revision>,
    known: Known,
}

impl Watcher {
    async fn watch(self, stop: CancellationToken, ended: watch::Sender<Option<End>>) {
        tokio::select! {
            () = self.connection.broken() => {
                self.forget().await;
                // Calls go to a new connection from now on; those in flight may still get their answers.
                ended.send_replace(Some(End::Remote));
                tokio::select! {
                    _ = timeout(limits::TOOL_TIMEOUT_MAX, self.connection.emptied()) => {}
                    () = stop.cancelled() => {}
                    () = self.host.stopping.cancelled() => {}
                }
            }
            () = stop.cancelled() => {
                if self.is_over().await {
                    self.http.end_session().await;
                }
            }
        }
        self.connection.close();
        ended.send_replace(Some(End::Remote));
        drop(self.known);
    }

    /// Whether nobody will come back to the session: it is not stored, or not any more.
    async fn is_over(&self) -> bool {
        let Some(kept) = self.kept else { return true };
        if self.host.stopping.is_cancelled() || self.host.draining.is_cancelled() {
            return false;
        }
        let endpoint = &self.http.endpoint;
        let url = |record: &ServerRecord| match &record.transport {
            Transport::StreamableHttp { url, .. } => Some(url.clone()),
            Transport::Stdio { .. } => None,
        };
        if url(&current(&self.current)) != url(&endpoint.record) {
            return true;
        }
        let stored = self.host.vault.session(&endpoint.user, endpoint.server()).await;
        matches!(stored, Ok(stored) if stored.as_ref().is_none_or(|stored| stored.revision != kept))
    }

    async fn forget(&self) {
        let Some(revision) = self.kept else { return };
        let endpoint = &self.http.endpoint;
        let forgetting = self.host.vault.delete_session(&endpoint.user, endpoint.server(), Some(revision));
        if !matches!(timeout(FORGETTING, forgetting).await, Ok(Ok(_))) {
            tracing::debug!(server = %endpoint.server(), "a lost session is still stored");
        }
    }
}

/// Tells a remote server that the sessions of all its users are over, as far as that goes in a moment.
pub async fn end_sessions(host: &Arc<Host>, record: Arc<ServerRecord>) -> Result<(), WorkerError> {
    let sessions = host.vault.sessions_of(&record.name).await?;
    let ends = futures_util::stream::iter(sessions).map(|stored| {
        let (host, record) = (Arc::clone(host), Arc::clone(&record));
        async move { end_session(host, record, stored.value).await }
    });
    let all = ends.buffer_unordered(FAREWELLS).for_each(|()| async {});
    if timeout(limits::REMOTE_FAREWELL, all).await.is_err() {
        tracing::warn!(server = %record.name, "not all sessions were ended in time");
    }
    Ok(())
}

async fn end_session(host: Arc<Host>, record: Arc<ServerRecord>, session: Session) {
    let same = matches!(&record.transport, Transport::StreamableHttp { url, .. } if *url == session.url);
    let id: Option<HeaderValue> = session_id(session.id.expose_secret().as_bytes()).filter(|_| same);
    let (Some(id), tasks) = (id, host.tasks.clone()) else { return };
    let log = Arc::<Log>::default();
    if let Ok(endpoint) = Endpoint::new(host, session.user, record, Arc::clone(&log)) {
        let (http, connection) = Http::open(endpoint, log, &tasks);
        let _attempt = Attempt(Some(connection));
        http.resume(id, session.protocol_version.as_deref());
        http.end_session().await;
    }
}
