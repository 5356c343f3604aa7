//! How packages and jobs look in answers.

use std::cmp::Ordering;

use bytes::Bytes;
use mcp_shared::{
    error::WorkerError,
    package::{Job, PackageRecord, Runtime, versions},
};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::{problem::Problem, routes::server_view::View};

/// Fields that Python packages always have, as `null` when they are not set.
const NULLABLE: [&str; 3] = ["pipDependencies", "pipIndexUrl", "pipExtraIndexUrl"];
/// Fields whose addresses may have credentials in records that mcp-api made.
const ADDRESSES: [&str; 2] = ["pipIndexUrl", "pipExtraIndexUrl"];

/// A package as a document.
pub fn package(record: &PackageRecord) -> Result<Map<String, Value>, Problem> {
    let mut fields = object(record)?;
    // The installed version may have changed since somebody asked for the latest one.
    if let Some(latest) = &record.latest_version
        && let Some(order) = versions::compare(record.runtime, latest, &record.version)
    {
        fields.insert("updateAvailable".to_owned(), json!(order == Ordering::Greater));
    }
    if record.runtime == Runtime::Python {
        for name in NULLABLE {
            fields.entry(name).or_insert(Value::Null);
        }
    }
    hide_credentials(&mut fields);
    Ok(fields)
}

/// A job as a document, with or without what it said. The server that it is to register is left out: it has
/// values of variables.
pub fn job(job: &Job, log: bool) -> Result<Map<String, Value>, Problem> {
    let mut fields = object(job)?;
    for name in ["server", "previous", "active", "notBefore"] {
        fields.shift_remove(name);
    }
    if !log {
        fields.shift_remove("log");
        fields.shift_remove("logDropped");
    }
    if let Some(Value::Object(spec)) = fields.get_mut("spec") {
        hide_credentials(spec);
    }
    Ok(fields)
}

/// `{"success":true,"package":...,"server":...}` as bytes.
pub fn installed(package: &Map<String, Value>, server: &View<'_>) -> Result<Bytes, Problem> {
    #[derive(Serialize)]
    struct Document<'a> {
        success: bool,
        package: &'a Map<String, Value>,
        server: &'a View<'a>,
    }
    let document = Document { success: true, package, server };
    serde_json::to_vec(&document).map(Bytes::from).map_err(|error| WorkerError::internal(error).into())
}

fn object(value: &impl Serialize) -> Result<Map<String, Value>, Problem> {
    match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(WorkerError::internal("a record is no object").into()),
        Err(error) => Err(WorkerError::internal(error).into()),
    }
}

/// New records have no credentials in addresses; mcp-api accepted them.
fn hide_credentials(fields: &mut Map<String, Value>) {
    for name in ADDRESSES {
        if let Some(Value::String(address)) = fields.get_mut(name)
            && let Some((before, after)) = address.rsplit_once('@')
        {
            let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
            *address = format!("{scheme}://***@{after}");
        }
    }
}

#[cfg(test)]
mod tests {
    use mcp_shared::{
        ids::ServerName,
        package::{JobKind, PackageSpec},
        server::{Transport, Variables},
        timestamp::Timestamp,
    };

    use super::*;
    use crate::routes::server_input::plain;

    fn record(more: Value) -> PackageRecord {
        let mut record = json!({
            "name": "time", "version": "1.9.0", "installPath": "packages/python/time", "status": "installed",
            "installed": Timestamp::from_millis(0), "mcpServerId": "time", "enabled": true,
        });
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(record).unwrap()
    }

    #[test]
    fn a_package_is_shown_as_recorded() {
        let shown = package(&record(json!({}))).unwrap();
        assert_eq!(
            Value::Object(shown),
            json!({
                "name": "time", "version": "1.9.0", "installPath": "packages/python/time",
                "status": "installed", "installed": "1970-01-01T00:00:00.000Z", "mcpServerId": "time",
                "enabled": true, "runtime": "node",
            })
        );
        let shown = package(&record(json!({
            "runtime": "python", "latestVersion": "1.10.0", "updateAvailable": false, "error": "old",
            "pipIndexUrl": "https://user:canary@pypi.example.org/simple",
        })))
        .unwrap();
        assert_eq!(shown["updateAvailable"], true);
        assert_eq!((&shown["pipDependencies"], &shown["error"]), (&Value::Null, &json!("old")));
        assert_eq!(shown["pipIndexUrl"], "https://***@pypi.example.org/simple");
        // mcp-api writes words where a version should stand.
        let shown = package(&record(json!({"latestVersion": "unknown", "updateAvailable": false}))).unwrap();
        assert_eq!(shown["updateAvailable"], false);
    }

    #[test]
    fn a_job_shows_no_variables() {
        let name = ServerName::from_stored("time");
        let env = Variables([("KEY".to_owned(), "canary".to_owned())].into());
        let server = plain(name.clone(), Transport::Stdio { command: String::new(), args: vec![], env });
        let spec =
            PackageSpec { pip_index_url: Some("https://canary@x/".to_owned()), ..PackageSpec::default() };
        let mut one = Job::new(JobKind::Install, name, spec, Some(server));
        one.note("a line");
        let shown = Value::Object(job(&one, true).unwrap());
        assert!(!shown.to_string().contains("canary"), "{shown}");
        assert_eq!((&shown["state"], &shown["log"]), (&json!("queued"), &json!(["a line"])));
        assert!(job(&one, false).unwrap().get("log").is_none());
    }
}
