//! `/auth/google`: users of servers with `MCP_AUTH_TYPE=OAUTH2_GOOGLE` let these act for them. The server
//! itself speaks to Google, by two tools of a fixed name.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use http::HeaderMap;
use mcp_shared::{
    audit::{Action, Object},
    error::{ErrorCode, WorkerError},
    google::{EXCHANGE_TOOL, GoogleFlow, TOKENS_SECRET, URL_TOOL},
    ids::{RequestId, SecretName, ServerName, ToolName, UserId},
    json::RawJson,
    limits,
    remote::Login,
    server::ServerRecord,
    store::StoreError,
    timestamp::Timestamp,
    vault::VaultError,
    worker_api::{CallContext, Change, ToolCall},
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use std::time::Duration;

use crate::{
    app::{App, Id},
    caller::Caller,
    login::{Origin, Parameters, Ticket, invalid_state, page, refusal, returning},
    problem::Problem,
};

/// What is kept of a login instead of a PKCE verifier: which of the two kinds it is.
const PROOF: &str = r#"{"google":true}"#;

/// `GET /auth/google/login?user_id=[&server_name=]`: sends the browser to Google.
pub async fn login(
    State(app): State<Arc<App>>,
    caller: Caller,
    Id(id): Id,
    origin: Origin,
    parameters: Parameters,
) -> Result<Response, Problem> {
    if parameters.get("user_id").is_none() {
        return Err(Problem::invalid("user_id is required: whose login it is"));
    }
    let user = caller.user_of(&parameters, "user_id")?;
    let server = chosen(&app, parameters.get("server_name")).await?;
    caller.at(&server)?;
    let _recorded = caller.record_for(&app, Action::LoginBegin, Object::server(&server), &user).await?;
    let ticket = Ticket::new()?;
    let arguments = json!({"redirect_uri": callback_uri(&origin), "state": ticket.state});
    let answer = ask(&app, id, &user, &server, URL_TOOL, &arguments).await?;
    let url = address(&answer).ok_or_else(|| failed("did not say where to log in", &server))?;
    let redirect = ticket.redirect(&origin, &url)?;
    if let Err(error) = app.vault.sweep_logins().await {
        tracing::debug!(error.cause = %error, "old logins could not be removed");
    }
    let login = Login {
        id: ticket.id.clone(),
        user,
        server,
        browser: ticket.browser(),
        begun_at: Timestamp::now(),
        code: None,
        answered_by: None,
        proof: PROOF.into(),
    };
    app.vault.put_login(&login, None).await?;
    Ok(redirect)
}

/// `GET /auth/google/callback`: where Google sends the browser back to.
pub async fn callback(
    State(app): State<Arc<App>>,
    caller: Caller,
    Id(id): Id,
    origin: Origin,
    headers: HeaderMap,
    parameters: Parameters,
) -> Result<Response, Problem> {
    let stored = returning(&app, &origin, &headers, &parameters).await?;
    let login = stored.value;
    if login.proof.expose_secret() != PROOF {
        return Err(invalid_state());
    }
    let object = Object::server(&login.server);
    let recorded = caller.record_for(&app, Action::LoginFinish, object, &login.user).await?;
    let code = parameters.get("code").map(str::to_owned);
    let refused = refusal(&parameters, &login.server);
    if code.is_none() && refused.is_none() {
        return Err(Problem::invalid("code is required"));
    }
    // Whoever takes it away may go on, and nobody after that.
    match app.vault.delete_login(&login.id, Some(stored.revision)).await {
        Ok(true) => {}
        Ok(false) | Err(VaultError::Store(StoreError::Conflict | StoreError::NotFound)) => {
            return Err(invalid_state());
        }
        Err(error) => return Err(error.into()),
    }
    if let Some(refused) = refused {
        return Err(refused);
    }
    let arguments = json!({"code": code, "redirect_uri": callback_uri(&origin)});
    let (user, server, here) = (login.user, login.server, Arc::clone(&app));
    // A code can be used once: what it gives must not be lost because the browser goes away.
    let (of, server) = (server.clone(), server);
    let finished = app.changes.spawn(async move {
        let answer = ask(&here, id, &user, &of, EXCHANGE_TOOL, &arguments).await?;
        let tokens = document(&answer).ok_or_else(|| failed("did not give tokens for the login", &of))?;
        let name = SecretName::from_stored(TOKENS_SECRET);
        let change = Change::Secret { user: user.clone(), server: of.clone(), name: name.clone() };
        let vault = here.vault.clone();
        let write = async move { vault.put_secret(&user, &of, &name, &tokens).await };
        here.commit(&recorded, change, write).await?.map_err(Problem::from)
    });
    finished.await.map_err(WorkerError::internal)??;
    page(&origin, &login.id, &server)
}

/// The server that is named, or the only one of its kind.
async fn chosen(app: &App, named: Option<&str>) -> Result<ServerName, Problem> {
    if let Some(named) = named {
        let name = ServerName::parse_existing(named)?;
        let server = app.vault.server(&name).await?.ok_or_else(|| WorkerError::server_not_found(&name))?;
        if GoogleFlow::of(&server.value).is_none() {
            let text = format!("Server {name} does not have MCP_AUTH_TYPE=OAUTH2_GOOGLE in its env");
            return Err(Problem::invalid(text));
        }
        return Ok(name);
    }
    let servers = app.vault.servers().await?;
    let enabled = |record: &&ServerRecord| record.enabled && GoogleFlow::of(record).is_some();
    let mut found = servers.iter().map(|server| &server.value).filter(enabled);
    match (found.next(), found.next()) {
        (Some(only), None) => Ok(only.name.clone()),
        (Some(_), Some(_)) => {
            Err(Problem::invalid("server_name is required: several servers use Google's logins"))
        }
        (None, _) => Err(Problem::new(
            ErrorCode::ServerNotFound,
            "No enabled server has MCP_AUTH_TYPE=OAUTH2_GOOGLE in its env",
        )),
    }
}

/// The result of one of the server's two tools.
async fn ask(
    app: &App,
    request_id: RequestId,
    user: &UserId,
    server: &ServerName,
    tool: &str,
    arguments: &Value,
) -> Result<Value, Problem> {
    let context =
        CallContext { request_id, user: user.clone(), timeout: None, spent: Duration::ZERO, trace: None };
    let call = ToolCall {
        idempotency: None,
        server: server.clone(),
        tool: ToolName::from_stored(tool),
        arguments: RawJson::of(arguments).map_err(WorkerError::internal)?,
        progress: false,
    };
    // What is known about the call is of no use to a browser.
    let plain = |error: WorkerError| WorkerError { outcome: None, ..error };
    let stream = app.worker.call_tool(context, call).await.map_err(plain)?;
    let result: Value = stream.result().await.map_err(plain)?.read().map_err(WorkerError::internal)?;
    // The server's own words may repeat what it was given.
    if result["isError"] == true {
        Err(failed("did not go along with the login", server))
    } else {
        Ok(result)
    }
}

fn failed(what: &str, server: &ServerName) -> Problem {
    Problem::new(ErrorCode::LoginFailed, format!("Server {server} {what}"))
        .with("serverName", server.as_str())
}

/// The address in a result: a text, or a member of an object.
fn address(result: &Value) -> Option<String> {
    let text = result["content"][0]["text"].as_str().map(str::trim);
    let is_address = |text: &&str| text.starts_with("https://") || text.starts_with("http://");
    if let Some(address) = text.filter(is_address) {
        return Some(address.to_owned());
    }
    let object = text.and_then(|text| serde_json::from_str(text).ok());
    [object.as_ref(), Some(&result["structuredContent"])].into_iter().flatten().find_map(|object: &Value| {
        let names = ["url", "authUrl", "auth_url", "authorizationUrl", "authorization_url"];
        let member = names.iter().find_map(|name| object[*name].as_str());
        member.or(object.as_str()).filter(is_address).map(str::to_owned)
    })
}

/// The tokens in a result: a JSON object, kept whole.
fn document(result: &Value) -> Option<SecretString> {
    let text = result["content"][0]["text"].as_str();
    let object = text.and_then(|text| serde_json::from_str::<Value>(text).ok()).filter(Value::is_object);
    let object = object.or_else(|| Some(result["structuredContent"].clone()).filter(Value::is_object))?;
    Some(object.to_string()).filter(|text| text.len() <= limits::SECRET_BYTES).map(Into::into)
}

fn callback_uri(origin: &Origin) -> String {
    origin.at(["auth", "google", "callback"]).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_answer_in_several_ways() {
        let text = |text: &str| json!({"content": [{"type": "text", "text": text}]});
        let url = "https://accounts.google.com/o/oauth2/v2/auth?x=1";
        for result in [
            text(url),
            text(&format!("  {url}\n")),
            text(&json!({"url": url}).to_string()),
            text(&json!({"authorization_url": url}).to_string()),
            text(&json!(url).to_string()),
            json!({"content": [], "structuredContent": {"authUrl": url}}),
        ] {
            assert_eq!(address(&result).as_deref(), Some(url), "{result}");
        }
        for result in [text("visit us"), text(r#"{"url":"javascript:alert(1)"}"#), json!({})] {
            assert_eq!(address(&result), None, "{result}");
        }
        let tokens = r#"{"access_token":"a","refresh_token":"b"}"#;
        assert_eq!(document(&text(tokens)).unwrap().expose_secret(), tokens);
        assert!(document(&text("\"a\"")).is_none() && document(&text("none")).is_none());
    }
}
