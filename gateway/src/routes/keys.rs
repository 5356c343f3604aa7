//! `/admin/keys`: the keys of this node while it runs, and what is encrypted with them. No answer has a key.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{body::Body, extract::State, response::Response};
use http::{HeaderMap, StatusCode};
use http_body::Body as _;
use mcp_shared::{
    audit::{Action, Object},
    error::{ErrorCode, WorkerError, shorten},
    fleet::{NodeReport, Role},
    ids::WorkerId,
    limits,
    node::{NodeError, Reloader},
    vault::{KeyView, RetireError, RewrapError, RewrapReport, Rewrapping},
};
use serde::Serialize;
use serde_json::json;

use crate::{
    app::App,
    body::Fields,
    caller::Caller,
    problem::{Problem, json_response},
};

/// How long counting may be waited for. Only one request at a time counts.
const COUNTING: Duration = Duration::from_secs(120);

/// What this gateway does with keys.
pub struct Keys {
    /// Reads them anew.
    pub reloader: Arc<Reloader>,
    /// The last run of rewrapping that was begun here.
    run: Mutex<Option<Arc<Rewrapping>>>,
    /// Counting reads everything that is encrypted.
    counting: tokio::sync::Mutex<()>,
}

impl Keys {
    /// Nothing was done yet.
    pub fn new(reloader: Arc<Reloader>) -> Self {
        Self { reloader, run: Mutex::default(), counting: tokio::sync::Mutex::default() }
    }

    fn report(&self) -> Option<RewrapReport> {
        let run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        run.as_ref().map(|run| run.report())
    }
}

/// A key, and who lacks it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Key {
    #[serde(flatten)]
    view: KeyView,
    /// Nodes that are heard and do not have it.
    missing_on: Vec<WorkerId>,
}

/// A node's keys.
#[derive(Serialize)]
struct Node {
    id: WorkerId,
    role: Role,
    keys: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    success: bool,
    source: String,
    legacy_mode: &'static str,
    keys: Vec<Key>,
    legacy_values: u64,
    clear_values: u64,
    broken_values: u64,
    nodes: Vec<Node>,
    rewrap: Option<RewrapReport>,
}

/// `GET /admin/keys`: which keys there are, which nodes have them, and how many stored values need each.
pub async fn list(State(app): State<Arc<App>>, _: Caller) -> Result<Response, Problem> {
    let mut nodes = app.keys.reloader.others().await.map_err(refused)?;
    nodes.push(NodeReport { keys: app.vault.kids(), ..app.me.clone() });
    let busy = || WorkerError::new(ErrorCode::Overloaded, "The values of each key are being counted already");
    let counting = async {
        let _turn = app.keys.counting.lock().await;
        app.vault.keys().await
    };
    let keys = tokio::time::timeout(COUNTING, counting).await.map_err(|_| busy())??;
    let lacking = |id: &str| {
        let lacking = nodes.iter().filter(|node| !node.keys.iter().any(|kid| kid == id));
        lacking.map(|node| node.id.clone()).collect()
    };
    let answer = Answer {
        success: true,
        source: app.keys.reloader.shown(),
        legacy_mode: keys.legacy_mode,
        keys: keys.keys.into_iter().map(|view| Key { missing_on: lacking(&view.id), view }).collect(),
        legacy_values: keys.legacy_values,
        clear_values: keys.clear_values,
        broken_values: keys.broken_values,
        rewrap: app.keys.report(),
        nodes: nodes.into_iter().map(|NodeReport { id, role, keys, .. }| Node { id, role, keys }).collect(),
    };
    Ok(json_response(StatusCode::OK, &answer))
}

/// `POST /admin/keys/reload`: reads this gateway's keys anew, as SIGHUP does.
pub async fn reload(State(app): State<Arc<App>>, caller: Caller) -> Result<Response, Problem> {
    let _recorded = caller.record(&app, Action::KeysReload, Object::default()).await?;
    let task = Arc::clone(&app);
    // Carried through also when the caller leaves: keys that were recorded should be used.
    let reloading = app.changes.spawn(async move { task.keys.reloader.reload().await });
    let kids = reloading.await.map_err(WorkerError::internal)?.map_err(refused)?;
    Ok(json_response(StatusCode::OK, &json!({"success": true, "keys": kids})))
}

/// `POST /admin/keys/rewrap`: begins to encrypt everything anew under the primary key. `rate` is the number of
/// documents that may be written in a second.
pub async fn rewrap(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = if body.is_end_stream() { app.no_body() } else { app.body(&headers, body).await? };
    let rule = format!("must be a whole number from 1 to {}", limits::REWRAP_RATE_MAX);
    let rate = Fields::parse(&body)?.get::<u32>("rate", &rule)?.value().unwrap_or(limits::REWRAP_RATE);
    if !(1..=limits::REWRAP_RATE_MAX).contains(&rate) {
        return Err(Problem::invalid(format!("rate {rule}")));
    }
    let others = app.keys.reloader.others().await.map_err(refused)?;
    if let Some(why) = other_primary(&app.vault.kids(), &others) {
        return Err(Problem::new(ErrorCode::KeysRefused, why));
    }
    let primary = app.vault.kids().into_iter().next().unwrap_or_default();
    let _recorded = caller.record(&app, Action::KeysRewrap, Object::key(primary)).await?;
    let rewrap = app.vault.begin_rewrap(app.me.id.as_str()).await.map_err(|error| match error {
        RewrapError::Busy { owner } => {
            let text = format!("{} is rewrapping already", shorten(&owner, 64));
            Problem::new(ErrorCode::RewrapInProgress, text)
        }
        RewrapError::Vault(error) => error.into(),
        error => Problem::new(ErrorCode::KeysRefused, error.to_string()),
    })?;
    let seen = rewrap.seen();
    *app.keys.run.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&seen));
    let stop = app.stop.clone();
    app.changes.spawn(async move { rewrap.run(rate, &stop).await });
    Ok(json_response(StatusCode::ACCEPTED, &json!({"success": true, "rewrap": seen.report()})))
}

/// `GET /admin/keys/rewrap`: how far the last run is that was begun at this gateway.
pub async fn rewrapping(State(app): State<Arc<App>>, _: Caller) -> Response {
    json_response(StatusCode::OK, &json!({"success": true, "rewrap": app.keys.report()}))
}

/// `POST /admin/keys/retire`: from now on nodes may forget a key, which nothing needs any more.
pub async fn retire(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = app.body(&headers, body).await?;
    let fields = Fields::parse(&body)?;
    let id = fields.required("id")?;
    let force = fields.get::<bool>("force", "must be true or false")?.value().unwrap_or(false);
    let _recorded = caller.record(&app, Action::KeysRetire, Object::key(&id)).await?;
    let others = app.keys.reloader.others().await.map_err(refused)?;
    if let Some(other) = others.iter().find(|other| other.keys.first() == Some(&id)) {
        let text = format!("{} still encrypts with the key {}", other.id, shorten(&id, 16));
        return Err(Problem::new(ErrorCode::KeyInUse, text));
    }
    match app.vault.retire_key(&id, force).await {
        Ok(()) => {}
        Err(RetireError::Vault(error)) => return Err(error.into()),
        Err(error @ RetireError::Unknown { .. }) => {
            return Err(Problem::new(ErrorCode::KeyNotFound, error.to_string()));
        }
        Err(error) => return Err(Problem::new(ErrorCode::KeyInUse, error.to_string())),
    }
    tracing::info!(key = %id, force, "a key was retired");
    Ok(json_response(StatusCode::OK, &json!({"success": true, "id": id})))
}

/// Why rewrapping would have no end: a node that still encrypts with another key.
pub fn other_primary(own: &[String], nodes: &[NodeReport]) -> Option<String> {
    let other = nodes.iter().find(|node| node.keys.first() != own.first())?;
    let key = other.keys.first().map_or("no key of its own", String::as_str);
    Some(format!("{} still encrypts with {key}: have it read its keys anew before", other.id))
}

/// Where the file is stands in the log; whoever may do this is told what is wrong with it.
fn refused(error: NodeError) -> Problem {
    match error {
        NodeError::Key(why) => {
            tracing::error!(error.cause = %why, "the keys were not read anew: the old ones stay");
            Problem::new(ErrorCode::KeysRefused, format!("The old keys stay: {why}"))
        }
        NodeError::BusUnreachable { .. } => {
            Problem::new(ErrorCode::BusUnavailable, "The other nodes cannot be asked which keys they have")
        }
        NodeError::Store(error) => WorkerError::from(error).into(),
        NodeError::Vault(error) => error.into(),
        error => WorkerError::internal(error).into(),
    }
}
