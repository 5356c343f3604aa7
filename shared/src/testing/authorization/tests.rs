use super::*;

const BACK: &str = "http://127.0.0.1:1/callback?kept=1";
const VERIFIER: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const CHALLENGE: &str = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";

fn post(server: &Authorization, path: &str, kind: &str, headers: &str, body: &str) -> (u16, Value) {
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    let (status, _, body) = http::fetch(&server.address().to_string(), &request).unwrap();
    (status, serde_json::from_str(&body).unwrap_or_default())
}

fn form(server: &Authorization, headers: &str, fields: &[(&str, &str)]) -> (u16, Value) {
    let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
    post(server, "/token", "application/x-www-form-urlencoded", headers, &body)
}

fn get(server: &Authorization, path: &str) -> (u16, Value) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
    let (status, _, body) = http::fetch(&server.address().to_string(), &request).unwrap();
    (status, serde_json::from_str(&body).unwrap_or_default())
}

fn login(server: &Authorization, client: &str) -> BTreeMap<String, String> {
    let mut url = Url::parse(&format!("{}/authorize", server.issuer())).unwrap();
    url.query_pairs_mut().extend_pairs([
        ("response_type", "code"),
        ("client_id", client),
        ("redirect_uri", BACK),
        ("state", "a b&c"),
        ("code_challenge", CHALLENGE),
        ("code_challenge_method", "S256"),
        ("resource", "http://mcp.test/mcp"),
        ("scope", "tools"),
    ]);
    let back = Url::parse(&server.browse(url.as_str())).unwrap();
    back.query_pairs().into_owned().collect()
}

#[test]
fn a_client_registers_logs_in_and_refreshes() {
    let server = Authorization::start();
    let (status, metadata) = get(&server, "/.well-known/oauth-authorization-server");
    assert_eq!((status, metadata["issuer"].as_str()), (200, Some(server.issuer().as_str())));
    assert_eq!(get(&server, "/.well-known/openid-configuration").0, 404);
    let wish = json!({"redirect_uris": [BACK], "token_endpoint_auth_method": "none"}).to_string();
    let (status, client) = post(&server, "/register", "application/json", "", &wish);
    assert_eq!(status, 201, "{client}");
    let id = client["client_id"].as_str().unwrap();
    let back = login(&server, id);
    assert_eq!((back["state"].as_str(), back["kept"].as_str()), ("a b&c", "1"));
    assert_eq!(back["iss"], server.issuer());
    let fields = |verifier| {
        [
            ("grant_type", "authorization_code"),
            ("code", back["code"].as_str()),
            ("redirect_uri", BACK),
            ("client_id", id),
            ("code_verifier", verifier),
            ("resource", "http://mcp.test/mcp"),
        ]
    };
    let (status, tokens) = form(&server, "", &fields(VERIFIER));
    assert_eq!(status, 200, "{tokens}");
    assert_eq!(form(&server, "", &fields(VERIFIER)).1["error"], "invalid_grant", "a code is used once");
    let access = tokens["access_token"].as_str().unwrap();
    assert_eq!(server.accepts(access).as_deref(), Some("somebody"));
    assert_eq!(server.granted(access).unwrap().resource.as_deref(), Some("http://mcp.test/mcp"));
    server.advance(Duration::from_secs(3_601));
    assert_eq!(server.accepts(access), None);

    let refresh = |token: &str| {
        form(&server, "", &[("grant_type", "refresh_token"), ("refresh_token", token), ("client_id", id)])
    };
    let first = tokens["refresh_token"].as_str().unwrap();
    let (status, tokens) = refresh(first);
    assert_eq!(status, 200, "{tokens}");
    let access = tokens["access_token"].as_str().unwrap();
    assert_eq!(server.accepts(access).as_deref(), Some("somebody"));
    // The first one again: everything that came of it is bad.
    assert_eq!(refresh(first).1["error"], "invalid_grant");
    assert_eq!(server.accepts(access), None);
    assert_eq!(refresh(tokens["refresh_token"].as_str().unwrap()).1["error"], "invalid_grant");
    assert_eq!((server.refreshes(), server.reuses(), server.registrations()), (3, 1, 1));
    assert_eq!(server.token_requests(), 5);
    assert!(server.has_seen(VERIFIER) && !server.has_seen("nothing of the kind"));
}

#[test]
fn a_wrong_verifier_or_secret_gets_nothing() {
    let server = Authorization::start();
    server.add_client("basic id", Some("s:e c"), &[BACK]);
    let back = login(&server, "basic id");
    let fields = |verifier| {
        [
            ("grant_type", "authorization_code"),
            ("code", back["code"].as_str()),
            ("redirect_uri", BACK),
            ("code_verifier", verifier),
        ]
    };
    let header = |pair: &str| {
        use base64::Engine;
        format!("authorization: Basic {}\r\n", base64::engine::general_purpose::STANDARD.encode(pair))
    };
    assert_eq!(form(&server, &header("basic+id:wrong"), &fields(VERIFIER)).1["error"], "invalid_client");
    assert_eq!(form(&server, &header("basic+id:s%3Ae+c"), &fields("wrong")).1["error"], "invalid_grant");
    let minted = server.mint("basic id", "alice", None);
    assert_eq!(server.accepts(&minted.access).as_deref(), Some("alice"));
    let body = format!("token={}", minted.access);
    let kind = "application/x-www-form-urlencoded";
    assert_eq!(post(&server, "/introspect", kind, "", &body).1["sub"], "alice");
    server.expire_all();
    assert_eq!(post(&server, "/introspect", kind, "", &body).1["active"], false);
    let refresh = [("grant_type", "refresh_token"), ("refresh_token", minted.refresh.as_deref().unwrap())];
    assert_eq!(form(&server, &header("basic+id:s%3Ae+c"), &refresh).0, 200);
}

#[test]
fn it_fails_as_it_is_told() {
    let server = Authorization::start_with(Settings {
        path: "/tenant".to_owned(),
        oauth_metadata: false,
        oidc_appended: true,
        denies: true,
        ..Settings::default()
    });
    assert_eq!(get(&server, "/.well-known/oauth-authorization-server/tenant").0, 404);
    let (_, metadata) = get(&server, "/tenant/.well-known/openid-configuration");
    assert_eq!(metadata["issuer"], server.issuer());
    server.add_client("public", None, &[BACK]);
    assert_eq!(login(&server, "public")["error"], "access_denied");
    server.fault("/token", Some(Fault::Status(500)));
    let kind = "application/x-www-form-urlencoded";
    assert_eq!(post(&server, "/tenant/token", kind, "", "grant_type=refresh_token").0, 500);
    server.fault("/token", Some(Fault::Redirect("http://127.0.0.1:2/".to_owned())));
    assert_eq!(post(&server, "/tenant/token", kind, "", "grant_type=refresh_token").0, 307);
    assert_eq!(server.refreshes(), 2);
    server.fault("/token", None);
    assert_eq!(post(&server, "/tenant/token", kind, "", "grant_type=x&client_id=public").0, 400);
}
