use mongodb::event::{EventHandler, command::CommandEvent};

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
    let write = read.write_concern.unwrap();
    assert_eq!((write.w, write.journal), (Some(Acknowledgment::Majority), Some(true)));
    assert_eq!(read.read_concern, Some(ReadConcern::majority()));
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

/// What the driver really sends: no URI can weaken it, and no operation does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_read_from_the_primary_and_what_is_written_is_a_majoritys() {
    let (mut settings, _own) = fresh().await;
    let weak = "readPreference=secondaryPreferred&readConcernLevel=local&w=0&journal=false";
    settings.address = format!("{}&{weak}", settings.address.expose_secret()).into();
    let mut options = options(&settings).await.unwrap();
    let (seen, sent) = std::sync::mpsc::sync_channel(1_000);
    options.command_event_handler = Some(EventHandler::callback(move |event| {
        if let CommandEvent::Started(started) = event {
            let _ = seen.try_send(started.command);
        }
    }));
    let store = MongoStore::look(settings, options).await.unwrap();
    let (user, server, name) =
        (UserId::from_stored("alice"), ServerName::from_stored("one"), SecretName::from_stored("K"));
    let secret = SealedSecret {
        username: user.clone(),
        key: SealedSecret::key_of(&server, &name),
        server_name: server.clone(),
        secret_name: name.clone(),
        value: "sealed".to_owned(),
    };
    // The server is a row of its own: without it nothing is stored.
    let row = doc! { "name": "one", "_incarnation": 1_i64 };
    store.database.servers.clone_with_type::<Document>().insert_one(row).await.unwrap();
    store.put_secret(&secret).await.unwrap();
    assert_eq!(store.secrets(&user, &server).await.unwrap().len(), 1);
    assert!(store.delete_secret(&user, &server, &name).await.unwrap());

    let commands: Vec<Document> = sent.try_iter().collect();
    let (mut reads, mut writes) = (0, 0);
    for command in &commands {
        let name = command.keys().next().unwrap().as_str();
        // A direct connection says `primaryPreferred`, so that it may be to any node; nothing weaker is said.
        let preference = command.get_document("$readPreference").and_then(|it| it.get_str("mode"));
        assert!(matches!(preference, Err(_) | Ok("primary" | "primaryPreferred")), "{command}");
        match name {
            "find" | "aggregate" | "distinct" | "count" => {
                reads += 1;
                let concern = command.get_document("readConcern").unwrap();
                assert_eq!(concern.get_str("level").unwrap(), "majority", "{command}");
            }
            "insert" | "update" | "delete" => {
                writes += 1;
                let concern = command.get_document("writeConcern").unwrap();
                assert_eq!(concern.get_str("w").unwrap(), "majority", "{command}");
                assert!(concern.get_bool("j").unwrap(), "{command}");
            }
            _ => {}
        }
    }
    assert!(reads >= 3 && writes >= 3, "{reads} reads and {writes} writes were seen");
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
