//! Packages, locks and jobs. What a job is to register has the variables of a server, and they are encrypted as
//! those are.

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};

use super::{Vault, VaultError};
use crate::{
    ids::ServerName,
    package::{Generation, Job, Lock, PackageRecord},
    store::{Collection, Document, Revision, SealedServer, StoreError, Versioned},
};

impl Vault {
    /// All installed packages, oldest first. Records that cannot be read are logged and left out.
    pub async fn packages(&self) -> Result<Vec<Versioned<PackageRecord>>, VaultError> {
        let stored = self.store.documents(Collection::Packages, false).await?;
        Ok(stored.into_iter().filter_map(|stored| readable("a package", stored)).collect())
    }

    /// The package that a server runs.
    pub async fn package(&self, server: &ServerName) -> Result<Option<Versioned<PackageRecord>>, VaultError> {
        let stored = self.store.document(Collection::Packages, server.as_str()).await?;
        stored.map(|stored| read("a package", stored)).transpose()
    }

    /// Adds a package's record.
    pub async fn insert_package(&self, package: &PackageRecord) -> Result<Revision, VaultError> {
        Ok(self.store.insert_document(Collection::Packages, &write(package)?).await?)
    }

    /// Replaces a package's record that still has the revision `expected`.
    pub async fn replace_package(
        &self,
        package: &PackageRecord,
        expected: Revision,
    ) -> Result<Revision, VaultError> {
        Ok(self.store.replace_document(Collection::Packages, &write(package)?, expected).await?)
    }

    /// Removes a package's record; says whether there was one.
    pub async fn delete_package(&self, server: &ServerName) -> Result<bool, VaultError> {
        Ok(self.store.delete_document(Collection::Packages, server.as_str(), None).await?)
    }

    /// A lock by the name of what is made of it.
    pub async fn lock(&self, generation: &Generation) -> Result<Option<Lock>, VaultError> {
        let stored = self.store.document(Collection::PackageLocks, generation.as_str()).await?;
        Ok(stored.map(|stored| read("a lock", stored)).transpose()?.map(|stored| stored.value))
    }

    /// Keeps a lock; one that is there already is the same.
    pub async fn put_lock(&self, lock: &Lock) -> Result<Generation, VaultError> {
        let generation = lock.generation().map_err(|error| corrupt("a lock", &error))?;
        let mut document = write(lock)?;
        document.insert(Collection::PackageLocks.key().to_owned(), generation.as_str().into());
        match self.store.insert_document(Collection::PackageLocks, &document).await {
            Ok(_) | Err(StoreError::AlreadyExists { .. }) => Ok(generation),
            Err(error) => Err(error.into()),
        }
    }

    /// The generations of all locks.
    pub async fn locks(&self) -> Result<Vec<Generation>, VaultError> {
        let key = Collection::PackageLocks.key();
        let stored = self.store.documents(Collection::PackageLocks, false).await?;
        let names = stored.iter().filter_map(|stored| Generation::parse(stored.value.get(key)?.as_str()?));
        Ok(names.collect())
    }

    /// Removes a lock that no server needs any more.
    pub async fn delete_lock(&self, generation: &Generation) -> Result<bool, VaultError> {
        Ok(self.store.delete_document(Collection::PackageLocks, generation.as_str(), None).await?)
    }

    /// The jobs, or only those that are queued or running.
    pub async fn jobs(&self, active: bool) -> Result<Vec<Versioned<Job>>, VaultError> {
        let stored = self.store.documents(Collection::Jobs, active).await?;
        let open = |stored| {
            self.open_job(readable("a job", stored)?)
                .inspect_err(|error| tracing::error!(%error, "a job is left out"))
                .ok()
        };
        Ok(stored.into_iter().filter_map(open).collect())
    }

    /// The job of a server.
    pub async fn job(&self, server: &ServerName) -> Result<Option<Versioned<Job>>, VaultError> {
        let stored = self.store.document(Collection::Jobs, server.as_str()).await?;
        stored.map(|stored| self.open_job(read("a job", stored)?)).transpose()
    }

    /// Adds the job of a server that has none.
    pub async fn insert_job(&self, job: &Job) -> Result<Revision, VaultError> {
        Ok(self.store.insert_document(Collection::Jobs, &self.seal_job(job)?).await?)
    }

    /// Replaces a server's job that still has the revision `expected`.
    pub async fn replace_job(&self, job: &Job, expected: Revision) -> Result<Revision, VaultError> {
        Ok(self.store.replace_document(Collection::Jobs, &self.seal_job(job)?, expected).await?)
    }

    /// Removes a job that still has the revision `expected`.
    pub async fn delete_job(&self, server: &ServerName, expected: Revision) -> Result<bool, VaultError> {
        Ok(self.store.delete_document(Collection::Jobs, server.as_str(), Some(expected)).await?)
    }

    fn seal_job(&self, job: &Job) -> Result<Document, VaultError> {
        let mut job = job.clone();
        job.server = job.server.map(|server| self.seal_server(&server)).transpose()?.map(|sealed| sealed.0);
        write(&job)
    }

    fn open_job(&self, mut job: Versioned<Job>) -> Result<Versioned<Job>, VaultError> {
        if let Some(server) = job.value.server.take() {
            let sealed = Versioned { revision: job.revision, value: SealedServer(server) };
            job.value.server = Some(self.open_server(sealed)?.value);
        }
        Ok(job)
    }
}

pub(super) fn read<T: DeserializeOwned>(
    what: &str,
    stored: Versioned<Document>,
) -> Result<Versioned<T>, VaultError> {
    let value = serde_json::from_value(serde_json::Value::Object(stored.value));
    let value = value.map_err(|error| corrupt(what, &error))?;
    Ok(Versioned { revision: stored.revision, value })
}

pub(super) fn readable<T: DeserializeOwned>(what: &str, stored: Versioned<Document>) -> Option<Versioned<T>> {
    read(what, stored).inspect_err(|error| tracing::error!(%error, "a document is left out")).ok()
}

pub(super) fn write(value: &impl Serialize) -> Result<Document, VaultError> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::Object(document)) => Ok(document),
        Ok(_) => Err(corrupt("a document", &"it is no object")),
        Err(error) => Err(corrupt("a document", &error)),
    }
}

pub(super) fn corrupt(what: &str, error: &dyn fmt::Display) -> VaultError {
    StoreError::Corrupt { what: format!("{what} ({error})") }.into()
}
