//! The HTTP server: connections within limits, and a stop that lets requests finish.

use std::{
    io,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use mcp_shared::limits;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tower::{ServiceExt, service_fn};

/// How long to wait before accepting again when the system has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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

/// Serves until `stop`; then takes no more connections and returns those that are open, to be waited
/// for.
pub async fn serve(listener: TcpListener, api: Api, stop: CancellationToken) -> GracefulShutdown {
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(limits::CONNECTIONS));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits::HEADER_TIMEOUT)
        // Twice what is allowed: what is only a little too large gets a proper answer from the edge.
        .max_headers(2 * limits::HEADER_COUNT)
        .max_buf_size(2 * (limits::HEAD_BYTES + limits::URI_BYTES));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => break,
        };
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
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
        // Small answers must not wait for the client's delayed acknowledgement.
        let _ = stream.set_nodelay(true);
        let api = api.clone();
        let service = TowerToHyperService::new(service_fn(move |request| api.now().oneshot(request)));
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error.cause = %error, "a connection ended with an error");
            }
            drop(permit);
        });
    }
    graceful
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    )
}
