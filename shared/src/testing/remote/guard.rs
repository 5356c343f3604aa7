//! Who may ask: tokens, as the authorization server knows them, and where a client finds that.

use std::net::TcpStream;

use serde_json::{Value, json};
use url::Url;

use super::{answer, server::Server};
use crate::testing::http::{self, Request};

impl Server {
    /// Whose token a request has; otherwise the status that it gets.
    pub(super) fn user(&self, request: &Request) -> Result<Option<String>, u16> {
        let Some(issuer) = &self.options.auth else { return Ok(None) };
        let token = request.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
        let token = token.ok_or(401_u16)?;
        let url = Url::parse(issuer).expect("--auth is a URL");
        let address = url.socket_addrs(|| None).expect("--auth names an address")[0];
        let body = url::form_urlencoded::Serializer::new(String::new()).append_pair("token", token).finish();
        let path = format!("{}/introspect", url.path().trim_end_matches('/'));
        let kind = "application/x-www-form-urlencoded";
        let text = format!(
            "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let (_, _, body) = http::fetch(&address.to_string(), &text).map_err(|_| 503_u16)?;
        let known: Value = serde_json::from_str(&body).unwrap_or_default();
        let resource = self.options.resource.clone().unwrap_or_else(|| self.endpoint());
        let ours = known["aud"].as_str().is_none_or(|audience| audience == resource);
        if known["active"] != true || !ours {
            return Err(401);
        }
        let scopes = known["scope"].as_str().unwrap_or_default();
        match &self.options.scope {
            Some(scope) if !scopes.split(' ').any(|one| one == scope) => Err(403),
            _ => Ok(known["sub"].as_str().map(str::to_owned)),
        }
    }

    /// Says that a token is needed, or another one, and where to find out which.
    pub(super) fn challenge(&self, status: u16, out: &mut TcpStream) -> bool {
        let mut challenge = match status {
            403 => r#"Bearer error="insufficient_scope""#.to_owned(),
            _ => r#"Bearer error="invalid_token""#.to_owned(),
        };
        if let Some(scope) = &self.options.scope {
            challenge += &format!(r#", scope="{scope}""#);
        }
        if !self.options.bare_challenge {
            let path = if self.options.metadata_at == "root" { "" } else { "/mcp" };
            let at = format!("http://{}/.well-known/oauth-protected-resource{path}", self.address);
            challenge += &format!(r#", resource_metadata="{at}""#);
        }
        answer::json(out, status, &[("www-authenticate", &challenge)], r#"{"error":"unauthorized"}"#)
    }

    /// Protected-resource metadata (RFC 9728).
    pub(super) fn metadata(&self, at: &str, out: &mut TcpStream) -> bool {
        let here = match self.options.metadata_at.as_str() {
            "root" => at.is_empty(),
            "path" => at == "/mcp",
            _ => false,
        };
        match &self.options.auth {
            Some(issuer) if here => {
                let resource = self.options.resource.clone().unwrap_or_else(|| self.endpoint());
                let mut document = json!({"resource": resource, "authorization_servers": [issuer],
                    "bearer_methods_supported": ["header"]});
                if let Some(scope) = &self.options.scope {
                    document["scopes_supported"] = json!([scope]);
                }
                answer::json(out, 200, &[], &document.to_string())
            }
            _ => answer::empty(out, 404),
        }
    }
}
