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
    deployment::{Builder, Data, Deployment},
    doctor::doctor,
    webtools::{OPEN, has_browser, site::Site},
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

/// The command that starts a program with these settings as that user, whose folder becomes that of the data.
fn as_nobody(program: &Path, data: &Data, builder: Builder) -> Command {
    let settings = builder.data(data).command();
    let mut command = Command::new(program);
    command.env_clear().current_dir(data.path()).stdin(Stdio::null());
    command.envs(settings.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if geteuid().is_root() {
        chown(data.path(), Some(Uid::from_raw(NOBODY)), Some(Gid::from_raw(NOBODY))).unwrap();
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

/// Starts it, and waits until it says where it listens.
async fn start(mut command: Command) -> (Running, String) {
    let mut running = Running(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    let first = tokio::task::spawn_blocking(move || lines.next()).await.unwrap().unwrap().unwrap();
    let base = first.split_whitespace().last().unwrap().to_owned();
    assert!(base.starts_with("http://"), "{first}");
    (running, base)
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
    let builder = Deployment::builder().env("SECRETS_KEY", "7d".repeat(16) + &"a3f15b".repeat(5));
    let (mut running, base) = start(as_nobody(&program, &data, builder)).await;

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

/// Whether the browser has its sandbox for an ordinary user depends on the machine: `doctor` knows, and pages show it.
#[tokio::test]
async fn what_is_said_of_the_browser_is_what_becomes_of_pages() {
    if !has_browser("ordinary_user::what_is_said_of_the_browser_is_what_becomes_of_pages") {
        return;
    }
    let (data, site) = (Data::new(), Site::on(OPEN).await);
    let program = data.path().join("gateway");
    place(Path::new(env!("CARGO_BIN_EXE_mcp-gateway")), &program);
    let command = || as_nobody(&program, &data, Deployment::builder().env("EGRESS_ALLOW", OPEN));
    let said = doctor(command()).await;
    let findings = said.report["findings"].as_array().unwrap();
    let finding = findings.iter().find(|finding| finding["what"] == "chromium").unwrap();
    let (_running, base) = start(command()).await;
    let args = json!({"url": site.url("/article")});
    let body = json!({"serverName": "webtools", "methodName": "get_url_content", "args": args});
    let answer = post(&base, "/mcp/tool/call", &body).await;
    let text = finding["text"].as_str().unwrap();
    if answer["data"]["_meta"]["mcp-api/rendered"] == true {
        assert_eq!(finding["level"], "ok", "{finding}");
        assert!(text.ends_with("in its sandbox"), "{text}");
    } else {
        assert_eq!(finding["level"], "warning", "{finding}: {answer}");
        assert!(text.contains("cannot make its sandbox"), "{text}: {answer}");
        assert!(finding["remedy"].as_str().unwrap().contains("compose/chromium.yaml"), "{finding}");
    }
}
