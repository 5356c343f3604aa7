//! What calls cost: counters of processes and of NATS, read before and after.

use std::{
    future::Future,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{allocations, client::Client, measure::Sample};

/// Microseconds of one tick in `/proc/PID/stat`, which Linux shows in hundredths of a second.
const TICK_MICROS: f64 = 10_000.0;
/// How long nothing is done to see what is counted all the same.
const REST: Duration = Duration::from_secs(2);

/// One counter.
pub enum Meter {
    /// Microseconds of processor time of processes.
    Processor(Vec<u32>),
    /// A member of what NATS says of itself.
    Nats(&'static str),
    /// Allocations and their bytes, as counted by [`allocations`].
    Allocations(Vec<PathBuf>),
    /// The same for the bytes.
    Allocated(Vec<PathBuf>),
}

/// Counters with their names.
pub struct Meters {
    meters: Vec<(&'static str, Meter)>,
    /// `host:port` of the monitoring page of NATS.
    monitoring: Option<String>,
    /// What each counts in a second without calls.
    resting: Vec<f64>,
}

impl Meters {
    /// No call may be under way: what is counted now is taken off later. Processor time is not, because
    /// its clock is too coarse to see it.
    pub async fn new(meters: Vec<(&'static str, Meter)>, monitoring: Option<String>) -> Result<Self> {
        let mut new = Self { resting: vec![0.0; meters.len()], meters, monitoring };
        let finely = |meter: &Meter| !matches!(meter, Meter::Processor(_));
        if new.meters.iter().any(|(_, meter)| finely(meter)) {
            let before = new.read().await?;
            let begun = Instant::now();
            tokio::time::sleep(REST).await;
            let after = new.read().await?;
            let time = begun.elapsed().as_secs_f64();
            let counted = before.iter().zip(&after).zip(&new.meters);
            let resting = counted.map(
                |((before, after), (_, meter))| {
                    if finely(meter) { (after - before) / time } else { 0.0 }
                },
            );
            new.resting = resting.collect();
        }
        Ok(new)
    }

    /// Does something, and says what each of its calls cost.
    pub async fn around(&self, work: impl Future<Output = Result<Sample>>) -> Result<(Sample, Vec<f64>)> {
        let before = self.read().await?;
        let begun = Instant::now();
        let sample = work.await?;
        let time = begun.elapsed().as_secs_f64();
        let after = self.read().await?;
        let calls = sample.made as f64;
        let costs = before.iter().zip(&after).zip(&self.resting);
        let costs = costs.map(|((before, after), resting)| (after - before - resting * time) / calls);
        Ok((sample, costs.collect()))
    }

    /// The names, in the order of the costs.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.meters.iter().map(|(name, _)| *name)
    }

    async fn read(&self) -> Result<Vec<f64>> {
        let nats = match &self.monitoring {
            Some(address) => varz(address).await?,
            None => Value::Null,
        };
        let read = |(_, meter): &(_, Meter)| match meter {
            Meter::Processor(processes) => processes.iter().map(|id| processor_time(*id)).sum(),
            Meter::Nats(name) => nats[name].as_f64().with_context(|| format!("NATS has no {name}")),
            Meter::Allocations(files) => files.iter().map(|file| Ok(allocations::read(file)?.0)).sum(),
            Meter::Allocated(files) => files.iter().map(|file| Ok(allocations::read(file)?.1)).sum(),
        };
        self.meters.iter().map(read).collect()
    }
}

/// What NATS says of itself.
pub async fn varz(address: &str) -> Result<Value> {
    Client::connect(address).await?.get("/varz").await
}

fn processor_time(process: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))
        .with_context(|| format!("process {process} has ended"))?;
    // The name may have anything in it; what follows it is numbers, from the third field on.
    let (_, rest) = stat.rsplit_once(')').context("no name")?;
    let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? * TICK_MICROS)
}
