//! Settings of what may be started as a server.

use super::{Reader, parse};
use crate::launch::LaunchRules;

/// Programs by names that are looked up, or by whole paths.
fn commands(text: &str) -> Result<Vec<String>, parse::Valid> {
    parse::list(text, |part| {
        let plain = part == "*" || part.starts_with('/') || !part.contains(['/', '*']);
        if plain && !part.starts_with('-') {
            return Ok(part.to_owned());
        }
        Err("names of programs and absolute paths, comma-separated, such as node,npx,/opt/server, and * for \
             everything but shells")
    })
}

fn variables(text: &str) -> Result<Vec<String>, parse::Valid> {
    parse::list(text, |part| {
        if part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Ok(part.to_owned());
        }
        Err("names of variables, comma-separated, such as NODE_OPTIONS")
    })
}

impl Reader {
    /// What may be started.
    pub(super) fn launch(&mut self) -> LaunchRules {
        LaunchRules {
            commands: self.optional("COMMANDS_ALLOW", commands),
            variables: self.optional("ENV_ALLOW", variables).unwrap_or_default(),
        }
    }
}
