//! What is printed.

use std::{collections::BTreeMap, path::Path as Folder};

use anyhow::{Context, Result};
use mcp_shared::testing::tools;
use tokio::process::Command;

use crate::{measure::Summary, overload::Row, own, paths::Path};

/// What one call cost, by the names of the counters.
pub type Costs = BTreeMap<&'static str, f64>;

/// Counters of NATS, and how their columns are called.
pub const NATS: [(&str, &str); 4] =
    [("in_msgs", "msgs in"), ("out_msgs", "msgs out"), ("in_bytes", "B in"), ("out_bytes", "B out")];

/// Says what runs, and where.
pub async fn machine(programs: &Folder, nats: &str) -> Result<Vec<String>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let mut lines = vec![format!("mcp-loadtests {}", arguments.join(" "))];
    let mut versions = Vec::new();
    for program in ["mcp-gateway", "mcp-worker"] {
        let path = programs.join(program);
        let said = Command::new(&path).arg("--version").output().await.with_context(|| {
            format!("{} cannot be run; build it with: cargo build --release", path.display())
        })?;
        versions.push(String::from_utf8_lossy(&said.stdout).trim().to_owned());
    }
    lines.push(format!("{}; nats-server {nats}", versions.join(", ")));
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let model = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    lines.push(format!(
        "{} processors ({}), Linux {}",
        std::thread::available_parallelism()?,
        model.map_or("unknown", |(_, model)| model),
        read("/proc/sys/kernel/osrelease").trim()
    ));
    let others = [("node", "--version"), ("python3", "--version"), ("rustc", "--version")];
    let mut versions = vec![format!("{} {}", tools::MCPO, tools::MCPO_VERSION)];
    versions.push(format!("SDKs of {} {}", tools::SERVER_EVERYTHING, tools::SERVER_EVERYTHING_VERSION));
    versions.push(format!("and {} {}", tools::SERVER_TIME, tools::SERVER_TIME_VERSION));
    for (program, flag) in others {
        versions.extend(said(program, &[flag]).await.map(|version| format!("{program} {version}")));
    }
    lines.push(versions.join(", "));
    let folder = env!("CARGO_MANIFEST_DIR");
    let commit = said("git", &["-C", folder, "describe", "--always", "--dirty"]).await;
    lines.extend(commit.map(|commit| format!("built from {commit}")));
    lines.extend(said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]).await);
    let memory = read("/proc/meminfo");
    let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let total = total.and_then(|total| total.parse::<f64>().ok()).unwrap_or(f64::NAN);
    lines.push(format!("{:.1} GB of memory", total / 1_048_576.0));
    lines.push(format!("load average at the start: {}", load_average()));
    for line in &lines {
        println!("{line}");
    }
    Ok(lines)
}

/// The first line that a program says, if there is that program.
async fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output =
        Command::new(program).args(arguments).output().await.ok().filter(|one| one.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned())
}

/// Whether others are at work.
pub fn load_average() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// The head of the table of speeds.
pub fn speed_head() {
    println!();
    println!(
        "{:>7}  {:<14} {:>8} {:>15} {:>8} {:>8} {:>9} {:>8}",
        "callers", "path", "calls/s", "least-most", "p50 ms", "p99 ms", "of direct", "of floor"
    );
}

/// The speeds of all paths with so many callers, and what follows from them.
pub fn speed(callers: u16, rows: &[(Path, Summary)]) {
    let of = |path: Path| rows.iter().find(|(own, _)| *own == path).map(|(_, summary)| summary);
    for (path, summary) in rows {
        let (least, most) = summary.range;
        let ratio = |to: Option<Path>| {
            let to = to.and_then(of);
            to.map_or_else(|| "-".to_owned(), |to| format!("{:.2}", summary.per_second / to.per_second))
        };
        println!(
            "{callers:>7}  {:<14} {:>8.0} {:>15} {:>8.3} {:>8.3} {:>9} {:>8}",
            path.name(),
            summary.per_second,
            format!("{least:.0}-{most:.0}"),
            summary.p50_ms,
            summary.p99_ms,
            ratio(Some(Path::Direct)),
            ratio(path.floor()),
        );
    }
    let paths = [Path::Single, Path::Cluster, Path::Nats, Path::Handshake].map(of);
    if let [Some(single), Some(cluster), Some(trip), Some(trips)] = paths {
        let more = cluster.p50_ms - single.p50_ms;
        println!(
            "         cluster / single node {:.2} of the calls/s; p50 {more:+.3} ms = {:.1} trips, {:+.3} ms over two; \
             handshake {:+.3} ms",
            cluster.per_second / single.per_second,
            more / trip.p50_ms,
            more - trips.p50_ms,
            trips.p50_ms - trip.p50_ms,
        );
    }
}

/// One server while another one is overloaded.
pub fn overload(rows: &[Row]) {
    println!("\nthe other server, idle and while the crowd is there; calls of the crowd");
    println!(
        "{:<14} {:>9} {:>8} {:>8}  {:>9} {:>8} {:>8} {:>9}  {:>8} {:>8}",
        "path",
        "calls/s",
        "p50 ms",
        "p99 ms",
        "calls/s",
        "p50 ms",
        "p99 ms",
        "p99 ratio",
        "served",
        "refused"
    );
    for Row { path, idle, crowded, served, refused } in rows {
        println!(
            "{:<14} {:>9.0} {:>8.3} {:>8.3}  {:>9.0} {:>8.3} {:>8.3} {:>9.2}  {served:>8} {refused:>8}",
            path.name(),
            idle.per_second,
            idle.p50_ms,
            idle.p99_ms,
            crowded.per_second,
            crowded.p50_ms,
            crowded.p99_ms,
            crowded.p99_ms / idle.p99_ms,
        );
    }
}

/// Processor time and messages.
pub fn costs(rows: &[(u16, Path, Costs)]) {
    let processes = ["load", "gateway", "worker", "nats", "server"];
    println!("\none call: µs of processor time of each process; messages and bytes of NATS");
    print!("{:>7}  {:<14}", "callers", "path");
    for name in processes {
        print!(" {name:>8}");
    }
    print!(" {:>8}", "all");
    for (_, name) in NATS {
        print!(" {name:>8}");
    }
    println!();
    for (callers, path, costs) in rows {
        print!("{callers:>7}  {:<14}", path.name());
        for name in processes {
            figure(costs.get(name));
        }
        let all: f64 = processes.iter().filter_map(|name| costs.get(name)).sum();
        figure(Some(&all));
        for (name, _) in NATS {
            figure(costs.get(name));
        }
        println!();
    }
}

/// Allocations.
pub fn allocations(rows: &[(u16, Path, Costs)]) {
    println!("\none call: allocations of each process and their bytes");
    let columns = ["gateway", "gateway bytes", "worker", "worker bytes"];
    print!("{:>7}  {:<14}", "callers", "path");
    for name in columns {
        print!(" {name:>14}");
    }
    println!();
    for (callers, path, costs) in rows {
        print!("{callers:>7}  {:<14}", path.name());
        for name in columns {
            match costs.get(name) {
                Some(value) => print!(" {value:>14.1}"),
                None => print!(" {:>14}", "-"),
            }
        }
        println!();
    }
}

/// The most memory that processes have had.
pub fn memory(path: Path, kind: &str, processes: &[u32]) -> Result<()> {
    for process in processes {
        let (_, peak) = own::memory(*process)?;
        println!("most memory of a {kind} ({}): {:.0} MB", path.name(), peak / 1_048_576.0);
    }
    Ok(())
}

fn figure(value: Option<&f64>) {
    match value {
        Some(value) => print!(" {value:>8.1}"),
        None => print!(" {:>8}", "-"),
    }
}
