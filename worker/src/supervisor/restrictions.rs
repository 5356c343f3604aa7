//! What every child is held to from its first instruction on, and by which it is known again.
//!
//! None of this is a sandbox: a server can lower or raise most of it. It keeps accidents small, and makes the kernel
//! choose a server, and not us, when memory runs out.

use std::{fs, io};

use mcp_shared::limits;
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::Pid,
};

/// The file that says how willingly the kernel ends a process when memory runs out.
const OOM_SCORE: &str = "/proc/self/oom_score_adj";
/// The most that may stand there.
const OOM_SCORE_MAX: i32 = 1_000;

/// The lowest value of a mark. As a limit on the microseconds that a real-time process may run without a pause it is
/// thirty-six thousand years, so that it limits nobody.
const MARK: u64 = 1 << 60;
/// Where the supervisor's process id stands in a mark. Below it is the child's number.
const MARK_SHIFT: u32 = 32;

/// What to hold one child to.
pub(super) struct Restrictions {
    mark: u64,
    oom_score: Option<String>,
}

impl Restrictions {
    /// For the child with this number. It reads what it will need, so that little is left to do in the child.
    pub(super) fn of(supervisor: u32, id: u64) -> Self {
        let own = fs::read_to_string(OOM_SCORE).ok().and_then(|score| score.trim().parse::<i32>().ok());
        let score = own.map(|own| own.saturating_add(limits::CHILD_OOM_SCORE).min(OOM_SCORE_MAX));
        Self { mark: limit_mark(supervisor, id), oom_score: score.map(|score| score.to_string()) }
    }

    /// Applies them to the running process. What a system does not allow is left as it is: a server that runs is
    /// worth more than a limit on it.
    pub(super) fn apply(&self) -> io::Result<()> {
        // A limit that is inherited by all descendants, that no unprivileged one can raise, and that everybody can
        // read: unlike the variable in the environment, it stays with processes that drop their environment, change
        // their user or do not let themselves be looked at.
        let _ = setrlimit(Resource::RLIMIT_RTTIME, self.mark, self.mark);
        // Only the soft limit: a server that needs larger files can raise it.
        if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_FSIZE) {
            let _ = setrlimit(Resource::RLIMIT_FSIZE, soft.min(limits::CHILD_FILE_BYTES), hard);
        }
        if let Some(score) = &self.oom_score {
            let _ = fs::write(OOM_SCORE, score);
        }
        Ok(())
    }
}

fn limit_mark(supervisor: u32, id: u64) -> u64 {
    MARK | u64::from(supervisor) << MARK_SHIFT | (id & u64::from(u32::MAX))
}

/// The supervisor and the number of the child that a process comes from, by its limit.
pub(super) fn marked(pid: Pid) -> Option<(u32, u64)> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max realtime timeout"))?;
    // The soft limit, which anybody may change, stands before the hard one.
    let value: u64 = line.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let number = value.checked_sub(MARK)?;
    Some((u32::try_from(number >> MARK_SHIFT).ok()?, number & u64::from(u32::MAX)))
}
