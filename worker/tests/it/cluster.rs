//! Workers on one store, and what tests ask of them.

use std::{path::PathBuf, sync::Arc, time::Duration};

use mcp_shared::{
    config::{PackageSettings, RemoteSettings},
    error::WorkerError,
    fleet::ServerLoad,
    hosting::{CallOffer, Hosting, Placing, Refusal, Reservation},
    ids::{RequestId, SecretName, ServerName, ToolName, UserId},
    json::RawJson,
    server::ServerRecord,
    store::{Store, embedded::EmbeddedStore},
    vault::{KeySource, Vault},
    worker_api::{CallContext, Change, WorkerApi},
};
use mcp_worker::{Boot, Worker};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::faults::Faulty;

/// How long a condition may take to come true.
const PATIENCE: Duration = Duration::from_secs(40);

/// One store and a folder for what servers write.
pub struct Cluster {
    store: Arc<EmbeddedStore>,
    key: String,
    folder: TempDir,
}

/// A worker with its own link to the store.
pub struct Node {
    pub worker: Arc<Worker>,
    pub link: Arc<Faulty>,
}

impl Cluster {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(&folder.path().join("data")).unwrap();
        let key = secrecy_line();
        Self { store, key, folder }
    }

    /// The store behind no faults.
    pub async fn vault(&self) -> Vault {
        self.vault_on(Arc::clone(&self.store) as Arc<dyn Store>).await
    }

    async fn vault_on(&self, store: Arc<dyn Store>) -> Vault {
        Vault::open(store, KeySource::RingFile(self.key.as_str().into()), None).await.unwrap()
    }

    /// Starts a worker.
    pub async fn worker(&self, boot: Boot) -> Node {
        self.worker_with(boot, RemoteSettings::default()).await
    }

    /// Starts a worker that reaches what these settings let it reach.
    pub async fn worker_with(&self, boot: Boot, remote: RemoteSettings) -> Node {
        let link = Faulty::new(Arc::clone(&self.store) as Arc<dyn Store>);
        let vault = self.vault_on(Arc::clone(&link) as Arc<dyn Store>).await;
        let (packages, limits) = (PackageSettings::default(), Default::default());
        let program = std::env::current_exe().unwrap();
        let worker = Worker::open(vault, program, boot, &packages, &remote, &limits, None).await.unwrap();
        Node { worker, link }
    }

    /// A file that servers write to.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The lines of such a file.
    pub fn lines(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.file(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Registers a server whose record has these further fields, and whose every start leaves a line in
    /// the file `NAME.starts`. Nobody is told.
    pub async fn register(&self, name: &str, fields: Value) -> ServerName {
        let starts = self.file(&format!("{name}.starts"));
        let mut document = json!({
            "_id": format!("{:024x}", rand_id()), "name": name, "displayName": name,
            "createdAt": "2026-11-22T16:48:29.287Z", "updatedAt": "2026-11-22T16:48:29.287Z",
            "transportType": "stdio", "command": std::env::current_exe().unwrap(),
            "args": [crate::FIXTURE, "--more", "--start-file", starts], "enabled": true,
        });
        let (Value::Object(all), Value::Object(fields)) = (&mut document, fields) else { panic!() };
        all.extend(fields);
        let record = ServerRecord::from_document(all.clone()).unwrap();
        self.vault().await.insert_server(&record).await.unwrap();
        record.name
    }

    /// Changes a record. Nobody is told.
    pub async fn change(&self, server: &ServerName, change: impl FnOnce(&mut ServerRecord)) {
        let vault = self.vault().await;
        let mut stored = vault.server(server).await.unwrap().unwrap();
        change(&mut stored.value);
        vault.replace_server(&stored.value, stored.revision).await.unwrap();
    }

    /// Sets a secret. Nobody is told.
    pub async fn set_secret(&self, user: &str, server: &ServerName, name: &str, value: &str) {
        let name = SecretName::parse(name).unwrap();
        self.vault().await.put_secret(&user_id(user), server, &name, &value.into()).await.unwrap();
    }
}

fn secrecy_line() -> String {
    use secrecy::ExposeSecret;
    mcp_shared::crypter::generate_key_line("k1").unwrap().expose_secret().to_owned()
}

fn rand_id() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos()
}

pub fn user_id(user: &str) -> UserId {
    UserId::parse(user).unwrap()
}

impl Node {
    /// Offers a call.
    pub async fn offer(
        &self,
        server: &ServerName,
        user: &str,
        tool: &str,
        placing: Placing,
    ) -> Result<Reservation, Refusal> {
        self.offer_within(server, user, tool, placing, Duration::from_secs(15)).await
    }

    pub async fn offer_within(
        &self,
        server: &ServerName,
        user: &str,
        tool: &str,
        placing: Placing,
        timeout: Duration,
    ) -> Result<Reservation, Refusal> {
        let context = CallContext {
            request_id: RequestId::generate(),
            user: user_id(user),
            timeout: Some(timeout),
            spent: Duration::ZERO,
            trace: None,
        };
        let tool = ToolName::parse(tool).unwrap();
        self.worker
            .reserve(
                context,
                CallOffer { server: server.clone(), tool, progress: false, placing, idempotency: None },
            )
            .await
    }

    /// Offers a call and carries it out; the answer's text.
    pub async fn call(
        &self,
        server: &ServerName,
        user: &str,
        tool: &str,
        arguments: Value,
        placing: Placing,
    ) -> Result<String, Refusal> {
        let mut reservation = self.offer(server, user, tool, placing).await?;
        reservation.held().await?;
        finish(reservation, arguments).await.map_err(|error| Refusal::Error { error })
    }

    /// What it says of a server that it owns.
    pub fn load(&self, server: &ServerName) -> Option<ServerLoad> {
        self.worker.describe().servers.into_iter().find(|load| load.name == *server)
    }

    pub async fn announce(&self, server: &ServerName) {
        self.worker.announce(Change::Server { server: server.clone() }).await.unwrap();
    }

    pub async fn stop(self) {
        self.worker.shutdown(Duration::from_secs(5)).await;
    }
}

/// Starts a call that was admitted, and waits for the text of its answer.
pub async fn finish(reservation: Reservation, arguments: Value) -> Result<String, WorkerError> {
    let result = reservation.go(RawJson::parse(arguments.to_string()).unwrap()).result().await?;
    let result: Value = result.read().unwrap();
    Ok(result["content"][0]["text"].as_str().unwrap_or_default().to_owned())
}

/// The owner that a refusal names.
pub fn owner(refused: Result<Reservation, Refusal>) -> Option<String> {
    match refused {
        Err(Refusal::NotOwner { owner }) => owner.map(|owner| owner.as_str().to_owned()),
        other => panic!("this is no answer of somebody who is not the owner: {other:?}"),
    }
}

/// Waits until a condition holds.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < end, "this never came true: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}
