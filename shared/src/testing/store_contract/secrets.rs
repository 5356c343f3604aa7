//! Users' secrets: for existing servers only, and never mixed up.

use std::{sync::Arc, time::Duration};

use tokio::task::JoinSet;

use super::{registered, secret, server, unique, user};
use crate::{
    ids::{SecretName, ServerName, UserId},
    store::{Store, StoreError},
};

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

/// Secrets that are set while their server is deleted go with it or are refused: a server that is
/// registered under the name afterwards has none of them.
pub async fn a_secret_set_while_its_server_goes_is_not_inherited(store: Arc<dyn Store>) {
    let name = ServerName::from_stored(unique("going"));
    for round in 0..5 {
        store.insert_server(&server(name.as_str())).await.unwrap();
        let users: Vec<_> = (0..6).map(|_| user("u")).collect();
        let mut puts = JoinSet::new();
        for (number, user) in users.iter().enumerate() {
            let (store, secret) = (Arc::clone(&store), secret(user, &name, "KEY", "sealed"));
            puts.spawn(async move {
                tokio::time::sleep(Duration::from_millis(u64::try_from(number).unwrap())).await;
                store.put_secret(&secret).await
            });
        }
        tokio::time::sleep(Duration::from_millis(round)).await;
        assert!(store.delete_server(&name).await.unwrap());
        for outcome in puts.join_all().await {
            assert!(matches!(outcome, Ok(()) | Err(StoreError::NotFound)), "{outcome:?}");
        }
        store.insert_server(&server(name.as_str())).await.unwrap();
        assert_eq!(store.users_with_secrets(&name).await.unwrap(), 0);
        for user in &users {
            assert_eq!(store.secrets(user, &name).await.unwrap(), []);
        }
        assert!(store.delete_server(&name).await.unwrap());
    }
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
    let first = store.legacy_secrets().await.unwrap();
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
    // No other test stores such values, so the difference is ours even in a shared store. (The server has variables in
    // clear, which count where mcp-api may have been.)
    let before = store.legacy_secrets().await.unwrap();
    for (number, value) in old.iter().chain(&other).enumerate() {
        store.put_secret(&secret(&user, &server, &format!("N{number}"), value)).await.unwrap();
    }
    assert_eq!(store.legacy_secrets().await.unwrap(), before + 2);
    store.put_secret(&secret(&user, &server, "N0", "v1.k1.c2VhbGVk")).await.unwrap();
    assert_eq!(store.legacy_secrets().await.unwrap(), before + 1);
    assert!(store.delete_server(&server).await.unwrap());
    assert_eq!(store.legacy_secrets().await.unwrap(), first);
}
