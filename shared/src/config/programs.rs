//! Programs of others that a cluster on one machine is made of.

use std::path::PathBuf;

use super::{Reader, parse};

/// What `mcp-gateway cluster` starts beside programs of ours.
#[derive(Debug, Clone)]
pub struct ProgramSettings {
    /// The file of `nats-server`; else it is looked for on `PATH`.
    pub nats_server: Option<PathBuf>,
    /// The file of a server that speaks MongoDB's protocol; else one is looked for on `PATH`.
    pub mongod: Option<PathBuf>,
    /// The first token of every subject, also where there is no bus yet.
    pub prefix: String,
}

impl Reader {
    /// The programs, unless something is wrong with their settings.
    pub(super) fn programs(&mut self) -> Option<ProgramSettings> {
        let nats_server = self.optional("NATS_SERVER_BIN", parse::path);
        let mongod = self.optional("MONGOD_BIN", parse::path);
        let prefix = self.required("NATS_PREFIX", super::bus::prefix)?;
        Some(ProgramSettings { nats_server, mongod, prefix })
    }
}
