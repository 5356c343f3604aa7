//! Settings of remote servers and of logins to them.

use std::{fmt, sync::Arc};

use secrecy::SecretString;
use serde_json::Value;
use url::Url;

use super::{Reader, WebToolSettings, parse};
use crate::egress::{Egress, Permit};

/// Where requests may go that users can steer, and how users log in to remote servers.
#[derive(Debug, Clone, Default)]
pub struct RemoteSettings {
    /// The guard in front of what leaves.
    pub egress: Egress,
    /// Where browsers find this program; `None`: where they say that they have found it.
    pub public_url: Option<Url>,
    /// The application's credentials for the Google flow.
    pub google: Option<GoogleCredentials>,
    /// What the built-in tools for the web work with.
    pub web_tools: WebToolSettings,
}

/// What Google's console gives for an application, as one JSON object. It is never printed.
#[derive(Clone)]
pub struct GoogleCredentials(Arc<SecretString>);

impl GoogleCredentials {
    /// The JSON text.
    pub fn json(&self) -> &SecretString {
        &self.0
    }
}

impl fmt::Debug for GoogleCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GoogleCredentials")
    }
}

fn permits(text: &str) -> Result<Vec<Permit>, parse::Valid> {
    const VALID: parse::Valid = "hosts, *.domains, addresses and networks, comma-separated, such as \
                                 mcp.internal,10.0.0.0/8";
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| part.parse().map_err(|()| VALID)).collect()
}

fn public_url(text: &str) -> Result<Url, parse::Valid> {
    const VALID: parse::Valid = "an http or https URL without query, such as https://mcp.example.com";
    let url = Url::parse(text).map_err(|_| VALID)?;
    let plain = url.username().is_empty() && url.password().is_none();
    let bare = url.query().is_none() && url.fragment().is_none() && url.path() == "/";
    if matches!(url.scheme(), "http" | "https") && url.has_host() && plain && bare {
        Ok(url)
    } else {
        Err(VALID)
    }
}

fn google(text: &str) -> Result<GoogleCredentials, parse::Valid> {
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(_)) => Ok(GoogleCredentials(Arc::new(text.into()))),
        _ => Err("the JSON object that Google's console gives for an OAuth client, on one line"),
    }
}

impl Reader {
    /// The settings of remote servers.
    pub(super) fn remote(&mut self) -> RemoteSettings {
        RemoteSettings {
            egress: Egress::new(self.optional("EGRESS_ALLOW", permits).unwrap_or_default()),
            public_url: self.optional("PUBLIC_URL", public_url),
            google: self.optional("GOOGLE_OAUTH_CREDENTIALS", google),
            web_tools: self.web_tools(),
        }
    }
}
