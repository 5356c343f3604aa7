//! `overload`: what calls of one server take while a crowd calls another one that has a single slot.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, bail};
use bytes::Bytes;
use clap::Args;
use serde_json::json;
use tokio::{task::JoinSet, time::sleep};

use crate::{
    callers::Call,
    client::Client,
    deployment::Deployment,
    measure::{Summary, closed_loop},
    paths::{Path, Stage},
    servers::Language,
    table,
};

/// How to measure.
#[derive(Args)]
pub struct Options {
    /// Callers of the server with one slot. Each waits as long as it is told before it comes back.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u16).range(1..=15_000))]
    crowd: u16,
    /// Milliseconds that each call takes there.
    #[arg(long, default_value_t = 10)]
    slow_ms: u64,
    /// Callers of the other server.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    callers: u16,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// How often idle and overloaded are measured in turn; medians are printed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=20))]
    rounds: u64,
    /// Gateways of the cluster.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    gateways: u16,
    /// Workers of the cluster.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    workers: u16,
    /// The folder of `mcp-gateway` and `mcp-worker`; without it the one of this program.
    #[arg(long)]
    programs: Option<PathBuf>,
}

/// What one path came to.
pub struct Row {
    /// By which path.
    pub path: Path,
    /// The other server's calls without the crowd.
    pub idle: Summary,
    /// And with it.
    pub crowded: Summary,
    /// Calls of the crowd that were served.
    pub served: usize,
    /// And refused, to come back later.
    pub refused: usize,
}

/// Measures and prints.
pub async fn run(options: &Options) -> Result<()> {
    let stage = Stage::set(options.programs.as_ref()).await?;
    let launch = Language::Rust.launch().await?;
    table::machine(&stage.programs, &stage.nats_version().await?).await?;
    println!(
        "{} callers of a server with one slot and calls of {} ms; {} callers of another one, closed loop; \
         {} rounds of {} s each in turn, medians; {} gateways and {} workers in the cluster",
        options.crowd,
        options.slow_ms,
        options.callers,
        options.rounds,
        options.seconds,
        options.gateways,
        options.workers
    );
    let mut rows = Vec::new();
    for path in [Path::Single, Path::Cluster] {
        let deployment = match path {
            Path::Single => stage.single(&launch).await?,
            _ => stage.cluster(&launch, options.gateways.into(), options.workers.into()).await?,
        };
        rows.push(measure(options, path, &deployment).await?);
        table::memory(path, "gateway", &deployment.gateways())?;
        table::memory(path, "worker", &deployment.workers())?;
        deployment.stop().await?;
    }
    table::overload(&rows);
    println!("load average at the end: {}", table::load_average());
    Ok(())
}

async fn measure(options: &Options, path: Path, deployment: &Deployment) -> Result<Row> {
    deployment.add("slow", json!({"concurrency": 1, "scaling": "singleton"})).await?;
    let call = Call::echo(1);
    let time = Duration::from_secs(options.seconds);
    let (mut idle, mut crowded) = (Vec::new(), Vec::new());
    let (mut served, mut refused) = (0, 0);
    for _ in 0..options.rounds {
        idle.push(
            closed_loop(deployment.callers(options.callers.into(), &call).await?, time).await?.summary(),
        );
        let crowd = Crowd::begin(options, deployment).await?;
        crowded.push(
            closed_loop(deployment.callers(options.callers.into(), &call).await?, time).await?.summary(),
        );
        let (more_served, more_refused) = crowd.end().await?;
        served += more_served;
        refused += more_refused;
    }
    Ok(Row { path, idle: Summary::median(&idle), crowded: Summary::median(&crowded), served, refused })
}

/// Callers of the server with one slot, all at once.
struct Crowd {
    callers: JoinSet<Result<()>>,
    over: Arc<AtomicBool>,
    counts: Arc<(AtomicUsize, AtomicUsize)>,
}

impl Crowd {
    /// Connects all, and then has them call.
    async fn begin(options: &Options, deployment: &Deployment) -> Result<Self> {
        let body = Call::sleep(options.slow_ms).at("slow").body();
        let mut clients = Vec::new();
        for address in deployment.addresses().iter().cycle().take(options.crowd.into()) {
            clients.push(Client::connect(address).await?);
        }
        let (over, counts) = (Arc::new(AtomicBool::new(false)), Arc::default());
        let mut callers = JoinSet::new();
        for client in clients {
            callers.spawn(call(client, body.clone(), Arc::clone(&over), Arc::clone(&counts)));
        }
        Ok(Self { callers, over, counts })
    }

    /// Waits until each has had its last answer. How many were served and refused is returned.
    async fn end(mut self) -> Result<(usize, usize)> {
        self.over.store(true, Ordering::Relaxed);
        while let Some(ended) = self.callers.join_next().await {
            ended??;
        }
        Ok((self.counts.0.load(Ordering::Relaxed), self.counts.1.load(Ordering::Relaxed)))
    }
}

async fn call(
    mut client: Client,
    body: Bytes,
    over: Arc<AtomicBool>,
    counts: Arc<(AtomicUsize, AtomicUsize)>,
) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        let (answer, wait) = client.try_post("/mcp/tool/call", body.clone()).await?;
        if answer.starts_with(b"{\"success\":true") {
            counts.0.fetch_add(1, Ordering::Relaxed);
        } else if let Some(wait) = wait {
            counts.1.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_secs(wait)).await;
        } else {
            bail!("a call failed: {}", String::from_utf8_lossy(&answer));
        }
    }
    Ok(())
}
