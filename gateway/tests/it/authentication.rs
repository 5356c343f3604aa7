//! Who may do what: API keys, their scopes and their reach, and the user that each is of.

use std::process::Output;

use mcp_shared::testing::{authorization::Authorization, remote::Remote};
use reqwest::{Method, header};
use serde_json::{Value, json};

use crate::{
    FIXTURE,
    deployment::{Answer, Builder, Deployment, eventually},
    logins::{local, open},
};

/// Runs a subcommand of the gateway with a deployment's settings.
fn subcommand(builder: &Builder, arguments: &[&str]) -> Output {
    builder.command().args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned()
}

/// A deployment that asks for keys, whose own requests are made with one that may do everything.
async fn asking() -> Deployment {
    let builder = Deployment::builder().env("AUTH", "keys");
    let key = stdout(&subcommand(
        &builder,
        &[
            "api-keys",
            "create",
            "--name",
            "a test's",
            "--user",
            "root",
            "--scopes",
            "call,secrets,admin,impersonate,metrics",
        ],
    ));
    builder.key(&key).start().await
}

/// A new key.
pub async fn make_key(api: &Deployment, user: &str, scopes: &[&str], more: Value) -> String {
    let mut body = json!({"name": "a test's", "user": user, "scopes": scopes});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = api.post("/admin/api-keys", &body).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer.json()["key"].as_str().unwrap().to_owned()
}

async fn send(
    api: &Deployment,
    key: Option<&str>,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Answer {
    let request = api.request_with(key, method, path);
    api.send(match body {
        Some(body) => request.json(body),
        None => request,
    })
    .await
}

/// Every route, as the program lists them: method, path with names filled in, and what it needs.
fn routes(api: &Deployment) -> Vec<(Method, String, String)> {
    let listed = stdout(&subcommand(&Deployment::builder().data(&api.data()), &["routes"]));
    let routes: Vec<_> = listed
        .lines()
        .map(|line| {
            let mut words = line.split_whitespace();
            let (method, path) = (words.next().unwrap(), words.next().unwrap());
            let path = ["{id}", "{name}", "{*name}", "{server}"]
                .iter()
                .fold(path.to_owned(), |path, part| path.replace(part, "some-name"));
            (method.parse().unwrap(), path, words.collect::<Vec<_>>().join(" "))
        })
        .collect();
    assert!(routes.len() > 30, "{listed}");
    routes
}

#[tokio::test]
async fn every_route_but_the_public_ones_needs_a_credential_and_its_scope() {
    let api = asking().await;
    let scopes = ["call", "secrets", "admin", "impersonate", "metrics"];
    let mut keys = Vec::new();
    for scope in scopes {
        keys.push((scope, make_key(&api, "alice", &[scope], json!({})).await));
    }
    let mut open_ones = Vec::new();
    let unknown = [
        (Method::GET, "/nowhere".to_owned(), "anything".to_owned()),
        (Method::PATCH, "/mcp/servers".to_owned(), "anything".to_owned()),
        (Method::GET, "/admin".to_owned(), "anything".to_owned()),
    ];
    for (method, path, needs) in routes(&api).into_iter().chain(unknown) {
        for wrong in [
            None,
            Some("mcpk_abcdefghijkm_0123456789012345678901234567890123456789012"),
            Some("x.y.z"),
            Some(""),
        ] {
            let answer = send(&api, wrong, method.clone(), &path, None).await;
            if needs == "public" {
                assert_ne!((answer.status, answer.code().as_str()), (401, "unauthorized"), "{method} {path}");
                continue;
            }
            let answer = answer.fails(401, "unauthorized");
            assert!(
                answer.headers["www-authenticate"].to_str().unwrap().starts_with("Bearer"),
                "{method} {path}"
            );
        }
        if needs == "public" {
            open_ones.push(path);
            continue;
        }
        for (scope, key) in &keys {
            let answer = send(&api, Some(key), method.clone(), &path, None).await;
            let refused = (answer.status, answer.code().as_str()) == (403, "forbidden");
            let needed = needs.split(", or ").last().unwrap();
            assert_eq!(
                refused,
                needed != "anything" && needed != *scope,
                "{method} {path} with {scope}: {}",
                answer.text
            );
        }
    }
    assert_eq!(
        open_ones,
        ["/healthz", "/readyz", "/auth/callback", "/auth/client.json", "/auth/google/callback"]
    );
    // A credential is one header, and one credential.
    let twice = api.request(Method::GET, "/mcp/servers").header("authorization", "Bearer x");
    api.send(twice).await.fails(400, "invalid_request");
    let basic = api.request_with(None, Method::GET, "/mcp/servers").basic_auth("alice", Some("x"));
    api.send(basic).await.fails(401, "unauthorized");
}

/// Each of several gateways is found by its address, which is in nobody's settings. What a browser is led to by a name
/// comes without a credential.
#[tokio::test]
async fn metrics_are_shown_by_any_name_to_whoever_has_the_scope() {
    let api = asking().await;
    let scraper = make_key(&api, "prometheus", &["metrics"], json!({})).await;
    let caller = make_key(&api, "alice", &["call", "secrets", "admin"], json!({})).await;
    for host in ["10.0.0.7:8080", "[2001:db8::7]:8080", "gateway-2.example.org", "evil.com"] {
        let get = |key: Option<&str>, path: &str| {
            api.send(api.request_with(key, Method::GET, path).header(header::HOST, host))
        };
        let shown = get(Some(&scraper), "/metrics").await.ok();
        assert!(shown.text.contains("mcp_http_requests_total"), "{host}: {}", shown.text);
        get(None, "/metrics").await.fails(401, "unauthorized");
        get(Some(&caller), "/metrics").await.fails(403, "forbidden");
        // A name is checked everywhere else, whatever the key.
        for path in ["/fleet", "/mcp/servers", "/metrics/", "/nowhere"] {
            for key in [Some(scraper.as_str()), api.key(), None] {
                get(key, path).await.fails(403, "host_not_allowed");
            }
        }
    }
    // Pages are refused by where they come from, too.
    let page = api.request_with(Some(&scraper), Method::GET, "/metrics");
    api.send(page.header(header::ORIGIN, "http://evil.com")).await.fails(403, "origin_not_allowed");
}

#[tokio::test]
async fn the_user_is_who_the_key_says_everywhere() {
    let api = asking().await;
    api.add_fixture("echo", &[], json!({})).await;
    let alice = make_key(&api, "alice", &["call", "secrets"], json!({})).await;
    let bob = make_key(&api, "bob", &["call", "secrets", "admin"], json!({})).await;
    let set = json!({"serverName": "echo", "secretName": "token", "secretValue": "alices-own"});
    send(&api, Some(&alice), Method::POST, "/secrets/set", Some(&set)).await.ok();

    let url = "http://127.0.0.1:9/mcp";
    let remote = json!({"name": "remote", "transportType": "streamable_http", "url": url, "enabled": false});
    api.post("/mcp/servers", &remote).await.ok();
    // Every place in which a request can name a user.
    let call = json!({"serverName": "echo", "methodName": "args", "args": {}});
    let tokens = json!({"accessToken": "x"});
    let places = [
        (Method::POST, "/mcp/tool/call", Some(call.clone())),
        (Method::POST, "/secrets/set", Some(set.clone())),
        (Method::POST, "/secrets/delete", Some(json!({"serverName": "echo", "secretName": "token"}))),
        (Method::POST, "/mcp/servers", Some(json!({"name": "new", "command": "node"}))),
        (Method::PUT, "/mcp/servers/echo", Some(json!({"description": "bob was here"}))),
        (Method::POST, "/packages/install", Some(json!({"name": "a", "serverName": "a"}))),
        (Method::PUT, "/packages/a/upgrade", Some(json!({}))),
        (Method::POST, "/mcp/servers/remote/oauth", Some(tokens)),
        (Method::DELETE, "/mcp/servers/remote/oauth?username=alice", None),
        (Method::GET, "/auth/remote/login?username=alice", None),
        (Method::GET, "/auth/google/login?user_id=alice", None),
    ];
    for (method, path, body) in places {
        let body = body.map(|mut body| {
            body["username"] = json!("alice");
            body
        });
        let answer = send(&api, Some(&bob), method.clone(), path, body.as_ref()).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (403, "forbidden_user"),
            "{method} {path}: {}",
            answer.text
        );
    }
    // Hidden in other fields, the name is nobody's.
    let mut sneaky = call.clone();
    sneaky["user"] = json!("alice");
    sneaky["args"] = json!({"username": "alice"});
    let answer = send(&api, Some(&bob), Method::POST, "/mcp/tool/call", Some(&sneaky)).await.ok();
    assert!(!answer.text.contains("alices-own"), "{}", answer.text);
    let answer = send(&api, Some(&alice), Method::POST, "/mcp/tool/call", Some(&call)).await.ok();
    assert!(answer.text.contains("alices-own"), "{}", answer.text);
    // Who may act for others does so by naming them, and is themselves otherwise.
    let answer = api.call_as("alice", "echo", "args", json!({})).await.ok();
    assert!(answer.text.contains("alices-own"), "{}", answer.text);
    let answer = send(&api, api.key(), Method::POST, "/mcp/tool/call", Some(&call)).await.ok();
    assert!(!answer.text.contains("alices-own"), "{}", answer.text);
}

#[tokio::test]
async fn a_key_reaches_what_it_lists() {
    let api = asking().await;
    for name in ["one", "two"] {
        api.add_fixture(name, &[], json!({"env": {"SOME_TOKEN": "seen by admins"}})).await;
    }
    let key =
        make_key(&api, "alice", &["call", "secrets"], json!({"servers": ["one"], "tools": ["echo"]})).await;
    let key = Some(key.as_str());
    let call =
        |server: &str, tool: &str| json!({"serverName": server, "methodName": tool, "args": {"text": "hi"}});
    send(&api, key, Method::POST, "/mcp/tool/call", Some(&call("one", "echo"))).await.ok();
    for (server, tool) in [("one", "pid"), ("two", "echo"), ("nowhere", "echo")] {
        let answer = send(&api, key, Method::POST, "/mcp/tool/call", Some(&call(server, tool))).await;
        let answer = answer.fails(403, "forbidden");
        assert_eq!(answer.json()["outcome"], "not_started");
    }
    let listed = send(&api, key, Method::GET, "/mcp/servers", None).await.ok();
    assert_eq!(listed.json()["servers"].as_array().unwrap().len(), 1, "{}", listed.text);
    assert!(!listed.text.contains("seen by admins"), "{}", listed.text);
    let tools = send(&api, key, Method::GET, "/mcp/tools", None).await.ok();
    assert!(tools.text.contains("\"one\"") && !tools.text.contains("\"two\""), "{}", tools.text);
    send(&api, key, Method::GET, "/mcp/servers/two", None).await.fails(403, "forbidden");
    let secret = json!({"serverName": "two", "secretName": "a", "secretValue": "b"});
    send(&api, key, Method::POST, "/secrets/set", Some(&secret)).await.fails(403, "forbidden");
    assert!(api.get("/mcp/servers/two").await.ok().text.contains("seen by admins"));

    for (body, status) in [
        (json!({"name": "x", "user": "a", "scopes": ["admin"], "servers": ["one"]}), 400),
        (json!({"name": "x", "user": "a", "scopes": []}), 400),
        (json!({"name": "x", "user": "a", "scopes": ["root"]}), 400),
        (json!({"name": "x", "user": "a", "scopes": "call"}), 400),
        (json!({"name": "x", "user": "", "scopes": ["call"]}), 400),
        (json!({"user": "a", "scopes": ["call"]}), 400),
        (json!({"name": "x", "user": "a", "scopes": ["call"], "servers": []}), 400),
        (json!({"name": "x", "user": "a", "scopes": ["call"], "servers": ["../x"]}), 400),
        (json!({"name": "x", "user": "a", "scopes": ["call"], "expiresAt": "soon"}), 400),
        (json!({"name": "x", "user": "a", "scopes": ["call"], "expiresAt": "2020-01-01T00:00:00Z"}), 400),
    ] {
        assert_eq!(api.post("/admin/api-keys", &body).await.status, status, "{body}");
    }
    // Nobody gives away what they do not have.
    let admin = make_key(&api, "carol", &["admin"], json!({})).await;
    let more = json!({"name": "x", "user": "carol", "scopes": ["admin", "impersonate"]});
    send(&api, Some(&admin), Method::POST, "/admin/api-keys", Some(&more)).await.fails(403, "forbidden");
}

#[tokio::test]
async fn a_key_is_shown_once_and_ends_when_it_is_revoked() {
    let api = asking().await;
    let made =
        api.post("/admin/api-keys", &json!({"name": "short", "user": "alice", "scopes": ["call"]})).await;
    let (id, key) = (made.json()["apiKey"]["id"].clone(), made.json()["key"].as_str().unwrap().to_owned());
    let secret = key.rsplit_once('_').unwrap().1.to_owned();
    // At once, at whichever gateway.
    for _ in 0..4 {
        send(&api, Some(&key), Method::GET, "/mcp/servers", None).await.ok();
    }
    let listed = api.get("/admin/api-keys").await.ok();
    let listed = (listed.json()["apiKeys"].clone(), listed.text);
    assert!(listed.0.as_array().unwrap().iter().any(|key| key["id"] == id), "{}", listed.1);
    assert!(!listed.1.contains(&secret) && !listed.1.contains("hash"), "{}", listed.1);
    assert!(!api.log().contains(&secret));
    let path = format!("/admin/api-keys/{}", id.as_str().unwrap());
    api.delete(&path).await.ok();
    eventually("the key ends everywhere", async || {
        let mut refused = 0;
        for _ in 0..4 {
            refused +=
                usize::from(send(&api, Some(&key), Method::GET, "/mcp/servers", None).await.status == 401);
        }
        refused == 4
    })
    .await;
    api.delete(&path).await.fails(404, "api_key_not_found");
}

#[tokio::test]
async fn keys_are_made_by_a_subcommand_as_well() {
    let builder = Deployment::builder().env("AUTH", "keys");
    let data = builder.place();
    let create = ["api-keys", "create", "--name", "n", "--user", "alice", "--scopes", "call,metrics"];
    let key = stdout(&subcommand(&builder, &create));
    let id = key.split('_').nth(1).unwrap().to_owned();
    let listed = stdout(&subcommand(&builder, &["api-keys", "list"]));
    assert!(listed.contains(&id) && listed.contains("alice") && listed.contains("call,metrics"), "{listed}");
    assert!(!listed.contains(&key));
    for bad in [
        &["api-keys", "create", "--name", "n", "--user", "alice", "--scopes", "root"][..],
        &["api-keys", "create", "--name", "n", "--user", "", "--scopes", "call"],
        &["api-keys", "revoke", "nosuchkey"],
    ] {
        assert!(!subcommand(&builder, bad).status.success(), "{bad:?}");
    }
    let api = builder.key(&key).start().await;
    api.get("/mcp/servers").await.ok();
    drop(api);
    let again = Deployment::builder().env("AUTH", "keys").data(&data);
    stdout(&subcommand(&again, &["api-keys", "revoke", &id]));
    assert!(!stdout(&subcommand(&again, &["api-keys", "list"])).contains(&id));
}

#[tokio::test]
async fn the_first_start_makes_a_key_that_only_the_owner_of_the_files_can_read() {
    if crate::CLUSTER {
        // There it is beside one of the gateways, which the deployment cannot tell in advance.
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let api = Deployment::builder().env("AUTH", "keys").start().await;
    let path = api.data().path().join("data/admin.key");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let key = std::fs::read_to_string(&path).unwrap().trim().to_owned();
    send(&api, Some(&key), Method::GET, "/admin/api-keys", None).await.ok();
    assert!(!api.log().contains(&key));
    let data = api.data();
    api.stop().await;
    std::fs::remove_file(&path).unwrap();
    // Not again: whoever took it away wanted it so.
    let api = Deployment::builder().env("AUTH", "keys").data(&data).start().await;
    assert!(!path.exists());
    send(&api, Some(&key), Method::GET, "/admin/api-keys", None).await.ok();
}

#[tokio::test]
async fn a_login_link_is_for_one_user_and_one_server() {
    let authorization = Authorization::start();
    let api = asking().await;
    let remote = Remote::start(FIXTURE, &["--auth", &authorization.issuer()]);
    for name in ["one", "two"] {
        let body = json!({"name": name, "transportType": "streamable_http", "url": remote.url()});
        api.post("/mcp/servers", &body).await.ok();
    }
    let alice = make_key(&api, "alice", &["call", "secrets"], json!({})).await;
    // Whoever has the scope may begin a login of their own.
    let answer = send(&api, Some(&alice), Method::GET, "/auth/one/login?username=bob", None).await;
    answer.fails(403, "forbidden_user");
    assert_eq!(open(&api, "/auth/one/login", None).await.status, 401);
    for bad in
        ["/auth/one/login?ticket=", "/auth/one/login?ticket=x", "/auth/one/login?ticket=%24mg1%24k1%24AAAA"]
    {
        let answer = open(&api, bad, None).await;
        assert_eq!((answer.status, answer.code().as_str()), (401, "unauthorized"), "{bad}");
    }
    // The link that a call that needs a login is answered with.
    let call = json!({"serverName": "one", "methodName": "echo", "args": {"text": "hi"}});
    let refused = send(&api, Some(&alice), Method::POST, "/mcp/tool/call", Some(&call)).await;
    let refused = refused.fails(401, "reauth_required").json();
    let link = local(refused["loginUrl"].as_str().unwrap());
    assert!(link.starts_with("/auth/one/login?username=alice&ticket="), "{link}");
    assert_eq!(open(&api, &link, None).await.status, 302);
    for (from, to) in
        [("username=alice", "username=bob"), ("/auth/one/", "/auth/two/"), ("ticket=", "ticket=x")]
    {
        let other = link.replacen(from, to, 1);
        let status = open(&api, &other, None).await.status;
        assert!(matches!(status, 401 | 403), "{other}: {status}");
    }
    let twice = format!("{link}&ticket=x");
    assert_ne!(open(&api, &twice, None).await.status, 302);
}
