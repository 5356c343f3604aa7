//! The public keys of an OIDC issuer: fetched when they are needed, kept for minutes, fetched again when a token
//! names one that is not known, and used for hours while the issuer does not answer.

use std::{
    sync::{Arc, RwLock},
    time::Duration,
};

use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use mcp_shared::{config::JwtSettings, limits, tls};
use reqwest::{Client, redirect};
use serde::Deserialize;
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    time::Instant,
};
use url::Url;

/// How often keys are fetched at most because one is not known, or because that failed.
const AGAIN: Duration = Duration::from_secs(10);

/// The keys, and when they came.
struct Known {
    keys: Arc<JwkSet>,
    at: Instant,
}

/// An issuer's keys.
pub struct Jwks(Arc<Issuer>);

struct Issuer {
    name: String,
    url: Option<Url>,
    client: Client,
    known: RwLock<Option<Known>>,
    /// When they were asked for last, whatever came of it. Whoever asks holds it.
    asked: Arc<Mutex<Option<Instant>>>,
}

/// What of the discovery document is of interest.
#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

impl Jwks {
    /// Of the issuer of these settings. Nothing is fetched yet: a start does not depend on it.
    pub fn new(settings: &JwtSettings) -> Result<Self, String> {
        tls::install_provider();
        let client = Client::builder()
            .timeout(limits::JWKS_TIMEOUT)
            // Where the keys are is said by who is trusted, and by nobody else.
            .redirect(redirect::Policy::none())
            .build()
            .map_err(|error| format!("no client for the issuer's keys: {error}"))?;
        Ok(Self(Arc::new(Issuer {
            name: settings.issuer.clone(),
            url: settings.jwks_url.clone(),
            client,
            known: RwLock::default(),
            asked: Arc::default(),
        })))
    }

    /// The key of that id; without one, the only key there is. `Ok(None)`: the issuer has none. `Err`: nobody
    /// knows.
    pub async fn key(&self, id: Option<&str>) -> Result<Option<Jwk>, ()> {
        let issuer = &self.0;
        if let (Some(found), Some(age)) = issuer.look(id)
            && age <= limits::JWKS_TRUST
        {
            // What is known already is only confirmed, and nobody waits for that.
            if age >= limits::JWKS_MEMORY
                && let Ok(asked) = Arc::clone(&issuer.asked).try_lock_owned()
            {
                let issuer = Arc::clone(issuer);
                tokio::spawn(async move { issuer.ask(asked).await });
            }
            return Ok(Some(found));
        }
        let asked = Arc::clone(&issuer.asked).lock_owned().await;
        // Somebody else may have fetched it, while this waited.
        if let (Some(found), Some(age)) = issuer.look(id)
            && age <= limits::JWKS_TRUST
        {
            return Ok(Some(found));
        }
        issuer.ask(asked).await;
        match issuer.look(id) {
            (found, Some(age)) if age <= limits::JWKS_TRUST => Ok(found),
            _ => Err(()),
        }
    }
}

impl Issuer {
    /// Fetches the keys, unless that was tried a moment ago. It ends within the time limits of its requests.
    async fn ask(&self, mut asked: OwnedMutexGuard<Option<Instant>>) {
        if asked.is_some_and(|at| at.elapsed() < AGAIN) {
            return;
        }
        *asked = Some(Instant::now());
        match self.fetch().await {
            Ok(keys) => {
                let mut known = self.known.write().unwrap_or_else(std::sync::PoisonError::into_inner);
                *known = Some(Known { keys: Arc::new(keys), at: Instant::now() });
            }
            Err(cause) => {
                tracing::warn!(
                    error.cause = cause,
                    issuer = self.name,
                    "the issuer's keys cannot be fetched"
                );
            }
        }
    }

    fn look(&self, id: Option<&str>) -> (Option<Jwk>, Option<Duration>) {
        let known = self.known.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(known) = known.as_ref() else { return (None, None) };
        let mut fit = known.keys.keys.iter().filter(|key| {
            let for_signing =
                key.common.public_key_use.as_ref().is_none_or(|of| *of == PublicKeyUse::Signature);
            for_signing && id.is_none_or(|id| key.common.key_id.as_deref() == Some(id))
        });
        let found = match (fit.next(), fit.next()) {
            (Some(only), None) => Some(only.clone()),
            // Several of one name, or of none: which is meant, nobody knows.
            _ => None,
        };
        (found, Some(known.at.elapsed()))
    }

    async fn fetch(&self) -> Result<JwkSet, String> {
        let url = match &self.url {
            Some(url) => url.clone(),
            None => {
                let text = format!("{}/.well-known/openid-configuration", self.name.trim_end_matches('/'));
                let url = Url::parse(&text).map_err(|error| error.to_string())?;
                let found: Discovery = self.document(url).await?;
                if found.issuer != self.name {
                    return Err("the discovery document is another issuer's".to_owned());
                }
                let url = Url::parse(&found.jwks_uri).map_err(|error| error.to_string())?;
                // It may be elsewhere, and not where anybody could change it on the way.
                if url.scheme() != "https" && !self.name.starts_with("http://") {
                    return Err("the issuer's keys are not at an https URL".to_owned());
                }
                url
            }
        };
        self.document(url).await
    }

    async fn document<T: for<'de> Deserialize<'de>>(&self, url: Url) -> Result<T, String> {
        let answer = self.client.get(url).send().await.and_then(reqwest::Response::error_for_status);
        let mut answer = answer.map_err(|error| mcp_shared::lifecycle::explain(&error))?;
        let mut body = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(|error| mcp_shared::lifecycle::explain(&error))? {
            if body.len() + part.len() > limits::JWKS_BYTES {
                return Err("the document is too large".to_owned());
            }
            body.extend_from_slice(&part);
        }
        serde_json::from_slice(&body).map_err(|error| error.to_string())
    }
}
