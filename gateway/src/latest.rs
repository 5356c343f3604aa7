//! The latest versions of packages: asked for side by side, and remembered for a while.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use mcp_shared::{
    error::WorkerError,
    limits,
    package::{Latest, LatestQuery},
    worker_api::WorkerApi,
};
use tokio::time::Instant;

/// What registries said lately.
#[derive(Default)]
pub struct LatestVersions(Mutex<HashMap<LatestQuery, (Instant, String)>>);

impl LatestVersions {
    /// The latest versions, in the order of the questions. Only what nobody asked for lately goes to the
    /// registries, each package once.
    pub async fn look_up(&self, worker: &dyn WorkerApi, queries: &[LatestQuery]) -> Vec<Latest> {
        let mut answers = HashMap::new();
        let mut unknown: Vec<LatestQuery> = Vec::new();
        for query in queries {
            if let Some(version) = self.known(query) {
                answers.insert(query.clone(), Latest::Version(version));
            } else if !unknown.contains(query) {
                unknown.push(query.clone());
            }
        }
        if !unknown.is_empty() {
            let found = match worker.latest(unknown.clone()).await {
                Ok(found) => found,
                Err(error) => vec![Latest::Unknown(error); unknown.len()],
            };
            for (query, latest) in unknown.into_iter().zip(found) {
                if let Latest::Version(version) = &latest {
                    self.remember(query.clone(), version.clone());
                }
                answers.insert(query, latest);
            }
        }
        let answer = |query| answers.get(query).cloned();
        let missing = || Latest::Unknown(WorkerError::internal("a question was not answered"));
        queries.iter().map(|query| answer(query).unwrap_or_else(missing)).collect()
    }

    fn known(&self, query: &LatestQuery) -> Option<String> {
        let versions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, version) = versions.get(query)?;
        (since.elapsed() < limits::LATEST_MEMORY).then(|| version.clone())
    }

    fn remember(&self, query: LatestQuery, version: String) {
        let mut versions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // What is left is at most what was asked for within the time.
        versions.retain(|_, (since, _)| since.elapsed() < limits::LATEST_MEMORY);
        versions.insert(query, (Instant::now(), version));
    }
}
