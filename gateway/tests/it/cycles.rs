//! Starting and stopping servers again and again leaves nothing behind: no process, no descriptor, no thread, and no
//! memory that grows with it.
//!
//! `FAULTS_LONG=1` runs as many cycles as a server may see in years.

#![allow(clippy::print_stdout, reason = "the figures are what the long run is for")]

use std::time::Instant;

use serde_json::json;

use crate::{
    deployment::{Deployment, alive, eventually},
    footprint::{self, processes_with},
};

/// Cycles of the short run. Changes of a cluster are slower, the more so with the stand-in for MongoDB.
const CYCLES: usize = if crate::CLUSTER { 60 } else { 200 };
/// Cycles of the long run.
const LONG_CYCLES: usize = if crate::CLUSTER { 1_000 } else { 10_000 };
/// Cycles before anything is counted, for what is made only once.
const WARM_UP: usize = 20;
/// How much larger our memory may be after all of them: what the allocator keeps in hand, and nothing for each cycle.
const KILOBYTES: u64 = 8 * 1024;
/// Threads that the runtime may have started since: it keeps those that block for a while.
const THREADS: u64 = 8;
/// Connections that the test's own client may have opened meanwhile.
const SOCKETS: usize = 4;

/// One start, one call, one stop; in turn in all the ways in which a server may leave. One that has to be told takes
/// its time.
async fn cycle(api: &Deployment, turn: usize) {
    let name = if turn % 20 == 19 { "asked" } else { ["polite", "wrapped", "crashing"][turn % 3] };
    let server = api.put(&format!("/mcp/servers/{name}/enable"), None).await.ok().json()["server"].clone();
    assert_eq!(server["status"], "connected", "{server}");
    let pids = api.pids(name).await;
    let text = format!("turn {turn}");
    assert_eq!(api.call(name, "echo", json!({"text": text})).await.tool_text(), text);
    if name == "crashing" {
        api.call(name, "crash", json!({})).await.fails(502, "server_crashed");
    }
    api.put(&format!("/mcp/servers/{name}/disable"), None).await.ok();
    assert!(!pids.iter().any(|pid| alive(*pid)), "{name}: {pids:?}");
}

#[tokio::test]
async fn starting_and_stopping_leaves_nothing_behind() {
    let long = std::env::var_os("FAULTS_LONG").is_some_and(|value| value == "1");
    let cycles = if long { LONG_CYCLES } else { CYCLES };
    let api = Deployment::builder().workers(1).start().await;
    let mark = format!("cycle-{}", std::process::id());
    for (name, flags) in [
        ("polite", &[][..]),
        ("wrapped", &["--wrapper"]),
        ("crashing", &["--more"]),
        ("asked", &["--linger"]),
    ] {
        api.add_fixture(name, flags, json!({"env": {"CYCLE": mark}})).await;
        api.put(&format!("/mcp/servers/{name}/disable"), None).await.ok();
    }
    for turn in 0..WARM_UP {
        cycle(&api, turn).await;
    }
    let (before, start) = (footprint::of(&api), Instant::now());
    println!("after {WARM_UP} cycles: {before:?}");
    for turn in 0..cycles {
        cycle(&api, turn).await;
        if turn % 1_000 == 999 {
            println!("{} more in {:?}: {:?}", turn + 1, start.elapsed(), footprint::of(&api));
        }
    }
    let took = start.elapsed();
    eventually("all is as it was", async || {
        let now = footprint::of(&api);
        let threads = now
            .iter()
            .all(|(pid, now)| before.get(pid).is_some_and(|before| now.threads <= before.threads + THREADS));
        threads
            && footprint::growth(&before, &now, KILOBYTES, SOCKETS).is_empty()
            && processes_with(&format!("CYCLE={mark}")).is_empty()
    })
    .await;
    println!("{cycles} cycles in {took:?}: {:?}", footprint::of(&api));
    assert!(api.stop().await.success());
}
