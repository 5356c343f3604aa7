//! Secrets that sing: fifty of them go through everything that the program does, at its most talkative, and through
//! everything that can go wrong. Then they are looked for wherever something is written down or can be read. They
//! may be in the servers that they are for, and nowhere else.

use std::{collections::BTreeMap, sync::Arc, sync::Mutex, time::Duration};

use futures_util::StreamExt;
use mcp_shared::testing::{
    authorization::{Authorization, Fault, Settings, Tokens},
    registry,
    remote::Remote,
    services::NatsServer,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::search::{Canaries, Places, Shape};
use crate::{
    FIXTURE,
    collector::Collector,
    deployment::{Answer, Data, Deployment, eventually},
    packages, stored,
};

#[path = "canary/search.rs"]
mod search;

const USERS: [&str; 5] = ["anna", "ben", "cleo", "dan", "eve"];
/// Secrets of the server that everybody shares: the names of arguments that the fixture's tools speak out loud.
const SPOKEN: [&str; 4] = ["message", "text", "line", "token"];
/// How many secrets there must be.
const SECRETS: usize = 50;

/// A message: its subject, and everything in it.
type Message = (String, Vec<u8>);

/// Everything that went over a bus of the test's own.
struct Bus {
    server: NatsServer,
    seen: Arc<Mutex<Vec<Message>>>,
}

impl Bus {
    async fn start() -> Self {
        let server = tokio::task::spawn_blocking(|| NatsServer::start("")).await.unwrap();
        let client = async_nats::connect(server.url()).await.unwrap();
        let mut everything = client.subscribe(">").await.unwrap();
        client.flush().await.unwrap();
        let seen = Arc::<Mutex<Vec<_>>>::default();
        let heard = Arc::clone(&seen);
        tokio::spawn(async move {
            // With the client, which ends otherwise.
            let _client = client;
            while let Some(message) = everything.next().await {
                let head = format!("{} {:?} {:?}\n", message.subject, message.reply, message.headers);
                let bytes = [head.as_bytes(), &message.payload].concat();
                heard.lock().unwrap().push((message.subject.to_string(), bytes));
            }
        });
        Self { server, seen }
    }
}

/// The deployment with all that belongs to it.
struct World {
    data: Data,
    bus: Option<Bus>,
    collector: Collector,
    collector_key: String,
    registry: registry::Registry,
    authorization: Authorization,
    plain: Remote,
    guarded: Remote,
    places: Places,
    secrets: Canaries,
    arguments: Canaries,
    /// The digests of what users' servers must have been given, by user, server, and name.
    expected: BTreeMap<(String, String, String), String>,
    /// Tokens that the authorization server made.
    minted: Vec<Tokens>,
}

impl World {
    async fn new() -> Self {
        let authorization = Authorization::start_with(Settings::default());
        let guarded = Remote::start(FIXTURE, &["--auth", &authorization.issuer()]);
        let mut secrets = Canaries::new();
        Self {
            data: Data::new(),
            bus: if crate::CLUSTER { Some(Bus::start().await) } else { None },
            collector: Collector::start().await,
            collector_key: secrets.value(Shape::Token),
            registry: packages::registry(),
            authorization,
            plain: Remote::start(FIXTURE, &[]),
            guarded,
            places: Places::default(),
            secrets,
            arguments: Canaries::new(),
            expected: BTreeMap::new(),
            minted: Vec::new(),
        }
    }

    async fn start(&self) -> Deployment {
        let mut builder = packages::from(&self.registry).data(&self.data).env("RUST_LOG", "trace");
        builder = builder.env("EGRESS_ALLOW", "127.0.0.0/8");
        builder = builder.env("OTEL_EXPORTER_OTLP_ENDPOINT", self.collector.url());
        builder = builder.env("OTEL_EXPORTER_OTLP_HEADERS", format!("x-key={}", self.collector_key));
        if let Some(bus) = &self.bus {
            builder = builder.env("NATS_URL", bus.server.url());
        }
        builder.start().await
    }

    /// Keeps an answer for the search.
    fn note(&mut self, what: &str, answer: Answer) -> Answer {
        self.places.add(format!("answer to {what}"), format!("{:?}\n{}", answer.headers, answer.text));
        answer
    }

    /// The same of an administrator's answer, who reads back what the record has. Everything else in it counts.
    fn note_record(&mut self, what: &str, answer: Answer) -> Answer {
        let mut document = answer.json();
        without_settings(&mut document);
        self.places.add(format!("record in {what}"), format!("{:?}\n{document}", answer.headers));
        answer
    }

    fn secret(&mut self) -> String {
        let shapes = [Shape::Token, Shape::Quoted, Shape::Lines, Shape::Address];
        let shape = shapes[self.secrets.made() % shapes.len()];
        self.secrets.value(shape)
    }

    fn token(&mut self) -> String {
        self.secrets.value(Shape::Token)
    }

    async fn set(&mut self, api: &Deployment, user: &str, server: &str, name: &str) {
        let value = self.secret();
        let digest = Sha256::digest(&value).iter().map(|byte| format!("{byte:02x}")).collect();
        let answer = api.set_secret(user, server, name, &value).await.ok();
        self.note("a secret", answer);
        self.expected.insert((user.to_owned(), server.to_owned(), name.to_owned()), digest);
    }

    /// Registers servers and gives users secrets.
    async fn furnish(&mut self, api: &Deployment) {
        let env = json!({"SERVICE_TOKEN": self.token(), "DB_PASSWORD": self.token()});
        let shared =
            api.register_fixture("shared", &["--more", "--tell", "SERVICE_TOKEN"], json!({ "env": env }));
        self.note_record("shared", shared.await.ok());
        let keyed = json!({"isolation": "per_user", "secretEnv": {"SERVICE_KEY": "API_KEY"}});
        let own = api.register_fixture("own", &["--more", "--tell", "SERVICE_KEY"], keyed.clone());
        self.note_record("own", own.await.ok());
        // They say what they know and do not start.
        let flags = ["--exit-at-start", "7", "--tell", "SERVICE_KEY"];
        let broken = api.register_fixture("broken", &flags, json!({"env": {"SERVICE_KEY": self.token()}}));
        self.note_record("broken", broken.await.ok());
        self.note_record("broken-own", api.register_fixture("broken-own", &flags, keyed).await.ok());

        let headers = json!({"X-Api-Key": self.token(), "Authorization": format!("Bearer {}", self.token())});
        let plain = json!({"name": "plain", "transportType": "streamable_http", "url": self.plain.url(),
            "headers": headers, "sessionId": self.token()});
        self.note_record("plain", api.post("/mcp/servers", &plain).await.ok());
        let client_secret = self.token();
        self.authorization.add_client("client", Some(&client_secret), &["https://example.com/back"]);
        let guarded = json!({"name": "guarded", "transportType": "streamable_http", "url": self.guarded.url(),
            "oauthClient": {"clientId": "client", "clientSecret": client_secret}});
        self.note_record("guarded", api.post("/mcp/servers", &guarded).await.ok());

        for user in USERS {
            for name in SPOKEN {
                self.set(api, user, "shared", name).await;
            }
            self.set(api, user, "own", "API_KEY").await;
            self.set(api, user, "broken-own", "API_KEY").await;
            self.set(api, user, "plain", "message").await;
        }
        // Three log in elsewhere. The tokens of one are good, until they are not.
        for (at, user) in USERS.into_iter().take(3).enumerate() {
            let mut login = json!({"username": user, "accessToken": self.token(), "refreshToken": self.token(),
                "codeVerifier": self.token(), "clientId": "client", "clientSecret": client_secret,
                "redirectUri": "https://example.com/back", "expiresIn": 3_600});
            if at == 0 {
                let minted = self.authorization.mint("client", user, Some(&self.guarded.url()));
                login["accessToken"] = minted.access.clone().into();
                login["refreshToken"] = minted.refresh.clone().into();
                self.minted.push(minted);
            }
            let answer = api.post("/mcp/servers/guarded/oauth", &login).await.ok();
            self.note("tokens", answer);
        }
    }

    /// Every server was given what it is for, which shows that the secrets are under way.
    async fn everybody_has_their_own(&mut self, api: &Deployment) {
        for ((user, server, name), digest) in self.expected.clone() {
            let of = if server == "own" { "SERVICE_KEY".to_owned() } else { name };
            if server == "broken-own" {
                continue;
            }
            let answer = api.call_as(&user, &server, "digest", json!({ "of": of })).await;
            assert_eq!(answer.tool_text(), digest, "{user} at {server}");
            self.note("digest", answer);
        }
    }

    /// Calls of one user that go wrong in every way there is.
    async fn fail(&mut self, api: &Deployment, user: &str) {
        let said = self.arguments.value(Shape::Quoted);
        for (server, tool, args) in [
            ("shared", "log_secret", json!({})),
            ("shared", "log_env", json!({"name": "SERVICE_TOKEN"})),
            ("shared", "log_env", json!({"name": "DB_PASSWORD"})),
            ("shared", "stderr", json!({"lines": 3})),
            ("shared", "fail", json!({ "said": said })),
            ("shared", "raw", json!({"answer": true})),
            ("shared", "rpc_error", json!({"code": -32000, "data": {"x": 1}})),
            ("shared", "rpc_error", json!({"code": -32602})),
            ("shared", "rpc_error", json!({"code": -32601})),
            ("shared", "no_such_tool", json!({ "said": said })),
            ("shared", "remember", json!({ "value": said })),
            ("shared", "garbage", json!({"lines": 3})),
            ("own", "log_env", json!({"name": "SERVICE_KEY"})),
            ("own", "log_secret", json!({})),
            ("broken", "echo", json!({ "text": said })),
            ("broken-own", "echo", json!({ "text": said })),
            ("plain", "rpc_error", json!({"code": -32000, "said": said})),
            ("guarded", "fail", json!({ "said": said })),
            ("nobody", "echo", json!({ "text": said })),
        ] {
            let answer = api.call_as(user, server, tool, args).await;
            assert!(answer.status < 500 || answer.code() != "internal", "{server} {tool}: {}", answer.text);
            self.note(&format!("{tool} of {server}"), answer);
        }
        let call = |tool: &str, args: Value| -> RequestBuilder {
            let body = json!({"username": user, "serverName": "shared", "methodName": tool, "args": args});
            api.request(Method::POST, "/mcp/tool/call").json(&body)
        };
        // It is late, it is cancelled, it is followed, it has a name.
        let late = call("hang", json!({ "said": said })).header("X-Request-Timeout-Ms", "200");
        self.note("a late call", api.send(late).await.fails(504, "deadline_exceeded"));
        let leaving =
            call("cancellable", json!({"ms": 20_000, "said": said})).timeout(Duration::from_millis(300));
        assert!(leaving.send().await.is_err());
        let events = call("rpc_error", json!({"code": -32000})).header("Accept", "text/event-stream");
        self.note("events", api.send(events).await);
        for _ in 0..2 {
            let named = call("digest", json!({"of": "token"})).header("Idempotency-Key", "a-name");
            self.note("a named call", api.send(named).await.ok());
        }
        // What is no request.
        let types = json!({"username": user, "serverName": "shared", "methodName": "echo", "args": [said]});
        self.note("a list", api.post("/mcp/tool/call", &types).await.fails(400, "invalid_request"));
        let cut_off =
            format!(r#"{{"serverName":"shared","methodName":"echo","args":{{"text":{}"#, json!(said));
        for path in ["/mcp/tool/call", "/secrets/set", "/mcp/servers"] {
            let request = api.request(Method::POST, path).header("Content-Type", "application/json");
            self.note(
                "half a document",
                api.send(request.body(cut_off.clone())).await.fails(400, "invalid_json"),
            );
        }
        let (name, value) = (said.clone(), self.secret());
        for body in [
            json!({"username": user, "serverName": "shared", "secretName": "$", "secretValue": value}),
            json!({"username": user, "serverName": "nobody", "secretName": "K", "secretValue": value}),
            json!({"username": user, "serverName": "shared", "secretName": "K", "secretValue": [value]}),
            json!({"username": [value], "serverName": "shared", "secretName": name, "secretValue": value}),
        ] {
            self.note("a refused secret", api.post("/secrets/set", &body).await);
        }
        // In the end, and not for everybody: whoever crashes often waits longer to be started again.
        if USERS[..2].contains(&user) {
            for server in ["shared", "own"] {
                let answer = api.call_as(user, server, "crash", json!({ "said": said })).await;
                self.note("a crash", answer.fails(502, "server_crashed"));
            }
        }
    }

    /// Packages that cannot be installed, with secrets for the servers that they would be.
    async fn fail_to_install(&mut self, api: &Deployment) {
        for (name, fault) in [
            ("@acme/clock", registry::Fault::Status(500)),
            ("@acme/clock", registry::Fault::Garbage),
            ("@acme/clock", registry::Fault::Corrupt),
            ("no-such-package", registry::Fault::None),
        ] {
            self.registry.fault(fault);
            let body = json!({"name": name, "serverName": "clock", "env": {"CLOCK_TOKEN": self.token()}});
            let answer = packages::install(api, body).await;
            assert_ne!(answer.status, 200, "{fault:?}: {}", answer.text);
            self.note("a failed installation", answer);
        }
        self.registry.fault(registry::Fault::None);
        let body =
            json!({"name": "@acme/clock", "serverName": "clock", "env": {"CLOCK_TOKEN": self.token()}});
        self.note_record("an installation", packages::install(api, body).await.ok());
        self.registry.fault(registry::Fault::Status(503));
        self.note_record(
            "an upgrade",
            api.put("/packages/clock/upgrade", Some(&json!({"version": "2.0.0"}))).await,
        );
        for path in ["/packages", "/packages/jobs", "/packages/by-id/clock", "/packages/updates"] {
            self.note(path, api.get(path).await);
        }
    }

    /// Logins that are refused, refreshed, and over.
    async fn lose_logins(&mut self, api: &Deployment) {
        let secret = self.token();
        let told = json!({"error": "invalid_grant", "error_description": secret, "access_token": secret});
        let echo = async |user: &str| api.call_as(user, "guarded", "echo", json!({"text": "hi"})).await;
        self.note("a good token", echo(USERS[0]).await.ok());
        self.authorization.expire_all();
        self.note("a refreshed token", echo(USERS[0]).await.ok());
        self.authorization.fault("/token", Some(Fault::Says(400, told.to_string())));
        self.authorization.revoke_all();
        for user in USERS {
            self.note("no good token", echo(user).await.fails(401, "reauth_required"));
        }
        self.authorization.fault("/token", None);
        self.note("a forgotten login", api.delete("/mcp/servers/guarded/oauth?username=anna").await.ok());
    }

    /// Servers that are killed, changed, switched off and on.
    async fn restart_servers(&mut self, api: &Deployment) {
        for server in ["shared", "own"] {
            for pid in api.pids(server).await {
                // It may be on its way out already.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let change =
            json!({"env": {"SERVICE_TOKEN": self.token(), "DB_PASSWORD": self.token(), "MORE": "x"}});
        self.note_record("a change", api.put("/mcp/servers/shared", Some(&change)).await.ok());
        let refused = json!({"env": {"SERVICE_TOKEN": [self.token()]}, "headers": {"X": self.token()}});
        self.note("a refused change", api.put("/mcp/servers/shared", Some(&refused)).await);
        let refused = json!({"headers": {"Authorization": format!("{}\r\nX: y", self.token())}});
        self.note("a refused header", api.put("/mcp/servers/plain", Some(&refused)).await);
        for verb in ["disable", "enable"] {
            let answer = api.put(&format!("/mcp/servers/shared/{verb}"), None).await.ok();
            self.note_record(verb, answer);
        }
    }

    /// Everything that can be read from outside while the programs run.
    async fn look_around(&mut self, api: &Deployment, when: &str) {
        for path in [
            "/mcp/servers",
            "/mcp/servers/shared",
            "/mcp/servers/own",
            "/mcp/servers/broken",
            "/mcp/servers/broken-own",
            "/mcp/servers/plain",
            "/mcp/servers/guarded",
        ] {
            self.note_record(path, api.get(path).await.ok());
        }
        for path in ["/mcp/tools", "/fleet", "/healthz", "/readyz", "/mcp/servers/own/delete-impact"] {
            self.note(path, api.get(path).await.ok());
        }
        for _ in 0..2 {
            self.note("/metrics", api.get("/metrics").await.ok());
        }
        for worker in api.workers() {
            let metrics =
                reqwest::get(format!("{}/metrics", worker.base)).await.unwrap().text().await.unwrap();
            self.places.add(format!("metrics of {}", worker.id), metrics);
        }
        for (table, rows) in stored::everything(&self.data).await {
            self.places.add(format!("{when}: stored in {table}"), rows.join("\n"));
        }
        let ours: Vec<_> = supervisors(&api.programs());
        assert!(!ours.is_empty(), "the programs have helpers, which have environments");
        self.places.add_processes(&[api.programs(), ours].concat());
        self.places.add_files(when, self.data.path());
    }
}

/// Takes what an administrator reads back out of a document.
fn without_settings(document: &mut Value) {
    match document {
        Value::Object(fields) => {
            fields.remove("env");
            fields.remove("headers");
            fields.values_mut().for_each(without_settings);
        }
        Value::Array(items) => items.iter_mut().for_each(without_settings),
        _ => {}
    }
}

/// Processes that the programs have of themselves: those that they started, but for servers.
fn supervisors(programs: &[i32]) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
        let (stat, words) = (read("stat"), read("cmdline"));
        let (stat, words) = (String::from_utf8_lossy(&stat), String::from_utf8_lossy(&words));
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        if parent.is_some_and(|parent: i32| programs.contains(&parent)) && !words.contains(FIXTURE) {
            found.push(pid);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stdout, reason = "how much was searched is worth reading")]
async fn fifty_secrets_are_found_nowhere_but_in_their_servers() {
    let mut world = World::new().await;
    let api = world.start().await;
    world.furnish(&api).await;
    world.everybody_has_their_own(&api).await;
    world.look_around(&api, "at first").await;
    for user in USERS {
        world.fail(&api, user).await;
    }
    world.fail_to_install(&api).await;
    world.lose_logins(&api).await;
    world.restart_servers(&api).await;
    eventually("everybody is served again", async || {
        api.call_as(USERS[0], "shared", "digest", json!({"of": "token"})).await.status == 200
    })
    .await;
    world.everybody_has_their_own(&api).await;
    let logs = api.server("shared").await["logs"].to_string() + &api.server("own").await["logs"].to_string();
    assert!(logs.contains("[secret]"), "what servers said is kept without the values: {logs}");
    world.look_around(&api, "at last").await;
    world.places.add("the programs' logs", api.log());
    assert!(api.log().contains("\"DEBUG\""), "the programs were to say all that they can");
    assert!(!api.log().contains("panicked"));
    api.stop().await;
    world.places.add_files("stopped", world.data.path());

    // Once more, with what was stored.
    let api = world.start().await;
    eventually("the server is there", async || {
        api.call_as(USERS[0], "shared", "digest", json!({"of": "token"})).await.status == 200
    })
    .await;
    world.everybody_has_their_own(&api).await;
    for user in USERS {
        let body = json!({"username": user, "serverName": "shared", "secretName": "token"});
        world.note("a deleted secret", api.post("/secrets/delete", &body).await.ok());
    }
    for server in ["own", "plain", "broken"] {
        world.note("a deleted server", api.delete(&format!("/mcp/servers/{server}")).await.ok());
    }
    api.stop().await;
    world.places.add_files("in the end", world.data.path());

    let World { mut places, bus, collector, collector_key, secrets, arguments, minted, data, .. } = world;
    assert!(secrets.made() >= SECRETS, "only {} secrets", secrets.made());
    if let Some(bus) = bus {
        let seen = std::mem::take(&mut *bus.seen.lock().unwrap());
        println!("{} messages", seen.len());
        for (subject, message) in seen {
            places.add(format!("bus: {subject}"), message);
        }
    }
    assert!(collector.keys().iter().all(|key| *key == collector_key), "the credential was sent");
    let batches = collector.bodies();
    println!("{} batches of spans", batches.len());
    for batch in batches {
        places.add("traces", batch);
    }
    let minted: Vec<_> = minted
        .iter()
        .flat_map(|tokens| [Some(tokens.access.as_str()), tokens.refresh.as_deref()])
        .flatten()
        .collect();
    let all = [vec![secrets.mark()], minted].concat();
    let found = places.find(&all, &[]);
    assert!(found.is_empty(), "{} places:\n{}", found.len(), found.join("\n"));
    // What callers say is theirs, and goes to whom it is for.
    let found = places.find(&[arguments.mark()], &["bus: "]);
    assert!(found.is_empty(), "{} places:\n{}", found.len(), found.join("\n"));

    // The search finds what is there.
    assert_eq!(places.find(&[arguments.mark()], &[]).is_empty(), !crate::CLUSTER, "arguments are on the bus");
    assert!(places.named("at last: ").any(|text| text.contains("duration_ms")), "logs are among the files");
    assert!(places.named("traces").any(|text| text.contains("error.type")), "failures are among the spans");
    assert!(
        places.named("at last: stored in ").any(|text| text.contains("$mg1$")),
        "what is stored is searched"
    );
    for (name, written) in [
        ("plain", format!("said {}", secrets.mark())),
        ("backwards", secrets.mark().chars().rev().collect()),
        ("json", json!({"a": format!("{}\n", secrets.mark())}).to_string()),
    ] {
        std::fs::write(data.path().join(name), written).unwrap();
    }
    let mut proof = Places::default();
    proof.add_files("proof", data.path());
    assert_eq!(proof.find(&[secrets.mark()], &[]).len(), 3);
}
