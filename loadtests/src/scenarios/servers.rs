//! Many servers, of which some are called.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use futures_util::{StreamExt, TryStreamExt, future::try_join, stream};
use mongodb::{
    Database,
    bson::{RawDocumentBuf, doc},
};
use serde_json::json;

use super::Context;
use crate::{
    callers::{Call, varied},
    client::Client,
    deployment::Deployment,
    figures::{Axis, Budget, Outcome, Plot, Series, Shape, Table},
    floors::Floor,
    measure::{Latencies, closed_loop},
    paths::Path,
};

/// A listing in the time that the HTTP floor takes for as many bytes, from [`MANY`] servers on: a short one has nothing
/// to divide by.
const OF_FLOOR: f64 = 40.0;
const MANY: usize = 500;
/// And in milliseconds, which depends on the machine, for 500 servers.
const LIST_MS: f64 = 10.0;
/// Registrations at once.
const AT_ONCE: usize = 8;

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let registered = context.options.servers.unwrap_or(context.size(500, 40)) as usize;
    let hot = (registered / 10).max(1);
    let (listings, seconds) = context.size((100, 5), (20, 1));
    let text = format!(
        "{registered} servers are registered, {AT_ONCE} at a time, each a process of its own. All are listed {listings} times by one \
         caller, beside as many bytes from floor-http and, in a cluster, beside the same documents read by MongoDB's driver \
         alone (`store`): what is left are mcp-api's own ms. Then {hot} callers call, closed loop, {seconds} s: first one server, then \
         {hot} of them."
    );
    let mut outcome = Outcome::new("servers", "Many servers", text);
    let columns = [
        ("path", 0),
        ("registrations/s", 1),
        ("list p50 ms", 2),
        ("list p99 ms", 2),
        ("list KB", 0),
        ("store ms", 2),
        ("own ms", 2),
        ("own in floor-http's", 1),
        ("tools p50 ms", 2),
        ("calls/s, one server", 0),
        ("calls/s, hot servers", 0),
        ("ratio", 2),
    ];
    let mut table = Table::new("Servers", &columns);
    let (mut names, mut lists, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    let floor = Floor::http(&context.launch).await?;
    for path in context.paths(&[Path::Single, Path::Cluster]) {
        let deployment = match path {
            Path::Single => context.stage.single(&context.launch).await?,
            _ => context.stage.cluster(&context.launch, 1, 1).await?,
        };
        let begun = Instant::now();
        stream::iter(0..registered.saturating_sub(1))
            .map(|at| add(&deployment, at))
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await?;
        let registering = begun.elapsed().as_secs_f64();
        let mut client = deployment.client().await?;
        let (list, bytes) = listing(&mut client, "/mcp/servers", listings).await?;
        let (tools, _) = listing(&mut client, "/mcp/tools", listings).await?;
        let store = match deployment.store().await? {
            Some(store) => reading(&store, listings).await?.sorted().at(0.5),
            None => 0.0,
        };
        let mut client = Client::connect(&floor.address).await?;
        let (same, _) = listing(&mut client, &format!("/bytes/{bytes}"), listings).await?;
        let time = Duration::from_secs(seconds);
        let one = closed_loop(deployment.callers(hot, &Call::echo(100)).await?, time).await?.summary();
        let make = move |number: u64| {
            let name = format!("echo-{}", number as usize % hot);
            (Call::echo(100).at(&name).body(), "\"success\":true".to_owned())
        };
        let callers = varied(&deployment.addresses(), hot, "/mcp/tool/call", Arc::new(make)).await?;
        let many = closed_loop(callers, time).await?.summary();
        let (list, tools, same) = (list.sorted(), tools.sorted(), same.sorted());
        let own = list.at(0.5) - store;
        table.row([
            path.name().into(),
            (registered as f64 / registering).into(),
            list.at(0.5).into(),
            list.at(0.99).into(),
            (bytes as f64 / 1e3).into(),
            store.into(),
            own.into(),
            (own / same.at(0.5)).into(),
            tools.at(0.5).into(),
            one.per_second.into(),
            many.per_second.into(),
            (many.per_second / one.per_second).into(),
        ]);
        let besides = if path == Path::Cluster { ", besides the store's own time" } else { "" };
        let what = format!("{}, listing {registered} servers{besides}", path.name());
        let ratio = own / same.at(0.5);
        let of_floor = format!("{what} in the time of as many bytes of floor-http");
        let budget = Budget::at_most(&of_floor, ratio, OF_FLOOR);
        outcome.budgets.push(if registered < MANY { budget.shown() } else { budget });
        outcome.budgets.push(Budget::at_most(&what, own, LIST_MS).unit("ms").shown());
        names.push(path.name());
        lists.push(list.at(0.5));
        floors.push(same.at(0.5));
        deployment.stop().await?;
    }
    outcome.tables.push(table);
    outcome.plots.push(Plot {
        file: "servers".to_owned(),
        title: format!("Listing {registered} servers"),
        shape: Shape::Bars,
        x: Axis::names("path", names),
        y: Axis::linear("p50, ms"),
        series: vec![Series::heights("listing", lists), Series::heights("as many bytes, floor", floors)],
        marks: vec![("budget: 10 ms".to_owned(), LIST_MS)],
    });
    Ok(outcome)
}

/// What a listing reads from the store of a cluster, with nothing around it.
async fn reading(store: &Database, times: usize) -> Result<Latencies> {
    let all = async |name: &str| {
        let found = store.collection::<RawDocumentBuf>(name).find(doc! {}).batch_size(1_000).await?;
        found.try_collect::<Vec<_>>().await
    };
    let mut latencies = Latencies::default();
    for _ in 0..times {
        let begun = Instant::now();
        try_join(all("mcp"), all("mcpTools")).await?;
        latencies.push(begun.elapsed());
    }
    Ok(latencies)
}

async fn add(deployment: &Deployment, at: usize) -> Result<()> {
    deployment.add(&format!("echo-{at}"), json!({})).await
}

async fn listing(client: &mut Client, path: &str, times: usize) -> Result<(Latencies, usize)> {
    let (mut latencies, mut bytes) = (Latencies::default(), 0);
    for _ in 0..times {
        let begun = Instant::now();
        bytes = client.read(path).await?.len();
        latencies.push(begun.elapsed());
    }
    Ok((latencies, bytes))
}
