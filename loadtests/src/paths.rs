//! The ways of a call, each started once and then called in turns.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::ValueEnum;
use mcp_shared::testing::{
    port::Port,
    services::{self, NatsServer},
};

use crate::{
    bus::{self, Responder},
    callers::{Call, Caller},
    client::Client,
    cost::varz,
    deployment::{Cluster, Deployment},
    floors::Floor,
    mcpo::Mcpo,
    servers::Launch,
    stdio,
};

/// How a call gets to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Path {
    /// To the server's standard input.
    Direct,
    /// By HTTP to a program that does nothing else than to pass it on.
    FloorHttp,
    /// The same with NATS between two such programs.
    FloorCluster,
    /// By HTTP to one program.
    Single,
    /// By HTTP to a cluster.
    Cluster,
    /// Not at all: NATS there and back.
    Nats,
    /// The same twice in sequence, as a handshake takes.
    Handshake,
    /// By HTTP to mcpo, from PyPI.
    Mcpo,
}

impl Path {
    /// As the tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct stdio",
            Self::FloorHttp => "floor-http",
            Self::FloorCluster => "floor-cluster",
            Self::Single => "single node",
            Self::Cluster => "cluster",
            Self::Nats => "NATS, 1 trip",
            Self::Handshake => "NATS, 2 trips",
            Self::Mcpo => "mcpo",
        }
    }

    /// What its calls per second are compared with.
    pub fn floor(self) -> Option<Self> {
        match self {
            Self::Single | Self::Mcpo | Self::FloorCluster => Some(Self::FloorHttp),
            Self::Cluster => Some(Self::FloorCluster),
            Self::FloorHttp => Some(Self::Direct),
            Self::Direct | Self::Nats | Self::Handshake => None,
        }
    }

    /// Whether NATS is on the way.
    pub fn on_nats(self) -> bool {
        matches!(self, Self::FloorCluster | Self::Cluster | Self::Nats | Self::Handshake)
    }
}

/// What the paths need around them.
pub struct Stage {
    /// Where `mcp-gateway` and `mcp-worker` are.
    pub programs: PathBuf,
    /// NATS, as it is without settings but a monitoring page and room for bodies of the floor.
    pub nats: NatsServer,
    /// `host:port` of its monitoring page.
    pub monitoring: String,
    /// The store of clusters.
    pub mongo: &'static str,
}

/// What there is at the other end of a path.
pub enum Target {
    /// The server itself.
    Direct(stdio::Server),
    /// A floor.
    Floor(Floor),
    /// What is measured.
    Http(Deployment),
    /// NATS alone.
    Nats(async_nats::Client, Responder, usize),
    /// mcpo.
    Mcpo(Mcpo),
}

impl Stage {
    /// Starts NATS and the store.
    pub async fn set(programs: Option<&PathBuf>) -> Result<Self> {
        let programs = match programs {
            Some(folder) => folder.clone(),
            None => std::env::current_exe()?.parent().context("no folder")?.to_owned(),
        };
        let port = Port::keep();
        let monitoring = port.address().to_string();
        let config = format!("http: \"{monitoring}\"");
        let started =
            tokio::task::spawn_blocking(move || (NatsServer::start(&config), services::shared_mongo()));
        let (nats, mongo) = started.await.context("NATS or the store did not start")?;
        Ok(Self { programs, nats, monitoring, mongo })
    }

    /// The version of NATS.
    pub async fn nats_version(&self) -> Result<String> {
        let version = varz(&self.monitoring).await?["version"].as_str().map(str::to_owned);
        version.context("NATS has no version")
    }

    /// A single node that runs this server as `echo`.
    pub async fn single(&self, launch: &Launch) -> Result<Deployment> {
        Deployment::single(&self.programs, launch, |_| Vec::new()).await
    }

    /// A cluster that does.
    pub async fn cluster(&self, launch: &Launch, gateways: usize, workers: usize) -> Result<Deployment> {
        Deployment::cluster(&self.programs, launch, &self.size(gateways, workers), |_| Vec::new()).await
    }

    /// A cluster's surroundings and size.
    pub fn size(&self, gateways: usize, workers: usize) -> Cluster {
        Cluster { nats: self.nats.url(), mongo: self.mongo.to_owned(), gateways, workers }
    }

    /// Starts a path; clusters have one gateway and one worker.
    pub async fn start(&self, path: Path, launch: &Launch) -> Result<Target> {
        let trips = |subject, trips| async move {
            let responder = Responder::start(&self.nats.url(), subject).await?;
            anyhow::Ok(Target::Nats(bus::connect(&self.nats.url()).await?, responder, trips))
        };
        Ok(match path {
            Path::Direct => Target::Direct(stdio::Server::start(launch).await?),
            Path::FloorHttp => Target::Floor(Floor::http(launch).await?),
            Path::FloorCluster => {
                Target::Floor(Floor::cluster(launch, &self.nats.url(), "load.floor").await?)
            }
            Path::Single => Target::Http(self.single(launch).await?),
            Path::Cluster => Target::Http(self.cluster(launch, 1, 1).await?),
            Path::Nats => trips("load.one", 1).await?,
            Path::Handshake => trips("load.two", 2).await?,
            Path::Mcpo => Target::Mcpo(Mcpo::start(launch).await?),
        })
    }
}

impl Target {
    /// So many callers of it, each with a connection of its own where there are connections.
    pub async fn callers(&self, number: usize, call: &Call) -> Result<Vec<Caller>> {
        let body = call.body();
        let mut callers = Vec::with_capacity(number);
        match self {
            Self::Http(deployment) => return deployment.callers(number, call).await,
            Self::Direct(server) => {
                let call = Arc::new(call.clone());
                let caller = || Caller::Direct(Arc::clone(&server.connection), Arc::clone(&call));
                callers.extend(std::iter::repeat_with(caller).take(number));
            }
            Self::Nats(client, responder, trips) => {
                let caller = || Caller::Nats(client.clone(), responder.subject, body.clone(), *trips);
                callers.extend(std::iter::repeat_with(caller).take(number));
            }
            Self::Floor(floor) => {
                for _ in 0..number {
                    callers.push(Caller::Http(Client::connect(&floor.address).await?, body.clone()));
                }
            }
            Self::Mcpo(mcpo) => {
                let (path, arguments) = (format!("/{}", call.tool), Bytes::from(call.arguments.clone()));
                for _ in 0..number {
                    let client = Client::connect(&mcpo.address).await?;
                    callers.push(Caller::Mcpo(client, path.clone(), arguments.clone()));
                }
            }
        }
        Ok(callers)
    }

    /// Ends it. What runs is stopped in order.
    pub async fn stop(self) -> Result<()> {
        if let Self::Http(deployment) = self { deployment.stop().await } else { Ok(()) }
    }
}
