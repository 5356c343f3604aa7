#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mcp_shared::testing::fuzz::sealed_secret(data));
