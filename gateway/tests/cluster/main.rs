//! The behaviour tests once more, against two gateways and two workers with a real NATS server and a real
//! server of MongoDB's protocol between them; and tests of what only a cluster has. Answers are the same,
//! whichever gateway is asked: requests go to them in turn.
// A test that cannot set up what it needs has failed, and a panic is how it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../it/acknowledged.rs"]
mod acknowledged;
#[path = "../it/annotations.rs"]
mod annotations;
#[path = "../it/audit.rs"]
mod audit;
#[path = "../it/authentication.rs"]
mod authentication;
#[path = "../it/bad_inputs.rs"]
mod bad_inputs;
#[path = "../it/calls.rs"]
mod calls;
#[path = "../it/canary.rs"]
mod canary;
#[path = "../it/children.rs"]
mod children;
#[path = "../it/collector.rs"]
mod collector;
#[path = "../it/compat.rs"]
mod compat;
#[path = "../it/cycles.rs"]
mod cycles;
#[path = "../it/deployment.rs"]
mod deployment;
#[path = "../it/durability.rs"]
mod durability;
#[path = "../it/edge.rs"]
mod edge;
#[path = "../it/footprint.rs"]
mod footprint;
#[path = "../it/framing.rs"]
mod framing;
#[path = "../it/hostile_children.rs"]
mod hostile_children;
#[path = "../it/idempotency.rs"]
mod idempotency;
#[path = "../it/isolation.rs"]
mod isolation;
#[path = "../it/lifecycle.rs"]
mod lifecycle;
#[path = "../it/listings.rs"]
mod listings;
#[path = "../it/logins.rs"]
mod logins;
#[path = "../it/logs.rs"]
mod logs;
#[path = "../it/metrics.rs"]
mod metrics;
#[path = "../it/oauth.rs"]
mod oauth;
#[path = "../it/overload.rs"]
mod overload;
#[path = "../it/packages.rs"]
mod packages;
#[path = "../it/packages_input.rs"]
mod packages_input;
#[path = "../it/processes.rs"]
mod processes;
#[path = "../it/real_remotes.rs"]
mod real_remotes;
#[path = "../it/real_servers.rs"]
mod real_servers;
#[path = "../it/remote.rs"]
mod remote;
#[path = "../it/remote_faults.rs"]
mod remote_faults;
#[path = "../it/remote_hostile.rs"]
mod remote_hostile;
#[path = "../it/remote_input.rs"]
mod remote_input;
#[path = "../it/remote_tls.rs"]
mod remote_tls;
#[path = "../it/secrets.rs"]
mod secrets;
#[path = "../it/smoke.rs"]
mod smoke;
#[path = "../it/stored.rs"]
mod stored;
#[path = "../it/tokens.rs"]
mod tokens;
#[path = "../it/traces.rs"]
mod traces;
#[path = "../it/webtools.rs"]
mod webtools;

mod bad_inputs_fleet;
mod bodies;
mod faults;
mod fleet;
mod guarded;
mod keys_fleet;
mod metrics_fleet;
mod mongodb_alone;
mod moving_over;
mod overload_fleet;
mod packages_fleet;
mod placement;
mod reads_after_writes;
mod remote_fleet;
mod services;
mod store_edge;
mod store_outage;

#[path = "../it/fixture.rs"]
mod fixture;
use fixture::FIXTURE;

/// The shape that the tests of this binary start.
const CLUSTER: bool = true;
