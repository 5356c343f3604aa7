//! Processes that the load generator starts: parts of itself, and programs of others.

use std::{io::Read, process::Stdio, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::oneshot,
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// Another process of this program. It ends with its standard input, and is killed when this is dropped.
pub struct Own {
    child: Child,
    /// What it said when it was ready.
    pub said: String,
}

impl Own {
    /// Starts one with these arguments, and waits until it says its first line.
    pub async fn start(args: &[&str]) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let name = args.first().copied().unwrap_or_default();
        let first = timeout(PATIENCE, lines.next_line()).await;
        let first = first.with_context(|| format!("no {name} in time"))??;
        Ok(Self { child, said: first.with_context(|| format!("the {name} did not start"))? })
    }

    /// Its process.
    pub fn process(&self) -> Option<u32> {
        self.child.id()
    }
}

/// Resolves when standard input ends, which is when whoever started this process has gone.
pub fn input_ended() -> oneshot::Receiver<()> {
    let (sender, ended) = oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = sender.send(());
    });
    ended
}

/// Bytes of resident memory of a process: now, and the most that it has had.
pub fn memory(process: u32) -> Result<(f64, f64)> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
        anyhow::Ok(line.context("a process has ended")?.parse::<f64>()? * 1_024.0)
    };
    Ok((of("VmRSS:")?, of("VmHWM:")?))
}

/// Open files of a process.
pub fn descriptors(process: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{process}/fd"))?.count())
}
