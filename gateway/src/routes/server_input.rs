//! What a client may say about a server, checked field by field.

use std::collections::BTreeMap;

use mcp_shared::{
    egress::Egress,
    ids::{SecretName, ServerName, object_id},
    limits,
    server::{Isolation, Scaling, ServerRecord, Transport, Variables},
    timestamp::Timestamp,
};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{
    body::{Field, Fields},
    problem::Problem,
    routes::remote_input,
};

/// Fields that only one of the two transports has.
const STDIO_FIELDS: [&str; 3] = ["command", "args", "env"];
const HTTP_FIELDS: [&str; 5] = ["url", "headers", "sessionId", "reconnectionOptions", "oauthClient"];
/// What is said of the others.
const NOT_STDIO: &str =
    "Stdio servers cannot define streamable_http fields (url, headers, sessionId, reconnectionOptions).";
const NOT_HTTP: &str = "Streamable HTTP servers cannot define stdio fields (command, args, env).";
/// Descriptive fields that are kept and shown, and mean nothing to us.
const DESCRIPTIVE: [&str; 6] =
    ["homepageUrl", "repositoryUrl", "licenseName", "catalogProvider", "catalogId", "createdBy"];

/// A record from the body of `POST /mcp/servers`.
pub fn new_record(fields: &Fields<'_>, egress: &Egress) -> Result<ServerRecord, Problem> {
    let name = ServerName::parse_new(&fields.required("name")?)?;
    let transport = new_transport(fields, egress)?;
    if let Transport::Stdio { command, .. } = &transport {
        require_command(command)?;
    }
    draft(name, transport, fields)
}

/// A record with a name and a transport, and with whatever else a body says about it. A package's server may
/// have no command yet.
pub fn draft(name: ServerName, transport: Transport, fields: &Fields<'_>) -> Result<ServerRecord, Problem> {
    let mut record = plain(name, transport);
    update_common(&mut record, fields)?;
    check_whole(&record)?;
    Ok(record)
}

/// A record of which nothing is known but a name and a transport.
pub fn plain(name: ServerName, transport: Transport) -> ServerRecord {
    let now = Timestamp::now();
    ServerRecord {
        id: object_id(now),
        display_name: name.to_string(),
        name,
        description: String::new(),
        source: "platform".to_owned(),
        auth_mode: "none".to_owned(),
        secret_fields: Vec::new(),
        created_at: now,
        updated_at: now,
        transport,
        secret_names: None,
        enabled: true,
        startup_timeout: None,
        tool_timeout: None,
        idle_timeout: None,
        oauth_client: None,
        isolation: Isolation::default(),
        scaling: Scaling::default(),
        secret_env: BTreeMap::new(),
        concurrency: None,
        instances: None,
        trust_annotations: false,
        package: None,
        extra: Map::new(),
    }
}

/// A record with the changes that the body of `PUT /mcp/servers/:name` asks for. Fields that are not
/// there stay; `null` unsets those that can be unset.
pub fn updated_record(
    record: &ServerRecord,
    fields: &Fields<'_>,
    egress: &Egress,
) -> Result<ServerRecord, Problem> {
    let mut next = record.clone();
    if let Field::Value(name) = fields.text("name")?
        && name != record.name.as_str()
    {
        return Err(Problem::invalid("name cannot be changed"));
    }
    update_transport(&mut next, fields, egress)?;
    update_common(&mut next, fields)?;
    if let Transport::Stdio { command, .. } = &next.transport {
        require_command(command)?;
    }
    check_whole(&next)?;
    if next != *record {
        next.updated_at = Timestamp::now();
    }
    Ok(next)
}

/// A transport from the fields of a new server. The command may be missing: that of a package follows from
/// what is installed.
pub fn new_transport(fields: &Fields<'_>, egress: &Egress) -> Result<Transport, Problem> {
    match fields.text("transportType")?.value().as_deref() {
        None | Some("stdio") => {
            has_none(fields, &HTTP_FIELDS, NOT_STDIO)?;
            let command = fields.text("command")?.value().filter(|command| !command.trim().is_empty());
            let args = list(fields, "args")?.value().unwrap_or_default();
            let env = variables(fields, "env")?.value().unwrap_or_default();
            Ok(Transport::Stdio { command: command.unwrap_or_default(), args, env })
        }
        Some("streamable_http") => {
            let url = fields.text("url")?.value().filter(|url| !url.trim().is_empty());
            let url = url.ok_or_else(|| Problem::invalid("Streamable HTTP servers require a url."))?;
            has_none(fields, &STDIO_FIELDS, NOT_HTTP)?;
            remote_input::check_url(egress, "url", &url)?;
            Ok(Transport::StreamableHttp {
                url,
                headers: remote_input::headers(fields)?.value(),
                // It is a user's, and not the server's.
                session_id: None,
                reconnection_options: remote_input::reconnection(fields)?.value(),
            })
        }
        Some(_) => Err(Problem::invalid("transportType must be \"stdio\" or \"streamable_http\"")),
    }
}

fn update_transport(record: &mut ServerRecord, fields: &Fields<'_>, egress: &Egress) -> Result<(), Problem> {
    let wanted = fields.text("transportType")?.value();
    let same = matches!(
        (&record.transport, wanted.as_deref()),
        (_, None)
            | (Transport::Stdio { .. }, Some("stdio"))
            | (Transport::StreamableHttp { .. }, Some("streamable_http"))
    );
    if !same {
        record.transport = new_transport(fields, egress)?;
        if !record.is_remote() {
            record.oauth_client = None;
        }
        return Ok(());
    }
    match &mut record.transport {
        Transport::Stdio { command, args, env } => {
            has_none(fields, &HTTP_FIELDS, NOT_STDIO)?;
            set(command, fields.text("command")?);
            set(args, list(fields, "args")?);
            set(env, variables(fields, "env")?);
        }
        Transport::StreamableHttp { url, headers, session_id, reconnection_options } => {
            has_none(fields, &STDIO_FIELDS, NOT_HTTP)?;
            if let Field::Value(new) = fields.text("url")? {
                remote_input::check_url(egress, "url", &new)?;
                *url = new;
            }
            set_optional(headers, remote_input::headers(fields)?);
            set_optional(reconnection_options, remote_input::reconnection(fields)?);
            // One that mcp-api kept here is over when somebody says something else.
            if fields.raw("sessionId") != Field::Absent {
                *session_id = None;
            }
        }
    }
    Ok(())
}

/// Refuses fields of the other transport.
fn has_none(fields: &Fields<'_>, names: &[&str], rule: &str) -> Result<(), Problem> {
    if names.iter().any(|name| matches!(fields.raw(name), Field::Value(_))) {
        return Err(Problem::invalid(rule));
    }
    Ok(())
}

fn update_common(record: &mut ServerRecord, fields: &Fields<'_>) -> Result<(), Problem> {
    if fields.text("source")?.value().is_some_and(|source| source != record.source) {
        return Err(Problem::invalid(
            "source must be \"platform\": external servers are not part of this version",
        ));
    }
    set(&mut record.display_name, limited(fields, "displayName", 256)?);
    set(&mut record.description, limited(fields, "description", 16 * 1024)?);
    set(&mut record.secret_fields, fields.get("secretFields", "must be a list")?);
    set(&mut record.enabled, fields.get("enabled", "must be true or false")?);
    set_optional(&mut record.secret_names, secret_names(fields)?);
    set_optional(
        &mut record.startup_timeout,
        millis(fields, "startupTimeout", 1, limits::STARTUP_TIMEOUT_MAX)?,
    );
    set_optional(&mut record.tool_timeout, millis(fields, "toolTimeout", 1, limits::TOOL_TIMEOUT_MAX)?);
    let week = std::time::Duration::from_secs(7 * 24 * 3_600);
    set_optional(&mut record.idle_timeout, millis(fields, "idleTimeout", 0, week)?);
    set(&mut record.isolation, choice(fields, "isolation", "must be \"shared\" or \"per_user\"")?);
    set(&mut record.scaling, choice(fields, "scaling", "must be \"replicated\" or \"singleton\"")?);
    set(&mut record.secret_env, secret_env(fields)?);
    set_optional(&mut record.concurrency, count(fields, "concurrency", limits::CONCURRENCY_MAX)?);
    set_optional(&mut record.instances, instances(fields)?);
    set(&mut record.trust_annotations, fields.get("trustAnnotations", "must be true or false")?);
    let client = remote_input::oauth_client(fields, record.oauth_client.as_ref())?;
    set_optional(&mut record.oauth_client, client);
    for name in DESCRIPTIVE {
        match limited(fields, name, 2_048)? {
            Field::Absent => {}
            Field::Null => drop(record.extra.remove(name)),
            Field::Value(text) => drop(record.extra.insert(name.to_owned(), Value::String(text))),
        }
    }
    Ok(())
}

/// Rules that concern more than one field.
fn check_whole(record: &ServerRecord) -> Result<(), Problem> {
    if record.is_remote() && !record.secret_env.is_empty() {
        return Err(Problem::invalid(
            "secretEnv needs a server of our own: a remote one has no environment here",
        ));
    }
    if record.is_remote() && record.instances.is_some() {
        return Err(Problem::invalid(
            "instances needs a server of our own: to a remote one every user has one connection",
        ));
    }
    if !record.secret_env.is_empty() && record.isolation != Isolation::PerUser {
        return Err(Problem::invalid("secretEnv needs isolation \"per_user\": a shared process has no user"));
    }
    let Transport::Stdio { command, args, env } = &record.transport else { return Ok(()) };
    check_command("command, args and env", std::iter::once(command).chain(args).chain(env.0.values()))
}

/// What a process can be given at all. `what` names the fields.
pub fn check_command<'a>(what: &str, texts: impl Iterator<Item = &'a String> + Clone) -> Result<(), Problem> {
    if texts.clone().any(|text| text.contains('\0')) {
        return Err(Problem::invalid(format!("{what} cannot contain NUL")));
    }
    if texts.map(String::len).sum::<usize>() > limits::COMMAND_BYTES {
        return Err(Problem::invalid(format!("{what} are too large together")));
    }
    Ok(())
}

fn require_command(command: &str) -> Result<(), Problem> {
    if command.trim().is_empty() {
        return Err(Problem::invalid("Stdio servers require a command."));
    }
    Ok(())
}

fn set<T>(target: &mut T, field: Field<T>) {
    if let Field::Value(value) = field {
        *target = value;
    }
}

fn set_optional<T>(target: &mut Option<T>, field: Field<T>) {
    match field {
        Field::Absent => {}
        Field::Null => *target = None,
        Field::Value(value) => *target = Some(value),
    }
}

fn limited(fields: &Fields<'_>, name: &str, bytes: usize) -> Result<Field<String>, Problem> {
    match fields.text(name)? {
        Field::Value(text) if text.len() > bytes => {
            Err(Problem::invalid(format!("{name} must be at most {bytes} bytes")))
        }
        field => Ok(field),
    }
}

/// A member that is a list of strings.
pub fn list(fields: &Fields<'_>, name: &str) -> Result<Field<Vec<String>>, Problem> {
    fields.get(name, "must be a list of strings")
}

fn variables(fields: &Fields<'_>, name: &str) -> Result<Field<Variables>, Problem> {
    let field: Field<Variables> = fields.get(name, "must be an object whose values are strings")?;
    if let Field::Value(variables) = &field {
        variables.0.keys().try_for_each(|variable| variable_name(name, variable))?;
    }
    Ok(field)
}

fn variable_name(field: &str, name: &str) -> Result<(), Problem> {
    let ok = name.len() <= 256
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if ok {
        return Ok(());
    }
    Err(Problem::invalid(format!(
        "{field} has a name that is not one of a variable: letters, digits and '_'"
    )))
}

/// `secretNames`, or the single `secretName` of older clients.
fn secret_names(fields: &Fields<'_>) -> Result<Field<Vec<SecretName>>, Problem> {
    let names = match list(fields, "secretNames")? {
        Field::Absent => match fields.text("secretName")? {
            Field::Value(name) if !name.is_empty() => Field::Value(vec![name]),
            _ => Field::Absent,
        },
        field => field,
    };
    Ok(match names {
        Field::Absent => Field::Absent,
        Field::Null => Field::Null,
        Field::Value(names) => {
            Field::Value(names.iter().map(|name| SecretName::parse(name)).collect::<Result<_, _>>()?)
        }
    })
}

fn secret_env(fields: &Fields<'_>) -> Result<Field<BTreeMap<String, SecretName>>, Problem> {
    let field: Field<BTreeMap<String, String>> =
        fields.get("secretEnv", "must be an object of variable names and secret names")?;
    Ok(match field {
        Field::Absent => Field::Absent,
        Field::Null => Field::Value(BTreeMap::new()),
        Field::Value(map) => Field::Value(
            map.into_iter()
                .map(|(variable, secret)| {
                    variable_name("secretEnv", &variable)?;
                    Ok((variable, SecretName::parse(&secret)?))
                })
                .collect::<Result<_, Problem>>()?,
        ),
    })
}

fn choice<T: DeserializeOwned>(fields: &Fields<'_>, name: &str, rule: &str) -> Result<Field<T>, Problem> {
    fields.get(name, rule)
}

fn millis(
    fields: &Fields<'_>,
    name: &str,
    min: u64,
    max: std::time::Duration,
) -> Result<Field<u64>, Problem> {
    let max = u64::try_from(max.as_millis()).unwrap_or(u64::MAX);
    let rule = format!("must be a whole number of milliseconds from {min} to {max}");
    match fields.get::<u64>(name, &rule)? {
        Field::Value(value) if !(min..=max).contains(&value) => {
            Err(Problem::invalid(format!("{name} {rule}")))
        }
        field => Ok(field),
    }
}

/// How many connections a worker opens. Answers show running processes as the list `instances` and
/// this number as `instanceLimit`, so that a document that was read can be sent back.
fn instances(fields: &Fields<'_>) -> Result<Field<u32>, Problem> {
    match fields.raw("instances") {
        Field::Value(value) if value.as_bytes().starts_with(b"[") => {
            count(fields, "instanceLimit", limits::INSTANCES_MAX)
        }
        Field::Absent => count(fields, "instanceLimit", limits::INSTANCES_MAX),
        _ => count(fields, "instances", limits::INSTANCES_MAX),
    }
}

fn count(fields: &Fields<'_>, name: &str, max: u32) -> Result<Field<u32>, Problem> {
    let rule = format!("must be a whole number from 1 to {max}");
    match fields.get::<u32>(name, &rule)? {
        Field::Value(value) if !(1..=max).contains(&value) => Err(Problem::invalid(format!("{name} {rule}"))),
        field => Ok(field),
    }
}
