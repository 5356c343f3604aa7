//! Routes, and the names and fields that come by them.

use reqwest::{Method, header};
use serde_json::json;

use super::{ECHOED, ROUTES, method, raw, raw_fails, started, unharmed};
use crate::deployment::fixture;

#[tokio::test]
async fn every_route_knows_its_methods() {
    let api = started().await;
    for (route, allowed) in ROUTES {
        let path = route.replace("{name}", "echo");
        for name in ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"] {
            if allowed.contains(&name) {
                continue;
            }
            let request = api.request(method(name), &path);
            let request = if name == "HEAD" { request } else { request.json(&json!({})) };
            let answer = api.send(request).await;
            let allow = answer.headers.get(header::ALLOW).map(|value| value.to_str().unwrap().to_owned());
            let mut listed: Vec<_> = allow.as_deref().unwrap_or_default().split(',').map(str::trim).collect();
            let mut expected = allowed.to_vec();
            listed.sort_unstable();
            expected.sort_unstable();
            assert_eq!(listed, expected, "{name} {route}");
            if name == "HEAD" {
                assert_eq!(answer.status, 405, "{name} {route}");
            } else {
                answer.fails(405, "method_not_allowed");
            }
        }
        if allowed.contains(&"HEAD") {
            let answer = api.send(api.request(Method::HEAD, &path)).await.ok();
            assert_eq!(answer.text, "");
        }
    }
    for path in [
        "/",
        "/mcp",
        "/mcp/",
        "/mcp/servers/",
        "/mcp/servers/echo/",
        "/mcp/servers/echo/nothing",
        "/secrets",
        "/MCP/tools",
        "/mcp/tools/",
        "//mcp/tools",
        "/metrics.json",
    ] {
        for name in ["GET", "POST", "DELETE"] {
            api.send(api.request(method(name), path)).await.fails(404, "not_found");
        }
    }
    unharmed(&api).await;
}

#[tokio::test]
async fn paths_cannot_play_tricks() {
    let api = started().await;
    let host = api.address().to_owned();
    for (route, methods) in ROUTES.iter().filter(|(route, _)| route.contains("{name}")) {
        for name in [
            "..%2f..%2fetc",
            "%2e%2e",
            "..",
            "%2fetc%2fpasswd",
            "a%0d%0aX-Evil:%20yes",
            "%00",
            "a%00b",
            "%ff%fe",
            "a%2f%2fb",
            "%20",
            "a.*",
            "%3e",
            "%e2%80%ae",
            "a%0a",
        ] {
            // Sent by hand: clients clean paths before they send them.
            let path = route.replace("{name}", name);
            for verb in methods.iter().filter(|verb| **verb != "HEAD") {
                let request = format!(
                    "{verb} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}"
                );
                let answer = raw(&api, request.as_bytes()).await;
                raw_fails(&answer, 400, "invalid_server_name");
                assert!(!answer.to_ascii_lowercase().contains("x-evil"), "{answer}");
            }
        }
        // A name that a server might have, and none has.
        for name in ["nobody", "a.b", "%40scope%2fname", "my%20server", &"n".repeat(128)] {
            let path = route.replace("{name}", name);
            for verb in methods.iter().filter(|verb| **verb != "HEAD") {
                let answer = api.send(api.request(method(verb), &path).json(&json!({}))).await;
                let longest = answer.text.split(|c| c != 'n').map(str::len).max().unwrap_or_default();
                assert!(longest <= ECHOED, "{verb} {route} repeats {longest} characters: {}", answer.text);
                answer.fails(404, "server_not_found");
            }
        }
        let path = route.replace("{name}", &"n".repeat(129));
        let verb = method(methods.first().unwrap());
        api.send(api.request(verb, &path).json(&json!({}))).await.fails(400, "invalid_server_name");
    }
    unharmed(&api).await;
}

#[tokio::test]
async fn names_of_new_servers_are_checked() {
    let api = started().await;
    for name in [
        "../../etc",
        "..%2f..%2fetc",
        "a/b",
        "/abs",
        ".",
        "..",
        "a.*",
        ">",
        "a b",
        "a\r\nPUB x 1",
        "%00",
        "a\0",
        "",
        "-a",
        "_a",
        "a.b",
        "ä",
        "\u{202e}a",
        "a\n",
        "@scope/name",
        "Ѕerver",
        &"x".repeat(64),
    ] {
        let answer = api.register_fixture(name, &[], json!({})).await;
        let code = if name.is_empty() { "invalid_request" } else { "invalid_server_name" };
        assert_eq!(answer.code(), code, "{name:?}: {}", answer.text);
        answer.fails(400, code);
    }
    api.register_fixture("webtools", &[], json!({})).await.fails(403, "builtin_server");
    api.delete("/mcp/servers/webtools").await.fails(403, "builtin_server");
    api.put("/mcp/servers/webtools", Some(&json!({}))).await.fails(403, "builtin_server");
    api.put("/mcp/servers/webtools/disable", None).await.fails(403, "builtin_server");
    // A name that differs in case only is nobody's: mcp-api may have left such a server, which can be removed.
    api.register_fixture("WebTools", &[], json!({})).await.fails(403, "builtin_server");
    api.delete("/mcp/servers/WebTools").await.fails(404, "server_not_found");
    api.put("/mcp/servers/WebTools", Some(&json!({}))).await.fails(404, "server_not_found");
    api.put("/mcp/servers/WebTools/disable", None).await.fails(404, "server_not_found");
    let same = api.register_fixture("echo", &[], json!({})).await.fails(409, "server_already_exists");
    assert_eq!(same.json()["error"], "Server with name echo already exists");
    let clash = api.register_fixture("ECHO", &[], json!({})).await.fails(409, "server_already_exists");
    assert!(clash.json()["error"].as_str().unwrap().contains("echo"), "{}", clash.text);
    api.call("Echo", "args", json!({})).await.fails(404, "server_not_found");
    let disabled = json!({"enabled": false});
    for name in ["a", "A9_-", &"x".repeat(63)] {
        api.register_fixture(name, &[], disabled.clone()).await.ok();
        api.delete(&format!("/mcp/servers/{name}")).await.ok();
    }
    assert_eq!(api.get("/mcp/servers").await.ok().json()["servers"].as_array().unwrap().len(), 2);
    unharmed(&api).await;
}

#[tokio::test]
async fn fields_of_servers_are_checked() {
    let api = started().await;
    api.register_fixture("target", &[], json!({"enabled": false})).await.ok();
    let before = api.server("target").await;
    let bad = [
        json!({"startupTimeout": 0}),
        json!({"startupTimeout": 300_001}),
        json!({"startupTimeout": "x"}),
        json!({"startupTimeout": -1}),
        json!({"startupTimeout": 1.5}),
        json!({"toolTimeout": 0}),
        json!({"toolTimeout": 600_001}),
        json!({"idleTimeout": -1}),
        json!({"idleTimeout": "soon"}),
        json!({"concurrency": 0}),
        json!({"concurrency": 1_025}),
        json!({"concurrency": "many"}),
        json!({"instances": 0}),
        json!({"instances": 65}),
        json!({"env": {"A": 1}}),
        json!({"env": {"A": {"$ne": null}}}),
        json!({"env": []}),
        json!({"env": {"A=B": "x"}}),
        json!({"env": {"": "x"}}),
        json!({"env": {"1A": "x"}}),
        json!({"env": {"A\0": "x"}}),
        json!({"env": {"A": "x\0y"}}),
        json!({"args": "one two"}),
        json!({"args": [1]}),
        json!({"args": {"0": "a"}}),
        json!({"args": ["a\0b"]}),
        json!({"command": "a\0b"}),
        json!({"command": ["node"]}),
        json!({"command": "  "}),
        json!({"url": "http://127.0.0.1:1/"}),
        json!({"headers": {"A": "b"}}),
        json!({"transportType": "carrier-pigeon"}),
        json!({"transportType": 7}),
        json!({"secretEnv": {"A": "K"}}),
        json!({"isolation": "per_user", "secretEnv": {"A": 1}}),
        json!({"isolation": "per_user", "secretEnv": {"A B": "K"}}),
        json!({"isolation": "per_user", "secretEnv": {"A": "$K"}}),
        json!({"isolation": "per_user", "secretEnv": ["A"]}),
        json!({"isolation": "everyone"}),
        json!({"isolation": {"$ne": null}}),
        json!({"scaling": "none"}),
        json!({"secretNames": "A"}),
        json!({"secretNames": [1]}),
        json!({"secretNames": ["$A"]}),
        json!({"secretName": 1}),
        json!({"enabled": "yes"}),
        json!({"displayName": 1}),
        json!({"displayName": "d".repeat(257)}),
        json!({"description": {"a": 1}}),
        json!({"description": "d".repeat(17 * 1024)}),
        json!({"secretFields": "none"}),
        json!({"source": "external"}),
        json!({"homepageUrl": 1}),
    ];
    for more in &bad {
        let mut body = fixture("refused", &[]);
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = api.post("/mcp/servers", &body).await;
        assert_eq!(answer.code(), "invalid_request", "POST {more:.80}: {}", answer.text);
        answer.fails(400, "invalid_request");
        let answer = api.put("/mcp/servers/target", Some(more)).await;
        assert_eq!(answer.code(), "invalid_request", "PUT {more:.80}: {}", answer.text);
        answer.fails(400, "invalid_request");
    }
    for more in [json!({"name": "renamed"}), json!({"name": 7})] {
        api.put("/mcp/servers/target", Some(&more)).await.fails(400, "invalid_request");
    }
    for body in
        [json!({"name": "refused"}), json!({"command": "true"}), json!({"name": null, "command": "true"})]
    {
        api.post("/mcp/servers", &body).await.fails(400, "invalid_request");
    }
    api.get("/mcp/servers/refused").await.fails(404, "server_not_found");
    assert_eq!(api.server("target").await, before, "a refused change changed something");
    let edges =
        json!({"startupTimeout": 300_000, "toolTimeout": 600_000, "concurrency": 1_024, "idleTimeout": 0});
    api.put("/mcp/servers/target", Some(&edges)).await.ok();
    unharmed(&api).await;
}
