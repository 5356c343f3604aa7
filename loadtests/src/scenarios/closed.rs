//! Callers who wait for each answer.

use std::time::Duration;

use anyhow::Result;

use super::{Context, stop};
use crate::{
    callers::Call,
    figures::{Axis, Budget, Outcome, Plot, Series, Shape, Table},
    measure::{Summary, closed_loop, median},
    paths::{Path, Target},
};

/// Calls per second of a single node in those of the HTTP floor, at [`MANY`] callers.
const SINGLE_OF_FLOOR: f64 = 0.6;
/// Calls per second of a cluster in those of its floor, at [`MANY`] callers.
const CLUSTER_OF_FLOOR: f64 = 0.6;
/// Milliseconds that a single node may add to the median of one caller.
const SINGLE_ADDS_MS: f64 = 0.15;
/// Milliseconds that a cluster may add to that, besides two round trips of NATS.
const CLUSTER_ADDS_MS: f64 = 0.1;
/// Calls per second in those of mcpo, at [`MANY`] callers.
const SINGLE_OF_MCPO: f64 = 10.0;
const CLUSTER_OF_MCPO: f64 = 5.0;
/// Where calls per second are judged.
const MANY: usize = 64;

const CALLERS: [usize; 4] = [1, 16, MANY, 256];
const PATHS: [Path; 8] = [
    Path::Direct,
    Path::FloorHttp,
    Path::FloorCluster,
    Path::Single,
    Path::Cluster,
    Path::Nats,
    Path::Handshake,
    Path::Mcpo,
];

/// What was measured of some paths in turns, round by round.
pub struct Rounds(Vec<(Path, Vec<Summary>)>);

impl Rounds {
    /// Measures.
    pub async fn measure(
        targets: &[(Path, Target)],
        callers: usize,
        call: &Call,
        rounds: usize,
        time: Duration,
    ) -> Result<Self> {
        let mut all: Vec<_> = targets.iter().map(|(path, _)| (*path, Vec::new())).collect();
        for _ in 0..rounds {
            for ((_, target), (_, summaries)) in targets.iter().zip(&mut all) {
                let sample = closed_loop(target.callers(callers, call).await?, time).await?;
                summaries.push(sample.summary());
            }
        }
        Ok(Self(all))
    }

    /// The medians of each path.
    pub fn medians(&self) -> impl Iterator<Item = (Path, Summary)> {
        self.0.iter().map(|(path, summaries)| (*path, Summary::median(summaries)))
    }

    fn of(&self, path: Path) -> &[Summary] {
        self.0.iter().find(|(own, _)| *own == path).map_or(&[], |(_, summaries)| summaries)
    }

    /// The median of what a path's figure is in another one's of the same round, which saw the same machine.
    pub fn ratio(&self, path: Path, to: Path) -> f64 {
        let pairs = self.of(path).iter().zip(self.of(to));
        median(pairs.map(|(one, other)| one.per_second / other.per_second))
    }

    /// The median of how many milliseconds the median latency of a path is above those of others together, in the same
    /// round: the machine may be faster in one round than in the next.
    pub fn p50_above(&self, path: Path, others: &[Path]) -> f64 {
        let above = |(round, own): (usize, &Summary)| {
            let rest = others.iter().filter_map(|other| self.of(*other).get(round));
            own.p50_ms - rest.map(|other| other.p50_ms).sum::<f64>()
        };
        median(self.of(path).iter().enumerate().map(above))
    }
}

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let (rounds, seconds) = context.size((3, 3), (1, 1));
    // A median of tenths of a millisecond is a matter of what else the machine does, and is judged by differences.
    let rounds_of_one = context.size(9, 1);
    let text = format!(
        "Callers who make their next call when the last one is answered, each with a kept-alive connection; a text of 100 \
         bytes; {rounds} rounds of {seconds} s by each path in turns ({rounds_of_one} with one caller), medians. `of floor` is the ratio of calls per second to \
         those of the path's floor in the same round: floor-http for the single node and mcpo, floor-cluster for the \
         cluster, direct stdio for floor-http, and floor-http for floor-cluster."
    );
    let mut outcome = Outcome::new("closed", "Closed loop", text);
    let targets = context.start(&PATHS).await?;
    let columns = [
        ("callers", 0),
        ("path", 0),
        ("calls/s", 0),
        ("least", 0),
        ("most", 0),
        ("p50 ms", 3),
        ("p99 ms", 3),
        ("p99.9 ms", 3),
        ("of floor", 2),
        ("of direct", 2),
    ];
    let mut table = Table::new("Calls per second and latency", &columns);
    let mut measured = Vec::new();
    for callers in CALLERS {
        let time = Duration::from_secs(seconds);
        let rounds = if callers == 1 { rounds_of_one } else { rounds };
        let rounds = Rounds::measure(&targets, callers, &Call::echo(100), rounds, time).await?;
        for (path, summary) in rounds.medians() {
            let of_floor = path.floor().map(|floor| rounds.ratio(path, floor));
            table.row([
                callers.into(),
                path.name().into(),
                summary.per_second.into(),
                summary.range.0.into(),
                summary.range.1.into(),
                summary.p50_ms.into(),
                summary.p99_ms.into(),
                summary.p999_ms.into(),
                of_floor.into(),
                rounds.ratio(path, Path::Direct).into(),
            ]);
        }
        measured.push((callers, rounds));
    }
    outcome.tables.push(table);
    outcome
        .plots
        .push(plot("closed", "Calls per second, 100 byte text", "calls/s", &measured, |one| one.per_second));
    outcome
        .plots
        .push(plot("closed-p50", "Median latency, 100 byte text", "p50, ms", &measured, |one| one.p50_ms));
    outcome.budgets = budgets(context, &measured);
    stop(targets).await?;
    Ok(outcome)
}

fn plot(
    file: &str,
    title: &str,
    unit: &str,
    measured: &[(usize, Rounds)],
    figure: fn(&Summary) -> f64,
) -> Plot {
    let series = |path: Path| {
        let points = measured.iter().filter_map(|(callers, rounds)| {
            let (_, summary) = rounds.medians().find(|(own, _)| *own == path)?;
            Some((*callers as f64, figure(&summary)))
        });
        Series::new(path.name(), points)
    };
    Plot {
        file: file.to_owned(),
        title: title.to_owned(),
        shape: Shape::Lines,
        x: Axis::log("callers at once"),
        y: Axis::log(unit),
        series: PATHS.map(series).into_iter().filter(|series| !series.points.is_empty()).collect(),
        marks: vec![],
    }
}

fn budgets(context: &Context<'_>, measured: &[(usize, Rounds)]) -> Vec<Budget> {
    let at = |callers| measured.iter().find(|(own, _)| *own == callers).map(|(_, rounds)| rounds);
    let (Some(one), Some(many)) = (at(1), at(MANY)) else { return vec![] };
    let mut budgets = Vec::new();
    let there = |path| context.paths(&[path]).contains(&path);
    if there(Path::Single) {
        let ratio = many.ratio(Path::Single, Path::FloorHttp);
        budgets.push(Budget::at_least(
            "single node, calls/s in floor-http's, 64 callers",
            ratio,
            SINGLE_OF_FLOOR,
        ));
        let adds = one.p50_above(Path::Single, &[Path::Direct]);
        let what = "single node, p50 above direct stdio, 1 caller";
        budgets.push(Budget::at_most(what, adds, SINGLE_ADDS_MS).unit("ms"));
    }
    if there(Path::Cluster) {
        let ratio = many.ratio(Path::Cluster, Path::FloorCluster);
        budgets.push(Budget::at_least(
            "cluster, calls/s in floor-cluster's, 64 callers",
            ratio,
            CLUSTER_OF_FLOOR,
        ));
    }
    if there(Path::Cluster) && there(Path::Single) {
        let adds = one.p50_above(Path::Cluster, &[Path::Single, Path::Handshake]);
        let what = "cluster, p50 above single node and two round trips, 1 caller";
        budgets.push(Budget::at_most(what, adds, CLUSTER_ADDS_MS).unit("ms"));
    }
    for (path, limit) in [(Path::Single, SINGLE_OF_MCPO), (Path::Cluster, CLUSTER_OF_MCPO)] {
        if there(path) && there(Path::Mcpo) {
            let what = format!("{}, calls/s in mcpo's, 64 callers", path.name());
            budgets.push(Budget::at_least(&what, many.ratio(path, Path::Mcpo), limit));
        }
    }
    budgets
}
