//! The store of a single node: one SQLite file in the data folder, opened by one process.
//!
//! A write that returned `Ok` is in the write-ahead log on the disk. Writes that arrive together share
//! one transaction and so one wait for the disk (see `executor`); reads see only what is committed.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, OptionalExtension};
use tokio::sync::{
    mpsc::{self, error::TrySendError},
    oneshot,
};

use super::{Fact, StoreError};
use crate::limits;

mod documents;
mod executor;
mod resealing;
mod schema;
mod sql;
#[cfg(test)]
mod tests;

use executor::{Call, Executor, Failure, Kind, Message, Shared};

/// Why the store in a data folder was not opened. No data in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("another mcp-api process uses the data folder {}", dir.display())]
    Locked {
        /// The data folder.
        dir: PathBuf,
    },
    /// The file is damaged. It is never replaced by an empty one.
    #[error(
        "the data file {} is damaged ({what}). It was left as it is: restore a backup, \
         or save what can be read with `sqlite3 {} .recover`",
        file.display(), file.display()
    )]
    Corrupt {
        /// The data file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The file was written by a newer version of the program.
    #[error(
        "the data file {} was written by a newer version of mcp-api (its schema is {found}, the newest \
         known here {known})",
        file.display()
    )]
    Newer {
        /// The data file.
        file: PathBuf,
        /// The version of its schema.
        found: i64,
        /// The newest version that this program knows.
        known: i64,
    },
    /// The folder cannot be made, read or written.
    #[error("the data folder {} cannot be used", dir.display())]
    Io {
        /// The data folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// SQLite cannot work with the file, although it does not call it damaged.
    #[error("the data file {} cannot be used", file.display())]
    Sqlite {
        /// The data file.
        file: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
}

/// What the store has done since it was opened.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Writing commands that took effect.
    pub writes: u64,
    /// Transactions that changed something, each with one wait for the disk.
    pub commits: u64,
}

/// The store in a data folder. One thread owns the connection; calls queue for it.
#[derive(Debug)]
pub struct EmbeddedStore {
    sender: mpsc::Sender<Message>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    timeout: Duration,
}

impl EmbeddedStore {
    /// Opens the store in `data_dir`; both are made if they do not exist. It blocks while it recovers
    /// what a crash left behind and checks the file.
    pub fn open(data_dir: &Path) -> Result<Arc<Self>, OpenError> {
        Self::open_with(data_dir, limits::DISK_TIMEOUT)
    }

    fn open_with(data_dir: &Path, timeout: Duration) -> Result<Arc<Self>, OpenError> {
        let opened = schema::open(data_dir)?;
        let (sender, receiver) = mpsc::channel(limits::STORE_QUEUE);
        let shared = Arc::new(Shared::default());
        let executor = Executor::new(opened, data_dir.to_owned(), Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || executor.run(receiver))
            .map_err(|source| OpenError::Io { dir: data_dir.to_owned(), source })?;
        Ok(Arc::new(Self { sender, shared, thread: Some(thread), timeout }))
    }

    /// Reads a fact while another process has the folder open, which is not disturbed by it.
    pub fn peek(data_dir: &Path, fact: Fact, key: &str) -> Result<Option<String>, OpenError> {
        let file = data_dir.join(schema::DATA_FILE);
        let read = || {
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let connection = Connection::open_with_flags(&file, flags)?;
            connection.busy_timeout(schema::BUSY_TIMEOUT)?;
            connection.query_row(sql::FACT, [fact.collection(), key], |row| row.get(0)).optional()
        };
        read().map_err(|source| OpenError::Sqlite { file: file.clone(), source })
    }

    /// Finishes what is queued, moves the write-ahead log into the data file and frees the folder.
    /// Later calls fail. Dropping the store does the same, but blocks the thread that drops it.
    pub async fn close(&self) {
        // An error means that the thread has ended already, which is what was asked for.
        if self.sender.send(Message::Close).await.is_ok() {
            // The thread drops its end of the queue last, when the folder is free.
            self.sender.closed().await;
        }
    }

    /// Counters for tests and metrics.
    #[doc(hidden)]
    pub fn stats(&self) -> Stats {
        Stats {
            writes: self.shared.writes.load(Ordering::Relaxed),
            commits: self.shared.commits.load(Ordering::Relaxed),
        }
    }

    async fn read<T: Send + 'static>(
        &self,
        run: impl FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.call(Kind::Read, run).await
    }

    async fn write<T: Send + 'static>(
        &self,
        run: impl FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.call(Kind::Write, run).await
    }

    async fn call<T: Send + 'static>(
        &self,
        kind: Kind,
        run: impl FnOnce(&Connection) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let call = Box::new(Call::new(kind, run, reply));
        self.sender.try_send(Message::Run(call)).map_err(|error| match error {
            TrySendError::Full(_) => unavailable("queue full"),
            TrySendError::Closed(_) => unavailable("closed"),
        })?;
        match tokio::time::timeout(self.timeout, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(unavailable("closed")),
            // Whether a write that had begun takes effect is unknown, as after a lost connection.
            Err(_) => Err(unavailable("no answer in time")),
        }
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        // The thread ends when the last sender is gone, so ours must go before we wait for it.
        self.sender = mpsc::channel(1).0;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the store panicked");
        }
    }
}

fn unavailable(cause: &str) -> StoreError {
    StoreError::Unavailable { cause: cause.to_owned() }
}
