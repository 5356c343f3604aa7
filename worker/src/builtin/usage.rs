//! The memory of a browser, with all its processes.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How long a killed process may take to give its memory back.
const KILL_TIME: Duration = Duration::from_secs(5);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// A browser's processes.
pub struct Usage {
    /// Bytes that they do not share with files or each other.
    pub bytes: u64,
    /// What runs pages, with the bytes of each.
    pages: Vec<(Pid, u64)>,
}

/// What a process and all that it started take. It reads `/proc`, so it blocks.
pub fn of(root: u32) -> Usage {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut usage = Usage { bytes: 0, pages: Vec::new() };
    let mut left = vec![i32::try_from(root).unwrap_or_default()];
    while let Some(pid) = left.pop() {
        let bytes = bytes(pid);
        usage.bytes += bytes;
        if fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| memchr::memmem::find(&line, b"--type=renderer").is_some())
        {
            usage.pages.push((Pid::from_raw(pid), bytes));
        }
        left.extend(children.remove(&pid).unwrap_or_default());
    }
    usage
}

impl Usage {
    /// Ends the page that takes most, and waits for its end: what is on its way out still counts, and must not cost
    /// another page its life. Says whether there was one.
    pub fn end_largest(&self) -> bool {
        let largest = self.pages.iter().max_by_key(|(_, bytes)| *bytes);
        let Some((pid, _)) = largest.filter(|(pid, _)| kill(*pid, Signal::SIGKILL).is_ok()) else {
            return false;
        };
        let patience = Instant::now() + KILL_TIME;
        while bytes(pid.as_raw()) > 0 && Instant::now() < patience {
            std::thread::sleep(LOOK);
        }
        true
    }
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn bytes(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kilobytes = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok()
    };
    ["RssAnon:", "RssShmem:"].iter().filter_map(|field| kilobytes(field)).sum::<u64>() * 1024
}
