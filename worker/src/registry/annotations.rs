//! What servers say of their tools, where an administrator has said that they are to be believed.

use std::collections::HashSet;

use mcp_shared::{ids::ToolName, json::RawJson};
use serde::Deserialize;

/// The tools that may be called again when nobody knows what became of a call: those that say of themselves that
/// they only read, or that doing it twice is like doing it once.
#[derive(Debug, Default)]
pub struct Repeatable(HashSet<String>);

#[derive(Deserialize)]
struct Tool {
    name: String,
    #[serde(default)]
    annotations: Option<Annotations>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Annotations {
    #[serde(default)]
    read_only_hint: Option<bool>,
    #[serde(default)]
    idempotent_hint: Option<bool>,
}

impl Repeatable {
    /// Those of a listing. A tool that cannot be read is not among them.
    pub fn of(tools: Option<&RawJson>) -> Self {
        let listed: Vec<&serde_json::value::RawValue> =
            tools.and_then(|tools| tools.read().ok()).unwrap_or_default();
        let tools = listed.into_iter().filter_map(|tool| serde_json::from_str::<Tool>(tool.get()).ok());
        let repeatable = tools.filter(|tool| {
            tool.annotations
                .as_ref()
                .is_some_and(|said| said.read_only_hint == Some(true) || said.idempotent_hint == Some(true))
        });
        Self(repeatable.map(|tool| tool.name).collect())
    }

    /// Whether a tool is among them.
    pub fn contains(&self, tool: &ToolName) -> bool {
        self.0.contains(tool.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_says_so_may_be_repeated() {
        let tools = RawJson::parse(
            r#"[{"name": "reads", "annotations": {"readOnlyHint": true}},
                {"name": "sets", "annotations": {"readOnlyHint": false, "idempotentHint": true}},
                {"name": "adds", "annotations": {"destructiveHint": false}},
                {"name": "odd", "annotations": {"readOnlyHint": "true"}},
                {"name": "null", "annotations": null}, {"name": "plain"}, 7]"#,
        )
        .unwrap();
        let repeatable = Repeatable::of(Some(&tools));
        let has = |name: &str| repeatable.contains(&ToolName::parse(name).unwrap());
        assert!(has("reads") && has("sets"));
        assert!(!has("adds") && !has("odd") && !has("null") && !has("plain"));
        assert!(!Repeatable::of(None).contains(&ToolName::parse("reads").unwrap()));
    }
}
