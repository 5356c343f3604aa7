//! The span of a request, and where the work belongs that it causes.

use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::Request;
use http::StatusCode;
use mcp_shared::{
    error::ErrorCode,
    trace::{self, Key, Kind, Span, Trace},
};

/// Routes that are asked again and again by machines, and of which nobody wants to see each answer.
const UNTRACED: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// What is known of a request that its caller or this program traces. Cloning it shares it.
#[derive(Clone)]
pub struct Traced {
    /// Where the work belongs that the request causes.
    pub trace: Trace,
    span: Option<Arc<Mutex<Span>>>,
}

impl Traced {
    /// Looks whether a request is traced. Most are not, and have nothing then.
    pub fn begin(request: &Request, route: Option<&str>) -> Option<Self> {
        if route.is_some_and(|route| UNTRACED.contains(&route)) {
            return None;
        }
        let headers = request.headers();
        let received = Trace::received(|name| headers.get_all(name).iter().map(http::HeaderValue::as_bytes));
        let method = request.method();
        // A method of the caller's own making is no name.
        let method = || if is_usual(method) { method.as_str().to_owned() } else { "_OTHER".to_owned() };
        let (mut span, trace) = trace::begin(received, Kind::Server, || match route {
            Some(route) => format!("{} {route}", method()).into(),
            None => method().into(),
        });
        span.say(Key::Method, method);
        if let Some(route) = route {
            span.say(Key::Route, || route.to_owned());
        }
        let span = span.is_recorded().then(|| Arc::new(Mutex::new(span)));
        Some(Self { trace: trace?, span })
    }

    /// The span, for whoever goes on with the request when the head of its answer is sent.
    pub fn take(&self) -> Span {
        let span = self
            .span
            .as_ref()
            .map(|span| std::mem::take(&mut *span.lock().unwrap_or_else(PoisonError::into_inner)));
        span.unwrap_or_default()
    }

    /// The request was answered.
    pub fn answered(self, status: StatusCode, code: Option<ErrorCode>) {
        let mut span = self.take();
        span.say(Key::Status, || i64::from(status.as_u16()));
        let code = code.map(ErrorCode::as_str);
        if status.is_server_error() {
            span.fail(code.unwrap_or("internal"));
        } else if status.is_client_error() {
            span.refuse(code.unwrap_or("refused"));
        } else {
            span.end();
        }
    }
}

fn is_usual(method: &http::Method) -> bool {
    use http::Method;
    [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS, Method::PATCH]
        .contains(method)
}
