#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mcp_shared::testing::fuzz::trace_context(data));
