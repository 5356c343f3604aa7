//! Rows about who is asking (1, 2) and about what not even administrators may have run (22).

use std::collections::BTreeSet;

use mcp_shared::timestamp::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};

use super::{
    case::{Case, Row},
    request::Request,
};
use crate::{
    deployment::{Deployment, eventually, fixture},
    stored,
};

/// The keys of a deployment that asks for some.
struct Keys {
    /// May do everything.
    admin: String,
    /// Anna's, for calls and secrets.
    anna: String,
    /// No keys, or none any more: what is wrong, and what stands in `Authorization`.
    bad: Vec<(&'static str, String)>,
}

/// Asks for something with a key.
async fn asked(api: &Deployment, key: &str, method: Method, path: &str, body: &Value) -> Value {
    let request = api.request(method, path).header("Authorization", format!("Bearer {key}"));
    let answer = api.send(request.json(body)).await;
    assert!(matches!(answer.status, 200 | 201), "{}", answer.text);
    answer.json()
}

impl Keys {
    async fn make(api: &Deployment) -> Self {
        let admin = first_key(api);
        let make = async |more: Value| {
            let mut body = json!({"name": "a test", "user": "anna", "scopes": ["call", "secrets"]});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let made = asked(api, &admin, Method::POST, "/admin/api-keys", &body).await;
            (made["apiKey"]["id"].as_str().unwrap().to_owned(), made["key"].as_str().unwrap().to_owned())
        };
        let (_, anna) = make(json!({})).await;
        let (revoked_id, revoked) = make(json!({})).await;
        let soon = Timestamp::from_millis(Timestamp::now().millis() + 2_000);
        let (_, expired) = make(json!({ "expiresAt": soon })).await;
        asked(api, &admin, Method::DELETE, &format!("/admin/api-keys/{revoked_id}"), &json!({})).await;
        let works = async |key: &str| {
            // Every gateway is asked.
            let mut statuses = BTreeSet::new();
            for _ in 0..2 {
                let request =
                    api.request(Method::GET, "/mcp/tools").header("Authorization", format!("Bearer {key}"));
                statuses.insert(api.send(request).await.status);
            }
            statuses
        };
        eventually("the key is known", async || works(&anna).await == BTreeSet::from([200])).await;
        for over in [&revoked, &expired] {
            eventually("the key is over", async || works(over).await == BTreeSet::from([401])).await;
        }
        let (known, _) = anna.rsplit_once('_').unwrap();
        let bearer = |key: &str| format!("Bearer {key}");
        let bad = vec![
            ("a wrong key", bearer(&format!("{known}_{}", "A".repeat(43)))),
            ("half a key", bearer(&anna[..anna.len() - 1])),
            ("a key and more", bearer(&format!("{anna}x"))),
            ("a revoked key", bearer(&revoked)),
            ("an expired key", bearer(&expired)),
            ("nonsense", bearer("nonsense")),
            ("an unsigned token", bearer("eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm5hIn0.")),
            ("nothing", "Bearer ".to_owned()),
            ("another scheme", "Basic YW5uYTphbm5h".to_owned()),
        ];
        Self { admin, anna, bad }
    }
}

/// The key that the first start made: with one of the gateways' data.
fn first_key(api: &Deployment) -> String {
    let folders = if crate::CLUSTER { vec!["gateway-0/data", "gateway-1/data"] } else { vec!["data"] };
    let mut files = folders.into_iter().map(|folder| api.data().path().join(folder).join("admin.key"));
    let text = files.find_map(|file| std::fs::read_to_string(file).ok()).expect("one of them made a key");
    text.trim().to_owned()
}

/// Every route that the program has, so that none can be forgotten: method, path, and who may come.
fn routes() -> Vec<(&'static str, String, String)> {
    let output = Deployment::builder().command().arg("routes").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let routes: Vec<_> = text
        .lines()
        .map(|line| {
            let mut words = line.split_whitespace();
            let method = match words.next().unwrap() {
                "GET" => "GET",
                "POST" => "POST",
                "PUT" => "PUT",
                "DELETE" => "DELETE",
                other => panic!("another method: {other}"),
            };
            let path = words.next().unwrap();
            let path = ["{name}", "{server}", "{id}", "{*name}"]
                .iter()
                .fold(path.to_owned(), |path, part| path.replace(part, "echo"));
            (method, path, words.collect::<Vec<_>>().join(" "))
        })
        .collect();
    assert!(routes.len() > 30, "{text}");
    routes
}

fn with_key(request: Request, key: &str) -> Request {
    request.header("Authorization", format!("Bearer {key}"))
}

fn strangers(keys: &Keys) -> Row {
    let mut row = Row::new("1");
    let mut open = Vec::new();
    for (method, path, access) in routes() {
        if access == "public" {
            open.push(path);
            continue;
        }
        let request = || Request::json(method, &path, &json!({"serverName": "echo", "methodName": "args"}));
        row = row
            .refused(format!("nobody to {method} {path}"), request(), 401, "unauthorized")
            .with("www-authenticate", "");
        for (what, header) in &keys.bad {
            let request = request().header("Authorization", header.as_str());
            row = row
                .refused(format!("{what} to {method} {path}"), request, 401, "unauthorized")
                .with("www-authenticate", "");
        }
    }
    assert_eq!(open, ["/healthz", "/readyz", "/auth/callback", "/auth/client.json", "/auth/google/callback"]);
    // Whoever has no key does not learn what there is, either.
    for request in [Request::new("GET", "/nowhere"), Request::new("PATCH", "/mcp/tools")] {
        row = row.refused("nobody to no route", request, 401, "unauthorized").with("www-authenticate", "");
    }
    let twice = with_key(with_key(Request::new("GET", "/mcp/tools"), &keys.anna), &keys.admin);
    row.refused("two keys", twice, 400, "invalid_request")
}

fn others(keys: &Keys) -> Row {
    let bodies = [
        ("POST", "/mcp/tool/call", json!({"serverName": "echo", "methodName": "args"})),
        ("POST", "/secrets/set", json!({"serverName": "echo", "secretName": "K", "secretValue": "v"})),
        ("POST", "/secrets/delete", json!({"serverName": "echo", "secretName": "K"})),
        ("POST", "/mcp/servers/web/oauth", json!({"accessToken": "token"})),
    ];
    let addresses = [
        ("DELETE", "/mcp/servers/web/oauth?username="),
        ("GET", "/auth/web/login?username="),
        ("GET", "/auth/google/login?server_name=echo&user_id="),
    ];
    let mut row = Row::new("2");
    for user in ["ben", "default", "Anna", "anna "] {
        for (method, target, body) in &bodies {
            let mut body = body.clone();
            body["username"] = user.into();
            let request = with_key(Request::json(method, target, &body), &keys.anna);
            row = row.refused(format!("{user} to {target}"), request, 403, "forbidden_user");
        }
        for (method, target) in addresses {
            let request = Request::new(method, format!("{target}{}", user.replace(' ', "%20")));
            row = row.refused(
                format!("{user} to {target}"),
                with_key(request, &keys.anna),
                403,
                "forbidden_user",
            );
        }
    }
    let own = json!({"username": "anna", "serverName": "echo", "methodName": "args"});
    row.fine("her own name", with_key(Request::call(&own), &keys.anna))
}

fn commands(keys: &Keys) -> Row {
    let server = |more: &Value| {
        let mut body = json!({"name": "new", "command": "node", "enabled": false});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Request::json("POST", "/mcp/servers", &body)
    };
    let change = |more: &Value| Request::json("PUT", "/mcp/servers/echo", more);
    let mut row = Row::new("22");
    for (more, code) in [
        (json!({"command": "sh"}), "command_not_allowed"),
        (json!({"command": "/bin/sh", "args": ["-c", "x"]}), "command_not_allowed"),
        (json!({"command": "/bin/sh -c x"}), "command_not_allowed"),
        (json!({"env": {"LD_PRELOAD": "x"}}), "env_not_allowed"),
        (json!({"env": {"NODE_OPTIONS": "--require x"}}), "env_not_allowed"),
    ] {
        for (what, request) in [("a new one", server(&more)), ("a change", change(&more))] {
            let name = format!("{what} with {more}");
            row = row.refused(name.clone(), with_key(request.clone(), &keys.admin), 400, code).refused(
                format!("{name} by a user"),
                with_key(request, &keys.anna),
                403,
                "forbidden",
            );
        }
    }
    row
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_others_and_shells_are_refused() {
    let api = Deployment::builder().env("AUTH", "keys").start().await;
    let keys = Keys::make(&api).await;
    asked(&api, &keys.admin, Method::POST, "/mcp/servers", &fixture("echo", &["--more"])).await;
    let web = json!({"name": "web", "transportType": "streamable_http", "url": "https://mcp.example.org/mcp",
        "enabled": false});
    asked(&api, &keys.admin, Method::POST, "/mcp/servers", &web).await;
    let before = stored::settled(&api.data()).await;
    let cases: Vec<Case> =
        [strangers(&keys), others(&keys), commands(&keys)].into_iter().flat_map(Row::cases).collect();
    let mut faults = Vec::new();
    for case in &cases {
        let host = api.address().to_owned();
        let received = case.request.send(&host).await;
        let wrong = case.faults(&host, &received);
        let good = json!({"serverName": "echo", "methodName": "echo", "args": {"text": "still here"}});
        let next = with_key(Request::call(&good), &keys.anna).send(&host).await;
        if !wrong.is_empty() || next.status != 200 {
            faults.push(format!(
                "row {} ({}): {wrong:?} {} {}",
                case.row, case.name, received.text, next.status
            ));
        }
    }
    assert!(faults.is_empty(), "{} of {}:\n{}", faults.len(), cases.len(), faults.join("\n"));
    assert_eq!(stored::settled(&api.data()).await, before, "something was stored");
    assert!(!api.log().contains("panicked"));
}
