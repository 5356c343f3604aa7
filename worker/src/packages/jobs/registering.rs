//! How what a job made comes into force, and is taken back: records, and the news of them.

use std::time::Duration;

use mcp_shared::{
    error::{ErrorCode, WorkerError},
    ids::ServerName,
    package::{Job, JobKind, PackageRecord},
    server::ServerRecord,
    store::StoreError,
    timestamp::Timestamp,
    vault::VaultError,
    worker_api::Change,
};
use tokio::time::sleep;

use super::{ATTEMPTS, Runner, Stop, changed, unknown};

impl Runner {
    /// Takes back what an installation that failed for good had registered.
    pub(super) async fn undo(&self, job: &Job) {
        let Some(draft) = job.server.as_ref().filter(|_| job.kind == JobKind::Install) else { return };
        let vault = &self.host.vault;
        let undone = async {
            let server = vault.server(&job.server_name).await?;
            let package = vault.package(&job.server_name).await?;
            let whole = package.is_some_and(|package| package.value.job_id.as_deref() == Some(&job.id));
            if whole || server.is_none_or(|server| server.value.id != draft.id) {
                return Ok(false);
            }
            vault.delete_server(&job.server_name).await
        };
        match undone.await {
            Ok(false) => {}
            Ok(true) => drop(self.announce(&job.server_name).await),
            Err(error) => tracing::error!(server = %job.server_name, %error, "a server was not taken back"),
        }
    }

    /// Adds the server and the package. The server first: it is what others see.
    pub(super) async fn register(
        &self,
        job: &Job,
        server: &ServerRecord,
        record: &PackageRecord,
    ) -> Result<(), Stop> {
        let vault = &self.host.vault;
        match vault.insert_server(server).await {
            Ok(_) => {}
            Err(VaultError::Store(StoreError::AlreadyExists { existing })) => {
                let stored = vault.server(&server.name).await?;
                let Some(stored) = stored.filter(|stored| stored.value.id == server.id) else {
                    let text = format!("Server with name {existing} already exists");
                    return Err(WorkerError::new(ErrorCode::ServerAlreadyExists, text).into());
                };
                // An attempt that was cut short added it.
                vault.replace_server(server, stored.revision).await?;
            }
            Err(error) => return Err(error.into()),
        }
        match vault.insert_package(record).await {
            Ok(_) => {}
            Err(VaultError::Store(StoreError::AlreadyExists { .. })) => {
                // What an earlier server of the name left behind.
                let stored = vault.package(&job.server_name).await?.ok_or_else(|| unknown(&server.name))?;
                vault.replace_package(record, stored.revision).await?;
            }
            Err(error) => return Err(error.into()),
        }
        // Somebody may have removed the server as soon as it was there.
        if vault.server(&server.name).await?.is_none_or(|stored| stored.value.id != server.id) {
            vault.delete_package(&server.name).await?;
            return Err(unknown(&server.name).into());
        }
        Ok(())
    }

    /// Has the server run the new installation. What others changed about it meanwhile stays.
    pub(super) async fn switch(
        &self,
        from: &ServerRecord,
        next: &ServerRecord,
        record: &PackageRecord,
    ) -> Result<(), Stop> {
        let vault = &self.host.vault;
        for _ in 0..ATTEMPTS {
            let stored = vault.server(&next.name).await?.ok_or_else(|| unknown(&next.name))?;
            let mut server = stored.value;
            if server.id != next.id {
                return Err(unknown(&next.name).into());
            }
            let known = [(&from.package, &from.transport), (&next.package, &next.transport)];
            if !known.contains(&(&server.package, &server.transport)) {
                // What was tried is not what would run now.
                return Err(changed().into());
            }
            server.transport = next.transport.clone();
            server.package.clone_from(&next.package);
            server.updated_at = Timestamp::now();
            match vault.replace_server(&server, stored.revision).await {
                Ok(_) => {}
                Err(VaultError::Store(StoreError::Conflict)) => continue,
                Err(error) => return Err(error.into()),
            }
            let mut record = record.clone();
            let stored = vault.package(&next.name).await?.ok_or_else(|| unknown(&next.name))?;
            record.enabled = server.enabled;
            record.latest_version.clone_from(&stored.value.latest_version);
            match vault.replace_package(&record, stored.revision).await {
                Ok(_) => return Ok(()),
                Err(VaultError::Store(StoreError::Conflict)) => continue,
                Err(error) => return Err(error.into()),
            }
        }
        Err(changed().into())
    }

    /// Tells every worker. Whoever does not hear it now finds it in the store before long.
    pub(super) async fn announce(&self, server: &ServerName) -> Result<(), Stop> {
        let mut last = None;
        for _ in 0..ATTEMPTS {
            match self.fleet.announce(Change::Server { server: server.clone() }).await {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
            sleep(Duration::from_secs(1)).await;
        }
        let cause = last.map(|error| error.message).unwrap_or_default();
        tracing::warn!(server = %server, cause, "not every worker was told of an installation");
        let text = "Not every worker could be told of the installation";
        Err(WorkerError::new(ErrorCode::StoreUnavailable, text).into())
    }
}
