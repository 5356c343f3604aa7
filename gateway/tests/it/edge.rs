//! The HTTP edge: what is refused, in which words, and that nothing a client sends does more than that.

use std::time::{Duration, Instant};

use reqwest::{Method, header};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::deployment::{Answer, Deployment, PATIENCE, fixture};

/// Every route of the program with the methods that it has, as `Allow` lists them.
const ROUTES: &[(&str, &[&str])] = &[
    ("/fleet", &["GET", "HEAD"]),
    ("/healthz", &["GET", "HEAD"]),
    ("/readyz", &["GET", "HEAD"]),
    ("/mcp/tool/call", &["POST"]),
    ("/mcp/tools", &["GET", "HEAD"]),
    ("/mcp/servers", &["GET", "HEAD", "POST"]),
    ("/mcp/servers/{name}", &["GET", "HEAD", "PUT", "DELETE"]),
    ("/mcp/servers/{name}/enable", &["PUT"]),
    ("/mcp/servers/{name}/disable", &["PUT"]),
    ("/mcp/servers/{name}/delete-impact", &["GET", "HEAD"]),
    ("/secrets/set", &["POST"]),
    ("/secrets/delete", &["POST"]),
];

/// Routes that read a JSON body, with a method.
const BODIES: &[(&str, &str)] = &[
    ("POST", "/mcp/tool/call"),
    ("POST", "/mcp/servers"),
    ("PUT", "/mcp/servers/echo"),
    ("POST", "/secrets/set"),
    ("POST", "/secrets/delete"),
];

/// The most of a client's words that an answer may repeat.
const ECHOED: usize = 64;

fn method(name: &str) -> Method {
    Method::from_bytes(name.as_bytes()).unwrap()
}

/// A deployment with one server, and what must be true after anything that was sent to it.
async fn started() -> Deployment {
    let api = Deployment::start().await;
    api.add_fixture("echo", &["--more"], json!({})).await;
    api
}

async fn unharmed(api: &Deployment) {
    assert_eq!(api.call("echo", "echo", json!({"text": "still here"})).await.tool_text(), "still here");
    let log = api.log();
    assert!(!log.contains("panicked"), "{log}");
    assert!(!log.contains("internal error"), "{log}");
}

/// Sends bytes as they are and reads what comes back until the other side closes or falls silent.
async fn raw(api: &Deployment, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(api.address()).await.unwrap();
    // The other side may close before everything is written, and answer all the same.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match timeout(PATIENCE, stream.read(&mut chunk)).await.expect("no answer") {
            Ok(0) | Err(_) => break,
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
        }
        if complete(&answer) {
            break;
        }
    }
    String::from_utf8(answer).unwrap()
}

/// Whether an answer with a length is there whole.
fn complete(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    length.is_some_and(|length| length.parse().is_ok_and(|length: usize| body.len() >= length))
}

#[track_caller]
fn raw_fails(answer: &str, status: u16, code: &str) {
    assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    assert!(answer.contains(&format!(r#""code":"{code}""#)), "{answer}");
    assert!(answer.to_ascii_lowercase().contains("x-request-id: "), "{answer}");
}

/// Sends a body to a route of [`BODIES`].
async fn send_body(api: &Deployment, route: (&str, &str), body: impl Into<reqwest::Body>) -> Answer {
    let request = api.request(method(route.0), route.1).header(header::CONTENT_TYPE, "application/json");
    api.send(request.body(body)).await
}

#[tokio::test]
async fn web_pages_and_foreign_names_are_refused() {
    let api = started().await;
    let port = api.address().rsplit_once(':').unwrap().1.to_owned();
    let get = || api.request(Method::GET, "/mcp/servers");
    for host in
        ["evil.com", &format!("evil.com:{port}"), "localhost.evil.com", "127.0.0.1.evil.com", "0.0.0.0"]
    {
        api.send(get().header(header::HOST, host)).await.fails(403, "host_not_allowed");
    }
    for host in ["localhost", &format!("LOCALHOST:{port}"), &format!("127.0.0.1:{port}"), "[::1]:80"] {
        api.send(get().header(header::HOST, host)).await.ok();
    }
    let own = format!("http://127.0.0.1:{port}");
    for origin in
        ["http://evil.com", "null", "http://localhost.evil.com", "file://", "http://127.0.0.1@evil.com"]
    {
        api.send(get().header(header::ORIGIN, origin)).await.fails(403, "origin_not_allowed");
    }
    for origin in [own.as_str(), "http://localhost:3000", "https://[::1]:1"] {
        let answer = api.send(get().header(header::ORIGIN, origin)).await.ok();
        assert!(!answer.headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
    }
    let twice = get().header(header::ORIGIN, "http://evil.com").header(header::ORIGIN, own);
    api.send(twice).await.fails(400, "invalid_request");
    // The edge stands in front of every route, and of those that do not exist; only probes may come to
    // whatever address a node has.
    api.send(api.request(Method::GET, "/healthz").header(header::HOST, "10.0.0.7:8080")).await.ok();
    for path in ["/mcp/tools", "/nowhere", "/mcp/servers/echo"] {
        let answer = api.send(api.request(Method::GET, path).header(header::HOST, "evil.com")).await;
        answer.fails(403, "host_not_allowed");
    }
    // What a page may send without asking first is not understood as JSON.
    let form = api.request(Method::POST, "/mcp/servers").header(header::CONTENT_TYPE, "text/plain");
    api.send(form.body(r#"{"name":"x","command":"true"}"#)).await.fails(415, "unsupported_media_type");
    let own_only = Deployment::builder()
        .env("ALLOWED_HOSTS", "api.example.org")
        .env("ALLOWED_ORIGINS", "https://app.example.org")
        .start()
        .await;
    let get = || own_only.request(Method::GET, "/mcp/servers");
    own_only.send(get().header(header::HOST, "api.example.org")).await.ok();
    own_only.send(get().header(header::ORIGIN, "https://app.example.org")).await.ok();
    own_only.send(get().header(header::HOST, "evil.com")).await.fails(403, "host_not_allowed");
    unharmed(&api).await;
}

#[tokio::test]
async fn heads_that_say_two_things_are_refused() {
    let api = started().await;
    let host = api.address().to_owned();
    let head = |lines: &str| format!("GET /mcp/servers HTTP/1.1\r\n{lines}\r\n\r\n");
    raw_fails(&raw(&api, head("Accept: */*").as_bytes()).await, 400, "invalid_request");
    let two_hosts = head(&format!("Host: {host}\r\nHost: {host}"));
    raw_fails(&raw(&api, two_hosts.as_bytes()).await, 400, "invalid_request");
    let evil_second = head(&format!("Host: {host}\r\nHost: evil.com"));
    raw_fails(&raw(&api, evil_second.as_bytes()).await, 400, "invalid_request");
    let no_text = [b"GET /healthz HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n".as_slice()].concat();
    raw_fails(&raw(&api, &no_text).await, 400, "invalid_request");
    // A target with a host of its own is meant for that host, whatever the header says.
    let absolute = format!("GET http://evil.com/mcp/servers HTTP/1.1\r\nHost: {host}\r\n\r\n");
    raw_fails(&raw(&api, absolute.as_bytes()).await, 403, "host_not_allowed");
    let absolute = format!("GET http://{host}/mcp/servers HTTP/1.1\r\nHost: {host}\r\n\r\n");
    assert!(raw(&api, absolute.as_bytes()).await.starts_with("HTTP/1.1 200 "));

    // Two lengths are how requests are smuggled past whatever stands in front. The connection is closed
    // so that what follows is not taken for a request.
    let body = r#"{"username":"a"}"#;
    let chunked = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    for lengths in [
        format!("Content-Length: {}\r\nTransfer-Encoding: chunked", body.len()),
        format!("Transfer-Encoding: chunked\r\nContent-Length: {}", body.len()),
    ] {
        let request = format!(
            "POST /secrets/set HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{lengths}\r\n\r\n\
             {chunked}GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n"
        );
        let answer = raw(&api, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{lengths}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{lengths}: {answer}");
        assert!(!answer.contains(r#""status":"ok""#), "{lengths}: {answer}");
    }
    for lengths in ["Content-Length: 5\r\nContent-Length: 6", "Content-Length: -1", "Transfer-Encoding: gzip"]
    {
        let request = format!(
            "POST /secrets/set HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{lengths}\r\n\r\n{body}"
        );
        let answer = raw(&api, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{lengths}: {answer}");
    }
    unharmed(&api).await;
}

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
        for body in
            ["[]", "\"text\"", "7", "null", r#"{"username":"a","username":"b"}"#, r#"{"a":1,"\u0061":2}"#, ""]
        {
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
async fn request_ids_are_kept_or_made() {
    let api = started().await;
    let get = |id: &str| api.request(Method::GET, "/mcp/servers/nobody").header("X-Request-Id", id);
    for id in ["abc-123", "a", &"i".repeat(128), "~!@#$%^&*()"] {
        let answer = api.send(get(id)).await.fails(404, "server_not_found");
        assert_eq!(answer.headers["x-request-id"], *id);
    }
    for id in ["", "with space", &"i".repeat(129), "tab\there"] {
        let answer = api.send(get(id)).await.fails(400, "invalid_request");
        assert_ne!(answer.headers["x-request-id"], *id);
    }
    let twice = get("one").header("X-Request-Id", "two");
    api.send(twice).await.fails(400, "invalid_request");
    let latin = api.request(Method::GET, "/healthz").header("X-Request-Id", b"\xe4".as_slice());
    api.send(latin).await.fails(400, "invalid_request");
    let ids: std::collections::HashSet<_> = [
        api.get("/healthz").await.headers["x-request-id"].to_str().unwrap().to_owned(),
        api.get("/healthz").await.headers["x-request-id"].to_str().unwrap().to_owned(),
    ]
    .into();
    assert_eq!(ids.len(), 2);
    let headers = api.get("/nowhere").await.headers;
    assert_eq!(headers["x-content-type-options"], "nosniff");
    assert_eq!(headers["cache-control"], "no-store");
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
async fn heads_that_are_too_large_are_refused() {
    let api = started().await;
    let host = api.address().to_owned();
    let many: String = (0..200).map(|at| format!("X-Header-{at}: value\r\n")).collect();
    let large = format!("X-Large: {}\r\n", "x".repeat(1024 * 1024));
    for headers in [many, large] {
        let answer =
            raw(&api, format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n").as_bytes()).await;
        // What is too large may be cut off in the middle of sending it.
        let refused = ["HTTP/1.1 431 ", "HTTP/1.1 400 ", ""].iter().any(|start| answer.starts_with(start));
        assert!(refused && !answer.contains("\"ok\""), "{answer:.200}");
    }
    // What the HTTP parser still takes is refused in the words of the API.
    let get = || api.request(Method::GET, "/healthz");
    let crowd = (0..110).fold(get(), |request, at| request.header(format!("x-header-{at}"), "value"));
    api.send(crowd).await.fails(431, "headers_too_large");
    api.send(get().header("x-large", "x".repeat(70_000))).await.fails(431, "headers_too_large");
    let long = format!("/mcp/servers/{}", "x".repeat(20_000));
    api.send(api.request(Method::GET, &long)).await.fails(414, "uri_too_long");
    let fields: String = (0..300_000).map(|at| format!(",\"f{at}\":0")).collect();
    let crowded =
        api.request(Method::POST, "/mcp/tool/call").header(header::CONTENT_TYPE, "application/json");
    let answer = api.send(crowded.body(format!("{{\"serverName\":\"echo\"{fields}}}"))).await;
    assert_eq!(answer.fails(400, "invalid_request").json()["outcome"], "not_started");
    for nonsense in [
        "\r\n\r\n\r\n\r\n",
        "GET\r\n\r\n",
        "nonsense\0\u{1}\r\n\r\n",
        "GET /\0 HTTP/1.1\r\n\r\n",
        "GET /healthz HTTP/9.9\r\n\r\n",
    ] {
        let mut stream = TcpStream::connect(api.address()).await.unwrap();
        stream.write_all(nonsense.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400 "), "{nonsense:?}: {answer}");
    }
    // A long path is no route.
    let answer =
        raw(&api, format!("GET /{} HTTP/1.1\r\nHost: {host}\r\n\r\n", "p".repeat(20_000)).as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer:.200}");
    assert!(answer.len() < 1024, "{answer:.200}");
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
    for name in ["webtools", "WebTools"] {
        api.register_fixture(name, &[], json!({})).await.fails(403, "builtin_server");
        api.delete(&format!("/mcp/servers/{name}")).await.fails(403, "builtin_server");
        api.put(&format!("/mcp/servers/{name}"), Some(&json!({}))).await.fails(403, "builtin_server");
        api.put(&format!("/mcp/servers/{name}/disable"), None).await.fails(403, "builtin_server");
    }
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
    assert_eq!(api.get("/mcp/servers").await.ok().json()["servers"].as_array().unwrap().len(), 1);
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

/// Pools and balancers keep connections for later. Who has begun to ask has to go on.
#[tokio::test]
async fn a_connection_may_rest_between_requests_and_not_within_one() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let api = Deployment::start().await;
    let connect = async || tokio::net::TcpStream::connect(api.address()).await.unwrap();
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {}\r\n\r\n", api.address());
    let resting = async {
        let mut stream = connect().await;
        for pause in [Duration::ZERO, Duration::from_secs(12)] {
            tokio::time::sleep(pause).await;
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = vec![0; 4_096];
            let read = stream.read(&mut answer).await.unwrap();
            assert!(answer[..read].starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&answer));
        }
    };
    let dripping = async {
        let mut stream = connect().await;
        // The first request of the connection is in time, the second is not.
        stream.write_all(request.as_bytes()).await.unwrap();
        assert!(stream.read(&mut vec![0; 4_096]).await.unwrap() > 0);
        let begun = Instant::now();
        for byte in request.bytes().cycle() {
            let closed = tokio::time::timeout(Duration::from_millis(500), stream.read(&mut [0])).await;
            if matches!(closed, Ok(Ok(0) | Err(_))) || stream.write_all(&[byte.max(b'a')]).await.is_err() {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "a head may drip in for ever");
        }
        assert!(begun.elapsed() > Duration::from_secs(8), "it was closed before its time");
    };
    let silent = async {
        let mut stream = connect().await;
        let closed = tokio::time::timeout(Duration::from_secs(30), stream.read(&mut [0])).await;
        assert_eq!(closed.unwrap().unwrap(), 0, "who connects has to ask for something");
    };
    tokio::join!(resting, dripping, silent);
}

#[tokio::test]
async fn who_sends_or_reads_nothing_is_let_go() {
    let api = started().await;
    let call = |body: &str| {
        let head = format!(
            "POST /mcp/tool/call HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: ",
            api.address()
        );
        format!("{head}{}\r\n\r\n{body}", body.len())
    };
    let slow_body = async {
        let mut stream = TcpStream::connect(api.address()).await.unwrap();
        let request = call(r#"{"serverName": "echo", "methodName": "echo", "args": {"text": "hi"}}"#);
        let begun = Instant::now();
        stream.write_all(&request.as_bytes()[..request.len() - 10]).await.unwrap();
        let mut answer = vec![0; 4_096];
        let read = timeout(Duration::from_secs(60), stream.read(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
        assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
        assert!(answer.contains("request_timeout") && answer.contains("not_started"), "{answer}");
        assert!(begun.elapsed() > Duration::from_secs(25));
    };
    let unread = async {
        let mut stream = TcpStream::connect(api.address()).await.unwrap();
        let whole = 15 * 1024 * 1024;
        let body = json!({"serverName": "echo", "methodName": "big", "args": {"bytes": whole}});
        stream.write_all(call(&body.to_string()).as_bytes()).await.unwrap();
        // The answer begins, and fills whatever holds it on its way. Nobody reads on.
        assert!(stream.read(&mut [0; 64]).await.unwrap() > 0);
        let open = || {
            let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
            let port = |address: std::net::SocketAddr| format!(":{:04X}", address.port());
            let (own, theirs) = (port(stream.local_addr().unwrap()), port(stream.peer_addr().unwrap()));
            // As the gateway sees it: the client is its remote address. 01: established.
            sockets.lines().any(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                matches!(words[..], [_, local, remote, "01", ..] if local.ends_with(&theirs) && remote.ends_with(&own))
            })
        };
        assert!(open());
        let begun = Instant::now();
        while open() {
            assert!(begun.elapsed() < Duration::from_secs(90), "the connection is kept for ever");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        assert!(begun.elapsed() > Duration::from_secs(20), "it was closed before its time");
    };
    tokio::join!(slow_body, unread);
    unharmed(&api).await;
}
