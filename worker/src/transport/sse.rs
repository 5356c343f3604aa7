//! The older HTTP+SSE transport of MCP: one stream from the server, on which all answers come, and an
//! address that it names for what it is sent.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use tokio::time::timeout;
use url::Url;

use super::{
    connection::Failure,
    events::Events,
    http::{Http, is_type},
};

/// How long a server may take to name the address.
const NAMING: Duration = Duration::from_secs(30);

/// Opens the stream of a connection, and learns where messages are to be sent. From then on a task reads it;
/// its end is the connection's.
pub async fn open(http: &Arc<Http>, tasks: &tokio_util::task::TaskTracker) -> Result<(), Failure> {
    let mut headers = HeaderMap::new();
    headers.insert(header::ACCEPT, HeaderValue::from_static("text/event-stream"));
    let endpoint = &http.endpoint;
    let response = endpoint.send(Method::GET, &endpoint.url, &headers, None).await?;
    if response.status() != StatusCode::OK {
        return Err(endpoint.refused(&response));
    }
    if !is_type(&response, "text/event-stream") {
        return Err(endpoint.malformed("answered with something else than a stream"));
    }
    // It lives as long as the connection, so that only its single events are bounded.
    let mut events = Events::of(response, usize::MAX);
    let named = timeout(NAMING, async {
        loop {
            let event = events.next().await.map_err(|_| endpoint.lost())?;
            if event.event.as_deref() == Some("endpoint") {
                return Ok::<_, Failure>(event.data.unwrap_or_default());
            }
        }
    });
    let named = named.await.map_err(|_| endpoint.malformed("did not say where to send messages"))??;
    let target = target(&endpoint.url, &named)
        .ok_or_else(|| endpoint.malformed("named an address of somebody else to send messages to"))?;
    let _ = http.messages.set(target);
    let reader = Arc::clone(http);
    tasks.spawn(async move {
        let connection = reader.connection();
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = connection.closed() => return,
            };
            match event {
                Ok(event) => reader.take(event, None).await,
                Err(_) => break,
            }
        }
        // What is not answered by now never will be.
        connection.close();
        connection.end_output();
    });
    Ok(())
}

/// The address for messages, which must be of the same origin: credentials go there.
fn target(base: &Url, named: &str) -> Option<Url> {
    let target = base.join(named.trim()).ok()?;
    let same = target.origin() == base.origin()
        && target.username().is_empty()
        && target.password().is_none()
        && target.fragment().is_none();
    same.then_some(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_go_to_nobody_else() {
        let base = Url::parse("http://example.com:8080/a/sse?x=1").unwrap();
        let target = |named| target(&base, named).map(|url| url.to_string());
        assert_eq!(target("/messages?id=7").as_deref(), Some("http://example.com:8080/messages?id=7"));
        assert_eq!(target("messages").as_deref(), Some("http://example.com:8080/a/messages"));
        assert!(target("http://example.com:8080/m").is_some());
        for bad in [
            "http://example.com/m",
            "https://example.com:8080/m",
            "//evil.example/m",
            "http://u:p@example.com:8080/",
            "file:///m",
        ] {
            assert_eq!(target(bad), None, "{bad}");
        }
    }
}
