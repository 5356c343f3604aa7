//! A disk that is full, and a data file that is damaged: what is refused, what goes on, and that nothing is lost.

#![allow(clippy::print_stderr, reason = "a test that cannot be run has to say so")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    deployment::{Data, Deployment, eventually},
    packages,
};

/// Bytes of a page of the data file.
const PAGE: usize = 4_096;

/// A disk of its own, small enough to be full.
pub struct Disk(TempDir);

impl Disk {
    /// `None` where one may not be mounted, and then it says so.
    pub fn mount() -> Option<Self> {
        let folder = tempfile::Builder::new().prefix("mcp-api-disk-").tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs"]).arg(folder.path());
        match mount.output() {
            Ok(output) if output.status.success() => Some(Self(folder)),
            failed => {
                // Past the harness, which shows nothing of a test that passes.
                let _ = std::io::Write::write_all(
                    &mut std::io::stderr(),
                    format!("\nNOT TESTED: a full disk needs the right to mount one: {failed:?}\n")
                        .as_bytes(),
                );
                None
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    fn filler(&self) -> PathBuf {
        self.0.path().join("filler")
    }

    /// Leaves no byte.
    fn fill(&self) {
        use std::io::Write;
        let mut file = fs::File::options().create(true).append(true).open(self.filler()).unwrap();
        for size in [64 * 1024, 4 * 1024, 1] {
            while file.write_all(&vec![0xA5; size]).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Also while a program still has it open.
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

async fn arguments(api: &Deployment) -> Value {
    serde_json::from_str(&api.call_as("alice", "echo", "args", json!({})).await.tool_text()).unwrap()
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_nothing_else() {
    let Some(disk) = Disk::mount() else { return };
    let data = Data::new();
    let folder = disk.0.path().join("data");
    let builder = || Deployment::builder().data(&data).env("DATA_DIR", folder.to_str().unwrap());
    let api = builder().start().await;
    api.add_fixture("echo", &[], json!({})).await;
    api.set_secret("alice", "echo", "KEPT", "before").await.ok();
    for round in 0..3 {
        disk.fill();
        let large = "x".repeat(60_000);
        // What little room the log still has is used up first.
        eventually("the store is full", async || {
            let answer = api.set_secret("alice", "echo", "LARGE", &large).await;
            if answer.status == 200 {
                disk.fill();
            }
            answer.status != 200
        })
        .await;
        let refused = api.set_secret("alice", "echo", "KEPT", &large).await.fails(507, "storage_full");
        assert_eq!(refused.json()["retryable"], true);
        api.register_fixture(&format!("new-{round}"), &[], json!({"env": {"LARGE": large}}))
            .await
            .fails(507, "storage_full");
        api.get(&format!("/mcp/servers/new-{round}")).await.fails(404, "server_not_found");
        // Reads and calls do not care, and a process that died is started again.
        assert_eq!(api.get("/mcp/servers").await.ok().json()["servers"].as_array().unwrap().len(), 2 + round);
        assert_eq!(arguments(&api).await["KEPT"], if round == 0 { "before" } else { "after" });
        let pid = api.pids("echo").await[0];
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
        eventually("a call works again", async || {
            api.call("echo", "echo", json!({"text": "hi"})).await.status == 200
        })
        .await;

        disk.free();
        api.set_secret("alice", "echo", "KEPT", "after").await.ok();
        assert_eq!(arguments(&api).await["KEPT"], "after");
        api.register_fixture(&format!("old-{round}"), &[], json!({"enabled": false})).await.ok();
        assert_eq!(api.get("/readyz").await.status, 200);
    }
    // A program that is killed on a full disk has lost nothing when there is room again.
    disk.fill();
    api.kill().await;
    disk.free();
    let api = builder().start().await;
    assert_eq!(arguments(&api).await["KEPT"], "after");
    assert_eq!(api.get("/mcp/servers").await.ok().json()["servers"].as_array().unwrap().len(), 5);
    assert!(api.stop().await.success());
}

#[tokio::test]
async fn an_installation_is_refused_where_there_is_no_room() {
    let Some(disk) = Disk::mount() else { return };
    let folder = disk.0.path().join("data");
    let registry = packages::registry();
    let api = packages::from(&registry).env("DATA_DIR", folder.to_str().unwrap()).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let install = json!({"name": "@acme/clock", "serverName": "clock"});
    packages::install(&api, install).await.fails(507, "disk_full");
    api.get("/mcp/servers/clock").await.fails(404, "server_not_found");
    let left = fs::read_dir(folder.join("packages/.scratch")).into_iter().flatten().count();
    assert_eq!(left, 0, "something half done is left");
    assert_eq!(api.call("echo", "echo", json!({"text": "hi"})).await.tool_text(), "hi");
    assert!(api.stop().await.success());
}

/// Runs the program to its end, which comes at once.
async fn refused(data: &Data) -> (Option<i32>, String) {
    let mut command = Deployment::builder().data(data).command();
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Does something to the bytes of a file.
type Damage = fn(&mut Vec<u8>);

#[tokio::test]
async fn a_damaged_file_is_refused_with_a_way_out_and_left_as_it_is() {
    let api = Deployment::start().await;
    let data = api.data();
    for n in 0..40 {
        let record = json!({"enabled": false, "description": "x".repeat(1_000)});
        api.register_fixture(&format!("server-{n}"), &[], record).await.ok();
    }
    assert!(api.stop().await.success());
    let file = data.path().join("data").join("mcp-api.db");
    let sound = fs::read(&file).unwrap();
    let damages: [(&str, Damage); 4] = [
        ("noise instead of the first page", |file| file[..PAGE].fill(0x5A)),
        ("noise in the middle", |file| {
            let at = file.len() / 2 / PAGE * PAGE;
            file[at..at + PAGE].fill(0x5A);
        }),
        ("half of it", |file| file.truncate(file.len() / 2)),
        ("another file", |file| *file = b"this is no database".repeat(1_000)),
    ];
    for (what, damage) in damages {
        let mut damaged = sound.clone();
        damage(&mut damaged);
        fs::write(&file, &damaged).unwrap();
        let (code, said) = refused(&data).await;
        // To start again changes nothing.
        assert_eq!(code, Some(78), "{what}: {said}");
        for part in ["mcp-api.db is damaged", "left as it is", "restore a backup", ".recover"] {
            assert!(said.contains(part), "{what}: {said}");
        }
        assert!(fs::read(&file).unwrap() == damaged, "{what}: it was changed");
    }
    // A backup is a way out.
    fs::write(&file, &sound).unwrap();
    let api = Deployment::builder().data(&data).start().await;
    assert_eq!(api.get("/mcp/servers").await.ok().json()["servers"].as_array().unwrap().len(), 41);
    api.register_fixture("last", &[], json!({"enabled": false})).await.ok();
    api.kill().await;
    emptied(&data, &file).await;
}

/// A data file that was emptied, while what was not moved into it yet is still there, is no new beginning.
async fn emptied(data: &Data, file: &Path) {
    assert!(file.with_extension("db-wal").metadata().unwrap().len() > 0, "the program was killed");
    fs::write(file, "").unwrap();
    let (code, said) = refused(data).await;
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("its write-ahead log is there"), "{said}");
    assert_eq!(file.metadata().unwrap().len(), 0);
}
