//! Opens the store that the settings name.

use std::sync::Arc;

use super::{
    Store, StoreError,
    embedded::{EmbeddedStore, OpenError},
    metered::Metered,
    mongo::{self, MongoStore},
};
use crate::config::{MongoSettings, Settings, StoreSettings};

/// What opening a store may leave behind in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// What the program needs, such as indexes.
    Use,
    /// Nothing.
    Inspect,
}

/// A store, and what it is, for people.
pub struct Opened {
    /// The store.
    pub store: Arc<dyn Store>,
    /// Such as `MongoDB 8.0.4 at 127.0.0.1:27017`; without credentials.
    pub description: String,
}

/// Why a store was not opened. No message has credentials.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The file in the data folder.
    #[error(transparent)]
    Embedded(#[from] OpenError),
    /// MongoDB does not answer, which may pass.
    #[error("MongoDB at {hosts} cannot be reached: {cause}")]
    Unreachable {
        /// Where it should be.
        hosts: String,
        /// What happened.
        cause: String,
    },
    /// MongoDB does not let this program in.
    #[error(
        "MongoDB at {hosts} refuses the login: {cause}; MONGO_USER and MONGO_PASS, or MONGODB_URI, have it"
    )]
    Login {
        /// Where it is.
        hosts: String,
        /// What it said.
        cause: String,
    },
    /// MongoDB answers, and is not fit for this program.
    #[error("MongoDB at {hosts} cannot be used: {cause}")]
    Unfit {
        /// Where it is.
        hosts: String,
        /// What is wrong with it.
        cause: String,
    },
}

/// Opens the store once; whoever starts a program may have to be patient with it.
pub async fn open(settings: &Settings, access: Access) -> Result<Opened, ConnectError> {
    match &settings.store {
        StoreSettings::Embedded => Ok(Opened {
            store: Metered::of(EmbeddedStore::open(&settings.data_dir)?),
            description: format!("SQLite in {}", settings.data_dir.display()),
        }),
        StoreSettings::Mongo(mongo) => connect(mongo, access).await,
    }
}

async fn connect(settings: &MongoSettings, access: Access) -> Result<Opened, ConnectError> {
    let store = mongo(settings, access).await?;
    Ok(Opened { description: format!("MongoDB at {}", settings.hosts), store: Metered::of(store) })
}

/// Opens the MongoDB of these settings, for what only that store can tell.
pub async fn mongo(settings: &MongoSettings, access: Access) -> Result<Arc<MongoStore>, ConnectError> {
    match (connect_once(settings, access).await, settings.without_default_login()) {
        // Nobody chose that login: a MongoDB that knows no users is used as it is.
        (Err(ConnectError::Login { .. }), Some(other)) => {
            tracing::info!("MongoDB knows no such user as the default one; it is used without a login");
            connect_once(&other, access).await
        }
        (result, _) => result,
    }
}

/// One attempt, with one login.
async fn connect_once(settings: &MongoSettings, access: Access) -> Result<Arc<MongoStore>, ConnectError> {
    let hosts = settings.hosts.clone();
    let login = settings.login.as_ref().map(|login| (login.user.clone(), login.password.clone()));
    let settings = mongo::MongoSettings {
        address: settings.uri.clone(),
        credentials: login,
        database: Some(settings.database.clone()),
        replica_set: settings.replica_set.clone(),
        secrets: settings.secrets_collection.clone(),
    };
    let store = match access {
        Access::Use => MongoStore::connect(settings).await,
        Access::Inspect => MongoStore::inspect(settings).await,
    };
    match store {
        Ok(store) => Ok(store),
        Err(mongo::ConnectError::Store(StoreError::Unavailable { cause })) if is_refusal(&cause) => {
            Err(ConnectError::Login { hosts, cause })
        }
        Err(mongo::ConnectError::Store(StoreError::Unavailable { cause })) if is_distrust(&cause) => {
            Err(ConnectError::Unfit { hosts, cause })
        }
        Err(mongo::ConnectError::Store(StoreError::Unavailable { cause })) => {
            Err(ConnectError::Unreachable { hosts, cause })
        }
        Err(error) => Err(ConnectError::Unfit { hosts, cause: error.to_string() }),
    }
}

/// Whether TLS shows that this is not the MongoDB that was meant, or our own files are no good: waiting mends
/// neither.
fn is_distrust(cause: &str) -> bool {
    let cause = cause.to_ascii_lowercase();
    ["invalid peer certificate", "certificate", "pem file", "tls config"]
        .iter()
        .any(|word| cause.contains(word))
}

/// Whether MongoDB answered, and did not let us in.
fn is_refusal(cause: &str) -> bool {
    let cause = cause.to_ascii_lowercase();
    ["authentication", "scram", "unauthorized", "not authorized"].iter().any(|word| cause.contains(word))
}
