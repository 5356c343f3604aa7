//! Where a node's keys are, and how they are read again while it runs.

use std::{
    fs::{OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use secrecy::{ExposeSecret, SecretString};
use tokio::{
    sync::Mutex,
    time::{Duration, Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use super::NodeError;
use crate::{
    config::Settings,
    crypter::{KeyError, RingText, TEXT_KID, generate_key_line},
    fleet::NodeReport,
    lifecycle::{Hangup, Hangups, explain},
    limits::KEYS_PATIENCE,
    vault::{KeySource, NewKeys, Vault},
    worker_api::WorkerApi,
};

/// The file with the generated key, below `DATA_DIR`.
pub const KEY_FILE: &str = "secrets.key";
/// How often the fleet is looked at again that does not have the keys yet.
const AGAIN: Duration = Duration::from_millis(200);

/// Where the keys of a node are: in a file, in `SECRETS_KEY`, or in both.
#[derive(Debug, Clone)]
pub struct KeyPlace {
    text: Option<SecretString>,
    file: Option<PathBuf>,
    /// Where a key is that was generated here.
    generated: PathBuf,
}

impl KeyPlace {
    /// As the settings have it.
    pub fn of(settings: &Settings) -> Self {
        Self {
            text: settings.secrets_key.clone(),
            file: settings.secrets_keys_file.clone(),
            generated: settings.data_dir.join(KEY_FILE),
        }
    }

    /// The file of the key ring. `None` where `SECRETS_KEY` alone has the key.
    pub fn file(&self) -> Option<&Path> {
        match (&self.file, &self.text) {
            (Some(file), _) => Some(file),
            (None, None) => Some(&self.generated),
            (None, Some(_)) => None,
        }
    }

    /// Where the keys come from, for messages about them.
    pub fn shown(&self) -> String {
        match (&self.file, &self.text) {
            (Some(file), _) => format!("SECRETS_KEYS_FILE ({})", file.display()),
            (None, Some(_)) => "SECRETS_KEY".to_owned(),
            (None, None) => self.generated.display().to_string(),
        }
    }

    /// Reads the keys as they are now. `None`: there is no generated key yet. A file that cannot be read is a
    /// mistake in the settings, not a fault that passes.
    pub fn read(&self) -> Result<Option<KeySource>, NodeError> {
        let Some(file) = self.file() else { return Ok(self.text.clone().map(KeySource::Text)) };
        if self.file.is_none() && !file.exists() {
            return Ok(None);
        }
        let ring = read(file)
            .map_err(|error| NodeError::Key(format!("{} cannot be read: {error}", self.shown())))?;
        Ok(Some(match &self.text {
            Some(text) => KeySource::Both { ring, text: text.clone() },
            None => KeySource::RingFile(ring),
        }))
    }

    /// Makes a new key where only the owner can read it; says where.
    pub(super) fn generate(&self) -> Result<&Path, NodeError> {
        let key = |error: KeyError| NodeError::Key(error.to_string());
        let line = generate_key_line(TEXT_KID).map_err(key)?;
        let ring = RingText::new(String::new().into()).with(&line).map_err(key)?;
        let path = self.generated.as_path();
        // The embedded store has made its folder; with MongoDB the key may be the first thing in it.
        let folder = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        let written = folder.and_then(|()| write_ring(path, &ring));
        written.map_err(|source| NodeError::File { path: path.to_owned(), source })?;
        Ok(path)
    }

    /// Changes the key ring's file.
    pub fn change(
        &self,
        change: impl FnOnce(&RingText) -> Result<RingText, KeyError>,
    ) -> Result<(), NodeError> {
        let file = self.file_to_change()?;
        let changed = change(&self.ring()?);
        let changed = changed.map_err(|error| NodeError::Key(format!("{}: {error}", self.shown())))?;
        write_ring(file, &changed).map_err(|source| NodeError::File { path: file.to_owned(), source })
    }

    /// The key ring as its file has it.
    pub fn ring(&self) -> Result<RingText, NodeError> {
        let file = self.file_to_change()?;
        let read = read(file).map_err(|source| NodeError::File { path: file.to_owned(), source })?;
        Ok(RingText::new(read))
    }

    fn file_to_change(&self) -> Result<&Path, NodeError> {
        self.file().ok_or_else(|| {
            NodeError::Key(
                "SECRETS_KEY holds one key, which cannot be changed while programs run: put the line \
                 `k1:SECRETS_KEY` into a file, name that in SECRETS_KEYS_FILE, keep SECRETS_KEY, and start anew"
                    .to_owned(),
            )
        })
    }
}

/// Makes a key ring with one new key where only the owner can read it, unless there is one.
pub fn make_key(path: &Path) -> Result<(), NodeError> {
    if path.exists() {
        return Ok(());
    }
    KeyPlace { text: None, file: None, generated: path.to_owned() }.generate().map(drop)
}

fn read(path: &Path) -> io::Result<SecretString> {
    let contents = std::fs::read_to_string(path).map(SecretString::from)?;
    if std::fs::metadata(path)?.permissions().mode() & 0o004 != 0 {
        tracing::warn!(path = %path.display(), "every user of this machine can read the keys: chmod 600 it");
    }
    Ok(contents)
}

/// Writes a key ring in the place of the one that is there, whose owner and rights stay as they are; a new one
/// is its owner's alone. It stands there as a whole or not at all.
fn write_ring(path: &Path, ring: &RingText) -> io::Result<()> {
    let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    // A link stays one: what it leads to is replaced.
    let path = match path.canonicalize() {
        Err(error) if missing(&error) => path.to_owned(),
        found => found?,
    };
    let old = match std::fs::metadata(&path) {
        Err(error) if missing(&error) => None,
        found => Some(found?),
    };
    let staged = path.with_extension("new");
    match std::fs::remove_file(&staged) {
        Err(error) if !missing(&error) => return Err(error),
        _ => {}
    }
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&staged)?;
        if let Some(old) = &old {
            let new = file.metadata()?;
            if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
                // Or the program that reads the file could not read it any more.
                std::os::unix::fs::fchown(&file, Some(old.uid()), Some(old.gid()))?;
            }
            file.set_permissions(Permissions::from_mode(old.mode() & 0o777))?;
        }
        file.write_all(ring.contents().expose_secret().as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&staged, &path)?;
        match path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            Some(folder) => std::fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    write().inspect_err(|_| drop(std::fs::remove_file(&staged)))
}

/// Reads a node's keys again while it runs. Nothing waits for it: calls go on with the keys that were there, and
/// then with the new ones. Keys that do not fit are refused, and the old ones stay.
pub struct Reloader {
    place: KeyPlace,
    vault: Vault,
    me: NodeReport,
    /// Those who must have the key that encrypts; `None` where there are no others.
    fleet: Option<Arc<dyn WorkerApi>>,
    one_at_a_time: Mutex<()>,
}

impl Reloader {
    /// For a node that describes itself as `me`.
    pub fn new(
        settings: &Settings,
        vault: &Vault,
        me: &NodeReport,
        fleet: Option<Arc<dyn WorkerApi>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            place: KeyPlace::of(settings),
            vault: vault.clone(),
            me: me.clone(),
            fleet,
            one_at_a_time: Mutex::new(()),
        })
    }

    /// Where the keys come from, for people.
    pub fn shown(&self) -> String {
        self.place.shown()
    }

    /// The nodes that are heard, other than this one.
    pub async fn others(&self) -> Result<Vec<NodeReport>, NodeError> {
        let Some(fleet) = &self.fleet else { return Ok(Vec::new()) };
        let unheard = |cause: &dyn std::fmt::Display| NodeError::BusUnreachable {
            servers: "the bus".to_owned(),
            cause: format!("the other nodes cannot be asked for their keys: {cause}"),
        };
        // A view of the fleet is worth nothing while nobody is heard.
        if let Err(error) = fleet.ready().await
            && error.code == crate::error::ErrorCode::BusUnavailable
        {
            return Err(unheard(&error.message));
        }
        let fleet = fleet.fleet().await.map_err(|error| unheard(&error.message))?;
        let nodes = fleet.workers.into_iter().chain(fleet.gateways).map(|node| node.report);
        Ok(nodes.filter(|node| node.id != self.me.id).collect())
    }

    /// Reads the keys, holds them against the store and the fleet, and goes on with them. Says which they are,
    /// the one that encrypts first.
    pub async fn reload(&self) -> Result<Vec<String>, NodeError> {
        let _turn = self.one_at_a_time.lock().await;
        if self.place.file().is_none() {
            return Err(NodeError::Key(
                "SECRETS_KEY is read at the start only; a key ring's file can be read anew".to_owned(),
            ));
        }
        let source = self.place.read()?;
        let source = source.ok_or_else(|| NodeError::Key(format!("{} is gone", self.place.shown())))?;
        let named = |error| super::named_by(&self.place, error);
        let new = self.vault.read_keys(source).await.map_err(named)?;
        self.agree(&new).await?;
        self.vault.record_keys(&new).await.map_err(named)?;
        // Whoever joined between the two has heard of the key from the store by now, or is heard.
        self.agree(&new).await?;
        let kids = new.kids();
        self.vault.use_keys(new);
        tracing::info!(keys = ?kids, "the keys were read anew; the first one encrypts");
        Ok(kids)
    }

    /// Waits until all nodes that are heard can read what this one writes, and this one what they write.
    async fn agree(&self, new: &NewKeys) -> Result<(), NodeError> {
        let deadline = Instant::now() + KEYS_PATIENCE;
        let me = NodeReport { keys: new.kids(), ..self.me.clone() };
        loop {
            let others = self.others().await?;
            let Some(why) = others.iter().find_map(|other| me.disagreement(other)) else { return Ok(()) };
            // Others may have read their keys anew as well, and their next beat says so.
            if Instant::now() >= deadline {
                return Err(NodeError::Key(format!("{}: {why}", self.place.shown())));
            }
            sleep(AGAIN).await;
        }
    }

    /// Reads the keys anew at every SIGHUP, until `stop`. The terminal's end is a reason to stop.
    pub async fn serve(self: Arc<Self>, mut hangups: Hangups, stop: CancellationToken) {
        loop {
            let hangup = tokio::select! {
                hangup = hangups.next() => hangup,
                () = stop.cancelled() => return,
            };
            match hangup {
                Hangup::Terminal => {
                    tracing::info!("stopping: the terminal is gone");
                    return stop.cancel();
                }
                Hangup::Signal => {
                    if let Err(error) = self.reload().await {
                        tracing::error!(error.cause = %explain(&error), "the keys were not read anew: the old ones stay");
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(text: &str) -> RingText {
        RingText::new(text.into())
    }

    #[test]
    fn a_ring_keeps_its_rights_and_its_links() {
        let folder = tempfile::TempDir::new().unwrap();
        let (path, link) = (folder.path().join("ring"), folder.path().join("link"));
        write_ring(&path, &ring("k1:A\n")).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, Permissions::from_mode(0o440)).unwrap();
        std::os::unix::fs::symlink("ring", &link).unwrap();
        write_ring(&link, &ring("k2:B\n")).unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o440);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "k2:B\n");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside it");
    }
}
