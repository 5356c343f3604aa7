//! The one way out of the browser: a forward proxy for each page, on this machine's loopback. It looks names up and
//! connects through the guard, to the very addresses that the guard judged, so that neither a redirect nor a name that
//! changes its address nor a script of the page leads anywhere else. It counts what the page loads, and goes with it.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use mcp_shared::{
    egress::{Egress, EgressError},
    limits,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use url::Url;

/// Bytes of a request's head.
const HEAD: usize = 64 * 1024;
/// How long it may take to come.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// Connections of one page at once.
const CONNECTIONS: usize = 64;
/// Hosts of which it is remembered why they were refused.
const REFUSED: usize = 64;
/// Names that are looked up at once, by all pages.
const LOOKUPS_AT_ONCE: usize = 32;
/// The shortest time that one of several addresses has to answer.
const SHORTEST_TRY: Duration = Duration::from_secs(1);
/// Bytes that are passed on at once.
const CHUNK: usize = 16 * 1024;

/// A page's proxy. It ends when this is dropped.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    page: Arc<Page>,
    _stop: tokio_util::sync::DropGuard,
}

/// What is known of one page's traffic.
struct Page {
    egress: Egress,
    /// Bytes that it may still load.
    left: AtomicUsize,
    refused: Mutex<HashMap<String, Refused>>,
    connections: Arc<Semaphore>,
    stop: CancellationToken,
}

/// Why a host was not connected to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It may not be.
    #[error(transparent)]
    Egress(#[from] EgressError),
    /// Nobody accepts connections there.
    #[error("the server cannot be reached")]
    Unreachable,
}

impl Proxy {
    /// Listens from now on.
    pub async fn start(egress: Egress, tasks: &TaskTracker) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let page = Arc::new(Page {
            egress,
            left: AtomicUsize::new(limits::WEB_PAGE_BYTES),
            refused: Mutex::default(),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
            stop: stop.clone(),
        });
        tasks.spawn(accept(listener, Arc::clone(&page), tasks.clone()));
        Ok(Self { address, page, _stop: stop.drop_guard() })
    }

    /// Why a host was not connected to, if it was not.
    pub fn refused(&self, host: &str) -> Option<Refused> {
        lock(&self.page.refused).get(host).cloned()
    }

    /// Whether the page wanted to load more than it may.
    pub fn is_used_up(&self) -> bool {
        self.page.left.load(Ordering::Acquire) == 0
    }
}

async fn accept(listener: TcpListener, page: Arc<Page>, tasks: TaskTracker) {
    loop {
        let accept = async {
            // Whoever has no place waits with the system, and takes up nothing here.
            let place = Arc::clone(&page.connections).acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            () = page.stop.cancelled() => return,
            accepted = accept => accepted,
        };
        let Ok((client, _)) = accepted else {
            // Out of descriptors, most likely: not in a circle as fast as possible.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let page = Arc::clone(&page);
        tasks.spawn(async move {
            let _place = place;
            tokio::select! {
                () = page.stop.cancelled() => {}
                _ = serve(&page, client) => {}
            }
        });
    }
}

/// Serves one connection of the browser: one tunnel, or requests to one server. A request that cannot be sent on is
/// answered by the end of the connection: there is nothing that a page could make of an answer of ours.
async fn serve(page: &Page, mut client: TcpStream) -> io::Result<()> {
    let Ok(read) = timeout(HEAD_TIME, head(&mut client)).await else { return Ok(()) };
    let (head, rest) = read?;
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    let head = std::str::from_utf8(&head).map_err(|_| invalid())?;
    let (first, headers) = head.split_once("\r\n").ok_or_else(invalid)?;
    let mut parts = first.split(' ');
    let (Some(method), Some(target), Some(_)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(invalid());
    };
    if method == "CONNECT" {
        let url = Url::parse(&format!("https://{target}/")).map_err(|_| invalid())?;
        let Some(mut server) = page.dial(&url).await else { return Ok(()) };
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
        server.write_all(&rest).await?;
        return page.relay(client, server).await;
    }
    let url = Url::parse(target).map_err(|_| invalid())?;
    if url.scheme() != "http" {
        return Err(invalid());
    }
    let Some(mut server) = page.dial(&url).await else { return Ok(()) };
    let mut sent = format!("{method} {}", url.path());
    if let Some(query) = url.query() {
        sent.push('?');
        sent.push_str(query);
    }
    sent.push_str(" HTTP/1.1\r\n");
    // Whatever follows on this connection goes to the same server, which has to do with that.
    let hop = ["proxy-", "connection:", "keep-alive:"];
    let kept = headers.split("\r\n").filter(|line| !line.is_empty()).filter(|line| {
        let line = line.to_ascii_lowercase();
        !hop.iter().any(|name| line.starts_with(name))
    });
    for line in kept {
        sent.push_str(line);
        sent.push_str("\r\n");
    }
    sent.push_str("Connection: close\r\n\r\n");
    server.write_all(sent.as_bytes()).await?;
    server.write_all(&rest).await?;
    page.relay(client, server).await
}

/// The head of a request, and what came after it.
async fn head(client: &mut TcpStream) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let mut bytes = Vec::with_capacity(2 * 1024);
    loop {
        let from = bytes.len().saturating_sub(3);
        if client.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(at) = memchr::memmem::find(&bytes[from..], b"\r\n\r\n") {
            let rest = bytes.split_off(from + at + 4);
            bytes.truncate(from + at + 2);
            return Ok((bytes, rest));
        }
        if bytes.len() > HEAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

impl Page {
    /// Connects to where a URL leads, if the guard permits that.
    async fn dial(&self, url: &Url) -> Option<TcpStream> {
        let host = url.host_str()?;
        match self.connect(url, host).await {
            Ok(server) => Some(server),
            Err(refused) => {
                tracing::debug!(host, %refused, "a page is not connected");
                let mut list = lock(&self.refused);
                if list.len() < REFUSED {
                    list.insert(host.to_owned(), refused);
                }
                None
            }
        }
    }

    /// Looks a name up. The system goes on with that when nobody waits any more, which is why there are only so many.
    async fn look_up(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, Refused> {
        static LOOKUPS: Semaphore = Semaphore::const_new(LOOKUPS_AT_ONCE);
        let (egress, host) = (self.egress.clone(), host.to_owned());
        let found = async {
            let permit = LOOKUPS.acquire().await.map_err(|_| Refused::Unreachable)?;
            let looking = tokio::spawn(async move {
                let found = egress.addresses(&host, port).await;
                drop(permit);
                found
            });
            Ok(looking.await.map_err(|_| Refused::Unreachable)??)
        };
        timeout(limits::REMOTE_CONNECT_TIMEOUT, found).await.unwrap_or(Err(Refused::Unreachable))
    }

    async fn connect(&self, url: &Url, host: &str) -> Result<TcpStream, Refused> {
        self.egress.check_url(url)?;
        let port = url.port_or_known_default().ok_or(Refused::Unreachable)?;
        let addresses = self.look_up(host, port).await?;
        // One that does not answer must not take all the time of the others.
        let count = u32::try_from(addresses.len()).unwrap_or(u32::MAX).max(1);
        let each = (limits::REMOTE_CONNECT_TIMEOUT / count).max(SHORTEST_TRY);
        for address in addresses {
            if let Ok(Ok(server)) = timeout(each, TcpStream::connect(address)).await {
                let _ = server.set_nodelay(true);
                return Ok(server);
            }
        }
        Err(Refused::Unreachable)
    }

    /// Passes on what comes until one side ends, or too much came.
    async fn relay(&self, mut client: TcpStream, mut server: TcpStream) -> io::Result<()> {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        tokio::try_join!(self.pass(from_client, to_server), async {
            self.pass(from_server, to_client).await?;
            // A server that has said everything has no more use for what the browser says.
            Err::<(), _>(io::Error::from(io::ErrorKind::UnexpectedEof))
        })?;
        Ok(())
    }

    async fn pass(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = from.read(&mut chunk).await?;
            if count == 0 {
                return to.shutdown().await;
            }
            let taken = self
                .left
                .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| Some(left.saturating_sub(count)));
            if taken.is_ok_and(|left| left <= count) {
                self.stop.cancel();
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            to.write_all(&chunk[..count]).await?;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use async_trait::async_trait;
    use mcp_shared::egress::Resolve;

    use super::*;

    /// Names that lead to 127.0.0.2, which is permitted, and after the first time to 127.0.0.3, which is not.
    #[derive(Default)]
    struct Rebinding(AtomicUsize);

    #[async_trait]
    impl Resolve for Rebinding {
        async fn resolve(&self, _: &str) -> io::Result<Vec<IpAddr>> {
            let last = if self.0.fetch_add(1, Ordering::SeqCst) == 0 { 2 } else { 3 };
            Ok(vec![IpAddr::from([127, 0, 0, last])])
        }
    }

    /// A server that says who it is; how often it was asked is counted.
    async fn server(address: &str, port: u16) -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind((address, port)).await.unwrap();
        let (at, asked) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let (request, _) = head(&mut client).await.unwrap();
                    let request = String::from_utf8(request).unwrap();
                    let answer = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nseen: {request}");
                    let _ = client.write_all(answer.as_bytes()).await;
                });
            }
        });
        (at, asked)
    }

    async fn proxy(permits: &[&str]) -> Proxy {
        let permits = permits.iter().map(|text| text.parse().unwrap()).collect();
        let egress = Egress::with_resolver(permits, Arc::new(Rebinding::default()));
        Proxy::start(egress, &TaskTracker::new()).await.unwrap()
    }

    async fn ask(proxy: &Proxy, text: &str) -> String {
        let mut client = TcpStream::connect(proxy.address).await.unwrap();
        client.write_all(text.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = timeout(Duration::from_secs(20), client.read_to_end(&mut answer)).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[tokio::test]
    async fn a_name_that_changes_its_address_leads_only_where_it_was_judged() {
        let (good, asked) = server("127.0.0.2", 0).await;
        let (_, never) = server("127.0.0.3", good.port()).await;
        let proxy = proxy(&["127.0.0.2"]).await;
        let get = format!(
            "GET http://page.example:{}/a?b=c HTTP/1.1\r\nHost: page.example\r\nProxy-Connection: \
                           keep-alive\r\nX-Own: 1\r\n\r\n",
            good.port()
        );
        let answer = ask(&proxy, &get).await;
        assert!(
            answer
                .contains("seen: GET /a?b=c HTTP/1.1\r\nHost: page.example\r\nX-Own: 1\r\nConnection: close")
        );
        // The next look finds another address, which is judged anew.
        assert_eq!(ask(&proxy, &get).await, "");
        let connect = format!("CONNECT page.example:{} HTTP/1.1\r\n\r\n", good.port());
        assert_eq!(ask(&proxy, &connect).await, "");
        assert!(matches!(proxy.refused("page.example"), Some(Refused::Egress(EgressError::Blocked(_)))));
        assert_eq!((asked.load(Ordering::SeqCst), never.load(Ordering::SeqCst)), (1, 0));
    }

    #[tokio::test]
    async fn tunnels_lead_where_the_guard_permits() {
        let (good, _) = server("127.0.0.2", 0).await;
        let (bad, never) = server("127.0.0.3", good.port()).await;
        let proxy = proxy(&["127.0.0.2"]).await;
        let tunnel = format!("CONNECT {good} HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n");
        let answer = ask(&proxy, &tunnel).await;
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n\r\n") && answer.contains("seen: GET / HTTP/1.1"),
            "{answer}"
        );
        for target in [
            format!("CONNECT {bad} HTTP/1.1\r\n\r\n"),
            format!("GET http://{bad}/ HTTP/1.1\r\n\r\n"),
            format!("GET http://2130706435:{}/ HTTP/1.1\r\n\r\n", bad.port()),
            "CONNECT 169.254.169.254:80 HTTP/1.1\r\n\r\n".to_owned(),
            "CONNECT [::1]:80 HTTP/1.1\r\n\r\n".to_owned(),
            "CONNECT localhost:80 HTTP/1.1\r\n\r\n".to_owned(),
            format!("GET ftp://{good}/ HTTP/1.1\r\n\r\n"),
            "GET / HTTP/1.1\r\n\r\n".to_owned(),
            "\r\n\r\n".to_owned(),
            "x".repeat(HEAD + 10),
        ] {
            assert_eq!(ask(&proxy, &target).await, "", "{target:.60}");
        }
        assert_eq!(never.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_page_loads_no_more_than_it_may() {
        let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let endless = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.unwrap();
            while client.write_all(&[b'x'; CHUNK]).await.is_ok() {}
        });
        let proxy = proxy(&["127.0.0.2"]).await;
        let answer = ask(&proxy, &format!("GET http://{endless}/ HTTP/1.1\r\n\r\n")).await;
        assert!(answer.len() <= limits::WEB_PAGE_BYTES && proxy.is_used_up());
        assert!(TcpStream::connect(proxy.address).await.is_err(), "it ends");
    }
}
