//! What the server says about itself (RFC 8414, OpenID Connect Discovery).

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::Settings;

/// Whether its metadata is at a path.
pub(super) fn is_at(settings: &Settings, path: &str) -> bool {
    let tenant = &settings.path;
    (settings.oauth_metadata && path == format!("/.well-known/oauth-authorization-server{tenant}"))
        || (settings.oidc_inserted && path == format!("/.well-known/openid-configuration{tenant}"))
        || (settings.oidc_appended && path == format!("{tenant}/.well-known/openid-configuration"))
}

/// The metadata.
pub(super) fn document(settings: &Settings, issuer: &str, address: SocketAddr) -> Value {
    let at = |path: &str| format!("http://{address}{}{path}", settings.path);
    let mut document = json!({
        "issuer": settings.other_issuer.as_deref().unwrap_or(issuer),
        "authorization_endpoint": at("/authorize"),
        "token_endpoint": at("/token"),
        "response_types_supported": ["code"],
        "grant_types_supported": ["authorization_code", "refresh_token"],
        "token_endpoint_auth_methods_supported": settings.auth_methods,
        "scopes_supported": settings.scopes,
    });
    if let Some(methods) = &settings.challenge_methods {
        document["code_challenge_methods_supported"] = json!(methods);
    }
    if settings.registration {
        document["registration_endpoint"] = at("/register").into();
    }
    if settings.client_documents {
        document["client_id_metadata_document_supported"] = true.into();
    }
    if settings.iss {
        document["authorization_response_iss_parameter_supported"] = true.into();
    }
    if settings.oidc_inserted || settings.oidc_appended {
        document["jwks_uri"] = at("/jwks").into();
        document["subject_types_supported"] = json!(["public"]);
        document["id_token_signing_alg_values_supported"] = json!(["RS256"]);
    }
    document
}
