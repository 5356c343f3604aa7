//! What nodes say of themselves, and the fleet that follows from it.

use std::{thread::available_parallelism, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{ServerName, WorkerId},
    timestamp::Timestamp,
    vault::Vault,
    worker_api::ServerStatus,
};

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It answers HTTP.
    Gateway,
    /// It owns MCP connections.
    Worker,
}

/// A node as it describes itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeReport {
    /// Its id, new with every start.
    pub id: WorkerId,
    /// What it does.
    pub role: Role,
    /// The version of the program.
    pub version: String,
    /// When it started, by its own clock.
    pub started: Timestamp,
    /// The oldest and the newest wire version that it speaks.
    pub wire: (u32, u32),
    /// What its store is known by. Nodes of one fleet have one store.
    pub store: String,
    /// The ids of its encryption keys, the one that encrypts first.
    pub keys: Vec<String>,
    /// The processors that it may use: its weight when servers are placed.
    pub capacity: u32,
    /// It takes nothing new, because it is about to stop.
    pub draining: bool,
    /// The servers that it owns; empty for a gateway.
    pub servers: Vec<ServerLoad>,
    /// Enabled servers that it knows as having a process for each user, whether or not it owns any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub per_user: Vec<ServerName>,
}

impl NodeReport {
    /// A node that starts now, with a store and keys, and owns nothing yet. `wire` is what it speaks.
    pub fn of(id: WorkerId, role: Role, wire: (u32, u32), vault: &Vault) -> Self {
        Self {
            id,
            role,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: Timestamp::now(),
            wire,
            store: vault.store_id().unwrap_or_default().to_owned(),
            keys: vault.kids(),
            capacity: available_parallelism()
                .map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
            draining: false,
            servers: Vec::new(),
            per_user: Vec::new(),
        }
    }

    /// Why this node and another one cannot be of one fleet, if they cannot.
    pub fn disagreement(&self, other: &NodeReport) -> Option<String> {
        let them = || match other.role {
            Role::Gateway => format!("the gateway {}", other.id),
            Role::Worker => format!("the worker {}", other.id),
        };
        if self.store != other.store {
            return Some(format!(
                "{} uses another database: give all nodes the same one, or each fleet a NATS_PREFIX of its own",
                them()
            ));
        }
        // A node without keys of its own reads mcp-api's values, and writes no others.
        match (self.keys.first(), other.keys.first()) {
            (_, Some(theirs)) if !self.keys.contains(theirs) => {
                Some(format!("{} encrypts with the key {theirs}, which this node does not have", them()))
            }
            (Some(own), _) if !other.keys.contains(own) => Some(format!(
                "this node would encrypt with the key {own}, which {} does not have: add it behind the \
                 first key of every node before any node has it first",
                them()
            )),
            _ => None,
        }
    }
}

/// A server that a worker owns, and how busy it is there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerLoad {
    /// Which server.
    pub name: ServerName,
    /// The best state of its instances.
    pub status: ServerStatus,
    /// Its processes.
    pub instances: usize,
    /// Users that have a process of their own here.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub users: usize,
    /// Calls that may be in flight at once.
    pub slots: usize,
    /// Calls that hold a slot.
    pub in_flight: usize,
    /// Calls that wait for one.
    pub waiting: usize,
    /// How long the call that waits longest for a slot has waited, in milliseconds; when none waits, how
    /// long the last one had to that got its slot within the last second.
    pub wait_ms: u64,
    /// Since when it is owned, by the worker's clock.
    pub since: Timestamp,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// A node as somebody else sees it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeView {
    /// What it said last.
    #[serde(flatten)]
    pub report: NodeReport,
    /// How long ago it said so, in milliseconds.
    pub heard_ms: u64,
}

/// All nodes that are heard.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fleet {
    /// Workers, oldest first.
    pub workers: Vec<NodeView>,
    /// Gateways, oldest first.
    pub gateways: Vec<NodeView>,
}

impl NodeView {
    /// A node seen by itself.
    pub fn of_myself(report: NodeReport) -> Self {
        Self { report, heard_ms: 0 }
    }

    /// A node that was heard some time ago.
    pub fn heard(report: NodeReport, ago: Duration) -> Self {
        Self { report, heard_ms: u64::try_from(ago.as_millis()).unwrap_or(u64::MAX) }
    }
}
