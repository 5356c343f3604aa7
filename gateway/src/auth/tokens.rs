//! Tokens of an OIDC issuer.

use std::collections::BTreeSet;

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use mcp_shared::{
    config::{JwtAlgorithm, JwtSettings},
    error::{ErrorCode, WorkerError},
    ids::UserId,
    limits,
    principal::{Credential, Principal, Reach, Scopes},
};
use serde_json::{Map, Value};
use std::time::Duration;

use super::{jwks::Jwks, signatures};
use crate::problem::Problem;

/// How far clocks may be apart, in seconds.
const LEEWAY: u64 = 30;

/// What knows tokens.
pub struct Tokens {
    settings: JwtSettings,
    jwks: Jwks,
    validation: Validation,
}

impl Tokens {
    /// As the settings say.
    pub fn new(settings: JwtSettings) -> Result<Self, String> {
        signatures::install();
        let mut validation = Validation::new(Algorithm::ES256);
        validation.algorithms = settings.algorithms.iter().copied().map(algorithm).collect();
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_issuer(&[&settings.issuer]);
        validation.set_audience(&settings.audiences);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        Ok(Self { jwks: Jwks::new(&settings)?, settings, validation })
    }

    /// Who comes with a token; `None`: nobody.
    pub async fn recognise(&self, text: &str) -> Result<Option<Principal>, Problem> {
        if text.len() > limits::TOKEN_BYTES {
            return Ok(None);
        }
        let Ok(header) = decode_header(text) else { return Ok(None) };
        // Before anybody is asked for a key.
        if !self.validation.algorithms.contains(&header.alg) {
            return Ok(None);
        }
        let key = self.jwks.key(header.kid.as_deref()).await.map_err(|()| unknown())?;
        let Some(key) = key else { return Ok(None) };
        let same = key.common.key_algorithm.is_none_or(|of| of.to_string() == format!("{:?}", header.alg));
        let Some(key) = DecodingKey::from_jwk(&key).ok().filter(|_| same) else { return Ok(None) };
        // One algorithm, which the key has to be of.
        let mut validation = self.validation.clone();
        validation.algorithms = vec![header.alg];
        match decode::<Map<String, Value>>(text, &key, &validation) {
            Ok(token) => Ok(self.principal(&token.claims)),
            Err(error) => {
                tracing::debug!(error.cause = %error, "a token is not valid");
                Ok(None)
            }
        }
    }

    fn principal(&self, claims: &Map<String, Value>) -> Option<Principal> {
        let text = |claim: &str| claims.get(claim).and_then(Value::as_str);
        let user = UserId::parse(text(&self.settings.user_claim)?).ok()?;
        let subject = text("sub").unwrap_or(user.as_str()).to_owned();
        Some(Principal {
            user,
            credential: Credential::Token { subject },
            scopes: self.scopes(claims.get(&self.settings.scope_claim)),
            reach: Reach::default(),
        })
    }

    /// Those of our scopes that a token has. Others are other programs' business.
    fn scopes(&self, claim: Option<&Value>) -> Scopes {
        let listed: Vec<&str> = match claim {
            Some(Value::String(text)) => text.split_ascii_whitespace().collect(),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let ours = listed.into_iter().filter_map(|one| one.strip_prefix(self.settings.scope_prefix.as_str()));
        ours.filter_map(|scope| scope.parse().ok()).collect::<BTreeSet<_>>()
    }
}

fn unknown() -> Problem {
    let text = "Tokens cannot be checked: the issuer's keys cannot be fetched";
    WorkerError::new(ErrorCode::IssuerUnavailable, text).retry_after(Duration::from_secs(10)).into()
}

fn algorithm(named: JwtAlgorithm) -> Algorithm {
    match named {
        JwtAlgorithm::RS256 => Algorithm::RS256,
        JwtAlgorithm::RS384 => Algorithm::RS384,
        JwtAlgorithm::RS512 => Algorithm::RS512,
        JwtAlgorithm::PS256 => Algorithm::PS256,
        JwtAlgorithm::PS384 => Algorithm::PS384,
        JwtAlgorithm::PS512 => Algorithm::PS512,
        JwtAlgorithm::ES256 => Algorithm::ES256,
        JwtAlgorithm::ES384 => Algorithm::ES384,
        JwtAlgorithm::EdDSA => Algorithm::EdDSA,
    }
}
