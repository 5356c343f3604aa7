//! Rows about HTTP and JSON: who may ask at all, and what is no request.

use serde_json::json;

use super::{
    case::{Case, Expected, Row},
    request::Request,
};

/// Routes that read a body.
pub const BODIES: [(&str, &str); 7] = [
    ("POST", "/mcp/tool/call"),
    ("POST", "/mcp/servers"),
    ("PUT", "/mcp/servers/echo"),
    ("POST", "/mcp/servers/web/oauth"),
    ("POST", "/secrets/set"),
    ("POST", "/secrets/delete"),
    ("POST", "/packages/install"),
];
/// What a body may be by default: `PAYLOAD_LIMIT`.
const PAYLOAD_LIMIT: usize = 6 * 1024 * 1024;
/// How deep the list nests.
const DEEP: usize = 100_000;

/// All of them.
pub fn rows() -> Vec<Case> {
    [
        hosts_and_origins(),
        host_missing_or_twice(),
        two_lengths(),
        cut_off(),
        other_types(),
        too_large(),
        too_deep(),
        no_json(),
        twice(),
        timeouts(),
        heads(),
    ]
    .into_iter()
    .flat_map(Row::cases)
    .collect()
}

fn get(target: &str) -> Request {
    Request::new("GET", target)
}

fn good_call() -> Request {
    Request::call(&json!({"serverName": "echo", "methodName": "echo", "args": {"text": "x"}}))
}

fn hosts_and_origins() -> Row {
    let mut row = Row::new("3");
    for host in
        ["evil.com", "evil.com:80", "localhost.evil.com", "127.0.0.1.evil.com", "0.0.0.0", "2130706433"]
    {
        for request in [get("/mcp/servers"), get("/nowhere"), good_call()] {
            let name = format!("Host: {host}");
            row = row.refused(name, request.without("Host").header("Host", host), 403, "host_not_allowed");
        }
    }
    for origin in
        ["http://evil.com", "null", "file://", "http://localhost.evil.com", "http://127.0.0.1@evil.com"]
    {
        for request in [get("/mcp/servers"), good_call()] {
            let request = request.header("Origin", origin);
            row = row.refused(format!("Origin: {origin}"), request, 403, "origin_not_allowed");
        }
    }
    let two = |second: &str| get("/mcp/servers").header("Origin", "http://{host}").header("Origin", second);
    row.refused("two origins", two("http://evil.com"), 400, "invalid_request")
        .refused("one origin twice", two("http://{host}"), 400, "invalid_request")
        .refused("a target of another host", get("http://evil.com/mcp/servers"), 403, "host_not_allowed")
        .fine("the own origin", get("/mcp/servers").header("Origin", "http://{host}"))
}

fn host_missing_or_twice() -> Row {
    let without = || get("/mcp/servers").without("Host");
    let two = |first: &str, second: &str| without().header("Host", first).header("Host", second);
    Row::new("4")
        .refused("no host", without(), 400, "invalid_request")
        .refused("no host, and a call", good_call().without("Host"), 400, "invalid_request")
        .refused("one host twice", two("{host}", "{host}"), 400, "invalid_request")
        .refused("two hosts", two("{host}", "evil.com"), 400, "invalid_request")
        .refused("two other hosts", two("evil.com", "{host}"), 400, "invalid_request")
        .refused("no text", without().header("Host", b"\xff\xfe".as_slice()), 400, "invalid_request")
}

/// The second request would be a stranger's, if the two lengths meant two things to two readers.
fn two_lengths() -> Row {
    let smuggled = "2\r\n{}\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let request =
        || Request::body("POST", "/secrets/set", smuggled).without("Connection").without("Content-Length");
    let (length, coding) = (smuggled.len().to_string(), "chunked");
    let both = request().header("Content-Length", length.as_str()).header("Transfer-Encoding", coding);
    let other_order = request().header("Transfer-Encoding", coding).header("Content-Length", length.as_str());
    let mut row = Row::new("5").refused("a length and a coding", both, 400, "invalid_request").refused(
        "a coding and a length",
        other_order,
        400,
        "invalid_request",
    );
    for (name, value) in [("Content-Length", "-1"), ("Content-Length", "2, 3"), ("Transfer-Encoding", "gzip")]
    {
        row = row.add(format!("{name}: {value}"), request().header(name, value), Expected::Unread(400));
    }
    let lengths = request().header("Content-Length", "2").header("Content-Length", "3");
    row.add("two lengths", lengths, Expected::Unread(400))
}

fn cut_off() -> Row {
    let mut row = Row::new("6");
    for (method, target) in BODIES {
        for body in
            [r#"{"username":"#, "{", r#"{"username":"a",}"#, "{} {}", "nonsense", "{'a':1}", r#"{"a":NaN}"#]
        {
            let request = Request::body(method, target, body);
            row = row.refused(format!("{body} to {target}"), request, 400, "invalid_json");
        }
    }
    row
}

fn other_types() -> Row {
    let mut row = Row::new("7");
    for (method, target) in BODIES {
        let plain = || Request::body(method, target, "{}").without("Content-Type");
        row = row.refused(format!("no type to {target}"), plain(), 415, "unsupported_media_type");
        for kind in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/jsonx",
            "",
        ] {
            let request = plain().header("Content-Type", kind);
            row = row.refused(format!("{kind:?} to {target}"), request, 415, "unsupported_media_type");
        }
    }
    row
}

fn too_large() -> Row {
    let call = |bytes: usize| {
        let text = "x".repeat(bytes);
        json!({"serverName": "echo", "methodName": "echo", "args": {"text": text}}).to_string()
    };
    let mut row = Row::new("8");
    for (method, target) in BODIES {
        let large = || Request::body(method, target, call(PAYLOAD_LIMIT));
        row = row.refused(format!("too much to {target}"), large(), 413, "payload_too_large").refused(
            format!("too much in pieces to {target}"),
            large().chunked(),
            413,
            "payload_too_large",
        );
    }
    let lie = Request::body("POST", "/mcp/tool/call", "").without("Content-Length");
    row.refused("a length that lies", lie.header("Content-Length", "99999999999"), 413, "payload_too_large")
        .fine("nearly too much", Request::body("POST", "/mcp/tool/call", call(PAYLOAD_LIMIT - 200)))
}

/// The list says 50 ms and 1 KB. No test here asserts a speed of its own.
fn too_deep() -> Row {
    let within =
        |inner: String| format!(r#"{{"serverName":"echo","methodName":"args","args":{{"x":{inner}}}}}"#);
    let deep = |open: &str, close: &str| within(format!("{}1{}", open.repeat(DEEP), close.repeat(DEEP)));
    let mut row = Row::new("9");
    for (method, target) in BODIES {
        for (name, body) in [
            ("deep arrays", deep("[", "]")),
            ("deep objects", deep(r#"{"x":"#, "}")),
            ("deep and never closed", "[".repeat(DEEP)),
        ] {
            row = row.refused(
                format!("{name} to {target}"),
                Request::body(method, target, body),
                400,
                "invalid_json",
            );
        }
    }
    row
}

fn no_json() -> Row {
    let args = |value: &[u8]| {
        [br#"{"serverName":"echo","methodName":"args","args":{"x":"#.as_slice(), value, b"}}"].concat()
    };
    let mut row = Row::new("10");
    for (method, target) in BODIES {
        for (name, body) in [
            ("invalid UTF-8", b"{\"username\":\"\xff\xfe\"}".to_vec()),
            ("invalid UTF-8 in a name", b"{\"\xff\":1}".to_vec()),
            ("half of a character", args(b"\"\xc3\"")),
            ("a lone surrogate", br#"{"username":"\ud800"}"#.to_vec()),
            ("the other half of a surrogate", args(br#""\udfff""#)),
            ("a byte order mark", b"\xef\xbb\xbf{}".to_vec()),
            ("1e400", args(b"1e400")),
            ("-1e400", args(b"-1E+400")),
            ("a huge number", args("9".repeat(400).as_bytes())),
            ("a control character", b"{\"username\":\"a\nb\"}".to_vec()),
        ] {
            row = row.refused(
                format!("{name} to {target}"),
                Request::body(method, target, body),
                400,
                "invalid_json",
            );
        }
    }
    row
}

fn twice() -> Row {
    let mut row = Row::new("11");
    for (method, target) in BODIES {
        for body in [
            r#"{"username":"a","username":"b"}"#,
            r#"{"username":"a","userna\u006de":"a"}"#,
            r#"{"serverName":"echo","methodName":"echo","args":{},"args":{}}"#,
        ] {
            row = row.refused(
                format!("{body} to {target}"),
                Request::body(method, target, body),
                400,
                "invalid_request",
            );
        }
    }
    let body = r#"{"username":"a","username":"b"}"#;
    row.refused(
        "twice to an upgrade",
        Request::body("PUT", "/packages/pad/upgrade", body),
        400,
        "invalid_request",
    )
    .refused(
        "twice in an address",
        Request::new("DELETE", "/mcp/servers/web/oauth?username=a&username=b"),
        400,
        "invalid_request",
    )
}

fn timeouts() -> Row {
    let mut row = Row::new("27");
    for value in ["-1", "abc", "1e99", "0", "1.5", "", "+5", "0x10", "99999999999999999999999999"] {
        let request = good_call().header("X-Request-Timeout-Ms", value);
        row = row.refused(format!("{value:?}"), request, 400, "invalid_request");
    }
    row.fine("it is clamped", good_call().header("X-Request-Timeout-Ms", "999999999"))
}

fn heads() -> Row {
    let crowd =
        (0..200).fold(get("/mcp/servers"), |request, at| request.header(&format!("X-Header-{at}"), "v"));
    let large = |bytes: usize| get("/mcp/servers").header("X-Large", "x".repeat(bytes));
    let long = |bytes: usize| get(&format!("/mcp/servers/{}", "x".repeat(bytes)));
    Row::new("28")
        .refused("200 headers", crowd, 431, "headers_too_large")
        .refused("a header of 70,000 bytes", large(70_000), 431, "headers_too_large")
        .add("a header of 1 MiB", large(1 << 20), Expected::Unread(431))
        .refused("an address of 20 KiB", long(20 * 1024), 414, "uri_too_long")
        .refused("another of 20 KiB", get(&format!("/{}", "p".repeat(20 * 1024))), 414, "uri_too_long")
        .refused(
            "a query of 20 KiB",
            get(&format!("/packages?name={}", "q".repeat(20 * 1024))),
            414,
            "uri_too_long",
        )
}
