//! What both programs stand on, looked at by `doctor`: the machine, the store and its keys, the bus and who is on it,
//! and the programs that run MCP servers. A gateway adds what only it has.

mod browser;
mod runtimes;

use clap::Args;
use mcp_nats::doctor;
use mcp_shared::{
    check,
    config::{BusServer, BusSettings, Settings},
    doctor::{Area, Finding, limited, machine, stored},
    fleet::{NodeReport, Role},
    timestamp::Timestamp,
};

use crate::bus;

/// A node that started so much later than now has another clock, in milliseconds.
const SKEW: i64 = 2_000;

/// How somebody wants to be told, and how far may be looked.
#[derive(Debug, Clone, Copy, Args)]
pub struct DoctorArguments {
    /// Print one JSON object for machines.
    #[arg(long)]
    pub json: bool,
    /// Also ask the package registries, which no setting need name.
    #[arg(long)]
    pub network: bool,
}

/// Looks at everything side by side.
pub async fn look(settings: &Settings, role: Role, how: DoctorArguments) -> Vec<Finding> {
    let runs_servers = role == Role::Worker || settings.bus.is_none();
    let fleet = async {
        let looked = stored(settings).await;
        let mut findings = looked.findings;
        if let Some(bus) = &settings.bus {
            findings.extend(limited(Area::Reach, "bus", joined(bus, role, looked.node.as_ref())).await);
        }
        findings
    };
    let greetings = async {
        match &settings.bus {
            Some(bus) => limited(Area::Versions, "NATS", greetings(bus)).await,
            None if role == Role::Worker => vec![Finding::error(
                Area::Settings,
                "NATS_URL",
                "is not set, and a worker takes its calls from NATS",
                "set it, with MONGODB_URI or MONGO_HOST and SECRETS_KEY, as the gateways have it",
            )],
            None => Vec::new(),
        }
    };
    let runtimes = async {
        if runs_servers {
            limited(Area::Runtimes, "runtimes", runtimes::look(settings, how.network)).await
        } else {
            Vec::new()
        }
    };
    // It has a time of its own, which is longer than that of a look.
    let browser =
        async { if runs_servers { vec![browser::look(&settings.remote).await] } else { Vec::new() } };
    let health = async {
        if role == Role::Gateway {
            return Vec::new();
        }
        let listen = check::listen(&settings.worker_host, settings.worker_port).await;
        vec![listening("health", listen, "WORKER_HOST and WORKER_PORT choose another address")]
    };
    let mut findings = machine(settings, role == Role::Gateway);
    let (fleet, greetings, runtimes, browser, health) =
        tokio::join!(fleet, greetings, runtimes, browser, health);
    for more in [fleet, greetings, runtimes, browser, health] {
        findings.extend(more);
    }
    findings
}

/// Whether an address can be listened on.
pub fn listening(what: &str, listen: Result<String, String>, remedy: &str) -> Finding {
    match listen {
        Ok(text) => Finding::ok(Area::Reach, what, text),
        Err(text) => Finding::error(Area::Reach, what, text, remedy),
    }
}

/// What each server of the bus says before anybody logs in.
async fn greetings(bus: &BusSettings) -> Vec<Finding> {
    let all = bus.servers.iter().map(async |server| judge(server, doctor::greeting(server).await));
    futures_util::future::join_all(all).await
}

fn judge(server: &BusServer, greeting: std::io::Result<Option<doctor::Greeting>>) -> Finding {
    let what = format!("NATS {}:{}", server.host, server.port);
    match greeting {
        Ok(Some(greeting)) => match greeting.holes() {
            Some(holes) => Finding::error(Area::Versions, what, holes, "install NATS 2.12.6 or newer"),
            None => Finding::ok(Area::Versions, what, greeting.version),
        },
        Ok(None) => {
            Finding::ok(Area::Versions, what, "greets nobody without TLS, so its version is not known")
        }
        Err(error) => Finding::error(
            Area::Reach,
            what,
            format!("cannot be reached: {error}"),
            "start it, or correct NATS_URL",
        ),
    }
}

/// Whether this node can join, who is there, and whether it may do there what its role has to.
async fn joined(bus: &BusSettings, role: Role, own: Option<&NodeReport>) -> Vec<Finding> {
    let ((lines, nodes), refused) = tokio::join!(bus::look(bus, own), doctor::refused(bus, role));
    let mut findings: Vec<Finding> = lines
        .into_iter()
        .map(|(what, how)| match how {
            Ok(text) => Finding::ok(Area::Reach, what, text),
            Err(text) if what == "fleet" => Finding::error(
                Area::Reach,
                what,
                text,
                "give this node the database and the keys of the others, or a NATS_PREFIX of its own",
            ),
            Err(text) => Finding::error(
                Area::Reach,
                what,
                text,
                "correct NATS_URL and the login (NATS_NKEY_SEED_FILE, NATS_CREDS), or the accounts of the server",
            ),
        })
        .collect();
    if let Ok(refused) = refused {
        let who = match role {
            Role::Gateway => "a gateway",
            Role::Worker => "a worker",
        };
        findings.extend(refused.iter().map(|text| {
            let remedy = format!("give this login the permissions of {who} in nats/nats-server.conf");
            Finding::error(Area::Permissions, "NATS", text, remedy)
        }));
        if refused.is_empty() {
            let text = format!("this login may say and hear what {who} has to");
            findings.push(Finding::ok(Area::Permissions, "NATS", text));
        }
    }
    findings.extend(clocks(&nodes));
    findings
}

fn clocks(nodes: &[NodeReport]) -> Vec<Finding> {
    let now = Timestamp::now().millis();
    let ahead = |node: &&NodeReport| node.started.millis() > now + SKEW;
    let others: Vec<_> = nodes.iter().filter(ahead).collect();
    if nodes.is_empty() {
        return Vec::new();
    }
    if others.is_empty() {
        let text = "no node has started in this one's future";
        return vec![Finding::ok(Area::Clocks, "fleet", text)];
    }
    let finding = |node: &&NodeReport| {
        let seconds = (node.started.millis() - now) / 1_000;
        Finding::warning(
            Area::Clocks,
            node.id.as_str(),
            format!("says that it started {seconds} s from now"),
            "let both machines follow a time server (chrony, systemd-timesyncd)",
        )
    };
    others.iter().map(finding).collect()
}

#[cfg(test)]
mod tests {
    use mcp_shared::{doctor::Level, ids::WorkerId};

    use super::*;

    fn started(ahead: i64) -> NodeReport {
        NodeReport {
            id: WorkerId::from_stored(format!("w-{ahead}")),
            role: Role::Worker,
            version: "1".to_owned(),
            started: Timestamp::from_millis(Timestamp::now().millis() + ahead),
            wire: (1, 1),
            store: String::new(),
            keys: Vec::new(),
            capacity: 1,
            draining: false,
            servers: Vec::new(),
            per_user: Vec::new(),
        }
    }

    #[test]
    fn a_node_from_the_future_has_another_clock() {
        assert_eq!(clocks(&[]), []);
        let fine = clocks(&[started(-60_000), started(500)]);
        assert_eq!((fine.len(), fine[0].level), (1, Level::Ok));
        let off = clocks(&[started(-60_000), started(60_000)]);
        assert_eq!((off.len(), off[0].level, off[0].what.as_str()), (1, Level::Warning, "w-60000"));
    }
}
