//! Support for the tests of this and other crates. Nothing here is part of the program.
// A test that cannot set up what it needs has failed, and a panic is how it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod authorization;
pub mod chromium;
pub mod fixture;
pub mod fuzz;
mod http;
pub mod link;
pub mod port;
pub mod registry;
pub mod remote;
pub mod services;
pub mod store_contract;
pub mod tools;
