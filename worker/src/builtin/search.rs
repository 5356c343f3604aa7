//! `web_search`: a question to the operator's own SearXNG. Where that is is not for users to say, so it may be a private
//! address; what it answers comes from strangers, and is bounded.

use mcp_shared::{config::SearxngUrl, error::shorten, limits};
use reqwest::Client;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::fetch::{BodyError, body};
use crate::outgoing::{chain, plain_client};

/// Results of one page.
const RESULTS: usize = 100;
/// Bytes of a query, and of the name of a language.
const QUERY_BYTES: usize = 2 * 1024;
const LANGUAGE_BYTES: usize = 64;
/// Characters that are shown of one result's title, text and address.
const SHOWN: usize = 4 * 1024;

/// The search engine.
pub struct Search {
    engine: SearxngUrl,
    client: Result<Client, String>,
}

/// What to search for.
#[derive(Debug, PartialEq)]
pub struct Query {
    parameters: Vec<(&'static str, String)>,
    count: usize,
}

/// Why nothing was found out.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    #[error("the search engine cannot be reached")]
    Unreachable,
    #[error("the search engine did not answer within {} s", limits::SEARCH_TIMEOUT.as_secs())]
    Slow,
    #[error("the search engine answered with status {0}")]
    Status(u16),
    #[error(
        "the search engine refuses answers in JSON (status 403): its settings need json under search.formats"
    )]
    NoJson,
    #[error("the search engine's answer is too large")]
    TooLarge,
    #[error("the search engine's answer is not what SearXNG says")]
    Garbage,
}

#[derive(Deserialize)]
struct Found {
    results: Vec<One>,
}

#[derive(Deserialize)]
struct One {
    #[serde(default)]
    title: Option<String>,
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    url: Option<String>,
}

impl Search {
    /// Asks this engine.
    pub fn new(engine: SearxngUrl) -> Self {
        let client = plain_client().build().map_err(|error| chain(&error));
        Self { engine, client }
    }

    /// The results as text, for a model to read.
    pub async fn search(&self, query: &Query) -> Result<String, SearchError> {
        let asked = timeout(limits::SEARCH_TIMEOUT, self.ask(query)).await;
        let found = asked.map_err(|_| SearchError::Slow).and_then(|found| found);
        found.inspect_err(|error| tracing::warn!(%error, "a search came to nothing"))
    }

    async fn ask(&self, query: &Query) -> Result<String, SearchError> {
        let client = self.client.as_ref().map_err(|_| SearchError::Unreachable)?;
        let mut url = self.engine.search();
        url.query_pairs_mut().extend_pairs(&query.parameters);
        let answer = client.get(url).header("accept", "application/json").send().await.map_err(|error| {
            // The address may have a login in it.
            tracing::debug!(error.cause = chain(&error.without_url()), "the search engine is out of reach");
            SearchError::Unreachable
        })?;
        match answer.status().as_u16() {
            200 => {}
            403 => return Err(SearchError::NoJson),
            other => return Err(SearchError::Status(other)),
        }
        let bytes = body(answer, limits::SEARCH_BYTES).await.map_err(|error| match error {
            BodyError::TooLarge => SearchError::TooLarge,
            BodyError::Broken => SearchError::Unreachable,
        })?;
        let found: Found = serde_json::from_slice(&bytes).map_err(|_| SearchError::Garbage)?;
        let text: Vec<_> = found.results.iter().take(query.count).map(One::text).collect();
        Ok(if text.is_empty() { "No results were found.".to_owned() } else { text.join("\n\n") })
    }
}

impl One {
    fn text(&self) -> String {
        let part = |text: &Option<String>| shorten(text.as_deref().unwrap_or_default(), SHOWN);
        let (title, content, url) = (part(&self.title), part(&self.content), part(&self.url));
        format!("Title: {title}\nDescription: {content}\nURL: {url}")
    }
}

impl Query {
    /// Reads a call's arguments. Models like to fill in what they do not mean: `null` and empty texts count as absent,
    /// and numbers may be texts and the other way round. The error is a sentence for the caller.
    pub fn of(arguments: &Map<String, Value>) -> Result<Self, String> {
        let text = |name: &str, most: usize| match arguments.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
            Some(Value::String(text)) if text.len() <= most => Ok(Some(text.trim().to_owned())),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(_) => Err(format!("{name} must be a string of at most {most} bytes")),
        };
        let number = |name: &str, most: usize| match text(name, 16)?.map(|text| text.parse::<f64>()) {
            None => Ok(None),
            // 2.0 is a whole number to whoever knows only one kind of them.
            Some(Ok(number)) if number >= 1.0 && number <= most as f64 && number.fract() == 0.0 => {
                Ok(Some(number as usize))
            }
            Some(_) => Err(format!("{name} must be a whole number from 1 to {most}")),
        };
        let one_of = |name: &str, valid: &[&str]| match text(name, 16)? {
            Some(text) if valid.contains(&text.as_str()) => Ok(Some(text)),
            None => Ok(None),
            Some(_) => Err(format!("{name} must be one of: {}", valid.join(", "))),
        };
        let query =
            text("query", QUERY_BYTES)?.ok_or("query is required and must be a string that is not empty")?;
        let (page, count) = (number("pageno", 1_000)?.unwrap_or(1), number("count", RESULTS)?.unwrap_or(10));
        let language = text("language", LANGUAGE_BYTES)?.filter(|language| language != "all");
        let mut parameters = vec![("q", query), ("format", "json".to_owned()), ("pageno", page.to_string())];
        parameters.push(("count", count.to_string()));
        let optional = [
            ("time_range", one_of("time_range", &["day", "month", "year"])?),
            ("language", language),
            ("safesearch", one_of("safesearch", &["0", "1", "2"])?),
        ];
        parameters.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
        Ok(Self { parameters, count })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn query(arguments: Value) -> Result<Query, String> {
        Query::of(arguments.as_object().unwrap())
    }

    #[test]
    fn parameters_are_those_of_mcp_api() {
        let all = query(json!({
            "query": " trees ", "pageno": "2", "count": 3.0, "time_range": "month", "language": "de", "safesearch": 1,
        }));
        let all = all.unwrap();
        let text: Vec<_> = all.parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let expected =
            "q=trees&format=json&pageno=2&count=3&time_range=month&language=de&safesearch=1".split('&');
        assert_eq!(text, expected.collect::<Vec<_>>());
        assert_eq!(all.count, 3);
        let few =
            query(json!({"query": "x", "language": "all", "time_range": "", "safesearch": null})).unwrap();
        assert_eq!((few.parameters.len(), few.count), (4, 10));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [
            json!({}),
            json!({"query": ""}),
            json!({"query": ["x"]}),
            json!({"query": "x".repeat(3_000)}),
            json!({"query": "x", "pageno": 0}),
            json!({"query": "x", "pageno": 1.5}),
            json!({"query": "x", "pageno": "NaN"}),
            json!({"query": "x", "count": 101}),
            json!({"query": "x", "time_range": "week"}),
            json!({"query": "x", "safesearch": "3"}),
            json!({"query": "x", "language": {}}),
        ] {
            assert!(query(bad.clone()).is_err(), "{bad}");
        }
    }
}
