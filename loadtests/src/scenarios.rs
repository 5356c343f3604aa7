//! `run` and `report`: scenarios, each with its table, its picture and its budgets.

mod bodies;
mod closed;
mod memory;
mod mixed;
mod open;
mod scaling;
mod servers;
mod slow;
mod soak;
mod start;
mod users;

use std::{path::PathBuf, sync::atomic::Ordering, time::Instant};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{
    callers::REFUSED,
    figures::{Outcome, Run},
    mcpo::Mcpo,
    paths::{Path, Stage, Target},
    report,
    servers::{Language, Launch},
    table,
};

/// What can be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// 1 to 256 callers who wait for each answer, by every path and beside every floor.
    Closed,
    /// Calls at fixed rates, whose latency counts from the moment at which they were to be made.
    Open,
    /// Texts of 100 bytes, 100 KB and 1 MB.
    Bodies,
    /// 200 calls of a tool that takes a second, all at once.
    Slow,
    /// Many servers, listed, and some of them called.
    Servers,
    /// Many users, each with a secret.
    Users,
    /// Calls beside those who change secrets.
    Mixed,
    /// A server with few slots, on one worker and more.
    Scaling,
    /// From the start of the programs to the first answered call.
    Start,
    /// Resident memory, idle and with many large bodies.
    Memory,
    /// A steady load for long: what grows.
    Soak,
}

/// How to run them.
#[derive(Debug, Args)]
pub struct Options {
    /// Seconds instead of minutes: to see that all works, and not how well.
    #[arg(long)]
    pub quick: bool,
    /// Only this one of `single` and `cluster`.
    #[arg(long, value_enum)]
    pub shape: Option<Shape>,
    /// Does not install mcpo and does not compare with it.
    #[arg(long)]
    pub without_mcpo: bool,
    /// Users with secrets (10,000; quick 200).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub users: Option<u32>,
    /// Servers that are registered (500; quick 40).
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=2_000))]
    pub servers: Option<u32>,
    /// Minutes that the soak takes (10; quick a quarter).
    #[arg(long)]
    pub minutes: Option<f64>,
    /// The folder of `mcp-gateway` and `mcp-worker`; without it the one of this program.
    #[arg(long)]
    pub programs: Option<PathBuf>,
}

/// `run`.
#[derive(Debug, Args)]
pub struct RunOptions {
    /// Which ones.
    #[arg(required = true, value_enum)]
    scenarios: Vec<Scenario>,
    /// What the echo server is written in; may be given more than once.
    #[arg(long, value_enum, default_values_t = [Language::Rust])]
    server: Vec<Language>,
    #[command(flatten)]
    options: Options,
    /// Where what was found is also written, as JSON that `report --from` reads.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// A shape of a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// One program.
    Single,
    /// Gateways and workers.
    Cluster,
}

/// What scenarios are given.
pub struct Context<'a> {
    /// What all paths need.
    pub stage: &'a Stage,
    /// What was asked for.
    pub options: &'a Options,
    /// What the server is written in.
    pub language: Language,
    /// How to start it.
    pub launch: Launch,
    /// Whether mcpo is installed.
    pub mcpo: bool,
}

impl Context<'_> {
    /// What a full run takes, or a quick one.
    pub fn size<T>(&self, full: T, quick: T) -> T {
        if self.options.quick { quick } else { full }
    }

    /// Those of the paths that are there and asked for.
    pub fn paths(&self, paths: &[Path]) -> Vec<Path> {
        let asked = |path: &Path| match path {
            Path::Single => self.options.shape != Some(Shape::Cluster),
            Path::Cluster => self.options.shape != Some(Shape::Single),
            Path::Mcpo => self.mcpo,
            _ => true,
        };
        paths.iter().copied().filter(asked).collect()
    }

    /// Starts those of the paths that are there and asked for.
    pub async fn start(&self, paths: &[Path]) -> Result<Vec<(Path, Target)>> {
        let mut started = Vec::new();
        for path in self.paths(paths) {
            let target = self.stage.start(path, &self.launch).await;
            started.push((path, target.with_context(|| format!("{} did not start", path.name()))?));
        }
        Ok(started)
    }
}

/// Ends what was started.
pub async fn stop(targets: Vec<(Path, Target)>) -> Result<()> {
    for (_, target) in targets {
        target.stop().await?;
    }
    Ok(())
}

/// `run`: runs, prints, and fails if a budget is not kept.
pub async fn run(options: &RunOptions) -> Result<()> {
    let plan: Vec<_> = options
        .server
        .iter()
        .flat_map(|language| options.scenarios.iter().map(|scenario| (*scenario, *language)))
        .collect();
    let mut run = Run::default();
    let done = perform(&plan, &options.options, &mut run, |run| match &options.json {
        Some(file) => report::keep(run, file),
        None => Ok(()),
    });
    done.await?;
    verdict(&run)
}

/// Runs what is planned, and prints it. What was found so far is handed over after each, so that nothing is lost.
pub async fn perform(
    plan: &[(Scenario, Language)],
    options: &Options,
    run: &mut Run,
    mut keep: impl FnMut(&Run) -> Result<()>,
) -> Result<()> {
    let stage = Stage::set(options.programs.as_ref()).await?;
    run.machine = table::machine(&stage.programs, &stage.nats_version().await?).await?;
    let mcpo = !options.without_mcpo && Mcpo::install().await.is_ok();
    if !mcpo {
        println!("mcpo is not compared with");
    }
    for (scenario, language) in plan {
        let context =
            Context { stage: &stage, options, language: *language, launch: language.launch().await?, mcpo };
        let (begun, load) = (Instant::now(), table::load_average());
        REFUSED.store(0, Ordering::Relaxed);
        // The others may go well.
        let mut outcome = scenario.perform(&context).await.unwrap_or_else(|error| {
            let name = scenario.to_possible_value().map(|value| value.get_name().to_owned());
            let name = name.unwrap_or_default();
            let failed = format!("{error:#}").chars().take(600).collect();
            Outcome { failed: Some(failed), ..Outcome::new(&name, &name, String::new()) }
        });
        let refused = REFUSED.load(Ordering::Relaxed);
        if refused > 0 {
            outcome.text.push_str(&format!(" {refused} calls were refused for want of room and made again."));
        }
        outcome.seconds = begun.elapsed().as_secs_f64();
        outcome.load = [load, table::load_average()];
        if *language != Language::Rust {
            outcome.of(*language);
        }
        report::print(&outcome);
        run.outcomes.push(outcome);
        keep(run)?;
    }
    Ok(())
}

/// An error if a scenario has failed or a budget is not kept.
pub fn verdict(run: &Run) -> Result<()> {
    let failed: Vec<_> =
        run.outcomes.iter().filter(|one| one.failed.is_some()).map(|one| &*one.name).collect();
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    let budgets: Vec<_> = run.outcomes.iter().flat_map(|outcome| &outcome.budgets).collect();
    let missed: Vec<_> =
        budgets.iter().filter(|one| one.decides && !one.met()).map(|one| one.line()).collect();
    ensure!(
        missed.is_empty(),
        "{} of {} budgets missed:\n  {}",
        missed.len(),
        budgets.len(),
        missed.join("\n  ")
    );
    if !budgets.is_empty() {
        println!("\n{} of {} budgets kept", budgets.iter().filter(|one| one.met()).count(), budgets.len());
    }
    Ok(())
}

impl Scenario {
    async fn perform(self, context: &Context<'_>) -> Result<Outcome> {
        match self {
            Self::Closed => closed::run(context).await,
            Self::Open => open::run(context).await,
            Self::Bodies => bodies::run(context).await,
            Self::Slow => slow::run(context).await,
            Self::Servers => servers::run(context).await,
            Self::Users => users::run(context).await,
            Self::Mixed => mixed::run(context).await,
            Self::Scaling => scaling::run(context).await,
            Self::Start => start::run(context).await,
            Self::Memory => memory::run(context).await,
            Self::Soak => soak::run(context).await,
        }
    }
}

impl Outcome {
    /// To be filled.
    pub fn new(name: &str, title: &str, text: String) -> Self {
        Self {
            name: name.to_owned(),
            title: title.to_owned(),
            text,
            tables: vec![],
            plots: vec![],
            budgets: vec![],
            failed: None,
            seconds: 0.0,
            load: Default::default(),
        }
    }

    /// Names the language of the server, wherever two outcomes would have the same name.
    fn of(&mut self, language: Language) {
        let name = language.name();
        self.name = format!("{}-{}", self.name, name.to_lowercase());
        self.title = format!("{} ({name})", self.title);
        for plot in &mut self.plots {
            plot.file = format!("{}-{}", plot.file, name.to_lowercase());
            plot.title = format!("{} ({name} server)", plot.title);
        }
        // They speak of the Rust server, which is hardly there.
        self.budgets.clear();
    }
}
