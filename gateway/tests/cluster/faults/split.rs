//! Two NATS servers that lose each other, with a part of the fleet on either side: both go on, and learn of each
//! other's changes from the store they share.

use std::time::{Duration, Instant};

use mcp_shared::testing::{
    link::Link,
    port::Port,
    services::{MongoServer, NatsServer},
};
use serde_json::{Value, json};

use super::super::deployment::{Answer, Data, Deployment, Node, Program, eventually, fixture};

/// How long a change of one side may take to be in force on the other, after it was answered.
const IN_FORCE: Duration = Duration::from_secs(8);

/// One NATS server with a gateway and a worker.
struct Side {
    gateway: Node,
    _worker: Node,
}

impl Side {
    async fn start(nats: &NatsServer, mongo: &MongoServer, data: &Data, name: &str) -> Self {
        let builder = Deployment::builder()
            .data(data)
            .env("NATS_URL", format!("nats://{}", nats.address()))
            .env("MONGODB_URI", format!("mongodb://{}/?directConnection=true", mongo.address()));
        Self {
            gateway: Node::start(&builder, Program::Gateway, &format!("gateway-{name}")).await,
            _worker: Node::start(&builder, Program::Worker, &format!("worker-{name}")).await,
        }
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        let client = reqwest::Client::new();
        let response = client.post(format!("{}{path}", self.gateway.base)).json(body).send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, text: response.text().await.unwrap() }
    }

    /// What alice's call says; a call that is refused was not started.
    async fn says(&self) -> Option<String> {
        let body =
            json!({"username": "alice", "serverName": "s", "methodName": "echo", "args": {"text": "none"}});
        let answer = self.post("/mcp/tool/call", &body).await;
        if answer.status != 200 {
            assert_eq!(answer.json()["outcome"], "not_started", "{}", answer.text);
            return None;
        }
        Some(answer.tool_text())
    }

    async fn set(&self, value: &str) {
        let body =
            json!({"username": "alice", "serverName": "s", "secretName": "text", "secretValue": value});
        self.post("/secrets/set", &body).await.ok();
    }

    async fn workers(&self) -> usize {
        let fleet = reqwest::get(format!("{}/fleet", self.gateway.base)).await.unwrap();
        let fleet: Value = fleet.json().await.unwrap();
        fleet["workers"].as_array().unwrap().len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_halves_of_the_bus_go_on_and_agree_by_the_store() {
    mcp_shared::tls::install_provider();
    let started = tokio::task::spawn_blocking(|| {
        let kept = Port::keep();
        let cluster = kept.address();
        let one = NatsServer::start(&format!("cluster {{ name: fleet, listen: \"{cluster}\" }}"));
        let link = Link::to(cluster);
        let route = link.address();
        let other = NatsServer::start(&format!(
            "cluster {{ name: fleet, listen: \"127.0.0.1:-1\", routes: [\"nats://{route}\"] }}"
        ));
        (kept, one, other, link, MongoServer::forgetful())
    });
    let (_kept, one, other, link, mongo) = started.await.unwrap();
    let data = Data::new();
    let (left, right) =
        tokio::join!(Side::start(&one, &mongo, &data, "left"), Side::start(&other, &mongo, &data, "right"));
    eventually("all see each other", async || left.workers().await == 2 && right.workers().await == 2).await;
    left.post("/mcp/servers", &fixture("s", &["--more"])).await.ok();
    left.set("first").await;
    assert_eq!(left.says().await.as_deref(), Some("first"));
    assert_eq!(right.says().await.as_deref(), Some("first"));

    link.cut();
    eventually("each side is alone", async || left.workers().await == 1 && right.workers().await == 1).await;
    for side in [&left, &right] {
        eventually("it goes on by itself", async || side.says().await.is_some()).await;
    }
    for (value, writer, reader) in [("second", &left, &right), ("third", &right, &left)] {
        writer.set(value).await;
        assert_eq!(writer.says().await.as_deref(), Some(value));
        let answered = Instant::now();
        eventually("the other side has it from the store", async || {
            reader.says().await.as_deref() == Some(value)
        })
        .await;
        assert!(answered.elapsed() < IN_FORCE, "an old value served for {:?}", answered.elapsed());
    }

    link.mend();
    eventually("all see each other again", async || left.workers().await == 2 && right.workers().await == 2)
        .await;
    for (value, side) in [("fourth", &left), ("fifth", &right)] {
        side.set(value).await;
        assert_eq!(left.says().await.as_deref(), Some(value));
        assert_eq!(right.says().await.as_deref(), Some(value));
    }
}
