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
    store::{Collection, Document, SealedSecret, SealedServer, Store, StoreError, StoredTools},
};

pub mod coordination;
pub mod documents;
pub mod resealing;
pub mod secrets;
pub mod servers;

/// How many callers compete where only one may win.
const RIVALS: usize = 16;

/// Makes the contract's tests for the store that an `async fn` opens.
#[macro_export]
macro_rules! store_contract {
    (@all $what:tt) => {
        $crate::store_contract! {
            @each $what;
            servers::the_store_answers,
            servers::a_server_is_kept_whole,
            servers::a_taken_name_is_refused,
            servers::one_of_many_registrations_wins,
            servers::a_replacement_needs_the_current_revision,
            servers::one_of_many_replacements_wins,
            servers::a_revision_does_not_fit_a_later_server_of_that_name,
            servers::servers_are_listed_oldest_first,
            servers::deleting_a_server_takes_what_belongs_to_it,
            servers::tools_come_back_byte_for_byte,
            secrets::a_secret_needs_its_server,
            secrets::secrets_are_set_overwritten_and_deleted,
            secrets::secrets_are_kept_apart_by_user_and_server,
            secrets::names_that_begin_alike_are_kept_apart,
            secrets::secrets_with_one_key_do_not_replace_each_other,
            secrets::a_secret_set_while_its_server_goes_is_not_inherited,
            secrets::users_with_secrets_are_counted_once,
            secrets::secrets_in_the_old_format_are_counted,
            coordination::a_lease_has_one_holder,
            coordination::a_silent_holder_loses_its_lease,
            coordination::a_lease_that_was_given_back_can_be_taken,
            coordination::one_of_many_takers_gets_the_lease,
            coordination::the_first_writer_of_a_fact_wins,
            coordination::facts_are_kept_apart_by_collection,
            documents::a_document_is_kept_whole,
            documents::a_large_document_is_kept_whole,
            documents::a_document_needs_a_key_that_is_free,
            documents::keys_are_only_text,
            documents::one_of_many_additions_wins,
            documents::a_document_is_replaced_at_its_current_revision,
            documents::one_of_many_changes_wins,
            documents::a_document_is_deleted_at_its_current_revision,
            documents::a_revision_does_not_fit_a_later_document_of_that_key,
            documents::active_documents_can_be_listed_alone,
            documents::documents_are_listed_in_the_order_in_which_they_were_added,
            documents::documents_of_a_server_are_listed_alone,
            documents::documents_of_a_server_go_with_it,
            resealing::a_resealed_server_keeps_its_revision,
            resealing::a_resealed_document_keeps_its_revision,
            resealing::a_secret_is_resealed_as_long_as_it_is_what_it_was,
            resealing::all_secrets_are_found_page_by_page,
            resealing::all_documents_are_found_page_by_page,
        }
    };
    (@each (tests $open:path); $($module:ident::$test:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                let (store, _guard) = $open().await;
                $crate::testing::store_contract::$module::$test(store).await;
            }
        )*
    };
    (@each (run $store:ident); $($module:ident::$test:ident,)*) => {
        $( $crate::testing::store_contract::$module::$test(::std::sync::Arc::clone(&$store)).await; )*
    };
    ($open:path) => {
        $crate::store_contract! { @all (tests $open) }
    };
}

/// Runs the whole contract, one test after the other, on one store.
pub async fn run(store: Arc<dyn Store>) {
    store_contract! { @all (run store) }
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

/// A document with some of everything. A package has an id, as all that stands in mcp-api's collection.
pub fn document(collection: Collection, key: &str) -> Document {
    let document = json!({
        collection.key(): key, "name": "@scope/p\u{e4}ckage", "status": "installed",
        "installed": "2026-11-22T16:48:29.287Z", "lastUpgraded": "yesterday",
        "created": "2026-11-22T16:48:29.287Z", "log": ["", "two"], "rank": 9_007_199_254_740_993_i64,
        "files": { "package.json": "{}\n", "$dollar": "\t" },
        "nested": {
            "list": [1, "two", null, { "three": [] }], "empty": {}, "_id": 7,
            "installed": "2026-11-22T16:48:29.287Z", "$date": "2026-11-22T16:48:29.287Z",
        },
        "weight": 0.5, "enabled": true, "active": false,
    });
    let Value::Object(mut document) = document else { panic!("a document is an object") };
    if collection == Collection::Packages {
        // Ids as these grow, as those that MongoDB makes.
        let id = uuid::Uuid::now_v7().simple().to_string();
        document.insert("_id".to_owned(), id[..24].into());
    }
    document
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
