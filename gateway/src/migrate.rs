//! `mcp-gateway migrate`: what becomes of the database of an mcp-api. A start does by itself what is done here; this
//! says it before, and does it while nobody waits.

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

use clap::Args;
use mcp_shared::{
    config::{MongoSettings, Settings, StoreSettings},
    crypter::LegacyMode,
    lifecycle::{EX_CONFIG, complain},
    node::{self, NodeError},
    store::{
        mongo::{Fate, Note},
        open::{self, Access},
    },
    vault::{Left, Vault},
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

/// The exit status when something needs somebody.
const ATTENTION: u8 = 1;

/// What can be said on the command line.
#[derive(Debug, Clone, Copy, Args)]
pub struct MigrateArguments {
    /// Change nothing: only say what would be done, and what cannot be kept.
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON object for machines.
    #[arg(long)]
    json: bool,
}

/// What was found in a database, and whether something was done about it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    database: String,
    legacy_mode: &'static str,
    dry_run: bool,
    /// Whether there is something for somebody to do.
    attention: bool,
    notes: Vec<Note>,
    /// Values of our own format that this node's keys do not open.
    unopened: Vec<Left>,
}

/// Looks, and without `--dry-run` does what the first start would do. The exit status is 1 if something cannot be kept
/// as it was.
pub async fn run(settings: &Settings, arguments: MigrateArguments) -> ExitCode {
    let StoreSettings::Mongo(mongo) = &settings.store else {
        complain(
            "migrate is about the MongoDB database of an mcp-api: set MONGO_HOST (or MONGODB_URI), MONGO_DBNAME, \
             MONGO_USER, MONGO_PASS and SECRETS_KEY as it has them",
        );
        return ExitCode::from(EX_CONFIG);
    };
    match migrate(settings, mongo, arguments).await {
        Ok(report) => {
            print(&report, arguments.json);
            if report.attention { ExitCode::from(ATTENTION) } else { ExitCode::SUCCESS }
        }
        Err(error) => error.report(),
    }
}

async fn migrate(
    settings: &Settings,
    mongo: &MongoSettings,
    arguments: MigrateArguments,
) -> Result<Report, NodeError> {
    let inspected = node::inspect(settings).await?;
    let vault = inspected.vault?.ok_or_else(|| {
        NodeError::Key(
            "SECRETS_KEY is not set: set it to the one that mcp-api had (it is `secret` if none was ever set)"
                .to_owned(),
        )
    })?;
    let report = look(settings, mongo, &vault, arguments.dry_run).await?;
    if !arguments.dry_run {
        // It makes the indexes, and resolves what stands in their way.
        let stop = CancellationToken::new();
        node::open(settings, &stop).await?;
    }
    Ok(report)
}

async fn look(
    settings: &Settings,
    mongo: &MongoSettings,
    vault: &Vault,
    dry_run: bool,
) -> Result<Report, NodeError> {
    let store = open::mongo(mongo, Access::Inspect).await?;
    let surveyed = store.survey(&settings.launch, &|text| vault.refuses_legacy(text)).await;
    store.close().await;
    let notes = surveyed?;
    let unopened = vault.unopened().await?;
    Ok(Report {
        database: format!("{} at {}", mongo.database, mongo.hosts),
        legacy_mode: vault.crypter().mode().as_str(),
        dry_run,
        attention: !unopened.is_empty() || notes.iter().any(|note| note.fate == Fate::Attention),
        notes,
        unopened,
    })
}

fn print(report: &Report, json: bool) {
    let mut out = std::io::stdout().lock();
    // Somebody who closed the pipe has read enough.
    if json {
        let _ = serde_json::to_writer_pretty(&mut out, report);
        let _ = writeln!(out);
        return;
    }
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let bold = out.is_terminal() && !plain;
    let _ = writeln!(out, "database {}, legacy mode {}", report.database, report.legacy_mode);
    let done = if report.dry_run { "would be done, now or by the first start" } else { "done" };
    for (fate, title) in [
        (Fate::Kept, "kept"),
        (Fate::Changed, done),
        (Fate::Later, "left to workers, which do it as soon as they run"),
        (Fate::Attention, "not as before, or for somebody to look at"),
    ] {
        let notes: Vec<_> = report.notes.iter().filter(|note| note.fate == fate).collect();
        if notes.is_empty() {
            continue;
        }
        let title = if bold { format!("\x1b[1m{title}\x1b[0m") } else { title.to_owned() };
        let _ = writeln!(out, "\n{title}");
        for note in notes {
            let _ = writeln!(out, "  {} {}", note.count, note.text);
            for name in &note.names {
                let _ = writeln!(out, "      {name}");
            }
            let more = note.count.saturating_sub(u64::try_from(note.names.len()).unwrap_or(u64::MAX));
            if !note.names.is_empty() && more > 0 {
                let _ = writeln!(out, "      and {more} more");
            }
            if let Some(remedy) = note.remedy {
                let _ = writeln!(out, "    -> {remedy}");
            }
        }
    }
    if !report.unopened.is_empty() {
        let _ = writeln!(out, "\nencrypted values that this node's keys do not open");
        for left in &report.unopened {
            let _ = writeln!(out, "  {} ({})", left.what, left.reason);
        }
    }
    let changed = report.notes.iter().any(|note| note.fate == Fate::Changed);
    let outcome = match (report.dry_run, changed) {
        (true, _) => "Nothing was changed.",
        (false, true) => "What stands there as done was done.",
        (false, false) => "There was nothing to change.",
    };
    let _ = writeln!(out, "\n{outcome}");
    if report.legacy_mode == LegacyMode::Rw.as_str() {
        let _ = writeln!(
            out,
            "mcp-api can go on with this database, or come back to it, until LEGACY_SECRETS is set to ro."
        );
    }
}
