//! The other end of a built-in server's connection: MCP, as far as a server with tools and nothing else has to speak it.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::FutureExt;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream},
    sync::mpsc,
    task::AbortHandle,
};
use tokio_util::task::TaskTracker;

use super::webtools::{Answer, WebTools};

/// Answers that may wait to be written.
const ANSWERS: usize = 64;

#[derive(Deserialize)]
struct Message {
    id: Option<Value>,
    method: Option<String>,
    #[serde(default)]
    params: Map<String, Value>,
}

/// Calls that run, by the ids of their requests.
type Running = Arc<Mutex<HashMap<String, AbortHandle>>>;

/// Serves until the other side goes. Calls that still run then are given up.
pub async fn serve(tools: Arc<WebTools>, stream: DuplexStream, tasks: TaskTracker) {
    let (input, mut output) = tokio::io::split(stream);
    let (answers, mut queue) = mpsc::channel::<Value>(ANSWERS);
    tasks.spawn(async move {
        while let Some(answer) = queue.recv().await {
            let mut line = answer.to_string().into_bytes();
            line.push(b'\n');
            if output.write_all(&line).await.is_err() {
                return;
            }
        }
    });
    let running = Running::default();
    let mut lines = BufReader::new(input).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(Message { id, method: Some(method), params }) = serde_json::from_str(&line) else { continue };
        let Some(id) = id else {
            if method == "notifications/cancelled"
                && let Some(call) =
                    params.get("requestId").and_then(|id| lock(&running).remove(&id.to_string()))
            {
                call.abort();
                // Nobody reads it; but that there is one gives the call's place free.
                if let Some(id) = params.get("requestId") {
                    let _ = answers.send(failed(id, -32800, "the call was cancelled")).await;
                }
            }
            continue;
        };
        let answer = match method.as_str() {
            "initialize" => Some(initialized(&params)),
            "ping" => Some(json!({})),
            "tools/list" => Some(json!({"tools": tools.listing()})),
            "tools/call" => {
                call(&tools, id.clone(), params, (answers.clone(), Arc::clone(&running)), &tasks);
                None
            }
            _ => {
                let _ = answers.send(failed(&id, -32601, "there is no such method")).await;
                None
            }
        };
        if let Some(result) = answer
            && answers.send(json!({"jsonrpc": "2.0", "id": id, "result": result})).await.is_err()
        {
            break;
        }
    }
    for (_, call) in lock(&running).drain() {
        call.abort();
    }
}

fn initialized(params: &Map<String, Value>) -> Value {
    json!({
        // Nothing that is said here differs between versions.
        "protocolVersion": params.get("protocolVersion"),
        "capabilities": {"tools": {}},
        "serverInfo": {"name": mcp_shared::builtin::WEBTOOLS, "version": env!("CARGO_PKG_VERSION")},
    })
}

/// Runs a call on a task of its own, which ends early when the call is cancelled.
fn call(
    tools: &Arc<WebTools>,
    id: Value,
    mut params: Map<String, Value>,
    (answers, running): (mpsc::Sender<Value>, Running),
    tasks: &TaskTracker,
) {
    let name = params.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let arguments = match params.remove("arguments") {
        Some(Value::Object(arguments)) => arguments,
        _ => Map::new(),
    };
    let (tools, key, listed) = (Arc::clone(tools), id.to_string(), Arc::clone(&running));
    // Held while the task begins, so that it cannot end before it stands in the list.
    let mut list = lock(&running);
    let task = tasks.spawn(async move {
        let ran = AssertUnwindSafe(tools.call(&name, &arguments)).catch_unwind().await;
        lock(&listed).remove(&id.to_string());
        let answer = match ran {
            Ok(Answer::Result(result)) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
            Ok(Answer::Invalid(text)) => failed(&id, -32602, &text),
            Err(_) => {
                tracing::error!(tool = %name, "a built-in tool fell over a fault of ours");
                failed(&id, -32603, "the tool failed by a fault of its own")
            }
        };
        let _ = answers.send(answer).await;
    });
    list.insert(key, task.abort_handle());
}

fn failed(id: &Value, code: i32, text: &str) -> Value {
    json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": text}})
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
