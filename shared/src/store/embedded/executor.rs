//! The thread that owns the connection. What is queued when it looks is one batch: first the reads,
//! each on its own, then all writes in one transaction with one wait for the disk.
//!
//! Reads go first because nothing of the batch is acknowledged yet: they may as well see the state
//! before it, so they neither wait for the disk nor see what might be rolled back.

use std::{
    fs::File,
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rusqlite::{Connection, ErrorCode, ffi};
use tokio::sync::{mpsc, oneshot};

use super::{
    StoreError,
    schema::{self, Opened},
};

/// The most commands in one transaction, so that the first does not wait too long for the last.
const BATCH: usize = 64;

/// What callers and the thread both see.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Writing commands that took effect.
    pub(super) writes: AtomicU64,
    /// Transactions that changed something.
    pub(super) commits: AtomicU64,
    /// Whether the disk refused the last write.
    pub(super) failing: AtomicBool,
}

/// What is sent to the thread.
pub(super) enum Message {
    /// A command.
    Run(Box<dyn Command>),
    /// Finish what came before and end.
    Close,
}

/// Whether a command writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
}

/// Why a command failed: by its own judgement, or by SQLite's.
pub(super) enum Failure {
    Store(StoreError),
    Sqlite(rusqlite::Error),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

/// A queued call of whatever type.
pub(super) trait Command: Send {
    fn kind(&self) -> Kind;
    /// Whether nobody waits for the answer any more.
    fn given_up(&self) -> bool;
    /// Runs it and keeps the outcome.
    fn run(&mut self, connection: &Connection, dir: &Path);
    /// The error it ended with.
    fn error(&self) -> Option<&StoreError>;
    /// Sends the outcome, if it ran.
    fn reply(self: Box<Self>);
    /// Sends an error in place of the outcome.
    fn fail(self: Box<Self>, error: StoreError);
}

/// A call that answers with a `T`.
pub(super) struct Call<T, F> {
    kind: Kind,
    run: Option<F>,
    outcome: Option<Result<T, StoreError>>,
    reply: oneshot::Sender<Result<T, StoreError>>,
}

impl<T, F> Call<T, F> {
    pub(super) fn new(kind: Kind, run: F, reply: oneshot::Sender<Result<T, StoreError>>) -> Self {
        Self { kind, run: Some(run), outcome: None, reply }
    }
}

impl<T, F> Command for Call<T, F>
where
    T: Send,
    F: FnOnce(&Connection) -> Result<T, Failure> + Send,
{
    fn kind(&self) -> Kind {
        self.kind
    }

    fn given_up(&self) -> bool {
        self.reply.is_closed()
    }

    fn run(&mut self, connection: &Connection, dir: &Path) {
        let Some(run) = self.run.take() else { return };
        // A fault in one command must not take the store away from all others. Unwinding drops the
        // command's statements, and its savepoint is rolled back like that of any that fails.
        self.outcome = Some(match catch_unwind(AssertUnwindSafe(|| run(connection))) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Failure::Store(error))) => Err(error),
            Ok(Err(Failure::Sqlite(error))) => Err(classify(&error, dir)),
            Err(_) => Err(StoreError::Unavailable { cause: "a command of the store panicked".to_owned() }),
        });
    }

    fn error(&self) -> Option<&StoreError> {
        self.outcome.as_ref().and_then(|outcome| outcome.as_ref().err())
    }

    fn reply(self: Box<Self>) {
        if let Some(outcome) = self.outcome {
            // An error means that the caller has left, and then nobody needs the answer.
            let _ = self.reply.send(outcome);
        }
    }

    fn fail(self: Box<Self>, error: StoreError) {
        let _ = self.reply.send(Err(error));
    }
}

/// The thread's state.
pub(super) struct Executor {
    connection: Connection,
    lock: File,
    dir: PathBuf,
    shared: Arc<Shared>,
}

impl Executor {
    pub(super) fn new(opened: Opened, dir: PathBuf, shared: Arc<Shared>) -> Self {
        Self { connection: opened.connection, lock: opened.lock, dir, shared }
    }

    /// Works until it is told to close or nobody is left to send.
    pub(super) fn run(self, mut receiver: mpsc::Receiver<Message>) {
        let mut open = true;
        while open && let Some(first) = receiver.blocking_recv() {
            let mut writes = Vec::new();
            let mut next = Some(first);
            let mut taken = 0;
            while let Some(message) = next.take() {
                match message {
                    Message::Close => open = false,
                    Message::Run(command) if command.kind() == Kind::Write => writes.push(command),
                    Message::Run(command) => self.read(command),
                }
                taken += 1;
                if open && taken < BATCH {
                    next = receiver.try_recv().ok();
                }
            }
            if !writes.is_empty() {
                self.write_together(writes);
            }
        }
        let Self { connection, lock, .. } = self;
        close(connection);
        // Only now may another process open the file; and who waits for the queue's end may rely on it.
        drop(lock);
        drop(receiver);
    }

    fn read(&self, mut command: Box<dyn Command>) {
        if !command.given_up() {
            command.run(&self.connection, &self.dir);
            command.reply();
        }
    }

    /// Runs writes in one transaction, and answers when it is on the disk.
    fn write_together(&self, mut batch: Vec<Box<dyn Command>>) {
        let changes = self.connection.total_changes();
        match self.transaction(&mut batch) {
            Ok(done) => {
                if self.connection.total_changes() != changes {
                    self.shared.commits.fetch_add(1, Ordering::Relaxed);
                }
                self.shared.writes.fetch_add(done, Ordering::Relaxed);
                self.note(batch.iter().filter_map(|command| command.error()).find(|error| is_outage(error)));
                for command in batch {
                    command.reply();
                }
            }
            Err(error) => {
                if !self.connection.is_autocommit()
                    && let Err(cause) = self.connection.execute_batch("ROLLBACK")
                {
                    tracing::error!(error.cause = %cause, "a transaction of the store was not rolled back");
                }
                self.note(Some(&error));
                // Also those get the error that had another outcome: they may have met what a
                // neighbour wrote, and that is gone.
                for command in batch {
                    command.fail(copy(&error));
                }
            }
        }
    }

    /// Runs the writes, each in a savepoint, so that one that fails takes back only its own changes.
    /// Returns how many took effect. After an error none did.
    fn transaction(&self, batch: &mut [Box<dyn Command>]) -> Result<u64, StoreError> {
        // The write lock at once: one that is asked for later can be refused without a wait.
        self.execute("BEGIN IMMEDIATE")?;
        let mut done = 0;
        for command in batch.iter_mut().filter(|command| !command.given_up()) {
            self.execute("SAVEPOINT command")?;
            command.run(&self.connection, &self.dir);
            let error = command.error();
            // A full disk and some other faults make SQLite roll back the whole transaction.
            if self.connection.is_autocommit() {
                let lost = || StoreError::Unavailable { cause: "the transaction was rolled back".to_owned() };
                return Err(error.map_or_else(lost, copy));
            }
            if error.is_some() {
                self.execute("ROLLBACK TO command; RELEASE command")?;
            } else {
                self.execute("RELEASE command")?;
                done += 1;
            }
        }
        self.execute("COMMIT")?;
        Ok(done)
    }

    fn execute(&self, sql: &str) -> Result<(), StoreError> {
        self.connection.execute_batch(sql).map_err(|error| classify(&error, &self.dir))
    }

    /// Remembers whether writes fail, and logs when that changes.
    fn note(&self, outage: Option<&StoreError>) {
        let before = self.shared.failing.swap(outage.is_some(), Ordering::Relaxed);
        match outage {
            Some(StoreError::Unavailable { cause }) if !before => {
                tracing::error!(error.cause = %cause, "the store cannot be written");
            }
            Some(error) if !before => tracing::error!(error.cause = %error, "the store cannot be written"),
            None if before => tracing::info!("the store can be written again"),
            _ => {}
        }
    }
}

/// Moves the log into the data file. What is committed is safe in the log already, so a failure only
/// costs time at the next start.
fn close(connection: Connection) {
    let moved = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
    let closed = connection.close().map_err(|(_, error)| error);
    if let Err(cause) = moved.and(closed) {
        tracing::warn!(error.cause = %cause, "the store's log stays until the next start");
    }
}

/// Whether an error says that the store, not the request, is at fault.
fn is_outage(error: &StoreError) -> bool {
    matches!(error, StoreError::Full | StoreError::Unavailable { .. } | StoreError::Corrupt { .. })
}

/// The same error again, for the next command of a batch.
fn copy(error: &StoreError) -> StoreError {
    match error {
        StoreError::Full => StoreError::Full,
        StoreError::Corrupt { what } => StoreError::Corrupt { what: what.clone() },
        StoreError::Unavailable { cause } => StoreError::Unavailable { cause: cause.clone() },
        StoreError::AlreadyExists { .. } | StoreError::NotFound | StoreError::Conflict => {
            StoreError::Unavailable { cause: error.to_string() }
        }
    }
}

/// What an error of SQLite means for callers.
fn classify(error: &rusqlite::Error, dir: &Path) -> StoreError {
    let unreadable = matches!(
        error,
        rusqlite::Error::FromSqlConversionFailure(..)
            | rusqlite::Error::InvalidColumnType(..)
            | rusqlite::Error::IntegralValueOutOfRange(..)
            | rusqlite::Error::Utf8Error(..)
    );
    if unreadable || schema::is_damage(error) {
        return StoreError::Corrupt { what: format!("the data file: {error}") };
    }
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full,
        Some(ErrorCode::SystemIoFailure) if !is_reading(error) && disk_is_full(dir) => StoreError::Full,
        _ => StoreError::Unavailable { cause: error.to_string() },
    }
}

fn is_reading(error: &rusqlite::Error) -> bool {
    let extended = error.sqlite_error().map(|error| error.extended_code);
    matches!(
        extended,
        Some(ffi::SQLITE_IOERR_READ | ffi::SQLITE_IOERR_SHORT_READ | ffi::SQLITE_IOERR_CORRUPTFS)
    )
}

/// Whether the disk takes no more bytes. SQLite reports a lack of space as such only where it writes
/// pages; when it waits for the disk, maps shared memory, or exceeds a quota, it is an I/O error like
/// any other, so the disk is asked.
fn disk_is_full(dir: &Path) -> bool {
    let probe = dir.join("space-probe");
    let write = || {
        let mut file = File::create(&probe)?;
        file.write_all(&[0xA5; 64 * 1024])?;
        file.sync_all()
    };
    let result = write();
    // It is made anew the next time, and nobody reads it.
    let _ = std::fs::remove_file(&probe);
    let Err(error) = result else { return false };
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
