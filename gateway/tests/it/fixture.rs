//! The test binary is also the MCP server that it tests with: so the server is always as new as the
//! tests, and nothing has to be found or built at run time.

/// The first argument that turns this test binary into the server.
pub const FIXTURE: &str = "mcp-fixture";

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
