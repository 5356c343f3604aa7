//! What happens to every request before and after its handler: id, checks of the connection's claims,
//! errors made into documents, one line in the log.

use std::{
    fmt,
    net::IpAddr,
    num::NonZeroU128,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Instant,
};

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::Response,
};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use http_body::Body as _;
use mcp_shared::{
    audit::Audit,
    error::{ErrorCode, Outcome, WorkerError, shorten},
    ids::RequestId,
    limits,
    principal::Principal,
};

use crate::{
    audit::{Trail, note_denied},
    body::Discarding,
    cors::Cors,
    guard::Guard,
    meters,
    problem::Problem,
    traced::Traced,
};

/// The header that names a request.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The route whose errors say what is known about the call.
const CALL: &str = "/mcp/tool/call";
/// Probes come to a node's address, whatever it is called, and learn nothing there.
const PROBES: [&str; 2] = ["/healthz", "/readyz"];
/// So does Prometheus, which finds each of several gateways by its address.
const METRICS: &str = "/metrics";

/// Which `Host` and `Origin` headers are accepted.
#[derive(Debug)]
pub struct Allowed {
    hosts: Vec<String>,
    origins: Vec<String>,
    cors: Cors,
    audit: OnceLock<Audit>,
}

impl Allowed {
    /// `hosts`, `origins` and `cors` as configured. Loopback names are accepted in any case: requests that
    /// carry them come from this machine or from somebody who can write any header.
    pub fn new(hosts: Vec<String>, origins: Vec<String>, cors: Cors, listen: String) -> Self {
        let mut hosts = hosts;
        match listen.parse::<IpAddr>() {
            // "All addresses" is an address to listen on, not one that an honest client asks for.
            Ok(address) if address.is_unspecified() => {}
            Ok(IpAddr::V6(address)) => hosts.push(format!("[{address}]")),
            _ => hosts.push(listen),
        }
        Self { hosts, origins, cors, audit: OnceLock::new() }
    }

    /// Has refused requests recorded from now on.
    pub fn record_in(&self, audit: Audit) {
        let _ = self.audit.set(audit);
    }

    /// Refuses requests that a web page made in somebody's browser (DNS rebinding, cross-site), and
    /// those whose head says two things at once. `guarded`: whoever comes needs a credential, too.
    fn check(&self, request: &Request, route: Option<&str>, guarded: bool) -> Result<(), Problem> {
        let headers = request.headers();
        within_limits(request)?;
        let host = single(headers, &header::HOST)?;
        // A target may name the host as well (`GET http://host/path`), and then that is who is meant.
        let target = request.uri().authority().map(|authority| authority.as_str());
        if host.is_none() && target.is_none() {
            return Err(Problem::invalid("The Host header is required"));
        }
        // A page whose name leads here has somebody's browser, and not their credential: where one is needed, names
        // are of no use to it.
        let any_name = route.is_some_and(|route| PROBES.contains(&route) || guarded && route == METRICS);
        if !any_name && host.into_iter().chain(target).any(|host| !self.host_allowed(host)) {
            return Err(Problem::new(
                ErrorCode::HostNotAllowed,
                "The Host header names a host that is not allowed",
            ));
        }
        if let (Some(host), Some(target)) = (host, target)
            && !host.eq_ignore_ascii_case(target)
        {
            return Err(Problem::invalid("The Host header and the address name two hosts"));
        }
        if let Some(origin) = single(headers, &header::ORIGIN)?
            && !self.origin_allowed(origin)
        {
            return Err(Problem::new(
                ErrorCode::OriginNotAllowed,
                "Requests from this web origin are not allowed",
            ));
        }
        // Whoever reads the body goes by one of them.
        single(headers, &header::CONTENT_TYPE)?;
        if headers.contains_key(header::TRANSFER_ENCODING) && headers.contains_key(header::CONTENT_LENGTH) {
            return Err(Problem::invalid("Content-Length and Transfer-Encoding cannot stand together")
                .header(header::CONNECTION, HeaderValue::from_static("close")));
        }
        Ok(())
    }

    fn host_allowed(&self, host: &str) -> bool {
        let name = without_port(host);
        let allowed =
            |allowed: &String| allowed.eq_ignore_ascii_case(host) || allowed.eq_ignore_ascii_case(name);
        is_loopback(name) || self.hosts.iter().any(allowed)
    }

    fn origin_allowed(&self, origin: &str) -> bool {
        let own = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        own.is_some_and(|host| is_loopback(without_port(host)))
            || self.cors.has(origin)
            || self.origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin))
    }
}

/// Refuses heads that are too large for this API although the HTTP parser takes them.
fn within_limits(request: &Request) -> Result<(), Problem> {
    if request.uri().path_and_query().is_some_and(|path| path.as_str().len() > limits::URI_BYTES) {
        return Err(Problem::new(ErrorCode::UriTooLong, "The address of the request is too long"));
    }
    let headers = request.headers();
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if bytes > limits::HEAD_BYTES || headers.len() > limits::HEADER_COUNT {
        return Err(Problem::new(
            ErrorCode::HeadersTooLarge,
            "The request has too many or too large headers",
        ));
    }
    Ok(())
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

fn is_loopback(name: &str) -> bool {
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    if values.next().is_some() {
        return Err(Problem::invalid(format!("The {name} header appears twice")));
    }
    match first.map(HeaderValue::to_str) {
        None => Ok(None),
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(_)) => Err(Problem::invalid(format!("The {name} header is not valid"))),
    }
}

/// What the layer goes by.
pub struct Edge {
    /// Whom requests may name.
    pub allowed: Arc<Allowed>,
    /// Who may come where; nobody asks while the program starts. It is no layer of its own, because each costs
    /// every request some memory and time.
    pub guard: Option<Guard>,
}

/// The layer around everything.
pub async fn edge(State(edge): State<Arc<Edge>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let allowed = &edge.allowed;
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let method = request.method().clone();
    let reader = allowed.cors.reader(request.headers());
    let sent_bytes = request.body().size_hint().exact();
    let traced = Traced::begin(&request, route.as_deref());
    let trace_id = traced.as_ref().map(|traced| traced.trace.parent.trace());
    let guarded = edge.guard.as_ref().is_some_and(Guard::asks);
    let (id, checked) = match request_id(request.headers()) {
        Ok(id) => (id, allowed.check(&request, route.as_deref(), guarded)),
        Err(problem) => (RequestId::generate(), Err(problem)),
    };
    // A browser's question is answered here: it comes without credentials, and no route knows it.
    let checked = checked.and_then(|()| match &reader {
        Some(reader) => reader.preflight(&request).transpose(),
        None => Ok(None),
    });
    request.extensions_mut().insert(id.clone());
    if let Some(traced) = &traced {
        request.extensions_mut().insert(traced.clone());
    }
    let trail = Trail::default();
    request.extensions_mut().insert(trail.clone());
    let body = std::mem::take(request.body_mut());
    *request.body_mut() = Discarding::wrap(request.headers(), body);
    // Whatever is wrong with a call before its handler, it was not started.
    let of_route =
        |problem: Problem| if route.as_deref() == Some(CALL) { problem.not_started() } else { problem };
    let mut response = match checked {
        Err(problem) => {
            let code = problem.code();
            let mut answer = of_route(problem).into_answer(&id);
            answer.extensions_mut().insert(code);
            answer
        }
        Ok(Some(response)) => response,
        Ok(None) => match AssertUnwindSafe(edge.run(request, next)).catch_unwind().await {
            Ok(mut response) => match response.extensions_mut().remove::<Problem>() {
                Some(problem) => {
                    let code = problem.code();
                    let allow = response.headers_mut().remove(header::ALLOW);
                    let principal = response.extensions_mut().remove::<Arc<Principal>>();
                    let mut answer = of_route(problem).into_answer(&id);
                    answer.extensions_mut().insert(code);
                    if let Some(principal) = principal {
                        answer.extensions_mut().insert(principal);
                    }
                    if let Some(allow) = allow {
                        answer.headers_mut().insert(header::ALLOW, allow);
                    }
                    answer
                }
                None => response,
            },
            // The panic hook has logged where it happened.
            Err(_) => {
                let error = WorkerError::internal("a handler panicked");
                let error =
                    if route.as_deref() == Some(CALL) { error.outcome(Outcome::Unknown) } else { error };
                let mut answer = Problem::from(error).into_answer(&id);
                answer.extensions_mut().insert(ErrorCode::Internal);
                answer
            }
        },
    };
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    allowed.cors.mark(reader, response.headers_mut());
    let code = response.extensions().get::<ErrorCode>().copied();
    trail.end(response.status(), code);
    if let Some(traced) = traced {
        traced.answered(response.status(), code);
    }
    if let Some(audit) = allowed.audit.get() {
        let call = route.as_deref() == Some(CALL);
        note_denied(audit, &id, (method.as_str(), route.as_deref()), call, &response);
    }
    let (status, took) = (response.status(), start.elapsed());
    meters::answered(&method, route.as_deref(), status, response.extensions().get().copied(), took);
    tracing::info!(
        target: "mcp_gateway::access",
        request_id = %id,
        method = %shorten(method.as_str(), 16),
        // The pattern that matched, never the path: paths are the caller's words.
        route = route.as_deref().unwrap_or("-"),
        // Who, as far as that was found out; never a credential.
        caller = response.extensions().get::<Arc<Principal>>().map(|caller| tracing::field::display(&caller.credential)),
        status = status.as_u16(),
        code = code.map(ErrorCode::as_str),
        // As far as they are known before they are sent.
        bytes_in = sent_bytes,
        bytes_out = response.body().size_hint().exact(),
        trace_id = trace_id.map(|id| tracing::field::display(Hex(id))),
        duration_ms = took.as_secs_f64() * 1_000.0,
        "request"
    );
    response
}

impl Edge {
    async fn run(&self, request: Request, next: Next) -> Response {
        match &self.guard {
            Some(guard) => guard.pass(request, next).await,
            None => next.run(request).await,
        }
    }
}

/// The id of a trace, as it is written.
struct Hex(NonZeroU128);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

fn request_id(headers: &HeaderMap) -> Result<RequestId, Problem> {
    match single(headers, &REQUEST_ID)? {
        Some(given) => Ok(given.parse()?),
        None => Ok(RequestId::generate()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_origins() {
        let allowed = Allowed::new(
            vec!["api.example.org".into(), "other:8443".into()],
            vec!["https://app.example.org".into()],
            Cors::new(vec!["https://page.example.org".into()]),
            "192.0.2.7".into(),
        );
        for good in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:80",
            "[::1]:8080",
            "::1",
            "127.9.9.9",
            "192.0.2.7:80",
            "api.example.org:443",
            "other:8443",
        ] {
            assert!(allowed.host_allowed(good), "{good}");
        }
        for bad in
            ["evil.com", "localhost.evil.com", "127.0.0.1.evil.com", "other:80", "other", "", "2130706433"]
        {
            assert!(!allowed.host_allowed(bad), "{bad}");
        }
        for good in [
            "http://localhost:3000",
            "https://127.0.0.1",
            "https://app.example.org",
            "https://page.example.org",
        ] {
            assert!(allowed.origin_allowed(good), "{good}");
        }
        for bad in
            ["null", "http://evil.com", "file://", "https://app.example.org.evil.com", "ftp://localhost"]
        {
            assert!(!allowed.origin_allowed(bad), "{bad}");
        }
    }
}
