//! Thousands of calls while everything around them dies, hangs, is cut off and comes back: none is executed
//! twice, and every caller is told the truth, in time.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    super::deployment::eventually,
    chance::Rng,
    history::{self, Call, Told, told},
    monkey::Monkey,
    setting,
    stage::Stage,
};

/// The schedule that is run if no other one is asked for.
const SEED: u64 = 50_678;
/// For how long calls are made and harm is done, in CI.
const SHORT: Duration = Duration::from_secs(50);
/// The calls of a long run, if nothing says how long it is to be.
const LONG: usize = 10_000;

const CALLERS: usize = 16;
const USERS: usize = 4;
/// What callers allow a call.
const LIMIT: Duration = Duration::from_secs(10);
/// How much later than that it has to be answered: machines are slow and shared.
const GRACE: Duration = Duration::from_secs(5);
/// How long it may take until everything is well again.
const RECOVERY: Duration = Duration::from_secs(15);
/// How long nothing more may happen before it is over.
const QUIET: Duration = Duration::from_secs(3);

/// The servers: whether calls have a user and a secret, and whether only one process may run.
const SERVERS: [(&str, bool, bool); 5] = [
    ("many", false, false),
    ("few", false, false),
    ("one", false, true),
    ("own", true, true),
    ("secret", true, false),
];

/// When callers stop.
#[derive(Clone, Copy)]
enum Until {
    Calls(usize),
    Elapsed(Duration),
}

/// What all callers share.
struct Theatre {
    stage: Stage,
    seed: u64,
    begun: Instant,
    made: AtomicUsize,
    calls: Mutex<Vec<Call>>,
    over: CancellationToken,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_is_executed_at_most_once_and_told_truly() {
    let seed = setting("FAULTS_SEED").unwrap_or(SEED);
    let until = match (setting("FAULTS_SECONDS"), setting("FAULTS_LONG")) {
        (Some(seconds), _) => Until::Elapsed(Duration::from_secs(seconds)),
        (None, Some(1)) => Until::Calls(LONG),
        _ => Until::Elapsed(SHORT),
    };
    println!("FAULTS_SEED={seed}");
    let stage = Stage::lasting(2, 3, 1).await;
    prepare(&stage).await;
    let theatre = Arc::new(Theatre {
        stage,
        seed,
        begun: Instant::now(),
        made: AtomicUsize::new(0),
        calls: Mutex::default(),
        over: CancellationToken::new(),
    });
    let callers: Vec<_> =
        (1..=CALLERS).map(|number| tokio::spawn(Arc::clone(&theatre).caller(number, until))).collect();
    let service = tokio::spawn(Arc::clone(&theatre).service());
    let mut monkey = Monkey::new(seed);
    while !theatre.is_over(until) {
        monkey.round(&theatre.stage).await;
    }
    theatre.over.cancel();
    let healed = Instant::now();
    theatre.recover().await;
    let recovery = healed.elapsed();
    for caller in callers {
        caller.await.unwrap();
    }
    service.await.unwrap();
    theatre.calm_down().await;

    let calls = theatre.calls.lock().unwrap().clone();
    let violations = history::violations(&calls, &theatre.stage.history());
    println!(
        "seed {seed}: {} calls in {:.0?}\n{}\nfaults\n{}\nwell again {recovery:.1?} after the last fault; \
         children of killed nodes lived on for up to {:.1?}",
        calls.len(),
        theatre.begun.elapsed(),
        history::table(&calls),
        monkey.table(),
        monkey.survived,
    );
    if !violations.is_empty() || recovery > RECOVERY {
        let kept = theatre.stage.keep_logs(&format!("faults-{seed}"));
        std::fs::write(kept.join("diary"), monkey.diary.join("\n")).unwrap();
        panic!("recovery took {recovery:?}; see {}\n{}", kept.display(), violations.join("\n"));
    }
    // The schedule that is run by itself leaves no part of the fleet unharmed.
    if matches!(until, Until::Elapsed(SHORT)) && seed == SEED {
        for deed in [
            "Kill the bus",
            "Freeze the bus",
            "Kill the store",
            "Freeze the store",
            "Kill a gateway",
            "Kill a worker",
        ] {
            assert!(
                monkey.has_done(deed),
                "{deed}: the machine was too slow for the schedule\n{}",
                monkey.table()
            );
        }
    }
    // An ordinary run has all kinds of ends, and most calls are answered.
    let answered = calls.iter().filter(|call| call.told.contains(&Told::Answer)).count();
    assert!(answered * 2 > calls.len(), "only {answered} of {} calls were answered", calls.len());
    Arc::into_inner(theatre).unwrap().stage.stop().await;
}

async fn prepare(stage: &Stage) {
    stage.add("many", json!({})).await;
    stage.add("few", json!({"concurrency": 4})).await;
    stage.add("one", json!({"scaling": "singleton"})).await;
    stage.add("own", json!({"isolation": "per_user"})).await;
    stage.add("secret", json!({})).await;
    for (server, user) in SERVERS.iter().flat_map(|server| (0..USERS).map(move |user| (server, user))) {
        let (name, has_user, _) = server;
        if *has_user {
            let secret = json!({
                "username": format!("user-{user}"),
                "serverName": name,
                "secretName": "KEY",
                "secretValue": format!("key-of-{user}"),
            });
            stage.post(0, "/secrets/set", &secret).await.ok();
        }
    }
}

impl Theatre {
    fn is_over(&self, until: Until) -> bool {
        self.over.is_cancelled()
            || match until {
                Until::Calls(calls) => self.calls.lock().unwrap().len() >= calls,
                Until::Elapsed(time) => self.begun.elapsed() >= time,
            }
    }

    /// Draws a call: its history so far, its user, its server and its arguments.
    fn draw(&self, rng: &mut Rng) -> (Call, String, &'static str, Value) {
        let id = format!("call-{}", self.made.fetch_add(1, Ordering::Relaxed));
        let (server, has_user, alone) = SERVERS[rng.below(SERVERS.len())];
        let number = rng.below(USERS);
        let user = if has_user { format!("user-{number}") } else { "default".to_owned() };
        let mut args = json!({"path": self.stage.executed(), "id": id});
        if rng.happens(40) {
            args["ms"] = u64::try_from(rng.millis(50, 300).as_millis()).unwrap().into();
        }
        if alone {
            args["lock"] = json!(self.stage.data.path().join(format!("lock-{server}-{user}")));
        }
        let key = if has_user { format!("key-of-{number}") } else { "-".to_owned() };
        let what = format!("{server} for {user}");
        let call = Call { id, key, what, begun: self.begun.elapsed(), told: Vec::new(), late: None };
        (call, user, server, args)
    }

    /// Makes one call after the other.
    async fn caller(self: Arc<Self>, number: usize, until: Until) {
        let mut rng = Rng::new(self.seed, number as u64);
        while !self.is_over(until) {
            let (mut call, user, server, args) = self.draw(&mut rng);
            let gateway = rng.below(self.stage.gateways.len());
            let keyed = rng.happens(15);
            call.what =
                format!("{}, by gateway {gateway}, {}", call.what, if keyed { "keyed" } else { "once" });
            let body = json!({"username": user, "serverName": server, "methodName": "record", "args": args});
            for attempt in 0..8 {
                let gateway = (gateway + attempt) % self.stage.gateways.len();
                let Some(told) =
                    self.attempt(gateway, &body, keyed.then_some(&call.id), &mut call.late).await
                else {
                    // Nobody was there to be asked: another gateway is.
                    sleep(rng.millis(50, 200)).await;
                    continue;
                };
                call.told.push(told);
                if !keyed || call.told.contains(&Told::Answer) {
                    break;
                }
                // A call with a name is made again until its end is known.
                sleep(rng.millis(100, 1_000)).await;
            }
            if !call.told.is_empty() {
                self.calls.lock().unwrap().push(call);
            }
            sleep(rng.millis(100, 800)).await;
        }
    }

    /// Asks one gateway. `None`: it could not be reached.
    async fn attempt(
        &self,
        gateway: usize,
        body: &Value,
        key: Option<&String>,
        late: &mut Option<Duration>,
    ) -> Option<Told> {
        let seat = &self.stage.gateways[gateway];
        let limit = u64::try_from(LIMIT.as_millis()).unwrap();
        let mut request = self.stage.request(gateway, "/mcp/tool/call").json(body);
        request = request.header("X-Request-Timeout-Ms", limit).timeout(LIMIT * 6);
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        let asked = Instant::now();
        let answer = self.stage.send(request).await;
        let over = asked.elapsed().saturating_sub(LIMIT + GRACE + seat.frozen_since(asked));
        if !over.is_zero() {
            *late = Some(over);
        }
        match answer {
            Ok(answer) => Some(told(answer.status, &answer.json())),
            Err(error) if error.is_connect() => None,
            Err(_) if seat.ended_since(asked) => Some(Told::Nothing),
            Err(error) => Some(Told::Nonsense(format!("no answer of a gateway that lives: {error:?}"))),
        }
    }

    /// A service that calls by the bus alone.
    async fn service(self: Arc<Self>) {
        let mut rng = Rng::new(self.seed, 1_000);
        let url = self.stage.nats.lock().unwrap().url();
        let client = async_nats::ConnectOptions::new().retry_on_initial_connect().connect(url).await.unwrap();
        while !self.over.is_cancelled() {
            let (mut call, user, server, args) = self.draw(&mut rng);
            call.what = format!("{}, by the bus", call.what);
            let subject = format!("{}.v1.call.{server}.{user}", self.stage.data.name());
            let limit = u64::try_from(LIMIT.as_millis()).unwrap();
            let body = json!({"tool": "record", "args": args, "timeoutMs": limit}).to_string();
            let request = async_nats::Request::new().payload(body.into()).timeout(Some(LIMIT));
            // What the bus loses is answered by nobody: whoever asks by it alone waits by a clock of his own.
            let reply = tokio::time::timeout(LIMIT + GRACE, client.send_request(subject, request)).await;
            call.told.push(match reply {
                Ok(Ok(reply)) => {
                    let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
                    let status = if reply["success"] == true { 200 } else { 0 };
                    told(status, &reply)
                }
                Ok(Err(_)) | Err(_) => Told::Nothing,
            });
            self.calls.lock().unwrap().push(call);
            sleep(rng.millis(100, 800)).await;
        }
    }

    /// Calls to every server succeed through every gateway.
    async fn recover(&self) {
        for gateway in 0..self.stage.gateways.len() {
            for (server, has_user, _) in SERVERS {
                let user = if has_user { "user-0" } else { "default" };
                let said = Mutex::new(String::new());
                eventually(&format!("{server} answers by gateway {gateway}"), async || {
                    let answer = self.stage.call(gateway, user, server, "echo", json!({"text": "hi"})).await;
                    let well = answer.status == 200;
                    let code = if well { String::new() } else { answer.code() };
                    if *said.lock().unwrap() != code {
                        println!("{server} by gateway {gateway}: {}", answer.text);
                        *said.lock().unwrap() = code;
                    }
                    well
                })
                .await;
            }
        }
    }

    /// Waits until nothing happens any more: what was not executed by then never will be.
    async fn calm_down(&self) {
        eventually("no process runs that no worker has", async || self.stage.orphans().is_empty()).await;
        eventually("all calls have ended", async || {
            let fleet = self.stage.get(0, "/fleet").await.ok().json();
            let workers = fleet["workers"].as_array().unwrap().clone();
            let loads = workers.iter().flat_map(|one| one["servers"].as_array().unwrap());
            loads.into_iter().all(|load| load["inFlight"] == 0 && load["waiting"] == 0)
        })
        .await;
        let last = Mutex::new((self.stage.history().len(), Instant::now()));
        eventually("nothing is executed any more", async || {
            let length = self.stage.history().len();
            let mut last = last.lock().unwrap();
            if length != last.0 {
                *last = (length, Instant::now());
            }
            last.1.elapsed() >= QUIET
        })
        .await;
    }
}
