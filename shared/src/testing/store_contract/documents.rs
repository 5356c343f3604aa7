//! Documents by collection and key: whole, in order, one winner, no revision twice.

use std::{collections::HashSet, sync::Arc};

use serde_json::{Value, json};

use super::{compete, document, one_won, registered, server, unique};
use crate::{
    ids::ServerName,
    store::{Collection, Document, Revision, Store, StoreError, Versioned},
};

/// A document comes back as it was, with fields that nobody knows, alone and among the others.
pub async fn a_document_is_kept_whole(store: Arc<dyn Store>) {
    for collection in Collection::ALL {
        let key = unique("Whole");
        let first = document(collection, &key);
        assert_eq!(store.document(collection, &key).await.unwrap(), None);
        let revision = store.insert_document(collection, &first).await.unwrap();
        let expected = Versioned { revision, value: first.clone() };
        assert_eq!(store.document(collection, &key).await.unwrap().as_ref(), Some(&expected));
        assert_eq!(listed(&*store, collection, false, &key).await, [expected]);

        let mut second = first;
        second.remove("log");
        second.insert("lastUpgraded".to_owned(), "2027-01-31T00:00:00.000Z".into());
        second.insert("installed".to_owned(), "2027-01-31T00:00:00.000001+01:00".into());
        second.insert("new".to_owned(), json!({ "a.b": { "$c": [[]] }, "none": null }));
        let revision = store.replace_document(collection, &second, revision).await.unwrap();
        let expected = Versioned { revision, value: second };
        assert_eq!(store.document(collection, &key).await.unwrap().as_ref(), Some(&expected));
        assert_eq!(listed(&*store, collection, false, &key).await, [expected]);
    }
}

/// Locks of large packages have megabytes.
pub async fn a_large_document_is_kept_whole(store: Arc<dyn Store>) {
    let (collection, key) = (Collection::PackageLocks, unique("large"));
    let mut large = document(collection, &key);
    let line = "    \"integrity\": \"sha512-\u{e4}\",\n";
    large.insert("files".to_owned(), json!({ "package-lock.json": line.repeat(3_000_000 / line.len() + 1) }));
    let first = store.insert_document(collection, &large).await.unwrap();
    taken(store.insert_document(collection, &large).await, &key);
    large.insert("name".to_owned(), "second".into());
    let revision = store.replace_document(collection, &large, first).await.unwrap();
    let found = store.document(collection, &key).await.unwrap();
    assert!(found == Some(Versioned { revision, value: large }), "it is not what it was");
    conflicts(store.delete_document(collection, &key, Some(first)).await);
    assert!(store.delete_document(collection, &key, Some(revision)).await.unwrap());
}

/// A key is taken by one document of a collection, and by none of the others.
pub async fn a_document_needs_a_key_that_is_free(store: Arc<dyn Store>) {
    let key = unique("taken");
    for collection in Collection::ALL {
        assert_eq!(store.document(collection, &key).await.unwrap(), None);
        let first = document(collection, &key);
        let revision = store.insert_document(collection, &first).await.unwrap();
        let mut second = document(collection, &key);
        second.insert("status".to_owned(), "second".into());
        taken(store.insert_document(collection, &second).await, &key);
        let expected = Versioned { revision, value: first };
        assert_eq!(store.document(collection, &key).await.unwrap(), Some(expected));
        for bad in [Value::Null, "".into(), 7.into()] {
            second.insert(collection.key().to_owned(), bad);
            let outcome = store.insert_document(collection, &second).await;
            assert!(matches!(outcome, Err(StoreError::Corrupt { .. })), "{outcome:?}");
        }
        assert!(store.delete_document(collection, &key, None).await.unwrap());
    }
}

/// Case, dots and signs of patterns in keys are only characters.
pub async fn keys_are_only_text(store: Arc<dyn Store>) {
    let base = unique("k");
    let keys = ["", ".b", "%", "_", "$x", "'", "\u{1F600}", "B", "b"].map(|end| format!("{base}{end}"));
    for key in &keys {
        store.insert_document(Collection::Jobs, &document(Collection::Jobs, key)).await.unwrap();
    }
    for key in &keys {
        let found = store.document(Collection::Jobs, key).await.unwrap().unwrap();
        assert_eq!(found.value, document(Collection::Jobs, key));
    }
    assert!(store.delete_document(Collection::Jobs, &keys[0], None).await.unwrap());
    assert_eq!(listed(&*store, Collection::Jobs, false, &base).await.len(), keys.len() - 1);
}

/// Of many who add a document with the same key at the same time, one succeeds.
pub async fn one_of_many_additions_wins(store: Arc<dyn Store>) {
    for collection in Collection::ALL {
        let key = unique("rivals");
        let outcomes = compete(|rival| {
            let (store, mut document) = (Arc::clone(&store), document(collection, &key));
            document.insert("rival".to_owned(), rival.into());
            async move { store.insert_document(collection, &document).await }
        })
        .await;
        let (winner, revision) =
            one_won(&outcomes, |error| matches!(error, StoreError::AlreadyExists { .. }));
        let found = listed(&*store, collection, false, &key).await;
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].revision, &found[0].value["rival"]), (*revision, &json!(winner)));
    }
}

/// A replacement fits only the revision that was read, and only a document that exists.
pub async fn a_document_is_replaced_at_its_current_revision(store: Arc<dyn Store>) {
    for collection in Collection::ALL {
        let key = unique("replace");
        let mut document = document(collection, &key);
        let missing = store.replace_document(collection, &document, Revision(1)).await;
        assert!(matches!(missing, Err(StoreError::NotFound)), "{missing:?}");
        let first = store.insert_document(collection, &document).await.unwrap();
        document.insert("status".to_owned(), "second".into());
        let second = store.replace_document(collection, &document, first).await.unwrap();
        assert_ne!(first, second);
        let mut stale = document.clone();
        stale.insert("status".to_owned(), "stale".into());
        conflicts(store.replace_document(collection, &stale, first).await);
        let expected = Versioned { revision: second, value: document.clone() };
        assert_eq!(store.document(collection, &key).await.unwrap(), Some(expected));
        // Also a write that changes nothing is a write.
        let third = store.replace_document(collection, &document, second).await.unwrap();
        assert!(third != second && third != first);
    }
}

/// Of many who change or delete the same revision at the same time, one succeeds.
pub async fn one_of_many_changes_wins(store: Arc<dyn Store>) {
    let (collection, key) = (Collection::Jobs, unique("race"));
    let document = document(collection, &key);
    let revision = store.insert_document(collection, &document).await.unwrap();
    let outcomes = compete(|rival| {
        let (store, mut document) = (Arc::clone(&store), document.clone());
        document.insert("rival".to_owned(), rival.into());
        async move { store.replace_document(collection, &document, revision).await }
    })
    .await;
    let (winner, won) = one_won(&outcomes, |error| matches!(error, StoreError::Conflict));
    let found = store.document(collection, &key).await.unwrap().unwrap();
    assert_eq!((found.revision, &found.value["rival"]), (*won, &json!(winner)));

    let outcomes = compete(|rival| {
        let (store, key, document) = (Arc::clone(&store), key.clone(), document.clone());
        async move {
            if rival % 2 == 0 {
                return store.replace_document(collection, &document, found.revision).await.map(|_| false);
            }
            // Who finds it deleted did not do it.
            match store.delete_document(collection, &key, Some(found.revision)).await? {
                true => Ok(true),
                false => Err(StoreError::NotFound),
            }
        }
    })
    .await;
    let (_, deleted) =
        one_won(&outcomes, |error| matches!(error, StoreError::Conflict | StoreError::NotFound));
    assert_eq!(store.document(collection, &key).await.unwrap().is_none(), *deleted);
}

/// A deletion that names a revision fits only that one; one that names none fits any.
pub async fn a_document_is_deleted_at_its_current_revision(store: Arc<dyn Store>) {
    for collection in Collection::ALL {
        let (key, other) = (unique("delete"), unique("stays"));
        store.insert_document(collection, &document(collection, &other)).await.unwrap();
        for expected in [None, Some(Revision(1))] {
            assert!(!store.delete_document(collection, &key, expected).await.unwrap());
        }
        let document = document(collection, &key);
        for named in [true, false] {
            let first = store.insert_document(collection, &document).await.unwrap();
            let second = store.replace_document(collection, &document, first).await.unwrap();
            conflicts(store.delete_document(collection, &key, Some(first)).await);
            assert_eq!(store.document(collection, &key).await.unwrap().unwrap().revision, second);
            let expected = named.then_some(second);
            assert!(store.delete_document(collection, &key, expected).await.unwrap());
            assert!(!store.delete_document(collection, &key, expected).await.unwrap());
            assert_eq!(store.document(collection, &key).await.unwrap(), None);
            assert_eq!(listed(&*store, collection, false, &key).await, []);
        }
        assert_eq!(listed(&*store, collection, false, &other).await.len(), 1);
    }
}

/// Who read a document that was deleted since cannot change the one that has its key now.
pub async fn a_revision_does_not_fit_a_later_document_of_that_key(store: Arc<dyn Store>) {
    for collection in Collection::ALL {
        let key = unique("again");
        let document = document(collection, &key);
        let mut revisions = HashSet::new();
        for _ in 0..3 {
            let mut revision = store.insert_document(collection, &document).await.unwrap();
            for old in &revisions {
                conflicts(store.replace_document(collection, &document, *old).await);
                conflicts(store.delete_document(collection, &key, Some(*old)).await);
            }
            for _ in 0..3 {
                assert!(revisions.insert(revision), "{revision:?} was there before");
                revision = store.replace_document(collection, &document, revision).await.unwrap();
            }
            assert!(revisions.insert(revision), "{revision:?} was there before");
            assert!(store.delete_document(collection, &key, Some(revision)).await.unwrap());
        }
    }
}

/// Active is what says so of itself, as it stands now.
pub async fn active_documents_can_be_listed_alone(store: Arc<dyn Store>) {
    let base = unique("active");
    for collection in Collection::ALL {
        for (end, active) in [
            ("yes", Value::Bool(true)),
            ("no", Value::Bool(false)),
            ("text", "true".into()),
            ("one", 1.into()),
        ] {
            let mut document = document(collection, &format!("{base}-{end}"));
            document.insert("active".to_owned(), active);
            store.insert_document(collection, &document).await.unwrap();
        }
        let mut none = document(collection, &format!("{base}-none"));
        none.remove("active");
        store.insert_document(collection, &none).await.unwrap();
        let mut active = listed(&*store, collection, true, &base).await;
        assert_eq!(keys(collection, &active), [format!("{base}-yes")]);
        assert_eq!(listed(&*store, collection, false, &base).await.len(), 5);

        let mut over = active.remove(0);
        over.value.insert("active".to_owned(), false.into());
        store.replace_document(collection, &over.value, over.revision).await.unwrap();
        assert_eq!(listed(&*store, collection, true, &base).await, []);
        let mut begun = store.document(collection, &format!("{base}-no")).await.unwrap().unwrap();
        begun.value.insert("active".to_owned(), true.into());
        store.replace_document(collection, &begun.value, begun.revision).await.unwrap();
        let active = listed(&*store, collection, true, &base).await;
        assert_eq!(keys(collection, &active), [format!("{base}-no")]);
    }
}

/// The order of a listing is that of the additions, which replacing one does not change.
pub async fn documents_are_listed_in_the_order_in_which_they_were_added(store: Arc<dyn Store>) {
    let base = unique("order");
    for collection in Collection::ALL {
        let names = ["m", "z", "a", "k"].map(|letter| format!("{letter}-{base}"));
        for name in &names {
            let mut document = document(collection, name);
            document.insert("active".to_owned(), true.into());
            store.insert_document(collection, &document).await.unwrap();
        }
        let mut first = store.document(collection, &names[0]).await.unwrap().unwrap();
        first.value.insert("status".to_owned(), "changed".into());
        store.replace_document(collection, &first.value, first.revision).await.unwrap();
        for active in [false, true] {
            assert_eq!(keys(collection, &listed(&*store, collection, active, &base).await), names);
        }
        // What is added again is the last.
        assert!(store.delete_document(collection, &names[1], None).await.unwrap());
        store.insert_document(collection, &document(collection, &names[1])).await.unwrap();
        let now = listed(&*store, collection, false, &base).await;
        assert_eq!(keys(collection, &now), [&names[0], &names[2], &names[3], &names[1]]);
    }
}

/// The server is the one that a document names now, letter by letter.
pub async fn documents_of_a_server_are_listed_alone(store: Arc<dyn Store>) {
    let (base, one) = (unique("of"), ServerName::from_stored(unique("One")));
    let other = ServerName::from_stored(one.as_str().to_uppercase());
    for collection in Collection::ALL {
        if collection.key() == "serverName" {
            continue;
        }
        let names = ["m", "z", "a", "k", "none", "number"].map(|letter| format!("{letter}-{base}"));
        let servers = [&one, &one, &other, &one].map(|server| Value::from(server.as_str()));
        for (name, server) in names.iter().zip(servers.into_iter().chain([Value::Null, 7.into()])) {
            let mut document = document(collection, name);
            document.insert("serverName".to_owned(), server);
            store.insert_document(collection, &document).await.unwrap();
        }
        let mut found = store.documents_of(collection, &one).await.unwrap();
        assert_eq!(keys(collection, &found), [&names[0], &names[1], &names[3]]);
        let first = store.document(collection, &names[0]).await.unwrap();
        assert_eq!(first.as_ref(), Some(&found[0]));

        let mut moved = found.remove(0);
        moved.value.insert("serverName".to_owned(), other.as_str().into());
        store.replace_document(collection, &moved.value, moved.revision).await.unwrap();
        let found = store.documents_of(collection, &one).await.unwrap();
        assert_eq!(keys(collection, &found), [&names[1], &names[3]]);
        let found = store.documents_of(collection, &other).await.unwrap();
        assert_eq!(keys(collection, &found), [&names[0], &names[2]]);
    }
    let job = document(Collection::Jobs, one.as_str());
    store.insert_document(Collection::Jobs, &job).await.unwrap();
    let found = store.documents_of(Collection::Jobs, &one).await.unwrap();
    assert_eq!(found.iter().map(|found| &found.value).collect::<Vec<_>>(), [&job]);
}

/// With a server go its users' sessions, tokens and logins, and nothing else. A later server of its name
/// inherits none, also not what was stored after the deletion.
pub async fn documents_of_a_server_go_with_it(store: Arc<dyn Store>) {
    let (gone, stays) = (registered(&*store, "gone").await, registered(&*store, "stays").await);
    let of_server = |collection| Collection::OF_SERVERS.contains(&collection);
    let put = async |server: &ServerName| {
        for collection in Collection::ALL {
            let key = if collection == Collection::Jobs { server.to_string() } else { unique("document") };
            let mut document = document(collection, &key);
            document.insert("serverName".to_owned(), server.as_str().into());
            store.insert_document(collection, &document).await.unwrap();
        }
    };
    put(&gone).await;
    put(&stays).await;
    let counts = async |server: &ServerName| {
        let mut counts = Vec::new();
        for collection in Collection::ALL {
            counts.push((of_server(collection), store.documents_of(collection, server).await.unwrap().len()));
        }
        counts
    };
    let left = |count: (bool, usize)| count.1 == usize::from(!count.0);
    assert!(store.delete_server(&gone).await.unwrap());
    assert!(counts(&gone).await.into_iter().all(left));
    assert!(counts(&stays).await.into_iter().all(|(_, count)| count == 1));

    let mut late = document(Collection::OAuthTokens, &unique("late"));
    late.insert("serverName".to_owned(), gone.as_str().into());
    store.insert_document(Collection::OAuthTokens, &late).await.unwrap();
    store.insert_server(&server(gone.as_str())).await.unwrap();
    assert!(counts(&gone).await.into_iter().all(left));
    // A repeated deletion completes one that was cut short.
    assert!(store.delete_server(&gone).await.unwrap());
    store.insert_document(Collection::OAuthTokens, &late).await.unwrap();
    assert!(!store.delete_server(&gone).await.unwrap());
    assert!(counts(&gone).await.into_iter().all(left));
}

/// A test's own documents of a listing, by a part of their keys.
async fn listed(
    store: &dyn Store,
    collection: Collection,
    active: bool,
    part: &str,
) -> Vec<Versioned<Document>> {
    let mut all = store.documents(collection, active).await.unwrap();
    all.retain(|found| found.value[collection.key()].as_str().unwrap().contains(part));
    all
}

fn keys(collection: Collection, documents: &[Versioned<Document>]) -> Vec<&str> {
    documents.iter().map(|found| found.value[collection.key()].as_str().unwrap()).collect()
}

fn taken(outcome: Result<Revision, StoreError>, key: &str) {
    match outcome {
        Err(StoreError::AlreadyExists { existing }) => assert_eq!(existing, key),
        other => panic!("{other:?}"),
    }
}

fn conflicts<T: std::fmt::Debug>(outcome: Result<T, StoreError>) {
    assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
}
