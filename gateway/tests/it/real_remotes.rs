//! Other people's servers over HTTP, unmodified: over each transport that they have they list, answer and
//! report progress; they may be started again, and so may this program.

use std::{
    net::{SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use mcp_shared::testing::{
    port::Port,
    tools::{RealServer, fastmcp_server, server_everything},
};
use serde_json::{Value, json};

use crate::{
    deployment::{Deployment, eventually},
    remote::{permitting, streamed},
};

/// A real server in a process of its own. Dropping it kills the process.
struct Served {
    server: RealServer,
    transport: &'static str,
    port: Port,
    child: Child,
}

impl Served {
    async fn start(get: fn() -> RealServer, transport: &'static str) -> Self {
        // Installing may take long, and blocks.
        let server = tokio::task::spawn_blocking(get).await.unwrap();
        let port = Port::keep();
        let child = launch(&server, transport, port.address());
        let served = Self { server, transport, port, child };
        served.listens().await;
        served
    }

    async fn listens(&self) {
        eventually("the server listens", async || TcpStream::connect(self.port.address()).is_ok()).await;
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    async fn restart(&mut self) {
        self.kill();
        self.child = launch(&self.server, self.transport, self.port.address());
        self.listens().await;
    }

    async fn add(&self, api: &Deployment, path: &str) -> Value {
        let body = json!({"name": "real", "transportType": "streamable_http",
            "url": format!("http://{}{path}", self.port.address()),
            "reconnectionOptions": {"initialReconnectionDelay": 100, "maxRetries": 5}});
        let added = api.post("/mcp/servers", &body).await.ok().json()["server"].clone();
        assert_eq!(added["status"], "connected", "{added}");
        added
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.kill();
    }
}

fn launch(server: &RealServer, transport: &str, address: SocketAddr) -> Child {
    Command::new(&server.command)
        .args(&server.args)
        .arg(transport)
        .env("PORT", address.port().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn has_tools(server: &Value, wanted: &[&str]) {
    let tools = server["toolsList"].as_array().unwrap();
    for name in wanted {
        assert!(tools.iter().any(|tool| tool["name"] == *name), "{name}: {server}");
    }
}

/// Asserts that a call reports its progress before its result.
async fn reports(api: &Deployment, tool: &str, args: Value, steps: u64) {
    let events = streamed(api, "real", tool, args).await;
    let (last, progress) = events.split_last().unwrap();
    assert_eq!((last.0.as_str(), &last.1["success"]), ("result", &json!(true)), "{events:?}");
    let seen: Vec<_> = progress.iter().filter_map(|(_, params)| params["progress"].as_f64()).collect();
    #[allow(clippy::cast_precision_loss, reason = "there are few steps")]
    let expected: Vec<_> = (1..=steps).map(|step| step as f64).collect();
    assert_eq!(seen, expected, "{events:?}");
}

async fn everything(transport: &'static str, path: &str) {
    let mut served = Served::start(server_everything, transport).await;
    let api = permitting().start().await;
    let data = api.data();
    has_tools(&served.add(&api, path).await, &["echo", "get-sum"]);
    let echo = async |api: &Deployment, user: &str, text: &str| {
        let answer = api.call_as(user, "real", "echo", json!({"message": text})).await;
        assert_eq!(answer.tool_text(), format!("Echo: {text}"), "{transport}");
    };
    echo(&api, "default", "ä \u{1f600}").await;
    echo(&api, "alice", "hers").await;
    let listed = api.server("real").await;
    let mut names = listed["toolsList"].as_array().unwrap().iter().filter_map(|tool| tool["name"].as_str());
    let long = names.find(|name| name.contains("long-running")).unwrap();
    reports(&api, long, json!({"duration": 1, "steps": 4}), 4).await;

    // The remote is started again: it knows no session any more.
    served.restart().await;
    echo(&api, "default", "back").await;
    echo(&api, "alice", "back").await;

    // We are: it still knows them, where it has such.
    assert!(api.stop().await.success());
    let api = permitting().data(&data).start().await;
    echo(&api, "default", "again").await;
    echo(&api, "alice", "again").await;
    if transport == "streamableHttp" {
        eventually("sessions are resumed", async || api.log().matches("a session is resumed").count() >= 2)
            .await;
    }
    // Both, one after the other, while calls go on.
    let calls = async {
        for n in 0..50 {
            let answer = api.call("real", "echo", json!({"message": n.to_string()})).await;
            let lost = answer.status == 502
                && ["upstream_lost", "upstream_unavailable"].contains(&answer.code().as_str());
            assert!(answer.status == 200 || lost, "{}", answer.text);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::join!(calls, served.restart());
    eventually("it is back", async || api.call("real", "echo", json!({"message": "x"})).await.status == 200)
        .await;
    api.delete("/mcp/servers/real").await.ok();
    assert!(api.stop().await.success());
}

#[tokio::test]
async fn the_reference_server_of_node_works_over_streamable_http() {
    everything("streamableHttp", "/mcp").await;
}

#[tokio::test]
async fn the_reference_server_of_node_works_over_the_older_transport() {
    everything("sse", "/sse").await;
}

async fn python(transport: &'static str, path: &str) {
    let mut served = Served::start(fastmcp_server, transport).await;
    let api = permitting().start().await;
    let data = api.data();
    has_tools(&served.add(&api, path).await, &["echo", "steps", "total"]);
    assert_eq!(api.call("real", "echo", json!({"text": "ä \u{1f600}"})).await.tool_text(), "ä \u{1f600}");
    reports(&api, "steps", json!({"count": 4}), 4).await;
    let total = async |api: &Deployment, n: u64| api.call("real", "total", json!({"n": n})).await.tool_text();
    assert_eq!(total(&api, 2).await, "2");
    let calls = (0..20).map(|_| total(&api, 1));
    futures_util::future::join_all(calls).await;
    assert_eq!(total(&api, 1).await, "23", "each ran once");
    served.restart().await;
    assert_eq!(total(&api, 5).await, "5");
    assert!(api.stop().await.success());
    let api = permitting().data(&data).start().await;
    assert_eq!(total(&api, 1).await, "6");
    reports(&api, "steps", json!({"count": 3}), 3).await;
    let failed = api.call("real", "total", json!({"n": "no number"})).await;
    assert!(failed.status != 200 || failed.json()["data"]["isError"] == true, "{}", failed.text);
    assert!(api.stop().await.success());
}

#[tokio::test]
async fn a_server_of_fastmcp_works_over_http() {
    python("http", "/mcp").await;
}

#[tokio::test]
async fn a_server_of_fastmcp_works_over_the_older_transport() {
    python("sse", "/sse").await;
}
