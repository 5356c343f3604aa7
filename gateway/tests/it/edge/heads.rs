//! Heads of requests: hosts, origins, lengths, sizes, and what is smuggled in them.

use reqwest::{Method, header};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{raw, raw_fails, started, unharmed};
use crate::deployment::{Deployment, PATIENCE};

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
    for path in ["/mcp/tools", "/nowhere", "/mcp/servers/echo", "/metrics"] {
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
