//! `mcp-gateway api-keys`: what `/admin/api-keys` does, for whoever can reach the store: before the first start, or
//! when nobody has a key any more.

use std::{collections::BTreeSet, io::Write, process::ExitCode};

use clap::{Args, Subcommand};
use mcp_shared::{
    api_key::{ApiKey, NewApiKey},
    audit::{Action, Audit, Object, Recorded},
    config::Settings,
    ids::{ServerName, ToolName, UserId},
    lifecycle::{EX_CONFIG, complain, explain},
    node::{self, NodeError},
    principal::{Reach, Scope},
    store::StoreError,
    timestamp::Timestamp,
    vault::{Vault, VaultError},
};
use secrecy::ExposeSecret;
use tokio_util::sync::CancellationToken;

use crate::audit::record_command;

/// What is done with API keys.
#[derive(Subcommand)]
pub enum ApiKeysCommand {
    /// Make a key, and print it. It is shown this once.
    Create(Create),
    /// List keys: id, user, scopes, name.
    List,
    /// End a key by its id. Running gateways notice within two seconds.
    Revoke {
        /// The id, as `list` shows it.
        id: String,
    },
}

/// What a new key is like.
#[derive(Args)]
pub struct Create {
    /// What the key is for.
    #[arg(long)]
    name: String,
    /// The user whose key it is.
    #[arg(long, value_parser = |text: &str| UserId::parse(text).map_err(|error| error.to_string()))]
    user: UserId,
    /// What it is good for: call, secrets, admin, impersonate, metrics; several with commas.
    #[arg(long, value_delimiter = ',', required = true)]
    scopes: Vec<Scope>,
    /// The only servers that it may use; several with commas.
    #[arg(long, value_delimiter = ',', value_parser = |text: &str| ServerName::parse_existing(text).map_err(|error| error.to_string()))]
    servers: Option<Vec<ServerName>>,
    /// The only tools that it may call; several with commas.
    #[arg(long, value_delimiter = ',', value_parser = |text: &str| ToolName::parse(text).map_err(|error| error.to_string()))]
    tools: Option<Vec<ToolName>>,
    /// Until when it works, such as 2027-01-31T12:00:00Z.
    #[arg(long, value_parser = moment)]
    expires_at: Option<Timestamp>,
}

fn moment(text: &str) -> Result<Timestamp, String> {
    serde_json::from_value(text.into()).map_err(|_| "a moment looks like 2027-01-31T12:00:00Z".to_owned())
}

/// Does it.
pub async fn run(settings: &Settings, command: ApiKeysCommand) -> ExitCode {
    let vault = match node::open(settings, &CancellationToken::new()).await {
        Ok(vault) => vault,
        Err(error @ NodeError::Open(_)) if !error.is_configuration() => {
            complain(&explain(&error));
            complain("While the program runs, ask it instead: GET, POST and DELETE /admin/api-keys.");
            return error.status();
        }
        Err(error) => return error.report(),
    };
    if let ApiKeysCommand::List = command {
        return finish(list(&vault).await);
    }
    let audit = match Audit::open(&settings.audit, "mcp-gateway api-keys") {
        Ok(audit) => audit,
        Err(error) => return NodeError::from(error).report(),
    };
    let done = match command {
        ApiKeysCommand::Create(create) => make(&vault, &audit, create).await,
        ApiKeysCommand::Revoke { id } => revoke(&vault, &audit, &id).await,
        ApiKeysCommand::List => Ok(()),
    };
    audit.close().await;
    finish(done)
}

fn finish(done: Result<(), String>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            complain(&text);
            ExitCode::from(EX_CONFIG)
        }
    }
}

async fn record(audit: &Audit, action: Action, id: &str) -> Result<Recorded, String> {
    record_command(audit, action, Object::key(id)).await.map_err(|error| error.to_string())
}

async fn make(vault: &Vault, audit: &Audit, create: Create) -> Result<(), String> {
    if !vault.crypter().ring().can_protect() {
        return Err("API keys need a SECRETS_KEY that nobody can guess".to_owned());
    }
    let set = |names: Option<Vec<ServerName>>| names.map(BTreeSet::from_iter);
    let new = NewApiKey {
        name: create.name,
        user: create.user,
        scopes: create.scopes.into_iter().collect(),
        reach: Reach { servers: set(create.servers), tools: create.tools.map(BTreeSet::from_iter) },
        expires_at: create.expires_at,
    };
    let (key, text) = ApiKey::make(new, "the command line").map_err(|error| error.to_string())?;
    let recorded = record(audit, Action::ApiKeyCreate, &key.id).await?;
    vault.insert_api_key(&key).await.map_err(|error| explain(&error))?;
    recorded.answered(201, None);
    // Alone on its line, so that scripts can read it; all else is for people.
    complain(&format!("API key {} of {}. It is shown this once:", key.id, key.user));
    say(text.expose_secret());
    Ok(())
}

async fn list(vault: &Vault) -> Result<(), String> {
    let mut keys = vault.api_keys().await.map_err(|error| explain(&error))?;
    keys.sort_by_key(|key| key.created_at);
    let now = Timestamp::now();
    for key in &keys {
        let scopes: Vec<_> = key.scopes.iter().map(|scope| scope.as_str()).collect();
        let end = match key.expires_at {
            Some(_) if key.is_over(now) => "  (expired)".to_owned(),
            Some(end) => format!("  (until {end})"),
            None => String::new(),
        };
        say(&format!("{}  {}  {}  {}{end}", key.id, key.user, scopes.join(","), key.name));
    }
    if keys.is_empty() {
        complain("There are no API keys.");
    }
    Ok(())
}

async fn revoke(vault: &Vault, audit: &Audit, id: &str) -> Result<(), String> {
    let recorded = record(audit, Action::ApiKeyRevoke, id).await?;
    match vault.delete_api_key(id).await {
        Ok(true) => {
            recorded.answered(200, None);
            Ok(())
        }
        Ok(false) | Err(VaultError::Store(StoreError::NotFound)) => {
            Err("There is no API key with that id; `list` shows them".to_owned())
        }
        Err(error) => Err(explain(&error)),
    }
}

fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
