//! One provider of cryptography for TLS in the whole process.

/// Makes `ring` the provider of rustls, unless one was chosen already.
///
/// Our dependencies bring two, and where two are compiled in, a TLS client that names none panics at its
/// first connection. Whoever connects to anything with TLS calls this before; calling it again does
/// nothing.
pub fn install_provider() {
    // An error says that there is one already, which is all that is needed.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_client_can_be_built_after_any_number_of_calls() {
        super::install_provider();
        super::install_provider();
        let roots = rustls::RootCertStore::empty();
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        assert!(!config.crypto_provider().cipher_suites.is_empty());
    }
}
