//! `/mcp/servers/:name/oauth`: tokens of logins that somebody else went through, and the end of logins.

use std::{sync::Arc, time::Duration};

use axum::{body::Body, extract::State, response::Response};
use http::{HeaderMap, StatusCode};
use mcp_shared::{
    audit::{Action, Object},
    ids::{ServerName, UserId},
    limits,
    remote::{OAuthTokens, RemoteAnswer, RemoteAsk},
    server::{ServerRecord, Transport},
    timestamp::Timestamp,
    worker_api::Change,
};
use serde::Deserialize;
use serde_json::{Map, json};
use tokio::time::timeout;
use url::Url;

use crate::{
    app::{App, Server},
    body::{Field, Fields},
    caller::Caller,
    login::Parameters,
    problem::{Problem, json_response},
};

/// How long a remote server has to say which authorization server it trusts.
const ISSUER_WAIT: Duration = Duration::from_secs(8);
/// Characters of a field that is no secret.
const TEXT: usize = 2_048;
/// Scopes of one login.
const SCOPES: usize = 256;
/// Seconds that an access token may be said to live: a hundred years.
const LIFE: u64 = 100 * 365 * 24 * 3_600;

/// A list of scopes as clients write it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Scopes {
    List(Vec<String>),
    Text(String),
}

/// `POST /mcp/servers/:name/oauth`: stores a user's tokens. When this has answered, no later call uses
/// older ones.
pub async fn set(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(name): Server,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let body = app.body(&headers, body).await?;
    let fields = Fields::parse(&body)?;
    let user = caller.user(&fields)?;
    caller.at(&name)?;
    let mut tokens = tokens(&fields, user, name)?;
    let name = tokens.server.clone();
    if let Transport::StreamableHttp { url, .. } = remote(&app, &name).await?.transport {
        tokens.resource = Some(url);
    }
    if tokens.issuer.is_none() {
        tokens.issuer = app.issuer(&tokens.user, &name).await?;
    }
    let recorded = caller.record_for(&app, Action::TokensSet, Object::server(&name), &tokens.user).await?;
    let change = Change::Login { user: tokens.user.clone(), server: name.clone() };
    let vault = app.vault.clone();
    app.commit(&recorded, change, async move { vault.replace_oauth_tokens(tokens).await }).await??;
    Ok(json_response(StatusCode::OK, &json!({"success": true, "serverName": name})))
}

/// `DELETE /mcp/servers/:name/oauth?username=`: forgets a user's tokens. Forgetting what is not there
/// succeeds.
pub async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Server(name): Server,
    parameters: Parameters,
) -> Result<Response, Problem> {
    let user = caller.user_of(&parameters, "username")?;
    caller.at(&name)?;
    remote(&app, &name).await?;
    let recorded = caller.record_for(&app, Action::TokensDelete, Object::server(&name), &user).await?;
    let change = Change::Login { user: user.clone(), server: name.clone() };
    let (vault, of) = (app.vault.clone(), name.clone());
    let write = async move {
        vault.delete_oauth_tokens(&user, &of, None).await?;
        vault.delete_session(&user, &of, None).await
    };
    app.commit(&recorded, change, write).await??;
    Ok(json_response(StatusCode::OK, &json!({"success": true, "serverName": name})))
}

impl App {
    /// The authorization server that tokens are of whose giver is not named: the one that the remote server
    /// names now, or else the one that gave the user's last tokens. If nobody knows, it is found out when
    /// they are refreshed first.
    async fn issuer(&self, user: &UserId, server: &ServerName) -> Result<Option<String>, Problem> {
        let ask = self.worker.remote(RemoteAsk::Issuer { server: server.clone() });
        match timeout(ISSUER_WAIT, ask).await {
            Ok(Ok(RemoteAnswer::Issuer { issuer: Some(issuer) })) => return Ok(Some(issuer)),
            Ok(Ok(_)) | Err(_) => {}
            Ok(Err(error)) => {
                tracing::debug!(%server, error.cause = %error, "nobody says who gives tokens for a server");
            }
        }
        // Tokens that cannot be read are replaced like any others.
        let stored = self.vault.oauth_tokens(user, server).await.ok().flatten();
        Ok(stored.and_then(|stored| stored.value.issuer))
    }
}

/// The record of a remote server, which users log in to.
async fn remote(app: &App, name: &ServerName) -> Result<ServerRecord, Problem> {
    let server = app.server(name).await?;
    if server.is_remote() {
        return Ok(server);
    }
    Err(Problem::invalid(format!(
        "Server {name} is not a streamable_http server, and users do not log in to it"
    )))
}

fn tokens(fields: &Fields<'_>, user: UserId, server: ServerName) -> Result<OAuthTokens, Problem> {
    let token_type = text(fields, "tokenType")?.unwrap_or_else(|| "Bearer".to_owned());
    if !token_type.eq_ignore_ascii_case("bearer") {
        return Err(Problem::invalid("tokenType must be Bearer"));
    }
    let access_token = fields.required("accessToken")?;
    // It travels in a header.
    let sendable = access_token.bytes().all(|byte| byte.is_ascii_graphic());
    if access_token.len() > limits::HEAD_BYTES / 4 || !sendable {
        let text = "accessToken must be at most 16384 visible ASCII characters, without white space";
        return Err(Problem::invalid(text));
    }
    let expires_in = fields
        .get::<u64>("expiresIn", "must be a whole number of seconds above 0")?
        .value()
        .map(|life| match life {
            1..=LIFE => Ok(i64::try_from(life * 1_000).unwrap_or(i64::MAX)),
            _ => Err(Problem::invalid("expiresIn must be a whole number of seconds above 0")),
        })
        .transpose()?;
    let scopes = match fields.get("scopes", "must be an array of strings, or one string with spaces")?.value()
    {
        None => Vec::new(),
        Some(Scopes::List(list)) => list,
        Some(Scopes::Text(text)) => text.split_ascii_whitespace().map(str::to_owned).collect(),
    };
    let plain = |scope: &String| !scope.is_empty() && scope.bytes().all(|byte| byte.is_ascii_graphic());
    let length: usize = scopes.iter().map(String::len).sum();
    if scopes.len() > SCOPES || length > limits::URI_BYTES || !scopes.iter().all(plain) {
        return Err(Problem::invalid(format!("scopes must be at most {SCOPES} words of ASCII")));
    }
    let address = |name: &str| -> Result<Option<String>, Problem> {
        let Some(text) = text(fields, name)? else { return Ok(None) };
        let url = Url::parse(&text).ok();
        let good = url.is_some_and(|url| {
            url.username().is_empty() && url.password().is_none() && url.fragment().is_none()
        });
        if good { Ok(Some(text)) } else { Err(Problem::invalid(format!("{name} must be a URL"))) }
    };
    let issuer = address("issuer")?;
    if issuer.as_deref().is_some_and(|issuer| {
        !(issuer.starts_with("https://") || issuer.starts_with("http://")) || issuer.contains('?')
    }) {
        return Err(Problem::invalid("issuer must be an http or https URL without query"));
    }
    Ok(OAuthTokens {
        user,
        server,
        issuer,
        resource: None,
        token_type: "Bearer".to_owned(),
        access_token: access_token.into(),
        refresh_token: secret(fields, "refreshToken")?.map(Into::into),
        expires_at: expires_in
            .map(|life| Timestamp::from_millis(Timestamp::now().millis().saturating_add(life))),
        scopes,
        client_id: text(fields, "clientId")?,
        client_secret: secret(fields, "clientSecret")?.map(Into::into),
        redirect_uri: address("redirectUri")?,
        code_verifier: secret(fields, "codeVerifier")?.map(Into::into),
        refreshing: None,
        refused: None,
        extra: Map::new(),
    })
}

/// A field that is no secret; empty counts as not there.
fn text(fields: &Fields<'_>, name: &str) -> Result<Option<String>, Problem> {
    bounded(fields, name, TEXT)
}

fn secret(fields: &Fields<'_>, name: &str) -> Result<Option<String>, Problem> {
    bounded(fields, name, limits::SECRET_BYTES)
}

fn bounded(fields: &Fields<'_>, name: &str, bytes: usize) -> Result<Option<String>, Problem> {
    match fields.text(name)? {
        Field::Value(text) if text.len() > bytes || text.chars().any(char::is_control) => {
            Err(Problem::invalid(format!("{name} must be at most {bytes} bytes, without control characters")))
        }
        Field::Value(text) if !text.is_empty() => Ok(Some(text)),
        _ => Ok(None),
    }
}
