//! How a server looks in answers.

use bytes::Bytes;
use mcp_shared::{
    error::WorkerError,
    server::{Isolation, Scaling, ServerRecord},
    worker_api::{ServerReport, ServerStatus},
};
use serde::Serialize;
use serde_json::{Map, Value, json, value::RawValue};

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

/// A server as a document. The tools stay the bytes that the server sent.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct View<'a> {
    #[serde(flatten)]
    fields: Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tools_list: Option<&'a RawValue>,
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

/// A server's record joined with what the workers know about it.
pub fn view<'a>(
    record: &ServerRecord,
    report: Option<&'a ServerReport>,
    detail: Detail,
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
    if let Value::Object(transport) =
        serde_json::to_value(&record.transport).map_err(WorkerError::internal)?
    {
        fields.extend(transport);
    }
    let optional = [
        ("secretNames", record.secret_names.as_ref().map(|names| json!(names))),
        ("startupTimeout", record.startup_timeout.map(Value::from)),
        ("toolTimeout", record.tool_timeout.map(Value::from)),
        ("idleTimeout", record.idle_timeout.map(Value::from)),
        ("concurrency", record.concurrency.map(Value::from)),
        ("instanceLimit", record.instances.map(Value::from)),
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
    if detail == Detail::Full {
        for name in NULLABLE {
            fields.entry(name).or_insert(Value::Null);
        }
    }
    let tools = report.and_then(|report| report.tools.as_ref());
    let tools_list = tools.map(|tools| tools.read()).transpose().map_err(WorkerError::internal)?;
    Ok(View { fields, tools_list, logs: report.map(|report| report.logs.as_slice()).unwrap_or_default() })
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
