//! Remote servers behind TLS. The certificates are for these tests alone: an authority that nobody trusts,
//! and what it signed, with the key: for
//! `localhost`, the same until 2021, and for another name.

use std::{path::PathBuf, sync::Arc};

use mcp_shared::tls;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::{deployment::Deployment, remote::remote};

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/it/tls").join(name)
}

/// Speaks TLS in front of whoever has this address. Returned is its port.
pub async fn in_front_of(address: &str, certificate: &str) -> u16 {
    tls::install_provider();
    let certificate = CertificateDer::from_pem_file(file(certificate)).unwrap();
    let key = PrivateKeyDer::from_pem_file(file("localhost.key")).unwrap();
    let config =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let behind = address.split('/').nth(2).unwrap().to_owned();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (acceptor, behind) = (acceptor.clone(), behind.clone());
            tokio::spawn(async move {
                if let Ok(mut client) = acceptor.accept(client).await {
                    let mut server = TcpStream::connect(behind).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn a_server_with_a_trusted_certificate_is_called() {
    let remote = remote(&[]);
    let port = in_front_of(&remote.url(), "localhost.pem").await;
    let authority = file("authority.pem");
    let api = Deployment::builder()
        .env("EGRESS_ALLOW", "127.0.0.0/8,::1")
        .env("SSL_CERT_FILE", authority.to_str().unwrap())
        .start()
        .await;
    let url = format!("https://localhost:{port}/mcp");
    let body = json!({"name": "s", "transportType": "streamable_http", "url": url});
    let added = api.post("/mcp/servers", &body).await.ok();
    assert_eq!(added.json()["server"]["status"], "connected");
    assert_eq!(api.call("s", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
}

#[tokio::test]
async fn a_server_that_nobody_vouches_for_is_not() {
    let remote = remote(&[]);
    let port = in_front_of(&remote.url(), "localhost.pem").await;
    let api = Deployment::builder().env("EGRESS_ALLOW", "127.0.0.0/8,::1").start().await;
    let url = format!("https://localhost:{port}/mcp");
    let body = json!({"name": "s", "transportType": "streamable_http", "url": url});
    let added = api.post("/mcp/servers", &body).await.ok();
    assert_eq!(added.json()["server"]["status"], "disconnected");
    let refused = api.call("s", "echo", json!({"text": "hi"})).await.fails(502, "upstream_tls");
    assert_eq!(refused.json()["outcome"], "not_started");
    assert_eq!(refused.json()["retryable"], false);
}

#[tokio::test]
async fn a_certificate_that_has_ended_or_is_anothers_is_refused() {
    let remote = remote(&[]);
    let authority = file("authority.pem");
    let api = Deployment::builder()
        .env("EGRESS_ALLOW", "127.0.0.0/8,::1")
        .env("SSL_CERT_FILE", authority.to_str().unwrap())
        .start()
        .await;
    for (name, certificate) in [("ended", "expired.pem"), ("another", "elsewhere.pem")] {
        let port = in_front_of(&remote.url(), certificate).await;
        let url = format!("https://localhost:{port}/mcp");
        let body = json!({"name": name, "transportType": "streamable_http", "url": url});
        let added = api.post("/mcp/servers", &body).await.ok();
        assert_eq!(added.json()["server"]["status"], "disconnected");
        let refused = api.call(name, "echo", json!({"text": "hi"})).await.fails(502, "upstream_tls");
        assert_eq!(refused.json()["outcome"], "not_started", "{}", refused.text);
        assert_eq!(refused.json()["retryable"], false);
    }
}
