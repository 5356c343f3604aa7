//! The grammar of what goes to npm, pip and Python: nothing in it can be an option, a path, an address or
//! the start of a command.

use std::str::FromStr;

use url::{Host, Url};

/// The longest name of a package, in bytes. It is npm's limit.
const NAME_BYTES: usize = 214;
/// The longest specification of a version.
const VERSION_BYTES: usize = 128;
/// The longest address of an index.
const URL_BYTES: usize = 2_048;

/// A name in npm's registry, with its scope if it has one.
pub fn npm_name(text: &str) -> bool {
    let part = |part: &str| {
        let mut bytes = part.bytes();
        bytes.next().is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            && bytes.all(|byte| {
                byte.is_ascii_lowercase()
                    || byte.is_ascii_digit()
                    || matches!(byte, b'.' | b'_' | b'-' | b'~')
            })
    };
    text.len() <= NAME_BYTES
        && match text.strip_prefix('@') {
            Some(scoped) => scoped.split_once('/').is_some_and(|(scope, name)| part(scope) && part(name)),
            None => part(text),
        }
}

/// A version, a range of versions or a tag of npm's: never an address, a path or an alias.
pub fn npm_version(text: &str) -> bool {
    let first = text.bytes().next();
    text.len() <= VERSION_BYTES
        && first.is_some_and(|byte| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'^' | b'~' | b'<' | b'>' | b'=' | b'*')
        })
        && text.bytes().all(|byte| {
            byte.is_ascii_alphanumeric()
                || matches!(
                    byte,
                    b'.' | b'_' | b'-' | b'+' | b'^' | b'~' | b'<' | b'>' | b'=' | b'*' | b'|' | b' '
                )
        })
        // Two of them stand between ranges, and one alone between nothing that npm knows.
        && text.split("||").all(|range| !range.contains('|'))
}

/// A name in PyPI, with extras if it has some: `name[extra,other]`.
pub fn python_name(text: &str) -> bool {
    split_extras(text).is_some()
}

/// The name without its extras, and the extras with their brackets; `None` if it is no name.
pub fn split_extras(text: &str) -> Option<(&str, &str)> {
    let (name, extras) = text.split_at(text.find('[').unwrap_or(text.len()));
    let word = |word: &str| {
        let alphanumeric = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
        alphanumeric(word.bytes().next())
            && alphanumeric(word.bytes().last())
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
    };
    let extras_valid = extras.is_empty()
        || extras
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|inner| inner.split(',').all(|extra| word(extra.trim())));
    (text.len() <= NAME_BYTES && printable(text) && word(name) && extras_valid).then_some((name, extras))
}

/// Whether a text is one line of ASCII. Parsers pass over whatever Unicode calls white space, line ends too.
fn printable(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
}

/// A version by PEP 440.
pub fn python_version(text: &str) -> bool {
    text.len() <= VERSION_BYTES
        && text.bytes().all(|byte| byte.is_ascii_graphic())
        && pep440_rs::Version::from_str(text).is_ok()
}

/// A specification by PEP 508 without addresses and markers: `fastmcp<3`, `requests[socks]>=2.28,!=2.30`.
pub fn pip_dependency(text: &str) -> bool {
    let end = text.find(['<', '>', '=', '!', '~']).unwrap_or(text.len());
    let (name, specifiers) = text.split_at(end);
    text.len() <= NAME_BYTES + VERSION_BYTES
        && printable(text)
        && python_name(name.trim_end())
        && (specifiers.is_empty() || pep440_rs::VersionSpecifiers::from_str(specifiers).is_ok())
}

/// The name of a Python module: identifiers with dots.
pub fn python_module(text: &str) -> bool {
    text.len() <= NAME_BYTES
        && text.split('.').all(|part| {
            let mut bytes = part.bytes();
            bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
                && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        })
}

/// The address of an index; the error says what would be valid. Passwords in addresses would end up in
/// logs and lock files, and link-local addresses are those of cloud metadata.
pub fn index_url(text: &str) -> Result<(), &'static str> {
    const RULE: &str = "must be an https address without user name and password";
    let url = Url::parse(text).map_err(|_| RULE)?;
    let plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
    let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
    if text.len() > URL_BYTES || !plain || !printable {
        return Err(RULE);
    }
    let loopback = match url.host() {
        None => return Err(RULE),
        Some(Host::Domain(name)) => name.eq_ignore_ascii_case("localhost"),
        Some(Host::Ipv4(address)) if address.is_link_local() || address.is_unspecified() => return Err(RULE),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => {
            // Every other way to write an IPv4 address is no address of an index.
            if address.to_ipv4().is_some_and(|_| !address.is_loopback()) || address.is_unicast_link_local() {
                return Err(RULE);
            }
            address.is_loopback()
        }
    };
    match url.scheme() {
        "https" => Ok(()),
        "http" if loopback => Ok(()),
        _ => Err(RULE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_npm() {
        for name in ["a", "left-pad", "@scope/name", "@missionsquad/mcp-github", "0x", "a.b_c~d"] {
            assert!(npm_name(name), "{name}");
        }
        let long = "a".repeat(215);
        for name in [
            "",
            "-g",
            "--prefix=/",
            "..",
            ".a",
            "_a",
            "/etc/passwd",
            "@x/../../y",
            "@x/",
            "@/y",
            "@x/.y",
            "@x/y/z",
            "A",
            "a b",
            "a;id",
            "$(id)",
            "a@1",
            "a@file:/etc",
            "git+ssh://x",
            "https://x",
            "Ѕerver",
            "a\n",
            "%2e%2e",
            &long,
        ] {
            assert!(!npm_name(name), "{name}");
        }
    }

    #[test]
    fn versions_of_npm() {
        for version in
            ["1.0.0", "latest", "next", "^1.2", "~1", ">=1 <2 || 3.x", "1.0.0-rc.1+b", "*", "2026.8.31"]
        {
            assert!(npm_version(version), "{version}");
        }
        for version in [
            "",
            "-g",
            "--x",
            "file:/etc",
            "npm:other@1",
            "git+ssh://x",
            "../x",
            "/x",
            "1;id",
            "1|id",
            "1 ||| 2",
            "$(id)",
            "a/b",
            "1\n2",
            "@x",
        ] {
            assert!(!npm_version(version), "{version}");
        }
    }

    #[test]
    fn names_and_specifications_of_python() {
        for name in ["a", "mcp-server-time", "Fast_MCP", "zope.interface", "requests[socks]", "a[b,c-d]"] {
            assert!(python_name(name), "{name}");
        }
        for name in [
            "",
            "-r",
            "--index-url=http://x",
            ".",
            "a/",
            "a b",
            "a@http://x",
            "a;x",
            "a[",
            "a[]",
            "a[b]c",
            "a\n",
            "a[b,\nc]",
            "Ѕ",
        ] {
            assert!(!python_name(name), "{name}");
        }
        for spec in ["fastmcp<3", "requests>=2.28", "a == 1.0", "a[b]~=1.4,!=1.5", "a", "a===1.0"] {
            assert!(pip_dependency(spec), "{spec}");
        }
        for spec in [
            "--index-url=http://evil",
            "-r x",
            "a @ http://x",
            "a; python_version<'3'",
            "a<",
            "a<3;x",
            "../a",
            "a<3 --hash=x",
            "a\n<3",
            "a<3\n",
            "a<3,\n<4",
            "a[b,\nc]",
            "a\u{a0}<3",
        ] {
            assert!(!pip_dependency(spec), "{spec}");
        }
        assert!(
            python_version("1.0rc1")
                && !python_version("latest")
                && !python_version(" 1")
                && !python_version("<3")
        );
        assert!(python_module("a.b_c") && python_module("_x"));
        for module in ["", "os; import x", "a..b", "a-b", "1a", "a b", ".a", "a."] {
            assert!(!python_module(module), "{module}");
        }
    }

    #[test]
    fn addresses_of_indexes() {
        for url in [
            "https://pypi.example.org/simple",
            "http://127.0.0.1:8081/simple/",
            "http://localhost/x",
            "http://[::1]:1/",
        ] {
            assert_eq!(index_url(url), Ok(()), "{url}");
        }
        for url in [
            "",
            "x",
            "ftp://x/",
            "file:///etc",
            "http://pypi.example.org/simple",
            "https://u:p@x/",
            "https://u@x/",
            "http://169.254.169.254/",
            "https://169.254.169.254/",
            "https://[fe80::1]/",
            "https://[::ffff:169.254.169.254]/",
            "https://0.0.0.0/",
            "https://x/#y",
            "https://x/ --y",
            "https://0xa9fea9fe/",
        ] {
            assert!(index_url(url).is_err(), "{url}");
        }
    }
}
