#![doc = include_str!("../README.md")]

pub mod callee;
pub mod caller;
pub mod frames;
pub mod subjects;
pub mod wire;
