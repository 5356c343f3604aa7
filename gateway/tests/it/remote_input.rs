//! What may be said about remote servers: everything else is refused before anything is stored, and nothing
//! is sent to addresses that are not public, however they are spelled.

use serde_json::{Value, json};

use crate::deployment::{Answer, Deployment, eventually};

const URL: &str = "https://mcp.example.org/mcp";
const CANARY: &str = "canary-4b7d";

/// A remote server that is good but for `more`. It may not run: nobody is to be connected to.
fn remote(more: Value) -> Value {
    let mut body =
        json!({"name": "remote", "transportType": "streamable_http", "url": URL, "enabled": false});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The same as a package's.
fn package(more: Value) -> Value {
    let mut body = remote(json!({"name": "left-pad", "serverName": "remote"}));
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// A deployment that permits nothing beside public addresses.
async fn guarded() -> Deployment {
    Deployment::builder().env("EGRESS_ALLOW", "").start().await
}

async fn impact(api: &Deployment, field: &str) -> Value {
    api.get("/mcp/servers/remote/delete-impact").await.ok().json()["impact"][field].clone()
}

#[track_caller]
fn says(answer: &Answer, words: &str) {
    let error = answer.json()["error"].as_str().unwrap().to_owned();
    assert!(error.contains(words), "{error}");
}

/// Sends a bad field in all requests that could have it. Nothing is stored, and nothing changes.
async fn refused_everywhere(api: &Deployment, more: &Value, code: &str, words: &str) {
    let before = api.server("good").await;
    let mut change = more.clone();
    change.as_object_mut().unwrap().entry("transportType").or_insert("streamable_http".into());
    for answer in [
        api.post("/mcp/servers", &remote(more.clone())).await,
        api.put("/mcp/servers/good", Some(&change)).await,
        api.post("/packages/install", &package(more.clone())).await,
    ] {
        let answer = answer.fails(400, code);
        says(&answer, words);
        assert!(!answer.text.contains(CANARY), "{}", answer.text);
    }
    assert_eq!(api.server("good").await, before);
    assert_eq!(api.get("/mcp/servers").await.ok().json()["servers"].as_array().unwrap().len(), 2);
    assert_eq!(api.get("/packages/jobs").await.ok().json()["jobs"], json!([]));
}

async fn with_a_good_one(api: &Deployment) {
    api.post("/mcp/servers", &remote(json!({"name": "good"}))).await.ok();
}

#[tokio::test]
async fn addresses_that_are_not_public_are_refused_however_they_are_spelled() {
    let api = guarded().await;
    with_a_good_one(&api).await;
    for url in [
        "http://127.0.0.1",
        "http://127.0.0.1:21099/mcp",
        "http://127.1",
        "http://2130706433",
        "http://0x7f000001",
        "http://0177.0.0.1",
        "http://127.0.0.1.",
        "http://127。0。0。1",
        "http://0.0.0.0",
        "http://10.1.2.3",
        "https://172.16.0.1/mcp",
        "https://192.168.1.1/mcp",
        "http://169.254.169.254/latest/meta-data",
        "http://100.64.0.1",
        "http://[::1]",
        "http://[::]",
        "http://[::ffff:7f00:1]",
        "http://[::ffff:a9fe:a9fe]",
        "http://[64:ff9b::7f00:1]",
        "http://[2002:7f00:1::]",
        "http://[fe80::1]",
        "http://[fd00:ec2::254]",
        "http://localhost",
        "http://localhost.",
        "http://LOCALHOST:8080",
        "http://a.localhost",
    ] {
        refused_everywhere(&api, &json!({ "url": url }), "blocked_address", "Blocked private or local").await;
    }
}

#[tokio::test]
async fn what_is_no_url_of_a_remote_server_is_refused() {
    let api = Deployment::start().await;
    with_a_good_one(&api).await;
    let long = format!("https://mcp.example.org/{}", "x".repeat(8_192));
    for (url, words) in [
        ("mcp.example.org", "not a URL"),
        ("https://", "not a URL"),
        ("file:///etc/passwd", "must begin with https:// or http://"),
        ("gopher://mcp.example.org", "must begin with https:// or http://"),
        ("https://user:canary-4b7d@mcp.example.org", "user name or a password"),
        ("https://user@mcp.example.org", "user name or a password"),
        ("https://mcp.example.org/#fragment", "fragment"),
        ("https://mcp.example.org:0/mcp", "port 0"),
        ("https://1.2.3.4.5/", "not a URL"),
        ("https://a b/", "spaces or control characters"),
        (" https://mcp.example.org", "spaces or control characters"),
        ("https://mcp.example\n.org", "spaces or control characters"),
        ("https://mcp.example.org/\u{0}", "spaces or control characters"),
        (&long, "at most 8192 bytes"),
    ] {
        refused_everywhere(&api, &json!({ "url": url }), "invalid_url", words).await;
    }
    for url in [json!(7), json!({"$ne": null}), json!([URL])] {
        refused_everywhere(&api, &json!({ "url": url }), "invalid_request", "url must be a string").await;
    }
}

#[tokio::test]
async fn headers_that_would_make_another_message_are_refused() {
    let api = Deployment::start().await;
    with_a_good_one(&api).await;
    for name in [
        "Host",
        "content-length",
        "Transfer-Encoding",
        "Connection",
        "Keep-Alive",
        "UPGRADE",
        "TE",
        "Trailer",
        "Proxy-Authorization",
        "Proxy-Connection",
        "Mcp-Session-Id",
        "MCP-Protocol-Version",
        "Mcp-Method",
        "Mcp-Name",
        "Mcp-Param-Anything",
        "Accept",
        "Content-Type",
        "Content-Encoding",
        "Accept-Encoding",
        "Last-Event-ID",
    ] {
        let headers = json!({"headers": {name: CANARY}});
        refused_everywhere(&api, &headers, "invalid_header", "set by the transport").await;
    }
    let many: serde_json::Map<String, Value> =
        (0..101).map(|number| (format!("X-{number}"), "v".into())).collect();
    for (headers, words) in [
        (json!({"X": "canary-4b7d\r\nY: b"}), "value of the header X"),
        (json!({"X": "canary-4b7d\u{0}"}), "value of the header X"),
        (json!({"X": "ž"}), "value of the header X"),
        (json!({"X: y": "canary-4b7d"}), "not a name"),
        (json!({"X\r\nY": "canary-4b7d"}), "not a name"),
        (json!({"": "canary-4b7d"}), "not a name"),
        (json!({"X-One": "canary-4b7d", "x-one": "b"}), "appears twice"),
        (Value::Object(many), "at most 100"),
        (json!({"X": "v".repeat(65_536)}), "65536 bytes together"),
    ] {
        refused_everywhere(&api, &json!({ "headers": headers }), "invalid_header", words).await;
    }
    for headers in [json!(["X"]), json!("X: y"), json!({"X": 7}), json!({"X": null})] {
        let headers = json!({ "headers": headers });
        refused_everywhere(&api, &headers, "invalid_request", "headers must be an object").await;
    }
}

#[tokio::test]
async fn other_fields_of_remote_servers_are_checked_as_well() {
    let api = Deployment::start().await;
    with_a_good_one(&api).await;
    let secret = "x".repeat(2_049);
    for (more, words) in [
        (json!({"command": "node"}), "cannot define stdio fields"),
        (json!({"env": {"A": "b"}}), "cannot define stdio fields"),
        (json!({"sessionId": "a b"}), "sessionId must be"),
        (json!({"sessionId": ""}), "sessionId must be"),
        (json!({"sessionId": "x".repeat(1_025)}), "sessionId must be"),
        (json!({"sessionId": 7}), "sessionId must be a string"),
        (json!({"reconnectionOptions": 7}), "reconnectionOptions must be an object"),
        (json!({"reconnectionOptions": {"maxRetries": -1}}), "maxRetries must be a whole number"),
        (json!({"reconnectionOptions": {"maxRetries": 1.5}}), "maxRetries must be a whole number"),
        (json!({"reconnectionOptions": {"maxRetries": "2"}}), "maxRetries must be a whole number"),
        (json!({"reconnectionOptions": {"maxReconnectionDelay": -1}}), "maxReconnectionDelay must be"),
        (json!({"reconnectionOptions": {"initialReconnectionDelay": 1e9}}), "initialReconnectionDelay must"),
        (json!({"reconnectionOptions": {"reconnectionDelayGrowFactor": 0.5}}), "GrowFactor must be a number"),
        (json!({"reconnectionOptions": {"maxRetry": 1}}), "reconnectionOptions can have"),
        (json!({"oauthClient": "id"}), "oauthClient must be an object"),
        (json!({"oauthClient": {}}), "oauthClient must be an object"),
        (json!({"oauthClient": {"clientId": ""}}), "clientId and clientSecret"),
        (json!({"oauthClient": {"clientId": "id", "clientSecret": ""}}), "clientId and clientSecret"),
        (json!({"oauthClient": {"clientId": "id", "clientSecret": secret}}), "clientId and clientSecret"),
        (json!({"oauthClient": {"clientId": "id", "scopes": ["a b"]}}), "scopes of oauthClient"),
        (json!({"oauthClient": {"clientId": "id", "scopes": "a"}}), "oauthClient must be an object"),
        (json!({"oauthClient": {"clientId": "id", "issuer": "x"}}), "oauthClient must be an object"),
        (json!({"secretEnv": {"A": "B"}}), "secretEnv needs a server of our own"),
        (json!({"secretEnv": {"A": "B"}, "isolation": "per_user"}), "secretEnv needs a server of our own"),
        (json!({"instances": 2}), "instances needs a server of our own"),
    ] {
        refused_everywhere(&api, &more, "invalid_request", words).await;
    }
    for (more, words) in [
        (json!({"url": URL}), "cannot define streamable_http fields"),
        (json!({"sessionId": "s"}), "cannot define streamable_http fields"),
        (json!({"oauthClient": {"clientId": "id"}}), "cannot define streamable_http fields"),
    ] {
        let mut body = json!({"name": "local", "command": "node"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        says(&api.post("/mcp/servers", &body).await.fails(400, "invalid_request"), words);
    }
    api.post("/mcp/servers", &remote(json!({"url": null}))).await.fails(400, "invalid_request");
}

#[tokio::test]
async fn indexes_of_requests_go_past_the_guard() {
    let api = guarded().await;
    let python = |field: &str, url: &str| {
        json!({"name": "requests", "serverName": "remote", "runtime": "python", "pythonModule": "requests",
            field: url})
    };
    for field in ["pipIndexUrl", "pipExtraIndexUrl"] {
        for (url, code) in [
            ("http://127.0.0.1:8080/simple", "blocked_address"),
            ("http://localhost/simple", "blocked_address"),
            ("http://169.254.169.254/", "blocked_address"),
            ("https://10.0.0.7/simple", "blocked_address"),
            ("https://[::ffff:10.0.0.7]/", "blocked_address"),
            ("https://pypi.example.org:0/simple", "invalid_url"),
            ("http://pypi.example.org/simple", "invalid_request"),
        ] {
            api.post("/packages/install", &python(field, url)).await.fails(400, code);
        }
    }
    assert_eq!(api.get("/packages/jobs").await.ok().json()["jobs"], json!([]));
}

#[tokio::test]
async fn what_is_said_of_a_remote_server_is_kept_and_credentials_are_not_shown() {
    let api = Deployment::start().await;
    let body = remote(json!({
        "headers": {"X-Custom-Header": "v", "Authorization": "Bearer static"}, "isolation": "per_user",
        "reconnectionOptions": {"maxReconnectionDelay": 4_000, "initialReconnectionDelay": 500,
            "reconnectionDelayGrowFactor": 1.5, "maxRetries": 7},
        "oauthClient": {"clientId": "id", "clientSecret": CANARY, "scopes": ["a", "b"]},
        "sessionId": format!("{CANARY}-session"), "toolTimeout": 5_000, "secretNames": ["A"],
    }));
    let added = api.post("/mcp/servers", &body).await.ok();
    let server = &added.json()["server"];
    assert_eq!((&server["status"], &server["authMode"]), (&json!("disconnected"), &json!("none")));
    for field in ["url", "headers", "reconnectionOptions", "toolTimeout", "transportType"] {
        assert_eq!(server[field], body[field], "{field}");
    }
    assert_eq!(server["oauthClient"], json!({"clientId": "id", "scopes": ["a", "b"]}));
    assert!(server.get("sessionId").is_none() && server.get("command").is_none(), "{server}");
    let mut seen = vec![added.text.clone()];

    // What was read can be sent back.
    let read = api.get("/mcp/servers/remote").await.ok();
    let again = api.put("/mcp/servers/remote", Some(&read.json()["server"])).await.ok();
    assert_eq!(again.json()["server"]["updatedAt"], read.json()["server"]["updatedAt"]);
    let change = json!({"url": "https://other.example.org/mcp", "headers": null, "reconnectionOptions": null,
        "oauthClient": {"clientId": "other"}});
    let changed = api.put("/mcp/servers/remote", Some(&change)).await.ok();
    let server = &changed.json()["server"];
    assert_eq!(server["url"], "https://other.example.org/mcp");
    assert!(server.get("headers").is_none() && server.get("reconnectionOptions").is_none(), "{server}");
    assert_eq!(server["oauthClient"], json!({"clientId": "other", "scopes": []}));
    seen.extend([read.text, again.text, changed.text, api.get("/mcp/servers").await.ok().text, api.log()]);
    for text in seen {
        assert!(!text.contains(CANARY), "{text}");
    }

    // It can become a server of our own, and one elsewhere again.
    let local = json!({"transportType": "stdio", "command": "node"});
    let server = api.put("/mcp/servers/remote", Some(&local)).await.ok().json()["server"].clone();
    assert!(server.get("url").is_none() && server.get("oauthClient").is_none(), "{server}");
    let back = json!({"transportType": "streamable_http", "url": URL});
    let server = api.put("/mcp/servers/remote", Some(&back)).await.ok().json()["server"].clone();
    assert!(server["url"] == URL && server.get("command").is_none(), "{server}");
    api.delete("/mcp/servers/remote").await.ok();
}

#[tokio::test]
async fn a_session_is_its_users_and_goes_with_the_server() {
    let api = Deployment::start().await;
    let session = |user: Value, id: Value| json!({"username": user, "sessionId": id});
    api.post("/mcp/servers", &remote(json!({"sessionId": CANARY}))).await.ok();
    assert_eq!(impact(&api, "activeSessionUsers").await, 1);
    // Without a name it was the default user's, and a new one takes its place.
    api.put("/mcp/servers/remote", Some(&session("default".into(), "second".into()))).await.ok();
    assert_eq!(impact(&api, "activeSessionUsers").await, 1);
    api.put("/mcp/servers/remote", Some(&session("alice".into(), "a".into()))).await.ok();
    assert_eq!(impact(&api, "activeSessionUsers").await, 2);
    assert_eq!(impact(&api, "oauthTokenUsers").await, 0);
    api.put("/mcp/servers/remote", Some(&session("bob".into(), Value::Null))).await.ok();
    api.put("/mcp/servers/remote", Some(&json!({"username": "alice", "description": "x"}))).await.ok();
    assert_eq!(impact(&api, "activeSessionUsers").await, 2);
    api.put("/mcp/servers/remote", Some(&session(Value::Null, Value::Null))).await.ok();
    assert_eq!(impact(&api, "activeSessionUsers").await, 1);
    api.put("/mcp/servers/missing", Some(&session("alice".into(), "a".into())))
        .await
        .fails(404, "server_not_found");

    api.delete("/mcp/servers/remote").await.ok();
    api.post("/mcp/servers", &remote(json!({}))).await.ok();
    assert_eq!(impact(&api, "activeSessionUsers").await, 0);
    eventually("the log has the removal", async || !api.log().is_empty()).await;
    assert!(!api.log().contains(CANARY));
}

/// The recorded answer to a server on loopback, where an operator permits it.
#[tokio::test]
async fn a_server_on_loopback_can_be_permitted() {
    let api = Deployment::start().await;
    let body = json!({"name": "http1", "transportType": "streamable_http", "url": "http://127.0.0.1:1/mcp",
        "enabled": false});
    let server = api.post("/mcp/servers", &body).await.ok().json()["server"].clone();
    let expected = json!({
        "name": "http1", "displayName": "http1", "description": "", "source": "platform", "authMode": "none",
        "secretFields": [], "transportType": "streamable_http", "url": "http://127.0.0.1:1/mcp",
        "status": "disconnected",
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&server[field], value, "{field}");
    }
    assert!(server.get("headers").is_none() && server.get("isolation").is_none(), "{server}");
}
