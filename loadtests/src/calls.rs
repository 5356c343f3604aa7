//! `calls`: the same call by every path, in turns.

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use clap::Args;

use crate::{
    allocations::Counter,
    callers::Call,
    cost::{Meter, Meters},
    deployment::{Cluster, Deployment},
    measure::{Sample, Summary, closed_loop, median},
    paths::{Path, Stage, Target},
    servers::{Language, Launch},
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

/// A path, and what was measured on it.
struct Track {
    path: Path,
    target: Target,
    meters: Meters,
}

/// Everything that is needed to start something.
struct Bench<'a> {
    options: &'a Options,
    stage: Stage,
    launch: Launch,
    call: Call,
}

/// What is measured where nothing else is asked for.
const PATHS: [Path; 7] = [
    Path::Direct,
    Path::FloorHttp,
    Path::FloorCluster,
    Path::Single,
    Path::Cluster,
    Path::Nats,
    Path::Handshake,
];

/// Measures and prints.
pub async fn run(options: &Options) -> Result<()> {
    let bench = Bench::new(options).await?;
    table::machine(&bench.stage.programs, &bench.stage.nats_version().await?).await?;
    let paths = if options.only.is_empty() { PATHS.as_slice() } else { options.only.as_slice() };
    let mut tracks = Vec::new();
    for path in paths {
        tracks.push(bench.track(*path).await?);
    }
    println!(
        "closed loop, {} byte text ({} byte body), {} rounds of {} s each in turn, medians; \
         {} gateways and {} workers in the cluster",
        options.bytes,
        bench.call.body().len(),
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
    println!("load average at the end: {}", table::load_average());
    bench.end(tracks).await?;
    if options.allocations {
        bench.allocations().await?;
    }
    Ok(())
}

impl<'a> Bench<'a> {
    async fn new(options: &'a Options) -> Result<Self> {
        let stage = Stage::set(options.programs.as_ref()).await?;
        let (launch, call) = (Language::Rust.launch().await?, Call::echo(options.bytes));
        Ok(Self { options, stage, launch, call })
    }

    async fn track(&self, path: Path) -> Result<Track> {
        let target = match path {
            Path::Cluster => Target::Http(
                Deployment::cluster(&self.stage.programs, &self.launch, &self.cluster(), |_| Vec::new())
                    .await?,
            ),
            path => self.stage.start(path, &self.launch).await?,
        };
        let mut meters = vec![("load", Meter::Processor(vec![std::process::id()]))];
        let server = match &target {
            Target::Direct(server) => server.process().into_iter().collect(),
            Target::Http(deployment) => {
                meters.push(("gateway", Meter::Processor(deployment.gateways())));
                deployment.servers()
            }
            Target::Floor(floor) => {
                meters.push(("gateway", Meter::Processor(floor.processes())));
                vec![]
            }
            Target::Nats(_, responder, _) => responder.process().into_iter().collect(),
            Target::Mcpo(mcpo) => mcpo.process().into_iter().collect(),
        };
        meters.push(("server", Meter::Processor(server)));
        if let (Path::Cluster, Target::Http(deployment)) = (path, &target) {
            meters.push(("worker", Meter::Processor(deployment.workers())));
        }
        let on_nats = path.on_nats();
        if on_nats {
            meters.push(("nats", Meter::Processor(vec![self.stage.nats.pid()])));
            meters.extend(table::NATS.map(|(name, _)| (name, Meter::Nats(name))));
        }
        let meters = Meters::new(meters, on_nats.then(|| self.stage.monitoring.clone())).await?;
        Ok(Track { path, target, meters })
    }

    fn cluster(&self) -> Cluster {
        self.stage.size(self.options.gateways.into(), self.options.workers.into())
    }

    /// Goes all paths in turn, as often as asked for: the samples, and the median costs by name.
    async fn rounds(
        &self,
        tracks: &[Track],
        callers: u16,
        rounds: u64,
    ) -> Result<Vec<(Path, Vec<Summary>, table::Costs)>> {
        let mut measured: Vec<Vec<(Summary, Vec<f64>)>> = tracks.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds {
            for (track, measured) in tracks.iter().zip(&mut measured) {
                let (sample, costs) = track.meters.around(self.load(&track.target, callers)).await?;
                measured.push((sample.summary(), costs));
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
        let callers = target.callers(callers.into(), &self.call).await?;
        closed_loop(callers, Duration::from_secs(self.options.seconds)).await
    }

    /// Counts allocations of gateway and worker in processes of their own.
    async fn allocations(&self) -> Result<()> {
        let counter = Counter::build().await?;
        let env = |program: &str| counter.env(program);
        let single = Deployment::single(&self.stage.programs, &self.launch, env).await?;
        let files =
            |kind: &str, count: u16| (0..count).map(|at| counter.file(&format!("{kind}-{at}"))).collect();
        let cluster = Deployment::cluster(&self.stage.programs, &self.launch, &self.cluster(), env).await?;
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
            track.target.stop().await?;
        }
        Ok(())
    }
}
