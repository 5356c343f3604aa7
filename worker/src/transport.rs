//! Connections to MCP servers as raw JSON-RPC: what is sent and received passes through byte for byte.

#[cfg(feature = "testing")]
pub mod benching;
pub mod connection;
pub mod endpoint;
mod events;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod fuzzing;
mod headers;
pub mod http;
mod lines;
mod message;
pub mod sse;
pub mod stdio;
pub(crate) mod turns;

pub use message::RpcError;
pub(crate) use message::push_string;
