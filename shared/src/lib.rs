#![doc = include_str!("../README.md")]

pub mod answer;
pub mod check;
pub mod config;
pub mod crypter;
pub mod egress;
pub mod error;
pub mod fleet;
pub mod google;
pub mod hosting;
pub mod ids;
pub mod json;
pub mod lifecycle;
pub mod limits;
pub mod node;
pub mod package;
pub mod remote;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod timestamp;
pub mod tls;
pub mod vault;
pub mod worker_api;

#[cfg(feature = "testing")]
pub mod testing;
