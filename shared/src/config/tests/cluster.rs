//! Settings of clusters and of MongoDB.

use super::*;

const STRONG: &str = "8f1d2c3b4a5968778695a4b3c2d1e0f00f1e2d3c4b5a69788796a5b4c3d2e1f0";

/// Settings of a cluster's node, and more.
fn node(more: &[(&str, &str)]) -> Result<Settings, ConfigErrors> {
    let mut env = vec![("MONGODB_URI", "mongodb://127.0.0.1"), ("SECRETS_KEY", STRONG)];
    env.extend_from_slice(more);
    load(&env)
}

fn bus(more: &[(&str, &str)]) -> BusSettings {
    node(more).unwrap().bus.unwrap()
}

fn mongo(env: &[(&str, &str)]) -> MongoSettings {
    match load(env).unwrap().store {
        StoreSettings::Mongo(mongo) => mongo,
        StoreSettings::Embedded => panic!("no MongoDB"),
    }
}

/// Everything that is wrong, which never has the secrets of these tests in it.
fn wrong(result: Result<Settings, ConfigErrors>) -> String {
    let text = result.unwrap_err().to_string();
    assert!(!text.contains("canary"), "{text}");
    text
}

#[test]
fn without_addresses_there_is_neither_bus_nor_mongodb() {
    let settings = load(&[("MONGO_USER", "u"), ("NATS_PREFIX", "x")]).unwrap();
    assert!(settings.bus.is_none() && matches!(settings.store, StoreSettings::Embedded));
    assert_eq!((settings.worker_port, settings.worker_host.is_loopback()), (9090, true));
    assert_eq!(settings.start_timeout, Duration::from_secs(60));
    let warned = load(&[("NATS_CREDS", "file")]).unwrap().warnings;
    assert_eq!(warned, ["NATS_CREDS: not used, because NATS_URL is not set"]);
}

#[test]
fn urls_of_nats() {
    let settings = bus(&[("NATS_URL", "nats://127.0.0.1, TLS://LocalHost:4333/")]);
    assert_eq!(settings.shown(), "nats://127.0.0.1:4222,tls://localhost:4333");
    assert!(matches!(settings.login, BusLogin::None) && settings.open_allowed);
    assert!(settings.tls.required && settings.prefix == "mcp");
    assert_eq!(bus(&[("NATS_URL", "nats://[::1]:1")]).shown(), "nats://[::1]:1");
    assert!(!bus(&[("NATS_URL", "nats://[::1]:1")]).tls.required);
    let BusLogin::Password { user, password } = bus(&[("NATS_URL", "nats://a%40b:c:%25d@nats")]).login else {
        panic!("no password");
    };
    assert_eq!((user.as_str(), password.expose_secret()), ("a@b", "c:%d"));
    let token = bus(&[("NATS_URL", "nats://canary@nats,nats://canary@other")]);
    assert!(matches!(&token.login, BusLogin::Token(token) if token.expose_secret() == "canary"));
    assert!(!token.open_allowed, "it may turn out that the server asks nobody for the token");
    assert!(!format!("{token:?} {}", token.shown()).contains("canary"));
    for bad in [
        "127.0.0.1:4222",
        "http://127.0.0.1",
        "nats://",
        "nats://u:canary@",
        "nats://:canary@h",
        "nats://u:@h",
        "nats://u:canary%zz@h",
        "nats://u:canary@h,nats://h",
        "nats://u:canary@h,nats://u:canary2@h",
        "nats://h:0",
        "nats://a b",
        "nats://h/path",
        ",",
    ] {
        let text = wrong(node(&[("NATS_URL", bad)]));
        assert!(
            text.starts_with("NATS_URL: the value is not valid; valid: nats://host:port"),
            "{bad}: {text}"
        );
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    for bad in ["a.b", "", "_INBOX", "*", "ä", &"x".repeat(33)] {
        let result = node(&[("NATS_URL", "nats://127.0.0.1"), ("NATS_PREFIX", bad)]);
        assert_eq!(result.is_ok(), bad.is_empty(), "{bad}");
    }
    assert!(wrong(node(&[("NATS_URL", "nats://h"), ("NATS_AUTH", "off")])).contains("valid: none"));
}

#[test]
fn an_open_nats_elsewhere_must_be_allowed() {
    for url in ["nats://nats", "nats://127.0.0.1,tls://192.0.2.1", "nats://localhost.example"] {
        let text = wrong(node(&[("NATS_URL", url)]));
        assert!(text.contains("is not on this machine and no login is configured"), "{text}");
        assert!(text.contains("NATS_AUTH=none"), "{text}");
        assert!(bus(&[("NATS_URL", url), ("NATS_AUTH", "None")]).open_allowed);
    }
    let settings = node(&[("NATS_URL", "nats://u:canary@nats")]).unwrap();
    assert!(settings.warnings.iter().any(|text| text.contains("in clear") && !text.contains("canary")));
    assert!(node(&[("NATS_URL", "tls://u:canary@nats")]).unwrap().warnings.is_empty());
}

#[test]
fn logins_from_files() {
    let seed = format!("SU{}", "A".repeat(56));
    let nkey = EnvFile::new("seed", &format!("# mine\n{seed}\n"));
    let creds_text =
        format!("-----BEGIN NATS USER JWT-----\ncanary\n-----BEGIN USER NKEY SEED-----\n{seed}\n------END\n");
    let creds = EnvFile::new("creds", &creds_text);
    let pem = EnvFile::new("pem", "-----BEGIN CERTIFICATE-----\n");
    let other = EnvFile::new("other", "canary");
    let path = |file: &EnvFile| file.0.display().to_string();
    let with = |more: &[(&str, &str)]| {
        let mut env = vec![("NATS_URL", "nats://nats.example")];
        env.extend_from_slice(more);
        node(&env)
    };
    let settings = with(&[("NATS_NKEY_SEED_FILE", &path(&nkey))]).unwrap().bus.unwrap();
    assert!(matches!(&settings.login, BusLogin::NKey(found) if found.expose_secret() == seed));
    let settings = with(&[("NATS_CREDS", &path(&creds))]).unwrap();
    assert!(!format!("{settings:?} {:?}", settings.bus).contains("canary"));
    let login = settings.bus.unwrap().login;
    assert!(matches!(&login, BusLogin::Credentials(found) if found.expose_secret() == creds_text));
    let tls = with(&[("NATS_TLS_CERT_FILE", &path(&pem)), ("NATS_TLS_KEY_FILE", &path(&pem))])
        .unwrap()
        .bus
        .unwrap();
    assert!(tls.tls.required && tls.tls.identity.is_some() && tls.tls.ca.is_none());

    for (env, says) in [
        (vec![("NATS_CREDS", path(&other))], "is not a NATS credentials file"),
        (vec![("NATS_NKEY_SEED_FILE", path(&other))], "is not the NKey seed of a user"),
        (vec![("NATS_TLS_CA_FILE", path(&other)), ("NATS_AUTH", "none".to_owned())], "is not PEM"),
        (vec![("NATS_CREDS", "/no/such".to_owned())], "/no/such cannot be read: entity not found"),
        (vec![("NATS_CREDS", path(&creds)), ("NATS_NKEY_SEED_FILE", path(&nkey))], "only one of the two"),
        (vec![("NATS_TLS_CERT_FILE", path(&pem))], "NATS_TLS_KEY_FILE is missing"),
        (vec![("NATS_TLS_KEY_FILE", path(&pem))], "NATS_TLS_CERT_FILE is missing"),
        (vec![("NATS_CREDS", path(&creds)), ("NATS_URL", "nats://canary@h".to_owned())], "a login as well"),
    ] {
        let borrowed: Vec<_> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        // The environment cannot have a name twice: the first one counts.
        let mut all = borrowed.clone();
        all.push(("NATS_URL", "nats://nats.example"));
        let text = wrong(node(&all));
        assert!(text.contains(says), "{env:?}: {text}");
    }
}

#[test]
fn a_cluster_needs_a_common_store_and_key() {
    let text = wrong(load(&[("NATS_URL", "nats://u:canary@127.0.0.1")]));
    assert!(text.contains("NATS_URL: gateways and workers need a store"), "{text}");
    assert!(text.contains("SECRETS_KEY: a cluster needs one key"), "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
    let ring =
        [("NATS_URL", "nats://127.0.0.1"), ("MONGO_HOST", "127.0.0.1:27017"), ("SECRETS_KEYS_FILE", "ring")];
    assert!(load(&ring).unwrap().bus.is_some());
    // MongoDB alone is one node with another store, and makes itself a key as ever.
    assert!(load(&[("MONGODB_URI", "mongodb://127.0.0.1")]).unwrap().bus.is_none());
}

#[test]
fn addresses_of_mongodb() {
    let full = mongo(&[
        ("MONGODB_URI", "mongodb://u:canary@a.example:1,b.example/x?replicaSet=rs0"),
        ("MONGO_HOST", "ignored:1"),
        ("MONGO_USER", "ignored"),
        ("MONGO_DBNAME", "data"),
    ]);
    assert_eq!(full.hosts, "a.example:1,b.example:27017");
    assert!(full.login.is_none() && full.without_default_login().is_none());
    assert_eq!((full.database.as_str(), full.secrets_collection.as_str()), ("data", "secrets"));
    assert!(!format!("{full:?}").contains("canary"));
    let uri = ("MONGODB_URI", "mongodb://127.0.0.1/x");
    assert_eq!(mongo(&[uri]).database, "x");
    assert_eq!(mongo(&[uri, ("MONGO_DBNAME", "y")]).database, "y");
    assert_eq!(mongo(&[("MONGO_HOST", "mongodb://127.0.0.1/x")]).database, "squad-test", "as mcp-api");
    let hosts = mongo(&[
        ("MONGO_HOST", "A.example:27018, b.example"),
        ("MONGO_USER", "u"),
        ("MONGO_PASS", "can@ary/:"),
        ("MONGO_REPLICASET", "rs1"),
    ]);
    assert_eq!(hosts.hosts, "a.example:27018,b.example:27017");
    assert_eq!(hosts.replica_set.as_deref(), Some("rs1"));
    let login = hosts.login.unwrap();
    assert_eq!((login.user.as_str(), login.password.expose_secret()), ("u", "can@ary/:"));
    assert!(!login.is_default);
    // As mcp-api does, a login that is set goes before that of the address.
    let both =
        mongo(&[("MONGO_HOST", "mongodb+srv://a:b@c.example"), ("MONGO_USER", "u"), ("MONGO_PASS", "p")]);
    assert_eq!((both.login.unwrap().user.as_str(), both.hosts.as_str()), ("u", "c.example"));
    assert!(mongo(&[("MONGO_HOST", "mongodb://a:b@c.example")]).login.is_none());

    for (name, value) in [
        ("MONGODB_URI", "127.0.0.1:27017"),
        ("MONGODB_URI", "mongodb://u:can@ary@127.0.0.1"),
        ("MONGODB_URI", "mongodb://u:canary@127.0.0.1/?maxPoolSize=x"),
        ("MONGODB_URI", "http://u:canary@127.0.0.1"),
        ("MONGO_HOST", "u:canary@h"),
        ("MONGO_HOST", "mongodb://u:canary@"),
        ("MONGO_HOST", "a b"),
        ("MONGO_HOST", ","),
    ] {
        let text = wrong(load(&[(name, value)]));
        assert!(text.starts_with(&format!("{name}: the value is not valid; valid: ")), "{value}: {text}");
        assert!(!text.contains("can@ary"), "{text}");
    }
    let text =
        wrong(load(&[("MONGODB_URI", "mongodb://127.0.0.1/?replicaSet=a"), ("MONGO_REPLICASET", "b")]));
    assert!(text.starts_with("MONGO_REPLICASET: MONGODB_URI names another replica set"), "{text}");
}

#[test]
fn the_documented_login_stays_on_this_machine() {
    for host in ["localhost:27017", "127.0.0.1", "[::1]:27017", "mongodb://localhost/?appName=x"] {
        let settings = mongo(&[("MONGO_HOST", host)]);
        let login = settings.login.clone().unwrap();
        assert_eq!((login.user.as_str(), login.password.expose_secret()), ("root", "example"), "{host}");
        assert!(login.is_default && settings.without_default_login().unwrap().login.is_none());
        let named = mongo(&[("MONGO_HOST", host), ("MONGO_USER", "me")]);
        assert!(named.without_default_login().is_none() && named.login.unwrap().user == "me");
    }
    for host in ["mongo:27017", "localhost:1,mongo:2", "mongodb+srv://c.example"] {
        let text = wrong(load(&[("MONGO_HOST", host)]));
        assert!(text.starts_with("MONGO_USER: MongoDB at ") && text.contains("documented default"), "{text}");
        let text = wrong(load(&[("MONGO_HOST", host), ("MONGO_USER", "root")]));
        assert!(text.starts_with("MONGO_PASS: MongoDB at "), "{text}");
        // What is said is done, even if it is the default.
        let said = mongo(&[("MONGO_HOST", host), ("MONGO_USER", "root"), ("MONGO_PASS", "example")]);
        assert!(!said.login.unwrap().is_default);
    }
    let open = load(&[("MONGODB_URI", "mongodb://mongo:27017")]).unwrap();
    assert!(open.warnings[0].contains("has no login"), "{:?}", open.warnings);
    assert!(load(&[("MONGODB_URI", "mongodb://127.0.0.1")]).unwrap().warnings.is_empty());
}
