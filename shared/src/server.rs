//! The record of an MCP server: what it is, how it is started, how it may be used.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    ids::{SecretName, ServerName},
    limits,
    package::PackageRef,
    remote::{GivenClient, Reconnection},
    timestamp::Timestamp,
};

/// Environment variables or HTTP headers of a server. Values never appear in debug output.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Variables(pub BTreeMap<String, String>);

impl fmt::Debug for Variables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Parts of names of which it is known what they stand for, wherever in a name they are.
const SECRET_WORDS: [&str; 15] = [
    "secret",
    "token",
    "passw",
    "passphrase",
    "credential",
    "authorization",
    "cookie",
    "apikey",
    "api_key",
    "access_key",
    "private_key",
    "signature",
    "session",
    "bearer",
    "jwt",
];
/// The same, only as whole words: others have them inside.
const SECRET_PARTS: [&str; 7] = ["key", "auth", "pass", "pwd", "pat", "dsn", "sas"];

/// Whether the value of a variable or header of this name is one that not everybody should see.
pub fn looks_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace('-', "_");
    SECRET_WORDS.iter().any(|word| name.contains(word))
        || name.split('_').any(|part| SECRET_PARTS.contains(&part))
}

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "transportType", rename_all = "snake_case", rename_all_fields = "camelCase")]
pub enum Transport {
    /// A child process of a worker, spoken to over its standard input and output.
    Stdio {
        /// The program: a path, or a name looked up in `PATH`. No shell reads it.
        command: String,
        /// Its arguments, passed as they are.
        #[serde(default)]
        args: Vec<String>,
        /// Variables added to the child's small default environment.
        #[serde(default)]
        env: Variables,
    },
    /// A remote server over MCP's streamable HTTP transport.
    StreamableHttp {
        /// The MCP endpoint.
        url: String,
        /// Static headers of every request.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        headers: Option<Variables>,
        /// A session to resume.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        session_id: Option<String>,
        /// When and how often to reconnect.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reconnection_options: Option<Map<String, Value>>,
    },
}

/// Who shares a running server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// All users' calls go to the same processes; secrets travel in the arguments.
    #[default]
    Shared,
    /// Every user has a process of their own, started at first use and stopped when idle.
    PerUser,
}

/// On how many workers a server may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// As many as the load asks for.
    #[default]
    Replicated,
    /// One process in the whole fleet.
    Singleton,
}

/// A registered server. Field names are those of mcp-api's `mcp` collection; what we do not know is
/// kept in `extra` and written back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", remote = "Self")]
pub struct ServerRecord {
    /// 24 hexadecimal digits, like MongoDB's.
    #[serde(rename = "_id")]
    pub id: String,
    /// The unique name.
    pub name: ServerName,
    /// How people see it called.
    pub display_name: String,
    /// What it is for.
    #[serde(default)]
    pub description: String,
    /// `platform`, or `external` for servers that users bring.
    #[serde(default = "platform")]
    pub source: String,
    /// How users log in to it: `none` unless OAuth is configured.
    #[serde(default = "none")]
    pub auth_mode: String,
    /// Descriptions of the secrets that users fill in.
    #[serde(default)]
    pub secret_fields: Vec<Value>,
    /// When it was registered.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
    /// How it is reached.
    #[serde(flatten)]
    pub transport: Transport,
    /// The secrets that are injected into calls. `None` or empty: all that the user stored for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_names: Option<Vec<SecretName>>,
    /// Whether it may run.
    pub enabled: bool,
    /// Bounds start and tool discovery, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup_timeout: Option<u64>,
    /// Bounds one call, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_timeout: Option<u64>,
    /// Stops a process that nobody called for this long, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<u64>,
    /// Who shares a running server.
    #[serde(default)]
    pub isolation: Isolation,
    /// On how many workers it may run.
    #[serde(default)]
    pub scaling: Scaling,
    /// For `per_user`: environment variable of the user's process → name of the secret it holds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secret_env: BTreeMap<String, SecretName>,
    /// Calls in flight on one connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// Connections on one worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instances: Option<u32>,
    /// Whether what the server says of its tools is believed: calls of those that only read, or that may be
    /// done twice, are made again when their worker or process is lost.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trust_annotations: bool,
    /// For a remote server: what its authorization server knows us by, where an operator registered us.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oauth_client: Option<GivenClient>,
    /// The installed package that it runs, if it was installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<PackageRef>,
    /// Fields that this version does not use.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

fn platform() -> String {
    "platform".to_owned()
}

fn none() -> String {
    "none".to_owned()
}

impl ServerRecord {
    /// Reads a stored document, whichever version wrote it: a missing transport is stdio, and the
    /// single `secretName` of old records becomes the list `secretNames`.
    pub fn from_document(mut document: Map<String, Value>) -> Result<Self, serde_json::Error> {
        document.entry("transportType").or_insert_with(|| "stdio".into());
        let single = document.remove("secretName");
        if document.get("secretNames").is_none_or(Value::is_null) {
            match single {
                Some(Value::String(name)) if !name.is_empty() => {
                    document.insert("secretNames".to_owned(), Value::Array(vec![Value::String(name)]))
                }
                _ => document.remove("secretNames"),
            };
        }
        // Older programs write `null` where they mean "not set".
        document.retain(|_, value| !value.is_null());
        if let Some(name) = document.get("name").cloned() {
            document.entry("displayName").or_insert(name);
        }
        document.entry("enabled").or_insert(Value::Bool(true));
        // The derived reader fills `extra` with whatever it did not name, which includes the members
        // of the flattened transport: as copies they would outlive a change of the real ones.
        let mut record = Self::deserialize(Value::Object(document))?;
        if let Value::Object(own) = serde_json::to_value(&record.transport)? {
            record.extra.retain(|field, _| !own.contains_key(field));
        }
        Ok(record)
    }

    /// The record as a document.
    pub fn to_document(&self) -> Result<Map<String, Value>, serde_json::Error> {
        match serde_json::to_value(self)? {
            Value::Object(map) => Ok(map),
            _ => Err(serde::ser::Error::custom("a record is an object")),
        }
    }

    /// Whether it runs somewhere else, and is reached over HTTP.
    pub fn is_remote(&self) -> bool {
        matches!(self.transport, Transport::StreamableHttp { .. })
    }

    /// Whether every user has processes or connections of their own. A remote server knows users by what is
    /// sent along with their requests, so that no two share a connection to it.
    pub fn is_per_user(&self) -> bool {
        self.isolation == Isolation::PerUser || self.is_remote()
    }

    /// How a remote server's broken streams are taken up again.
    pub fn reconnection(&self) -> Reconnection {
        match &self.transport {
            Transport::StreamableHttp { reconnection_options, .. } => {
                Reconnection::of(reconnection_options.as_ref())
            }
            Transport::Stdio { .. } => Reconnection::default(),
        }
    }

    /// How long start and tool discovery may take.
    pub fn startup_limit(&self) -> Duration {
        bounded(self.startup_timeout, limits::STARTUP_TIMEOUT, limits::STARTUP_TIMEOUT_MAX)
    }

    /// How long one call may take if its caller asks for `requested`. A time that the record sets is
    /// a bound; without one the caller may ask for up to [`limits::TOOL_TIMEOUT_MAX`].
    pub fn call_limit(&self, requested: Option<Duration>) -> Duration {
        let own = self.tool_timeout.or(self.startup_timeout).map(Duration::from_millis);
        let limit = match (own, requested) {
            (Some(own), Some(requested)) => own.min(requested),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => limits::TOOL_TIMEOUT,
        };
        limit.min(limits::TOOL_TIMEOUT_MAX)
    }

    /// After how long without a call a process is stopped; `None`: never.
    pub fn idle_limit(&self) -> Option<Duration> {
        match (self.idle_timeout, self.is_per_user()) {
            (Some(0), _) => None,
            (Some(millis), _) => Some(Duration::from_millis(millis)),
            (None, true) => Some(limits::PER_USER_IDLE_TIMEOUT),
            (None, false) => None,
        }
    }

    /// Calls in flight on one connection.
    pub fn concurrency_limit(&self) -> usize {
        self.concurrency.map_or(limits::CONCURRENCY, |n| usize::try_from(n).unwrap_or(usize::MAX)).max(1)
    }

    /// Connections on one worker. A singleton and a user's own process are one.
    pub fn instance_limit(&self) -> usize {
        match (self.scaling, self.is_per_user()) {
            (Scaling::Replicated, false) => {
                self.instances.map_or(1, |n| usize::try_from(n).unwrap_or(usize::MAX)).max(1)
            }
            _ => 1,
        }
    }

    /// Whether going from `self` to `next` needs new processes. Descriptions, names of secrets,
    /// timeouts and the like apply to running ones.
    pub fn needs_restart(&self, next: &Self) -> bool {
        self.transport != next.transport
            || self.package != next.package
            || self.isolation != next.isolation
            || self.scaling != next.scaling
            || self.secret_env != next.secret_env
            || self.oauth_client != next.oauth_client
            || self.concurrency_limit() != next.concurrency_limit()
            || self.instance_limit() != next.instance_limit()
    }
}

impl Serialize for ServerRecord {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for ServerRecord {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let document = <Map<String, Value> as Deserialize>::deserialize(deserializer)?;
        Self::from_document(document).map_err(serde::de::Error::custom)
    }
}

fn bounded(millis: Option<u64>, default: Duration, max: Duration) -> Duration {
    millis.map_or(default, Duration::from_millis).min(max)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(document: Value) -> ServerRecord {
        let Value::Object(map) = document else { panic!("not an object") };
        ServerRecord::from_document(map).unwrap()
    }

    fn stored() -> Value {
        json!({
            "_id": "6b031cdd6c5c3ee8dbcb20dd", "name": "echo",
            "createdAt": "2026-11-22T16:48:29.287Z", "updatedAt": "2026-11-22T16:48:29.287Z",
            "command": "node", "secretName": "TOKEN", "startupTimeout": null, "catalogProvider": "x",
        })
    }

    #[test]
    fn older_documents_are_understood_and_kept_whole() {
        let record = record(stored());
        assert_eq!(record.display_name, "echo");
        assert!(record.enabled);
        assert_eq!(record.secret_names, Some(vec![SecretName::parse("TOKEN").unwrap()]));
        let Transport::Stdio { ref command, ref args, .. } = record.transport else { panic!() };
        assert_eq!((command.as_str(), args.len()), ("node", 0));
        let document = record.to_document().unwrap();
        assert_eq!(document["catalogProvider"], "x");
        assert_eq!(ServerRecord::from_document(document).unwrap(), record);
    }

    #[test]
    fn a_call_is_bounded_as_recorded() {
        let mut record = record(stored());
        let ms = Duration::from_millis;
        assert_eq!(record.call_limit(None), ms(60_000));
        assert_eq!(record.call_limit(Some(ms(120_000))), ms(120_000));
        assert_eq!(record.call_limit(Some(ms(999_999_999))), ms(600_000));
        record.startup_timeout = Some(500);
        assert_eq!(record.call_limit(None), ms(500));
        record.tool_timeout = Some(2_000);
        assert_eq!(record.call_limit(Some(ms(90_000))), ms(2_000));
        assert_eq!(record.startup_limit(), ms(500));
    }

    #[test]
    fn only_what_concerns_the_process_restarts_it() {
        let old = record(stored());
        let mut new = old.clone();
        new.description = "other".to_owned();
        new.secret_names = None;
        new.tool_timeout = Some(1);
        assert!(!old.needs_restart(&new));
        new.transport =
            Transport::Stdio { command: "node".into(), args: vec!["x".into()], env: Variables::default() };
        assert!(old.needs_restart(&new));
    }

    #[test]
    fn names_that_look_secret() {
        for name in [
            "TOKEN",
            "GH_TOKEN",
            "github-token",
            "AccessToken",
            "DB_PASSWORD",
            "PASSWD",
            "API_KEY",
            "apiKey",
            "X-API-Key",
            "OPENAI_KEY",
            "Authorization",
            "Proxy-Authorization",
            "X-Auth",
            "AWS_SECRET_ACCESS_KEY",
            "Cookie",
            "Set-Cookie",
            "SENTRY_DSN",
            "X-Session-Id",
            "CLIENT_CREDENTIALS",
        ] {
            assert!(looks_secret(name), "{name}");
        }
        for name in ["NODE_ENV", "X-Custom-Header", "PATH", "AUTHOR", "KEYBOARD", "MONKEY", "PATTERN", "LANG"]
        {
            assert!(!looks_secret(name), "{name}");
        }
    }

    #[test]
    fn values_of_variables_are_not_printed() {
        let env = Variables(BTreeMap::from([("KEY".to_owned(), "hidden-value".to_owned())]));
        assert_eq!(format!("{env:?}"), r#"{"KEY"}"#);
    }
}
