//! What handlers share.

use std::{collections::HashMap, ops::Deref, sync::Arc, time::Duration};

use axum::{body::Body, extract::FromRequestParts};
use bytes::Bytes;
use http::{HeaderMap, header, request::Parts};
use mcp_shared::{
    audit::{Audit, Recorded},
    builtin,
    egress::Egress,
    error::{ErrorCode, WorkerError},
    fleet::NodeReport,
    ids::{RequestId, ServerName, UserId},
    json::RawJson,
    launch::LaunchRules,
    limits,
    metrics::Exposition,
    server::ServerRecord,
    store::StoreError,
    vault::{Vault, VaultError},
    worker_api::{CallContext, Change, ServerReport, ServerStatus, WorkerApi},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use url::Url;

use crate::{
    admission::{Admission, Room},
    auth::Authenticator,
    body,
    caller::Caller,
    latest::LatestVersions,
    problem::Problem,
    routes::keys::Keys,
};

/// The state of the HTTP side.
pub struct App {
    /// What is stored.
    pub vault: Vault,
    /// What is done with keys while the program runs.
    pub keys: Keys,
    /// Who does the work.
    pub worker: Arc<dyn WorkerApi>,
    /// This gateway.
    pub me: NodeReport,
    /// The largest body, in bytes.
    pub payload_limit: usize,
    /// Who may come in.
    pub authenticator: Arc<Authenticator>,
    /// How much is taken in at once.
    pub admission: Admission,
    /// What is shown of it, and of all the rest.
    pub metrics: Exposition,
    /// Changes under way, which a stop waits for.
    pub changes: TaskTracker,
    /// Cancelled when the program is to stop.
    pub stop: CancellationToken,
    /// Where requests may go that users steer.
    pub egress: Egress,
    /// The latest versions of packages, as registries said lately.
    pub latest: LatestVersions,
    /// Where browsers find this program, if it was told.
    pub public_url: Option<Url>,
    /// What may be started as a server.
    pub launch: LaunchRules,
    /// Where it is recorded who did what.
    pub audit: Audit,
}

/// A body that was taken in. Its room is taken as long as this is held.
pub struct Taken {
    bytes: Bytes,
    /// The room of its bytes, for whoever goes on with parts of them.
    pub room: Room,
}

impl Deref for Taken {
    type Target = Bytes;

    fn deref(&self) -> &Bytes {
        &self.bytes
    }
}

/// The id that the edge gave the request.
pub struct Id(pub RequestId);

impl<S: Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        parts
            .extensions
            .get::<RequestId>()
            .cloned()
            .map(Id)
            .ok_or_else(|| WorkerError::internal("a request came past the edge").into())
    }
}

/// The server named in the path.
pub struct Server(pub ServerName);

impl<S: Send + Sync> FromRequestParts<S> for Server {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let invalid =
            || Problem::new(ErrorCode::InvalidServerName, "The server's name in the path is not valid");
        let path =
            axum::extract::Path::<String>::from_request_parts(parts, state).await.map_err(|_| invalid())?;
        ServerName::parse_existing(&path).map(Server).map_err(|_| invalid())
    }
}

impl App {
    /// Writes to the store and tells the workers, as one step: a client that hangs up between the two must
    /// not leave workers with a state that is no longer stored. The outer error is the announcement's.
    ///
    /// It is recorded by then, and so is its end, when it is over.
    pub async fn commit<T: Send + 'static>(
        &self,
        recorded: &Recorded,
        change: Change,
        write: impl Future<Output = Result<T, VaultError>> + Send + 'static,
    ) -> Result<Result<T, VaultError>, Problem> {
        let worker = Arc::clone(&self.worker);
        // What could not be announced should not be written.
        if let Err(error) = worker.ready().await
            && error.code == ErrorCode::BusUnavailable
        {
            return Err(error.into());
        }
        let recorded = recorded.share();
        let step = self.changes.spawn(async move {
            let written = write.await;
            // A write that got no answer in time may have happened all the same.
            let told = match &written {
                Ok(_) | Err(VaultError::Store(StoreError::Unavailable { .. })) => {
                    worker.announce(change).await
                }
                Err(_) => Ok(()),
            };
            drop(recorded);
            (written, told)
        });
        match step.await.map_err(WorkerError::internal)? {
            (Ok(_), Err(error)) => Err(error.into()),
            (written, _) => Ok(written),
        }
    }

    /// All servers: those that are stored, and those that are part of the program. What is stored under the name of one
    /// of the latter is kept, and not used.
    pub async fn servers(&self) -> Result<Vec<ServerRecord>, Problem> {
        let stored = self.vault.servers().await?.into_iter().map(|server| server.value);
        Ok(stored.filter(|server| !builtin::is_builtin(&server.name)).chain(builtin::records()).collect())
    }

    /// One of them.
    pub async fn server(&self, name: &ServerName) -> Result<ServerRecord, Problem> {
        if let Some(builtin) = builtin::find(name) {
            return Ok(builtin);
        }
        let stored = self.vault.server(name).await?;
        Ok(stored.ok_or_else(|| WorkerError::server_not_found(name))?.value)
    }

    /// What is known about all servers. Listings of which no worker knows better are those of the store:
    /// a server has its tools whether or not anybody runs it right now.
    pub async fn reports(&self) -> Result<HashMap<ServerName, ServerReport>, Problem> {
        let (running, stored) = tokio::join!(self.worker.reports(), self.vault.tools());
        let mut reports: HashMap<_, _> =
            running?.into_iter().map(|report| (report.name.clone(), report)).collect();
        for stored in stored? {
            let listed = reports.get(&stored.server).is_some_and(|report| report.listed.is_some());
            if listed || stored.user.is_some() || builtin::is_builtin(&stored.server) {
                continue;
            }
            let Ok(tools) = RawJson::parse(stored.tools) else { continue };
            let report = reports.entry(stored.server.clone()).or_insert_with(|| ServerReport {
                name: stored.server,
                status: ServerStatus::Disconnected,
                tools: None,
                logs: Vec::new(),
                instances: Vec::new(),
                listed: None,
            });
            report.tools = Some(tools);
        }
        Ok(reports)
    }

    /// Reads a JSON body within this program's limits.
    pub async fn body(&self, headers: &HeaderMap, body: Body) -> Result<Taken, Problem> {
        let mut room = self.admission.body();
        let bytes = body::read(headers, body, self.payload_limit, &mut room).await?;
        Ok(Taken { bytes, room })
    }

    /// What stands for a body where none was sent: an object without fields.
    pub fn no_body(&self) -> Taken {
        Taken { bytes: Bytes::from_static(b"{}"), room: self.admission.body() }
    }
}

/// On whose behalf a call is made, and in which time.
pub fn context(caller: &Caller, user: UserId, headers: &HeaderMap) -> Result<CallContext, Problem> {
    let timeout = match headers.get("x-request-timeout-ms") {
        None => None,
        Some(value) => {
            let millis = value
                .to_str()
                .ok()
                .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|text| text.parse::<u64>().ok())
                .filter(|millis| *millis > 0)
                .ok_or_else(|| {
                    Problem::invalid("X-Request-Timeout-Ms must be a whole number of milliseconds above 0")
                })?;
            Some(Duration::from_millis(millis).min(limits::TOOL_TIMEOUT_MAX))
        }
    };
    let trace = caller.traced.as_ref().map(|traced| traced.trace.clone());
    Ok(CallContext { request_id: caller.request.clone(), user, timeout, spent: Duration::ZERO, trace })
}

/// Whether the caller asks for server-sent events.
pub fn wants_events(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).any(|accept| {
        accept.split(',').any(|one| {
            one.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
        })
    })
}
