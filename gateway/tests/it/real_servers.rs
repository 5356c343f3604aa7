//! Other people's servers, unmodified: what they offer arrives, byte for byte, and nothing of them stays.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use mcp_shared::testing::tools::{RealServer, server_everything, server_time};
use reqwest::{Method, header};
use serde_json::{Value, json, value::RawValue};

use crate::deployment::{Deployment, alive};

/// Installing may take long, and blocks.
async fn obtained(get: fn() -> RealServer) -> RealServer {
    tokio::task::spawn_blocking(get).await.unwrap()
}

async fn add(api: &Deployment, name: &str, server: &RealServer, more: Value) -> Value {
    let mut body = json!({"name": name, "command": server.command, "args": server.args});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let added = api.post("/mcp/servers", &body).await.ok().json()["server"].clone();
    assert_eq!(added["status"], "connected", "{added}");
    added
}

fn tool_names(server: &Value) -> Vec<String> {
    let tools = server["toolsList"].as_array().unwrap();
    tools.iter().map(|tool| tool["name"].as_str().unwrap().to_owned()).collect()
}

/// The same server, spoken to without anything between.
struct Direct {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    id: u64,
}

impl Direct {
    fn start(server: &RealServer) -> Self {
        let mut child = Command::new(&server.command)
            .args(&server.args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut direct = Self { child, input, output, id: 0 };
        let client = json!({"name": "test", "version": "1"});
        direct.request(
            "initialize",
            &json!({"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}),
        );
        direct.send(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"}));
        direct
    }

    fn send(&mut self, message: &Value) {
        writeln!(self.input, "{message}").unwrap();
    }

    /// The text of the result of a request, as the server wrote it.
    fn request(&mut self, method: &str, params: &Value) -> String {
        #[derive(serde::Deserialize)]
        struct Line<'a> {
            id: Option<Value>,
            #[serde(borrow)]
            result: Option<&'a RawValue>,
        }
        self.id += 1;
        let id = self.id;
        self.send(&json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}));
        loop {
            let mut line = String::new();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the server went away");
            let read: Line<'_> = serde_json::from_str(&line).unwrap();
            if read.id == Some(json!(id)) {
                return read.result.unwrap_or_else(|| panic!("{line}")).get().to_owned();
            }
        }
    }

    fn call(&mut self, tool: &str, arguments: &Value) -> String {
        self.request("tools/call", &json!({"name": tool, "arguments": arguments}))
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asserts that an answer has every byte of a result that the server gave to the same call.
#[track_caller]
fn has_bytes_of(answer: &str, result: &str) {
    let members = result.strip_suffix('}').unwrap();
    assert!(answer.contains(members), "{answer}\nhas not the bytes of\n{result}");
}

#[tokio::test]
async fn the_reference_server_of_node_works() {
    let server = obtained(server_everything).await;
    let api = Deployment::start().await;
    let added = add(&api, "everything", &server, json!({"secretNames": ["message"]})).await;
    let names = tool_names(&added);
    assert!(names.len() > 5 && names.contains(&"echo".to_owned()), "{names:?}");

    let echo = async |user: &str| api.call_as(user, "everything", "echo", json!({"message": "said"})).await;
    api.set_secret("alice", "everything", "message", "alices secret").await.ok();
    api.set_secret("alice", "everything", "other", "is not injected").await.ok();
    assert_eq!(echo("alice").await.tool_text(), "Echo: alices secret");
    assert_eq!(echo("bob").await.tool_text(), "Echo: said");

    let listed = api.server("everything").await;
    let listing = api.get("/mcp/servers/everything").await.ok().text;
    let calls: Vec<(&str, Value)> = vec![
        ("echo", json!({"message": "ä \u{1f600} \" \\ \n \u{7}"})),
        ("get-sum", json!({"a": 0.1, "b": 12_345_678})),
        ("get-tiny-image", json!({})),
        ("get-structured-content", json!({"location": "New York"})),
        ("get-annotated-message", json!({"messageType": "error", "includeImage": true})),
    ];
    let calls: Vec<_> = calls.into_iter().filter(|(tool, _)| names.iter().any(|name| name == tool)).collect();
    assert!(calls.len() >= 3, "{names:?}");
    let asked = calls.clone();
    let (tools, results) = tokio::task::spawn_blocking(move || {
        let mut direct = Direct::start(&server);
        let tools = direct.request("tools/list", &json!({}));
        let results: Vec<_> = asked.iter().map(|(tool, args)| direct.call(tool, args)).collect();
        (tools, results)
    })
    .await
    .unwrap();
    let tools: Value = serde_json::from_str(&tools).unwrap();
    let described =
        |list: &Value| list.as_array().unwrap().iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(described(&listed["toolsList"]), described(&tools["tools"]));
    assert!(listing.contains(&tools["tools"][0].to_string()), "the listing keeps the server's spelling");
    for ((tool, args), result) in calls.iter().zip(&results) {
        let answer = api.call_as("bob", "everything", tool, args.clone()).await.ok();
        has_bytes_of(&answer.text, result);
    }

    let pid = api.pids("everything").await[0];
    assert!(alive(pid));
    assert!(api.stop().await.success());
    assert!(!alive(pid), "the server outlived the program");
}

#[tokio::test]
async fn progress_of_the_reference_server_is_streamed() {
    let server = obtained(server_everything).await;
    let api = Deployment::start().await;
    let added = add(&api, "everything", &server, json!({})).await;
    let names = tool_names(&added);
    let long = names.iter().find(|name| name.to_ascii_lowercase().contains("long-running"));
    let long = long.unwrap_or_else(|| panic!("{names:?}"));
    let args = json!({"duration": 1, "steps": 4});
    let body = json!({"serverName": "everything", "methodName": long, "args": args});
    let request = api.request(Method::POST, "/mcp/tool/call").header(header::ACCEPT, "text/event-stream");
    let answer = api.send(request.json(&body)).await.ok();
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let mut events = Vec::new();
    for event in answer.text.split("\n\n").filter(|event| event.contains("event:")) {
        let field = |name: &str| {
            event.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned()
        };
        events.push((field("event:"), serde_json::from_str::<Value>(&field("data:")).unwrap()));
    }
    let (last, progress) = events.split_last().unwrap();
    assert_eq!(last.0, "result", "{events:?}");
    assert_eq!(last.1["success"], true);
    assert!(last.1["data"]["content"][0]["text"].as_str().unwrap().contains("completed"), "{last:?}");
    let steps: Vec<_> =
        progress.iter().map(|(name, params)| (name.as_str(), params["progress"].as_f64())).collect();
    assert_eq!(steps, (1..=4).map(|step| ("progress", Some(f64::from(step)))).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_server_of_python_works() {
    let server = obtained(server_time).await;
    let api = Deployment::start().await;
    let added = add(&api, "time", &server, json!({})).await;
    assert_eq!(tool_names(&added), ["get_current_time", "convert_time"]);
    let answer = api.call("time", "get_current_time", json!({"timezone": "Europe/Berlin"})).await;
    let told: Value = serde_json::from_str(&answer.tool_text()).unwrap();
    assert_eq!(told["timezone"], "Europe/Berlin");
    assert!(told["datetime"].as_str().unwrap().starts_with("20"), "{told}");
    // What the stored secret names is what the server is asked.
    api.set_secret("alice", "time", "timezone", "Asia/Tokyo").await.ok();
    for (user, zone) in [("alice", "Asia/Tokyo"), ("bob", "Europe/Berlin")] {
        let answer =
            api.call_as(user, "time", "get_current_time", json!({"timezone": "Europe/Berlin"})).await;
        let told: Value = serde_json::from_str(&answer.tool_text()).unwrap();
        assert_eq!(told["timezone"], zone, "{user}");
    }
    let convert = json!({"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"});
    let bad = json!({"timezone": "Nowhere/Nothing"});
    let asked = [("convert_time", convert), ("get_current_time", bad)];
    let calls = asked.clone();
    let results = tokio::task::spawn_blocking(move || {
        let mut direct = Direct::start(&server);
        calls.iter().map(|(tool, args)| direct.call(tool, args)).collect::<Vec<_>>()
    })
    .await
    .unwrap();
    for ((tool, args), result) in asked.iter().zip(&results) {
        has_bytes_of(&api.call("time", tool, args.clone()).await.ok().text, result);
    }
    let failed =
        api.call("time", "get_current_time", json!({"timezone": "Nowhere/Nothing"})).await.ok().json();
    assert_eq!(failed["data"]["isError"], true, "{failed}");

    let pid = api.pids("time").await[0];
    api.delete("/mcp/servers/time").await.ok();
    assert!(!alive(pid), "a removed server's process is gone when the answer comes");
}
