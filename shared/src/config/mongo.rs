//! Which store, and how MongoDB is reached and logged in to, as mcp-api has it.

use mongodb::options::{ConnectionString, HostInfo, ServerAddress};
use secrecy::SecretString;

use super::{Reader, parse};
use crate::error::shorten;

/// Which store.
#[derive(Debug, Clone)]
pub enum StoreSettings {
    /// The file in the data folder.
    Embedded,
    /// A MongoDB, which other nodes may use too.
    Mongo(MongoSettings),
}

/// A database in a MongoDB. `Debug` shows no secrets.
#[derive(Debug, Clone)]
pub struct MongoSettings {
    /// A connection string that the driver understands; it may have a login of its own.
    pub uri: SecretString,
    /// A login that goes before that of the connection string.
    pub login: Option<MongoLogin>,
    /// The replica set, where the connection string does not name one.
    pub replica_set: Option<String>,
    /// The database.
    pub database: String,
    /// The collection of users' secrets in it. mcp-api calls the setting `SECRETS_DBNAME`, but what it takes
    /// from it is the name of a collection.
    pub secrets_collection: String,
    /// The hosts, for people: without login and options.
    pub hosts: String,
}

/// A user and their password, kept in the database `admin`.
#[derive(Debug, Clone)]
pub struct MongoLogin {
    /// The user.
    pub user: String,
    /// The password.
    pub password: SecretString,
    /// It is the documented default, which nobody chose: where MongoDB knows no such user, it is to be used
    /// without a login ([`MongoSettings::without_default_login`]).
    pub is_default: bool,
}

impl MongoSettings {
    /// The same without the documented default login; `None` where the operator chose how to log in.
    pub fn without_default_login(&self) -> Option<Self> {
        let is_default = self.login.as_ref().is_some_and(|login| login.is_default);
        is_default.then(|| Self { login: None, ..self.clone() })
    }
}

/// What is known about a MongoDB address.
struct Address {
    uri: String,
    hosts: String,
    on_this_machine: bool,
    has_login: bool,
    replica_set: Option<String>,
    database: Option<String>,
}

const VALID_URI: parse::Valid = "a MongoDB connection string, such as \
                                 mongodb://user:password@host:27017/?replicaSet=rs0 or \
                                 mongodb+srv://user:password@cluster.example.com (special characters as %40)";
const VALID_HOST: parse::Valid = "host:port, several of them comma-separated, or a mongodb:// or \
                                  mongodb+srv:// URI (special characters in it as %40)";

fn uri(text: &str) -> Result<Address, parse::Valid> {
    // The error of the driver may repeat what it was given, and with it a password.
    let parsed = ConnectionString::parse(text).map_err(|_| VALID_URI)?;
    let (hosts, on_this_machine) = match &parsed.host_info {
        HostInfo::HostIdentifiers(hosts) => (
            hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
            hosts.iter().all(|host| match host {
                ServerAddress::Tcp { host, .. } => parse::is_loopback(&host.to_ascii_lowercase()),
                // The other kind is a socket in the file system.
                _ => true,
            }),
        ),
        HostInfo::DnsRecord(name) => (name.clone(), false),
        _ => return Err(VALID_URI),
    };
    Ok(Address {
        uri: text.to_owned(),
        hosts: shorten(&hosts, 256),
        on_this_machine,
        has_login: parsed.credential.is_some(),
        replica_set: parsed.replica_set,
        database: parsed.default_database,
    })
}

fn host(text: &str) -> Result<Address, parse::Valid> {
    if text.contains("://") {
        return uri(text).map_err(|_| VALID_HOST);
    }
    let hosts: Vec<_> = text.split(',').map(str::trim).filter(|host| !host.is_empty()).collect();
    let each = |host: &&str| parse::host_and_port(host).is_some();
    if hosts.is_empty() || !hosts.iter().all(each) {
        return Err(VALID_HOST);
    }
    uri(&format!("mongodb://{}/", hosts.join(","))).map_err(|_| VALID_HOST)
}

fn collection(text: &str) -> Result<String, parse::Valid> {
    let ok = (1..=120).contains(&text.len())
        && !text.contains(|c: char| c.is_control() || c == '$')
        && !text.starts_with("system.");
    if ok { Ok(text.to_owned()) } else { Err("1 to 120 characters without $, not beginning with system.") }
}

fn database(text: &str) -> Result<String, parse::Valid> {
    let ok = (1..=63).contains(&text.len())
        && !text.contains(|c: char| c.is_control() || c.is_whitespace() || "/\\.\"$*<>:|?".contains(c));
    if ok { Ok(text.to_owned()) } else { Err("1 to 63 characters without spaces and without /\\.\"$*<>:|?") }
}

impl Reader {
    /// The store, unless something is wrong with its settings.
    pub(super) fn store(&mut self) -> Option<StoreSettings> {
        let database_name = self.required("MONGO_DBNAME", database);
        let secrets_collection = self.required("SECRETS_DBNAME", collection);
        let (name, address) = if self.raw("MONGODB_URI").is_some() {
            ("MONGODB_URI", self.optional("MONGODB_URI", uri)?)
        } else if self.raw("MONGO_HOST").is_some() {
            ("MONGO_HOST", self.optional("MONGO_HOST", host)?)
        } else {
            return Some(StoreSettings::Embedded);
        };
        // With mcp-api's own variables the database is the one that it would use, whatever the address says.
        let database_name = match address.database.clone() {
            Some(named) if name == "MONGODB_URI" && self.raw("MONGO_DBNAME").is_none() => Some(named),
            _ => database_name,
        };
        let login = match name {
            // It says all there is to say, so it is also how to use a MongoDB that wants no login.
            "MONGODB_URI" => None,
            _ => self.mongo_login(&address),
        };
        if login.is_none() && !address.has_login && !address.on_this_machine && name == "MONGODB_URI" {
            self.warnings.push(
                "MONGODB_URI: it has no login, and the host is not this machine: whoever can reach that \
                 MongoDB could make this program start programs of theirs"
                    .to_owned(),
            );
        }
        let replica_set = self.raw("MONGO_REPLICASET");
        if let (Some(one), Some(other)) = (&replica_set, &address.replica_set)
            && one != other
        {
            self.problem(
                "MONGO_REPLICASET",
                format!("{name} names another replica set; keep one of the two"),
            );
        }
        Some(StoreSettings::Mongo(MongoSettings {
            uri: address.uri.into(),
            login,
            replica_set,
            database: database_name?,
            secrets_collection: secrets_collection?,
            hosts: address.hosts,
        }))
    }

    /// The login for a MongoDB that `MONGO_HOST` names. The documented default is a password that everybody
    /// knows: it is good enough for a MongoDB on this machine, and sent nowhere else unless it is set.
    fn mongo_login(&mut self, address: &Address) -> Option<MongoLogin> {
        let default = |name| super::find(name).map(|variable| variable.default).unwrap_or_default();
        let (user, password) = (self.raw("MONGO_USER"), self.raw("MONGO_PASS"));
        let is_default = user.is_none() && password.is_none();
        if is_default && address.has_login {
            return None;
        }
        if (user.is_none() || password.is_none()) && !address.on_this_machine {
            let missing = match (&user, &password) {
                (Some(_), None) => "MONGO_PASS",
                _ => "MONGO_USER",
            };
            let message = format!(
                "MongoDB at {} is not on this machine, and the documented default login is not sent there: \
                 set MONGO_USER and MONGO_PASS (or MONGODB_URI, which needs no login if MongoDB wants none)",
                address.hosts
            );
            self.problem(missing, message);
            return None;
        }
        Some(MongoLogin {
            user: user.unwrap_or_else(|| default("MONGO_USER").to_owned()),
            password: password.unwrap_or_else(|| default("MONGO_PASS").to_owned()).into(),
            is_default,
        })
    }
}
