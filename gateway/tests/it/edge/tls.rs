//! HTTPS by certificate files.

use std::{path::Path, sync::Arc, time::Instant};

use reqwest::Method;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore, SupportedProtocolVersion,
        pki_types::{CertificateDer, pem::PemObject},
        version::{TLS12, TLS13},
    },
};

use super::unharmed;
use crate::deployment::{Builder, Deployment, PATIENCE, eventually, tls_file};

/// A program with a certificate in a folder of its own.
fn with(folder: &Path, certificate: &str, key: &str) -> Builder {
    place(folder, certificate, key);
    Deployment::builder()
        .env("TLS_CERT_FILE", folder.join("cert.pem").display().to_string())
        .env("TLS_KEY_FILE", folder.join("key.pem").display().to_string())
}

fn place(folder: &Path, certificate: &str, key: &str) {
    std::fs::copy(tls_file(certificate), folder.join("cert.pem")).unwrap();
    std::fs::copy(tls_file(key), folder.join("key.pem")).unwrap();
}

/// Connects as a client that trusts one certificate, and speaks these versions and protocols.
async fn connect(
    address: &str,
    trusted: &str,
    versions: &[&'static SupportedProtocolVersion],
    protocols: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(tls_file(trusted)).unwrap()).unwrap();
    let mut config = ClientConfig::builder_with_protocol_versions(versions)
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect("localhost".try_into().unwrap(), stream).await
}

#[tokio::test]
async fn the_api_is_served_over_tls_and_nothing_else_is() {
    let folder = tempfile::tempdir().unwrap();
    let api = with(folder.path(), "localhost.pem", "localhost.key").start().await;
    assert!(api.base().starts_with("https://"));
    api.add_fixture("echo", &[], json!({})).await;
    let address = api.address().to_owned();
    for versions in [&[&TLS12], &[&TLS13]] {
        let stream = connect(&address, "authority.pem", versions, &["h2", "http/1.1"]).await.unwrap();
        let (_, connection) = stream.get_ref();
        assert_eq!(connection.alpn_protocol(), Some(b"http/1.1".as_slice()));
    }
    assert!(
        connect(&address, "renewed.pem", &[&TLS13], &[]).await.is_err(),
        "it has the certificate of another"
    );
    assert!(connect(&address, "authority.pem", &[&TLS13], &["h2"]).await.is_err(), "it spoke h2");

    // Who speaks HTTP in clear is told so, and learns nothing else.
    let body = "x".repeat(20_000);
    for request in [
        format!("GET /mcp/servers HTTP/1.1\r\nHost: {address}\r\n\r\n"),
        format!("POST /mcp/tool/call HTTP/1.1\r\nHost: {address}\r\nContent-Length: 20000\r\n\r\n{body}"),
        "nonsense".to_owned(),
    ] {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
        assert!(answer.contains(r#""code":"invalid_request""#) && answer.contains("https://"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    }
    // A client that knows nothing newer than TLS 1.1 gets an alert.
    let mut hello = vec![22, 3, 1, 0, 45, 1, 0, 0, 41, 3, 2];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0, 0x2f, 1, 0]);
    let mut stream = TcpStream::connect(&address).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer.first(), Some(&21), "{answer:?}");
    unharmed(&api).await;
    assert!(api.stop().await.success());
}

#[tokio::test]
async fn handshakes_have_their_time() {
    let folder = tempfile::tempdir().unwrap();
    let api = with(folder.path(), "localhost.pem", "localhost.key").start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let address = api.address().to_owned();
    let stuck = async |said: &[u8]| {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(said).await.unwrap();
        let begun = Instant::now();
        let closed = timeout(2 * PATIENCE, stream.read(&mut [0])).await.expect("the connection is kept");
        assert_eq!(closed.unwrap_or(0), 0);
        begun.elapsed()
    };
    let silent_behind_it = async {
        let mut stream = connect(&address, "authority.pem", &[&TLS13], &[]).await.unwrap();
        let closed = timeout(2 * PATIENCE, stream.read(&mut [0])).await.expect("the connection is kept");
        assert_eq!(closed.unwrap_or(0), 0);
    };
    let served = async {
        for _ in 0..20 {
            api.send(api.request(Method::GET, "/mcp/servers")).await.ok();
        }
    };
    let (silent, half, (), ()) =
        tokio::join!(stuck(b""), stuck(&[22, 3, 1, 2, 0, 1]), silent_behind_it, served);
    for time in [silent, half] {
        assert!(time.as_secs() >= 8, "it was closed after {time:?}, before its time");
    }
    unharmed(&api).await;
}

#[tokio::test]
async fn certificates_are_read_again_and_bad_ones_are_not_taken() {
    let folder = tempfile::tempdir().unwrap();
    let api = with(folder.path(), "localhost.pem", "localhost.key").start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let addresses = [api.address().to_owned(), api.address().to_owned()];
    let fits = async |trusted: &str| {
        for address in &addresses {
            if connect(address, trusted, &[&TLS13, &TLS12], &[]).await.is_err() {
                return false;
            }
        }
        true
    };
    let count = |words: &str| api.log().matches(words).count();
    let gateways = if crate::CLUSTER { 2 } else { 1 };
    assert!(fits("authority.pem").await);
    // As `openssl x509 -enddate` says it of both.
    let ends = async || api.metric("mcp_tls_certificate_expiry_timestamp_seconds").await / gateways as f64;
    assert_eq!(ends().await, 4_948_992_000.0);
    let mut kept = 0;
    for (certificate, key) in [
        ("renewed.pem", "localhost.key"),
        ("localhost.key", "localhost.key"),
        ("expired.pem", "localhost.key"),
    ] {
        place(folder.path(), certificate, key);
        kept += gateways;
        api.hang_up();
        eventually("the new file is refused", async || count("the old one stays in use") == kept).await;
        assert!(fits("authority.pem").await);
    }
    place(folder.path(), "renewed.pem", "another.key");
    api.hang_up();
    eventually("the new certificate is in use", async || fits("renewed.pem").await).await;
    assert!(!fits("authority.pem").await);
    assert_eq!(ends().await, 4_949_033_212.0);
    unharmed(&api).await;
}
