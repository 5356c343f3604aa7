//! The normative table of limits and times that are not settings. What bounds something that users can
//! see takes its number from here; records and requests may override where the comment says so. (The
//! grammar of names, with their lengths, stands in [`crate::ids`].)

use std::time::Duration;

macro_rules! table {
    ($($(#[doc = $doc:literal])* $name:ident: $kind:ty = $value:expr;)*) => {
        $($(#[doc = $doc])* pub const $name: $kind = $value;)*

        /// Every entry as (name, value, meaning), for the documentation.
        pub fn entries() -> Vec<(&'static str, String, String)> {
            vec![$((stringify!($name), format!("{:?}", $name), concat!($($doc),*).trim().to_owned()),)*]
        }
    };
}

table! {
    /// Bounds one tool call; a record's `toolTimeout` and `X-Request-Timeout-Ms` override it.
    TOOL_TIMEOUT: Duration = Duration::from_secs(60);
    /// The most that a call may take, whoever asks.
    TOOL_TIMEOUT_MAX: Duration = Duration::from_secs(600);
    /// Bounds start and tool discovery; a record's `startupTimeout` overrides it.
    STARTUP_TIMEOUT: Duration = Duration::from_secs(180);
    /// The most that a start may take.
    STARTUP_TIMEOUT_MAX: Duration = Duration::from_secs(300);
    /// A `per_user` process that nobody called for this long is stopped; `idleTimeout` overrides it.
    PER_USER_IDLE_TIMEOUT: Duration = Duration::from_secs(600);
    /// Calls in flight on one connection; a record's `concurrency` overrides it.
    CONCURRENCY: usize = 64;
    /// The most that a record's `concurrency` may be.
    CONCURRENCY_MAX: u32 = 1_024;
    /// The most that a record's `instances` may be.
    INSTANCES_MAX: u32 = 64;
    /// Processes of one `per_user` server that may run at once on one worker.
    PER_USER_PROCESSES: usize = 256;
    /// Bytes of one tool result.
    RESULT_BYTES: usize = 16 * 1024 * 1024;
    /// Bytes of one line on a server's standard output; a longer line fails its own call.
    LINE_BYTES: usize = 17 * 1024 * 1024;
    /// A line that has not ended by now costs the process its life.
    LINE_BYTES_FATAL: usize = 64 * 1024 * 1024;
    /// Bytes of one stored secret.
    SECRET_BYTES: usize = 64 * 1024;
    /// Lines of standard error that are kept for each server.
    LOG_LINES: usize = 200;
    /// Bytes of one such line; the rest is cut.
    LOG_LINE_BYTES: usize = 4 * 1024;
    /// Tools that one server may list.
    TOOLS: usize = 10_000;
    /// Pages of one `tools/list`.
    TOOL_PAGES: usize = 1_000;
    /// Progress events that wait for a slow reader; further ones are dropped, results never.
    PROGRESS_QUEUE: usize = 64;
    /// Bytes of one progress report.
    PROGRESS_BYTES: usize = 64 * 1024;
    /// Bytes of the id of a request that a server makes.
    REQUEST_ID_BYTES: usize = 256;
    /// How long a server that announces new tools waits to be asked again.
    LISTING_PAUSE: Duration = Duration::from_secs(1);
    /// How long a cancelled call may hold its slot while the server makes up its mind.
    CANCEL_GRACE: Duration = Duration::from_secs(5);
    /// A process that did not give up so many cancelled calls in that time is replaced when no call is with it.
    IGNORED_CANCELS: usize = 3;
    /// How long calls in flight may take when their server is stopped by an administrator.
    STOP_DRAIN: Duration = Duration::from_secs(5);
    /// How long a process has to leave after its standard input was closed.
    STOP_EOF: Duration = Duration::from_secs(2);
    /// How long it has after SIGTERM; then SIGKILL.
    STOP_TERM: Duration = Duration::from_secs(2);
    /// First pause before a server that crashed or did not start is started again; doubles each time.
    RESTART_BACKOFF: Duration = Duration::from_millis(500);
    /// The longest such pause.
    RESTART_BACKOFF_MAX: Duration = Duration::from_secs(60);
    /// A process that ran for this long before it died is not in a crash loop.
    STABLE_AFTER: Duration = Duration::from_secs(60);
    /// How long a process may say nothing before it is asked for a sign of life, while calls wait for it; and how
    /// often it is asked then.
    PING_INTERVAL: Duration = Duration::from_secs(5);
    /// A process that owes so many such signs is replaced, once all calls that it had when it fell silent had their
    /// time, and the time that a call of the server has by default is over, too.
    PINGS_MISSED: u32 = 3;
    /// Lines a second on a server's standard output that are no messages; more of them are noted as a fault.
    NOISE_PER_SECOND: u32 = 100;
    /// Progress reports a second that one connection passes on. Further ones are dropped, results never.
    PROGRESS_PER_SECOND: u32 = 1_000;
    /// Bytes of one file that a server writes, as a soft limit that the server may raise.
    CHILD_FILE_BYTES: u64 = 16 * 1024 * 1024 * 1024;
    /// How much rather the kernel ends a server than the worker when memory runs out (`oom_score_adj`).
    CHILD_OOM_SCORE: i32 = 500;
    /// Bytes of a page, PDF or text that the built-in `get_url_content` reads, with all that the page loads.
    WEB_PAGE_BYTES: usize = 24 * 1024 * 1024;
    /// Bytes of the Markdown or text that it answers with; the rest is cut, which the answer says.
    WEB_TEXT_BYTES: usize = 1024 * 1024;
    /// How long a page may take to load; what is there by then is taken as it is.
    WEB_PAGE_TIMEOUT: Duration = Duration::from_secs(20);
    /// How long a page, PDF or text may take without a browser.
    WEB_FETCH_TIMEOUT: Duration = Duration::from_secs(30);
    /// Redirects that are followed.
    WEB_REDIRECTS: usize = 10;
    /// How long it may take to make Markdown of a page, or text of a PDF.
    WEB_CONVERT_TIMEOUT: Duration = Duration::from_secs(10);
    /// Bytes of memory that this may take. It happens in a process of its own.
    WEB_CONVERT_MEMORY: u64 = 1024 * 1024 * 1024;
    /// A browser that nobody asked for a page for so long is ended.
    BROWSER_IDLE: Duration = Duration::from_secs(300);
    /// How long a browser may take to start.
    BROWSER_START: Duration = Duration::from_secs(30);
    /// How long no browser is started after one did not start; pages are fetched without until then.
    BROWSER_PAUSE: Duration = Duration::from_secs(30);
    /// How long the built-in `web_search` waits for the search engine.
    SEARCH_TIMEOUT: Duration = Duration::from_secs(20);
    /// Bytes of the search engine's answer.
    SEARCH_BYTES: usize = 4 * 1024 * 1024;
    /// Entries of the cache of (still encrypted) secrets, by user and server.
    SECRET_CACHE: usize = 20_000;
    /// For how long after the store of a fleet last answered what is remembered of secrets may be used. (That
    /// somebody has none may be used for longer: whoever sets one has to reach every worker.)
    SECRET_TRUST: Duration = Duration::from_secs(60);
    /// Documents that are encrypted anew in a second when keys are changed; whoever begins that may say another number.
    REWRAP_RATE: u32 = 200;
    /// The most that may be said there.
    REWRAP_RATE_MAX: u32 = 10_000;
    /// Values that could not be opened then, and are named in the report.
    REWRAP_NAMED: usize = 100;
    /// How long new keys wait for the fleet to have them, before they are refused.
    KEYS_PATIENCE: Duration = Duration::from_secs(5);
    /// How long an operation of MongoDB may take.
    STORE_TIMEOUT: Duration = Duration::from_secs(5);
    /// How long one of the embedded store may take. A disk that is busy is waited for: there is no other store to go
    /// to, and whether a write that was given up took effect nobody knows.
    DISK_TIMEOUT: Duration = Duration::from_secs(20);
    /// Store operations that may wait.
    STORE_QUEUE: usize = 1_024;
    /// Connections to MongoDB of one node.
    STORE_POOL: u32 = 32;
    /// How long an operation waits for a MongoDB server that takes it.
    STORE_SELECTION_TIMEOUT: Duration = Duration::from_secs(2);
    /// How long making the indexes of a MongoDB database may take at a start.
    STORE_SCHEMA_TIMEOUT: Duration = Duration::from_secs(120);
    /// How often a worker of a cluster shows in the store that it lives.
    LEASE_RENEWAL: Duration = Duration::from_secs(1);
    /// A worker accepts calls of servers that may run only once for this long after the start of the
    /// last renewal that succeeded.
    LEASE_VALID: Duration = Duration::from_millis(2_500);
    /// A worker that could not renew for this long ends the processes of such servers, which have taken
    /// no call since `LEASE_VALID`: a short absence of the store costs no restart. It ends them at once
    /// when another worker has taken its lease.
    LEASE_RETIREMENT: Duration = Duration::from_secs(20);
    /// A worker whose lease another one has seen unchanged for this long, by its own clock, is lost: what
    /// it ran may be taken. It must be longer than `LEASE_VALID` by more than clocks may drift.
    LEASE_TAKEOVER: Duration = Duration::from_secs(4);
    /// How often a lease is looked at that may have to be taken over.
    LEASE_WATCH: Duration = Duration::from_millis(400);
    /// How long the store may take for one operation on a lease.
    LEASE_STORE_TIMEOUT: Duration = Duration::from_secs(2);
    /// Workers whose leases are remembered as last seen.
    LEASE_SIGHTINGS: usize = 1_024;
    /// Installations that run side by side on one worker.
    INSTALLS: usize = 2;
    /// How long an installation may take.
    INSTALL_TIMEOUT: Duration = Duration::from_secs(600);
    /// How long npm or pip may say nothing during an installation.
    INSTALL_SILENCE: Duration = Duration::from_secs(120);
    /// Bytes that one installation may have.
    INSTALL_BYTES: u64 = 2 * 1024 * 1024 * 1024;
    /// Files that one installation may have.
    INSTALL_FILES: u64 = 200_000;
    /// Bytes that must be free on the disk before an installation begins.
    INSTALL_FREE_BYTES: u64 = 500 * 1024 * 1024;
    /// How often an installation is begun that fails for a reason that may pass.
    INSTALL_ATTEMPTS: u32 = 3;
    /// The pause before it is begun again; grows with each.
    INSTALL_RETRY: Duration = Duration::from_secs(2);
    /// How often workers look for jobs of which nobody told them.
    JOB_POLL: Duration = Duration::from_secs(5);
    /// How often a gateway looks how far a job is that somebody waits for.
    JOB_WATCH: Duration = Duration::from_millis(300);
    /// How long a request waits for its installation to be over. The installation goes on without it.
    INSTALL_WAIT: Duration = Duration::from_secs(1_800);
    /// Upgrades that one `upgrade-all` runs side by side.
    UPGRADES: usize = 2;
    /// Specifications that one package's `pipDependencies` may have.
    PIP_DEPENDENCIES: usize = 64;
    /// Lines of a job's log.
    JOB_LOG_LINES: usize = 200;
    /// Bytes of such a line.
    JOB_LINE_BYTES: usize = 512;
    /// How long the last job of a server that does not exist is remembered.
    JOB_MEMORY: Duration = Duration::from_secs(7 * 24 * 3_600);
    /// How long a registry may take to say which version of a package is the latest.
    LATEST_TIMEOUT: Duration = Duration::from_secs(15);
    /// How long that is remembered.
    LATEST_MEMORY: Duration = Duration::from_secs(300);
    /// Registries that are asked at the same time.
    LATEST_LOOKUPS: usize = 4;
    /// Users of one remote server that one worker is connected for at the same time.
    REMOTE_USERS: usize = 4_096;
    /// How long a remote server may take to accept a connection, TLS included.
    REMOTE_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
    /// How long a remote server may leave a message unfinished that it has begun to send.
    REMOTE_STALL: Duration = Duration::from_secs(30);
    /// Bytes that a remote server may send in answer to one request, streams included.
    REMOTE_ANSWER_BYTES: usize = 32 * 1024 * 1024;
    /// How long a remote server has to hear that a session is over.
    REMOTE_FAREWELL: Duration = Duration::from_secs(5);
    /// How long a worker may take for what it is asked about a remote server.
    REMOTE_ASK_TIMEOUT: Duration = Duration::from_secs(60);
    /// How long one request to an authorization server may take.
    OAUTH_TIMEOUT: Duration = Duration::from_secs(15);
    /// Bytes of an authorization server's answer.
    OAUTH_ANSWER_BYTES: usize = 1024 * 1024;
    /// How long before its end an access token is refreshed; half of its life if that is shorter.
    OAUTH_REFRESH_AHEAD: Duration = Duration::from_secs(60);
    /// A worker that claimed a refresh and has not written its result for this long is lost: another may
    /// refresh. Longer than a refresh may take.
    OAUTH_REFRESH_TAKEOVER: Duration = Duration::from_secs(40);
    /// For how long after it was granted a slot counts as the wait that routers see.
    SLOT_WAIT_SHOWN: Duration = Duration::from_secs(1);
    /// How long a client may leave what it is sent unread, or unacknowledged; then its connection is closed.
    UNREAD_TIMEOUT: Duration = Duration::from_secs(30);
    /// How often a silent client's connection is tried out. One that leaves that unanswered is closed as well.
    KEEPALIVE: Duration = Duration::from_secs(15);
    /// How long a connection is kept without a request.
    IDLE_TIMEOUT: Duration = Duration::from_secs(75);
    /// How long a client may take to send the head of a request, from its first byte, or from the connection.
    HEADER_TIMEOUT: Duration = Duration::from_secs(10);
    /// How long a client may take for the handshake of TLS.
    HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
    /// How long a browser may remember what a preflight request was answered.
    CORS_MEMORY: Duration = Duration::from_secs(600);
    /// How long a client may take to send the body of a request.
    BODY_TIMEOUT: Duration = Duration::from_secs(30);
    /// Bytes of a request's address.
    URI_BYTES: usize = 8 * 1024;
    /// Bytes of a request's header fields together.
    HEAD_BYTES: usize = 64 * 1024;
    /// Header fields of one request.
    HEADER_COUNT: usize = 100;
    /// Lines of the audit log that wait to be written. Beyond them changes wait, and what else is recorded is dropped and counted.
    AUDIT_QUEUE: usize = 4_096;
    /// How long a change waits for its line; then it is refused.
    AUDIT_WAIT: Duration = Duration::from_secs(5);
    /// What `Retry-After` says where the audit log cannot be written.
    AUDIT_RETRY: Duration = Duration::from_secs(5);
    /// Refused requests in a second that one process records. Of further ones the number is recorded.
    AUDIT_DENIALS: u32 = 100;
    /// Characters of one text in a line of the audit log.
    AUDIT_TEXT: usize = 256;
    /// Tools that one such line names.
    AUDIT_TOOLS: usize = 100;
    /// Fields of one request body.
    BODY_FIELDS: usize = 256;
    /// Nesting of a request body.
    JSON_DEPTH: usize = 128;
    /// Bytes of a refused body that are taken in only so that its sender can read the answer.
    DISCARDED_BYTES: usize = 64 * 1024 * 1024;
    /// Bytes of a server's command, arguments and environment together.
    COMMAND_BYTES: usize = 1024 * 1024;
    /// The least that `Retry-After` says where calls wait for a server.
    RETRY_LEAST: Duration = Duration::from_secs(1);
    /// The most that it says there, before it is spread. It is how long those will take that wait.
    RETRY_MOST: Duration = Duration::from_secs(20);
    /// Users whose rates are remembered, where `USER_MAX_RATE` sets one.
    USERS: usize = 65_536;
    /// How often a gateway reads API keys again. One that was revoked elsewhere is of no more use after this.
    API_KEYS_REREAD: Duration = Duration::from_secs(2);
    /// For how long keys are trusted that could not be read again. After this nobody is let in with one.
    API_KEYS_TRUST: Duration = Duration::from_secs(60);
    /// How long a login link is good for.
    LOGIN_LINK: Duration = Duration::from_secs(600);
    /// Bytes of a token.
    TOKEN_BYTES: usize = 16 * 1024;
    /// How long a request for the public keys of a token's issuer may take.
    JWKS_TIMEOUT: Duration = Duration::from_secs(5);
    /// Bytes of its answer.
    JWKS_BYTES: usize = 1024 * 1024;
    /// For how long such keys are used without asking for them again.
    JWKS_MEMORY: Duration = Duration::from_secs(600);
    /// For how long, if the issuer does not answer.
    JWKS_TRUST: Duration = Duration::from_secs(86_400);
    /// Connections to a worker's health that are served at once.
    HEALTH_CONNECTIONS: usize = 64;
    /// How long such a connection, which has one request, may take.
    HEALTH_TIMEOUT: Duration = Duration::from_secs(10);
    /// How long a stop waits for the last spans to be exported.
    TRACES_FAREWELL: Duration = Duration::from_secs(3);
    /// Bytes of a log filter that is set while the program runs.
    LOG_FILTER_BYTES: usize = 1_024;
}
