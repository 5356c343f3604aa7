//! Memory, idle and with many large bodies.

use std::time::Duration;

use anyhow::Result;
use tokio::time::sleep;

use super::Context;
use crate::{
    callers::Call,
    figures::{Axis, Budget, Outcome, Plot, Series, Shape, Table},
    floors::Floor,
    measure::closed_loop,
    own,
    paths::{Path, Target},
};

const CALLERS: usize = 256;
const BYTES: usize = 100_000;
/// MB of a gateway and of a worker without calls, and of each with [`CALLERS`] of [`BYTES`].
const GATEWAY_IDLE: f64 = 40.0;
const WORKER_IDLE: f64 = 60.0;
const EACH_LOADED: f64 = 150.0;
const MB: f64 = 1_048_576.0;

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let (rest, seconds) = context.size((5, 10), (1, 2));
    let text = format!(
        "Resident memory {rest} s after the start, with one server registered; the most of it while {CALLERS} callers send and get \
         {BYTES} bytes each, closed loop, for {seconds} s; and {rest} s after that."
    );
    let mut outcome = Outcome::new("memory", "Memory", text);
    let columns = [("process", 0), ("idle MB", 1), ("most MB", 1), ("after MB", 1), ("calls/s", 0)];
    let mut table = Table::new("Resident memory", &columns);
    let (mut names, mut idles, mut mosts, mut afters) = (vec![], vec![], vec![], vec![]);
    for path in [vec![Path::FloorHttp], context.paths(&[Path::Single, Path::Cluster])].concat() {
        let target = match path {
            Path::FloorHttp => Target::Floor(Floor::http(&context.launch).await?),
            path => context.stage.start(path, &context.launch).await?,
        };
        let processes = match &target {
            Target::Http(deployment) if path == Path::Cluster => {
                vec![("gateway", deployment.gateways()), ("worker", deployment.workers())]
            }
            Target::Http(deployment) => vec![("single node", deployment.gateways())],
            Target::Floor(floor) => vec![("floor-http", floor.processes())],
            _ => vec![],
        };
        let processes: Vec<_> =
            processes.into_iter().flat_map(|(kind, ids)| ids.into_iter().map(move |id| (kind, id))).collect();
        let now = || processes.iter().map(|(_, id)| own::memory(*id)).collect::<Result<Vec<_>>>();
        sleep(Duration::from_secs(rest)).await;
        let before = now()?;
        let callers = target.callers(CALLERS, &Call::echo(BYTES)).await?;
        let loaded = closed_loop(callers, Duration::from_secs(seconds)).await?.summary();
        sleep(Duration::from_secs(rest)).await;
        let after = now()?;
        for (((kind, _), (idle, _)), (later, most)) in processes.iter().zip(before).zip(after) {
            let (idle, later, most) = (idle / MB, later / MB, most / MB);
            table.row([(*kind).into(), idle.into(), most.into(), later.into(), loaded.per_second.into()]);
            if path == Path::Cluster {
                let limit = if *kind == "gateway" { GATEWAY_IDLE } else { WORKER_IDLE };
                outcome.budgets.push(Budget::at_most(&format!("{kind}, idle"), idle, limit).unit("MB"));
                let what = format!("{kind}, most with {CALLERS} callers of 100 KB");
                outcome.budgets.push(Budget::at_most(&what, most, EACH_LOADED).unit("MB"));
            }
            names.push(*kind);
            idles.push(idle);
            mosts.push(most);
            afters.push(later);
        }
        target.stop().await?;
    }
    outcome.tables.push(table);
    outcome.plots.push(Plot {
        file: "memory".to_owned(),
        title: format!("Resident memory, idle and with {CALLERS} callers of 100 KB"),
        shape: Shape::Bars,
        x: Axis::names("process", names),
        y: Axis::linear("MB"),
        series: vec![
            Series::heights("idle", idles),
            Series::heights("most under load", mosts),
            Series::heights("after", afters),
        ],
        marks: vec![
            ("budget loaded: 150".to_owned(), EACH_LOADED),
            ("gateway idle: 40".to_owned(), GATEWAY_IDLE),
        ],
    });
    Ok(outcome)
}
