//! `mcp-loadtests`: measures the program against the floor, side by side in one run.
// A command-line program speaks on its standard output.
#![allow(clippy::print_stdout)]

mod direct;
mod gateway;
mod measure;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::measure::{Sample, Summary};

/// Load tests for mcp-api.
#[derive(Parser)]
#[command(name = "mcp-loadtests", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Calls a small echo server through the gateway and directly over stdio, in turns.
    Calls {
        /// Callers at once; may be given more than once.
        #[arg(long, default_values_t = [1, 64])]
        callers: Vec<usize>,
        /// Seconds of each measurement.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
        seconds: u64,
        /// How often the measurements are repeated in turn; medians are printed.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=20))]
        rounds: u64,
        /// Bytes of the text that is echoed.
        #[arg(long, default_value_t = 100)]
        bytes: usize,
        /// The program; without it the one beside this one.
        #[arg(long)]
        gateway: Option<PathBuf>,
    },
    /// Is the echo server (used by `calls`).
    #[command(hide = true)]
    EchoServer {
        /// Flags of the fixture server.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::EchoServer { flags } => {
            let status = mcp_shared::testing::fixture::run(&flags);
            return u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from);
        }
        Command::Calls { callers, seconds, rounds, bytes, gateway } => {
            calls(&callers, Duration::from_secs(seconds), rounds, bytes, gateway)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn calls(
    callers: &[usize],
    time: Duration,
    rounds: u64,
    bytes: usize,
    program: Option<PathBuf>,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let text = "x".repeat(bytes);
        let direct = direct::Server::start().await?;
        let gateway = gateway::Gateway::start(program).await?;
        println!("closed loop, {bytes} byte text, {rounds} rounds of {} s each, medians", time.as_secs());
        println!(
            "{:>7}  {:<14} {:>10} {:>9} {:>9} {:>7}",
            "callers", "path", "calls/s", "p50 ms", "p99 ms", "ratio"
        );
        for &callers in callers {
            let (mut floor, mut ours): (Vec<Sample>, Vec<Sample>) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                floor.push(direct.load(callers, &text, time).await?);
                ours.push(gateway.load(callers, &text, time).await?);
            }
            let (floor, ours) = (Summary::median(&floor), Summary::median(&ours));
            print_row(callers, "direct stdio", &floor, 1.0);
            print_row(callers, "HTTP gateway", &ours, ours.per_second / floor.per_second);
        }
        gateway.stop().await
    })
}

fn print_row(callers: usize, path: &str, summary: &Summary, ratio: f64) {
    println!(
        "{callers:>7}  {path:<14} {:>10.0} {:>9.3} {:>9.3} {ratio:>7.2}",
        summary.per_second, summary.p50_ms, summary.p99_ms
    );
}
