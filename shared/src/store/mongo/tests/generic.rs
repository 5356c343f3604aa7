//! The collections that hold documents by key, also with what mcp-api wrote into `packages`.

use mongodb::bson::{Bson, DateTime, oid::ObjectId};
use serde_json::json;

use super::*;
use crate::{
    store::Collection as Documents,
    testing::store_contract::document,
    vault::{KeySource, Vault},
};

const INSTALLED: i64 = 1_795_366_109_287;

/// As mcp-api 1.11 stores a package.
fn written_by_mcp_api(server: &str) -> Document {
    doc! {
        "name": "@scope/package", "version": "1.2.3", "installPath": "packages/scope-package",
        "status": "installed", "installed": DateTime::from_millis(INSTALLED), "runtime": "node",
        "lastUpgraded": DateTime::from_millis(INSTALLED + 1), "mcpServerId": server, "enabled": true,
        "latestVersion": "2.0.0", "updateAvailable": true, "error": Bson::Null, "venvPath": Bson::Null,
        "failOnWarning": Bson::Null,
        // What JSON does not have.
        "lastUsed": DateTime::from_millis(5), "owner": ObjectId::from_bytes([7; 12]),
        "nested": { "date": DateTime::from_millis(6), "none": Bson::Null },
    }
}

fn rows(own: &Own, collection: Documents) -> Collection<Document> {
    own.0.collection(collection.name())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packages_of_mcp_api_are_picked_up_and_keep_what_nobody_knows() {
    let (settings, own) = fresh().await;
    let packages = rows(&own, Documents::Packages);
    let id = packages.insert_one(written_by_mcp_api("echo")).await.unwrap().inserted_id;
    let store = MongoStore::connect(settings).await.unwrap();
    let read = store.document(Documents::Packages, "echo").await.unwrap().unwrap();
    assert!(read.revision.0 < 0);
    let expected = json!({
        "_id": id.as_object_id().unwrap().to_hex(), "name": "@scope/package", "version": "1.2.3",
        "installPath": "packages/scope-package", "status": "installed", "installed": "2026-11-22T16:48:29.287Z",
        "runtime": "node", "lastUpgraded": "2026-11-22T16:48:29.288Z", "mcpServerId": "echo", "enabled": true,
        "latestVersion": "2.0.0", "updateAvailable": true, "lastUsed": "1970-01-01T00:00:00.005Z",
        "owner": "070707070707070707070707",
        "nested": { "date": "1970-01-01T00:00:00.006Z", "none": null },
    });
    assert_eq!(serde_json::Value::Object(read.value.clone()), expected);
    assert_eq!(store.documents(Documents::Packages, false).await.unwrap(), std::slice::from_ref(&read));
    let taken = store.insert_document(Documents::Packages, &document(Documents::Packages, "echo")).await;
    assert!(matches!(taken, Err(StoreError::AlreadyExists { .. })), "{taken:?}");

    let mut changed = read.value.clone();
    changed.insert("version".to_owned(), "2.0.0".into());
    changed.insert("lastUpgraded".to_owned(), "2026-11-22T16:48:29.289Z".into());
    changed.insert("generation".to_owned(), "node-000000000000000000000000".into());
    changed.remove("latestVersion");
    let second = store.replace_document(Documents::Packages, &changed, read.revision).await.unwrap();
    let stale = store.replace_document(Documents::Packages, &read.value, read.revision).await;
    assert!(matches!(stale, Err(StoreError::Conflict)), "{stale:?}");
    let again = store.document(Documents::Packages, "echo").await.unwrap().unwrap();
    assert_eq!(again, Versioned { revision: second, value: changed });

    let stored = packages.find_one(doc! {}).await.unwrap().unwrap();
    assert_eq!(stored.get("_id"), Some(&id));
    for (field, value) in written_by_mcp_api("echo") {
        match field.as_str() {
            "version" => assert_eq!(stored.get_str("version").unwrap(), "2.0.0"),
            "lastUpgraded" => {
                let date = DateTime::from_millis(INSTALLED + 2);
                assert_eq!(stored.get(&field), Some(&date.into()));
            }
            "latestVersion" => assert_eq!(stored.get(&field), None),
            _ => assert_eq!(stored.get(&field), Some(&value), "{field}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packages_are_stored_as_mcp_api_does_it() {
    let (settings, own) = fresh().await;
    let store = MongoStore::connect(settings).await.unwrap();
    for collection in Documents::ALL {
        let mut new = document(collection, "new");
        new.insert("lastUpgraded".to_owned(), "2026-11-22T16:48:29.288Z".into());
        store.insert_document(collection, &new).await.unwrap();
        // As bytes: the driver would take an object with a member `$date` for a date.
        let raw = rows(&own, collection).clone_with_type::<RawDocumentBuf>().find_one(doc! {}).await;
        let stored = Document::try_from(&raw.unwrap().unwrap()).unwrap();
        assert!(matches!(stored["_id"], Bson::ObjectId(_)));
        let shared = collection == Documents::Packages;
        for (field, millis) in [("installed", INSTALLED), ("lastUpgraded", INSTALLED + 1)] {
            let date = Bson::from(DateTime::from_millis(millis));
            let expected = if shared { date } else { new[field].as_str().unwrap().into() };
            assert_eq!(stored.get(field), Some(&expected), "{collection:?}");
        }
        assert!(stored.get_str("created").is_ok(), "{collection:?}");
        let nested = stored.get_document("nested").unwrap();
        assert!(nested.get_str("installed").is_ok() && nested.get_str("$date").is_ok(), "{collection:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_by_mcp_api_is_noticed() {
    let (settings, own) = fresh().await;
    let packages = rows(&own, Documents::Packages);
    packages.insert_one(written_by_mcp_api("echo")).await.unwrap();
    let store = MongoStore::connect(settings).await.unwrap();
    let read = async || store.document(Documents::Packages, "echo").await.unwrap().unwrap();
    let first = read().await;
    assert_eq!(read().await.revision, first.revision);
    packages.update_one(doc! {}, doc! { "$set": { "enabled": false } }).await.unwrap();
    let replaced = store.replace_document(Documents::Packages, &first.value, first.revision).await;
    assert!(matches!(replaced, Err(StoreError::Conflict)), "{replaced:?}");
    let deleted = store.delete_document(Documents::Packages, "echo", Some(first.revision)).await;
    assert!(matches!(deleted, Err(StoreError::Conflict)), "{deleted:?}");
    let now = read().await;
    assert!(now.value["enabled"] == false && now.revision != first.revision);
    assert!(store.delete_document(Documents::Packages, "echo", Some(now.revision)).await.unwrap());
    assert_eq!(packages.count_documents(doc! {}).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_changes_to_a_package_of_mcp_api_wins() {
    let (settings, own) = fresh().await;
    rows(&own, Documents::Packages).insert_one(written_by_mcp_api("echo")).await.unwrap();
    let store = MongoStore::connect(settings).await.unwrap();
    let read = store.document(Documents::Packages, "echo").await.unwrap().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for rival in 0..8 {
        let (store, mut changed) = (Arc::clone(&store), read.value.clone());
        changed.insert("rival".to_owned(), rival.into());
        tasks.spawn(async move {
            let outcome = store.replace_document(Documents::Packages, &changed, read.revision).await;
            outcome.map(|revision| Versioned { revision, value: changed })
        });
    }
    let outcomes = tasks.join_all().await;
    let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert!(lost.iter().all(|outcome| matches!(outcome, Err(StoreError::Conflict))), "{lost:?}");
    assert_eq!(won.len(), 1);
    let now = store.document(Documents::Packages, "echo").await.unwrap();
    assert_eq!(now, won.into_iter().next().unwrap().ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_packages_stored_twice_the_newest_stays() {
    let (settings, own) = fresh().await;
    let packages = rows(&own, Documents::Packages);
    for version in ["1", "2", "3"] {
        for server in ["echo", "other"] {
            let mut row = written_by_mcp_api(server);
            row.insert("version", version);
            packages.insert_one(row).await.unwrap();
        }
        // Installations that failed have no server, and are as many as they are.
        let mut failed = written_by_mcp_api("");
        for server in [Bson::Null, Bson::from(7), "".into()] {
            failed.insert("mcpServerId", server);
            packages.insert_one(failed.clone()).await.unwrap();
        }
        failed.remove("mcpServerId");
        packages.insert_one(failed).await.unwrap();
    }
    let store = MongoStore::connect(settings.clone()).await.unwrap();
    assert_eq!(packages.count_documents(doc! {}).await.unwrap(), 2 + 4 * 3);
    let versions = async || -> Vec<String> {
        let found = store.documents(Documents::Packages, false).await.unwrap();
        found.iter().map(|package| package.value["version"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(versions().await, ["3", "3"]);
    // Nobody can add a second one now, and failed installations can still be recorded.
    assert!(failure::is_duplicate(&packages.insert_one(written_by_mcp_api("echo")).await.unwrap_err()));
    packages.insert_one(doc! { "name": "failed" }).await.unwrap();
    packages.insert_one(doc! { "name": "failed" }).await.unwrap();

    // As long as there is no index, the newest counts as well.
    packages.drop_index("mcpServerId_unique").await.unwrap();
    let mut row = written_by_mcp_api("echo");
    row.insert("version", "4");
    packages.insert_one(row).await.unwrap();
    assert_eq!(versions().await, ["3", "4"]);
    let newest = store.document(Documents::Packages, "echo").await.unwrap().unwrap();
    assert_eq!(newest.value["version"], "4");
    assert!(store.delete_document(Documents::Packages, "echo", None).await.unwrap());
    assert_eq!(store.document(Documents::Packages, "echo").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_that_cannot_be_read_hides_no_other() {
    let (settings, own) = fresh().await;
    let store = MongoStore::connect(settings).await.unwrap();
    for collection in Documents::ALL {
        let rows = rows(&own, collection);
        rows.insert_one(doc! { collection.key(): "odd", "_revision": "one", "active": true }).await.unwrap();
        rows.insert_one(doc! { "name": "no key", "_revision": 1, "active": true }).await.unwrap();
        let mut good = document(collection, "good");
        good.insert("active".to_owned(), true.into());
        store.insert_document(collection, &good).await.unwrap();
        for active in [false, true] {
            let found = store.documents(collection, active).await.unwrap();
            assert_eq!(found.iter().map(|found| &found.value).collect::<Vec<_>>(), [&good]);
        }
        let error = store.document(collection, "odd").await.unwrap_err();
        assert!(matches!(&error, StoreError::Corrupt { what } if what.ends_with(" odd")), "{error:?}");
        assert!(store.delete_document(collection, "odd", None).await.unwrap());
        store.insert_document(collection, &document(collection, "odd")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vault_reads_and_replaces_the_packages_of_mcp_api() {
    const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    let (settings, own) = fresh().await;
    let packages = rows(&own, Documents::Packages);
    packages.insert_one(written_by_mcp_api("echo")).await.unwrap();
    packages.insert_one(doc! { "name": "failed", "status": "installing" }).await.unwrap();
    let store = MongoStore::connect(settings).await.unwrap();
    let vault = Vault::open(store, KeySource::Text(KEY.into()), None).await.unwrap();
    let mut listed = vault.packages().await.unwrap();
    assert_eq!(listed.len(), 1);
    let mut package = listed.remove(0);
    assert_eq!(package.value.installed.millis(), INSTALLED);
    assert_eq!(package.value.last_upgraded.unwrap().millis(), INSTALLED + 1);
    assert!(!package.value.fail_on_warning && package.value.venv_path.is_none());
    package.value.latest_version = None;
    vault.replace_package(&package.value, package.revision).await.unwrap();
    let again = vault.package(&ServerName::from_stored("echo")).await.unwrap().unwrap();
    assert_eq!(again.value, package.value);
    let stored = packages.find_one(doc! { "mcpServerId": "echo" }).await.unwrap().unwrap();
    assert_eq!(stored.get("installed"), Some(&Bson::from(DateTime::from_millis(INSTALLED))));
    assert_eq!(stored.get("owner"), Some(&Bson::from(ObjectId::from_bytes([7; 12]))));
}
