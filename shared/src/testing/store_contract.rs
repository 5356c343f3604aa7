//! What every implementation of [`Store`] must do, as tests that all of them pass unchanged.
//!
//! `mcp_shared::store_contract!(open)` makes one `#[tokio::test]` of each. `open` is the path of an
//! `async fn() -> (Arc<dyn Store>, T)`; the `T` (a folder, a database's process) is kept until the test
//! has ended. Every test uses names of its own, so all of them may share one store.

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    ids::{SecretName, ServerName, UserId},
    server::ServerRecord,
    store::{Fact, Lease, Revision, SealedSecret, SealedServer, Store, StoreError, StoredTools, Versioned},
};

/// How many callers compete where only one may win.
const RIVALS: usize = 16;

/// Makes the contract's tests for the store that an `async fn` opens.
#[macro_export]
macro_rules! store_contract {
    (@all $what:tt) => {
        $crate::store_contract! {
            @each $what;
            the_store_answers,
            a_server_is_kept_whole,
            a_taken_name_is_refused,
            one_of_many_registrations_wins,
            a_replacement_needs_the_current_revision,
            one_of_many_replacements_wins,
            a_revision_does_not_fit_a_later_server_of_that_name,
            servers_are_listed_oldest_first,
            deleting_a_server_takes_what_belongs_to_it,
            a_secret_needs_its_server,
            secrets_are_set_overwritten_and_deleted,
            secrets_are_kept_apart_by_user_and_server,
            names_that_begin_alike_are_kept_apart,
            secrets_with_one_key_do_not_replace_each_other,
            users_with_secrets_are_counted_once,
            secrets_in_the_old_format_are_counted,
            tools_come_back_byte_for_byte,
            a_lease_has_one_holder,
            a_silent_holder_loses_its_lease,
            a_lease_that_was_given_back_can_be_taken,
            one_of_many_takers_gets_the_lease,
            the_first_writer_of_a_fact_wins,
            facts_are_kept_apart_by_collection,
        }
    };
    (@each (tests $open:path); $($test:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                let (store, _guard) = $open().await;
                $crate::testing::store_contract::$test(store).await;
            }
        )*
    };
    (@each (run $store:ident); $($test:ident,)*) => {
        $( $crate::testing::store_contract::$test(::std::sync::Arc::clone(&$store)).await; )*
    };
    ($open:path) => {
        $crate::store_contract! { @all (tests $open) }
    };
}

/// Runs the whole contract, one test after the other, on one store.
pub async fn run(store: Arc<dyn Store>) {
    store_contract! { @all (run store) }
}

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

/// A secret for a server that does not exist is refused and leaves nothing behind.
pub async fn a_secret_needs_its_server(store: Arc<dyn Store>) {
    let (user, missing) = (user("u"), ServerName::from_stored(unique("missing")));
    let outcome = store.put_secret(&secret(&user, &missing, "KEY", "sealed")).await;
    assert!(matches!(outcome, Err(StoreError::NotFound)), "{outcome:?}");
    assert_eq!(store.secrets(&user, &missing).await.unwrap(), []);
    store.insert_server(&server(missing.as_str())).await.unwrap();
    assert_eq!(store.secrets(&user, &missing).await.unwrap(), []);
}

/// A secret can be set, set again and deleted; the listing is ordered by name.
pub async fn secrets_are_set_overwritten_and_deleted(store: Arc<dyn Store>) {
    let (user, server) = (user("ü ser"), registered(&*store, "secrets").await);
    let (a, b) = (secret(&user, &server, "A_KEY", "a1"), secret(&user, &server, "B_KEY", "b1"));
    store.put_secret(&b).await.unwrap();
    store.put_secret(&a).await.unwrap();
    assert_eq!(store.secrets(&user, &server).await.unwrap(), [a.clone(), b.clone()]);
    let b = secret(&user, &server, "B_KEY", "b2");
    store.put_secret(&b).await.unwrap();
    assert_eq!(store.secrets(&user, &server).await.unwrap(), [a.clone(), b.clone()]);
    assert!(store.delete_secret(&user, &server, &a.secret_name).await.unwrap());
    assert!(!store.delete_secret(&user, &server, &a.secret_name).await.unwrap());
    assert_eq!(store.secrets(&user, &server).await.unwrap(), [b]);
}

/// A user's secrets for one server are neither another user's nor another server's.
pub async fn secrets_are_kept_apart_by_user_and_server(store: Arc<dyn Store>) {
    let servers = [registered(&*store, "one").await, registered(&*store, "two").await];
    let users = [user("u"), user("v")];
    for server in &servers {
        for user in &users {
            store.put_secret(&secret(user, server, "KEY", &format!("{user} {server}"))).await.unwrap();
        }
    }
    assert!(store.delete_secret(&users[0], &servers[0], &SecretName::from_stored("KEY")).await.unwrap());
    for server in &servers {
        for user in &users {
            let values: Vec<_> =
                store.secrets(user, server).await.unwrap().into_iter().map(|secret| secret.value).collect();
            let deleted = *server == servers[0] && *user == users[0];
            let expected = if deleted { vec![] } else { vec![format!("{user} {server}")] };
            assert_eq!(values, expected);
        }
    }
}

/// Dots and signs of patterns in names are only characters: `a` never gets what belongs to `a.b`.
pub async fn names_that_begin_alike_are_kept_apart(store: Arc<dyn Store>) {
    let base = unique("x");
    let user = UserId::from_stored(format!("{base}_"));
    let other = UserId::from_stored(format!("{base}%"));
    let names = ["", ".b", "_", ".b.c", "%"].map(|end| ServerName::from_stored(format!("{base}{end}")));
    for (number, name) in names.iter().enumerate() {
        store.insert_server(&server(name.as_str())).await.unwrap();
        store.put_secret(&secret(&user, name, &format!("N{number}"), name.as_str())).await.unwrap();
    }
    for (number, name) in names.iter().enumerate() {
        let listed = store.secrets(&user, name).await.unwrap();
        assert_eq!(listed, [secret(&user, name, &format!("N{number}"), name.as_str())]);
        assert_eq!(store.secrets(&other, name).await.unwrap(), []);
        assert_eq!(store.users_with_secrets(name).await.unwrap(), 1);
    }
    assert!(store.delete_server(&names[0]).await.unwrap());
    for name in &names[1..] {
        assert_eq!(store.secrets(&user, name).await.unwrap().len(), 1);
    }
}

/// Two secrets of one user can have one key when a server's name has dots (`a` + `b.c`, `a.b` + `c`).
/// The second is refused: overwriting would take the first from its server.
pub async fn secrets_with_one_key_do_not_replace_each_other(store: Arc<dyn Store>) {
    let (user, base) = (user("u"), unique("clash"));
    let (short, long) = (ServerName::from_stored(&base), ServerName::from_stored(format!("{base}.b")));
    for name in [&short, &long] {
        store.insert_server(&server(name.as_str())).await.unwrap();
    }
    let (first, second) = (secret(&user, &short, "b.c", "first"), secret(&user, &long, "c", "second"));
    assert_eq!(first.key, second.key);
    store.put_secret(&first).await.unwrap();
    match store.put_secret(&second).await {
        Err(StoreError::AlreadyExists { existing }) => assert_eq!(existing, first.key),
        other => panic!("{other:?}"),
    }
    assert!(!store.delete_secret(&user, &long, &second.secret_name).await.unwrap());
    assert_eq!(store.secrets(&user, &long).await.unwrap(), []);
    assert_eq!(store.secrets(&user, &short).await.unwrap(), std::slice::from_ref(&first));
    // The key is free when its owner is gone.
    assert!(store.delete_secret(&user, &short, &first.secret_name).await.unwrap());
    store.put_secret(&second).await.unwrap();
    assert_eq!(store.secrets(&user, &long).await.unwrap(), [second]);
}

/// A user with several secrets counts once.
pub async fn users_with_secrets_are_counted_once(store: Arc<dyn Store>) {
    let server = registered(&*store, "counted").await;
    assert_eq!(store.users_with_secrets(&server).await.unwrap(), 0);
    let users = [user("u"), user("v"), user("w")];
    for user in &users {
        for name in ["A", "B"] {
            store.put_secret(&secret(user, &server, name, "sealed")).await.unwrap();
        }
    }
    assert_eq!(store.users_with_secrets(&server).await.unwrap(), 3);
    for name in ["A", "B"] {
        assert!(store.delete_secret(&users[0], &server, &SecretName::from_stored(name)).await.unwrap());
    }
    assert_eq!(store.users_with_secrets(&server).await.unwrap(), 2);
}

/// Only values of mcp-api's form count: nonce, tag and ciphertext in hexadecimal digits.
pub async fn secrets_in_the_old_format_are_counted(store: Arc<dyn Store>) {
    let (user, server) = (user("u"), registered(&*store, "legacy").await);
    let (nonce, tag) = ("0123456789abcdef01234567", "0123456789abcdef0123456789ABCDEF");
    let old = [format!("{nonce}:{tag}:00ff"), format!("{nonce}:{tag}:")];
    let other = [
        String::new(),
        "v1.k1.c2VhbGVk".to_owned(),
        format!("{nonce}:{tag}"),
        format!("{nonce}:{tag}:00fg"),
        format!("{nonce}:{tag}:00:ff"),
        format!("{nonce}0:{tag}:00ff"),
        format!("0{nonce}:{tag}:00ff"),
        format!("{nonce}:{}:00ff", &tag[1..]),
        format!("g{}:{tag}:00ff", &nonce[1..]),
        format!("{nonce}:{tag}:00ff\n"),
    ];
    // No other test stores such values, so the difference is ours even in a shared store.
    let before = store.legacy_secrets().await.unwrap();
    for (number, value) in old.iter().chain(&other).enumerate() {
        store.put_secret(&secret(&user, &server, &format!("N{number}"), value)).await.unwrap();
    }
    assert_eq!(store.legacy_secrets().await.unwrap(), before + 2);
    store.put_secret(&secret(&user, &server, "N0", "v1.k1.c2VhbGVk")).await.unwrap();
    assert_eq!(store.legacy_secrets().await.unwrap(), before + 1);
    assert!(store.delete_server(&server).await.unwrap());
    assert_eq!(store.legacy_secrets().await.unwrap(), before);
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

/// While somebody holds a lease and shows it, nobody else gets it.
pub async fn a_lease_has_one_holder(store: Arc<dyn Store>) {
    let name = unique("lease");
    assert_eq!(store.lease(&name).await.unwrap(), None);
    // Who saw a revision that never was does not get it either.
    conflicts(store.take_lease(&name, "a", Some(Revision(7))).await);
    assert_eq!(store.lease(&name).await.unwrap(), None);

    let lease = store.take_lease(&name, "a", None).await.unwrap();
    assert_eq!((lease.name.as_str(), lease.owner.as_deref()), (name.as_str(), Some("a")));
    assert_eq!(store.lease(&name).await.unwrap(), Some(lease.clone()));
    conflicts(store.take_lease(&name, "b", None).await);

    let renewed = store.renew_lease(&lease).await.unwrap();
    assert_eq!((&renewed.owner, renewed.fence), (&lease.owner, lease.fence));
    assert!(renewed.revision.0 > lease.revision.0);
    assert_eq!(store.lease(&name).await.unwrap(), Some(renewed.clone()));
    // Who saw it before it was renewed was wrong about the holder.
    conflicts(store.take_lease(&name, "b", Some(lease.revision)).await);
    // A renewal whose answer was lost can be repeated: owner and fence say whose the lease is.
    let again = store.renew_lease(&lease).await.unwrap();
    assert!(again.revision.0 > renewed.revision.0);
    let stranger = Lease { owner: Some("b".to_owned()), ..again.clone() };
    conflicts(store.renew_lease(&stranger).await);
    store.release_lease(&stranger).await.unwrap();
    assert_eq!(store.lease(&name).await.unwrap(), Some(again));
}

/// A lease that was not renewed can be taken; from then on its old holder has lost it.
pub async fn a_silent_holder_loses_its_lease(store: Arc<dyn Store>) {
    let name = unique("silent");
    let old = store.take_lease(&name, "a", None).await.unwrap();
    let new = store.take_lease(&name, "b", Some(old.revision)).await.unwrap();
    assert_eq!(new.owner.as_deref(), Some("b"));
    assert!(new.fence > old.fence && new.revision.0 > old.revision.0);
    conflicts(store.renew_lease(&old).await);
    // What the old holder gives back is not its own any more.
    store.release_lease(&old).await.unwrap();
    assert_eq!(store.lease(&name).await.unwrap(), Some(new.clone()));
    // The same owner anew is a new holder: work under its old fence is void.
    let back = store.take_lease(&name, "a", Some(new.revision)).await.unwrap();
    assert!(back.fence > new.fence);
    conflicts(store.renew_lease(&old).await);
    conflicts(store.renew_lease(&new).await);
}

/// A lease that was given back is free at once, and its fence goes on growing.
pub async fn a_lease_that_was_given_back_can_be_taken(store: Arc<dyn Store>) {
    let name = unique("free");
    let mut last = store.take_lease(&name, "a", None).await.unwrap();
    for owner in ["b", "b", "a"] {
        store.release_lease(&last).await.unwrap();
        let free = store.lease(&name).await.unwrap().unwrap();
        assert_eq!((&free.owner, free.fence), (&None, last.fence));
        assert!(free.revision.0 > last.revision.0);
        conflicts(store.renew_lease(&last).await);
        conflicts(store.renew_lease(&free).await);
        store.release_lease(&last).await.unwrap();
        assert_eq!(store.lease(&name).await.unwrap(), Some(free.clone()));
        let next = store.take_lease(&name, owner, None).await.unwrap();
        assert!(next.fence > last.fence);
        last = next;
    }
    store.release_lease(&last).await.unwrap();
    let free = store.lease(&name).await.unwrap().unwrap();
    let next = store.take_lease(&name, "c", Some(free.revision)).await.unwrap();
    assert!(next.fence > last.fence);
}

/// Of many who take a lease at the same time, one gets it: when it is new and when it lapsed.
pub async fn one_of_many_takers_gets_the_lease(store: Arc<dyn Store>) {
    let name = unique("rivals");
    let mut seen = None;
    for _ in 0..2 {
        let outcomes = compete(|rival| {
            let (store, name) = (Arc::clone(&store), name.clone());
            async move { store.take_lease(&name, &rival.to_string(), seen).await }
        })
        .await;
        let (winner, lease) = one_won(&outcomes, |error| matches!(error, StoreError::Conflict));
        assert_eq!(lease.owner, Some(winner.to_string()));
        assert_eq!(store.lease(&name).await.unwrap().as_ref(), Some(lease));
        seen = Some(lease.revision);
    }
}

/// A fact that is written stays, and everybody who tries to write it learns what it is.
pub async fn the_first_writer_of_a_fact_wins(store: Arc<dyn Store>) {
    let key = unique("fact");
    assert_eq!(store.fact(Fact::KeyRing, &key).await.unwrap(), None);
    let outcomes = compete(|rival| {
        let (store, key) = (Arc::clone(&store), key.clone());
        async move { store.put_once(Fact::KeyRing, &key, &rival.to_string()).await }
    })
    .await;
    let first = outcomes[0].as_ref().unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.as_ref().unwrap() == first), "{outcomes:?}");
    assert!((0..RIVALS).any(|rival| rival.to_string() == *first), "{first}");
    assert_eq!(store.fact(Fact::KeyRing, &key).await.unwrap().as_ref(), Some(first));
    assert_eq!(store.put_once(Fact::KeyRing, &key, "late").await.unwrap(), *first);
}

/// Facts of different collections have nothing to do with each other.
pub async fn facts_are_kept_apart_by_collection(store: Arc<dyn Store>) {
    let key = unique("fact");
    assert_eq!(store.put_once(Fact::KeyRing, &key, "ring").await.unwrap(), "ring");
    assert_eq!(store.fact(Fact::AppState, &key).await.unwrap(), None);
    assert_eq!(store.put_once(Fact::AppState, &key, "state").await.unwrap(), "state");
    assert_eq!(store.fact(Fact::KeyRing, &key).await.unwrap().as_deref(), Some("ring"));
}

/// A name that no other test has. Its last part is in lower case and has no signs of patterns.
pub fn unique(prefix: &str) -> String {
    format!("{prefix}-{}", uuid::Uuid::now_v7().simple())
}

/// A stored server with some of everything, also fields that this version does not know.
pub fn server(name: &str) -> SealedServer {
    let id = uuid::Uuid::now_v7().simple().to_string();
    let document = json!({
        "_id": &id[..24], "name": name, "displayName": "Ein Sërver \u{1F600}", "description": "",
        "createdAt": "2026-11-22T16:48:29.287Z", "updatedAt": "2026-11-22T16:48:29.300Z",
        "transportType": "stdio", "command": "node", "args": ["--x", ""],
        "env": { "KEY.with.dots": "sealed", "$dollar": "sealed" },
        "secretNames": ["A"], "enabled": true, "toolTimeout": 2_000, "secretEnv": { "A": "B" },
        "catalogProvider": "x", "platformManaged": false, "rank": 9_007_199_254_740_993_i64, "weight": 0.5,
        "nested": { "list": [1, "two", null, { "three": [] }], "empty": {} },
    });
    let Value::Object(document) = document else { panic!("a record is an object") };
    SealedServer(ServerRecord::from_document(document).unwrap())
}

/// A stored secret under mcp-api's key.
pub fn secret(user: &UserId, server: &ServerName, name: &str, value: &str) -> SealedSecret {
    let secret_name = SecretName::from_stored(name);
    SealedSecret {
        username: user.clone(),
        key: SealedSecret::key_of(server, &secret_name),
        server_name: server.clone(),
        secret_name,
        value: value.to_owned(),
    }
}

fn user(prefix: &str) -> UserId {
    UserId::from_stored(unique(prefix))
}

/// Registers a server and returns its unique name.
async fn registered(store: &dyn Store, prefix: &str) -> ServerName {
    let server = server(&unique(prefix));
    store.insert_server(&server).await.unwrap();
    server.0.name
}

async fn tools_of(store: &dyn Store, server: &ServerName) -> Vec<StoredTools> {
    let all = store.tools().await.unwrap();
    all.into_iter().filter(|tools| tools.server == *server).collect()
}

/// Runs [`RIVALS`] tasks at the same time; returns their outcomes by number.
async fn compete<T, F>(rival: impl Fn(usize) -> F) -> Vec<Result<T, StoreError>>
where
    T: Send + 'static,
    F: Future<Output = Result<T, StoreError>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    for number in 0..RIVALS {
        let rival = rival(number);
        tasks.spawn(async move { (number, rival.await) });
    }
    let mut outcomes = tasks.join_all().await;
    outcomes.sort_by_key(|(number, _)| *number);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Finds the one that succeeded; all others must have failed as expected.
fn one_won<T: std::fmt::Debug>(
    outcomes: &[Result<T, StoreError>],
    expected: impl Fn(&StoreError) -> bool,
) -> (usize, &T) {
    let won: Vec<_> =
        outcomes.iter().enumerate().filter_map(|(number, o)| Some((number, o.as_ref().ok()?))).collect();
    assert_eq!(won.len(), 1, "{outcomes:?}");
    assert!(outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).all(expected), "{outcomes:?}");
    won[0]
}

fn conflicts(outcome: Result<Lease, StoreError>) {
    assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
}
