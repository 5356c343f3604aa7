//! A database that goes away, comes back, or does not answer.

use std::{collections::BTreeSet, time::Instant};

use super::*;
use crate::testing::{port::Port, services::MongoServer, store_contract::server};

async fn private() -> (MongoServer, MongoSettings) {
    let server = tokio::task::spawn_blocking(MongoServer::start).await.unwrap();
    let settings = settings(&server.uri(), "own");
    (server, settings)
}

/// The longest that an operation may take, with room for a loaded machine.
fn limit() -> Duration {
    limits::STORE_TIMEOUT + Duration::from_secs(2)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_by_a_crash() {
    let (mut mongo, settings) = private().await;
    let store = MongoStore::connect(settings).await.unwrap();
    let writer = Arc::clone(&store);
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let writing = tokio::spawn(async move {
        let (mut acknowledged, mut refused) = (Vec::new(), 0);
        for number in 0.. {
            if stopped.try_recv().is_ok() {
                break;
            }
            let begun = Instant::now();
            match writer.put_once(Fact::AppState, &format!("k{number}"), "v").await {
                Ok(_) => acknowledged.push(format!("k{number}")),
                Err(StoreError::Unavailable { .. }) => refused += 1,
                Err(error) => panic!("{error:?}"),
            }
            assert!(begun.elapsed() < limit(), "{:?}", begun.elapsed());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        (acknowledged, refused)
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    mongo.kill();
    // While it is gone, the answer comes in the time that finding a server may take.
    let begun = Instant::now();
    outage(store.fact(Fact::AppState, "k0").await);
    assert!(begun.elapsed() < limit());
    outage(store.ping().await);
    let (mongo, back) = tokio::task::spawn_blocking(move || {
        mongo.restart();
        (mongo, Instant::now())
    })
    .await
    .unwrap();
    while store.ping().await.is_err() {
        assert!(back.elapsed() < Duration::from_secs(10));
    }
    let recovered = back.elapsed();
    assert!(recovered < Duration::from_secs(5), "{recovered:?}");
    assert!(!store.failing.load(Ordering::Relaxed));
    tokio::time::sleep(Duration::from_millis(300)).await;
    stop.send(()).unwrap();
    let (acknowledged, refused) = writing.await.unwrap();
    assert!(refused > 0 && acknowledged.len() > 10, "{refused} {}", acknowledged.len());
    let facts = store.database.database.collection::<Document>("appState");
    let stored = facts.distinct("_id", doc! {}).await.unwrap();
    let stored: BTreeSet<&str> = stored.iter().filter_map(|id| id.as_str()).collect();
    let lost: Vec<_> = acknowledged.iter().filter(|key| !stored.contains(key.as_str())).collect();
    assert!(lost.is_empty(), "{lost:?}");
    drop(mongo);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_does_not_answer_costs_no_more_than_the_limit() {
    let (mongo, settings) = private().await;
    let store = MongoStore::connect(settings.clone()).await.unwrap();
    store.insert_server(&server("before")).await.unwrap();
    mongo.freeze();
    let begun = Instant::now();
    let calls: Vec<_> = (0..40)
        .map(|number| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.fact(Fact::KeyRing, &number.to_string()).await })
        })
        .collect();
    outage(store.insert_server(&server("meanwhile")).await);
    for call in calls {
        outage(call.await.unwrap());
    }
    assert!(begun.elapsed() < limit(), "{:?}", begun.elapsed());
    let begun = Instant::now();
    let error = MongoStore::connect(settings).await.unwrap_err();
    assert!(matches!(error, ConnectError::Store(StoreError::Unavailable { .. })), "{error:?}");
    assert!(begun.elapsed() < limit(), "{:?}", begun.elapsed());
    mongo.thaw();
    let begun = Instant::now();
    while store.ping().await.is_err() {
        assert!(begun.elapsed() < Duration::from_secs(15));
    }
    assert!(store.server(&ServerName::from_stored("before")).await.unwrap().is_some());
    assert_eq!(store.places.available_permits(), limits::STORE_POOL as usize + limits::STORE_QUEUE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_an_outage_that_shows_no_password() {
    let nobody = Port::keep();
    let uri = format!("mongodb://user:canary@{}/?directConnection=true", nobody.address());
    let begun = Instant::now();
    let error = MongoStore::connect(MongoSettings::new(uri.into())).await.unwrap_err();
    assert!(begun.elapsed() < limit());
    assert!(matches!(error, ConnectError::Store(StoreError::Unavailable { .. })), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("canary"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_was_replaced_gets_its_indexes_again() {
    let (settings, own) = fresh().await;
    let store = MongoStore::connect(settings).await.unwrap();
    own.0.drop().await.unwrap();
    // What an outage leaves behind.
    store.failing.store(true, Ordering::Relaxed);
    store.ping().await.unwrap();
    let names = own.0.collection::<Document>("mcp").list_index_names().await.unwrap();
    assert!(names.iter().any(|name| name == "caseKey_unique"), "{names:?}");
    // Such documents are larger than MongoDB takes: an error, and the store goes on.
    let mut large = server("large");
    large.0.description = "x".repeat(17 * 1024 * 1024);
    let outcome = store.insert_server(&large).await;
    assert!(matches!(outcome, Err(StoreError::Corrupt { .. })), "{outcome:?}");
    store.ping().await.unwrap();
}
