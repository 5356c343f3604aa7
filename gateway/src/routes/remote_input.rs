//! What a client may say about a remote server, checked field by field: where requests go, and what is sent
//! along with them.

use std::collections::BTreeMap;

use http::HeaderName;
use mcp_shared::{
    egress::{Egress, EgressError},
    error::{ErrorCode, shorten},
    json, limits,
    remote::GivenClient,
    server::Variables,
};
use secrecy::SecretString;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::{
    body::{Field, Fields},
    problem::Problem,
};

/// Headers that say how a message is sent, or that the transport sets by itself: another value would make
/// another message of it, or another session. `Proxy-` and `Mcp-Param-` stand for all names that begin so.
const RESERVED: [&str; 19] = [
    "accept",
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "host",
    "keep-alive",
    "last-event-id",
    "mcp-method",
    "mcp-name",
    "mcp-protocol-version",
    "mcp-session-id",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "mcp-param-",
    "proxy-",
];
/// Bytes of a session's id.
const SESSION_BYTES: usize = 1_024;
/// Bytes of what an authorization server knows us by, and of a scope.
const CLIENT_BYTES: usize = 2_048;
/// Scopes that are asked for.
const SCOPES: usize = 64;
/// The longest pause between attempts, in milliseconds: a day.
const PAUSE_MAX: f64 = 86_400_000.0;
/// How much longer each pause may become.
const GROWTH_MAX: f64 = 100.0;
/// Attempts in a row.
const RETRIES_MAX: f64 = 1_000.0;

/// Refuses a URL that no request is sent to. Whether its name leads to a private address is seen when it is
/// connected to.
pub fn check_url(egress: &Egress, field: &str, url: &str) -> Result<(), Problem> {
    let invalid = |rule: &str| Problem::new(ErrorCode::InvalidUrl, format!("{field} {rule}"));
    if url.len() > limits::URI_BYTES {
        return Err(invalid(&format!("must be at most {} bytes", limits::URI_BYTES)));
    }
    // A parser of URLs skips some of these. What is shown and stored is what requests are sent to.
    if url.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(invalid("must not have spaces or control characters"));
    }
    match egress.check(url) {
        Ok(_) => Ok(()),
        Err(EgressError::InvalidUrl(rule)) => Err(invalid(rule)),
        Err(error @ EgressError::Blocked(_)) => {
            Err(Problem::new(ErrorCode::BlockedAddress, error.to_string()))
        }
        // Nothing was resolved.
        Err(error @ EgressError::Unresolved) => Err(invalid(&error.to_string())),
    }
}

/// The static headers of every request.
pub fn headers(fields: &Fields<'_>) -> Result<Field<Variables>, Problem> {
    let given = match fields.raw("headers") {
        Field::Absent => return Ok(Field::Absent),
        Field::Null => return Ok(Field::Null),
        Field::Value(given) => given,
    };
    let rule = || Problem::invalid("headers must be an object whose values are strings");
    let members = json::members(given.bytes(), limits::HEADER_COUNT).map_err(|_| rule())?;
    if members.len() > limits::HEADER_COUNT {
        return Err(refused(format!("headers can be at most {}", limits::HEADER_COUNT)));
    }
    let mut headers = BTreeMap::new();
    let mut names = Vec::with_capacity(members.len());
    let mut bytes = 0;
    for (name, value) in members {
        let value: String = serde_json::from_str(value.get()).map_err(|_| rule())?;
        let shown = shorten(&name, 64);
        let parsed = HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| refused(format!("{shown} is not a name that an HTTP header can have")))?;
        if RESERVED.iter().any(|reserved| match reserved.strip_suffix('-') {
            Some(_) => parsed.as_str().starts_with(reserved),
            None => parsed.as_str() == *reserved,
        }) {
            return Err(refused(format!("The header {shown} is set by the transport and by nobody else")));
        }
        // Other bytes could be sent, and mean something else to everybody who reads them.
        if !value.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte)) {
            return Err(refused(format!(
                "The value of the header {shown} is not one that HTTP headers can have"
            )));
        }
        bytes += name.len() + value.len();
        if names.contains(&parsed) {
            return Err(refused(format!("The header {shown} appears twice")));
        }
        names.push(parsed);
        headers.insert(name.into_owned(), value);
    }
    if bytes > limits::HEAD_BYTES {
        return Err(refused(format!("headers can have at most {} bytes together", limits::HEAD_BYTES)));
    }
    Ok(Field::Value(Variables(headers)))
}

fn refused(message: String) -> Problem {
    Problem::new(ErrorCode::InvalidHeader, message)
}

/// When and how often a broken stream is taken up again.
pub fn reconnection(fields: &Fields<'_>) -> Result<Field<Map<String, Value>>, Problem> {
    let field: Field<Map<String, Value>> = fields.get("reconnectionOptions", "must be an object")?;
    let Field::Value(options) = &field else { return Ok(field) };
    for (name, value) in options {
        let (range, whole) = match name.as_str() {
            "maxReconnectionDelay" | "initialReconnectionDelay" => (0.0..=PAUSE_MAX, false),
            "reconnectionDelayGrowFactor" => (1.0..=GROWTH_MAX, false),
            "maxRetries" => (0.0..=RETRIES_MAX, true),
            _ => {
                return Err(Problem::invalid(
                    "reconnectionOptions can have maxReconnectionDelay, initialReconnectionDelay, \
                     reconnectionDelayGrowFactor and maxRetries",
                ));
            }
        };
        let valid = value.as_f64().is_some_and(|number| range.contains(&number));
        if !valid || whole && value.as_u64().is_none() {
            let number = if whole { "whole number" } else { "number" };
            let (from, to) = (range.start(), range.end());
            return Err(Problem::invalid(format!(
                "reconnectionOptions.{name} must be a {number} from {from} to {to}"
            )));
        }
    }
    Ok(field)
}

/// A session to take up. It is a credential of one user, and no part of the server's record.
pub fn session_id(fields: &Fields<'_>) -> Result<Field<SecretString>, Problem> {
    Ok(match fields.text("sessionId")? {
        Field::Absent => Field::Absent,
        Field::Null => Field::Null,
        Field::Value(id) => {
            if id.is_empty() || id.len() > SESSION_BYTES || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(Problem::invalid(format!(
                    "sessionId must be 1 to {SESSION_BYTES} visible ASCII characters"
                )));
            }
            Field::Value(id.into())
        }
    })
}

/// What an authorization server knows us by, where an operator registered us. Without a new secret the one
/// that is known stays, for as long as the id does: answers do not show it, and may be sent back.
pub fn oauth_client(fields: &Fields<'_>, known: Option<&GivenClient>) -> Result<Field<GivenClient>, Problem> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Given {
        client_id: String,
        #[serde(default, deserialize_with = "there")]
        client_secret: Option<Option<String>>,
        #[serde(default)]
        scopes: Option<Vec<String>>,
    }
    let rule = "must be an object with clientId, and maybe clientSecret and a list scopes";
    let given = match fields.get::<Given>("oauthClient", rule)? {
        Field::Absent => return Ok(Field::Absent),
        Field::Null => return Ok(Field::Null),
        Field::Value(given) => given,
    };
    let visible = |text: &str| {
        (1..=CLIENT_BYTES).contains(&text.len()) && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
    };
    if !visible(&given.client_id) || given.client_secret.iter().flatten().any(|secret| !visible(secret)) {
        return Err(Problem::invalid(format!(
            "clientId and clientSecret of oauthClient must be 1 to {CLIENT_BYTES} visible ASCII characters"
        )));
    }
    let scopes = given.scopes.unwrap_or_default();
    let is_scope =
        |scope: &String| visible(scope) && !scope.bytes().any(|byte| matches!(byte, b' ' | b'"' | b'\\'));
    if scopes.len() > SCOPES || !scopes.iter().all(is_scope) {
        return Err(Problem::invalid(format!(
            "scopes of oauthClient must be at most {SCOPES} names of scopes"
        )));
    }
    let client_secret = match given.client_secret {
        Some(secret) => secret,
        None => known
            .filter(|known| known.client_id == given.client_id)
            .and_then(|known| known.client_secret.clone()),
    };
    Ok(Field::Value(GivenClient { client_id: given.client_id, client_secret, scopes }))
}

/// Tells a member that is `null` from one that is not there.
fn there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}
