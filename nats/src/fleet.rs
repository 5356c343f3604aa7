//! Who is there and who should do what, from beats alone: no clock, no bus. All routers that hear the
//! same beats choose alike, so that nobody has to lead.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use mcp_shared::{
    fleet::{Fleet, NodeReport, NodeView, Role, ServerLoad},
    hosting::Placing,
    ids::{ServerName, UserId, WorkerId},
    worker_api::ServerStatus,
};
use sha2::{Digest, Sha256};

use crate::caller::{Now, Wish};

/// How often a node beats.
pub const BEAT: Duration = Duration::from_secs(1);
/// A node that is unheard for so long is offered nothing.
pub const OUT_AFTER: Duration = Duration::from_secs(3);
/// How long a node that is out is remembered: it may come back, and must hear of changes then.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(600);
/// When calls wait this long at every owner, another worker is asked to run the server as well.
pub const CROWDED: Duration = Duration::from_secs(1);

/// The nodes as they were heard.
#[derive(Debug, Default)]
pub struct FleetView {
    nodes: HashMap<WorkerId, Node>,
}

#[derive(Debug)]
struct Node {
    report: NodeReport,
    owned: HashMap<ServerName, Owned>,
    heard: Now,
    /// Nobody answered in its name since the last beat.
    silent: bool,
}

#[derive(Debug)]
struct Owned {
    load: ServerLoad,
    /// Calls of this router that are with it.
    mine: Arc<AtomicUsize>,
    /// How many they were when the load was told.
    mine_then: usize,
}

impl Owned {
    /// A call goes to this owner, and counts from now on.
    fn chosen(&self, node: &Node) -> Choice {
        self.mine.fetch_add(1, Ordering::AcqRel);
        Choice {
            worker: node.report.id.clone(),
            placing: Placing::Owned,
            underway: Some(Underway(Arc::clone(&self.mine))),
            expands: false,
        }
    }
}

/// A call of this router that is with a worker; counted until it is dropped.
#[derive(Debug)]
pub struct Underway(Arc<AtomicUsize>);

impl Drop for Underway {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Who is to be offered a call.
#[derive(Debug)]
pub struct Choice {
    /// The worker.
    pub worker: WorkerId,
    /// How far it may go.
    pub placing: Placing,
    /// Counts the call, where the worker owns the server already.
    pub underway: Option<Underway>,
    /// It is asked because the owners are crowded: not more often than need be.
    pub expands: bool,
}

impl FleetView {
    /// A node beat.
    pub fn beat(&mut self, now: Now, report: NodeReport) {
        let old = self.nodes.remove(&report.id);
        let mut counters: HashMap<ServerName, Arc<AtomicUsize>> = old
            .map(|old| old.owned.into_iter().map(|(name, owned)| (name, owned.mine)).collect())
            .unwrap_or_default();
        let owned = report
            .servers
            .iter()
            .map(|load| {
                let mine = counters.remove(&load.name).unwrap_or_default();
                let mine_then = mine.load(Ordering::Acquire);
                (load.name.clone(), Owned { load: load.clone(), mine, mine_then })
            })
            .collect();
        self.nodes.insert(report.id.clone(), Node { report, owned, heard: now, silent: false });
        self.nodes.retain(|_, node| now.saturating_sub(node.heard) < FORGOTTEN_AFTER);
    }

    /// Something was heard of a node.
    pub fn heard(&mut self, now: Now, node: &WorkerId) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.heard = now;
            node.silent = false;
        }
    }

    /// A node answered about a call: it is at work, although its beats may not be read in time. One in whose name
    /// nobody answered since is out all the same: the answer may be older than that.
    pub fn answered(&mut self, now: Now, node: &WorkerId) {
        if let Some(node) = self.nodes.get_mut(node).filter(|node| !node.silent) {
            node.heard = now;
        }
    }

    /// Silence did not count until now: the bus was away.
    pub fn excuse(&mut self, now: Now) {
        for node in self.nodes.values_mut().filter(|node| !node.silent) {
            node.heard = now;
        }
    }

    /// A node said that it leaves.
    pub fn left(&mut self, node: &WorkerId) {
        self.nodes.remove(node);
    }

    /// Nobody answers in a node's name. It is out until it beats again.
    pub fn silent(&mut self, node: &WorkerId) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.silent = true;
        }
    }

    /// Whether a node that has not said goodbye is not heard any more.
    pub fn misses_somebody(&self, now: Now) -> bool {
        self.nodes.values().any(|node| node.silent || now.saturating_sub(node.heard) >= OUT_AFTER)
    }

    /// How long a node has been unheard; `None`: it is not known.
    pub fn silence(&self, now: Now, node: &WorkerId) -> Option<Duration> {
        self.nodes.get(node).map(|node| now.saturating_sub(node.heard))
    }

    /// Workers that must hear of changes: all that may still run something. One in whose name nobody
    /// answered may be back and at work before its next beat says so.
    pub fn workers(&self) -> Vec<WorkerId> {
        let workers = self.nodes.values().filter(|node| node.report.role == Role::Worker);
        workers.map(|node| node.report.id.clone()).collect()
    }

    /// Workers that answer.
    pub fn live(&self, now: Now) -> Vec<WorkerId> {
        self.live_nodes(now).map(|node| node.report.id.clone()).collect()
    }

    /// Workers that answer and stay.
    pub fn staying(&self, now: Now) -> Vec<WorkerId> {
        self.live_nodes(now).filter(|node| !node.report.draining).map(|node| node.report.id.clone()).collect()
    }

    /// The fleet for people.
    pub fn view(&self, now: Now) -> Fleet {
        let mut fleet = Fleet::default();
        for node in self.nodes.values().filter(|node| !node.silent) {
            let ago = now.saturating_sub(node.heard);
            if ago >= OUT_AFTER {
                continue;
            }
            let view = NodeView::heard(node.report.clone(), ago);
            match node.report.role {
                Role::Worker => fleet.workers.push(view),
                Role::Gateway => fleet.gateways.push(view),
            }
        }
        for views in [&mut fleet.workers, &mut fleet.gateways] {
            views.sort_by(|a, b| (a.report.started, &a.report.id).cmp(&(b.report.started, &b.report.id)));
        }
        fleet
    }

    /// The workers that own a server and answer, those that are about to leave left out.
    pub fn owners(&self, now: Now, server: &ServerName) -> Vec<WorkerId> {
        let owners =
            self.live_nodes(now).filter(|node| !node.report.draining && node.owned.contains_key(server));
        owners.map(|node| node.report.id.clone()).collect()
    }

    /// The owners where the server runs, those that are about to leave left out.
    pub fn running(&self, now: Now, server: &ServerName) -> Vec<WorkerId> {
        let running = |node: &&Node| {
            let status = node.owned.get(server).map(|owned| owned.load.status);
            !node.report.draining && status == Some(ServerStatus::Connected)
        };
        self.live_nodes(now).filter(running).map(|node| node.report.id.clone()).collect()
    }

    /// The worker that ranks first for a server among those that answer and stay.
    pub fn first(&self, now: Now, server: &ServerName) -> Option<WorkerId> {
        self.ranked(now, &key(server, None), |_| true)
    }

    /// Whether every user has a process of their own there.
    pub fn is_per_user(&self, now: Now, server: &ServerName) -> bool {
        self.live_nodes(now).any(|node| node.report.per_user.contains(server))
    }

    /// Chooses the worker for a call. `draw` gives a number below its argument.
    pub fn choose(
        &self,
        now: Now,
        server: &ServerName,
        user: &UserId,
        wish: &Wish,
        mut draw: impl FnMut(usize) -> usize,
    ) -> Option<Choice> {
        let plain = |worker, placing| Some(Choice { worker, placing, underway: None, expands: false });
        let live: Vec<&Node> = self.live_nodes(now).collect();
        // An owner that was asked and said nothing is not asked again until it is named anew.
        if let Some(owner) = wish.owner.as_ref().filter(|owner| !wish.avoid.contains(owner))
            && let Some(node) = live.iter().find(|node| node.report.id == *owner)
        {
            return plain(node.report.id.clone(), Placing::Take);
        }
        // The lease names somebody who does not answer: as good as lost.
        let take_over = wish.lost_owner.is_some() || wish.owner.is_some();
        let per_user = self.is_per_user(now, server);
        let mut owners: Vec<(&Node, &Owned)> = Vec::new();
        if !per_user && !take_over {
            for node in &live {
                let id = &node.report.id;
                if !node.report.draining
                    && !wish.avoid.contains(id)
                    && !wish.not_owners.contains(id)
                    && let Some(owned) = node.owned.get(server)
                {
                    owners.push((node, owned));
                }
            }
            if owners.iter().any(|(_, owned)| owned.load.status == ServerStatus::Connected) {
                owners.retain(|(_, owned)| owned.load.status == ServerStatus::Connected);
            }
        }
        let crowded = !owners.is_empty()
            && owners.iter().all(|(_, owned)| u128::from(owned.load.wait_ms) >= CROWDED.as_millis());
        let key = key(server, per_user.then_some(user));
        if owners.is_empty() || crowded {
            let candidate = self.ranked(now, &key, |node| {
                !(wish.avoid.contains(&node.report.id) || crowded && node.owned.contains_key(server))
            });
            match candidate {
                Some(worker) if crowded => {
                    return Some(Choice { worker, placing: Placing::Take, underway: None, expands: true });
                }
                Some(worker) => {
                    return plain(worker, if take_over { Placing::TakeOver } else { Placing::Take });
                }
                None if owners.is_empty() => return None,
                None => {}
            }
        }
        let (node, owned) = match owners.as_slice() {
            [] => return None,
            [only] => *only,
            several => {
                // The better of two drawn at random: nobody runs after one who was free a moment ago.
                let first = draw(several.len());
                let second = (first + 1 + draw(several.len() - 1)) % several.len();
                let (a, b) = (several[first], several[second]);
                if owned_pressure(b.1) < owned_pressure(a.1) { b } else { a }
            }
        };
        Some(owned.chosen(node))
    }

    /// An owner for the call although all are crowded: where another was asked already.
    pub fn choose_owner(&self, now: Now, server: &ServerName, wish: &Wish) -> Option<Choice> {
        let owners = self.live_nodes(now).filter(|node| {
            let id = &node.report.id;
            !node.report.draining && !wish.avoid.contains(id) && !wish.not_owners.contains(id)
        });
        let (node, owned) = owners
            .filter_map(|node| Some((node, node.owned.get(server)?)))
            .min_by(|a, b| owned_pressure(a.1).total_cmp(&owned_pressure(b.1)))?;
        Some(owned.chosen(node))
    }

    fn live_nodes(&self, now: Now) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(move |node| {
            node.report.role == Role::Worker && !node.silent && now.saturating_sub(node.heard) < OUT_AFTER
        })
    }

    /// Rendezvous hashing, weighted by processors: every worker draws a lot for the key, and the best
    /// one wins. A worker that comes or goes moves only what it wins or had won. The weights do not
    /// follow the load of the moment, or views that differ by a second would rank differently.
    fn ranked(&self, now: Now, key: &[u8], may: impl Fn(&Node) -> bool) -> Option<WorkerId> {
        self.live_nodes(now)
            .filter(|node| !node.report.draining && may(node))
            .min_by(|a, b| {
                lot(&a.report, key)
                    .total_cmp(&lot(&b.report, key))
                    .then_with(|| a.report.id.cmp(&b.report.id))
            })
            .map(|node| node.report.id.clone())
    }
}

/// What a server, or one user's process of it, is ranked by.
fn key(server: &ServerName, user: Option<&UserId>) -> Vec<u8> {
    let mut key = server.as_str().as_bytes().to_vec();
    if let Some(user) = user {
        key.push(0);
        key.extend_from_slice(user.as_str().as_bytes());
    }
    key
}

/// A worker's lot for a key; the smallest wins. With weights, lots are drawn from exponential
/// distributions whose rates they are.
fn lot(report: &NodeReport, key: &[u8]) -> f64 {
    let mut hash = Sha256::new();
    hash.update(report.id.as_str().as_bytes());
    hash.update([0]);
    hash.update(key);
    let digest = hash.finalize();
    let mut first = [0; 4];
    first.copy_from_slice(&digest[..4]);
    let drawn = (f64::from(u32::from_be_bytes(first)) + 1.0) / (f64::from(u32::MAX) + 2.0);
    -drawn.ln() / f64::from(report.capacity.max(1))
}

/// How full an owner is, as far as this router can know.
fn owned_pressure(owned: &Owned) -> f64 {
    let told = owned.load.in_flight + owned.load.waiting;
    let mine = owned.mine.load(Ordering::Acquire);
    let estimate = (told + mine).saturating_sub(owned.mine_then).max(mine);
    let (estimate, slots) =
        (u32::try_from(estimate).unwrap_or(u32::MAX), u32::try_from(owned.load.slots.max(1)).unwrap_or(1));
    f64::from(estimate) / f64::from(slots)
}

#[cfg(test)]
mod tests;
