//! The file: locked, taken up where it ended, added to, and put aside when it is large.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use super::{
    Action, Entry, Event, Object,
    chain::{self, Tip},
};
use crate::timestamp::Timestamp;

/// How many processes can share a folder.
const PROCESSES: u32 = 64;
/// How far back from its end a file is looked at for its last line.
const TAIL: u64 = 1024 * 1024;
/// Digits of the number in the name of a file that was put aside, so that names sort as numbers do.
const DIGITS: usize = 12;

/// A file that only this process writes.
pub(super) struct Log {
    path: PathBuf,
    file: File,
    /// Which file that is, whatever stands under the path by now.
    identity: (u64, u64),
    /// Bytes of whole lines.
    length: u64,
    /// Whether there may be more in the file than that.
    untidy: bool,
    /// The number of the first line in the file.
    first: u64,
    tip: Tip,
    rotate_at: u64,
    _lock: File,
}

impl Log {
    /// Takes the file, or, where another process has it, the next of that name. The entry says what had to be cut off.
    pub(super) fn open(path: &Path, rotate_at: u64) -> io::Result<(Self, Option<Entry>)> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let (path, lock) = take(path)?;
        let file = open_file(&path)?;
        // Also where it was there before.
        file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
        let before = newest_aside(&path)?;
        let Tail { tip, length, cut } = tail(&file)?;
        let mut first = first_seq(&file, length)?;
        let tip = match (tip, before) {
            (Some(tip), _) => tip,
            // It was put aside, and the next one was not begun yet.
            (None, Some(before)) => tail(&File::open(before)?)?.tip.unwrap_or_default(),
            (None, None) => Tip::default(),
        };
        if length == 0 {
            first = tip.seq + 1;
        }
        let identity = identity(&file)?;
        let mut log =
            Self { path, file, identity, length, untidy: cut.is_some(), first, tip, rotate_at, _lock: lock };
        log.tidy()?;
        sync_folder(&log.path)?;
        let recovered = cut.map(|cut| Entry {
            bytes: Some(cut.len() as u64),
            fragment: Some(chain::hash(&cut)),
            ..Entry::new(Event::Noted, Action::Recovered, Object::default())
        });
        Ok((log, recovered))
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the chain ends.
    pub(super) fn tip(&self) -> &Tip {
        &self.tip
    }

    /// Adds lines: all of them or, after an error, none. With `sync` they are on the disk when this returns. Returns the
    /// number of the first.
    pub(super) fn append<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a Entry>,
        mut dropped: Option<u64>,
        sync: bool,
    ) -> io::Result<u64> {
        self.stay()?;
        self.tidy()?;
        if self.length >= self.rotate_at {
            self.rotate()?;
        }
        let (mut tip, first, now) = (self.tip.clone(), self.tip.seq + 1, Timestamp::now());
        let mut lines = String::new();
        for entry in entries {
            lines.push_str(&tip.extend(entry, dropped.take(), now).map_err(io::Error::other)?);
        }
        self.untidy = true;
        self.file.write_all(lines.as_bytes())?;
        if sync {
            self.file.sync_data()?;
        }
        self.untidy = false;
        self.length += lines.len() as u64;
        self.tip = tip;
        Ok(first)
    }

    /// Has what was added so far on the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Goes on in a new file if somebody moved this one away. A folder that is gone is somebody's mistake, and not made
    /// again: what would be written there nobody would look for.
    fn stay(&mut self) -> io::Result<()> {
        match std::fs::metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == self.identity => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(_) | Err(_) => {}
        }
        let file = open_file(&self.path)?;
        sync_folder(&self.path)?;
        tracing::warn!(path = %self.path.display(), "the audit log was moved away; its chain goes on in a new file");
        self.identity = identity(&file)?;
        let Tail { length, cut, .. } = tail(&file)?;
        (self.file, self.length, self.untidy) = (file, length, cut.is_some());
        self.first = self.tip.seq + 1;
        Ok(())
    }

    /// Removes what an append that failed left behind.
    fn tidy(&mut self) -> io::Result<()> {
        if self.untidy {
            self.file.set_len(self.length)?;
            self.untidy = false;
        }
        Ok(())
    }

    /// Puts the file aside under the number of its first line, and begins the next.
    fn rotate(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        let aside = aside(&self.path, self.first);
        if aside.exists() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is in the way", aside.display()),
            ));
        }
        std::fs::rename(&self.path, &aside)?;
        tracing::info!(path = %aside.display(), seq = self.tip.seq, hash = %self.tip.hash, "an audit log is complete");
        self.file = open_file(&self.path)?;
        self.identity = identity(&self.file)?;
        (self.length, self.first) = (0, self.tip.seq + 1);
        sync_folder(&self.path)
    }
}

/// The first name of which no other process has the lock.
fn take(path: &Path) -> io::Result<(PathBuf, File)> {
    for number in 1..=PROCESSES {
        let path = numbered(path, number);
        let mut name = path.clone().into_os_string();
        name.push(".lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(name)?;
        match lock.try_lock() {
            Ok(()) => return Ok((path, lock)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::WouldBlock, "too many processes write here"))
}

/// `audit.jsonl`, `audit-2.jsonl`, ...
fn numbered(path: &Path, number: u32) -> PathBuf {
    if number == 1 { path.to_owned() } else { between(path, &format!("-{number}")) }
}

/// `audit.000000000001.jsonl`.
fn aside(path: &Path, first: u64) -> PathBuf {
    between(path, &format!(".{first:0DIGITS$}"))
}

/// Puts something between the name of a file and its extension.
fn between(path: &Path, middle: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path.extension().map(|extension| format!(".{}", extension.to_string_lossy()));
    path.with_file_name(format!("{stem}{middle}{}", extension.unwrap_or_default()))
}

/// The files of all processes that wrote under this name: the path of each process' current file, and, oldest first,
/// those that were put aside.
pub(super) fn family(path: &Path) -> io::Result<Vec<(PathBuf, Vec<PathBuf>)>> {
    let mut family = Vec::new();
    for number in 1..=PROCESSES {
        let path = numbered(path, number);
        let aside = set_aside(&path)?;
        if path.exists() || !aside.is_empty() {
            family.push((path, aside));
        }
    }
    Ok(family)
}

/// The path that a file that was put aside had before; that of any other is its own.
pub(super) fn current_of(path: &Path) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    match stem.rsplit_once('.') {
        Some((stem, number)) if is_number(number) => {
            let extension = path.extension().map(|extension| format!(".{}", extension.to_string_lossy()));
            path.with_file_name(format!("{stem}{}", extension.unwrap_or_default()))
        }
        _ => path.to_owned(),
    }
}

fn is_number(text: &str) -> bool {
    text.len() >= DIGITS && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The files that were put aside, oldest first.
fn set_aside(path: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name();
        let candidate = path.with_file_name(name);
        if candidate != path && current_of(&candidate) == path {
            found.push(candidate);
        }
    }
    found.sort();
    Ok(found)
}

fn newest_aside(path: &Path) -> io::Result<Option<PathBuf>> {
    Ok(set_aside(path)?.pop())
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}

/// The end of a file.
struct Tail {
    /// What the last line that can be read makes of the chain.
    tip: Option<Tip>,
    /// Bytes of whole lines.
    length: u64,
    /// What stands behind the last end of line: a line that was being written when its process was killed.
    cut: Option<Vec<u8>>,
}

/// Looks at the end of a file. Whole lines that cannot be read stay where they are: whoever verifies the file has to
/// see them.
fn tail(mut file: &File) -> io::Result<Tail> {
    let size = file.metadata()?.len();
    let from = size.saturating_sub(TAIL);
    file.seek(SeekFrom::Start(from))?;
    let mut end = Vec::new();
    file.take(TAIL).read_to_end(&mut end)?;
    let whole = end.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let tip = end[..whole]
        .split(|byte| *byte == b'\n')
        .rev()
        .filter(|line| !line.is_empty())
        .find_map(|line| chain::read(line).ok().map(|(_, tip)| tip));
    let cut = end.split_off(whole);
    // Whatever this is, it is not ours to write to.
    if tip.is_none() && (from > 0 || whole > 0) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not an audit log"));
    }
    Ok(Tail { tip, length: from + whole as u64, cut: (!cut.is_empty()).then_some(cut) })
}

/// The number of the first line; 0 if that cannot be read.
fn first_seq(mut file: &File, length: u64) -> io::Result<u64> {
    file.seek(SeekFrom::Start(0))?;
    let mut start = Vec::new();
    file.take(length.min(TAIL)).read_to_end(&mut start)?;
    let line = start.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(chain::read(line).map_or(0, |(place, _)| place.seq))
}
