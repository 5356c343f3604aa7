//! Connections to MCP servers as raw JSON-RPC: what is sent and received passes through byte for byte.

mod lines;
mod message;
pub mod stdio;

pub use message::RpcError;
pub(crate) use message::push_string;
