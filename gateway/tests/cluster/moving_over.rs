//! A database of mcp-api, taken over, gone back from, and taken over for good. Its values are encrypted and decrypted
//! here as mcp-api does it, by Node's own library.

use std::{
    collections::BTreeMap,
    io::Write,
    process::{Command, Output, Stdio},
};

use mcp_shared::testing::{
    authorization::{Authorization, Settings},
    registry::python_server,
    remote::Remote,
};
use mongodb::{
    Database,
    bson::{Bson, DateTime, Document, doc, oid::ObjectId},
};
use serde_json::{Value, json};

use crate::{
    FIXTURE,
    deployment::{Builder, Data, Deployment, eventually, fixture},
    packages::{from, registry, version},
};

/// What mcp-api encrypts with if nobody ever set anything.
const KEY: &str = "secret";
/// What Google gives to an application.
const CREDENTIALS: &str = r#"{"web":{"client_id":"app.example","client_secret":"of the application"}}"#;
/// What mcp-api keeps of a user's login there.
const AT_GOOGLE: &str = r#"{"access_token":"ya29.alice","refresh_token":"1//alice"}"#;
/// A key ring of ours.
const RING: &str = "main:obLD1OX2BxgpOktcbX6PkKq7zN0RIjNEASPtzf5FZ7o=\n";

/// Has Node do something to each text: `encrypt` or `decrypt`, with a passphrase, as mcp-api's source has it.
fn node(work: &str, key: &str, texts: &[String]) -> Vec<String> {
    const SCRIPT: &str = r#"
        const crypto = require('crypto');
        const [work, passphrase] = process.argv.slice(1);
        const key = crypto.createHash('sha256').update(passphrase).digest();
        const encrypt = (text) => {
            const iv = crypto.randomBytes(12);
            const cipher = crypto.createCipheriv('aes-256-gcm', key, iv);
            const body = cipher.update(text, 'utf8', 'hex') + cipher.final('hex');
            return `${iv.toString('hex')}:${cipher.getAuthTag().toString('hex')}:${body}`;
        };
        const decrypt = (text) => {
            const parts = text.split(':');
            if (parts.length !== 3) throw new Error('Invalid encrypted data format.');
            const decipher = crypto.createDecipheriv('aes-256-gcm', key, Buffer.from(parts[0], 'hex'));
            decipher.setAuthTag(Buffer.from(parts[1], 'hex'));
            return decipher.update(parts[2], 'hex', 'utf8') + decipher.final('utf8');
        };
        const texts = JSON.parse(require('fs').readFileSync(0, 'utf8'));
        console.log(JSON.stringify(texts.map(work === 'encrypt' ? encrypt : decrypt)));
    "#;
    let mut child = Command::new("node")
        .args(["-e", SCRIPT, "--", work, key])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(json!(texts).to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "Node does not {work} {texts:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn encrypted(text: &str) -> String {
    node("encrypt", KEY, &[text.to_owned()]).remove(0)
}

fn date() -> Bson {
    Bson::DateTime(DateTime::now())
}

/// Everything that a database holds, with its indexes.
async fn everything(database: &Database) -> BTreeMap<String, Vec<String>> {
    let mut all = BTreeMap::new();
    for name in database.list_collection_names().await.unwrap() {
        let rows = database.collection::<Document>(&name);
        let mut texts: Vec<String> = rows.list_index_names().await.unwrap();
        let mut cursor = rows.find(doc! {}).await.unwrap();
        while cursor.advance().await.unwrap() {
            texts.push(format!("{:?}", cursor.deserialize_current().unwrap()));
        }
        texts.sort();
        all.insert(name, texts);
    }
    all
}

/// What remote servers know of a user who came by way of mcp-api.
struct Elsewhere {
    authorization: Authorization,
    guarded: Remote,
    /// Says nothing of its authorization server.
    silent: Remote,
    open: Remote,
    session: String,
}

impl Elsewhere {
    async fn new() -> Self {
        let authorization = Authorization::start_with(Settings::default());
        authorization.add_client("client", Some("client-secret"), &["https://example.com/back"]);
        let guarded = Remote::start(FIXTURE, &["--auth", &authorization.issuer()]);
        let silent = ["--auth", &authorization.issuer(), "--bare-challenge", "--metadata-at", "/nowhere"]
            .map(str::to_owned);
        let silent = Remote::start(FIXTURE, &silent.each_ref().map(String::as_str));
        let open = Remote::start(FIXTURE, &[]);
        let client = crate::deployment::client();
        let post = async |session: Option<&str>, body: Value| {
            let mut request = client.post(open.url()).json(&body);
            request = request.header("Accept", "application/json, text/event-stream");
            if let Some(session) = session {
                request =
                    request.header("Mcp-Session-Id", session).header("MCP-Protocol-Version", "2025-06-18");
            }
            request.send().await.unwrap()
        };
        let hello = json!({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "mcp-api", "version": "1"}}});
        let answer = post(None, hello).await;
        let session = answer.headers()["mcp-session-id"].to_str().unwrap().to_owned();
        post(Some(&session), json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
        Self { authorization, guarded, silent, open, session }
    }
}

/// Writes a database as mcp-api 1.11 does, by its documents' fields and types: also what goes wrong in it over time.
async fn fill(database: &Database, elsewhere: &Elsewhere) {
    let base = |name: &str| {
        doc! {
            "_id": ObjectId::new(), "name": name, "displayName": name, "description": "", "source": "platform",
            "authMode": "none", "secretFields": [], "homepageUrl": Bson::Null, "repositoryUrl": Bson::Null,
            "createdBy": Bson::Null, "createdAt": date(), "updatedAt": date(), "startupTimeout": Bson::Null,
            "status": "connected", "enabled": true,
        }
    };
    let own = fixture("", &["--more"]);
    let arguments: Vec<&str> =
        own["args"].as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect();
    let stdio = |name: &str, command: &str, args: &[&str], enabled: bool| {
        let mut server = base(name);
        let env = doc! { "API_KEY": "in clear" };
        server.extend(doc! { "transportType": "stdio", "command": command, "args": args, "env": env });
        server.insert("secretName", "K");
        server.insert("enabled", enabled);
        server
    };
    let remote = |name: &str, url: String| {
        let mut server = base(name);
        server.extend(doc! { "transportType": "streamable_http", "url": url, "source": "external" });
        server
    };
    let program = own["command"].as_str().unwrap();
    let entry = "./packages/acme-clock/node_modules/@acme/clock/cli.js";
    // As it starts a virtual environment, by the paths of its own machine.
    let venv = "/srv/mcp-api/packages/python/tick";
    let mut tick = stdio("tick", &format!("{venv}/bin/python"), &["-u", "-m", "tick_tock"], true);
    let path = format!("{venv}/bin:/usr/local/bin:/usr/bin:/bin");
    tick.insert("env", doc! { "PATH": path, "VIRTUAL_ENV": venv, "PYTHONUNBUFFERED": "1" });
    let mut silent = remote("silent", elsewhere.silent.url());
    let issuer = elsewhere.authorization.issuer();
    let template = doc! {
        "authorizationServerIssuer": &issuer, "authorizationServerMetadataUrl": "", "resourceUri": elsewhere.silent.url(),
        "authorizationEndpoint": format!("{issuer}/authorize"), "tokenEndpoint": format!("{issuer}/token"),
        "codeChallengeMethodsSupported": ["S256"], "pkceRequired": true, "discoveryMode": "manual",
        "registrationMode": "manual", "registrationEndpoint": Bson::Null,
    };
    silent.insert("oauthTemplate", template);
    let mut workspace = stdio("workspace", program, &arguments, true);
    workspace.insert("secretName", Bson::Null);
    workspace.insert("env", doc! { "MCP_AUTH_TYPE": "OAUTH2_GOOGLE" });
    let mut asking = remote("asking", elsewhere.open.url());
    asking.insert("secretFields", vec![doc! { "name": "apiKey", "label": "apiKey", "required": true }]);
    asking.insert("enabled", false);
    database
        .collection("mcp")
        .insert_many([
            stdio("echo", program, &arguments, true),
            stdio("git", program, &arguments, false),
            stdio("git.hub", program, &arguments, false),
            stdio("shell", "sh", &["-c", "true"], false),
            stdio("clock", "node", &[entry], true),
            stdio("clock-two", "node", &[entry], false),
            tick,
            doc! { "name": "damaged", "command": 7 },
            remote("guarded", elsewhere.guarded.url()),
            remote("open", elsewhere.open.url()),
            silent,
            workspace,
            asking,
        ])
        .await
        .unwrap();
    let package = |name: &str, server: Bson| {
        doc! {
            "name": name, "version": "1.0.0", "installPath": "packages/acme-clock", "status": "installed",
            "installed": date(), "main": Bson::Null, "error": Bson::Null, "mcpServerId": server, "enabled": true,
        }
    };
    let mut python = package("tick-tock", "tick".into());
    for (field, value) in
        [("version", "1.0"), ("installPath", "packages/python/tick"), ("venvPath", "packages/python/tick")]
    {
        python.insert(field, value);
    }
    python.extend(doc! { "runtime": "python", "pythonModule": "tick_tock", "pythonArgs": Bson::Null });
    let packages = [package("@acme/clock", "clock".into()), package("@acme/never", Bson::Null), python];
    database.collection("packages").insert_many(packages).await.unwrap();
    let foreign = node("encrypt", "another key", &["lost".to_owned()]).remove(0);
    let secret = |user: &str, key: &str, value: String| doc! { "username": user, "key": key, "value": value };
    database
        .collection("secrets")
        .insert_many([
            secret("alice", "echo.K", encrypted("the older one")),
            secret("alice", "echo.K", encrypted("žluťoučký kůň")),
            secret("bob", "echo.K", foreign),
            secret("alice", "git.hub.TOKEN", encrypted("whose")),
            secret("alice", "UNPREFIXED", encrypted("of no server")),
            secret("alice", "google_tokens", encrypted(AT_GOOGLE)),
        ])
        .await
        .unwrap();
    for (server, remote) in [("guarded", &elsewhere.guarded), ("silent", &elsewhere.silent)] {
        let tokens = elsewhere.authorization.mint("client", "alice", Some(&remote.url()));
        let row = doc! {
            "serverName": server, "username": "alice", "tokenType": "Bearer", "accessToken": encrypted(&tokens.access),
            "refreshToken": encrypted(tokens.refresh.as_deref().unwrap()), "expiresAt": Bson::Null, "scopes": ["tools"],
            "clientId": "client", "clientSecret": encrypted("client-secret"), "redirectUri": "https://example.com/back",
            "codeVerifier": Bson::Null, "tokenEndpointAuthMethod": "client_secret_basic", "registrationMode": "manual",
            "createdAt": date(), "updatedAt": date(),
        };
        database.collection("mcpOAuthTokens").insert_one(row).await.unwrap();
    }
    let registration = |origin: &str| {
        doc! {
            "issuer": &issuer, "publicApiOrigin": origin, "redirectUri": "https://example.com/back",
            "clientName": "MissionSquad", "registrationEndpoint": format!("{issuer}/register"),
            "tokenEndpointAuthMethod": "client_secret_basic", "clientId": origin, "clientSecret": encrypted(origin),
            "registrationAccessToken": encrypted("manages it"), "grantTypes": ["authorization_code"],
            "responseTypes": ["code"], "createdAt": date(), "updatedAt": date(),
        }
    };
    let registrations = ["https://old.example", "https://new.example"].map(registration);
    database.collection("mcpDcrClients").insert_many(registrations).await.unwrap();
    let session = doc! {
        "serverName": "open", "username": "alice", "sessionId": &elsewhere.session, "updatedAt": date(),
    };
    database.collection("mcpUserSessions").insert_one(session).await.unwrap();
    let install = doc! {
        "serverName": "guarded", "username": "alice", "enabled": true, "authState": "connected",
        "oauthClientId": "client", "oauthClientSecret": "client-secret", "oauthScopes": Bson::Null,
        "lastAuthError": Bson::Null, "createdAt": date(), "updatedAt": date(),
    };
    database.collection("mcpUserServerInstalls").insert_one(install).await.unwrap();
    let state = doc! { "firstRunCompleted": true, "installedPackages": Vec::<Bson>::new() };
    database.collection("appState").insert_one(state).await.unwrap();
    database.collection("somebodyElses").insert_one(doc! { "a": 1 }).await.unwrap();
}

async fn run(builder: Builder, arguments: &[&str]) -> Output {
    let mut command = builder.command();
    command.args(arguments);
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

async fn migrate(builder: Builder, arguments: &[&str]) -> (Option<i32>, Value) {
    let output = run(builder, &[&["migrate", "--json"], arguments].concat()).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for secret in ["in clear", "client-secret", "žluťoučký", "the older one"] {
        assert!(!said.contains(&format!(": {secret}")) && !said.contains(&format!("\"{secret}")), "{said}");
    }
    let report = serde_json::from_str(&said)
        .unwrap_or_else(|_| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
    (output.status.code(), report)
}

/// The note that says this, if there is one.
fn note<'a>(report: &'a Value, text: &str) -> Option<&'a Value> {
    let notes = report["notes"].as_array().unwrap();
    let whole = notes.iter().find(|note| note["text"] == text);
    whole.or_else(|| notes.iter().find(|note| note["text"].as_str().unwrap().contains(text)))
}

#[tokio::test]
async fn a_database_of_mcp_api_moves_over_and_back_and_over() {
    let (registry, data) = (registry(), Data::new());
    for version in ["1.0", "1.1"] {
        let files = [("tick_tock/__init__.py", ""), ("tick_tock/__main__.py", &python_server(version))];
        registry.add_python("tick-tock", version, &files);
    }
    let elsewhere = Elsewhere::new().await;
    let client = mongodb::Client::with_uri_str(data.mongo()).await.unwrap();
    let database = client.database(data.name());
    fill(&database, &elsewhere).await;
    let with = || {
        let with = from(&registry).data(&data).alone().env("SECRETS_KEY", KEY);
        with.env("GOOGLE_OAUTH_CREDENTIALS", CREDENTIALS)
    };

    // What would be done is said, and nothing is done.
    let before = everything(&database).await;
    let (status, report) = migrate(with(), &["--dry-run"]).await;
    assert_eq!(everything(&database).await, before);
    assert_eq!((status, &report["legacyMode"]), (Some(1), &json!("rw")), "{report:#}");
    let expected: [(&str, &str, u64, &str); 20] = [
        ("kept", "servers", 12, ""),
        ("kept", "packages", 3, ""),
        ("kept", "scaling: singleton", 12, ""),
        ("kept", "values in clear (variables", 10, ""),
        ("kept", "users' tokens for Google", 1, "alice"),
        ("kept", "registrations with authorization servers", 2, ""),
        ("kept", "names that new ones cannot have", 1, "git.hub"),
        ("kept", "installs of servers by their users", 1, ""),
        ("kept", "collections that this version does not use", 1, "somebodyElses"),
        ("changed", "stored twice", 1, "secret echo.K of alice"),
        ("later", "workers install anew", 2, "@acme/clock@1.0.0 of clock"),
        ("changed", "OAuth tokens that get a field", 2, ""),
        ("changed", "unique indexes", 12, ""),
        ("attention", "does not decrypt", 1, "secret echo.K of bob (tag_mismatch)"),
        ("attention", "fits several servers", 1, "secret git.hub.TOKEN of alice: git.hub"),
        ("attention", "secrets of no registered server", 1, "UNPREFIXED"),
        ("attention", "cannot be read", 1, "damaged"),
        ("attention", "could not be registered today", 1, "shell"),
        ("attention", "without having its record", 1, "clock-two"),
        ("attention", "into the query of the URL", 1, "asking"),
    ];
    for (fate, text, count, name) in expected {
        let found = note(&report, text).unwrap_or_else(|| panic!("no {text}: {report:#}"));
        assert_eq!((&found["fate"], &found["count"]), (&json!(fate), &json!(count)), "{found:#}");
        assert!(found.to_string().contains(name), "{found:#}");
    }
    let shown = run(with(), &["migrate", "--dry-run"]).await;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("\nkept\n") && shown.contains("Nothing was changed."), "{shown}");

    // It starts, and everything works: with its packages, secrets, tokens and sessions.
    let api = with().start().await;
    let told = api.call_as("alice", "echo", "args", json!({})).await.tool_text();
    assert_eq!(told, r#"{"K":"žluťoučký kůň"}"#);
    api.call_as("bob", "echo", "args", json!({})).await.fails(500, "secret_integrity");
    for (server, expected) in [("clock", "1.0.0"), ("tick", "1.0")] {
        eventually("the package is installed here", async || {
            api.call(server, "version", json!({})).await.status == 200
        })
        .await;
        assert_eq!(version(&api, server).await, expected);
    }
    let text = json!({"text": "hi"});
    assert_eq!(api.call_as("alice", "open", "echo", text.clone()).await.tool_text(), "hi");
    let called: Vec<_> = elsewhere.open.seen().into_iter().filter(|seen| seen.is("tools/call")).collect();
    assert_eq!(called[0].header("mcp-session-id"), elsewhere.session, "the session goes on");
    assert_eq!(api.call_as("alice", "guarded", "echo", text.clone()).await.tool_text(), "hi");
    elsewhere.authorization.expire_all();
    assert_eq!(api.call_as("alice", "guarded", "echo", text.clone()).await.tool_text(), "hi");
    assert_eq!(elsewhere.authorization.refreshes(), 1);
    assert_eq!(api.call_as("alice", "silent", "echo", text.clone()).await.tool_text(), "hi");
    assert_eq!(elsewhere.authorization.refreshes(), 2, "by what its record says");
    acts_at_google(&api).await;
    assert_eq!(api.server("echo").await["scaling"], "singleton");
    assert_eq!(api.server("echo").await["env"]["API_KEY"], "in clear");
    // What is written now mcp-api has to be able to read.
    api.set_secret("carol", "echo", "K", "new, and with ü").await.ok();
    api.put("/mcp/servers/echo", Some(&json!({"description": "changed", "env": {"API_KEY": "new"}})))
        .await
        .ok();
    assert_eq!(api.call_as("bob", "open", "echo", text.clone()).await.tool_text(), "hi");
    assert!(api.stop().await.success());

    reads_as_mcp_api_does(&database, &elsewhere).await;
    let (_, report) = migrate(with(), &[]).await;
    assert!(note(&report, "stored twice").is_none() && note(&report, "install anew").is_none(), "{report:#}");
    let (_, report) = migrate(with(), &["--dry-run"]).await;
    let changes = report["notes"].as_array().unwrap().iter().filter(|note| note["fate"] == "changed").count();
    assert_eq!(changes, 0, "{report:#}");
    reads_as_mcp_api_does(&database, &elsewhere).await;

    ended(&data, &database, &with).await;
}

/// A user who logged in to Google with mcp-api need not do so again.
async fn acts_at_google(api: &Deployment) {
    let told = api.call_as("alice", "workspace", "args", json!({})).await.tool_text();
    let [credentials, tokens]: [Value; 2] =
        [CREDENTIALS, AT_GOOGLE].map(|text| serde_json::from_str(text).unwrap());
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told, json!({"gauthFileContent": credentials, "userCredentials": tokens}));
    api.call_as("bob", "workspace", "args", json!({})).await.fails(401, "reauth_required");
    // No other server gets them.
    assert!(!api.call_as("alice", "echo", "args", json!({})).await.tool_text().contains("ya29"));
}

/// What is kept of both registrations, which only mcp-api tells apart.
async fn registrations(database: &Database) -> Vec<[String; 2]> {
    let rows = database.collection::<Document>("mcpDcrClients");
    let mut found = rows.find(doc! {}).sort(doc! { "clientId": 1 }).await.unwrap();
    let mut values = Vec::new();
    while found.advance().await.unwrap() {
        let row = found.deserialize_current().unwrap();
        assert_eq!(row.get_str("clientId").unwrap(), row.get_str("publicApiOrigin").unwrap(), "{row}");
        values.push(
            ["clientSecret", "registrationAccessToken"].map(|field| row.get_str(field).unwrap().to_owned()),
        );
    }
    values
}

/// Goes back: reads every credential as mcp-api reads it.
async fn reads_as_mcp_api_does(database: &Database, elsewhere: &Elsewhere) {
    let one = async |collection: &str, filter: Document| {
        database.collection::<Document>(collection).find_one(filter).await.unwrap().unwrap()
    };
    let text = |row: &Document, field: &str| row.get_str(field).unwrap().to_owned();
    let mut values = Vec::new();
    for user in ["alice", "carol"] {
        values.push(text(&one("secrets", doc! { "username": user, "key": "echo.K" }).await, "value"));
    }
    let row = one("mcpOAuthTokens", doc! { "serverName": "guarded", "username": "alice" }).await;
    for field in ["clientSecret", "accessToken", "refreshToken"] {
        values.push(text(&row, field));
    }
    assert_eq!(text(&row, "tokenEndpointAuthMethod"), "client_secret_basic");
    assert!(row.get_datetime("updatedAt").is_ok() && row["codeVerifier"] == Bson::Null, "{row}");
    values.push(text(&one("secrets", doc! { "username": "alice", "key": "google_tokens" }).await, "value"));
    values.extend(registrations(database).await.concat());
    let clear = node("decrypt", KEY, &values);
    assert_eq!(
        clear[5..],
        [AT_GOOGLE, "https://new.example", "manages it", "https://old.example", "manages it"]
    );
    assert_eq!(clear[..3], ["žluťoučký kůň", "new, and with ü", "client-secret"]);
    assert_eq!(
        elsewhere.authorization.accepts(&clear[3]).as_deref(),
        Some("alice"),
        "the token that was refreshed"
    );
    // These mcp-api has in clear, also those that it did not write.
    for user in ["alice", "bob"] {
        let row = one("mcpUserSessions", doc! { "serverName": "open", "username": user }).await;
        assert!(text(&row, "sessionId").starts_with("session-"), "{row}");
    }
    let echo = one("mcp", doc! { "name": "echo" }).await;
    assert_eq!(echo.get_document("env").unwrap(), &doc! { "API_KEY": "new" });
    assert!(echo.get_datetime("createdAt").is_ok() && echo["startupTimeout"] == Bson::Null, "{echo}");
    assert_eq!(echo.get_array("secretNames").unwrap(), &["K".into()]);
    // Packages are started by the paths that they have over there.
    let tick = one("mcp", doc! { "name": "tick" }).await;
    assert_eq!(text(&tick, "command"), "/srv/mcp-api/packages/python/tick/bin/python");
    assert_eq!(text(tick.get_document("env").unwrap(), "VIRTUAL_ENV"), "/srv/mcp-api/packages/python/tick");
    let package = one("packages", doc! { "mcpServerId": "tick" }).await;
    assert_eq!(
        (text(&package, "venvPath").as_str(), text(&package, "version").as_str()),
        ("packages/python/tick", "1.0")
    );
    assert!(package.get_datetime("installed").is_ok(), "{package}");
    let install = one("mcpUserServerInstalls", doc! {}).await;
    assert_eq!(text(&install, "oauthClientSecret"), "client-secret");
}

/// Ends the legacy mode, after which rows of mcp-api are refused.
async fn ended(data: &Data, database: &Database, with: &dyn Fn() -> Builder) {
    let ring = data.path().join("ring");
    std::fs::write(&ring, RING).unwrap();
    let ring = ring.display().to_string();
    let reading = || with().env("SECRETS_KEYS_FILE", &ring).env("LEGACY_SECRETS", "ro");
    let api = reading().start().await;
    assert!(api.stop().await.success());
    let rewrapped = run(reading(), &["keys", "rewrap"]).await;
    let said = String::from_utf8_lossy(&rewrapped.stdout).into_owned();
    assert!(said.contains("echo.K"), "what cannot be decrypted is named: {said}");
    let without =
        || with().env("SECRETS_KEYS_FILE", &ring).env("SECRETS_KEY", "").env("LEGACY_SECRETS", "off");
    let api: Deployment = without().start().await;
    let told = api.call_as("alice", "echo", "args", json!({})).await.tool_text();
    assert_eq!(told, r#"{"K":"žluťoučký kůň"}"#);
    assert_eq!(api.server("echo").await["env"]["API_KEY"], "new");
    for (server, user) in [("guarded", "alice"), ("silent", "alice"), ("open", "bob")] {
        assert_eq!(
            api.call_as(user, server, "echo", json!({"text": "hi"})).await.tool_text(),
            "hi",
            "{server}"
        );
    }
    acts_at_google(&api).await;
    assert!(api.stop().await.success());
    let values = registrations(database).await.concat();
    assert!(values.len() == 4 && values.iter().all(|value| value.starts_with("$mg1$main$")), "{values:?}");
    let secrets = database.collection::<Document>("secrets");
    let planted = doc! { "$set": { "value": encrypted("planted") } };
    secrets.update_one(doc! { "username": "carol", "key": "echo.K" }, planted).await.unwrap();
    let api = without().start().await;
    // With a server goes all that is its own.
    api.delete("/mcp/servers/guarded").await.ok();
    for collection in ["mcpUserServerInstalls", "mcpOAuthTokens"] {
        let rows = database.collection::<Document>(collection);
        let left = rows.count_documents(doc! { "serverName": "guarded" }).await.unwrap();
        assert_eq!(left, 0, "{collection}");
    }
    api.call_as("carol", "echo", "args", json!({})).await.fails(500, "secret_integrity");
    let row = secrets.find_one(doc! { "username": "alice", "key": "echo.K" }).await.unwrap().unwrap();
    assert!(row.get_str("value").unwrap().starts_with("$mg1$main$"), "{row}");
    let echo =
        database.collection::<Document>("mcp").find_one(doc! { "name": "echo" }).await.unwrap().unwrap();
    assert!(echo.get_document("env").unwrap().get_str("API_KEY").unwrap().starts_with("$mg1$"), "{echo}");
}

/// A database that has tokens, or only variables in clear, is one of mcp-api as well.
#[tokio::test]
async fn what_mcp_api_left_is_recognised_by_any_of_it() {
    let data = Data::new();
    let client = mongodb::Client::with_uri_str(data.mongo()).await.unwrap();
    let own = fixture("", &["--more"]);
    let row = doc! {
        "name": "echo", "command": own["command"].as_str().unwrap(), "args": [own["args"][0].as_str().unwrap()],
        "env": { "A": "in clear" }, "status": "connected", "enabled": true,
    };
    client.database(data.name()).collection("mcp").insert_one(row).await.unwrap();
    let api = Deployment::builder().data(&data).alone().env("SECRETS_KEY", KEY).start().await;
    assert_eq!(api.server("echo").await["env"]["A"], "in clear");
    assert_eq!(api.call("echo", "echo", json!({"text": "here"})).await.tool_text(), "here");
}

#[tokio::test]
async fn only_a_mongodb_is_migrated() {
    let output = run(Deployment::builder().env("MONGODB_URI", "").env("NATS_URL", ""), &["migrate"]).await;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains("MONGO_HOST") && said.contains("SECRETS_KEY"), "{said}");
}
