//! `/secrets`: users' secrets are set and deleted here, and never read.

use std::sync::Arc;

use axum::{body::Body, extract::State, response::Response};
use http::{HeaderMap, StatusCode};
use mcp_shared::{
    audit::{Action, Object},
    builtin,
    error::{ErrorCode, WorkerError},
    ids::{SecretName, ServerName},
    limits,
    store::StoreError,
    vault::VaultError,
    worker_api::Change,
};
use serde_json::json;

use crate::{
    app::App,
    body::{Field, Fields},
    caller::Caller,
    problem::{Problem, json_response},
};

/// `POST /secrets/set`. When this has answered, no later call uses an older value.
pub async fn set(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = app.body(&headers, body).await?;
    let fields = Fields::parse(&body)?;
    let user = caller.user(&fields)?;
    let value = fields.required("secretValue")?;
    if value.len() > limits::SECRET_BYTES || value.contains('\0') {
        let text = format!("secretValue must be at most {} bytes, without NUL", limits::SECRET_BYTES);
        return Err(Problem::invalid(text));
    }
    let (server, name) = app.target(&fields).await?;
    caller.at(&server)?;
    if builtin::is_builtin(&server) {
        let text = format!("{server} is a built-in server, which takes no secrets");
        return Err(WorkerError::new(ErrorCode::BuiltinServer, text)
            .with("serverName", server.as_str())
            .into());
    }
    let object = Object::server(&server).with_secret(&name);
    let recorded = caller.record_for(&app, Action::SecretSet, object, &user).await?;
    let change = Change::Secret { user: user.clone(), server: server.clone(), name: name.clone() };
    let (vault, of) = (app.vault.clone(), server.clone());
    let write = async move { vault.put_secret(&user, &of, &name, &value.into()).await };
    match app.commit(&recorded, change, write).await? {
        Ok(()) => {}
        Err(VaultError::Store(StoreError::NotFound)) => {
            return Err(WorkerError::server_not_found(&server).into());
        }
        Err(error) => return Err(error.into()),
    }
    Ok(json_response(StatusCode::OK, &json!({"success": true})))
}

/// `POST /secrets/delete`. Deleting what is not there succeeds.
pub async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = app.body(&headers, body).await?;
    let fields = Fields::parse(&body)?;
    let user = caller.user(&fields)?;
    let (server, name) = app.target(&fields).await?;
    caller.at(&server)?;
    if app.vault.server(&server).await?.is_none() {
        return Err(WorkerError::server_not_found(&server).into());
    }
    let object = Object::server(&server).with_secret(&name);
    let recorded = caller.record_for(&app, Action::SecretDelete, object, &user).await?;
    let change = Change::Secret { user: user.clone(), server: server.clone(), name: name.clone() };
    let vault = app.vault.clone();
    app.commit(&recorded, change, async move { vault.delete_secret(&user, &server, &name).await }).await??;
    Ok(json_response(StatusCode::OK, &json!({"success": true})))
}

impl App {
    /// Which server's secret is meant: `serverName` and `secretName`, or, as clients of newer mcp-api
    /// versions say it, `secretName` alone as `server.NAME`.
    async fn target(&self, fields: &Fields<'_>) -> Result<(ServerName, SecretName), Problem> {
        let name = fields.required("secretName")?;
        match fields.text("serverName")? {
            Field::Value(server) => Ok((ServerName::parse_existing(&server)?, SecretName::parse(&name)?)),
            Field::Absent | Field::Null => {
                let Some((prefix, _)) = name.split_once('.') else {
                    return Err(Problem::invalid(
                        "serverName is required, unless secretName is \"server.NAME\"",
                    ));
                };
                let prefix = ServerName::parse_existing(prefix)?;
                // Old servers may have dots in their names: the longest that fits is meant.
                let servers = self.vault.servers().await?;
                let found = servers
                    .iter()
                    .map(|server| &server.value.name)
                    .filter_map(|server| {
                        Some((server, name.strip_prefix(server.as_str())?.strip_prefix('.')?))
                    })
                    .max_by_key(|(server, _)| server.as_str().len());
                let (server, rest) = found.ok_or_else(|| {
                    Problem::from(WorkerError::new(
                        ErrorCode::ServerNotFound,
                        format!("Server {} not found", mcp_shared::error::shorten(prefix.as_str(), 64)),
                    ))
                })?;
                Ok((server.clone(), SecretName::parse(rest)?))
            }
        }
    }
}
