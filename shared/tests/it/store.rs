//! The embedded store: the contract of all stores, and what only a file can do wrong.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use mcp_shared::{
    ids::{ServerName, UserId},
    store::{
        Collection, Fact, Store, StoreError, StoredTools, Versioned,
        embedded::{EmbeddedStore, OpenError},
    },
    testing::store_contract::{self, document, secret, server},
};
use rusqlite::Connection;
use tempfile::TempDir;
use tokio::task::JoinSet;

mod contract {
    mcp_shared::store_contract!(super::open_anywhere);
}

async fn open_anywhere() -> (Arc<dyn Store>, TempDir) {
    let dir = TempDir::new().unwrap();
    (EmbeddedStore::open(dir.path()).unwrap(), dir)
}

fn data_file(dir: &Path) -> PathBuf {
    dir.join("mcp-api.db")
}

fn log_file(dir: &Path) -> PathBuf {
    dir.join("mcp-api.db-wal")
}

/// A folder whose store was used and closed, so that the data file has everything.
async fn used_folder() -> TempDir {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    for number in 0..50 {
        store.insert_server(&server(&format!("server-{number}"))).await.unwrap();
    }
    store.close().await;
    dir
}

fn refused(dir: &Path) -> OpenError {
    EmbeddedStore::open(dir).map(|_| ()).unwrap_err()
}

#[tokio::test]
async fn one_store_passes_the_whole_contract() {
    let (store, _dir) = open_anywhere().await;
    store_contract::run(store).await;
}

#[tokio::test]
async fn everything_is_there_after_reopening() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("made/when/missing");
    let store = EmbeddedStore::open(&folder).unwrap();
    let user = UserId::default();
    let record = server("kept");
    let revision = store.insert_server(&record).await.unwrap();
    let sealed = secret(&user, &record.0.name, "KEY", "sealed");
    store.put_secret(&sealed).await.unwrap();
    let tools = StoredTools { server: record.0.name.clone(), user: None, tools: "[]".to_owned() };
    store.put_tools(&tools).await.unwrap();
    store.put_once(Fact::AppState, "imported", "yes").await.unwrap();
    let job = document(Collection::Jobs, "kept");
    let queued = store.insert_document(Collection::Jobs, &job).await.unwrap();
    let held = store.take_lease("held", "dead", None).await.unwrap();
    let free = store.take_lease("free", "dead", None).await.unwrap();
    store.release_lease(&free).await.unwrap();
    let free = store.lease("free").await.unwrap();
    drop(store);
    assert!(fs::metadata(log_file(&folder)).is_err(), "the log has moved to the data file");

    let store = EmbeddedStore::open(&folder).unwrap();
    let found = store.server(&record.0.name).await.unwrap().unwrap();
    assert_eq!((found.revision, &found.value), (revision, &record));
    assert_eq!(store.secrets(&user, &record.0.name).await.unwrap(), [sealed]);
    assert_eq!(store.tools().await.unwrap(), [tools]);
    assert_eq!(store.fact(Fact::AppState, "imported").await.unwrap().as_deref(), Some("yes"));
    let found = store.document(Collection::Jobs, "kept").await.unwrap();
    assert_eq!(found, Some(Versioned { revision: queued, value: job }));

    // The dead process holds nothing any more, but its fence still counts.
    assert!(matches!(store.renew_lease(&held).await, Err(StoreError::Conflict)));
    let next = store.take_lease("held", "alive", None).await.unwrap();
    assert!(next.fence > held.fence && next.revision.0 > held.revision.0);
    assert_eq!(store.lease("free").await.unwrap(), free);
}

#[tokio::test]
async fn only_the_owner_can_read_the_folder() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("data");
    let store = EmbeddedStore::open(&folder).unwrap();
    store.ping().await.unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[tokio::test]
async fn a_folder_has_one_user_at_a_time() {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    let error = refused(dir.path());
    assert!(matches!(error, OpenError::Locked { .. }), "{error:?}");
    assert!(error.to_string().contains("another mcp-api process"), "{error}");
    store.ping().await.unwrap();

    // Closing is enough, even while somebody still has the store; closing twice is no fault.
    store.close().await;
    store.close().await;
    let next = EmbeddedStore::open(dir.path()).unwrap();
    assert!(matches!(store.ping().await, Err(StoreError::Unavailable { .. })));
    drop(store);
    assert!(matches!(refused(dir.path()), OpenError::Locked { .. }));
    drop(next);
    EmbeddedStore::open(dir.path()).unwrap();
}

#[tokio::test]
async fn a_torn_log_gives_a_prefix_of_what_was_written() {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    let mut names = Vec::new();
    for number in 0..40 {
        let server = server(&format!("server-{number}"));
        store.insert_server(&server).await.unwrap();
        names.push(server.0.name);
    }
    let (data, log) = (fs::read(data_file(dir.path())).unwrap(), fs::read(log_file(dir.path())).unwrap());

    let reopened_with = async |length: usize| {
        let copy = TempDir::new().unwrap();
        fs::write(data_file(copy.path()), &data).unwrap();
        fs::write(log_file(copy.path()), &log[..length]).unwrap();
        let store = EmbeddedStore::open(copy.path()).unwrap_or_else(|error| panic!("{length}: {error:?}"));
        let found: Vec<_> =
            store.servers().await.unwrap().into_iter().map(|server| server.value.0.name).collect();
        assert_eq!(found, names[..found.len()], "cut at {length}");
        // What is left can be worked with.
        store.insert_server(&server("after-the-crash")).await.unwrap();
        found.len()
    };
    assert_eq!(reopened_with(log.len()).await, names.len());
    let mut seed = 0x5EED_u64;
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..30 {
        // A linear congruential generator: the same positions in every run.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let length = usize::try_from(seed >> 33).unwrap() % (log.len() + 1);
        counts.insert(length, reopened_with(length).await);
    }
    // The more of the log is left, the more is found.
    assert!(counts.values().is_sorted(), "{counts:?}");
    assert!(counts.values().any(|&count| 0 < count && count < names.len()), "{counts:?}");
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused_and_left_alone() {
    let noise: Vec<u8> = (0..20_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut header_only = noise.clone();
    header_only[..16].copy_from_slice(b"SQLite format 3\0");
    for content in [b"hello".to_vec(), noise, header_only] {
        let dir = TempDir::new().unwrap();
        fs::write(data_file(dir.path()), &content).unwrap();
        let error = refused(dir.path());
        assert!(matches!(error, OpenError::Corrupt { .. }), "{error:?}");
        assert!(error.to_string().contains("mcp-api.db is damaged"), "{error}");
        assert_eq!(fs::read(data_file(dir.path())).unwrap(), content);
        // A refusal does not keep the folder locked.
        assert!(matches!(refused(dir.path()), OpenError::Corrupt { .. }));
    }
}

#[tokio::test]
async fn a_damaged_page_is_found_when_the_file_is_opened() {
    let dir = used_folder().await;
    let mut content = fs::read(data_file(dir.path())).unwrap();
    let middle = content.len() / 2 / 4096 * 4096;
    content[middle..middle + 4096].fill(0xA5);
    fs::write(data_file(dir.path()), &content).unwrap();
    let error = refused(dir.path());
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error:?}");
    assert_eq!(fs::read(data_file(dir.path())).unwrap(), content);
}

#[tokio::test]
async fn a_cut_file_is_refused() {
    let dir = used_folder().await;
    let content = fs::read(data_file(dir.path())).unwrap();
    let half = &content[..content.len() / 2];
    fs::write(data_file(dir.path()), half).unwrap();
    let error = refused(dir.path());
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error:?}");
    assert_eq!(fs::read(data_file(dir.path())).unwrap(), half);
}

#[tokio::test]
async fn a_log_without_its_data_file_is_not_thrown_away() {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    store.insert_server(&server("only-in-the-log")).await.unwrap();
    let log = fs::read(log_file(dir.path())).unwrap();
    let copy = TempDir::new().unwrap();
    fs::write(log_file(copy.path()), &log).unwrap();
    let error = refused(copy.path());
    assert!(matches!(error, OpenError::Corrupt { .. }), "{error:?}");
    assert_eq!(fs::read(log_file(copy.path())).unwrap(), log);
    assert!(!data_file(copy.path()).exists());
}

#[tokio::test]
async fn a_file_of_a_newer_version_is_refused() {
    let dir = used_folder().await;
    let connection = Connection::open(data_file(dir.path())).unwrap();
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    connection.pragma_update(None, "user_version", version + 1).unwrap();
    connection.close().unwrap();
    match refused(dir.path()) {
        OpenError::Newer { found, known, .. } => assert_eq!((found, known), (version + 1, version)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_file_of_an_older_version_is_brought_up_to_date() {
    let dir = used_folder().await;
    let connection = Connection::open(data_file(dir.path())).unwrap();
    connection.execute_batch("DROP TABLE documents; PRAGMA user_version = 1").unwrap();
    connection.close().unwrap();
    // The second time there is nothing left to do.
    for round in 0..2 {
        let store = EmbeddedStore::open(dir.path()).unwrap();
        assert_eq!(store.servers().await.unwrap().len(), 50);
        for collection in Collection::ALL {
            assert_eq!(store.documents(collection, false).await.unwrap().len(), round);
            store.insert_document(collection, &document(collection, &format!("k{round}"))).await.unwrap();
        }
        store.close().await;
    }
}

#[tokio::test]
async fn one_unreadable_document_does_not_hide_the_others() {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    for number in 0..6 {
        let mut document = document(Collection::Jobs, &format!("job-{number}"));
        document.insert("active".to_owned(), true.into());
        store.insert_document(Collection::Jobs, &document).await.unwrap();
    }
    store.close().await;
    let connection = Connection::open(data_file(dir.path())).unwrap();
    let bad = [("job-1", "'[]'"), ("job-2", "'{'"), ("job-4", "CAST(x'FF' AS TEXT)")];
    for (key, document) in bad {
        let sql = format!("UPDATE documents SET document = {document} WHERE key = '{key}'");
        assert_eq!(connection.execute(&sql, []).unwrap(), 1);
    }
    connection.close().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    for active in [false, true] {
        assert_eq!(store.documents(Collection::Jobs, active).await.unwrap().len(), 3);
    }
    for (key, _) in bad {
        let error = store.document(Collection::Jobs, key).await.unwrap_err();
        assert!(
            matches!(&error, StoreError::Corrupt { what } if *what == format!("jobs {key}")),
            "{error:?}"
        );
        assert!(store.delete_document(Collection::Jobs, key, None).await.unwrap());
        store.insert_document(Collection::Jobs, &document(Collection::Jobs, key)).await.unwrap();
    }
}

#[tokio::test]
async fn one_unreadable_record_does_not_hide_the_others() {
    let dir = used_folder().await;
    let connection = Connection::open(data_file(dir.path())).unwrap();
    for (name, document) in [("server-3", "'{}'"), ("server-4", "'{'"), ("server-5", "CAST(x'FF' AS TEXT)")] {
        let sql = format!("UPDATE servers SET document = {document} WHERE name = '{name}'");
        assert_eq!(connection.execute(&sql, []).unwrap(), 1);
    }
    connection.close().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    assert_eq!(store.servers().await.unwrap().len(), 47);
    for name in ["server-3", "server-4", "server-5"] {
        let name = ServerName::from_stored(name);
        let outcome = store.server(&name).await;
        assert!(matches!(outcome, Err(StoreError::Corrupt { .. })), "{outcome:?}");
        // An administrator can get rid of it.
        assert!(store.delete_server(&name).await.unwrap());
    }
}

#[tokio::test]
async fn what_changes_nothing_does_not_wait_for_the_disk() {
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    let record = server("quiet");
    store.insert_server(&record).await.unwrap();
    let tools = StoredTools { server: record.0.name.clone(), user: None, tools: "[]".to_owned() };
    store.put_tools(&tools).await.unwrap();
    store.put_once(Fact::AppState, "key", "value").await.unwrap();
    let (log, stats) = (fs::read(log_file(dir.path())).unwrap(), store.stats());

    store.put_tools(&tools).await.unwrap();
    store.put_once(Fact::AppState, "key", "other").await.unwrap();
    store.insert_server(&record).await.unwrap_err();
    store.ping().await.unwrap();
    store.servers().await.unwrap();
    store.tools().await.unwrap();
    assert_eq!(store.stats().commits, stats.commits);
    assert!(fs::read(log_file(dir.path())).unwrap() == log, "the log was written");

    store.put_tools(&StoredTools { tools: "[ ]".to_owned(), ..tools }).await.unwrap();
    assert_eq!(store.stats().commits, stats.commits + 1);
}

#[tokio::test]
async fn many_writes_at_once_all_land() {
    const WRITES: u64 = 500;
    let dir = TempDir::new().unwrap();
    let store = EmbeddedStore::open(dir.path()).unwrap();
    let record = server("busy");
    store.insert_server(&record).await.unwrap();
    let before = store.stats();
    let mut tasks = JoinSet::new();
    for number in 0..WRITES {
        let store = Arc::clone(&store);
        let user = UserId::from_stored(format!("user-{number}"));
        let sealed = secret(&user, &record.0.name, "KEY", &format!("sealed {number}"));
        tasks.spawn(async move { store.put_secret(&sealed).await });
    }
    for outcome in tasks.join_all().await {
        outcome.unwrap();
    }
    // How few commits these are depends on the disk; the module's own tests hold the thread and count.
    assert_eq!(store.stats().writes - before.writes, WRITES);
    drop(store);

    let store = EmbeddedStore::open(dir.path()).unwrap();
    assert_eq!(store.users_with_secrets(&record.0.name).await.unwrap(), WRITES);
    for number in 0..WRITES {
        let user = UserId::from_stored(format!("user-{number}"));
        let found = store.secrets(&user, &record.0.name).await.unwrap();
        assert_eq!(found, [secret(&user, &record.0.name, "KEY", &format!("sealed {number}"))]);
    }
}
