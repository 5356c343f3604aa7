//! `calls`: the same call by every path, in turns.

use std::{net::TcpListener, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::{Args, ValueEnum};
use mcp_shared::testing::services::{self, NatsServer};
use serde_json::json;

use crate::{
    allocations::Counter,
    bus::Responder,
    cost::{Meter, Meters, varz},
    deployment::{Cluster, Deployment},
    direct,
    measure::{Sample, Summary, median},
    table,
};

/// How to measure.
#[derive(Args)]
pub struct Options {
    /// Callers at once; may be given more than once.
    #[arg(long, default_values_t = [1, 16, 64], value_parser = clap::value_parser!(u16).range(1..=1024))]
    callers: Vec<u16>,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// How often the measurements are repeated in turn; medians are printed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=20))]
    rounds: u64,
    /// Bytes of the text that is echoed.
    #[arg(long, default_value_t = 100)]
    bytes: usize,
    /// Gateways of the cluster.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    gateways: u16,
    /// Workers of the cluster.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    workers: u16,
    /// Only this path, for a look with a profiler; may be given more than once.
    #[arg(long, value_enum)]
    only: Vec<Path>,
    /// Also counts allocations, in a run of its own whose speed is not looked at. Needs `cc`.
    #[arg(long)]
    allocations: bool,
    /// The folder of `mcp-gateway` and `mcp-worker`; without it the one of this program.
    #[arg(long)]
    programs: Option<PathBuf>,
}

/// How a call gets to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Path {
    /// To the server's standard input.
    Direct,
    /// By HTTP to one program.
    Single,
    /// By HTTP to a cluster.
    Cluster,
    /// Not at all: NATS there and back.
    Nats,
    /// The same twice in sequence, as a handshake takes.
    Handshake,
}

impl Path {
    /// As the tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct stdio",
            Self::Single => "single node",
            Self::Cluster => "cluster",
            Self::Nats => "NATS, 1 trip",
            Self::Handshake => "NATS, 2 trips",
        }
    }
}

/// What there is at the other end of a path.
enum Target {
    Direct(direct::Server),
    Http(Deployment),
    Nats { responder: Responder, trips: usize },
}

/// A path, and what was measured on it.
struct Track {
    path: Path,
    target: Target,
    meters: Meters,
}

/// Everything that is needed to start something.
struct Bench<'a> {
    options: &'a Options,
    folder: PathBuf,
    nats: NatsServer,
    monitoring: String,
    mongo: &'static str,
    text: String,
    body: Bytes,
}

/// Measures and prints.
pub async fn run(options: &Options) -> Result<()> {
    let bench = Bench::new(options).await?;
    table::machine(&bench.folder, &bench.nats_version().await?).await?;
    let paths = if options.only.is_empty() { Path::value_variants() } else { options.only.as_slice() };
    let mut tracks = Vec::new();
    for path in paths {
        tracks.push(bench.track(*path).await?);
    }
    println!(
        "closed loop, {} byte text ({} byte body), {} rounds of {} s each in turn, medians; \
         {} gateways and {} workers in the cluster",
        options.bytes,
        bench.body.len(),
        options.rounds,
        options.seconds,
        options.gateways,
        options.workers
    );
    let mut costs = Vec::new();
    table::speed_head();
    for callers in &options.callers {
        let mut rows = Vec::new();
        for (path, samples, cost) in bench.rounds(&tracks, *callers, options.rounds).await? {
            rows.push((path, Summary::median(&samples)));
            costs.push((*callers, path, cost));
        }
        table::speed(*callers, &rows);
    }
    table::costs(&costs);
    for track in &tracks {
        if let Target::Http(deployment) = &track.target {
            table::memory(track.path, "gateway", &deployment.gateways())?;
            table::memory(track.path, "worker", &deployment.workers())?;
        }
    }
    table::load_average("at the end");
    bench.end(tracks).await?;
    if options.allocations {
        bench.allocations().await?;
    }
    Ok(())
}

impl<'a> Bench<'a> {
    async fn new(options: &'a Options) -> Result<Self> {
        let folder = match &options.programs {
            Some(folder) => folder.clone(),
            None => std::env::current_exe()?.parent().context("no folder")?.to_owned(),
        };
        let text = "x".repeat(options.bytes);
        let body = json!({"serverName": "echo", "methodName": "echo", "args": {"text": text}}).to_string();
        // NATS does not say which port it has drawn for its monitoring page, so one is drawn here.
        let monitoring = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let config = format!("http: \"{monitoring}\"");
        let started =
            tokio::task::spawn_blocking(move || (NatsServer::start(&config), services::shared_mongo()));
        let (nats, mongo) = started.await.context("NATS or the store did not start")?;
        Ok(Self { options, folder, nats, monitoring, mongo, text, body: body.into() })
    }

    async fn nats_version(&self) -> Result<String> {
        let version = varz(&self.monitoring).await?["version"].as_str().map(str::to_owned);
        version.context("NATS has no version")
    }

    async fn track(&self, path: Path) -> Result<Track> {
        let without = |_: &str| Vec::new();
        let target = match path {
            Path::Direct => Target::Direct(direct::Server::start().await?),
            Path::Single => Target::Http(Deployment::single(&self.folder, without).await?),
            Path::Cluster => Target::Http(Deployment::cluster(&self.folder, &self.cluster(), without).await?),
            Path::Nats => self.bus("load.one", 1).await?,
            Path::Handshake => self.bus("load.two", 2).await?,
        };
        let mut meters = vec![("load", Meter::Processor(vec![std::process::id()]))];
        let server = match &target {
            Target::Direct(server) => server.process().into_iter().collect(),
            Target::Http(deployment) => {
                meters.push(("gateway", Meter::Processor(deployment.gateways())));
                deployment.servers()
            }
            Target::Nats { responder, .. } => responder.process().into_iter().collect(),
        };
        meters.push(("server", Meter::Processor(server)));
        if let (Path::Cluster, Target::Http(deployment)) = (path, &target) {
            meters.push(("worker", Meter::Processor(deployment.workers())));
        }
        let on_nats = !matches!(path, Path::Direct | Path::Single);
        if on_nats {
            meters.push(("nats", Meter::Processor(vec![self.nats.pid()])));
            meters.extend(table::NATS.map(|(name, _)| (name, Meter::Nats(name))));
        }
        let meters = Meters::new(meters, on_nats.then(|| self.monitoring.clone())).await?;
        Ok(Track { path, target, meters })
    }

    async fn bus(&self, subject: &'static str, trips: usize) -> Result<Target> {
        Ok(Target::Nats { responder: Responder::start(&self.nats.url(), subject).await?, trips })
    }

    fn cluster(&self) -> Cluster {
        Cluster {
            nats: self.nats.url(),
            mongo: self.mongo.to_owned(),
            gateways: self.options.gateways.into(),
            workers: self.options.workers.into(),
        }
    }

    /// Goes all paths in turn, as often as asked for: the samples, and the median costs by name.
    async fn rounds(
        &self,
        tracks: &[Track],
        callers: u16,
        rounds: u64,
    ) -> Result<Vec<(Path, Vec<Sample>, table::Costs)>> {
        let mut measured: Vec<Vec<(Sample, Vec<f64>)>> = tracks.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds {
            for (track, measured) in tracks.iter().zip(&mut measured) {
                measured.push(track.meters.around(self.load(&track.target, callers)).await?);
            }
        }
        let rows = tracks.iter().zip(measured).map(|(track, measured)| {
            let (samples, costs): (Vec<_>, Vec<_>) = measured.into_iter().unzip();
            let cost = |at: usize| median(costs.iter().filter_map(|round| round.get(at).copied()));
            let costs = track.meters.names().enumerate().map(|(at, name)| (name, cost(at))).collect();
            (track.path, samples, costs)
        });
        Ok(rows.collect())
    }

    async fn load(&self, target: &Target, callers: u16) -> Result<Sample> {
        let (callers, time) = (callers.into(), Duration::from_secs(self.options.seconds));
        match target {
            Target::Direct(server) => server.load(callers, &self.text, time).await,
            Target::Http(deployment) => deployment.load(callers, &self.body, time).await,
            Target::Nats { responder, trips } => responder.load(callers, *trips, &self.body, time).await,
        }
    }

    /// Counts allocations of gateway and worker in processes of their own.
    async fn allocations(&self) -> Result<()> {
        let counter = Counter::build().await?;
        let env = |program: &str| counter.env(program);
        let single = Deployment::single(&self.folder, env).await?;
        let files =
            |kind: &str, count: u16| (0..count).map(|at| counter.file(&format!("{kind}-{at}"))).collect();
        let cluster = Deployment::cluster(&self.folder, &self.cluster(), env).await?;
        let (gateways, workers): (Vec<_>, Vec<_>) =
            (files("gateway", self.options.gateways), files("worker", self.options.workers));
        let single_meters = vec![
            ("gateway", Meter::Allocations(vec![counter.file("gateway")])),
            ("gateway bytes", Meter::Allocated(vec![counter.file("gateway")])),
        ];
        let cluster_meters = vec![
            ("gateway", Meter::Allocations(gateways.clone())),
            ("gateway bytes", Meter::Allocated(gateways)),
            ("worker", Meter::Allocations(workers.clone())),
            ("worker bytes", Meter::Allocated(workers)),
        ];
        let mut tracks = Vec::new();
        for (path, target, meters) in
            [(Path::Single, single, single_meters), (Path::Cluster, cluster, cluster_meters)]
        {
            let meters = Meters::new(meters, None).await?;
            tracks.push(Track { path, target: Target::Http(target), meters });
        }
        let mut costs = Vec::new();
        for callers in &self.options.callers {
            for (path, _, cost) in self.rounds(&tracks, *callers, 1).await? {
                costs.push((*callers, path, cost));
            }
        }
        table::allocations(&costs);
        self.end(tracks).await
    }

    async fn end(&self, tracks: Vec<Track>) -> Result<()> {
        for track in tracks {
            if let Target::Http(deployment) = track.target {
                deployment.stop().await?;
            }
        }
        Ok(())
    }
}
