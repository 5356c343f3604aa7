//! From the start of the programs to the first answered call.

use std::time::Instant;

use anyhow::Result;

use super::Context;
use crate::{
    callers::Call,
    client::Client,
    figures::{Axis, Budget, Outcome, Plot, Series, Shape, Table},
    floors::Floor,
    measure::median,
    paths::Path,
    stdio::Server,
};

/// Seconds until a single node has answered, less those of the server; this depends on the machine.
const SINGLE_S: f64 = 0.5;
/// The same in what floor-http takes, its server included.
const OF_FLOOR: f64 = 50.0;

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let rounds = context.size(10, 3);
    let text = format!(
        "From the start of the processes to the first answer of a call, {rounds} times in turns, medians. The server was registered \
         before, and starts with the programs; direct stdio is that start alone. The programs of a cluster are started at once, \
         with their store and NATS there."
    );
    let mut outcome = Outcome::new("start", "Start", text);
    let mut names = vec![Path::Direct, Path::FloorHttp];
    let mut deployments = Vec::new();
    for path in context.paths(&[Path::Single, Path::Cluster]) {
        names.push(path);
        deployments.push(match path {
            Path::Single => context.stage.single(&context.launch).await?,
            _ => context.stage.cluster(&context.launch, 1, 1).await?,
        });
    }
    let mut times: Vec<Vec<f64>> = names.iter().map(|_| Vec::new()).collect();
    let call = Call::echo(100);
    for _ in 0..rounds {
        let mut round = Vec::new();
        let begun = Instant::now();
        let server = Server::start(&context.launch).await?;
        server.connection.call(call.tool, &call.arguments).await?;
        round.push(begun.elapsed());
        let begun = Instant::now();
        let floor = Floor::http(&context.launch).await?;
        Client::connect(&floor.address).await?.post("/mcp/tool/call", call.body()).await?;
        round.push(begun.elapsed());
        for deployment in &mut deployments {
            round.push(deployment.restart().await?);
        }
        for (times, time) in times.iter_mut().zip(round) {
            times.push(time.as_secs_f64());
        }
    }
    for deployment in deployments {
        deployment.stop().await?;
    }
    let columns =
        [("path", 0), ("s", 3), ("least", 3), ("most", 3), ("less the server", 3), ("in floor-http's", 1)];
    let mut table = Table::new("Seconds to the first answer", &columns);
    let middle = |at: usize| times.get(at).map_or(f64::NAN, |times| median(times.iter().copied()));
    let (server, floor) = (middle(0), middle(1));
    let mut heights = Vec::new();
    for (at, (path, times)) in names.iter().zip(&times).enumerate() {
        let time = middle(at);
        heights.push(time);
        table.row([
            path.name().into(),
            time.into(),
            times.iter().copied().fold(f64::INFINITY, f64::min).into(),
            times.iter().copied().fold(0.0, f64::max).into(),
            (time - server).into(),
            (time / floor).into(),
        ]);
        if *path == Path::Single {
            let what = "single node, start to first answer in that of floor-http";
            outcome.budgets.push(Budget::at_most(what, time / floor, OF_FLOOR));
            let what = "single node, start to first answer, less the server's";
            outcome.budgets.push(Budget::at_most(what, time - server, SINGLE_S).unit("s").shown());
        }
    }
    outcome.tables.push(table);
    outcome.plots.push(Plot {
        file: "start".to_owned(),
        title: "From start to the first answered call".to_owned(),
        shape: Shape::Bars,
        x: Axis::names("path", names.iter().map(|path| path.name())),
        y: Axis::linear("s"),
        series: vec![Series::heights("to the first answer", heights)],
        marks: vec![("budget: single 0.5 s".to_owned(), SINGLE_S)],
    });
    Ok(outcome)
}
