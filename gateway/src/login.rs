//! What all logins through a browser have in common: where the browser finds this program, the state that
//! travels through it, the cookie that binds it, and the page at the end.

use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

use axum::{
    extract::FromRequestParts,
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts};
use mcp_shared::{
    error::{ErrorCode, WorkerError},
    google::TYPE,
    ids::{ServerName, UserId},
    remote::{LOGIN_TIME, Login, LoginId},
    store::Versioned,
    timestamp::Timestamp,
};
use subtle::ConstantTimeEq;
use url::Url;

use crate::{
    app::App,
    auth::{Authenticator, tickets::PARAMETER},
    problem::Problem,
    serve::Scheme,
};

/// Where browsers find this program: `PUBLIC_URL`, or where this request found it. The edge has checked
/// the name.
pub struct Origin(pub Url);

/// Where browsers find this program, for whoever has to log in first.
pub struct Invitation {
    origin: Origin,
    authenticator: Arc<Authenticator>,
}

impl FromRequestParts<Arc<App>> for Invitation {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        let origin = Origin::from_request_parts(parts, app).await?;
        Ok(Self { origin, authenticator: Arc::clone(&app.authenticator) })
    }
}

impl Invitation {
    /// Adds to `reauth_required` where the user begins a login. Where callers are asked who they are, a browser is
    /// not, and so the link itself says for whom it is.
    pub fn invite(&self, error: WorkerError) -> WorkerError {
        let mut error = self.origin.invite(error);
        let text = |field: &str| error.details.get(field).and_then(|value| value.as_str());
        let (Some(url), Some(server), Some(user)) = (text("loginUrl"), text("serverName"), text("username"))
        else {
            return error;
        };
        if !self.authenticator.asks() {
            return error;
        }
        let server = ServerName::from_stored(server);
        let link = self.authenticator.link(&UserId::from_stored(user), &server);
        let link = link.ok().flatten().and_then(|ticket| {
            let mut url = Url::parse(url).ok()?;
            url.query_pairs_mut().append_pair(PARAMETER, &ticket);
            Some(url)
        });
        match link {
            Some(url) => error.details.insert("loginUrl".to_owned(), url.as_str().into()),
            // A link that leads nowhere helps nobody.
            None => error.details.shift_remove("loginUrl"),
        };
        error
    }
}

impl FromRequestParts<Arc<App>> for Origin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        if let Some(url) = &app.public_url {
            return Ok(Self(url.clone()));
        }
        let target = parts.uri.authority().map(|authority| authority.as_str());
        let host = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let scheme = parts.extensions.get::<Scheme>().copied().unwrap_or_default();
        let url = target.or(host).and_then(|host| found_at(scheme, host));
        url.map(Self).ok_or_else(|| Problem::invalid("The Host header is not valid"))
    }
}

/// The address under which a request found this program. Nearly all of them name the same one.
fn found_at(scheme: Scheme, host: &str) -> Option<Url> {
    thread_local! {
        static LATEST: RefCell<Option<(Scheme, String, Url)>> = const { RefCell::new(None) };
    }
    LATEST.with_borrow_mut(|latest| {
        if let Some((of, name, url)) = latest
            && *of == scheme
            && name == host
        {
            return Some(url.clone());
        }
        let plain = Url::parse(&format!("{}://{host}/", scheme.as_str())).ok();
        // An IPv6 address that its sender put no brackets around.
        let url = plain.or_else(|| Url::parse(&format!("{}://[{host}]/", scheme.as_str())).ok())?;
        let plain = url.path() == "/" && url.query().is_none() && url.username().is_empty();
        plain.then(|| {
            *latest = Some((scheme, host.to_owned(), url.clone()));
            url
        })
    })
}

impl Origin {
    /// An address of ours.
    pub fn at<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.0.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.clear().extend(path);
        }
        url
    }

    /// Whether nobody on the way can listen.
    pub fn is_secure(&self) -> bool {
        self.0.scheme() == "https"
    }

    /// Adds to `reauth_required` where the user begins a login.
    pub fn invite(&self, mut error: WorkerError) -> WorkerError {
        if error.code != ErrorCode::ReauthRequired || error.details.contains_key("loginUrl") {
            return error;
        }
        let text = |field: &str| error.details.get(field).and_then(|value| value.as_str());
        let (Some(server), Some(user)) = (text("serverName"), text("username")) else { return error };
        let google = text("authType") == Some(TYPE);
        let mut url = self.at(["auth", if google { "google" } else { server }, "login"]);
        if google {
            url.query_pairs_mut().append_pair("user_id", user).append_pair("server_name", server);
        } else {
            url.query_pairs_mut().append_pair("username", user);
        }
        error.details.insert("loginUrl".to_owned(), url.as_str().into());
        error
    }
}

/// The parameters of an address, each of which may stand there once.
pub struct Parameters(BTreeMap<String, String>);

impl<S: Sync> FromRequestParts<S> for Parameters {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let mut found = BTreeMap::new();
        let query = parts.uri.query().unwrap_or_default();
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            if found.insert(name.into_owned(), value.into_owned()).is_some() {
                return Err(Problem::invalid("A parameter appears twice in the address"));
            }
        }
        Ok(Self(found))
    }
}

impl Parameters {
    /// A parameter that is there and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }
}

/// What a login is begun with: two secrets that meet again at its end, one in the address that the
/// authorization server sends the browser to, one in the browser.
pub struct Ticket {
    /// Travels through the authorization server.
    pub state: String,
    /// Where the login is kept.
    pub id: LoginId,
    cookie: String,
}

impl Ticket {
    /// A new one.
    pub fn new() -> Result<Self, Problem> {
        let (state, cookie) = (random()?, random()?);
        Ok(Self { id: LoginId::of(&state), state, cookie })
    }

    /// What is kept of the cookie.
    pub fn browser(&self) -> String {
        LoginId::of(&self.cookie).as_str().to_owned()
    }

    /// Sends the browser away to log in.
    pub fn redirect(&self, origin: &Origin, to: &str) -> Result<Response, Problem> {
        let invalid = || Problem::new(ErrorCode::LoginFailed, "The address to log in at is not a valid one");
        let mut url = Url::parse(to).map_err(|_| invalid())?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(invalid());
        }
        let others: Vec<_> = url.query_pairs().into_owned().filter(|(name, _)| name != "state").collect();
        url.query_pairs_mut().clear().extend_pairs(others).append_pair("state", &self.state);
        let life = LOGIN_TIME.as_secs();
        let mut response = StatusCode::FOUND.into_response();
        let headers = response.headers_mut();
        headers.insert(header::LOCATION, value(url.as_str())?);
        headers.insert(header::SET_COOKIE, cookie(origin, &self.id, &self.cookie, life)?);
        headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        Ok(response)
    }
}

/// Finds the login to which a browser comes back. It must have been begun in this browser, not long ago,
/// and not be over.
pub async fn returning(
    app: &App,
    origin: &Origin,
    headers: &HeaderMap,
    parameters: &Parameters,
) -> Result<Versioned<Login>, Problem> {
    let id = LoginId::of(parameters.get("state").ok_or_else(invalid_state)?);
    let login = app.vault.login(&id).await?.ok_or_else(invalid_state)?;
    let name = cookie_name(origin, &id);
    let hash = cookies(headers).find(|(found, _)| *found == name).map(|(_, value)| LoginId::of(value));
    let same = hash.is_some_and(|hash| hash.as_str().as_bytes().ct_eq(login.value.browser.as_bytes()).into());
    let age = Timestamp::now().millis().abs_diff(login.value.begun_at.millis());
    if !same || u128::from(age) > LOGIN_TIME.as_millis() || login.value.code.is_some() {
        return Err(invalid_state());
    }
    Ok(login)
}

/// What the authorization server says instead of a code.
pub fn refusal(parameters: &Parameters, server: &ServerName) -> Option<Problem> {
    let error = parameters.get("error")?;
    let known = error.len() <= 64 && error.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    let text = match error {
        "access_denied" => "The login was refused by the user or by the authorization server".to_owned(),
        other if known => format!("The authorization server refused the login: {other}"),
        _ => "The authorization server refused the login".to_owned(),
    };
    Some(Problem::new(ErrorCode::LoginFailed, text).with("serverName", server.as_str()))
}

/// The page at the end of a login.
pub fn page(origin: &Origin, id: &LoginId, server: &ServerName) -> Result<Response, Problem> {
    let name: String = server
        .as_str()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_string() } else { format!("&#{};", u32::from(c)) })
        .collect();
    let body = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Logged in</title></head>\
         <body><h1>Logged in</h1><p>The login to {name} is complete. You can close this page.</p></body></html>\n"
    );
    let mut response = Response::new(body.into());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    let policy = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::SET_COOKIE, cookie(origin, id, "", 0)?);
    Ok(response)
}

/// `invalid_state`.
pub fn invalid_state() -> Problem {
    Problem::new(
        ErrorCode::InvalidState,
        "This login was not begun in this browser, is over, or was used before; begin it again",
    )
}

/// 256 random bits, as text for addresses and cookies.
fn random() -> Result<String, Problem> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(WorkerError::internal)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// Every login has a cookie of its own, so that two of them in one browser do not end each other. (The
/// prefix `__Host-` would want them sent to all of this host.)
fn cookie_name(origin: &Origin, id: &LoginId) -> String {
    let prefix = if origin.is_secure() { "__Secure-" } else { "" };
    format!("{prefix}mcp-api-login-{}", &id.as_str()[..16])
}

fn cookie(origin: &Origin, id: &LoginId, content: &str, life: u64) -> Result<HeaderValue, Problem> {
    let secure = if origin.is_secure() { "; Secure" } else { "" };
    let name = cookie_name(origin, id);
    value(&format!("{name}={content}; Path=/auth; Max-Age={life}; HttpOnly; SameSite=Lax{secure}"))
}

fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|line| line.to_str().ok())
        .flat_map(|line| line.split(';'))
        .filter_map(|one| one.trim().split_once('='))
}

fn value(text: &str) -> Result<HeaderValue, Problem> {
    Ok(HeaderValue::from_str(text).map_err(WorkerError::internal)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_to_log_in_hears_where() {
        let origin = Origin(Url::parse("https://mcp.example.com/").unwrap());
        let error = WorkerError::new(ErrorCode::ReauthRequired, "log in")
            .with("serverName", "a b/c")
            .with("username", "x&y");
        let invited = origin.invite(error.clone());
        assert_eq!(
            invited.details["loginUrl"],
            "https://mcp.example.com/auth/a%20b%2Fc/login?username=x%26y"
        );
        let invited = origin.invite(error.with("authType", TYPE));
        assert_eq!(
            invited.details["loginUrl"],
            "https://mcp.example.com/auth/google/login?user_id=x%26y&server_name=a+b%2Fc"
        );
        let other = WorkerError::new(ErrorCode::Conflict, "other").with("serverName", "a");
        assert_eq!(origin.invite(other.clone()), other);
    }

    #[test]
    fn cookies_are_found_by_name_and_kept_to_the_login() {
        let (plain, secure) = ("http://127.0.0.1:1/", "https://mcp.example.com/");
        let [plain, secure] = [plain, secure].map(|url| Origin(Url::parse(url).unwrap()));
        let ticket = Ticket::new().unwrap();
        let set = |origin: &Origin| {
            let response = ticket.redirect(origin, "https://as.example/authorize?a=1&state=old").unwrap();
            let location = response.headers()[header::LOCATION].to_str().unwrap().to_owned();
            assert_eq!(location, format!("https://as.example/authorize?a=1&state={}", ticket.state));
            response.headers()[header::SET_COOKIE].to_str().unwrap().to_owned()
        };
        assert!(set(&secure).starts_with("__Secure-mcp-api-login-"));
        assert!(set(&secure).ends_with("; Path=/auth; Max-Age=600; HttpOnly; SameSite=Lax; Secure"));
        assert!(set(&plain).starts_with("mcp-api-login-") && !set(&plain).contains("Secure"));
        assert!(!set(&plain).contains(&ticket.state));
        let mut headers = HeaderMap::new();
        let line = format!("a=b; {}", set(&plain).split(';').next().unwrap());
        headers.insert(header::COOKIE, line.parse().unwrap());
        let name = cookie_name(&plain, &ticket.id);
        let (_, found) = cookies(&headers).find(|(found, _)| *found == name).unwrap();
        assert_eq!(LoginId::of(found).as_str(), ticket.browser());
        assert!(ticket.redirect(&plain, "javascript:alert(1)").is_err());
    }
}
