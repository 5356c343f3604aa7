//! Who is let in.

use url::Url;

use super::{Reader, parse};

/// Who is let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// `AUTH=none` in so many words.
    None,
    /// Nothing was said: nobody is asked for credentials, and only loopback is listened on.
    Unset,
    /// Whoever shows a credential.
    Asked(Box<AuthSettings>),
}

/// Which credentials are accepted; one kind at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthSettings {
    /// API keys.
    pub keys: bool,
    /// Tokens of an OIDC issuer.
    pub jwt: Option<JwtSettings>,
}

/// Which tokens are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtSettings {
    /// The claim `iss`, to the letter.
    pub issuer: String,
    /// One of these must be in the claim `aud`.
    pub audiences: Vec<String>,
    /// Where the issuer's keys are; `None`: where its discovery document says.
    pub jwks_url: Option<Url>,
    /// How tokens may be signed.
    pub algorithms: Vec<JwtAlgorithm>,
    /// The claim that names the user.
    pub user_claim: String,
    /// The claim that lists scopes.
    pub scope_claim: String,
    /// What stands before our scopes there.
    pub scope_prefix: String,
}

macro_rules! algorithms {
    ($($name:ident)*) => {
        /// A signature algorithm with a public key. There is none with a shared secret: whoever could check such a token
        /// could make one.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[allow(missing_docs)]
        pub enum JwtAlgorithm { $($name,)* }

        impl JwtAlgorithm {
            fn parse(text: &str) -> Option<Self> {
                $(if text.eq_ignore_ascii_case(stringify!($name)) { return Some(Self::$name); })*
                None
            }
        }
    };
}

algorithms! { RS256 RS384 RS512 PS256 PS384 PS512 ES256 ES384 EdDSA }

fn kinds(text: &str) -> Result<Option<(bool, bool)>, parse::Valid> {
    const VALID: parse::Valid = "keys, jwt, both with a comma between them, or none";
    if text.eq_ignore_ascii_case("none") {
        return Ok(None);
    }
    let (mut keys, mut jwt) = (false, false);
    for one in text.split(',').map(str::trim) {
        match one.to_ascii_lowercase().as_str() {
            "keys" => keys = true,
            "jwt" => jwt = true,
            _ => return Err(VALID),
        }
    }
    Ok(Some((keys, jwt)))
}

/// A URL of an issuer: nobody on the way may give us other keys.
fn trusted_url(text: &str) -> Result<Url, parse::Valid> {
    const VALID: parse::Valid = "an https URL without user, query and fragment (http on this machine only)";
    let url = Url::parse(text).map_err(|_| VALID)?;
    let host = url.host_str().unwrap_or_default();
    let safe = url.scheme() == "https" || url.scheme() == "http" && parse::is_loopback(host);
    let plain = url.username().is_empty() && url.password().is_none();
    if safe && plain && url.has_host() && url.query().is_none() && url.fragment().is_none() {
        Ok(url)
    } else {
        Err(VALID)
    }
}

fn issuer(text: &str) -> Result<String, parse::Valid> {
    // As it is written: issuers are compared to the letter, and parsing would add a slash.
    trusted_url(text).map(|_| text.to_owned())
}

fn list(text: &str) -> Result<Vec<String>, parse::Valid> {
    let list: Vec<_> =
        text.split(',').map(str::trim).filter(|one| !one.is_empty()).map(str::to_owned).collect();
    if list.is_empty() { Err("one or more values, comma-separated") } else { Ok(list) }
}

fn algorithms(text: &str) -> Result<Vec<JwtAlgorithm>, parse::Valid> {
    const VALID: parse::Valid =
        "one or more of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 and EdDSA, comma-separated";
    list(text)?.iter().map(|one| JwtAlgorithm::parse(one).ok_or(VALID)).collect()
}

fn claim(text: &str) -> Result<String, parse::Valid> {
    let plain = text.len() <= 128 && text.bytes().all(|byte| byte.is_ascii_graphic());
    if plain { Ok(text.to_owned()) } else { Err("the name of a claim") }
}

impl Reader {
    /// Who is let in. A value that is not valid lets nobody in, and is reported.
    pub(super) fn auth(&mut self) -> Auth {
        let asked = match self.optional("AUTH", kinds) {
            None => return Auth::Unset,
            Some(None) => return Auth::None,
            Some(Some(asked)) => asked,
        };
        let (keys, jwt) = asked;
        let jwt = if jwt { self.jwt() } else { None };
        Auth::Asked(Box::new(AuthSettings { keys, jwt }))
    }

    fn jwt(&mut self) -> Option<JwtSettings> {
        for name in ["JWT_ISSUER", "JWT_AUDIENCE"] {
            if self.raw(name).is_none() {
                self.problem(
                    name,
                    "AUTH=jwt needs it: whose tokens are accepted, and those that are meant for whom",
                );
            }
        }
        let issuer = self.optional("JWT_ISSUER", issuer);
        let audiences = self.optional("JWT_AUDIENCE", list);
        let jwks_url = self.optional("JWT_JWKS_URL", trusted_url);
        let algorithms = self.required("JWT_ALGORITHMS", algorithms);
        let user_claim = self.required("JWT_USER_CLAIM", claim);
        let scope_claim = self.required("JWT_SCOPE_CLAIM", claim);
        let scope_prefix = self.required("JWT_SCOPE_PREFIX", claim);
        Some(JwtSettings {
            issuer: issuer?,
            audiences: audiences?,
            jwks_url,
            algorithms: algorithms?,
            user_claim: user_claim?,
            scope_claim: scope_claim?,
            scope_prefix: scope_prefix?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_credentials() {
        for (text, found) in [
            ("none", Some(None)),
            ("NONE", Some(None)),
            ("keys", Some(Some((true, false)))),
            ("jwt", Some(Some((false, true)))),
            ("JWT, keys", Some(Some((true, true)))),
            ("off", None),
            ("keys,", None),
            ("none,keys", None),
        ] {
            assert_eq!(kinds(text).ok(), found, "{text}");
        }
    }

    #[test]
    fn issuers_are_safe_from_whoever_is_on_the_way() {
        for good in [
            "https://id.example.com",
            "https://id.example.com/realms/a",
            "http://127.0.0.1:9",
            "http://localhost:8",
        ] {
            assert!(trusted_url(good).is_ok(), "{good}");
        }
        for bad in [
            "http://id.example.com",
            "https://a:b@id.example.com",
            "https://id.example.com/?a=b",
            "id.example.com",
            "file:///etc",
        ] {
            assert!(trusted_url(bad).is_err(), "{bad}");
        }
        assert_eq!(algorithms("es256, EDDSA").unwrap(), [JwtAlgorithm::ES256, JwtAlgorithm::EdDSA]);
        for bad in ["HS256", "none", "", "RS256,HS256"] {
            assert!(algorithms(bad).is_err(), "{bad}");
        }
    }
}
