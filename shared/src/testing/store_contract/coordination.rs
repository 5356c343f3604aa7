//! What keeps several processes from doing the same thing: leases and facts.

use std::sync::Arc;

use super::{RIVALS, compete, one_won, unique};
use crate::store::{Fact, Lease, Revision, Store, StoreError};

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

fn conflicts(outcome: Result<Lease, StoreError>) {
    assert!(matches!(outcome, Err(StoreError::Conflict)), "{outcome:?}");
}
