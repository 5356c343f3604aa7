//! `get_url_content`: a page as a person would see it, less what is not its content, as Markdown.

use std::sync::Arc;

use mcp_shared::{egress::EgressError, limits};
use serde_json::{Value, json};
use url::Url;

use super::{
    convert::{ConvertError, Document, Source},
    document,
    fetch::{FetchError, Fetched, fetch},
    page::{Failure, Rendered, render},
    webtools::WebTools,
};

/// How often a page is rendered anew whose browser went away.
const ATTEMPTS: usize = 2;
/// What is said of one that was.
const AGAIN: &str = "the browser ended while it rendered the page, which a new one loaded again.";
/// Why the browser left to us what it was asked for: most often that is a document, sometimes a page to be downloaded.
const NO_PAGE: &str = "the browser does not show it as a page";

/// What is at a URL.
pub struct Content {
    /// Where it was in the end, if that is not where it was asked for.
    moved: Option<String>,
    document: Document,
    /// Whether the browser rendered it.
    rendered: bool,
    /// What its reader should know.
    notes: Vec<String>,
}

/// Why there is nothing. The texts are for callers.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    #[error(transparent)]
    Egress(#[from] EgressError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Convert(#[from] ConvertError),
    #[error("{0}")]
    Page(String),
    #[error("the browser ended again and again while it rendered the page")]
    Browser,
    #[error(
        "the browser was ended, twice, since all pages that it had took too much memory together; try again in a moment"
    )]
    Crowded,
    #[error("it has no text: it is {0}")]
    NoText(String),
    #[error("too many pages are being read right now; try again in a moment")]
    Busy,
    #[error("this worker is stopping")]
    Stopping,
}

impl Content {
    /// As the result of a tool.
    pub fn into_result(self) -> Value {
        let mut parts = Vec::new();
        if !self.document.title.is_empty() {
            parts.push(format!("# {}", self.document.title));
        }
        parts.extend(self.moved.as_ref().map(|url| format!("(from {url})")));
        if self.document.text.is_empty() {
            parts.push("(There is no text.)".to_owned());
        } else {
            parts.push(self.document.text);
        }
        if !self.notes.is_empty() {
            let notes: Vec<_> = self.notes.iter().map(|note| format!("*Note: {note}*")).collect();
            parts.push(format!("---\n\n{}", notes.join("\n\n")));
        }
        json!({
            "content": [{"type": "text", "text": parts.join("\n\n")}],
            "isError": false,
            "_meta": {"mcp-api/rendered": self.rendered},
        })
    }

    fn new(asked: &Url, url: &str, status: Option<u16>, document: Document, rendered: bool) -> Self {
        let mut notes = Vec::new();
        if let Some(status) = status.filter(|status| *status >= 400) {
            notes.push(format!("the server answered with status {status}."));
        }
        if document.cut {
            notes.push(format!("only the first {} KiB are here.", limits::WEB_TEXT_BYTES / 1024));
        }
        let bare = |url: &str| url.split('#').next().unwrap_or_default().to_owned();
        let moved = (bare(url) != bare(asked.as_str())).then(|| url.to_owned());
        Self { moved, document, rendered, notes }
    }
}

impl WebTools {
    /// Reads what is at a URL.
    pub async fn content(&self, text: &str) -> Result<Content, ContentError> {
        let mut url = Url::parse(text.trim()).map_err(|_| EgressError::InvalidUrl("is not a URL"))?;
        // It is for whoever reads the page.
        url.set_fragment(None);
        self.http.egress().check_url(&url)?;
        let _place = self.waiting.try_acquire().map_err(|_| ContentError::Busy)?;
        let page = Arc::clone(&self.pages).acquire_owned().await.map_err(|_| ContentError::Stopping)?;
        let page = Arc::new(page);
        let mut error = ContentError::Browser;
        for attempt in 0..ATTEMPTS {
            match render(&self.browsers, &url, &page).await {
                Ok(rendered) => {
                    let mut content = self.rendered(&url, rendered).await?;
                    if attempt > 0 {
                        content.notes.push(AGAIN.to_owned());
                    }
                    return Ok(content);
                }
                Err(Failure::NoPage) => return self.fetched(&url, NO_PAGE).await,
                Err(Failure::NoBrowser(why)) => return self.fetched(&url, &why).await,
                Err(Failure::Failed(text)) => return Err(ContentError::Page(text)),
                // Nothing was changed by reading it.
                Err(Failure::Gone | Failure::Crashed) => error = ContentError::Browser,
                Err(Failure::Crowded) => error = ContentError::Crowded,
            }
        }
        Err(error)
    }

    async fn rendered(&self, asked: &Url, page: Rendered) -> Result<Content, ContentError> {
        let source = Source::Html { url: page.url.clone(), charset: Some("utf-8".to_owned()) };
        let document = self.converter.convert(&source, page.html.as_bytes()).await?;
        let mut content = Content::new(asked, &page.url, page.status, document, true);
        if page.unfinished {
            let seconds = limits::WEB_PAGE_TIMEOUT.as_secs();
            content.notes.push(format!("the page was still loading after {seconds} s."));
        }
        if page.cut {
            content.notes.push("the page is too long to be read as a whole.".to_owned());
        }
        Ok(content)
    }

    /// Fetches it without the browser, because of `why`.
    async fn fetched(&self, asked: &Url, why: &str) -> Result<Content, ContentError> {
        let Fetched { url, status, kind, charset, body } = fetch(&self.http, asked.clone()).await?;
        let document = match Kind::of(&kind, &body) {
            Kind::Html => {
                let source = Source::Html { url: url.to_string(), charset };
                self.converter.convert(&source, &body).await?
            }
            Kind::Pdf => self.converter.convert(&Source::Pdf, &body).await?,
            Kind::Text => {
                let mut text = document::text(&body, charset.as_deref(), false);
                let cut = text.len() > limits::WEB_TEXT_BYTES;
                if cut {
                    let end = (0..=limits::WEB_TEXT_BYTES).rev().find(|at| text.is_char_boundary(*at));
                    text.truncate(end.unwrap_or_default());
                }
                Document { title: String::new(), text: text.trim_end().to_owned(), cut }
            }
            Kind::Other => {
                let kind = if kind.is_empty() { "of no known kind".to_owned() } else { kind };
                return Err(ContentError::NoText(mcp_shared::error::shorten(&kind, 64)));
            }
        };
        let is_page = Kind::of(&kind, &body) == Kind::Html;
        let mut content = Content::new(asked, url.as_str(), Some(status), document, false);
        if is_page {
            content.notes.push(format!(
                "fetched without a browser, because {why}: what the page's scripts add is missing."
            ));
        }
        Ok(content)
    }
}

/// What is made of something that was fetched.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Html,
    Pdf,
    Text,
    Other,
}

impl Kind {
    /// By what it says that it is, and by how it begins where it does not say, or says what servers say of anything.
    fn of(kind: &str, body: &[u8]) -> Self {
        let subtype = kind.split_once('/').map(|(_, subtype)| subtype).unwrap_or_default();
        match kind {
            "text/html" | "application/xhtml+xml" => Kind::Html,
            "application/pdf" | "application/x-pdf" => Kind::Pdf,
            "" | "application/octet-stream" | "text/plain" if body.starts_with(b"%PDF-") => Kind::Pdf,
            "" if body.trim_ascii_start().starts_with(b"<") => Kind::Html,
            "" if std::str::from_utf8(body).is_ok() && !body.contains(&0) => Kind::Text,
            _ if kind.starts_with("text/") => Kind::Text,
            _ if subtype.ends_with("json") || subtype.ends_with("xml") => Kind::Text,
            _ if ["javascript", "x-javascript", "yaml", "x-yaml", "toml", "x-ndjson"].contains(&subtype) => {
                Kind::Text
            }
            _ => Kind::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_something_is() {
        for (kind, body, is) in [
            ("text/html", &b"x"[..], Kind::Html),
            ("application/xhtml+xml", b"x", Kind::Html),
            ("application/pdf", b"x", Kind::Pdf),
            ("application/octet-stream", b"%PDF-1.7", Kind::Pdf),
            ("application/octet-stream", b"text", Kind::Other),
            ("", b"%PDF-1.7", Kind::Pdf),
            ("", b" <!doctype html>", Kind::Html),
            ("", b"text", Kind::Text),
            ("", b"a\0b", Kind::Other),
            ("text/markdown", b"x", Kind::Text),
            ("application/ld+json", b"{}", Kind::Text),
            ("application/atom+xml", b"<a/>", Kind::Text),
            ("application/javascript", b"x", Kind::Text),
            ("image/png", b"x", Kind::Other),
            ("image/svg+xml", b"<svg/>", Kind::Text),
        ] {
            assert_eq!(Kind::of(kind, body), is, "{kind} {body:?}");
        }
    }
}
