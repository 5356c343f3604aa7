//! Behaviour of the program, tested through its public face: the real binary, real HTTP, real MCP
//! servers as real processes. Tests are written against [`deployment::Deployment`], which hides what
//! stands behind the HTTP address.
// A test that cannot set up what it needs has failed, and a panic is how it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod acknowledged;
mod annotations;
mod audit;
mod authentication;
mod bad_inputs;
mod calls;
mod canary;
mod children;
mod collector;
mod compat;
mod cycles;
mod deployment;
mod doctor;
mod durability;
mod edge;
mod embedded;
mod fixture;
mod footprint;
mod framing;
mod full_disk;
mod hostile_children;
mod idempotency;
mod isolation;
mod keys;
mod lifecycle;
mod listings;
mod logins;
mod logs;
mod metrics;
mod oauth;
mod one_machine;
mod ordinary_user;
mod overload;
mod packages;
mod packages_input;
mod processes;
mod real_remotes;
mod real_servers;
mod remote;
mod remote_faults;
mod remote_hostile;
mod remote_input;
mod remote_tls;
mod secrets;
mod settings;
mod settings_cluster;
mod smoke;
mod stored;
mod tokens;
mod traces;
mod webtools;
mod webtools_pages;

use fixture::FIXTURE;

/// The shape that the tests of this binary start.
const CLUSTER: bool = false;
