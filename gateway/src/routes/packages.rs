//! `/packages`. Installing and upgrading is done by workers, as jobs (`jobs.rs`); everything else here
//! concerns records.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{FromRequestParts, Path, Query, State, rejection::QueryRejection},
    response::Response,
};
use futures_util::{StreamExt, future::join_all, stream};
use http::{HeaderMap, StatusCode, request::Parts};
use http_body::Body as _;
use mcp_shared::{
    audit::{Action, Object},
    error::{ErrorCode, WorkerError, shorten},
    ids::{ServerName, UserId},
    limits,
    package::{Job, JobKind, Latest, PackageRecord, versions::is_newer},
    store::Versioned,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    app::App,
    body::{Field, Fields},
    caller::Caller,
    problem::{Problem, json_bytes, json_response},
    routes::{
        jobs::{accepted, respond_async},
        package_input::{self, Install},
        package_view, remote_input,
        server_view::{Detail, Viewer, view},
        servers::not_reserved,
    },
};

/// The name in the path: that of a server, or of a package.
pub struct Name(String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(name)| Self(name)).map_err(|_| Problem::invalid("The name in the path is not text"))
    }
}

/// What may stand behind the `?`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Parameters {
    check_updates: Option<bool>,
    name: Option<String>,
}

type Asked = Result<Query<Parameters>, QueryRejection>;

fn parameters(asked: Asked) -> Result<Parameters, Problem> {
    let rule = "Of the parameters, checkUpdates must be true or false, and each may appear once";
    asked.map(|Query(parameters)| parameters).map_err(|_| Problem::invalid(rule))
}

/// `POST /packages/install`: answers when the server runs, or when it is known why it does not.
pub async fn install(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = app.body(&headers, body).await?;
    let fields = Fields::parse(&body)?;
    let user = caller.user(&fields)?;
    let Install { spec, server } = package_input::install(&fields, &app.egress)?;
    let session = remote_input::session_id(&fields)?;
    not_reserved(&server.name)?;
    caller.at(&server.name)?;
    // It can be stored when there is a server that it belongs to.
    if respond_async(&headers) && matches!(session, Field::Value(_)) {
        return Err(Problem::invalid("sessionId cannot be kept for a server that nobody waits for"));
    }
    app.no_server(&server.name).await?;
    app.launch.check(&server, None)?;
    let object = Object::server(&server.name).with_package(&spec.name);
    let recorded = caller.record(&app, Action::PackageInstall, object).await?;
    let job = Job::new(JobKind::Install, server.name.clone(), spec, Some(server));
    let job = app.order(&recorded, job).await?;
    if respond_async(&headers) {
        return accepted(&job);
    }
    let job = app.ended(job).await?;
    app.keep_session(&recorded, &job.server_name, &user, session).await?;
    app.installed(&job.server_name, &user, caller.viewer(), Detail::Summary).await
}

/// `GET /packages`.
pub async fn list(State(app): State<Arc<App>>, asked: Asked) -> Result<Response, Problem> {
    let check = parameters(asked)?.check_updates.unwrap_or_default();
    let mut packages: Vec<_> = app.vault.packages().await?.into_iter().map(Known::new).collect();
    if check {
        app.check_updates(&mut packages).await;
    }
    let packages = packages.iter().map(Known::view).collect::<Result<Vec<_>, _>>()?;
    Ok(json_response(StatusCode::OK, &json!({"success": true, "packages": packages})))
}

/// `GET /packages/by-name/:name`: of several servers that run the package, the oldest one's.
pub async fn by_name(
    State(app): State<Arc<App>>,
    Name(name): Name,
    asked: Asked,
) -> Result<Response, Problem> {
    let packages = app.vault.packages().await?;
    let package = packages.into_iter().find(|package| package_input::is_called(&package.value, &name));
    app.show(package.ok_or_else(|| not_found(&name))?, asked).await
}

/// `GET /packages/by-id/:name`, by the name of the server.
pub async fn by_id(State(app): State<Arc<App>>, Name(name): Name, asked: Asked) -> Result<Response, Problem> {
    let package = app.package_of(&name).await?;
    app.show(package.ok_or_else(|| not_found(&name))?, asked).await
}

/// `GET /packages/updates`.
pub async fn updates(State(app): State<Arc<App>>, asked: Asked) -> Result<Response, Problem> {
    let packages = match parameters(asked)?.name {
        None => app.vault.packages().await?,
        Some(name) => match app.find(&name).await {
            Ok(package) => vec![package],
            Err(problem) if problem.code() == ErrorCode::PackageNotFound => Vec::new(),
            Err(problem) => return Err(problem),
        },
    };
    let mut packages: Vec<_> = packages.into_iter().map(Known::new).collect();
    app.check_updates(&mut packages).await;
    let updates: Vec<_> = packages.iter().map(Known::update).collect();
    Ok(json_response(StatusCode::OK, &json!({"success": true, "updates": updates})))
}

/// `PUT /packages/:name/enable`.
pub async fn enable(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(name): Name,
) -> Result<Response, Problem> {
    let package = app.find(&name).await?;
    app.switch(&caller, Action::PackageEnable, &package.value.mcp_server_id, true).await
}

/// `PUT /packages/:name/disable`.
pub async fn disable(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(name): Name,
) -> Result<Response, Problem> {
    let package = app.find(&name).await?;
    app.switch(&caller, Action::PackageDisable, &package.value.mcp_server_id, false).await
}

/// `DELETE /packages/:name`: with its server and all that belongs to that.
pub async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(name): Name,
) -> Result<Response, Problem> {
    let server = match app.find(&name).await {
        Ok(package) => package.value.mcp_server_id,
        // What is being installed is no package yet, and cannot be removed yet.
        Err(problem) => {
            if let Ok(server) = ServerName::parse_existing(&name) {
                app.no_job(&server).await?;
            }
            return Err(problem);
        }
    };
    caller.at(&server)?;
    app.no_job(&server).await?;
    let recorded = caller.record(&app, Action::PackageDelete, Object::server(&server)).await?;
    if !app.remove(&recorded, &server).await? {
        return Err(not_found(&name));
    }
    Ok(json_response(StatusCode::OK, &json!({"success": true})))
}

/// `PUT /packages/:name/upgrade`: to the latest version, or to the one that is asked for.
pub async fn upgrade(
    State(app): State<Arc<App>>,
    caller: Caller,
    Name(name): Name,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = if body.is_end_stream() { app.no_body() } else { app.body(&headers, body).await? };
    let fields = Fields::parse(&body)?;
    let user = caller.user(&fields)?;
    let version = package_input::version(&fields)?;
    let package = app.find(&name).await?;
    caller.at(&package.value.mcp_server_id)?;
    let job = app.order_upgrade(&caller, &package.value, version).await?;
    if respond_async(&headers) {
        return accepted(&job);
    }
    let job = app.ended(job).await?;
    app.installed(&job.server_name, &user, caller.viewer(), Detail::Full).await
}

/// `PUT /packages/upgrade-all`: each to its latest version. One that fails does not keep the others.
pub async fn upgrade_all(State(app): State<Arc<App>>, caller: Caller) -> Result<Response, Problem> {
    let mut packages = app.vault.packages().await?;
    packages.retain(|package| caller.reach.has_server(&package.value.mcp_server_id));
    let upgrading = Arc::clone(&app);
    let each = move |package: Versioned<PackageRecord>| {
        let (app, caller) = (Arc::clone(&upgrading), caller.clone());
        async move {
            let server = package.value.mcp_server_id.clone();
            let done =
                async { app.ended(app.order_upgrade(&caller, &package.value, None).await?).await }.await;
            (server, done)
        }
    };
    // A task of its own: a caller that goes away does not stop it half-way.
    let all = stream::iter(packages).map(each).buffered(limits::UPGRADES).collect::<Vec<_>>();
    let results = app.changes.spawn(all).await.map_err(WorkerError::internal)?;
    let success = results.iter().all(|(_, done)| done.is_ok());
    let results: Vec<_> = results
        .into_iter()
        .map(|(server, done)| match done {
            Ok(job) => json!({"serverName": server, "success": true, "version": job.version}),
            Err(problem) => {
                let (code, error) = problem.into_parts();
                json!({"serverName": server, "success": false, "error": error, "code": code})
            }
        })
        .collect();
    Ok(json_response(StatusCode::OK, &json!({"success": success, "results": results})))
}

/// A package, with what is known about its latest version.
struct Known {
    package: Versioned<PackageRecord>,
    error: Option<String>,
}

impl Known {
    fn new(package: Versioned<PackageRecord>) -> Self {
        Self { package, error: None }
    }

    fn view(&self) -> Result<Map<String, Value>, Problem> {
        let mut fields = package_view::package(&self.package.value)?;
        if let Some(error) = &self.error {
            fields.insert("latestError".to_owned(), json!(error));
        }
        Ok(fields)
    }

    fn update(&self) -> Map<String, Value> {
        let record = &self.package.value;
        let latest = record.latest_version.as_deref();
        let newer = latest.is_some_and(|latest| is_newer(record.runtime, latest, &record.version));
        let mut fields = Map::new();
        fields.insert("serverName".to_owned(), json!(record.mcp_server_id));
        fields.insert("currentVersion".to_owned(), json!(record.version));
        fields.insert("latestVersion".to_owned(), json!(latest));
        fields.insert("updateAvailable".to_owned(), json!(newer));
        if let Some(error) = &self.error {
            fields.insert("latestError".to_owned(), json!(error));
        }
        fields
    }
}

impl App {
    /// The package that a server runs.
    async fn package_of(&self, server: &str) -> Result<Option<Versioned<PackageRecord>>, Problem> {
        match ServerName::parse_existing(server) {
            Ok(server) => Ok(self.vault.package(&server).await?),
            Err(_) => Ok(None),
        }
    }

    /// The package of a server, or the only one of a name.
    async fn find(&self, name: &str) -> Result<Versioned<PackageRecord>, Problem> {
        if let Some(package) = self.package_of(name).await? {
            return Ok(package);
        }
        let mut packages = self.vault.packages().await?;
        packages.retain(|package| package_input::is_called(&package.value, name));
        if packages.len() > 1 {
            let servers: Vec<_> = packages.iter().map(|package| json!(package.value.mcp_server_id)).collect();
            let text = format!("Several servers run the package {}: name one of them", shorten(name, 64));
            return Err(WorkerError::new(ErrorCode::InvalidRequest, text)
                .with("serverNames", servers)
                .into());
        }
        packages.pop().ok_or_else(|| not_found(name))
    }

    async fn show(&self, package: Versioned<PackageRecord>, asked: Asked) -> Result<Response, Problem> {
        let mut known = [Known::new(package)];
        if parameters(asked)?.check_updates.unwrap_or_default() {
            self.check_updates(&mut known).await;
        }
        let [known] = known;
        Ok(json_response(StatusCode::OK, &json!({"success": true, "package": known.view()?})))
    }

    /// Learns the latest versions of packages, and notes them in their records. Where a registry does not
    /// say, the record stays as it is.
    async fn check_updates(&self, packages: &mut [Known]) {
        let mut queries = Vec::new();
        let mut asked = Vec::new();
        for known in packages {
            match package_input::latest_of(&known.package.value, &self.egress) {
                Ok(query) => {
                    queries.push(query);
                    asked.push(known);
                }
                Err(problem) => known.error = Some(problem.into_parts().1),
            }
        }
        let ask = |queries| self.worker.latest(queries);
        let answers = self.latest.look_up(&queries, ask).await;
        join_all(asked.into_iter().zip(answers).map(|(known, latest)| self.note(known, latest))).await;
    }

    async fn note(&self, known: &mut Known, latest: Latest) {
        let version = match latest {
            Latest::Version(version) => version,
            Latest::Unknown(error) => {
                known.error = Some(error.message);
                return;
            }
        };
        let record = &mut known.package.value;
        let newer = is_newer(record.runtime, &version, &record.version);
        if record.latest_version.as_ref() == Some(&version) && record.update_available == Some(newer) {
            return;
        }
        record.latest_version = Some(version);
        record.update_available = Some(newer);
        // It is a note for later: whoever changed the record meanwhile knows better.
        if let Err(error) = self.vault.replace_package(record, known.package.revision).await {
            tracing::debug!(%error, server = %record.mcp_server_id, "a latest version was not noted");
        }
    }

    async fn order_upgrade(
        &self,
        caller: &Caller,
        record: &PackageRecord,
        version: Option<String>,
    ) -> Result<Job, Problem> {
        let spec = record.spec(version);
        package_input::check(&spec, &self.egress)?;
        let server = &record.mcp_server_id;
        if self.vault.server(server).await?.is_none() {
            return Err(WorkerError::server_not_found(server).into());
        }
        let object = Object::server(server).with_package(&spec.name);
        let recorded = caller.record(self, Action::PackageUpgrade, object).await?;
        self.order(&recorded, Job::new(JobKind::Upgrade, server.clone(), spec, None)).await
    }

    /// The answer to an installation that is done: what keeps its server from running, if anything does,
    /// shows in the server's document.
    async fn installed(
        &self,
        name: &ServerName,
        user: &UserId,
        viewer: Viewer,
        detail: Detail,
    ) -> Result<Response, Problem> {
        let package = self.vault.package(name).await?.ok_or_else(|| not_found(name.as_str()))?;
        let server = self.vault.server(name).await?.ok_or_else(|| WorkerError::server_not_found(name))?;
        let report = match self.running(&server.value, user).await {
            Ok(Some(report)) => Some(report),
            Ok(None) | Err(_) => self.worker.report(name).await.ok(),
        };
        let server = view(&server.value, report.as_ref(), detail, viewer)?;
        let package = package_view::package(&package.value)?;
        Ok(json_bytes(StatusCode::OK, package_view::installed(&package, &server)?))
    }
}

fn not_found(name: &str) -> Problem {
    let text = format!("Package {} not found", shorten(name, 64));
    Problem::new(ErrorCode::PackageNotFound, text)
}
