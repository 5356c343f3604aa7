//! Logging in to NATS as the settings say, and whether it is a NATS that may be used.

use std::collections::BTreeMap;

use async_nats::{Client, ConnectErrorKind, ConnectOptions, ServerAddr, ServerInfo};
use futures_util::StreamExt;
use mcp_shared::{
    config::{BusLogin, BusSettings},
    fleet::NodeReport,
    ids::WorkerId,
};
use secrecy::ExposeSecret;
use tokio::time::{Instant, timeout_at};

use crate::{
    bus::Bus,
    fleet::BEAT,
    subjects::Subjects,
    wire::{self, Beat},
};

/// The oldest version of NATS that is known to do.
const OLDEST: [u64; 3] = [2, 10, 0];
/// The oldest version without holes that need no login (CVE-2026-27571, CVE-2026-33219, GO-2026-4826).
const SAFE: [u64; 3] = [2, 12, 6];

/// Why NATS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nobody answers, which may pass.
    #[error("{0}")]
    Unreachable(String),
    /// It answers, and does not let this node in or is not fit for it.
    #[error("{0}")]
    Unfit(String),
}

impl From<async_nats::SubscribeError> for OpenError {
    fn from(error: async_nats::SubscribeError) -> Self {
        OpenError::Unreachable(error.to_string())
    }
}

impl Bus {
    /// Connects a node, once, and looks whether the server may be used.
    pub async fn open(settings: &BusSettings, node: WorkerId) -> Result<Self, OpenError> {
        mcp_shared::tls::install_provider();
        let options = options(settings)?;
        let bus =
            Bus::connect(options, addresses(settings)?, &settings.prefix, node).await.map_err(explain)?;
        let info = bus.client().server_info();
        fit(settings, &info)?;
        if let Some(holes) = holes(&info) {
            tracing::warn!("{holes}");
        }
        Ok(bus)
    }
}

/// What `check` says: connects once, listens who is there, and leaves nothing behind.
pub async fn check(settings: &BusSettings) -> Result<(String, Vec<NodeReport>), OpenError> {
    mcp_shared::tls::install_provider();
    let client: Client =
        options(settings)?.name("mcp-api check").connect(addresses(settings)?).await.map_err(explain)?;
    let info = client.server_info();
    fit(settings, &info)?;
    if let Some(holes) = holes(&info) {
        return Err(OpenError::Unfit(holes));
    }
    let login = if info.auth_required { "asks for a login" } else { "asks nobody for a login" };
    let nodes = listen(&client, &Subjects::new(&settings.prefix)).await?;
    let description = format!(
        "{}, version {}, {login}, messages up to {} bytes",
        settings.shown(),
        info.version,
        info.max_payload
    );
    Ok((description, nodes))
}

/// The nodes that beat within the time in which each of them does.
async fn listen(client: &Client, subjects: &Subjects) -> Result<Vec<NodeReport>, OpenError> {
    let mut nodes = BTreeMap::new();
    let mut beats = client.subscribe(subjects.beats()).await?;
    let end = Instant::now() + BEAT + BEAT / 2;
    while let Ok(Some(message)) = timeout_at(end, beats.next()).await {
        match wire::decode::<Beat>(&message.payload) {
            Ok((Beat::Here(report) | Beat::Hello(report), _)) => {
                nodes.insert(report.id.clone(), report);
            }
            Ok((Beat::Gone(node), _)) => {
                nodes.remove(&node);
            }
            // Of another version.
            Ok((Beat::Log(_), _)) | Err(_) => {}
        }
    }
    Ok(nodes.into_values().collect())
}

pub(crate) fn options(settings: &BusSettings) -> Result<ConnectOptions, OpenError> {
    let unfit = |error: std::io::Error| OpenError::Unfit(format!("NATS_CREDS: {error}"));
    let mut options = ConnectOptions::new();
    options = match &settings.login {
        BusLogin::None => options,
        BusLogin::Password { user, password } => {
            options.user_and_password(user.clone(), password.expose_secret().to_owned())
        }
        BusLogin::Token(token) => options.token(token.expose_secret().to_owned()),
        BusLogin::Credentials(contents) => options.credentials(contents.expose_secret()).map_err(unfit)?,
        BusLogin::NKey(seed) => options.nkey(seed.expose_secret().trim().to_owned()),
    };
    options = options.require_tls(settings.tls.required);
    if let Some(ca) = &settings.tls.ca {
        options = options.add_root_certificates(ca.clone());
    }
    if let Some((certificate, key)) = &settings.tls.identity {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

pub(crate) fn addresses(settings: &BusSettings) -> Result<Vec<ServerAddr>, OpenError> {
    let parse = |server: &mcp_shared::config::BusServer| {
        server.to_string().parse().map_err(|error| OpenError::Unfit(format!("{server}: {error}")))
    };
    settings.servers.iter().map(parse).collect()
}

/// Bytes that a message must be allowed to have: a part of a body with what stands around it, and the beat of a
/// worker with many servers.
const SMALLEST: usize = 512 * 1024;

/// The three numbers of a version. What is no number, as in versions before the final one, is 0.
fn numbers(version: &str) -> [u64; 3] {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    [(); 3].map(|()| numbers.next().unwrap_or(0))
}

/// What is to be said of a server with known holes.
fn holes(info: &ServerInfo) -> Option<String> {
    holes_of(&info.version)
}

/// The same by the version alone.
pub(crate) fn holes_of(version: &str) -> Option<String> {
    let [major, minor, patch] = SAFE;
    (numbers(version) < SAFE).then(|| {
        format!(
            "version {version} of NATS has holes that need no login: {major}.{minor}.{patch} or newer has them mended"
        )
    })
}

/// Anybody who can speak on the bus can call tools as any user, so a server that lets everybody in is
/// used only where the settings allow it.
fn fit(settings: &BusSettings, info: &ServerInfo) -> Result<(), OpenError> {
    if numbers(&info.version) < OLDEST {
        let [major, minor, _] = OLDEST;
        return Err(OpenError::Unfit(format!("version {} is older than {major}.{minor}", info.version)));
    }
    if !info.headers {
        return Err(OpenError::Unfit("the server has headers switched off".to_owned()));
    }
    if info.max_payload < SMALLEST {
        let text =
            format!("messages may have {} bytes only: max_payload has to be {SMALLEST}", info.max_payload);
        return Err(OpenError::Unfit(text));
    }
    if !settings.open_allowed && !info.auth_required {
        return Err(OpenError::Unfit(
            "the server asks nobody for a login and is not on this machine; give it accounts, or set NATS_AUTH=none"
                .to_owned(),
        ));
    }
    Ok(())
}

pub(crate) fn explain(error: async_nats::ConnectError) -> OpenError {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    match error.kind() {
        ConnectErrorKind::Authentication
        | ConnectErrorKind::AuthorizationViolation
        | ConnectErrorKind::ServerParse
        | ConnectErrorKind::Tls => OpenError::Unfit(text),
        // The client says so of the handshake as of every other loss of the connection. No other server comes by
        // waiting.
        _ if text.contains("certificate") || text.contains("corrupt message") => OpenError::Unfit(text),
        _ => OpenError::Unreachable(text),
    }
}
