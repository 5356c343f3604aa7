//! What an installed package runs.

use std::path::{Component, Path, PathBuf};

use mcp_shared::{
    error::{ErrorCode, WorkerError, shorten},
    package::{PackageSpec, names},
};
use serde_json::Value;

use super::environment::{Environment, is_executable};

/// Command and arguments as the request has them.
type Given<'a> = (&'a String, &'a Vec<String>);

/// The command of a package from npm: what was asked for, or Node with the package's program.
pub(super) fn node(
    spec: &PackageSpec,
    (command, args): Given<'_>,
    folder: &Path,
    documented: &str,
) -> Result<(String, Vec<String>), WorkerError> {
    if !command.is_empty() {
        return Ok((command.clone(), args.clone()));
    }
    let inner = format!("node_modules/{}", spec.name);
    let package = folder.join(&inner);
    let manifest = std::fs::read(package.join("package.json")).ok();
    let manifest: Value = manifest.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let program = program(&manifest, &spec.name).or_else(|| {
        let index = "index.js".to_owned();
        package.join(&index).is_file().then_some(index)
    });
    let Some(program) = program else {
        return Err(none(spec, "its package.json has neither `bin` nor `main`, and there is no index.js"));
    };
    let Some(path) = inside(&package, &program) else {
        return Err(none(spec, &format!("its program {} is not in the package", shorten(&program, 64))));
    };
    let here = if Path::new(documented).is_absolute() { "" } else { "./" };
    let mut all = vec![format!("{here}{documented}/{inner}/{path}")];
    all.extend(args.iter().cloned());
    Ok(("node".to_owned(), all))
}

/// What a package's manifest says that it runs.
fn program(manifest: &Value, name: &str) -> Option<String> {
    let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let bin = match manifest.get("bin") {
        Some(Value::Object(programs)) => {
            let bare = name.rsplit('/').next().unwrap_or(name);
            let mut sorted: Vec<_> = programs.iter().collect();
            sorted.sort_by_key(|(key, _)| key.as_str());
            programs.get(bare).or_else(|| sorted.first().map(|(_, path)| *path)).and_then(text)
        }
        Some(value) => text(value),
        None => None,
    };
    bin.or_else(|| manifest.get("main").and_then(text))
}

/// The path of a file in a package, as it stands below the package's folder; `None` if it is not there or
/// somewhere else. As Node does, `main` may leave out what ends its name.
fn inside(package: &Path, program: &str) -> Option<String> {
    let mut plain = PathBuf::new();
    for part in Path::new(program).components() {
        match part {
            Component::Normal(part) => plain.push(part),
            Component::CurDir => {}
            _ => return None,
        }
    }
    let root = package.canonicalize().ok()?;
    let plain = plain.to_str()?;
    let candidates = ["", ".js", ".cjs", ".mjs", "/index.js"].map(|ending| format!("{plain}{ending}"));
    candidates.into_iter().find(|path| {
        package.join(path).canonicalize().is_ok_and(|real| real.starts_with(&root) && real.is_file())
    })
}

/// The command of a package from PyPI: a module that Python runs, a program of the virtual environment, or
/// another one that was asked for.
pub(super) fn python(
    spec: &PackageSpec,
    (command, args): Given<'_>,
    folder: &Path,
    documented: &str,
    environment: &Environment,
) -> Result<(String, Vec<String>), WorkerError> {
    if !command.is_empty() {
        let name = Path::new(command).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !name.is_empty() && is_executable(&folder.join("bin").join(name)) {
            return Ok((format!("{documented}/bin/{name}"), args.clone()));
        }
        let exists = match command.contains('/') {
            true => Path::new(command).is_file(),
            false => environment.find(command).is_some(),
        };
        return match exists {
            true => Ok((command.clone(), args.clone())),
            false => {
                Err(none(spec, &format!("there is no program {}{}", shorten(command, 64), commands(folder))))
            }
        };
    }
    let Some(module) = &spec.python_module else {
        return Err(none(spec, &format!("`pythonModule` or `command` must say it{}", commands(folder))));
    };
    if !names::python_module(module) {
        return Err(none(spec, "`pythonModule` is not the name of a module"));
    }
    if !is_runnable(folder, module) {
        let module = shorten(module, 64);
        return Err(none(
            spec,
            &format!("it has no module {module} that `python -m` can run{}", commands(folder)),
        ));
    }
    let mut all = vec!["-u".to_owned(), "-m".to_owned(), module.clone()];
    all.extend(spec.python_args.iter().flatten().cloned());
    all.extend(args.iter().cloned());
    Ok((format!("{documented}/bin/python"), all))
}

/// Whether `python -m` would find a module, as far as that can be told without running it. In doubt it
/// would.
fn is_runnable(folder: &Path, module: &str) -> bool {
    let libraries: Vec<PathBuf> = std::fs::read_dir(folder.join("lib"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("site-packages"))
        .filter(|path| path.is_dir())
        .collect();
    let path = module.replace('.', "/");
    let top = module.split('.').next().unwrap_or(module);
    let mut known = false;
    for library in &libraries {
        if holds(&library.join(&path), "__main__") || holds_module(library, &path) {
            return true;
        }
        known |= library.join(top).exists() || holds_module(library, top);
    }
    // A module of Python itself, or one that a `.pth` file brings from somewhere.
    !known
        && (libraries.is_empty()
            || standard_library(folder).is_none_or(|library| {
                holds(&library.join(&path), "__main__") || holds_module(&library, &path)
            })
            || libraries.iter().any(|library| brings_others(library)))
}

/// Whether a folder has a module of this name: a source, compiled, or a library.
fn holds(folder: &Path, module: &str) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).any(|name| {
        let ending = name.strip_prefix(module);
        ending.is_some_and(|ending| {
            [".py", ".pyc", ".so"].iter().any(|end| ending.ends_with(end)) && ending.starts_with('.')
        })
    })
}

fn holds_module(library: &Path, path: &str) -> bool {
    let whole = library.join(path);
    match (whole.parent(), whole.file_name().and_then(|name| name.to_str())) {
        (Some(folder), Some(name)) => holds(folder, name),
        _ => false,
    }
}

/// Where the modules of Python itself are.
fn standard_library(folder: &Path) -> Option<PathBuf> {
    let python = folder.join("bin").join("python").canonicalize().ok()?;
    let version = std::fs::read_dir(folder.join("lib")).ok()?.flatten().next()?.file_name();
    let library = python.parent()?.parent()?.join("lib").join(version);
    library.is_dir().then_some(library)
}

fn brings_others(library: &Path) -> bool {
    let entries = std::fs::read_dir(library).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).any(|name| {
        let name = name.to_string_lossy();
        // These two come with virtual environments.
        name.ends_with(".pth") && name != "_virtualenv.pth" && name != "distutils-precedence.pth"
    })
}

/// The commands that a virtual environment has, for people who look for one.
fn commands(folder: &Path) -> String {
    let entries = std::fs::read_dir(folder.join("bin")).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            let own = ["python", "activate", "Activate", "deactivate", "pip", "pydoc"];
            !own.iter().any(|own| name.starts_with(own))
        })
        .collect();
    names.sort();
    names.truncate(8);
    if names.is_empty() {
        String::new()
    } else {
        shorten(&format!("; its commands are {}", names.join(", ")), 200)
    }
}

fn none(spec: &PackageSpec, why: &str) -> WorkerError {
    let name = shorten(&spec.name, 64);
    WorkerError::new(ErrorCode::NoEntryPoint, format!("It is not known what {name} runs: {why}"))
}
