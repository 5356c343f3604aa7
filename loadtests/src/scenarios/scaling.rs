//! More workers for a server with few slots.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::Context;
use crate::{
    callers::Call,
    deployment::Deployment,
    figures::{Axis, Budget, Outcome, Plot, Series, Shape, Table},
    measure::window,
    paths::Path,
};

const WORKERS: usize = 4;
const SLOTS: u32 = 4;
const TOOL_MS: u64 = 100;
/// Another worker takes part when calls wait for a second at those that there are, so these have to be enough for all.
const CALLERS: usize = 256;
/// Calls per second in as many times those of one worker.
const OF_LINEAR: f64 = 0.85;
/// How long it may take until a worker that was added takes part.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let seconds = context.size(10, 2);
    let text = format!(
        "A server that allows {SLOTS} calls at once, of a tool that takes {TOOL_MS} ms, on a cluster to which workers are added while \
         {CALLERS} callers call. Measured for {seconds} s as soon as as many workers run it as there are; `joins` is the time from \
         the start of the worker to then."
    );
    let mut outcome = Outcome::new("scaling", "Scaling", text);
    let columns = [("workers", 0), ("joins, s", 1), ("calls/s", 1), ("of linear", 3), ("of all slots", 3)];
    let mut table = Table::new("Calls per second by workers", &columns);
    let mut measured = Vec::new();
    if !context.paths(&[Path::Cluster]).is_empty() {
        let mut deployment = context.stage.cluster(&context.launch, 1, 1).await?;
        deployment.add("slotted", json!({"concurrency": SLOTS})).await?;
        for workers in 1..=WORKERS {
            let begun = Instant::now();
            if workers > 1 {
                deployment.add_worker().await?;
            }
            let callers = || async { deployment.callers(CALLERS, &Call::sleep(TOOL_MS).at("slotted")).await };
            // Whoever waits for the workers calls meanwhile, or nothing would show that more of them are needed.
            tokio::select! {
                loaded = window(callers().await?, PATIENCE * 2, Duration::ZERO) => { loaded?; }
                all = run_by(&deployment, workers) => all?,
            }
            let joins = begun.elapsed().as_secs_f64();
            let rate = window(callers().await?, Duration::from_secs(2), Duration::from_secs(seconds)).await?;
            measured.push(rate);
            let linear = measured.first().map_or(f64::NAN, |one| one * workers as f64);
            let slots = f64::from(SLOTS) * workers as f64 * 1_000.0 / TOOL_MS as f64;
            table.row([
                workers.into(),
                if workers > 1 { joins } else { f64::NAN }.into(),
                rate.into(),
                (rate / linear).into(),
                (rate / slots).into(),
            ]);
        }
        deployment.stop().await?;
    }
    for workers in [2, WORKERS] {
        if let (Some(one), Some(rate)) = (measured.first(), measured.get(workers - 1)) {
            let what = format!("cluster, calls/s of {workers} workers in {workers} × those of one");
            outcome.budgets.push(Budget::at_least(&what, rate / (one * workers as f64), OF_LINEAR));
        }
    }
    outcome.tables.push(table);
    let one = measured.first().copied().unwrap_or(f64::NAN);
    let linear = (1..=measured.len()).map(|workers| one * workers as f64);
    outcome.plots.push(Plot {
        file: "scaling".to_owned(),
        title: format!("A server with {SLOTS} slots and a {TOOL_MS} ms tool"),
        shape: Shape::Bars,
        x: Axis::names("workers", 1..=measured.len()),
        y: Axis::linear("calls/s"),
        series: vec![Series::heights("measured", measured.clone()), Series::heights("linear", linear)],
        marks: vec![],
    });
    Ok(outcome)
}

/// Waits until so many workers run the server.
async fn run_by(deployment: &Deployment, workers: usize) -> Result<()> {
    let mut client = deployment.client().await?;
    let begun = Instant::now();
    loop {
        let server = client.get("/mcp/servers/slotted").await?;
        if server["server"]["instances"].as_array().map_or(0, Vec::len) >= workers {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "{workers} workers are there, and not all run the server");
        sleep(Duration::from_millis(20)).await;
    }
}
