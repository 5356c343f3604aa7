//! The remote server as a test has it: a process with a port, that can be killed and started again there.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use serde::Deserialize;
use tempfile::TempDir;

use crate::testing::{http, port::Port};

/// A remote MCP server in a process of its own. Dropping it kills the process.
pub struct Remote {
    child: Child,
    port: Port,
    /// What makes the test's own program become the fixture.
    switch: String,
    flags: Vec<String>,
    folder: TempDir,
}

/// A request as the server saw it, or with the method `GONE`: a client that did not wait for its answer.
#[derive(Debug, Clone, Deserialize)]
pub struct Seen {
    /// `POST`.
    pub method: String,
    /// The path, without the query.
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The method of JSON-RPC.
    pub rpc: Option<String>,
    /// Whose token it had.
    pub user: Option<String>,
}

impl Seen {
    /// A header, or nothing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(String::as_str).unwrap_or_default()
    }

    /// Whether it is a request of JSON-RPC with this method.
    pub fn is(&self, rpc: &str) -> bool {
        self.method == "POST" && self.rpc.as_deref() == Some(rpc)
    }
}

impl Remote {
    /// Starts one, with flags of the module's table. `switch` is the argument that makes the test's own
    /// program become the fixture.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub fn start(switch: &str, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("there is a folder for temporary files");
        let mut flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        for log in ["requests", "executed"] {
            flags.push(format!("--{log}"));
            flags.push(folder.path().join(log).to_str().expect("temporary folders are Unicode").to_owned());
        }
        let port = Port::keep();
        let child = launch(switch, &port, &flags);
        Self { child, port, switch: switch.to_owned(), flags, folder }
    }

    /// Where MCP is spoken.
    pub fn url(&self) -> String {
        format!("http://{}/mcp", self.port.address())
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// A path in its folder, for `--session-file`: give it to [`Self::restart_with`].
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Kills it; nobody listens at its port then.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again at the same port. It is killed first if it still runs.
    pub fn restart(&mut self) {
        self.kill();
        self.child = launch(&self.switch, &self.port, &self.flags);
    }

    /// Starts it again with other flags.
    pub fn restart_with(&mut self, flags: &[&str]) {
        let logs = self.flags.split_off(self.flags.len() - 4);
        self.flags = flags.iter().map(|flag| (*flag).to_owned()).chain(logs).collect();
        self.restart();
    }

    /// Forgets all sessions, as a server does that is started again.
    pub fn forget_sessions(&self) {
        self.control("forget");
    }

    /// Breaks all streams off.
    pub fn drop_streams(&self) {
        self.control("drop");
    }

    /// How many sessions there are.
    pub fn sessions(&self) -> usize {
        self.control("sessions").parse().expect("a number")
    }

    /// The calls that were executed so far: the tool, a space, its arguments as JSON.
    pub fn executed(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder.path().join("executed")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        let text = fs::read_to_string(self.folder.path().join("requests")).unwrap_or_default();
        // The last line may be on its way.
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// How many requests of a method of JSON-RPC there were.
    pub fn count(&self, rpc: &str) -> usize {
        self.seen().iter().filter(|seen| seen.is(rpc)).count()
    }

    fn control(&self, what: &str) -> String {
        let request = format!("POST /control/{what} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
        let (status, _, body) =
            http::fetch(&self.port.address().to_string(), &request).expect("the server answers");
        assert_eq!(status, 200, "{body}");
        body
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.kill();
    }
}

fn launch(switch: &str, port: &Port, flags: &[String]) -> Child {
    let mut child = Command::new(env::current_exe().expect("this program has a path"))
        .args([switch, "--http", &port.number().to_string()])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program can be started");
    let mut line = String::new();
    let output = child.stdout.take().expect("its output is a pipe");
    BufReader::new(output).read_line(&mut line).expect("its output can be read");
    assert!(line.starts_with("listening on "), "the remote server did not start: {line}");
    child
}
