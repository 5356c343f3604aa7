//! Which of two versions is newer: by semver for npm, by PEP 440 for Python.

use std::{cmp::Ordering, str::FromStr};

use super::Runtime;

/// Compares two versions; `None` where one of them cannot be understood.
pub fn compare(runtime: Runtime, one: &str, other: &str) -> Option<Ordering> {
    match runtime {
        // Numbers behind the `+` have no meaning.
        Runtime::Node => {
            Some(semver::Version::parse(one).ok()?.cmp_precedence(&semver::Version::parse(other).ok()?))
        }
        Runtime::Python => {
            Some(pep440_rs::Version::from_str(one).ok()?.cmp(&pep440_rs::Version::from_str(other).ok()?))
        }
    }
}

/// Whether `latest` is newer than `current`. Of versions that nobody understands, other ones are newer.
pub fn is_newer(runtime: Runtime, latest: &str, current: &str) -> bool {
    match compare(runtime, latest, current) {
        Some(order) => order == Ordering::Greater,
        None => latest != current,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_and_not_text() {
        for (runtime, newer, older) in [
            (Runtime::Node, "1.10.0", "1.9.0"),
            (Runtime::Node, "2026.8.31", "2026.1.14"),
            (Runtime::Node, "1.0.0", "1.0.0-rc.1"),
            (Runtime::Node, "1.0.0-rc.10", "1.0.0-rc.9"),
            (Runtime::Python, "1.10", "1.9.9"),
            (Runtime::Python, "1.0", "1.0rc1"),
            (Runtime::Python, "1.0.post1", "1.0"),
            (Runtime::Python, "1!0.1", "2026.1"),
        ] {
            assert!(is_newer(runtime, newer, older), "{newer} {older}");
            assert!(!is_newer(runtime, older, newer), "{newer} {older}");
        }
        assert!(!is_newer(Runtime::Python, "1.0", "1.0.0"), "the same");
        assert!(!is_newer(Runtime::Node, "1.0.0+b", "1.0.0+a"));
        assert!(is_newer(Runtime::Node, "1.0.0", "latest"), "what mcp-api wrote is never current");
    }
}
