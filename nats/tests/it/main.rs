//! The bus on a real NATS server: who may say and hear what, and a router and a worker that live within
//! just that.
// A test that cannot set up what it needs has failed, and a panic is how it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod changes;
mod client;
mod echo;
mod fleet;
mod login;
mod node;
mod outages;
mod permissions;
