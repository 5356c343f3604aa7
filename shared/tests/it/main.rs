//! The integration tests of `mcp-shared`, as one program.
// A test that cannot set up what it needs has failed, and a panic is how it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod store;
