//! What becomes of processes: how a server's is started, what it knows, and that nothing of it is left
//! when it should be gone, however that came about.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    deployment::{Deployment, alive, eventually, fixture},
    footprint::parent_of,
};

/// How long a process may outlive a gateway that was killed.
const AFTER_KILL: Duration = Duration::from_secs(5);

/// A field of `/proc/PID/status`.
fn status(pid: i32, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {text}")).trim().to_owned()
}

fn parent(pid: i32) -> i32 {
    status(pid, "PPid").parse().unwrap()
}

/// The entries of a file such as `/proc/PID/environ`.
fn entries(pid: i32, file: &str) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    text.split_terminator('\0').map(str::to_owned).collect()
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

async fn all_gone(what: &str, pids: &[i32]) {
    eventually(&format!("{what}: {pids:?} are gone"), async || !pids.iter().any(|pid| alive(*pid))).await;
}

/// A number that a tool answers with.
async fn pid_from(api: &Deployment, server: &str, tool: &str, args: Value) -> i32 {
    let text = api.call(server, tool, args).await.tool_text();
    match serde_json::from_str::<Value>(&text).unwrap() {
        Value::Number(pid) => i32::try_from(pid.as_i64().unwrap()).unwrap(),
        ids => i32::try_from(ids["pid"].as_i64().unwrap()).unwrap(),
    }
}

/// The names of [`family`]'s servers.
const FAMILY: [&str; 3] = ["plain", "wrapped", "stubborn"];

/// Servers that leave as politely and as badly as servers do, each with processes of its own: one in its
/// group and one in another session. Returns the ids of all of these processes.
async fn family(api: &Deployment) -> Vec<i32> {
    let flags: [&[&str]; 3] =
        [&["--more"], &["--more", "--wrapper", "--linger"], &["--more", "--ignore-stop"]];
    let mut pids = BTreeSet::new();
    for (name, flags) in FAMILY.into_iter().zip(flags) {
        api.add_fixture(name, flags, json!({})).await;
        pids.extend(api.pids(name).await);
        pids.insert(pid_from(api, name, "pid", json!({})).await);
        for escape in [false, true] {
            pids.insert(pid_from(api, name, "grandchild", json!({"escape": escape})).await);
        }
    }
    // Three servers, the wrapper's own child, and two further processes of each server.
    assert_eq!(pids.len(), 3 + 1 + 6);
    assert!(pids.iter().all(|pid| alive(*pid)));
    pids.into_iter().collect()
}

#[tokio::test]
async fn every_server_leads_a_process_group_of_its_own() {
    let api = Deployment::start().await;
    let mut supervisors = BTreeSet::new();
    for name in ["one", "two"] {
        api.add_fixture(name, &["--more"], json!({})).await;
        let ids: Value = serde_json::from_str(&api.call(name, "pid", json!({})).await.tool_text()).unwrap();
        assert_eq!(ids["pid"], ids["pgid"], "{ids}");
        assert_eq!(ids["pid"], api.pids(name).await[0]);
        let pid = api.pids(name).await[0];
        supervisors.insert(parent(pid));
        // A blocked or ignored signal is inherited, and few programs expect that: a launcher that never
        // hears SIGCHLD does not notice the end of what it launched.
        for field in ["SigBlk", "SigIgn"] {
            let signals = u64::from_str_radix(&status(pid, field), 16).unwrap();
            // Those above 31 belong to the C library.
            assert_eq!(signals & 0x7fff_ffff, 0, "{field}: {signals:x}");
        }
    }
    // All servers of one worker have the same supervisor.
    let owners: BTreeSet<_> = supervisors.iter().map(|supervisor| parent(*supervisor)).collect();
    assert_eq!(supervisors.len(), owners.len());
    assert!(owners.iter().all(|owner| api.owners().contains(owner)), "{owners:?}");
}

#[tokio::test]
async fn a_server_gets_only_what_it_needs_of_our_environment() {
    let key = "9f1c64d0a7b35e28c1d94f7702be6a835d0e91f4c8a2376bb45ce1d90f38a762";
    let api = Deployment::builder()
        .env("SECRETS_KEY", key)
        .env("PIP_EXTRA_INDEX_URL", "https://u:index-password@example.org/simple")
        .env("DATABASE_PASSWORD", "database-password")
        .env("AWS_SECRET_ACCESS_KEY", "cloud-password")
        .env("LD_LIBRARY_PATH", "/nonexistent")
        .env("NODE_OPTIONS", "--no-warnings")
        .env("LANG", "C.UTF-8")
        .env("TZ", "UTC")
        .start()
        .await;
    let own = json!({"env": {"OWN": "a $HOME; \"b\"", "TZ": "Europe/Vienna"}});
    api.add_fixture("env", &["--more"], own).await;
    let told = api.call("env", "env", json!({})).await.tool_text();
    let told: BTreeMap<String, String> = serde_json::from_str(&told).unwrap();
    let names: Vec<_> = told.keys().map(String::as_str).collect();
    assert_eq!(names, ["HOME", "LANG", "MCP_API_INSTANCE", "OWN", "PATH", "TZ"]);
    assert_eq!(told["OWN"], "a $HOME; \"b\"");
    assert_eq!(told["TZ"], "Europe/Vienna", "the record wins");

    // What one process of this user can read about another must not hold the key.
    let server = api.pids("env").await[0];
    let supervisor = parent(server);
    for pid in [server, supervisor] {
        for text in entries(pid, "environ").iter().chain(&entries(pid, "cmdline")) {
            assert!(!text.contains(key) && !text.contains("password"), "{pid} has {text}");
        }
    }
    assert_eq!(entries(supervisor, "environ"), [""; 0]);
    for owner in api.owners() {
        assert!(!entries(owner, "cmdline").iter().any(|text| text.contains(key)));
    }
}

#[tokio::test]
async fn no_shell_reads_the_command_line() {
    let api = Deployment::start().await;
    let data = api.data();
    let odd = data.path().join("a b;touch injected;$(touch injected) `touch injected` && 'c' \"d\" * | e");
    let odd = odd.to_str().unwrap();
    api.add_fixture("odd", &["--start-file", odd], json!({})).await;
    let pid = api.pids("odd").await[0];
    assert_eq!(entries(pid, "cmdline").last().unwrap(), odd);
    assert_eq!(std::fs::read_to_string(odd).unwrap().trim(), pid.to_string());

    let body = json!({"name": "command", "command": "touch injected; true", "args": ["$(touch injected)"]});
    let server = api.post("/mcp/servers", &body).await.ok().json()["server"].clone();
    assert_eq!(server["status"], "error");
    assert!(server["logs"].to_string().contains("no such program"), "{server}");
    assert!(!data.path().join("injected").exists());
}

#[tokio::test]
async fn a_polite_server_leaves_by_itself() {
    let api = Deployment::builder().env("COMMANDS_ALLOW", "*,sh").start().await;
    let note = api.data().path().join("note");
    // The shell waits for the server and writes only if no signal ends it.
    let mut body = fixture("polite", &[]);
    let mut arguments = vec![json!("-c"), json!(r#""$0" "$@"; echo "left with $?" >>"$NOTE""#)];
    arguments.push(body["command"].clone());
    arguments.extend(body["args"].as_array().unwrap().iter().cloned());
    body["command"] = json!("sh");
    body["args"] = json!(arguments);
    body["env"] = json!({"NOTE": note});
    let server = api.post("/mcp/servers", &body).await.ok().json()["server"].clone();
    assert_eq!(server["status"], "connected", "{server}");
    let pid = api.pids("polite").await[0];
    api.put("/mcp/servers/polite/disable", None).await.ok();
    assert!(!alive(pid));
    assert_eq!(std::fs::read_to_string(&note).unwrap(), "left with 0\n");

    api.put("/mcp/servers/polite/enable", None).await.ok();
    let pid = api.pids("polite").await[0];
    api.delete("/mcp/servers/polite").await.ok();
    assert!(!alive(pid));
    assert_eq!(std::fs::read_to_string(&note).unwrap(), "left with 0\n".repeat(2));
}

#[tokio::test]
async fn a_server_that_does_not_leave_is_ended() {
    let api = Deployment::start().await;
    api.add_fixture("lingering", &["--linger"], json!({})).await;
    api.add_fixture("stubborn", &["--ignore-stop"], json!({})).await;
    let pids = [api.pids("lingering").await[0], api.pids("stubborn").await[0]];
    // It holds no slot of a call, but it holds up whoever waits for its end.
    let (deleted, disabled) =
        tokio::join!(api.delete("/mcp/servers/lingering"), api.put("/mcp/servers/stubborn/disable", None));
    deleted.ok();
    disabled.ok();
    assert_eq!(pids.map(alive), [false; 2]);
    assert_eq!(api.server("stubborn").await["status"], "disconnected");
}

#[tokio::test]
async fn a_disabled_server_leaves_no_process_behind() {
    let api = Deployment::start().await;
    let pids = family(&api).await;
    let disable = FAMILY.map(|name| format!("/mcp/servers/{name}/disable"));
    futures_util::future::join_all(disable.iter().map(|path| async { api.put(path, None).await.ok() })).await;
    all_gone("after disable", &pids).await;
}

#[tokio::test]
async fn sigterm_leaves_no_process_behind() {
    let api = Deployment::start().await;
    let pids = family(&api).await;
    let supervisor = parent(api.pids("plain").await[0]);
    assert!(api.stop().await.success());
    all_gone("after SIGTERM", &pids).await;
    all_gone("after SIGTERM", &[supervisor]).await;
}

#[tokio::test]
async fn sigkill_leaves_no_process_behind() {
    let api = Deployment::start().await;
    let mut pids = family(&api).await;
    pids.push(parent(api.pids("plain").await[0]));
    let start = Instant::now();
    api.kill().await;
    all_gone("after SIGKILL", &pids).await;
    assert!(start.elapsed() < AFTER_KILL, "it took {:?}", start.elapsed());
}

/// A server that leaves by itself when its gateway dies is an exit like any other to the supervisor,
/// only that nobody is left to be told.
#[tokio::test]
async fn exits_at_the_same_time_keep_nobody_from_cleaning_up() {
    let api = Deployment::start().await;
    api.add_fixture("polite", &[], json!({})).await;
    api.add_fixture("lingering", &["--more", "--linger"], json!({})).await;
    let server = api.pids("polite").await[0];
    let escaped = pid_from(&api, "lingering", "grandchild", json!({"escape": true})).await;
    let supervisor = parent(server);
    // Held back, the supervisor finds both at once: the end of its child and that of the gateway.
    send(supervisor, Signal::SIGSTOP);
    api.kill().await;
    all_gone("by themselves", &[server]).await;
    send(supervisor, Signal::SIGCONT);
    all_gone("after SIGKILL", &[escaped, supervisor]).await;
}

/// The supervisors: one for each program that owns servers.
pub fn supervisors(api: &Deployment) -> Vec<i32> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let name = entry.unwrap().file_name();
        name.to_str()?.parse::<i32>().ok()
    });
    let owners = api.owners();
    processes.filter(|pid| alive(*pid) && owners.contains(&parent_of(*pid))).collect()
}

/// Direct children die with the supervisor; what they started elsewhere is found by its mark.
#[tokio::test]
async fn a_lost_supervisor_leaves_no_process_behind() {
    let api = Deployment::start().await;
    let pids = family(&api).await;
    for supervisor in supervisors(&api) {
        send(supervisor, Signal::SIGKILL);
    }
    all_gone("without their supervisor", &pids).await;
}

#[tokio::test]
async fn a_lost_supervisor_is_replaced() {
    let api = Deployment::start().await;
    api.add_fixture("one", &["--linger"], json!({})).await;
    api.add_fixture("two", &["--ignore-stop"], json!({})).await;
    let pids = [api.pids("one").await[0], api.pids("two").await[0]];
    let lost = supervisors(&api);
    // Until the server has seen the call it may still be given to another process.
    let started = api.data().path().join("started");
    let in_flight = api.call("one", "sleep", json!({"ms": 20_000, "started": started}));
    let (answer, ()) = tokio::join!(in_flight, async {
        eventually("the call is in flight", async || started.exists()).await;
        for supervisor in &lost {
            send(*supervisor, Signal::SIGKILL);
        }
    });
    assert_eq!(answer.fails(502, "server_crashed").json()["outcome"], "unknown");
    all_gone("without their supervisor", &pids).await;
    for name in ["one", "two"] {
        eventually("a call works again", async || {
            let answer = api.call(name, "echo", json!({"text": "again"})).await;
            answer.status == 200 && answer.tool_text() == "again"
        })
        .await;
    }
    let replaced = parent(api.pids("one").await[0]);
    assert!(!lost.contains(&replaced));
    assert!(api.owners().contains(&parent(replaced)));
}

/// Service managers and terminals send their signals to more processes than the one that they started.
#[tokio::test]
async fn the_supervisor_stays_as_long_as_the_gateway() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let pid = api.pids("echo").await[0];
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        send(parent(pid), signal);
    }
    assert_eq!(api.call("echo", "echo", json!({"text": "still here"})).await.tool_text(), "still here");
    assert_eq!(api.pids("echo").await, [pid]);
    assert!(api.stop().await.success());
    all_gone("after the end", &[pid]).await;
}

async fn in_flight_of(api: &Deployment, server: &str) -> u64 {
    api.server(server).await["instances"][0]["inFlight"].as_u64().unwrap_or_default()
}

/// The processes that wrote their ids to a `--start-file`.
fn started(path: &Path) -> Vec<i32> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_no_process_behind() {
    let api = Deployment::start().await;
    let data = api.data();
    let file = |name: &str| data.path().join(name);
    let (late, slow) = (file("late"), file("slow"));
    // One that failed to start in time and does not want to leave, and one that is still starting.
    let stubborn = ["--ignore-stop", "--never-initialize", "--start-file", late.to_str().unwrap()];
    let starting = ["--ignore-stop", "--never-initialize", "--start-file", slow.to_str().unwrap()];
    let (first, (), ()) = tokio::join!(
        api.register_fixture("late", &stubborn, json!({"startupTimeout": 300})),
        async {
            let _ = api.register_fixture("slow", &starting, json!({})).await;
        },
        async {
            eventually("it is starting", async || !started(&slow).is_empty()).await;
            api.put("/mcp/servers/slow/disable", None).await.ok();
            let pids = started(&slow);
            assert!(!pids.iter().any(|pid| alive(*pid)), "{pids:?} outlived the answer");
        },
    );
    assert_eq!(first.ok().json()["server"]["status"], "error");
    api.put("/mcp/servers/late/disable", None).await.ok();
    let pids = started(&late);
    assert!(!pids.is_empty());
    assert!(!pids.iter().any(|pid| alive(*pid)), "{pids:?} outlived the answer");
}

#[tokio::test]
async fn calls_in_flight_finish_before_the_end() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut api = Deployment::start().await;
        api.add_fixture("echo", &[], json!({})).await;
        let pid = api.pids("echo").await[0];
        let (answer, ()) = tokio::join!(api.call("echo", "sleep", json!({"ms": 1_000})), async {
            eventually("the call is in flight", async || in_flight_of(&api, "echo").await == 1).await;
            api.signal(signal);
        });
        assert_eq!(answer.tool_text(), "slept 1000");
        assert!(api.wait().await.success(), "{signal}");
        assert!(!alive(pid));
    }
}

#[tokio::test]
async fn a_call_that_does_not_finish_cannot_stop_the_end() {
    let mut api = Deployment::builder().env("SHUTDOWN_TIMEOUT_SECONDS", "1").start().await;
    api.add_fixture("hang", &["--more"], json!({})).await;
    let pid = api.pids("hang").await[0];
    let (answer, ()) = tokio::join!(api.call("hang", "hang", json!({})), async {
        eventually("the call is in flight", async || in_flight_of(&api, "hang").await == 1).await;
        api.signal(Signal::SIGTERM);
    });
    assert_eq!(answer.fails(502, "server_stopped").json()["outcome"], "unknown");
    assert!(api.wait().await.success());
    assert!(!alive(pid));
}
