//! Many users, each with a secret.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use serde_json::json;

use super::Context;
use crate::{
    callers::{Call, Make, varied},
    figures::{Axis, Outcome, Plot, Series, Shape, Table},
    measure::{closed_loop, exactly},
    paths::Path,
};

/// Callers, and those who set secrets.
const CALLERS: usize = 16;

/// Runs.
pub async fn run(context: &Context<'_>) -> Result<Outcome> {
    let users = u64::from(context.options.users.unwrap_or(context.size(10_000, 200)));
    let seconds = context.size(5, 1);
    let text = format!(
        "{users} users have a secret each, which {CALLERS} callers set. Then each user calls once (`first`: the secret comes from the \
         store), and all of them over and over, closed loop, {seconds} s (`again`). The secret becomes an argument and comes back, \
         and an answer with anything but that user's secret ends the run. Beside it the same calls without secrets."
    );
    let mut outcome = Outcome::new("users", "Many users with secrets", text);
    let columns = [
        ("path", 0),
        ("secrets set/s", 0),
        ("set p99 ms", 2),
        ("first calls/s", 0),
        ("first p99 ms", 2),
        ("again calls/s", 0),
        ("again p99 ms", 2),
        ("without calls/s", 0),
        ("again / without", 2),
    ];
    let mut table = Table::new("Users", &columns);
    let (mut names, mut heights) = (Vec::new(), [vec![], vec![], vec![], vec![]]);
    for path in context.paths(&[Path::Single, Path::Cluster]) {
        let deployment = match path {
            Path::Single => context.stage.single(&context.launch).await?,
            _ => context.stage.cluster(&context.launch, 1, 1).await?,
        };
        let addresses = deployment.addresses();
        let time = Duration::from_secs(seconds);
        let bare = closed_loop(deployment.callers(CALLERS, &Call::echo(100)).await?, time).await?.summary();
        let setters = varied(&addresses, CALLERS, "/secrets/set", setting(users)).await?;
        let set = exactly(setters, users).await?.summary();
        let first = varied(&addresses, CALLERS, "/mcp/tool/call", calling(users)).await?;
        let first = exactly(first, users).await?.summary();
        let again = varied(&addresses, CALLERS, "/mcp/tool/call", calling(users)).await?;
        let again = closed_loop(again, time).await?.summary();
        table.row([
            path.name().into(),
            set.per_second.into(),
            set.p99_ms.into(),
            first.per_second.into(),
            first.p99_ms.into(),
            again.per_second.into(),
            again.p99_ms.into(),
            bare.per_second.into(),
            (again.per_second / bare.per_second).into(),
        ]);
        names.push(path.name());
        for (heights, summary) in heights.iter_mut().zip([set, first, again, bare]) {
            heights.push(summary.per_second);
        }
        deployment.stop().await?;
    }
    outcome.tables.push(table);
    let kinds = ["secrets set", "first call of each user", "calls again", "calls without secrets"];
    let series = kinds.iter().zip(heights).map(|(name, heights)| Series::heights(name, heights));
    outcome.plots.push(Plot {
        file: "users".to_owned(),
        title: format!("{users} users with a secret each"),
        shape: Shape::Bars,
        x: Axis::names("path", names),
        y: Axis::linear("in a second"),
        series: series.collect(),
        marks: vec![],
    });
    Ok(outcome)
}

/// As long as the text of other calls.
pub fn secret(user: u64, version: u64) -> String {
    format!("secret-{version}-of-user-{user}-{}", "s".repeat(70))
}

/// What sets a user's secret.
pub fn set(user: u64, version: u64) -> bytes::Bytes {
    let (name, value) = (format!("user-{user}"), secret(user, version));
    json!({"username": name, "serverName": "echo", "secretName": "text", "secretValue": value})
        .to_string()
        .into()
}

/// What calls with it.
pub fn call(user: u64) -> bytes::Bytes {
    let name = format!("user-{user}");
    json!({"username": name, "serverName": "echo", "methodName": "echo", "args": {}}).to_string().into()
}

fn setting(users: u64) -> Make {
    Arc::new(move |number| (set(number % users, 0), "\"success\":true".to_owned()))
}

fn calling(users: u64) -> Make {
    // Each of them once, and not in their order.
    let step = if users.is_multiple_of(7_919) { 1 } else { 7_919 };
    Arc::new(move |number| {
        let user = number.wrapping_mul(step) % users;
        (call(user), secret(user, 0))
    })
}
