//! One thread that writes: whatever waits is written together, and one wait for the disk serves all of it.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{Action, AuditCalls, Entry, Event, Object, Recorded, Unavailable, file::Log};
use crate::{config::AuditSettings, limits, metrics};

/// Lines that are written together.
const BATCH: usize = 1_024;

/// The log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("AUDIT_FILE ({path}): {source}")]
pub struct OpenError {
    path: PathBuf,
    source: io::Error,
}

/// This process' audit log.
#[derive(Clone)]
pub struct Audit {
    shared: Arc<Shared>,
}

struct Shared {
    queue: mpsc::Sender<Message>,
    calls: AuditCalls,
    dropped: Arc<AtomicU64>,
    denials: Mutex<Denials>,
    tasks: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// How many refused requests were recorded lately.
struct Denials {
    since: Instant,
    count: u32,
}

impl std::fmt::Debug for Audit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Audit")
    }
}

enum Message {
    /// To be on the disk before anything else happens.
    Durable(Entry, oneshot::Sender<Result<u64, Unavailable>>),
    /// To be written some time.
    Note(Entry),
    /// The last one.
    Close(oneshot::Sender<()>),
}

impl Audit {
    /// Opens the log for a program, and has it say so.
    pub fn open(settings: &AuditSettings, program: &str) -> Result<Self, OpenError> {
        let failed = |source| OpenError { path: settings.file.clone(), source };
        let (mut log, recovered) = Log::open(&settings.file, settings.rotate_bytes).map_err(failed)?;
        let words = format!("{program} {}, process {}", env!("CARGO_PKG_VERSION"), std::process::id());
        let opened = Entry::new(Event::Noted, Action::Opened, Object::default()).note(words);
        let begun: Vec<_> = recovered.iter().chain([&opened]).collect();
        let (mut well, mut missing) = (true, 0);
        match log.append(begun.iter().copied(), None, true) {
            Ok(_) => begun.iter().for_each(|entry| metrics::count_audit_line(entry.event)),
            // Nothing can be changed, but what only reads goes on.
            Err(error) if is_full(&error) => {
                tracing::error!(path = %log.path().display(), "the audit log's disk is full: changes are refused");
                (well, missing) = (false, begun.len() as u64);
            }
            Err(error) => return Err(failed(error)),
        }
        let (path, tip) = (log.path().display(), log.tip());
        tracing::info!(%path, seq = tip.seq, hash = %tip.hash, "audit log");
        if recovered.is_some() {
            tracing::warn!(%path, "the last line of the audit log had been cut off by a crash, and was removed");
        }

        let (queue, waiting) = mpsc::channel(limits::AUDIT_QUEUE);
        let dropped = Arc::new(AtomicU64::new(missing));
        let counted = Arc::clone(&dropped);
        let writer = std::thread::Builder::new().name("audit".to_owned());
        let writer = writer.spawn(move || Writer { log, dropped: counted, well }.run(waiting));
        let shared = Shared {
            queue,
            calls: settings.calls,
            dropped,
            denials: Mutex::new(Denials { since: Instant::now(), count: 0 }),
            tasks: Mutex::new(Some(writer.map_err(failed)?)),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Which calls of tools are recorded.
    pub fn calls(&self) -> AuditCalls {
        self.shared.calls
    }

    /// Records that something is let in. It is on the disk when this returns, and may begin.
    pub async fn begin(&self, entry: Entry) -> Result<Recorded, Unavailable> {
        let seq = self.record(entry.clone()).await?;
        Ok(Recorded::new(self.clone(), seq, &entry))
    }

    /// Writes a line and waits until it is on the disk; its number.
    pub async fn record(&self, entry: Entry) -> Result<u64, Unavailable> {
        let (sender, written) = oneshot::channel();
        let send = async {
            self.shared.queue.send(Message::Durable(entry, sender)).await.map_err(|_| Unavailable::Broken)?;
            written.await.map_err(|_| Unavailable::Broken)?
        };
        timeout(limits::AUDIT_WAIT, send).await.unwrap_or_else(|_| {
            tracing::error!("the audit log does not take lines any more");
            Err(Unavailable::Broken)
        })
    }

    /// Writes a line without waiting for it. Lines that cannot be written are counted, and the next one says how many.
    pub fn note(&self, entry: Entry) {
        if self.shared.queue.try_send(Message::Note(entry)).is_err() {
            self.drop_lines(1);
        }
    }

    /// Notes a request that was refused. Of very many in a second only the first are written.
    pub fn deny(&self, entry: Entry) {
        let write = {
            let mut denials = self.shared.denials.lock().unwrap_or_else(PoisonError::into_inner);
            if denials.since.elapsed() >= Duration::from_secs(1) {
                *denials = Denials { since: Instant::now(), count: 0 };
            }
            denials.count = denials.count.saturating_add(1);
            denials.count <= limits::AUDIT_DENIALS
        };
        if write { self.note(entry) } else { self.drop_lines(1) }
    }

    /// Writes what waits, and ends.
    pub async fn close(&self) {
        let (sender, closed) = oneshot::channel();
        let close = async {
            if self.shared.queue.send(Message::Close(sender)).await.is_ok() {
                let _ = closed.await;
            }
        };
        if timeout(limits::AUDIT_WAIT, close).await.is_err() {
            tracing::error!("the last lines of the audit log could not be written");
            return;
        }
        let writer = self.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It has said that it is at its end, so that this does not wait.
        if let Some(writer) = writer {
            let _ = writer.join();
        }
    }

    fn drop_lines(&self, count: u64) {
        self.shared.dropped.fetch_add(count, Ordering::Relaxed);
        metrics::count_audit_dropped(count);
    }
}

struct Writer {
    log: Log,
    dropped: Arc<AtomicU64>,
    /// Whether the last lines could be written.
    well: bool,
}

impl Writer {
    fn run(mut self, mut waiting: mpsc::Receiver<Message>) {
        let mut batch = Vec::with_capacity(BATCH);
        while waiting.blocking_recv_many(&mut batch, BATCH) > 0 {
            let (mut entries, mut answers, mut close) = (Vec::new(), Vec::new(), None);
            for message in batch.drain(..) {
                match message {
                    Message::Durable(entry, answer) => {
                        answers.push((entries.len() as u64, answer));
                        entries.push(entry);
                    }
                    Message::Note(entry) => entries.push(entry),
                    Message::Close(closed) => close = Some(closed),
                }
            }
            if close.is_some() {
                entries.push(Entry::new(Event::Noted, Action::Closed, Object::default()));
            }
            let notes = (entries.len() - answers.len()) as u64;
            let written = self.write(&entries, !answers.is_empty() || close.is_some());
            if written.is_err() {
                self.dropped.fetch_add(notes, Ordering::Relaxed);
                metrics::count_audit_dropped(notes);
            }
            for (at, answer) in answers {
                // Who does not wait any more was told that it failed, and does nothing.
                let _ = answer.send(written.map(|first| first + at));
            }
            if let Some(closed) = close {
                let (path, tip) = (self.log.path().display(), self.log.tip());
                tracing::info!(%path, seq = tip.seq, hash = %tip.hash, "the audit log ends");
                let _ = closed.send(());
                return;
            }
        }
        if let Err(error) = self.log.sync() {
            tracing::error!(%error, "the audit log could not be written to the disk");
        }
    }

    fn write(&mut self, entries: &[Entry], sync: bool) -> Result<u64, Unavailable> {
        if entries.is_empty() {
            return Ok(0);
        }
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        let written = self.log.append(entries.iter(), (dropped > 0).then_some(dropped), sync);
        match written {
            Ok(first) => {
                if !self.well {
                    tracing::info!(path = %self.log.path().display(), "the audit log can be written again");
                }
                self.well = true;
                entries.iter().for_each(|entry| metrics::count_audit_line(entry.event));
                Ok(first)
            }
            Err(error) => {
                self.dropped.fetch_add(dropped, Ordering::Relaxed);
                metrics::count_audit_failure();
                // Once, not for every request that it keeps from doing something.
                if std::mem::replace(&mut self.well, false) {
                    let path = self.log.path().display();
                    tracing::error!(%path, %error, "the audit log cannot be written: changes are refused");
                }
                Err(if is_full(&error) { Unavailable::Full } else { Unavailable::Broken })
            }
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The file that is written unless `AUDIT_FILE` names another.
pub(crate) fn default_file(data_dir: &Path) -> PathBuf {
    data_dir.join("audit").join("audit.jsonl")
}
