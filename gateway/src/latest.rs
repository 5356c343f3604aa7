//! The latest versions of packages: asked for side by side, and remembered for a while.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use mcp_shared::{
    error::WorkerError,
    limits,
    package::{Latest, LatestQuery},
};
use tokio::time::Instant;

/// What registries said lately.
#[derive(Default)]
pub struct LatestVersions(Mutex<HashMap<LatestQuery, (Instant, String)>>);

impl LatestVersions {
    /// The latest versions, in the order of the questions. Only what nobody asked for lately goes to the
    /// registries, each package once.
    pub async fn look_up<F>(
        &self,
        queries: &[LatestQuery],
        ask: impl FnOnce(Vec<LatestQuery>) -> F,
    ) -> Vec<Latest>
    where
        F: Future<Output = Result<Vec<Latest>, WorkerError>>,
    {
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
            let found = match ask(unknown.clone()).await {
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

#[cfg(test)]
mod tests {
    use mcp_shared::{error::ErrorCode, package::Runtime};

    use super::*;

    fn query(name: &str, index: Option<&str>) -> LatestQuery {
        let pip_index_url = index.map(str::to_owned);
        LatestQuery {
            name: name.to_owned(),
            runtime: Runtime::Node,
            pip_index_url,
            pip_extra_index_url: None,
        }
    }

    /// What came of each question, in short.
    fn shown(answers: &[Latest]) -> Vec<String> {
        let show = |latest: &Latest| match latest {
            Latest::Version(version) => version.clone(),
            Latest::Unknown(error) => error.code.to_string(),
        };
        answers.iter().map(show).collect()
    }

    #[tokio::test]
    async fn a_registry_is_asked_once_for_each_package() {
        let latest = LatestVersions::default();
        let [one, two, elsewhere] = [query("a", None), query("b", None), query("a", Some("https://x"))];
        let down = || Latest::Unknown(WorkerError::new(ErrorCode::RegistryUnavailable, "down"));
        let answers = latest
            .look_up(&[one.clone(), two.clone(), one.clone(), elsewhere.clone()], async |asked| {
                assert_eq!(asked, [one.clone(), two.clone(), elsewhere.clone()]);
                Ok(vec![Latest::Version("1.0.0".into()), down(), Latest::Version("2.0.0".into())])
            })
            .await;
        assert_eq!(shown(&answers), ["1.0.0", "registry_unavailable", "1.0.0", "2.0.0"]);
        // What is known is not asked for again, and what failed is.
        let answers = latest
            .look_up(&[one.clone(), two.clone()], async |asked| {
                assert_eq!(asked, std::slice::from_ref(&two));
                Err(WorkerError::new(ErrorCode::NoWorker, "nobody"))
            })
            .await;
        assert_eq!(shown(&answers), ["1.0.0", "no_worker"]);
        let answers = latest.look_up(&[one], async |_| panic!("nothing is to be asked")).await;
        assert_eq!(shown(&answers), ["1.0.0"]);
        let answers = latest.look_up(&[two], async |_| Ok(Vec::new())).await;
        assert_eq!(shown(&answers), ["internal"]);
    }
}
