//! Servers and what they listed: whole, in order, one winner, nothing left behind.

use std::sync::Arc;

use super::{compete, one_won, registered, secret, server, tools_of, unique, user};
use crate::{
    ids::ServerName,
    store::{Revision, Store, StoreError, StoredTools, Versioned},
};

/// `ping` succeeds on a healthy store.
pub async fn the_store_answers(store: Arc<dyn Store>) {
    store.ping().await.unwrap();
    store.ping().await.unwrap();
}

/// A record comes back as it was, with fields that this version does not know.
pub async fn a_server_is_kept_whole(store: Arc<dyn Store>) {
    let server = server(&unique("Whole"));
    assert!(server.0.extra.contains_key("catalogProvider"));
    let name = &server.0.name;
    assert!(store.server(name).await.unwrap().is_none());
    let revision = store.insert_server(&server).await.unwrap();
    let expected = Versioned { revision, value: server.clone() };
    assert_eq!(store.server(name).await.unwrap(), Some(expected.clone()));
    assert!(store.servers().await.unwrap().contains(&expected));

    let mut changed = server.clone();
    changed.0.description = "changed".to_owned();
    let revision = store.replace_server(&changed, revision).await.unwrap();
    let expected = Versioned { revision, value: changed };
    assert_eq!(store.server(name).await.unwrap(), Some(expected));
    // Names are compared with their case, except where one is registered.
    let lower = ServerName::from_stored(name.case_key());
    assert!(store.server(&lower).await.unwrap().is_none());
}

/// Registering a taken name fails, also in another case, and names the server that has it.
pub async fn a_taken_name_is_refused(store: Arc<dyn Store>) {
    let first = server(&unique("Taken"));
    let revision = store.insert_server(&first).await.unwrap();
    let mut second = server(first.0.name.as_str());
    second.0.description = "second".to_owned();
    let mut upper = second.clone();
    upper.0.name = ServerName::from_stored(first.0.name.as_str().to_ascii_uppercase());
    for clash in [second, upper] {
        match store.insert_server(&clash).await {
            Err(StoreError::AlreadyExists { existing }) => assert_eq!(existing, first.0.name.as_str()),
            other => panic!("{other:?}"),
        }
    }
    let expected = Versioned { revision, value: first.clone() };
    assert_eq!(store.server(&first.0.name).await.unwrap(), Some(expected));
}

/// Of many who register one name at the same time, in whatever case, one succeeds.
pub async fn one_of_many_registrations_wins(store: Arc<dyn Store>) {
    let name = unique("Rivals");
    let outcomes = compete(|rival| {
        let name = if rival % 2 == 0 { name.clone() } else { name.to_ascii_uppercase() };
        let (store, server) = (Arc::clone(&store), server(&name));
        async move { store.insert_server(&server).await }
    })
    .await;
    one_won(&outcomes, |error| matches!(error, StoreError::AlreadyExists { .. }));
    let case_key = name.to_ascii_lowercase();
    let servers = store.servers().await.unwrap();
    assert_eq!(servers.iter().filter(|server| server.value.0.name.case_key() == case_key).count(), 1);
}

/// A replacement fits only the revision that was read, and only a server that exists.
pub async fn a_replacement_needs_the_current_revision(store: Arc<dyn Store>) {
    let mut server = server(&unique("replace"));
    let missing = store.replace_server(&server, Revision(1)).await;
    assert!(matches!(missing, Err(StoreError::NotFound)), "{missing:?}");
    let first = store.insert_server(&server).await.unwrap();
    server.0.description = "second".to_owned();
    let second = store.replace_server(&server, first).await.unwrap();
    assert_ne!(first, second);
    let mut stale = server.clone();
    stale.0.description = "stale".to_owned();
    let outcome = store.replace_server(&stale, first).await;
    assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
    let expected = Versioned { revision: second, value: server.clone() };
    assert_eq!(store.server(&server.0.name).await.unwrap(), Some(expected));
    // Also a write that changes nothing is a write.
    assert_ne!(store.replace_server(&server, second).await.unwrap(), second);
}

/// Of many who replace the same revision at the same time, one succeeds, and its document stays.
pub async fn one_of_many_replacements_wins(store: Arc<dyn Store>) {
    let server = server(&unique("race"));
    let revision = store.insert_server(&server).await.unwrap();
    let outcomes = compete(|rival| {
        let (store, mut server) = (Arc::clone(&store), server.clone());
        server.0.description = rival.to_string();
        async move { store.replace_server(&server, revision).await }
    })
    .await;
    let (winner, won) = one_won(&outcomes, |error| matches!(error, StoreError::Conflict));
    let stored = store.server(&server.0.name).await.unwrap().unwrap();
    assert_eq!((stored.revision, stored.value.0.description), (*won, winner.to_string()));
}

/// Who read a server that was deleted since cannot overwrite the one that has its name now.
pub async fn a_revision_does_not_fit_a_later_server_of_that_name(store: Arc<dyn Store>) {
    let server = server(&unique("again"));
    let old = store.insert_server(&server).await.unwrap();
    assert!(store.delete_server(&server.0.name).await.unwrap());
    let new = store.insert_server(&server).await.unwrap();
    assert_ne!(old, new);
    let outcome = store.replace_server(&server, old).await;
    assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
}

/// Servers are listed in the order of their registration, which replacing one does not change.
pub async fn servers_are_listed_oldest_first(store: Arc<dyn Store>) {
    let suffix = unique("");
    let names = ["m", "z", "a", "k"].map(|letter| format!("{letter}{suffix}"));
    let mut first = None;
    for (age, name) in names.iter().enumerate() {
        let mut server = server(name);
        let age = i64::try_from(age).unwrap();
        server.0.created_at = crate::timestamp::Timestamp::from_millis(server.0.created_at.millis() + age);
        let revision = store.insert_server(&server).await.unwrap();
        first.get_or_insert((server, revision));
    }
    let (mut server, revision) = first.unwrap();
    server.0.description = "changed".to_owned();
    store.replace_server(&server, revision).await.unwrap();
    let listed = store.servers().await.unwrap();
    let mine: Vec<_> = listed
        .iter()
        .map(|server| server.value.0.name.as_str())
        .filter(|name| name.ends_with(&suffix))
        .collect();
    assert_eq!(mine, names);
}

/// Deleting a server deletes its secrets and tools, and nobody else's. It can be repeated.
pub async fn deleting_a_server_takes_what_belongs_to_it(store: Arc<dyn Store>) {
    let (gone, stays) = (registered(&*store, "gone").await, registered(&*store, "stays").await);
    let users = [user("u"), user("v")];
    for server in [&gone, &stays] {
        for user in &users {
            store.put_secret(&secret(user, server, "KEY", "sealed")).await.unwrap();
        }
        for user in [None, Some(users[0].clone())] {
            let tools = StoredTools { server: server.clone(), user, tools: "[]".to_owned() };
            store.put_tools(&tools).await.unwrap();
        }
    }
    assert!(store.delete_server(&gone).await.unwrap());
    assert!(!store.delete_server(&gone).await.unwrap());
    assert!(store.server(&gone).await.unwrap().is_none());
    assert!(store.servers().await.unwrap().iter().all(|server| server.value.0.name != gone));
    assert_eq!(tools_of(&*store, &gone).await, []);
    assert_eq!(store.users_with_secrets(&gone).await.unwrap(), 0);

    // A server that is registered under the old name does not inherit anything.
    store.insert_server(&server(gone.as_str())).await.unwrap();
    for user in &users {
        assert_eq!(store.secrets(user, &gone).await.unwrap(), []);
        assert_eq!(store.secrets(user, &stays).await.unwrap().len(), 1);
    }
    assert_eq!(tools_of(&*store, &stays).await.len(), 2);
}

/// Listings are text to the store: spacing, escapes, order and numbers stay.
pub async fn tools_come_back_byte_for_byte(store: Arc<dyn Store>) {
    let server = registered(&*store, "tools").await;
    let text = " [ {\"z\":1.0e2,\"a\":\"\\u00e4\\/ä\" ,\n\"n\":123456789012345678901234567890} ]\t";
    let shared = StoredTools { server: server.clone(), user: None, tools: text.to_owned() };
    let own = StoredTools { user: Some(user("u")), tools: "[1]".to_owned(), ..shared.clone() };
    for tools in [&shared, &own, &shared] {
        store.put_tools(tools).await.unwrap();
    }
    let listed = tools_of(&*store, &server).await;
    assert_eq!(listed.len(), 2);
    assert!(listed.contains(&shared) && listed.contains(&own), "{listed:?}");

    let changed = StoredTools { tools: "[]".to_owned(), ..shared };
    store.put_tools(&changed).await.unwrap();
    let listed = tools_of(&*store, &server).await;
    assert_eq!(listed.len(), 2);
    assert!(listed.contains(&changed) && listed.contains(&own), "{listed:?}");
}
