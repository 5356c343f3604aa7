//! Other texts for the same values: page by page, and never over what somebody changed.

use std::sync::Arc;

use super::{RIVALS, document, registered, secret, server, unique, user};
use crate::{
    ids::UserId,
    store::{Collection, Revision, SecretRow, Store, StoreError, Versioned},
};

/// Whoever read the server before can still change it; after that nothing is resealed any more.
pub async fn a_resealed_server_keeps_its_revision(store: Arc<dyn Store>) {
    let mut server = server(&unique("reseal"));
    let missing = store.reseal_server(&server, Revision(1)).await;
    assert!(matches!(missing, Err(StoreError::NotFound)), "{missing:?}");
    let revision = store.insert_server(&server).await.unwrap();
    for text in ["one", "two"] {
        server.0.description = text.to_owned();
        store.reseal_server(&server, revision).await.unwrap();
        let expected = Versioned { revision, value: server.clone() };
        assert_eq!(store.server(&server.0.name).await.unwrap(), Some(expected));
    }
    let mut late = server.clone();
    server.0.description = "a user's".to_owned();
    let second = store.replace_server(&server, revision).await.unwrap();
    assert_ne!(second, revision);
    late.0.description = "late".to_owned();
    let outcome = store.reseal_server(&late, revision).await;
    assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
    let expected = Versioned { revision: second, value: server.clone() };
    assert_eq!(store.server(&server.0.name).await.unwrap(), Some(expected));
}

/// The same for documents.
pub async fn a_resealed_document_keeps_its_revision(store: Arc<dyn Store>) {
    for collection in Collection::ALL {
        let key = unique("reseal");
        let mut own = document(collection, &key);
        let missing = store.reseal_document(collection, &own, Revision(1)).await;
        assert!(matches!(missing, Err(StoreError::NotFound)), "{missing:?}");
        let revision = store.insert_document(collection, &own).await.unwrap();
        own.insert("name".to_owned(), "resealed".into());
        store.reseal_document(collection, &own, revision).await.unwrap();
        let expected = Versioned { revision, value: own.clone() };
        assert_eq!(store.document(collection, &key).await.unwrap(), Some(expected));
        let late = own.clone();
        own.insert("name".to_owned(), "a user's".into());
        let second = store.replace_document(collection, &own, revision).await.unwrap();
        let outcome = store.reseal_document(collection, &late, revision).await;
        assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
        let expected = Versioned { revision: second, value: own };
        assert_eq!(store.document(collection, &key).await.unwrap(), Some(expected));
    }
}

/// A secret that was set, or deleted, meanwhile stays as it is then.
pub async fn a_secret_is_resealed_as_long_as_it_is_what_it_was(store: Arc<dyn Store>) {
    let (user, server) = (user("reseal"), registered(&*store, "reseal").await);
    let old = secret(&user, &server, "KEY", "old");
    store.put_secret(&old).await.unwrap();
    let row =
        |value: &str| SecretRow { username: user.to_string(), key: old.key.clone(), value: value.to_owned() };
    assert!(store.reseal_secret(&row("old"), "resealed").await.unwrap());
    let resealed = secret(&user, &server, "KEY", "resealed");
    assert_eq!(store.secrets(&user, &server).await.unwrap(), [resealed]);
    assert!(!store.reseal_secret(&row("old"), "late").await.unwrap());
    let new = secret(&user, &server, "KEY", "a user's");
    store.put_secret(&new).await.unwrap();
    assert!(!store.reseal_secret(&row("resealed"), "late").await.unwrap());
    assert_eq!(store.secrets(&user, &server).await.unwrap(), [new]);
    store.delete_secret(&user, &server, &old.secret_name).await.unwrap();
    assert!(!store.reseal_secret(&row("a user's"), "late").await.unwrap());
    assert!(store.secrets(&user, &server).await.unwrap().is_empty());
}

/// Every secret is on one page, in the order of users and keys, however users and keys are spelled.
pub async fn all_secrets_are_found_page_by_page(store: Arc<dyn Store>) {
    let server = registered(&*store, "pages").await;
    let base = unique("page");
    let users = ["", ".b", "$x", "B", "b", "\u{e4}", "\u{1F600}"].map(|end| format!("{base}{end}"));
    let mut expected = Vec::new();
    for name in &users {
        let user = UserId::from_stored(name);
        for name in ["B", "a", "\u{1F600}"] {
            let secret = secret(&user, &server, name, "sealed");
            store.put_secret(&secret).await.unwrap();
            expected.push((user.to_string(), secret.key));
        }
    }
    expected.sort();
    for limit in [1, 4, 1_000] {
        let mut found: Vec<(String, String)> = Vec::new();
        let mut last: Option<(String, String)> = None;
        loop {
            let after = last.as_ref().map(|(user, key)| (user.as_str(), key.as_str()));
            let page = store.secrets_after(after, limit).await.unwrap();
            assert!(page.len() <= limit);
            let Some(end) = page.last() else { break };
            last = Some((end.username.clone(), end.key.clone()));
            found.extend(page.into_iter().map(|row| (row.username, row.key)));
        }
        assert!(found.is_sorted(), "{found:?}");
        found.retain(|(user, _)| user.starts_with(&base));
        assert_eq!(found, expected, "pages of {limit}");
    }
}

/// Every document is on one page, in the order of the keys.
pub async fn all_documents_are_found_page_by_page(store: Arc<dyn Store>) {
    let (collection, base) = (Collection::NamedCalls, unique("page"));
    let mut expected: Vec<String> = (0..RIVALS).map(|number| format!("{base}-{number}")).collect();
    expected.push(format!("{base}-\u{1F600}"));
    for key in &expected {
        store.insert_document(collection, &document(collection, key)).await.unwrap();
    }
    expected.sort();
    for limit in [1, 5, 1_000] {
        let (mut found, mut last): (Vec<String>, Option<String>) = (Vec::new(), None);
        loop {
            let page = store.documents_after(collection, last.as_deref(), limit).await.unwrap();
            assert!(page.len() <= limit);
            let Some((end, _)) = page.last() else { break };
            last = Some(end.clone());
            for (key, document) in page {
                if key.starts_with(&base) {
                    let stored = store.document(collection, &key).await.unwrap();
                    assert_eq!(document, stored);
                    found.push(key);
                }
            }
        }
        assert_eq!(found, expected, "pages of {limit}");
    }
}
