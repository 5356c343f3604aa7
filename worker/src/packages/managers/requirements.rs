//! Locks of Python packages: versions with the hashes of all files that they may be.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::errors::canonical;

/// What stands before a lock's note on what it was made for.
const MADE_FOR: &str = "# Resolved for ";

/// One package of a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pinned {
    /// Its name as PyPI spells it.
    pub(super) name: String,
    pub(super) version: String,
    /// SHA-256, in hexadecimal digits.
    pub(super) hashes: BTreeSet<String>,
}

/// The name in a specification.
pub(super) fn name(specification: &str) -> &str {
    let end = specification.find(['[', '<', '>', '=', '!', '~', ' ']).unwrap_or(specification.len());
    &specification[..end]
}

/// A lock as text, as pip and uv read it.
pub(super) fn render(pinned: &[Pinned], made_for: &str) -> String {
    let mut text = format!("{MADE_FOR}{made_for}\n");
    for Pinned { name, version, hashes } in pinned {
        text.push_str(&format!("{name}=={version}"));
        for hash in hashes {
            text.push_str(&format!(" \\\n    --hash=sha256:{hash}"));
        }
        text.push('\n');
    }
    text
}

/// What a lock was made for.
pub(super) fn made_for(text: &str) -> Option<String> {
    text.lines().next()?.strip_prefix(MADE_FOR).map(str::to_owned)
}

/// Reads a lock; `None` if anything in it is not a version with hashes.
pub(super) fn read(text: &str) -> Option<Vec<Pinned>> {
    let mut all: Vec<Pinned> = Vec::new();
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_whitespace();
        let (name, version) = words.next()?.split_once("==")?;
        let hashes: Option<BTreeSet<String>> =
            words.map(|word| hash(word.strip_prefix("--hash=sha256:")?)).collect();
        all.push(pin(name, version, hashes?)?);
    }
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Some(all)
}

fn pin(name: &str, version: &str, hashes: BTreeSet<String>) -> Option<Pinned> {
    // Extras do not matter where nothing is added to what stands here.
    let (name, _) = mcp_shared::package::names::split_extras(name)?;
    let valid = mcp_shared::package::names::python_version(version) && !hashes.is_empty();
    valid.then(|| Pinned { name: canonical(name), version: version.to_owned(), hashes })
}

fn hash(text: &str) -> Option<String> {
    let valid = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    valid.then(|| text.to_ascii_lowercase())
}

#[derive(Deserialize)]
struct Report {
    install: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    metadata: Metadata,
    download_info: Download,
    #[serde(default)]
    is_direct: bool,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
    version: String,
}

#[derive(Deserialize)]
struct Download {
    archive_info: Option<Archive>,
}

#[derive(Deserialize)]
struct Archive {
    hash: Option<String>,
    #[serde(default)]
    hashes: std::collections::BTreeMap<String, String>,
}

/// What pip's report says that it would install; `None` if that is not only files of an index.
pub(super) fn of_report(text: &str) -> Option<Vec<Pinned>> {
    let report: Report = serde_json::from_str(text).ok()?;
    let mut all = Vec::new();
    for item in report.install {
        let archive = item.download_info.archive_info.filter(|_| !item.is_direct)?;
        let from_old = archive.hash.as_deref().and_then(|hash| hash.strip_prefix("sha256="));
        let found = archive.hashes.get("sha256").map(String::as_str).or(from_old)?;
        all.push(pin(&item.metadata.name, &item.metadata.version, BTreeSet::from([hash(found)?]))?);
    }
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_survive_being_written_and_read() {
        let (a, b) = ("a".repeat(64), "B".repeat(64));
        let text = format!(
            "# c\nFoo.Bar[x]==1.0 \\\n    --hash=sha256:{a} \\\n    --hash=sha256:{b}\nz==2 --hash=sha256:{a}\n"
        );
        let pinned = read(&text).unwrap();
        assert_eq!((pinned[0].name.as_str(), pinned[0].hashes.len(), pinned.len()), ("foo-bar", 2, 2));
        let rendered = render(&pinned, "Python 3.11, linux x");
        assert_eq!(read(&rendered).unwrap(), pinned);
        assert_eq!(made_for(&rendered).unwrap(), "Python 3.11, linux x");
    }

    #[test]
    fn nothing_else_is_a_lock() {
        let hash = format!("--hash=sha256:{}", "0".repeat(64));
        for line in [
            "a==1",
            "a==1 --hash=md5:00",
            "a>=1 --hash=sha256:00",
            "--index-url=https://x",
            "-r x",
            "a @ https://x",
            "a==1 --global-option=x",
        ] {
            assert_eq!(read(&format!("{line}\n")), None, "{line}");
            assert_eq!(read(&format!("{line} {hash} -e .\n")), None, "{line}");
        }
    }

    #[test]
    fn reports_of_pip() {
        let item = |direct: bool, info: &str| {
            format!(
                r#"{{"install":[{{"is_direct":{direct},"download_info":{info},"metadata":{{"name":"A.b","version":"1"}}}}]}}"#
            )
        };
        let hash = "0".repeat(64);
        let new = format!(r#"{{"url":"x","archive_info":{{"hashes":{{"sha256":"{hash}"}}}}}}"#);
        let old = format!(r#"{{"url":"x","archive_info":{{"hash":"sha256={hash}"}}}}"#);
        for info in [&new, &old] {
            assert_eq!(of_report(&item(false, info)).unwrap()[0].name, "a-b");
            assert_eq!(of_report(&item(true, info)), None);
        }
        assert_eq!(of_report(&item(false, r#"{"url":"x","vcs_info":{}}"#)), None);
    }
}
