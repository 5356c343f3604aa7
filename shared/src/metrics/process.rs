//! What the process itself takes: its time, its memory, its files, and how busy its threads are.

use std::fs;

use nix::sys::{
    resource::{Resource, UsageWho, getrlimit, getrusage},
    time::TimeVal,
};
use tokio::runtime::{Handle, RuntimeMetrics};

use super::{exposition::Exposition, table::Metric};

/// Of what the kernel counts times in that it tells programs, in a second, on every architecture.
const TICKS: f64 = 100.0;

/// Shows all of it. Where the system does not tell something, it is shown as 0.
pub(super) fn show(exposition: &Exposition) {
    exposition.show_all(Metric::BuildInfo, |samples| {
        samples.value(&[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    });
    exposition.show(Metric::ProcessCpu, || cpu().unwrap_or(0.0));
    exposition.show(Metric::ProcessMemory, || resident().unwrap_or(0.0));
    exposition.show_count(Metric::ProcessFiles, || fs::read_dir("/proc/self/fd").map_or(0, Iterator::count));
    exposition.show(Metric::ProcessFilesLimit, || {
        getrlimit(Resource::RLIMIT_NOFILE).map_or(0.0, |(now, _)| now as f64)
    });
    // It does not change.
    let started = started().unwrap_or(0.0);
    exposition.show(Metric::ProcessStart, move || started);
    // Without a runtime, as in tests, there is nothing to tell.
    let runtime = Handle::try_current().map(|handle| handle.metrics()).ok();
    let show = |metric, read: fn(&RuntimeMetrics) -> f64| {
        let runtime = runtime.clone();
        exposition.show(metric, move || runtime.as_ref().map_or(0.0, read));
    };
    show(Metric::RuntimeThreads, |runtime| runtime.num_workers() as f64);
    show(Metric::RuntimeTasks, |runtime| runtime.num_alive_tasks() as f64);
    show(Metric::RuntimeQueue, |runtime| runtime.global_queue_depth() as f64);
    show(Metric::RuntimeBusy, |runtime| {
        (0..runtime.num_workers())
            .map(|thread| runtime.worker_total_busy_duration(thread).as_secs_f64())
            .sum()
    });
}

/// Seconds on processors, in the program and in the kernel on its behalf.
fn cpu() -> Option<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Some(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// Seconds from 1970 to the start of the process.
fn started() -> Option<f64> {
    let system = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = system.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    let own = fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name, in parentheses, may have spaces. proc(5) numbers what follows it from 3.
    let (_, fields) = own.rsplit_once(") ")?;
    let ticks: f64 = fields.split(' ').nth(22 - 3)?.parse().ok()?;
    Some(boot + ticks / TICKS)
}

/// Bytes in memory.
fn resident() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: f64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_start_memory_and_time() {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        let started = started().unwrap();
        assert!(started > now - 3_600.0 && started < now + 2.0, "{started} {now}");
        assert!(resident().unwrap() > 1e6);
        assert!(cpu().unwrap() > 0.0);
    }
}
