//! The store, its server, and the keys.

use std::time::Duration;

use tokio::time::timeout;

use super::{Area, Finding, LOOK, limited};
use crate::{
    check,
    config::{MongoSettings, Settings, StoreSettings},
    crypter::LegacyMode,
    fleet::NodeReport,
    lifecycle::explain,
    store::{
        mongo::Examined,
        open::{self, Access, ConnectError},
    },
    vault::Vault,
};

/// A difference of clocks at which tokens and sessions end too early or too late.
const SKEW: Duration = Duration::from_secs(2);
/// One at which they do not work any more.
const LARGE_SKEW: Duration = Duration::from_secs(60);
/// A round trip to the database that makes every change slow.
const FAR: Duration = Duration::from_millis(150);
/// The oldest MongoDB that is still looked after.
const OLDEST: u64 = 6;

/// What the store showed.
pub struct Looked {
    /// How it is.
    pub findings: Vec<Finding>,
    /// This node as it would introduce itself to others, where the store could be looked into.
    pub node: Option<NodeReport>,
}

/// Looks at the store, its server and the keys. A store that is not there yet is not made.
pub async fn stored(settings: &Settings) -> Looked {
    let opened = async {
        match timeout(LOOK, check::storage(settings)).await {
            Ok(stored) => {
                let mut findings = lines(settings, &stored.findings);
                if let Some(vault) = &stored.vault {
                    findings.extend(keys(vault).await);
                }
                Looked { findings, node: stored.node }
            }
            Err(_) => {
                let text = format!("the store was not opened within {} s", LOOK.as_secs());
                let findings = vec![Finding::error(Area::Reach, "store", text, remedy(settings))];
                Looked { findings, node: None }
            }
        }
    };
    let server = async {
        match &settings.store {
            StoreSettings::Mongo(mongo) => limited(Area::Reach, "MongoDB", server(mongo)).await,
            StoreSettings::Embedded => Vec::new(),
        }
    };
    let (mut looked, server) = tokio::join!(opened, server);
    looked.findings.extend(server);
    looked
}

fn remedy(settings: &Settings) -> &'static str {
    match &settings.store {
        StoreSettings::Embedded => "restore DATA_DIR from a backup, or set it to another folder",
        StoreSettings::Mongo(_) => {
            "start it, or correct MONGODB_URI (or MONGO_HOST, MONGO_USER, MONGO_PASS and MONGO_REPLICASET)"
        }
    }
}

fn lines(settings: &Settings, found: &[check::Finding]) -> Vec<Finding> {
    let finding = |(what, how): &check::Finding| match (*what, how) {
        // It is looked at more closely elsewhere.
        ("data folder", _) => None,
        ("key", Ok(text)) => Some(Finding::ok(Area::Keys, "key", text)),
        ("key", Err(text)) => Some(Finding::error(
            Area::Keys,
            "key",
            text,
            "set SECRETS_KEY or SECRETS_KEYS_FILE to the key that the data was encrypted with; for new data \
             `openssl rand -hex 32` makes one",
        )),
        (what, Ok(text)) => Some(Finding::ok(Area::Reach, what, text)),
        (what, Err(text)) => Some(Finding::error(Area::Reach, what, text, remedy(settings))),
    };
    found.iter().filter_map(finding).collect()
}

async fn keys(vault: &Vault) -> Vec<Finding> {
    let mut findings = Vec::new();
    let crypter = vault.crypter();
    if !crypter.ring().can_protect() {
        findings.push(Finding::warning(
            Area::Keys,
            "SECRETS_KEY",
            "is weak: it only serves values in mcp-api's format",
            "make a key ring (mcp-gateway keys generate), name it in SECRETS_KEYS_FILE, and end the legacy mode",
        ));
    }
    // It reads everything that is encrypted.
    let counted = match timeout(LOOK / 2, vault.keys()).await {
        Ok(Ok(counted)) => counted,
        Ok(Err(error)) => {
            let text = explain(&error);
            findings.push(Finding::error(Area::Keys, "stored values", text, "see what the store says"));
            return findings;
        }
        Err(_) => {
            findings.push(Finding::warning(
                Area::Keys,
                "stored values",
                "there are too many to be counted in a few seconds",
                "mcp-gateway keys list counts them",
            ));
            return findings;
        }
    };
    let lost = counted.keys.iter().filter(|key| key.values > 0 && !key.held);
    findings.extend(lost.map(|key| {
        Finding::error(
            Area::Keys,
            format!("key {}", key.id),
            format!("{} stored values need it, and this node does not have it", key.values),
            "put it back into SECRETS_KEYS_FILE",
        )
    }));
    let (legacy, clear) = (counted.legacy_values, counted.clear_values);
    match crypter.mode() {
        LegacyMode::Off if legacy + clear > 0 => findings.push(Finding::warning(
            Area::Keys,
            "legacy mode",
            format!("off, and {legacy} values in mcp-api's format and {clear} in clear cannot be read"),
            "start with LEGACY_SECRETS=ro and run mcp-gateway keys rewrap",
        )),
        LegacyMode::Off => {}
        LegacyMode::Rw | LegacyMode::Ro => findings.push(Finding::warning(
            Area::Keys,
            "legacy mode",
            format!(
                "{}: {legacy} values in mcp-api's format and {clear} in clear, which are not bound to their places",
                counted.legacy_mode
            ),
            "when mcp-api is not gone back to: LEGACY_SECRETS=ro, mcp-gateway keys rewrap, LEGACY_SECRETS=off",
        )),
    }
    if counted.broken_values > 0 {
        findings.push(Finding::warning(
            Area::Keys,
            "stored values",
            format!("{} are neither encrypted nor clear", counted.broken_values),
            "mcp-gateway migrate --dry-run names them; they have to be set again",
        ));
    }
    findings
}

/// The server behind the store.
async fn server(settings: &MongoSettings) -> Vec<Finding> {
    let examined = async {
        let store = open::mongo(settings, Access::Inspect).await?;
        let examined = store.examine().await;
        store.close().await;
        examined
            .map_err(|error| ConnectError::Unfit { hosts: settings.hosts.clone(), cause: explain(&error) })
    };
    match examined.await {
        Ok(examined) => describe(settings, &examined),
        // That it cannot be reached was said.
        Err(_) => Vec::new(),
    }
}

fn describe(settings: &MongoSettings, seen: &Examined) -> Vec<Finding> {
    let mut findings = Vec::new();
    let what = "MongoDB";
    let version = format!("{} (wire version {}), {}", seen.version, seen.wire, seen.topology);
    let major = seen.version.split('.').next().and_then(|major| major.parse::<u64>().ok());
    findings.push(if major.is_some_and(|major| major < OLDEST) {
        let remedy = format!("move to MongoDB {OLDEST} or newer: older ones get no security fixes");
        Finding::warning(Area::Versions, what, version, remedy)
    } else {
        Finding::ok(Area::Versions, what, version)
    });
    let trip = format!("answers within {:.1} ms", seen.round_trip.as_secs_f64() * 1_000.0);
    findings.push(if seen.round_trip > FAR {
        Finding::warning(Area::Reach, what, trip, "put it nearer to the nodes: every change waits for it")
    } else {
        Finding::ok(Area::Reach, what, trip)
    });
    if let Some(skew) = seen.skew {
        let seconds = format!("{:.1} s", skew.as_secs_f64());
        let remedy = "let both machines follow a time server (chrony, systemd-timesyncd)";
        findings.push(match skew {
            skew if skew > LARGE_SKEW => Finding::error(
                Area::Clocks,
                what,
                format!("its clock is {seconds} away from this one"),
                remedy,
            ),
            skew if skew > SKEW => Finding::warning(
                Area::Clocks,
                what,
                format!("its clock is {seconds} away from this one"),
                remedy,
            ),
            _ => Finding::ok(Area::Clocks, what, format!("its clock and this one agree within {seconds}")),
        });
    }
    findings.push(match (&seen.user, &seen.missing) {
        (None, _) => Finding::ok(Area::Permissions, what, "asks nobody for a login"),
        (Some(user), Some(missing)) if !missing.is_empty() => Finding::error(
            Area::Permissions,
            what,
            format!("the user {user} may not {} in {}", missing.join(", "), settings.database),
            format!("give the role readWrite on the database {}", settings.database),
        ),
        (Some(user), Some(_)) => {
            Finding::ok(Area::Permissions, what, format!("the user {user} may do all that is needed"))
        }
        (Some(user), None) => Finding::ok(Area::Permissions, what, format!("logged in as {user}")),
    });
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    fn findings(change: impl FnOnce(&mut Examined)) -> Vec<Finding> {
        let mut seen = Examined {
            version: "8.0.4".to_owned(),
            wire: 25,
            topology: "replica set rs0".to_owned(),
            round_trip: Duration::from_millis(1),
            skew: Some(Duration::from_millis(20)),
            user: Some("mcp".to_owned()),
            missing: Some(Vec::new()),
        };
        change(&mut seen);
        let env = [("MONGO_HOST".to_owned(), "127.0.0.1:1".to_owned())];
        let settings = Settings::load(env.into_iter(), None).unwrap();
        let StoreSettings::Mongo(mongo) = &settings.store else { panic!("no MongoDB") };
        describe(mongo, &seen)
    }

    fn worst(findings: &[Finding]) -> (Level, Area) {
        findings.iter().map(|finding| (finding.level, finding.area)).max().unwrap()
    }

    #[test]
    fn a_server_is_judged_by_what_it_says() {
        assert_eq!(worst(&findings(|_| {})).0, Level::Ok);
        assert_eq!(worst(&findings(|seen| seen.user = None)).0, Level::Ok);
        let seconds = |seconds| move |seen: &mut Examined| seen.skew = Some(Duration::from_secs(seconds));
        assert_eq!(worst(&findings(seconds(3))), (Level::Warning, Area::Clocks));
        assert_eq!(worst(&findings(seconds(90))), (Level::Error, Area::Clocks));
        let old = findings(|seen| seen.version = "4.4.29".to_owned());
        assert_eq!(worst(&old), (Level::Warning, Area::Versions));
        let far = findings(|seen| seen.round_trip = Duration::from_millis(200));
        assert_eq!(worst(&far), (Level::Warning, Area::Reach));
        let narrow = findings(|seen| seen.missing = Some(vec!["insert", "createIndex"]));
        assert_eq!(worst(&narrow), (Level::Error, Area::Permissions));
        let finding = narrow.iter().find(|finding| finding.level == Level::Error).unwrap();
        assert_eq!(finding.text, "the user mcp may not insert, createIndex in squad-test");
        assert_eq!(finding.remedy.as_deref(), Some("give the role readWrite on the database squad-test"));
    }
}
