//! The audit log: every change is recorded before it is made, and what cannot be recorded is not done.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use mcp_shared::testing::{authorization::Authorization, remote::Remote};
use reqwest::Method;
use serde_json::{Value, json};
use url::Url;

use crate::{
    FIXTURE,
    deployment::{Answer, Deployment, eventually, fixture},
    logins::{Begun, CREDENTIALS, local, open},
    packages,
};

/// The audit logs of all programs of a deployment, also those that were put aside.
fn logs(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(logs(&path));
        } else if path.extension().is_some_and(|extension| extension == "jsonl") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The folders that they are in: one for each program.
fn folders(api: &Deployment) -> Vec<PathBuf> {
    let mut folders: Vec<_> =
        logs(api.data().path()).iter().filter_map(|log| Some(log.parent()?.to_owned())).collect();
    folders.dedup();
    folders
}

/// All lines of all programs.
pub fn lines(api: &Deployment) -> Vec<Value> {
    let text = logs(api.data().path()).into_iter().map(|path| fs::read_to_string(path).unwrap());
    text.collect::<String>().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The lines about a request.
fn of_request(api: &Deployment, request: &str) -> Vec<Value> {
    let mut lines = lines(api);
    lines.retain(|line| line["requestId"] == request);
    lines
}

/// What `audit verify` says of files.
fn verify(files: &[PathBuf]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-gateway"));
    command.env_clear().args(["audit", "verify"]).args(files).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test]
async fn every_change_leaves_a_line_before_and_one_after() {
    let canary = "canary-2f8e1c7a";
    let api = Deployment::start().await;
    let mut body = fixture("one", &["--more"]);
    body["env"] = json!({"API_KEY": canary});
    let secret =
        json!({"username": "alice", "serverName": "one", "secretName": "TOKEN", "secretValue": canary});
    let named = json!({"username": "alice", "serverName": "one", "secretName": "TOKEN"});
    let description = json!({"description": canary});
    let changes = [
        (api.post("/mcp/servers", &body).await.ok(), "server.create"),
        (api.put("/mcp/servers/one", Some(&description)).await.ok(), "server.update"),
        (api.put("/mcp/servers/one/disable", None).await.ok(), "server.disable"),
        (api.put("/mcp/servers/one/enable", None).await.ok(), "server.enable"),
        (api.post("/secrets/set", &secret).await.ok(), "secret.set"),
        (api.post("/secrets/delete", &named).await.ok(), "secret.delete"),
        (api.delete("/mcp/servers/one").await.ok(), "server.delete"),
    ];
    for (answer, action) in &changes {
        let request = answer.headers["x-request-id"].to_str().unwrap();
        eventually("the end is recorded as well", async || of_request(&api, request).len() == 2).await;
        let recorded = of_request(&api, request);
        let (allowed, done) = (&recorded[0], &recorded[1]);
        assert_eq!((&allowed["event"], &allowed["action"]), (&json!("allowed"), &json!(action)), "{allowed}");
        assert_eq!((&done["event"], &done["action"]), (&json!("done"), &json!(action)), "{done}");
        assert_eq!((&done["of"], &done["status"]), (&allowed["seq"], &json!(200)));
        assert_eq!(allowed["object"]["server"], "one", "{allowed}");
        assert!(allowed["credential"].is_string() && allowed["user"].is_string(), "{allowed}");
        let of_secret = action.starts_with("secret");
        assert_eq!(allowed["object"]["secret"], if of_secret { json!("TOKEN") } else { Value::Null });
        assert_eq!(allowed["onBehalfOf"], if of_secret { json!("alice") } else { Value::Null }, "{allowed}");
    }
    // One that fails says so.
    let refused = api.delete("/mcp/servers/one").await;
    let request = refused.headers["x-request-id"].to_str().unwrap();
    eventually("the failure is recorded", async || {
        of_request(&api, request).last().is_some_and(|line| line["status"] == 404)
    })
    .await;
    assert_eq!(of_request(&api, request).last().unwrap()["code"], "server_not_found");
    let text: String = lines(&api).iter().map(Value::to_string).collect();
    assert!(!text.contains(canary));
    // Looking changes nothing, and is not recorded.
    let before = lines(&api).len();
    api.get("/mcp/servers").await.ok();
    api.get("/mcp/tools").await.ok();
    assert_eq!(lines(&api).len(), before);
    let data = api.data();
    assert!(api.stop().await.success());
    let output = verify(&logs(data.path()));
    assert!(output.status.success(), "{}", said(&output));
}

/// The routes of the program that change something: all that do not only read, and those of logins.
fn changing_routes() -> BTreeSet<String> {
    let output = Deployment::builder().command().arg("routes").output().unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    let routes = listed.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (method, path) = (words.next()?, words.next()?);
        let logs_in = path.starts_with("/auth/") && path != "/auth/client.json";
        let changes = (method != "GET" || logs_in) && path != "/mcp/tool/call";
        changes.then(|| format!("{method} {path}"))
    });
    routes.collect()
}

/// Takes a route off the list when its answer shows that it left a line.
fn left(forgotten: &mut BTreeSet<String>, api: &Deployment, route: &str, action: &str, answer: &Answer) {
    let lines = of_request(api, answer.headers["x-request-id"].to_str().unwrap());
    let found = lines.iter().any(|line| line["event"] == "allowed" && line["action"] == action);
    assert!(found, "{route}: {lines:?} {}", answer.text);
    assert!(forgotten.remove(route), "{route}");
}

#[tokio::test]
async fn no_route_that_changes_something_is_forgotten() {
    let mut forgotten = changing_routes();
    assert!(forgotten.len() >= 20, "{forgotten:?}");
    let registry = packages::registry();
    let authorization = Authorization::start();
    let remote = Remote::start(FIXTURE, &["--auth", &authorization.issuer()]);
    let api = packages::from(&registry).env("GOOGLE_OAUTH_CREDENTIALS", CREDENTIALS).start().await;
    let body = json!({"name": "remote", "transportType": "streamable_http", "url": remote.url()});
    api.post("/mcp/servers", &body).await.ok();
    let secret = json!({"serverName": "one", "secretName": "A", "secretValue": "b"});
    let package = json!({"name": "@acme/clock", "version": "old", "serverName": "clock"});
    let steps = [
        ("POST", "/mcp/servers", "/mcp/servers", Some(fixture("one", &[])), "server.create"),
        (
            "PUT",
            "/mcp/servers/{name}",
            "/mcp/servers/one",
            Some(json!({"description": "x"})),
            "server.update",
        ),
        ("PUT", "/mcp/servers/{name}/disable", "/mcp/servers/one/disable", None, "server.disable"),
        ("PUT", "/mcp/servers/{name}/enable", "/mcp/servers/one/enable", None, "server.enable"),
        ("POST", "/secrets/set", "/secrets/set", Some(secret.clone()), "secret.set"),
        ("POST", "/secrets/delete", "/secrets/delete", Some(secret), "secret.delete"),
        ("DELETE", "/mcp/servers/{name}", "/mcp/servers/one", None, "server.delete"),
        (
            "POST",
            "/mcp/servers/{name}/oauth",
            "/mcp/servers/remote/oauth",
            Some(json!({"accessToken": "a"})),
            "tokens.set",
        ),
        ("DELETE", "/mcp/servers/{name}/oauth", "/mcp/servers/remote/oauth", None, "tokens.delete"),
        ("POST", "/packages/install", "/packages/install", Some(package), "package.install"),
        ("PUT", "/packages/{name}/disable", "/packages/clock/disable", None, "package.disable"),
        ("PUT", "/packages/{name}/enable", "/packages/clock/enable", None, "package.enable"),
        ("PUT", "/packages/upgrade-all", "/packages/upgrade-all", None, "package.upgrade"),
        ("PUT", "/packages/{name}/upgrade", "/packages/clock/upgrade", None, "package.upgrade"),
        ("DELETE", "/packages/{name}", "/packages/clock", None, "package.delete"),
        ("POST", "/fleet/workers/{id}/drain", "/fleet/workers/nobody/drain", None, "worker.drain"),
        ("POST", "/admin/keys/reload", "/admin/keys/reload", None, "keys.reload"),
        ("POST", "/admin/keys/rewrap", "/admin/keys/rewrap", None, "keys.rewrap"),
        ("POST", "/admin/keys/retire", "/admin/keys/retire", Some(json!({"id": "k9"})), "keys.retire"),
        ("PUT", "/admin/log", "/admin/log", Some(json!({"filter": "info"})), "log.filter"),
    ];
    for (method, pattern, path, body, action) in steps {
        let request = api.request(method.parse().unwrap(), path);
        let answer = api.send(if let Some(body) = &body { request.json(body) } else { request }).await;
        left(&mut forgotten, &api, &format!("{method} {pattern}"), action, &answer);
    }

    let begun = open(&api, "/auth/remote/login?username=alice", None).await;
    left(&mut forgotten, &api, "GET /auth/{server}/login", "login.begin", &begun);
    let begun = Begun::at(&api, "/auth/remote/login?username=alice").await;
    let back = local(&authorization.browse(&begun.location));
    let finished = open(&api, &back, Some(begun.cookie())).await.ok();
    left(&mut forgotten, &api, "GET /auth/callback", "login.finish", &finished);
    let google = json!({"env": {"MCP_AUTH_TYPE": "OAUTH2_GOOGLE"}});
    api.add_fixture("workspace", &["--more"], google).await;
    let begun = open(&api, "/auth/google/login?user_id=alice", None).await;
    left(&mut forgotten, &api, "GET /auth/google/login", "login.begin", &begun);
    let begun = Begun::at(&api, "/auth/google/login?user_id=alice").await;
    let location = Url::parse(&begun.location).unwrap();
    let state = location.query_pairs().find(|(name, _)| name == "state").unwrap().1.into_owned();
    let back = format!("/auth/google/callback?code=good&state={state}");
    let finished = open(&api, &back, Some(begun.cookie())).await.ok();
    left(&mut forgotten, &api, "GET /auth/google/callback", "login.finish", &finished);

    let builder = Deployment::builder().env("AUTH", "keys");
    let every = "call,secrets,admin,impersonate,metrics";
    let create = ["api-keys", "create", "--name", "a test's", "--user", "root", "--scopes", every];
    let output = builder.command().args(create).output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let key = String::from_utf8(output.stdout).unwrap();
    let api = builder.key(key.trim()).start().await;
    let by_command = |line: &Value| line["action"] == "api_key.create" && line["event"] == "allowed";
    assert!(lines(&api).iter().any(by_command), "the command line is a way in as well");
    let made = api.post("/admin/api-keys", &json!({"name": "k", "user": "alice", "scopes": ["call"]})).await;
    left(&mut forgotten, &api, "POST /admin/api-keys", "api_key.create", &made);
    let id = made.json()["apiKey"]["id"].as_str().unwrap().to_owned();
    let revoked = api.delete(&format!("/admin/api-keys/{id}")).await.ok();
    left(&mut forgotten, &api, "DELETE /admin/api-keys/{id}", "api_key.revoke", &revoked);
    let text: String = lines(&api).iter().map(Value::to_string).collect();
    assert!(!text.contains(key.trim()) && !text.contains(made.json()["key"].as_str().unwrap()));
    // Nobody is let in without a key, and who tries is recorded.
    let request = api.request_with(None, Method::DELETE, "/mcp/servers/one");
    let refused = api.send(request).await.fails(401, "unauthorized");
    let id = refused.headers["x-request-id"].to_str().unwrap().to_owned();
    eventually("the refusal is recorded", async || of_request(&api, &id).len() == 1).await;
    assert_eq!(of_request(&api, &id)[0]["event"], "denied");
    assert!(forgotten.is_empty(), "these leave no line, or no step here shows it: {forgotten:?}");
}

#[tokio::test]
async fn what_cannot_be_recorded_is_not_done() {
    let api = Deployment::start().await;
    api.add_fixture("one", &[], json!({})).await;
    let away: Vec<_> = folders(&api).into_iter().map(|at| (at.clone(), at.with_file_name("away"))).collect();
    for (at, to) in &away {
        fs::rename(at, to).unwrap();
    }
    let secret = json!({"serverName": "one", "secretName": "A", "secretValue": "b"});
    for answer in [
        api.post("/mcp/servers", &fixture("two", &[])).await,
        api.put("/mcp/servers/one", Some(&json!({"description": "new"}))).await,
        api.put("/mcp/servers/one/disable", None).await,
        api.post("/secrets/set", &secret).await,
        api.delete("/mcp/servers/one").await,
        api.post("/packages/install", &json!({"name": "a", "serverName": "a"})).await,
    ] {
        let answer = answer.fails(503, "audit_unavailable");
        assert!(answer.headers.contains_key("retry-after"));
    }
    // Nothing was done, and what changes nothing goes on.
    let one = api.server("one").await;
    assert_eq!((&one["description"], &one["status"]), (&json!(""), &json!("connected")));
    assert_eq!(api.call("one", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    api.get("/mcp/servers/two").await.fails(404, "server_not_found");
    let jobs = api.get("/packages/jobs").await.ok().json();
    assert_eq!(jobs["jobs"], json!([]));
    for (at, to) in &away {
        fs::rename(to, at).unwrap();
    }
    api.put("/mcp/servers/one", Some(&json!({"description": "new"}))).await.ok();
    let output = verify(&logs(api.data().path()));
    assert!(output.status.success(), "{}", said(&output));
}

#[tokio::test]
async fn after_a_kill_the_chain_goes_on_and_a_changed_line_is_found() {
    let api = Deployment::start().await;
    api.add_fixture("one", &[], json!({})).await;
    let data = api.data();
    api.kill().await;
    let torn = logs(data.path());
    for path in &torn {
        let mut text = fs::read(path).unwrap();
        text.extend(b"{\"seq\":99,\"ti");
        fs::write(path, text).unwrap();
    }
    let api = Deployment::builder().data(&data).start().await;
    api.delete("/mcp/servers/one").await.ok();
    let cut: Vec<_> = lines(&api).into_iter().filter(|line| line["action"] == "audit.recovered").collect();
    assert_eq!(cut.len(), torn.len());
    assert!(cut.iter().all(|line| line["bytes"] == 13), "{cut:?}");
    assert!(api.stop().await.success());

    let logs = logs(data.path());
    let output = verify(&logs);
    assert!(output.status.success(), "{}", said(&output));
    let log = logs.iter().find(|log| fs::read_to_string(log).unwrap().contains("server.delete")).unwrap();
    let text = fs::read_to_string(log).unwrap();
    let line = 1 + text.lines().position(|line| line.contains("server.delete")).unwrap();
    fs::write(log, text.replacen("server.delete", "server.update", 1)).unwrap();
    let output = verify(&logs);
    assert_eq!(output.status.code(), Some(1));
    let fault = format!("{}: line {line}: it was changed", log.display());
    assert!(said(&output).contains(&fault), "{}", said(&output));
    // Without names it looks where the settings say.
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcp-gateway"));
    let output = command.env_clear().env("AUDIT_FILE", log).args(["audit", "verify"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains(&fault), "{}", said(&output));
}

#[tokio::test]
async fn many_changes_at_once_are_all_recorded() {
    let api = Deployment::builder().env("AUDIT_ROTATE_SIZE", "8kb").start().await;
    api.add_fixture("one", &[], json!({})).await;
    let set = (0..200).map(|n| {
        let (user, api) = (format!("user-{n}"), &api);
        async move { api.set_secret(&user, "one", "TOKEN", "value").await.ok() }
    });
    futures_util::future::join_all(set).await;
    let recorded = lines(&api);
    for n in 0..200 {
        let user = json!(format!("user-{n}"));
        assert!(
            recorded.iter().any(|line| line["event"] == "allowed" && line["onBehalfOf"] == user),
            "{user}"
        );
    }
    assert!(logs(api.data().path()).len() > 5);
    let data = api.data();
    assert!(api.stop().await.success());
    let output = verify(&logs(data.path()));
    assert!(output.status.success(), "{}", said(&output));
}

#[tokio::test]
async fn calls_are_recorded_where_that_is_asked_for() {
    let api = Deployment::builder().env("AUDIT_CALLS", "all").start().await;
    api.add_fixture("one", &[], json!({})).await;
    let answer = api.call_as("alice", "one", "echo", json!({"text": "canary-of-a-call"})).await;
    assert_eq!(answer.tool_text(), "canary-of-a-call");
    let request = answer.headers["x-request-id"].to_str().unwrap();
    eventually("the call is recorded", async || of_request(&api, request).len() == 1).await;
    let line = &of_request(&api, request)[0];
    assert_eq!((&line["event"], &line["action"]), (&json!("allowed"), &json!("tool.call")));
    assert_eq!(line["object"], json!({"server": "one", "tools": ["echo"]}));
    assert_eq!(line["onBehalfOf"], "alice");
    assert!(!line.to_string().contains("canary"));

    let api = Deployment::start().await;
    api.add_fixture("one", &[], json!({})).await;
    assert_eq!(api.call("one", "echo", json!({"text": "a"})).await.tool_text(), "a");
    api.delete("/mcp/servers/one").await.ok();
    assert!(!lines(&api).iter().any(|line| line["action"] == "tool.call"));
}

#[tokio::test]
async fn refused_requests_are_recorded() {
    let api = Deployment::start().await;
    let request = api.request(reqwest::Method::GET, "/mcp/servers").header("host", "evil.example");
    let answer = api.send(request).await.fails(403, "host_not_allowed");
    let id = answer.headers["x-request-id"].to_str().unwrap();
    eventually("the refusal is recorded", async || of_request(&api, id).len() == 1).await;
    let line = &of_request(&api, id)[0];
    assert_eq!((&line["event"], &line["status"]), (&json!("denied"), &json!(403)));
    assert_eq!(
        (&line["code"], &line["object"]["route"]),
        (&json!("host_not_allowed"), &json!("GET /mcp/servers"))
    );
}

#[tokio::test]
async fn a_file_that_is_no_audit_log_is_not_written_to() {
    let data = crate::deployment::Data::new();
    let file = data.path().join("notes");
    fs::write(&file, "milk\n").unwrap();
    let builder = Deployment::builder().data(&data).env("AUDIT_FILE", file.to_str().unwrap());
    let output = builder.command().output().unwrap();
    assert_eq!(output.status.code(), Some(78), "{}", said(&output));
    assert!(said(&output).contains("AUDIT_FILE"), "{}", said(&output));
    assert_eq!(fs::read_to_string(&file).unwrap(), "milk\n");
}
