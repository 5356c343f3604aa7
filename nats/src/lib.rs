#![doc = include_str!("../README.md")]

pub mod bus;
pub mod callee;
pub mod caller;
pub mod connect;
pub mod doctor;
pub mod fleet;
pub mod frames;
#[cfg(any(test, feature = "testing"))]
pub mod fuzzing;
mod micro;
mod outbox;
pub mod router;
pub mod server;
pub mod subjects;
pub mod wire;
