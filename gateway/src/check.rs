//! `mcp-gateway check`.

use std::process::ExitCode;

use mcp_shared::{check, config::Settings};
use mcp_worker::bus;

use crate::tls;

/// Prints settings and findings. Nothing is created that is not there already.
pub async fn run(settings: &Settings) -> ExitCode {
    let mut findings = vec![("listen", check::listen(&settings.host, settings.port).await)];
    if let Some(files) = &settings.http.tls {
        findings.push(("tls", tls::check(files)));
    }
    let stored = check::storage(settings).await;
    findings.extend(stored.findings);
    if let Some(settings) = &settings.bus {
        findings.extend(bus::check(settings, stored.node.as_ref()).await);
    }
    check::print(settings, &findings)
}
