//! Packages, locks and jobs.

use super::*;
use crate::{
    ids::WorkerId,
    package::{Job, JobKind, JobState, Lock, PackageRecord, PackageSpec, Runtime},
    store::Collection,
    timestamp::Timestamp,
    vault::packages::write,
};

fn package(server: &str) -> PackageRecord {
    let document = json!({
        "name": "@scope/package", "version": "1.2.3", "installPath": "packages/scope-package",
        "status": "installed", "installed": "2026-11-22T16:48:29.287Z", "mcpServerId": server, "enabled": true,
        "runtime": "python", "pythonArgs": ["--x", ""], "generation": "python-0123456789abcdef01234567",
        "skippedScripts": ["esbuild"], "unknown": { "list": [1, null] },
    });
    serde_json::from_value(document).unwrap()
}

#[tokio::test]
async fn packages_come_back_as_they_were() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let (one, two) = (package("one"), package("two"));
    assert_eq!(vault.package(&one.mcp_server_id).await.unwrap(), None);
    let first = vault.insert_package(&one).await.unwrap();
    vault.insert_package(&two).await.unwrap();
    let again = vault.insert_package(&one).await;
    assert!(
        matches!(again, Err(VaultError::Store(StoreError::AlreadyExists { existing })) if existing == "one")
    );
    // A record that is none hides no other.
    let mut odd = write(&package("odd")).unwrap();
    odd.insert("installed".to_owned(), "yesterday".into());
    store.store.insert_document(Collection::Packages, &odd).await.unwrap();
    let listed: Vec<_> = vault.packages().await.unwrap().into_iter().map(|package| package.value).collect();
    assert_eq!(listed, [one.clone(), two]);
    let error = vault.package(&ServerName::from_stored("odd")).await.unwrap_err();
    assert!(matches!(error, VaultError::Store(StoreError::Corrupt { .. })), "{error:?}");

    let mut changed = one.clone();
    changed.last_upgraded = Some(Timestamp::from_millis(1_795_366_109_288));
    let second = vault.replace_package(&changed, first).await.unwrap();
    let late = vault.replace_package(&one, first).await;
    assert!(matches!(late, Err(VaultError::Store(StoreError::Conflict))), "{late:?}");
    let read = vault.package(&one.mcp_server_id).await.unwrap();
    assert_eq!(read, Some(Versioned { revision: second, value: changed }));
    assert!(vault.delete_package(&one.mcp_server_id).await.unwrap());
    assert!(!vault.delete_package(&one.mcp_server_id).await.unwrap());
}

#[tokio::test]
async fn a_lock_is_kept_once_under_the_name_of_what_is_made_of_it() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let lock = Lock {
        runtime: Runtime::Node,
        name: "@scope/package".to_owned(),
        version: "1.2.3".to_owned(),
        files: BTreeMap::from([("package-lock.json".to_owned(), "{\n}".to_owned())]),
        allow_scripts: false,
        skipped_scripts: vec!["esbuild".to_owned()],
        pip_index_url: None,
        pip_extra_index_url: None,
        python: None,
    };
    let other = Lock { version: "1.2.4".to_owned(), ..lock.clone() };
    let name = vault.put_lock(&lock).await.unwrap();
    assert_eq!(vault.put_lock(&lock).await.unwrap(), name);
    assert_eq!(vault.lock(&name).await.unwrap(), Some(lock.clone()));
    let second = vault.put_lock(&other).await.unwrap();
    assert_eq!(vault.locks().await.unwrap(), [name.clone(), second.clone()]);
    assert!(vault.delete_lock(&name).await.unwrap());
    assert!(!vault.delete_lock(&name).await.unwrap());
    assert_eq!(vault.lock(&name).await.unwrap(), None);
    assert_eq!(vault.locks().await.unwrap(), [second]);
}

#[tokio::test]
async fn a_job_keeps_the_variables_of_its_server_encrypted() {
    let store = TestStore::new();
    let vault = opened(&store, KEY, None).await;
    let job = |name: &str| {
        let spec = PackageSpec { name: "package".to_owned(), ..PackageSpec::default() };
        Job::new(JobKind::Install, ServerName::from_stored(name), spec, Some(stdio(name)))
    };
    let mut one = job("one");
    one.note("ordered");
    let first = vault.insert_job(&one).await.unwrap();
    let written = async || -> String {
        let stored = store.store.document(Collection::Jobs, "one").await.unwrap().unwrap();
        serde_json::to_string(&stored.value).unwrap()
    };
    let stored = written().await;
    assert!(!stored.contains("value-") && stored.contains("$mg1$k1$"), "{stored}");
    let read = vault.job(&one.server_name).await.unwrap();
    assert_eq!(read, Some(Versioned { revision: first, value: one.clone() }));

    one.owner = Some(WorkerId::from_stored("w"));
    one.state = JobState::Running;
    variables(one.server.as_mut().unwrap()).insert("A".to_owned(), "value-new".to_owned());
    let second = vault.replace_job(&one, first).await.unwrap();
    let stored = written().await;
    assert!(!stored.contains("value-") && stored.contains("$mg1$k1$"), "{stored}");
    let running = Versioned { revision: second, value: one.clone() };
    assert_eq!(vault.jobs(true).await.unwrap(), std::slice::from_ref(&running));
    let late = vault.replace_job(&one, first).await;
    assert!(matches!(late, Err(VaultError::Store(StoreError::Conflict))), "{late:?}");

    let mut over = Job { server: None, state: JobState::Done, active: false, ..job("two") };
    over.finished = Some(over.created);
    vault.insert_job(&over).await.unwrap();
    // One whose values were moved hides no other.
    let mut moved = store.store.document(Collection::Jobs, "one").await.unwrap().unwrap().value;
    moved.insert("serverName".to_owned(), "three".into());
    moved["server"]["name"] = "three".into();
    store.store.insert_document(Collection::Jobs, &moved).await.unwrap();
    assert_eq!(vault.jobs(true).await.unwrap(), std::slice::from_ref(&running));
    let all = vault.jobs(false).await.unwrap();
    assert_eq!(all.iter().map(|job| &job.value).collect::<Vec<_>>(), [&one, &over]);
    let error = vault.job(&ServerName::from_stored("three")).await.unwrap_err();
    assert!(matches!(error, VaultError::Integrity { .. }), "{error:?}");

    let stale = vault.delete_job(&one.server_name, first).await;
    assert!(matches!(stale, Err(VaultError::Store(StoreError::Conflict))), "{stale:?}");
    assert!(vault.delete_job(&one.server_name, second).await.unwrap());
    assert_eq!(vault.job(&one.server_name).await.unwrap(), None);
}
