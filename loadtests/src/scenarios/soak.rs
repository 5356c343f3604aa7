//! The same load for long: what grows?

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::json;
use tokio::time::sleep;

use super::{Context, users};
use crate::{
    callers::{Call, shown},
    client::Client,
    deployment::Deployment,
    figures::{Axis, Budget, Outcome, Plot, Series, Shape, Table},
    measure::{Schedule, median, open_loop},
    own,
    paths::Path,
};

/// Calls in a second.
const RATE: f64 = 400.0;
const CONNECTIONS: usize = 32;
/// How often somebody comes, sets a secret, calls, deletes it, and leaves.
const VISITS: Duration = Duration::from_millis(100);
/// How often is looked.
const LOOKS: u32 = 120;
/// The last quarter in the second one.
const MEMORY_GROWS: f64 = 1.10;
const DESCRIPTORS_GROW: f64 = 1.05;
const MB: f64 = 1_048_576.0;
/// Shorter runs have nothing to say about trends.
const MEANS_SOMETHING: Duration = Duration::from_secs(240);

/// What one process was seen to have, at each look.
struct Watched {
    name: String,
    process: u32,
    memory: Vec<(f64, f64)>,
    descriptors: Vec<(f64, f64)>,
}

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let minutes = context.options.minutes.unwrap_or(context.size(10.0, 0.25));
    let paths = context.paths(&[Path::Single, Path::Cluster]);
    let time = Duration::from_secs_f64(minutes * 60.0 / paths.len().max(1) as f64);
    let text = format!(
        "{RATE} calls a second with a text of 1 KB over {CONNECTIONS} connections, and ten times a second somebody who connects, sets a \
         secret, calls with it, deletes it and leaves; {minutes} minutes, shared by the shapes. Growth is the median of the last \
         quarter in that of the second one; the trend is the slope of a straight line through the second half."
    );
    let mut outcome = Outcome::new("soak", "Soak", text);
    let columns = [
        ("process", 0),
        ("MB at first", 1),
        ("MB at last", 1),
        ("MB most", 1),
        ("growth", 3),
        ("trend, MB/h", 1),
        ("files at first", 0),
        ("files at last", 0),
        ("growth of files", 3),
    ];
    let mut table = Table::new("Memory and open files", &columns);
    let call_columns =
        [("path", 0), ("calls/s", 0), ("p50 ms", 3), ("p99 ms", 3), ("p99.9 ms", 3), ("visits", 0)];
    let mut calls = Table::new("Calls", &call_columns);
    let mut series = Vec::new();
    for path in paths {
        let deployment = match path {
            Path::Single => context.stage.single(&context.launch).await?,
            _ => context.stage.cluster(&context.launch, 1, 1).await?,
        };
        let over = Arc::new(AtomicBool::new(false));
        let visits = tokio::spawn(visit(deployment.addresses(), Arc::clone(&over)));
        let watch = tokio::spawn(watch(watched(&deployment, path), time, Arc::clone(&over)));
        let schedule = Schedule { rate: RATE, time };
        let open = open_loop(deployment.callers(CONNECTIONS, &Call::echo(1_000)).await?, schedule).await?;
        over.store(true, Ordering::Relaxed);
        let visits = visits.await??;
        let sorted = open.latencies.sorted();
        let visits = visits as usize;
        let latencies = [0.5, 0.99, 0.999].map(|share| sorted.at(share).into());
        let [p50, p99, p999] = latencies;
        calls.row([path.name().into(), open.per_second.into(), p50, p99, p999, visits.into()]);
        for one in watch.await?? {
            let (memory, files) = (growth(&one.memory), growth(&one.descriptors));
            let first = |figures: &[(f64, f64)]| figures.first().map(|(_, figure)| *figure);
            let last = |figures: &[(f64, f64)]| figures.last().map(|(_, figure)| *figure);
            table.row([
                one.name.as_str().into(),
                first(&one.memory).into(),
                last(&one.memory).into(),
                (own::memory(one.process)?.1 / MB).into(),
                memory.into(),
                (slope(&one.memory) * 3_600.0).into(),
                first(&one.descriptors).into(),
                last(&one.descriptors).into(),
                files.into(),
            ]);
            for (what, figure, limit) in
                [("memory", memory, MEMORY_GROWS), ("open files", files, DESCRIPTORS_GROW)]
            {
                let what = format!("soak, {}, growth of {what}", one.name);
                let budget = Budget::at_most(&what, figure, limit);
                outcome.budgets.push(if time < MEANS_SOMETHING { budget.shown() } else { budget });
            }
            series.push(Series::new(&one.name, one.memory.iter().map(|(at, figure)| (at / 60.0, *figure))));
        }
        deployment.stop().await?;
    }
    outcome.tables = vec![table, calls];
    outcome.plots.push(Plot {
        file: "soak".to_owned(),
        title: format!("Resident memory under {RATE} calls a second"),
        shape: Shape::Lines,
        x: Axis::linear("minutes"),
        y: Axis::linear("MB"),
        series,
        marks: vec![],
    });
    Ok(outcome)
}

fn watched(deployment: &Deployment, path: Path) -> Vec<Watched> {
    let kinds = [("gateway", deployment.gateways()), ("worker", deployment.workers())];
    let all = kinds.into_iter().flat_map(|(kind, processes)| {
        processes.into_iter().map(move |process| Watched {
            name: if path == Path::Single {
                path.name().to_owned()
            } else {
                format!("{}, {kind}", path.name())
            },
            process,
            memory: vec![],
            descriptors: vec![],
        })
    });
    all.collect()
}

async fn watch(mut watched: Vec<Watched>, time: Duration, over: Arc<AtomicBool>) -> Result<Vec<Watched>> {
    let begun = Instant::now();
    while !over.load(Ordering::Relaxed) {
        for one in &mut watched {
            let at = begun.elapsed().as_secs_f64();
            one.memory.push((at, own::memory(one.process)?.0 / MB));
            one.descriptors.push((at, own::descriptors(one.process)? as f64));
        }
        sleep(time / LOOKS).await;
    }
    Ok(watched)
}

/// Comes and goes until it is over: how often.
async fn visit(addresses: Vec<String>, over: Arc<AtomicBool>) -> Result<u64> {
    let mut visits = 0;
    while !over.load(Ordering::Relaxed) {
        let address = addresses.get(visits as usize % addresses.len()).cloned().unwrap_or_default();
        let mut client = Client::connect(&address).await?;
        let user = visits % 100;
        let answer = client.post("/secrets/set", users::set(user, visits)).await?;
        ensure!(answer.starts_with(b"{\"success\":true"), "a secret was not set: {}", shown(&answer));
        let answer = client.post("/mcp/tool/call", users::call(user)).await?;
        ensure!(answer.starts_with(b"{\"success\":true"), "a call failed: {}", shown(&answer));
        let gone = json!({"username": format!("user-{user}"), "serverName": "echo", "secretName": "text"});
        let answer = client.post("/secrets/delete", gone.to_string().into()).await?;
        ensure!(answer.starts_with(b"{\"success\":true"), "a secret was not deleted: {}", shown(&answer));
        visits += 1;
        sleep(VISITS).await;
    }
    Ok(visits)
}

/// The median of the last quarter in that of the second one.
fn growth(figures: &[(f64, f64)]) -> f64 {
    let quarter = figures.len() / 4;
    let median = |from: usize, to: usize| median(figures[from..to].iter().map(|(_, figure)| *figure));
    if quarter == 0 {
        f64::NAN
    } else {
        median(figures.len() - quarter, figures.len()) / median(quarter, 2 * quarter)
    }
}

/// How much there is more in a second: least squares over the second half.
fn slope(figures: &[(f64, f64)]) -> f64 {
    let half = &figures[figures.len() / 2..];
    let count = half.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| half.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|one| one.0), mean(|one| one.1));
    let both: f64 = half.iter().map(|one| (one.0 - x) * (one.1 - y)).sum();
    let square: f64 = half.iter().map(|one| (one.0 - x).powi(2)).sum();
    both / square
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_and_trend() {
        let steady: Vec<_> = (0..100).map(|at| (f64::from(at), 50.0)).collect();
        assert_eq!((growth(&steady), slope(&steady)), (1.0, 0.0));
        let growing: Vec<_> = (0..100).map(|at| (f64::from(at), 50.0 + 0.5 * f64::from(at))).collect();
        assert!((slope(&growing) - 0.5).abs() < 1e-9);
        assert!(growth(&growing) > 1.3);
        assert!(growth(&[]).is_nan() && growth(&steady[..3]).is_nan());
    }
}
