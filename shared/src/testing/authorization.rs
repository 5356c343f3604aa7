//! An OAuth 2.1 authorization server on loopback whose users agree to everything at once, and that can
//! fail in the ways in which such servers do. Refresh tokens rotate, and one that is used twice costs the
//! whole family its validity, as RFC 9700 asks.
//!
//! ```no_run
//! use mcp_shared::testing::authorization::Authorization;
//! let authorization = Authorization::start();
//! // A remote server names `authorization.issuer()`. A test is the browser:
//! let back = authorization.browse(&format!("{}/authorize?client_id=...", authorization.issuer()));
//! ```

use std::{
    collections::BTreeMap,
    io::{BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use url::Url;

use super::http::{self, Request};

mod grants;
mod metadata;
#[cfg(test)]
mod tests;

pub use grants::{Granted, Tokens};

/// What kind of authorization server it is.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What stands behind the host in its issuer identifier: empty, or `/tenant`.
    pub path: String,
    /// Whether its metadata is at `/.well-known/oauth-authorization-server/tenant`.
    pub oauth_metadata: bool,
    /// Whether its metadata is at `/.well-known/openid-configuration/tenant`.
    pub oidc_inserted: bool,
    /// Whether its metadata is at `/tenant/.well-known/openid-configuration`.
    pub oidc_appended: bool,
    /// The `issuer` of its metadata, where that is not its own.
    pub other_issuer: Option<String>,
    /// `code_challenge_methods_supported`; `None`: the metadata has no such member.
    pub challenge_methods: Option<Vec<String>>,
    /// Whether an https URL will do as the id of a client. Nothing is fetched from there.
    pub client_documents: bool,
    /// Whether clients can register.
    pub registration: bool,
    /// `token_endpoint_auth_methods_supported`. A client that registers without a wish gets the first.
    pub auth_methods: Vec<String>,
    /// Whether the answer to the browser has `iss`, and the metadata says so.
    pub iss: bool,
    /// The `iss` of that answer, where that is not its own.
    pub other_iss: Option<String>,
    /// Whether the user refuses.
    pub denies: bool,
    /// Who the user is.
    pub subject: String,
    /// The only resource for which there are tokens; `None`: any, and none.
    pub resource: Option<String>,
    /// `scopes_supported`.
    pub scopes: Vec<String>,
    /// How long access tokens are good for.
    pub lifetime: Duration,
    /// Whether answers with tokens say how long.
    pub says_lifetime: bool,
    /// Whether there are refresh tokens.
    pub refreshable: bool,
    /// Whether a refresh token is good for one use.
    pub rotation: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Self {
            path: String::new(),
            oauth_metadata: true,
            oidc_inserted: false,
            oidc_appended: false,
            other_issuer: None,
            challenge_methods: Some(texts(&["S256"])),
            client_documents: false,
            registration: true,
            auth_methods: texts(&["none", "client_secret_basic", "client_secret_post"]),
            iss: true,
            other_iss: None,
            denies: false,
            subject: "somebody".to_owned(),
            resource: None,
            scopes: texts(&["tools", "offline_access"]),
            lifetime: Duration::from_secs(3_600),
            says_lifetime: true,
            refreshable: true,
            rotation: true,
        }
    }
}

/// How requests to some path are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// With this status and an empty object.
    Status(u16),
    /// With this status and body.
    Says(u16, String),
    /// With a page.
    Garbage,
    /// Not at all, until the fault is taken away.
    Hang,
    /// With a redirect that keeps the method and the body, to this address.
    Redirect(String),
    /// With 64 MiB.
    Huge,
    /// The request is handled, and the connection ends before the answer.
    Lost,
}

/// A request as the server saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// `GET`.
    pub method: String,
    /// The path, without the query.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The parameters of query and form.
    pub params: BTreeMap<String, String>,
    /// The body as it came.
    pub body: String,
}

/// An authorization server. It ends when this is dropped.
pub struct Authorization {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    address: SocketAddr,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    settings: Settings,
    faults: BTreeMap<String, Fault>,
    delay: Duration,
    over: bool,
    seen: Vec<Seen>,
    /// How far the clock of the tokens is ahead.
    ahead: Duration,
    grants: grants::Grants,
}

impl Authorization {
    /// Starts one with the default settings.
    pub fn start() -> Self {
        Self::start_with(Settings::default())
    }

    /// Starts one.
    pub fn start_with(settings: Settings) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback can be listened on");
        let address = listener.local_addr().expect("a listener has an address");
        let state = Mutex::new(State { settings, ..State::default() });
        let shared = Arc::new(Shared { address, state });
        let own = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if own.state().over {
                    return;
                }
                let (Ok(stream), shared) = (stream, Arc::clone(&own)) else { continue };
                thread::spawn(move || shared.serve(stream));
            }
        });
        Self { address, shared }
    }

    /// Its issuer identifier.
    pub fn issuer(&self) -> String {
        self.shared.issuer()
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what it is.
    pub fn change(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.shared.state().settings);
    }

    /// Makes requests to paths that begin so fail (`/token`, `/register`, `/.well-known`), or with `None`
    /// work again.
    pub fn fault(&self, path: &str, fault: Option<Fault>) {
        let mut state = self.shared.state();
        match fault {
            Some(fault) => state.faults.insert(path.to_owned(), fault),
            None => state.faults.remove(path),
        };
    }

    /// Makes `/token` take its time. What it does to the tokens it does before.
    pub fn delay(&self, delay: Duration) {
        self.shared.state().delay = delay;
    }

    /// Knows a client from now on; one without a secret is public.
    pub fn add_client(&self, id: &str, secret: Option<&str>, redirect_uris: &[&str]) {
        self.shared.state().grants.add_client(id, secret, redirect_uris);
    }

    /// Forgets a client.
    pub fn forget_client(&self, id: &str) {
        self.shared.state().grants.forget_client(id);
    }

    /// Tokens without a login.
    pub fn mint(&self, client: &str, subject: &str, resource: Option<&str>) -> Tokens {
        let mut state = self.shared.state();
        let (now, settings) = (state.now(), state.settings.clone());
        state.grants.mint(&settings, now, client, subject, resource)
    }

    /// Whose access token this is, if it is good.
    pub fn accepts(&self, token: &str) -> Option<String> {
        self.granted(token).map(|granted| granted.subject)
    }

    /// What an access token stands for, if it is good.
    pub fn granted(&self, token: &str) -> Option<Granted> {
        let state = self.shared.state();
        state.grants.granted(token, state.now())
    }

    /// Puts the clock of the tokens forward.
    pub fn advance(&self, time: Duration) {
        self.shared.state().ahead += time;
    }

    /// Makes all access tokens that were given so far bad.
    pub fn expire_all(&self) {
        self.shared.state().grants.expire_all();
    }

    /// Makes all tokens that were given so far bad, refresh tokens too.
    pub fn revoke_all(&self) {
        self.shared.state().grants.revoke_all();
    }

    /// How often somebody asked for a refresh, whatever came of it.
    pub fn refreshes(&self) -> usize {
        self.count("/token", Some("refresh_token"))
    }

    /// How often `/token` was asked for anything.
    pub fn token_requests(&self) -> usize {
        self.count("/token", None)
    }

    /// How often somebody registered, whatever came of it.
    pub fn registrations(&self) -> usize {
        self.count("/register", None)
    }

    /// How often a refresh token came that had been used before.
    pub fn reuses(&self) -> usize {
        self.shared.state().grants.reuses()
    }

    /// All requests so far, in the order in which they came.
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.state().seen.clone()
    }

    /// Whether this text was anywhere in any request.
    pub fn has_seen(&self, text: &str) -> bool {
        self.requests().iter().any(|seen| {
            seen.path.contains(text)
                || seen.body.contains(text)
                || seen.headers.iter().any(|(_, value)| value.contains(text))
                || seen.params.values().any(|value| value.contains(text))
        })
    }

    /// Opens a login's address as the user's browser does, and returns where that is sent.
    ///
    /// # Panics
    ///
    /// When the address does not belong to this server, or it does not redirect.
    pub fn browse(&self, url: &str) -> String {
        let parsed = Url::parse(url).expect("the address of a login is a URL");
        assert_eq!(parsed.socket_addrs(|| None).ok(), Some(vec![self.address]), "{url} leads elsewhere");
        let target = &url[url.find(parsed.path()).expect("the URL has its path")..];
        let target = if parsed.path() == "/" { parsed.path() } else { target };
        let request = format!("GET {target} HTTP/1.1\r\nhost: {}\r\n\r\n", self.address);
        let (status, headers, body) =
            http::fetch(&self.address.to_string(), &request).expect("the server answers");
        let location = headers.into_iter().find(|(name, _)| name == "location");
        match location {
            Some((_, location)) if status == 302 => location,
            _ => panic!("{status}: {body}"),
        }
    }

    fn count(&self, path: &str, grant: Option<&str>) -> usize {
        let state = self.shared.state();
        let path = format!("{}{path}", state.settings.path);
        let asked = state.seen.iter().filter(|seen| seen.method == "POST" && seen.path == path);
        asked
            .filter(|seen| grant.is_none() || seen.params.get("grant_type").map(String::as_str) == grant)
            .count()
    }
}

impl Drop for Authorization {
    fn drop(&mut self) {
        self.shared.state().over = true;
        // The thread that waits for a connection sees it then.
        let _ = TcpStream::connect(self.address);
    }
}

/// What is answered.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: String,
}

impl Answer {
    fn json(status: u16, body: &Value) -> Self {
        let headers = vec![("content-type", "application/json".into()), ("cache-control", "no-store".into())];
        Self { status, headers, body: body.to_string() }
    }

    /// An error of RFC 6749, 5.2.
    fn error(status: u16, error: &str, description: &str) -> Self {
        Self::json(status, &json!({"error": error, "error_description": description}))
    }

    fn redirect(status: u16, to: String) -> Self {
        Self { status, headers: vec![("location", to)], body: String::new() }
    }
}

impl State {
    fn now(&self) -> Instant {
        Instant::now() + self.ahead
    }

    fn fault_at(&self, path: &str) -> Option<Fault> {
        let path = path.strip_prefix(self.settings.path.as_str()).unwrap_or(path);
        self.faults
            .iter()
            .find(|(prefix, _)| path.starts_with(prefix.as_str()))
            .map(|(_, fault)| fault.clone())
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn issuer(&self) -> String {
        format!("http://{}{}", self.address, self.state().settings.path)
    }

    /// One request on a connection; clients open as many as they need.
    fn serve(&self, stream: TcpStream) {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
        let mut reader = BufReader::new(stream);
        let Some(request) = Request::read(&mut reader) else { return };
        let mut stream = reader.into_inner();
        let mut params: BTreeMap<String, String> = request.query().into_iter().collect();
        if request.header("content-type").is_some_and(|kind| kind.contains("form-urlencoded")) {
            params.extend(request.form());
        }
        self.state().seen.push(Seen {
            method: request.method.clone(),
            path: request.path.clone(),
            headers: request.headers.clone(),
            params: params.clone(),
            body: String::from_utf8_lossy(&request.body).into_owned(),
        });
        let fault = self.state().fault_at(&request.path);
        let answer = match fault {
            Some(Fault::Status(status)) => Answer::json(status, &json!({})),
            Some(Fault::Says(status, body)) => {
                Answer { status, headers: vec![("content-type", "application/json".into())], body }
            }
            Some(Fault::Garbage) => Answer {
                status: 200,
                headers: vec![("content-type", "text/html".into())],
                body: "<html>oops</html>".into(),
            },
            Some(Fault::Redirect(to)) => Answer::redirect(307, to),
            Some(Fault::Huge) => return huge(&mut stream),
            Some(Fault::Hang) => {
                while self.state().fault_at(&request.path) == Some(Fault::Hang) && !self.state().over {
                    thread::sleep(Duration::from_millis(20));
                }
                return;
            }
            Some(Fault::Lost) => {
                self.answer(&request, &params);
                return;
            }
            None => self.answer(&request, &params),
        };
        let delay = if request.path.ends_with("/token") { self.state().delay } else { Duration::ZERO };
        thread::sleep(delay);
        let mut headers: Vec<(&str, &str)> =
            answer.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        headers.push(("connection", "close"));
        // Who does not wait for the answer does not want it.
        let _ = http::respond(&mut stream, answer.status, &headers, answer.body.as_bytes());
    }

    fn answer(&self, request: &Request, params: &BTreeMap<String, String>) -> Answer {
        let issuer = self.issuer();
        let mut state = self.state();
        let settings = state.settings.clone();
        let now = state.now();
        let path = request.path.as_str();
        let own = path.strip_prefix(settings.path.as_str()).unwrap_or(path);
        if path.contains("/.well-known/") {
            return match metadata::is_at(&settings, path) {
                true => Answer::json(200, &metadata::document(&settings, &issuer, self.address)),
                false => Answer::error(404, "not_found", "there is nothing"),
            };
        }
        match (request.method.as_str(), own) {
            ("GET", "/authorize") => state.grants.authorize(&settings, &issuer, params),
            ("POST", "/token") => {
                let authorization = request.header("authorization");
                state.grants.token(&settings, now, params, authorization)
            }
            ("POST", "/register") if settings.registration => state.grants.register(&settings, &request.body),
            ("POST", "/introspect") => {
                let token = params.get("token").map(String::as_str).unwrap_or_default();
                Answer::json(
                    200,
                    &match state.grants.granted(token, now) {
                        Some(granted) => {
                            json!({"active": true, "sub": granted.subject, "aud": granted.resource,
                        "client_id": granted.client, "scope": granted.scope})
                        }
                        None => json!({"active": false}),
                    },
                )
            }
            _ => Answer::error(404, "not_found", "there is nothing"),
        }
    }
}

fn huge(stream: &mut TcpStream) {
    const BYTES: usize = 64 * 1024 * 1024;
    let length = BYTES.to_string();
    let head = http::head(200, &[("content-type", "application/json"), ("content-length", &length)]);
    let _ = stream.write_all(head.as_bytes());
    let chunk = vec![b' '; 64 * 1024];
    for _ in 0..BYTES / chunk.len() {
        if stream.write_all(&chunk).is_err() {
            return;
        }
    }
}
