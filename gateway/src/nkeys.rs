//! The command `nkeys`: keys by which nodes and services log in to NATS.

use std::{
    fs::OpenOptions,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::ExitCode,
};

use mcp_shared::lifecycle::complain;
use nkeys::KeyPair;
use zeroize::Zeroizing;

/// Makes a key for each name: the seed goes into a file that only its owner can read, and the public key is printed as
/// `nats/nats-server.conf` expects it. A file that is there already is kept, and its public key printed.
pub fn run(names: &[String], folder: &Path) -> ExitCode {
    let mut printed = String::new();
    for name in names {
        if !is_name(name) {
            complain(&format!(
                "nkeys: `{}` is no name; valid: 1 to 32 of a-z, 0-9 and -",
                name.escape_debug()
            ));
            return ExitCode::from(2);
        }
        let path = folder.join(format!("{name}.nk"));
        match key(&path) {
            Ok(key) => {
                let variable = name.to_ascii_uppercase().replace('-', "_");
                printed.push_str(&format!("MCP_{variable}_NKEY={}\n", key.public_key()));
            }
            Err(error) => {
                complain(&format!("nkeys: {}: {error}", path.display()));
                return ExitCode::FAILURE;
            }
        }
    }
    match io::stdout().lock().write_all(printed.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn is_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && !name.starts_with('-')
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

/// The key of a file, which is made, for its owner alone, if it is not there.
pub fn key(path: &Path) -> io::Result<KeyPair> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(mut file) => {
            let key = KeyPair::new_user();
            let seed = Zeroizing::new(key.seed().map_err(io::Error::other)?);
            writeln!(file, "{}", *seed)?;
            file.sync_all()?;
            Ok(key)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut text = Zeroizing::new(String::new());
            OpenOptions::new().read(true).open(path)?.take(1_024).read_to_string(&mut text)?;
            KeyPair::from_seed(text.trim())
                .map_err(|_| io::Error::other("it is there, and has no seed of an NKey"))
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn seeds_are_made_once_and_for_their_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.nk");
        let made = key(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let seed = std::fs::read_to_string(&path).unwrap();
        assert!(seed.starts_with("SU") && seed.trim().len() == 58, "{seed}");
        assert_eq!(key(&path).unwrap().public_key(), made.public_key());
        std::fs::write(&path, "something else").unwrap();
        assert!(key(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "something else");
        for bad in ["", "-x", "../x", "A", "a b", "a/b", &"a".repeat(33)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
