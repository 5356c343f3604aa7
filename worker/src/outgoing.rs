//! Requests to other machines, all of them through the guard: no redirects, no proxies of the environment,
//! no connection to an address that was not judged.
//!
//! Connections are looked after by threads of their own. What the other side sends before an answer begins is
//! taken apart where nobody can make it give way: a server that floods there would keep whoever shares its
//! thread from their work, the node's own signs of life among them.

use std::{error::Error, io, sync::Arc, time::Duration};

use mcp_shared::{
    egress::{Egress, EgressError},
    limits, tls,
};
use reqwest::{
    Client, ClientBuilder, Request, Response,
    dns::{Addrs, Name, Resolve, Resolving},
    redirect::Policy,
};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::AbortOnDropHandle;

/// How long a connection that nobody uses is kept.
const IDLE: Duration = Duration::from_secs(60);

/// Sends requests. Cloning it is cheap, and all clones share their connections.
#[derive(Debug, Clone)]
pub struct Outgoing {
    egress: Egress,
    client: Result<(Client, Arc<Apart>), String>,
}

/// The threads of the connections, which end with them.
#[derive(Debug)]
struct Apart(Option<Runtime>);

impl Apart {
    fn new() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("remote")
            // After each step of a connection, however long it took, the others are looked at.
            .event_interval(1)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    fn handle(&self) -> Option<&Handle> {
        self.0.as_ref().map(Runtime::handle)
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // It may be dropped by a task, which must not wait.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// What all requests of this program have in common, whether or not the guard looks at where they go.
pub fn plain_client() -> ClientBuilder {
    tls::install_provider();
    Client::builder()
        .user_agent(concat!("mcp-api/", env!("CARGO_PKG_VERSION")))
        .no_proxy()
        .redirect(Policy::none())
        .referer(false)
        .connect_timeout(limits::REMOTE_CONNECT_TIMEOUT)
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// It was not sent: it would have gone where it may not, or nowhere.
    #[error(transparent)]
    Egress(EgressError),
    /// It was not sent: nobody accepted the connection.
    #[error("it cannot be reached")]
    Unreachable(#[source] Box<dyn Error + Send + Sync>),
    /// It was not sent: who answers is not who it should be.
    #[error("its certificate is not valid")]
    Tls(#[source] Box<dyn Error + Send + Sync>),
    /// It was sent, in part or as a whole.
    #[error("the connection was lost")]
    Lost(#[source] Box<dyn Error + Send + Sync>),
}

/// Looks names up through the guard.
struct Guarded(Egress);

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let egress = self.0.clone();
        Box::pin(async move {
            let addresses = egress.addresses(name.as_str(), 0).await?;
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

impl Outgoing {
    /// A sender behind this guard.
    pub fn new(egress: Egress) -> Self {
        let client = plain_client()
            .pool_idle_timeout(IDLE)
            .dns_resolver(Arc::new(Guarded(egress.clone())))
            .build()
            // Without any trusted certificate on this machine, for one. Other servers can do without.
            .map_err(|error| chain(&error))
            .and_then(|client| Ok((client, Arc::new(Apart::new().map_err(|error| chain(&error))?))));
        Self { egress, client }
    }

    /// The guard.
    pub fn egress(&self) -> &Egress {
        &self.egress
    }

    /// Sends a request and waits for the head of the answer. The caller sees to the time.
    pub async fn send(&self, request: Request) -> Result<Response, SendError> {
        // An address in the URL is connected to without being looked up.
        self.egress.check_url(request.url()).map_err(SendError::Egress)?;
        let (client, apart) =
            self.client.as_ref().map_err(|error| SendError::Unreachable(error.as_str().into()))?;
        let Some(apart) = apart.handle() else { return Err(SendError::Unreachable("it ends".into())) };
        // Dropping this gives the request up, wherever it is.
        let sending = AbortOnDropHandle::new(apart.spawn(client.execute(request)));
        sending.await.map_err(|error| SendError::Lost(error.into()))?.map_err(classify)
    }
}

fn classify(error: reqwest::Error) -> SendError {
    if let Some(refused) = cause::<EgressError>(&error) {
        return SendError::Egress(refused.clone());
    }
    let tls = cause::<rustls::Error>(&error).is_some();
    match error {
        error if error.is_connect() && tls => SendError::Tls(error.without_url().into()),
        error if error.is_connect() || error.is_builder() => {
            SendError::Unreachable(error.without_url().into())
        }
        error => SendError::Lost(error.without_url().into()),
    }
}

/// The cause of a certain kind, also where it travels inside of errors of the operating system's kind, which
/// do not name what they hold as their source.
fn cause<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(one) = next {
        if let Some(found) = one.downcast_ref::<E>() {
            return Some(found);
        }
        let held = one.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match held {
            Some(held) => Some(held),
            None => one.source(),
        };
    }
    None
}

/// An error with its causes, for the log.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
