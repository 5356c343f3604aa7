//! What is installed on the first start of a store, so that there is something to call: ordered once by
//! whichever node comes first, and never again, whatever became of it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use mcp_shared::{
    config::InstallOnStart,
    egress::Egress,
    error::WorkerError,
    package::{Job, JobKind},
    store::{Fact, INSTALLED_ON_START as ORDERED, StoreError},
    vault::VaultError,
};
use serde_json::json;
use tokio::time::sleep;

use crate::{
    app::App,
    body::Fields,
    problem::Problem,
    routes::{
        package_input::{self, Install},
        servers::{not_reserved, uninstalled},
    },
};

/// What the ids of these jobs end with. Nodes that start together make the same one.
const MARK: &str = "on-start";
/// How long to wait before trying again when the store is away.
const PAUSE: Duration = Duration::from_secs(5);

/// Orders what is to be installed, unless that was done before. It ends when it is done, or with the program.
pub async fn run(app: Arc<App>, wanted: Vec<InstallOnStart>) {
    if wanted.is_empty() {
        return;
    }
    loop {
        match order(&app, &wanted).await {
            Ok(()) => return,
            Err(error @ VaultError::Store(StoreError::Unavailable { .. } | StoreError::Full)) => {
                tracing::debug!(%error, "what is installed on the first start could not be ordered yet");
            }
            Err(error) => {
                tracing::error!(%error, "what is installed on the first start cannot be ordered");
                return;
            }
        }
        tokio::select! {
            () = sleep(PAUSE) => {}
            () = app.stop.cancelled() => return,
        }
    }
}

async fn order(app: &App, wanted: &[InstallOnStart]) -> Result<(), VaultError> {
    let store = app.vault.store();
    if store.fact(Fact::AppState, ORDERED).await?.is_some() {
        return Ok(());
    }
    for one in wanted {
        match order_one(app, one).await? {
            Ordered::Now => tracing::info!(package = one.package, server = %one.server, "to be installed"),
            Ordered::Before => {}
            Ordered::Never(problem) => {
                let (_, reason) = problem.into_parts();
                tracing::warn!(package = one.package, server = %one.server, reason, "not to be installed");
            }
        }
    }
    if let Err(error) = app.worker.wake().await {
        tracing::debug!(%error, "workers will find the jobs by themselves");
    }
    // Last: whoever is cut off before this leaves the rest to the next start, which finds what is there.
    store.put_once(Fact::AppState, ORDERED, "true").await?;
    Ok(())
}

enum Ordered {
    Now,
    /// It is there, or was and somebody removed it, or is being installed.
    Before,
    /// It cannot be.
    Never(Problem),
}

async fn order_one(app: &App, one: &InstallOnStart) -> Result<Ordered, VaultError> {
    let removed = app.vault.store().fact(Fact::AppState, &uninstalled(&one.server)).await?;
    let known = removed.is_some() || app.vault.package(&one.server).await?.is_some();
    if known || app.vault.job(&one.server).await?.is_some() {
        return Ok(Ordered::Before);
    }
    let key = one.server.case_key();
    if app.vault.store().servers().await?.iter().any(|server| server.value.0.name.case_key() == key) {
        return Ok(Ordered::Before);
    }
    let Install { spec, server } = match install(one, &app.egress) {
        Ok(install) => install,
        Err(problem) => return Ok(Ordered::Never(problem)),
    };
    let mut job = Job::new(JobKind::Install, one.server.clone(), spec, Some(server));
    job.id = format!("{}~{MARK}", one.server);
    match app.vault.insert_job(&job).await {
        Ok(_) => Ok(Ordered::Now),
        Err(VaultError::Store(StoreError::AlreadyExists { .. })) => Ok(Ordered::Before),
        Err(error) => Err(error),
    }
}

/// The same as a request with these two names.
fn install(one: &InstallOnStart, egress: &Egress) -> Result<Install, Problem> {
    not_reserved(&one.server)?;
    let body = json!({"name": one.package, "serverName": one.server});
    let body = serde_json::to_vec(&body).map(Bytes::from).map_err(WorkerError::internal)?;
    package_input::install(&Fields::parse(&body)?, egress)
}

#[cfg(test)]
mod tests {
    use mcp_shared::ids::ServerName;

    use super::*;

    #[test]
    fn an_entry_is_a_request_like_any_other() {
        let one = |server| InstallOnStart {
            package: "@missionsquad/mcp-github".to_owned(),
            server: ServerName::from_stored(server),
        };
        let Install { spec, server } = install(&one("github"), &Egress::default()).unwrap();
        assert_eq!((spec.name.as_str(), server.name.as_str()), ("@missionsquad/mcp-github", "github"));
        for server in ["webtools", "jobs"] {
            assert!(install(&one(server), &Egress::default()).is_err(), "{server}");
        }
    }
}
