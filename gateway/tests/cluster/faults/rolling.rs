//! Every node is replaced, one after the other, while calls come at a steady rate: nobody notices.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::json;
use tokio::time::{MissedTickBehavior, interval};

use super::stage::Stage;

/// Calls a second, and how long the balancer takes to notice that a gateway is not ready.
const RATE: u64 = 200;
const BALANCER: Duration = Duration::from_millis(500);
const SERVERS: [&str; 3] = ["fast", "single", "personal"];

/// What stands before the gateways, in its simplest form: it asks them whether they are ready, and sends requests to
/// those in turn that were.
struct Balancer {
    stage: Arc<Stage>,
    ready: Mutex<Vec<usize>>,
    next: AtomicUsize,
    stop: AtomicBool,
    /// What was answered, and how often.
    answers: Mutex<BTreeMap<String, usize>>,
}

impl Balancer {
    async fn watch(self: Arc<Self>) {
        let mut ticks = interval(BALANCER);
        while !self.stop.load(Ordering::Relaxed) {
            ticks.tick().await;
            let mut ready = Vec::new();
            for at in 0..self.stage.gateways.len() {
                if self.stage.is_ready(at).await {
                    ready.push(at);
                }
            }
            // With nobody left, any is as good as any other.
            if !ready.is_empty() {
                *self.ready.lock().unwrap() = ready;
            }
        }
    }

    /// Makes calls at a steady rate, however long each of them takes.
    async fn calls(self: Arc<Self>) {
        let mut ticks = interval(Duration::from_micros(1_000_000 / RATE));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut calls = tokio::task::JoinSet::new();
        for number in 0_usize.. {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            ticks.tick().await;
            calls.spawn(Arc::clone(&self).call(number));
            while let Some(ended) = calls.try_join_next() {
                ended.unwrap();
            }
        }
        while let Some(ended) = calls.join_next().await {
            ended.unwrap();
        }
    }

    async fn call(self: Arc<Self>, number: usize) {
        let gateway = {
            let ready = self.ready.lock().unwrap();
            ready[self.next.fetch_add(1, Ordering::Relaxed) % ready.len()]
        };
        let (server, user) = (SERVERS[number % SERVERS.len()], format!("user-{}", number % 4));
        let body = json!({"username": user, "serverName": server, "methodName": "sleep", "args": {"ms": 20}});
        let request = self.stage.request(gateway, "/mcp/tool/call").json(&body);
        let answer = match self.stage.send(request).await {
            Ok(answer) if answer.status == 200 => "200".to_owned(),
            Ok(answer) => format!("{} by gateway {gateway}: {}", answer.status, answer.text),
            Err(error) => format!("gateway {gateway} did not answer: {error:?}"),
        };
        *self.answers.lock().unwrap().entry(answer).or_default() += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_is_replaced_and_no_call_fails() {
    let stage = Arc::new(Stage::start(2, 2, 0).await);
    stage.add("fast", json!({})).await;
    stage.add("single", json!({"scaling": "singleton"})).await;
    stage.add("personal", json!({"isolation": "per_user"})).await;
    let balancer = Arc::new(Balancer {
        ready: Mutex::new((0..stage.gateways.len()).collect()),
        stage: Arc::clone(&stage),
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        answers: Mutex::default(),
    });
    let watching = tokio::spawn(Arc::clone(&balancer).watch());
    let calling = tokio::spawn(Arc::clone(&balancer).calls());
    let before: Vec<_> = stage.gateways.iter().chain(&stage.workers).map(|seat| seat.pid()).collect();
    for seat in stage.workers.iter().chain(&stage.gateways) {
        let node = seat.leave().unwrap();
        assert!(node.stop().await.success());
        seat.fill(&stage.data).await;
        stage.whole().await;
        if let Some(at) = stage.gateways.iter().position(|one| std::ptr::eq(one, seat)) {
            crate::deployment::eventually("the balancer has it back", async || {
                balancer.ready.lock().unwrap().contains(&at)
            })
            .await;
        }
    }
    balancer.stop.store(true, Ordering::Relaxed);
    watching.await.unwrap();
    calling.await.unwrap();
    let after: Vec<_> = stage.gateways.iter().chain(&stage.workers).map(|seat| seat.pid()).collect();
    assert!(before.iter().zip(&after).all(|(before, after)| before != after), "all were replaced");
    let answers = balancer.answers.lock().unwrap().clone();
    println!("{answers:#?}");
    assert_eq!(answers.keys().map(String::as_str).collect::<Vec<_>>(), ["200"], "{answers:#?}");
    // A few seconds for each of four nodes.
    assert!(answers["200"] > 1_000, "there were not enough calls to notice anything");
    drop(balancer);
    Arc::into_inner(stage).unwrap().stop().await;
}
