//! The tools for the web: what they are called, what they take, and who does their work.

use std::{path::PathBuf, sync::Arc};

use mcp_shared::{config::WebToolSettings, error::shorten, json::RawJson};
use serde_json::{Map, Value, json};
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    browser::Browsers,
    convert::Converter,
    search::{Query, Search},
};
use crate::{outgoing::Outgoing, supervisor::Supervisor};

/// Pages that may wait, for each that may be read. Whoever waits takes up a place of the whole server, which searches
/// need as well.
const WAITING: usize = 4;

/// The tools, and what they work with.
pub struct WebTools {
    search: Option<Search>,
    pub(super) http: Outgoing,
    pub(super) browsers: Arc<Browsers>,
    pub(super) converter: Converter,
    /// A permit for each page that is read.
    pub(super) pages: Arc<Semaphore>,
    /// A permit for each page that is read or waits for its turn.
    pub(super) waiting: Semaphore,
}

/// How a call ended.
pub enum Answer {
    /// With a result, which may say that it failed.
    Result(Value),
    /// It was not begun: its arguments make no sense.
    Invalid(String),
}

impl WebTools {
    /// The tools of one worker. `executable` is this program.
    pub fn new(
        settings: WebToolSettings,
        http: Outgoing,
        executable: PathBuf,
        supervisor: Arc<Supervisor>,
        (tasks, stopping): (TaskTracker, CancellationToken),
    ) -> Arc<Self> {
        Arc::new(Self {
            search: settings.searxng.clone().map(Search::new),
            waiting: Semaphore::new(settings.pages * (1 + WAITING)),
            pages: Arc::new(Semaphore::new(settings.pages)),
            converter: Converter::new(executable, Arc::clone(&supervisor)),
            browsers: Browsers::new(settings, http.egress().clone(), supervisor, tasks, stopping),
            http,
        })
    }

    /// The tools that there are, as MCP lists them.
    pub fn listing(&self) -> Vec<Value> {
        let search = self.search.is_some().then(web_search);
        search.into_iter().chain([get_url_content()]).collect()
    }

    /// The same as one JSON array.
    pub fn tools(&self) -> RawJson {
        RawJson::from_parsed(Value::from(self.listing()).to_string().into_bytes().into())
    }

    /// Calls one of them.
    pub async fn call(&self, name: &str, arguments: &Map<String, Value>) -> Answer {
        match (name, &self.search) {
            ("web_search", Some(search)) => match Query::of(arguments) {
                Ok(query) => Answer::Result(match search.search(&query).await {
                    Ok(text) => result(&text, false),
                    Err(error) => result(&format!("Search error: {error}"), true),
                }),
                Err(text) => Answer::Invalid(text),
            },
            ("get_url_content", _) => match arguments.get("url") {
                Some(Value::String(url)) => Answer::Result(match self.content(url).await {
                    Ok(content) => content.into_result(),
                    Err(error) => result(&format!("Fetch error: {error}"), true),
                }),
                _ => Answer::Invalid("url is required and must be a string".to_owned()),
            },
            // As mcp-api says it.
            _ => Answer::Result(result(&format!("Unknown tool: {}", shorten(name, 64)), true)),
        }
    }
}

fn result(text: &str, is_error: bool) -> Value {
    json!({"content": [{"type": "text", "text": text}], "isError": is_error})
}

/// As mcp-api has it.
fn web_search() -> Value {
    json!({
        "name": "web_search",
        "description": "Performs a web search using the SearXNG API, ideal for general queries, news, articles, and \
            online content. Use this for broad information gathering, recent events, or when you need diverse web \
            sources.",
        "inputSchema": {
            "type": "object",
            "properties": {
                "query": {
                    "type": "string",
                    "description": "The search query. This is the main input for the web search",
                },
                "pageno": {
                    "type": "number",
                    "description": "Search page number (starts at 1)",
                    "default": 1,
                },
                "count": {
                    "type": "number",
                    "description": "Number of results per page (default: 10)",
                    "default": 10,
                },
                "time_range": {
                    "type": "string",
                    "description": "Time range of search (day, month, year)",
                    "enum": ["day", "month", "year"],
                },
                "language": {
                    "type": "string",
                    "description": "Language code for search results (e.g., 'en', 'fr', 'de'). Default is \
                        instance-dependent.",
                },
                "safesearch": {
                    "type": "string",
                    "description": "Safe search filter level (0: None, 1: Moderate, 2: Strict) (default: 0)",
                    "enum": ["0", "1", "2"],
                },
            },
            "required": ["query"],
        },
        "annotations": {"readOnlyHint": true, "openWorldHint": true},
    })
}

/// As mcp-api has it.
fn get_url_content() -> Value {
    json!({
        "name": "get_url_content",
        "description": "Get the content of a URL. Use this for further information retrieving to understand the content \
            of each URL.",
        "inputSchema": {
            "type": "object",
            "properties": {"url": {"type": "string", "description": "URL"}},
            "required": ["url"],
        },
        "annotations": {"readOnlyHint": true, "openWorldHint": true},
    })
}
