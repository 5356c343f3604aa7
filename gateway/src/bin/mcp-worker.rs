//! `mcp-worker`: a worker of a cluster. It is built in this package so that the tests of the programs are
//! always run with both as they are; all of it is in the crate `mcp_worker`.

use std::process::ExitCode;

fn main() -> ExitCode {
    mcp_worker::program::main()
}
