//! How the server of an installed package is started: with the folder of the installation in place of the
//! documented path.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use mcp_shared::package::{PackageRef, Runtime};

/// A command line with the paths of this worker.
#[derive(Debug, PartialEq, Eq)]
pub struct Localized {
    /// The program.
    pub command: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// The record's variables, and those that a virtual environment needs.
    pub env: BTreeMap<String, String>,
}

/// Replaces the documented path of a package by its folder, wherever it leads to something that is there.
pub fn localized(
    reference: &PackageRef,
    folder: &Path,
    command: &str,
    args: &[String],
    env: &BTreeMap<String, String>,
    search_path: Option<&str>,
) -> Localized {
    let local = |text: &str| match within(&reference.path, text).map(|rest| folder.join(rest)) {
        Some(path) if path.exists() => path.to_string_lossy().into_owned(),
        _ => text.to_owned(),
    };
    let mut env = env.clone();
    if reference.runtime == Runtime::Python {
        let bin = folder.join("bin").to_string_lossy().into_owned();
        let path = match env.get("PATH").map(String::as_str).or(search_path) {
            Some(path) => format!("{bin}:{path}"),
            None => bin,
        };
        env.insert("PATH".to_owned(), path);
        env.insert("VIRTUAL_ENV".to_owned(), folder.to_string_lossy().into_owned());
        env.entry("PYTHONUNBUFFERED".to_owned()).or_insert_with(|| "1".to_owned());
    }
    Localized { command: local(command), args: args.iter().map(|arg| local(arg)).collect(), env }
}

/// What follows the documented path in a text that begins with it: as it is, behind `./`, or as an absolute
/// path that ends with it, which other machines had.
fn within(documented: &str, text: &str) -> Option<PathBuf> {
    let start = text.strip_prefix("./").unwrap_or(text);
    let rest = match start.strip_prefix(documented) {
        Some(rest) => rest,
        None if text.starts_with('/') => {
            let relative = documented.trim_start_matches('/');
            let at = text.find(&format!("/{relative}/"))?;
            &text[at + 1 + relative.len()..]
        }
        None => return None,
    };
    let rest = rest.strip_prefix('/')?;
    // What leaves the folder again does not mean it.
    (!rest.split('/').any(|part| part == "..")).then(|| PathBuf::from(rest))
}

#[cfg(test)]
mod tests {
    use mcp_shared::package::Generation;

    use super::*;

    fn reference(runtime: Runtime, path: &str) -> PackageRef {
        let generation = Generation::parse("node-000000000000000000000000").unwrap();
        PackageRef { generation, runtime, path: path.to_owned() }
    }

    #[test]
    fn documented_paths_mean_the_installation() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("node_modules/a")).unwrap();
        std::fs::write(folder.path().join("node_modules/a/x.js"), "").unwrap();
        let real = folder.path().join("node_modules/a/x.js").to_string_lossy().into_owned();
        let reference = reference(Runtime::Node, "packages/a");
        let args = [
            "./packages/a/node_modules/a/x.js",
            "packages/a/node_modules/a/x.js",
            "/app/packages/a/node_modules/a/x.js",
            "./packages/a/node_modules/a/missing.js",
            "./packages/ab/node_modules/a/x.js",
            "./packages/a/../a/node_modules/a/x.js",
            "/data/packages/a/",
            "--flag",
        ];
        let args: Vec<String> = args.map(str::to_owned).to_vec();
        let local = localized(&reference, folder.path(), "node", &args, &BTreeMap::new(), Some("/bin"));
        assert_eq!(local.args[..3], [real.clone(), real.clone(), real]);
        assert_eq!(local.args[3..6], args[3..6]);
        assert_eq!(local.args[7], "--flag");
        assert_eq!((local.command.as_str(), local.env.len()), ("node", 0));
    }

    #[test]
    fn a_virtual_environment_is_entered() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("bin")).unwrap();
        std::fs::write(folder.path().join("bin/tool"), "").unwrap();
        let own = folder.path().to_string_lossy().into_owned();
        for documented in ["packages/python/time", "/srv/venvs/time"] {
            let reference = reference(Runtime::Python, documented);
            let env = BTreeMap::from([("KEY".to_owned(), "x".to_owned())]);
            let local = localized(
                &reference,
                folder.path(),
                &format!("{documented}/bin/tool"),
                &[],
                &env,
                Some("/bin"),
            );
            assert_eq!(local.command, format!("{own}/bin/tool"));
            assert_eq!(local.env["PATH"], format!("{own}/bin:/bin"));
            assert_eq!(
                (local.env["VIRTUAL_ENV"].as_str(), local.env["PYTHONUNBUFFERED"].as_str()),
                (own.as_str(), "1")
            );
            assert_eq!(local.env["KEY"], "x");
        }
    }
}
