//! Authorization servers that mcp-api's records name themselves (`oauthTemplate`), because the remote server names
//! none, or not the right one.

use std::sync::Arc;

use mcp_shared::{crypter::LegacyMode, error::WorkerError, server::ServerRecord};
use rmcp::transport::auth::{AuthorizationManager, AuthorizationMetadata, OAuthHttpClient};
use serde_json::{Map, Value};
use url::Url;

use super::{
    discovery::{Found, at, encrypts, failed},
    http::Http,
    url_of,
};
use crate::outgoing::Outgoing;

/// The fields that are called otherwise in an authorization server's own document.
const NAMES: [(&str, &str); 8] = [
    ("authorizationServerIssuer", "issuer"),
    ("authorizationEndpoint", "authorization_endpoint"),
    ("tokenEndpoint", "token_endpoint"),
    ("registrationEndpoint", "registration_endpoint"),
    ("scopesSupported", "scopes_supported"),
    ("codeChallengeMethodsSupported", "code_challenge_methods_supported"),
    ("tokenEndpointAuthMethodsSupported", "token_endpoint_auth_methods_supported"),
    ("clientIdMetadataDocumentSupported", "client_id_metadata_document_supported"),
];

/// What a record says of its authorization server.
pub struct Template {
    issuer: String,
    metadata: AuthorizationMetadata,
}

impl Template {
    /// What the record says where it is meant to count; `None`: the remote server is asked, as for any other.
    pub fn of(record: &ServerRecord, mode: LegacyMode) -> Option<Self> {
        let template = record.extra.get("oauthTemplate")?.as_object()?;
        let text = |field: &str| template.get(field).and_then(Value::as_str);
        let by_hand =
            text("discoveryMode") == Some("manual") || text("discoverySource") == Some("issuer_override");
        if !by_hand {
            return None;
        }
        let given = |(ours, theirs): &(&str, &str)| {
            let value = template.get(*ours).filter(|value| !value.is_null())?;
            Some(((*theirs).to_owned(), value.clone()))
        };
        let document: Map<String, Value> = NAMES.iter().filter_map(given).collect();
        let metadata: AuthorizationMetadata = serde_json::from_value(document.into())
            .inspect_err(|_| tracing::warn!(server = %record.name, "its oauthTemplate is not complete"))
            .ok()?;
        let issuer = metadata.issuer.clone()?;
        // A record is bound to nothing: whoever can write to the database could have tokens sent anywhere. As long as
        // mcp-api's rows count, they could so already.
        let origin = |url: &str| Url::parse(url).ok().map(|url| url.origin());
        if mode == LegacyMode::Off && origin(&issuer) != origin(&metadata.token_endpoint) {
            return None;
        }
        Some(Self { issuer, metadata })
    }

    /// The authorization server, unasked.
    pub async fn found(self, outgoing: &Outgoing, record: &ServerRecord) -> Result<Found, WorkerError> {
        let base = at(outgoing, url_of(record))?;
        encrypts(&self.issuer, &self.metadata)?;
        let http = Arc::new(Http::new(outgoing.clone(), base.clone()));
        let client = Arc::clone(&http) as Arc<dyn OAuthHttpClient>;
        let manager = AuthorizationManager::new_with_oauth_http_client(base, client).await;
        let mut manager = manager.map_err(|error| failed(&http, &error))?;
        manager.set_metadata(self.metadata.clone());
        Ok(Found { manager, http, issuer: self.issuer, metadata: self.metadata })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(template: Value) -> ServerRecord {
        serde_json::from_value(serde_json::json!({
            "_id": "6b031cdd6c5c3ee8dbcb20dd", "name": "remote", "displayName": "remote", "enabled": true,
            "createdAt": "2026-11-22T16:48:29.287Z", "updatedAt": "2026-11-22T16:48:29.287Z",
            "transportType": "streamable_http", "url": "https://mcp.example/", "oauthTemplate": template,
        }))
        .unwrap()
    }

    fn named(template: Value, mode: LegacyMode) -> Option<String> {
        Template::of(&record(template), mode).map(|template| template.metadata.token_endpoint)
    }

    #[test]
    fn only_what_was_said_by_hand_counts() {
        let template = |mode: &str, source: &str, token: &str| {
            serde_json::json!({
                "authorizationServerIssuer": "https://login.example", "discoveryMode": mode, "discoverySource": source,
                "authorizationEndpoint": "https://login.example/authorize", "tokenEndpoint": token,
                "registrationEndpoint": null, "codeChallengeMethodsSupported": ["S256"],
            })
        };
        let (here, elsewhere) = ("https://login.example/token", "https://api.example/token");
        for (mode, source) in [("manual", "prm"), ("auto", "issuer_override")] {
            for legacy in [LegacyMode::Rw, LegacyMode::Ro, LegacyMode::Off] {
                assert_eq!(named(template(mode, source, here), legacy).as_deref(), Some(here));
            }
            assert_eq!(named(template(mode, source, elsewhere), LegacyMode::Rw).as_deref(), Some(elsewhere));
            assert_eq!(named(template(mode, source, elsewhere), LegacyMode::Off), None);
        }
        assert_eq!(named(template("auto", "prm", here), LegacyMode::Rw), None);
        assert_eq!(named(serde_json::json!({"discoveryMode": "manual"}), LegacyMode::Rw), None);
        assert_eq!(named(Value::Null, LegacyMode::Rw), None);
    }
}
