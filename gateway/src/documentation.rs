//! The tables of the README are made from the code, and this is what makes and checks them.

use std::fmt::Write;

use mcp_shared::{config, error::ErrorCode, limits};

use crate::problem::status;

const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");

#[test]
fn the_readme_has_the_tables_of_this_version() {
    let old = std::fs::read_to_string(README).unwrap();
    let mut new = old.clone();
    for (name, table) in
        [("variables", config::markdown_table()), ("codes", codes()), ("limits", limits_table())]
    {
        new = replaced(&new, name, &table);
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(README, &new).unwrap();
    } else {
        assert_eq!(old, new, "the tables are out of date; CONTRIBUTING.md says how to make them anew");
    }
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
