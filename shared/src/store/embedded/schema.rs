//! Opening the data folder: the lock, the file, its settings and the versions of its schema.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};

use super::OpenError;

const LOCK_FILE: &str = "lock";
pub(super) const DATA_FILE: &str = "mcp-api.db";
const LOG_FILE: &str = "mcp-api.db-wal";

/// How long a statement waits for somebody who works on the file by hand. Shorter than a call waits,
/// so that the caller learns the cause.
pub(super) const BUSY_TIMEOUT: Duration = Duration::from_secs(2);

/// Files up to this size are checked whole when they are opened. A larger one would take longer than
/// a start may; SQLite then reports damage when it reads the page.
const CHECKED_AT_OPEN: u64 = 256 * 1024 * 1024;

/// The schema, step by step: the first `n` steps make version `n`. Steps that were released are never
/// changed; new ones are added at the end.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE servers (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        case_key TEXT NOT NULL UNIQUE,
        revision INTEGER NOT NULL,
        document TEXT NOT NULL
    ) STRICT;
    CREATE TABLE secrets (
        username TEXT NOT NULL,
        key TEXT NOT NULL,
        server_name TEXT NOT NULL REFERENCES servers (name),
        secret_name TEXT NOT NULL,
        value TEXT NOT NULL,
        UNIQUE (username, key)
    ) STRICT;
    -- Serves a user's listing, the number of users of a server, and the deletion of a server.
    CREATE INDEX secrets_by_server ON secrets (server_name, username, secret_name);
    CREATE TABLE tools (
        server TEXT NOT NULL,
        user TEXT NOT NULL, -- empty for the listing that everybody sees
        tools TEXT NOT NULL,
        PRIMARY KEY (server, user)
    ) STRICT;
    CREATE TABLE leases (
        name TEXT NOT NULL PRIMARY KEY,
        owner TEXT,
        fence INTEGER NOT NULL,
        revision INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE facts (
        collection TEXT NOT NULL,
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        PRIMARY KEY (collection, key)
    ) STRICT;
",
    "
    CREATE TABLE documents (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        collection TEXT NOT NULL,
        key TEXT NOT NULL,
        active INTEGER NOT NULL, -- before the document, which may be long
        revision INTEGER NOT NULL,
        document TEXT NOT NULL,
        UNIQUE (collection, key)
    ) STRICT;
    -- Serves listings: a collection in the order in which its documents were added.
    CREATE INDEX documents_in_order ON documents (collection, seq);
",
    "
    ALTER TABLE documents ADD COLUMN server TEXT; -- the field serverName of the document
    -- Only jobs had the field so far, and it is their key.
    UPDATE documents SET server = key WHERE collection = 'jobs';
    CREATE INDEX documents_by_server ON documents (server, collection, seq) WHERE server IS NOT NULL;
",
];

/// An open data folder.
pub(super) struct Opened {
    pub(super) connection: Connection,
    /// Held for as long as the connection is open.
    pub(super) lock: File,
}

/// Locks the folder, opens its file, and brings its schema up to date.
pub(super) fn open(dir: &Path) -> Result<Opened, OpenError> {
    let io_error = |source| OpenError::Io { dir: dir.to_owned(), source };
    create_dir(dir).map_err(io_error)?;
    let lock = private_file(&dir.join(LOCK_FILE)).map_err(io_error)?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(OpenError::Locked { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => return Err(io_error(source)),
    }

    let file = dir.join(DATA_FILE);
    refuse_log_without_data(&file, &dir.join(LOG_FILE))?;
    // SQLite would make the file with the rights that the umask leaves; its log takes the file's.
    let size = private_file(&file).and_then(|data| data.metadata()).map_err(io_error)?.len();
    sync_dir(dir).map_err(io_error)?;
    let connection = prepare(&file, size).map_err(|error| match error {
        PrepareError::Corrupt(what) => OpenError::Corrupt { file: file.clone(), what },
        PrepareError::Newer(found) => OpenError::Newer { file: file.clone(), found, known: known_version() },
        PrepareError::Sqlite(source) if is_damage(&source) => {
            OpenError::Corrupt { file: file.clone(), what: source.to_string() }
        }
        PrepareError::Sqlite(source) => OpenError::Sqlite { file: file.clone(), source },
    })?;
    Ok(Opened { connection, lock })
}

/// Writes the version of the schema that stands there already: a real write that changes nothing.
pub(super) fn rewrite_version(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "user_version", known_version())
}

/// Whether SQLite says that the file itself is damaged.
pub(super) fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

enum PrepareError {
    Corrupt(String),
    Newer(i64),
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for PrepareError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

/// Opens the file. It is judged before anything is written to it.
fn prepare(file: &Path, size: u64) -> Result<Connection, PrepareError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(file, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "cell_size_check", true)?;

    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if !(0..=known_version()).contains(&version) {
        return Err(PrepareError::Newer(version));
    }
    if size <= CHECKED_AT_OPEN {
        let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict != "ok" {
            // The first line only: the verdict on one damaged page may have several.
            return Err(PrepareError::Corrupt(verdict.lines().next().unwrap_or_default().to_owned()));
        }
    }

    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        tracing::warn!(store.journal_mode = %mode, "the file system does not support a write-ahead log");
    }
    // An acknowledged write survives the loss of power: FULL waits for the disk at every commit, and
    // the other two make macOS wait for the disk rather than for its cache.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "fullfsync", true)?;
    connection.pragma_update(None, "checkpoint_fullfsync", true)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    // A log that one large batch made long is cut when its content has moved to the data file.
    connection.query_row("PRAGMA journal_size_limit = 16777216", [], |_| Ok(()))?;

    migrate(&mut connection, version)?;
    // Nobody who held a lease can be alive: holders live in the process that locks the folder, and
    // that is this one now. Waiting for them to fall silent would only delay the start. The fence
    // stays, so the next owner's is higher than that of anything the dead process left behind.
    connection
        .execute("UPDATE leases SET owner = NULL, revision = revision + 1 WHERE owner IS NOT NULL", [])?;
    Ok(connection)
}

fn migrate(connection: &mut Connection, version: i64) -> rusqlite::Result<()> {
    for (step, target) in MIGRATIONS.iter().zip(1_i64..) {
        if target > version {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(step)?;
            transaction.pragma_update(None, "user_version", target)?;
            transaction.commit()?;
        }
    }
    Ok(())
}

fn known_version() -> i64 {
    i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX)
}

/// SQLite deletes a log that it finds beside an empty file. A new store never has one, so the data
/// file was lost, and the log may be all that is left of it.
fn refuse_log_without_data(file: &Path, log: &Path) -> Result<(), OpenError> {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    if size(file) == 0 && size(log) > 0 {
        let what = "it is empty or missing although its write-ahead log is there".to_owned();
        return Err(OpenError::Corrupt { file: file.to_owned(), what });
    }
    Ok(())
}

/// Makes a folder that only its owner may enter. Its parents' entries are written to the disk, else a
/// loss of power could take the whole folder away.
fn create_dir(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create_dir(parent)?;
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        other => other?,
    }
    sync_dir(parent)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Opens a file for writing, made for its owner alone if it does not exist.
fn private_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}
