//! Behaviour of workers as the bus sees them: several in one process, on one store, with real MCP servers
//! as real processes.
// A test that cannot set up what it needs has failed, and a panic is how it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cluster;
mod faults;
mod hosting;
mod leases;
mod managers;
mod ownership;
mod rebinding;

/// The first argument that turns this test binary into the MCP server that it tests with.
const FIXTURE: &str = "mcp-fixture";

/// Runs before the test harness looks at the arguments: the test binary is also the MCP server, the
/// supervisor that starts it, and what reads pages.
// The attribute places a function pointer in a section of the binary that the loader calls. The
// function needs no more than the program's arguments, which the standard library has by then.
#[allow(unsafe_code)]
#[ctor::ctor(unsafe)]
fn become_another_program() {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(FIXTURE) => {
            let arguments: Vec<String> = arguments.collect();
            std::process::exit(mcp_shared::testing::fixture::run(&arguments));
        }
        // The supervisor, and what reads documents.
        Some(argument) if argument.starts_with("__") => {
            let ended = mcp_worker::program::supervised();
            std::process::exit(i32::from(ended != Some(std::process::ExitCode::SUCCESS)));
        }
        _ => {}
    }
}
