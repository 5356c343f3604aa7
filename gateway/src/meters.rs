//! What a gateway counts of requests and calls.

use std::{
    collections::HashMap,
    sync::LazyLock,
    time::{Duration, Instant},
};

use http::{Method, StatusCode};
use mcp_shared::{
    error::{ErrorCode, WorkerError},
    json::RawJson,
    metrics::{
        CallEnd, Counts, Direction, Exposition, Histogram, Histograms, Metric, Reply, StatusClass,
        instruments,
    },
};

use crate::router;

/// What stands for the method and the route of a request that no route has: their words are the client's.
const OTHER: &str = "other";

static ERRORS: Counts<ErrorCode, { ErrorCode::ALL.len() }> = Counts::new();
static CALLS: Counts<CallEnd, { CallEnd::ALL.len() }> = Counts::new();
static CALL_TIMES: Histograms<Reply, { Reply::ALL.len() }> = Histograms::new(instruments::CALLS);
static CALL_BODIES: Histograms<Direction, { Direction::ALL.len() }> = Histograms::new(instruments::BODIES);
static REQUESTS: LazyLock<Requests> =
    LazyLock::new(|| Requests::new(router::table().into_iter().map(|route| (route.method, route.path))));

/// Shows all of it.
pub fn show(metrics: &Exposition) {
    metrics.show_counts(Metric::Errors, "code", &ERRORS);
    metrics.show_counts(Metric::Calls, "outcome", &CALLS);
    metrics.show_all(Metric::CallDuration, |samples| {
        for reply in Reply::ALL {
            samples.histogram(&[("reply", reply.as_str())], CALL_TIMES.of(*reply));
        }
    });
    metrics.show_all(Metric::CallBody, |samples| {
        for direction in Direction::ALL {
            samples.histogram(&[("direction", direction.as_str())], CALL_BODIES.of(*direction));
        }
    });
    metrics.show_all(Metric::HttpRequests, |samples| {
        for route in &REQUESTS.routes {
            for class in StatusClass::ALL {
                let labels =
                    [("method", route.method.as_str()), ("route", route.path), ("status", class.as_str())];
                samples.count(&labels, route.answers.get(*class));
            }
        }
    });
    metrics.show_all(Metric::HttpDuration, |samples| {
        for route in &REQUESTS.routes {
            samples.histogram(&[("method", route.method.as_str()), ("route", route.path)], &route.times);
        }
    });
}

/// An answer leaves, after so long. `route` is the pattern that matched.
pub fn answered(
    method: &Method,
    route: Option<&str>,
    status: StatusCode,
    code: Option<ErrorCode>,
    took: Duration,
) {
    let route = REQUESTS.route(method, route);
    route.answers.one(StatusClass::of(status.as_u16()));
    route.times.time(took);
    if let Some(code) = code {
        ERRORS.one(code);
    }
}

/// What is counted of each route. Which these are is known before the first request comes.
struct Requests {
    routes: Vec<Route>,
    /// The places of a pattern's routes.
    of_path: HashMap<&'static str, Vec<usize>>,
}

struct Route {
    method: String,
    path: &'static str,
    answers: Counts<StatusClass, { StatusClass::ALL.len() }>,
    times: Histogram,
}

impl Route {
    fn new(method: &str, path: &'static str) -> Self {
        let (answers, times) = (Counts::new(), Histogram::new(instruments::REQUESTS));
        Self { method: method.to_owned(), path, answers, times }
    }
}

impl Requests {
    fn new(table: impl Iterator<Item = (Method, &'static str)>) -> Self {
        // The first is that of all that have none.
        let (mut routes, mut of_path) = (vec![Route::new(OTHER, OTHER)], HashMap::<_, Vec<_>>::new());
        for (method, path) in table {
            of_path.entry(path).or_default().push(routes.len());
            routes.push(Route::new(method.as_str(), path));
        }
        Self { routes, of_path }
    }

    fn route(&self, method: &Method, path: Option<&str>) -> &Route {
        // Those who ask for the head only are answered by the same handler.
        let method = if method == Method::HEAD { &Method::GET } else { method };
        let places = path.and_then(|path| self.of_path.get(path));
        let mut routes = places.into_iter().flatten().map(|at| &self.routes[*at]);
        routes.find(|route| route.method == method.as_str()).unwrap_or(&self.routes[0])
    }
}

/// Counts one call, whatever becomes of it: a caller who goes away drops it.
pub struct CallMeter {
    begun: Instant,
    reply: Reply,
    end: CallEnd,
}

impl CallMeter {
    /// A call came.
    pub fn begin() -> Self {
        Self { begun: Instant::now(), reply: Reply::Json, end: CallEnd::Left }
    }

    /// Its body is here.
    pub fn body(&self, bytes: usize) {
        CALL_BODIES.of(Direction::In).size(bytes);
    }

    /// Its end comes in a stream of events.
    pub fn as_events(&mut self) {
        self.reply = Reply::Events;
    }

    /// It is over.
    pub fn ended(&mut self, result: &Result<RawJson, WorkerError>) {
        match result {
            Ok(result) => {
                CALL_BODIES.of(Direction::Out).size(result.as_bytes().len());
                self.end = CallEnd::of_result(result);
            }
            Err(error) => {
                self.failed(error);
                // The head of a stream has left: nobody else counts what comes in it.
                if self.reply == Reply::Events {
                    ERRORS.one(error.code);
                }
            }
        }
    }

    /// It did not get as far as a result.
    pub fn failed(&mut self, error: &WorkerError) {
        self.end = CallEnd::of_error(error);
    }
}

impl Drop for CallMeter {
    fn drop(&mut self) {
        CALLS.one(self.end);
        CALL_TIMES.of(self.reply).time(self.begun.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_of_one_route() {
        let requests = Requests::new([(Method::GET, "/a/{name}"), (Method::PUT, "/a/{name}")].into_iter());
        let of = |method: &Method, path| {
            let route = requests.route(method, path);
            (route.method.clone(), route.path)
        };
        assert_eq!(of(&Method::GET, Some("/a/{name}")), ("GET".to_owned(), "/a/{name}"));
        assert_eq!(of(&Method::HEAD, Some("/a/{name}")), ("GET".to_owned(), "/a/{name}"));
        assert_eq!(of(&Method::PUT, Some("/a/{name}")), ("PUT".to_owned(), "/a/{name}"));
        for (method, path) in
            [(&Method::DELETE, Some("/a/{name}")), (&Method::GET, None), (&Method::GET, Some("/b"))]
        {
            assert_eq!(of(method, path), ("other".to_owned(), "other"));
        }
    }
}
