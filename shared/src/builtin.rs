//! Servers that are part of the program. They run in every worker, are always connected, and stand beside those that
//! are registered; nobody can change or remove them, or take their names.

use serde_json::Map;

use crate::{
    ids::ServerName,
    server::{Isolation, Scaling, ServerRecord, Transport, Variables},
    timestamp::Timestamp,
};

/// The tools for the web.
pub const WEBTOOLS: &str = "webtools";
/// What stands in a record where others have their program, as in mcp-api.
const COMMAND: &str = "built-in";

/// The names of all of them.
pub const NAMES: [&str; 1] = [WEBTOOLS];

/// Whether this is the name of one of them.
pub fn is_builtin(name: &ServerName) -> bool {
    NAMES.contains(&name.as_str())
}

/// Whether nobody else may have this name: names must differ in more than case.
pub fn is_reserved(name: &ServerName) -> bool {
    NAMES.iter().any(|builtin| name.as_str().eq_ignore_ascii_case(builtin))
}

/// All of them, as records.
pub fn records() -> impl Iterator<Item = ServerRecord> {
    NAMES.iter().map(|name| record(ServerName::from_stored(*name)))
}

/// One of them, if it is one, as a record. It is stored nowhere.
pub fn find(name: &ServerName) -> Option<ServerRecord> {
    is_builtin(name).then(|| record(name.clone()))
}

fn record(name: ServerName) -> ServerRecord {
    ServerRecord {
        // It is the same on every node and in every version.
        id: "0".repeat(24),
        display_name: name.as_str().to_owned(),
        description: "Searches the web, and reads pages of it as Markdown".to_owned(),
        name,
        source: "platform".to_owned(),
        auth_mode: "none".to_owned(),
        secret_fields: Vec::new(),
        created_at: Timestamp::from_millis(0),
        updated_at: Timestamp::from_millis(0),
        transport: Transport::Stdio {
            command: COMMAND.to_owned(),
            args: Vec::new(),
            env: Variables::default(),
        },
        secret_names: None,
        enabled: true,
        startup_timeout: None,
        tool_timeout: None,
        idle_timeout: None,
        isolation: Isolation::Shared,
        scaling: Scaling::Replicated,
        secret_env: Default::default(),
        concurrency: None,
        instances: None,
        // They only read: whatever is lost on the way may be asked for once more.
        trust_annotations: true,
        oauth_client: None,
        package: None,
        extra: Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_builtin_servers_are_nobody_elses() {
        let name = |text: &str| ServerName::from_stored(text);
        assert!(is_builtin(&name("webtools")) && is_reserved(&name("webtools")));
        assert!(!is_builtin(&name("WebTools")) && is_reserved(&name("WebTools")));
        assert!(!is_reserved(&name("webtools2")) && find(&name("WebTools")).is_none());
        let all: Vec<_> = records().map(|record| record.name).collect();
        assert_eq!(all, [name("webtools")]);
    }
}
