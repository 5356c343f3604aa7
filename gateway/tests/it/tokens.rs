//! Tokens of an OIDC issuer: whose are accepted, and what they allow. The issuer is the test's own, on this machine.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use reqwest::Method;
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair},
};
use serde_json::{Value, json};

use crate::deployment::{Answer, Builder, Deployment};

/// Signs tokens.
enum Key {
    Ec(EcdsaKeyPair),
    Ed(Ed25519KeyPair),
}

impl Key {
    fn ec() -> Self {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        Self::Ec(
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref(), &random).unwrap(),
        )
    }

    fn ed() -> Self {
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        Self::Ed(Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap())
    }

    fn algorithm(&self) -> &'static str {
        match self {
            Key::Ec(_) => "ES256",
            Key::Ed(_) => "EdDSA",
        }
    }

    fn jwk(&self, kid: &str) -> Value {
        match self {
            Key::Ec(key) => {
                let (x, y) = key.public_key().as_ref()[1..].split_at(32);
                json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": kid, "x": text(x), "y": text(y)})
            }
            Key::Ed(key) => {
                json!({"kty": "OKP", "crv": "Ed25519", "use": "sig", "kid": kid, "x": text(key.public_key().as_ref())})
            }
        }
    }

    /// A token with these parts.
    fn sign(&self, header: &Value, claims: &Value) -> String {
        let signed =
            format!("{}.{}", text(header.to_string().as_bytes()), text(claims.to_string().as_bytes()));
        let signature = match self {
            Key::Ec(key) => text(key.sign(&SystemRandom::new(), signed.as_bytes()).unwrap().as_ref()),
            Key::Ed(key) => text(key.sign(signed.as_bytes()).as_ref()),
        };
        format!("{signed}.{signature}")
    }

    fn token(&self, kid: &str, claims: &Value) -> String {
        self.sign(&json!({"alg": self.algorithm(), "kid": kid, "typ": "JWT"}), claims)
    }
}

fn text(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// An issuer, which says what its keys are.
struct Issuer {
    url: String,
    keys: Arc<Mutex<Value>>,
    asked: Arc<AtomicUsize>,
}

impl Issuer {
    fn start(keys: Value) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (keys, asked) = (Arc::new(Mutex::new(keys)), Arc::new(AtomicUsize::new(0)));
        let (shown, counted, own) = (Arc::clone(&keys), Arc::clone(&asked), url.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
                let Some(first) = lines.next() else { continue };
                while lines.next().is_some_and(|line| !line.is_empty()) {}
                let body = if first.starts_with("GET /.well-known/openid-configuration ") {
                    json!({"issuer": own, "jwks_uri": format!("{own}/keys")})
                } else if first.starts_with("GET /keys ") {
                    counted.fetch_add(1, Ordering::Relaxed);
                    shown.lock().unwrap().clone()
                } else {
                    json!({})
                };
                let body = body.to_string();
                let _ = write!(
                    stream,
                    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                );
            }
        });
        Self { url, keys, asked }
    }

    fn claims(&self, user: &str, scope: &str, more: Value) -> Value {
        let now = now();
        let mut claims = json!({"iss": self.url, "aud": "mcp-api", "sub": user, "scope": scope, "iat": now, "exp": now + 600});
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        claims
    }

    fn deployment(&self) -> Builder {
        Deployment::builder()
            .env("AUTH", "jwt,keys")
            .env("JWT_ISSUER", &self.url)
            .env("JWT_AUDIENCE", "other, mcp-api")
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

async fn ask(api: &Deployment, token: &str, path: &str) -> Answer {
    api.send(api.request_with(Some(token), Method::GET, path)).await
}

const ALL: &str = "openid mcp:call mcp:secrets mcp:admin mcp:impersonate mcp:metrics";

#[tokio::test]
async fn tokens_of_the_issuer_let_their_users_in_with_their_scopes() {
    let (key, ed) = (Key::ec(), Key::ed());
    let issuer = Issuer::start(json!({"keys": [key.jwk("one"), ed.jwk("two")]}));
    let root = key.token("one", &issuer.claims("root", ALL, json!({})));
    let api = issuer.deployment().key(&root).start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let alice = ed.token("two", &issuer.claims("alice", "mcp:call call admin mcp:unheard-of", json!({})));
    let call = |user: Value| json!({"serverName": "echo", "methodName": "echo", "args": {"text": "hi"}, "username": user});
    let post = async |token: &str, body: Value| {
        api.send(api.request_with(Some(token), Method::POST, "/mcp/tool/call").json(&body)).await
    };
    assert_eq!(post(&alice, call(Value::Null)).await.tool_text(), "hi");
    assert_eq!(post(&alice, call(json!("alice"))).await.tool_text(), "hi");
    post(&alice, call(json!("bob"))).await.fails(403, "forbidden_user");
    // Scopes of other programs, and such without the prefix, are not ours.
    ask(&api, &alice, "/packages").await.fails(403, "forbidden");
    // As an array, and in an audience of several.
    let list = issuer.claims("carol", "", json!({"scope": ["mcp:metrics"], "aud": ["x", "mcp-api"]}));
    ask(&api, &key.token("one", &list), "/metrics").await.ok();
    api.logged("token:alice").await;
    assert!(!api.log().contains(&alice), "who, and never the token");
}

#[tokio::test]
async fn other_tokens_let_nobody_in() {
    let (key, stranger) = (Key::ec(), Key::ec());
    let issuer = Issuer::start(json!({"keys": [key.jwk("one")]}));
    let good = issuer.claims("alice", ALL, json!({}));
    let token = key.token("one", &good);
    let api = issuer.deployment().key(&token).start().await;
    ask(&api, &token, "/mcp/servers").await.ok();
    let with = |more: Value| key.token("one", &issuer.claims("alice", ALL, more));
    let without = |claim: &str| {
        let mut claims = good.clone();
        claims.as_object_mut().unwrap().remove(claim);
        key.token("one", &claims)
    };
    let parts: Vec<_> = token.split('.').collect();
    let none = text(br#"{"alg":"none","kid":"one"}"#);
    let hmac = text(br#"{"alg":"HS256","kid":"one"}"#);
    let bad = [
        ("over", with(json!({"exp": now() - 60}))),
        ("over, as a text", with(json!({"exp": "1"}))),
        ("never over", without("exp")),
        ("not yet", with(json!({"nbf": now() + 600}))),
        ("another issuer", with(json!({"iss": "https://id.example.com"}))),
        ("the issuer with a slash", with(json!({"iss": format!("{}/", issuer.url)}))),
        ("no issuer", without("iss")),
        ("another audience", with(json!({"aud": "mcp"}))),
        ("no audience", without("aud")),
        ("no user", without("sub")),
        ("a user that cannot be", with(json!({"sub": "a\u{202e}b"}))),
        ("a user that is no text", with(json!({"sub": ["alice"]}))),
        ("signed by somebody else", stranger.token("one", &good)),
        ("a key of another name", key.token("two", &good)),
        (
            "claims of somebody else",
            format!(
                "{}.{}.{}",
                parts[0],
                text(good.to_string().replace("alice", "root").as_bytes()),
                parts[2]
            ),
        ),
        ("no algorithm", format!("{none}.{}.", parts[1])),
        ("an algorithm with a shared secret", format!("{hmac}.{}.{}", parts[1], parts[2])),
        ("another algorithm than the key's", key.sign(&json!({"alg": "EdDSA", "kid": "one"}), &good)),
        ("no signature", format!("{}.{}.", parts[0], parts[1])),
        ("two parts", format!("{}.{}", parts[0], parts[1])),
        ("not JSON", format!("{}.{}.{}", text(b"{"), parts[1], parts[2])),
        ("too long", format!("{token}{}", "A".repeat(20_000))),
        ("nothing", String::new()),
    ];
    for (what, token) in &bad {
        let answer = ask(&api, token, "/mcp/servers").await;
        assert_eq!((answer.status, answer.code().as_str()), (401, "unauthorized"), "{what}: {}", answer.text);
    }
    // However many come with keys that nobody knows, the issuer is left in peace.
    assert!(
        issuer.asked.load(Ordering::Relaxed) <= 6,
        "asked {} times",
        issuer.asked.load(Ordering::Relaxed)
    );
    ask(&api, &token, "/mcp/servers").await.ok();
}

#[tokio::test]
async fn an_issuer_that_is_away_keeps_nobody_out_who_is_known_and_lets_nobody_in_who_is_not() {
    let key = Key::ec();
    let issuer = Issuer::start(json!({"keys": []}));
    let builder = issuer.deployment();
    let output = builder
        .command()
        .args(["api-keys", "create", "--name", "n", "--user", "root", "--scopes", "call,metrics,admin"])
        .output()
        .unwrap();
    let api_key = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let nowhere = "http://127.0.0.1:9/keys";
    let api = builder.env("JWT_JWKS_URL", nowhere).key(&api_key).start().await;
    let token = key.token("one", &issuer.claims("alice", ALL, json!({})));
    let answer = ask(&api, &token, "/mcp/servers").await.fails(503, "issuer_unavailable");
    assert!(answer.headers.contains_key("retry-after"));
    // API keys need no issuer.
    api.get("/mcp/servers").await.ok();
    drop(issuer.keys);
}
