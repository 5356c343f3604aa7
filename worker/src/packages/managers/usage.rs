//! How much is in a folder.

use std::{collections::HashSet, os::unix::fs::MetadataExt, path::Path};

/// What a folder holds, with all that is below it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) bytes: u64,
    pub(super) files: u64,
}

/// Counts what a folder holds. Links are not followed, files of several names count once, and what
/// vanishes meanwhile does not count. It stops where there are more than so many files.
pub(super) fn measure(folder: &Path, most: u64) -> Usage {
    let (mut usage, mut seen) = (Usage::default(), HashSet::new());
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            // This does not follow links.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.nlink() > 1 && !metadata.is_dir() && !seen.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            usage.files += 1;
            if metadata.is_dir() {
                folders.push(entry.path());
            } else {
                usage.bytes += metadata.len();
            }
        }
        if usage.files > most {
            break;
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_counts_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        std::fs::create_dir(path.join("a")).unwrap();
        std::fs::write(path.join("a/b"), "12345").unwrap();
        std::fs::hard_link(path.join("a/b"), path.join("c")).unwrap();
        std::os::unix::fs::symlink("/", path.join("d")).unwrap();
        assert_eq!(measure(path, 100), Usage { bytes: 5 + 1, files: 3 });
        assert_eq!(measure(&path.join("none"), 100), Usage::default());
    }
}
