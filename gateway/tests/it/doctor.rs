//! `doctor` of both programs: quiet where all is well, and for each thing that is not, what it is and what mends it.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    process::Command,
};

use mcp_shared::testing::{
    chromium::has_browser,
    port::Port,
    services::{MongoServer, NatsServer, mongo_for_a_test, shared_nats},
};
use nix::unistd::geteuid;
use serde_json::{Value, json};

use crate::{
    deployment::{Data, Deployment, tls_file},
    full_disk::Disk,
    settings::{KEY, ended, text},
};

/// No browser is started but where a test is about that: it takes a second each time.
const NO_BROWSER: &str = "none";

/// What a doctor said.
pub struct Said {
    status: Option<i32>,
    pub report: Value,
    all: String,
}

impl Said {
    /// The finding that is worse than ok and speaks of all of these words.
    #[track_caller]
    fn finds(&self, level: &str, area: &str, words: &[&str]) -> &Self {
        let findings = self.report["findings"].as_array().unwrap();
        let fits = |finding: &&Value| {
            let text = finding.to_string();
            finding["level"] == level
                && finding["area"] == area
                && words.iter().all(|word| text.contains(word))
        };
        let found =
            findings.iter().find(fits).unwrap_or_else(|| panic!("no {level} {words:?}: {}", self.all));
        assert_eq!(
            finding_needs_remedy(found),
            found["remedy"].as_str().is_some_and(|text| !text.is_empty()),
            "{found}"
        );
        self
    }

    #[track_caller]
    fn is(&self, status: i32) -> &Self {
        assert_eq!(self.status, Some(status), "{}", self.all);
        assert_eq!(self.report["ok"], status == 0, "{}", self.all);
        self
    }

    /// Nothing is wrong. (That this machine has little room, or few programs, is not ours to say.)
    #[track_caller]
    fn is_well(&self) -> &Self {
        let about_us = |finding: &&Value| {
            finding["level"] != "ok"
                && !matches!(finding["area"].as_str(), Some("disk" | "runtimes" | "limits"))
        };
        let wrong: Vec<_> = self.report["findings"].as_array().unwrap().iter().filter(about_us).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
        self.is(0)
    }
}

fn finding_needs_remedy(finding: &Value) -> bool {
    finding["level"] != "ok"
}

pub async fn doctor(command: Command) -> Said {
    let output = ended(command, &["doctor", "--json"]).await;
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(err, "", "{out}");
    for secret in [KEY, "canary"] {
        assert!(!out.contains(secret), "{out}");
    }
    let report = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
    Said { status: output.status.code(), report, all: out }
}

fn with(data: &Data, settings: &[(&str, &str)]) -> Command {
    let builder = Deployment::builder().data(data).env("CHROMIUM", NO_BROWSER);
    settings.iter().fold(builder, |builder, (name, value)| builder.env(name, *value)).command()
}

#[tokio::test]
async fn a_single_node_is_well_before_and_while_it_serves() {
    let data = Data::new();
    let said = doctor(with(&data, &[])).await;
    said.is_well().finds("ok", "reach", &["store", "will be made at the first start"]);
    assert!(!data.path().join("data").exists(), "looking made something");

    let api = Deployment::builder().data(&data).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let said = doctor(with(&data, &[])).await;
    said.is_well().finds("ok", "reach", &["store", "in use by a running mcp-api"]);
    said.finds("ok", "permissions", &["files with keys"]);
    api.stop().await;
    let said = doctor(with(&data, &[])).await;
    said.is_well().finds("ok", "keys", &["fits the data"]).finds("ok", "reach", &["1 servers"]);

    // For people.
    let output = ended(with(&data, &[]), &["doctor"]).await;
    let shown = text(&output.stdout);
    assert!(shown.contains("\nkeys\n  ok") && shown.contains(" 0 errors\n"), "{shown}");
    assert!(!shown.contains('\u{1b}'), "colours in a pipe: {shown}");
}

#[tokio::test]
async fn what_is_wrong_with_settings_keys_and_files_is_found() {
    let data = Data::new();
    // Settings that cannot be: all of them, and nothing is opened.
    let said = doctor(with(&data, &[("PORT", "http"), ("HOST", "0.0.0.0")])).await;
    said.is(1).finds("error", "settings", &["PORT", "1 to 65535"]).finds(
        "error",
        "settings",
        &["HOST", "AUTH"],
    );

    doctor(with(&data, &[("SECRETS_KEY", "changeme")])).await.is(1).finds("error", "keys", &["weak"]);
    doctor(with(&data, &[("SECRET_KEYS", "x")])).await.finds(
        "warning",
        "settings",
        &["SECRET_KEYS", "SECRETS_KEY"],
    );
    let open = [("HOST", "0.0.0.0"), ("AUTH", "none")];
    doctor(with(&data, &open)).await.is(0).finds("warning", "settings", &["AUTH", "nobody is asked"]);

    // A file where the folder should be.
    let file = data.path().join("file");
    fs::write(&file, "").unwrap();
    let below = file.join("data").display().to_string();
    doctor(with(&data, &[("DATA_DIR", &below)])).await.is(1).finds("error", "permissions", &["DATA_DIR"]);

    // Files with secrets that others can read.
    let env = data.path().join(".env");
    fs::write(&env, format!("SECRETS_KEY={KEY}\n")).unwrap();
    fs::set_permissions(&env, fs::Permissions::from_mode(0o644)).unwrap();
    doctor(with(&data, &[])).await.is(0).finds(
        "warning",
        "permissions",
        &[".env", "chmod 600", "every user"],
    );
    fs::remove_file(&env).unwrap();

    // Data of another key, and a folder and a key that others can look into.
    let api = Deployment::builder().data(&data).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    api.stop().await;
    doctor(with(&data, &[("SECRETS_KEY", KEY)])).await.is(1).finds(
        "error",
        "keys",
        &["key", "encrypted with"],
    );
    let folder = data.path().join("data");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(folder.join("secrets.key"), fs::Permissions::from_mode(0o640)).unwrap();
    doctor(with(&data, &[])).await.is(0).finds("warning", "permissions", &["DATA_DIR", "chmod 700"]).finds(
        "warning",
        "permissions",
        &["group", "secrets.key", "chmod 600"],
    );

    let tls = |certificate: &str, key: &str| {
        [("TLS_CERT_FILE", tls_file(certificate)), ("TLS_KEY_FILE", tls_file(key))]
            .map(|(name, path)| (name, path.display().to_string()))
    };
    for (certificate, key, status, level, words) in [
        ("localhost.pem", "localhost.key", 0, "ok", "2126"),
        ("expired.pem", "localhost.key", 1, "error", "ended at 2021"),
        ("localhost.pem", "another.key", 1, "error", "not that of the certificate"),
    ] {
        let settings = tls(certificate, key);
        let settings: Vec<_> = settings.iter().map(|(name, path)| (*name, path.as_str())).collect();
        doctor(with(&data, &settings)).await.is(status).finds(level, "tls", &["TLS_CERT_FILE", words]);
    }

    // Programs that are not there, and services that do not answer.
    let kept = Port::keep();
    let nobody = kept.address();
    let collector = format!("http://{nobody}");
    let settings = [("PATH", "/nowhere"), ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector)];
    doctor(with(&data, &settings))
        .await
        .is(0)
        .finds("warning", "runtimes", &["node", "not found"])
        .finds("warning", "runtimes", &["npm", "not found"])
        .finds("warning", "runtimes", &["python", "PYTHON_BIN"])
        .finds("warning", "reach", &["OTLP", "no connection"]);
    let issuer = format!("http://{nobody}/canary");
    let settings = [
        ("AUTH", "jwt"),
        ("JWT_ISSUER", &format!("http://{nobody}")),
        ("JWT_AUDIENCE", "us"),
        ("JWT_JWKS_URL", &issuer),
    ];
    doctor(with(&data, &settings)).await.is(1).finds("error", "reach", &["JWT_ISSUER", "no connection"]);
}

#[tokio::test]
async fn a_browser_that_does_not_work_or_has_no_sandbox_is_found() {
    let data = Data::new();
    let about = async |settings: &[(&str, &str)]| doctor(with(&data, settings)).await;
    about(&[]).await.is(0).finds("ok", "runtimes", &["chromium", "none is to be used here"]);
    let broken = ("CHROMIUM", "/bin/false");
    let words = ["chromium", "does not work", "correct CHROMIUM"];
    about(&[broken, ("CHROMIUM_SANDBOX", "never")]).await.is(0).finds("warning", "runtimes", &words);
    let as_root = geteuid().is_root();
    let words = if as_root {
        ["when root runs it", "as another user"]
    } else {
        ["does not work", "correct CHROMIUM"]
    };
    about(&[broken, ("CHROMIUM_SANDBOX", "always")]).await.is(0).finds("warning", "runtimes", &words);
    if !has_browser("doctor::a_browser_that_does_not_work_or_has_no_sandbox_is_found") {
        return;
    }
    let found = ("CHROMIUM", "auto");
    let words = ["chromium", "without its sandbox", "keys", "CHROMIUM_SANDBOX=auto", "compose/chromium.yaml"];
    about(&[found, ("CHROMIUM_SANDBOX", "never")]).await.is(0).finds("warning", "runtimes", &words);
    // What others than root are told is shown in `ordinary_user`.
    if as_root {
        let words = ["chromium", "without its sandbox", "another user than root"];
        about(&[found]).await.is(0).finds("warning", "runtimes", &words);
    }
}

#[tokio::test]
async fn what_the_machine_lacks_is_found() {
    let data = Data::new();
    if let Some(disk) = Disk::mount() {
        let folder = disk.path().display().to_string();
        doctor(with(&data, &[("DATA_DIR", &folder)])).await.is(1).finds(
            "error",
            "disk",
            &["data", "DATA_DIR"],
        );
    }
    let program = with(&data, &[]);
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 1000; exec \"$0\" \"$@\""]).arg(program.get_program());
    command.env_clear().current_dir(program.get_current_dir().unwrap());
    command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    doctor(command).await.is(0).finds("warning", "limits", &["may have 1000", "ulimit"]);
}

/// A NATS that greets as one of an old version does, to whoever comes.
fn old_nats() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let info = json!({
                    "server_id": "OLD", "server_name": "old", "version": "2.12.5", "go": "go1", "host": "127.0.0.1",
                    "port": 4222, "headers": true, "max_payload": 1_048_576, "proto": 1, "client_id": 1,
                });
                let _ = stream.write_all(format!("INFO {info}\r\n").as_bytes());
                let mut said = [0; 1024];
                while let Ok(count @ 1..) = stream.read(&mut said) {
                    if String::from_utf8_lossy(&said[..count]).contains("PING") {
                        let _ = stream.write_all(b"PONG\r\n");
                    }
                }
            });
        }
    });
    format!("nats://{address}")
}

#[tokio::test]
async fn a_cluster_is_well_and_what_is_wrong_with_it_is_found() {
    let (data, mongo) = (Data::new(), mongo_for_a_test());
    let base = [
        ("NATS_URL", shared_nats().url()),
        ("NATS_PREFIX", data.name().to_owned()),
        ("MONGODB_URI", mongo.uri().to_owned()),
        ("MONGO_DBNAME", data.name().to_owned()),
        ("SECRETS_KEY", KEY.to_owned()),
        ("CHROMIUM", NO_BROWSER.to_owned()),
    ];
    let node = |worker: bool, changed: &[(&str, &str)]| {
        let all = base.iter().map(|(name, value)| (*name, value.as_str())).chain(changed.iter().copied());
        let builder =
            all.fold(Deployment::builder().data(&data), |builder, (name, value)| builder.env(name, value));
        if worker { builder.worker_command() } else { builder.command() }
    };
    for worker in [false, true] {
        let said = doctor(node(worker, &[])).await;
        said.is_well()
            .finds("ok", "versions", &["NATS", "2."])
            .finds("ok", "versions", &["MongoDB", "wire version"])
            .finds("ok", "reach", &["MongoDB", "answers within"])
            .finds("ok", "clocks", &["MongoDB", "agree"])
            .finds("ok", "permissions", &["NATS", "this login may say and hear"]);
    }
    // A worker alone, without its bus.
    doctor(node(true, &[("NATS_URL", "")])).await.is(1).finds("error", "settings", &["NATS_URL", "worker"]);

    // What does not answer, and what is too old.
    let kept = Port::keep();
    let nobody = kept.address();
    let (no_bus, no_store) = (format!("nats://{nobody}"), format!("mongodb://{nobody}"));
    let (no_bus, no_store, old) = (
        doctor(node(true, &[("NATS_URL", &no_bus)])),
        doctor(node(true, &[("MONGODB_URI", &no_store)])),
        old_nats(),
    );
    let (no_bus, no_store) = tokio::join!(no_bus, no_store);
    no_bus.is(1).finds("error", "reach", &["NATS", "cannot be reached", "NATS_URL"]);
    no_store.is(1).finds("error", "reach", &["store", "MongoDB", "MONGODB_URI"]);
    let old = doctor(node(false, &[("NATS_URL", &old)])).await;
    old.is(1).finds("error", "versions", &["2.12.5", "holes", "2.12.6"]);

    // Permissions that lack something.
    let narrow = NatsServer::start(&format!(
        "accounts {{ A {{ users = [{{ user: u, password: canary, permissions: {{ publish: [\"{0}.v1.worker.*.*\", \
         \"{0}.v1.inbox.>\"], subscribe: [\"{0}.v1.inbox.>\", \"{0}.v1.event.*.*\"] }} }}] }} }}",
        data.name()
    ));
    let url = narrow.url().replace("nats://", "nats://u:canary@");
    let said = doctor(node(true, &[("NATS_URL", &url)])).await;
    said.is(1).finds("error", "permissions", &["NATS", "v1.beat", "nats-server.conf"]);
    said.finds("error", "permissions", &["v1.worker."]).finds("error", "permissions", &["v1.call."]);
    let wrong = narrow.url().replace("nats://", "nats://u:canary-too@");
    doctor(node(true, &[("NATS_URL", &wrong)])).await.is(1).finds("error", "reach", &["bus", "login"]);

    // Another key than that of the data, and a database that lets nobody in.
    let api = Deployment::builder().data(&data);
    let api = base
        .iter()
        .filter(|(name, _)| !name.starts_with("NATS"))
        .fold(api, |api, (name, value)| api.env(name, value));
    let api = api.start().await;
    api.add_fixture("echo", &[], json!({})).await;
    api.set_secret("u", "echo", "K", "v").await.ok();
    api.stop().await;
    let other = KEY.chars().rev().collect::<String>();
    doctor(node(false, &[("SECRETS_KEY", &other)])).await.is(1).finds("error", "keys", &["key"]);
    let guarded = MongoServer::guarded("u", "canary");
    let uri = format!("mongodb://u:canary@{}/?directConnection=true", guarded.address());
    doctor(node(false, &[("MONGODB_URI", &uri)])).await.is_well().finds("ok", "permissions", &["MongoDB"]);
    let uri = format!("mongodb://u:canary-too@{}/?directConnection=true", guarded.address());
    doctor(node(false, &[("MONGODB_URI", &uri)])).await.is(1).finds("error", "reach", &["refuses the login"]);
}
