//! A registry on loopback that is npm's and PyPI's at once, with packages made by hand, and that can fail
//! in the ways in which registries do.
//!
//! ```no_run
//! use mcp_shared::testing::registry::{Registry, node_server};
//! let registry = Registry::start();
//! registry.add_npm("@a/server", "1.0.0", &[("cli.js", &node_server("1.0.0"))], r#"{"bin": "cli.js"}"#);
//! // npm_config_registry = registry.npm_url()
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "this is test support: a failure should end the test loudly"
)]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use base64::{Engine, engine::general_purpose};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256, Sha512};

use super::port::Port;

mod archive;

/// How the registry answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// As it should.
    None,
    /// Every connection is refused: nothing listens.
    Down,
    /// Requests are taken and never answered.
    Hang,
    /// With this status.
    Status(u16),
    /// With pages where metadata should be.
    Garbage,
    /// Files have other bytes than the metadata says.
    Corrupt,
    /// Files break off in the middle.
    Broken,
}

/// A registry. It ends when this is dropped.
pub struct Registry {
    port: Port,
    shared: Arc<Shared>,
}

/// What a Python package holds besides its modules.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wheel<'a> {
    /// What it needs: `other>=1`.
    pub requires: &'a [&'a str],
    /// Its console scripts: name and `module:function`.
    pub scripts: &'a [(&'a str, &'a str)],
    /// The versions of Python that it is for: `>=3.9`.
    pub requires_python: Option<&'a str>,
    /// Whether it was withdrawn.
    pub yanked: bool,
    /// Whether there is only an archive of its source.
    pub source_only: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
}

struct State {
    fault: Fault,
    listener: Option<TcpListener>,
    over: bool,
    requests: Vec<String>,
    npm: BTreeMap<String, Value>,
    python: BTreeMap<String, Vec<Value>>,
    files: BTreeMap<String, Vec<u8>>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            fault: Fault::None,
            listener: None,
            over: false,
            requests: Vec::new(),
            npm: BTreeMap::new(),
            python: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }
}

impl Registry {
    /// Starts an empty one.
    pub fn start() -> Self {
        let registry = Self { port: Port::keep(), shared: Arc::default() };
        registry.listen(registry.port.listen());
        registry
    }

    /// What npm needs to be told: `npm_config_registry`.
    pub fn npm_url(&self) -> String {
        format!("http://{}/", self.port.address())
    }

    /// What pip and uv need to be told: the index's address.
    pub fn pip_url(&self) -> String {
        format!("http://{}/simple/", self.port.address())
    }

    /// Makes it fail, or work again.
    pub fn fault(&self, fault: Fault) {
        let mut state = self.shared.state();
        state.fault = fault;
        if fault == Fault::Down {
            state.listener = None;
            drop(state);
            // The thread that waits for a connection has its own handle of the listener.
            let _ = TcpStream::connect(self.port.address());
        } else if state.listener.is_none() {
            drop(state);
            self.listen(self.port.listen());
        }
    }

    /// The paths that were asked for so far.
    pub fn requests(&self) -> Vec<String> {
        self.shared.state().requests.clone()
    }

    /// Adds a version of an npm package. `package` are further fields of its `package.json`, as JSON. A
    /// version that is no prerelease becomes the latest.
    pub fn add_npm(&self, name: &str, version: &str, files: &[(&str, &str)], package: &str) {
        let mut manifest: Map<String, Value> = serde_json::from_str(package).expect("fields as JSON");
        manifest.insert("name".to_owned(), name.into());
        manifest.insert("version".to_owned(), version.into());
        let text = serde_json::to_string_pretty(&manifest).expect("JSON can be written");
        let mut members = vec![("package/package.json".to_owned(), text.into_bytes())];
        members
            .extend(files.iter().map(|(path, text)| (format!("package/{path}"), text.as_bytes().to_vec())));
        let tarball = archive::tgz(&members);
        let integrity = format!("sha512-{}", general_purpose::STANDARD.encode(Sha512::digest(&tarball)));
        let bare = name.rsplit('/').next().unwrap_or(name);
        let path = format!("/{name}/-/{bare}-{version}.tgz");
        manifest.insert(
            "dist".to_owned(),
            json!({"tarball": format!("http://{}{path}", self.port.address()), "integrity": integrity}),
        );
        if ["preinstall", "install", "postinstall"].iter().any(|script| has_script(&manifest, script)) {
            manifest.insert("hasInstallScript".to_owned(), true.into());
        }
        let mut state = self.shared.state();
        state.files.insert(path, tarball);
        let entry = state
            .npm
            .entry(name.to_owned())
            .or_insert_with(|| json!({"name": name, "dist-tags": {}, "versions": {}}));
        entry["versions"][version] = Value::Object(manifest);
        if !version.contains('-') {
            entry["dist-tags"]["latest"] = version.into();
        }
    }

    /// Gives a version of an npm package a tag.
    pub fn tag_npm(&self, name: &str, tag: &str, version: &str) {
        self.shared.state().npm.get_mut(name).expect("the package exists")["dist-tags"][tag] = version.into();
    }

    /// Adds a version of a Python package: a wheel with these files.
    pub fn add_python(&self, name: &str, version: &str, files: &[(&str, &str)]) {
        self.add_wheel(name, version, files, Wheel::default());
    }

    /// Adds a version of a Python package.
    pub fn add_wheel(&self, name: &str, version: &str, files: &[(&str, &str)], wheel: Wheel<'_>) {
        let folded = name.replace(['-', '.'], "_");
        let (file, bytes) = if wheel.source_only {
            (format!("{name}-{version}.tar.gz"), source(name, version, files))
        } else {
            (format!("{folded}-{version}-py3-none-any.whl"), build_wheel(name, version, files, wheel))
        };
        let mut link = json!({
            "filename": file, "url": format!("/files/{file}"), "yanked": wheel.yanked,
            "hashes": {"sha256": hex::encode(Sha256::digest(&bytes))},
        });
        if let Some(python) = wheel.requires_python {
            link["requires-python"] = python.into();
        }
        let mut state = self.shared.state();
        state.files.insert(format!("/files/{file}"), bytes);
        state.python.entry(folded.replace('_', "-").to_lowercase()).or_default().push(link);
    }

    /// Removes every version of a package, as a registry does that withdraws it.
    pub fn remove(&self, name: &str) {
        let mut state = self.shared.state();
        state.npm.remove(name);
        state.python.remove(name);
    }

    /// Removes a file, but not what says that it is there.
    pub fn remove_file(&self, path: &str) {
        self.shared.state().files.remove(path).expect("the file exists");
    }

    fn listen(&self, listener: TcpListener) {
        let handle = listener.try_clone().expect("a listener can be cloned");
        self.shared.state().listener = Some(handle);
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if shared.state().listener.is_none() {
                    return;
                }
                let (Ok(stream), shared) = (stream, Arc::clone(&shared)) else { continue };
                thread::spawn(move || shared.answer(stream));
            }
        });
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.shared.state().over = true;
        self.fault(Fault::Down);
    }
}

/// What files are.
const BYTES: &str = "application/octet-stream";

fn has_script(manifest: &Map<String, Value>, script: &str) -> bool {
    manifest.get("scripts").is_some_and(|scripts| scripts.get(script).is_some())
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request on a connection; clients open as many as they need.
    fn answer(&self, mut stream: TcpStream) {
        let Some(head) = read_head(&mut stream) else { return };
        let mut words = head.split(' ');
        let (Some(method), Some(target)) = (words.next(), words.next()) else { return };
        let path = target.split('?').next().unwrap_or(target).replace("%2f", "/").replace("%2F", "/");
        let json = head.contains("application/vnd.pypi.simple.v1+json") || !path.starts_with("/simple/");
        self.state().requests.push(format!("{method} {path}"));
        while self.state().fault == Fault::Hang && !self.state().over {
            thread::sleep(Duration::from_millis(20));
        }
        let ((status, kind, mut body), fault) = {
            let state = self.state();
            (state.find(&path, json), state.fault)
        };
        let length = body.len();
        if fault == Fault::Broken && kind == BYTES {
            body.truncate(length / 2);
        }
        let head = format!(
            "HTTP/1.1 {status} Answer\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
        );
        let _ = stream.write_all(head.as_bytes());
        if method != "HEAD" {
            let _ = stream.write_all(&body);
        }
    }
}

impl State {
    fn find(&self, path: &str, json: bool) -> (u16, &'static str, Vec<u8>) {
        const JSON: &str = "application/json";
        const INDEX: &str = "application/vnd.pypi.simple.v1+json";
        match self.fault {
            Fault::Status(status) => return (status, JSON, b"{}".to_vec()),
            Fault::Garbage => return (200, if json { INDEX } else { "text/html" }, b"<html>oops".to_vec()),
            _ => {}
        }
        if let Some(file) = self.files.get(path) {
            let mut bytes = file.clone();
            if self.fault == Fault::Corrupt {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x55;
            }
            return (200, BYTES, bytes);
        }
        if let Some(project) = path.strip_prefix("/simple/").and_then(|rest| rest.strip_suffix('/'))
            && let Some(files) = self.python.get(project)
        {
            if json {
                let index = json!({"meta": {"api-version": "1.0"}, "name": project, "files": files});
                return (200, INDEX, index.to_string().into_bytes());
            }
            let links: String = files
                .iter()
                .map(|file| {
                    let text = |key: &str| file[key].as_str().unwrap_or_default().replace('>', "&gt;");
                    let (name, url) = (text("filename"), text("url"));
                    let hash = file["hashes"]["sha256"].as_str().unwrap_or_default();
                    let python = match file.get("requires-python") {
                        Some(_) => format!(" data-requires-python=\"{}\"", text("requires-python")),
                        None => String::new(),
                    };
                    let yanked = if file["yanked"] == true { " data-yanked=\"\"" } else { "" };
                    format!("<a href=\"{url}#sha256={hash}\"{python}{yanked}>{name}</a>\n")
                })
                .collect();
            return (200, "text/html", format!("<!DOCTYPE html><html><body>{links}</body></html>").into());
        }
        match self.npm.get(path.trim_start_matches('/')) {
            Some(packument) => (200, JSON, packument.to_string().into_bytes()),
            None => (404, JSON, br#"{"error":"not_found"}"#.to_vec()),
        }
    }
}

/// The lines of a request up to the empty one. No client of a registry sends more than that here.
fn read_head(stream: &mut TcpStream) -> Option<String> {
    let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
    let (mut head, mut chunk) = (Vec::new(), [0; 2_048]);
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let read = stream.read(&mut chunk).ok().filter(|read| *read > 0 && head.len() < 65_536)?;
        head.extend(&chunk[..read]);
    }
    String::from_utf8(head).ok()
}

fn build_wheel(name: &str, version: &str, files: &[(&str, &str)], wheel: Wheel<'_>) -> Vec<u8> {
    let info = format!("{}-{version}.dist-info", name.replace(['-', '.'], "_"));
    let mut metadata = format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n");
    for required in wheel.requires {
        metadata.push_str(&format!("Requires-Dist: {required}\n"));
    }
    if let Some(python) = wheel.requires_python {
        metadata.push_str(&format!("Requires-Python: {python}\n"));
    }
    let mut members: Vec<(String, Vec<u8>)> =
        files.iter().map(|(path, text)| ((*path).to_owned(), text.as_bytes().to_vec())).collect();
    members.push((format!("{info}/METADATA"), metadata.into_bytes()));
    let about = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
    members.push((format!("{info}/WHEEL"), about.into()));
    if !wheel.scripts.is_empty() {
        let scripts: String =
            wheel.scripts.iter().map(|(name, target)| format!("{name} = {target}\n")).collect();
        members
            .push((format!("{info}/entry_points.txt"), format!("[console_scripts]\n{scripts}").into_bytes()));
    }
    let mut record: String = members
        .iter()
        .map(|(path, bytes)| {
            let hash = general_purpose::URL_SAFE_NO_PAD.encode(Sha256::digest(bytes));
            format!("{path},sha256={hash},{}\n", bytes.len())
        })
        .collect();
    record.push_str(&format!("{info}/RECORD,,\n"));
    members.push((format!("{info}/RECORD"), record.into_bytes()));
    archive::zip(&members)
}

/// An archive of sources. Building it would run `setup.py`.
fn source(name: &str, version: &str, files: &[(&str, &str)]) -> Vec<u8> {
    let mut members = vec![(
        format!("{name}-{version}/PKG-INFO"),
        format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n").into_bytes(),
    )];
    members.extend(
        files.iter().map(|(path, text)| (format!("{name}-{version}/{path}"), text.as_bytes().to_vec())),
    );
    archive::tgz(&members)
}

/// An MCP server for Node that needs no package: its tools are `version`, which answers this text, and
/// `tool_<text>` with everything but letters and digits as `_`, so that lists of tools differ too.
pub fn node_server(version: &str) -> String {
    let tool: String = version.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    NODE_SERVER.replace("@VERSION@", version).replace("@TOOL@", &tool)
}

/// The same for Python.
pub fn python_server(version: &str) -> String {
    let tool: String = version.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    PYTHON_SERVER.replace("@VERSION@", version).replace("@TOOL@", &tool)
}

const NODE_SERVER: &str = include_str!("registry/server.js.txt");
const PYTHON_SERVER: &str = include_str!("registry/server.py.txt");
