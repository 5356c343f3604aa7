//! `report`: runs everything, or reads what a run has found, and writes it down for people.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::{
    figures::{Outcome, Run},
    plot,
    scenarios::{self, Options, Scenario},
    servers::Language,
};

/// What to report.
#[derive(Debug, Args)]
pub struct ReportOptions {
    #[command(flatten)]
    options: Options,
    /// Where `REPORT.md` and the folder `report` go.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR")))]
    out: PathBuf,
    /// Writes the report of an earlier run from its JSON, and runs nothing.
    #[arg(long)]
    from: Option<PathBuf>,
}

/// Runs, writes, and fails if a scenario did or a budget is not kept.
pub async fn run(options: &ReportOptions) -> Result<()> {
    let mut run = Run::default();
    if let Some(file) = &options.from {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        run = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
        write(&run, &options.out)?;
    } else {
        scenarios::perform(&plan(), &options.options, &mut run, |run| write(run, &options.out)).await?;
    }
    println!("\nwritten to {}", options.out.join("REPORT.md").display());
    scenarios::verdict(&run)
}

/// Everything with the Rust server, which is hardly there; and what the others make of it in the closed and the open loop.
fn plan() -> Vec<(Scenario, Language)> {
    let all = Scenario::value_variants().iter().map(|scenario| (*scenario, Language::Rust));
    let mut plan: Vec<_> = all.collect();
    for language in [Language::Node, Language::Python] {
        plan.extend([(Scenario::Closed, language), (Scenario::Open, language)]);
    }
    plan
}

/// Prints what a scenario has found.
pub fn print(outcome: &Outcome) {
    println!("\n== {}: {}\n{}", outcome.name, outcome.title, outcome.text);
    if let Some(failed) = &outcome.failed {
        println!("\n  FAILED: {failed}");
    }
    for table in &outcome.tables {
        print!("\n  {}\n{}", table.title, table.render(false));
    }
    if !outcome.budgets.is_empty() {
        println!();
    }
    for budget in &outcome.budgets {
        println!("  {}", budget.line());
    }
    println!(
        "\n  {:.0} s; load average {} before, {} after",
        outcome.seconds, outcome.load[0], outcome.load[1]
    );
}

/// Keeps what was found.
pub fn keep(run: &Run, file: &Path) -> Result<()> {
    fs::write(file, serde_json::to_string_pretty(run)?).with_context(|| file.display().to_string())
}

/// Writes the report, its pictures and its figures.
fn write(run: &Run, folder: &Path) -> Result<()> {
    let pictures = folder.join("report");
    fs::create_dir_all(&pictures)?;
    for plot in run.outcomes.iter().flat_map(|outcome| &outcome.plots) {
        fs::write(pictures.join(format!("{}.svg", plot.file)), plot::svg(plot))?;
    }
    keep(run, &pictures.join("run.json"))?;
    fs::write(folder.join("REPORT.md"), markdown(run))?;
    Ok(())
}

fn markdown(run: &Run) -> String {
    let mut out = String::from("# Load test report\n\n");
    out.push_str(
        "Written by `mcp-loadtests report`; `README.md` says what the scenarios do and how to run them. Figures were taken in one \
         run, side by side on one machine, which the load generator shares: read ratios. [report/run.json](report/run.json) has \
         all of them.\n\n",
    );
    for line in &run.machine {
        out.push_str(&format!("    {line}\n"));
    }
    let budgets: Vec<_> = run.outcomes.iter().flat_map(|outcome| &outcome.budgets).collect();
    let met = budgets.iter().filter(|budget| budget.met()).count();
    out.push_str(&format!("\n## Budgets: {met} of {} met\n\n", budgets.len()));
    out.push_str("| budget | figure | limit | |\n| --- | ---: | ---: | --- |\n");
    for budget in budgets {
        let verdict = match (budget.met(), budget.decides) {
            (true, _) => "met",
            (false, true) => "**missed**",
            (false, false) => "missed (only shown)",
        };
        let rule = if budget.at_least { "≥" } else { "≤" };
        let (what, figure, limit, unit) = (&budget.what, budget.figure.0, budget.limit, &budget.unit);
        out.push_str(&format!("| {what} | {figure:.3} {unit} | {rule} {limit} {unit} | {verdict} |\n"));
    }
    for outcome in &run.outcomes {
        out.push_str(&format!("\n## {}\n\n{}\n", outcome.title, outcome.text));
        if let Some(failed) = &outcome.failed {
            out.push_str(&format!("\n**Failed**: `{}`\n", failed.replace('`', "'")));
        }
        for plot in &outcome.plots {
            out.push_str(&format!("\n![{}](report/{}.svg)\n", plot.title, plot.file));
        }
        for table in &outcome.tables {
            out.push_str(&format!("\n**{}**\n\n{}", table.title, table.render(true)));
        }
        out.push_str(&format!(
            "\nIt took {:.0} s; load average {} before, {} after.\n",
            outcome.seconds, outcome.load[0], outcome.load[1]
        ));
    }
    out
}
