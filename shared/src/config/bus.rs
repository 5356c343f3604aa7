//! How NATS is reached, and how a node logs in to it.
//!
//! Whoever can speak on the bus can call tools as any user and pose as a worker. So a NATS that asks nobody
//! for a login is used on this machine, and elsewhere only when the operator says so.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use secrecy::{ExposeSecret, SecretString};

use super::{Reader, parse};
use crate::error::shorten;

/// The bus between gateways and workers. `Debug` shows no secrets.
#[derive(Debug, Clone)]
pub struct BusSettings {
    /// The servers of one NATS; never empty.
    pub servers: Vec<BusServer>,
    /// How to log in, at each of them.
    pub login: BusLogin,
    /// What is asked of the connection.
    pub tls: BusTls,
    /// The first token of every subject.
    pub prefix: String,
    /// Whether a server may be used that asks nobody for a login: it is on this machine, or the operator
    /// said so. A login that is configured does not show that the server wants one, so whoever connects
    /// has to look at the server's greeting too.
    pub open_allowed: bool,
}

/// The address of a NATS server. As text it is a URL without user information.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusServer {
    /// Whether the URL asks for TLS.
    pub tls: bool,
    /// The host, an IPv6 address in brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for BusServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}:{}", if self.tls { "tls" } else { "nats" }, self.host, self.port)
    }
}

/// How a node proves who it is. A certificate (see [`BusTls::identity`]) may be the proof as well.
#[derive(Debug, Clone)]
pub enum BusLogin {
    /// Not at all.
    None,
    /// User and password.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: SecretString,
    },
    /// A token.
    Token(SecretString),
    /// The contents of a credentials file: a JWT and the seed of its key.
    Credentials(SecretString),
    /// The seed of an NKey.
    NKey(SecretString),
}

impl BusLogin {
    fn is_none(&self) -> bool {
        matches!(self, BusLogin::None)
    }
}

/// Certificates, and whether TLS is a must. The files were readable when the settings were read.
#[derive(Debug, Clone, Default)]
pub struct BusTls {
    /// A connection without TLS is refused.
    pub required: bool,
    /// The authorities to trust instead of the usual ones.
    pub ca: Option<PathBuf>,
    /// This node's certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl BusSettings {
    /// The servers as people know them, without user information.
    pub fn shown(&self) -> String {
        self.servers.iter().map(BusServer::to_string).collect::<Vec<_>>().join(",")
    }
}

const VALID_URLS: parse::Valid = "nats://host:port or tls://host:port, several of them comma-separated, with \
                                  the same user:password@ or token@ in each or in none (special characters \
                                  as %40)";

/// User information, as it stands in a URL.
type UserInfo<'a> = Option<&'a str>;

fn server(text: &str) -> Option<(BusServer, UserInfo<'_>)> {
    let (scheme, rest) = text.split_once("://")?;
    let tls = match scheme.to_ascii_lowercase().as_str() {
        "nats" => false,
        "tls" => true,
        _ => return None,
    };
    let (user_info, address) = match rest.rsplit_once('@') {
        Some((user_info, address)) => (Some(user_info), address),
        None => (None, rest),
    };
    let (host, port) = parse::host_and_port(address.strip_suffix('/').unwrap_or(address))?;
    Some((BusServer { tls, host, port: port.unwrap_or(4222) }, user_info))
}

fn urls(text: &str) -> Result<(Vec<BusServer>, BusLogin), parse::Valid> {
    let mut servers = Vec::new();
    let mut logins = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (server, user_info) = server(part).ok_or(VALID_URLS)?;
        servers.push(server);
        logins.push(user_info);
    }
    let Some(first) = logins.first().copied().filter(|first| logins.iter().all(|one| one == first)) else {
        return Err(VALID_URLS);
    };
    Ok((servers, login(first).ok_or(VALID_URLS)?))
}

fn login(user_info: UserInfo<'_>) -> Option<BusLogin> {
    let decoded = |text| parse::percent_decoded(text).filter(|text| !text.is_empty());
    Some(match user_info.map(|info| info.split_once(':').ok_or(info)) {
        None => BusLogin::None,
        Some(Ok((user, password))) => {
            BusLogin::Password { user: decoded(user)?, password: decoded(password)?.into() }
        }
        Some(Err(token)) => BusLogin::Token(decoded(token)?.into()),
    })
}

/// A first token of subjects.
pub(super) fn prefix(text: &str) -> Result<String, parse::Valid> {
    let ok = (1..=32).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
        // NATS' clients receive their answers below that token.
        && text != "_INBOX";
    if ok { Ok(text.to_owned()) } else { Err("1 to 32 letters, digits, _ or -, and not _INBOX") }
}

fn no_authentication(text: &str) -> Result<(), parse::Valid> {
    if text.eq_ignore_ascii_case("none") { Ok(()) } else { Err("none") }
}

/// The seed in an NKey file, which may have it alone or between decorations.
fn seed(contents: &SecretString) -> Option<SecretString> {
    let is_seed = |line: &&str| {
        line.len() == 58
            && line.starts_with("SU")
            && line.bytes().all(|b| b.is_ascii_uppercase() || (b'2'..=b'7').contains(&b))
    };
    contents.expose_secret().lines().map(str::trim).find(is_seed).map(SecretString::from)
}

impl Reader {
    /// The bus, unless none is set or something is wrong with it.
    pub(super) fn bus(&mut self) -> Option<BusSettings> {
        if self.raw("NATS_URL").is_none() {
            self.warn_about_a_bus_without_an_address();
            return None;
        }
        self.require_what_a_cluster_needs();
        let servers = self.optional("NATS_URL", urls);
        let prefix = self.required("NATS_PREFIX", prefix);
        let open_allowed = self.optional("NATS_AUTH", no_authentication).is_some();
        let tls = self.bus_tls();
        let file = self.bus_login_file();
        let (servers, login) = servers?;
        let login = match (login, file) {
            (login, None) => login,
            (BusLogin::None, Some((_, login))) => login,
            (_, Some((name, _))) => {
                self.problem(name, "NATS_URL has a login as well; keep only one of the two");
                return None;
            }
        };
        let elsewhere = servers.iter().find(|server| !parse::is_loopback(&server.host));
        if let Some(server) = elsewhere {
            if login.is_none() && tls.identity.is_none() && !open_allowed {
                let message = format!(
                    "{} is not on this machine and no login is configured: anyone who can reach that NATS \
                     could call tools as any user; set NATS_CREDS, NATS_NKEY_SEED_FILE, NATS_TLS_CERT_FILE \
                     or a login in the URL, or NATS_AUTH=none if everyone who can reach it is trusted",
                    shorten(&server.to_string(), 128)
                );
                self.problem("NATS_URL", message);
            }
            let in_clear = matches!(login, BusLogin::Password { .. } | BusLogin::Token(_));
            if in_clear && !tls.required && !servers.iter().all(|server| server.tls) {
                self.warnings.push(
                    "NATS_URL: its login crosses the network in clear unless the server asks for TLS; \
                     tls:// makes sure"
                        .to_owned(),
                );
            }
        }
        let tls = BusTls { required: tls.required || servers.iter().any(|server| server.tls), ..tls };
        let open_allowed = open_allowed || elsewhere.is_none();
        Some(BusSettings { servers, login, tls, prefix: prefix?, open_allowed })
    }

    /// A node that was meant to be part of a cluster must not quietly run alone.
    fn warn_about_a_bus_without_an_address(&mut self) {
        for name in ["NATS_CREDS", "NATS_NKEY_SEED_FILE", "NATS_TLS_CA_FILE", "NATS_TLS_CERT_FILE"] {
            if self.raw(name).is_some() {
                self.warnings.push(format!("{name}: not used, because NATS_URL is not set"));
            }
        }
    }

    fn require_what_a_cluster_needs(&mut self) {
        if self.raw("MONGODB_URI").is_none() && self.raw("MONGO_HOST").is_none() {
            let message = "gateways and workers need a store that all of them reach: set MONGODB_URI or \
                           MONGO_HOST as well";
            self.problem("NATS_URL", message);
        }
        if self.raw("SECRETS_KEY").is_none() && self.raw("SECRETS_KEYS_FILE").is_none() {
            let message = "a cluster needs one key that all its gateways and workers have: set SECRETS_KEY to \
                           the same output of `openssl rand -hex 32` on each of them, or SECRETS_KEYS_FILE";
            self.problem("SECRETS_KEY", message);
        }
    }

    fn bus_tls(&mut self) -> BusTls {
        let ca = self.pem("NATS_TLS_CA_FILE");
        let certificate = self.pem("NATS_TLS_CERT_FILE");
        let key = self.pem("NATS_TLS_KEY_FILE");
        for (name, other) in
            [("NATS_TLS_CERT_FILE", "NATS_TLS_KEY_FILE"), ("NATS_TLS_KEY_FILE", "NATS_TLS_CERT_FILE")]
        {
            if self.raw(name).is_some() && self.raw(other).is_none() {
                self.problem(name, format!("{other} is missing: a certificate and its key go together"));
            }
        }
        let identity = certificate.zip(key);
        BusTls { required: ca.is_some() || identity.is_some(), ca, identity }
    }

    /// The login from a file, and the variable that named it.
    fn bus_login_file(&mut self) -> Option<(&'static str, BusLogin)> {
        if self.raw("NATS_CREDS").is_some() && self.raw("NATS_NKEY_SEED_FILE").is_some() {
            self.problem("NATS_NKEY_SEED_FILE", "NATS_CREDS is set as well; set only one of the two");
        }
        if let Some((path, contents)) = self.file("NATS_CREDS") {
            let text = contents.expose_secret();
            if text.contains("BEGIN NATS USER JWT") && text.contains("BEGIN USER NKEY SEED") {
                return Some(("NATS_CREDS", BusLogin::Credentials(contents)));
            }
            self.not_one("NATS_CREDS", &path, "a NATS credentials file with a user's JWT and seed");
        }
        if let Some((path, contents)) = self.file("NATS_NKEY_SEED_FILE") {
            if let Some(seed) = seed(&contents) {
                return Some(("NATS_NKEY_SEED_FILE", BusLogin::NKey(seed)));
            }
            let what = "the NKey seed of a user, which has 58 characters and begins with SU";
            self.not_one("NATS_NKEY_SEED_FILE", &path, what);
        }
        None
    }

    fn pem(&mut self, name: &'static str) -> Option<PathBuf> {
        let (path, contents) = self.file(name)?;
        if contents.expose_secret().contains("-----BEGIN ") {
            return Some(path);
        }
        self.not_one(name, &path, "PEM, which has a line that starts with -----BEGIN");
        None
    }

    /// A file that must be there and be text. Reading it now tells at the start what is wrong with it.
    fn file(&mut self, name: &'static str) -> Option<(PathBuf, SecretString)> {
        let path = self.optional(name, parse::path)?;
        match std::fs::read_to_string(&path) {
            Ok(contents) => Some((path, contents.into())),
            Err(error) => {
                let shown = shorten(&path.display().to_string(), 128);
                self.problem(name, format!("{shown} cannot be read: {}", error.kind()));
                None
            }
        }
    }

    fn not_one(&mut self, name: &'static str, path: &Path, what: &str) {
        self.problem(name, format!("{} is not {what}", shorten(&path.display().to_string(), 128)));
    }
}
