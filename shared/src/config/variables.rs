//! The normative table of settings. Reading them, `--help` and the README all come from here.

use std::fmt::Write;

/// What this version does with a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// It is used.
    Now,
    /// It is known and accepted, and does nothing yet.
    Later,
    /// It is known, and setting it is an error: running on without it would lose what it asks for.
    Refused,
}

/// The heading under which a variable is explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Where the program listens and whom it answers.
    Http,
    /// Where data is kept.
    Storage,
    /// How secrets are encrypted.
    Secrets,
    /// What is logged and how.
    Logging,
    /// Packages and built-in tools.
    Packages,
    /// Many machines, and MongoDB.
    Cluster,
}

impl Group {
    /// All groups, in the order in which they are explained.
    pub const ALL: &'static [Group] =
        &[Group::Http, Group::Storage, Group::Secrets, Group::Logging, Group::Packages, Group::Cluster];

    /// The heading.
    pub fn title(self) -> &'static str {
        match self {
            Group::Http => "Listening",
            Group::Storage => "Storage",
            Group::Secrets => "Secrets",
            Group::Logging => "Logging",
            Group::Packages => "Packages and built-in tools",
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

const fn plain(
    name: &'static str,
    default: &'static str,
    group: Group,
    used: Since,
    help: &'static str,
) -> Variable {
    Variable { name, default, group, help, secret: false, used }
}

const fn secret(
    name: &'static str,
    default: &'static str,
    group: Group,
    used: Since,
    help: &'static str,
) -> Variable {
    Variable { name, default, group, help, secret: true, used }
}

/// Every variable that the program knows, in the order of the documentation.
pub const VARIABLES: &[Variable] = &[
    plain(
        "HOST",
        "127.0.0.1",
        Group::Http,
        Since::Now,
        "Address to listen on. Anything but loopback is refused unless AUTH=none is set as well.",
    ),
    plain("PORT", "8080", Group::Http, Since::Now, "HTTP server port; 0 picks a free one and logs it."),
    plain(
        "AUTH",
        "none on loopback",
        Group::Http,
        Since::Now,
        "Who is let in. The only value of this version is none: something in front authenticates, or \
         everyone who can connect is trusted.",
    ),
    plain(
        "ALLOWED_HOSTS",
        "loopback names",
        Group::Http,
        Since::Now,
        "Host names, comma-separated, that requests may be addressed to besides the loopback names. A name \
         without a port stands for every port.",
    ),
    plain(
        "ALLOWED_ORIGINS",
        "loopback names",
        Group::Http,
        Since::Now,
        "Origins of web pages, comma-separated, that may send requests besides those on loopback names, \
         such as https://app.example.com.",
    ),
    plain(
        "PAYLOAD_LIMIT",
        "6mb",
        Group::Http,
        Since::Now,
        "Maximum request body size: bytes, or a number with b, kb, mb or gb; from 1kb to 1gb.",
    ),
    plain(
        "SHUTDOWN_TIMEOUT_SECONDS",
        "30",
        Group::Http,
        Since::Now,
        "How long calls in flight have to finish when the program stops; from 1 to 600.",
    ),
    plain(
        "DATA_DIR",
        "./data",
        Group::Storage,
        Since::Now,
        "Folder of the embedded store, the generated key and the packages.",
    ),
    secret(
        "SECRETS_KEY",
        "generated on a single node",
        Group::Secrets,
        Since::Now,
        "Key that encrypts secrets: 32 bytes in hex or base64, or a long passphrase.",
    ),
    plain(
        "SECRETS_KEYS_FILE",
        "",
        Group::Secrets,
        Since::Now,
        "File with a key ring instead of SECRETS_KEY: lines of kid:base64 of 32 bytes, the first one \
         encrypts.",
    ),
    plain(
        "LEGACY_SECRETS",
        "rw where such values exist, else off",
        Group::Secrets,
        Since::Now,
        "Secrets in the format of earlier versions: rw reads and writes them, ro reads them, off refuses \
         them.",
    ),
    plain(
        "DEBUG",
        "false",
        Group::Logging,
        Since::Now,
        "Enable debug logging of this program's own parts, unless RUST_LOG says more.",
    ),
    plain(
        "LOG_FORMAT",
        "auto",
        Group::Logging,
        Since::Now,
        "pretty for people, json for one JSON object a line; auto is pretty on a terminal, else json.",
    ),
    plain(
        "RUST_LOG",
        "info",
        Group::Logging,
        Since::Now,
        "Log filter, such as info or mcp_gateway=debug,warn.",
    ),
    plain(
        "INSTALL_ON_START",
        "@missionsquad/mcp-github|github,@missionsquad/mcp-helper-tools|helper-tools",
        Group::Packages,
        Since::Later,
        "Packages to auto-install on first run.",
    ),
    plain(
        "SEARXNG_URL",
        "",
        Group::Packages,
        Since::Later,
        "SearXNG instance URL for the built-in web search tool.",
    ),
    plain(
        "EGRESS_ALLOW",
        "",
        Group::Packages,
        Since::Later,
        "Hosts and networks, comma-separated, that requests steered by users may reach although they are \
         private.",
    ),
    plain(
        "PYTHON_BIN",
        "",
        Group::Packages,
        Since::Later,
        "Path to the Python executable; python3, then python when unset.",
    ),
    plain(
        "PYTHON_VENV_DIR",
        "packages/python",
        Group::Packages,
        Since::Later,
        "Base directory for Python virtual environments; the default is below DATA_DIR.",
    ),
    secret("PIP_INDEX_URL", "", Group::Packages, Since::Later, "Custom PyPI index URL for pip."),
    secret("PIP_EXTRA_INDEX_URL", "", Group::Packages, Since::Later, "Additional PyPI index URL for pip."),
    secret(
        "GOOGLE_OAUTH_CREDENTIALS",
        "",
        Group::Packages,
        Since::Later,
        "Full Google OAuth credentials JSON (single-line string) for the Stdio OAuth2 flow.",
    ),
    secret("NATS_URL", "", Group::Cluster, Since::Refused, "NATS server that connects gateways and workers."),
    plain("NATS_CREDS", "", Group::Cluster, Since::Later, "Credentials file for NATS."),
    plain("NATS_NKEY_SEED_FILE", "", Group::Cluster, Since::Later, "NKey seed file for NATS."),
    plain(
        "WORKER_PORT",
        "9090",
        Group::Cluster,
        Since::Later,
        "Port of a worker's health and metrics; 0 picks a free one and logs it.",
    ),
    secret(
        "MONGODB_URI",
        "",
        Group::Cluster,
        Since::Refused,
        "Full MongoDB connection string; wins over MONGO_HOST, MONGO_USER and MONGO_PASS.",
    ),
    secret(
        "MONGO_HOST",
        "",
        Group::Cluster,
        Since::Refused,
        "MongoDB host and port, or a full mongodb:// URI; the embedded store when unset.",
    ),
    plain("MONGO_USER", "root", Group::Cluster, Since::Later, "MongoDB username."),
    secret("MONGO_PASS", "example", Group::Cluster, Since::Later, "MongoDB password."),
    plain(
        "MONGO_DBNAME",
        "squad-test",
        Group::Cluster,
        Since::Later,
        "MongoDB database name for MCP server records and packages.",
    ),
    plain(
        "MONGO_REPLICASET",
        "",
        Group::Cluster,
        Since::Later,
        "MongoDB replica set name, for replica set connections.",
    ),
    plain(
        "SECRETS_DBNAME",
        "secrets",
        Group::Cluster,
        Since::Later,
        "MongoDB database name for encrypted secrets.",
    ),
];

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
            Since::Refused => format!("{} Not part of this version: setting it is an error.", self.help),
        }
    }
}

/// Columns that [`help_text`] uses at most.
const WIDTH: usize = 100;
/// The column in which its explanations begin; the longest name and two spaces fit before it.
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
            assert!(help.contains(&format!("\n  {} ", variable.name)), "{}", variable.name);
            assert!(variable.name.len() + 4 <= INDENT, "{}", variable.name);
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
