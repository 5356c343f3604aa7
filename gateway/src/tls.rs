//! HTTPS: a certificate and its key from files, which are read again when the operator says so (SIGHUP).

use std::{
    io,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use der::{
    Decode, SliceReader, Tag, Tagged,
    asn1::{AnyRef, GeneralizedTime, UtcTime},
};
use mcp_shared::{
    config::TlsFiles, error::shorten, ids::RequestId, lifecycle::explain, limits, timestamp::Timestamp, tls,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        version::{TLS12, TLS13},
    },
    server::TlsStream,
};

use crate::problem::Problem;

/// What a client that speaks TLS says first: the type of a record with a handshake in it.
const HANDSHAKE: u8 = 22;

/// How much is read of what somebody says in clear, and for how long, before they are told that this is HTTPS.
const IN_CLEAR: usize = 64 * 1024;
const FAREWELL: Duration = Duration::from_secs(1);

/// Why a certificate and its key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not there, or is no PEM with what it should have.
    #[error("{variable}: {path}: {cause}")]
    File {
        /// The setting that names it.
        variable: &'static str,
        /// The file, for people.
        path: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The key is not the certificate's, or neither can be used.
    #[error("TLS_CERT_FILE and TLS_KEY_FILE: {0}")]
    Pair(String),
}

impl TlsError {
    fn file(variable: &'static str, path: &Path, cause: impl ToString) -> Self {
        Self::File { variable, path: shorten(&path.display().to_string(), 128), cause: cause.to_string() }
    }
}

/// A certificate that can be served with.
struct Loaded {
    config: Arc<ServerConfig>,
    /// When it ends, if that can be read.
    ends: Option<Timestamp>,
}

/// The certificate in use.
pub struct Tls {
    files: TlsFiles,
    loaded: RwLock<Loaded>,
}

impl Tls {
    /// Reads certificate and key.
    pub fn open(files: &TlsFiles) -> Result<Self, TlsError> {
        let loaded = load(files)?;
        match loaded.ends {
            // Clients will say so themselves, and some do not look.
            Some(ends) if ends <= Timestamp::now() => {
                tracing::warn!(%ends, "the certificate of TLS_CERT_FILE has ended");
            }
            _ => loaded.log("a certificate is in use"),
        }
        Ok(Self { files: files.clone(), loaded: RwLock::new(loaded) })
    }

    /// Reads the files again with every SIGHUP. One that cannot be used leaves everything as it was; connections
    /// that are open keep what they began with.
    pub async fn follow(self: Arc<Self>) {
        let mut hangup = match signal(SignalKind::hangup()) {
            Ok(hangup) => hangup,
            Err(error) => {
                tracing::warn!(error.cause = %error, "certificates are not read again: no signals");
                return;
            }
        };
        while hangup.recv().await.is_some() {
            let files = self.files.clone();
            let Ok(loaded) = tokio::task::spawn_blocking(move || load(&files)).await else { continue };
            match loaded {
                Ok(loaded) if loaded.ends.is_some_and(|ends| ends <= Timestamp::now()) => {
                    tracing::error!("the new certificate has ended already; the old one stays in use");
                }
                Ok(loaded) => {
                    loaded.log("a certificate was read again");
                    *self.loaded.write().unwrap_or_else(PoisonError::into_inner) = loaded;
                }
                Err(error) => tracing::error!(
                    error.cause = %error,
                    "the new certificate cannot be used; the old one stays in use"
                ),
            }
        }
    }

    /// When the certificate in use ends, if that can be read.
    pub fn ends(&self) -> Option<Timestamp> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner).ends
    }

    /// Greets a client, for a limited time. `None`: it did not speak TLS, or not to the end.
    pub async fn accept(&self, stream: TcpStream) -> Option<TlsStream<TcpStream>> {
        let config = Arc::clone(&self.loaded.read().unwrap_or_else(PoisonError::into_inner).config);
        let greeting = async move {
            let mut first = [0];
            if stream.peek(&mut first).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if first[0] != HANDSHAKE {
                refuse(stream).await;
                return Err(io::Error::other("no TLS"));
            }
            TlsAcceptor::from(config).accept(stream).await
        };
        match timeout(limits::HANDSHAKE_TIMEOUT, greeting).await {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(error.cause = %error, "a connection did not get as far as TLS");
                None
            }
            Err(_) => {
                tracing::debug!("a handshake took too long");
                None
            }
        }
    }
}

impl Loaded {
    fn log(&self, what: &str) {
        tracing::info!(ends = self.ends.map(|ends| ends.to_string()), "{what}");
    }
}

/// What `check` says.
pub fn check(files: &TlsFiles) -> Result<String, String> {
    let loaded = load(files).map_err(|error| error.to_string())?;
    let file = files.certificate.display();
    match loaded.ends {
        Some(ends) if ends <= Timestamp::now() => Err(format!("{file} ended at {ends}")),
        Some(ends) => Ok(format!("{file} fits its key, and ends at {ends}")),
        None => Ok(format!("{file} fits its key")),
    }
}

/// When the certificate of a file ends, if that can be read.
pub fn ends(path: &Path) -> Option<Timestamp> {
    end(certificates(path).ok()?.first()?)
}

fn load(files: &TlsFiles) -> Result<Loaded, TlsError> {
    tls::install_provider();
    let TlsFiles { certificate: path, key } = files;
    let unusable = |cause: String| TlsError::file("TLS_CERT_FILE", path, cause);
    let chain = certificates(path).map_err(unusable)?;
    let Some(first) = chain.first() else { return Err(unusable("it has no certificate in PEM".to_owned())) };
    let ends = end(first);
    let key = PrivateKeyDer::from_pem_file(key)
        // The parser's words cannot repeat a key: they name what is missing.
        .map_err(|error| TlsError::file("TLS_KEY_FILE", key, pem(&error)))?;
    // Nothing older than TLS 1.2, whatever other parts of the program have the library know.
    let builder = ServerConfig::builder_with_protocol_versions(&[&TLS13, &TLS12]).with_no_client_auth();
    let mut config = builder.with_single_cert(chain, key).map_err(|error| {
        TlsError::Pair(match error {
            rustls::Error::InconsistentKeys(_) => "the key is not that of the certificate".to_owned(),
            error => explain(&error),
        })
    })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Loaded { config: Arc::new(config), ends })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let all = CertificateDer::pem_file_iter(path).map_err(|error| pem(&error))?;
    all.collect::<Result<_, _>>().map_err(|error| pem(&error))
}

fn pem(error: &rustls::pki_types::pem::Error) -> String {
    use rustls::pki_types::pem::Error;
    match error {
        Error::Io(error) => error.kind().to_string(),
        Error::NoItemsFound => "it has nothing of that kind in PEM".to_owned(),
        _ => "it is not good PEM".to_owned(),
    }
}

/// When a certificate ends: the second time of its validity, which stands behind the version (if it is said),
/// the serial number, the algorithm and the issuer.
fn end(certificate: &[u8]) -> Option<Timestamp> {
    let mut certificate = inside(AnyRef::from_der(certificate).ok()?)?;
    let mut signed = inside(AnyRef::decode(&mut certificate).ok()?)?;
    if AnyRef::decode(&mut signed).ok()?.tag() != Tag::Integer {
        AnyRef::decode(&mut signed).ok()?;
    }
    for _ in ["algorithm", "issuer"] {
        AnyRef::decode(&mut signed).ok()?;
    }
    let mut validity = inside(AnyRef::decode(&mut signed).ok()?)?;
    AnyRef::decode(&mut validity).ok()?;
    let end = AnyRef::decode(&mut validity).ok()?;
    let since = match end.tag() {
        Tag::UtcTime => end.decode_as::<UtcTime>().ok()?.to_unix_duration(),
        _ => end.decode_as::<GeneralizedTime>().ok()?.to_unix_duration(),
    };
    i64::try_from(since.as_millis()).ok().map(Timestamp::from_millis)
}

fn inside(sequence: AnyRef<'_>) -> Option<SliceReader<'_>> {
    (sequence.tag() == Tag::Sequence).then(|| SliceReader::new(sequence.value()).ok()).flatten()
}

/// Tells somebody who speaks HTTP in clear what is spoken here. Their request is not read any further than
/// needed for them to read the answer.
async fn refuse(mut stream: TcpStream) {
    let problem = Problem::invalid("This port speaks HTTPS: the address begins with https://");
    let id = RequestId::generate();
    let body = problem.envelope(&id).to_string();
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {}\r\nx-request-id: {id}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    let talk = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        // Closed with something unread in it, a connection takes the answer with it.
        tokio::io::copy(&mut (&mut stream).take(IN_CLEAR as u64), &mut tokio::io::sink()).await
    };
    let _ = timeout(FAREWELL, talk).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/tls").join(name)
    }

    fn pair(certificate: &str, key: &str) -> TlsFiles {
        TlsFiles { certificate: file(certificate), key: file(key) }
    }

    #[test]
    fn certificates_say_when_they_end() {
        for (name, expected) in
            [("localhost.pem", "2126-10-30T00:00:00.000Z"), ("expired.pem", "2021-01-01T00:00:00.000Z")]
        {
            let first = certificates(&file(name)).unwrap().remove(0);
            assert_eq!(end(&first).unwrap().to_string(), expected);
            // Whatever is cut off or changed has no end, and does no harm.
            for cut in 0..first.len() {
                end(&first[..cut]);
                let mut changed = first.to_vec();
                changed[cut] ^= 0xff;
                end(&changed);
            }
        }
        assert_eq!(end(b""), None);
    }

    #[test]
    fn a_check_says_what_is_wrong() {
        assert!(check(&pair("localhost.pem", "localhost.key")).unwrap().contains("ends at 2126-10-30"));
        for (certificate, key, expected) in [
            ("expired.pem", "localhost.key", "ended at 2021-01-01"),
            ("localhost.pem", "another.key", "the key is not that of the certificate"),
            ("localhost.key", "localhost.key", "TLS_CERT_FILE"),
            ("localhost.pem", "localhost.pem", "TLS_KEY_FILE"),
            ("nowhere.pem", "localhost.key", "not found"),
            ("localhost.pem", "nowhere.key", "not found"),
        ] {
            let said = check(&pair(certificate, key)).unwrap_err();
            assert!(said.contains(expected), "{certificate} {key}: {said}");
        }
    }
}
