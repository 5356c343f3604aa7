//! The program as an ordinary user, which is how it should run: there even its own servers cannot look at it. (Tests
//! often run as root, whom nothing can be hidden from.)

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Gid, Pid, Uid, chown, geteuid},
};
use serde_json::{Value, json};

use crate::{
    FIXTURE,
    deployment::{Data, Deployment},
};

/// Nobody, who may do nothing.
const NOBODY: u32 = 65_534;

/// A program that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Puts a program where that user reaches it.
fn place(program: &Path, at: &Path) {
    if fs::hard_link(program, at).is_err() {
        fs::copy(program, at).unwrap();
    }
    assert!(fs::metadata(at).unwrap().permissions().mode() & 0o005 == 0o005, "others may run it");
    // The test's own folder becomes that user's.
    for folder in at.ancestors().skip(2) {
        let mode = fs::metadata(folder).unwrap().permissions().mode();
        assert!(
            mode & 0o001 == 0o001,
            "this test needs a TMPDIR that other users can come through, and {folder:?} is not"
        );
    }
}

async fn post(base: &str, path: &str, body: &Value) -> Value {
    let client = reqwest::Client::new();
    let answer = client.post(format!("{base}{path}")).json(body).send().await.unwrap();
    serde_json::from_str(&answer.text().await.unwrap()).unwrap()
}

#[tokio::test]
async fn a_server_cannot_look_at_us() {
    let data = Data::new();
    let (program, fixture) = (data.path().join("gateway"), data.path().join("fixture"));
    place(Path::new(env!("CARGO_BIN_EXE_mcp-gateway")), &program);
    place(&std::env::current_exe().unwrap(), &fixture);
    let settings =
        Deployment::builder().data(&data).env("SECRETS_KEY", "7d".repeat(16) + &"a3f15b".repeat(5)).command();
    let mut command = Command::new(&program);
    command.env_clear().current_dir(data.path()).stdin(Stdio::null()).stdout(Stdio::piped());
    command.envs(settings.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if geteuid().is_root() {
        chown(data.path(), Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY))).unwrap();
        command.uid(NOBODY).gid(NOBODY);
    }
    let mut running = Running(command.spawn().unwrap());
    let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    let first = tokio::task::spawn_blocking(move || lines.next()).await.unwrap().unwrap().unwrap();
    let base = first.split_whitespace().last().unwrap().to_owned();
    assert!(base.starts_with("http://"), "{first}");

    let body = json!({"name": "spy", "command": fixture, "args": [FIXTURE, "--more"]});
    let server = post(&base, "/mcp/servers", &body).await;
    assert_eq!(server["server"]["status"], "connected", "{server}");
    let call = async |tool: &str, args: Value| -> Value {
        let body = json!({"serverName": "spy", "methodName": tool, "args": args});
        let answer = post(&base, "/mcp/tool/call", &body).await;
        serde_json::from_str(answer["data"]["content"][0]["text"].as_str().unwrap()).unwrap()
    };
    let supervisor = call("pid", json!({})).await["ppid"].as_u64().unwrap();
    let gateway = u64::from(running.0.id());
    let report = call("spy", json!({"pids": [gateway, supervisor, std::process::id()]})).await;
    for pid in [gateway, supervisor] {
        let seen = &report["others"][pid.to_string()];
        for what in ["environ", "maps", "auxv", "syscall", "fd", "mem"] {
            assert_eq!(seen[what], Value::Null, "{what} of {pid}: {report}");
        }
    }
    kill(Pid::from_raw(i32::try_from(running.0.id()).unwrap()), Signal::SIGTERM).unwrap();
    let ended = tokio::task::spawn_blocking(move || running.0.wait().unwrap()).await.unwrap();
    assert!(ended.success());
}
