//! The normative table of settings. Reading them, `--help` and the README all come from here.

use super::variables::{Group, Since, Variable};

const fn plain(
    name: &'static str,
    default: &'static str,
    group: Group,
    used: Since,
    help: &'static str,
) -> Variable {
    Variable { name, default, group, help, secret: false, used }
}

const fn secret(
    name: &'static str,
    default: &'static str,
    group: Group,
    used: Since,
    help: &'static str,
) -> Variable {
    Variable { name, default, group, help, secret: true, used }
}

/// Every variable that the program knows, in the order of the documentation.
pub const VARIABLES: &[Variable] = &[
    plain(
        "HOST",
        "127.0.0.1",
        Group::Http,
        Since::Now,
        "Address to listen on. Anything but loopback is refused unless AUTH is set as well.",
    ),
    plain("PORT", "8080", Group::Http, Since::Now, "HTTP server port; 0 picks a free one and logs it."),
    plain(
        "ALLOWED_HOSTS",
        "loopback names",
        Group::Http,
        Since::Now,
        "Host names, comma-separated, that requests may be addressed to besides the loopback names. A name \
         without a port stands for every port.",
    ),
    plain(
        "ALLOWED_ORIGINS",
        "loopback names",
        Group::Http,
        Since::Now,
        "Origins of web pages, comma-separated, that may send requests besides those on loopback names, \
         such as https://app.example.com.",
    ),
    plain(
        "CORS_ORIGINS",
        "",
        Group::Http,
        Since::Now,
        "Origins of web pages, comma-separated, whose scripts may also read the answers to their requests (CORS): each \
         in full, never with *. Unset: no page may.",
    ),
    plain(
        "TLS_CERT_FILE",
        "",
        Group::Http,
        Since::Now,
        "Certificate to serve HTTPS with instead of HTTP, in PEM, with those that it comes from after it; read again \
         on SIGHUP.",
    ),
    plain("TLS_KEY_FILE", "", Group::Http, Since::Now, "The key of that certificate, in PEM."),
    plain(
        "PAYLOAD_LIMIT",
        "6mb",
        Group::Http,
        Since::Now,
        "Maximum request body size: bytes, or a number with b, kb, mb or gb; from 1kb to 1gb.",
    ),
    plain(
        "SHUTDOWN_TIMEOUT_SECONDS",
        "30",
        Group::Http,
        Since::Now,
        "How long calls in flight have to finish when the program stops; from 1 to 600. Whoever ends programs by force \
         has to wait for longer than this and SHUTDOWN_NOTICE_SECONDS together.",
    ),
    plain(
        "SHUTDOWN_NOTICE_SECONDS",
        "3 with NATS_URL, else 0",
        Group::Http,
        Since::Now,
        "How long a gateway that was told to stop goes on taking requests before that, while /readyz says 503 and \
         every answer closes its connection: balancers and clients move to another gateway without losing a \
         request. From 0 to 600; longer than a balancer needs to notice.",
    ),
    plain(
        "AUTH",
        "none on loopback",
        Group::Auth,
        Since::Now,
        "Who is let in: keys (API keys), jwt (tokens of an OIDC issuer), both with a comma between them, or none: \
         something in front authenticates, or everyone who can connect is trusted.",
    ),
    plain(
        "JWT_ISSUER",
        "",
        Group::Auth,
        Since::Now,
        "With AUTH=jwt: the issuer of tokens, as their claim iss has it.",
    ),
    plain(
        "JWT_AUDIENCE",
        "",
        Group::Auth,
        Since::Now,
        "With AUTH=jwt: what the claim aud of tokens must have; several comma-separated, of which one must be there.",
    ),
    plain(
        "JWT_JWKS_URL",
        "as the issuer's discovery document says",
        Group::Auth,
        Since::Now,
        "Where the issuer's public keys are.",
    ),
    plain(
        "JWT_ALGORITHMS",
        "RS256,PS256,ES256,EdDSA",
        Group::Auth,
        Since::Now,
        "How tokens may be signed: also RS384, RS512, PS384, PS512, ES384. There is none with a shared secret.",
    ),
    plain("JWT_USER_CLAIM", "sub", Group::Auth, Since::Now, "The claim of tokens that names the user."),
    plain(
        "JWT_SCOPE_CLAIM",
        "scope",
        Group::Auth,
        Since::Now,
        "The claim of tokens that lists scopes, as a text with spaces or as an array.",
    ),
    plain(
        "JWT_SCOPE_PREFIX",
        "mcp:",
        Group::Auth,
        Since::Now,
        "What stands before this program's scopes in tokens: mcp:call, mcp:secrets, and so on.",
    ),
    plain(
        "RUNTIME_THREADS",
        "all cores; one less with NATS_URL, of several",
        Group::Limits,
        Since::Now,
        "Threads that run the program's own work, from 1 to 1024. A node of a cluster leaves a core to NATS and to the \
         servers that it starts.",
    ),
    plain(
        "MAX_CONNECTIONS",
        "20000",
        Group::Limits,
        Since::Now,
        "Connections of clients that one gateway serves at once; further ones are closed. From 1 to 1000000, and better \
         more than MAX_CALLS, so that whoever comes too many is told so.",
    ),
    plain(
        "MAX_CALLS",
        "16384",
        Group::Limits,
        Since::Now,
        "Calls in flight at one gateway; further ones are answered with 503 overloaded. From 1 to 1000000.",
    ),
    plain(
        "MAX_BODY_BYTES",
        "256mb",
        Group::Limits,
        Since::Now,
        "Bytes of request bodies in flight at one gateway, a call's until it is over; further ones are answered with \
         503 overloaded. From 1mb to 64gb, and not below PAYLOAD_LIMIT.",
    ),
    plain(
        "USER_MAX_CALLS",
        "256 with AUTH=keys or jwt, else none",
        Group::Limits,
        Since::Now,
        "Calls in flight of one user; further ones are answered with 429 rate_limited. Each gateway counts the calls that \
         it is sent, and each worker those of services on NATS that it answers. A call with an Idempotency-Key goes on \
         when its caller has left, and is not counted from then on. none: no limit.",
    ),
    plain(
        "USER_MAX_RATE",
        "none",
        Group::Limits,
        Since::Now,
        "Calls of one user in a second, such as 50 or 0.5; a second's calls may come at once. Further ones are answered \
         with 429 rate_limited, and counted as those of USER_MAX_CALLS. none: no limit.",
    ),
    plain(
        "WORKER_MAX_CALLS",
        "16384",
        Group::Limits,
        Since::Now,
        "Calls that one worker, or the program alone, looks after at once, running and waiting. Further ones go to \
         another worker, or are answered with 503 overloaded. From 1 to 1000000.",
    ),
    plain(
        "SERVER_QUEUE",
        "1024",
        Group::Limits,
        Since::Now,
        "Calls that may wait on one worker for a free slot of one server (of one user's own process), within their \
         deadlines; further ones are treated as those of WORKER_MAX_CALLS. From 1 to 1000000.",
    ),
    plain(
        "SERVER_MAX_PROCESSES",
        "1024",
        Group::Limits,
        Since::Now,
        "Processes that one process of a server may have with all that it starts; with more it is ended and started \
         again as after a crash. Counted every two seconds. From 1 to 1000000; none: no limit.",
    ),
    plain(
        "SERVER_MAX_MEMORY",
        "none",
        Group::Limits,
        Since::Now,
        "Memory that these may take together, in the same way; from 1mb to 64gb. none: no limit but the machine's, \
         and the kernel ends servers first.",
    ),
    plain(
        "DATA_DIR",
        "./data",
        Group::Storage,
        Since::Now,
        "Folder of the embedded store, the generated key and the packages.",
    ),
    secret(
        "SECRETS_KEY",
        "generated on a single node",
        Group::Secrets,
        Since::Now,
        "Key that encrypts secrets: 32 bytes in hex or base64, or a long passphrase. All nodes of a cluster \
         have the same one.",
    ),
    plain(
        "SECRETS_KEYS_FILE",
        "",
        Group::Secrets,
        Since::Now,
        "File with a key ring: lines of kid:base64 of 32 bytes, the first one encrypts. It is read again at \
         SIGHUP. With SECRETS_KEY set as well, that one is the key of the line k1:SECRETS_KEY, and otherwise for \
         values in the format of earlier versions only.",
    ),
    plain(
        "LEGACY_SECRETS",
        "rw where such values exist, else off",
        Group::Secrets,
        Since::Now,
        "Secrets in the format of earlier versions: rw reads and writes them, ro reads them, off refuses \
         them.",
    ),
    plain(
        "DEBUG",
        "false",
        Group::Logging,
        Since::Now,
        "Enable debug logging of this program's own parts, unless RUST_LOG says more.",
    ),
    plain(
        "LOG_FORMAT",
        "auto",
        Group::Logging,
        Since::Now,
        "pretty for people, json for one JSON object a line; auto is pretty on a terminal, else json.",
    ),
    plain(
        "RUST_LOG",
        "info",
        Group::Logging,
        Since::Now,
        "Log filter, such as info or mcp_gateway=debug,warn.",
    ),
    plain(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        Group::Traces,
        Since::Now,
        "Collector that traces are exported to by OTLP over HTTP, such as http://127.0.0.1:4318; they go to \
         /v1/traces below it. Unset: none are made.",
    ),
    plain(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "",
        Group::Traces,
        Since::Now,
        "The address of traces as a whole; wins over the one above.",
    ),
    secret(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "",
        Group::Traces,
        Since::Now,
        "Headers for the collector: name=value pairs, comma-separated, values percent-encoded.",
    ),
    secret(
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        "",
        Group::Traces,
        Since::Now,
        "The same for traces only; wins over those above.",
    ),
    plain(
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "http/protobuf",
        Group::Traces,
        Since::Now,
        "How the collector is spoken to. There is no other.",
    ),
    plain("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "", Group::Traces, Since::Now, "The same for traces only."),
    plain(
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        "10000",
        Group::Traces,
        Since::Now,
        "Milliseconds that sending a batch of spans may take, with all attempts.",
    ),
    plain("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "", Group::Traces, Since::Now, "The same for traces only."),
    plain(
        "OTEL_SERVICE_NAME",
        "mcp-gateway or mcp-worker",
        Group::Traces,
        Since::Now,
        "What this program is called in traces (service.name).",
    ),
    plain(
        "OTEL_RESOURCE_ATTRIBUTES",
        "",
        Group::Traces,
        Since::Now,
        "What else traces say of this program: key=value pairs, comma-separated, values percent-encoded.",
    ),
    plain(
        "OTEL_TRACES_SAMPLER",
        "parentbased_always_on",
        Group::Traces,
        Since::Now,
        "Which traces are recorded: always_on, always_off, traceidratio, or one of them with parentbased_ before \
         it: then the caller decides, if its request says so.",
    ),
    plain(
        "OTEL_TRACES_SAMPLER_ARG",
        "1",
        Group::Traces,
        Since::Now,
        "The share of traces that traceidratio records, from 0 to 1.",
    ),
    plain(
        "OTEL_TRACES_EXPORTER",
        "otlp",
        Group::Traces,
        Since::Now,
        "none exports no traces, whatever else is set.",
    ),
    plain(
        "OTEL_SDK_DISABLED",
        "false",
        Group::Traces,
        Since::Now,
        "true exports no traces, whatever else is set.",
    ),
    plain(
        "OTEL_BSP_MAX_QUEUE_SIZE",
        "2048",
        Group::Traces,
        Since::Now,
        "Spans that may wait to be exported. Further ones are dropped and counted.",
    ),
    plain(
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        "512",
        Group::Traces,
        Since::Now,
        "Spans that are sent together.",
    ),
    plain(
        "OTEL_BSP_SCHEDULE_DELAY",
        "5000",
        Group::Traces,
        Since::Now,
        "Milliseconds that spans wait for others to be sent with.",
    ),
    plain(
        "AUDIT_FILE",
        "audit/audit.jsonl",
        Group::Audit,
        Since::Now,
        "File of the audit log; the default is below DATA_DIR. Each process has a file of its own: one that finds it \
         taken writes audit-2.jsonl, and so on.",
    ),
    plain(
        "AUDIT_CALLS",
        "denied",
        Group::Audit,
        Since::Now,
        "Calls of tools that the audit log has: none, denied (refused for want of a right), or all.",
    ),
    plain(
        "AUDIT_ROTATE_SIZE",
        "64mb",
        Group::Audit,
        Since::Now,
        "Size at which the file is put aside, under the number of its first line, and the next begun: from 1kb to \
         1gb. Nothing is ever deleted.",
    ),
    plain(
        "COMMANDS_ALLOW",
        "all but shells",
        Group::Children,
        Since::Now,
        "Programs, comma-separated, that servers may be started with: names as records have them, or absolute paths. \
         Only these then, and what installed packages bring along; with * everything but shells, and these.",
    ),
    plain(
        "ENV_ALLOW",
        "",
        Group::Children,
        Since::Now,
        "Environment variables, comma-separated, that records of servers may set although they make programs run \
         other code, such as NODE_OPTIONS.",
    ),
    plain(
        "INSTALL_ON_START",
        "@missionsquad/mcp-github|github,@missionsquad/mcp-helper-tools|helper-tools",
        Group::Packages,
        Since::Now,
        "npm packages that are installed on the first start of a store, as comma-separated pairs of package \
         and server; none for none at all.",
    ),
    plain(
        "SEARXNG_URL",
        "",
        Group::Packages,
        Since::Now,
        "SearXNG instance URL for the built-in web search tool, which has to answer with JSON (search.formats in its \
         settings). It is the operator's own, so it may be a private address. Unset: there is no such tool.",
    ),
    plain(
        "CHROMIUM",
        "auto",
        Group::Packages,
        Since::Now,
        "The Chromium that renders pages for the built-in get_url_content, by its path; auto looks for one on the PATH; \
         none fetches pages without a browser.",
    ),
    plain(
        "CHROMIUM_SANDBOX",
        "auto",
        Group::Packages,
        Since::Now,
        "Whether Chromium keeps pages in its sandbox: auto leaves it out for root, who cannot have it; always renders \
         nothing without it; never leaves it out, for containers that are a sandbox themselves.",
    ),
    plain(
        "CHROMIUM_MAX_MEMORY",
        "1gb",
        Group::Packages,
        Since::Now,
        "Memory that Chromium's processes may take together, from 256mb, with what they share counted once: beyond that \
         the largest page ends.",
    ),
    plain(
        "WEBTOOLS_PAGES",
        "4",
        Group::Packages,
        Since::Now,
        "Pages that get_url_content reads at once on one worker; more of them wait.",
    ),
    plain(
        "PYTHON_BIN",
        "",
        Group::Packages,
        Since::Now,
        "Path to the Python executable; python3, then python when unset.",
    ),
    plain(
        "PYTHON_VENV_DIR",
        "packages/python",
        Group::Packages,
        Since::Now,
        "Base directory for Python virtual environments; the default is below DATA_DIR.",
    ),
    secret("PIP_INDEX_URL", "", Group::Packages, Since::Now, "Custom PyPI index URL for pip."),
    secret("PIP_EXTRA_INDEX_URL", "", Group::Packages, Since::Now, "Additional PyPI index URL for pip."),
    plain(
        "EGRESS_ALLOW",
        "",
        Group::Remote,
        Since::Now,
        "Hosts, *.domains, addresses and networks, comma-separated, that requests steered by users may reach \
         although they are private or local.",
    ),
    plain(
        "PUBLIC_URL",
        "",
        Group::Remote,
        Since::Now,
        "Where browsers reach this program, such as https://mcp.example.com: authorization servers send \
         users back to /auth/callback below it. Unset: the address that the browser's request names.",
    ),
    secret(
        "GOOGLE_OAUTH_CREDENTIALS",
        "",
        Group::Remote,
        Since::Now,
        "Full Google OAuth credentials JSON (single-line string) for the Stdio OAuth2 flow.",
    ),
    secret(
        "NATS_URL",
        "",
        Group::Cluster,
        Since::Now,
        "NATS that connects gateways and workers: nats:// or tls:// and host:port, several comma-separated. \
         User and password, or a token, may stand before an @. Unset: the worker runs in this program.",
    ),
    plain(
        "NATS_SERVER_BIN",
        "nats-server on PATH",
        Group::Cluster,
        Since::Now,
        "The nats-server that `mcp-gateway cluster` starts where NATS_URL is not set.",
    ),
    plain(
        "MONGOD_BIN",
        "mongod or secantusd-py on PATH",
        Group::Cluster,
        Since::Now,
        "The database that `mcp-gateway cluster` starts where neither MONGODB_URI nor MONGO_HOST is set: mongod, or \
         another program with its options --bind_ip, --port and --dbpath.",
    ),
    plain("NATS_CREDS", "", Group::Cluster, Since::Now, "Credentials file for NATS, as nsc writes it."),
    plain("NATS_NKEY_SEED_FILE", "", Group::Cluster, Since::Now, "File with the NKey seed of a NATS user."),
    plain(
        "NATS_TLS_CA_FILE",
        "",
        Group::Cluster,
        Since::Now,
        "Certificates, in PEM, that NATS' own certificate must come from; asks for TLS.",
    ),
    plain(
        "NATS_TLS_CERT_FILE",
        "",
        Group::Cluster,
        Since::Now,
        "This node's certificate for NATS, in PEM; asks for TLS.",
    ),
    plain("NATS_TLS_KEY_FILE", "", Group::Cluster, Since::Now, "The key of that certificate, in PEM."),
    plain(
        "NATS_PREFIX",
        "mcp",
        Group::Cluster,
        Since::Now,
        "First token of every subject, so that several fleets can share one NATS: 1 to 32 letters, digits, \
         _ or -.",
    ),
    plain(
        "NATS_AUTH",
        "",
        Group::Cluster,
        Since::Now,
        "none: use a NATS that is not on this machine although it asks nobody for a login, so that whoever \
         reaches it is trusted.",
    ),
    plain(
        "START_TIMEOUT_SECONDS",
        "60",
        Group::Cluster,
        Since::Now,
        "How long a start waits for MongoDB and NATS when they cannot be reached yet; from 1 to 600.",
    ),
    plain(
        "WORKER_HOST",
        "127.0.0.1",
        Group::Cluster,
        Since::Now,
        "Address of a worker's health and metrics. Any address may be chosen: it tells whether the worker \
         lives, is ready and how busy it is, and nothing of whom it works for.",
    ),
    plain(
        "WORKER_PORT",
        "9090",
        Group::Cluster,
        Since::Now,
        "Port of a worker's health and metrics; 0 picks a free one and logs it.",
    ),
    secret(
        "MONGODB_URI",
        "",
        Group::Cluster,
        Since::Now,
        "Full MongoDB connection string; wins over MONGO_HOST, MONGO_USER and MONGO_PASS.",
    ),
    secret(
        "MONGO_HOST",
        "",
        Group::Cluster,
        Since::Now,
        "MongoDB host and port, several comma-separated, or a full mongodb:// or mongodb+srv:// URI; the \
         embedded store when unset.",
    ),
    plain(
        "MONGO_USER",
        "root",
        Group::Cluster,
        Since::Now,
        "MongoDB username. The default and that of MONGO_PASS are for a MongoDB on this machine: they are \
         tried there, and left out if it knows no such user; any other needs both in so many words.",
    ),
    secret("MONGO_PASS", "example", Group::Cluster, Since::Now, "MongoDB password."),
    plain(
        "MONGO_DBNAME",
        "squad-test",
        Group::Cluster,
        Since::Now,
        "MongoDB database name for MCP server records and packages. MONGODB_URI may name it instead.",
    ),
    plain(
        "MONGO_REPLICASET",
        "",
        Group::Cluster,
        Since::Now,
        "MongoDB replica set name, for replica set connections.",
    ),
    plain(
        "SECRETS_DBNAME",
        "secrets",
        Group::Cluster,
        Since::Now,
        "MongoDB collection for encrypted secrets. Despite its name, mcp-api takes it for a collection in \
         MONGO_DBNAME too.",
    ),
];
