//! The programs under test, started as their users start them: one alone, or a cluster.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use futures_util::future::join_all;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    time::{Instant, sleep, timeout},
};

use crate::{
    callers::{Call, Caller, shown},
    client::Client,
    servers::Launch,
};

/// How long a program may take to start, to be seen, or to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a cluster needs around it, and how large it is.
pub struct Cluster {
    /// NATS.
    pub nats: String,
    /// The store.
    pub mongo: String,
    /// Gateways.
    pub gateways: usize,
    /// Workers.
    pub workers: usize,
}

/// A running deployment with an echo server registered.
pub struct Deployment {
    launch: Launch,
    /// What further workers are started with.
    settings: BTreeMap<String, String>,
    folder: PathBuf,
    gateways: Vec<Program>,
    workers: Vec<Program>,
    servers: Vec<u32>,
    /// The store's address and the database's name, to be left as they were found.
    database: Option<(String, String)>,
    data: TempDir,
}

impl Deployment {
    /// Starts the program alone. `env` says what each program gets on top, by its name.
    pub async fn single(
        folder: &Path,
        launch: &Launch,
        env: impl Fn(&str) -> Vec<(String, String)>,
    ) -> Result<Self> {
        let data = tempfile::tempdir()?;
        let mut settings: BTreeMap<String, String> = env("gateway").into_iter().collect();
        settings.insert("PORT".to_owned(), "0".to_owned());
        settings.insert("DATA_DIR".to_owned(), data.path().display().to_string());
        let gateway = Program::start(&folder.join("mcp-gateway"), "gateway", data.path(), &settings).await?;
        let deployment = Self {
            launch: launch.clone(),
            settings,
            folder: folder.to_owned(),
            gateways: vec![gateway],
            workers: vec![],
            servers: vec![],
            database: None,
            data,
        };
        deployment.register().await
    }

    /// Starts a cluster, and waits until its gateways see its workers.
    pub async fn cluster(
        folder: &Path,
        launch: &Launch,
        cluster: &Cluster,
        env: impl Fn(&str) -> Vec<(String, String)>,
    ) -> Result<Self> {
        let data = tempfile::tempdir()?;
        // The folder's name is drawn at random, and so names a fleet that is nobody else's.
        let name = data.path().file_name().and_then(|name| name.to_str()).context("no name")?;
        let name: String =
            format!("load-{}", name.chars().filter(char::is_ascii_alphanumeric).collect::<String>());
        let settings = [
            ("PORT", "0"),
            ("WORKER_PORT", "0"),
            ("NATS_URL", cluster.nats.as_str()),
            ("NATS_PREFIX", name.as_str()),
            ("MONGODB_URI", cluster.mongo.as_str()),
            ("MONGO_DBNAME", name.as_str()),
            ("SECRETS_KEY", "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"),
        ];
        let settings: BTreeMap<String, String> =
            settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let mut deployment = Self {
            launch: launch.clone(),
            settings,
            folder: folder.to_owned(),
            gateways: vec![],
            workers: vec![],
            servers: vec![],
            database: Some((cluster.mongo.clone(), name)),
            data,
        };
        let kinds = [("worker", cluster.workers), ("gateway", cluster.gateways)];
        for (kind, at) in kinds.iter().flat_map(|(kind, count)| (0..*count).map(move |at| (*kind, at))) {
            deployment.start(kind, at, env(&format!("{kind}-{at}"))).await?;
        }
        deployment.seen().await?;
        deployment.register().await
    }

    async fn start(&mut self, kind: &'static str, at: usize, more: Vec<(String, String)>) -> Result<()> {
        let own = self.data.path().join(format!("{kind}-{at}"));
        std::fs::create_dir_all(&own)?;
        let mut settings = self.settings.clone();
        settings.extend(more);
        let program = Program::start(&self.folder.join(format!("mcp-{kind}")), kind, &own, &settings).await?;
        let programs = if kind == "worker" { &mut self.workers } else { &mut self.gateways };
        programs.push(program);
        Ok(())
    }

    /// Adds a worker to a cluster, and waits until all gateways see it.
    pub async fn add_worker(&mut self) -> Result<()> {
        self.start("worker", self.workers.len(), Vec::new()).await?;
        self.seen().await
    }

    async fn seen(&self) -> Result<()> {
        for gateway in &self.gateways {
            let mut client = Client::connect(&gateway.address).await?;
            let begun = Instant::now();
            loop {
                let fleet = client.get("/fleet").await?;
                if fleet["workers"].as_array().map(Vec::len) == Some(self.workers.len()) {
                    break;
                }
                ensure!(begun.elapsed() < PATIENCE, "a gateway does not see all workers: {fleet}");
                sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    async fn register(mut self) -> Result<Self> {
        self.add("echo", json!({})).await?;
        let server = self.client().await?.get("/mcp/servers/echo").await?;
        let instances = server["server"]["instances"].as_array().context("no instances")?;
        self.servers = instances.iter().filter_map(|one| u32::try_from(one["pid"].as_u64()?).ok()).collect();
        Ok(self)
    }

    /// Registers the echo server under a name, with further fields of its record.
    pub async fn add(&self, name: &str, more: Value) -> Result<()> {
        let mut client = self.client().await?;
        let mut record = json!({"name": name, "command": self.launch.command, "args": self.launch.args});
        if let (Some(record), Value::Object(more)) = (record.as_object_mut(), more) {
            record.extend(more);
        }
        let answer = client.post("/mcp/servers", record.to_string().into());
        let answer =
            timeout(PATIENCE, answer).await.context("the echo server was not registered in time")??;
        let answer = String::from_utf8_lossy(&answer);
        ensure!(answer.contains("\"connected\""), "the echo server did not connect: {answer}");
        Ok(())
    }

    /// A connection to the first gateway.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.gateways.first().context("no gateway")?.address).await
    }

    /// Where the gateways listen.
    pub fn addresses(&self) -> Vec<String> {
        self.gateways.iter().map(|program| program.address.clone()).collect()
    }

    /// The processes of gateways.
    pub fn gateways(&self) -> Vec<u32> {
        self.gateways.iter().filter_map(|program| program.child.id()).collect()
    }

    /// The processes of workers.
    pub fn workers(&self) -> Vec<u32> {
        self.workers.iter().filter_map(|program| program.child.id()).collect()
    }

    /// The processes of the echo server, as of its registration.
    pub fn servers(&self) -> Vec<u32> {
        self.servers.clone()
    }

    /// So many callers, which are spread over the gateways.
    pub async fn callers(&self, number: usize, call: &Call) -> Result<Vec<Caller>> {
        let mut callers = Vec::with_capacity(number);
        for gateway in self.gateways.iter().cycle().take(number) {
            callers.push(Caller::Http(Client::connect(&gateway.address).await?, call.body()));
        }
        Ok(callers)
    }

    /// Stops the programs and starts them again, all at once: how long it takes until a call is answered. Servers are
    /// those that were registered before.
    pub async fn restart(&mut self) -> Result<Duration> {
        self.end().await?;
        let (workers, gateways) = (self.workers.len(), self.gateways.len());
        self.workers.clear();
        self.gateways.clear();
        let begun = Instant::now();
        let (folder, data, settings) = (&self.folder, self.data.path(), &self.settings);
        let cluster = self.database.is_some();
        let start = |kind: &'static str, at: usize| async move {
            let own = if cluster { data.join(format!("{kind}-{at}")) } else { data.to_owned() };
            Program::start(&folder.join(format!("mcp-{kind}")), kind, &own, settings).await
        };
        let all = |kind, count| join_all((0..count).map(move |at| start(kind, at)));
        let (new_workers, new_gateways) = tokio::join!(all("worker", workers), all("gateway", gateways));
        self.workers = new_workers.into_iter().collect::<Result<_>>()?;
        self.gateways = new_gateways.into_iter().collect::<Result<_>>()?;
        let (mut client, body) = (self.client().await?, Call::echo(100).body());
        loop {
            let answer = client.post("/mcp/tool/call", body.clone()).await?;
            if answer.starts_with(b"{\"success\":true") {
                return Ok(begun.elapsed());
            }
            ensure!(begun.elapsed() < PATIENCE, "no call is answered: {}", shown(&answer));
            sleep(Duration::from_millis(1)).await;
        }
    }

    async fn end(&mut self) -> Result<()> {
        for program in self.gateways.iter().chain(&self.workers) {
            program.signal(Signal::SIGTERM)?;
        }
        for program in self.gateways.iter_mut().chain(&mut self.workers) {
            let ended = timeout(PATIENCE, program.child.wait()).await;
            let ended = ended.with_context(|| format!("a {} did not stop in time", program.kind))??;
            ensure!(ended.success(), "a {} did not stop in order: {ended}", program.kind);
        }
        Ok(())
    }

    /// The database of a cluster.
    pub async fn store(&self) -> Result<Option<mongodb::Database>> {
        let Some((uri, name)) = &self.database else { return Ok(None) };
        Ok(Some(mongodb::Client::with_uri_str(uri).await?.database(name)))
    }

    /// Stops the programs in order, all at once.
    pub async fn stop(mut self) -> Result<()> {
        self.end().await?;
        if let Some((uri, name)) = self.database.take() {
            mongodb::Client::with_uri_str(uri).await?.database(&name).drop().await?;
        }
        Ok(())
    }
}

/// One process. It is killed when this is dropped.
struct Program {
    kind: &'static str,
    child: Child,
    address: String,
}

impl Program {
    async fn start(
        path: &Path,
        kind: &'static str,
        folder: &Path,
        settings: &BTreeMap<String, String>,
    ) -> Result<Self> {
        ensure!(path.exists(), "{} is not there; build it with: cargo build --release", path.display());
        let log = folder.join("program.log");
        let mut child = Command::new(path)
            .current_dir(folder)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", folder)
            .env("INSTALL_ON_START", "none")
            .envs(settings)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| path.display().to_string())?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let first = timeout(PATIENCE, lines.next_line()).await.context("it did not start in time")??;
        // The address is the last word of the first line.
        let address = first.as_deref().and_then(|line| line.rsplit_once("http://"));
        let Some((_, address)) = address else {
            bail!("a {kind} did not start:\n{}", std::fs::read_to_string(&log).unwrap_or_default());
        };
        Ok(Self { kind, child, address: address.to_owned() })
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let id = self.child.id().with_context(|| format!("a {} has ended", self.kind))?;
        Ok(kill(Pid::from_raw(i32::try_from(id)?), signal)?)
    }
}
