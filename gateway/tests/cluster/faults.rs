//! What happens to calls while parts of the fleet die, hang, are cut off or restart: the reliability that is
//! promised, shown on real processes.
//!
//! CI runs one schedule of faults that takes about a minute. `FAULTS_SEED=N` draws another one,
//! `FAULTS_LONG=1` makes it ten thousand calls, and `FAULTS_SECONDS=N` lets it go on for as long as that:
//!
//!     FAULTS_LONG=1 FAULTS_SEED=7 cargo test -p mcp-gateway --test cluster faults::chaos -- --nocapture
#![allow(clippy::print_stdout, reason = "whoever runs them wants to see what was done, and how calls ended")]

mod bus_restarts;
mod chance;
mod chaos;
mod gateways;
mod history;
mod monkey;
mod owners;
mod rolling;
mod scaling;
mod split;
mod stage;
mod workers;

/// A number that whoever runs the tests has set.
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}
