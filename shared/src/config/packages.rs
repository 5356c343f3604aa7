//! Settings of packages.

use std::path::{Path, PathBuf};

use secrecy::SecretString;
use url::Url;

use super::{Reader, parse};
use crate::{ids::ServerName, package::names};

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

/// What a list says that has no entries: an empty value would mean the default.
const NONE: &str = "none";

fn install_on_start(text: &str) -> Result<Vec<InstallOnStart>, parse::Valid> {
    const VALID: parse::Valid = "package|server pairs, comma-separated, such as @scope/name|my-server, each \
                                 with an npm package and a server of its own; or none";
    let mut entries: Vec<InstallOnStart> = Vec::new();
    if text.eq_ignore_ascii_case(NONE) {
        return Ok(entries);
    }
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (package, server) = part.split_once('|').ok_or(VALID)?;
        let (package, server) = (package.trim(), server.trim());
        let server = ServerName::parse_new(server).map_err(|_| VALID)?;
        let taken = entries.iter().any(|other| other.server.case_key() == server.case_key());
        if !names::npm_name(package) || taken {
            return Err(VALID);
        }
        entries.push(InstallOnStart { package: package.to_owned(), server });
    }
    Ok(entries)
}

/// The operator's own index may ask for a login, which those of requests may not.
fn index(text: &str) -> Result<SecretString, parse::Valid> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "https" | "http") && url.has_host());
    let plain = text.bytes().all(|byte| byte.is_ascii_graphic());
    if url.is_none() || !plain {
        return Err("an http or https URL, such as https://pypi.example.org/simple");
    }
    Ok(SecretString::from(text))
}

/// A program by its path, or by a name to be looked up in `PATH`.
fn program(text: &str) -> Result<PathBuf, parse::Valid> {
    if text.starts_with('-') { Err("the path of a Python executable") } else { Ok(PathBuf::from(text)) }
}

impl Reader {
    /// The settings of packages; `None` only after a problem.
    pub(super) fn packages(&mut self, data_dir: Option<&Path>) -> Option<PackageSettings> {
        let python_bin = self.optional("PYTHON_BIN", program);
        let venv_dir = self.optional("PYTHON_VENV_DIR", parse::path);
        let pip_index_url = self.optional("PIP_INDEX_URL", index);
        let pip_extra_index_url = self.optional("PIP_EXTRA_INDEX_URL", index);
        let install_on_start = self.required("INSTALL_ON_START", install_on_start)?;
        let folder = data_dir?.join("packages");
        Some(PackageSettings {
            folder,
            python_bin,
            venv_dir,
            pip_index_url,
            pip_extra_index_url,
            install_on_start,
        })
    }
}
