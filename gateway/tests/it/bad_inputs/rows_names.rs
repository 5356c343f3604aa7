//! Rows about names: of users, servers, tools, secrets and calls.

use serde_json::{Value, json};

use super::{
    case::{Case, Expected, Row},
    request::Request,
    rows_http::BODIES,
};

/// Routes with the name of a server in their address.
const NAMED: [(&str, &str); 8] = [
    ("GET", "/mcp/servers/{}"),
    ("PUT", "/mcp/servers/{}"),
    ("DELETE", "/mcp/servers/{}"),
    ("PUT", "/mcp/servers/{}/enable"),
    ("PUT", "/mcp/servers/{}/disable"),
    ("GET", "/mcp/servers/{}/delete-impact"),
    ("POST", "/mcp/servers/{}/oauth"),
    ("DELETE", "/mcp/servers/{}/oauth"),
];

/// All of them.
pub fn rows() -> Vec<Case> {
    let rows = [
        other_types(),
        users(),
        arguments(),
        paths(),
        subjects(),
        absent(),
        tools(),
        secrets(),
        idempotency(),
    ];
    rows.into_iter().flat_map(Row::cases).collect()
}

/// A body that is good for a route of [`BODIES`].
fn good(target: &str) -> Value {
    match target {
        "/mcp/tool/call" => {
            json!({"username": "alice", "serverName": "echo", "methodName": "args", "args": {}})
        }
        "/mcp/servers" => json!({"username": "alice", "name": "new", "command": "node", "enabled": false}),
        "/secrets/set" => {
            json!({"username": "alice", "serverName": "echo", "secretName": "K", "secretValue": "new"})
        }
        "/secrets/delete" => json!({"username": "alice", "serverName": "echo", "secretName": "K"}),
        "/packages/install" => json!({"username": "alice", "name": "left-pad", "serverName": "pad"}),
        "/mcp/servers/web/oauth" => json!({"username": "alice", "accessToken": "token"}),
        _ => json!({"username": "alice"}),
    }
}

/// That body with another field.
pub fn with(target: &str, field: &str, value: Value) -> Value {
    let mut body = good(target);
    body[field] = value;
    body
}

/// A name in an address.
fn encoded(name: &str) -> String {
    name.bytes()
        .map(
            |byte| {
                if byte.is_ascii_alphanumeric() {
                    char::from(byte).to_string()
                } else {
                    format!("%{byte:02x}")
                }
            },
        )
        .collect()
}

fn short(name: &str) -> String {
    format!("{:?}", name.chars().take(24).collect::<String>())
}

fn other_types() -> Row {
    let mut row = Row::new("12");
    for (method, target) in BODIES {
        let texts: &[&str] = match target {
            "/mcp/tool/call" => &["username", "serverName", "methodName"],
            "/mcp/servers" => {
                &["username", "name", "command", "transportType", "description", "url", "sessionId"]
            }
            "/secrets/set" => &["username", "serverName", "secretName", "secretValue"],
            "/secrets/delete" => &["username", "serverName", "secretName"],
            "/packages/install" => &["username", "name", "serverName", "version", "runtime"],
            "/mcp/servers/web/oauth" => &["username", "accessToken", "refreshToken", "clientId", "issuer"],
            _ => &["username", "command", "description", "transportType"],
        };
        for field in texts {
            for value in [
                json!({"$ne": null}),
                json!({"$gt": ""}),
                json!({"$where": "1"}),
                json!(["a"]),
                json!(7),
                json!(true),
            ] {
                let request = Request::json(method, target, &with(target, field, value.clone()));
                row = row.refused(format!("{field} {value} to {target}"), request, 400, "invalid_request");
            }
        }
    }
    // A pattern is a name like any other, and is no other's.
    let patterns = [".*", "^", "K|X"].map(|name| with("/secrets/delete", "secretName", json!(name)));
    patterns.iter().fold(row, |row, body| {
        row.add(
            format!("deletes nothing: {body}"),
            Request::json("POST", "/secrets/delete", body),
            Expected::Fine,
        )
    })
}

fn users() -> Row {
    let mut row = Row::new("13");
    for user in ["", "  ", "\t", &"u".repeat(300), "a\0b", "a\r\nb", "a\u{202e}b", "a\u{200b}", "a\u{7f}"] {
        for (method, target) in BODIES {
            let request = Request::json(method, target, &with(target, "username", json!(user)));
            row = row.refused(format!("{} to {target}", short(user)), request, 400, "invalid_request");
        }
        if !user.is_empty() {
            for (method, target) in [("DELETE", "/mcp/servers/web/oauth"), ("GET", "/auth/web/login")] {
                let request = Request::new(method, format!("{target}?username={}", encoded(user)));
                row = row.refused(format!("{} to {target}", short(user)), request, 400, "invalid_request");
            }
        }
    }
    row
}

fn arguments() -> Row {
    let mut row = Row::new("14");
    for value in [json!([1]), json!([]), json!("text"), json!(7), json!(false)] {
        let request = Request::call(&with("/mcp/tool/call", "args", value.clone()));
        row = row.refused(value.to_string(), request, 400, "invalid_request");
    }
    let absent = json!({"serverName": "echo", "methodName": "args"});
    row.fine("null", Request::call(&with("/mcp/tool/call", "args", Value::Null)))
        .fine("none", Request::call(&absent))
}

/// Names that no server has, wherever a name may stand. A record that mcp-api left behind may have dots, spaces
/// and slashes in its name (`api.md`): such a name is looked up, and is not there.
fn everywhere(mut row: Row, name: &str) -> Row {
    let bad = Some("invalid_server_name");
    for (field, method, target, code) in [
        ("serverName", "POST", "/mcp/tool/call", bad.filter(|_| !is_legal(name))),
        ("serverName", "POST", "/secrets/set", bad.filter(|_| !is_legal(name))),
        ("serverName", "POST", "/secrets/delete", bad.filter(|_| !is_legal(name))),
        ("name", "POST", "/mcp/servers", bad),
        ("serverName", "POST", "/packages/install", bad),
    ] {
        let request = Request::json(method, target, &with(target, field, json!(name)));
        let (status, code) = code.map_or((404, "server_not_found"), |code| (400, code));
        row = row.refused(format!("{} to {target}", short(name)), request, status, code);
    }
    for (method, pattern) in NAMED {
        let target = pattern.replace("{}", &encoded(name));
        let request = match method {
            "GET" | "DELETE" => Request::new(method, target),
            _ => Request::json(method, &target, &json!({"accessToken": "token"})),
        };
        let (status, code) =
            if is_legal(name) { (404, "server_not_found") } else { (400, "invalid_server_name") };
        row = row.refused(format!("{method} {pattern} {}", short(name)), request, status, code);
    }
    row
}

fn is_legal(name: &str) -> bool {
    matches!(name, "a/b" | "a b" | "a.b")
}

fn paths() -> Row {
    let mut row = Row::new("15");
    for name in [
        "../../etc",
        "..%2f..%2fetc",
        "a/b",
        "/abs",
        ".",
        "..",
        "a/../b",
        "a//b",
        "a/",
        "./a",
        "~/x",
        "a\\..\\b",
    ] {
        row = everywhere(row, name);
    }
    // As they are: nothing cleans them on the way.
    for (target, status, code) in [
        ("/mcp/servers/..%2f..%2fetc", 400, "invalid_server_name"),
        ("/mcp/servers/%2e%2e", 400, "invalid_server_name"),
        ("/mcp/servers/..", 400, "invalid_server_name"),
        ("/mcp/servers/../../etc", 404, "not_found"),
        ("/mcp/servers/%2fetc%2fpasswd", 400, "invalid_server_name"),
        ("/mcp/servers/%ff%fe", 400, "invalid_server_name"),
        ("/mcp/servers//", 404, "not_found"),
        ("/packages/by-id/..%2f..%2fetc", 404, "package_not_found"),
        ("/packages/jobs/..%2f..%2fetc", 404, "job_not_found"),
    ] {
        row = row.refused(target, Request::new("GET", target), status, code);
    }
    row
}

fn subjects() -> Row {
    let mut row = Row::new("16");
    for name in [
        "a.*",
        ">",
        "*",
        "a b",
        "a.b",
        "a\r\nPUB x 1",
        "a\r\nPUB x 1\r\na\r\n",
        "%00",
        "a\0",
        "a\u{202e}b",
        "ä",
        "$SYS.>",
        "a\tb",
        "_INBOX.>",
        &"n".repeat(200),
    ] {
        row = everywhere(row, name);
    }
    row
}

fn absent() -> Row {
    let mut row = Row::new("17");
    for target in ["/mcp/tool/call", "/secrets/set", "/secrets/delete"] {
        let request = Request::json("POST", target, &with(target, "serverName", json!("nobody")));
        row = row.refused(format!("unknown to {target}"), request, 404, "server_not_found");
    }
    for (method, pattern) in NAMED {
        let target = pattern.replace("{}", "nobody");
        let request = match method {
            "GET" | "DELETE" => Request::new(method, target),
            _ => Request::json(method, &target, &json!({"accessToken": "token"})),
        };
        row = row.refused(format!("unknown to {method} {pattern}"), request, 404, "server_not_found");
    }
    row.refused("unknown to a login", Request::new("GET", "/auth/nobody/login"), 404, "server_not_found")
        .refused(
            "disabled",
            Request::call(&with("/mcp/tool/call", "serverName", json!("off"))),
            409,
            "server_disabled",
        )
}

fn tools() -> Row {
    let named = |name: &str| Request::call(&with("/mcp/tool/call", "methodName", json!(name)));
    let mut row = Row::new("18");
    for name in ["", &"m".repeat(10 * 1024), "a\0", "a\r\nb", "a\u{202e}b"] {
        row = row.refused(short(name), named(name), 400, "invalid_request");
    }
    // The server's own word for it: it answers with a result that is an error.
    for name in ["no_such_tool", "__proto__", "constructor", "../../etc", "$(id)", "a b"] {
        row = row.add(name, named(name), Expected::Told);
    }
    row
}

fn secrets() -> Row {
    let mut row = Row::new("25");
    let set = |field: &str, value: &str| {
        Request::json("POST", "/secrets/set", &with("/secrets/set", field, json!(value)))
    };
    for value in ["", &"x".repeat(65 * 1024 + 1), &"x".repeat(64 * 1024 + 1), "a\0b"] {
        row = row.refused(
            format!("secretValue {}", short(value)),
            set("secretValue", value),
            400,
            "invalid_request",
        );
    }
    for name in ["", "  ", "$where", "a$b", "a\0", "a\r\nb", "a\u{202e}b", &"n".repeat(129)] {
        let delete =
            Request::json("POST", "/secrets/delete", &with("/secrets/delete", "secretName", json!(name)));
        row = row
            .refused(format!("secretName {}", short(name)), set("secretName", name), 400, "invalid_request")
            .refused(format!("secretName {} away", short(name)), delete, 400, "invalid_request");
    }
    row
}

/// The names of calls that the test has made before.
pub const USED: &str = "used";
/// A call that is under way for as long as the test takes.
pub const IN_FLIGHT: &str = "in-flight";

/// The call that was made as [`USED`].
pub fn used() -> Value {
    json!({"username": "alice", "serverName": "echo", "methodName": "echo", "args": {"text": "once"}})
}

/// The call that is made as [`IN_FLIGHT`].
pub fn in_flight() -> Value {
    json!({"username": "alice", "serverName": "echo", "methodName": "sleep", "args": {"ms": 600_000}})
}

fn idempotency() -> Row {
    let named = |body: &Value, key: &str| Request::call(body).header("Idempotency-Key", key);
    let mut other = used();
    other["args"]["text"] = "twice".into();
    let mut row = Row::new("26")
        .refused("another body", named(&other, USED), 422, "idempotency_key_reused")
        .refused("in flight", named(&in_flight(), IN_FLIGHT), 409, "idempotency_in_progress")
        .fine("the same body", named(&used(), USED))
        .with("idempotency-replayed", "true");
    for key in ["", "   ", &"k".repeat(300), "k\u{e4}"] {
        row = row.refused(short(key), named(&used(), key), 400, "invalid_request");
    }
    row
}
