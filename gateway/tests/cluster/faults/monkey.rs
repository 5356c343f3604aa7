//! The faults, drawn from a seed: one or two at a time, with rests between them.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use mcp_shared::testing::services::{MongoServer, NatsServer};
use serde_json::json;
use tokio::time::sleep;

use super::{
    super::deployment::{alive, eventually},
    chance::Rng,
    stage::{Seat, Stage, descendants},
};

/// What is done to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Kill,
    Freeze,
    /// Its connections to the bus, or to the store, are closed.
    Cut(Way),
    /// Nothing gets through between it and the bus, or the store, until later.
    Hold(Way),
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Bus,
    Store,
}

/// Whom it is done to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Gateway(usize),
    Worker(usize),
    Bus,
    Store,
    /// The place of a worker that comes and goes.
    Spare,
}

#[derive(Debug, Clone, Copy)]
struct Fault {
    target: Target,
    deed: Deed,
    lasts: Duration,
}

impl Fault {
    fn draw(rng: &mut Rng, stage: &Stage) -> Self {
        let (gateways, workers) = (stage.gateways.len(), stage.workers.len() - 1);
        let target = match rng.below(10) {
            0..=3 => Target::Worker(rng.below(workers)),
            4..=6 => Target::Gateway(rng.below(gateways)),
            7 => Target::Bus,
            8 => Target::Store,
            _ => Target::Spare,
        };
        let way = if rng.happens(60) { Way::Bus } else { Way::Store };
        let deed = match (target, rng.below(10)) {
            (Target::Bus | Target::Store, 0..=4) | (_, 0..=2) => Deed::Kill,
            (Target::Bus | Target::Store, _) | (_, 3..=4) => Deed::Freeze,
            (_, 5..=6) => Deed::Hold(way),
            (_, 7) => Deed::Cut(way),
            _ => Deed::Stop,
        };
        // Many are short: those are the ones that nobody notices at once.
        let longest = if rng.happens(40) { 1_000 } else { 6_000 };
        Self { target, deed, lasts: rng.millis(200, longest) }
    }

    fn name(self) -> String {
        let whom = match self.target {
            Target::Gateway(_) => "gateway",
            Target::Worker(_) => "worker",
            Target::Bus => return format!("{:?} the bus", self.deed),
            Target::Store => return format!("{:?} the store", self.deed),
            Target::Spare => return "a worker comes or goes".to_owned(),
        };
        format!("{:?} a {whom}", self.deed)
    }
}

/// Who does it, and remembers what was done.
pub struct Monkey {
    rng: Rng,
    begun: Instant,
    done: BTreeMap<String, usize>,
    /// When what was done, for whoever looks for a cause.
    pub diary: Vec<String>,
    /// How long children of killed workers lived on.
    pub survived: Duration,
}

impl Monkey {
    /// One that follows a seed.
    pub fn new(seed: u64) -> Self {
        Self {
            rng: Rng::new(seed, 0),
            begun: Instant::now(),
            done: BTreeMap::new(),
            diary: Vec::new(),
            survived: Duration::ZERO,
        }
    }

    /// What was done how often.
    pub fn table(&self) -> String {
        self.done.iter().map(|(what, times)| format!("{times:>7}  {what}\n")).collect()
    }

    /// Whether something was done.
    pub fn has_done(&self, what: &str) -> bool {
        self.done.contains_key(what)
    }

    /// One or two faults at once, then whoever is lost is replaced, then a rest.
    pub async fn round(&mut self, stage: &Stage) {
        let mut faults = vec![Fault::draw(&mut self.rng, stage)];
        if self.rng.happens(30) {
            let second = Fault::draw(&mut self.rng, stage);
            if second.target != faults[0].target {
                faults.push(second);
            }
        }
        for fault in &faults {
            *self.done.entry(fault.name()).or_default() += 1;
            self.diary.push(format!("{:>9.3} {fault:?}", self.begun.elapsed().as_secs_f64()));
        }
        let lived = futures_util::future::join_all(faults.iter().map(|fault| happen(stage, *fault))).await;
        self.survived = lived.into_iter().fold(self.survived, Duration::max);
        self.diary.push(format!("{:>9.3} replace", self.begun.elapsed().as_secs_f64()));
        let seats = stage.gateways.iter().chain(&stage.workers[..stage.workers.len() - 1]);
        futures_util::future::join_all(seats.map(|seat| seat.fill(&stage.data))).await;
        if faults.iter().any(|fault| fault.target == Target::Spare) && self.rng.happens(60) {
            stage.workers.last().unwrap().fill(&stage.data).await;
        }
        self.diary.push(format!("{:>9.3} rest", self.begun.elapsed().as_secs_f64()));
        sleep(self.rng.millis(500, 3_000)).await;
    }
}

/// Does one thing, and undoes it after its time. Returned is how long children of a killed worker lived on.
async fn happen(stage: &Stage, fault: Fault) -> Duration {
    let mut survived = Duration::ZERO;
    match fault.target {
        Target::Bus => {
            let service = &stage.nats;
            if fault.deed == Deed::Kill {
                stage.with(service, NatsServer::kill).await;
                sleep(fault.lasts).await;
                stage.with(service, NatsServer::restart).await;
            } else {
                stage.with(service, |nats| nats.freeze()).await;
                sleep(fault.lasts).await;
                stage.with(service, |nats| nats.thaw()).await;
            }
        }
        Target::Store => {
            let service = &stage.mongo;
            if fault.deed == Deed::Kill {
                stage.with(service, MongoServer::kill).await;
                sleep(fault.lasts).await;
                stage.with(service, MongoServer::restart).await;
            } else {
                stage.with(service, |mongo| mongo.freeze()).await;
                sleep(fault.lasts).await;
                stage.with(service, |mongo| mongo.thaw()).await;
            }
        }
        Target::Spare => drain(stage, stage.workers.last().unwrap()).await,
        Target::Gateway(at) => survived = harm(&stage.gateways[at], fault).await,
        Target::Worker(at) => survived = harm(&stage.workers[at], fault).await,
    }
    survived
}

async fn harm(seat: &Seat, fault: Fault) -> Duration {
    let link = |way| match way {
        Way::Bus => &seat.bus,
        Way::Store => &seat.store,
    };
    match fault.deed {
        Deed::Kill => {
            let children = seat.pid().map(descendants).unwrap_or_default();
            seat.kill();
            let killed = Instant::now();
            eventually("children of what was killed end", async || !children.iter().any(|pid| alive(*pid)))
                .await;
            let survived = killed.elapsed();
            sleep(fault.lasts.saturating_sub(survived)).await;
            return survived;
        }
        Deed::Freeze => {
            seat.freeze();
            sleep(fault.lasts).await;
            seat.thaw();
        }
        Deed::Cut(way) => {
            link(way).cut();
            sleep(fault.lasts).await;
            link(way).mend();
        }
        Deed::Hold(way) => {
            link(way).hold();
            sleep(fault.lasts).await;
            link(way).mend();
        }
        Deed::Stop => {
            if let Some(node) = seat.leave() {
                ended(node.stop()).await;
            }
        }
    }
    Duration::ZERO
}

/// Asks the worker to leave, if there is one.
async fn drain(stage: &Stage, seat: &Seat) {
    if !seat.is_taken() {
        return;
    }
    let path = format!("/fleet/workers/{}/drain", seat.id());
    let asked = stage.send(stage.request(0, &path).timeout(Duration::from_secs(5)).json(&json!({}))).await;
    let Some(node) = seat.leave() else { return };
    // The gateway may be the one that is harmed just now.
    if asked.is_ok_and(|answer| answer.status == 202) {
        ended(node.ended()).await;
    } else {
        ended(node.stop()).await;
    }
}

async fn ended(end: impl Future<Output = std::process::ExitStatus>) {
    let end = end.await;
    assert!(end.success(), "a node that was asked to stop ended with {end}");
}
