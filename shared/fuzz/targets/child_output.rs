#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mcp_worker::child_output(data));
