//! Web sites of tests, good ones and bad ones, each on an address of this machine's loopback.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A site that answers on an address. It ends with the test.
pub struct Site {
    pub address: SocketAddr,
    /// Requests that came, as `GET /path?query`.
    pub asked: Arc<Mutex<Vec<String>>>,
    /// Connections that are open.
    pub open: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Site {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Site {
    /// Listens on an address such as 127.0.0.2.
    pub async fn on(host: &str) -> Self {
        let listener = TcpListener::bind((host, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, open) = (Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicUsize>::default());
        let (seen, count) = (Arc::clone(&asked), Arc::clone(&open));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, count) = (Arc::clone(&seen), Arc::clone(&count));
                tokio::spawn(async move {
                    count.fetch_add(1, Ordering::SeqCst);
                    answer(stream, &seen).await;
                    count.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, asked, open, task }
    }

    /// The address of a page.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

async fn answer(mut stream: TcpStream, asked: &Mutex<Vec<String>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_buf(&mut head).await {
            Ok(1..) if head.len() < 64 * 1024 => {}
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let first = head.lines().next().unwrap_or_default();
    let target = first.split(' ').nth(1).unwrap_or_default().to_owned();
    asked.lock().unwrap().push(first.trim_end_matches(" HTTP/1.1").to_owned());
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = url::form_urlencoded::parse(query.as_bytes());
    let query: Vec<(String, String)> = query.into_owned().collect();
    let parameter = |name: &str| query.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    let html = "text/html; charset=utf-8";
    match path {
        "/article" => send(&mut stream, 200, html, include_bytes!("article.html")).await,
        "/report.pdf" => send(&mut stream, 200, "application/pdf", include_bytes!("report.pdf")).await,
        "/broken.pdf" => send(&mut stream, 200, "application/pdf", b"%PDF-1.7\n1 0 obj\n<<").await,
        "/note.txt" => send(&mut stream, 200, "text/plain; charset=windows-1252", b"B\xe4ume\n").await,
        "/data.json" => send(&mut stream, 200, "application/json", br#"{"a":1}"#).await,
        "/download" => {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-disposition: attachment\r\ncontent-length: 5\r\n\r\n<p>Hi";
            let _ = stream.write_all(head.as_bytes()).await;
        }
        "/image.png" => send(&mut stream, 200, "image/png", b"\x89PNG\r\n\x1a\n").await,
        "/page" => {
            let body = parameter("body").unwrap_or_default();
            let status = parameter("status").and_then(|status| status.parse().ok()).unwrap_or(200);
            send(&mut stream, status, html, body.as_bytes()).await;
        }
        "/to" => {
            let to = parameter("url").unwrap_or_default();
            let answer = format!(
                "HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
        "/circle" => {
            let answer =
                "HTTP/1.1 302 Found\r\nlocation: /circle\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            let _ = stream.write_all(answer.as_bytes()).await;
        }
        "/huge" => {
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-type: {html}\r\ncontent-length: 104857600\r\n\r\n<p>");
            let _ = stream.write_all(head.as_bytes()).await;
            while stream.write_all(&[b'x'; 64 * 1024]).await.is_ok() {}
        }
        "/endless" => {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {html}\r\n\r\n<p>");
            let _ = stream.write_all(head.as_bytes()).await;
            while stream.write_all(&[b'x'; 64 * 1024]).await.is_ok() {}
        }
        "/once" => {
            // The first time as below.
            let before = asked.lock().unwrap().iter().filter(|asked| asked.contains("/once")).count();
            if before == 1 {
                let _ = stream.read(&mut [0; 16]).await;
            }
            send(&mut stream, 200, "text/javascript", b"").await;
        }
        "/after" => {
            // Once somebody has asked for something else.
            let other = format!("GET {}", parameter("path").unwrap_or_default());
            while !asked.lock().unwrap().contains(&other) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            send(&mut stream, 200, "text/javascript", b"").await;
        }
        "/never" => {
            // Until the other side goes.
            let _ = stream.read(&mut [0; 16]).await;
        }
        "/search" => match parameter("q").as_deref() {
            Some("garbage") => send(&mut stream, 200, "application/json", b"<html>not json").await,
            Some("odd") => send(&mut stream, 200, "application/json", br#"{"results": "none"}"#).await,
            Some("none") => send(&mut stream, 200, "application/json", br#"{"results": []}"#).await,
            Some("refused") => send(&mut stream, 403, "text/html", b"Forbidden").await,
            Some("broken") => send(&mut stream, 500, "text/plain", b"canary").await,
            Some(query) if query.starts_with("moved ") => {
                let to = query.trim_start_matches("moved ");
                let answer = format!("HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n");
                let _ = stream.write_all(answer.as_bytes()).await;
            }
            Some("huge") => {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n{\"results\": [";
                let _ = stream.write_all(head.as_bytes()).await;
                while stream.write_all(&[b' '; 64 * 1024]).await.is_ok() {}
            }
            Some("slow") => {
                let _ = stream.read(&mut [0; 16]).await;
            }
            _ => {
                let results: Vec<_> = (1..=12)
                    .map(|at| serde_json::json!({
                        "title": format!("Tree {at}"), "content": "A tree, 木", "url": format!("https://trees.example/{at}"),
                        "engine": "x", "score": 1.5,
                    }))
                    .chain([serde_json::json!({"url": "https://bare.example/", "title": null})])
                    .collect();
                let body = serde_json::json!({"query": "x", "results": results}).to_string();
                send(&mut stream, 200, "application/json", body.as_bytes()).await;
            }
        },
        _ => send(&mut stream, 404, html, b"<h1>Not here</h1><p>There is no such page.").await,
    }
    // What was written is read before the end is seen.
    let _ = stream.shutdown().await;
    let _ = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 16])).await;
}

async fn send(stream: &mut TcpStream, status: u16, kind: &str, body: &[u8]) {
    let head = format!(
        "HTTP/1.1 {status} Answer\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(body).await;
}
