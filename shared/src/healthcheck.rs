//! The command `healthcheck`: asks the program that runs here with these settings whether it lives or can serve. It is
//! for containers, which may have no other program that could ask.

use std::{net::IpAddr, process::ExitCode, time::Duration};

use reqwest::{Client, redirect::Policy};

use crate::{
    config::ListenHost,
    lifecycle::{EX_CONFIG, address, complain, explain},
    tls,
};

/// How long an answer may take. Orchestrators have limits of their own, and most are longer.
const PATIENCE: Duration = Duration::from_secs(4);

/// Asks, and says by the exit status what came of it: 0 for an answer of 200, 1 for any other or none, and 78 where the
/// settings do not say which port it is. `https` is whether the program speaks TLS; its certificate is for other names
/// than this address, and not looked at. `ready` asks whether it can serve, and not only whether it lives.
pub async fn ask(host: &ListenHost, port: u16, https: bool, ready: bool) -> ExitCode {
    if port == 0 {
        complain(
            "healthcheck: the program listens on a port that the system picked; set one to be asked there",
        );
        return ExitCode::from(EX_CONFIG);
    }
    let (scheme, path) = (if https { "https" } else { "http" }, if ready { "readyz" } else { "healthz" });
    let url = format!("{scheme}://{}/{path}", address(&reachable(host), port));
    match answer(&url).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            complain(&format!("healthcheck: {url}: {text}"));
            ExitCode::FAILURE
        }
    }
}

async fn answer(url: &str) -> Result<(), String> {
    tls::install_provider();
    let client = Client::builder()
        .no_proxy()
        .redirect(Policy::none())
        .timeout(PATIENCE)
        .tls_danger_accept_invalid_certs(true)
        .build()
        .map_err(|error| explain(&error))?;
    let response = client.get(url).send().await.map_err(|error| explain(&error.without_url()))?;
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    Err(format!("{status} {}", response.text().await.unwrap_or_default()))
}

/// An address at which a program that listens on `host` can be reached from here.
fn reachable(host: &ListenHost) -> ListenHost {
    match host {
        ListenHost::Address(IpAddr::V4(address)) if address.is_unspecified() => {
            ListenHost::Address(IpAddr::from([127, 0, 0, 1]))
        }
        ListenHost::Address(IpAddr::V6(address)) if address.is_unspecified() => {
            ListenHost::Address(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]))
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_asked_at_one_of_this_machine() {
        for (listens, asked) in [
            ("0.0.0.0", "127.0.0.1:80"),
            ("::", "[::1]:80"),
            ("192.0.2.1", "192.0.2.1:80"),
            ("127.0.0.2", "127.0.0.2:80"),
        ] {
            let host = ListenHost::Address(listens.parse().unwrap());
            assert_eq!(address(&reachable(&host), 80), asked);
        }
    }
}
