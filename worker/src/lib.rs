#![doc = include_str!("../README.md")]

mod call;
mod group;
mod host;
mod hosting;
mod instance;
mod leases;
mod logs;
mod mcp;
mod registry;
mod secrets;
pub mod supervisor;
mod transport;
mod worker;

pub use host::Boot;
pub use worker::Worker;
