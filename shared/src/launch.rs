//! What may be started as a server of our own, whoever asks for it.
//!
//! This is no sandbox: a server is a program, and can do what its user can do. It keeps a record from turning into a
//! command line of a shell, and a variable, above all one that users fill with a secret of theirs, from turning into
//! other code than the record names.

use std::path::{Path, PathBuf};

use crate::{
    error::{ErrorCode, WorkerError, shorten},
    server::{ServerRecord, Transport},
};

/// Programs that run what their arguments say: shells, and what only starts others.
#[rustfmt::skip]
const SHELLS: &[&str] = &[
    "sh", "bash", "rbash", "dash", "ash", "zsh", "ksh", "ksh93", "mksh", "pdksh", "oksh", "yash", "posh", "csh",
    "tcsh", "fish", "elvish", "nu", "xonsh", "busybox", "toybox", "cmd", "command.com", "powershell", "pwsh",
    "env", "sudo", "sudoedit", "su", "doas", "pkexec", "runuser", "setpriv", "chroot", "nsenter", "unshare", "exec",
    "nohup", "setsid", "nice", "ionice", "chrt", "taskset", "timeout", "stdbuf", "xargs", "parallel", "script", "watch",
    "time", "strace", "ltrace", "gdb", "expect", "socat", "ssh", "systemd-run", "start-stop-daemon",
];

/// Variables that make a program load or run code that its command line does not name.
#[rustfmt::skip]
const LOADERS: &[&str] = &[
    "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "LD_ORIGIN_PATH", "LD_PROFILE", "LD_PROFILE_OUTPUT", "LD_DEBUG",
    "LD_DEBUG_OUTPUT", "LD_BIND_NOT", "LD_BIND_NOW", "LD_DYNAMIC_WEAK", "LD_USE_LOAD_BIAS", "LD_HWCAP_MASK",
    "LD_SHOW_AUXV", "LD_ASSUME_KERNEL",
    "NODE_OPTIONS", "NODE_REPL_EXTERNAL_MODULE", "NPM_CONFIG_NODE_OPTIONS", "NPM_CONFIG_SCRIPT_SHELL",
    "NPM_CONFIG_SHELL", "BUN_OPTIONS", "DENO_NODE_OPTIONS",
    "PYTHONSTARTUP", "PYTHONHOME", "PYTHONWARNINGS", "PYTHONBREAKPOINT", "PYTHONUSERBASE", "PYTHONPLATLIBDIR",
    "PYTHONEXECUTABLE", "PYTHONINSPECT",
    "BASH_ENV", "SHELLOPTS", "BASHOPTS", "PROMPT_COMMAND", "PS4", "ZDOTDIR",
    "PERL5OPT", "PERL5DB", "RUBYOPT", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS",
    "DOTNET_STARTUP_HOOKS", "PHPRC", "PHP_INI_SCAN_DIR",
    "GCONV_PATH", "GLIBC_TUNABLES", "LOCPATH", "OPENSSL_CONF", "OPENSSL_ENGINES", "OPENSSL_MODULES",
];
/// What the names of further ones begin with.
const LOADER_PREFIXES: &[&str] = &["DYLD_", "BASH_FUNC_", "COR_", "CORECLR_"];

/// Variables that say where code is looked for. An administrator may set them, as the command itself; that a user's
/// secret becomes one of them is another matter.
#[rustfmt::skip]
const PLACES: &[&str] = &[
    "PATH", "HOME", "SHELL", "TMPDIR", "PYTHONPATH", "NODE_PATH", "CLASSPATH", "PERL5LIB", "PERLLIB", "RUBYLIB",
    "GEM_HOME", "GEM_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "JAVA_HOME", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "PAGER", "EDITOR", "VISUAL", "BROWSER", "ENV", "IFS",
    "GIT_SSH", "GIT_SSH_COMMAND", "GIT_EXEC_PATH", "GIT_EXTERNAL_DIFF", "GIT_ASKPASS", "GIT_EDITOR", "GIT_PAGER",
    "GIT_PROXY_COMMAND", "GIT_DIR", "GIT_TEMPLATE_DIR", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_PARAMETERS",
];
/// What the names of further ones begin with: settings of the programs that install and start packages.
const PLACE_PREFIXES: &[&str] = &["NPM_CONFIG_", "PIP_", "UV_", "GIT_CONFIG_", "XDG_"];

/// Stands for every program that is no shell.
const ANY: &str = "*";

/// Which programs may be started, and with which variables.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaunchRules {
    /// Names and paths of `COMMANDS_ALLOW`; `None`: everything but shells.
    pub commands: Option<Vec<String>>,
    /// Names of `ENV_ALLOW`.
    pub variables: Vec<String>,
}

impl LaunchRules {
    /// Whether a server may be registered like this. What `before` was alike is not judged again: rules that came later
    /// keep nobody from changing a description.
    pub fn check(&self, record: &ServerRecord, before: Option<&ServerRecord>) -> Result<(), WorkerError> {
        let Transport::Stdio { command, env, .. } = &record.transport else { return Ok(()) };
        let (old_command, old_env) = match before.map(|before| &before.transport) {
            Some(Transport::Stdio { command, env, .. }) => (Some(command), Some(env)),
            _ => (None, None),
        };
        // Where there is none yet, it is what an installed package brings along.
        if !command.is_empty() && old_command != Some(command) {
            self.check_command(command, env.0.get("PATH").map(String::as_str))?;
        }
        if old_env != Some(env) {
            self.check_env(env.0.keys())?;
        }
        if before.is_none_or(|before| before.secret_env != record.secret_env) {
            self.check_secret_env(record.secret_env.keys())?;
        }
        Ok(())
    }

    /// Whether a program may be started. `path`: where its name is looked up, if not where ours is.
    pub fn check_command(&self, command: &str, path: Option<&str>) -> Result<(), WorkerError> {
        let allowed = self.commands.as_deref();
        let listed = |name: &str| allowed.is_some_and(|allowed| allowed.iter().any(|one| one == name));
        if listed(command) {
            return Ok(());
        }
        let refused = |why: &str| {
            let text = format!("command {} cannot be a server: {why}", shorten(command, 64));
            Err(WorkerError::new(ErrorCode::CommandNotAllowed, text))
        };
        // With an argument in the same text it would not be found, but what is meant is clear.
        let word = command.split_whitespace().next().unwrap_or_default();
        if is_shell(Path::new(command)) || is_shell(Path::new(word)) {
            return refused("it runs other programs, as its arguments say (COMMANDS_ALLOW permits it)");
        }
        if allowed.is_some_and(|allowed| !allowed.iter().any(|one| one == ANY)) {
            return refused("it is not in COMMANDS_ALLOW");
        }
        // Another name of a shell is a shell. Where the program is on other machines only, its name is all there is.
        if let Some(real) = find(command, path).and_then(|path| path.canonicalize().ok())
            && is_shell(&real)
            && !real.to_str().is_some_and(listed)
        {
            return refused("it is a link to a program that runs others, as its arguments say");
        }
        Ok(())
    }

    /// Whether a record may set these variables.
    pub fn check_env<'a>(&self, mut names: impl Iterator<Item = &'a String>) -> Result<(), WorkerError> {
        // Whoever may start only some programs may not say where those are looked for either.
        let narrow = self.commands.as_ref().is_some_and(|allowed| !allowed.iter().any(|one| one == ANY));
        let refused = |name: &String| is_loader(name) || narrow && is_place(name);
        match names.find(|name| refused(name) && !self.is_listed(name)) {
            Some(name) => Err(env_refused("env", name)),
            None => Ok(()),
        }
    }

    /// Whether users' secrets may become these variables.
    pub fn check_secret_env<'a>(
        &self,
        mut names: impl Iterator<Item = &'a String>,
    ) -> Result<(), WorkerError> {
        match names.find(|name| (is_loader(name) || is_place(name)) && !self.is_listed(name)) {
            Some(name) => Err(env_refused("secretEnv", name)),
            None => Ok(()),
        }
    }

    fn is_listed(&self, name: &str) -> bool {
        self.variables.iter().any(|one| one == name)
    }
}

fn env_refused(field: &str, name: &str) -> WorkerError {
    let text = format!(
        "{field} cannot have {}: it makes programs run other code than they are (ENV_ALLOW permits it)",
        shorten(name, 64)
    );
    WorkerError::new(ErrorCode::EnvNotAllowed, text)
}

fn is_shell(program: &Path) -> bool {
    let Some(name) = program.file_name().and_then(|name| name.to_str()) else { return false };
    let name = name.trim().to_ascii_lowercase();
    let name = name.strip_suffix(".exe").or_else(|| name.strip_suffix(".static")).unwrap_or(&name);
    // Versions are installed side by side: bash5, zsh-5.9.
    let plain = name.trim_end_matches(|c: char| c.is_ascii_digit() || c == '.' || c == '-');
    SHELLS.iter().any(|shell| *shell == name || *shell == plain)
}

fn is_loader(name: &str) -> bool {
    is_one_of(name, LOADERS, LOADER_PREFIXES)
}

fn is_place(name: &str) -> bool {
    is_one_of(name, PLACES, PLACE_PREFIXES)
}

/// Some programs do not tell large letters from small ones.
fn is_one_of(name: &str, names: &[&str], prefixes: &[&str]) -> bool {
    let name = name.to_ascii_uppercase();
    names.contains(&name.as_str()) || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// The file that a command is, as far as this machine has it.
fn find(command: &str, path: Option<&str>) -> Option<PathBuf> {
    if command.contains('/') {
        return Some(PathBuf::from(command));
    }
    let path = path.map(Into::into).or_else(|| std::env::var_os("PATH"))?;
    std::env::split_paths(&path).map(|folder| folder.join(command)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(result: Result<(), WorkerError>) -> Option<&'static str> {
        result.err().map(|error| error.code.as_str())
    }

    fn rules(commands: &[&str], variables: &[&str]) -> LaunchRules {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        LaunchRules { commands: (!commands.is_empty()).then(|| list(commands)), variables: list(variables) }
    }

    #[test]
    fn shells_are_known_by_their_names_and_by_what_links_to_them() {
        let rules = LaunchRules::default();
        for command in [
            "sh",
            "bash",
            "/bin/sh",
            "/usr/bin/env",
            "/bin/sh -c x",
            "bash -c ls",
            "./zsh",
            "../../bin/dash",
            "SH",
            "bash5",
            "zsh-5.9",
            "pwsh.exe",
            "busybox.static",
            "sudo",
            "timeout",
            " sh",
        ] {
            assert_eq!(code(rules.check_command(command, None)), Some("command_not_allowed"), "{command}");
        }
        for command in [
            "node",
            "npx",
            "uvx",
            "python3",
            "python3.12",
            "/usr/bin/node",
            "docker",
            "/opt/sh/server",
            "fresh",
            "bash-language-server",
            "mcp-server-shell",
            "env-server",
            "/nonexistent/server",
        ] {
            assert_eq!(code(rules.check_command(command, None)), None, "{command}");
        }
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("server");
        std::os::unix::fs::symlink("/bin/sh", &link).unwrap();
        assert_eq!(code(rules.check_command(link.to_str().unwrap(), None)), Some("command_not_allowed"));
        let found = rules.check_command("server", folder.path().to_str());
        assert_eq!(code(found), Some("command_not_allowed"));
        assert_eq!(code(rules.check_command("server", Some("/nonexistent"))), None);
    }

    #[test]
    fn a_list_narrows_what_may_be_started_and_lets_shells_through() {
        let narrow = rules(&["node", "/opt/server", "bash"], &[]);
        for command in ["node", "/opt/server", "bash"] {
            assert_eq!(code(narrow.check_command(command, None)), None, "{command}");
        }
        for command in ["npx", "/tmp/node", "./node", "/bin/bash", "sh", "*", "server"] {
            assert_eq!(code(narrow.check_command(command, None)), Some("command_not_allowed"), "{command}");
        }
        let wide = rules(&["*", "bash"], &[]);
        for command in ["npx", "bash", "/anything/else"] {
            assert_eq!(code(wide.check_command(command, None)), None, "{command}");
        }
        assert_eq!(code(wide.check_command("sh", None)), Some("command_not_allowed"));
        // Where the names are looked for is then not the record's to say.
        let path = ["PATH".to_owned()];
        assert_eq!(code(narrow.check_env(path.iter())), Some("env_not_allowed"));
        assert_eq!(code(wide.check_env(path.iter())), None);
    }

    #[test]
    fn variables_that_are_code_are_refused() {
        let plain = LaunchRules::default();
        let env = |rules: &LaunchRules, name: &str| code(rules.check_env([name.to_owned()].iter()));
        let secret = |rules: &LaunchRules, name: &str| code(rules.check_secret_env([name.to_owned()].iter()));
        for name in
            ["LD_PRELOAD", "LD_AUDIT", "NODE_OPTIONS", "BASH_ENV", "PERL5OPT", "npm_config_node_options"]
        {
            assert_eq!(env(&plain, name), Some("env_not_allowed"), "{name}");
            assert_eq!(secret(&plain, name), Some("env_not_allowed"), "{name}");
        }
        for name in ["PATH", "HOME", "PYTHONPATH", "NODE_PATH", "GIT_SSH_COMMAND", "npm_config_registry"] {
            assert_eq!(env(&plain, name), None, "{name}");
            assert_eq!(secret(&plain, name), Some("env_not_allowed"), "{name}");
        }
        for name in [
            "API_KEY",
            "OLD_PATH",
            "GOLD_KEY",
            "NODE_ENV",
            "GITHUB_TOKEN",
            "GIT_TOKEN",
            "LD_SDK_KEY",
            "PYTHONUNBUFFERED",
        ] {
            assert_eq!((env(&plain, name), secret(&plain, name)), (None, None), "{name}");
        }
        let exception = rules(&[], &["NODE_OPTIONS"]);
        assert_eq!(env(&exception, "NODE_OPTIONS"), None);
        assert_eq!(env(&exception, "LD_PRELOAD"), Some("env_not_allowed"));
    }
}
