//! The environment of package managers: what reaches registries from where the operator is, and nothing
//! of ours. Above all no setting that would change where or how something is installed.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

/// Variables that every program gets.
const COMMON: &[&str] = &[
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LOGNAME",
    "NETRC",
    "PATH",
    "TZ",
    "USER",
    "XDG_CONFIG_HOME",
    // Certificates.
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "NODE_USE_SYSTEM_CA",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    // Proxies.
    "ALL_PROXY",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "all_proxy",
    "https_proxy",
    "http_proxy",
    "no_proxy",
];

/// Settings of npm, as they are called behind `npm_config_`, in lower case and with `_` for `-`.
const NPM: &[&str] = &[
    "ca",
    "cafile",
    "cert",
    "fetch_retries",
    "fetch_retry_factor",
    "globalconfig",
    "https_proxy",
    "key",
    "local_address",
    "maxsockets",
    "min_release_age",
    "noproxy",
    "proxy",
    "registry",
    "strict_ssl",
    "userconfig",
];

/// Settings of pip, behind `PIP_`. Indexes are given for each package.
const PIP: &[&str] = &[
    "CERT",
    "CLIENT_CERT",
    "CONFIG_FILE",
    "FIND_LINKS",
    "KEYRING_PROVIDER",
    "NO_INDEX",
    "PROXY",
    "TRUSTED_HOST",
    "USE_FEATURE",
];

/// Settings of uv, behind `UV_`.
const UV: &[&str] = &[
    "EXCLUDE_NEWER",
    "FIND_LINKS",
    "INSECURE_HOST",
    "KEYRING_PROVIDER",
    "NATIVE_TLS",
    "NO_INDEX",
    "OFFLINE",
    "SYSTEM_CERTS",
];

/// Variables for children.
pub(super) struct Environment {
    variables: BTreeMap<String, Zeroizing<String>>,
}

impl Environment {
    /// What of an environment package managers may see.
    pub(super) fn of(all: BTreeMap<String, String>) -> Self {
        let mut variables: BTreeMap<String, Zeroizing<String>> = all
            .into_iter()
            .filter(|(name, value)| is_passed(name) && !value.is_empty())
            .map(|(name, value)| (name, Zeroizing::new(value)))
            .collect();
        // Each of them reads another variable for the certificates of a private authority. One is enough.
        let bundles = ["SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];
        let own = bundles.iter().find_map(|name| variables.get(*name)).cloned();
        if let Some(bundle) = own {
            for name in ["NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE", "PIP_CERT"] {
                variables.entry(name.to_owned()).or_insert_with(|| bundle.clone());
            }
        }
        Self { variables }
    }

    /// The variables.
    pub(super) fn variables(&self) -> impl Iterator<Item = (&String, &Zeroizing<String>)> {
        self.variables.iter()
    }

    /// The value of one.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|value| value.as_str())
    }

    /// The absolute path of a program in `PATH`. Links are kept: launchers of version managers look at the
    /// name that they are called by.
    pub(super) fn find(&self, name: &str) -> Option<PathBuf> {
        std::env::split_paths(self.get("PATH")?)
            // What is relative would be another file in another folder.
            .filter(|folder| folder.is_absolute())
            .map(|folder| folder.join(name))
            .find(|path| is_executable(path))
    }
}

/// Whether a file can be run.
pub(super) fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

fn is_passed(name: &str) -> bool {
    if COMMON.contains(&name) {
        return true;
    }
    if let Some(setting) = name.strip_prefix("PIP_") {
        return PIP.contains(&setting);
    }
    if let Some(setting) = name.strip_prefix("UV_") {
        // `UV_INDEX_<NAME>_USERNAME` and `_PASSWORD` are for indexes that have names.
        let of_index = setting.ends_with("_USERNAME") || setting.ends_with("_PASSWORD");
        return UV.contains(&setting) || (setting.starts_with("INDEX_") && of_index);
    }
    let Some((prefix, setting)) = name.split_at_checked("npm_config_".len()) else { return false };
    if !prefix.eq_ignore_ascii_case("npm_config_") {
        return false;
    }
    // Addresses of registries by scope, and what they are told about us: `@scope:registry`,
    // `//host/:_authToken`, `_auth`.
    let setting = setting.to_ascii_lowercase().replace('-', "_");
    NPM.contains(&setting.as_str())
        || setting.starts_with('@')
        || setting.starts_with("//")
        || setting.starts_with("_auth")
        || setting == "_password"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_to_registries_are_passed_and_nothing_else() {
        for name in [
            "PATH",
            "HTTPS_PROXY",
            "no_proxy",
            "NPM_CONFIG_REGISTRY",
            "npm_config_registry",
            "npm_config_@corp:registry",
            "npm_config_//npm.corp/:_authToken",
            "NPM_CONFIG_STRICT_SSL",
            "PIP_CERT",
            "UV_SYSTEM_CERTS",
            "UV_INDEX_CORP_PASSWORD",
        ] {
            assert!(is_passed(name), "{name}");
        }
        for name in [
            "SECRETS_KEY",
            "MONGODB_URI",
            "API_TOKENS",
            "LD_PRELOAD",
            "NODE_OPTIONS",
            "PYTHONPATH",
            "PYTHONSTARTUP",
            "npm_config_prefix",
            "npm_config_global",
            "npm_config_ignore_scripts",
            "npm_config_script_shell",
            "npm_config_",
            "PIP_TARGET",
            "PIP_NO_BINARY",
            "PIP_INDEX_URL",
            "UV_INDEX_URL",
            "UV_PYTHON",
            "é",
        ] {
            assert!(!is_passed(name), "{name}");
        }
    }

    #[test]
    fn one_bundle_of_certificates_is_for_all() {
        let of = |name: &str| Environment::of(BTreeMap::from([(name.to_owned(), "/ca.pem".to_owned())]));
        for environment in [of("SSL_CERT_FILE"), of("PIP_CERT"), of("REQUESTS_CA_BUNDLE")] {
            for name in ["SSL_CERT_FILE", "PIP_CERT", "NODE_EXTRA_CA_CERTS"] {
                assert_eq!(environment.get(name), Some("/ca.pem"), "{name}");
            }
        }
        assert_eq!(of("NODE_EXTRA_CA_CERTS").get("SSL_CERT_FILE"), None, "it holds only what is extra");
        assert_eq!(Environment::of(BTreeMap::new()).find("sh"), None);
    }
}
