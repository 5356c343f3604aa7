//! `mcp-loadtests`: measures the programs against the floors, side by side in one run.
// A command-line program speaks on its standard output.
#![allow(clippy::print_stdout)]

mod allocations;
mod bus;
mod callers;
mod calls;
mod client;
mod cost;
mod deployment;
mod figures;
mod floors;
mod mcpo;
mod measure;
mod overload;
mod own;
mod paths;
mod plot;
mod report;
mod scenarios;
mod servers;
mod stdio;
mod table;

use std::{future::Future, process::ExitCode};

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

/// Load tests for mcp-api.
#[derive(Parser)]
#[command(name = "mcp-loadtests", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Calls a small echo server in turns: directly over stdio, through a single node, and through a
    /// cluster; and sends as much through a bare NATS.
    Calls(calls::Options),
    /// Measures one server while a crowd calls another one that has a single slot.
    Overload(overload::Options),
    /// Runs scenarios, prints what they found beside the floors of the same run, and fails if a budget is not kept.
    Run(scenarios::RunOptions),
    /// Runs everything and writes `REPORT.md` with a picture for each scenario.
    Report(report::ReportOptions),
    /// Is the echo server (used by `calls`).
    #[command(hide = true)]
    EchoServer {
        /// Flags of the fixture server.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Is the floor of a single node.
    #[command(hide = true)]
    FloorHttp {
        /// The server's program and its arguments.
        #[arg(last = true, required = true)]
        launch: Vec<String>,
    },
    /// Is the floor of a gateway.
    #[command(hide = true)]
    FloorFront {
        /// Where NATS is.
        url: String,
        /// Where the other side listens.
        subject: String,
    },
    /// Is the floor of a worker.
    #[command(hide = true)]
    FloorBack {
        /// Where NATS is.
        url: String,
        /// What to listen to.
        subject: String,
        /// The server's program and its arguments.
        #[arg(last = true, required = true)]
        launch: Vec<String>,
    },
    /// Answers on NATS what it is sent (used by `calls`).
    #[command(hide = true)]
    NatsResponder {
        /// Where NATS is.
        url: String,
        /// What to listen to.
        subject: String,
    },
}

fn main() -> ExitCode {
    // Each caller is an open file.
    mcp_shared::lifecycle::raise_open_files();
    let result = match Arguments::parse().command {
        Command::EchoServer { flags } => {
            let status = mcp_shared::testing::fixture::run(&flags);
            return u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from);
        }
        Command::NatsResponder { url, subject } => run(bus::respond(&url, subject)),
        Command::FloorHttp { launch } => run(floors::http(launch.into())),
        Command::FloorFront { url, subject } => run(floors::front(&url, subject)),
        Command::FloorBack { url, subject, launch } => run(floors::back(&url, subject, launch.into())),
        Command::Run(options) => run(scenarios::run(&options)),
        Command::Report(options) => run(report::run(&options)),
        Command::Calls(options) => run(calls::run(&options)),
        Command::Overload(options) => run(overload::run(&options)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs until it is done or told to stop. Either way what it started is ended with it.
fn run(work: impl Future<Output = Result<()>>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut stop = signal(SignalKind::terminate())?;
        tokio::select! {
            result = work => result,
            _ = tokio::signal::ctrl_c() => bail!("stopped"),
            _ = stop.recv() => bail!("stopped"),
        }
    })
}
