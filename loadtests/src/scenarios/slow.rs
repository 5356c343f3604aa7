//! Many calls of a slow tool at once.

use anyhow::Result;
use serde_json::json;

use super::{Context, stop};
use crate::{
    callers::Call,
    figures::{Axis, Budget, Outcome, Plot, Series, Shape, Table},
    measure::{burst, median},
    paths::{Path, Target},
};

const CALLS: usize = 200;
const TOOL_MS: u64 = 1_000;
/// All of them in what the tool takes.
const OF_TOOL: f64 = 1.3;
const PATHS: [Path; 6] =
    [Path::Direct, Path::FloorHttp, Path::FloorCluster, Path::Single, Path::Cluster, Path::Mcpo];

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let rounds = context.size(5, 1);
    let text = format!(
        "{CALLS} calls of a tool that takes {TOOL_MS} ms, all at once, on connections that are there already; {rounds} rounds in \
         turns, medians. The server is registered with room for as many calls."
    );
    let mut outcome = Outcome::new("slow", "Slow tools", text);
    let targets = context.start(&PATHS).await?;
    for (_, target) in &targets {
        if let Target::Http(deployment) = target {
            deployment.add("slow", json!({"concurrency": 256})).await?;
        }
    }
    let mut measured: Vec<_> = targets.iter().map(|(path, _)| (*path, Vec::new())).collect();
    for _ in 0..rounds {
        for ((_, target), (_, times)) in targets.iter().zip(&mut measured) {
            let call = Call::sleep(TOOL_MS).at("slow");
            times.push(burst(target.callers(CALLS, &call).await?).await?.as_secs_f64());
        }
    }
    stop(targets).await?;
    let columns = [
        ("path", 0),
        ("s until all are answered", 3),
        ("in what the tool takes", 3),
        ("above direct, ms", 1),
    ];
    let mut table = Table::new("All at once", &columns);
    let of = |path: Path| {
        measured
            .iter()
            .find(|(own, _)| *own == path)
            .map_or(f64::NAN, |(_, times)| median(times.iter().copied()))
    };
    let tool = TOOL_MS as f64 / 1_000.0;
    for (path, _) in &measured {
        let time = of(*path);
        table.row([
            path.name().into(),
            time.into(),
            (time / tool).into(),
            ((time - of(Path::Direct)) * 1_000.0).into(),
        ]);
    }
    outcome.tables.push(table);
    for path in context.paths(&[Path::Single, Path::Cluster]) {
        let what = format!("{}, {CALLS} calls of {TOOL_MS} ms at once in what one takes", path.name());
        outcome.budgets.push(Budget::at_most(&what, of(path) / tool, OF_TOOL));
    }
    outcome.plots.push(Plot {
        file: "slow".to_owned(),
        title: format!("{CALLS} calls of a {TOOL_MS} ms tool at once"),
        shape: Shape::Bars,
        x: Axis::names("path", measured.iter().map(|(path, _)| path.name())),
        y: Axis::linear("s until all are answered"),
        series: vec![Series::heights("until all are answered", measured.iter().map(|(path, _)| of(*path)))],
        marks: vec![("budget: 1.3 × the tool".to_owned(), OF_TOOL * tool)],
    });
    Ok(outcome)
}
