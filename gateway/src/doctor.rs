//! `mcp-gateway doctor`: what only a gateway stands on, beside what both programs do.

use std::{path::Path, time::Duration};

use mcp_shared::{
    check,
    config::{Auth, Settings},
    doctor::{Area, Finding, limited},
    fleet::Role,
    timestamp::Timestamp,
    tls as provider,
};
use mcp_worker::doctor::{self, DoctorArguments, listening};
use reqwest::{Client, redirect};

use crate::tls;

/// How long a service may take to answer.
const PATIENCE: Duration = Duration::from_secs(4);
/// A certificate that ends within this is to be renewed, in days.
const RENEW: i64 = 14;
const DAY: i64 = 24 * 60 * 60 * 1_000;

/// Looks at everything, side by side.
pub async fn look(settings: &Settings, how: DoctorArguments) -> Vec<Finding> {
    let common = doctor::look(settings, Role::Gateway, how);
    let listen = check::listen(&settings.host, settings.port);
    let services = limited(Area::Reach, "services", services(settings));
    let (mut findings, listen, services) = tokio::join!(common, listen, services);
    findings.push(listening("listen", listen, "PORT and HOST choose another address"));
    findings.extend(services);
    if let Some(files) = &settings.http.tls {
        findings.push(match tls::check(files) {
            Ok(_) => certificate("TLS_CERT_FILE", &files.certificate),
            Err(text) => {
                Finding::error(Area::Tls, "TLS_CERT_FILE", text, "put a certificate with its key there")
            }
        });
    }
    if let Some((path, _)) = settings.bus.as_ref().and_then(|bus| bus.tls.identity.as_ref()) {
        findings.push(certificate("NATS_TLS_CERT_FILE", path));
    }
    findings
}

fn certificate(what: &str, path: &Path) -> Finding {
    let remedy = "renew it, and send this program SIGHUP";
    let Some(ends) = tls::ends(path) else {
        return Finding::warning(
            Area::Tls,
            what,
            "it cannot be read when it ends",
            "put a certificate in PEM there",
        );
    };
    let left = ends.millis() - Timestamp::now().millis();
    match left {
        left if left <= 0 => Finding::error(Area::Tls, what, format!("ended at {ends}"), remedy),
        left if left < RENEW * DAY => {
            Finding::warning(Area::Tls, what, format!("ends at {ends}, in {} days", left / DAY), remedy)
        }
        _ => Finding::ok(Area::Tls, what, format!("ends at {ends}")),
    }
}

/// Services that the settings name. They are asked as the program would ask them.
async fn services(settings: &Settings) -> Vec<Finding> {
    provider::install_provider();
    let client = Client::builder().timeout(PATIENCE).redirect(redirect::Policy::none()).no_proxy().build();
    let Ok(client) = client else { return Vec::new() };
    let issuer = async {
        let Auth::Asked(auth) = &settings.auth else { return None };
        let jwt = auth.jwt.as_ref()?;
        let url = match &jwt.jwks_url {
            Some(url) => url.to_string(),
            None => format!("{}/.well-known/openid-configuration", jwt.issuer.trim_end_matches('/')),
        };
        Some(match asked(&client, &url).await {
            Ok(200) => Finding::ok(Area::Reach, "JWT_ISSUER", "its keys can be fetched"),
            answer => Finding::error(
                Area::Reach,
                "JWT_ISSUER",
                format!("its keys cannot be fetched: {}", said(answer)),
                "correct JWT_ISSUER or JWT_JWKS_URL, or let this machine reach it: nobody's token can be checked",
            ),
        })
    };
    let collector = async {
        let endpoint = &settings.traces.as_ref()?.endpoint;
        Some(match asked(&client, endpoint.as_str()).await {
            // It takes POST only, and says so.
            Ok(status) if status < 500 && status != 404 => {
                Finding::ok(Area::Reach, "OTLP collector", "answers")
            }
            answer => Finding::warning(
                Area::Reach,
                "OTLP collector",
                format!("{}: {}", endpoint.origin().ascii_serialization(), said(answer)),
                "start it, or correct OTEL_EXPORTER_OTLP_ENDPOINT: spans are dropped",
            ),
        })
    };
    let search = async {
        let url = settings.remote.web_tools.searxng.as_ref()?.base();
        Some(match asked(&client, url.as_str()).await {
            Ok(status) if status < 400 => Finding::ok(Area::Reach, "SEARXNG_URL", "answers"),
            answer => Finding::warning(
                Area::Reach,
                "SEARXNG_URL",
                said(answer),
                "start it, or correct SEARXNG_URL: searches fail",
            ),
        })
    };
    let (issuer, collector, search) = tokio::join!(issuer, collector, search);
    [issuer, collector, search].into_iter().flatten().collect()
}

async fn asked(client: &Client, url: &str) -> Result<u16, String> {
    let answer = client.get(url).send().await;
    // The error of the library has the whole URL, which may hold a credential.
    answer.map(|answer| answer.status().as_u16()).map_err(|error| {
        let why = if error.is_timeout() {
            "no answer in time"
        } else if error.is_connect() {
            "no connection"
        } else {
            "no HTTP"
        };
        why.to_owned()
    })
}

fn said(answer: Result<u16, String>) -> String {
    match answer {
        Ok(status) => format!("it answers {status}"),
        Err(why) => why,
    }
}
