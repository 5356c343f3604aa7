//! x
fn main() { let a: Vec<String> = std::env::args().skip(1).collect(); if a.first().is_some_and(|x| x == "echo-server") { std::process::exit(mcp_shared::testing::fixture::run(&a[1..])); } }
