//! What a database of mcp-api has in it: what is kept, what a first start changes in it, and what needs somebody.
//! Everything is read as it stands, and nothing is changed.

use std::collections::{BTreeMap, HashMap, HashSet};

use mongodb::{
    Cursor,
    bson::{Bson, Document, RawDocumentBuf, doc},
};
use serde::Serialize;

use super::{
    Database, MongoStore, adoption,
    documents::{REVISION, StoredServer},
    failure::{Failure, unavailable},
    secrets::{ANCIENT, Row},
    servers::INSTALLS,
};
use crate::{
    crypter::{is_legacy, is_sealed},
    error::shorten,
    google,
    ids::ServerName,
    launch::LaunchRules,
    limits,
    package::{Runtime, names},
    server::{ServerRecord, Transport},
    store::{Collection, StoreError},
};

/// Names that are listed of each kind. There may be thousands, and the count says how many.
const NAMED: usize = 20;
/// Fields of servers that say how one was doing when it was last written.
const PASSING: [&str; 3] = ["status", "logs", "toolsList"];
/// Fields of servers that are used although no record of ours has them.
const ADOPTED: [&str; 1] = ["oauthTemplate"];
/// Locks of mcp-api, which end by themselves.
const LOCKS: &str = "mcpDcrProvisioningLocks";

/// What is to be made of something that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It works on, as it is.
    Kept,
    /// The first start changes something for it.
    Changed,
    /// Workers do something for it once they run.
    Later,
    /// It is kept, and does not work as before or needs somebody.
    Attention,
}

/// Something that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// What is to be made of it.
    pub fate: Fate,
    /// How many there are.
    pub count: u64,
    /// What they are, and what is made of them.
    pub text: &'static str,
    /// What somebody can do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<&'static str>,
    /// Which ones, as far as there is room.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
}

/// Says why a text in mcp-api's format cannot be opened, if it cannot.
pub type Opens<'a> = dyn Fn(&str) -> Option<&'static str> + Send + Sync + 'a;

/// Notes by what they say, in the order in which they came up.
#[derive(Default)]
struct Notes(Vec<Note>);

impl Notes {
    fn count(&mut self, fate: Fate, text: &'static str, count: usize) {
        if count > 0 {
            let count = u64::try_from(count).unwrap_or(u64::MAX);
            self.0.push(Note { fate, count, text, remedy: None, names: Vec::new() });
        }
    }

    fn name(&mut self, fate: Fate, text: &'static str, remedy: Option<&'static str>, name: impl AsRef<str>) {
        let at = self.0.iter().position(|note| note.text == text).unwrap_or_else(|| {
            self.0.push(Note { fate, count: 0, text, remedy, names: Vec::new() });
            self.0.len() - 1
        });
        let note = &mut self.0[at];
        note.count += 1;
        if note.names.len() < NAMED {
            note.names.push(shorten(name.as_ref(), 160));
        }
    }

    fn changed(&mut self, text: &'static str, name: impl AsRef<str>) {
        self.name(Fate::Changed, text, None, name);
    }

    fn attention(&mut self, text: &'static str, remedy: &'static str, name: impl AsRef<str>) {
        self.name(Fate::Attention, text, Some(remedy), name);
    }
}

const UNDECRYPTABLE: &str = "values that this SECRETS_KEY does not decrypt; they are left as they are";
const SET_AGAIN: &str = "use the SECRETS_KEY that mcp-api had (it is `secret` if none was ever set); else these are to be set again";
const TWICE: &str = "rows that were stored twice: the newest stays, the others are removed";
const CLEAR: &str = "values in clear (variables and headers of servers), which mcp-api could not read otherwise: \
                     they are encrypted by `mcp-gateway keys rewrap` when the legacy mode is ended";

impl MongoStore {
    /// Looks through the whole database. `rules` say what may be started today.
    pub async fn survey(&self, rules: &LaunchRules, opens: &Opens<'_>) -> Result<Vec<Note>, StoreError> {
        let survey = self.database.survey(rules, opens);
        // It reads everything, which takes longer than an operation.
        let notes = tokio::time::timeout(limits::STORE_SCHEMA_TIMEOUT, survey).await;
        let mut notes = notes.map_err(|_| unavailable("the database was not read in time"))??;
        notes.sort_by_key(|note| note.fate);
        Ok(notes)
    }
}

impl Database {
    async fn survey(&self, rules: &LaunchRules, opens: &Opens<'_>) -> Result<Vec<Note>, Failure> {
        let mut notes = Notes::default();
        let servers = self.survey_servers(&mut notes, rules).await?;
        self.survey_packages(&mut notes, &servers).await?;
        self.survey_secrets(&mut notes, &servers, opens).await?;
        for collection in [Collection::OAuthTokens, Collection::Sessions, Collection::OAuthClients] {
            self.survey_rows(&mut notes, collection, opens).await?;
        }
        self.survey_rest(&mut notes).await?;
        Ok(notes.0)
    }

    async fn rows(&self, collection: &str) -> Result<Cursor<RawDocumentBuf>, Failure> {
        let rows = self.database.collection::<RawDocumentBuf>(collection);
        Ok(rows.find(doc! {}).sort(doc! { "_id": 1 }).await?)
    }

    async fn survey_servers(
        &self,
        notes: &mut Notes,
        rules: &LaunchRules,
    ) -> Result<Vec<ServerRecord>, Failure> {
        let (mut servers, mut cases): (Vec<ServerRecord>, HashMap<String, String>) = Default::default();
        let (mut clear, mut foreign) = (0, 0);
        let mut rows = self.rows("mcp").await?;
        while rows.advance().await? {
            let raw = rows.current().to_owned();
            let stored = StoredServer::read(&raw).and_then(|stored| match stored.record() {
                Ok(record) => Ok(record.0),
                Err(error) => {
                    Err(format!("{}: {error}", raw.get_str("name").unwrap_or("a server without a name")))
                }
            });
            let record = match stored {
                Ok(record) => record,
                Err(what) => {
                    let text = "records of servers that cannot be read; they do not run";
                    notes.attention(text, "correct or delete the document", what);
                    continue;
                }
            };
            let name = record.name.as_str();
            foreign += usize::from(raw.get(REVISION).ok().flatten().is_none());
            if servers.iter().any(|other| other.name == record.name) {
                let text = "servers whose name another one has; the older one counts, and these do not run";
                notes.attention(text, "rename or delete the document", format!("{name} ({})", record.id));
                continue;
            }
            if let Some(other) = cases.insert(record.name.case_key(), name.to_owned()) {
                let text = "servers whose names differ in case only; all of them work";
                notes.attention(text, "new ones like that are refused", format!("{other}, {name}"));
            }
            if ServerName::parse_existing(name).is_err() {
                let text = "servers whose names are no names here; they run, and no request can name them";
                notes.attention(text, "rename the document, and its secrets with it", name);
            } else if ServerName::parse_new(name).is_err() {
                let text = "servers with names that new ones cannot have; they work";
                notes.name(Fate::Kept, text, None, name);
            }
            if let Err(refused) = rules.check(&record, None) {
                let text =
                    "servers that could not be registered today; they work until their command is changed";
                let remedy = "COMMANDS_ALLOW and ENV_ALLOW permit more";
                notes.attention(text, remedy, format!("{name}: {}", refused.message));
            }
            if record.is_remote() && record.source == "external" && !record.secret_fields.is_empty() {
                let text = "servers of users whose secrets mcp-api puts into the query of the URL; here they become \
                            arguments of calls";
                notes.attention(text, "register them with headers or OAuth, or with the whole URL", name);
            }
            clear += clear_values(&record);
            servers.push(record);
        }
        notes.count(Fate::Kept, "servers", servers.len());
        let text = "servers that mcp-api wrote: each runs once in the fleet (scaling: singleton) until its record \
                    says otherwise";
        notes.count(Fate::Kept, text, foreign);
        notes.count(Fate::Kept, CLEAR, clear);
        let unknown: HashSet<&String> = servers.iter().flat_map(|server| server.extra.keys()).collect();
        let known = [&PASSING[..], &ADOPTED[..]].concat();
        let mut unknown: Vec<_> =
            unknown.into_iter().filter(|field| !known.contains(&field.as_str())).collect();
        unknown.sort();
        for field in unknown {
            let text = "fields of servers that this version does not use; they are kept";
            notes.name(Fate::Kept, text, None, field);
        }
        Ok(servers)
    }

    async fn survey_packages(&self, notes: &mut Notes, servers: &[ServerRecord]) -> Result<(), Failure> {
        let mut seen: HashSet<String> = HashSet::new();
        let mut count = 0;
        let mut rows = self.rows(Collection::Packages.name()).await?;
        while rows.advance().await? {
            let row = rows.current();
            let text = |field: &str| row.get_str(field).unwrap_or_default().to_owned();
            let (name, version, server) = (text("name"), text("version"), text("mcpServerId"));
            let label = format!("{name}@{version} of {server}");
            count += 1;
            if server.is_empty() {
                let text = "packages that no server runs, since their installation failed; they are left out";
                notes.attention(text, "install them again if they are wanted", format!("{name}@{version}"));
                continue;
            }
            if !seen.insert(server.clone()) {
                notes.changed(TWICE, format!("package {label}"));
                continue;
            }
            if row.get_str("generation").is_ok() {
                continue;
            }
            let python = row.get_str("runtime").is_ok_and(|runtime| runtime == "python");
            let runtime = if python { Runtime::Python } else { Runtime::Node };
            let latest = version == "latest" || version.is_empty();
            let valid = match runtime {
                Runtime::Node => names::npm_name(&name) && (latest || names::npm_version(&version)),
                Runtime::Python => names::python_name(&name) && (latest || names::python_version(&version)),
            };
            if !servers.iter().any(|one| one.name.as_str() == server) {
                let text = "packages whose server is gone; they are left as they are";
                notes.attention(text, "delete them: DELETE /packages/:name", label);
            } else if valid {
                let text = "packages that workers install anew, in the version that their records have";
                notes.name(Fate::Later, text, None, label);
            } else {
                let text = "packages whose name or version is none here; they are not installed, and their servers \
                            run only where their files are";
                notes.attention(text, "install them again with a version that there is", label);
            }
        }
        notes.count(Fate::Kept, "packages", count);
        // mcp-api keeps packages by their names, so that of two servers of one package only one has a record.
        let bare =
            servers.iter().filter(|server| server.package.is_none() && !seen.contains(server.name.as_str()));
        for server in bare.filter(|server| runs_a_package(server)) {
            let text = "servers that run files of a package without having its record; they run only where those \
                        files are";
            let remedy = "delete the server and install the package under its name: POST /packages/install";
            notes.attention(text, remedy, server.name.as_str());
        }
        Ok(())
    }

    async fn survey_secrets(
        &self,
        notes: &mut Notes,
        servers: &[ServerRecord],
        opens: &Opens<'_>,
    ) -> Result<(), Failure> {
        let registered: HashSet<&str> = servers.iter().map(|server| server.name.as_str()).collect();
        let (mut users, mut count, mut legacy) = (HashSet::new(), 0, 0);
        let mut seen: BTreeMap<(String, String), u64> = BTreeMap::new();
        let mut rows = self.rows(self.secrets.name()).await?;
        while rows.advance().await? {
            let raw = rows.current().to_owned();
            if raw.get(ANCIENT).ok().flatten().is_some() {
                let text = "secrets of the first version of mcp-api, which its later ones do not read either";
                notes.attention(text, "set them again", raw.get_str("key").unwrap_or_default());
                continue;
            }
            let Some(row) = Row::read(&raw) else {
                let text = "rows of secrets without a user or a key; they are left alone";
                notes.attention(
                    text,
                    "delete them",
                    raw.get("_id").ok().flatten().map_or(String::new(), |id| format!("{id:?}")),
                );
                continue;
            };
            count += 1;
            let label = format!("secret {} of {}", row.key, row.username);
            *seen.entry((row.username.clone(), row.key.clone())).or_default() += 1;
            let fits: Vec<&str> = row
                .key
                .match_indices('.')
                .map(|(at, _)| &row.key[..at])
                .filter(|name| registered.contains(name))
                .collect();
            match (&row.owner, fits.as_slice()) {
                (Some(_), _) | (None, [_]) => {}
                (None, []) if row.key == google::TOKENS_OF_MCP_API => {
                    let text = "users' tokens for Google; servers with MCP_AUTH_TYPE=OAUTH2_GOOGLE get them until the \
                                user logs in again";
                    notes.name(Fate::Kept, text, None, &row.username);
                }
                (None, []) => {
                    let text = "secrets of no registered server; they are kept, and no call gets them";
                    notes.attention(text, "set them for the server that needs them", &label);
                }
                (None, [.., longest]) => {
                    let text = "secrets whose key fits several servers; they belong to the one with the longest name";
                    notes.attention(
                        text,
                        "set them again for the other one if it is meant",
                        format!("{label}: {longest}"),
                    );
                }
            }
            let value = row.value.as_deref().unwrap_or_default();
            if is_legacy(value) {
                legacy += 1;
                if let Some(why) = opens(value) {
                    notes.attention(UNDECRYPTABLE, SET_AGAIN, format!("{label} ({why})"));
                }
            } else if !is_sealed(value) {
                let text = "secrets that are not encrypted, or not as a text; a call that needs one fails";
                notes.attention(text, "set them again", &label);
            }
            users.insert(row.username);
        }
        for ((user, key), times) in seen.iter().filter(|(_, times)| **times > 1) {
            for _ in 1..*times {
                notes.changed(TWICE, format!("secret {key} of {user}"));
            }
        }
        notes.count(Fate::Kept, "secrets", count);
        notes.count(Fate::Kept, "users with secrets", users.len());
        let text =
            "secrets in mcp-api's format; they can be read by both programs until the legacy mode is ended";
        notes.count(Fate::Kept, text, legacy);
        Ok(())
    }

    /// Tokens, sessions and clients.
    async fn survey_rows(
        &self,
        notes: &mut Notes,
        collection: Collection,
        opens: &Opens<'_>,
    ) -> Result<(), Failure> {
        let Some(parts) = adoption::parts(collection) else { return Ok(()) };
        let (what, fields): (_, &[&str]) = match collection {
            Collection::Sessions => ("sessions of users with remote servers", &[]),
            Collection::OAuthClients => {
                ("registrations with authorization servers", &["clientSecret", "registrationAccessToken"])
            }
            _ => ("OAuth tokens of users", &["accessToken", "refreshToken", "clientSecret", "codeVerifier"]),
        };
        let mut seen = HashSet::new();
        let (mut count, mut keyless, mut clear) = (0, 0, 0);
        let mut rows = self.rows(collection.name()).await?;
        while rows.advance().await? {
            let row = rows.current();
            let text = |field: &str| row.get_str(field).ok().filter(|text| !text.is_empty());
            let (Some(first), Some(second)) = (text(parts[0]), text(parts[1])) else {
                let id = row.get("_id").ok().flatten().map_or(String::new(), |id| format!("{id:?}"));
                let name = format!("{} {id}", collection.name());
                notes.attention(
                    "rows that do not say whose they are; they are left alone",
                    "delete them",
                    name,
                );
                continue;
            };
            let label = format!("{} of {second}, {first}", collection.name());
            count += 1;
            keyless += usize::from(text(collection.key()).is_none());
            let third = adoption::distinguished_by(collection).and_then(text);
            if !seen.insert((first.to_owned(), second.to_owned(), third.map(str::to_owned))) {
                notes.changed(TWICE, &label);
            }
            for field in fields {
                let Some(value) = text(field) else { continue };
                if !is_legacy(value) && !is_sealed(value) {
                    let text = "credentials that are not encrypted; they are refused";
                    notes.attention(text, "the user has to log in again", format!("{field}, {label}"));
                } else if let Some(why) = is_legacy(value).then(|| opens(value)).flatten() {
                    notes.attention(UNDECRYPTABLE, SET_AGAIN, format!("{field}, {label} ({why})"));
                }
            }
            let session = text("sessionId").filter(|id| !is_legacy(id) && !is_sealed(id));
            clear += usize::from(collection == Collection::Sessions && session.is_some());
        }
        notes.count(Fate::Kept, what, count);
        notes.count(
            Fate::Changed,
            match collection {
                Collection::Sessions => "sessions that get a field `key`, which mcp-api does not look at",
                Collection::OAuthClients => {
                    "registrations that get a field `key`, which mcp-api does not look at"
                }
                _ => "OAuth tokens that get a field `key`, which mcp-api does not look at",
            },
            keyless,
        );
        notes.count(
            Fate::Kept,
            "ids of sessions in clear, as mcp-api has them, until the legacy mode is ended",
            clear,
        );
        Ok(())
    }

    /// What else is there: collections that nobody here knows, and indexes that are missing.
    async fn survey_rest(&self, notes: &mut Notes) -> Result<(), Failure> {
        let mut collections = self.database.list_collection_names().await?;
        collections.sort();
        let own = self.collections();
        let known = |name: &str| {
            own.contains(&name) || [INSTALLS, LOCKS].contains(&name) || name.starts_with("system.")
        };
        for name in collections.iter().filter(|name| !known(name)) {
            notes.name(
                Fate::Kept,
                "collections that this version does not use; they are left alone",
                None,
                name,
            );
        }
        let (mut installs, mut secrets) = (0, 0);
        let mut rows = self.rows(INSTALLS).await?;
        while rows.advance().await? {
            installs += 1;
            secrets += usize::from(rows.current().get_str("oauthClientSecret").is_ok());
        }
        let text =
            "installs of servers by their users; they are kept, and this version has no routes for them yet";
        notes.count(Fate::Kept, text, installs);
        if secrets > 0 {
            let text = "client secrets in clear in users' installs; they are kept as mcp-api has them";
            let remedy =
                "whoever reads the database reads them: replace them once mcp-api is not gone back to";
            notes.attention(text, remedy, INSTALLS);
        }
        let mut missing = 0;
        let unique =
            [("mcp", "caseKey_unique".to_owned()), (self.secrets.name(), "secret_unique".to_owned())];
        let of_documents =
            Collection::ALL.map(|collection| (collection.name(), format!("{}_unique", collection.key())));
        for (collection, index) in unique.into_iter().chain(of_documents) {
            if !collections.iter().any(|name| name == collection) {
                missing += 1;
                continue;
            }
            let rows = self.database.collection::<Document>(collection);
            missing += usize::from(!rows.list_index_names().await?.contains(&index));
        }
        notes.count(Fate::Changed, "unique indexes that are made; those of mcp-api stay", missing);
        Ok(())
    }

    /// How much there is that only mcp-api would have written: credentials in its format, and variables in clear.
    pub(super) async fn legacy_rows(&self) -> Result<u64, Failure> {
        let mut count = self.legacy_secrets().await?;
        for (collection, fields) in [
            (Collection::OAuthTokens, &["accessToken", "refreshToken", "clientSecret", "codeVerifier"][..]),
            (Collection::OAuthClients, &["clientSecret", "registrationAccessToken"][..]),
        ] {
            let format = |field: &&str| doc! { *field: { "$regex": super::secrets::LEGACY_VALUE } };
            let filter = doc! { "$or": fields.iter().map(format).collect::<Vec<_>>() };
            count += self.documents(collection).count_documents(filter).await?;
        }
        let shown = doc! { "env": 1, "headers": 1 };
        let mut rows = self.servers.find(doc! {}).projection(shown).await?;
        while rows.advance().await? {
            let row = Document::try_from(&rows.current().to_owned()).unwrap_or_default();
            let maps = ["env", "headers"].iter().filter_map(|field| row.get_document(field).ok());
            let clear =
                maps.flat_map(|map| map.values()).filter_map(Bson::as_str).filter(|value| is_clear(value));
            count += u64::try_from(clear.count()).unwrap_or_default();
        }
        Ok(count)
    }
}

fn is_clear(value: &str) -> bool {
    !is_sealed(value) && !is_legacy(value)
}

fn clear_values(record: &ServerRecord) -> usize {
    let variables = match &record.transport {
        Transport::Stdio { env, .. } => Some(env),
        Transport::StreamableHttp { headers, .. } => headers.as_ref(),
    };
    variables.map_or(0, |variables| variables.0.values().filter(|value| is_clear(value)).count())
}

/// Whether a server's command line leads into a folder of packages.
fn runs_a_package(record: &ServerRecord) -> bool {
    let Transport::Stdio { command, args, .. } = &record.transport else { return false };
    let leads = |text: &String| {
        let path = text.strip_prefix("./").unwrap_or(text);
        path.starts_with("packages/") || path.contains("/packages/") && path.contains("/node_modules/")
    };
    leads(command) || args.iter().any(leads)
}
