//! The memory of a browser, with all its processes: what they have alone and what they share.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        statfs::{TMPFS_MAGIC, statfs},
        statvfs::statvfs,
    },
    unistd::{AccessFlags, Pid, access},
};

/// Where processes of one machine share memory.
const SHARED_MEMORY: &str = "/dev/shm";
/// Bytes that have to be free there. With less (containers have 64 MiB unless somebody says otherwise) pages crash.
const ROOM: u64 = 256 * 1024 * 1024;
/// How long a killed process may take to give its memory back.
const KILL_TIME: Duration = Duration::from_secs(5);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// Where a browser has the memory that its processes share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shared {
    /// In the system's place for it.
    Memory,
    /// In files below its own folder, which are in memory, too.
    Files,
    /// In files below this folder, its own, which are on a disk. The kernel tells them from no other file that is
    /// mapped, so that they are looked for, and count with all their bytes.
    FilesOnDisk(PathBuf),
}

/// A browser's processes.
pub struct Usage {
    /// Bytes that they have, once each.
    pub bytes: u64,
    /// Every process with its bytes. Of what several share, each has its part.
    processes: Vec<(Pid, u64)>,
}

impl Shared {
    /// Where it is best for a browser with this folder. It asks the file system, so it blocks.
    pub fn of(folder: &Path) -> Self {
        Self::between(Path::new(SHARED_MEMORY), folder)
    }

    fn between(shared_memory: &Path, folder: &Path) -> Self {
        if has_room(shared_memory) {
            return Self::Memory;
        }
        let in_memory = statfs(folder).is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC);
        if in_memory { Self::Files } else { Self::FilesOnDisk(folder.to_owned()) }
    }
}

fn has_room(folder: &Path) -> bool {
    let usable = access(folder, AccessFlags::W_OK | AccessFlags::X_OK).is_ok();
    usable && statvfs(folder).is_ok_and(|disk| disk.blocks_available() * disk.fragment_size() >= ROOM)
}

/// What a process and all that it started take. It reads `/proc`, so it blocks.
///
/// The numbers that the kernel has at hand count memory that is shared for each process that has it. As long as even
/// that is not more than `most` it is taken as it is; only then is the kernel made to go through all that is mapped.
pub fn of(root: u32, most: u64, shared: &Shared) -> Usage {
    let family = family(root);
    let in_files = match shared {
        Shared::FilesOnDisk(folder) => in_files(&family, folder),
        Shared::Memory | Shared::Files => vec![0; family.len()],
    };
    let add = |bytes: fn(i32) -> u64| -> Vec<(Pid, u64)> {
        let each = family.iter().zip(&in_files);
        each.map(|(pid, files)| (Pid::from_raw(*pid), bytes(*pid) + files)).collect()
    };
    let mut processes = add(resident);
    if total(&processes) > most {
        // A process that hides from others of its user (the older sandbox has such) keeps the larger number.
        processes = add(|pid| proportional(pid).unwrap_or_else(|| resident(pid)));
    }
    Usage { bytes: total(&processes), processes }
}

impl Usage {
    /// Ends the page that takes most, and waits for its end: what is on its way out still counts, and must not cost
    /// another page its life. Says whether there was one.
    pub fn end_largest(&self) -> bool {
        let pages = self.processes.iter().filter(|(pid, _)| is_page(*pid));
        let largest = pages.max_by_key(|(_, bytes)| *bytes);
        let Some((pid, _)) = largest.filter(|(pid, _)| kill(*pid, Signal::SIGKILL).is_ok()) else {
            return false;
        };
        let patience = Instant::now() + KILL_TIME;
        while resident(pid.as_raw()) > 0 && Instant::now() < patience {
            std::thread::sleep(LOOK);
        }
        true
    }
}

fn total(processes: &[(Pid, u64)]) -> u64 {
    processes.iter().map(|(_, bytes)| bytes).sum()
}

/// A process and all that came of it.
fn family(root: u32) -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let Some(parent) = parent(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut left = vec![i32::try_from(root).unwrap_or_default()];
    let mut family = Vec::new();
    while let Some(pid) = left.pop() {
        family.push(pid);
        left.extend(children.remove(&pid).unwrap_or_default());
    }
    family
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Whether a process runs pages.
fn is_page(pid: Pid) -> bool {
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| memchr::memmem::find(&line, b"--type=renderer").is_some())
}

/// Bytes that a process has in memory, what it shares included, and without what is in files on a disk.
fn resident(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let counted = ["RssAnon:", "RssShmem:"].into_iter().filter_map(|field| kilobytes(&status, field));
    counted.sum::<u64>() * 1024
}

/// The same with its part of what it shares; `None` where that cannot be seen.
fn proportional(pid: i32) -> Option<u64> {
    let all = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    Some((kilobytes(&all, "Pss_Anon:")? + kilobytes(&all, "Pss_Shmem:")?) * 1024)
}

/// What each process has of the files below a folder: those that several have mapped are shared out among them.
fn in_files(family: &[i32], folder: &Path) -> Vec<u64> {
    let folder = folder.to_string_lossy();
    let mut files: HashMap<String, (u64, Vec<usize>)> = HashMap::new();
    for (at, pid) in family.iter().enumerate() {
        let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        let maps = String::from_utf8_lossy(&maps);
        for (file, end) in maps.lines().filter(|line| line.contains(&*folder)).filter_map(mapped) {
            let (bytes, owners) = files.entry(file).or_default();
            *bytes = end.max(*bytes);
            if owners.last() != Some(&at) {
                owners.push(at);
            }
        }
    }
    let mut shares = vec![0; family.len()];
    for (bytes, owners) in files.values() {
        for at in owners {
            shares[*at] += bytes / owners.len() as u64;
        }
    }
    shares
}

/// Which file is mapped, and up to which of its bytes, by a line of `/proc/PID/maps`:
/// `7f2a4000-7f2b4000 rw-s 00000000 08:01 1234 /path`.
fn mapped(line: &str) -> Option<(String, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    let (_, offset, device, inode) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let bytes = number(to)?.checked_sub(number(from)?)?;
    Some((format!("{device} {inode}"), number(offset)?.checked_add(bytes)?))
}

fn kilobytes(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::unix::process::CommandExt,
        process::{Command, Stdio},
    };

    use nix::sys::signal::killpg;

    use super::*;

    /// Two processes that have the same memory and the same file mapped; each says when it has.
    const SHARES: &str = "
import mmap, os, sys, time
memory = mmap.mmap(-1, 64 << 20)
file = open(sys.argv[1], 'w+b')
file.truncate(64 << 20)
shared = mmap.mmap(file.fileno(), 64 << 20)
os.unlink(sys.argv[1])
os.fork()
for at in range(0, len(memory), 4096):
    memory[at] = 1
os.write(1, b'ready\\n')
time.sleep(600)
";
    const SIZE: u64 = 64 * 1024 * 1024;

    /// A group of processes, which ends with the test, however that ends.
    struct Group(Pid);

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = killpg(self.0, Signal::SIGKILL);
        }
    }

    #[test]
    fn what_is_shared_counts_once() {
        let mut command = Command::new("python3");
        let folder = tempfile::tempdir().unwrap();
        command.args(["-c", SHARES]).arg(folder.path().join("file")).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().expect("python3 is needed");
        let group = Group(Pid::from_raw(i32::try_from(child.id()).unwrap()));
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..2 {
            assert_eq!(lines.next().unwrap().unwrap(), "ready");
        }
        let quick = of(child.id(), u64::MAX, &Shared::Memory);
        let exact = of(child.id(), 0, &Shared::Memory);
        let with_files = of(child.id(), 0, &Shared::FilesOnDisk(folder.path().to_owned()));
        drop(group);
        child.wait().unwrap();
        assert_eq!((quick.processes.len(), exact.processes.len()), (2, 2));
        // The kernel's own count may lag behind a little.
        assert!(quick.bytes > SIZE / 4 * 7, "a quick look counts it twice: {}", quick.bytes);
        assert!((SIZE..SIZE * 3 / 2).contains(&exact.bytes), "{}", exact.bytes);
        assert!(exact.processes.iter().all(|(_, bytes)| *bytes >= SIZE / 2), "each has its part");
        let files = with_files.bytes.checked_sub(exact.bytes).unwrap();
        assert!((SIZE / 8 * 7..SIZE / 8 * 9).contains(&files), "{files}");
    }

    #[test]
    fn shared_memory_is_where_there_is_room() {
        let roomy = tempfile::tempdir().unwrap();
        let (none, full, memory) = (roomy.path().join("none"), Path::new("/proc"), Path::new(SHARED_MEMORY));
        assert_eq!(Shared::between(roomy.path(), memory), Shared::Memory);
        for bad in [none.as_path(), full] {
            assert_eq!(Shared::between(bad, memory), Shared::Files);
            assert_eq!(Shared::between(bad, full), Shared::FilesOnDisk(full.to_owned()));
        }
    }
}
