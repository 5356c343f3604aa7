//! Gateways that die, hang or lose the bus: their callers hear the truth, and their calls do not run on
//! for nobody.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{
    super::deployment::{Answer, eventually},
    stage::Stage,
};

/// A worker gives up the calls of a gateway that it has not heard for five seconds.
const GIVEN_UP: Duration = Duration::from_secs(6);
/// Machines are slow and shared.
const GRACE: Duration = Duration::from_secs(3);

/// A request that calls a tool of the server `s`.
fn calling(stage: &Stage, gateway: usize, tool: &str, args: &Value) -> reqwest::RequestBuilder {
    let body = json!({"serverName": "s", "methodName": tool, "args": args});
    stage.request(gateway, "/mcp/tool/call").timeout(Duration::from_secs(60)).json(&body)
}

/// Waits until so many calls run and so many wait, as a gateway sees it.
async fn busy(stage: &Stage, gateway: usize, running: u64, waiting: u64) {
    eventually("calls run and wait", async || {
        let fleet = stage.get(gateway, "/fleet").await.ok().json();
        let workers = fleet["workers"].as_array().unwrap().clone();
        let loads = workers.iter().flat_map(|one| one["servers"].as_array().unwrap());
        let (mut runs, mut waits) = (0, 0);
        for load in loads.filter(|load| load["name"] == "s") {
            runs += load["inFlight"].as_u64().unwrap();
            waits += load["waiting"].as_u64().unwrap();
        }
        (runs, waits) == (running, waiting)
    })
    .await;
}

/// How many of its calls the server was told to cancel.
async fn cancelled(stage: &Stage, gateway: usize) -> usize {
    let ids = stage.call(gateway, "default", "s", "cancelled", json!({})).await.tool_text();
    serde_json::from_str::<Vec<Value>>(&ids).unwrap().len()
}

/// The answer of a call with a name, made again until its end is known.
async fn known(stage: &Stage, request: impl Fn() -> reqwest::RequestBuilder) -> Answer {
    let patience = Instant::now() + Duration::from_secs(30);
    loop {
        let answer = stage.send(request()).await.unwrap();
        if answer.status != 409 {
            return answer;
        }
        assert!(Instant::now() < patience, "{}", answer.text);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What becomes of the calls of a gateway that is lost while they run.
async fn lose_a_gateway(freeze: bool) {
    let stage = Stage::start(2, 1, 0).await;
    stage.add("s", json!({})).await;
    let plain = calling(&stage, 0, "cancellable", &json!({"ms": 30_000}));
    let named = |gateway| {
        calling(&stage, gateway, "cancellable", &json!({"ms": 9_000})).header("Idempotency-Key", "named")
    };
    let lost = async {
        busy(&stage, 1, 2, 0).await;
        if freeze {
            stage.gateways[0].freeze();
        } else {
            stage.gateways[0].kill();
        }
        let lost = Instant::now();
        eventually("the server is told that a call is cancelled", async || cancelled(&stage, 1).await == 1)
            .await;
        assert!(lost.elapsed() < GIVEN_UP + GRACE, "it took {:?}", lost.elapsed());
        // Who gave the call a name may ask anywhere what became of it.
        let answer = known(&stage, || named(1)).await;
        assert_eq!(answer.tool_text(), "not cancelled");
        assert!(answer.headers.contains_key("idempotency-replayed"));
        assert_eq!(cancelled(&stage, 1).await, 1);
        stage.gateways[0].thaw();
    };
    let (plain, first, ()) = tokio::join!(stage.send(plain), stage.send(named(0)), lost);
    if freeze {
        let answer = plain.unwrap();
        assert_eq!(answer.json()["outcome"], "unknown", "{}", answer.text);
        let answer = first.unwrap();
        assert!(answer.status == 200 || answer.json()["outcome"] == "unknown", "{}", answer.text);
        stage.whole().await;
        calls_succeed(&stage, 0).await;
    } else {
        assert!(plain.is_err() && first.is_err(), "nobody is there to answer");
    }
    stage.stop().await;
}

async fn calls_succeed(stage: &Stage, gateway: usize) {
    eventually("calls succeed", async || {
        stage.call(gateway, "default", "s", "echo", json!({"text": "hi"})).await.status == 200
    })
    .await;
}

#[tokio::test]
async fn calls_of_a_killed_gateway_are_cancelled_unless_they_have_a_name() {
    lose_a_gateway(false).await;
}

#[tokio::test]
async fn calls_of_a_frozen_gateway_are_cancelled_unless_they_have_a_name() {
    lose_a_gateway(true).await;
}

/// The worker has had a place for them meanwhile, and said so to nobody.
#[tokio::test]
async fn a_gateway_that_was_frozen_starts_nothing_late() {
    let stage = Stage::start(2, 1, 0).await;
    stage.add("s", json!({"concurrency": 1})).await;
    let record = |id: &str| json!({"path": stage.executed(), "id": id});
    let first = calling(&stage, 1, "sleep", &json!({"ms": 12_000}));
    let deadline = Duration::from_secs(14);
    let impatient = calling(&stage, 0, "record", &record("impatient")).header("X-Request-Timeout-Ms", 14_000);
    let patient = calling(&stage, 0, "record", &record("patient")).header("X-Request-Timeout-Ms", 40_000);
    let (first, impatient, patient, ()) = tokio::join!(
        stage.send(first),
        async {
            busy(&stage, 1, 1, 0).await;
            stage.send(impatient).await
        },
        async {
            busy(&stage, 1, 1, 1).await;
            stage.send(patient).await
        },
        async {
            busy(&stage, 1, 1, 2).await;
            stage.gateways[0].freeze();
            let frozen = Instant::now();
            // Until the worker has held a place for each of them, and given it up again.
            busy(&stage, 1, 0, 0).await;
            eventually("the deadline of one is over", async || frozen.elapsed() > deadline).await;
            stage.gateways[0].thaw();
        }
    );
    assert_eq!(first.unwrap().tool_text(), "slept 12000");
    let impatient = impatient.unwrap().fails(504, "deadline_exceeded");
    assert_eq!(impatient.json()["outcome"], "not_started");
    assert_eq!(patient.unwrap().tool_text(), "recorded");
    let executed = stage.history();
    assert!(executed.starts_with("run patient ") && executed.lines().count() == 1, "{executed}");
    stage.stop().await;
}

/// What a gateway says that cannot reach the bus. Silently: nothing gets through, and nobody says so.
async fn cut_off_a_gateway(silently: bool) {
    let stage = Stage::start(2, 1, 0).await;
    stage.add("s", json!({})).await;
    let running = calling(&stage, 0, "cancellable", &json!({"ms": 30_000}));
    let (running, (answered, cut)) =
        tokio::join!(async { (stage.send(running).await.unwrap(), Instant::now()) }, async {
            busy(&stage, 1, 1, 0).await;
            let link = &stage.gateways[0].bus;
            if silently {
                link.hold()
            } else {
                link.cut()
            }
            let cut = Instant::now();
            // One that was taken in before the loss was noticed waits for the bus, and for nothing else.
            let refused = eventually("calls are refused", async || {
                let answer = stage.call(0, "default", "s", "echo", json!({"text": "hi"})).await;
                if answer.status != 200 {
                    assert_eq!(answer.json()["outcome"], "not_started", "{}", answer.text);
                }
                answer.status != 200 && answer.code() == "bus_unavailable"
            });
            // The other one has lost nothing; the server is told that nobody waits for the call.
            let given_up = async {
                eventually("the call is cancelled", async || cancelled(&stage, 1).await == 1).await;
                assert!(cut.elapsed() < GIVEN_UP + GRACE, "it took {:?}", cut.elapsed());
                Instant::now()
            };
            let ((), given_up) = tokio::join!(refused, given_up);
            let asked = Instant::now();
            let answer = stage.call(0, "default", "s", "echo", json!({"text": "hi"})).await;
            let answer = answer.fails(503, "bus_unavailable");
            assert!(asked.elapsed() < Duration::from_secs(1), "it took {:?}", asked.elapsed());
            assert!(answer.headers.contains_key("retry-after"));
            stage.get(0, "/readyz").await.fails(503, "bus_unavailable");
            (given_up, cut)
        });
    let (running, ended) = running;
    assert_eq!(running.fails(502, "worker_lost").json()["outcome"], "unknown");
    let took = ended - cut;
    assert!(took < Duration::from_secs(14) + GRACE, "the call in flight was answered after {took:?}");
    assert!(answered < ended + GRACE);
    stage.gateways[0].bus.mend();
    let mended = Instant::now();
    calls_succeed(&stage, 0).await;
    eventually("it is ready", async || stage.get(0, "/readyz").await.status == 200).await;
    println!("well again after {:?}", mended.elapsed());
    stage.stop().await;
}

#[tokio::test]
async fn a_gateway_whose_connection_to_the_bus_ends_says_so() {
    cut_off_a_gateway(false).await;
}

#[tokio::test]
async fn a_gateway_that_nothing_reaches_by_the_bus_says_so() {
    cut_off_a_gateway(true).await;
}
