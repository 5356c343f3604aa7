//! Fetching without a browser: through the guard, redirects one by one.

use http::{HeaderMap, HeaderValue, Method, header};
use mcp_shared::{egress::EgressError, limits};
use reqwest::Response;
use tokio::time::timeout;
use url::Url;

use crate::outgoing::{Outgoing, SendError};

/// What was fetched.
pub struct Fetched {
    /// Where it was in the end.
    pub url: Url,
    /// The status of the answer.
    pub status: u16,
    /// What it says that it is, in lower case, without parameters; empty if it says nothing.
    pub kind: String,
    /// The character set that it names.
    pub charset: Option<String>,
    /// The bytes.
    pub body: Vec<u8>,
}

/// Why nothing was fetched. The texts are for callers.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    #[error(transparent)]
    Egress(#[from] EgressError),
    #[error("the server cannot be reached")]
    Unreachable,
    #[error("the server's certificate is not valid")]
    Tls,
    #[error("the connection broke off")]
    Broken,
    #[error("it redirects more than {} times", limits::WEB_REDIRECTS)]
    Redirects,
    #[error("it redirects to nowhere")]
    Nowhere,
    #[error("it has more than {} MiB", limits::WEB_PAGE_BYTES / 1024 / 1024)]
    TooLarge,
    #[error("it did not come within {} s", limits::WEB_FETCH_TIMEOUT.as_secs())]
    Slow,
}

/// Why a body was not read.
pub enum BodyError {
    /// It has more bytes than it may have.
    TooLarge,
    /// It ended too early.
    Broken,
}

/// Fetches what is at a URL.
pub async fn fetch(http: &Outgoing, url: Url) -> Result<Fetched, FetchError> {
    let fetched = timeout(limits::WEB_FETCH_TIMEOUT, follow(http, url)).await;
    fetched.unwrap_or(Err(FetchError::Slow))
}

async fn follow(http: &Outgoing, mut url: Url) -> Result<Fetched, FetchError> {
    for _ in 0..=limits::WEB_REDIRECTS {
        url.set_fragment(None);
        let mut request = reqwest::Request::new(Method::GET, url.clone());
        let accept = "text/html,application/xhtml+xml,application/pdf,text/plain;q=0.9,*/*;q=0.5";
        request.headers_mut().insert(header::ACCEPT, HeaderValue::from_static(accept));
        let answer = http.send(request).await.map_err(|error| match error {
            SendError::Egress(error) => FetchError::Egress(error),
            SendError::Unreachable(_) => FetchError::Unreachable,
            SendError::Tls(_) => FetchError::Tls,
            SendError::Lost(_) => FetchError::Broken,
        })?;
        let status = answer.status();
        if status.is_redirection()
            && let Some(to) = answer.headers().get(header::LOCATION)
        {
            let to = std::str::from_utf8(to.as_bytes()).map_err(|_| FetchError::Nowhere)?;
            url = url.join(to).map_err(|_| FetchError::Nowhere)?;
            continue;
        }
        let (kind, charset) = content_type(answer.headers());
        let body = body(answer, limits::WEB_PAGE_BYTES).await.map_err(|error| match error {
            BodyError::TooLarge => FetchError::TooLarge,
            BodyError::Broken => FetchError::Broken,
        })?;
        return Ok(Fetched { url, status: status.as_u16(), kind, charset, body });
    }
    Err(FetchError::Redirects)
}

/// Reads a body of at most so many bytes.
pub async fn body(mut answer: Response, most: usize) -> Result<Vec<u8>, BodyError> {
    let said = answer.content_length().and_then(|length| usize::try_from(length).ok());
    if said.is_some_and(|length| length > most) {
        return Err(BodyError::TooLarge);
    }
    let mut bytes = Vec::with_capacity(said.unwrap_or_default());
    while let Some(chunk) = answer.chunk().await.map_err(|_| BodyError::Broken)? {
        if bytes.len() + chunk.len() > most {
            return Err(BodyError::TooLarge);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn content_type(headers: &HeaderMap) -> (String, Option<String>) {
    let text = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let text = text.to_ascii_lowercase();
    let (kind, parameters) = text.split_once(';').unwrap_or((&text, ""));
    let charset = parameters.split(';').find_map(|one| one.trim().strip_prefix("charset="));
    (kind.trim().to_owned(), charset.map(|charset| charset.trim_matches(['"', '\'', ' ']).to_owned()))
}
