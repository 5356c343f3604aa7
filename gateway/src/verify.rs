//! `mcp-gateway audit verify`.

use std::{io::Write, path::PathBuf, process::ExitCode};

use mcp_shared::{
    audit::{self, Chain},
    config::Settings,
    lifecycle::complain,
};

/// Says of each log whether it is as it was written, and what is wrong first if it is not. Without files it looks at
/// those of this machine.
pub fn run(settings: &Settings, files: &[PathBuf]) -> ExitCode {
    let chains = match audit::chains(files, &settings.audit.file) {
        Ok(chains) if chains.is_empty() => {
            complain(&format!("{}: there is no audit log", settings.audit.file.display()));
            return ExitCode::FAILURE;
        }
        Ok(chains) => chains,
        Err(error) => {
            complain(&format!("{}: {error}", settings.audit.file.display()));
            return ExitCode::FAILURE;
        }
    };
    let mut whole = true;
    for chain in &chains {
        whole &= say(chain);
    }
    if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn say(chain: &Chain) -> bool {
    let Some(last) = chain.files.last() else { return true };
    match audit::verify(chain) {
        Ok(found) => {
            let file = last.display();
            let (lines, first, last, hash) = (found.lines, found.first, found.last, &found.hash);
            let mut text = format!("{file}: ok, {lines} lines, {first} to {last}, hash {hash}");
            if chain.files.len() > 1 {
                text.push_str(&format!(" (in {} files)", chain.files.len()));
            }
            if found.unfinished > 0 {
                text.push_str(&format!("; {} bytes behind that are no whole line (yet)", found.unfinished));
            }
            let _ = writeln!(std::io::stdout(), "{text}");
            true
        }
        Err(fault) => {
            let _ = writeln!(std::io::stdout(), "{fault}");
            false
        }
    }
}
