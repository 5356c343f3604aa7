#![doc = include_str!("../README.md")]

mod call;
mod group;
mod host;
mod instance;
mod logs;
mod mcp;
mod registry;
mod secrets;
pub mod supervisor;
mod transport;
mod worker;

pub use worker::Worker;
