//! How users' tokens for remote servers come here: posted by somebody else, or through a browser. The
//! browser is the test, which follows no redirect by itself: addresses in them may be anybody's.

use std::collections::BTreeMap;

use mcp_shared::testing::authorization::{Authorization, Settings};
use reqwest::{Client, header, redirect::Policy};
use serde_json::{Value, json};
use url::Url;

use crate::deployment::{Answer, Builder, Deployment};

/// Where browsers are told to find the program. Nothing is ever sent there.
const PUBLIC: &str = "https://mcp.example.com";

pub fn builder() -> Builder {
    Deployment::builder().env("EGRESS_ALLOW", "127.0.0.0/8").env("RUST_LOG", "trace")
}

/// Registers a remote server whose authorization server this is. Whether it answers otherwise is not what
/// these tests are about.
async fn add_remote(api: &Deployment, name: &str, authorization: &Authorization) {
    let url = format!("{}/mcp", authorization.issuer());
    let body = json!({"name": name, "transportType": "streamable_http", "url": url, "enabled": false});
    api.post("/mcp/servers", &body).await.ok();
}

/// A browser's request, to the gateways in turn.
pub async fn open(api: &Deployment, address: &str, cookie: Option<&str>) -> Answer {
    let client = Client::builder().redirect(Policy::none()).no_proxy().build().unwrap();
    let mut request = client.get(format!("{}{address}", api.base()));
    if let Some(cookie) = cookie {
        request = request.header(header::COOKIE, cookie);
    }
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Answer { status, headers, text: response.text().await.unwrap() }
}

/// A login that was begun.
pub struct Begun {
    /// Where the browser is sent.
    pub location: String,
    parameters: BTreeMap<String, String>,
    /// The whole line.
    set_cookie: String,
}

impl Begun {
    /// Begins one.
    pub async fn at(api: &Deployment, address: &str) -> Self {
        let answer = open(api, address, None).await;
        assert_eq!(answer.status, 302, "{}", answer.text);
        let text = |name: header::HeaderName| answer.headers[name].to_str().unwrap().to_owned();
        let location = text(header::LOCATION);
        assert_eq!(text(header::CACHE_CONTROL), "no-store");
        let parameters = Url::parse(&location).unwrap().query_pairs().into_owned().collect();
        Self { set_cookie: text(header::SET_COOKIE), parameters, location }
    }

    /// What the browser sends back.
    pub fn cookie(&self) -> &str {
        self.set_cookie.split(';').next().unwrap()
    }
}

/// Path and query of an address.
pub fn local(url: &str) -> String {
    let url = Url::parse(url).unwrap();
    format!("{}?{}", url.path(), url.query().unwrap_or_default())
}

/// Asserts that texts are in no log and in no file.
pub fn nowhere(api: &Deployment, texts: &[&str]) {
    fn search(folder: &std::path::Path, texts: &[&str]) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                search(&path, texts);
                continue;
            }
            let content = std::fs::read(&path).unwrap();
            for text in texts {
                let found = content.windows(text.len()).any(|part| part == text.as_bytes());
                assert!(!found, "{text} is in {}", path.display());
            }
        }
    }
    search(api.data().path(), texts);
}

#[tokio::test]
async fn posted_tokens_are_checked_and_kept_encrypted() {
    let api = builder().start().await;
    let authorization = Authorization::start();
    add_remote(&api, "remote", &authorization).await;
    api.add_fixture("local", &[], json!({})).await;
    let good = json!({
        "username": "alice", "tokenType": "bearer", "accessToken": "access-canary-5fa1",
        "refreshToken": "refresh-canary-8b02", "expiresIn": 3600, "scopes": ["read", "write"],
        "clientId": "client", "clientSecret": "secret-canary-77c3",
        "redirectUri": "https://example.com/webhooks/oauth/callback/123", "codeVerifier": "verifier-canary-19d4",
    });
    let answer = api.post("/mcp/servers/remote/oauth", &good).await.ok().json();
    assert_eq!(answer, json!({"success": true, "serverName": "remote"}));
    // The least that is needed, and what other clients write.
    for body in [
        json!({"accessToken": "a"}),
        json!({"accessToken": "a", "scopes": "read write", "expiresIn": null, "refreshToken": "", "issuer": null}),
        json!({"accessToken": "a", "issuer": "https://login.example.com/tenant"}),
    ] {
        api.post("/mcp/servers/remote/oauth", &body).await.ok();
    }
    for (field, value) in [
        ("accessToken", json!(null)),
        ("accessToken", json!("")),
        ("accessToken", json!(1)),
        ("accessToken", json!("a b")),
        ("accessToken", json!("a\r\nX: y")),
        ("accessToken", json!("x".repeat(20_000))),
        ("tokenType", json!("mac")),
        ("refreshToken", json!(["x"])),
        ("refreshToken", json!("x".repeat(70_000))),
        ("expiresIn", json!(0)),
        ("expiresIn", json!(-1)),
        ("expiresIn", json!("soon")),
        ("expiresIn", json!(1e300)),
        ("scopes", json!(1)),
        ("scopes", json!([1])),
        ("scopes", json!(["a b"])),
        ("clientId", json!("a\u{0}b")),
        ("clientId", json!({"$ne": ""})),
        ("redirectUri", json!("not a url")),
        ("issuer", json!("ftp://example.com")),
        ("username", json!("")),
    ] {
        let mut body = good.clone();
        body[field] = value.clone();
        let answer = api.post("/mcp/servers/remote/oauth", &body).await.fails(400, "invalid_request");
        assert!(answer.json()["error"].as_str().unwrap().contains(field), "{field}: {}", answer.text);
    }
    api.post("/mcp/servers/local/oauth", &good).await.fails(400, "invalid_request");
    api.post("/mcp/servers/absent/oauth", &good).await.fails(404, "server_not_found");
    api.post("/mcp/servers/absent/oauth", &json!([])).await.fails(400, "invalid_request");
    for _ in 0..2 {
        api.delete("/mcp/servers/remote/oauth?username=alice").await.ok();
    }
    api.delete("/mcp/servers/absent/oauth").await.fails(404, "server_not_found");
    nowhere(&api, &["access-canary", "refresh-canary", "secret-canary", "verifier-canary"]);
    assert_eq!(authorization.token_requests(), 0);
}

#[tokio::test]
async fn a_browser_is_led_to_the_authorization_server_and_back() {
    let api = builder().env("PUBLIC_URL", PUBLIC).start().await;
    let authorization = Authorization::start();
    add_remote(&api, "remote", &authorization).await;
    let begun = Begun::at(&api, "/auth/remote/login?username=alice").await;
    assert!(
        begun.location.starts_with(&format!("{}/authorize?", authorization.issuer())),
        "{}",
        begun.location
    );
    assert_eq!(begun.parameters["response_type"], "code");
    assert_eq!(begun.parameters["code_challenge_method"], "S256");
    assert_eq!(begun.parameters["redirect_uri"], format!("{PUBLIC}/auth/callback"));
    assert!(begun.parameters["resource"].starts_with(&authorization.issuer()));
    let state = begun.parameters["state"].clone();
    assert_eq!((state.len(), begun.location.matches("state=").count()), (43, 1));
    let flags = begun.set_cookie.split_once(';').unwrap().1;
    assert_eq!(flags.trim(), "Path=/auth; Max-Age=600; HttpOnly; SameSite=Lax; Secure");
    assert!(begun.cookie().starts_with("__Secure-mcp-api-login-"));

    let back = local(&authorization.browse(&begun.location));
    let (name, value) = begun.cookie().split_once('=').unwrap();
    let other = Begun::at(&api, "/auth/remote/login?username=mallory").await;
    let reversed: String = value.chars().rev().collect();
    for cookie in [
        None,
        Some(other.cookie().to_owned()),
        Some(format!("{name}={reversed}")),
        Some(format!("{name}=")),
        Some(format!("{name}={}", other.cookie().split_once('=').unwrap().1)),
    ] {
        open(&api, &back, cookie.as_deref()).await.fails(400, "invalid_state");
    }
    for address in ["/auth/callback", "/auth/callback?code=x", "/auth/callback?code=x&state=nobodys"] {
        open(&api, address, Some(begun.cookie())).await.fails(400, "invalid_state");
    }
    let twice = format!("{back}&state={state}");
    open(&api, &twice, Some(begun.cookie())).await.fails(400, "invalid_request");
    // The other kind of login has another end.
    let elsewhere = back.replace("/auth/callback", "/auth/google/callback");
    open(&api, &elsewhere, Some(begun.cookie())).await.fails(400, "invalid_state");
    assert_eq!(authorization.token_requests(), 0);

    let page = open(&api, &back, Some(begun.cookie())).await.ok();
    assert_eq!(page.headers["content-type"], "text/html; charset=utf-8");
    assert!(page.headers["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
    assert_eq!(
        (&page.headers["referrer-policy"], &page.headers["cache-control"]),
        (&"no-referrer".parse().unwrap(), &"no-store".parse().unwrap())
    );
    assert!(page.headers["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    assert!(page.text.contains("Logged in"), "{}", page.text);
    open(&api, &back, Some(begun.cookie())).await.fails(400, "invalid_state");
    assert_eq!((authorization.token_requests(), authorization.registrations()), (1, 1));

    // A login ends for all gateways and workers.
    let code = Url::parse(&format!("http://x{back}")).unwrap();
    let code = code.query_pairs().find(|(name, _)| name == "code").unwrap().1.into_owned();
    nowhere(&api, &[&code, &state, value]);
    api.delete("/mcp/servers/remote/oauth?username=alice").await.ok();
}

#[tokio::test]
async fn a_login_that_cannot_be_says_so() {
    let api = builder().start().await;
    let authorization = Authorization::start_with(Settings { denies: true, ..Settings::default() });
    add_remote(&api, "remote", &authorization).await;
    let begun = Begun::at(&api, "/auth/remote/login").await;
    assert!(begun.parameters["redirect_uri"].starts_with("http://127.0.0.1:"));
    assert!(!begun.set_cookie.contains("Secure"));
    let back = local(&authorization.browse(&begun.location));
    open(&api, &back, Some(begun.cookie())).await.fails(502, "login_failed");
    open(&api, &back, Some(begun.cookie())).await.fails(400, "invalid_state");
    // Another server answers than the one that was asked.
    authorization.change(|settings| {
        settings.denies = false;
        settings.other_iss = Some("https://login.example.com".to_owned());
    });
    let begun = Begun::at(&api, "/auth/remote/login").await;
    let back = local(&authorization.browse(&begun.location));
    open(&api, &back, Some(begun.cookie())).await.fails(502, "login_failed");
    assert_eq!(authorization.token_requests(), 0);

    authorization.change(|settings| settings.challenge_methods = Some(vec!["plain".to_owned()]));
    open(&api, "/auth/remote/login", None).await.fails(502, "login_failed");
    authorization.change(|settings| settings.oauth_metadata = false);
    open(&api, "/auth/remote/login", None).await.fails(502, "login_failed");
    api.add_fixture("local", &[], json!({})).await;
    open(&api, "/auth/local/login", None).await.fails(400, "invalid_request");
    open(&api, "/auth/absent/login", None).await.fails(404, "server_not_found");
    open(&api, "/auth/remote/login?username=%00", None).await.fails(400, "invalid_request");
    open(&api, "/auth/client.json", None).await.fails(404, "not_found");
    // Nobody listens on the discard port.
    let body = json!({"name": "gone", "transportType": "streamable_http", "url": "http://127.0.0.1:9/mcp", "enabled": false});
    api.post("/mcp/servers", &body).await.ok();
    open(&api, "/auth/gone/login", None).await.fails(502, "upstream_unavailable");
}

#[tokio::test]
async fn an_authorization_server_may_read_who_we_are() {
    let api = builder().env("PUBLIC_URL", PUBLIC).start().await;
    let settings = Settings { client_documents: true, ..Settings::default() };
    let authorization = Authorization::start_with(settings);
    add_remote(&api, "remote", &authorization).await;
    let document = open(&api, "/auth/client.json", None).await.ok().json();
    assert_eq!(document["client_id"], format!("{PUBLIC}/auth/client.json"));
    assert_eq!(document["redirect_uris"], json!([format!("{PUBLIC}/auth/callback")]));
    let begun = Begun::at(&api, "/auth/remote/login").await;
    assert_eq!(begun.parameters["client_id"], document["client_id"].as_str().unwrap());
    let back = local(&authorization.browse(&begun.location));
    open(&api, &back, Some(begun.cookie())).await.ok();
    assert_eq!(authorization.registrations(), 0);
}

/// What Google gives to an application.
pub const CREDENTIALS: &str = r#"{"web":{"client_id":"app.example","client_secret":"GOCSPX-canary-41c7"}}"#;

fn google(more: Value) -> Value {
    let mut env = json!({"MCP_AUTH_TYPE": "OAUTH2_GOOGLE"});
    env.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    json!({"env": env})
}

async fn arguments(api: &Deployment, user: &str, server: &str) -> Value {
    serde_json::from_str(&api.call_as(user, server, "args", json!({"q": 1})).await.tool_text()).unwrap()
}

#[tokio::test]
async fn a_user_lets_a_server_act_at_google() {
    let api = builder().env("GOOGLE_OAUTH_CREDENTIALS", CREDENTIALS).start().await;
    api.add_fixture("workspace", &["--more"], google(json!({}))).await;
    let answer = api.call_as("user 1", "workspace", "args", json!({})).await.fails(401, "reauth_required");
    let answer = answer.json();
    assert_eq!(answer["outcome"], "not_started");
    let login = answer["loginUrl"].as_str().unwrap();
    assert!(login.starts_with("http://127.0.0.1:"), "{login}");
    assert_eq!(local(login), "/auth/google/login?user_id=user+1&server_name=workspace");
    let body = json!({"username": "user 1", "serverName": "workspace", "methodName": "args"});
    let request = api.request(reqwest::Method::POST, "/mcp/tool/call").json(&body);
    let events = api.send(request.header("accept", "text/event-stream")).await.ok();
    assert!(events.text.contains("event: error") && events.text.contains("\"loginUrl\":"), "{}", events.text);

    let begun = Begun::at(&api, "/auth/google/login?user_id=user%201").await;
    assert!(
        begun.location.starts_with("https://accounts.example/authorize?scope=mail"),
        "{}",
        begun.location
    );
    let redirect = Url::parse(&begun.parameters["redirect_uri"]).unwrap();
    assert_eq!(redirect.path(), "/auth/google/callback");
    let back =
        |code: &str, state: &str| format!("/auth/google/callback?code={code}&state={state}&scope=mail");
    let state = begun.parameters["state"].as_str();
    open(&api, &back("good-code-canary", state), None).await.fails(400, "invalid_state");
    // What mcp-api took for a state.
    let forged = "%7B%22userId%22%3A%22victim%22%7D";
    open(&api, &back("good-code-canary", forged), Some(begun.cookie())).await.fails(400, "invalid_state");
    open(&api, &back("good-code-canary", state), Some(begun.cookie())).await.ok();
    open(&api, &back("good-code-canary", state), Some(begun.cookie())).await.fails(400, "invalid_state");

    let credentials: Value = serde_json::from_str(CREDENTIALS).unwrap();
    let tokens = json!({"access_token": "access-good-code-canary", "refresh_token": "refresh-good-code-canary",
        "token_type": "Bearer"});
    let expected = json!({"q": 1, "gauthFileContent": credentials, "userCredentials": tokens});
    assert_eq!(arguments(&api, "user 1", "workspace").await, expected);
    api.call_as("other", "workspace", "args", json!({})).await.fails(401, "reauth_required");
    // A caller cannot bring tokens of its own, and secrets go along as for any server.
    api.set_secret("user 1", "workspace", "K", "v").await.ok();
    let own = json!({"q": 1, "userCredentials": "mine"});
    let text = api.call_as("user 1", "workspace", "args", own).await.tool_text();
    let got: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&got["userCredentials"], &got["K"]), (&tokens, &json!("v")));
    // What the server says out loud is blotted out.
    api.call_as("user 1", "workspace", "log_secret", json!({})).await.ok();
    let begun = Begun::at(&api, "/auth/google/login?user_id=bad&server_name=workspace").await;
    let (cookie, state) = (Some(begun.cookie()), begun.parameters["state"].as_str());
    open(&api, &back("bad-code", state), cookie).await.fails(502, "login_failed");
    let begun = Begun::at(&api, "/auth/google/login?user_id=bad").await;
    let (cookie, state) = (Some(begun.cookie()), begun.parameters["state"].as_str());
    let denied = format!("/auth/google/callback?error=access_denied&state={state}");
    open(&api, &denied, cookie).await.fails(502, "login_failed");
    nowhere(&api, &["code-canary", "GOCSPX-canary"]);

    api.add_fixture("second", &[], google(json!({"MCP_AUTH_TOKENS_PARAM": "auth"}))).await;
    open(&api, "/auth/google/login?user_id=x", None).await.fails(400, "invalid_request");
    open(&api, "/auth/google/login", None).await.fails(400, "invalid_request");
    api.add_fixture("plain", &[], json!({})).await;
    open(&api, "/auth/google/login?user_id=x&server_name=plain", None).await.fails(400, "invalid_request");
    open(&api, "/auth/google/login?user_id=x&server_name=absent", None).await.fails(404, "server_not_found");
    api.set_secret("bob", "second", "GOOGLE_OAUTH_TOKENS", r#"{"access_token":"bobs"}"#).await.ok();
    let got = arguments(&api, "bob", "second").await;
    assert_eq!(got, json!({"q": 1, "auth": {"access_token": "bobs"}, "gauthFileContent": credentials}));
}

#[tokio::test]
async fn a_server_for_google_needs_the_applications_credentials() {
    let api = builder().start().await;
    open(&api, "/auth/google/login?user_id=x", None).await.fails(404, "server_not_found");
    api.add_fixture("workspace", &["--more"], google(json!({}))).await;
    let answer = api.call("workspace", "args", json!({})).await.fails(502, "server_unavailable");
    assert!(answer.json()["error"].as_str().unwrap().contains("GOOGLE_OAUTH_CREDENTIALS"), "{}", answer.text);
    open(&api, "/auth/google/login?user_id=x", None).await.fails(502, "server_unavailable");
}
