//! Where packages are on this worker's disk.
//!
//! An installation is a folder named after its lock, so that equal ones are one folder and a changed one is
//! another. It is built where it stays, and counts only with its marker, which is written last. Whoever
//! builds or removes one holds its lock file alone, whoever runs it holds it together with others; these
//! are locks of the kernel, so that workers may share a disk and none is left behind by a worker that dies.
//!
//! The documented paths (`packages/<folder>`, `<PYTHON_VENV_DIR>/<server>`) are links to installations, for
//! people. Servers are started with the folder itself: what runs does not change under a process.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use mcp_shared::{
    config::PackageSettings,
    error::{ErrorCode, WorkerError},
    ids::ServerName,
    limits,
    package::{Generation, PackageRef, Runtime},
};
use tokio::task::spawn_blocking;

/// The folder of installations.
const GENERATIONS: &str = ".generations";
/// The folder of what is only needed while something is installed.
const SCRATCH: &str = ".scratch";
/// The file that makes an installation one.
const MARKER: &str = ".mcp-api-complete";
/// How often a lock that somebody else has is tried again.
const AGAIN: Duration = Duration::from_millis(50);

/// The folders of one worker.
pub struct Folders {
    root: PathBuf,
    venvs: Option<PathBuf>,
    /// What runs here, and what was looked for a moment ago.
    installed: Mutex<HashMap<Generation, Weak<Installed>>>,
    /// Of those who want the same one, one builds it.
    turns: Mutex<HashMap<Generation, Weak<tokio::sync::Mutex<()>>>>,
}

/// An installation that is complete. It is not removed while this lives.
#[derive(Debug)]
pub struct Installed {
    /// Which one.
    pub generation: Generation,
    /// Where it is.
    pub folder: PathBuf,
    _shared: File,
}

/// An empty folder that is removed with this.
pub struct Scratch {
    path: PathBuf,
    _alone: File,
}

impl Scratch {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), error.cause = %error, "a folder was not removed");
        }
        let _ = fs::remove_file(self.path.with_extension("lock"));
    }
}

impl Folders {
    /// The folders as the settings have them. Nothing is made yet.
    pub fn new(settings: &PackageSettings) -> Self {
        // Programs are started with these paths, whatever folder they are started in.
        let root = std::path::absolute(&settings.folder).unwrap_or_else(|_| settings.folder.clone());
        let venvs = settings.venv_dir.clone();
        Self { root, venvs, installed: Mutex::default(), turns: Mutex::default() }
    }

    /// The documented path of a package: below `DATA_DIR` for npm, and for Python unless the settings say
    /// where.
    pub fn documented(&self, runtime: Runtime, package: &str, server: &ServerName) -> String {
        match (runtime, &self.venvs) {
            (Runtime::Node, _) => {
                match package.trim_start_matches('@').replace('/', "-").as_str() {
                    // That is where the virtual environments are.
                    "python" => "packages/python-of-npm".to_owned(),
                    folder => format!("packages/{folder}"),
                }
            }
            (Runtime::Python, None) => format!("packages/python/{server}"),
            (Runtime::Python, Some(venvs)) => format!("{}/{server}", venvs.display()),
        }
    }

    /// Finds an installation, or has it built. What is not complete in the end is removed.
    pub async fn acquire(
        &self,
        generation: &Generation,
        build: impl AsyncFnOnce(&Path) -> Result<(), WorkerError>,
    ) -> Result<Arc<Installed>, WorkerError> {
        if let Some(installed) = self.at_hand(generation) {
            return Ok(installed);
        }
        let turn = {
            let mut turns = lock(&self.turns);
            turns.retain(|_, turn| turn.strong_count() > 0);
            turns.get(generation).and_then(Weak::upgrade).unwrap_or_else(|| {
                let turn = Arc::new(tokio::sync::Mutex::default());
                turns.insert(generation.clone(), Arc::downgrade(&turn));
                turn
            })
        };
        let _turn = turn.lock().await;
        if let Some(installed) = self.at_hand(generation) {
            return Ok(installed);
        }
        let folder = self.root.join(GENERATIONS).join(generation.as_str());
        let mut build = Some(build);
        loop {
            let shared = locked(&folder, Hold::Shared).await?;
            if folder.join(MARKER).exists() {
                return Ok(self.remember(generation, folder, shared));
            }
            drop(shared);
            // Not waited for: whoever has it may complete the installation, and keep it from then on.
            let alone = match tried(&folder, Hold::Alone).await? {
                Some(alone) if !folder.join(MARKER).exists() => alone,
                Some(_) => continue,
                None => {
                    tokio::time::sleep(AGAIN).await;
                    continue;
                }
            };
            let Some(build) = build.take() else {
                return Err(WorkerError::internal("an installation vanished as soon as it was there"));
            };
            if self.free_bytes().is_some_and(|free| free < limits::INSTALL_FREE_BYTES) {
                return Err(disk_full());
            }
            made_anew(&folder).await?;
            let built = match build(&folder).await {
                Ok(()) => complete(&folder).await,
                Err(error) => Err(error),
            };
            if let Err(error) = built {
                remove(&folder).await;
                return Err(error);
            }
            drop(alone);
        }
    }

    fn at_hand(&self, generation: &Generation) -> Option<Arc<Installed>> {
        lock(&self.installed).get(generation).and_then(Weak::upgrade)
    }

    fn remember(&self, generation: &Generation, folder: PathBuf, shared: File) -> Arc<Installed> {
        let installed = Arc::new(Installed { generation: generation.clone(), folder, _shared: shared });
        let mut known = lock(&self.installed);
        known.retain(|_, installed| installed.strong_count() > 0);
        known.insert(generation.clone(), Arc::downgrade(&installed));
        installed
    }

    /// An empty folder of this worker's own.
    pub async fn scratch(&self) -> Result<Scratch, WorkerError> {
        let path = self.root.join(SCRATCH).join(uuid::Uuid::new_v4().simple().to_string());
        let alone = locked(&path, Hold::Alone).await?;
        made_anew(&path).await?;
        Ok(Scratch { path, _alone: alone })
    }

    /// Points the documented path at an installation. People look there, and nothing of ours depends on it.
    pub fn link(&self, reference: &PackageRef, installed: &Installed) {
        let link = self.place_of(&reference.path);
        if fs::read_link(&link).is_ok_and(|target| target == installed.folder) {
            return;
        }
        let switch = || -> io::Result<()> {
            if let Some(parent) = link.parent() {
                fs::create_dir_all(parent)?;
            }
            let new = link.with_file_name(format!(".link-{}", uuid::Uuid::new_v4().simple()));
            std::os::unix::fs::symlink(&installed.folder, &new)?;
            // A folder that stands there already, which an earlier program made, is left alone.
            fs::rename(&new, &link).inspect_err(|_| {
                let _ = fs::remove_file(&new);
            })
        };
        if let Err(error) = switch() {
            tracing::warn!(path = %link.display(), error.cause = %error, "a documented path was not made");
        }
    }

    /// Removes installations that nobody keeps or runs, links to what is not there any more, and what
    /// others left behind when they died. It blocks.
    pub fn sweep(&self, keep: &HashSet<Generation>) {
        for folder in folders_in(&self.root.join(GENERATIONS)) {
            let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let kept = Generation::parse(name).is_some_and(|generation| keep.contains(&generation));
            if !kept && remove_unused(&folder) {
                tracing::info!(installation = name, "an installation was removed that nothing runs");
            }
        }
        for folder in folders_in(&self.root.join(SCRATCH)) {
            remove_unused(&folder);
        }
        for place in [GENERATIONS, SCRATCH] {
            for entry in fs::read_dir(self.root.join(place)).into_iter().flatten().flatten() {
                let folder = entry.path().with_extension("");
                if entry.path().extension().is_some_and(|name| name == "lock") && !folder.exists() {
                    // Of an installation that failed.
                    remove_unused(&folder);
                }
            }
        }
        let venvs = self.venvs.clone().unwrap_or_else(|| self.root.join("python"));
        for entry in [&self.root, &venvs].into_iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten()
        {
            let Ok(entry) = entry else { continue };
            let target = fs::read_link(entry.path());
            if target.is_ok_and(|target| target.starts_with(self.root.join(GENERATIONS)) && !target.exists())
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn place_of(&self, documented: &str) -> PathBuf {
        match documented.strip_prefix("packages/") {
            Some(rest) => self.root.join(rest),
            None => PathBuf::from(documented),
        }
    }

    fn free_bytes(&self) -> Option<u64> {
        let stat = nix::sys::statvfs::statvfs(&self.root).ok()?;
        Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Hold {
    Shared,
    Alone,
}

/// Holds the lock file of a folder, and waits for as long as that takes.
async fn locked(folder: &Path, hold: Hold) -> Result<File, WorkerError> {
    loop {
        match tried(folder, hold).await? {
            Some(file) => return Ok(file),
            None => tokio::time::sleep(AGAIN).await,
        }
    }
}

async fn tried(folder: &Path, hold: Hold) -> Result<Option<File>, WorkerError> {
    let folder = folder.to_owned();
    let tried = spawn_blocking(move || try_lock(&folder, hold)).await.map_err(WorkerError::internal)?;
    tried.map_err(|error| of_disk(&error))
}

/// Holds the lock file of a folder; `None`: somebody else does.
fn try_lock(folder: &Path, hold: Hold) -> io::Result<Option<File>> {
    let path = folder.with_extension("lock");
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    let locked = match hold {
        Hold::Shared => file.try_lock_shared(),
        Hold::Alone => file.try_lock(),
    };
    match locked {
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
        Ok(()) => {}
    }
    // Whoever removes an installation removes its lock file, which may have been this one.
    let same = fs::metadata(&path).is_ok_and(|now| file.metadata().is_ok_and(|own| own.ino() == now.ino()));
    Ok(same.then_some(file))
}

/// Removes a folder unless somebody holds it; says whether it did.
fn remove_unused(folder: &Path) -> bool {
    let Ok(Some(_alone)) = try_lock(folder, Hold::Alone) else { return false };
    // Without its marker it is none any more, however far this comes.
    let _ = fs::remove_file(folder.join(MARKER));
    let removed = fs::remove_dir_all(folder);
    if let Err(error) = &removed
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %folder.display(), error.cause = %error, "a folder was not removed");
    }
    let _ = fs::remove_file(folder.with_extension("lock"));
    removed.is_ok()
}

async fn made_anew(folder: &Path) -> Result<(), WorkerError> {
    let folder = folder.to_owned();
    let made = spawn_blocking(move || {
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        fs::create_dir_all(&folder)
    });
    made.await.map_err(WorkerError::internal)?.map_err(|error| of_disk(&error))
}

/// Marks an installation as complete, when all of it is on the disk.
async fn complete(folder: &Path) -> Result<(), WorkerError> {
    let folder = folder.to_owned();
    let marked = spawn_blocking(move || -> io::Result<()> {
        // One call instead of one for each of thousands of files: what is in the folder before its marker.
        nix::unistd::syncfs(File::open(&folder)?).map_err(io::Error::from)?;
        File::create_new(folder.join(MARKER))?.sync_all()?;
        File::open(&folder)?.sync_all()
    });
    marked.await.map_err(WorkerError::internal)?.map_err(|error| of_disk(&error))
}

async fn remove(folder: &Path) {
    let path = folder.to_owned();
    if let Ok(Err(error)) = spawn_blocking(move || fs::remove_dir_all(path)).await {
        tracing::warn!(path = %folder.display(), error.cause = %error, "a folder was not removed");
    }
}

fn folders_in(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// What a failure of the disk means for whoever wanted the package.
pub fn of_disk(error: &io::Error) -> WorkerError {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => disk_full(),
        _ => {
            tracing::error!(error.cause = %error, "the folder of packages cannot be used");
            WorkerError::new(ErrorCode::InstallFailed, "The folder of packages cannot be used on this worker")
        }
    }
}

fn disk_full() -> WorkerError {
    WorkerError::new(ErrorCode::DiskFull, "The disk of the worker has no room for another package")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn folders(root: &Path) -> Folders {
        Folders::new(&PackageSettings { folder: root.to_owned(), ..PackageSettings::default() })
    }

    fn generation(digit: char) -> Generation {
        Generation::parse(&format!("node-{}", digit.to_string().repeat(24))).unwrap()
    }

    async fn built(folders: &Folders, generation: &Generation) -> Arc<Installed> {
        let build = async |folder: &Path| {
            fs::write(folder.join("file"), "x").unwrap();
            Ok(())
        };
        folders.acquire(generation, build).await.unwrap()
    }

    #[tokio::test]
    async fn one_builds_and_the_others_find_it() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (folders(root.path()), folders(root.path()));
        let count = AtomicUsize::new(0);
        let build = async |folders: &Folders| {
            let build = async |folder: &Path| {
                count.fetch_add(1, Ordering::Relaxed);
                assert!(fs::read_dir(folder).unwrap().next().is_none());
                tokio::time::sleep(AGAIN).await;
                fs::write(folder.join("file"), "x").unwrap();
                Ok(())
            };
            folders.acquire(&generation('a'), build).await.unwrap()
        };
        let (a, b, c) = tokio::join!(build(&one), build(&one), build(&other));
        assert_eq!(count.load(Ordering::Relaxed), 1);
        assert!(Arc::ptr_eq(&a, &b) && a.folder == c.folder && a.folder.join("file").exists());
    }

    #[tokio::test]
    async fn what_is_not_complete_is_none() {
        let root = tempfile::tempdir().unwrap();
        let folders = folders(root.path());
        let half = generation('b');
        let failed = folders.acquire(&half, async |folder: &Path| {
            fs::write(folder.join("half"), "x").unwrap();
            Err(WorkerError::new(ErrorCode::RegistryUnavailable, "gone"))
        });
        assert_eq!(failed.await.unwrap_err().code, ErrorCode::RegistryUnavailable);
        folders.sweep(&HashSet::new());
        assert_eq!(fs::read_dir(root.path().join(GENERATIONS)).unwrap().count(), 0);
        assert!(folders_in(&root.path().join(GENERATIONS)).is_empty());
        // A worker that died left something behind.
        let path = root.path().join(GENERATIONS).join(half.as_str());
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("half"), "x").unwrap();
        let installed = built(&folders, &half).await;
        assert!(!installed.folder.join("half").exists() && installed.folder.join("file").exists());
    }

    #[tokio::test]
    async fn what_nobody_keeps_or_runs_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (folders(root.path()), folders(root.path()));
        let (kept, runs, neither) = (generation('1'), generation('2'), generation('3'));
        for one_of in [&kept, &neither] {
            built(&one, one_of).await;
        }
        let running = built(&one, &runs).await;
        let reference = |generation: &Generation, name: &str| PackageRef {
            generation: generation.clone(),
            runtime: Runtime::Node,
            path: format!("packages/{name}"),
        };
        one.link(&reference(&runs, "runs"), &running);
        let gone = built(&one, &neither).await;
        one.link(&reference(&neither, "gone"), &gone);
        drop(gone);
        let scratch = one.scratch().await.unwrap();
        other.sweep(&HashSet::from([kept.clone()]));
        let left: HashSet<_> = folders_in(&root.path().join(GENERATIONS)).into_iter().collect();
        let path = |generation: &Generation| root.path().join(GENERATIONS).join(generation.as_str());
        assert_eq!(left, HashSet::from([path(&kept), path(&runs)]));
        assert!(root.path().join("runs/file").exists() && fs::read_link(root.path().join("gone")).is_err());
        assert!(scratch.path().exists());
        drop((running, scratch));
        other.sweep(&HashSet::new());
        assert!(folders_in(&root.path().join(GENERATIONS)).is_empty());
        assert!(folders_in(&root.path().join(SCRATCH)).is_empty());
        assert_eq!(fs::read_dir(root.path().join(GENERATIONS)).unwrap().count(), 0, "no lock files either");
    }

    #[tokio::test]
    async fn a_link_is_switched_and_a_folder_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let folders = folders(root.path());
        let reference = PackageRef {
            generation: generation('4'),
            runtime: Runtime::Node,
            path: folders.documented(Runtime::Node, "@scope/name", &ServerName::from_stored("s")),
        };
        assert_eq!(reference.path, "packages/scope-name");
        for digit in ['4', '5'] {
            let installed = built(&folders, &generation(digit)).await;
            folders.link(&reference, &installed);
            assert_eq!(fs::read_link(root.path().join("scope-name")).unwrap(), installed.folder);
        }
        let old = root.path().join("old");
        fs::create_dir_all(old.join("node_modules")).unwrap();
        let installed = built(&folders, &generation('4')).await;
        folders.link(&PackageRef { path: "packages/old".to_owned(), ..reference }, &installed);
        assert!(old.join("node_modules").is_dir());
    }
}
