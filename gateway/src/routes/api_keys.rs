//! `/admin/api-keys`: who may use the API. A key is shown once, when it is made.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    body::Body,
    extract::{Path, State, rejection::PathRejection},
    response::Response,
};
use http::{HeaderMap, StatusCode};
use mcp_shared::{
    api_key::{ApiKey, NewApiKey},
    audit::{Action, Entry, Event, Object},
    error::{ErrorCode, WorkerError, shorten},
    ids::{ServerName, ToolName, UserId},
    principal::{Principal, Reach, Scope, Scopes},
    timestamp::Timestamp,
};
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use crate::{
    app::App,
    auth::api_keys::ApiKeys,
    body::Fields,
    caller::Caller,
    problem::{Problem, json_response},
};

/// `GET /admin/api-keys`.
pub async fn list(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    let mut keys = keys(&app)?.list().await?;
    keys.sort_by_key(|key| key.created_at);
    let keys: Vec<_> = keys.iter().map(view).collect();
    Ok(json_response(StatusCode::OK, &json!({"success": true, "apiKeys": keys})))
}

/// `POST /admin/api-keys`.
pub async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = app.body(&headers, body).await?;
    let new = wanted(&Fields::parse(&body)?)?;
    within(&caller, &new)?;
    let keys = keys(&app)?;
    let _recorded = caller.record_for(&app, Action::ApiKeyCreate, Object::key(&new.name), &new.user).await?;
    let (key, text) = keys.create(new, &caller).await?;
    // Only now it is known what it is called.
    let named = Entry::new(Event::Noted, Action::ApiKeyCreate, Object::key(&key.id));
    app.audit.note(named.in_request(&caller.request));
    let body = json!({"success": true, "apiKey": view(&key), "key": text.expose_secret()});
    Ok(json_response(StatusCode::CREATED, &body))
}

/// `DELETE /admin/api-keys/:id`: the key is of no more use, here at once and at other gateways in moments.
pub async fn revoke(
    State(app): State<Arc<App>>,
    caller: Caller,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Problem> {
    let Path(id) = id.map_err(|_| not_found(""))?;
    let keys = keys(&app)?;
    let _recorded = caller.record(&app, Action::ApiKeyRevoke, Object::key(&id)).await?;
    if !keys.revoke(&id).await? {
        return Err(not_found(&id));
    }
    Ok(json_response(StatusCode::OK, &json!({"success": true})))
}

/// What a body asks for.
pub fn wanted(fields: &Fields<'_>) -> Result<NewApiKey, Problem> {
    const SCOPES: &str = "must be an array of scopes: call, secrets, admin, impersonate, metrics";
    let scopes = fields.get::<Vec<String>>("scopes", SCOPES)?.value().unwrap_or_default();
    let scopes = scopes.iter().map(|scope| scope.parse::<Scope>()).collect::<Result<Scopes, _>>();
    let names = |field: &str| {
        fields.get::<BTreeSet<String>>(field, "must be an array of names").map(|names| names.value())
    };
    let servers = names("servers")?
        .map(|names| names.iter().map(|name| ServerName::parse_existing(name)).collect::<Result<_, _>>());
    let tools =
        names("tools")?.map(|names| names.iter().map(|name| ToolName::parse(name)).collect::<Result<_, _>>());
    const MOMENT: &str = "must be a moment such as 2027-01-31T12:00:00Z";
    Ok(NewApiKey {
        name: fields.required("name")?,
        user: UserId::parse(&fields.required("user")?)?,
        scopes: scopes.map_err(|_| Problem::invalid(format!("scopes {SCOPES}")))?,
        reach: Reach { servers: servers.transpose()?, tools: tools.transpose()? },
        expires_at: fields.get::<Timestamp>("expiresAt", MOMENT)?.value(),
    })
}

/// Nobody gives away what they do not have.
fn within(giver: &Principal, new: &NewApiKey) -> Result<(), Problem> {
    for scope in &new.scopes {
        giver.require(*scope)?;
    }
    Ok(())
}

fn keys(app: &App) -> Result<&Arc<ApiKeys>, Problem> {
    app.authenticator.keys().ok_or_else(|| {
        Problem::new(ErrorCode::NotFound, "There are no API keys here: AUTH does not name keys")
    })
}

fn view(key: &ApiKey) -> Value {
    let mut view = json!({
        "id": key.id,
        "name": key.name,
        "user": key.user,
        "scopes": key.scopes,
        "createdBy": key.created_by,
        "createdAt": key.created_at,
        "expiresAt": key.expires_at,
    });
    if let Some(servers) = &key.reach.servers {
        view["servers"] = json!(servers);
    }
    if let Some(tools) = &key.reach.tools {
        view["tools"] = json!(tools);
    }
    view
}

fn not_found(id: &str) -> Problem {
    let text = format!("API key {} not found", shorten(id, 64));
    WorkerError::new(ErrorCode::ApiKeyNotFound, text).into()
}
