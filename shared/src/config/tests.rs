use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use secrecy::ExposeSecret;

use super::*;

mod cluster;

fn pairs(env: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
    env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Vec<_>>().into_iter()
}

fn load(env: &[(&str, &str)]) -> Result<Settings, ConfigErrors> {
    Settings::load(pairs(env), None)
}

/// A `.env` file of this test process; `name` keeps tests apart.
struct EnvFile(PathBuf);

impl EnvFile {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mcp-config-{}-{name}.env", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn load(&self, env: &[(&str, &str)]) -> Result<Settings, ConfigErrors> {
        Settings::load(pairs(env), Some(&self.0))
    }
}

impl Drop for EnvFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn nothing_set_gives_the_defaults() {
    let settings = load(&[]).unwrap();
    assert_eq!(settings.host, ListenHost::Address(IpAddr::V4(Ipv4Addr::LOCALHOST)));
    assert_eq!((settings.port, &settings.auth, settings.debug), (8080, &Auth::Unset, false));
    assert_eq!(settings.data_dir, Path::new("./data"));
    assert_eq!(settings.payload_limit, 6 * 1024 * 1024);
    assert_eq!(settings.shutdown_timeout, Duration::from_secs(30));
    assert_eq!(settings.shutdown_notice, Duration::ZERO);
    assert_eq!(settings.limits, LimitSettings::default());
    assert_eq!(settings.log_format, LogFormat::Auto);
    assert!(settings.secrets_key.is_none() && settings.secrets_keys_file.is_none());
    assert!(settings.legacy.is_none() && settings.log_filter.is_none());
    assert!(settings.allowed_hosts.is_empty() && settings.allowed_origins.is_empty());
    assert!(settings.later.is_empty() && settings.warnings.is_empty());
    let servers: Vec<_> = settings.packages.install_on_start.iter().map(|one| one.server.as_str()).collect();
    assert_eq!(servers, ["github", "helper-tools"]);
    assert!(settings.remote.public_url.is_none() && settings.remote.google.is_none());
    assert!(settings.remote.egress.check("http://localhost").is_err());
    assert!(settings.packages.python_bin.is_none() && settings.packages.pip_index_url.is_none());
    let effective = settings.effective();
    assert_eq!(effective.len(), VARIABLES.len());
    assert!(effective.iter().all(|(_, _, origin)| *origin == Origin::Default));
}

#[test]
fn every_value_is_read() {
    let settings = load(&[
        ("HOST", "[::1]"),
        ("PORT", "0"),
        ("AUTH", "None"),
        ("ALLOWED_HOSTS", "Tools.Example.com, 10.0.0.7:8080,[FD00:0::1]:90,, mcp_api,mcp_api"),
        ("ALLOWED_ORIGINS", "https://App.example.com:443,http://localhost:3000,chrome-extension://abc"),
        ("PAYLOAD_LIMIT", "512KB"),
        ("MAX_CALLS", "100"),
        ("MAX_BODY_BYTES", "1.5gb"),
        ("USER_MAX_CALLS", "8"),
        ("USER_MAX_RATE", "0.5"),
        ("WORKER_MAX_CALLS", "200"),
        ("SERVER_QUEUE", "10"),
        ("RUNTIME_THREADS", "7"),
        ("SHUTDOWN_TIMEOUT_SECONDS", " 600 "),
        ("SHUTDOWN_NOTICE_SECONDS", "20"),
        ("DATA_DIR", "/srv/mcp data"),
        ("SECRETS_KEYS_FILE", "/run/keys"),
        ("LEGACY_SECRETS", "ro"),
        ("DEBUG", "YES"),
        ("LOG_FORMAT", "json"),
        ("RUST_LOG", "warn,mcp_gateway=trace"),
        ("INSTALL_ON_START", "@a/b|c, d|E_1,"),
        ("PYTHON_BIN", "/opt/python"),
        ("PYTHON_VENV_DIR", "/srv/venvs"),
        ("PIP_INDEX_URL", "https://user:canary@pypi.example.org/simple"),
        ("PIP_EXTRA_INDEX_URL", "http://10.0.0.7/simple"),
        ("SEARXNG_URL", "https://search.example/a/"),
        ("CHROMIUM", "/opt/chrome"),
        ("CHROMIUM_SANDBOX", "Always"),
        ("CHROMIUM_MAX_MEMORY", "512mb"),
        ("WEBTOOLS_PAGES", "2"),
        ("GOOGLE_OAUTH_CREDENTIALS", r#"{"web":{"client_secret":"canary"}}"#),
        ("EGRESS_ALLOW", "10.0.0.0/8, db.internal,*.corp.example,,[::1]"),
        ("PUBLIC_URL", "https://mcp.example.com:8443"),
        ("WORKER_HOST", "0.0.0.0"),
        ("WORKER_PORT", "0"),
        ("START_TIMEOUT_SECONDS", "5"),
        ("MAX_CONNECTIONS", "300"),
        ("CORS_ORIGINS", "https://Page.example.com:443, http://localhost:5173"),
        ("TLS_CERT_FILE", "/etc/cert.pem"),
        ("TLS_KEY_FILE", "/etc/key.pem"),
        ("PATH", "/bin"),
    ])
    .unwrap();
    assert_eq!(settings.host, ListenHost::Address(IpAddr::V6(Ipv6Addr::LOCALHOST)));
    assert_eq!((settings.port, &settings.auth, settings.debug), (0, &Auth::None, true));
    assert_eq!(settings.allowed_hosts, ["tools.example.com", "10.0.0.7:8080", "[fd00::1]:90", "mcp_api"]);
    assert_eq!(
        settings.allowed_origins,
        ["https://app.example.com", "http://localhost:3000", "chrome-extension://abc"]
    );
    assert_eq!(settings.payload_limit, 512 * 1024);
    assert_eq!(settings.http.cors_origins, ["https://page.example.com", "http://localhost:5173"]);
    let tls = settings.http.tls.unwrap();
    assert_eq!((tls.certificate, tls.key), ("/etc/cert.pem".into(), "/etc/key.pem".into()));
    let limits = LimitSettings {
        connections: 300,
        calls: 100,
        body_bytes: 3 << 29,
        user: UserLimits { calls: Some(8), rate: Some(0.5) },
        worker_calls: 200,
        server_queue: 10,
        ..LimitSettings::default()
    };
    assert_eq!(settings.limits, limits);
    assert_eq!(settings.threads, 7);
    assert_eq!(settings.shutdown_timeout, Duration::from_secs(600));
    assert_eq!(settings.shutdown_notice, Duration::from_secs(20));
    assert_eq!(settings.data_dir, Path::new("/srv/mcp data"));
    assert_eq!(settings.secrets_keys_file.as_deref(), Some(Path::new("/run/keys")));
    assert!(matches!(settings.legacy, Some(LegacyMode::Ro)));
    assert_eq!(settings.log_format, LogFormat::Json);
    assert_eq!(settings.log_filter.as_deref(), Some("warn,mcp_gateway=trace"));
    assert!(settings.later.is_empty());
    let remote = &settings.remote;
    let web = &remote.web_tools;
    assert_eq!(web.searxng.as_ref().unwrap().search().as_str(), "https://search.example/a/search");
    assert_eq!((&web.browser, web.sandbox), (&BrowserChoice::Program("/opt/chrome".into()), Sandbox::Always));
    assert_eq!((web.pages, web.memory), (2, 512 << 20));
    for url in ["http://10.1.2.3", "http://db.internal", "http://a.corp.example", "http://[::1]"] {
        assert!(remote.egress.check(url).is_ok(), "{url}");
    }
    assert!(remote.egress.check("http://127.0.0.1").is_err());
    assert_eq!(remote.public_url.as_ref().unwrap().as_str(), "https://mcp.example.com:8443/");
    let google = remote.google.as_ref().unwrap();
    assert!(google.json().expose_secret().contains("canary") && !format!("{google:?}").contains("canary"));
    let packages = &settings.packages;
    let installed: Vec<_> =
        packages.install_on_start.iter().map(|one| (&*one.package, one.server.as_str())).collect();
    assert_eq!(installed, [("@a/b", "c"), ("d", "E_1")]);
    assert_eq!(packages.folder, Path::new("/srv/mcp data/packages"));
    assert_eq!(packages.python_bin.as_deref(), Some(Path::new("/opt/python")));
    assert_eq!(packages.venv_dir.as_deref(), Some(Path::new("/srv/venvs")));
    let url = |url: &Option<SecretString>| url.as_ref().unwrap().expose_secret().to_owned();
    assert_eq!(url(&packages.pip_index_url), "https://user:canary@pypi.example.org/simple");
    assert_eq!(url(&packages.pip_extra_index_url), "http://10.0.0.7/simple");
    assert_eq!((settings.worker_host.to_string().as_str(), settings.worker_port), ("0.0.0.0", 0));
    assert_eq!(settings.start_timeout, Duration::from_secs(5));
}

#[test]
fn nothing_is_installed_on_the_first_start_if_somebody_says_so() {
    for none in ["none", "None", ","] {
        let settings = load(&[("INSTALL_ON_START", none)]).unwrap();
        assert!(settings.packages.install_on_start.is_empty(), "{none}");
    }
    assert_eq!(load(&[("INSTALL_ON_START", "")]).unwrap().packages.install_on_start.len(), 2);
}

#[test]
fn sizes() {
    for (text, bytes) in [
        ("6mb", 6 << 20),
        ("512kb", 512 << 10),
        ("1gb", 1 << 30),
        ("1GB", 1 << 30),
        ("1024b", 1024),
        ("1048576", 1 << 20),
        ("1.5mb", 3 << 19),
        ("1.5 MB", 3 << 19),
        ("0.001gb", 1_073_741),
        ("1.000000001gb", 0),
        ("100b", 0),
        ("1023", 0),
        ("1.1gb", 0),
        ("0", 0),
        ("-1mb", 0),
        ("+6mb", 0),
        ("1e3mb", 0),
        (".5mb", 0),
        ("5.mb", 0),
        ("1.2.3mb", 0),
        ("2048.5", 0),
        ("2048.0b", 0),
        ("mb", 0),
        ("6 m b", 0),
        ("6tb", 0),
        ("6mib", 0),
        ("99999999999999999999gb", 0),
        ("1.0000000000000000000001mb", 0),
        ("٦mb", 0),
    ] {
        let expected = if bytes == 0 { None } else { Some(bytes) };
        assert_eq!(parse::size(text).ok(), expected, "{text}");
    }
}

#[test]
fn bad_values_are_refused_with_what_would_be_valid() {
    let long = "x".repeat(300);
    for (name, value, says) in [
        ("HOST", "http://x", "an IP address"),
        ("HOST", "127.1", "an IP address"),
        ("HOST", "0x7f000001", "an IP address"),
        ("HOST", "[127.0.0.1]", "an IP address"),
        ("HOST", "a b", "an IP address"),
        ("HOST", "localhost:8080", "an IP address"),
        ("HOST", &long, "an IP address"),
        ("PORT", "65536", "PORT: `65536` is not valid; valid: a number from 1 to 65535, or 0"),
        ("PORT", "+80", "a number"),
        ("PORT", "80\r\nX", "`80  X`"),
        ("PORT", &long, "xxx…`"),
        ("AUTH", "off", "valid: keys, jwt, both with a comma between them, or none"),
        ("AUTH", "none,keys", "valid: keys, jwt"),
        ("ALLOWED_HOSTS", "*", "DNS rebinding"),
        ("ALLOWED_HOSTS", "ok.example,*.example.com", "DNS rebinding"),
        ("ALLOWED_HOSTS", "https://a", "host or host:port"),
        ("ALLOWED_HOSTS", "a:0", "host or host:port"),
        ("ALLOWED_HOSTS", "a:", "host or host:port"),
        ("ALLOWED_HOSTS", "::1", "host or host:port"),
        ("ALLOWED_HOSTS", "[::1", "host or host:port"),
        ("ALLOWED_HOSTS", "[::1]8", "host or host:port"),
        ("ALLOWED_HOSTS", "žluť.cz", "host or host:port"),
        ("ALLOWED_ORIGINS", "*", "any web page could start programs here"),
        ("ALLOWED_ORIGINS", "null", "the origin null"),
        ("ALLOWED_ORIGINS", "a.example", "origins, comma-separated"),
        ("ALLOWED_ORIGINS", "https://a/", "trailing slash"),
        ("ALLOWED_ORIGINS", "https://user:canary@a", "`https://***@a`"),
        ("ALLOWED_ORIGINS", "://a", "origins, comma-separated"),
        ("ALLOWED_ORIGINS", "file://", "origins, comma-separated"),
        ("PAYLOAD_LIMIT", "2gb", "from 1kb to 1gb"),
        ("MAX_CALLS", "0", "a whole number from 1 to 1000000"),
        ("MAX_CALLS", "none", "a whole number from 1 to 1000000"),
        ("MAX_BODY_BYTES", "5mb", "less than PAYLOAD_LIMIT"),
        ("MAX_BODY_BYTES", "65gb", "from 1mb to 64gb"),
        ("USER_MAX_CALLS", "0", "or none"),
        ("USER_MAX_RATE", "1e3", "such as 50 or 0.5, or none"),
        ("WORKER_MAX_CALLS", "1000001", "a whole number from 1 to 1000000"),
        ("SERVER_QUEUE", "-1", "a whole number from 1 to 1000000"),
        ("RUNTIME_THREADS", "0", "a whole number from 1 to 1024"),
        ("SHUTDOWN_TIMEOUT_SECONDS", "0", "from 1 to 600"),
        ("SHUTDOWN_TIMEOUT_SECONDS", "601", "from 1 to 600"),
        ("SHUTDOWN_NOTICE_SECONDS", "601", "from 0 to 600"),
        ("SHUTDOWN_TIMEOUT_SECONDS", "1.5", "from 1 to 600"),
        ("LEGACY_SECRETS", "on", "rw, ro or off"),
        ("DEBUG", "maybe", "true or false"),
        ("LOG_FORMAT", "xml", "auto, pretty or json"),
        ("RUST_LOG", "a=b=c", "a log filter"),
        ("DATA_DIR", "/a\u{fffd}", "not UTF-8"),
        ("SECRETS_KEY", "canary\u{fffd}", "SECRETS_KEY: the value is not UTF-8 text"),
        ("START_TIMEOUT_SECONDS", "0", "from 1 to 600"),
        ("WORKER_PORT", "x", "a number"),
        ("WORKER_HOST", "127.1", "an IP address"),
        ("INSTALL_ON_START", "a", "package|server pairs"),
        ("INSTALL_ON_START", "a|b,none", "package|server pairs"),
        ("INSTALL_ON_START", "a|b,c|B", "a server of its own"),
        ("INSTALL_ON_START", "../a|b", "package|server pairs"),
        ("INSTALL_ON_START", "a@1.0.0|b", "package|server pairs"),
        ("INSTALL_ON_START", "a|b.c", "package|server pairs"),
        ("INSTALL_ON_START", "a|b|c", "package|server pairs"),
        ("PYTHON_BIN", "-c", "the path of a Python"),
        ("PIP_INDEX_URL", "canary", "an http or https URL"),
        ("EGRESS_ALLOW", "10.0.0.0/8,a host", "hosts, *.domains, addresses and networks"),
        ("EGRESS_ALLOW", "10.0.0.0/40", "hosts, *.domains, addresses and networks"),
        ("EGRESS_ALLOW", "http://a", "hosts, *.domains, addresses and networks"),
        ("PUBLIC_URL", "mcp.example.com", "an http or https URL without query"),
        ("PUBLIC_URL", "ftp://mcp.example.com", "an http or https URL without query"),
        ("PUBLIC_URL", "https://user:canary@mcp.example.com", "an http or https URL without query"),
        ("PUBLIC_URL", "https://mcp.example.com/?a", "an http or https URL without query"),
        ("PUBLIC_URL", "https://mcp.example.com/a", "an http or https URL without query"),
        ("GOOGLE_OAUTH_CREDENTIALS", "canary", "the JSON object that Google's console gives"),
        ("GOOGLE_OAUTH_CREDENTIALS", "[\"canary\"]", "the JSON object that Google's console gives"),
        ("PIP_INDEX_URL", "https://x/ --canary", "an http or https URL"),
        ("PIP_EXTRA_INDEX_URL", "file:///canary", "an http or https URL"),
        ("MONGO_DBNAME", "a/b", "1 to 63 characters"),
        ("SECRETS_DBNAME", "a$b", "1 to 120 characters"),
    ] {
        let errors = load(&[(name, value)]).unwrap_err();
        let text = errors.to_string();
        assert_eq!(errors.problems().len(), 1, "{text}");
        assert_eq!(errors.problems()[0].subject(), name);
        assert!(text.contains(says) && text.starts_with(name), "{name}={value}: {text}");
        assert!(!text.contains("canary") && !text.contains(&"x".repeat(65)), "{text}");
    }
}

#[test]
fn listening_for_others_needs_a_word_on_authentication() {
    for host in ["0.0.0.0", "::", "[::]", "192.168.1.5", "::ffff:10.0.0.1", "box.lan", "localhost.lan"] {
        let text = load(&[("HOST", host)]).unwrap_err().to_string();
        assert!(text.starts_with("HOST: listening on ") && text.contains("AUTH=none"), "{text}");
        let settings = load(&[("HOST", host), ("AUTH", "none")]).unwrap();
        assert!(!settings.host.is_loopback());
        assert!(load(&[("HOST", host), ("AUTH", "")]).is_err());
    }
    for host in ["localhost", "LOCALHOST", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1"] {
        assert!(load(&[("HOST", host)]).unwrap().host.is_loopback(), "{host}");
    }
    assert_eq!(load(&[("HOST", "localhost")]).unwrap().host.to_string(), "127.0.0.1");
}

#[test]
fn everything_wrong_is_reported_at_once() {
    let file = EnvFile::new("many", "PROT=1\nnonsense\nLOG_FORMAT=xml\n");
    let errors = file
        .load(&[("PORT", "x"), ("DEBUG", "x"), ("MONGODB_URI", "x"), ("LEGACY_SECRETS", "x")])
        .unwrap_err();
    let text = errors.to_string();
    assert_eq!(text.lines().count(), 7, "{text}");
    assert_eq!(errors.problems().len(), 7);
    assert!(text.contains("LEGACY_SECRETS: `x` is not valid; valid: rw, ro or off"), "{text}");
}

#[test]
fn the_environment_wins_and_empty_is_unset() {
    let file = EnvFile::new("wins", "PORT=1111\nHOST=\nDEBUG=true\nPAYLOAD_LIMIT=1mb\nOTEL_X=1\n");
    let settings = file.load(&[("PORT", "2222"), ("DEBUG", ""), ("PAYLOAD_LIMIT", "  ")]).unwrap();
    assert_eq!((settings.port, settings.debug, settings.payload_limit), (2222, true, 1 << 20));
    let origin = |wanted| settings.effective().into_iter().find(|(name, ..)| *name == wanted).unwrap();
    assert_eq!(origin("PORT"), ("PORT", "2222".to_owned(), Origin::Environment));
    assert_eq!(origin("PAYLOAD_LIMIT"), ("PAYLOAD_LIMIT", "1mb".to_owned(), Origin::EnvFile));
    assert_eq!(origin("HOST"), ("HOST", "127.0.0.1".to_owned(), Origin::Default));
    assert_eq!(origin("SEARXNG_URL").1, "unset");
    assert_eq!(format!("[{:>8}]", Origin::EnvFile), "[    .env]");
}

#[test]
fn values_of_a_file_are_what_they_look_like() {
    let json = r#"{"web":{"client_id":"a b","secret":"x\ny$z"}}"#;
    let text = format!(
        "\u{feff}# mcp-api\r\nexport SECRETS_KEY='p\"a$s#s \\ '\r\nGOOGLE_OAUTH_CREDENTIALS={json}\r\n\
         DATA_DIR=\"/a b\" # c\r\nSEARXNG_URL=\r\n"
    );
    let settings = EnvFile::new("quotes", &text).load(&[]).unwrap();
    assert_eq!(settings.secrets_key.as_ref().map(ExposeSecret::expose_secret), Some("p\"a$s#s \\ "));
    assert_eq!(settings.remote.google.as_ref().unwrap().json().expose_secret(), json);
    assert_eq!(settings.data_dir, Path::new("/a b"));
    assert!(settings.remote.web_tools.searxng.is_none());
}

#[test]
fn unknown_names_in_a_file_are_errors() {
    for (line, says) in [
        ("SECRET_KEY=canary", "SECRET_KEY: not a setting of this program (line 1 of "),
        ("SECRET_KEY=canary", "did you mean SECRETS_KEY?"),
        ("secrets_key=canary", "did you mean SECRETS_KEY?"),
        ("PRT=1", "did you mean PORT?"),
        ("MONGODB_NAME=x", "did you mean MONGO_DBNAME?"),
        ("PIP_EXTRA_INDX_URL=x", "did you mean PIP_EXTRA_INDEX_URL?"),
        ("NODE_ENV=production", "remove it, or see --help"),
        ("MIIcanaryEvQIBADANBgkqhkiG9w0BAQEF==", ".env: not a setting of this program"),
    ] {
        let text = EnvFile::new("unknown", line).load(&[]).unwrap_err().to_string();
        assert!(text.contains(says), "{line}: {text}");
        assert!(!text.contains("canary"), "{text}");
    }
}

#[test]
fn names_in_the_environment_that_are_nearly_ours_are_warned_about() {
    let settings = load(&[
        ("SECRET_KEY", "canary"),
        ("PAYLOAD_LIMITS", "1"),
        ("secrets_key", "canary"),
        ("MONGO_PORT", "27017"),
        ("AUTHOR", "me"),
        ("HOSTNAME", "box"),
        ("PORTS", "1"),
        ("KATA_DIR", "1"),
        ("HOME", "/root"),
        ("PYTHON_VERSION", "3.13"),
        ("RUST_BACKTRACE", "1"),
        ("RUST_LOG_STYLE", "never"),
    ])
    .unwrap();
    assert_eq!(
        settings.warnings,
        [
            "PAYLOAD_LIMITS: not a setting of this program; did you mean PAYLOAD_LIMIT?",
            "SECRET_KEY: not a setting of this program; did you mean SECRETS_KEY?",
            "secrets_key: not a setting of this program; did you mean SECRETS_KEY?",
        ]
    );
}

#[test]
fn secrets_are_masked() {
    let mut env: Vec<_> = VARIABLES
        .iter()
        .filter(|v| v.secret && v.group != Group::Cluster && !v.name.starts_with("PIP_"))
        .map(|v| match v.name {
            "GOOGLE_OAUTH_CREDENTIALS" => (v.name, "{\"web\": \"canary-canary\"}"),
            name if name.ends_with("_HEADERS") => (name, "authorization=canary-canary"),
            name => (name, "canary-canary"),
        })
        .collect();
    env.push(("PIP_INDEX_URL", "https://user:canary@pypi.example/x"));
    env.push(("PIP_EXTRA_INDEX_URL", "https://user:canary@pypi.example/x"));
    env.push(("SEARXNG_URL", "https://user:canary@search.example/x"));
    let settings = load(&env).unwrap();
    let shown = format!("{settings:?} {settings:#?} {:?}", settings.effective());
    assert!(!shown.contains("canary"), "{shown}");
    assert!(settings.effective().contains(&(
        "SECRETS_KEY",
        "(set, 13 characters)".to_owned(),
        Origin::Environment
    )));
    assert!(shown.contains("https://***@search.example/x"), "{shown}");
    // Documented defaults are no secrets, and at signs alone are no credentials.
    let defaults = format!("{:?}", load(&[("INSTALL_ON_START", "@a/b|c,@d/e|f")]).unwrap());
    assert!(defaults.contains("@a/b|c,@d/e|f"), "{defaults}");
}

#[test]
fn a_file_that_was_asked_for_must_be_readable() {
    let missing = std::env::temp_dir().join("mcp-config-no-such-file.env");
    let text = Settings::load(pairs(&[]), Some(&missing)).unwrap_err().to_string();
    assert!(text.contains("the file cannot be read: entity not found"), "{text}");
    assert!(Settings::load(pairs(&[]), Some(&std::env::temp_dir())).is_err());
    let file = EnvFile::new("latin", "");
    std::fs::write(&file.0, b"SECRETS_KEY=canary\xff").unwrap();
    let text = file.load(&[]).unwrap_err().to_string();
    assert!(text.contains("not UTF-8") && !text.contains("canary"), "{text}");
    assert_eq!(env_file(Some(missing.clone())), Some(missing));
}
