//! HTTP as a caller speaks it: one kept-alive connection, one request at a time.

use anyhow::Result;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

/// A connection.
pub struct Client {
    sender: SendRequest<Full<Bytes>>,
    address: String,
}

impl Client {
    /// Connects to `host:port`.
    pub async fn connect(address: &str) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self { sender, address: address.to_owned() })
    }

    /// Sends a document and reads the answer, whatever it is.
    pub async fn post(&mut self, path: &str, body: Bytes) -> Result<Bytes> {
        Ok(self.send(Method::POST, path, body).await?.0)
    }

    /// Sends a document. What comes with the answer says after how many seconds to come back, where it was refused for now.
    pub async fn try_post(&mut self, path: &str, body: Bytes) -> Result<(Bytes, Option<u64>)> {
        self.send(Method::POST, path, body).await
    }

    /// Reads what there is, as it is.
    pub async fn read(&mut self, path: &str) -> Result<Bytes> {
        Ok(self.send(Method::GET, path, Bytes::new()).await?.0)
    }

    /// Reads a document.
    pub async fn get(&mut self, path: &str) -> Result<Value> {
        let (answer, _) = self.send(Method::GET, path, Bytes::new()).await?;
        Ok(serde_json::from_slice(&answer)?)
    }

    async fn send(&mut self, method: Method, path: &str, body: Bytes) -> Result<(Bytes, Option<u64>)> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.address)
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        let wait = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        Ok((response.into_body().collect().await?.to_bytes(), wait))
    }
}
