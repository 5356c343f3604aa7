//! Settings of the audit log.

use std::path::{Path, PathBuf};

use super::{Reader, parse};
use crate::audit::{AuditCalls, default_file};

/// Where the audit log is, and what is in it.
#[derive(Debug, Clone, Default)]
pub struct AuditSettings {
    /// The file. Another process that has it makes this one take the next name.
    pub file: PathBuf,
    /// At how many bytes it is put aside and the next begun.
    pub rotate_bytes: u64,
    /// Which calls of tools are recorded.
    pub calls: AuditCalls,
}

fn calls(text: &str) -> Result<AuditCalls, parse::Valid> {
    match text.to_ascii_lowercase().as_str() {
        "none" => Ok(AuditCalls::None),
        "denied" => Ok(AuditCalls::Denied),
        "all" => Ok(AuditCalls::All),
        _ => Err("none, denied or all"),
    }
}

/// A file's path: it must have a name.
fn file(text: &str) -> Result<PathBuf, parse::Valid> {
    let path = PathBuf::from(text);
    if path.file_name().is_none() || text.ends_with('/') {
        return Err("the path of a file, such as /var/log/mcp-api/audit.jsonl");
    }
    Ok(path)
}

impl Reader {
    /// The settings of the audit log; `None` only after a problem.
    pub(super) fn audit(&mut self, data_dir: Option<&Path>) -> Option<AuditSettings> {
        let file = self.optional("AUDIT_FILE", file);
        let rotate_bytes = self.required("AUDIT_ROTATE_SIZE", parse::size)?;
        let calls = self.required("AUDIT_CALLS", calls)?;
        Some(AuditSettings {
            file: file.or_else(|| data_dir.map(default_file))?,
            rotate_bytes: u64::try_from(rotate_bytes).unwrap_or(u64::MAX),
            calls,
        })
    }
}
