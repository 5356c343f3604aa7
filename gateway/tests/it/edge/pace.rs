//! Clients that are slow, silent or too many.

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{started, unharmed};
use crate::deployment::{Deployment, eventually};

/// Pools and balancers keep connections for later. Who has begun to ask has to go on.
#[tokio::test]
async fn a_connection_may_rest_between_requests_and_not_within_one() {
    let api = Deployment::start().await;
    let connect = async || tokio::net::TcpStream::connect(api.address()).await.unwrap();
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {}\r\n\r\n", api.address());
    let resting = async {
        let mut stream = connect().await;
        for pause in [Duration::ZERO, Duration::from_secs(12)] {
            tokio::time::sleep(pause).await;
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = vec![0; 4_096];
            let read = stream.read(&mut answer).await.unwrap();
            assert!(answer[..read].starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&answer));
        }
    };
    let dripping = async {
        let mut stream = connect().await;
        // The first request of the connection is in time, the second is not.
        stream.write_all(request.as_bytes()).await.unwrap();
        assert!(stream.read(&mut vec![0; 4_096]).await.unwrap() > 0);
        let begun = Instant::now();
        for byte in request.bytes().cycle() {
            let closed = tokio::time::timeout(Duration::from_millis(500), stream.read(&mut [0])).await;
            if matches!(closed, Ok(Ok(0) | Err(_))) || stream.write_all(&[byte.max(b'a')]).await.is_err() {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "a head may drip in for ever");
        }
        assert!(begun.elapsed() > Duration::from_secs(8), "it was closed before its time");
    };
    let silent = async {
        let mut stream = connect().await;
        let closed = tokio::time::timeout(Duration::from_secs(30), stream.read(&mut [0])).await;
        assert_eq!(closed.unwrap().unwrap(), 0, "who connects has to ask for something");
    };
    tokio::join!(resting, dripping, silent);
}

#[tokio::test]
async fn who_sends_or_reads_nothing_is_let_go() {
    let api = started().await;
    let call = |body: &str| {
        let head = format!(
            "POST /mcp/tool/call HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: ",
            api.address()
        );
        format!("{head}{}\r\n\r\n{body}", body.len())
    };
    let slow_body = async {
        let mut stream = TcpStream::connect(api.address()).await.unwrap();
        let request = call(r#"{"serverName": "echo", "methodName": "echo", "args": {"text": "hi"}}"#);
        let begun = Instant::now();
        stream.write_all(&request.as_bytes()[..request.len() - 10]).await.unwrap();
        let mut answer = vec![0; 4_096];
        let read = timeout(Duration::from_secs(60), stream.read(&mut answer)).await.unwrap().unwrap();
        let answer = String::from_utf8_lossy(&answer[..read]).into_owned();
        assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
        assert!(answer.contains("request_timeout") && answer.contains("not_started"), "{answer}");
        assert!(begun.elapsed() > Duration::from_secs(25));
    };
    let unread = async {
        let mut stream = TcpStream::connect(api.address()).await.unwrap();
        let whole = 15 * 1024 * 1024;
        let body = json!({"serverName": "echo", "methodName": "big", "args": {"bytes": whole}});
        stream.write_all(call(&body.to_string()).as_bytes()).await.unwrap();
        // The answer begins, and fills whatever holds it on its way. Nobody reads on.
        assert!(stream.read(&mut [0; 64]).await.unwrap() > 0);
        let open = || {
            let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
            let port = |address: std::net::SocketAddr| format!(":{:04X}", address.port());
            let (own, theirs) = (port(stream.local_addr().unwrap()), port(stream.peer_addr().unwrap()));
            // As the gateway sees it: the client is its remote address. 01: established.
            sockets.lines().any(|line| {
                let words: Vec<_> = line.split_whitespace().collect();
                matches!(words[..], [_, local, remote, "01", ..] if local.ends_with(&theirs) && remote.ends_with(&own))
            })
        };
        assert!(open());
        let begun = Instant::now();
        while open() {
            assert!(begun.elapsed() < Duration::from_secs(90), "the connection is kept for ever");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        assert!(begun.elapsed() > Duration::from_secs(20), "it was closed before its time");
    };
    tokio::join!(slow_body, unread);
    unharmed(&api).await;
}

/// Ten thousand idle clients are as many as the setting says, and one more.
#[tokio::test]
async fn who_comes_too_many_is_closed_and_the_others_are_served() {
    let api = Deployment::builder().env("MAX_CONNECTIONS", "40").start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let address = api.address().to_owned();
    let request = format!("GET /healthz HTTP/1.1\r\nHost: {address}\r\n\r\n");
    let ask = async |stream: &mut TcpStream| {
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = vec![0; 4_096];
        let read = timeout(Duration::from_secs(30), stream.read(&mut answer)).await.unwrap().ok()?;
        answer[..read].starts_with(b"HTTP/1.1 200 OK").then_some(())
    };
    // Some were asked something and rest, and some never say anything.
    let mut served = Vec::new();
    let mut refused = 0;
    for _ in 0..60 {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        match ask(&mut stream).await {
            Some(()) => served.push(stream),
            None => refused += 1,
        }
    }
    // The test's own connections count as well.
    assert!((30..=40).contains(&served.len()), "{}", served.len());
    assert_eq!(served.len() + refused, 60);
    let mut one_more = TcpStream::connect(&address).await.unwrap();
    assert_eq!(one_more.read(&mut [0]).await.unwrap_or(0), 0, "it is closed at once");
    for stream in &mut served {
        ask(stream).await.expect("who was let in is served");
    }
    drop(served);
    eventually("there is room again", async || {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        ask(&mut stream).await.is_some()
    })
    .await;
    assert!(api.metric("mcp_refused_total{reason=\"gateway_connections\"}").await >= 21.0);
    assert!(api.metric("mcp_gateway_connections").await >= 1.0);
    unharmed(&api).await;
}
