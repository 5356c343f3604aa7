//! Whether a log is as it was written.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use super::{
    chain::{self, Tip},
    file,
};

/// Bytes that a line may have. None of ours is nearly as long.
const LINE: u64 = 1024 * 1024;

/// The files of one chain, oldest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The files.
    pub files: Vec<PathBuf>,
}

/// A chain that is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// How many lines it has.
    pub lines: u64,
    /// The number of the first.
    pub first: u64,
    /// The number of the last.
    pub last: u64,
    /// The hash of the last.
    pub hash: String,
    /// Bytes of a line behind that: one that is being written, or that was when its process was killed.
    pub unfinished: u64,
}

/// The first thing that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Unreadable {
        /// Which one.
        file: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// A line is not as it was written, or not where.
    #[error("{file}: line {line}: {what}")]
    Line {
        /// In which file.
        file: PathBuf,
        /// Which line of it, beginning with 1.
        line: u64,
        /// What is wrong with it.
        what: String,
    },
}

/// The chains of some files, or, of none, all that were written where the path says.
pub fn chains(files: &[PathBuf], path: &Path) -> io::Result<Vec<Chain>> {
    if files.is_empty() {
        let family = file::family(path)?.into_iter();
        return Ok(family
            .map(|(current, mut files)| {
                files.extend(current.exists().then_some(current));
                Chain { files }
            })
            .collect());
    }
    let mut chains = BTreeMap::<PathBuf, Vec<PathBuf>>::new();
    for path in files {
        chains.entry(file::current_of(path)).or_default().push(path.clone());
    }
    Ok(chains
        .into_iter()
        .map(|(current, mut files)| {
            // The numbers of those that were put aside have equal lengths; the current one is the last.
            files.sort_by_key(|path| (*path == current, path.clone()));
            files.dedup();
            Chain { files }
        })
        .collect())
}

/// Reads a chain from its first line to its last.
pub fn verify(chain: &Chain) -> Result<Verified, Fault> {
    let mut found = Verified { lines: 0, first: 0, last: 0, hash: Tip::default().hash, unfinished: 0 };
    let mut tip: Option<Tip> = None;
    for file in &chain.files {
        let unreadable = |source| Fault::Unreadable { file: file.clone(), source };
        let mut reader = BufReader::new(File::open(file).map_err(unreadable)?);
        for number in 1.. {
            let wrong = |what: String| Fault::Line { file: file.clone(), line: number, what };
            let mut line = Vec::new();
            if (&mut reader).take(LINE).read_until(b'\n', &mut line).map_err(unreadable)? == 0 {
                break;
            }
            if found.unfinished > 0 {
                return Err(wrong("the file before it does not end with its last line".to_owned()));
            }
            if line.pop_if(|byte| *byte == b'\n').is_none() {
                if line.len() as u64 + 1 >= LINE {
                    return Err(wrong("it is longer than any that is written".to_owned()));
                }
                found.unfinished = line.len() as u64;
                break;
            }
            let (place, next) = chain::read(&line).map_err(|what| wrong(what.to_owned()))?;
            match &tip {
                Some(tip) if place.prev != tip.hash || place.seq != tip.seq + 1 => {
                    return Err(wrong(format!(
                        "it is number {} and does not follow number {}: what stood between or before was removed, \
                         added or changed",
                        place.seq, tip.seq
                    )));
                }
                // What came before a chain's first line may have been put away.
                None if place.seq == 1 && place.prev != Tip::default().hash => {
                    return Err(wrong(
                        "it says that it is the first, and that another stood before it".to_owned(),
                    ));
                }
                None => found.first = place.seq,
                Some(_) => {}
            }
            found.lines += 1;
            found.last = next.seq;
            tip = Some(next);
        }
    }
    if let Some(tip) = tip {
        found.hash = tip.hash;
    }
    Ok(found)
}
