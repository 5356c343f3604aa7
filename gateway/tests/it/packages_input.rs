//! What may be said about packages: everything else is refused before anything is started or stored, in words
//! that help.

use reqwest::{Method, header};
use serde_json::{Value, json};

use crate::deployment::{Answer, Deployment};

/// A request that is good but for `more`.
fn body(more: Value) -> Value {
    let mut body = json!({"name": "left-pad", "serverName": "pad"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn python(more: Value) -> Value {
    let mut body =
        body(json!({"name": "mcp-server-time", "runtime": "python", "pythonModule": "mcp_server_time"}));
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Nothing was stored: no package, no job, no server.
async fn nothing_came_of_it(api: &Deployment) {
    assert_eq!(api.get("/packages").await.ok().json(), json!({"success": true, "packages": []}));
    assert_eq!(api.get("/packages/jobs").await.ok().json(), json!({"success": true, "jobs": []}));
    assert_eq!(api.get("/packages/updates").await.ok().json(), json!({"success": true, "updates": []}));
    // The built-in one.
    assert_eq!(api.get("/mcp/servers").await.ok().json()["servers"].as_array().unwrap().len(), 1);
}

#[track_caller]
fn says(answer: &Answer, words: &str) {
    let error = answer.json()["error"].as_str().unwrap().to_owned();
    assert!(error.contains(words), "{error}");
}

#[tokio::test]
async fn bad_requests_for_an_installation_are_refused_and_leave_nothing() {
    let api = Deployment::start().await;
    let missing = "Package name and server name are required";
    for (body, code, words) in [
        (json!({}), "invalid_request", missing),
        (json!({"serverName": "pad"}), "invalid_request", missing),
        (json!({"name": "left-pad"}), "invalid_request", missing),
        (body(json!({"name": ""})), "invalid_request", missing),
        (body(json!({"serverName": null})), "invalid_request", missing),
        (body(json!({"name": 7})), "invalid_request", "name must be a string"),
        (body(json!({"name": ["left-pad"]})), "invalid_request", "name must be a string"),
        (body(json!({"serverName": {"$ne": null}})), "invalid_request", "serverName must be a string"),
        (body(json!({"serverName": "a b"})), "invalid_server_name", "1 to 63 letters"),
        (body(json!({"serverName": "../../etc"})), "invalid_server_name", "1 to 63 letters"),
        (body(json!({"serverName": "@scope/name"})), "invalid_server_name", "1 to 63 letters"),
        (body(json!({"serverName": "x".repeat(64)})), "invalid_server_name", "1 to 63 letters"),
        (body(json!({"serverName": "updates"})), "invalid_server_name", "addresses below /packages"),
        (body(json!({"username": " "})), "invalid_request", "username"),
        (body(json!({"runtime": "ruby"})), "invalid_request", "\"node\" or \"python\""),
        (body(json!({"runtime": 1})), "invalid_request", "runtime must be a string"),
        (body(json!({"version": 1})), "invalid_request", "version must be a string"),
        (body(json!({"version": ""})), "invalid_version", "a range of versions or a tag"),
        (body(json!({"version": "-g"})), "invalid_version", "a range of versions or a tag"),
        (body(json!({"version": "file:/etc"})), "invalid_version", "a range of versions or a tag"),
        (body(json!({"version": "npm:other@1"})), "invalid_version", "a range of versions or a tag"),
        (body(json!({"version": "git+ssh://x/y"})), "invalid_version", "a range of versions or a tag"),
        (body(json!({"version": "1.0.0;id"})), "invalid_version", "a range of versions or a tag"),
        (body(json!({"version": "$(id)"})), "invalid_version", "a range of versions or a tag"),
        (body(json!({"version": "9".repeat(200)})), "invalid_version", "a range of versions or a tag"),
        (body(json!({"enabled": "yes"})), "invalid_request", "enabled must be true or false"),
        (body(json!({"failOnWarning": 1})), "invalid_request", "failOnWarning must be true or false"),
        (body(json!({"allowScripts": "true"})), "invalid_request", "allowScripts must be true or false"),
        (body(json!({"args": "x"})), "invalid_request", "args must be a list of strings"),
        (body(json!({"args": ["a\u{0}b"]})), "invalid_request", "cannot contain NUL"),
        (body(json!({"args": ["x".repeat(2 << 20)]})), "invalid_request", "too large"),
        (body(json!({"env": ["A"]})), "invalid_request", "env must be an object"),
        (body(json!({"env": {"A=B": "x"}})), "invalid_request", "not one of a variable"),
        (body(json!({"secretName": "$where"})), "invalid_request", "secretName"),
        (body(json!({"secretNames": "A"})), "invalid_request", "secretNames must be a list"),
        (body(json!({"secretEnv": {"A": "B"}})), "invalid_request", "per_user"),
        (body(json!({"isolation": "alone"})), "invalid_request", "isolation must be"),
        (body(json!({"scaling": 2})), "invalid_request", "scaling must be"),
        (body(json!({"concurrency": 0})), "invalid_request", "concurrency must be"),
        (body(json!({"instances": 65})), "invalid_request", "instances must be"),
        (body(json!({"toolTimeout": 0})), "invalid_request", "toolTimeout must be"),
        (body(json!({"startupTimeout": 300_001})), "invalid_request", "startupTimeout must be"),
        (body(json!({"idleTimeout": -1})), "invalid_request", "idleTimeout must be"),
        (body(json!({"transportType": "sse"})), "invalid_request", "transportType must be"),
        (
            body(json!({"url": "https://x.example"})),
            "invalid_request",
            "cannot define streamable_http fields",
        ),
        (body(json!({"transportType": "streamable_http"})), "invalid_request", "require a url"),
        (
            body(json!({"transportType": "streamable_http", "url": "https://x.example", "command": "node"})),
            "invalid_request",
            "cannot define stdio fields",
        ),
        (body(json!({"pythonModule": "x"})), "invalid_request", "pythonModule needs the runtime"),
        (body(json!({"pipDependencies": []})), "invalid_request", "pipDependencies needs the runtime"),
        (python(json!({"pythonModule": null})), "invalid_request", "pythonModule is required"),
        (python(json!({"pythonModule": ""})), "invalid_request", "pythonModule is required"),
        (python(json!({"pythonModule": "os; import x"})), "invalid_request", "name of a Python module"),
        (python(json!({"pythonModule": "-c"})), "invalid_request", "name of a Python module"),
        (python(json!({"pythonArgs": "x"})), "invalid_request", "pythonArgs must be a list"),
        (python(json!({"pythonArgs": ["\u{0}"]})), "invalid_request", "pythonArgs cannot contain NUL"),
        (python(json!({"pythonArgs": ["x".repeat(2 << 20)]})), "invalid_request", "too large"),
        (python(json!({"version": "<3"})), "invalid_version", "must be one version"),
        (python(json!({"version": "^1"})), "invalid_version", "must be one version"),
        (
            python(json!({"transportType": "streamable_http", "url": "https://x.example"})),
            "invalid_request",
            "only",
        ),
        (python(json!({"pipDependencies": "a"})), "invalid_request", "pipDependencies must be a list"),
        (python(json!({"pipDependencies": ["a<3", "-r x"]})), "invalid_request", "options are refused"),
        (
            python(json!({"pipDependencies": ["--index-url=http://x"]})),
            "invalid_request",
            "options are refused",
        ),
        (
            python(json!({"pipDependencies": ["a @ https://x/y.whl"]})),
            "invalid_request",
            "options are refused",
        ),
        (python(json!({"pipDependencies": ["git+https://x/y"]})), "invalid_request", "options are refused"),
        (python(json!({"pipDependencies": ["../a"]})), "invalid_request", "options are refused"),
        (python(json!({"pipDependencies": vec!["a"; 65]})), "invalid_request", "at most 64"),
        (
            python(json!({"pipIndexUrl": "http://pypi.example.org"})),
            "invalid_request",
            "pipIndexUrl must be an https",
        ),
        (python(json!({"pipIndexUrl": "https://u:p@x.example"})), "invalid_request", "without user name"),
        (python(json!({"pipIndexUrl": "https://169.254.169.254/"})), "blocked_address", "169.254.169.254"),
        (python(json!({"pipExtraIndexUrl": "file:///etc"})), "invalid_request", "pipExtraIndexUrl must be"),
        (python(json!({"pipExtraIndexUrl": ["x"]})), "invalid_request", "pipExtraIndexUrl must be a string"),
    ] {
        let answer = api.post("/packages/install", &body).await.fails(400, code);
        says(&answer, words);
    }
    api.post("/packages/install", &body(json!({"serverName": "WebTools"})))
        .await
        .fails(403, "builtin_server");
    api.post("/packages/install", &json!([body(json!({}))])).await.fails(400, "invalid_request");
    api.put("/packages/install", Some(&body(json!({})))).await.fails(405, "method_not_allowed");
    nothing_came_of_it(&api).await;
}

#[tokio::test]
async fn names_that_no_registry_has_go_to_no_registry() {
    let api = Deployment::start().await;
    let long = "a".repeat(215);
    for name in [
        "..",
        ".",
        "/etc/passwd",
        "../../y",
        "@x/../../y",
        "@x/",
        "@/y",
        "@x/y/z",
        "x/y",
        ".hidden",
        "_x",
        "-g",
        "--prefix=/",
        "--registry=http://evil.example",
        "a b",
        "a;id",
        "a|id",
        "a&id",
        "a`id`",
        "$(id)",
        "a$HOME",
        "a>b",
        "a\nb",
        "a\r\nb",
        "a\tb",
        "a'b",
        "a\"b",
        "a\\b",
        "left-pad@1.0.0",
        "a@file:/etc",
        "a@npm:b",
        "git+ssh://x/y",
        "git+https://x/y",
        "github:x/y",
        "https://x/y.tgz",
        "file:/etc",
        "./x",
        "~/x",
        "A",
        "Ѕerver",
        "ä",
        "%2e%2e",
        "a\u{202e}b",
        "a\u{200b}b",
        &long,
    ] {
        let answer = api.post("/packages/install", &body(json!({"name": name}))).await;
        says(&answer.fails(400, "invalid_package_name"), "an npm package");
    }
    for name in [
        "-r",
        "--index-url=http://x",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc",
        "a b",
        "a;id",
        "$(id)",
        "a==1",
        "a<2",
        "a @ https://x/y.whl",
        "git+https://x/y",
        "https://x/y.whl",
        "a[",
        "a[]",
        "a[b]c",
        "a\n",
        "Ѕ",
        "_a",
        "a-",
        "a; os_name=='nt'",
        "%2e%2e",
        &long,
    ] {
        let answer = api.post("/packages/install", &python(json!({"name": name}))).await;
        says(&answer.fails(400, "invalid_package_name"), "a Python package");
    }
    nothing_came_of_it(&api).await;
}

#[tokio::test]
async fn a_name_is_given_once() {
    let api = Deployment::start().await;
    api.add_fixture("taken", &[], json!({})).await;
    let answer = api.post("/packages/install", &body(json!({"serverName": "taken"}))).await;
    says(&answer.fails(409, "server_already_exists"), "Server with name taken already exists");
    let answer = api.post("/packages/install", &body(json!({"serverName": "TAKEN"}))).await;
    says(&answer.fails(409, "server_already_exists"), "as taken");
    // A server that runs no package is none of the business of /packages.
    api.delete("/packages/taken").await.fails(404, "package_not_found");
    api.put("/packages/taken/disable", None).await.fails(404, "package_not_found");
    assert_eq!(api.server("taken").await["status"], "connected");
    assert_eq!(api.get("/packages/jobs").await.ok().json()["jobs"], json!([]));
}

#[tokio::test]
async fn what_is_not_there_is_said_to_be_not_there() {
    let api = Deployment::start().await;
    for answer in [
        api.get("/packages/by-name/nope").await,
        api.get("/packages/by-id/nope").await,
        api.get("/packages/by-name/nope?checkUpdates=true").await,
        api.put("/packages/nope/upgrade", Some(&json!({}))).await,
        api.put("/packages/nope/upgrade", None).await,
        api.put("/packages/nope/enable", None).await,
        api.put("/packages/nope/disable", None).await,
        api.delete("/packages/nope").await,
    ] {
        says(&answer.fails(404, "package_not_found"), "Package nope not found");
    }
    // Names are decoded once, and a scope's slash may be either.
    for path in ["@scope%2Fname", "@scope/name"] {
        let answer = api.get(&format!("/packages/by-name/{path}")).await;
        says(&answer.fails(404, "package_not_found"), "Package @scope/name not found");
    }
    let answer = api.get("/packages/by-name/@scope%252Fname").await;
    says(&answer.fails(404, "package_not_found"), "Package @scope%2Fname not found");
    for path in ["/packages/..%2f..%2fetc", "/packages/a%0d%0ab", "/packages/%2e%2e%2fx"] {
        api.delete(path).await.fails(404, "package_not_found");
    }
    api.delete("/packages/%ff").await.fails(400, "invalid_request");
    assert_eq!(api.get("/packages/updates?name=nope").await.ok().json()["updates"], json!([]));
    let all = api.put("/packages/upgrade-all", Some(&json!({}))).await.ok().json();
    assert_eq!(all, json!({"success": true, "results": []}));

    for id in ["nope", "nope~0123456789ab", "~", "..%2f~x", "%ff", "a~b~c"] {
        api.get(&format!("/packages/jobs/{id}")).await.fails(404, "job_not_found");
        let request = api.request(Method::GET, &format!("/packages/jobs/{id}"));
        let answer = api.send(request.header(header::ACCEPT, "text/event-stream")).await;
        answer.fails(404, "job_not_found");
    }
    for query in ["checkUpdates=maybe", "checkUpdates=true&checkUpdates=true", "checkUpdates=%ff"] {
        api.get(&format!("/packages?{query}")).await.fails(400, "invalid_request");
    }
    assert_eq!(api.get("/packages?checkUpdates=true&other=1").await.ok().json()["packages"], json!([]));
    // A version is looked at before it is looked for what is to be upgraded.
    api.put("/packages/nope/upgrade", Some(&json!({"version": 1}))).await.fails(400, "invalid_request");
    api.put("/packages/nope/upgrade", Some(&json!([]))).await.fails(400, "invalid_request");
    nothing_came_of_it(&api).await;
}
