//! The recorded exchanges with the program that this one succeeds, run against a deployment of ours.
//!
//! Clients of that program must work with this one unchanged, so each recorded request is sent in turn
//! and each recorded answer is held against ours. Where ours is different on purpose, `DIFFERENCES.md`
//! beside the recordings says so and why. It is written for people and read by this test: a difference
//! that it does not name fails the test, and so does an entry that is not, or no longer, a difference.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use mcp_shared::{
    error::ErrorCode,
    testing::registry::{Registry, python_server},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    deployment::{Answer, Deployment, eventually, fixture},
    packages::from,
};

/// What stands in the recordings for the program and the argument of the recorded MCP server.
const RECORDED_COMMAND: &str = "node";
const RECORDED_ARGUMENT: &str = "{{ECHO_SERVER}}";
/// How the one body that is too large to be kept in a file is described.
const OVERSIZED: &str = "valid call of echo with text = \"x\" * (6*1024*1024+100)";
/// The path whose errors say what is known about the call.
const CALL: &str = "/mcp/tool/call";
/// The package of npm that the recordings install, and the older one of its two versions.
const EVERYTHING: &str = "@modelcontextprotocol/server-everything";
const OLDER: &str = "2026.1.14";
/// The places of a difference that are not inside a JSON body.
const STATUS: &str = "status";
const BODY: &str = "body";

#[tokio::test]
async fn every_recorded_exchange_is_answered_alike_or_differs_as_the_table_says() {
    let mut table = Table::read();
    let mut wrong = Vec::new();
    let registry = registry();
    // The recorded program refuses the addresses of its own machine, as ours does unless it is told.
    let api = from(&registry).env("EGRESS_ALLOW", "").start().await;
    for (file, recording) in recordings() {
        prepare(&api, &recording.name).await;
        let answer = send(&api, &recording.request).await;
        wrong.extend(form(&recording.request, &answer).into_iter().map(|what| format!("{file}: {what}")));
        for difference in differences(&recording.response, &answer) {
            wrong.extend(table.check(&file, &difference));
        }
    }
    wrong.extend(table.unused());
    assert!(
        wrong.is_empty(),
        "the recordings and DIFFERENCES.md do not agree with us:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn recordings_of_later_work_wait_outside_of_the_suite() {
    let here: BTreeSet<String> = recordings().into_keys().collect();
    let later = later();
    assert!(!later.is_empty(), "without later work its part of the table can go");
    for file in &later {
        assert!(!here.contains(file), "{file} is run, so it is not later work any more");
    }
    let numbers: BTreeSet<&str> = here.iter().chain(&later).map(|file| &file[..3]).collect();
    assert_eq!(numbers.len(), here.len() + later.len(), "two recordings have one number");
}

/// One request and what the recorded program answered.
#[derive(Deserialize)]
struct Recording {
    name: String,
    request: Request,
    response: Response,
}

#[derive(Deserialize)]
struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: Option<Value>,
    body_raw: Option<String>,
    body_note: Option<String>,
}

#[derive(Deserialize)]
struct Response {
    status: u16,
    body: Option<Value>,
    body_raw: Option<String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat")
}

/// All recordings by the names of their files, which begin with their numbers and so give the order.
fn recordings() -> BTreeMap<String, Recording> {
    let files = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            let recording = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path:?}: {error}"));
            (path.file_stem().unwrap().to_str().unwrap().to_owned(), recording)
        })
        .collect()
}

/// A registry with the packages that the recordings install. What runs are servers of ours: of the tools
/// that the packages have in the world, there is the one that is called.
fn registry() -> Registry {
    let registry = Registry::start();
    for version in [OLDER, "2026.8.31"] {
        let files = [("dist/index.js", EVERYTHING_SERVER)];
        let package = r#"{"bin": {"mcp-server-everything": "dist/index.js"}}"#;
        registry.add_npm(EVERYTHING, version, &files, package);
    }
    let (name, version) = ("mcp-server-time", "2026.10.19");
    let files =
        [("mcp_server_time/__init__.py", ""), ("mcp_server_time/__main__.py", &python_server(version))];
    registry.add_python(name, version, &files);
    registry
}

/// What happened before some recordings without being an exchange that is run here.
async fn prepare(api: &Deployment, name: &str) {
    match name {
        // The recording was made half a second after the kill. We go on as soon as the death was noticed,
        // since a call that is written to a dying process is another case with another answer.
        "call-after-upstream-killed" => {
            let pids = api.pids("echo-node").await;
            assert!(!pids.is_empty(), "nothing to kill");
            for pid in &pids {
                kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap();
            }
            eventually("the killed process is shown no more", || async {
                api.pids("echo-node").await.iter().all(|pid| !pids.contains(pid))
            })
            .await;
        }
        // An endpoint of later work stored this secret in the recordings.
        "delete-impact" => drop(api.set_secret("alice", "echo-sec", "TOKEN", "t1").await.ok()),
        // The first install was repeated: the recorded program tells so in the package's record.
        "packages-list" => {
            let body = json!({"name": EVERYTHING, "serverName": "everything"});
            api.post("/packages/install", &body).await.fails(409, "server_already_exists");
        }
        // Somebody asked for updates, since here the recorded document knows the latest version and in
        // the list before it does not.
        "package-by-name" => drop(api.get("/packages?checkUpdates=true").await.ok()),
        "packages-updates-after-pin" => {
            let body = json!({"version": OLDER});
            api.put("/packages/everything/upgrade", Some(&body)).await.ok();
        }
        _ => {}
    }
}

async fn send(api: &Deployment, recorded: &Request) -> Answer {
    let method: Method = recorded.method.parse().unwrap();
    let mut request = api.request(method, &recorded.path);
    for (name, value) in &recorded.headers {
        request = request.header(name, value);
    }
    let body = match (&recorded.body, &recorded.body_raw, &recorded.body_note) {
        (Some(body), None, None) => Some(with_our_fixture(body).to_string()),
        (None, Some(text), None) => Some(text.clone()),
        (None, None, Some(note)) => {
            assert_eq!(note, OVERSIZED, "a body that this suite cannot make");
            let text = "x".repeat(6 * 1024 * 1024 + 100);
            let call = json!({"username": "alice", "serverName": "echo-node", "methodName": "echo"});
            let mut call = call.as_object().unwrap().clone();
            call.insert("args".to_owned(), json!({ "text": text }));
            Some(Value::Object(call).to_string())
        }
        (None, None, None) => None,
        _ => panic!("a request has one body"),
    };
    api.send(match body {
        Some(body) => request.body(body),
        None => request,
    })
    .await
}

/// The recorded MCP server replaced by the fixture, wherever a document names it.
fn with_our_fixture(recorded: &Value) -> Value {
    let ours = fixture("", &[]);
    let theirs = json!({"command": RECORDED_COMMAND, "args": [RECORDED_ARGUMENT]});
    replaced(recorded, &theirs, &ours)
}

/// The fixture replaced by the recorded MCP server, wherever a document names it.
fn with_their_fixture(answer: &Value) -> Value {
    let ours = fixture("", &[]);
    let theirs = json!({"command": RECORDED_COMMAND, "args": [RECORDED_ARGUMENT]});
    replaced(answer, &ours, &theirs)
}

fn replaced(value: &Value, from: &Value, to: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let mut members: Map<String, Value> =
                members.iter().map(|(name, value)| (name.clone(), replaced(value, from, to))).collect();
            let parts = ["command", "args"];
            if parts.iter().all(|part| members.get(*part) == Some(&from[part])) {
                for part in parts {
                    members.insert(part.to_owned(), to[part].clone());
                }
            }
            Value::Object(members)
        }
        Value::Array(items) => items.iter().map(|item| replaced(item, from, to)).collect(),
        other => other.clone(),
    }
}

/// What every answer of ours has, whatever was recorded. Returns what is wrong.
fn form(request: &Request, answer: &Answer) -> Vec<String> {
    let body = answer.json();
    let header = |name: &str| answer.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
    let failed = answer.status >= 400;
    let mut rules = vec![
        ("the content type is JSON", header("content-type") == "application/json; charset=utf-8"),
        ("X-Request-Id is set", !header("x-request-id").is_empty()),
    ];
    if failed {
        let code = body["code"].as_str().unwrap_or_default();
        let outcome = body["outcome"].as_str().unwrap_or_default();
        let is_call = request.method == "POST" && request.path == CALL;
        rules.extend([
            ("success is false", body["success"] == false),
            ("error is a sentence", body["error"].as_str().is_some_and(|text| !text.is_empty())),
            ("code is one of ours", ErrorCode::ALL.iter().any(|known| known.as_str() == code)),
            ("requestId is that of the header", body["requestId"] == header("x-request-id")),
            ("retryable is true or false", body["retryable"].is_boolean()),
            (
                "a call's error says what is known about the call",
                !is_call || ["not_started", "unknown", "completed"].contains(&outcome),
            ),
        ]);
    } else {
        rules.push(("success is true", body["success"] == true || request.path == "/healthz"));
    }
    let broken = rules.into_iter().filter(|(_, holds)| !holds);
    broken.map(|(rule, _)| format!("not so: {rule}: {} {}", answer.status, answer.text)).collect()
}

/// One way in which an answer is not as recorded.
struct Difference {
    /// `status`, `body`, or a pointer into the recorded body.
    place: String,
    recorded: Option<Value>,
    ours: Option<Value>,
}

fn differences(recorded: &Response, answer: &Answer) -> Vec<Difference> {
    let mut found = Vec::new();
    let ours = with_their_fixture(&answer.json());
    if recorded.status != answer.status {
        let code = ours["code"].as_str().map(|code| format!(" {code}")).unwrap_or_default();
        found.push(Difference {
            place: STATUS.to_owned(),
            recorded: Some(recorded.status.to_string().into()),
            ours: Some(format!("{}{code}", answer.status).into()),
        });
    }
    match (&recorded.body, &recorded.body_raw) {
        // Documents of a success and of a failure have nothing in common that could be compared.
        (Some(body), None) if (recorded.status < 400) == (answer.status < 400) => {
            compare("", Some(body), Some(&ours), &mut found);
        }
        (body, text) => {
            let recorded = body.clone().or_else(|| text.clone().map(Value::String));
            found.push(Difference { place: BODY.to_owned(), recorded, ours: Some(ours) });
        }
    }
    found
}

/// Every recorded field must be there with its value. Fields that only we have do not matter.
fn compare(place: &str, recorded: Option<&Value>, ours: Option<&Value>, found: &mut Vec<Difference>) {
    match (recorded, ours) {
        (Some(Value::Object(theirs)), Some(Value::Object(own))) => {
            for (name, value) in theirs {
                compare(&format!("{place}/{name}"), Some(value), own.get(name), found);
            }
        }
        (Some(Value::Array(theirs)), Some(Value::Array(own))) if is_unordered(place) => {
            let (theirs, own) = (named(place, theirs), named(place, own));
            for name in theirs.keys().chain(own.keys()).collect::<BTreeSet<_>>() {
                let (theirs, own) = (theirs.get(name).copied(), own.get(name).copied());
                compare(&format!("{place}/{name}"), theirs, own, found);
            }
        }
        (Some(Value::Array(theirs)), Some(Value::Array(own))) if theirs.len() == own.len() => {
            for (at, (theirs, own)) in theirs.iter().zip(own).enumerate() {
                compare(&format!("{place}/{at}"), Some(theirs), Some(own), found);
            }
        }
        (Some(Value::String(theirs)), Some(Value::String(own))) if same_shape(theirs, own) => {}
        _ if recorded == ours => {}
        _ => found.push(Difference {
            place: place.to_owned(),
            recorded: recorded.cloned(),
            ours: ours.cloned(),
        }),
    }
}

/// Lists whose order means nothing: the servers, and the tools of each server.
fn is_unordered(place: &str) -> bool {
    matches!(place, "/servers" | "/tools")
}

/// The entries of such a list by the name of the server.
fn named<'a>(place: &str, list: &'a [Value]) -> BTreeMap<&'a str, &'a Value> {
    let entries = list.iter().map(|entry| match (place, entry) {
        ("/servers", server) => (server["name"].as_str().unwrap(), server),
        (_, Value::Object(tools)) if tools.len() == 1 => {
            let (name, tools) = tools.iter().next().unwrap();
            (name.as_str(), tools)
        }
        _ => panic!("not the tools of one server: {entry}"),
    });
    let by_name: BTreeMap<_, _> = entries.collect();
    assert_eq!(by_name.len(), list.len(), "a server is listed twice");
    by_name
}

/// Whether both texts are moments, or both ids: values that no two runs share.
fn same_shape(one: &str, other: &str) -> bool {
    [is_moment, is_id].iter().any(|shape| shape(one) && shape(other))
}

/// `2026-11-22T16:48:29.287Z`.
fn is_moment(text: &str) -> bool {
    text.len() == 24
        && text.bytes().zip("0000-00-00T00:00:00.000Z".bytes()).all(|(byte, pattern)| match pattern {
            b'0' => byte.is_ascii_digit(),
            _ => byte == pattern,
        })
}

/// 24 hexadecimal digits.
fn is_id(text: &str) -> bool {
    text.len() == 24 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The deliberate differences.
struct Table {
    entries: BTreeMap<(String, String), Entry>,
}

struct Entry {
    recorded: Cell,
    ours: Cell,
    used: bool,
}

impl Table {
    /// Each entry of the file, for each of the recordings and places that it names.
    fn read() -> Self {
        let mut entries = BTreeMap::new();
        for row in rows("Differences") {
            let [files, places, recorded, ours, reason] = &row[..] else {
                panic!("a difference has five columns: {row:?}")
            };
            assert!(!reason.is_empty(), "a difference has a reason: {row:?}");
            for file in files.split(", ") {
                for place in places.split(", ").map(|place| unquoted(place).unwrap_or(place)) {
                    let cell = |text| Cell::parse(place, text);
                    let entry = Entry { recorded: cell(recorded), ours: cell(ours), used: false };
                    let before = entries.insert((file.to_owned(), place.to_owned()), entry);
                    assert!(before.is_none(), "two entries for {file} {place}");
                }
            }
        }
        Self { entries }
    }

    /// Whether a difference is in the table as it is. Returns the entry that should be there if not.
    fn check(&mut self, file: &str, difference: &Difference) -> Option<String> {
        let Difference { place, recorded, ours } = difference;
        let known = self.entries.get_mut(&(file.to_owned(), place.clone())).is_some_and(|entry| {
            entry.used = true;
            entry.recorded.fits(place, recorded.as_ref()) && entry.ours.fits(place, ours.as_ref())
        });
        (!known).then(|| {
            let [recorded, ours] = [recorded, ours].map(|value| show(place, value.as_ref()));
            format!("not in the table: | {file} | `{place}` | {recorded} | {ours} | |")
        })
    }

    /// Entries that were no difference.
    fn unused(&self) -> impl Iterator<Item = String> {
        let unused = self.entries.iter().filter(|(_, entry)| !entry.used);
        unused.map(|((file, place), _)| format!("no difference: {file} {place}"))
    }
}

/// What the table says about one side of a difference.
enum Cell {
    /// The field is not there.
    Absent,
    /// Something of a kind, whose value changes or is too long for a table.
    Kind(fn(&Value) -> bool),
    /// This value.
    Value(Value),
}

impl Cell {
    fn parse(place: &str, text: &str) -> Self {
        match (unquoted(text), text) {
            (Some(status), _) if place == STATUS => Self::Value(status.into()),
            (Some(json), _) => {
                Self::Value(serde_json::from_str(json).unwrap_or_else(|error| panic!("{json}: {error}")))
            }
            (None, "absent") => Self::Absent,
            (None, "an object") => Self::Kind(Value::is_object),
            (None, "a list") => Self::Kind(Value::is_array),
            (None, "a text") => Self::Kind(Value::is_string),
            _ => panic!("`JSON`, absent, an object, a list or a text must stand where there is {text:?}"),
        }
    }

    fn fits(&self, place: &str, value: Option<&Value>) -> bool {
        match (self, value) {
            (Self::Absent, None) => true,
            (Self::Kind(is_kind), Some(value)) => is_kind(value),
            // Whole bodies are said by the fields that matter.
            (Self::Value(expected), Some(value)) if place == BODY => {
                let mut missing = Vec::new();
                compare("", Some(expected), Some(value), &mut missing);
                missing.is_empty()
            }
            (Self::Value(expected), Some(value)) => expected == value,
            _ => false,
        }
    }
}

fn show(place: &str, value: Option<&Value>) -> String {
    match value {
        None => "absent".to_owned(),
        Some(Value::String(status)) if place == STATUS => format!("`{status}`"),
        Some(value) => format!("`{value}`"),
    }
}

fn unquoted(cell: &str) -> Option<&str> {
    cell.strip_prefix('`')?.strip_suffix('`')
}

/// The names of recordings that belong to work not done yet.
fn later() -> BTreeSet<String> {
    rows("Later work")
        .into_iter()
        .map(|row| {
            let [file, reason] = &row[..] else { panic!("later work has two columns: {row:?}") };
            assert!(reason.starts_with("comes with "), "{row:?}");
            file.clone()
        })
        .collect()
}

/// The rows of the table under a heading, without its head.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(folder().join("DIFFERENCES.md")).unwrap();
    let heading = format!("## {heading}");
    let section = text.lines().skip_while(|line| *line != heading).skip(1);
    let lines = section.take_while(|line| !line.starts_with("## ")).filter(|line| line.starts_with('|'));
    let rows: Vec<Vec<String>> = lines
        .map(|line| {
            let inner = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |"));
            let inner = inner.unwrap_or_else(|| panic!("a row is `| a | b |`: {line}"));
            inner.split(" | ").map(|cell| cell.trim().to_owned()).collect()
        })
        .collect();
    assert!(rows.len() > 2, "{heading} has no table");
    rows.into_iter().skip(2).collect()
}

/// A server with the tool `echo`, as the package of npm has it.
const EVERYTHING_SERVER: &str = r#"#!/usr/bin/env node
const schema = { type: "object", properties: { message: { type: "string" } }, required: ["message"] };
const answers = {
  initialize: (params) => ({
    protocolVersion: params.protocolVersion,
    capabilities: { tools: {} },
    serverInfo: { name: "made-by-hand", version: "1.0.0" },
  }),
  ping: () => ({}),
  "tools/list": () => ({ tools: [{ name: "echo", description: "echo", inputSchema: schema }] }),
  "tools/call": (params) => ({ content: [{ type: "text", text: `Echo: ${params.arguments.message}` }] }),
};
const lines = require("readline").createInterface({ input: process.stdin });
lines.on("line", (line) => {
  const { id, method, params } = JSON.parse(line);
  if (id === undefined) return;
  const answer = answers[method];
  const body = answer ? { result: answer(params) } : { error: { code: -32601, message: "Method not found" } };
  process.stdout.write(JSON.stringify({ jsonrpc: "2.0", id, ...body }) + "\n");
});
"#;
