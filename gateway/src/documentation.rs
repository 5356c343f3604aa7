//! The tables of the README are made from the code, and this is what makes and checks them. The fault matrix is
//! written by hand, as are the threats, and this is what keeps them from naming tests that are gone.

use std::{collections::BTreeSet, fmt::Write, path::Path};

use mcp_shared::{
    audit::Action,
    config::{self, Settings, VARIABLES},
    error::ErrorCode,
    limits, metrics,
    trace::Key,
};

use crate::problem::status;

const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
const FAULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/FAULTS.md");
const ENV_EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../compose/.env.example");
const COMPOSE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../compose/compose.yaml");
const SECURITY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../SECURITY.md");
/// Threats, and weaknesses of mcp-api, that must have a row.
const THREATS: usize = 38;
const WEAKNESSES: usize = 23;

#[test]
fn the_readme_has_the_tables_of_this_version() {
    let old = std::fs::read_to_string(README).unwrap();
    let mut new = old.clone();
    for (name, table) in [
        ("variables", config::markdown_table()),
        ("codes", codes()),
        ("limits", limits_table()),
        ("audit", actions()),
        ("metrics", metrics::markdown_table()),
        ("labels", metrics::markdown_labels()),
        ("attributes", attributes()),
    ] {
        new = replaced(&new, name, &table);
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(README, &new).unwrap();
    } else {
        assert_eq!(old, new, "the tables are out of date; CONTRIBUTING.md says how to make them anew");
    }
}

/// The example of a `.env` file has every setting, with what holds where it is not set.
#[test]
fn the_example_of_settings_is_that_of_this_version() {
    let old = std::fs::read_to_string(ENV_EXAMPLE).unwrap();
    let (begin, end) = ("# <settings>\n\n", "# </settings>");
    let (before, rest) = old.split_once(begin).unwrap();
    let (_, after) = rest.split_once(end).unwrap();
    let new = format!("{before}{begin}{}{end}{after}", config::dotenv_example());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(ENV_EXAMPLE, &new).unwrap();
    } else {
        assert_eq!(old, new, "it is out of date; CONTRIBUTING.md says how to make it anew");
    }
    // Read as the programs read it, with every line in force: nothing is unknown, and nothing changes.
    let (_, rest) = new.split_once(begin).unwrap();
    let (settings, _) = rest.split_once(end).unwrap();
    let lines: Vec<_> = settings.lines().filter_map(assignment).collect();
    let names: Vec<_> = lines.iter().map(|(name, _)| *name).collect();
    let (named, known): (BTreeSet<_>, BTreeSet<_>) =
        (names.iter().copied().collect(), VARIABLES.iter().map(|variable| variable.name).collect());
    assert_eq!(named, known, "each setting has a line");
    assert_eq!(names.len(), named.len(), "and no more than one");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(".env");
    let text: String = lines.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    std::fs::write(&file, text).unwrap();
    let read = Settings::load(std::iter::empty(), Some(&file)).unwrap_or_else(|errors| panic!("{errors}"));
    let unset = Settings::load(std::iter::empty(), None).unwrap();
    // Of credentials it is shown only that there is one.
    let values = |settings: &Settings| -> Vec<_> {
        let shown = settings.effective().into_iter().map(|(name, value, _)| (name, value));
        shown.filter(|(name, _)| config::find(name).is_some_and(|variable| !variable.secret)).collect()
    };
    for (read, unset) in values(&read).into_iter().zip(values(&unset)) {
        assert_eq!(read, unset);
    }
    assert_eq!(read.warnings, unset.warnings);
}

/// What compose.yaml takes from `.env` is in the example, and the example has nothing that nobody takes.
#[test]
fn the_example_has_what_the_compose_file_takes() {
    let (example, compose) =
        (std::fs::read_to_string(ENV_EXAMPLE).unwrap(), std::fs::read_to_string(COMPOSE).unwrap());
    let taken: BTreeSet<&str> = compose
        .split("${")
        .skip(1)
        .filter_map(|rest| rest.split(|c: char| !c.is_ascii_uppercase() && c != '_').next())
        .collect();
    let (own, _) = example.split_once("# <settings>").unwrap();
    let own: BTreeSet<&str> = own.lines().filter_map(assignment).map(|(name, _)| name).collect();
    for name in &own {
        assert!(taken.contains(name), "compose.yaml does not take {name}");
        assert!(config::find(name).is_none(), "{name} is a setting of the programs");
    }
    for name in &taken {
        assert!(own.contains(name) || config::find(name).is_some(), "the example lacks {name}");
    }
    // The defaults are written in both.
    for (name, value) in example.lines().filter_map(assignment).filter(|(name, _)| own.contains(name)) {
        assert!(
            compose.contains(&format!("${{{name}:-{value}}}")),
            "compose.yaml has another default of {name}"
        );
    }
}

/// The name and value of a line that assigns, commented out or not.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.strip_prefix('#').unwrap_or(line).split_once('=')?;
    let name_like = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    (!name.is_empty() && name.chars().all(name_like)).then_some((name, value))
}

/// Each row of the fault matrix names tests that there are, or says that nothing shows it.
#[test]
fn the_fault_matrix_names_tests_that_exist() {
    let matrix = std::fs::read_to_string(FAULTS).unwrap();
    let mut rows = 0;
    for row in matrix.lines() {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let ["", _, _, shown, ""] = cells[..] else { continue };
        if shown == "shown by" || shown.starts_with("---") {
            continue;
        }
        rows += 1;
        let tests = named_tests(shown);
        assert!(!tests.is_empty() || shown.starts_with("not shown: "), "nothing shows it: {row}");
        for (file, function) in tests {
            assert!(is_test(&file, function), "there is no test {function} in {file}");
        }
    }
    assert!(rows > 100, "only {rows} rows were found");
}

/// Each threat names tests that there are.
#[test]
fn the_threats_name_tests_that_exist() {
    let text = std::fs::read_to_string(SECURITY).unwrap();
    let mut found = Vec::new();
    for row in text.lines() {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let ["", number, _, _, shown, ""] = cells[..] else { continue };
        if shown == "shown by" || shown.starts_with("---") {
            continue;
        }
        found.push(number.to_owned());
        let tests = named_tests(shown);
        assert!(!tests.is_empty(), "nothing shows it: {row}");
        for (file, function) in tests {
            assert!(is_test(&file, function), "there is no test {function} in {file}");
        }
    }
    let threats = (1..=THREATS).map(|number| format!("S{number}"));
    let weaknesses = (1..=WEAKNESSES).map(|number| format!("L{number}"));
    assert_eq!(found, threats.chain(weaknesses).collect::<Vec<_>>(), "each has a row, in order");
}

/// The tests that a text names: files and functions.
fn named_tests(text: &str) -> Vec<(String, &str)> {
    let quoted = text.split('`').skip(1).step_by(2);
    let tests = quoted.filter_map(|name| name.split_once(".rs::"));
    tests.map(|(file, function)| (format!("{file}.rs"), function)).collect()
}

/// Whether a file has such a test.
fn is_test(file: &str, function: &str) -> bool {
    let ours = file.starts_with("it/") || file.starts_with("cluster/");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(if ours { "tests" } else { ".." });
    let source = std::fs::read_to_string(folder.join(file)).unwrap_or_default();
    let Some((before, _)) = source.split_once(&format!("fn {function}(")) else { return false };
    // Its attributes stand between the last empty line and its name.
    let attributes = before.rsplit("\n\n").next().unwrap_or_default();
    attributes.contains("#[test]") || attributes.contains("#[tokio::test")
}

fn codes() -> String {
    let mut table = "| code | status | retryable | meaning |\n|---|---|---|---|\n".to_owned();
    for code in ErrorCode::ALL {
        let retryable = if code.retryable() { "yes" } else { "no" };
        let status = status(*code).as_u16();
        writeln!(table, "| `{code}` | {status} | {retryable} | {} |", code.meaning()).unwrap();
    }
    table
}

fn actions() -> String {
    let mut table = "| action | meaning |\n|---|---|\n".to_owned();
    for action in Action::ALL {
        writeln!(table, "| `{}` | {} |", action.as_str(), action.meaning()).unwrap();
    }
    table
}

fn attributes() -> String {
    let mut table = "| attribute | meaning |\n|---|---|\n".to_owned();
    for key in Key::ALL {
        writeln!(table, "| `{}` | {} |", key.as_str(), key.meaning()).unwrap();
    }
    table
}

fn limits_table() -> String {
    let mut table = "| limit | value | what it bounds |\n|---|---|---|\n".to_owned();
    for (name, value, meaning) in limits::entries() {
        writeln!(table, "| `{name}` | {value} | {meaning} |").unwrap();
    }
    table
}

fn replaced(text: &str, name: &str, table: &str) -> String {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("the README has no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("the README has no {end}"));
    format!("{before}{begin}{}\n{end}{after}", table.trim_end())
}
