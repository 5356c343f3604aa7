#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mcp_nats::fuzzing::bus_message(data));
