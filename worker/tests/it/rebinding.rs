//! A page whose name leads elsewhere once it is loaded, in a real browser. (What looks names up can be another one only
//! where the worker is part of the test.)

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use mcp_shared::{
    config::RemoteSettings,
    egress::{Egress, Resolve},
    hosting::Placing,
    ids::ServerName,
    testing::chromium::has_browser,
    worker_api::ServerStatus,
};
use mcp_worker::Boot;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::cluster::{Cluster, finish, until};

/// It asks for more of itself, and says what came of that.
const PAGE: &str = "<!doctype html><title>Rebinding</title><p id=p>It was loaded.</p><script>\
    const tell = text => p.textContent += ' ' + text;\
    fetch('/inside').then(() => tell('REACHED'), () => tell('Refused.'));\
    new WebSocket('ws://' + location.host + '/inside').onopen = () => tell('SOCKET');</script>";

/// Leads to 127.0.0.2, which is permitted, and after the first time to 127.0.0.3, which is not.
#[derive(Default)]
struct Rebinding(AtomicUsize);

#[async_trait]
impl Resolve for Rebinding {
    async fn resolve(&self, _: &str) -> io::Result<Vec<IpAddr>> {
        let last = if self.0.fetch_add(1, Ordering::SeqCst) == 0 { 2 } else { 3 };
        Ok(vec![IpAddr::from([127, 0, 0, last])])
    }
}

/// A server with the page. Connections are counted.
async fn server(address: &str, port: u16) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind((address, port)).await.unwrap();
    let (at, connected) = (listener.local_addr().unwrap(), Arc::<AtomicUsize>::default());
    let count = Arc::clone(&connected);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let _ = client.read(&mut [0; 4096]).await;
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    PAGE.len()
                );
                let _ = client.write_all(format!("{head}{PAGE}").as_bytes()).await;
                // What was written is read before the end is seen.
                let _ = client.shutdown().await;
                let _ = client.read(&mut [0; 16]).await;
            });
        }
    });
    (at, connected)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_whose_name_changes_its_address_stays_where_it_was() {
    if !has_browser("rebinding::a_page_whose_name_changes_its_address_stays_where_it_was") {
        return;
    }
    let (outside, asked) = server("127.0.0.2", 0).await;
    let (inside, connected) = server("127.0.0.3", outside.port()).await;
    let resolver = Arc::new(Rebinding::default());
    let names: Arc<dyn Resolve> = resolver.clone();
    let egress = Egress::with_resolver(vec!["127.0.0.2".parse().unwrap()], names);
    let remote = RemoteSettings { egress, ..RemoteSettings::default() };
    let cluster = Cluster::new();
    let node = cluster.worker_with(Boot::Everything, remote).await;
    let server = ServerName::from_stored("webtools");
    until("the tools are there", async || {
        node.load(&server).is_some_and(|load| load.status == ServerStatus::Connected)
    })
    .await;
    let url = format!("http://page.example:{}/", outside.port());
    let time = Duration::from_secs(60);
    let mut call = node.offer_within(&server, "ann", "get_url_content", Placing::Take, time).await.unwrap();
    call.held().await.unwrap();
    let text = finish(call, json!({ "url": url })).await.unwrap();
    assert!(text.contains("It was loaded.") && text.contains("Refused."), "{text}");
    assert!(!text.contains("REACHED") && !text.contains("SOCKET"), "{text}");
    // It has looked again, and was led inside.
    assert!(resolver.0.load(Ordering::SeqCst) >= 2);
    assert_eq!((asked.load(Ordering::SeqCst), connected.load(Ordering::SeqCst)), (1, 0));
    // Who connects there is seen.
    TcpStream::connect(inside).await.unwrap();
    until("it is seen", async || connected.load(Ordering::SeqCst) == 1).await;
    node.stop().await;
}
