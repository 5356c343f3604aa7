//! The bus restarts again and again: nothing is executed twice, and nothing is left behind.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use mcp_shared::testing::services::NatsServer;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    super::deployment::eventually,
    history::{self, Call, Told, told},
    stage::Stage,
};

const RESTARTS: usize = 20;
const CALLERS: usize = 6;
/// Descriptors and threads that come and go without being leaked.
const SLACK: usize = 5;

/// Descriptors and threads of a process.
fn holds(pid: i32) -> (usize, usize) {
    let count = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    (count("fd"), count("task"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_restarts_of_the_bus_repeat_nothing_and_leave_nothing_behind() {
    // One worker: a second one would begin to run the server as well at some time, and hold more by right.
    let stage = Arc::new(Stage::start(2, 1, 0).await);
    stage.add("s", json!({})).await;
    let stop = CancellationToken::new();
    let calls = Arc::new(Mutex::new(Vec::new()));
    let made = Arc::new(AtomicUsize::new(0));
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (stage, stop, calls, made) =
                (Arc::clone(&stage), stop.clone(), Arc::clone(&calls), Arc::clone(&made));
            tokio::spawn(async move {
                while !stop.is_cancelled() {
                    let number = made.fetch_add(1, Ordering::Relaxed);
                    let id = format!("call-{number}");
                    let args = json!({"path": stage.executed(), "id": id, "ms": 20});
                    let answer = stage.call(number % 2, "default", "s", "record", args).await;
                    let told = told(answer.status, &answer.json());
                    if told != Told::Answer {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                    calls.lock().unwrap().push(Call::new(id, "-", "s", told));
                }
            })
        })
        .collect();
    let answered = || calls.lock().unwrap().iter().filter(|call| call.told[0] == Told::Answer).count();
    let goes_on = async |more: usize| {
        let before = answered();
        eventually("calls are answered", async || answered() >= before + more).await;
    };
    goes_on(100).await;
    let nodes: Vec<i32> =
        stage.gateways.iter().chain(&stage.workers).map(|seat| seat.pid().unwrap()).collect();
    let before: Vec<_> = nodes.iter().map(|pid| holds(*pid)).collect();
    for _ in 0..RESTARTS {
        stage.with(&stage.nats, NatsServer::restart).await;
        goes_on(20).await;
    }
    for (pid, (files, threads)) in nodes.into_iter().zip(before) {
        eventually("descriptors and threads are what they were", async || {
            let now = holds(pid);
            now.0 <= files + SLACK && now.1 <= threads + SLACK
        })
        .await;
    }
    stop.cancel();
    for caller in callers {
        caller.await.unwrap();
    }
    stage.whole().await;
    let calls = std::mem::take(&mut *calls.lock().unwrap());
    println!("{}", history::table(&calls));
    assert_eq!(history::violations(&calls, &stage.history()), [""; 0]);
    Arc::into_inner(stage).unwrap().stop().await;
}
