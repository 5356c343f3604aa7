//! What workers do about packages without being asked: they bring those of mcp-api to the fleet, and remove
//! what nothing needs any more.

use std::{collections::HashSet, sync::atomic::Ordering};

use mcp_shared::{
    limits,
    package::{Generation, Job, JobKind, Runtime, names},
    store::StoreError,
    timestamp::Timestamp,
    vault::{Vault, VaultError},
};

use super::Runner;

impl Runner {
    /// Orders what brings packages that mcp-api installed to this fleet: the version that it had, with a
    /// lock. Where that fails their servers stay as they are.
    pub(super) async fn adopt(&self) -> Result<(), VaultError> {
        let vault = &self.host.vault;
        for package in vault.packages().await? {
            let package = package.value;
            let server = &package.mcp_server_id;
            if package.generation.is_some() {
                continue;
            }
            match vault.job(server).await {
                Ok(None) => {}
                Ok(Some(_)) => continue,
                Err(error @ VaultError::Store(StoreError::Unavailable { .. })) => return Err(error),
                // One that cannot be read keeps its own package from being adopted, and no other.
                Err(error) => {
                    tracing::error!(server = %server, %error, "a package of mcp-api is left as it is");
                    continue;
                }
            }
            // mcp-api wrote the word that it was asked for, which is no version.
            let version = (package.version != "latest").then(|| package.version.clone());
            let valid = |version: &String| match package.runtime {
                Runtime::Node => names::npm_name(&package.name) && names::npm_version(version),
                Runtime::Python => names::python_name(&package.name) && names::python_version(version),
            };
            let none = String::from(if package.runtime == Runtime::Node { "latest" } else { "0" });
            if vault.server(server).await?.is_none() || !valid(version.as_ref().unwrap_or(&none)) {
                continue;
            }
            tracing::info!(server = %server, package.name = %package.name, "a package of mcp-api is installed here");
            let job = Job::new(JobKind::Upgrade, server.clone(), package.spec(version), None);
            match vault.insert_job(&job).await {
                Ok(_) | Err(VaultError::Store(StoreError::AlreadyExists { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes locks that no server has, what was made of them, and old news of servers that do not exist.
    pub(super) async fn tidy(&self) {
        let vault = &self.host.vault;
        let forget = async {
            let locks = vault.locks().await?;
            let jobs = vault.jobs(true).await?;
            let mut kept: HashSet<Generation> = kept(vault).await?;
            // An upgrade may have to be taken back.
            let previous = jobs.iter().filter_map(|job| job.value.previous.as_ref()?.generation.clone());
            kept.extend(previous);
            let over = Timestamp::now().millis() - i64::try_from(limits::JOB_MEMORY.as_millis()).unwrap_or(0);
            for job in vault.jobs(false).await? {
                let old = job.value.finished.is_some_and(|finished| finished.millis() < over);
                if old && vault.server(&job.value.server_name).await?.is_none() {
                    vault.delete_job(&job.value.server_name, job.revision).await?;
                }
            }
            // What a job has just resolved is not in a record yet.
            if jobs.is_empty() {
                for generation in locks.iter().filter(|generation| !kept.contains(generation)) {
                    vault.delete_lock(generation).await?;
                }
            }
            Ok::<_, VaultError>(kept)
        };
        match forget.await {
            Ok(kept) => self.host.packages.sweep(kept).await,
            Err(error) => {
                tracing::warn!(error.cause = %error, "what nothing runs any more was not removed yet");
                self.host.packages.sweep_due.store(true, Ordering::Release);
            }
        }
    }
}

/// The installations that servers have.
async fn kept(vault: &Vault) -> Result<HashSet<Generation>, VaultError> {
    let servers = vault.servers().await?;
    let of_servers = servers.into_iter().filter_map(|server| Some(server.value.package?.generation));
    let packages = vault.packages().await?;
    let of_packages = packages.into_iter().filter_map(|package| package.value.generation);
    Ok(of_servers.chain(of_packages).collect())
}
