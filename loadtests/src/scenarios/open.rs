//! Calls at fixed rates, whatever becomes of those before them.

use std::time::Duration;

use anyhow::Result;

use super::{Context, stop};
use crate::{
    callers::Call,
    figures::{Axis, Cell, Outcome, Plot, Series, Shape, Table},
    measure::{Schedule, open_loop},
    paths::Path,
    servers::Language,
};

/// Connections that calls are spread over.
const CONNECTIONS: usize = 128;
const PATHS: [Path; 5] = [Path::Direct, Path::FloorHttp, Path::FloorCluster, Path::Single, Path::Cluster];

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let seconds = context.size(8, 2);
    let rates: &[f64] = match (context.options.quick, context.language) {
        (true, _) => &[200.0, 1_000.0],
        (false, Language::Rust) => &[500.0, 1_000.0, 2_000.0, 4_000.0, 8_000.0],
        (false, _) => &[100.0, 250.0, 500.0, 1_000.0],
    };
    let text = format!(
        "Calls with a text of 100 bytes that begin at fixed rates for {seconds} s, over {CONNECTIONS} connections. A latency runs \
         from the moment at which the call was to be made, so that calls that wait because those before them are slow count \
         (coordinated omission); `as sent` is what it would be from the moment at which it was made. Where a path cannot keep \
         up, fewer are answered than were asked for, and latencies are those of a queue that grows."
    );
    let mut outcome = Outcome::new("open", "Open loop", text);
    let columns = [
        ("calls/s asked", 0),
        ("path", 0),
        ("calls/s answered", 0),
        ("p50 ms", 3),
        ("p99 ms", 3),
        ("p99.9 ms", 3),
        ("p99 ms as sent", 3),
        ("p99 in floor's", 1),
    ];
    let mut table = Table::new("Latency at fixed rates", &columns);
    let targets = context.start(&PATHS).await?;
    let mut series: Vec<_> = targets.iter().map(|(path, _)| (*path, Vec::new())).collect();
    for rate in rates {
        let schedule = Schedule { rate: *rate, time: Duration::from_secs(seconds) };
        let mut p99 = Vec::new();
        for ((path, target), (_, points)) in targets.iter().zip(&mut series) {
            let open = open_loop(target.callers(CONNECTIONS, &Call::echo(100)).await?, schedule).await?;
            let sorted = open.latencies.sorted();
            p99.push((*path, sorted.at(0.99)));
            points.push((*rate, sorted.at(0.99)));
            let floor = path.floor().and_then(|floor| p99.iter().find(|(own, _)| *own == floor));
            table.row([
                Cell::from(*rate),
                path.name().into(),
                open.per_second.into(),
                sorted.at(0.5).into(),
                sorted.at(0.99).into(),
                sorted.at(0.999).into(),
                open.service.sorted().at(0.99).into(),
                floor.map(|(_, floor)| sorted.at(0.99) / floor).into(),
            ]);
        }
    }
    stop(targets).await?;
    outcome.tables.push(table);
    outcome.plots.push(Plot {
        file: "open".to_owned(),
        title: "99th percentile at fixed rates".to_owned(),
        shape: Shape::Lines,
        x: Axis::log("calls asked for in a second"),
        y: Axis::log("p99 from the intended moment, ms"),
        series: series.into_iter().map(|(path, points)| Series::new(path.name(), points)).collect(),
        marks: vec![],
    });
    Ok(outcome)
}
