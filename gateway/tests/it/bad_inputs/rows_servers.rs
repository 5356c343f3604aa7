//! Rows about what is run and where requests go: packages, commands, addresses, headers; and what has no row.

use serde_json::{Value, json};

use super::{
    case::{Case, Expected, Place, Row},
    request::Request,
};

/// All of them. `login` is a login that was begun elsewhere, and gone through.
pub fn rows(login: &Login) -> Vec<Case> {
    let rows = [package_names(), versions(), python(), addresses(), headers(), routes(), under_way(login)];
    rows.into_iter().flat_map(Row::cases).collect()
}

/// The numbers of the rows whose cases must start nothing.
pub const STARTS_NOTHING: [&str; 3] = ["19", "20", "21"];

/// A login that is over.
pub struct Login {
    /// Path and query of the address that its browser came back to.
    pub back: String,
    /// What its browser brought along.
    pub cookie: String,
    /// The cookie of a browser that has begun another one.
    pub other: String,
    /// Where that other one was to come back to.
    pub other_back: String,
}

fn merged(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn install(more: &Value) -> Request {
    let body = json!({"name": "left-pad", "serverName": "pad"});
    Request::json("POST", "/packages/install", &merged(body, more))
}

fn python_install(more: &Value) -> Request {
    let body = json!({"name": "mcp-server-time", "runtime": "python", "pythonModule": "mcp_server_time"});
    install(&merged(body, more))
}

fn package_names() -> Row {
    let long = "a".repeat(215);
    let mut row = Row::new("19");
    for name in [
        ";id",
        "a;id",
        "$(id)",
        "`id`",
        "a|id",
        "a&id",
        "a&&id",
        "a>b",
        "a\nid",
        "a\r\nb",
        "-g",
        "--global",
        "--prefix=/",
        "--registry=http://evil.example",
        "..",
        ".",
        "../x",
        "/etc/passwd",
        "@x/../../y",
        "@x/",
        "@/y",
        "@x/y/z",
        "@x/.y",
        "a@1.0.0",
        "a@file:/etc",
        "a@npm:b",
        "git+ssh://x/y",
        "github:x/y",
        "https://x/y.tgz",
        "file:/etc",
        "a b",
        "a'b",
        "a\"b",
        "a\\b",
        "a$HOME",
        "%2e%2e",
        "Ѕerver",
        "ä",
        "a\u{202e}b",
        "a\u{200b}b",
        &long,
    ] {
        row = row.refused(
            format!("npm {name:.40?}"),
            install(&json!({"name": name})),
            400,
            "invalid_package_name",
        );
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
        "a[b]c",
        "a\n",
        "Ѕ",
        "a; os_name=='nt'",
        &long,
    ] {
        let request = python_install(&json!({"name": name}));
        row = row.refused(format!("pip {name:.40?}"), request, 400, "invalid_package_name");
    }
    row
}

fn versions() -> Row {
    let mut row = Row::new("20");
    for version in [
        "1.0.0; touch /tmp/x",
        "$(id)",
        "`id`",
        "1|id",
        "file:/etc",
        "file:../../x",
        "../x",
        "/etc",
        "git+https://x/y",
        "git+ssh://x/y",
        "https://x/y.tgz",
        "github:x/y",
        "npm:other@1",
        "-g",
        "--prefix=/",
        ">=0 || *\n",
        "1\r\n2",
        "1\0",
        "",
        "ä",
        &"9".repeat(200),
    ] {
        let request = install(&json!({"version": version}));
        row = row.refused(format!("npm {version:.40?}"), request, 400, "invalid_version");
    }
    for version in
        ["<3", ">=1", "^1", "1.0.0; os_name", "==1.0", "1.0 --hash=x", "git+https://x/y", "-r x", " 1.0", ""]
    {
        let request = python_install(&json!({"version": version}));
        row = row.refused(format!("pip {version:.40?}"), request, 400, "invalid_version");
    }
    row
}

fn python() -> Row {
    let mut row = Row::new("21");
    for (more, code) in [
        (json!({"pythonModule": "os; import x"}), "invalid_request"),
        (json!({"pythonModule": "-c"}), "invalid_request"),
        (json!({"pythonModule": "a-b"}), "invalid_request"),
        (json!({"pythonModule": "../x"}), "invalid_request"),
        (json!({"pipDependencies": ["--index-url=http://evil"]}), "invalid_request"),
        (json!({"pipDependencies": ["-r requirements.txt"]}), "invalid_request"),
        (json!({"pipDependencies": ["a @ https://x/y.whl"]}), "invalid_request"),
        (json!({"pipDependencies": ["git+https://x/y"]}), "invalid_request"),
        (json!({"pipDependencies": ["../a"]}), "invalid_request"),
        (json!({"pipDependencies": ["a\n--index-url=http://evil"]}), "invalid_request"),
        (json!({"pipDependencies": "a"}), "invalid_request"),
        (json!({"pipIndexUrl": "http://169.254.169.254/"}), "blocked_address"),
        (json!({"pipIndexUrl": "https://127.0.0.1/simple"}), "blocked_address"),
        (json!({"pipIndexUrl": "https://[::ffff:10.0.0.7]/"}), "blocked_address"),
        (json!({"pipExtraIndexUrl": "http://169.254.169.254/"}), "blocked_address"),
        (json!({"pipIndexUrl": "http://pypi.example.org/simple"}), "invalid_request"),
        (json!({"pipIndexUrl": "https://u:p@pypi.example.org"}), "invalid_request"),
        (json!({"pipExtraIndexUrl": "file:///etc"}), "invalid_request"),
    ] {
        row = row.refused(more.to_string(), python_install(&more), 400, code);
    }
    row
}

/// A remote server that is good but for `more`, in all requests that could name one.
fn remote(mut row: Row, more: &Value, code: &'static str) -> Row {
    let record = json!({"name": "new", "transportType": "streamable_http", "url": "https://mcp.example.org/mcp",
        "enabled": false});
    let change = json!({"transportType": "streamable_http"});
    let package = merged(record.clone(), &json!({"name": "left-pad", "serverName": "pad"}));
    for (method, target, body) in [
        ("POST", "/mcp/servers", record),
        ("PUT", "/mcp/servers/web", change),
        ("POST", "/packages/install", package),
    ] {
        let request = Request::json(method, target, &merged(body, more));
        row = row.refused(format!("{more} to {target}"), request, 400, code);
    }
    row
}

fn addresses() -> Row {
    let mut row = Row::new("23");
    for url in [
        "http://127.0.0.1",
        "http://127.0.0.1:21099/mcp",
        "http://127.1",
        "http://2130706433",
        "http://0x7f000001",
        "http://0177.0.0.1",
        "http://127.0.0.1.",
        "http://127。0。0。1",
        "http://0.0.0.0",
        "http://10.1.2.3",
        "https://172.16.0.1/mcp",
        "https://192.168.1.1/mcp",
        "http://169.254.169.254/latest/meta-data",
        "http://100.64.0.1",
        "http://[::1]",
        "http://[::]",
        "http://[::ffff:7f00:1]",
        "http://[::ffff:127.0.0.1]",
        "http://[::ffff:a9fe:a9fe]",
        "http://[64:ff9b::7f00:1]",
        "http://[2002:7f00:1::]",
        "http://[fe80::1]",
        "http://[fd00:ec2::254]",
        "http://localhost",
        "http://localhost.",
        "http://LOCALHOST:8080",
        "http://a.localhost",
    ] {
        row = remote(row, &json!({ "url": url }), "blocked_address");
    }
    for url in [
        "file:///etc/passwd",
        "gopher://mcp.example.org",
        "javascript:alert(1)",
        "mcp.example.org",
        "https://",
        "http://u:p@h",
        "https://u@mcp.example.org",
        "http://evil.com#@mcp.example.org",
        "https://mcp.example.org:0/mcp",
        "https://1.2.3.4.5/",
        "https://a b/",
        "https://mcp.example\r\n.org/",
        "https://mcp.example.org/\u{0}",
    ] {
        row = remote(row, &json!({ "url": url }), "invalid_url");
    }
    // It leads to this machine, which is seen when it is connected to.
    let call = json!({"serverName": "inward", "methodName": "echo", "args": {}});
    row.refused("a name that leads inward", Request::call(&call), 502, "blocked_address")
}

fn headers() -> Row {
    let mut row = Row::new("24");
    for name in [
        "Transfer-Encoding",
        "Host",
        "content-length",
        "Connection",
        "Keep-Alive",
        "UPGRADE",
        "TE",
        "Trailer",
        "Proxy-Authorization",
        "Mcp-Session-Id",
        "MCP-Protocol-Version",
        "Accept",
        "Content-Type",
        "Content-Encoding",
    ] {
        row = remote(row, &json!({"headers": {name: "x"}}), "invalid_header");
    }
    for headers in [
        json!({"X": "a\r\nY: b"}),
        json!({"X": "a\nb"}),
        json!({"X": "a\u{0}"}),
        json!({"X": "ž"}),
        json!({"X: y": "a"}),
        json!({"X\r\nY": "a"}),
        json!({"": "a"}),
        json!({"X-One": "a", "x-one": "b"}),
    ] {
        row = remote(row, &json!({ "headers": headers }), "invalid_header");
    }
    row
}

/// What has no row of its own. There is no MCP endpoint in this version: what the list says of one is for when
/// there is, and until then there is no such route.
fn routes() -> Row {
    Row::new("extra")
        .refused("another method", Request::new("GET", "/mcp/tool/call"), 405, "method_not_allowed")
        .with("allow", "POST")
        .refused(
            "a method that nobody has",
            Request::new("PROPFIND", "/mcp/tools"),
            405,
            "method_not_allowed",
        )
        .with("allow", "")
        .refused("an unknown route", Request::new("GET", "/nowhere"), 404, "not_found")
        .refused("an unknown route with a body", Request::json("POST", "/mcp", &json!({})), 404, "not_found")
        .refused("another case", Request::new("GET", "/MCP/tools"), 404, "not_found")
        .refused("one more slash", Request::new("GET", "//mcp/tools"), 404, "not_found")
        .refused("no state", Request::new("GET", "/auth/callback?code=x"), 400, "invalid_state")
        .refused(
            "nobody's state",
            Request::new("GET", "/auth/callback?code=x&state=nobodys"),
            400,
            "invalid_state",
        )
        .refused(
            "nobody's state, Google",
            Request::new("GET", "/auth/google/callback?code=x&state=x"),
            400,
            "invalid_state",
        )
        .refused(
            "what mcp-api took for a state",
            Request::new("GET", "/auth/google/callback?code=x&state=%7B%22userId%22%3A%22victim%22%7D"),
            400,
            "invalid_state",
        )
        .add("nonsense", Request::new("GET", "/ HTTP/9.9 x"), Expected::Unread(400))
        .add("another version", Request::new("GET", "/healthz").version("HTTP/9.9"), Expected::Unread(400))
}

/// What needs something that is under way, or over.
fn under_way(login: &Login) -> Row {
    let back = |back: &str, cookie: Option<&str>| {
        let request = Request::new("GET", back);
        cookie.into_iter().fold(request, |request, cookie| request.header("Cookie", cookie))
    };
    let other = json!({"name": "other", "serverName": "clock"});
    Row::new("extra")
        .at(Place::Busy)
        .refused("a login that is over", back(&login.back, Some(&login.cookie)), 400, "invalid_state")
        .refused("without its browser", back(&login.other_back, None), 400, "invalid_state")
        .refused("another browser", back(&login.other_back, Some(&login.cookie)), 400, "invalid_state")
        .refused(
            "another kind",
            back(&login.other_back.replace("/auth/", "/auth/google/"), Some(&login.other)),
            400,
            "invalid_state",
        )
        .refused(
            "installed twice at once",
            Request::json("POST", "/packages/install", &other),
            409,
            "install_in_progress",
        )
        .refused("removed meanwhile", Request::new("DELETE", "/packages/clock"), 409, "install_in_progress")
}
