//! npm, and pip or uv, behind one face. Each is asked for two things apart: to **resolve** what was asked
//! for to a [`Lock`], and to **build** a folder from a lock. The first installation takes the second way as
//! well, so that every other one is the same.
//!
//! Programs are run by their own command lines, without a shell, with an environment made for them, in
//! groups of their own that end with this worker.

use std::{path::Path, sync::Arc};

use mcp_shared::{
    config::PackageSettings,
    error::WorkerError,
    package::{Latest, LatestQuery, Lock, PackageSpec, Runtime},
    server::Transport,
};
use tokio_util::sync::CancellationToken;

use crate::supervisor::Supervisor;

/// Takes the lines that a package manager says, for the log of a job. Lines hold no secrets.
pub type Say = Arc<dyn Fn(&str) + Send + Sync>;

/// What running a package manager needs.
pub struct Work<'a> {
    /// Starts processes and ends them.
    pub supervisor: &'a Supervisor,
    /// Takes what is said.
    pub say: Say,
    /// Ends the processes at once.
    pub cancelled: &'a CancellationToken,
}

/// What can make a package's folder on this machine.
pub struct Managers {
    _private: (),
}

impl Managers {
    /// What the settings name, and else what is found in `PATH`.
    pub fn new(_settings: &PackageSettings) -> Self {
        Self { _private: () }
    }

    /// Resolves what was asked for. `scratch` is an empty folder, which the caller removes.
    pub async fn resolve(
        &self,
        _spec: &PackageSpec,
        _scratch: &Path,
        _work: &Work<'_>,
    ) -> Result<Lock, WorkerError> {
        Err(WorkerError::internal("not there yet"))
    }

    /// Makes what a lock says in a folder that is empty, at the path where it stays. A hash that differs
    /// is [`mcp_shared::error::ErrorCode::IntegrityMismatch`].
    pub async fn build(&self, _lock: &Lock, _folder: &Path, _work: &Work<'_>) -> Result<(), WorkerError> {
        Err(WorkerError::internal("not there yet"))
    }

    /// How the server of an installed package is started, with the documented path (`packages/...`) in
    /// place of the folder. `given` is what the request says of command, arguments and environment; its
    /// command is empty where it says nothing.
    pub fn entry_point(
        &self,
        _spec: &PackageSpec,
        _given: &Transport,
        _folder: &Path,
        _documented: &str,
    ) -> Result<Transport, WorkerError> {
        Err(WorkerError::internal("not there yet"))
    }

    /// The latest version of a package.
    pub async fn latest(&self, _query: &LatestQuery, _scratch: &Path, _work: &Work<'_>) -> Latest {
        Latest::Unknown(WorkerError::internal("not there yet"))
    }

    /// What Python packages would be built for, as `3.13`; `None` for npm.
    pub async fn target(&self, _runtime: Runtime) -> Option<String> {
        None
    }
}
