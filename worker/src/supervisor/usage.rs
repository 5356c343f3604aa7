//! How many processes a server has and how much memory they take, and what happens when that is too much.
//!
//! The kernel limits processes by user, not by server, root not at all, and address space in a way that Node.js cannot
//! live with. So it is counted, now and then: a server may have too much for a moment.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

/// How often it is counted.
pub(super) const EVERY: Duration = Duration::from_secs(2);

/// What one server may take, with everything that it starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caps {
    /// Processes; `None`: as many as it can get.
    pub processes: Option<u64>,
    /// Bytes of memory, where those that processes share count for each of them; `None`: what it can get.
    pub memory: Option<u64>,
}

/// What a server took too much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Excess {
    /// More processes than `SERVER_MAX_PROCESSES`.
    Processes,
    /// More memory than `SERVER_MAX_MEMORY`.
    Memory,
}

impl Caps {
    /// As arguments of the supervisor.
    pub(super) fn arguments(self) -> [String; 2] {
        [self.processes, self.memory].map(|cap| cap.map_or_else(|| "-".to_owned(), |cap| cap.to_string()))
    }

    /// From its arguments.
    pub(super) fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Self {
        let mut cap = || arguments.next()?.parse().ok();
        Self { processes: cap(), memory: cap() }
    }

    fn excess(self, usage: &Usage) -> Option<Excess> {
        if self.processes.is_some_and(|most| usage.pids.len() as u64 > most) {
            return Some(Excess::Processes);
        }
        self.memory.is_some_and(|most| usage.memory > most).then_some(Excess::Memory)
    }
}

/// Counts when it is time to.
pub(super) struct Watch {
    caps: Caps,
    next: Instant,
    page: u64,
}

/// What a child has, with all that came of it.
#[derive(Debug, Default)]
struct Usage {
    pids: Vec<Pid>,
    memory: u64,
}

/// A process, as far as it matters here.
struct Process {
    parent: i32,
    pages: u64,
}

impl Watch {
    pub(super) fn new(caps: Caps) -> Self {
        Self { caps, next: Instant::now(), page: page_bytes().unwrap_or(4_096) }
    }

    /// How long until the next count; `None`: nothing is counted.
    pub(super) fn pause(&self, children: &HashMap<u64, Pid>) -> Option<Duration> {
        let counts = self.caps != Caps::default() && !children.is_empty();
        counts.then(|| self.next.saturating_duration_since(Instant::now()))
    }

    /// Kills what has too much, if it is time to look. Returns the children that it was done to.
    pub(super) fn look(
        &mut self,
        children: &HashMap<u64, Pid>,
        owner_of: impl Fn(Pid) -> Option<u64>,
    ) -> Vec<(u64, Excess)> {
        if self.pause(children).is_none_or(|pause| !pause.is_zero()) {
            return Vec::new();
        }
        self.next = Instant::now() + EVERY;
        let mut over = Vec::new();
        for (id, usage) in self.usage(children, owner_of) {
            let Some(excess) = self.caps.excess(&usage) else { continue };
            // Stopped first: what is killed one by one could go on starting others meanwhile.
            for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
                for pid in &usage.pids {
                    let _ = kill(*pid, signal);
                }
            }
            over.push((id, excess));
        }
        over
    }

    fn usage(
        &self,
        children: &HashMap<u64, Pid>,
        owner_of: impl Fn(Pid) -> Option<u64>,
    ) -> HashMap<u64, Usage> {
        let me = i32::try_from(std::process::id()).unwrap_or(-1);
        let processes: HashMap<i32, Process> =
            super::process::all_processes().filter_map(|pid| Some((pid.as_raw(), read(pid)?))).collect();
        let roots: HashMap<i32, u64> = children.iter().map(|(id, pid)| (pid.as_raw(), *id)).collect();
        let mut owners: HashMap<i32, Option<u64>> = HashMap::new();
        let mut usages: HashMap<u64, Usage> = HashMap::new();
        for (pid, process) in &processes {
            // Up to a child of ours, or to an orphan that came to us.
            let (mut at, mut way) = (*pid, Vec::new());
            let owner = loop {
                if let Some(known) = owners.get(&at) {
                    break *known;
                }
                way.push(at);
                if let Some(id) = roots.get(&at) {
                    break Some(*id);
                }
                match processes.get(&at) {
                    Some(process) if process.parent == me => break owner_of(Pid::from_raw(at)),
                    // Processes that change while they are read may seem to be in a circle.
                    Some(process) if process.parent > 1 && way.len() < processes.len() => at = process.parent,
                    _ => break None,
                }
            };
            owners.extend(way.into_iter().map(|pid| (pid, owner)));
            if let Some(id) = owner {
                let usage = usages.entry(id).or_default();
                usage.pids.push(Pid::from_raw(*pid));
                usage.memory = usage.memory.saturating_add(process.pages.saturating_mul(self.page));
            }
        }
        usages
    }
}

/// Bytes of a page, as the kernel says it of any part of this process' memory.
fn page_bytes() -> Option<u64> {
    let parts = fs::read_to_string("/proc/self/smaps").ok()?;
    let line = parts.lines().find_map(|line| line.strip_prefix("KernelPageSize:"))?;
    line.split_ascii_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1_024)
}

/// Parent and resident pages of a process, by `/proc/PID/stat`: fields 4 and 24, of which those behind the name in
/// parentheses begin with 3.
fn read(pid: Pid) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let parent = fields.nth(1)?.parse().ok()?;
    let pages = fields.nth(24 - 5)?.parse().ok()?;
    Some(Process { parent, pages })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_reach_the_supervisor() {
        for caps in [
            Caps::default(),
            Caps { processes: Some(7), memory: None },
            Caps { processes: None, memory: Some(1 << 40) },
        ] {
            assert_eq!(Caps::from_arguments(caps.arguments().into_iter()), caps);
        }
        assert_eq!(Caps::from_arguments(std::iter::empty()), Caps::default());
    }

    #[test]
    fn a_process_is_read_as_it_is() {
        let own = read(Pid::this()).unwrap();
        assert_eq!(own.parent, Pid::parent().as_raw());
        assert!(own.pages > 100);
    }

    #[test]
    fn what_comes_of_a_child_counts_for_it() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let watch = Watch::new(Caps { processes: Some(1), memory: None });
        let usages = watch.usage(&HashMap::from([(7, pid)]), |_| None);
        assert_eq!(usages.keys().collect::<Vec<_>>(), [&7]);
        assert_eq!(usages[&7].pids, [pid]);
        assert!(usages[&7].memory >= 4_096);
        // An orphan that came to us is whose its mark says.
        let usages = watch.usage(&HashMap::new(), |orphan| (orphan == pid).then_some(8));
        assert_eq!(usages[&8].pids, [pid]);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
