//! What MCP wants before and between tool calls: negotiation and the listing of tools. Versions and
//! the shapes of these messages are rmcp's.

use mcp_shared::{error::shorten, json::RawJson, limits};
use rmcp::model::{
    ClientCapabilities, Implementation, InitializeRequestParams, ProtocolVersion, RequestMetaObject,
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::transport::{
    RpcError,
    connection::{Connection, Failure},
};

/// Why a server could not be talked to.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// A sentence for people.
    pub text: String,
    /// What came instead of an answer.
    pub failure: Option<Failure>,
}

impl Refusal {
    /// A refusal that no answer of the server is to blame for, or one that was understood.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), failure: None }
    }

    /// What came instead of the answer to a step.
    pub fn of(step: &str, failure: Failure) -> Self {
        let text = match &failure {
            Failure::Rpc(RpcError { code, message }) => format!("it refused {step}: {message} ({code})"),
            Failure::TooLarge => format!("its answer to {step} was too large"),
            Failure::Malformed | Failure::Unreadable => format!("its answer to {step} was not valid MCP"),
            Failure::Closed { .. } => format!("it closed the connection before it answered {step}"),
            Failure::Upstream(upstream) => upstream.error.message.clone(),
            Failure::SessionLost => "it does not know the session any more".to_owned(),
        };
        Self { text, failure: Some(failure) }
    }
}

/// Agrees with a server on a protocol version: `initialize` first, which every server up to 2025-11-25
/// wants exactly once; a server that knows only the stateless protocol refuses it and is asked to
/// describe itself instead.
pub async fn negotiate(connection: &Connection) -> Result<(), Refusal> {
    match initialize(connection).await {
        Ok(_) => {
            let told = connection.notify("notifications/initialized", None).await;
            told.map_err(|failure| Refusal::of("notifications/initialized", failure))
        }
        Err(refused) => match &refused.failure {
            Some(Failure::Rpc(_)) => discover(connection).await.or(Err(refused)),
            _ => Err(refused),
        },
    }
}

/// Begins to talk as every protocol up to 2025-11-25 wants it; the version that the server chose. The notification
/// `initialized` has to follow.
pub async fn initialize(connection: &Connection) -> Result<String, Refusal> {
    let params = InitializeRequestParams::new(ClientCapabilities::default(), client())
        .with_protocol_version(ProtocolVersion::LATEST_WITH_INITIALIZE);
    let params = write(&params)?;
    let result = connection
        .request("initialize", &params)
        .await
        .map_err(|failure| Refusal::of("initialize", failure))?;
    let version = version_of(&result)?;
    if !ProtocolVersion::KNOWN_VERSIONS.iter().any(|known| known.as_str() == version) {
        let version = shorten(&version, 32);
        return Err(Refusal::new(format!("it speaks MCP version {version}, which is not known here")));
    }
    Ok(version)
}

/// The version of the protocol without sessions.
pub fn stateless_version() -> &'static str {
    // rmcp's constant of the type has no text that lives as long.
    "2026-07-28"
}

/// Meets a server of the stateless protocol, where every request says what `initialize` used to say.
pub async fn discover(connection: &Connection) -> Result<(), Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Discovered {
        supported_versions: Vec<String>,
    }
    let context = RequestMetaObject::with_client_context(
        ProtocolVersion::V_2026_07_28,
        client(),
        ClientCapabilities::default(),
    );
    let meta = write(&context)?;
    let found = connection
        .request("server/discover", &format!("{{\"_meta\":{meta}}}"))
        .await
        .map_err(|failure| Refusal::of("server/discover", failure))?;
    let newest = ProtocolVersion::V_2026_07_28;
    match found.read::<Discovered>() {
        Ok(found) if found.supported_versions.iter().any(|version| version == newest.as_str()) => {
            let members = meta.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
            connection.set_meta(members.unwrap_or_default().to_owned());
            Ok(())
        }
        _ => Err(Refusal::new("it does not speak the stateless protocol")),
    }
}

/// Lists a server's tools, page after page, as a JSON array of what it sent.
pub async fn list_tools(connection: &Connection) -> Result<RawJson, Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Page<'a> {
        #[serde(borrow, default)]
        tools: Vec<&'a RawValue>,
        next_cursor: Option<String>,
    }
    let mut listing = b"[".to_vec();
    let mut count = 0;
    let mut cursor: Option<String> = None;
    for _ in 0..limits::TOOL_PAGES {
        let params = list_params(connection, cursor.as_deref())?;
        let result = match connection.request("tools/list", &params).await {
            Ok(result) => result,
            // A server without tools need not know the method.
            Err(Failure::Rpc(RpcError { code: -32601, .. })) => break,
            Err(failure) => return Err(Refusal::of("tools/list", failure)),
        };
        let page = result
            .read::<Page<'_>>()
            .map_err(|_| Refusal::new("its answer to tools/list was not valid MCP"))?;
        for tool in page.tools {
            count += 1;
            if count > limits::TOOLS || listing.len() + tool.get().len() > limits::RESULT_BYTES {
                return Err(Refusal::new("it lists more tools than a server may have"));
            }
            if listing.len() > 1 {
                listing.push(b',');
            }
            listing.extend_from_slice(tool.get().as_bytes());
        }
        // A cursor that comes back unchanged would go round in circles.
        if page.next_cursor.is_none() || page.next_cursor == cursor {
            break;
        }
        cursor = page.next_cursor;
    }
    listing.push(b']');
    Ok(RawJson::from_parsed(listing.into()))
}

fn list_params(connection: &Connection, cursor: Option<&str>) -> Result<String, Refusal> {
    let mut members = Vec::new();
    if let Some(cursor) = cursor {
        members.push(format!("\"cursor\":{}", write(&cursor)?));
    }
    if !connection.meta().is_empty() {
        members.push(format!("\"_meta\":{{{}}}", connection.meta()));
    }
    Ok(format!("{{{}}}", members.join(",")))
}

fn version_of(result: &RawJson) -> Result<String, Refusal> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Initialized {
        protocol_version: String,
    }
    result
        .read::<Initialized>()
        .map(|initialized| initialized.protocol_version)
        .map_err(|_| Refusal::new("its answer to initialize was not valid MCP"))
}

fn client() -> Implementation {
    Implementation::new("mcp-api", env!("CARGO_PKG_VERSION"))
}

fn write(value: &impl serde::Serialize) -> Result<String, Refusal> {
    serde_json::to_string(value)
        .map_err(|error| Refusal::new(format!("a request could not be written: {error}")))
}
