//! Clients, codes and tokens.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Instant,
};

use base64::{Engine, engine::general_purpose};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use url::{Url, form_urlencoded};
use uuid::Uuid;

use super::{Answer, Settings};

/// An access token and what renews it.
#[derive(Debug, Clone)]
pub struct Tokens {
    /// The access token.
    pub access: String,
    /// The refresh token, if there are such.
    pub refresh: Option<String>,
}

/// What an access token stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// Who agreed.
    pub subject: String,
    /// The client to whom.
    pub client: String,
    /// The resource that it is for.
    pub resource: Option<String>,
    /// The scopes, separated by spaces.
    pub scope: String,
}

struct Client {
    secret: Option<String>,
    redirect_uris: Vec<String>,
}

struct Code {
    granted: Granted,
    redirect_uri: String,
    challenge: String,
}

struct Access {
    granted: Granted,
    family: u64,
    ends: Instant,
}

struct Refresh {
    granted: Granted,
    family: u64,
    used: bool,
}

#[derive(Default)]
pub(super) struct Grants {
    clients: HashMap<String, Client>,
    codes: HashMap<String, Code>,
    access: HashMap<String, Access>,
    refresh: HashMap<String, Refresh>,
    revoked: HashSet<u64>,
    families: u64,
    reuses: usize,
}

type Params = BTreeMap<String, String>;

fn text<'a>(params: &'a Params, name: &str) -> &'a str {
    params.get(name).map(String::as_str).unwrap_or_default()
}

fn random(kind: &str) -> String {
    format!("{kind}-{}", Uuid::new_v4().simple())
}

impl Grants {
    pub(super) fn add_client(&mut self, id: &str, secret: Option<&str>, redirect_uris: &[&str]) {
        let redirect_uris = redirect_uris.iter().map(|uri| (*uri).to_owned()).collect();
        self.clients.insert(id.to_owned(), Client { secret: secret.map(str::to_owned), redirect_uris });
    }

    pub(super) fn forget_client(&mut self, id: &str) {
        self.clients.remove(id);
    }

    pub(super) fn reuses(&self) -> usize {
        self.reuses
    }

    pub(super) fn expire_all(&mut self) {
        self.access.clear();
    }

    pub(super) fn revoke_all(&mut self) {
        self.revoked.extend(0..=self.families);
    }

    pub(super) fn granted(&self, token: &str, now: Instant) -> Option<Granted> {
        let access = self.access.get(token)?;
        (access.ends > now && !self.revoked.contains(&access.family)).then(|| access.granted.clone())
    }

    pub(super) fn mint(
        &mut self,
        settings: &Settings,
        now: Instant,
        client: &str,
        subject: &str,
        resource: Option<&str>,
    ) -> Tokens {
        let granted = Granted {
            subject: subject.to_owned(),
            client: client.to_owned(),
            resource: resource.map(str::to_owned),
            scope: settings.scopes.join(" "),
        };
        self.families += 1;
        self.issue(settings, now, granted, self.families)
    }

    fn issue(&mut self, settings: &Settings, now: Instant, granted: Granted, family: u64) -> Tokens {
        let tokens =
            Tokens { access: random("access"), refresh: settings.refreshable.then(|| random("refresh")) };
        let access = Access { granted: granted.clone(), family, ends: now + settings.lifetime };
        self.access.insert(tokens.access.clone(), access);
        if let Some(token) = &tokens.refresh {
            self.refresh.insert(token.clone(), Refresh { granted, family, used: false });
        }
        tokens
    }

    /// Dynamic client registration (RFC 7591).
    pub(super) fn register(&mut self, settings: &Settings, body: &[u8]) -> Answer {
        let Ok(mut wish) = serde_json::from_slice::<Value>(body) else {
            return Answer::error(400, "invalid_client_metadata", "the body is not JSON");
        };
        let uris: Option<Vec<String>> = wish["redirect_uris"]
            .as_array()
            .and_then(|uris| uris.iter().map(|uri| uri.as_str().map(str::to_owned)).collect());
        let Some(uris) = uris.filter(|uris| !uris.is_empty()) else {
            return Answer::error(400, "invalid_redirect_uri", "there is none");
        };
        let wished = wish["token_endpoint_auth_method"].as_str().map(str::to_owned);
        let Some(method) = wished.or_else(|| settings.auth_methods.first().cloned()) else {
            return Answer::error(400, "invalid_client_metadata", "there is no way to authenticate");
        };
        if !settings.auth_methods.contains(&method) {
            return Answer::error(400, "invalid_client_metadata", "token_endpoint_auth_method");
        }
        let (id, secret) = (random("client"), (method != "none").then(|| random("secret")));
        wish["client_id"] = id.as_str().into();
        wish["token_endpoint_auth_method"] = method.into();
        if let Some(secret) = &secret {
            wish["client_secret"] = secret.as_str().into();
            wish["client_secret_expires_at"] = 0.into();
        }
        self.clients.insert(id, Client { secret, redirect_uris: uris });
        Answer::json(201, &wish)
    }

    /// The user's browser comes, and the user agrees.
    pub(super) fn authorize(&mut self, settings: &Settings, issuer: &str, params: &Params) -> Answer {
        let (id, uri) = (text(params, "client_id"), text(params, "redirect_uri"));
        // Nobody is sent anywhere before these two are right.
        let known = match self.clients.get(id) {
            Some(client) => client.redirect_uris.iter().any(|known| known == uri),
            None => settings.client_documents && id.starts_with("https://"),
        };
        let Some(mut back) = Url::parse(uri).ok().filter(|_| known) else {
            return Answer::error(400, "invalid_request", "the client or its redirect_uri is not known");
        };
        let resource = params.get("resource").cloned();
        let wrong = if settings.denies {
            Some("access_denied")
        } else if text(params, "response_type") != "code" {
            Some("unsupported_response_type")
        } else if text(params, "code_challenge_method") != "S256"
            || text(params, "code_challenge").len() != 43
        {
            Some("invalid_request")
        } else if settings.resource.is_some() && settings.resource != resource {
            Some("invalid_target")
        } else if !text(params, "scope").split_whitespace().all(|s| settings.scopes.iter().any(|t| t == s)) {
            Some("invalid_scope")
        } else {
            None
        };
        {
            let mut query = back.query_pairs_mut();
            match wrong {
                Some(error) => {
                    query.append_pair("error", error);
                }
                None => {
                    let code = random("code");
                    query.append_pair("code", &code);
                    let granted = Granted {
                        subject: settings.subject.clone(),
                        client: id.to_owned(),
                        resource,
                        scope: text(params, "scope").to_owned(),
                    };
                    let challenge = text(params, "code_challenge").to_owned();
                    self.codes.insert(code, Code { granted, redirect_uri: uri.to_owned(), challenge });
                }
            }
            if let Some(state) = params.get("state") {
                query.append_pair("state", state);
            }
            if settings.iss {
                query.append_pair("iss", settings.other_iss.as_deref().unwrap_or(issuer));
            }
        }
        Answer::redirect(302, back.into())
    }

    /// Tokens for a code, or for a refresh token.
    pub(super) fn token(
        &mut self,
        settings: &Settings,
        now: Instant,
        params: &Params,
        authorization: Option<&str>,
    ) -> Answer {
        let client = match self.client(settings, params, authorization) {
            Ok(client) => client,
            Err(why) => return Answer::error(401, "invalid_client", why),
        };
        let asked = params.get("resource");
        let (granted, family) = match text(params, "grant_type") {
            "authorization_code" => {
                // A code is used up by whoever brings it.
                let Some(code) = self.codes.remove(text(params, "code")) else {
                    return Answer::error(400, "invalid_grant", "the code is not known");
                };
                let digest = Sha256::digest(text(params, "code_verifier").as_bytes());
                let verified = general_purpose::URL_SAFE_NO_PAD.encode(digest) == code.challenge;
                let same = code.granted.client == client && code.redirect_uri == text(params, "redirect_uri");
                if !verified || !same {
                    return Answer::error(400, "invalid_grant", "the code is not for this client or login");
                }
                if asked.is_some() && asked != code.granted.resource.as_ref() {
                    return Answer::error(400, "invalid_target", "the login was for another resource");
                }
                self.families += 1;
                (code.granted, self.families)
            }
            "refresh_token" => match self.refreshed(settings, &client, text(params, "refresh_token")) {
                Ok(found) => found,
                Err(why) => return Answer::error(400, "invalid_grant", why),
            },
            _ => return Answer::error(400, "unsupported_grant_type", "authorization_code, refresh_token"),
        };
        if asked.is_some() && granted.resource.is_some() && asked != granted.resource.as_ref() {
            return Answer::error(400, "invalid_target", "the grant is for another resource");
        }
        let scope = granted.scope.clone();
        let tokens = self.issue(settings, now, granted, family);
        let mut answer = json!({"access_token": tokens.access, "token_type": "Bearer", "scope": scope});
        if settings.says_lifetime {
            answer["expires_in"] = settings.lifetime.as_secs().into();
        }
        let renewed = settings.rotation || text(params, "grant_type") == "authorization_code";
        if let Some(refresh) = tokens.refresh.filter(|_| renewed) {
            answer["refresh_token"] = refresh.into();
        }
        Answer::json(200, &answer)
    }

    fn refreshed(
        &mut self,
        settings: &Settings,
        client: &str,
        token: &str,
    ) -> Result<(Granted, u64), &'static str> {
        let found = self.refresh.get_mut(token).ok_or("the refresh token is not known")?;
        if found.granted.client != client {
            return Err("the refresh token is another client's");
        }
        if self.revoked.contains(&found.family) {
            return Err("the refresh token is revoked");
        }
        if found.used {
            self.reuses += 1;
            self.revoked.insert(found.family);
            return Err("the refresh token was used before");
        }
        found.used = settings.rotation;
        Ok((found.granted.clone(), found.family))
    }

    /// The client that asks, once it has proved who it is.
    fn client(
        &self,
        settings: &Settings,
        params: &Params,
        authorization: Option<&str>,
    ) -> Result<String, &'static str> {
        let decoded = |text: &str| {
            let pairs = format!("x={text}");
            form_urlencoded::parse(pairs.as_bytes()).next().map(|(_, value)| value.into_owned())
        };
        let (method, id, secret) = match authorization {
            Some(header) => {
                let basic = header.strip_prefix("Basic ").ok_or("only Basic is known")?;
                let bytes = general_purpose::STANDARD.decode(basic).map_err(|_| "not base64")?;
                let pair = String::from_utf8(bytes).map_err(|_| "not UTF-8")?;
                let (id, secret) = pair.split_once(':').ok_or("no colon")?;
                let (id, secret) = (decoded(id).unwrap_or_default(), decoded(secret));
                ("client_secret_basic", id, secret)
            }
            None => match params.get("client_secret") {
                Some(secret) => {
                    ("client_secret_post", text(params, "client_id").to_owned(), Some(secret.clone()))
                }
                None => ("none", text(params, "client_id").to_owned(), None),
            },
        };
        if !settings.auth_methods.iter().any(|known| known == method) {
            return Err("this way of authentication is not supported");
        }
        match self.clients.get(&id) {
            Some(client) if client.secret == secret => Ok(id),
            Some(_) => Err("the secret is wrong"),
            None if settings.client_documents && id.starts_with("https://") => Ok(id),
            None => Err("the client is not known"),
        }
    }
}
