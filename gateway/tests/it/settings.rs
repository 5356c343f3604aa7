//! Settings and starts: what is refused, in which words and with which exit status, and that a start that
//! is refused leaves everything as it was.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Output, Stdio},
};

use mcp_shared::config::VARIABLES;
use serde_json::{Value, json};

use crate::deployment::{Builder, Data, Deployment, PATIENCE, tls_file};

/// The exit status for settings that no restart mends.
pub const CONFIG: i32 = 78;
/// The exit status for what may pass.
pub const TEMPORARY: i32 = 75;

pub const KEY: &str = "8f1d2c3b4a5968778695a4b3c2d1e0f00f1e2d3c4b5a69788796a5b4c3d2e1f0";
const OTHER_KEY: &str = "0123fedc4567ba98a1b2c3d4e5f60718293a4b5c6d7e8f90aabbccdd11223344";
const PASSPHRASE: &str = "seven purple walruses juggle quietly at midnight";

/// Runs the program with arguments until it ends by itself.
pub async fn run(builder: Builder, arguments: &[&str]) -> Output {
    ended(builder.command(), arguments).await
}

/// Runs a program with arguments until it ends by itself.
pub async fn ended(mut command: Command, arguments: &[&str]) -> Output {
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let id = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    let ended = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    match tokio::time::timeout(PATIENCE, ended).await {
        Ok(output) => output.unwrap(),
        Err(_) => {
            let _ = nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGKILL);
            panic!("the program did not end by itself");
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A start that must be refused with a status; returns what it complained of.
async fn refused(builder: Builder, status: i32) -> String {
    let output = run(builder, &[]).await;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    // It never said that it listens.
    assert_eq!(text(&output.stdout), "", "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// Every file below a folder with its content and its time, to compare.
fn snapshot(folder: &Path) -> BTreeMap<String, (Vec<u8>, i64)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(snapshot(&path));
            continue;
        }
        found.insert(
            path.display().to_string(),
            (std::fs::read(&path).unwrap(), path.metadata().unwrap().mtime()),
        );
    }
    found
}

/// What is stored, without the files that come and go with every opening of the database.
fn contents(data: &Data) -> BTreeMap<String, Vec<u8>> {
    let files = snapshot(&data.path().join("data")).into_iter();
    let lasting = files.filter(|(path, _)| path.ends_with("mcp-api.db") || path.ends_with(".key"));
    lasting.map(|(path, (bytes, _))| (path, bytes)).collect()
}

/// A stopped program's data with a server and a secret of alice's in it.
async fn used(data: Data, key: Option<&str>) -> Data {
    let api = with_key(&data, key).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    api.set_secret("alice", "echo", "K", "stored earlier").await.ok();
    assert!(api.stop().await.success());
    data
}

fn with_key(data: &Data, key: Option<&str>) -> Builder {
    let builder = Deployment::builder().data(data);
    match key {
        Some(key) => builder.env("SECRETS_KEY", key),
        None => builder,
    }
}

async fn secret_is_there(api: &Deployment) {
    let told = api.call_as("alice", "echo", "args", json!({})).await.tool_text();
    assert_eq!(told, r#"{"K":"stored earlier"}"#);
}

#[tokio::test]
async fn help_lists_every_variable() {
    let output = run(Deployment::builder(), &["--help"]).await;
    assert!(output.status.success());
    let help = text(&output.stdout);
    for variable in VARIABLES {
        let line = help.lines().find_map(|line| line.strip_prefix("  ")?.strip_prefix(variable.name));
        assert!(line.is_some_and(|rest| rest.is_empty() || rest.starts_with(' ')), "{}", variable.name);
    }
    let short = run(Deployment::builder(), &["-h"]).await;
    assert!(text(&short.stdout).contains("--help"), "the short help leads to the long one");
    let version = run(Deployment::builder(), &["--version"]).await;
    assert!(text(&version.stdout).contains(env!("CARGO_PKG_VERSION")));
    let unknown = run(Deployment::builder(), &["--no-such-flag"]).await;
    assert_eq!(unknown.status.code(), Some(2));
}

#[tokio::test]
async fn check_shows_settings_and_creates_nothing() {
    let data = Data::new();
    std::fs::write(data.path().join(".env"), "PAYLOAD_LIMIT=2mb\nDEBUG=true\n").unwrap();
    let before = snapshot(data.path());
    let builder = || Deployment::builder().data(&data).env("SECRETS_KEY", KEY).env("DEBUG", "false");
    let output = run(builder(), &["check"]).await;
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    assert!(!said.contains(KEY) && !text(&output.stderr).contains(KEY), "{said}");
    let line = |name: &str| {
        let line = said.lines().find(|line| line.split_whitespace().next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in {said}")).split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("PAYLOAD_LIMIT"), "PAYLOAD_LIMIT 2mb .env");
    assert_eq!(line("DEBUG"), "DEBUG false environment");
    assert_eq!(line("HOST"), "HOST 127.0.0.1 default");
    assert_eq!(line("SECRETS_KEY"), "SECRETS_KEY (set, 64 characters) environment");
    for variable in VARIABLES {
        line(variable.name);
    }
    assert_eq!(snapshot(data.path()), before, "check made or changed something");
    assert!(!data.path().join("data").exists());

    // A refused start leaves an empty store at most; check does not make a key for it either.
    refused(Deployment::builder().data(&data).env("SECRETS_KEY", "secret"), CONFIG).await;
    run(Deployment::builder().data(&data), &["check"]).await;
    assert!(!data.path().join("data").join("secrets.key").exists(), "check made a key");
    let weak = run(Deployment::builder().data(&data).env("SECRETS_KEY", "secret"), &["check"]).await;
    assert_eq!(weak.status.code(), Some(CONFIG), "{}", text(&weak.stdout));
}

#[tokio::test]
async fn check_looks_at_used_data() {
    let data = used(Data::new(), Some(KEY)).await;
    let before = contents(&data);
    let good = run(with_key(&data, Some(KEY)), &["check"]).await;
    assert!(good.status.success(), "{}", text(&good.stdout));
    assert!(text(&good.stdout).contains("1 servers"), "{}", text(&good.stdout));
    for key in [Some(OTHER_KEY), Some(PASSPHRASE), None] {
        let wrong = run(with_key(&data, key), &["check"]).await;
        assert_eq!(wrong.status.code(), Some(CONFIG), "{key:?}: {}", text(&wrong.stdout));
        assert!(text(&wrong.stdout).contains("FAILED"), "{}", text(&wrong.stdout));
    }
    assert_eq!(contents(&data), before);

    let api = with_key(&data, Some(KEY)).start().await;
    let running = run(with_key(&data, Some(KEY)), &["check"]).await;
    assert!(running.status.success(), "{}", text(&running.stdout));
    assert!(text(&running.stdout).contains("in use by a running mcp-api"), "{}", text(&running.stdout));
    secret_is_there(&api).await;
}

#[tokio::test]
async fn weak_keys_are_refused() {
    let data = Data::new();
    let zeros = "0".repeat(64);
    let sixteen = "ab".repeat(32);
    for key in [
        "secret",
        "changeme",
        "password",
        "secrets-key-here",
        "short but own words",
        "SECRET",
        "your-secret-key-here",
        "change-me-in-production-please-change-me",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        zeros.as_str(),
        sixteen.as_str(),
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
    ] {
        let said = refused(Deployment::builder().data(&data).env("SECRETS_KEY", key), CONFIG).await;
        assert!(said.contains("weak") && said.contains("openssl rand -hex 32"), "{key}: {said}");
        assert!(key.len() < 12 || !said.contains(key), "{said}");
    }
    assert!(!data.path().join("data").join("secrets.key").exists());
    let ring = data.path().join("ring");
    for contents in [
        "",
        "# nothing\n",
        "k1:c2hvcnQ=\n",
        "K 1:AAAA\n",
        "k1\n",
        "k1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n",
    ] {
        std::fs::write(&ring, contents).unwrap();
        let builder = Deployment::builder().data(&data).env("SECRETS_KEYS_FILE", ring.display().to_string());
        let said = refused(builder, CONFIG).await;
        assert!(said.contains("key ring"), "{contents:?}: {said}");
    }
    // An empty key is as good as none, and none is made up by the program.
    let api = Deployment::builder().data(&data).env("SECRETS_KEY", "").start().await;
    assert!(data.path().join("data").join("secrets.key").exists());
    api.stop().await;
}

#[tokio::test]
async fn unsafe_and_impossible_settings_are_refused() {
    type Set = &'static [(&'static str, &'static str)];
    type Said = &'static [&'static str];
    let cases: Vec<(Set, Said)> = vec![
        (&[("HOST", "0.0.0.0")], &["HOST", "authentication"]),
        (&[("HOST", "::")], &["HOST", "authentication"]),
        (&[("HOST", "[::]")], &["HOST", "authentication"]),
        (&[("HOST", "192.0.2.1")], &["HOST", "authentication"]),
        (&[("HOST", "host.example")], &["HOST", "authentication"]),
        (&[("HOST", "127.1")], &["HOST"]),
        (&[("HOST", "a b")], &["HOST"]),
        (&[("PORT", "http")], &["PORT"]),
        (&[("PORT", "65536")], &["PORT"]),
        (&[("PORT", "-1")], &["PORT"]),
        (&[("PAYLOAD_LIMIT", "lots")], &["PAYLOAD_LIMIT"]),
        (&[("PAYLOAD_LIMIT", "2tb")], &["PAYLOAD_LIMIT"]),
        (&[("SHUTDOWN_TIMEOUT_SECONDS", "0")], &["SHUTDOWN_TIMEOUT_SECONDS"]),
        (&[("DEBUG", "perhaps")], &["DEBUG"]),
        (&[("LOG_FORMAT", "xml")], &["LOG_FORMAT"]),
        (&[("RUST_LOG", "a=b=c")], &["RUST_LOG"]),
        (&[("AUTH", "jwt")], &["JWT_ISSUER", "JWT_AUDIENCE"]),
        (&[("AUTH", "maybe")], &["AUTH"]),
        (&[("ALLOWED_ORIGINS", "not an origin")], &["ALLOWED_ORIGINS"]),
        (&[("CORS_ORIGINS", "*")], &["CORS_ORIGINS"]),
        (&[("CORS_ORIGINS", "https://a.example,null")], &["CORS_ORIGINS"]),
        (&[("CORS_ORIGINS", "https://a.example/path")], &["CORS_ORIGINS"]),
        (&[("MAX_CONNECTIONS", "0")], &["MAX_CONNECTIONS"]),
        (&[("TLS_CERT_FILE", "cert.pem")], &["TLS_CERT_FILE", "TLS_KEY_FILE is missing"]),
        (&[("TLS_KEY_FILE", "key.pem")], &["TLS_KEY_FILE", "TLS_CERT_FILE is missing"]),
        (&[("TLS_CERT_FILE", "no-cert.pem"), ("TLS_KEY_FILE", "no-key.pem")], &["no-cert.pem", "not found"]),
        (&[("LEGACY_SECRETS", "yes")], &["LEGACY_SECRETS"]),
        (&[("SECRETS_KEY", KEY), ("SECRETS_KEYS_FILE", "no-such-file")], &["no-such-file"]),
        (&[("SECRETS_KEYS_FILE", "no-such-file")], &["no-such-file"]),
        // All that is wrong is said at once.
        (&[("PORT", "x"), ("DEBUG", "x"), ("HOST", "0.0.0.0")], &["PORT", "DEBUG", "HOST"]),
    ];
    for (settings, expected) in cases {
        let data = Data::new();
        let mut builder = Deployment::builder().data(&data);
        for (name, value) in settings {
            builder = builder.env(name, *value);
        }
        let said = refused(builder, CONFIG).await;
        for word in expected {
            assert!(said.contains(word), "{settings:?} without {word}: {said}");
        }
        assert!(!said.contains("canary-pass") && !said.contains(KEY), "{said}");
    }
}

#[tokio::test]
async fn a_certificate_that_cannot_be_served_with_is_refused() {
    let with = |certificate: &str, key: &str| {
        Deployment::builder()
            .env("TLS_CERT_FILE", tls_file(certificate).display().to_string())
            .env("TLS_KEY_FILE", tls_file(key).display().to_string())
    };
    for (certificate, key, expected) in [
        ("localhost.pem", "another.key", "the key is not that of the certificate"),
        ("localhost.key", "localhost.key", "TLS_CERT_FILE"),
        ("localhost.pem", "localhost.pem", "TLS_KEY_FILE"),
    ] {
        let said = refused(with(certificate, key), CONFIG).await;
        assert!(said.contains(expected) && !said.contains("PRIVATE KEY"), "{said}");
        let checked = run(with(certificate, key), &["check"]).await;
        assert_eq!(checked.status.code(), Some(CONFIG));
        assert!(text(&checked.stdout).contains(expected), "{}", text(&checked.stdout));
    }
    let checked = run(with("expired.pem", "localhost.key"), &["check"]).await;
    assert_eq!(checked.status.code(), Some(CONFIG));
    assert!(text(&checked.stdout).contains("ended at 2021-01-01"), "{}", text(&checked.stdout));
    let checked = run(with("localhost.pem", "localhost.key"), &["check"]).await;
    assert!(checked.status.success(), "{}", text(&checked.stdout));
    assert!(text(&checked.stdout).contains("fits its key, and ends at 2126"), "{}", text(&checked.stdout));
}

#[tokio::test]
async fn the_env_file_is_read() {
    let data = Data::new();
    let file = data.path().join(".env");
    std::fs::write(&file, format!("# a comment\nexport SECRETS_KEY='{KEY}'\nDATA_DIR=elsewhere\n")).unwrap();
    let api = Deployment::builder().data(&data).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    api.stop().await;
    assert!(data.path().join("elsewhere").join("mcp-api.db").exists());
    assert!(!data.path().join("elsewhere").join("secrets.key").exists(), "the key of the file was used");
    // The environment wins.
    let api = Deployment::builder().data(&data).env("DATA_DIR", "here").start().await;
    assert!(data.path().join("here").join("mcp-api.db").exists());
    api.stop().await;

    for (line, hint) in [
        ("PROT=8080", "did you mean PORT?"),
        ("SECRET_KEY=abc-canary-value", "did you mean SECRETS_KEY?"),
        ("secrets_keys_file=x", "did you mean SECRETS_KEYS_FILE?"),
        ("NOTHING_LIKE_OURS=1", "--help"),
        ("PORT", "line 1"),
    ] {
        std::fs::write(&file, format!("{line}\n")).unwrap();
        let said = refused(Deployment::builder().data(&data), CONFIG).await;
        assert!(said.contains(hint), "{line}: {said}");
        assert!(!said.contains("canary-value"), "{said}");
    }
    std::fs::remove_file(&file).unwrap();
    let named = data.path().join("settings");
    std::fs::write(&named, "PORT=nonsense\n").unwrap();
    let output = run(Deployment::builder().data(&data), &["--env-file", "settings", "check"]).await;
    assert_eq!(output.status.code(), Some(0), "the environment's PORT wins: {}", text(&output.stderr));
    let output = run(Deployment::builder().data(&data), &["--env-file", "missing"]).await;
    assert_eq!(output.status.code(), Some(CONFIG));
}

#[tokio::test]
async fn healthcheck_asks_the_program_that_runs() {
    let api = Deployment::start().await;
    let (_, port) = api.address().split_once(':').unwrap();
    // It goes to the address of the settings, and looks into nothing else: what runs has the folder.
    let asked = async |host: &str, port: &str, arguments: &[&str]| {
        run(
            Deployment::builder().data(&api.data()).env("AUTH", "keys").env("HOST", host).env("PORT", port),
            arguments,
        )
        .await
    };
    for host in ["127.0.0.1", "0.0.0.0", "localhost"] {
        for arguments in [&["healthcheck"][..], &["healthcheck", "--ready"]] {
            let output = asked(host, port, arguments).await;
            assert_eq!(output.status.code(), Some(0), "{host} {arguments:?}: {}", text(&output.stderr));
            assert_eq!((text(&output.stdout), text(&output.stderr)), Default::default());
        }
    }
    // The certificate is for other names than the address that it asks.
    let with_tls = |builder: Builder| {
        builder
            .env("TLS_CERT_FILE", tls_file("localhost.pem").display().to_string())
            .env("TLS_KEY_FILE", tls_file("localhost.key").display().to_string())
    };
    let secure = with_tls(Deployment::builder()).start().await;
    let (_, port) = secure.address().rsplit_once(':').unwrap();
    let builder = with_tls(Deployment::builder().data(&secure.data()).env("PORT", port));
    let output = run(builder, &["healthcheck", "--ready"]).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));

    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let output = asked("127.0.0.1", &free, &["healthcheck"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).starts_with(&format!("healthcheck: http://127.0.0.1:{free}/healthz: ")));
    let output = asked("127.0.0.1", "0", &["healthcheck"]).await;
    assert_eq!(output.status.code(), Some(CONFIG), "{}", text(&output.stderr));
}

#[tokio::test]
async fn a_port_or_folder_in_use_is_said_clearly() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let data = Data::new();
    let said = refused(Deployment::builder().data(&data).env("PORT", &port), TEMPORARY).await;
    assert!(said.contains(&format!("cannot listen on 127.0.0.1:{port}")) && said.contains("PORT"), "{said}");
    assert!(!data.path().join("data").exists(), "nothing was made for a start that could not be");

    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let said = refused(Deployment::builder().data(&api.data()), TEMPORARY).await;
    assert!(said.contains("another mcp-api process uses the data folder"), "{said}");
    assert_eq!(api.call("echo", "echo", json!({"text": "undisturbed"})).await.tool_text(), "undisturbed");
}

#[tokio::test]
async fn another_key_than_the_datas_is_refused() {
    let data = used(Data::new(), Some(KEY)).await;
    let before = contents(&data);
    for key in [Some(OTHER_KEY), Some(PASSPHRASE), None] {
        let said = refused(with_key(&data, key), CONFIG).await;
        assert!(said.contains("key"), "{said}");
        assert!(!key.is_some_and(|key| said.contains(key)), "{said}");
        assert_eq!(contents(&data), before, "data and keys stay as they were");
    }
    // The same 32 bytes in another spelling are the same key.
    let api = with_key(&data, Some(&KEY.to_uppercase())).start().await;
    secret_is_there(&api).await;
}

#[tokio::test]
async fn a_lost_key_file_is_not_replaced() {
    let data = used(Data::new(), None).await;
    let key = data.path().join("data").join("secrets.key");
    let contents_of_key = std::fs::read(&key).unwrap();
    std::fs::remove_file(&key).unwrap();
    let before = contents(&data);
    let said = refused(Deployment::builder().data(&data), CONFIG).await;
    assert!(said.contains("secrets.key") && said.contains("SECRETS_KEY"), "{said}");
    assert!(!key.exists(), "a new key would hide that the old one is lost");
    assert_eq!(contents(&data), before);
    std::fs::write(&key, contents_of_key).unwrap();
    secret_is_there(&Deployment::builder().data(&data).start().await).await;
}

#[tokio::test]
async fn data_of_a_key_ring_is_not_opened_with_a_new_key() {
    let data = Data::new();
    let ring = data.path().join("ring");
    std::fs::write(&ring, "main:obLD1OX2BxgpOktcbX6PkKq7zN0RIjNEASPtzf5FZ7o=\n").unwrap();
    let with_ring = || Deployment::builder().data(&data).env("SECRETS_KEYS_FILE", ring.display().to_string());
    let api = with_ring().start().await;
    api.add_fixture("echo", &[], json!({})).await;
    api.set_secret("alice", "echo", "K", "stored earlier").await.ok();
    api.stop().await;
    // Without its ring, a key of the program's own making would fit no secret.
    let said = refused(Deployment::builder().data(&data), CONFIG).await;
    assert!(said.contains("SECRETS_KEY"), "{said}");
    assert!(!data.path().join("data").join("secrets.key").exists());
    let checked = run(Deployment::builder().data(&data), &["check"]).await;
    assert_eq!(checked.status.code(), Some(CONFIG), "{}", text(&checked.stdout));
    // Neither does a key of somebody's choosing, under whatever name.
    for key in [KEY, PASSPHRASE] {
        refused(with_key(&data, Some(key)), CONFIG).await;
    }
    let old = std::fs::read_to_string(&ring).unwrap();
    let new = "new:Zm9ydHkgdHdvIGJ5dGVzIG9mIG5vIG1lYW5pbmchISE=\n";
    std::fs::write(&ring, new).unwrap();
    refused(with_ring(), CONFIG).await;
    // A new key beside the old one is how keys are changed.
    std::fs::write(&ring, format!("{new}{old}")).unwrap();
    let api = with_ring().start().await;
    secret_is_there(&api).await;
    api.set_secret("bob", "echo", "K", "under the new key").await.ok();
    api.stop().await;
    std::fs::write(&ring, format!("{old}{new}")).unwrap();
    let api = with_ring().start().await;
    secret_is_there(&api).await;
    let told = api.call_as("bob", "echo", "args", json!({})).await.tool_text();
    assert_eq!(told, r#"{"K":"under the new key"}"#);
}

#[tokio::test]
async fn a_passphrase_works_across_starts() {
    let data = used(Data::new(), Some(PASSPHRASE)).await;
    secret_is_there(&with_key(&data, Some(PASSPHRASE)).start().await).await;
    assert!(!data.path().join("data").join("secrets.key").exists());
    let other = format!("{PASSPHRASE}!");
    refused(with_key(&data, Some(&other)), CONFIG).await;
}

#[tokio::test]
async fn a_damaged_database_is_left_as_it_is() {
    let data = used(Data::new(), None).await;
    let file = data.path().join("data").join("mcp-api.db");
    let good = std::fs::read(&file).unwrap();
    let mut torn = good.clone();
    torn[4096..8192].fill(0xa5);
    for damaged in [
        b"this is not a database at all, but somebody's letter".repeat(200),
        torn,
        good[..good.len() / 2].to_vec(),
    ] {
        std::fs::write(&file, &damaged).unwrap();
        let output = run(Deployment::builder().data(&data), &[]).await;
        let said = text(&output.stderr);
        assert!(matches!(output.status.code(), Some(TEMPORARY | CONFIG)), "{:?}: {said}", output.status);
        assert!(said.contains("mcp-api.db") && !said.contains("panicked"), "{said}");
        assert_eq!(text(&output.stdout), "");
        assert_eq!(std::fs::read(&file).unwrap(), damaged, "the file was changed");
    }
    std::fs::write(&file, good).unwrap();
    secret_is_there(&Deployment::builder().data(&data).start().await).await;
}

#[tokio::test]
async fn logs_have_the_format_that_was_asked_for() {
    for (format, json_lines) in [("pretty", false), ("json", true)] {
        let api = Deployment::builder().env("LOG_FORMAT", format).env("DEBUG", "true").start().await;
        api.add_fixture("echo", &[], json!({})).await;
        api.logged("server connected").await;
        let log = api.log();
        assert!(!log.contains('\u{1b}'), "colours in a file: {log}");
        for line in log.lines() {
            let parsed = serde_json::from_str::<Value>(line);
            assert_eq!(parsed.is_ok(), json_lines, "{line}");
        }
        assert!(api.stop().await.success());
    }
}
