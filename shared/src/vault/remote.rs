//! Users' sessions with remote servers, their tokens and their logins. Ids of sessions, tokens and what
//! proves who we are, are encrypted and bound to user, server and issuer.
//!
//! Fields have the names of mcp-api, whose documents are read as they are: what is missing there is `null`
//! or not there at all, moments are texts or numbers, and lists may be one text.

use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{Vault, VaultError, packages::corrupt};
use crate::{
    crypter::{CryptoError, CryptoErrorKind, LegacyMode, Place, is_legacy, is_sealed},
    error::shorten,
    ids::{ServerName, UserId, WorkerId},
    metrics::count_integrity_failure,
    remote::{LOGIN_TIME, Login, LoginId, OAuthClient, OAuthTokens, Session},
    store::{Collection, Document, Revision, Store, StoreError, Versioned},
    timestamp::Timestamp,
};

/// How often a write is tried anew when others write the same document.
const ATTEMPTS: usize = 5;
/// The last moment that can be written, at the end of the year 9999.
const LAST_MILLIS: f64 = 253_402_300_799_999.0;

impl Vault {
    /// A user's session with a server.
    pub async fn session(
        &self,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Option<Versioned<Session>>, VaultError> {
        let stored =
            self.store.document(Collection::Sessions, &key(&[server.as_str(), user.as_str()])).await?;
        stored.map(|stored| self.open_session(stored, user, server)).transpose()
    }

    /// All sessions of a server. Those that cannot be read are logged and left out.
    pub async fn sessions_of(&self, server: &ServerName) -> Result<Vec<Versioned<Session>>, VaultError> {
        let stored = self.store.documents_of(Collection::Sessions, server).await?;
        let open = |stored: Versioned<Document>| {
            let user = UserId::from_stored(text(&stored.value, "username")?);
            self.open_session(stored, &user, server)
                .inspect_err(|error| tracing::error!(%error, "a session is left out"))
                .ok()
        };
        Ok(stored.into_iter().filter_map(open).collect())
    }

    /// Stores a session: a new one, or in place of the one that still has the revision `expected`
    /// (`Conflict` or `NotFound` if it has not, `AlreadyExists` if there is one and none was expected).
    pub async fn put_session(
        &self,
        session: &Session,
        expected: Option<Revision>,
    ) -> Result<Revision, VaultError> {
        let (server, user) = (session.server.as_str(), session.user.as_str());
        let ids = [server, user];
        let mut fields = Fields::new(Collection::Sessions, &key(&ids));
        fields.set("serverName", server)?;
        fields.set("username", user)?;
        fields.set("url", &session.url)?;
        // mcp-api has it in clear, and would send what is encrypted as it stands.
        let place = Place { collection: Collection::Sessions.name(), field: "sessionId", ids: &ids };
        let id = self.seal_variable(&place, session.id.expose_secret());
        fields.set("sessionId", id.map_err(|error| VaultError::Seal { what: what(&place), error })?)?;
        fields.set("protocolVersion", &session.protocol_version)?;
        fields.set("createdAt", session.updated_at)?;
        fields.set("updatedAt", session.updated_at)?;
        fields.put(&*self.store, expected).await
    }

    /// Forgets a session; with `expected` only if it still has that revision. Says whether there was one.
    pub async fn delete_session(
        &self,
        user: &UserId,
        server: &ServerName,
        expected: Option<Revision>,
    ) -> Result<bool, VaultError> {
        let key = key(&[server.as_str(), user.as_str()]);
        Ok(self.store.delete_document(Collection::Sessions, &key, expected).await?)
    }

    /// A user's tokens for a server.
    pub async fn oauth_tokens(
        &self,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Option<Versioned<OAuthTokens>>, VaultError> {
        let key = key(&[server.as_str(), user.as_str()]);
        let stored = self.store.document(Collection::OAuthTokens, &key).await?;
        stored.map(|stored| self.open_tokens(stored, user, server)).transpose()
    }

    /// How many users have tokens for a server.
    pub async fn users_with_tokens(&self, server: &ServerName) -> Result<u64, VaultError> {
        // A user has one document for a server.
        let stored = self.store.documents_of(Collection::OAuthTokens, server).await?;
        Ok(stored.len().try_into().unwrap_or(u64::MAX))
    }

    /// Stores tokens, as [`Vault::put_session`] stores sessions.
    pub async fn put_oauth_tokens(
        &self,
        tokens: &OAuthTokens,
        expected: Option<Revision>,
    ) -> Result<Revision, VaultError> {
        let (server, user) = (tokens.server.as_str(), tokens.user.as_str());
        let ids = [server, user, tokens.issuer.as_deref().unwrap_or_default()];
        let seal = |field: &str, value: Option<&SecretString>| {
            value.map(|value| self.seal_field(Collection::OAuthTokens, field, &ids, value)).transpose()
        };
        let mut fields = Fields::new(Collection::OAuthTokens, &key(&[server, user]));
        fields.document.extend(tokens.extra.clone());
        fields.set("serverName", server)?;
        fields.set("username", user)?;
        fields.set("issuer", &tokens.issuer)?;
        fields.set("resource", &tokens.resource)?;
        fields.set("tokenType", &tokens.token_type)?;
        fields.set("accessToken", seal("accessToken", Some(&tokens.access_token))?)?;
        fields.set("refreshToken", seal("refreshToken", tokens.refresh_token.as_ref())?)?;
        fields.set("expiresAt", tokens.expires_at)?;
        fields.set("scopes", &tokens.scopes)?;
        fields.set("clientId", &tokens.client_id)?;
        fields.set("clientSecret", seal("clientSecret", tokens.client_secret.as_ref())?)?;
        fields.set("redirectUri", &tokens.redirect_uri)?;
        fields.set("codeVerifier", seal("codeVerifier", tokens.code_verifier.as_ref())?)?;
        fields.set("refreshing", &tokens.refreshing)?;
        fields.set("refused", &tokens.refused)?;
        fields.stamp()?;
        fields.put(&*self.store, expected).await
    }

    /// Forgets a user's tokens; with `expected` only if they still have that revision.
    pub async fn delete_oauth_tokens(
        &self,
        user: &UserId,
        server: &ServerName,
        expected: Option<Revision>,
    ) -> Result<bool, VaultError> {
        let key = key(&[server.as_str(), user.as_str()]);
        Ok(self.store.delete_document(Collection::OAuthTokens, &key, expected).await?)
    }

    /// What an authorization server knows us by, for one address to come back to.
    pub async fn oauth_client(
        &self,
        issuer: &str,
        redirect_uri: &str,
    ) -> Result<Option<OAuthClient>, VaultError> {
        let ids = [issuer, redirect_uri];
        let Some(stored) = self.store.document(Collection::OAuthClients, &key(&ids)).await? else {
            return Ok(None);
        };
        let stored = stored.value;
        same(&stored, "issuer", issuer)?;
        same(&stored, "redirectUri", redirect_uri)?;
        let secret = text(&stored, "clientSecret");
        let secret =
            secret.map(|sealed| self.open_field(Collection::OAuthClients, "clientSecret", &ids, sealed));
        Ok(Some(OAuthClient {
            issuer: issuer.to_owned(),
            redirect_uri: redirect_uri.to_owned(),
            client_id: required(&stored, "clientId")?.to_owned(),
            client_secret: secret.transpose()?,
        }))
    }

    /// Keeps what an authorization server knows us by, in place of what it knew us by before.
    pub async fn put_oauth_client(&self, client: &OAuthClient) -> Result<(), VaultError> {
        let ids = [client.issuer.as_str(), client.redirect_uri.as_str()];
        let seal = |value| self.seal_field(Collection::OAuthClients, "clientSecret", &ids, value);
        let key = key(&ids);
        let mut fields = Fields::new(Collection::OAuthClients, &key);
        fields.set("issuer", &client.issuer)?;
        fields.set("redirectUri", &client.redirect_uri)?;
        fields.set("clientId", &client.client_id)?;
        fields.set("clientSecret", client.client_secret.as_ref().map(seal).transpose()?)?;
        fields.stamp()?;
        let mut outcome = Ok(());
        for _ in 0..ATTEMPTS {
            let stored = self.store.document(Collection::OAuthClients, &key).await?;
            let expected = stored.map(|stored| stored.revision);
            outcome = fields.put(&*self.store, expected).await.map(|_| ());
            match &outcome {
                Err(VaultError::Store(
                    StoreError::Conflict | StoreError::NotFound | StoreError::AlreadyExists { .. },
                )) => {}
                _ => break,
            }
        }
        outcome
    }

    /// Forgets it: the authorization server does not know it any more.
    pub async fn delete_oauth_client(&self, issuer: &str, redirect_uri: &str) -> Result<bool, VaultError> {
        let key = key(&[issuer, redirect_uri]);
        Ok(self.store.delete_document(Collection::OAuthClients, &key, None).await?)
    }

    /// A login that was begun, however long ago.
    pub async fn login(&self, id: &LoginId) -> Result<Option<Versioned<Login>>, VaultError> {
        let Some(stored) = self.store.document(Collection::OAuthLogins, id.as_str()).await? else {
            return Ok(None);
        };
        let Versioned { revision, value: stored } = stored;
        let user = required(&stored, "username")?;
        let server = required(&stored, "serverName")?;
        let browser = required(&stored, "browser")?;
        let ids = [id.as_str(), server, user, browser];
        let open = |field: &str, sealed: &str| self.open_field(Collection::OAuthLogins, field, &ids, sealed);
        let login = Login {
            id: id.clone(),
            user: UserId::from_stored(user),
            server: ServerName::from_stored(server),
            browser: browser.to_owned(),
            begun_at: moment(&stored, "begunAt").ok_or_else(|| lacks("begunAt"))?,
            code: text(&stored, "code").map(|sealed| open("code", sealed)).transpose()?,
            answered_by: text(&stored, "answeredBy").map(str::to_owned),
            proof: open("proof", required(&stored, "proof")?)?,
        };
        Ok(Some(Versioned { revision, value: login }))
    }

    /// Stores a login, as [`Vault::put_session`] stores sessions.
    pub async fn put_login(&self, login: &Login, expected: Option<Revision>) -> Result<Revision, VaultError> {
        let id = login.id.as_str();
        // Whoever can write to the database must not finish one user's login as another user's.
        let ids = [id, login.server.as_str(), login.user.as_str(), &login.browser];
        let seal =
            |field: &str, value: &SecretString| self.seal_field(Collection::OAuthLogins, field, &ids, value);
        let mut fields = Fields::new(Collection::OAuthLogins, id);
        fields.set("serverName", login.server.as_str())?;
        fields.set("username", login.user.as_str())?;
        fields.set("browser", &login.browser)?;
        fields.set("begunAt", login.begun_at)?;
        fields.set("code", login.code.as_ref().map(|code| seal("code", code)).transpose()?)?;
        fields.set("answeredBy", &login.answered_by)?;
        fields.set("proof", seal("proof", &login.proof)?)?;
        fields.put(&*self.store, expected).await
    }

    /// Uses a login up: of several who do so with the revision that they saw, one succeeds.
    pub async fn delete_login(&self, id: &LoginId, expected: Option<Revision>) -> Result<bool, VaultError> {
        Ok(self.store.delete_document(Collection::OAuthLogins, id.as_str(), expected).await?)
    }

    /// Removes logins that nobody finished in time. Says how many.
    pub async fn sweep_logins(&self) -> Result<u64, VaultError> {
        let now = Timestamp::now().millis();
        let time = i64::try_from(LOGIN_TIME.as_millis()).unwrap_or(i64::MAX);
        let mut removed = 0;
        for stored in self.store.documents(Collection::OAuthLogins, false).await? {
            // One that was begun long after now was begun by nobody.
            let begun = moment(&stored.value, "begunAt").map(Timestamp::millis);
            if begun.is_some_and(|begun| begun.abs_diff(now) <= time.unsigned_abs()) {
                continue;
            }
            let key = Collection::OAuthLogins.key_in(&stored.value)?;
            match self.store.delete_document(Collection::OAuthLogins, key, Some(stored.revision)).await {
                Ok(was_there) => removed += u64::from(was_there),
                // Somebody works on it, and finds out by himself that it is too late.
                Err(StoreError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(removed)
    }

    fn open_session(
        &self,
        stored: Versioned<Document>,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Versioned<Session>, VaultError> {
        let Versioned { revision, value: stored } = stored;
        let ids = [server.as_str(), user.as_str()];
        is_of(&stored, &ids)?;
        let id = required(&stored, "sessionId")?;
        // As variables of servers: a clear one is accepted for as long as mcp-api's values are. It lets
        // nobody in who could not write to the database.
        let clear = self.mode() != LegacyMode::Off && !is_sealed(id) && !is_legacy(id);
        let id =
            if clear { id.into() } else { self.open_field(Collection::Sessions, "sessionId", &ids, id)? };
        let session = Session {
            user: user.clone(),
            server: server.clone(),
            url: text(&stored, "url").unwrap_or_default().to_owned(),
            id,
            protocol_version: text(&stored, "protocolVersion").map(str::to_owned),
            updated_at: moment(&stored, "updatedAt").unwrap_or(Timestamp::from_millis(0)),
        };
        Ok(Versioned { revision, value: session })
    }

    fn open_tokens(
        &self,
        stored: Versioned<Document>,
        user: &UserId,
        server: &ServerName,
    ) -> Result<Versioned<OAuthTokens>, VaultError> {
        let Versioned { revision, value: mut stored } = stored;
        is_of(&stored, &[server.as_str(), user.as_str()])?;
        let issuer = text(&stored, "issuer").map(str::to_owned);
        let ids = [server.as_str(), user.as_str(), issuer.as_deref().unwrap_or_default()];
        let open = |field: &str| {
            let sealed = text(&stored, field);
            sealed.map(|sealed| self.open_field(Collection::OAuthTokens, field, &ids, sealed)).transpose()
        };
        let own = |field: &str| text(&stored, field).map(str::to_owned);
        let mut tokens = OAuthTokens {
            user: user.clone(),
            server: server.clone(),
            issuer: issuer.clone(),
            resource: own("resource"),
            token_type: own("tokenType").unwrap_or_else(|| "Bearer".to_owned()),
            access_token: open("accessToken")?.ok_or_else(|| lacks("accessToken"))?,
            refresh_token: open("refreshToken")?,
            expires_at: moment(&stored, "expiresAt"),
            scopes: words(stored.get("scopes")),
            client_id: own("clientId"),
            client_secret: open("clientSecret")?,
            redirect_uri: own("redirectUri"),
            code_verifier: open("codeVerifier")?,
            refreshing: own("refreshing").map(WorkerId::from_stored),
            refused: own("refused"),
            extra: Map::new(),
        };
        stored.retain(|field, value| !TOKEN_FIELDS.contains(&field.as_str()) && !value.is_null());
        tokens.extra = stored;
        Ok(Versioned { revision, value: tokens })
    }

    fn seal_field(
        &self,
        collection: Collection,
        field: &str,
        ids: &[&str],
        value: &SecretString,
    ) -> Result<String, VaultError> {
        let place = Place { collection: collection.name(), field, ids };
        self.seal(&place, value).map_err(|error| VaultError::Seal { what: what(&place), error })
    }

    fn open_field(
        &self,
        collection: Collection,
        field: &str,
        ids: &[&str],
        sealed: &str,
    ) -> Result<SecretString, VaultError> {
        let place = Place { collection: collection.name(), field, ids };
        let failed = |error: CryptoError| VaultError::Integrity { what: what(&place), error };
        self.unseal(&place, sealed).map_err(failed)
    }
}

/// The fields of tokens that have a meaning here; all others are kept as they are.
const TOKEN_FIELDS: &[&str] = &[
    "_id",
    "key",
    "serverName",
    "username",
    "issuer",
    "resource",
    "tokenType",
    "accessToken",
    "refreshToken",
    "expiresAt",
    "scopes",
    "clientId",
    "clientSecret",
    "redirectUri",
    "codeVerifier",
    "refreshing",
    "refused",
    "updatedAt",
];

/// The fields of sessions and clients that have a meaning here.
const CARRIED_FIELDS: &[&str] = &[
    "_id",
    "key",
    "serverName",
    "username",
    "url",
    "sessionId",
    "protocolVersion",
    "issuer",
    "redirectUri",
    "clientId",
    "clientSecret",
    "updatedAt",
];

/// A document that is to be written.
struct Fields {
    collection: Collection,
    document: Document,
}

impl Fields {
    fn new(collection: Collection, key: &str) -> Self {
        let document = Document::from_iter([(collection.key().to_owned(), key.into())]);
        Self { collection, document }
    }

    /// Sets a field, or removes it where there is nothing to say: mcp-api takes a missing one for `null`.
    fn set(&mut self, field: &str, value: impl Serialize) -> Result<(), VaultError> {
        match serde_json::to_value(value) {
            Ok(Value::Null) => drop(self.document.remove(field)),
            Ok(value) => drop(self.document.insert(field.to_owned(), value)),
            Err(error) => return Err(corrupt(field, &error)),
        }
        Ok(())
    }

    /// Says when it was written, and when first.
    fn stamp(&mut self) -> Result<(), VaultError> {
        let now = Timestamp::now();
        self.set("updatedAt", now)?;
        if !self.document.contains_key("createdAt") {
            self.set("createdAt", now)?;
        }
        Ok(())
    }

    async fn put(&self, store: &dyn Store, expected: Option<Revision>) -> Result<Revision, VaultError> {
        let Some(expected) = expected else {
            return Ok(store.insert_document(self.collection, &self.document).await?);
        };
        let mut document = self.document.clone();
        // What mcp-api wrote beside it stays, and when it was first written. Tokens bring theirs along.
        if let Collection::Sessions | Collection::OAuthClients = self.collection {
            let key = self.collection.key_in(&document)?;
            let old = store.document(self.collection, key).await?.map(|stored| stored.value);
            let kept = |field: &str| field == "createdAt" || !CARRIED_FIELDS.contains(&field);
            let old = old.into_iter().flatten();
            document.extend(old.filter(|(field, value)| kept(field) && !value.is_null()));
        }
        Ok(store.replace_document(self.collection, &document, expected).await?)
    }
}

/// The key of what several parts tell from all others.
pub(super) fn key(parts: &[&str]) -> String {
    Collection::key_of(parts)
}

/// A field's text; `None` also where it is empty.
pub(super) fn text<'a>(document: &'a Document, field: &str) -> Option<&'a str> {
    document.get(field)?.as_str().filter(|text| !text.is_empty())
}

fn required<'a>(document: &'a Document, field: &str) -> Result<&'a str, VaultError> {
    text(document, field).ok_or_else(|| lacks(field))
}

/// A field's moment: a text, or a number of milliseconds, or of seconds if it is so small.
fn moment(document: &Document, field: &str) -> Option<Timestamp> {
    match document.get(field)? {
        value @ Value::String(_) => serde_json::from_value(value.clone()).ok(),
        Value::Number(number) => {
            let number = number.as_f64()?;
            // As milliseconds, it would be in the first months of 1973 at the latest.
            let millis = if number.abs() < 1e11 { number * 1_000.0 } else { number };
            (millis.abs() <= LAST_MILLIS).then(|| Timestamp::from_millis(millis as i64))
        }
        _ => None,
    }
}

/// A list of words: an array, or a text with spaces between them.
fn words(value: Option<&Value>) -> Vec<String> {
    let split = |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    match value {
        Some(Value::String(text)) => split(text),
        Some(Value::Array(items)) => items.iter().filter_map(Value::as_str).flat_map(split).collect(),
        _ => Vec::new(),
    }
}

/// Whoever can write to the database must not give one user's document to another one.
fn is_of(document: &Document, [server, user]: &[&str; 2]) -> Result<(), VaultError> {
    same(document, "serverName", server)?;
    same(document, "username", user)
}

fn same(document: &Document, field: &str, expected: &str) -> Result<(), VaultError> {
    if text(document, field) == Some(expected) {
        return Ok(());
    }
    count_integrity_failure(CryptoErrorKind::Misplaced);
    let what = format!("a user's document whose {field} is not that of its key");
    Err(VaultError::Integrity { what, error: CryptoErrorKind::Misplaced.into() })
}

fn lacks(field: &str) -> VaultError {
    corrupt("a user's document", &format!("it lacks {field}"))
}

/// Names a value in logs, without showing it.
pub(super) fn what(place: &Place<'_>) -> String {
    let ids: Vec<_> = place.ids.iter().map(|id| shorten(id, 64)).collect();
    format!("{} of {} {}", place.field, place.collection, ids.join(", "))
}
