//! Every encrypted text of the store, wherever it stands: what is counted when keys are looked at, and encrypted
//! anew when they change.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;
use serde_json::Value;

use super::{
    Vault, VaultError,
    idempotency::{self, NAME},
    packages::write,
    remote::{key, text},
    secret_place,
};
use crate::{
    crypter::{CryptoErrorKind, Place, is_legacy, is_sealed, kid_of},
    ids::{IdempotencyKey, UserId},
    package::Job,
    server::{ServerRecord, Transport, Variables},
    store::{Collection, Document, ORIGIN, SealedServer, SecretRow, Store, StoreError, Versioned},
};

/// Secrets on one page.
const SECRETS: usize = 256;
/// Documents on one page. Those of calls may have a megabyte each.
const DOCUMENTS: usize = 8;

/// How a text may stand where it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Encrypted.
    Sealed,
    /// Encrypted, or in clear in an old database.
    MayBeClear,
    /// Encrypted for a place that is not known any more. It goes by itself.
    Expiring,
}

/// Looks at a text; what it gives is to stand there instead.
pub(super) type Visit<'a> = dyn FnMut(&Place<'_>, &str, Kind) -> Option<String> + Send + 'a;

/// A document with encrypted texts in it.
pub(super) enum Item {
    /// A user's secret.
    Secret(SecretRow),
    /// A server.
    Server(Box<Versioned<SealedServer>>),
    /// Any other.
    Document(Collection, Versioned<Document>),
    /// A document that cannot be read.
    Unreadable(Collection, String),
}

/// What came of writing an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    /// It stands there.
    Yes,
    /// Somebody changed or deleted it meanwhile, and that stands.
    Overtaken,
}

impl Item {
    /// Names it in reports, without showing anything of it.
    pub(super) fn name(&self) -> String {
        let shorten = |text: &str| crate::error::shorten(text, 128);
        match self {
            Item::Secret(row) => format!("secret {} of user {}", shorten(&row.key), shorten(&row.username)),
            Item::Server(server) => format!("server {}", shorten(server.value.0.name.as_str())),
            Item::Document(collection, document) => {
                let key = document.value.get(collection.key()).and_then(Value::as_str).unwrap_or_default();
                format!("{} {}", collection.name(), shorten(key))
            }
            Item::Unreadable(collection, key) => format!("{} {}", collection.name(), shorten(key)),
        }
    }

    /// Shows every text to `visit`, and puts what it gives in their places. The error says why the texts of the
    /// document were not shown.
    pub(super) fn visit(&mut self, visit: &mut Visit<'_>) -> Result<(), CryptoErrorKind> {
        match self {
            Item::Secret(SecretRow { username, key, value }) => {
                if let Some(new) = visit(&secret_place(&[username, key]), value, Kind::Sealed) {
                    *value = new;
                }
                Ok(())
            }
            Item::Server(server) => {
                visit_server(&mut server.value.0, visit);
                Ok(())
            }
            Item::Document(collection, document) => visit_document(*collection, &mut document.value, visit),
            Item::Unreadable(..) => Err(CryptoErrorKind::Format),
        }
    }

    /// Writes the item in the place of `old`, unless that is not what stands there any more.
    pub(super) async fn write(&self, old: &Item, store: &dyn Store) -> Result<Written, StoreError> {
        let outcome = match (self, old) {
            (Item::Secret(row), Item::Secret(old)) => match store.reseal_secret(old, &row.value).await? {
                true => Ok(()),
                false => Err(StoreError::Conflict),
            },
            (Item::Server(server), _) => store.reseal_server(&server.value, server.revision).await,
            (Item::Document(collection, document), _) => {
                store.reseal_document(*collection, &document.value, document.revision).await
            }
            _ => Ok(()),
        };
        match outcome {
            Ok(()) => Ok(Written::Yes),
            Err(StoreError::Conflict | StoreError::NotFound) => Ok(Written::Overtaken),
            Err(error) => Err(error),
        }
    }
}

impl Clone for Item {
    fn clone(&self) -> Self {
        match self {
            Item::Secret(row) => Item::Secret(row.clone()),
            Item::Server(server) => Item::Server(server.clone()),
            Item::Document(collection, document) => Item::Document(*collection, document.clone()),
            Item::Unreadable(collection, key) => Item::Unreadable(*collection, key.clone()),
        }
    }
}

/// The fields with encrypted texts, and those whose values bind them to their document. (What else a collection
/// has is a matter of its own.)
fn fields(collection: Collection) -> (&'static [&'static str], &'static [&'static str]) {
    match collection {
        Collection::Sessions => (&["sessionId"], &["serverName", "username"]),
        Collection::OAuthTokens => (
            &["accessToken", "refreshToken", "clientSecret", "codeVerifier"],
            &["serverName", "username", "issuer"],
        ),
        // The second one only mcp-api has, and nobody here opens it.
        Collection::OAuthClients => {
            (&["clientSecret", "registrationAccessToken"], &["issuer", "redirectUri"])
        }
        Collection::OAuthLogins => (&["code", "proof"], &["key", "serverName", "username", "browser"]),
        Collection::ApiKeys => (&["record"], &["key"]),
        Collection::Jobs
        | Collection::NamedCalls
        | Collection::Packages
        | Collection::PackageLocks
        | Collection::ToolPins => (&[], &[]),
    }
}

/// The collections whose documents have encrypted texts.
const COLLECTIONS: [Collection; 7] = [
    Collection::Jobs,
    Collection::Sessions,
    Collection::OAuthTokens,
    Collection::OAuthClients,
    Collection::OAuthLogins,
    Collection::NamedCalls,
    Collection::ApiKeys,
];

/// The texts of a server. See [`super::each_variable`] for their places.
fn visit_server(record: &mut ServerRecord, visit: &mut Visit<'_>) {
    let name = record.name.clone();
    let (field, variables) = match &mut record.transport {
        Transport::Stdio { env, .. } => ("env", Some(env)),
        Transport::StreamableHttp { headers, .. } => ("headers", headers.as_mut()),
    };
    for (variable, value) in variables.into_iter().flat_map(|Variables(map)| map.iter_mut()) {
        let ids = [name.as_str(), variable.as_str()];
        let place = Place { collection: "servers", field, ids: &ids };
        if let Some(new) = visit(&place, value, Kind::MayBeClear) {
            *value = new;
        }
    }
    if let Some(secret) = record.oauth_client.as_mut().and_then(|client| client.client_secret.as_mut()) {
        let ids = [name.as_str(), "clientSecret"];
        let place = Place { collection: "servers", field: "oauthClient", ids: &ids };
        if let Some(new) = visit(&place, secret, Kind::Sealed) {
            *secret = new;
        }
    }
}

fn visit_document(
    collection: Collection,
    document: &mut Document,
    visit: &mut Visit<'_>,
) -> Result<(), CryptoErrorKind> {
    match collection {
        Collection::Jobs => visit_job(document, visit),
        Collection::NamedCalls => visit_call(document, visit),
        _ => visit_fields(collection, document, visit),
    }
}

fn visit_fields(
    collection: Collection,
    document: &mut Document,
    visit: &mut Visit<'_>,
) -> Result<(), CryptoErrorKind> {
    let (fields, names) = fields(collection);
    let mut ids = Vec::with_capacity(names.len());
    for name in names {
        match text(document, name) {
            Some(id) => ids.push(id.to_owned()),
            None if *name == "issuer" && collection == Collection::OAuthTokens => ids.push(String::new()),
            None => return Err(CryptoErrorKind::Format),
        }
    }
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    // What was moved under the key of another document is not made at home there.
    if !matches!(collection, Collection::OAuthLogins | Collection::ApiKeys)
        && !is_at_home(collection, document, &ids)
    {
        return Err(CryptoErrorKind::Misplaced);
    }
    // What mcp-api's key made would let somebody in who knows only that one.
    if collection == Collection::ApiKeys && !text(document, "record").is_some_and(is_sealed) {
        return Err(CryptoErrorKind::Format);
    }
    let kind = if collection == Collection::Sessions { Kind::MayBeClear } else { Kind::Sealed };
    for field in fields {
        let place = Place { collection: collection.name(), field, ids: &ids };
        let new = text(document, field).and_then(|text| visit(&place, text, kind));
        if let Some(new) = new {
            document.insert((*field).to_owned(), new.into());
        }
    }
    Ok(())
}

/// Whether a document has the key that its fields give it.
fn is_at_home(collection: Collection, document: &Document, ids: &[&str]) -> bool {
    let Some(parts) = ids.get(..2) else { return false };
    let own = text(document, collection.key());
    // Of registrations that only mcp-api tells apart all but one have a key of three parts.
    let further = text(document, ORIGIN).filter(|_| collection == Collection::OAuthClients);
    let aside = further.map(|further| key(&[parts, &[further]].concat()));
    own == Some(key(parts).as_str()) || own.is_some() && own == aside.as_deref()
}

/// What a job is to register.
fn visit_job(document: &mut Document, visit: &mut Visit<'_>) -> Result<(), CryptoErrorKind> {
    let job = serde_json::from_value::<Job>(Value::Object(document.clone()));
    let mut job = job.map_err(|_| CryptoErrorKind::Format)?;
    let Some(server) = &mut job.server else { return Ok(()) };
    let mut changed = false;
    visit_server(server, &mut |place, text, kind| {
        let new = visit(place, text, kind);
        changed |= new.is_some();
        new
    });
    if changed {
        *document = write(&job).map_err(|_| CryptoErrorKind::Internal)?;
    }
    Ok(())
}

/// The result of a named call, in parts.
fn visit_call(document: &mut Document, visit: &mut Visit<'_>) -> Result<(), CryptoErrorKind> {
    let user = text(document, "username").ok_or(CryptoErrorKind::Format)?.to_owned();
    let name = text(document, NAME).map(str::to_owned);
    if let Some(name) = &name {
        let (user, name) = (UserId::from_stored(user.as_str()), IdempotencyKey::from_stored(name.as_str()));
        if text(document, Collection::NamedCalls.key()) != Some(&idempotency::key_of(&user, &name)) {
            return Err(CryptoErrorKind::Misplaced);
        }
    }
    let kind = if name.is_some() { Kind::Sealed } else { Kind::Expiring };
    let name = name.unwrap_or_default();
    let Some(parts) = document.get_mut("parts").and_then(Value::as_array_mut) else { return Ok(()) };
    let count = parts.len();
    for (number, part) in parts.iter_mut().enumerate() {
        let number = idempotency::part_number(number, number + 1 == count);
        let ids = [user.as_str(), name.as_str(), number.as_str()];
        let new = part.as_str().and_then(|text| visit(&idempotency::place(&ids), text, kind));
        if let Some(new) = new {
            *part = new.into();
        }
    }
    Ok(())
}

/// Goes through all documents with encrypted texts, page by page.
pub(super) struct Walk<'a> {
    store: &'a dyn Store,
    page: VecDeque<Item>,
    next: Page,
}

/// The page that is read next.
enum Page {
    Servers,
    Secrets { after: Option<(String, String)> },
    Documents { collection: usize, after: Option<String> },
}

impl<'a> Walk<'a> {
    pub(super) fn new(store: &'a dyn Store) -> Self {
        Self { store, page: VecDeque::new(), next: Page::Servers }
    }

    /// The next document; `None` after the last.
    pub(super) async fn next(&mut self) -> Result<Option<Item>, StoreError> {
        loop {
            if let Some(item) = self.page.pop_front() {
                return Ok(Some(item));
            }
            if !self.turn().await? {
                return Ok(None);
            }
        }
    }

    /// Reads a page, which may be empty; says whether there was one.
    async fn turn(&mut self) -> Result<bool, StoreError> {
        self.next = match &self.next {
            Page::Servers => {
                let servers = self.store.servers().await?.into_iter();
                self.page.extend(servers.map(|server| Item::Server(Box::new(server))));
                Page::Secrets { after: None }
            }
            Page::Secrets { after } => {
                let after = after.as_ref().map(|(user, key)| (user.as_str(), key.as_str()));
                let rows = self.store.secrets_after(after, SECRETS).await?;
                let last = rows.last().map(|row| (row.username.clone(), row.key.clone()));
                self.page.extend(rows.into_iter().map(Item::Secret));
                match last {
                    Some(last) => Page::Secrets { after: Some(last) },
                    None => Page::Documents { collection: 0, after: None },
                }
            }
            Page::Documents { collection: at, after } => {
                let Some(collection) = COLLECTIONS.get(*at).copied() else { return Ok(false) };
                let found = self.store.documents_after(collection, after.as_deref(), DOCUMENTS).await?;
                let last = found.last().map(|(key, _)| key.clone());
                self.page.extend(found.into_iter().map(|(key, document)| match document {
                    Some(document) => Item::Document(collection, document),
                    None => Item::Unreadable(collection, key),
                }));
                match last {
                    Some(last) => Page::Documents { collection: *at, after: Some(last) },
                    None => Page::Documents { collection: at + 1, after: None },
                }
            }
        };
        Ok(true)
    }
}

/// How many texts of the store are encrypted, and with which keys. Nothing is decrypted to find out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Census {
    /// Encrypted texts by the ids of their keys.
    pub by_key: BTreeMap<String, u64>,
    /// Texts in mcp-api's format.
    pub legacy: u64,
    /// Texts in clear, where an old database may have them.
    pub clear: u64,
    /// Texts and documents that are none of these.
    pub broken: u64,
}

impl Census {
    /// Texts that need a key.
    pub fn of(&self, kid: &str) -> u64 {
        self.by_key.get(kid).copied().unwrap_or_default()
    }

    fn count(&mut self, text: &str, kind: Kind) {
        match kid_of(text) {
            Some(kid) => *self.by_key.entry(kid.to_owned()).or_default() += 1,
            None if is_legacy(text) => self.legacy += 1,
            None if kind == Kind::MayBeClear && !is_sealed(text) => self.clear += 1,
            None => self.broken += 1,
        }
    }
}

impl Vault {
    /// Counts the texts that are encrypted with each key. It reads all of them.
    pub async fn census(&self) -> Result<Census, VaultError> {
        let mut census = Census::default();
        let mut walk = Walk::new(&*self.store);
        while let Some(mut item) = walk.next().await? {
            let seen = item.visit(&mut |_, text, kind| {
                census.count(text, kind);
                None
            });
            census.broken += u64::from(seen.is_err());
            if let Item::Server(server) = &item {
                census.clear += leftovers(&server.value.0);
            }
        }
        Ok(census)
    }
}

/// Variables in clear that a record has kept from a time when its transport was another one. Nothing reads them,
/// and [`Vault::replace_server`] drops them.
fn leftovers(record: &ServerRecord) -> u64 {
    let count = |field: &str| record.extra.get(field).and_then(Value::as_object).map_or(0, |map| map.len());
    u64::try_from(LEFTOVERS.iter().map(|field| count(field)).sum::<usize>()).unwrap_or(u64::MAX)
}

/// Removes them; says whether there were any.
pub(super) fn drop_leftovers(item: &mut Item) -> bool {
    let Item::Server(server) = item else { return false };
    let mut dropped = false;
    for field in LEFTOVERS {
        dropped |= server.value.0.extra.remove(field).is_some();
    }
    dropped
}

/// The fields of a record that its transport may not have.
pub(super) const LEFTOVERS: [&str; 2] = ["env", "headers"];
