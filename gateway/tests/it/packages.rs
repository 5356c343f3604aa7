//! Packages: installed from a registry of the test's own, called, upgraded, pinned and removed.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use mcp_shared::testing::registry::{Fault, Registry, Wheel, node_server, python_server};
use serde_json::{Value, json};

use crate::deployment::{Answer, Builder, Deployment, alive, eventually};

/// A registry with a server of npm in two versions, the first of which is tagged `old`.
pub fn registry() -> Registry {
    let registry = Registry::start();
    for version in ["1.0.0", "1.1.0"] {
        add_version(&registry, version);
    }
    registry.tag_npm("@acme/clock", "old", "1.0.0");
    registry
}

/// Adds a version of that server.
pub fn add_version(registry: &Registry, version: &str) {
    registry.add_npm(
        "@acme/clock",
        version,
        &[("cli.js", &node_server(version))],
        r#"{"bin": {"clock": "cli.js"}}"#,
    );
}

/// A deployment whose workers install from a registry.
pub fn from(registry: &Registry) -> Builder {
    Deployment::builder()
        .env("npm_config_registry", registry.npm_url())
        .env("PIP_INDEX_URL", registry.pip_url())
}

pub async fn install(api: &Deployment, body: Value) -> Answer {
    api.post("/packages/install", &body).await
}

/// The version that a server answers with.
pub async fn version(api: &Deployment, server: &str) -> String {
    api.call(server, "version", json!({})).await.tool_text()
}

async fn package(api: &Deployment, server: &str) -> Value {
    api.get(&format!("/packages/by-id/{server}")).await.ok().json()["package"].clone()
}

/// Nothing of a server is stored, and no worker has more installations than those of the others.
async fn no_trace(api: &Deployment, server: &str, installations: usize) {
    api.get(&format!("/packages/by-id/{server}")).await.fails(404, "package_not_found");
    api.get(&format!("/mcp/servers/{server}")).await.fails(404, "server_not_found");
    eventually("nothing is left on any disk", async || {
        generations(api).iter().all(|(_, count)| *count <= installations)
    })
    .await;
}

/// The folders of installations, and how many there are in each, half-done ones included.
fn generations(api: &Deployment) -> Vec<(PathBuf, usize)> {
    let roots = if crate::CLUSTER { vec!["worker-0", "worker-1", "worker-2"] } else { vec![""] };
    let folders = roots.into_iter().map(|root| api.data().path().join(root).join("data/packages"));
    folders
        .map(|folder| {
            let entries = std::fs::read_dir(folder.join(".generations")).into_iter().flatten().flatten();
            let count = entries.filter(|entry| entry.path().is_dir()).count();
            let scratch = std::fs::read_dir(folder.join(".scratch")).into_iter().flatten().count();
            (folder, count + scratch)
        })
        .collect()
}

#[tokio::test]
async fn a_package_of_npm_lives_its_life() {
    let registry = registry();
    let api = from(&registry).start().await;
    let answer = install(&api, json!({"name": "@acme/clock", "version": "old", "serverName": "clock"}))
        .await
        .ok()
        .json();
    let (package, server) = (&answer["package"], &answer["server"]);
    assert_eq!((&package["version"], &package["status"]), (&"1.0.0".into(), &"installed".into()), "{answer}");
    assert_eq!((&package["mcpServerId"], &package["runtime"]), (&"clock".into(), &"node".into()));
    assert_eq!(package["installPath"], "packages/acme-clock");
    assert_eq!((&server["status"], &server["command"]), (&"connected".into(), &"node".into()), "{answer}");
    assert_eq!(server["args"], json!(["./packages/acme-clock/node_modules/@acme/clock/cli.js"]));
    assert_eq!(version(&api, "clock").await, "1.0.0");

    let updates = api.get("/packages/updates").await.ok().json()["updates"].clone();
    let expected = json!({"serverName": "clock", "currentVersion": "1.0.0", "latestVersion": "1.1.0", "updateAvailable": true});
    assert_eq!(updates, json!([expected]));
    for path in ["/packages/by-name/@acme%2Fclock", "/packages/by-name/@acme/clock", "/packages/by-id/clock"]
    {
        let package = api.get(&format!("{path}?checkUpdates=true")).await.ok().json()["package"].clone();
        assert_eq!(
            (&package["latestVersion"], &package["updateAvailable"]),
            (&"1.1.0".into(), &true.into()),
            "{path}"
        );
    }

    let pids = api.pids("clock").await;
    let upgraded = api.put("/packages/clock/upgrade", None).await.ok().json();
    assert_eq!(upgraded["package"]["version"], "1.1.0", "{upgraded}");
    assert!(upgraded["package"]["lastUpgraded"].is_string() && upgraded["server"]["status"] == "connected");
    assert_eq!(upgraded["package"]["updateAvailable"], false, "{upgraded}");
    assert_eq!(version(&api, "clock").await, "1.1.0");
    assert_ne!(api.pids("clock").await, pids);
    // What is there already is no work, and no new process.
    let pids = api.pids("clock").await;
    api.put("/packages/clock/upgrade", Some(&json!({}))).await.ok();
    assert_eq!(api.pids("clock").await, pids);
    // To pin is to upgrade to an older version.
    api.put("/packages/clock/upgrade", Some(&json!({"version": "1.0.0"}))).await.ok();
    assert_eq!(version(&api, "clock").await, "1.0.0");
    let all = api.put("/packages/upgrade-all", None).await.ok().json();
    assert_eq!(
        (&all["results"][0]["serverName"], &all["results"][0]["success"]),
        (&"clock".into(), &true.into())
    );
    assert_eq!(version(&api, "clock").await, "1.1.0");
    eventually("older installations go", async || generations(&api).iter().all(|(_, count)| *count <= 1))
        .await;

    api.put("/packages/clock/disable", None).await.ok();
    assert_eq!(package_of(&api).await["enabled"], false);
    api.call("clock", "version", json!({})).await.fails(409, "server_disabled");
    api.put("/packages/clock/enable", None).await.ok();
    assert_eq!(version(&api, "clock").await, "1.1.0");

    assert_eq!(api.delete("/packages/clock").await.ok().json(), json!({"success": true}));
    assert_eq!(api.get("/packages").await.ok().json()["packages"], json!([]));
    no_trace(&api, "clock", 0).await;
    api.delete("/packages/clock").await.fails(404, "package_not_found");
}

async fn package_of(api: &Deployment) -> Value {
    package(api, "clock").await
}

#[tokio::test]
async fn a_package_of_python_lives_its_life() {
    let registry = Registry::start();
    for version in ["1.0", "1.1"] {
        let files = [("tick_tock/__init__.py", ""), ("tick_tock/__main__.py", &python_server(version))];
        let wheel = Wheel {
            requires: &["tick-dep>=1"],
            scripts: &[("tick-tock", "tick_tock.__main__:main")],
            ..Wheel::default()
        };
        registry.add_wheel("tick-tock", version, &files, wheel);
    }
    registry.add_python("tick-dep", "1.5", &[("tick_dep.py", "")]);
    let api = from(&registry).start().await;
    let body = json!({
        "name": "tick-tock", "version": "1.0", "serverName": "tick", "runtime": "python", "pythonModule": "tick_tock",
        "pythonArgs": ["--quiet"], "pipDependencies": ["tick-dep<2"],
    });
    let answer = install(&api, body).await.ok().json();
    assert_eq!(answer["package"]["version"], "1.0", "{answer}");
    assert_eq!(answer["package"]["venvPath"], "packages/python/tick");
    assert_eq!(answer["server"]["args"], json!(["-u", "-m", "tick_tock", "--quiet"]));
    assert!(
        answer["server"]["command"]
            .as_str()
            .is_some_and(|command| command.ends_with("packages/python/tick/bin/python"))
    );
    assert_eq!(version(&api, "tick").await, "1.0");
    let update = &api.get("/packages/updates?name=tick").await.ok().json()["updates"][0];
    assert_eq!((&update["latestVersion"], &update["updateAvailable"]), (&"1.1".into(), &true.into()));
    api.put("/packages/tick/upgrade", None).await.ok();
    assert_eq!(version(&api, "tick").await, "1.1");
    assert_eq!(package(&api, "tick").await["pipDependencies"], json!(["tick-dep<2"]));
    // A console script by the path that the documentation names, and by its name alone.
    for (server, command) in
        [("by-path", "/app/packages/python/by-path/bin/tick-tock"), ("by-script", "tick-tock")]
    {
        let body = json!({
            "name": "tick-tock", "serverName": server, "runtime": "python", "pythonModule": "tick_tock", "command": command,
        });
        install(&api, body).await.ok();
        assert_eq!(version(&api, server).await, "1.1");
    }
    for server in ["tick", "by-path", "by-script"] {
        api.delete(&format!("/packages/{server}")).await.ok();
        no_trace(&api, server, 1).await;
    }
}

#[tokio::test]
async fn what_cannot_be_installed_says_why_and_leaves_no_trace() {
    let registry = registry();
    let silent = "setInterval(() => {}, 1000)";
    registry.add_npm("noentry", "1.0.0", &[("readme.md", "")], "{}");
    registry.add_npm("gone-entry", "1.0.0", &[("readme.md", "")], r#"{"bin": "missing.js"}"#);
    registry.add_npm(
        "nomcp",
        "1.0.0",
        &[("x.js", "console.error('I am no server'); process.exit(3)")],
        r#"{"bin": "x.js"}"#,
    );
    registry.add_npm("silent", "1.0.0", &[("x.js", silent)], r#"{"bin": "x.js"}"#);
    registry.add_npm(
        "warns",
        "1.0.0",
        &[("x.js", &node_server("1"))],
        r#"{"bin": "x.js", "deprecated": "do not use"}"#,
    );
    registry.add_npm(
        "needs-gone",
        "1.0.0",
        &[("x.js", "")],
        r#"{"bin": "x.js", "dependencies": {"nowhere": "1"}}"#,
    );
    let api = from(&registry).start().await;
    let cases = [
        (json!({"name": "nowhere"}), 404, "package_not_found"),
        (json!({"name": "@acme/clock", "version": "9.9.9"}), 404, "version_not_found"),
        (json!({"name": "@acme/clock", "version": "beta"}), 404, "version_not_found"),
        (json!({"name": "noentry"}), 422, "no_entry_point"),
        (json!({"name": "gone-entry"}), 422, "no_entry_point"),
        (json!({"name": "nomcp"}), 422, "not_an_mcp_server"),
        (json!({"name": "silent", "startupTimeout": 1_500}), 422, "not_an_mcp_server"),
        (json!({"name": "warns", "failOnWarning": true}), 422, "install_warnings"),
        (json!({"name": "needs-gone"}), 502, "install_failed"),
    ];
    for (body, status, code) in cases {
        let mut body = body;
        body["serverName"] = "fails".into();
        let answer = install(&api, body.clone()).await;
        let answer = answer.fails(status, code).json();
        assert!(answer["jobId"].is_string(), "{answer}");
        no_trace(&api, "fails", 0).await;
    }
    let nomcp = install(&api, json!({"name": "nomcp", "serverName": "fails"})).await.text;
    assert!(nomcp.contains("I am no server"), "{nomcp}");
    // A deprecated package is installed unless somebody minds, and so is one that need not be started.
    install(&api, json!({"name": "warns", "serverName": "warned"})).await.ok();
    let body = json!({"name": "nomcp", "serverName": "asleep", "enabled": false});
    assert_eq!(install(&api, body).await.ok().json()["server"]["enabled"], false);
    // Names that are taken.
    install(&api, json!({"name": "@acme/clock", "serverName": "warned"}))
        .await
        .fails(409, "server_already_exists");
}

/// What a job keeps is not encrypted.
#[tokio::test]
async fn secrets_of_a_server_do_not_get_into_its_job() {
    let registry = registry();
    let talks = "console.error('with ' + process.env.API_TOKEN + ' in ' + process.env.MODE); process.exit(3)";
    registry.add_npm("talks", "1.0.0", &[("x.js", talks)], r#"{"bin": "x.js"}"#);
    let api = from(&registry).start().await;
    let body = json!({
        "name": "talks", "serverName": "talks", "env": {"API_TOKEN": "canary-in-a-job", "MODE": "test-mode"},
    });
    let answer = install(&api, body).await.fails(422, "not_an_mcp_server");
    let path = format!("/packages/jobs/{}", answer.json()["jobId"].as_str().unwrap());
    let job = api.get(&path).await.ok();
    for text in [&answer.text, &job.text, &api.log()] {
        assert!(!text.contains("canary-in-a-job"), "{text}");
    }
    assert!(job.text.contains("test-mode"), "{}", job.text);
}

#[tokio::test]
async fn a_registry_that_fails_is_said_so() {
    let registry = registry();
    let api = from(&registry).start().await;
    for fault in [Fault::Down, Fault::Status(503), Fault::Garbage] {
        registry.fault(fault);
        let answer = install(&api, json!({"name": "@acme/clock", "serverName": "clock"})).await;
        let answer = answer.fails(502, "registry_unavailable").json();
        assert_eq!(answer["retryable"], true, "{answer}");
        let job = api.get(&format!("/packages/jobs/{}", answer["jobId"].as_str().unwrap())).await.ok().json();
        assert_eq!((&job["job"]["state"], &job["job"]["attempts"]), (&"failed".into(), &3.into()), "{job}");
        no_trace(&api, "clock", 0).await;
    }
    registry.fault(Fault::Corrupt);
    install(&api, json!({"name": "@acme/clock", "serverName": "clock"}))
        .await
        .fails(502, "integrity_mismatch");
    no_trace(&api, "clock", 0).await;
    registry.fault(Fault::None);
    install(&api, json!({"name": "@acme/clock", "serverName": "clock"})).await.ok();
    // What is installed runs whether or not there is a registry.
    registry.fault(Fault::Down);
    assert_eq!(version(&api, "clock").await, "1.1.0");
    let update = api.get("/packages/updates").await.ok().json()["updates"][0].clone();
    assert_eq!(
        (&update["currentVersion"], &update["updateAvailable"]),
        (&"1.1.0".into(), &false.into()),
        "{update}"
    );
    api.put("/packages/clock/upgrade", None).await.fails(502, "registry_unavailable");
    assert_eq!(version(&api, "clock").await, "1.1.0");
}

#[tokio::test]
async fn an_upgrade_that_fails_changes_nothing() {
    let registry = registry();
    let api = from(&registry).start().await;
    install(&api, json!({"name": "@acme/clock", "serverName": "clock"})).await.ok();
    let (pids, before) = (api.pids("clock").await, package_of(&api).await);
    registry.add_npm("@acme/clock", "2.0.0", &[("cli.js", "process.exit(1)")], r#"{"bin": "cli.js"}"#);
    registry.add_npm("@acme/clock", "3.0.0", &[], "{}");
    for (version, code) in [("2.0.0", "not_an_mcp_server"), ("3.0.0", "no_entry_point")] {
        api.put("/packages/clock/upgrade", Some(&json!({"version": version}))).await.fails(422, code);
    }
    api.put("/packages/clock/upgrade", Some(&json!({"version": "7.0.0"})))
        .await
        .fails(404, "version_not_found");
    assert_eq!(api.pids("clock").await, pids, "the processes went on");
    let after = package_of(&api).await;
    assert_eq!((&after["version"], &after["installed"]), (&before["version"], &before["installed"]));
    assert_eq!(version(&api, "clock").await, "1.1.0");
    eventually("nothing of them is left", async || generations(&api).iter().all(|(_, count)| *count <= 1))
        .await;
}

/// A call that is under way when its server is upgraded is answered by the version that it was given to; and
/// nothing of that is left when the server is removed meanwhile.
#[tokio::test]
async fn calls_in_flight_finish_on_the_old_version() {
    let registry = Registry::start();
    let slow = |version: &str| {
        node_server(version).replace(
            "process.stdout.write(",
            "setTimeout((text) => process.stdout.write(text), method === 'tools/call' ? params.arguments.ms || 0 : 0, ",
        )
    };
    for version in ["1.0.0", "1.1.0", "1.2.0"] {
        registry.add_npm("slow", version, &[("x.js", &slow(version))], r#"{"bin": "x.js"}"#);
    }
    let api = from(&registry).start().await;
    install(&api, json!({"name": "slow", "version": "1.0.0", "serverName": "slow"})).await.ok();
    // Longer than calls have when a server is stopped.
    let (answer, ()) = tokio::join!(api.call("slow", "version", json!({"ms": 12_000})), async {
        let body = json!({"version": "1.1.0"});
        api.put("/packages/slow/upgrade", Some(&body)).await.ok();
        assert_eq!(version(&api, "slow").await, "1.1.0", "new calls do not wait for old ones");
    });
    assert_eq!(answer.tool_text(), "1.0.0");
    let old = api.pids("slow").await;
    let (answer, ()) = tokio::join!(api.call("slow", "version", json!({"ms": 60_000})), async {
        let body = json!({"version": "1.2.0"});
        api.put("/packages/slow/upgrade", Some(&body)).await.ok();
        api.delete("/packages/slow").await.ok();
    });
    assert_ne!(answer.status, 200, "{}", answer.text);
    assert!(old.iter().all(|pid| !alive(*pid)), "a process of a removed server is there");
}

/// The new version cannot be tried beside the old one, so it takes its place, and the old one comes back.
#[tokio::test]
async fn a_singleton_goes_back_to_the_version_that_starts() {
    let registry = registry();
    let api = from(&registry).start().await;
    let body =
        json!({"name": "@acme/clock", "version": "1.0.0", "serverName": "clock", "scaling": "singleton"});
    install(&api, body).await.ok();
    registry.add_npm("@acme/clock", "2.0.0", &[("cli.js", "process.exit(1)")], r#"{"bin": "cli.js"}"#);
    api.put("/packages/clock/upgrade", Some(&json!({"version": "2.0.0"})))
        .await
        .fails(422, "not_an_mcp_server");
    eventually("the old version is back", async || {
        api.call("clock", "version", json!({})).await.status == 200
    })
    .await;
    assert_eq!(
        (version(&api, "clock").await, package_of(&api).await["version"].clone()),
        ("1.0.0".into(), "1.0.0".into())
    );
    api.put("/packages/clock/upgrade", Some(&json!({"version": "1.1.0"}))).await.ok();
    assert_eq!(version(&api, "clock").await, "1.1.0");
}

/// The package of a remote server is there for its version; what runs is elsewhere.
#[tokio::test]
async fn a_package_may_be_of_a_remote_server() {
    let registry = registry();
    let api = from(&registry).start().await;
    let body = json!({
        "name": "@acme/clock", "version": "1.0.0", "serverName": "remote", "transportType": "streamable_http",
        "url": "https://mcp.example.org/mcp", "headers": {"X-Custom": "value"}, "enabled": false,
    });
    let answer = install(&api, body).await.ok().json();
    let expected = ("streamable_http", "https://mcp.example.org/mcp", "1.0.0");
    let seen = |answer: &Value| {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let server = &answer["server"];
        (text(&server["transportType"]), text(&server["url"]), text(&answer["package"]["version"]))
    };
    let (transport, url, version) = seen(&answer);
    assert_eq!((transport.as_str(), url.as_str(), version.as_str()), expected, "{answer}");
    let upgraded = api.put("/packages/remote/upgrade", None).await.ok().json();
    let (transport, url, version) = seen(&upgraded);
    assert_eq!(
        (transport.as_str(), url.as_str(), version.as_str()),
        (expected.0, expected.1, "1.1.0"),
        "{upgraded}"
    );
    assert_eq!(upgraded["server"]["headers"], json!({"X-Custom": "value"}), "{upgraded}");
}

#[tokio::test]
async fn servers_of_one_package_have_their_own_versions() {
    let registry = registry();
    let api = from(&registry).start().await;
    let (old, new) = (
        json!({"name": "@acme/clock", "version": "~1.0", "serverName": "old"}),
        json!({"name": "@acme/clock", "serverName": "new"}),
    );
    let (old, new) = tokio::join!(install(&api, old), install(&api, new));
    assert_eq!(old.ok().json()["package"]["version"], "1.0.0");
    assert_eq!(new.ok().json()["package"]["version"], "1.1.0");
    assert_eq!((version(&api, "old").await, version(&api, "new").await), ("1.0.0".into(), "1.1.0".into()));
    api.delete("/mcp/servers/new").await.ok();
    no_trace(&api, "new", 1).await;
    assert_eq!(version(&api, "old").await, "1.0.0");
}

#[tokio::test]
async fn a_job_can_be_followed() {
    let registry = registry();
    let api = from(&registry).start().await;
    registry.fault(Fault::Hang);
    let body = json!({"name": "@acme/clock", "serverName": "clock"});
    let request = api.request(reqwest::Method::POST, "/packages/install").header("Prefer", "respond-async");
    let accepted = api.send(request.json(&body)).await;
    assert_eq!(accepted.status, 202, "{}", accepted.text);
    let path = accepted.headers["location"].to_str().unwrap().to_owned();
    let id = accepted.json()["jobId"].as_str().unwrap().to_owned();
    assert_eq!(path, format!("/packages/jobs/{id}"));
    eventually("a worker is at it", async || api.get(&path).await.ok().json()["job"]["state"] == "running")
        .await;
    // One at a time, whoever asks for what.
    let other = install(&api, json!({"name": "other", "serverName": "clock"}))
        .await
        .fails(409, "install_in_progress");
    assert_eq!(other.json()["jobId"], id.as_str());
    api.delete("/packages/clock").await.fails(409, "install_in_progress");
    registry.fault(Fault::None);
    let events =
        api.send(api.request(reqwest::Method::GET, &path).header("Accept", "text/event-stream")).await;
    assert_eq!(events.headers["content-type"], "text/event-stream");
    let names: Vec<_> = events.text.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert_eq!((names.last(), names.contains(&"log")), (Some(&"done"), true), "{}", events.text);
    let job = api.get(&path).await.ok().json()["job"].clone();
    assert_eq!((&job["state"], &job["version"]), (&"done".into(), &"1.1.0".into()), "{job}");
    assert_eq!(version(&api, "clock").await, "1.1.0");
    api.get("/packages/jobs/clock~000000000000").await.fails(404, "job_not_found");
    api.get("/packages/jobs/nonsense").await.fails(404, "job_not_found");
}

#[tokio::test]
async fn an_upgrade_fails_no_call() {
    let registry = registry();
    let api = from(&registry).start().await;
    install(&api, json!({"name": "@acme/clock", "serverName": "clock"})).await.ok();
    let over = tokio_util::sync::CancellationToken::new();
    // Fifty calls a second, whether or not the earlier ones are answered.
    let calls = async {
        let mut calls = Vec::new();
        let mut ticks = tokio::time::interval(Duration::from_millis(20));
        while !over.is_cancelled() {
            ticks.tick().await;
            calls.push(api.call("clock", "version", json!({})));
            if calls.len() == 50 {
                futures_util::future::join_all(calls.drain(..)).await.into_iter().for_each(|answer| {
                    answer.tool_text();
                });
            }
        }
        futures_util::future::join_all(calls).await
    };
    let upgrades = async {
        for version in ["1.2.0", "1.3.0", "1.4.0"] {
            add_version(&registry, version);
            let body = json!({"version": version});
            assert_eq!(
                api.put("/packages/clock/upgrade", Some(&body)).await.ok().json()["package"]["version"],
                version
            );
            assert_eq!(self::version(&api, "clock").await, version, "a call after the answer");
        }
        over.cancel();
    };
    let (last, ()) = tokio::join!(calls, upgrades);
    for answer in last {
        answer.tool_text();
    }
}

#[tokio::test]
async fn packages_outlive_the_programs() {
    let registry = registry();
    let api = from(&registry).start().await;
    install(&api, json!({"name": "@acme/clock", "version": "1.0.0", "serverName": "clock"})).await.ok();
    let data = api.data();
    assert!(api.stop().await.success());
    registry.fault(Fault::Down);
    let api = from(&registry).data(&data).start().await;
    let listed = api.get("/packages").await.ok().json()["packages"].clone();
    assert_eq!(
        (&listed[0]["version"], &listed[0]["mcpServerId"]),
        (&"1.0.0".into(), &"clock".into()),
        "{listed}"
    );
    // In a cluster the server may fall to a worker that has to install it first.
    registry.fault(Fault::None);
    assert_eq!(version(&api, "clock").await, "1.0.0");
    let links = generations(&api)
        .into_iter()
        .map(|(folder, _)| folder.join("acme-clock/node_modules/@acme/clock/cli.js"));
    assert!(links.into_iter().any(|path| Path::new(&path).exists()), "the documented path leads there");
}

#[tokio::test]
async fn packages_are_installed_on_the_first_start_only() {
    let registry = registry();
    let builder = || from(&registry).env("INSTALL_ON_START", "@acme/clock|clock,@acme/missing|missing");
    let api = builder().start().await;
    eventually("the one comes up by itself", async || {
        api.call("clock", "version", json!({})).await.status == 200
    })
    .await;
    eventually("the other is reported as failed", async || {
        let jobs = api.get("/packages/jobs").await.ok().json()["jobs"].clone();
        jobs.as_array().unwrap().iter().any(|job| {
            job["serverName"] == "missing"
                && job["state"] == "failed"
                && job["error"]["code"] == "package_not_found"
        })
    })
    .await;
    api.get("/mcp/servers/missing").await.fails(404, "server_not_found");
    api.delete("/packages/clock").await.ok();
    let data = api.data();
    assert!(api.stop().await.success());
    let asked = registry.requests().len();
    let api = builder().data(&data).start().await;
    api.get("/readyz").await.ok();
    install(&api, json!({"name": "@acme/clock", "serverName": "other"})).await.ok();
    assert!(registry.requests().len() > asked);
    api.get("/mcp/servers/clock").await.fails(404, "server_not_found");
    let names: Vec<_> =
        registry.requests()[asked..].iter().filter(|path| path.contains("missing")).cloned().collect();
    assert_eq!(names, Vec::<String>::new());
}
