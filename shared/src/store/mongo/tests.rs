use super::*;
use crate::testing::services::shared_mongo;

/// A database of a test's own. It is dropped at the end of the test.
struct Own(Client, String);

impl Drop for Own {
    fn drop(&mut self) {
        let (client, name) = (self.0.clone(), self.1.clone());
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async move {
                let _ = client.database(&name).drop().await;
            });
        });
    }
}

fn settings(uri: &str, database: &str) -> MongoSettings {
    MongoSettings { database: Some(database.to_owned()), ..MongoSettings::new(uri.into()) }
}

async fn open() -> (Arc<dyn Store>, Own) {
    let uri = tokio::task::spawn_blocking(shared_mongo).await.unwrap();
    let name = format!("t{}", uuid::Uuid::now_v7().simple());
    let store = MongoStore::connect(settings(uri, &name)).await.unwrap();
    let own = Own(store.database.client.clone(), name);
    (store, own)
}

crate::store_contract!(open);
