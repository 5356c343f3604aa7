//! Settings of packages.

use std::path::PathBuf;

use secrecy::SecretString;

use crate::ids::ServerName;

/// Where packages are installed, and with what.
#[derive(Debug, Clone, Default)]
pub struct PackageSettings {
    /// The folder `packages` below `DATA_DIR`.
    pub folder: PathBuf,
    /// The Python that makes virtual environments; else `python3`, then `python`.
    pub python_bin: Option<PathBuf>,
    /// Where the documented paths of virtual environments are, if not in `python` below the folder.
    pub venv_dir: Option<PathBuf>,
    /// Where Python packages come from that name no index of their own.
    pub pip_index_url: Option<SecretString>,
    /// Where else they may come from.
    pub pip_extra_index_url: Option<SecretString>,
    /// What is installed on the first start.
    pub install_on_start: Vec<InstallOnStart>,
}

/// One package to be installed on the first start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstallOnStart {
    /// Its name in npm's registry.
    pub package: String,
    /// The server that it becomes.
    pub server: ServerName,
}
