//! Workers are added and taken away while a slow server is hot: what it can do follows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;

use super::{super::deployment::eventually, setting, stage::Stage};

/// Calls that one owner runs at once.
const SLOTS: usize = 4;
/// For how long calls are counted, and how often at most: a machine that does something else as well takes its
/// time from some of the counts, and adds to none.
const MEASURE: Duration = Duration::from_secs(3);
const COUNTS: usize = 5;
/// How far from linear it may be.
const WITHIN: f64 = 0.15;

/// Callers that call one after the other, and how many calls they had answered.
struct Load {
    stage: Arc<Stage>,
    /// How long a call takes, in milliseconds. A tenth of a second is what is promised; beside the other tests
    /// of CI, the machine needs more time for each call.
    takes: u32,
    stop: AtomicBool,
    answered: AtomicUsize,
}

impl Load {
    /// How many calls a second so many owners can answer.
    fn possible(&self, owners: usize) -> f64 {
        count(owners * SLOTS) * 1_000.0 / f64::from(self.takes)
    }

    async fn caller(self: Arc<Self>, number: usize) {
        while !self.stop.load(Ordering::Relaxed) {
            let gateway = number % self.stage.gateways.len();
            let answer =
                self.stage.call(gateway, "default", "slow", "sleep", json!({"ms": self.takes})).await;
            assert_eq!(answer.tool_text(), format!("slept {}", self.takes), "no call fails");
            self.answered.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until so many workers run the server, and returns how many calls a second are answered then: the
    /// most that is counted, or what is counted first that is at least `enough`.
    async fn rate(&self, owners: usize, enough: f64) -> f64 {
        eventually(&format!("{owners} workers run it"), async || {
            self.stage.owners(0, "slow").await.len() == owners
        })
        .await;
        // Both gateways share the calls out anew once they have heard of it and calls of before are answered.
        self.count(MEASURE / 2).await;
        let mut most = 0.0_f64;
        for _ in 0..COUNTS {
            most = most.max(self.count(MEASURE).await);
            if most >= enough {
                break;
            }
        }
        println!("{owners} workers: {most:.1} calls a second");
        let possible = self.possible(owners);
        assert!(most < possible * (1.0 + WITHIN), "{most:.1} calls a second, where {possible} are possible");
        most
    }

    async fn count(&self, time: Duration) -> f64 {
        let (begun, before) = (Instant::now(), self.answered.load(Ordering::Relaxed));
        tokio::time::sleep(time).await;
        let answered = self.answered.load(Ordering::Relaxed) - before;
        count(answered) / begun.elapsed().as_secs_f64()
    }
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hot_server_becomes_faster_with_each_worker() {
    let stage = Arc::new(Stage::start(2, 1, 3).await);
    stage.add("slow", json!({"concurrency": SLOTS})).await;
    let load = Arc::new(Load {
        stage: Arc::clone(&stage),
        takes: if setting("FAULTS_LONG").is_some() { 100 } else { 250 },
        stop: AtomicBool::new(false),
        answered: AtomicUsize::new(0),
    });
    // So many that calls still wait for more than a second when three of four workers run the server.
    let callers = 3 * SLOTS * 1_500 / usize::try_from(load.takes).unwrap();
    let callers: Vec<_> = (0..callers).map(|number| tokio::spawn(Arc::clone(&load).caller(number))).collect();
    let one = load.rate(1, load.possible(1) * 0.97).await;
    let linear = |workers| one * count(workers) * (1.0 - WITHIN);
    let mut rates = Vec::new();
    for workers in [2, 4] {
        for seat in &stage.workers[..workers] {
            seat.fill(&stage.data).await;
        }
        rates.push((workers, load.rate(workers, linear(workers)).await));
    }
    for workers in [3, 1] {
        for seat in &stage.workers[workers..] {
            if let Some(node) = seat.leave() {
                assert!(node.stop().await.success());
            }
        }
        rates.push((workers, load.rate(workers, linear(workers)).await));
    }
    load.stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.unwrap();
    }
    for (workers, rate) in rates {
        assert!(rate >= linear(workers), "{workers} workers: {:.2} of linear", rate / one / count(workers));
    }
    drop(load);
    Arc::into_inner(stage).unwrap().stop().await;
}
