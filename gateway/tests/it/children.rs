//! What may be started as a server, and what a server sees of us.

use serde_json::{Value, json};

use crate::deployment::{Deployment, eventually, fixture};

/// A server that only reads; it is never started where it is refused.
fn body(change: Value) -> Value {
    let mut body = json!({"name": "refused", "command": "node"});
    body.as_object_mut().unwrap().extend(change.as_object().cloned().unwrap());
    body
}

#[tokio::test]
async fn shells_and_variables_that_are_code_are_refused() {
    let api = Deployment::start().await;
    let link = api.data().path().join("server");
    std::os::unix::fs::symlink("/bin/sh", &link).unwrap();
    let commands =
        ["sh", "bash", "/bin/sh", "/bin/sh -c x", "env", "/usr/bin/env", "busybox", "sudo", "pwsh"];
    for command in commands.into_iter().chain(link.to_str()) {
        let answer = api.post("/mcp/servers", &body(json!({"command": command}))).await;
        answer.fails(400, "command_not_allowed");
        let install = json!({"name": "some-package", "serverName": "refused", "command": command});
        api.post("/packages/install", &install).await.fails(400, "command_not_allowed");
    }
    for name in ["LD_PRELOAD", "LD_LIBRARY_PATH", "NODE_OPTIONS", "BASH_ENV", "PERL5OPT", "PYTHONSTARTUP"] {
        let answer = api.post("/mcp/servers", &body(json!({"env": {name: "x"}}))).await;
        answer.fails(400, "env_not_allowed");
        let install = json!({"name": "some-package", "serverName": "refused", "env": {name: "x"}});
        api.post("/packages/install", &install).await.fails(400, "env_not_allowed");
    }
    for name in ["NODE_OPTIONS", "PATH", "HOME", "PYTHONPATH"] {
        let own = json!({"isolation": "per_user", "secretEnv": {name: "SECRET"}});
        api.post("/mcp/servers", &body(own)).await.fails(400, "env_not_allowed");
    }
    api.get("/mcp/servers/refused").await.fails(404, "server_not_found");
    assert_eq!(api.get("/packages/jobs").await.ok().json()["jobs"], json!([]));

    // A server that is there does not become one either.
    api.add_fixture("one", &[], json!({})).await;
    let change = async |change: Value| api.put("/mcp/servers/one", Some(&change)).await;
    change(json!({"command": "sh"})).await.fails(400, "command_not_allowed");
    change(json!({"env": {"LD_PRELOAD": "x"}})).await.fails(400, "env_not_allowed");
    assert_eq!(api.call("one", "echo", json!({"text": "as before"})).await.tool_text(), "as before");
}

#[tokio::test]
async fn settings_permit_more_or_less() {
    let program = std::env::current_exe().unwrap();
    let program = program.to_str().unwrap();
    let api = Deployment::builder()
        .env("COMMANDS_ALLOW", format!("{program}, sh"))
        .env("ENV_ALLOW", "NODE_OPTIONS")
        .start()
        .await;
    api.add_fixture("one", &["--more"], json!({"env": {"NODE_OPTIONS": "--no-warnings"}})).await;
    let value = api.call("one", "env", json!({"name": "NODE_OPTIONS"})).await.tool_text();
    assert_eq!(value, "--no-warnings");
    let shell = json!({"command": "sh", "args": ["-c", "exit 3"]});
    let answer = api.post("/mcp/servers", &body(shell)).await.ok().json();
    assert_eq!(answer["server"]["status"], "error");
    for command in ["node", "python3", "/bin/sh", "bash"] {
        let answer = api.post("/mcp/servers", &body(json!({"command": command}))).await;
        answer.fails(400, "command_not_allowed");
    }
    let answer = api.post("/mcp/servers", &body(json!({"command": program, "env": {"PATH": "/tmp"}}))).await;
    answer.fails(400, "env_not_allowed");
}

/// Records that are stored already go on; only what is changed is judged.
#[tokio::test]
async fn what_was_registered_before_the_rules_goes_on() {
    let api = Deployment::builder().env("COMMANDS_ALLOW", "*,sh").env("ENV_ALLOW", "LD_DEBUG").start().await;
    let mut body = fixture("old", &[]);
    let mut arguments = vec![json!("-c"), json!(r#"exec "$0" "$@""#), body["command"].clone()];
    arguments.extend(body["args"].as_array().unwrap().iter().cloned());
    body["command"] = json!("sh");
    body["args"] = json!(arguments);
    body["env"] = json!({"LD_DEBUG": ""});
    assert_eq!(api.post("/mcp/servers", &body).await.ok().json()["server"]["status"], "connected");
    let data = api.data();
    assert!(api.stop().await.success());

    let api = Deployment::builder().data(&data).start().await;
    assert_eq!(api.call("old", "echo", json!({"text": "still"})).await.tool_text(), "still");
    api.logged("could not be registered today").await;
    api.put("/mcp/servers/old", Some(&json!({"description": "new", "toolTimeout": 5_000}))).await.ok();
    api.put("/mcp/servers/old/disable", None).await.ok();
    api.put("/mcp/servers/old/enable", None).await.ok();
    let change = json!({"env": {"LD_DEBUG": "", "A": "b"}});
    api.put("/mcp/servers/old", Some(&change)).await.fails(400, "env_not_allowed");
}

/// What a server finds out about us. Root may look into every process, so there it only must not find a secret.
#[tokio::test]
async fn a_server_sees_nothing_of_ours() {
    let key = "9f1c64d0a7b35e28c1d94f7702be6a835d0e91f4c8a2376bb45ce1d90f38a762";
    let password = "index-password-7d31";
    let api = Deployment::builder()
        .env("SECRETS_KEY", key)
        .env("PIP_EXTRA_INDEX_URL", format!("https://u:{password}@example.org/simple"))
        .start()
        .await;
    api.add_fixture("one", &[], json!({})).await;
    api.add_fixture("spy", &["--more"], json!({})).await;
    let mut pids = api.programs();
    pids.extend(crate::processes::supervisors(&api));
    let report = api.call("spy", "spy", json!({"pids": pids})).await.tool_text();
    assert!(!report.contains(key) && !report.contains(password), "{report}");
    let report: Value = serde_json::from_str(&report).unwrap();
    // Its three streams, however often it has them open itself, and the folder that it is just reading.
    let open = report["descriptors"].as_array().unwrap().iter().filter_map(Value::as_str);
    let open: Vec<_> = open.filter_map(|one| one.split_once(' ')).collect();
    let streams: Vec<_> = open.iter().filter(|(number, _)| ["0", "1", "2"].contains(number)).collect();
    let foreign: Vec<_> = open
        .iter()
        .filter(|(_, what)| !what.starts_with("/proc/") && !streams.iter().any(|(_, stream)| stream == what))
        .collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    let limits = report["limits"].as_str().unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_ascii_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    if !nix::unistd::geteuid().is_root() {
        for (pid, seen) in report["others"].as_object().unwrap() {
            for what in ["environ", "maps", "auxv", "syscall", "fd", "mem"] {
                assert_eq!(seen[what], Value::Null, "{what} of {pid}");
            }
        }
    }
}

#[tokio::test]
async fn a_server_that_takes_too_much_is_ended() {
    let api = Deployment::builder()
        .workers(1)
        .env("SERVER_MAX_PROCESSES", "20")
        .env("SERVER_MAX_MEMORY", "256mb")
        .start()
        .await;
    api.add_fixture("bystander", &[], json!({})).await;
    api.add_fixture("many", &["--more"], json!({})).await;
    let pid = api.pids("many").await[0];
    let bystander = api.pids("bystander").await;
    for n in 0..25 {
        // It may be over before the last of them.
        let answer = api.call("many", "grandchild", json!({"escape": n % 2 == 0})).await;
        assert!(answer.status == 200 || answer.status == 502, "{}", answer.text);
    }
    eventually("it is ended", async || !crate::deployment::alive(pid)).await;
    eventually("it says why", async || {
        let server = api.server("many").await;
        server["logs"].to_string().contains("SERVER_MAX_PROCESSES")
    })
    .await;
    assert_eq!(api.pids("bystander").await, bystander);
    assert_eq!(api.call("bystander", "echo", json!({"text": "here"})).await.tool_text(), "here");
}
