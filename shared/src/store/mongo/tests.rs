use super::*;
use crate::testing::services::shared_mongo;

mod faults;
mod generic;
mod legacy;

/// A database of a test's own. It is dropped at the end of the test.
struct Own(mongodb::Database);

impl Drop for Own {
    fn drop(&mut self) {
        let database = self.0.clone();
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async move {
                // The next run has another name in any case.
                let _ = database.drop().await;
            });
        });
    }
}

fn settings(uri: &str, database: &str) -> MongoSettings {
    MongoSettings { database: Some(database.to_owned()), ..MongoSettings::new(uri.into()) }
}

/// A database before the store has seen it.
async fn fresh() -> (MongoSettings, Own) {
    let uri = tokio::task::spawn_blocking(shared_mongo).await.unwrap();
    let name = format!("t{}", uuid::Uuid::now_v7().simple());
    let client = Client::with_uri_str(uri).await.unwrap();
    (settings(uri, &name), Own(client.database(&name)))
}

async fn open() -> (Arc<dyn Store>, Own) {
    let (settings, own) = fresh().await;
    (MongoStore::connect(settings).await.unwrap(), own)
}

crate::store_contract!(open);

fn outage<T: fmt::Debug>(outcome: Result<T, StoreError>) -> String {
    match outcome {
        Err(StoreError::Unavailable { cause }) => cause,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_address_is_read_without_showing_its_password() {
    const CANARY: &str = "canary/@:%";
    for bad in [
        "mongodb://u:canary/@:%@host/db",
        "mongodb://u:canary@host:port/",
        "http://u:canary@host",
        "mongodb://",
    ] {
        let settings = MongoSettings::new(bad.into());
        let error = MongoStore::connect(settings.clone()).await.unwrap_err();
        assert!(matches!(error, ConnectError::Address), "{error:?}");
        let shown = format!("{error} {error:?} {settings:?}");
        assert!(!shown.contains("canary"), "{shown}");
    }
    // Given apart, nothing in a name or password has a meaning, and what the URI promises is kept.
    let mut given =
        MongoSettings::new("mongodb://x:y@h1:1,h2/?authSource=users&w=1&readPreference=nearest".into());
    given.credentials = Some(("ro:ot@".to_owned(), CANARY.into()));
    given.replica_set = Some("set".to_owned());
    assert!(!format!("{given:?}").contains("canary"));
    let read = options(&given).await.unwrap();
    let credential = read.credential.unwrap();
    assert_eq!(credential.username.as_deref(), Some("ro:ot@"));
    assert_eq!(credential.password.as_deref(), Some(CANARY));
    assert_eq!(credential.source.as_deref(), Some("users"));
    assert_eq!((read.hosts.len(), read.repl_set_name.as_deref()), (2, Some("set")));
    assert_eq!(read.write_concern.unwrap().w, Some(Acknowledgment::Majority));
    assert_eq!(read.selection_criteria, Some(SelectionCriteria::ReadPreference(ReadPreference::Primary)));
    // A host alone is an address too.
    let read = options(&MongoSettings::new(" localhost:27018 ".into())).await.unwrap();
    assert_eq!(read.hosts[0].to_string(), "localhost:27018");
    assert!(read.credential.is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_are_made_once_and_allow_no_duplicates() {
    let (settings, own) = fresh().await;
    // One that an operator made: under another name, it is as good as ours.
    let made = mongodb::IndexModel::builder().keys(doc! { "name": 1 }).build();
    own.0.collection::<Document>("mcp").create_index(made).await.unwrap();
    let first = MongoStore::connect(settings.clone()).await.unwrap();
    let second = MongoStore::connect(settings).await.unwrap();
    first.ping().await.unwrap();
    second.ping().await.unwrap();
    let secrets = own.0.collection::<Document>("secrets");
    let row = || doc! { "username": "u", "key": "a.b", "value": "x" };
    secrets.insert_one(row()).await.unwrap();
    assert!(failure::is_duplicate(&secrets.insert_one(row()).await.unwrap_err()));
    let mut names = own.0.collection::<Document>("secrets").list_index_names().await.unwrap();
    names.sort();
    assert_eq!(names, ["_id_", "key", "secret_unique"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_operations_wait_than_may() {
    let (settings, _own) = fresh().await;
    let store = MongoStore::connect(settings).await.unwrap();
    let all = u32::try_from(store.places.available_permits()).unwrap();
    let places = store.places.try_acquire_many(all).unwrap();
    assert_eq!(outage(store.servers().await), "queue full");
    drop(places);
    store.servers().await.unwrap();
}
