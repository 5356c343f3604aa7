//! Behaviour of the program, tested through its public face: the real binary, real HTTP, real MCP
//! servers as real processes. Tests are written against [`deployment::Deployment`], which hides what
//! stands behind the HTTP address.
// A test that cannot set up what it needs has failed, and a panic is how it says so.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod calls;
mod compat;
mod deployment;
mod durability;
mod edge;
mod framing;
mod lifecycle;
mod processes;
mod real_servers;
mod secrets;
mod settings;
mod settings_cluster;
mod smoke;

/// The first argument that turns this test binary into the MCP server that it tests with. So the server
/// is always as new as the tests, and nothing has to be found or built at run time.
const FIXTURE: &str = "mcp-fixture";

/// Runs before the test harness looks at the arguments.
// The attribute places a function pointer in a section of the binary that the loader calls. The
// function needs no more than the program's arguments, which the standard library has by then.
#[allow(unsafe_code)]
#[ctor::ctor(unsafe)]
fn become_fixture() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(FIXTURE) {
        let arguments: Vec<String> = arguments.collect();
        std::process::exit(mcp_shared::testing::fixture::run(&arguments));
    }
}
