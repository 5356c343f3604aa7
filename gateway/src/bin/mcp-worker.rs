//! `mcp-worker`: a worker of a cluster. It is built in this package so that the tests of the programs are
//! always run with both as they are; all of it is in the crate `mcp_worker`.

use std::process::ExitCode;

/// Calls are many small pieces of memory that one thread takes and another gives back, at which it is faster than
/// the C library's.
#[global_allocator]
static MEMORY: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    mcp_worker::program::main()
}
