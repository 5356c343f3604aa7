//! Secrets on their way into a call: cached while encrypted, decrypted for one call, merged into its
//! arguments.

use std::sync::Arc;

use mcp_shared::{
    crypter::CryptoError,
    error::{ErrorCode, WorkerError},
    google::{GoogleFlow, TOKENS_SECRET},
    ids::{SecretName, ServerName, UserId},
    json::{self, RawJson},
    metrics::SecretSource,
    server::ServerRecord,
    store::SealedSecret,
    vault::{Vault, VaultError},
};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use crate::{
    meters,
    remembered::{Found, Remembered},
    transport::push_string,
};

/// Users' secrets as stored, by user and server.
pub struct SecretCache {
    vault: Vault,
    remembered: Remembered<Arc<[SealedSecret]>>,
}

/// A decrypted secret of one call.
pub struct OpenSecret {
    /// The name of the argument.
    pub name: SecretName,
    /// Its value.
    pub value: SecretString,
    /// The value is a JSON text, which becomes the argument as it is, and not a string with that text.
    pub is_json: bool,
}

impl SecretCache {
    /// An empty cache in front of the store.
    pub fn new(vault: Vault) -> Self {
        Self { vault, remembered: Remembered::new() }
    }

    /// The secrets that go into the arguments of a call: those that the record names, or all that the
    /// user stored for the server; never those that the user's process has in its environment already.
    pub async fn for_call(
        &self,
        user: &UserId,
        record: &ServerRecord,
    ) -> Result<Vec<OpenSecret>, WorkerError> {
        let sealed = self.sealed(user, record).await?;
        let named = record.secret_names.as_deref().filter(|names| !names.is_empty());
        let google = GoogleFlow::of(record).is_some();
        sealed
            .iter()
            // They have an argument of their own.
            .filter(|secret| !google || secret.secret_name.as_str() != TOKENS_SECRET)
            .filter(|secret| match named {
                Some(names) => names.contains(&secret.secret_name),
                None => !record.secret_env.values().any(|name| *name == secret.secret_name),
            })
            .map(|secret| {
                let value = self.open(secret)?;
                Ok(OpenSecret { name: secret.secret_name.clone(), value, is_json: false })
            })
            .collect()
    }

    /// What the user has at Google, for a server that acts for its users there.
    pub async fn google_tokens(
        &self,
        user: &UserId,
        record: &ServerRecord,
    ) -> Result<Option<SecretString>, WorkerError> {
        let sealed = self.sealed(user, record).await?;
        let found = sealed.iter().find(|secret| secret.secret_name.as_str() == TOKENS_SECRET);
        let open = |secret: &SealedSecret| {
            self.vault.open_google_tokens(secret).map_err(|error| integrity(secret, error))
        };
        found.map(open).transpose()
    }

    fn open(&self, secret: &SealedSecret) -> Result<SecretString, WorkerError> {
        self.vault.open_secret(secret).map_err(|error| integrity(secret, error))
    }

    /// What is stored for a server, and for one that acts at Google what mcp-api stored for all such servers.
    async fn stored(&self, user: &UserId, record: &ServerRecord) -> Result<Vec<SealedSecret>, VaultError> {
        let mut sealed = self.vault.sealed_secrets(user, &record.name).await?;
        let has_tokens = sealed.iter().any(|secret| secret.secret_name.as_str() == TOKENS_SECRET);
        if !has_tokens && GoogleFlow::of(record).is_some() {
            sealed.extend(self.vault.google_tokens_of_mcp_api(user, &record.name).await?);
        }
        Ok(sealed)
    }

    /// Forgets a user's secrets for a server. What was being read meanwhile is not kept.
    pub fn forget(&self, user: &UserId, server: &ServerName) {
        self.remembered.forget(&(user.clone(), server.clone()));
    }

    /// Forgets every user's secrets for a server.
    pub fn forget_server(&self, server: &ServerName) {
        self.remembered.forget_server(server);
    }

    /// Forgets everything: changes may have been missed. The store has just answered.
    pub fn forget_all(&self) {
        self.remembered.forget_all();
    }

    /// Has everything read again when it is needed, as long as the store answers, which it has just done.
    pub fn doubt_all(&self) {
        self.remembered.doubt_all();
    }

    /// A store that does not answer leaves calls of users who have no secrets alone: nobody has said that they
    /// have some now. What is known of others serves for a while.
    async fn sealed(&self, user: &UserId, record: &ServerRecord) -> Result<Arc<[SealedSecret]>, WorkerError> {
        let key = (user.clone(), record.name.clone());
        let usable = |sealed: &Arc<[SealedSecret]>| sealed.is_empty() || !self.remembered.is_outdated();
        let stamp = self.remembered.stamp(&key);
        // What needs a key that this worker had to forget has been encrypted anew, and is not what is stored.
        let current =
            |sealed: &Arc<[SealedSecret]>| sealed.iter().all(|one| self.vault.has_key_of(&one.value));
        let known = self.remembered.get(&key).filter(|known| match known {
            Found::Certain(sealed) | Found::Doubtful(sealed) => current(sealed),
        });
        if let Some(Found::Certain(sealed)) = &known
            && usable(sealed)
        {
            meters::secrets_from(SecretSource::Memory);
            return Ok(Arc::clone(sealed));
        }
        let sealed: Arc<[SealedSecret]> = match self.stored(user, record).await {
            Ok(sealed) => {
                meters::secrets_from(SecretSource::Store);
                sealed.into()
            }
            Err(error) => {
                let error = WorkerError::from(error);
                let untouched = self.remembered.is_untouched(&key, stamp);
                match known {
                    Some(Found::Doubtful(known))
                        if error.code == ErrorCode::StoreUnavailable && untouched && usable(&known) =>
                    {
                        meters::secrets_from(SecretSource::Doubtful);
                        known
                    }
                    _ => return Err(error),
                }
            }
        };
        self.remembered.put(&key, stamp, Arc::clone(&sealed));
        Ok(sealed)
    }
}

fn integrity(secret: &SealedSecret, error: CryptoError) -> WorkerError {
    let error = VaultError::Integrity { what: format!("secret {}", secret.key), error };
    WorkerError::from(error).with("secretName", secret.secret_name.as_str())
}

/// The arguments with the secrets in them, which win over arguments of the same name. Everything else
/// stays byte for byte, in its order; only the object's own members are looked at.
pub fn merge(arguments: &RawJson, secrets: &[OpenSecret]) -> Result<Zeroizing<Vec<u8>>, serde_json::Error> {
    let members = json::members(arguments.as_bytes(), usize::MAX - 1)?;
    let extra: usize = secrets.iter().map(|secret| secret.value.expose_secret().len() * 6 + 300).sum();
    // Large enough from the start: growing would leave copies of secrets behind.
    let mut out = Zeroizing::new(Vec::with_capacity(arguments.as_bytes().len() + extra));
    out.push(b'{');
    for (name, value) in &members {
        if secrets.iter().any(|secret| secret.name.as_str() == name.as_ref()) {
            continue;
        }
        push_key(&mut out, name);
        out.extend_from_slice(value.get().as_bytes());
    }
    for secret in secrets {
        push_key(&mut out, secret.name.as_str());
        if secret.is_json {
            out.extend_from_slice(secret.value.expose_secret().as_bytes());
        } else {
            push_string(&mut out, secret.value.expose_secret());
        }
    }
    out.push(b'}');
    Ok(out)
}

fn push_key(out: &mut Vec<u8>, name: &str) {
    if out.len() > 1 {
        out.push(b',');
    }
    push_string(out, name);
    out.push(b':');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(name: &str, value: &str) -> OpenSecret {
        OpenSecret { name: SecretName::parse(name).unwrap(), value: value.into(), is_json: false }
    }

    fn merged(arguments: &str, secrets: &[OpenSecret]) -> String {
        let arguments = RawJson::parse(arguments.to_owned()).unwrap();
        String::from_utf8(merge(&arguments, secrets).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn secrets_win_and_the_rest_keeps_its_spelling() {
        let secrets = [secret("API_KEY", "a\"b\n"), secret("B", "2")];
        assert_eq!(
            merged(r#"{"q":1.0e2, "API_KEY":"mine", "s":"\u00e4","n":{"API_KEY":1}}"#, &secrets),
            r#"{"q":1.0e2,"s":"\u00e4","n":{"API_KEY":1},"API_KEY":"a\"b\n","B":"2"}"#
        );
        assert_eq!(merged("{}", &secrets[1..]), r#"{"B":"2"}"#);
        assert_eq!(merged(r#"{"\u0042":"mine"}"#, &secrets[1..]), r#"{"B":"2"}"#);
        let document = OpenSecret { is_json: true, ..secret("D", r#"{"a":[1]}"#) };
        assert_eq!(merged(r#"{"D":"mine"}"#, &[document]), r#"{"D":{"a":[1]}}"#);
    }
}
