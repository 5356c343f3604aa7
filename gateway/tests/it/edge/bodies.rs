//! Bodies of requests: what is no good JSON, has wrong types or is too large.

use std::time::{Duration, Instant};

use reqwest::{Method, header};
use serde_json::{Value, json};

use super::{BODIES, ECHOED, method, raw, raw_fails, send_body, started, unharmed};
use crate::deployment::Deployment;

#[tokio::test]
async fn bodies_that_are_not_good_json_are_refused() {
    let api = started().await;
    let deep = |open: &str, close: &str| {
        format!(
            r#"{{"serverName":"echo","methodName":"args","args":{{"x":{}1{}}}}}"#,
            open.repeat(100_000),
            close.repeat(100_000)
        )
    };
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("cut off", br#"{"username":"#.to_vec()),
        ("trailing comma", br#"{"username":"a",}"#.to_vec()),
        ("two documents", br#"{} {}"#.to_vec()),
        ("words", b"nonsense".to_vec()),
        ("single quotes", b"{'a':1}".to_vec()),
        ("byte order mark", b"\xef\xbb\xbf{}".to_vec()),
        ("lone surrogate", br#"{"username":"\ud800"}"#.to_vec()),
        (
            "lone surrogate in args",
            br#"{"serverName":"echo","methodName":"args","args":{"x":"\udfff"}}"#.to_vec(),
        ),
        ("huge number", br#"{"serverName":"echo","methodName":"args","args":{"x":1e400}}"#.to_vec()),
        ("not a number", br#"{"args":{"x":NaN}}"#.to_vec()),
        ("invalid UTF-8", b"{\"username\":\"\xff\xfe\"}".to_vec()),
        (
            "invalid UTF-8 in args",
            b"{\"serverName\":\"echo\",\"methodName\":\"args\",\"args\":{\"x\":\"\xc3\"}}".to_vec(),
        ),
        ("invalid UTF-8 in a name", b"{\"\xff\":1}".to_vec()),
        ("control character in a string", b"{\"username\":\"a\nb\"}".to_vec()),
        ("deep arrays", deep("[", "]").into_bytes()),
        ("deep objects", deep(r#"{"x":"#, "}").into_bytes()),
        ("deep and never closed", "[".repeat(100_000).into_bytes()),
    ];
    for &route in BODIES {
        for (what, body) in &bad {
            let start = Instant::now();
            let answer = send_body(&api, route, body.clone()).await;
            assert!(answer.text.len() < 1024, "{what}: {}", answer.text);
            assert!(start.elapsed() < Duration::from_secs(5), "{what} took {:?}", start.elapsed());
            assert_eq!(answer.code(), "invalid_json", "{what} to {route:?}: {}", answer.text);
            answer.fails(400, "invalid_json");
        }
        for body in [
            "[]",
            "\"text\"",
            "7",
            "null",
            r#"{"username":"a","username":"b"}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"{"env":{"A":"b","A":"c"}}"#,
            r#"{"headers":[{"A":{"x":1,"\u0078":2}}]}"#,
            "",
        ] {
            let answer = send_body(&api, route, body).await;
            assert_eq!(answer.code(), "invalid_request", "{body} to {route:?}: {}", answer.text);
            answer.fails(400, "invalid_request");
        }
        for kind in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/jsonx",
            "",
        ] {
            let request = api.request(method(route.0), route.1).header(header::CONTENT_TYPE, kind);
            api.send(request.body("{}")).await.fails(415, "unsupported_media_type");
        }
        api.send(api.request(method(route.0), route.1).body("{}")).await.fails(415, "unsupported_media_type");
        api.send(api.request(method(route.0), route.1)).await.fails(400, "invalid_request");
    }
    let request = api.request(Method::POST, "/mcp/tool/call");
    let request = request.header(header::CONTENT_TYPE, "Application/JSON; charset=utf-8");
    let body = r#"{"serverName":"echo","methodName":"args","args":{"n":1.0e2}}"#;
    assert_eq!(api.send(request.body(body)).await.tool_text(), r#"{"n":1.0e2}"#);
    unharmed(&api).await;
}

#[tokio::test]
async fn calls_with_wrong_types_are_refused() {
    let api = started().await;
    let good = json!({"username": "alice", "serverName": "echo", "methodName": "args", "args": {}});
    for (field, value, code) in [
        ("username", json!({"$ne": null}), "invalid_request"),
        ("username", json!(7), "invalid_request"),
        ("username", json!(""), "invalid_request"),
        ("username", json!("  "), "invalid_request"),
        ("username", json!("u".repeat(300)), "invalid_request"),
        ("username", json!("a\0b"), "invalid_request"),
        ("username", json!("a\r\nb"), "invalid_request"),
        ("username", json!("a\u{202e}b"), "invalid_request"),
        ("serverName", json!(["a"]), "invalid_request"),
        ("serverName", json!({"$gt": ""}), "invalid_request"),
        ("serverName", Value::Null, "invalid_request"),
        ("serverName", json!(""), "invalid_request"),
        ("serverName", json!("../../etc"), "invalid_server_name"),
        ("serverName", json!("a.*"), "invalid_server_name"),
        ("methodName", json!(7), "invalid_request"),
        ("methodName", json!(""), "invalid_request"),
        ("methodName", json!("m".repeat(10 * 1024)), "invalid_request"),
        ("methodName", json!("a\u{0}"), "invalid_request"),
        ("args", json!([1]), "invalid_request"),
        ("args", json!("text"), "invalid_request"),
        ("args", json!(7), "invalid_request"),
        ("args", json!(false), "invalid_request"),
    ] {
        let mut body = good.clone();
        body[field] = value.clone();
        let answer = api.post("/mcp/tool/call", &body).await;
        assert_eq!(answer.code(), code, "{field} {value:.50}: {}", answer.text);
        answer.fails(400, code);
    }
    for field in ["serverName", "methodName"] {
        let mut body = good.clone();
        body.as_object_mut().unwrap().remove(field);
        api.post("/mcp/tool/call", &body).await.fails(400, "invalid_request");
    }
    let mut body = good.clone();
    body["args"] = Value::Null;
    assert_eq!(api.post("/mcp/tool/call", &body).await.tool_text(), "{}");
    api.call("nobody", "args", json!({})).await.fails(404, "server_not_found");
    let unknown = api.call("echo", "__proto__", json!({})).await.ok().json();
    assert_eq!(unknown["data"]["isError"], true, "the server's own verdict on an unknown tool");
    for value in ["-1", "abc", "1e99", "0", "1.5", "", "+5", "99999999999999999999999999"] {
        let request = api.request(Method::POST, "/mcp/tool/call").json(&good);
        let answer = api.send(request.header("X-Request-Timeout-Ms", value)).await;
        assert_eq!(answer.status, 400, "{value}: {}", answer.text);
        answer.fails(400, "invalid_request");
    }
    let request = api.request(Method::POST, "/mcp/tool/call").json(&good);
    api.send(request.header("X-Request-Timeout-Ms", "999999999")).await.ok();
    unharmed(&api).await;
}

#[tokio::test]
async fn bodies_over_the_limit_are_refused() {
    let api = Deployment::builder().env("PAYLOAD_LIMIT", "100kb").start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let call = |bytes: usize| {
        let text = "x".repeat(bytes);
        json!({"serverName": "echo", "methodName": "echo", "args": {"text": text}}).to_string()
    };
    let overhead = call(0).len();
    for &route in BODIES {
        send_body(&api, route, call(100 * 1024 - overhead + 1)).await.fails(413, "payload_too_large");
        // Without a length only counting helps.
        let pieces: Vec<Result<String, std::io::Error>> = call(300 * 1024)
            .as_bytes()
            .chunks(10_000)
            .map(|piece| Ok(String::from_utf8_lossy(piece).into_owned()))
            .collect();
        let stream = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
        send_body(&api, route, stream).await.fails(413, "payload_too_large");
    }
    let route = ("POST", "/mcp/tool/call");
    let text = send_body(&api, route, call(100 * 1024 - overhead)).await.tool_text();
    assert_eq!(text.len(), 100 * 1024 - overhead);
    let halves = call(50_000);
    let pieces = vec![Ok::<_, std::io::Error>(halves[..20_000].to_owned()), Ok(halves[20_000..].to_owned())];
    let stream = reqwest::Body::wrap_stream(futures_util::stream::iter(pieces));
    assert_eq!(send_body(&api, route, stream).await.tool_text().len(), 50_000);
    // A length that lies is refused before a byte of the body is read.
    let head = format!(
        "POST /mcp/tool/call HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n",
        api.address()
    );
    raw_fails(&raw(&api, head.as_bytes()).await, 413, "payload_too_large");
    unharmed(&api).await;
}

#[tokio::test]
async fn answers_repeat_little_of_what_was_sent() {
    let api = started().await;
    let long = "q".repeat(5_000);
    let name = &"q".repeat(63);
    let mut bodies = Vec::new();
    for field in [
        "username",
        "serverName",
        "methodName",
        "args",
        "name",
        "command",
        "secretName",
        "secretValue",
        "transportType",
        "isolation",
        "source",
        "startupTimeout",
        "secretNames",
        "secretEnv",
        "env",
    ] {
        for value in [json!(long), json!({long.clone(): long}), json!([long])] {
            let mut body = json!({
                "serverName": name, "methodName": "x", "name": "other", "command": "true",
                "secretName": "K", "secretValue": "v", "enabled": false,
            });
            body[field] = value;
            bodies.push(body.to_string());
        }
    }
    bodies.push(format!(r#"{{"{long}":1,"{long}":2}}"#));
    bodies.push(format!(r#"{{"a":{long}}}"#));
    bodies.push(long.clone());
    for &route in BODIES {
        for body in &bodies {
            let answer = send_body(&api, route, body.clone()).await;
            if answer.status == 200 {
                // Something that was good: away with it.
                api.delete("/mcp/servers/other").await;
                continue;
            }
            assert!((400..500).contains(&answer.status), "{}", answer.text);
            let longest = answer.text.split(|c| c != 'q').map(str::len).max().unwrap_or_default();
            assert!(
                longest <= ECHOED,
                "{route:?} repeats {longest} characters of {body:.100}: {}",
                answer.text
            );
        }
    }
    unharmed(&api).await;
}

/// What users send as names of variables, headers and options are keys of maps that the store keeps.
#[tokio::test]
async fn names_in_maps_mean_nothing_to_the_store() {
    let api = started().await;
    let other = api.server("echo").await;
    let names =
        ["$where", "$ne", "a.b", ".", "$", "a$b", "__proto__", "_id", "_revision", "$set", "a\0b", ""];
    for name in names {
        for field in ["env", "headers", "secretEnv", "reconnectionOptions", "oauthClient", "args", name] {
            let map = json!({name: "x"});
            let mut body = json!({"name": "keys", "command": "true", "enabled": false, field: map});
            if matches!(field, "headers" | "reconnectionOptions" | "oauthClient") {
                let body = body.as_object_mut().unwrap();
                body.remove("command");
                body.insert("transportType".to_owned(), json!("streamable_http"));
                body.insert("url".to_owned(), json!("http://127.0.0.1:1/mcp"));
            }
            let added = api.post("/mcp/servers", &body).await;
            if added.status != 200 {
                assert!(matches!(added.status, 400 | 403), "{field} {name:?}: {}", added.text);
                continue;
            }
            // What was taken is kept as it is, can be changed, and goes again.
            let kept = api.server("keys").await;
            assert!(kept[field].is_null() || kept[field] == map || field == name, "{field} {name:?}: {kept}");
            api.put("/mcp/servers/keys", Some(&json!({"description": "changed"}))).await.ok();
            assert_eq!(api.server("keys").await[field], kept[field], "{field} {name:?}");
            api.delete("/mcp/servers/keys").await.ok();
        }
        for field in ["username", "serverName", "secretName", "secretValue"] {
            let mut body = json!({"serverName": "echo", "secretName": "K", "secretValue": "v"});
            body[field] = json!({name: ""});
            api.post("/secrets/set", &body).await.fails(400, "invalid_request");
            api.post("/secrets/delete", &body).await;
        }
    }
    // Nothing in a name is a pattern: what is deleted is what has just that name.
    api.set_secret("alice", "echo", "K", "hers").await.ok();
    for name in [".*", "^K", "K|L", "[K]", "%", "_", "K%"] {
        let body = json!({"username": "alice", "serverName": "echo", "secretName": name});
        let answer = api.post("/secrets/delete", &body).await;
        assert!(answer.status == 400 || answer.json()["success"] == true, "{name}: {}", answer.text);
    }
    assert_eq!(api.call_as("alice", "echo", "args", json!({})).await.tool_text(), r#"{"K":"hers"}"#);
    assert_eq!(api.server("echo").await["createdAt"], other["createdAt"]);
    unharmed(&api).await;
}
