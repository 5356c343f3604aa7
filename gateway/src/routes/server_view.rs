//! How a server looks in answers.

use bytes::Bytes;
use mcp_shared::{
    builtin,
    error::WorkerError,
    json::RawJson,
    listing::{ToolPins, tame, tame_name},
    remote::GivenClient,
    server::{Isolation, Scaling, ServerRecord, looks_secret},
    store::Versioned,
    worker_api::{ServerReport, ServerStatus},
};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::problem::Problem;

/// Fields that answers about one server always have, as `null` when they are not set.
const NULLABLE: [&str; 11] = [
    "id",
    "homepageUrl",
    "repositoryUrl",
    "licenseName",
    "catalogProvider",
    "catalogId",
    "createdBy",
    "secretNames",
    "secretName",
    "startupTimeout",
    "oauthTemplate",
];

/// What stands in the place of a value that is not shown.
const MASK: &str = "********";

/// A server as a document. The tools stay the bytes that the server sent, less what nobody could see.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct View<'a> {
    #[serde(flatten)]
    fields: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools_list: Option<RawJson>,
    logs: &'a [String],
}

/// Whether fields that are not set appear as `null`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// Lists and the answer to a registration leave them out.
    Summary,
    /// Answers about one existing server have them.
    Full,
}

/// Who looks at an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Viewer {
    /// Whether all that is configured may be seen.
    pub admin: bool,
}

/// A server's record joined with what the workers know about it.
pub fn view<'a>(
    record: &ServerRecord,
    report: Option<&'a ServerReport>,
    detail: Detail,
    viewer: Viewer,
) -> Result<View<'a>, Problem> {
    let mut fields = record.extra.clone();
    let own = [
        ("_id", json!(record.id)),
        ("name", json!(record.name)),
        ("displayName", json!(record.display_name)),
        ("description", json!(record.description)),
        ("source", json!(record.source)),
        ("authMode", json!(record.auth_mode)),
        ("secretFields", json!(record.secret_fields)),
        ("createdAt", json!(record.created_at)),
        ("updatedAt", json!(record.updated_at)),
        ("enabled", json!(record.enabled)),
        ("isolation", json!(record.isolation)),
        ("scaling", json!(record.scaling)),
    ];
    fields.extend(own.map(|(name, value)| (name.to_owned(), value)));
    if record.isolation == Isolation::Shared {
        fields.remove("isolation");
    }
    if record.scaling == Scaling::Replicated {
        fields.remove("scaling");
    }
    if let Value::Object(mut transport) =
        serde_json::to_value(&record.transport).map_err(WorkerError::internal)?
    {
        // Whoever has it has the session.
        transport.remove("sessionId");
        fields.extend(transport);
    }
    if !viewer.admin {
        // Also those that a record keeps from the time before it had another transport.
        for field in ["env", "headers"] {
            fields.entry(field).and_modify(mask);
        }
    }
    let optional = [
        ("secretNames", record.secret_names.as_ref().map(|names| json!(names))),
        ("startupTimeout", record.startup_timeout.map(Value::from)),
        ("toolTimeout", record.tool_timeout.map(Value::from)),
        ("idleTimeout", record.idle_timeout.map(Value::from)),
        ("concurrency", record.concurrency.map(Value::from)),
        ("instanceLimit", record.instances.map(Value::from)),
        ("trustAnnotations", record.trust_annotations.then_some(Value::Bool(true))),
        ("oauthClient", record.oauth_client.as_ref().map(client)),
        ("secretEnv", (!record.secret_env.is_empty()).then(|| json!(record.secret_env))),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            fields.insert(name.to_owned(), value);
        }
    }
    let status = match report {
        Some(report) if record.enabled => report.status,
        _ => ServerStatus::Disconnected,
    };
    fields.insert("status".to_owned(), json!(status));
    fields.insert(
        "instances".to_owned(),
        json!(report.map(|report| report.instances.as_slice()).unwrap_or_default()),
    );
    if builtin::is_builtin(&record.name) {
        // Nobody registered it.
        for name in ["_id", "createdAt", "updatedAt", "trustAnnotations"] {
            fields.remove(name);
        }
    }
    if detail == Detail::Full {
        for name in NULLABLE {
            fields.entry(name).or_insert(Value::Null);
        }
    }
    let tools_list = report.and_then(|report| report.tools.as_ref()).map(tame);
    Ok(View { fields, tools_list, logs: report.map(|report| report.logs.as_slice()).unwrap_or_default() })
}

impl View<'_> {
    /// With the tools that are not what they were when they were pinned, if there are any.
    pub fn with_changed_tools(mut self, pins: &[Versioned<ToolPins>]) -> Self {
        let changed: Vec<_> = pins.iter().flat_map(|pins| changed_tools(&pins.value)).collect();
        if !changed.is_empty() {
            self.fields.insert("toolsChanged".to_owned(), changed.into());
        }
        self
    }
}

fn changed_tools(pins: &ToolPins) -> impl Iterator<Item = Value> {
    pins.changed.iter().map(|(name, tool)| {
        let change = match (pins.tools.contains_key(name), &tool.now) {
            (_, None) => "removed",
            (true, Some(_)) => "changed",
            (false, Some(_)) => "added",
        };
        let mut shown = json!({"name": tame_name(name), "change": change, "since": tool.at});
        if let (Some(user), Some(fields)) = (&pins.username, shown.as_object_mut()) {
            fields.insert("username".to_owned(), json!(user));
        }
        shown
    })
}

/// What an authorization server knows us by, without what proves it.
fn client(client: &GivenClient) -> Value {
    json!({"clientId": client.client_id, "scopes": client.scopes})
}

/// Hides the values of variables or headers whose names look as if they were secret.
pub fn mask(variables: &mut Value) {
    let Value::Object(variables) = variables else { return };
    for (name, value) in variables {
        if looks_secret(name) {
            *value = MASK.into();
        }
    }
}

/// `{"success":true, NAME: ...}` as bytes.
pub fn document(name: &str, value: &impl Serialize) -> Result<Bytes, Problem> {
    #[derive(Serialize)]
    struct Document<'a, T> {
        success: bool,
        #[serde(flatten)]
        rest: std::collections::BTreeMap<&'a str, &'a T>,
    }
    let document = Document { success: true, rest: [(name, value)].into() };
    serde_json::to_vec(&document).map(Bytes::from).map_err(|error| WorkerError::internal(error).into())
}

#[cfg(test)]
mod tests {
    use mcp_shared::ids::ServerName;

    use super::*;
    use crate::routes::server_input::plain;

    fn shown(record: &ServerRecord, admin: bool) -> Value {
        serde_json::to_value(view(record, None, Detail::Full, Viewer { admin }).ok()).unwrap()
    }

    fn remote() -> ServerRecord {
        let transport = json!({
            "transportType": "streamable_http", "url": "https://mcp.example.org/mcp", "sessionId": "canary",
            "headers": {"Authorization": "Bearer x", "X-Api-Key": "x", "X-Custom-Header": "v", "X-Monkey": "m"},
        });
        let name = ServerName::from_stored("remote");
        let mut record = plain(name, serde_json::from_value(transport).unwrap());
        record.oauth_client = Some(GivenClient {
            client_id: "id".to_owned(),
            client_secret: Some("canary".to_owned()),
            scopes: vec!["a".to_owned()],
        });
        record
    }

    #[test]
    fn what_looks_secret_is_masked_for_all_but_admins() {
        let (admin, other) = (shown(&remote(), true), shown(&remote(), false));
        assert_eq!(admin["headers"]["Authorization"], "Bearer x");
        assert_eq!(
            other["headers"],
            json!({
                "Authorization": MASK, "X-Api-Key": MASK, "X-Custom-Header": "v", "X-Monkey": "m",
            })
        );
        assert_eq!((&admin["url"], &admin["name"]), (&other["url"], &other["name"]));

        let transport =
            json!({"transportType": "stdio", "command": "node", "env": {"A": "b", "GITHUB_PAT": "x"}});
        let mut stdio = plain(ServerName::from_stored("stdio"), serde_json::from_value(transport).unwrap());
        stdio.extra.insert("headers".to_owned(), json!({"Cookie": "x"}));
        assert_eq!(shown(&stdio, true)["env"]["GITHUB_PAT"], "x");
        let other = shown(&stdio, false);
        assert_eq!(
            (&other["env"], &other["headers"]),
            (&json!({"A": "b", "GITHUB_PAT": MASK}), &json!({"Cookie": MASK}))
        );
    }

    #[test]
    fn credentials_are_shown_to_nobody() {
        for admin in [true, false] {
            let shown = shown(&remote(), admin);
            assert!(!shown.to_string().contains("canary"), "{shown}");
            assert_eq!(shown["oauthClient"], json!({"clientId": "id", "scopes": ["a"]}));
        }
    }
}
