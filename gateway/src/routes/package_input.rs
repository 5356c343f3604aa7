//! What a client may say about a package, checked field by field: nothing leaves this file for npm, pip or
//! Python that is not in the grammar of [`names`].

use mcp_shared::{
    egress::{Egress, EgressError},
    error::ErrorCode,
    ids::ServerName,
    limits,
    package::{LatestQuery, PackageRecord, PackageSpec, Runtime, names},
    server::{ServerRecord, Transport},
};

use crate::{
    body::{Field, Fields},
    problem::Problem,
    routes::{
        remote_input::check_url,
        server_input::{check_command, draft, list, new_transport},
    },
};

/// Fields that only packages of Python have.
const PYTHON_FIELDS: [&str; 5] =
    ["pythonModule", "pythonArgs", "pipDependencies", "pipIndexUrl", "pipExtraIndexUrl"];
/// Names that are words of addresses below `/packages`: a server of that name could not be addressed there.
const RESERVED: [&str; 6] = ["install", "updates", "upgrade-all", "jobs", "by-name", "by-id"];
/// What both registries and people call the version that is wanted when none is said.
const LATEST: &str = "latest";

/// What `POST /packages/install` asks for.
pub struct Install {
    /// The package.
    pub spec: PackageSpec,
    /// The server, with an empty command where that follows from the package.
    pub server: ServerRecord,
}

/// Reads the body of `POST /packages/install`.
pub fn install(fields: &Fields<'_>, egress: &Egress) -> Result<Install, Problem> {
    let given = |name: &str| Ok::<_, Problem>(fields.text(name)?.value().filter(|text| !text.is_empty()));
    let (Some(name), Some(server)) = (given("name")?, given("serverName")?) else {
        return Err(Problem::invalid("Package name and server name are required"));
    };
    let server = ServerName::parse_new(&server)?;
    if RESERVED.iter().any(|word| server.as_str().eq_ignore_ascii_case(word)) {
        let text = format!("serverName cannot be {server}, which is a part of addresses below /packages");
        return Err(Problem::new(ErrorCode::InvalidServerName, text));
    }
    let runtime = match fields.text("runtime")?.value().as_deref() {
        None | Some("node") => Runtime::Node,
        Some("python") => Runtime::Python,
        Some(_) => return Err(Problem::invalid("runtime must be \"node\" or \"python\"")),
    };
    let spec = PackageSpec {
        name,
        version: version(fields)?,
        runtime,
        python_module: given("pythonModule")?,
        python_args: list(fields, "pythonArgs")?.value(),
        pip_dependencies: list(fields, "pipDependencies")?.value(),
        pip_index_url: given("pipIndexUrl")?,
        pip_extra_index_url: given("pipExtraIndexUrl")?,
        fail_on_warning: flag(fields, "failOnWarning")?,
        allow_scripts: flag(fields, "allowScripts")?,
    };
    check(&spec, egress)?;
    let transport = new_transport(fields, egress)?;
    match runtime {
        Runtime::Python => {
            if !matches!(transport, Transport::Stdio { .. }) {
                return Err(Problem::invalid("Python packages can only have the transportType stdio"));
            }
            if spec.python_module.is_none() {
                return Err(Problem::invalid("pythonModule is required for Python packages"));
            }
        }
        Runtime::Node => {
            if let Some(field) =
                PYTHON_FIELDS.iter().find(|field| matches!(fields.raw(field), Field::Value(_)))
            {
                return Err(Problem::invalid(format!("{field} needs the runtime \"python\"")));
            }
        }
    }
    Ok(Install { server: draft(server, transport, fields)?, spec })
}

/// The version that a body asks for; `None`: the latest.
pub fn version(fields: &Fields<'_>) -> Result<Option<String>, Problem> {
    Ok(fields.text("version")?.value().filter(|version| version != LATEST))
}

/// Whether npm, pip and Python can be given this. Packages that mcp-api installed never passed this test, so
/// what is taken from a record has to pass it as well.
pub fn check(spec: &PackageSpec, egress: &Egress) -> Result<(), Problem> {
    let field = |name: &str, valid: bool, rule: &str| {
        if valid { Ok(()) } else { Err(Problem::invalid(format!("{name} {rule}"))) }
    };
    check_name(spec.runtime, &spec.name)?;
    if let Some(version) = &spec.version {
        let (valid, text) = match spec.runtime {
            Runtime::Node => (
                names::npm_version(version),
                "version must be a version, a range of versions or a tag, such as 1.2.3, ^1.2 or next",
            ),
            Runtime::Python => (names::python_version(version), "version must be one version, such as 1.2.3"),
        };
        if !valid {
            return Err(Problem::new(ErrorCode::InvalidVersion, text));
        }
    }
    if let Some(module) = &spec.python_module {
        field("pythonModule", names::python_module(module), "must be the name of a Python module")?;
    }
    check_command("pythonArgs", spec.python_args.iter().flatten())?;
    let dependencies = spec.pip_dependencies.as_deref().unwrap_or_default();
    if dependencies.len() > limits::PIP_DEPENDENCIES {
        let text = format!("pipDependencies can have at most {} entries", limits::PIP_DEPENDENCIES);
        return Err(Problem::invalid(text));
    }
    let rule = "must be names with versions, such as fastmcp<3 or requests[socks]>=2.28; addresses, paths \
                and options are refused";
    field("pipDependencies", dependencies.iter().all(|spec| names::pip_dependency(spec)), rule)?;
    for (name, url) in [("pipIndexUrl", &spec.pip_index_url), ("pipExtraIndexUrl", &spec.pip_extra_index_url)]
    {
        if let Some(url) = url {
            // What leads to where nobody may go is refused in these words, however it is spelled.
            if matches!(egress.check(url), Err(EgressError::Blocked(_))) {
                return check_url(egress, name, url);
            }
            names::index_url(url).map_err(|rule| Problem::invalid(format!("{name} {rule}")))?;
            check_url(egress, name, url)?;
        }
    }
    Ok(())
}

fn check_name(runtime: Runtime, name: &str) -> Result<(), Problem> {
    let (valid, text) = match runtime {
        Runtime::Node => (
            names::npm_name(name),
            "name must be that of an npm package, such as left-pad or @scope/name, in lower case; the version \
             has a field of its own",
        ),
        Runtime::Python => (
            names::python_name(name),
            "name must be that of a Python package, with extras if it has some, such as mcp-server-time or \
             requests[socks]; the version has a field of its own",
        ),
    };
    if valid { Ok(()) } else { Err(Problem::new(ErrorCode::InvalidPackageName, text)) }
}

/// How to ask for the latest version of an installed package.
pub fn latest_of(record: &PackageRecord, egress: &Egress) -> Result<LatestQuery, Problem> {
    check(&record.spec(None), egress)?;
    let name = match record.runtime {
        Runtime::Node => record.name.as_str(),
        Runtime::Python => bare(&record.name),
    };
    Ok(LatestQuery {
        name: name.to_owned(),
        runtime: record.runtime,
        pip_index_url: record.pip_index_url.clone(),
        pip_extra_index_url: record.pip_extra_index_url.clone(),
    })
}

/// Whether a record is that of the package that somebody calls `name`. Python has several spellings of one
/// name, and extras do not make another package.
pub fn is_called(record: &PackageRecord, name: &str) -> bool {
    let normal = |name: &str| bare(name).to_ascii_lowercase().replace(['_', '.'], "-");
    record.name == name || record.runtime == Runtime::Python && normal(&record.name) == normal(name)
}

fn bare(name: &str) -> &str {
    names::split_extras(name).map_or(name, |(name, _)| name)
}

fn flag(fields: &Fields<'_>, name: &str) -> Result<bool, Problem> {
    Ok(fields.get(name, "must be true or false")?.value().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use mcp_shared::timestamp::Timestamp;
    use serde_json::{Value, json};

    use super::*;

    fn read(more: Value) -> Install {
        let mut body = json!({"name": "left-pad", "serverName": "pad"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let bytes = Bytes::from(body.to_string());
        install(&Fields::parse(&bytes).unwrap(), &Egress::default()).unwrap()
    }

    #[test]
    fn what_is_asked_for_becomes_a_package_and_a_server() {
        let one = read(json!({"version": "latest", "env": {"A": "b"}, "args": ["x"], "secretName": "KEY"}));
        assert_eq!(
            (one.spec.version, one.spec.runtime, one.spec.fail_on_warning),
            (None, Runtime::Node, false)
        );
        let Transport::Stdio { command, args, env } = &one.server.transport else { panic!() };
        assert_eq!(
            (command.as_str(), args.as_slice(), env.0["A"].as_str()),
            ("", &["x".to_owned()][..], "b")
        );
        assert_eq!(one.server.secret_names.as_ref().map(Vec::len), Some(1));
        assert!(one.server.enabled && one.server.package.is_none());

        let one = read(json!({
            "name": "requests[socks]", "runtime": "python", "pythonModule": "requests", "version": "2.28",
            "pythonArgs": ["-x"], "pipDependencies": ["a<3"], "pipIndexUrl": "https://pypi.example.org/simple",
            "pipExtraIndexUrl": "", "enabled": false, "isolation": "per_user", "command": "requests",
        }));
        assert_eq!(one.spec.version.as_deref(), Some("2.28"));
        assert_eq!((one.spec.pip_extra_index_url, one.server.enabled), (None, false));
        let Transport::Stdio { command, .. } = &one.server.transport else { panic!() };
        assert_eq!(command, "requests");

        let one = read(json!({
            "transportType": "streamable_http", "url": "https://mcp.example.org/mcp",
            "headers": {"X-Custom-Header": "v"}, "sessionId": "s", "reconnectionOptions": {"maxRetries": 3},
        }));
        let Transport::StreamableHttp { url, headers, session_id, reconnection_options } =
            one.server.transport
        else {
            panic!()
        };
        assert_eq!((url.as_str(), session_id), ("https://mcp.example.org/mcp", None));
        assert_eq!(headers.unwrap().0["X-Custom-Header"], "v");
        assert_eq!(reconnection_options.unwrap()["maxRetries"], 3);
    }

    fn record(name: &str, runtime: Runtime) -> PackageRecord {
        serde_json::from_value(json!({
            "name": name, "version": "1", "installPath": "packages/x", "status": "installed",
            "installed": Timestamp::now(), "mcpServerId": "x", "enabled": true, "runtime": runtime,
        }))
        .unwrap()
    }

    #[test]
    fn names_of_python_have_spellings() {
        let time = record("MCP_Server.Time[tz]", Runtime::Python);
        assert!(is_called(&time, "mcp-server-time") && is_called(&time, "MCP_Server.Time[tz]"));
        assert!(!is_called(&time, "mcp-server"));
        let node = record("a_b", Runtime::Node);
        assert!(is_called(&node, "a_b") && !is_called(&node, "a-b"));
    }

    #[test]
    fn nobody_is_asked_for_what_no_registry_can_have() {
        assert_eq!(
            latest_of(&record("requests[socks]", Runtime::Python), &Egress::default()).unwrap().name,
            "requests"
        );
        for name in ["git+ssh://x/y", "../x", "--registry=http://x", "x@file:/etc"] {
            let problem = latest_of(&record(name, Runtime::Node), &Egress::default()).unwrap_err();
            assert_eq!(problem.code(), ErrorCode::InvalidPackageName, "{name}");
        }
        let mut record = record("x", Runtime::Python);
        record.pip_index_url = Some("http://user:password@x/".to_owned());
        assert!(latest_of(&record, &Egress::default()).is_err());
        // It was good when the operator permitted it.
        record.pip_index_url = Some("https://10.0.0.7/simple".to_owned());
        assert_eq!(latest_of(&record, &Egress::default()).unwrap_err().code(), ErrorCode::BlockedAddress);
        let permitted = Egress::new(vec!["10.0.0.0/8".parse().unwrap()]);
        assert!(latest_of(&record, &permitted).is_ok());
    }
}
