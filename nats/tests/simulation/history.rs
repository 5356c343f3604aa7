//! What happened, and whether it may have happened.

use std::{collections::HashMap, time::Duration};

use mcp_nats::{callee::FRESH, caller::Now, wire::CallId};
use mcp_shared::error::Outcome;

use crate::bus::Node;

/// How a tool behaves.
#[derive(Debug, Clone, Copy)]
pub struct Tool {
    /// How long it takes; it may never end.
    pub takes: Option<Duration>,
    /// Messages that its arguments need.
    pub frames: u32,
    /// It may be called again when nobody knows what became of it.
    pub repeatable: bool,
}

/// How a call ended for its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Answered(CallId),
    Failed(Outcome),
}

/// One logical call, over all its attempts.
#[derive(Debug)]
pub struct Record {
    pub router: usize,
    pub server: usize,
    pub tool: Tool,
    pub limit: Option<Duration>,
    /// It was made when all was well again: it has to succeed.
    pub plain: bool,
    pub begun: Now,
    pub starts: Vec<(CallId, usize, Now)>,
    pub finished: Vec<CallId>,
    pub ends: Vec<(End, Now)>,
    pub cancelled: bool,
}

/// Everything that happened, and the first thing that should not have.
#[derive(Debug, Default)]
pub struct History {
    pub calls: Vec<Record>,
    pub attempts: HashMap<CallId, usize>,
    /// When nodes were frozen.
    pub freezes: Vec<(Node, Now, Now)>,
    pub violation: Option<String>,
    pub traced: bool,
    pub trace: Vec<String>,
}

impl History {
    /// Remembers what must not be; the first is told.
    pub fn violate(&mut self, rule: &str) {
        self.violation.get_or_insert_with(|| rule.to_owned());
    }

    pub fn note(&mut self, now: Now, line: &str) {
        if self.traced {
            self.trace.push(format!("{:>9.4} {}", now.as_secs_f64(), line));
        }
    }

    /// The tool of an attempt is started, by a GO whose oldest part was sent then and arrived then.
    pub fn started(&mut self, now: Now, id: CallId, worker: usize, sent: Now, arrived: Now) {
        self.note(now, &format!("START {id} on {worker}"));
        let Some(call) = self.attempts.get(&id).copied() else {
            return self.violate("(1) something was started that nobody called");
        };
        self.calls[call].starts.push((id, worker, now));
        let attempts = self.calls[call].starts.iter().filter(|(one, ..)| *one == id).count();
        let starts = if self.calls[call].tool.repeatable { attempts } else { self.calls[call].starts.len() };
        if starts > 1 {
            self.violate(&format!("(1) call {call} was started again"));
        }
        if self.calls[call].ends.iter().any(|(end, _)| *end == End::Failed(Outcome::NotStarted)) {
            self.violate(&format!("(2) call {call} was started after it was said that it was not"));
        }
        if now.saturating_sub(arrived) > FRESH {
            self.violate(&format!("(7) call {call} was started by a message that lay about for too long"));
        }
        let stale = self.freezes.iter().any(|(node, from, to)| {
            let long = to.saturating_sub(*from) > Duration::from_secs(2);
            *node == Node::Worker(worker) && long && sent < *from && now >= *to
        });
        if stale {
            self.violate(&format!("(7) call {call} was started by a message from before a freeze"));
        }
    }

    /// A tool ran to its end.
    pub fn finished(&mut self, id: CallId) {
        if let Some(call) = self.attempts.get(&id) {
            self.calls[*call].finished.push(id);
        }
    }

    /// The caller is told how its call ended.
    pub fn ended(&mut self, now: Now, call: usize, end: End) {
        self.note(now, &format!("END call {call} {end:?}"));
        let record = &mut self.calls[call];
        record.ends.push((end, now));
        let (starts, finished, ends) = (record.starts.len(), record.finished.clone(), record.ends.len());
        let repeatable = record.tool.repeatable;
        if ends > 1 {
            self.violate(&format!("(3) call {call} ended twice"));
        }
        match end {
            End::Failed(Outcome::NotStarted) if starts > 0 => {
                self.violate(&format!("(2) call {call} is said to be not started, and was"));
            }
            End::Answered(id) if repeatable && finished.contains(&id) => {}
            End::Answered(_) if repeatable => {
                self.violate(&format!("(3) call {call} was answered and did not run to its end"));
            }
            End::Answered(id) if starts != 1 || finished != [id] => {
                self.violate(&format!("(3) call {call} was answered and did not run once to its end"));
            }
            _ => {}
        }
    }

    /// How long a node was frozen between two moments.
    pub fn frozen(&self, node: Node, from: Now, to: Now) -> Duration {
        let within = |(_, begin, end): &(Node, Now, Now)| (*end).min(to).saturating_sub((*begin).max(from));
        self.freezes.iter().filter(|(one, ..)| *one == node).map(within).sum()
    }
}
