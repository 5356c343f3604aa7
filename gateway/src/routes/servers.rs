//! `/mcp/servers`.

use std::{collections::BTreeSet, sync::Arc};

use axum::{body::Body, extract::State, response::Response};
use http::{HeaderMap, StatusCode};
use mcp_shared::{
    audit::{Action, Object, Recorded},
    builtin,
    error::{ErrorCode, WorkerError, shorten},
    ids::{ServerName, UserId},
    limits,
    remote::{RemoteAsk, Session},
    server::{ServerRecord, Transport},
    store::{Fact, StoreError, UNINSTALLED},
    timestamp::Timestamp,
    vault::{Vault, VaultError},
    worker_api::{Change, ServerReport},
};
use secrecy::SecretString;
use serde_json::json;
use tokio::time::timeout;

use crate::{
    app::{App, Server},
    body::{Field, Fields},
    caller::Caller,
    problem::{Problem, json_bytes, json_response},
    routes::{
        remote_input::session_id,
        server_input::{new_record, updated_record},
        server_view::{Detail, Viewer, document, view},
    },
};

/// How often a change is tried again when somebody else changes the same record.
const ATTEMPTS: usize = 5;

/// `GET /mcp/servers`.
pub async fn list(State(app): State<Arc<App>>, caller: Caller) -> Result<Response, Problem> {
    let (servers, reports) = tokio::join!(app.servers(), app.reports());
    let (servers, reports) = (servers?, reports?);
    let views = servers
        .iter()
        .filter(|server| caller.reach.has_server(&server.name))
        .map(|server| view(server, reports.get(&server.name), Detail::Summary, caller.viewer()))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(json_bytes(StatusCode::OK, document("servers", &views)?))
}

/// `GET /mcp/servers/:name`.
pub async fn get(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(name): Server,
) -> Result<Response, Problem> {
    caller.at(&name)?;
    let server = app.server(&name).await?;
    app.answer(&server, None, Detail::Full, caller.viewer()).await
}

/// `POST /mcp/servers`: registers a server, starts it and waits until it listed its tools or failed. A
/// server that fails is kept, with the reason in `logs`.
pub async fn add(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = app.body(&headers, body).await?;
    let fields = Fields::parse(&body)?;
    let user = caller.user(&fields)?;
    let record = new_record(&fields, &app.egress)?;
    let session = session_id(&fields)?;
    not_reserved(&record.name)?;
    caller.at(&record.name)?;
    app.launch.check(&record, None)?;
    let recorded = caller.record(&app, Action::ServerCreate, Object::server(&record.name)).await?;
    let (vault, new) = (app.vault.clone(), record.clone());
    let change = Change::Server { server: record.name.clone() };
    match app.commit(&recorded, change, async move { vault.insert_server(&new).await }).await? {
        Ok(_) => {}
        Err(VaultError::Store(StoreError::AlreadyExists { existing })) => {
            return Err(exists(&record.name, &existing));
        }
        Err(error) => return Err(error.into()),
    }
    app.keep_session(&recorded, &record.name, &user, session).await?;
    let report = app.running(&record, &user).await?;
    app.answer(&record, report, Detail::Summary, caller.viewer()).await
}

/// `PUT /mcp/servers/:name`.
pub async fn update(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(name): Server,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    not_builtin(&name)?;
    caller.at(&name)?;
    let body = app.body(&headers, body).await?;
    let fields = Fields::parse(&body)?;
    let user = caller.user(&fields)?;
    let session = session_id(&fields)?;
    let missing = || absent(&name);
    let change = |record: &ServerRecord| {
        let next = updated_record(record, &fields, &app.egress)?;
        app.launch.check(&next, Some(record))?;
        Ok(next)
    };
    app.change(&caller, Action::ServerUpdate, &name, &user, missing, session, change).await
}

/// `PUT /mcp/servers/:name/enable`.
pub async fn enable(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(name): Server,
) -> Result<Response, Problem> {
    app.switch(&caller, Action::ServerEnable, &name, true).await
}

/// `PUT /mcp/servers/:name/disable`.
pub async fn disable(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(name): Server,
) -> Result<Response, Problem> {
    app.switch(&caller, Action::ServerDisable, &name, false).await
}

/// `DELETE /mcp/servers/:name`: stops it and removes it with all that belongs to it: users' secrets for it,
/// and the package that it runs.
pub async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(name): Server,
) -> Result<Response, Problem> {
    not_builtin(&name)?;
    caller.at(&name)?;
    let recorded = caller.record(&app, Action::ServerDelete, Object::server(&name)).await?;
    if !app.remove(&recorded, &name).await? {
        return Err(absent(&name).into());
    }
    Ok(json_response(StatusCode::OK, &json!({"success": true})))
}

/// `GET /mcp/servers/:name/delete-impact`: whom the removal of a server would concern.
pub async fn delete_impact(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(name): Server,
) -> Result<Response, Problem> {
    caller.at(&name)?;
    let record = app.server(&name).await?;
    let report = app.worker.report(&name).await?;
    let mut users: BTreeSet<_> =
        report.instances.into_iter().filter_map(|instance| instance.username).collect();
    users.extend(app.vault.sessions_of(&name).await?.into_iter().map(|session| session.value.user));
    let with_tokens = app.vault.users_with_tokens(&name).await?;
    let transport = serde_json::to_value(&record.transport).map_err(WorkerError::internal)?;
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "success": true,
            "impact": {
                "serverName": record.name,
                "source": record.source,
                "authMode": record.auth_mode,
                "transportType": transport["transportType"],
                // This version has no servers that users install.
                "installedUsers": 0,
                "connectedAuthUsers": with_tokens,
                "oauthTokenUsers": with_tokens,
                "usersWithSavedSecrets": app.vault.users_with_secrets(&name).await?,
                "activeSessionUsers": users.len(),
            },
        }),
    ))
}

impl App {
    /// Removes a server and the package that it runs; says whether there was one of the two.
    pub async fn remove(&self, recorded: &Recorded, name: &ServerName) -> Result<bool, Problem> {
        self.say_farewell(name).await;
        let (vault, of) = (self.vault.clone(), name.clone());
        let change = Change::Server { server: name.clone() };
        Ok(self.commit(recorded, change, async move { removed(&vault, &of).await }).await??)
    }

    /// Lets a remote server know that its sessions are over, while it is still known which they are. What
    /// does not succeed in a few seconds is left to the remote server, which forgets them by itself.
    async fn say_farewell(&self, name: &ServerName) {
        match self.vault.server(name).await {
            Ok(Some(server)) if server.value.is_remote() => {}
            _ => return,
        }
        let asked = self.worker.remote(RemoteAsk::EndSessions { server: name.clone() });
        match timeout(limits::REMOTE_FAREWELL, asked).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, server = %name, "sessions were not ended"),
            Err(_) => tracing::warn!(server = %name, "sessions were not ended in time"),
        }
    }

    /// Stores the session of a remote server that a user brings along, or forgets the user's.
    pub async fn keep_session(
        &self,
        recorded: &Recorded,
        name: &ServerName,
        user: &UserId,
        session: Field<SecretString>,
    ) -> Result<(), Problem> {
        let id = match session {
            Field::Absent => return Ok(()),
            Field::Null => None,
            Field::Value(id) => Some(id),
        };
        let server = self.vault.server(name).await?.ok_or_else(|| WorkerError::server_not_found(name))?;
        // A server of our own has none that could be forgotten.
        let Transport::StreamableHttp { url, .. } = server.value.transport else { return Ok(()) };
        let (vault, user, name) = (self.vault.clone(), user.clone(), name.clone());
        let change = Change::Login { user: user.clone(), server: name.clone() };
        let write = async move {
            // Whatever stands there, also what cannot be read any more, is nothing that anybody needs.
            vault.delete_session(&user, &name, None).await?;
            let Some(id) = id else { return Ok(()) };
            let updated_at = Timestamp::now();
            let session = Session { user, server: name, url, id, protocol_version: None, updated_at };
            for _ in 1..ATTEMPTS {
                match vault.put_session(&session, None).await {
                    // A connection of the same user stored its own meanwhile.
                    Err(VaultError::Store(StoreError::AlreadyExists { .. })) => {
                        vault.delete_session(&session.user, &session.server, None).await?;
                    }
                    written => return written.map(drop),
                }
            }
            vault.put_session(&session, None).await.map(drop)
        };
        Ok(self.commit(recorded, change, write).await??)
    }

    /// Refuses a name that a server has already, also in other case.
    pub async fn no_server(&self, name: &ServerName) -> Result<(), Problem> {
        let key = name.case_key();
        let servers = self.vault.store().servers().await.map_err(WorkerError::from)?;
        match servers.iter().map(|server| &server.value.0.name).find(|other| other.case_key() == key) {
            Some(existing) => Err(exists(name, existing.as_str())),
            None => Ok(()),
        }
    }

    /// Allows a server to run, or not.
    pub async fn switch(
        &self,
        caller: &Caller,
        action: Action,
        name: &ServerName,
        enabled: bool,
    ) -> Result<Response, Problem> {
        not_builtin(name)?;
        caller.at(name)?;
        let missing = || WorkerError::server_not_found(name);
        self.change(caller, action, name, &caller.user, missing, Field::Absent, |record| {
            let mut next = record.clone();
            next.enabled = enabled;
            Ok(next)
        })
        .await
    }

    /// Changes a record as it is now, however often others change it meanwhile, and sees the change
    /// through to the processes.
    #[allow(clippy::too_many_arguments, reason = "each says something else about one change")]
    async fn change(
        &self,
        caller: &Caller,
        action: Action,
        name: &ServerName,
        user: &UserId,
        missing: impl Fn() -> WorkerError,
        session: Field<SecretString>,
        change: impl Fn(&ServerRecord) -> Result<ServerRecord, Problem>,
    ) -> Result<Response, Problem> {
        let mut recorded = None;
        for _ in 0..ATTEMPTS {
            let stored = self.vault.server(name).await?.ok_or_else(&missing)?;
            let next = change(&stored.value)?;
            let recorded = match &recorded {
                Some(recorded) => recorded,
                None => recorded.insert(caller.record(self, action, Object::server(name)).await?),
            };
            if next != stored.value {
                let (vault, new) = (self.vault.clone(), next.clone());
                let write = async move {
                    let revision = vault.replace_server(&new, stored.revision).await?;
                    switch_package(&vault, &new).await;
                    Ok(revision)
                };
                match self.commit(recorded, Change::Server { server: name.clone() }, write).await? {
                    Ok(_) => {}
                    Err(VaultError::Store(StoreError::Conflict)) => continue,
                    Err(VaultError::Store(StoreError::NotFound)) => return Err(missing().into()),
                    Err(error) => return Err(error.into()),
                }
            } else {
                // It may have been stored and never announced, when whoever stored it was cut off.
                self.worker.announce(Change::Server { server: name.clone() }).await?;
                switch_package(&self.vault, &next).await;
            }
            self.keep_session(recorded, name, user, session).await?;
            let report = self.running(&next, user).await?;
            return self.answer(&next, report, Detail::Full, caller.viewer()).await;
        }
        Err(Problem::new(ErrorCode::Conflict, "The server was changed by others at the same time; try again"))
    }

    /// Waits until a server that may run does, or failed to.
    pub async fn running(
        &self,
        record: &ServerRecord,
        user: &UserId,
    ) -> Result<Option<ServerReport>, Problem> {
        if !record.enabled {
            return Ok(None);
        }
        match self.worker.start_server(user, &record.name).await {
            Ok(report) => Ok(Some(report)),
            // Somebody disabled or removed it meanwhile, or there is no worker yet that could run what is
            // stored by now: the answer shows that.
            Err(error)
                if matches!(
                    error.code,
                    ErrorCode::ServerDisabled | ErrorCode::ServerNotFound | ErrorCode::NoWorker
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn answer(
        &self,
        record: &ServerRecord,
        report: Option<ServerReport>,
        detail: Detail,
        viewer: Viewer,
    ) -> Result<Response, Problem> {
        let report = match report {
            Some(report) => Some(report),
            None => self.worker.report(&record.name).await.ok(),
        };
        let mut shown = view(record, report.as_ref(), detail, viewer)?;
        if detail == Detail::Full {
            let mut pins = self.vault.tool_pins_of(&record.name).await?;
            // What a user's own listing says is for that user, and for who looks after the server.
            pins.retain(|pins| viewer.admin || pins.value.username.is_none());
            shown = shown.with_changed_tools(&pins);
        }
        Ok(json_bytes(StatusCode::OK, document("server", &shown)?))
    }
}

/// Removes what is stored of a server. Repeating it after a crash completes it.
async fn removed(vault: &Vault, name: &ServerName) -> Result<bool, VaultError> {
    let package = match vault.package(name).await {
        Ok(package) => package.is_some(),
        // What cannot be read can be removed all the same.
        Err(VaultError::Store(StoreError::Corrupt { .. })) => true,
        Err(error) => return Err(error),
    };
    if package {
        // What somebody removed must not come back with the next start. First, so that no crash loses it.
        vault.store().put_once(Fact::AppState, &uninstalled(name), "true").await?;
    }
    let server = vault.delete_server(name).await?;
    vault.delete_package(name).await?;
    // The job is only a memory, and goes by itself some day.
    if let Ok(Some(job)) = vault.job(name).await
        && !job.value.active
        && let Err(error) = vault.delete_job(name, job.revision).await
    {
        tracing::debug!(%error, job = %job.value.id, "the last job of a removed server is kept");
    }
    Ok(server || package)
}

/// The fact that a server's package was removed by somebody.
pub fn uninstalled(name: &ServerName) -> String {
    format!("{UNINSTALLED}{name}")
}

/// Lets the record of a server's package say whether the server may run. The server's own record is what
/// counts, so that this may fail.
async fn switch_package(vault: &Vault, server: &ServerRecord) {
    for _ in 0..ATTEMPTS {
        let written = match vault.package(&server.name).await {
            Ok(Some(package)) if package.value.enabled != server.enabled => {
                let mut next = package.value;
                next.enabled = server.enabled;
                vault.replace_package(&next, package.revision).await.map(drop)
            }
            other => other.map(drop),
        };
        match written {
            Err(VaultError::Store(StoreError::Conflict)) => {}
            Err(error) => {
                tracing::warn!(%error, server = %server.name, "the record of a package was not switched");
                return;
            }
            Ok(()) => return,
        }
    }
}

/// Refuses the names of servers that are part of the program, for new servers: names differ in more than case.
pub fn not_reserved(name: &ServerName) -> Result<(), Problem> {
    if builtin::is_reserved(name) { Err(builtin_server(name)) } else { Ok(()) }
}

/// Refuses servers that are part of the program. One of a moved database whose name differs from theirs in case is like
/// any other.
pub fn not_builtin(name: &ServerName) -> Result<(), Problem> {
    if builtin::is_builtin(name) { Err(builtin_server(name)) } else { Ok(()) }
}

fn builtin_server(name: &ServerName) -> Problem {
    let text = format!("{name} is the name of a built-in server, which cannot be changed or deleted");
    WorkerError::new(ErrorCode::BuiltinServer, text).with("serverName", name.as_str()).into()
}

fn exists(name: &ServerName, existing: &str) -> Problem {
    let mut text = format!("Server with name {name} already exists");
    if existing != name.as_str() {
        text.push_str(&format!(" as {existing}: names must differ in more than case"));
    }
    WorkerError::new(ErrorCode::ServerAlreadyExists, text).with("serverName", name.as_str()).into()
}

/// What changing and removing say of a server that does not exist, as documented.
fn absent(name: &ServerName) -> WorkerError {
    let name = shorten(name.as_str(), 64);
    WorkerError::new(ErrorCode::ServerNotFound, format!("Server with name {name} not found"))
        .with("serverName", name)
}
