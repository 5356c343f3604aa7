//! The tables of the README are made from the code, and this is what makes and checks them. The fault matrix is
//! written by hand, as are the threats, and this is what keeps them from naming tests that are gone.

use std::{fmt::Write, path::Path};

use mcp_shared::{audit::Action, config, error::ErrorCode, limits, metrics, trace::Key};

use crate::problem::status;

const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
const FAULTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/FAULTS.md");
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
