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
    measure::{Latencies, closed_loop, median},
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
const LIST: &str = "/mcp/servers";

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let registered = context.options.servers.unwrap_or(context.size(500, 40)) as usize;
    let hot = (registered / 10).max(1);
    let (listings, seconds) = context.size((100, 5), (20, 1));
    let text = format!(
        "{registered} servers are registered, {AT_ONCE} at a time, each a process of its own. All are listed {listings} times by one \
         caller, in turns with as many bytes from floor-http and, in a cluster, with the same documents read by MongoDB's driver \
         alone (`store`): what is left of a listing without the store's time in the same turn are mcp-api's own ms, the median \
         of which is shown. Then {hot} callers call, closed loop, {seconds} s: first one server, then \
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
        let Listings { list, store, own, same, tools, bytes } =
            measured(&deployment, &floor, listings).await?;
        let time = Duration::from_secs(seconds);
        let one = closed_loop(deployment.callers(hot, &Call::echo(100)).await?, time).await?.summary();
        let make = move |number: u64| {
            let name = format!("echo-{}", number as usize % hot);
            (Call::echo(100).at(&name).body(), "\"success\":true".to_owned())
        };
        let callers = varied(&deployment.addresses(), hot, "/mcp/tool/call", Arc::new(make)).await?;
        let many = closed_loop(callers, time).await?.summary();
        let (list, store, same) = (list.sorted(), store.sorted(), same.sorted());
        table.row([
            path.name().into(),
            (registered as f64 / registering).into(),
            list.at(0.5).into(),
            list.at(0.99).into(),
            (bytes as f64 / 1e3).into(),
            if path == Path::Cluster { store.at(0.5) } else { 0.0 }.into(),
            own.into(),
            (own / same.at(0.5)).into(),
            tools.sorted().at(0.5).into(),
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

/// What was measured of listings, in turns.
struct Listings {
    list: Latencies,
    /// What a listing reads from the store of a cluster, with nothing around it.
    store: Latencies,
    /// Milliseconds of a listing without the store's of the same turn, in the median.
    own: f64,
    /// As many bytes from the floor.
    same: Latencies,
    tools: Latencies,
    /// The size of a listing.
    bytes: usize,
}

async fn measured(deployment: &Deployment, floor: &Floor, turns: usize) -> Result<Listings> {
    let mut client = deployment.client().await?;
    let mut bare = Client::connect(&floor.address).await?;
    let database = deployment.store().await?;
    let bytes = client.read(LIST).await?.len();
    let as_many = format!("/bytes/{bytes}");
    let [mut list, mut store, mut same, mut tools] = [(); 4].map(|()| Latencies::default());
    let mut owns = Vec::with_capacity(turns);
    for _ in 0..turns {
        let listing = timed(client.read(LIST)).await?;
        let reading = match &database {
            Some(database) => timed(read(database)).await?,
            None => Duration::ZERO,
        };
        list.push(listing);
        store.push(reading);
        owns.push((listing.as_secs_f64() - reading.as_secs_f64()) * 1e3);
        same.push(timed(bare.read(&as_many)).await?);
        tools.push(timed(client.read("/mcp/tools")).await?);
    }
    Ok(Listings { list, store, own: median(owns.into_iter()), same, tools, bytes })
}

/// Reads what a listing reads.
async fn read(database: &Database) -> Result<()> {
    let all = async |name: &str| {
        let found = database.collection::<RawDocumentBuf>(name).find(doc! {}).batch_size(1_000).await?;
        found.try_collect::<Vec<_>>().await
    };
    try_join(all("mcp"), all("mcpTools")).await?;
    Ok(())
}

/// How long it takes.
async fn timed<T>(what: impl Future<Output = Result<T>>) -> Result<Duration> {
    let begun = Instant::now();
    what.await?;
    Ok(begun.elapsed())
}

async fn add(deployment: &Deployment, at: usize) -> Result<()> {
    deployment.add(&format!("echo-{at}"), json!({})).await
}
