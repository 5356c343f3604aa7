//! Calls while secrets are changed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use super::{Context, users};
use crate::{
    callers::{Call, contains, shown},
    client::Client,
    figures::{Axis, Outcome, Plot, Series, Shape, Table},
    measure::{Latencies, closed_loop},
    paths::Path,
};

const READERS: usize = 28;
const WRITERS: usize = 4;

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let seconds = context.size(8, 2);
    let text = format!(
        "{READERS} callers call, closed loop, {seconds} s, first alone and then beside {WRITERS} who set a secret of a user of their own \
         and call with it at once, again and again. A call that begins after a write was answered and has an older value ends the run."
    );
    let mut outcome = Outcome::new("mixed", "Reads and writes", text);
    let columns = [
        ("path", 0),
        ("calls/s alone", 0),
        ("p99 ms alone", 3),
        ("calls/s beside writes", 0),
        ("p99 ms beside writes", 3),
        ("ratio", 2),
        ("writes/s", 0),
        ("write p50 ms", 2),
        ("write p99 ms", 2),
    ];
    let mut table = Table::new("Calls alone and beside writes", &columns);
    let (mut names, mut alones, mut besides, mut writes) = (vec![], vec![], vec![], vec![]);
    for path in context.paths(&[Path::Single, Path::Cluster]) {
        let deployment = match path {
            Path::Single => context.stage.single(&context.launch).await?,
            _ => context.stage.cluster(&context.launch, 2, 1).await?,
        };
        let time = Duration::from_secs(seconds);
        let call = Call::echo(100);
        let alone = closed_loop(deployment.callers(READERS, &call).await?, time).await?.summary();
        let (over, addresses) = (Arc::new(AtomicBool::new(false)), deployment.addresses());
        let mut writers = JoinSet::new();
        for user in 0..WRITERS {
            // What one gateway was told is seen by the other one.
            let place = |at: usize| addresses.get(at % addresses.len()).cloned().unwrap_or_default();
            writers.spawn(write(place(user), place(user + 1), user as u64, Arc::clone(&over)));
        }
        let begun = Instant::now();
        let beside = closed_loop(deployment.callers(READERS, &call).await?, time).await?.summary();
        over.store(true, Ordering::Relaxed);
        let mut written = Latencies::default();
        while let Some(one) = writers.join_next().await {
            written.extend(&one??);
        }
        let per_second = written.count() as f64 / begun.elapsed().as_secs_f64();
        let sorted = written.sorted();
        table.row([
            path.name().into(),
            alone.per_second.into(),
            alone.p99_ms.into(),
            beside.per_second.into(),
            beside.p99_ms.into(),
            (beside.per_second / alone.per_second).into(),
            per_second.into(),
            sorted.at(0.5).into(),
            sorted.at(0.99).into(),
        ]);
        names.push(path.name());
        alones.push(alone.per_second);
        besides.push(beside.per_second);
        writes.push(per_second);
        deployment.stop().await?;
    }
    outcome.tables.push(table);
    outcome.plots.push(Plot {
        file: "mixed".to_owned(),
        title: "Calls alone and beside writes".to_owned(),
        shape: Shape::Bars,
        x: Axis::names("path", names),
        y: Axis::linear("in a second"),
        series: vec![
            Series::heights("calls alone", alones),
            Series::heights("calls beside writes", besides),
            Series::heights("writes", writes),
        ],
        marks: vec![],
    });
    Ok(outcome)
}

/// Sets a secret at one gateway and calls with it at another one, until it is over: what the writes took.
async fn write(one: String, other: String, user: u64, over: Arc<AtomicBool>) -> Result<Latencies> {
    let (mut one, mut other) = (Client::connect(&one).await?, Client::connect(&other).await?);
    let (mut latencies, mut version) = (Latencies::default(), 0);
    while !over.load(Ordering::Relaxed) {
        version += 1;
        let begun = Instant::now();
        let answer = one.post("/secrets/set", users::set(user, version)).await?;
        ensure!(answer.starts_with(b"{\"success\":true"), "a secret was not set: {}", shown(&answer));
        latencies.push(begun.elapsed());
        let (answer, expected) =
            (other.post("/mcp/tool/call", users::call(user)).await?, users::secret(user, version));
        let current = contains(&answer, &expected);
        ensure!(current, "a call has not the newest secret {expected}: {}", shown(&answer));
    }
    Ok(latencies)
}
