//! Small and large bodies.

use std::time::Duration;

use anyhow::{Context as _, Result};
use mcp_shared::testing::services::NatsServer;

use super::{Context, closed::Rounds, stop};
use crate::{
    callers::Call,
    figures::{Axis, Outcome, Plot, Series, Shape, Table},
    floors::Floor,
    paths::{Path, Target},
};

/// Bytes of the text, there and back.
const SIZES: [(&str, usize); 3] = [("100 B", 100), ("100 KB", 100_000), ("1 MB", 1_000_000)];
const CALLERS: usize = 16;
const PATHS: [Path; 5] = [Path::Direct, Path::FloorHttp, Path::FloorCluster, Path::Single, Path::Cluster];

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let (rounds, seconds) = context.size((3, 3), (1, 1));
    let text = format!(
        "The text that is echoed has 100 bytes, 100 KB and 1 MB, and goes there and back; {CALLERS} callers in a closed loop, \
         {rounds} rounds of {seconds} s, medians. The cluster goes over a stock NATS server, whose messages have at most 1 MB, \
         and divides; floor-cluster has one that takes 8 MB, and does not."
    );
    let mut outcome = Outcome::new("bodies", "Bodies", text);
    let roomy = tokio::task::spawn_blocking(|| NatsServer::start("max_payload: 8MB"));
    let roomy = roomy.await.context("NATS did not start")?;
    let mut targets = context.start(&PATHS).await?;
    for (path, target) in &mut targets {
        if *path == Path::FloorCluster {
            *target = Target::Floor(Floor::cluster(&context.launch, &roomy.url(), "load.bodies").await?);
        }
    }
    let columns = [
        ("text", 0),
        ("path", 0),
        ("calls/s", 0),
        ("MB/s each way", 1),
        ("p50 ms", 3),
        ("p99 ms", 3),
        ("of floor", 2),
        ("of direct", 2),
    ];
    let mut table = Table::new("Texts of different sizes", &columns);
    let mut heights: Vec<_> = targets.iter().map(|(path, _)| (*path, Vec::new())).collect();
    for (name, size) in SIZES {
        let time = Duration::from_secs(seconds);
        let rounds = Rounds::measure(&targets, CALLERS, &Call::echo(size), rounds, time).await?;
        for ((path, summary), (_, heights)) in rounds.medians().zip(&mut heights) {
            let megabytes = summary.per_second * size as f64 / 1e6;
            heights.push(rounds.ratio(path, Path::Direct));
            table.row([
                name.into(),
                path.name().into(),
                summary.per_second.into(),
                megabytes.into(),
                summary.p50_ms.into(),
                summary.p99_ms.into(),
                path.floor().map(|floor| rounds.ratio(path, floor)).into(),
                rounds.ratio(path, Path::Direct).into(),
            ]);
        }
    }
    stop(targets).await?;
    outcome.tables.push(table);
    outcome.plots.push(Plot {
        file: "bodies".to_owned(),
        title: "Calls per second in those of direct stdio, by size of the text".to_owned(),
        shape: Shape::Bars,
        x: Axis::names("text, there and back", SIZES.map(|(name, _)| name)),
        y: Axis::linear("calls/s in those of direct stdio"),
        series: heights.into_iter().map(|(path, heights)| Series::heights(path.name(), heights)).collect(),
        marks: vec![],
    });
    Ok(outcome)
}
