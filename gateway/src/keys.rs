//! `mcp-gateway keys`: what an operator does with encryption keys. Commands that change the key ring's file need
//! nothing else; those that look into the store do so beside running programs where that is a MongoDB, and say
//! whom to ask where it is the file of a running program.

use std::{io::Write, process::ExitCode, sync::Arc, time::Duration};

use clap::Subcommand;
use mcp_shared::{
    audit::{Action, Audit, Object, Recorded},
    config::{Settings, StoreSettings},
    crypter::{KeyError, LegacyMode, TEXT_KID, generate_key_line},
    fleet::NodeReport,
    lifecycle::{EX_CONFIG, EX_TEMPFAIL, address, complain, explain},
    limits,
    node::{self, KeyPlace, NodeError},
    store::{embedded::OpenError, open::ConnectError},
    vault::{KeysView, KnownKey, RetireError, RewrapError, RewrapState, Rewrapping, Vault},
};
use secrecy::ExposeSecret;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;

use crate::{audit::record_command, routes::keys::other_primary};

/// How often it is told of.
const TOLD: Duration = Duration::from_secs(5);

/// What can be done with keys.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Print a line for a key ring: an id and a new random key.
    Generate {
        /// The id of the key: 1 to 16 lower-case letters and digits.
        #[arg(long, value_name = "ID", default_value = TEXT_KID)]
        id: String,
    },
    /// Show the keys by their ids: which one encrypts, and how many stored values need each.
    List,
    /// Change the file of this node's key ring. Without an option: a new key that encrypts, and everything stored
    /// encrypted with it (on one machine, with the program stopped).
    Rotate {
        /// Add a new key behind the others. It decrypts, and does not encrypt yet.
        #[arg(long, conflicts_with_all = ["to", "drop"])]
        add: bool,
        /// The id of the new key; without it the next number.
        #[arg(long, value_name = "ID", conflicts_with_all = ["to", "drop"])]
        id: Option<String>,
        /// Make this key of the file the first one, which encrypts.
        #[arg(long, value_name = "ID", conflicts_with = "drop")]
        to: Option<String>,
        /// Take this key, which was retired, out of the file.
        #[arg(long, value_name = "ID")]
        drop: Option<String>,
    },
    /// Encrypt everything that is stored anew with the key that encrypts.
    Rewrap {
        /// Documents that may be written in a second.
        #[arg(long, default_value_t = limits::REWRAP_RATE, value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::REWRAP_RATE_MAX)))]
        rate: u32,
    },
    /// Say that nothing needs a key any more, so that nodes may forget it. It cannot be taken back.
    Retire {
        /// The key's id.
        id: String,
        /// Also if stored values need it, which are lost with it.
        #[arg(long)]
        force: bool,
    },
}

/// Why a command did not do it.
enum Failed {
    /// Trying again changes nothing.
    Refused(String),
    /// It may later.
    NotNow(String),
    /// A running program has the store to itself.
    InUse(String),
}

impl From<NodeError> for Failed {
    fn from(error: NodeError) -> Self {
        if error.is_configuration() { Self::Refused(explain(&error)) } else { Self::NotNow(explain(&error)) }
    }
}

impl From<KeyError> for Failed {
    fn from(error: KeyError) -> Self {
        Self::Refused(error.to_string())
    }
}

impl From<mcp_shared::vault::VaultError> for Failed {
    fn from(error: mcp_shared::vault::VaultError) -> Self {
        NodeError::from(error).into()
    }
}

/// Does it, and says by the exit status whether it was done.
pub async fn run(settings: &Settings, command: KeysCommand) -> ExitCode {
    let done = match command {
        KeysCommand::Generate { id } => generate(&id),
        KeysCommand::List => list(settings).await,
        command => match Audit::open(&settings.audit, "mcp-gateway keys") {
            Ok(audit) => {
                let done = change(&Command { settings, audit: &audit }, command).await;
                audit.close().await;
                done
            }
            Err(error) => Err(NodeError::from(error).into()),
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed::Refused(why)) => {
            complain(&why);
            ExitCode::from(EX_CONFIG)
        }
        Err(Failed::NotNow(why) | Failed::InUse(why)) => {
            complain(&why);
            ExitCode::from(EX_TEMPFAIL)
        }
    }
}

/// A command that changes something, which is recorded before.
struct Command<'a> {
    settings: &'a Settings,
    audit: &'a Audit,
}

impl Command<'_> {
    async fn record(&self, action: Action, key: &str) -> Result<Recorded, Failed> {
        let recorded = record_command(self.audit, action, Object::key(key)).await;
        recorded.map_err(|error| Failed::NotNow(error.to_string()))
    }
}

async fn change(command: &Command<'_>, wanted: KeysCommand) -> Result<(), Failed> {
    match wanted {
        KeysCommand::Generate { .. } | KeysCommand::List => Ok(()),
        KeysCommand::Rotate { add, id, to, drop } => match (to, drop) {
            (Some(to), _) => promote(command, &to).await,
            (None, Some(gone)) => forget(command, &gone).await,
            (None, None) if add || id.is_some() => add_key(command, id).await,
            (None, None) => rotate(command).await,
        },
        KeysCommand::Rewrap { rate } => rewrap(command, rate).await,
        KeysCommand::Retire { id, force } => retire(command, &id, force).await,
    }
}

fn say(text: &str) {
    // Somebody who closed the pipe has read enough.
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

fn generate(id: &str) -> Result<(), Failed> {
    say(generate_key_line(id)?.expose_secret());
    Ok(())
}

/// The store and the keys of this node, to look into.
async fn look(settings: &Settings) -> Result<Vault, Failed> {
    let inspected = node::inspect(settings).await.map_err(|error| beside(settings, error))?;
    let vault = inspected.vault?;
    vault
        .ok_or_else(|| Failed::Refused("this store was never used: the first start makes its key".to_owned()))
}

/// Says whom to ask where a running program has the store to itself.
fn beside(settings: &Settings, error: NodeError) -> Failed {
    if let NodeError::Open(ConnectError::Embedded(OpenError::Locked { dir })) = &error {
        let address = address(&settings.host, settings.port);
        return Failed::InUse(format!(
            "a running mcp-api uses the data folder {} and has it to itself: ask that program \
             (curl http://{address}/admin/keys, and POST to .../keys/reload, /rewrap or /retire), or stop it",
            dir.display()
        ));
    }
    error.into()
}

/// The nodes of the fleet that are heard.
async fn nodes(settings: &Settings) -> Result<Vec<NodeReport>, Failed> {
    let Some(bus) = &settings.bus else { return Ok(Vec::new()) };
    let found = mcp_nats::connect::check(bus).await;
    let (_, nodes) = found.map_err(|error| Failed::from(crate::cluster::unusable(bus, error)))?;
    Ok(nodes)
}

async fn list(settings: &Settings) -> Result<(), Failed> {
    let vault = look(settings).await?;
    let keys = vault.keys().await?;
    say(&format!("keys of {}, legacy mode {}", KeyPlace::of(settings).shown(), keys.legacy_mode));
    table(&keys);
    for node in nodes(settings).await? {
        say(&format!("{} has {}", node.id, node.keys.join(", ")));
    }
    Ok(())
}

fn table(keys: &KeysView) {
    say(&format!("{:<17} {:<17} {:>10}  {}", "id", "check value", "values", "what it is for"));
    for key in &keys.keys {
        let role = match (key.primary, key.held, key.retired) {
            (true, ..) => "encrypts",
            (_, true, true) => "decrypts; retired, so that it can be dropped",
            (_, true, false) => "decrypts",
            (_, false, true) => "retired and gone",
            (_, false, false) => "MISSING on this node",
        };
        let check = key.check_value.as_deref().unwrap_or("-");
        say(&format!("{:<17} {check:<17} {:>10}  {role}", key.id, key.values));
    }
    for (count, what) in [
        (keys.legacy_values, "in mcp-api's format"),
        (keys.clear_values, "in clear"),
        (keys.broken_values, "that are neither encrypted nor clear"),
    ] {
        if count > 0 {
            say(&format!("{count} values {what}"));
        }
    }
}

/// An id that neither the file nor, where it can be looked into, the store has seen: one that was used once would be
/// taken for the old key.
async fn free_id(settings: &Settings) -> Result<String, Failed> {
    let place = KeyPlace::of(settings);
    let ring = place.ring()?;
    let mut seen: Vec<String> = Vec::new();
    let vault = match look(settings).await {
        Ok(vault) => Some(vault),
        Err(Failed::InUse(_)) => None,
        Err(error) => return Err(error),
    };
    loop {
        let kid = ring.free_kid(|kid| seen.iter().any(|one| one == kid));
        match &vault {
            Some(vault) if vault.known_key(&kid).await?.seen => seen.push(kid),
            None if peek(settings, &kid)?.seen => seen.push(kid),
            _ => return Ok(kid),
        }
    }
}

/// What the store of a running program says of a key.
fn peek(settings: &Settings, kid: &str) -> Result<KnownKey, Failed> {
    KnownKey::peek(&settings.data_dir, kid).map_err(|error| NodeError::Open(error.into()).into())
}

async fn add_key(command: &Command<'_>, id: Option<String>) -> Result<(), Failed> {
    let settings = command.settings;
    let id = match id {
        Some(id) => id,
        None => free_id(settings).await?,
    };
    let line = generate_key_line(&id)?;
    let recorded = command.record(Action::KeysRotate, &id).await?;
    KeyPlace::of(settings).change(|ring| ring.with(&line))?;
    recorded.answered(200, None);
    say(&format!(
        "{id} was added behind the other keys of {}. Bring the line to the file of every node, have every node read \
         it (SIGHUP, or POST /admin/keys/reload at a gateway), and then: keys rotate --to {id}",
        shown(settings)
    ));
    Ok(())
}

async fn promote(command: &Command<'_>, kid: &str) -> Result<(), Failed> {
    let settings = command.settings;
    // A node reads its file anew at a start, too, and would find out only then.
    let nodes = nodes(settings).await?;
    if let Some(lacking) = nodes.iter().find(|node| !node.keys.iter().any(|own| own == kid)) {
        return Err(Failed::Refused(format!(
            "{} does not have the key {kid} yet and could not read what is encrypted with it: bring it there before",
            lacking.id
        )));
    }
    let recorded = command.record(Action::KeysRotate, kid).await?;
    KeyPlace::of(settings).change(|ring| ring.promoted(kid))?;
    recorded.answered(200, None);
    say(&format!(
        "{kid} stands first in {}. When the files of all nodes and the nodes themselves have it there (SIGHUP, or POST \
         /admin/keys/reload), encrypt what is stored with it: keys rewrap",
        shown(settings)
    ));
    Ok(())
}

async fn forget(command: &Command<'_>, kid: &str) -> Result<(), Failed> {
    let settings = command.settings;
    match look(settings).await {
        Ok(vault) => {
            let keys = vault.keys().await?.keys;
            if let Some(key) = keys.iter().find(|key| key.id == kid)
                && key.used
                && !key.retired
            {
                return Err(Failed::Refused(format!(
                    "{kid} has encrypted what is stored, and is not retired: keys retire {kid}"
                )));
            }
        }
        // What is taken out of the file is lost: that the running program would refuse it comes too late.
        Err(Failed::InUse(_)) => {
            let known = peek(settings, kid)?;
            if known.seen && !known.retired {
                return Err(Failed::Refused(format!(
                    "{kid} is not retired: POST {{\"id\": \"{kid}\"}} to /admin/keys/retire of the running program"
                )));
            }
        }
        Err(error) => return Err(error),
    }
    let recorded = command.record(Action::KeysRotate, kid).await?;
    KeyPlace::of(settings).change(|ring| ring.without(kid))?;
    recorded.answered(200, None);
    say(&format!("{kid} is not in {} any more. Nodes forget it when they read it anew", shown(settings)));
    Ok(())
}

fn shown(settings: &Settings) -> String {
    KeyPlace::of(settings).shown()
}

/// All steps at once, where one node is all there is and nobody uses its store.
async fn rotate(command: &Command<'_>) -> Result<(), Failed> {
    let settings = command.settings;
    if settings.bus.is_some() {
        return Err(Failed::Refused(
            "every node of a fleet has to have a new key before one encrypts with it. In this order: keys rotate --add, \
             the line into the file of every node, SIGHUP to every node, keys rotate --to ID for every file, SIGHUP \
             to every node, keys rewrap, keys retire OLD"
                .to_owned(),
        ));
    }
    let embedded = matches!(settings.store, StoreSettings::Embedded);
    let alone = match look(settings).await {
        Ok(vault) if vault.crypter().mode() == LegacyMode::Rw => {
            return Err(Failed::Refused(RewrapError::Legacy.to_string()));
        }
        Ok(_) => embedded,
        Err(Failed::InUse(_)) => false,
        Err(error) => return Err(error),
    };
    let id = free_id(settings).await?;
    let line = generate_key_line(&id)?;
    let recorded = command.record(Action::KeysRotate, &id).await?;
    KeyPlace::of(settings).change(|ring| ring.with(&line)?.promoted(&id))?;
    recorded.answered(200, None);
    say(&format!("{id} is the first key of {}", shown(settings)));
    if !alone {
        say(
            "A running program reads it at SIGHUP, or at POST /admin/keys/reload; then: POST /admin/keys/rewrap",
        );
        return Ok(());
    }
    rewrap(command, limits::REWRAP_RATE_MAX).await?;
    say(
        "The old keys can be retired when no backup needs them any more: keys retire ID, keys rotate --drop ID",
    );
    Ok(())
}

async fn rewrap(command: &Command<'_>, rate: u32) -> Result<(), Failed> {
    let settings = command.settings;
    let vault = look(settings).await?;
    let others = nodes(settings).await?;
    if let Some(why) = other_primary(&vault.kids(), &others) {
        return Err(Failed::Refused(why));
    }
    let primary = vault.kids().first().cloned().unwrap_or_default();
    if matches!(settings.store, StoreSettings::Embedded) {
        // Nobody else has the store, so that nobody has to agree.
        let source = KeyPlace::of(settings).read()?;
        if let Some(source) = source {
            let keys = vault.read_keys(source).await?;
            vault.record_keys(&keys).await?;
        }
    } else if !vault.keys().await?.keys.iter().any(|key| key.id == primary && key.used) {
        return Err(Failed::Refused(format!(
            "no node encrypts with {primary} yet: have them read their keys anew (SIGHUP), or start one, before"
        )));
    }
    let recorded = command.record(Action::KeysRewrap, &primary).await?;
    let stop = CancellationToken::new();
    let interrupted = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupted.cancel();
        }
    });
    let owner = format!("keys-rewrap-{}", uuid::Uuid::now_v7().simple());
    let rewrap = vault.begin_rewrap(&owner).await.map_err(|error| match error {
        RewrapError::Vault(error) => error.into(),
        error @ RewrapError::Busy { .. } => Failed::NotNow(error.to_string()),
        error => Failed::Refused(error.to_string()),
    })?;
    let seen = rewrap.seen();
    let telling = tokio::spawn(tell(Arc::clone(&seen)));
    rewrap.run(rate, &stop).await;
    telling.abort();
    let report = seen.report();
    say(&format!("{} values were encrypted anew with {}", report.rewrapped, report.key));
    if report.overtaken > 0 {
        say(&format!("{} documents were changed by others at the same time", report.overtaken));
    }
    if report.expiring > 0 {
        say(&format!("{} results of named calls stay as they are until they are forgotten", report.expiring));
    }
    for left in &report.left {
        say(&format!("left as it is ({}): {}", left.reason, left.what));
    }
    if report.left_count > 0 {
        say(&format!("{} values could not be opened and were left as they are", report.left_count));
    }
    match report.state {
        RewrapState::Done => {
            recorded.answered(200, None);
            Ok(())
        }
        RewrapState::Failed => Err(Failed::NotNow(report.error.unwrap_or_default())),
        _ => Err(Failed::NotNow("it was interrupted; begin again to go on".to_owned())),
    }
}

/// Tells how far a run is, for as long as it goes on.
async fn tell(seen: Arc<Rewrapping>) {
    let mut ticks = interval(TOLD);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let report = seen.report();
        say(&format!("{} documents examined, {} values encrypted anew", report.examined, report.rewrapped));
    }
}

async fn retire(command: &Command<'_>, id: &str, force: bool) -> Result<(), Failed> {
    let settings = command.settings;
    let vault = look(settings).await?;
    if let Some(other) =
        nodes(settings).await?.iter().find(|node| node.keys.first().is_some_and(|kid| kid == id))
    {
        return Err(Failed::Refused(format!("{} still encrypts with the key {id}", other.id)));
    }
    let recorded = command.record(Action::KeysRetire, id).await?;
    vault.retire_key(id, force).await.map_err(|error| match error {
        RetireError::Vault(error) => error.into(),
        error => Failed::Refused(error.to_string()),
    })?;
    recorded.answered(200, None);
    say(&format!("{id} is retired. Take it out of the key ring of every node: keys rotate --drop {id}"));
    Ok(())
}
