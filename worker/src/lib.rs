#![doc = include_str!("../README.md")]

mod builtin;
pub mod bus;
mod call;
pub mod doctor;
mod google;
mod group;
pub mod health;
mod host;
mod hosting;
mod idempotency;
mod instance;
mod leases;
mod logs;
mod mcp;
mod meters;
mod oauth;
mod outgoing;
pub mod packages;
pub mod program;
mod registry;
mod remembered;
mod remote;
mod secrets;
pub mod supervisor;
mod transport;
mod worker;

pub use host::Boot;
#[cfg(feature = "testing")]
#[doc(hidden)]
pub use transport::benching;
#[cfg(any(test, feature = "testing"))]
pub use transport::fuzzing::child_output;
pub use worker::Worker;
