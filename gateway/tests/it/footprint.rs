//! What a deployment takes of the machine, read from `/proc`: what a server left behind shows here.

use std::{collections::BTreeMap, fs};

use crate::deployment::Deployment;

/// The processes with this text in their environment, as it was when they started.
pub fn processes_with(mark: &str) -> Vec<i32> {
    let has = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        crate::deployment::alive(*pid)
            && environment.split(|byte| *byte == 0).any(|one| one == mark.as_bytes())
    };
    all_processes().filter(has).collect()
}

fn all_processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The parent of a process that may be gone; 0 then.
pub fn parent_of(pid: i32) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields.split_whitespace());
    fields.and_then(|mut fields| fields.nth(1)?.parse().ok()).unwrap_or_default()
}

/// A number of `/proc/PID/status`: kilobytes, or a count.
pub fn status(pid: i32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or_else(|| panic!("{field}: {text}"))
}

/// What one process of ours takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Open descriptors that are no sockets. (Connections of clients come and go.)
    pub descriptors: usize,
    /// Open sockets.
    pub sockets: usize,
    /// Processes that it started.
    pub children: usize,
    /// Threads.
    pub threads: u64,
    /// Kilobytes of memory.
    pub memory: u64,
}

impl Footprint {
    fn of(pid: i32) -> Self {
        let links = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        // One that was closed meanwhile has no target.
        let targets: Vec<_> = links.filter_map(|link| fs::read_link(link.path()).ok()).collect();
        let sockets = targets.iter().filter(|target| target.to_string_lossy().starts_with("socket:")).count();
        Self {
            descriptors: targets.len() - sockets,
            sockets,
            children: all_processes().filter(|child| parent_of(*child) == pid).count(),
            threads: status(pid, "Threads"),
            memory: status(pid, "VmRSS"),
        }
    }
}

/// The footprints of all programs that own servers, and of their supervisors, by process id.
pub fn of(api: &Deployment) -> BTreeMap<i32, Footprint> {
    let mut pids = api.owners();
    pids.extend(crate::processes::supervisors(api));
    pids.into_iter().map(|pid| (pid, Footprint::of(pid))).collect()
}

/// What is more than before and should not be: empty if nothing is. Memory and sockets may grow so far.
pub fn growth(
    before: &BTreeMap<i32, Footprint>,
    now: &BTreeMap<i32, Footprint>,
    kilobytes: u64,
    sockets: usize,
) -> String {
    let mut grown = Vec::new();
    for (pid, now) in now {
        let Some(before) = before.get(pid) else {
            grown.push(format!("{pid} is new"));
            continue;
        };
        let fine = now.descriptors <= before.descriptors
            && now.children <= before.children
            && now.sockets <= before.sockets + sockets
            && now.memory <= before.memory + kilobytes;
        if !fine {
            grown.push(format!("{pid} went from {before:?} to {now:?}"));
        }
    }
    grown.join("; ")
}
