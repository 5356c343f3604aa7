//! What goes into calls of servers whose users log in to Google, beside the users' other secrets.

use mcp_shared::{
    error::{ErrorCode, Outcome, WorkerError},
    google::{GoogleFlow, TYPE},
    ids::{SecretName, ToolName, UserId},
    server::ServerRecord,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use crate::{host::Host, secrets::OpenSecret};

/// The hidden arguments of a call.
pub async fn hidden(
    host: &Host,
    user: &UserId,
    record: &ServerRecord,
    tool: &ToolName,
) -> Result<Vec<OpenSecret>, WorkerError> {
    let Some(flow) = GoogleFlow::of(record) else { return Ok(Vec::new()) };
    let Some(credentials) = &host.google else {
        let text = "GOOGLE_OAUTH_CREDENTIALS is not set for this worker, and the server needs it";
        return Err(failed(ErrorCode::ServerUnavailable, text, record));
    };
    let document = |name: String, value: SecretString| OpenSecret {
        name: SecretName::from_stored(name),
        value,
        is_json: true,
    };
    let mut hidden = vec![document(flow.credentials, credentials.json().clone())];
    if GoogleFlow::needs_tokens(tool) {
        let tokens = host.secrets.google_tokens(user, record).await?;
        let tokens = tokens.ok_or_else(|| {
            let text = format!("Log in to Google for server {}: the user has not yet", record.name);
            failed(ErrorCode::ReauthRequired, &text, record)
                .with("username", user.as_str())
                .with("authType", TYPE)
        })?;
        if !matches!(serde_json::from_str(tokens.expose_secret()), Ok(Value::Object(_))) {
            let text = "The stored tokens for Google are not a JSON object; log in to Google again";
            return Err(failed(ErrorCode::ReauthRequired, text, record)
                .with("username", user.as_str())
                .with("authType", TYPE));
        }
        hidden.push(document(flow.tokens, tokens));
    }
    Ok(hidden)
}

/// The secrets that are in a JSON document: a server that speaks of them does not quote it whole.
pub fn secrets_in(document: &SecretString) -> Vec<SecretString> {
    let mut found = vec![document.clone()];
    if let Ok(value) = serde_json::from_str::<Value>(document.expose_secret()) {
        collect("", &value, &mut found);
    }
    found
}

fn collect(name: &str, value: &Value, found: &mut Vec<SecretString>) {
    match value {
        Value::String(text) => {
            let name = name.to_ascii_lowercase();
            let secret = ["token", "secret", "key"].iter().any(|part| name.contains(part));
            // `Bearer`, an address, the name of a key.
            let public = ["type", "uri", "url", "id"].iter().any(|end| name.ends_with(end));
            if secret && !public {
                found.push(text.as_str().into());
            }
        }
        Value::Object(members) => {
            for (name, value) in members {
                collect(name, value, found);
            }
        }
        Value::Array(items) => {
            for item in items {
                collect(name, item, found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn failed(code: ErrorCode, text: &str, record: &ServerRecord) -> WorkerError {
    WorkerError::new(code, text).outcome(Outcome::NotStarted).with("serverName", record.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_secret_in_a_document_is_found() {
        let document = r#"{"access_token":"ya29.abc","token_type":"Bearer","expiry_date":1,
            "web":{"client_secret":"GOCSPX-x","client_id":"id.apps","token_uri":"https://x"}}"#;
        let found = secrets_in(&document.into());
        let found: Vec<_> = found.iter().map(|secret| secret.expose_secret()).collect();
        assert_eq!(found, [document, "ya29.abc", "GOCSPX-x"]);
    }
}
