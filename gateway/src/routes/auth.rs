//! `/auth`: users log in to remote servers with their browsers. The names `google`, `callback` and
//! `client.json` are taken: a remote server that is called so has no login page.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use http::{HeaderMap, StatusCode};
use mcp_shared::{
    audit::{Action, Object},
    error::{ErrorCode, WorkerError},
    remote::{BeginLogin, RemoteAnswer, RemoteAsk},
    store::StoreError,
    vault::VaultError,
    worker_api::Change,
};
use serde_json::json;

use crate::{
    app::{App, Server},
    caller::Caller,
    login::{Origin, Parameters, Ticket, invalid_state, page, refusal, returning},
    problem::{Problem, json_response},
};

/// `GET /auth/:server/login?username=`: sends the browser to the authorization server.
pub async fn login(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(server): Server,
    origin: Origin,
    parameters: Parameters,
) -> Result<Response, Problem> {
    let user = caller.user_of(&parameters, "username")?;
    caller.at(&server)?;
    let _recorded = caller.record_for(&app, Action::LoginBegin, Object::server(&server), &user).await?;
    let ticket = Ticket::new()?;
    let begin = BeginLogin {
        id: ticket.id.clone(),
        user,
        server,
        browser: ticket.browser(),
        redirect_uri: callback_uri(&origin),
        client_document: origin.is_secure().then(|| document_uri(&origin)),
    };
    match app.worker.remote(RemoteAsk::BeginLogin(begin)).await? {
        RemoteAnswer::Login { url } => ticket.redirect(&origin, &url),
        _ => Err(WorkerError::internal("a worker answered something else to a login").into()),
    }
}

/// `GET /auth/callback`: where the authorization server sends the browser back to.
pub async fn callback(
    State(app): State<Arc<App>>,
    caller: Caller,
    origin: Origin,
    headers: HeaderMap,
    parameters: Parameters,
) -> Result<Response, Problem> {
    let stored = returning(&app, &origin, &headers, &parameters).await?;
    let mut login = stored.value;
    let object = Object::server(&login.server);
    let recorded = caller.record_for(&app, Action::LoginFinish, object, &login.user).await?;
    if let Some(refused) = refusal(&parameters, &login.server) {
        app.vault.delete_login(&login.id, None).await?;
        return Err(refused);
    }
    let code = parameters.get("code").ok_or_else(|| Problem::invalid("code is required"))?;
    login.code = Some(code.into());
    login.answered_by = parameters.get("iss").map(str::to_owned);
    match app.vault.put_login(&login, Some(stored.revision)).await {
        Ok(_) => {}
        Err(VaultError::Store(StoreError::Conflict | StoreError::NotFound)) => return Err(invalid_state()),
        Err(error) => return Err(error.into()),
    }
    let (worker, id) = (Arc::clone(&app.worker), login.id.clone());
    // The login is carried through although the browser may go away.
    let finished = app.changes.spawn(async move {
        let _recorded = recorded;
        match worker.remote(RemoteAsk::FinishLogin { id }).await? {
            RemoteAnswer::LoggedIn { user, server } => worker.announce(Change::Login { user, server }).await,
            _ => Err(WorkerError::internal("a worker answered something else to the end of a login")),
        }
    });
    finished.await.map_err(WorkerError::internal)??;
    page(&origin, &login.id, &login.server)
}

/// `GET /auth/client.json`: what authorization servers may read about us instead of registering us.
pub async fn client(origin: Origin) -> Result<Response, Problem> {
    if !origin.is_secure() {
        return Err(Problem::new(
            ErrorCode::NotFound,
            "There is no such document without an https PUBLIC_URL",
        ));
    }
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "client_id": document_uri(&origin),
            "client_name": "mcp-api",
            "client_uri": origin.0,
            "redirect_uris": [callback_uri(&origin)],
            "grant_types": ["authorization_code", "refresh_token"],
            "response_types": ["code"],
            "token_endpoint_auth_method": "none",
            "application_type": "web",
        }),
    ))
}

fn callback_uri(origin: &Origin) -> String {
    origin.at(["auth", "callback"]).into()
}

fn document_uri(origin: &Origin) -> String {
    origin.at(["auth", "client.json"]).into()
}
