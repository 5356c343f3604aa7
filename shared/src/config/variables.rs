//! What a variable is, and how the table of them is shown in `--help` and in the README.

use std::fmt::Write;

use super::table::VARIABLES;

/// What this version does with a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// It is used.
    Now,
    /// It is known and accepted, and does nothing yet.
    Later,
}

/// The heading under which a variable is explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Where the program listens and whom it answers.
    Http,
    /// Who is let in.
    Auth,
    /// How much is taken in at once.
    Limits,
    /// Where data is kept.
    Storage,
    /// How secrets are encrypted.
    Secrets,
    /// What is logged and how.
    Logging,
    /// What is told of calls to a collector of traces.
    Traces,
    /// Who did what.
    Audit,
    /// Which programs may be servers.
    Children,
    /// Packages and built-in tools.
    Packages,
    /// Remote servers and logins to them.
    Remote,
    /// Many machines, and MongoDB.
    Cluster,
}

impl Group {
    /// All groups, in the order in which they are explained.
    pub const ALL: &'static [Group] = &[
        Group::Http,
        Group::Auth,
        Group::Limits,
        Group::Storage,
        Group::Secrets,
        Group::Logging,
        Group::Traces,
        Group::Audit,
        Group::Children,
        Group::Packages,
        Group::Remote,
        Group::Cluster,
    ];

    /// The heading.
    pub fn title(self) -> &'static str {
        match self {
            Group::Http => "Listening",
            Group::Auth => "Authentication",
            Group::Limits => "Limits",
            Group::Storage => "Storage",
            Group::Secrets => "Secrets",
            Group::Logging => "Logging",
            Group::Traces => "Traces",
            Group::Audit => "Audit",
            Group::Children => "Programs that may be servers",
            Group::Packages => "Packages and built-in tools",
            Group::Remote => "Remote servers",
            Group::Cluster => "Clusters and MongoDB",
        }
    }
}

/// One environment variable that the program knows.
#[derive(Debug, Clone, Copy)]
pub struct Variable {
    /// Its name in the environment.
    pub name: &'static str,
    /// What holds when it is unset, as people read it; empty where nothing holds. For a variable that is
    /// always in effect this text is also what the program itself parses.
    pub default: &'static str,
    /// The heading it belongs to.
    pub group: Group,
    /// What it does, in a sentence or two.
    pub help: &'static str,
    /// Whether its value is never shown, because it is or may contain a credential.
    pub secret: bool,
    /// What this version does with it.
    pub used: Since,
}

/// The table's entry for a name.
pub fn find(name: &str) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| variable.name == name)
}

impl Variable {
    /// The help sentence and what this version does with the variable.
    fn meaning(&self) -> String {
        match self.used {
            Since::Now => self.help.to_owned(),
            Since::Later => format!("{} Accepted, but not used by this version.", self.help),
        }
    }
}

/// Columns that [`help_text`] uses at most.
const WIDTH: usize = 100;
/// The column in which its explanations begin. Most names and two spaces fit before it; after others it begins on a
/// line of its own.
const INDENT: usize = 28;

/// The table for `--help`: by group, wrapped to 100 columns.
pub fn help_text() -> String {
    let mut out = String::from("Environment variables (also read from a .env file):\n");
    for group in Group::ALL {
        let _ = writeln!(out, "\n{}:", group.title());
        for variable in VARIABLES.iter().filter(|variable| variable.group == *group) {
            let mut text = variable.meaning();
            if !variable.default.is_empty() {
                let _ = write!(text, " [default: {}]", variable.default);
            }
            let mut line = format!("  {:<width$}", variable.name, width = INDENT - 2);
            if variable.name.len() + 4 > INDENT {
                out.push_str(&line);
                out.push('\n');
                line = " ".repeat(INDENT);
            }
            let mut empty = true;
            // Lists without spaces may be longer than a line, so commas are places to break at as well.
            for piece in text.split_inclusive([' ', ',']) {
                if !empty && line.chars().count() + piece.trim_end().chars().count() > WIDTH {
                    out.push_str(line.trim_end());
                    out.push('\n');
                    line = " ".repeat(INDENT);
                    empty = true;
                }
                if !(empty && piece == " ") {
                    line.push_str(piece);
                    empty = false;
                }
            }
            out.push_str(&line);
            out.push('\n');
        }
    }
    out
}

/// The table for the README, as GitHub's Markdown.
pub fn markdown_table() -> String {
    let mut out = String::from("| variable | default | meaning |\n|---|---|---|\n");
    for group in Group::ALL {
        for variable in VARIABLES.iter().filter(|variable| variable.group == *group) {
            let default = match variable.default {
                "" => "unset".to_owned(),
                prose if prose.contains(' ') => prose.to_owned(),
                // A bar ends a cell even inside code, unless it is escaped.
                value => format!("`{}`", value.replace('|', "\\|")),
            };
            let _ = writeln!(out, "| `{}` | {default} | {} |", variable.name, variable.meaning());
        }
    }
    out
}

/// Every variable with its default, as lines of a `.env` file that are commented out: by group, wrapped to 100 columns.
/// What is no value but the description of one stands before the line, and not in it.
pub fn dotenv_example() -> String {
    let mut out = String::new();
    for group in Group::ALL {
        let _ = writeln!(out, "# {} {}", group.title(), "-".repeat(WIDTH - 3 - group.title().len()));
        for variable in VARIABLES.iter().filter(|variable| variable.group == *group) {
            let mut text = variable.meaning();
            let value = if variable.default.contains(' ') {
                let _ = write!(text, " Default: {}.", variable.default);
                ""
            } else {
                variable.default
            };
            out.push('\n');
            let mut line = String::from("#");
            for word in text.split_whitespace() {
                if line.len() > 1 && line.chars().count() + 1 + word.chars().count() > WIDTH {
                    out.push_str(&line);
                    out.push('\n');
                    line = String::from("#");
                }
                line.push(' ');
                line.push_str(word);
            }
            let _ = writeln!(out, "{line}\n#{}={value}", variable.name);
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_every_group_lists_some() {
        let names: std::collections::HashSet<_> = VARIABLES.iter().map(|variable| variable.name).collect();
        assert_eq!(names.len(), VARIABLES.len());
        for group in Group::ALL {
            assert!(VARIABLES.iter().any(|variable| variable.group == *group), "{group:?}");
        }
        assert!(find("PORT").is_some() && find("port").is_none());
    }

    #[test]
    fn help_names_everything_and_fits() {
        let help = help_text();
        for variable in VARIABLES {
            let line = help.lines().find_map(|line| line.strip_prefix("  ")?.strip_prefix(variable.name));
            assert!(line.is_some_and(|rest| rest.is_empty() || rest.starts_with(' ')), "{}", variable.name);
            assert!(variable.help.ends_with('.'), "{}", variable.name);
        }
        for line in help.lines() {
            assert!(line.chars().count() <= WIDTH && line.trim_end() == line, "{line}");
        }
        let words: Vec<_> = help.split_whitespace().collect();
        assert!(
            words.join(" ").contains("from 1kb to 1gb. [default: 6mb] SHUTDOWN_TIMEOUT_SECONDS How long")
        );
    }

    #[test]
    fn the_markdown_table_has_three_cells_a_row() {
        let table = markdown_table();
        assert_eq!(table.lines().count(), VARIABLES.len() + 2);
        for line in table.lines() {
            assert_eq!(line.replace("\\|", "").matches('|').count(), 4, "{line}");
        }
        assert!(table.contains("mcp-github\\|github"));
        assert!(table.contains("| `PORT` | `8080` | HTTP server port"));
    }
}
