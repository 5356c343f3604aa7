//! What the HTTP side speaks besides plain HTTP, and to which web pages.

use std::path::PathBuf;

use super::{Reader, parse};

/// How the HTTP side is reached.
#[derive(Debug, Clone, Default)]
pub struct HttpSettings {
    /// Certificate and key. With them nothing but HTTPS is spoken.
    pub tls: Option<TlsFiles>,
    /// Origins of web pages that may read answers, as browsers write them.
    pub cors_origins: Vec<String>,
}

/// A certificate and its key, in PEM. Whether they can be used is for whoever reads them to say.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// The certificate, and after it those that lead to an authority.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

impl Reader {
    /// The settings of the HTTP side that stand for themselves.
    pub(super) fn http(&mut self) -> HttpSettings {
        let certificate = self.optional("TLS_CERT_FILE", parse::path);
        let key = self.optional("TLS_KEY_FILE", parse::path);
        for (name, other, missing) in [
            ("TLS_CERT_FILE", "TLS_KEY_FILE", key.is_none()),
            ("TLS_KEY_FILE", "TLS_CERT_FILE", certificate.is_none()),
        ] {
            // Half of it must not quietly mean plain HTTP.
            if self.raw(name).is_some() && missing {
                self.problem(name, format!("{other} is missing: a certificate and its key go together"));
            }
        }
        HttpSettings {
            tls: certificate.zip(key).map(|(certificate, key)| TlsFiles { certificate, key }),
            cors_origins: self.optional("CORS_ORIGINS", parse::allowed_origins).unwrap_or_default(),
        }
    }
}
