//! What needs a hand on the store's thread: batches, full queues, callers who leave, a full disk.

use std::{
    sync::mpsc::{SyncSender, sync_channel},
    task::{Context, Waker},
};

use tempfile::TempDir;

use super::{Arc, Duration, EmbeddedStore, Ordering, Stats, StoreError, limits, oneshot};
use crate::{
    ids::ServerName,
    store::{Collection, Fact, Store},
};

fn open() -> (Arc<EmbeddedStore>, TempDir) {
    let dir = TempDir::new().unwrap();
    (EmbeddedStore::open(dir.path()).unwrap(), dir)
}

/// Polls a call once, which queues its command.
fn queue<F: Future>(call: F) -> std::pin::Pin<Box<F>> {
    let mut call = Box::pin(call);
    assert!(call.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    call
}

/// Occupies the thread until the sender is dropped, so that what is queued meanwhile is one batch.
async fn occupy(store: &Arc<EmbeddedStore>) -> SyncSender<()> {
    let (begun, wait) = oneshot::channel();
    let (gate, blocked) = sync_channel::<()>(1);
    let store = Arc::clone(store);
    tokio::spawn(async move {
        store
            .read(move |_| {
                begun.send(()).unwrap();
                // An error, since nobody sends: the gate was dropped.
                let _ = blocked.recv();
                Ok(())
            })
            .await
    });
    wait.await.unwrap();
    gate
}

fn outage<T: std::fmt::Debug>(outcome: Result<T, StoreError>) -> String {
    match outcome {
        Err(StoreError::Unavailable { cause }) => cause,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn writes_that_wait_together_are_committed_together() {
    let (store, _dir) = open();
    let gate = occupy(&store).await;
    let keys: Vec<_> = (0..500).map(|number| number.to_string()).collect();
    let calls: Vec<_> = keys.iter().map(|key| queue(store.put_once(Fact::AppState, key, key))).collect();
    drop(gate);
    for (key, call) in keys.iter().zip(calls) {
        assert_eq!(call.await.unwrap(), *key);
    }
    let Stats { writes, commits } = store.stats();
    assert_eq!((writes, commits), (500, 8), "500 writes are 8 batches of at most 64");
}

#[tokio::test]
async fn a_failing_write_takes_only_itself_back() {
    let (store, _dir) = open();
    let gate = occupy(&store).await;
    let before = queue(store.put_once(Fact::AppState, "before", "1"));
    let refused = queue(store.write(|connection| {
        connection.execute("INSERT INTO facts VALUES ('appState', 'half', '1')", [])?;
        Err::<(), _>(StoreError::Conflict.into())
    }));
    let panics = queue(store.write::<()>(|connection| {
        connection.execute("INSERT INTO facts VALUES ('appState', 'half', '2')", [])?;
        panic!("on purpose");
    }));
    let after = queue(store.put_once(Fact::AppState, "after", "1"));
    drop(gate);
    before.await.unwrap();
    assert!(matches!(refused.await, Err(StoreError::Conflict)));
    assert!(outage(panics.await).contains("panicked"));
    after.await.unwrap();
    assert_eq!(store.stats(), Stats { writes: 2, commits: 1 });
    assert_eq!(store.fact(Fact::AppState, "half").await.unwrap(), None);
    assert_eq!(store.fact(Fact::AppState, "before").await.unwrap().as_deref(), Some("1"));
    assert_eq!(store.fact(Fact::AppState, "after").await.unwrap().as_deref(), Some("1"));
    store.ping().await.unwrap();
}

#[tokio::test]
async fn a_commit_that_fails_fails_its_whole_batch() {
    let (store, _dir) = open();
    let gate = occupy(&store).await;
    let neighbour = queue(store.put_once(Fact::AppState, "lost", "1"));
    let read = queue(store.fact(Fact::AppState, "lost"));
    // A foreign key that is checked only at the end, and then missing.
    let poison = queue(store.write(|connection| {
        connection.execute_batch(
            "PRAGMA defer_foreign_keys = ON; INSERT INTO secrets VALUES ('u', 'k', 'missing', 's', 'v')",
        )?;
        Ok(())
    }));
    drop(gate);
    assert_eq!(read.await.unwrap(), None, "reads see only what is committed");
    outage(neighbour.await);
    outage(poison.await);
    assert_eq!(store.stats(), Stats { writes: 0, commits: 0 });
    assert_eq!(store.fact(Fact::AppState, "lost").await.unwrap(), None);
    assert!(store.shared.failing.load(Ordering::Relaxed));
    store.ping().await.unwrap();
    assert!(!store.shared.failing.load(Ordering::Relaxed));
    assert_eq!(store.put_once(Fact::AppState, "lost", "2").await.unwrap(), "2");
}

#[tokio::test]
async fn a_full_queue_is_refused_at_once() {
    let (store, _dir) = open();
    let gate = occupy(&store).await;
    let calls: Vec<_> = (0..limits::STORE_QUEUE).map(|_| queue(store.ping())).collect();
    assert_eq!(outage(store.ping().await), "queue full");
    drop(gate);
    for call in calls {
        call.await.unwrap();
    }
    store.ping().await.unwrap();
}

#[tokio::test]
async fn a_command_whose_caller_has_left_is_not_begun() {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open_with(dir.path(), Duration::from_millis(20)).unwrap();
    let gate = occupy(&store).await;
    assert_eq!(outage(store.put_once(Fact::AppState, "late", "1").await), "no answer in time");
    drop(queue(store.put_once(Fact::AppState, "left", "1")));
    drop(gate);
    store.close().await;
    let store = EmbeddedStore::open(dir.path()).unwrap();
    assert_eq!(store.fact(Fact::AppState, "late").await.unwrap(), None);
    assert_eq!(store.fact(Fact::AppState, "left").await.unwrap(), None);
}

#[tokio::test]
async fn closing_finishes_what_is_queued() {
    let (store, dir) = open();
    let gate = occupy(&store).await;
    let call = queue(store.put_once(Fact::AppState, "key", "1"));
    let closing = queue(store.close());
    let late = queue(store.put_once(Fact::AppState, "late", "1"));
    drop(gate);
    assert_eq!(call.await.unwrap(), "1");
    closing.await;
    assert_eq!(outage(late.await), "closed");
    let store = EmbeddedStore::open(dir.path()).unwrap();
    assert_eq!(store.fact(Fact::AppState, "key").await.unwrap().as_deref(), Some("1"));
}

/// Lets the file have so many pages; SQLite then treats the disk as full.
async fn allow_pages(store: &EmbeddedStore, pages: i64) {
    store
        .read(move |connection| {
            Ok(connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?)
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_full_disk_refuses_writes_until_there_is_room_again() {
    let (store, _dir) = open();
    store.put_once(Fact::AppState, "early", "1").await.unwrap();
    allow_pages(&store, 1).await;
    let large = "x".repeat(100_000);
    let gate = occupy(&store).await;
    let write = queue(store.put_once(Fact::AppState, "large", &large));
    let read = queue(store.fact(Fact::AppState, "early"));
    drop(gate);
    assert!(matches!(write.await, Err(StoreError::Full)));
    assert_eq!(read.await.unwrap().as_deref(), Some("1"));
    assert_eq!(store.fact(Fact::AppState, "large").await.unwrap(), None);
    assert!(store.shared.failing.load(Ordering::Relaxed));

    allow_pages(&store, 1_000_000).await;
    assert_eq!(store.put_once(Fact::AppState, "large", &large).await.unwrap(), large);
    assert!(!store.shared.failing.load(Ordering::Relaxed));
}

#[tokio::test]
async fn a_file_that_cannot_be_written_is_noticed_by_ping() {
    let (store, _dir) = open();
    let set = |on: bool| store.read(move |c| Ok(c.pragma_update(None, "query_only", on)?));
    store.ping().await.unwrap();
    set(true).await.unwrap();
    outage(store.put_once(Fact::AppState, "key", "1").await);
    outage(store.ping().await);
    assert_eq!(store.fact(Fact::AppState, "key").await.unwrap(), None);
    set(false).await.unwrap();
    store.ping().await.unwrap();
}

#[tokio::test]
async fn a_store_of_the_last_version_is_brought_up_to_date() {
    let (store, dir) = open();
    let job = serde_json::json!({ "serverName": "one", "active": true });
    store.insert_document(Collection::Jobs, job.as_object().unwrap()).await.unwrap();
    // As it was before documents had the server beside them.
    let older = "DROP INDEX documents_by_server; ALTER TABLE documents DROP COLUMN server; \
                 PRAGMA user_version = 2;";
    store.write(move |connection| Ok(connection.execute_batch(older)?)).await.unwrap();
    store.close().await;
    drop(store);

    let store = EmbeddedStore::open(dir.path()).unwrap();
    let one = ServerName::from_stored("one");
    assert_eq!(store.documents_of(Collection::Jobs, &one).await.unwrap().len(), 1);
    // A listing by server is one search, however many documents there are.
    let plan = "EXPLAIN QUERY PLAN SELECT key FROM documents WHERE collection = 'a' AND server = 'b'";
    let plan: String =
        store.read(move |connection| Ok(connection.query_row(plan, [], |row| row.get(3))?)).await.unwrap();
    assert!(plan.contains("documents_by_server"), "{plan}");
}
