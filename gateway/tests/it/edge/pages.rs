//! Scripts of web pages: none may read anything, unless its origin is configured.

use reqwest::{
    Method, RequestBuilder,
    header::{self, HeaderMap},
};
use serde_json::json;

use super::{ROUTES, unharmed};
use crate::deployment::Deployment;

const PAGE: &str = "https://app.example.org";

/// What a browser asks before a request of a page.
fn preflight(api: &Deployment, path: &str, origin: &str) -> RequestBuilder {
    api.request(Method::OPTIONS, path)
        .header(header::ORIGIN, origin)
        .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
        .header(header::ACCESS_CONTROL_REQUEST_HEADERS, "authorization,content-type")
}

fn allowed(headers: &HeaderMap) -> Option<&str> {
    assert!(!headers.contains_key(header::ACCESS_CONTROL_ALLOW_CREDENTIALS));
    assert!(!headers.contains_key("access-control-allow-private-network"));
    headers.get(header::ACCESS_CONTROL_ALLOW_ORIGIN).map(|origin| origin.to_str().unwrap())
}

fn lists<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
    headers[name].to_str().unwrap().split(',').map(str::trim).collect()
}

#[tokio::test]
async fn pages_read_nothing_unless_somebody_said_so() {
    let api = Deployment::builder().env("ALLOWED_ORIGINS", PAGE).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    for origin in [PAGE, "http://localhost:3000"] {
        let get = api.request(Method::GET, "/mcp/servers").header(header::ORIGIN, origin);
        let answer = api.send(get).await.ok();
        assert_eq!(allowed(&answer.headers), None, "{origin}");
        assert!(!answer.headers.contains_key(header::VARY));
        let asked =
            api.send(preflight(&api, "/mcp/tool/call", origin)).await.fails(405, "method_not_allowed");
        assert_eq!(allowed(&asked.headers), None, "{origin}");
    }
    unharmed(&api).await;
}

#[tokio::test]
async fn pages_of_configured_origins_read_answers_and_errors() {
    let api = Deployment::builder()
        .env("CORS_ORIGINS", format!("{PAGE}, http://tools.example.org:8443"))
        .env("ALLOWED_HOSTS", "api.example.org")
        .start()
        .await;
    api.add_fixture("echo", &[], json!({})).await;
    for (route, _) in ROUTES {
        let path = route.replace("{name}", "echo");
        let asked = api.send(preflight(&api, &path, PAGE)).await;
        assert_eq!((asked.status, asked.text.as_str()), (204, ""), "{route}");
        assert_eq!(allowed(&asked.headers), Some(PAGE));
        assert_eq!(asked.headers[header::VARY], "origin");
        assert_eq!(asked.headers[header::ACCESS_CONTROL_MAX_AGE], "600");
        assert!(lists(&asked.headers, "access-control-allow-methods").contains(&"DELETE"));
        for name in ["Authorization", "Content-Type", "Idempotency-Key", "X-Request-Timeout-Ms"] {
            assert!(lists(&asked.headers, "access-control-allow-headers").contains(&name), "{name}");
        }
        assert!(asked.headers.contains_key("x-request-id"));
    }
    let call = json!({"serverName": "echo", "methodName": "echo", "args": {"text": "hi"}});
    let call = || api.request(Method::POST, "/mcp/tool/call").json(&call).header(header::ORIGIN, PAGE);
    let answer = api.send(call()).await.ok();
    assert_eq!(allowed(&answer.headers), Some(PAGE));
    for name in ["X-Request-Id", "Retry-After", "RateLimit", "RateLimit-Policy", "Idempotency-Replayed"] {
        assert!(lists(&answer.headers, "access-control-expose-headers").contains(&name), "{name}");
    }
    // Pages are to show what went wrong.
    for (path, status) in [("/nowhere", 404), ("/mcp/servers/nobody", 404), ("/mcp/tool/call", 405)] {
        let answer = api.send(api.request(Method::GET, path).header(header::ORIGIN, PAGE)).await;
        assert_eq!((answer.status, allowed(&answer.headers)), (status, Some(PAGE)), "{path}");
    }
    let text = || api.request(Method::POST, "/mcp/tool/call").header(header::ORIGIN, PAGE).body("{}");
    for (request, status) in [
        (text().header(header::CONTENT_TYPE, "text/plain"), 415),
        (call().header(header::CONTENT_TYPE, "text/plain"), 400),
    ] {
        let refused = api.send(request).await;
        assert_eq!((refused.status, allowed(&refused.headers)), (status, Some(PAGE)), "{}", refused.text);
    }

    // Requests of other programs are what they were, but that caches are told.
    let plain = api.get("/mcp/servers").await.ok();
    assert_eq!(allowed(&plain.headers), None);
    assert_eq!(plain.headers[header::VARY], "origin");
    let options = api.send(api.request(Method::OPTIONS, "/mcp/servers").header(header::ORIGIN, PAGE)).await;
    options.fails(405, "method_not_allowed");
    unharmed(&api).await;
}

#[tokio::test]
async fn pages_of_other_origins_are_refused_however_they_ask() {
    let api = Deployment::builder().env("CORS_ORIGINS", PAGE).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    for origin in [
        "null",
        "https://app.example.org.evil.com",
        "https://evil-app.example.org",
        "http://app.example.org",
        "https://app.example.org:444",
        "https://app.example.org/",
        "https://app.example.org@evil.com",
        "https://sub.app.example.org",
        "*",
        "",
    ] {
        for path in ["/mcp/tool/call", "/mcp/servers", "/nowhere"] {
            let asked = api.send(preflight(&api, path, origin)).await.fails(403, "origin_not_allowed");
            assert_eq!(allowed(&asked.headers), None, "{origin}");
        }
        let get = api.request(Method::GET, "/mcp/servers").header(header::ORIGIN, origin);
        assert_eq!(allowed(&api.send(get).await.fails(403, "origin_not_allowed").headers), None);
    }
    // A page of a public network asks whether it may reach into this one.
    let asked =
        preflight(&api, "/mcp/tool/call", PAGE).header("Access-Control-Request-Private-Network", "true");
    api.send(asked).await.fails(403, "origin_not_allowed");
    // Its name resolves here by now, and the page reads its own host's answers: the host tells.
    let rebound = preflight(&api, "/mcp/tool/call", PAGE).header(header::HOST, "app.example.org");
    api.send(rebound).await.fails(403, "host_not_allowed");
    let two = preflight(&api, "/mcp/tool/call", PAGE).header(header::ORIGIN, "https://evil.com");
    let two = api.send(two).await.fails(400, "invalid_request");
    assert_eq!(allowed(&two.headers), None);
    unharmed(&api).await;
}
