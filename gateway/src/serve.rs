//! The HTTP server: connections within limits, and a stop that lets requests finish.

use std::{
    convert::Infallible,
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::Router;
use http::{HeaderValue, header};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
    service::TowerToHyperService,
};
use mcp_shared::{
    config::{HttpSettings, Settings},
    limits,
    metrics::{self, Exposition, Limit, Metric},
};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::{coop::unconstrained, yield_now},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tower::{ServiceExt, service_fn};

use crate::{
    pace::{Held, Paced, Serving},
    tls::{Tls, TlsError},
};

/// Connections that are accepted before others have their turn: as many as the system lets wait. (Tokio's own measure is 128.
/// Where thousands of requests are at work a turn takes long, and whoever knocks meanwhile is turned away by the system.)
const BURST: usize = 1_024;
/// How long to wait before accepting again when the system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long connections are taken that were made before the listener was closed.
const LATECOMERS: Duration = Duration::from_millis(250);

/// What is served: until it is set, `/healthz` and the news that the program still starts.
#[derive(Clone)]
pub struct Api {
    starting: Router,
    whole: Arc<OnceLock<Router>>,
}

impl Api {
    /// What is served until the start is complete.
    pub fn starting(starting: Router) -> Self {
        Self { starting, whole: Arc::default() }
    }

    /// From now on this is served, on connections that are open already as well.
    pub fn set(&self, router: Router) {
        // A second one would be a second start.
        let _ = self.whole.set(router);
    }

    fn now(&self) -> Router {
        self.whole.get().unwrap_or(&self.starting).clone()
    }
}

/// What a request came over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Scheme {
    /// HTTP in clear. Something in front may have had it over TLS.
    #[default]
    Http,
    /// HTTP over TLS that ended here.
    Https,
}

impl Scheme {
    /// As addresses begin.
    pub fn as_str(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }
}

/// Who is let in: so many at once, over TLS if there is a certificate.
#[derive(Clone)]
pub struct Door {
    most: usize,
    room: Arc<Semaphore>,
    tls: Option<Arc<Tls>>,
}

impl Door {
    /// As the settings say.
    pub fn new(settings: &Settings) -> Result<Self, TlsError> {
        let HttpSettings { tls, .. } = &settings.http;
        let tls = tls.as_ref().map(Tls::open).transpose()?.map(Arc::new);
        let most = settings.limits.connections;
        Ok(Self { most, room: Arc::new(Semaphore::new(most)), tls })
    }

    /// What is spoken behind it.
    pub fn scheme(&self) -> Scheme {
        if self.tls.is_some() { Scheme::Https } else { Scheme::Http }
    }

    /// Shows how many are in.
    pub fn show(&self, metrics: &Exposition) {
        let (most, room) = (self.most, Arc::clone(&self.room));
        metrics.show_count(Metric::GatewayConnections, move || most - room.available_permits());
        metrics.show_count(Metric::GatewayConnectionsLimit, move || most);
        if let Some(tls) = self.tls.clone() {
            let ends = move || tls.ends().map_or(0.0, |ends| ends.millis() as f64 / 1e3);
            metrics.show(Metric::CertificateEnd, ends);
        }
    }
}

/// Serves until `closed`; then takes no more connections and returns those that are open, to be waited
/// for. From `leaving` on every answer is the last one of its connection, so that clients come back to
/// somebody else.
pub async fn serve(
    listener: TcpListener,
    door: Door,
    api: Api,
    leaving: CancellationToken,
    closed: CancellationToken,
) -> GracefulShutdown {
    let graceful = GracefulShutdown::new();
    if let Some(tls) = &door.tls {
        tokio::spawn(Arc::clone(tls).follow());
    }
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        // Between requests. Heads that have begun have less time: see `pace.rs`.
        .header_read_timeout(limits::IDLE_TIMEOUT)
        // More than is allowed: what is only a little too large gets a proper answer from the edge.
        .max_headers(2 * limits::HEADER_COUNT + 16)
        .max_buf_size(2 * (limits::HEAD_BYTES + limits::URI_BYTES));
    let (mut newest, mut burst): (Option<Instant>, usize) = (None, 0);
    let mut closing: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            // Who has knocked before the door was closed is let in.
            biased;
            accepted = unconstrained(listener.accept()) => accepted,
            () = closed.cancelled() => break,
        };
        if closed.is_cancelled() && closing.get_or_insert_with(Instant::now).elapsed() >= LATECOMERS {
            break;
        }
        burst += 1;
        if burst % BURST == 0 {
            yield_now().await;
        }
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                if !is_of_one_connection(&error) {
                    tracing::warn!(error.cause = %error, "no connection could be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
                continue;
            }
        };
        // Those who are being served come before those who knock.
        let Ok(permit) = Arc::clone(&door.room).try_acquire_owned() else {
            metrics::count_refusal(Limit::Connections);
            continue;
        };
        tune(&stream);
        newest = Some(Instant::now());
        let (http, api, leaving) = (http.clone(), api.clone(), leaving.clone());
        let (tls, watcher) = (door.tls.clone(), graceful.watcher());
        tokio::spawn(async move {
            match tls {
                None => talk(stream, Scheme::Http, &http, api, leaving, watcher).await,
                Some(tls) => {
                    if let Some(stream) = tls.accept(stream).await {
                        talk(stream, Scheme::Https, &http, api, leaving, watcher).await;
                    }
                }
            }
            drop(permit);
        });
    }
    // Nobody can knock any more. Who was let in just now has a moment to say what for: a connection without a
    // request would be closed at once.
    drop(listener);
    if newest.is_some_and(|newest| newest.elapsed() < LATECOMERS) {
        tokio::time::sleep(LATECOMERS).await;
    }
    graceful
}

/// Serves what comes over one connection, until it ends.
async fn talk<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    scheme: Scheme,
    http: &http1::Builder,
    api: Api,
    leaving: CancellationToken,
    watcher: Watcher,
) {
    let serving = Serving::default();
    let stream = Paced::new(stream, serving.clone());
    let service = TowerToHyperService::new(service_fn(move |mut request: http::Request<Incoming>| {
        let (api, leaving, hold) = (api.now(), leaving.clone(), serving.begin());
        request.extensions_mut().insert(scheme);
        async move {
            let request = request.map(|body| Held::new(body, hold.clone()));
            let mut answer: axum::response::Response = api.oneshot(request).await?;
            if leaving.is_cancelled() {
                answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(answer.map(|body| Held::new(body, hold)))
        }
    }));
    if let Err(error) = watcher.watch(http.serve_connection(TokioIo::new(stream), service)).await {
        tracing::debug!(error.cause = %error, "a connection ended with an error");
    }
}

/// Small answers do not wait for the client's delayed acknowledgement, and a client that is gone, or reads no
/// more, does not hold its connection for ever.
fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
    let millis = u32::try_from(limits::UNREAD_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    let set = || -> nix::Result<()> {
        setsockopt(stream, sockopt::KeepAlive, &true)?;
        setsockopt(stream, sockopt::TcpKeepIdle, &seconds(limits::KEEPALIVE))?;
        setsockopt(stream, sockopt::TcpKeepInterval, &seconds(limits::KEEPALIVE))?;
        setsockopt(stream, sockopt::TcpUserTimeout, &millis)
    };
    if let Err(error) = set() {
        tracing::debug!(error.cause = %error, "a connection could not be tuned");
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    )
}
