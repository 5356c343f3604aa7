//! A hand-written MCP server on standard input and output, made to behave and to misbehave.
//!
//! Nearly every test talks to it, and the benchmarks use its `echo`. It is a function and not a
//! program of its own, because a test binary (or the load generator) starts itself again with
//! [`run`]'s arguments and so needs nothing installed. Threads and blocking reads keep it apart from
//! the code under test: it shares neither its runtime nor its framing.
//!
//! # Tools
//!
//! The first five are those of mcp-api's recorded exchanges, word for word. The others come with
//! `--more`. Every tool answers with one text block unless the table says otherwise; a tool that takes
//! its time runs on its own thread, so calls never wait for each other.
//!
//! | tool | arguments | what it does |
//! |---|---|---|
//! | `echo` | `text` | answers `text`, spelled as it came |
//! | `sleep` | `ms`, `started?` | answers `slept MS` after that time; first it appends a line to that file |
//! | `fail` | `text?` | answers `it failed` with `isError` |
//! | `throw` | | answers `boom` with `isError` |
//! | `args` | anything | answers its arguments as compact JSON, numbers and escapes untouched |
//! | `env` | `name?` | the whole environment as an object, or one variable (`isError` if it is not set) |
//! | `pid` | | `{"pid":..,"ppid":..,"pgid":..}` |
//! | `count` | | how often this process was asked: `1`, `2`, ... |
//! | `remember`, `recall` | `value` | keeps a value in this process, answers it (`null` before) |
//! | `progress` | `steps`, `delayMs` | one `notifications/progress` per step, then `done` |
//! | `rpc_error` | `code`, `message`, `data?` | a JSON-RPC error |
//! | `crash` | | exits with [`CRASH_CODE`] without answering |
//! | `answer_then_crash` | | answers `last words`, then exits with [`CRASH_CODE`] |
//! | `hang` | | never answers, whatever happens |
//! | `cancellable` | `ms` | answers `not cancelled` after that time; never, once it is cancelled |
//! | `cancelled` | | the request ids of all `notifications/cancelled` so far, as an array |
//! | `vendor` | | [`VENDOR_RESULT`], byte for byte |
//! | `image` | | an image block with a tiny PNG |
//! | `json_text` | | [`JSON_TEXT`] as text |
//! | `big` | `bytes` | a text of that many `x` |
//! | `unended` | `bytes` | writes that much of one line and then nothing any more |
//! | `raw` | `line`, `answer?` | writes the line as it is, then answers unless `answer` is false |
//! | `garbage` | `lines` | writes lines that are not JSON, then answers |
//! | `flood` | `notifications` | writes as many `notifications/message`, then answers |
//! | `unknown_ids` | `n` | writes answers that nobody asked for, then its own |
//! | `duplicate_answer` | | answers `first`, then again `second` |
//! | `late_answer` | `ms` | answers `late` after that time although it was cancelled |
//! | `stderr` | `lines`, `bytes?`, `text?` | writes lines (padded to `bytes`) to standard error |
//! | `grandchild` | `escape?` | starts a long `sleep` and answers its pid; `escape` puts it into another session |
//! | `add_tool` | | adds `added_N` and sends `notifications/tools/list_changed`; answers the new name |
//! | `log_secret` | anything | writes its arguments to standard error |
//! | `log_env` | `name` | writes that variable to standard error; not listed |
//! | `digest` | `of` | the SHA-256 of the argument of that name, or else of the variable, in hex: what shows that a secret came, and not which; not listed |
//! | `meta` | | the `_meta` of the call as compact JSON, or `null`; not listed |
//! | `touch` | `path`, `text` | appends a line to a file, with one write |
//! | `record` | `path`, `id`, `ms?`, `KEY?`, `lock?` | appends `run ID PID KEY` to a file, then takes its time; `clash` instead of `run` if another process has the `lock` |
//! | `server_request` | | sends `roots/list` and `ping` to the client; answers what came back within 5 s |
//! | `exit_when_idle` | `ms` | answers, then exits with 0 after that time |
//! | `relist` | | sends `notifications/tools/list_changed`; not listed |
//! | `spy` | `pids` | what it can see of these processes and of what it was given itself; not listed |
//! | `auth_get_authorization_url` | `redirect_uri`, `state` | the address of a login; not listed |
//! | `auth_exchange_code` | `code` | tokens for a code that begins with `good`; not listed |
//!
//! An unknown tool is answered as the Node SDK does: a result with `isError`.
//!
//! # Flags
//!
//! | flag | effect |
//! |---|---|
//! | `--more` | offers all tools of the table |
//! | `--pages N` | lists the tools in N pages with odd-looking cursors |
//! | `--tools-file P` | lists the tools in the file as well, one JSON object a line, read anew each time; whatever is called and unknown answers `called NAME` |
//! | `--read-only` | says of every tool of `--more` that it only reads, which is not true |
//! | `--no-tools` | declares the capability and has no tools |
//! | `--list-error` | answers `tools/list` with an error |
//! | `--modern-only` | refuses `initialize`, serves `server/discover` and requests of revision 2026-07-28 |
//! | `--never-initialize` | reads and never answers anything |
//! | `--start-delay-ms N` | does nothing for that time first |
//! | `--exit-at-start CODE` | complains on standard error and exits |
//! | `--tell NAME` | writes that variable to standard error at the start, last of all if it does not start |
//! | `--env-required NAME` | complains and exits with 1 when the variable is missing |
//! | `--fail-first N --state-file P` | the first N starts exit with 1; the file counts them |
//! | `--start-file P` | appends its pid to the file, one line for each start |
//! | `--banner N` | writes N lines that are not JSON to standard output first |
//! | `--crash-after N` | answers N calls and exits with [`CRASH_CODE`] when the next one arrives |
//! | `--linger` | does not leave at the end of standard input, dies by SIGTERM |
//! | `--ignore-stop` | does not leave at the end of standard input and ignores SIGTERM |
//! | `--hostile MODE` | adds the tool `misbehave`, or misbehaves earlier: see [`hostile`] |
//! | `--wrapper` | like `npx`: runs itself without this flag as a child and leaves alone at the end of input |
//!
//! A process that outlives its standard input still leaves after [`LINGER`], so that a test that was
//! killed leaves nothing behind for good. Without those flags it leaves at once, calls in flight or not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "this is test support: a failure should end the process loudly"
)]

mod catalog;
pub mod hostile;
mod protocol;
mod record;
mod spy;
#[cfg(test)]
mod tests;
mod tools;

use std::{
    env,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    path::Path,
    process::{self, Command, Stdio},
    thread,
    time::Duration,
};

use protocol::{Output, Server};

/// What the tool `vendor` answers, byte for byte: an unknown type of content, fields of a vendor at
/// every level, unusual spellings of numbers and strings, and white space inside.
pub const VENDOR_RESULT: &str = concat!(
    r#"{"content":[{"type":"video","data":"AAAA","mimeType":"video/mp4","x-vendor":{"frames":1.0}},"#,
    r#"{"type":"text","text":"\u00e4 ß \/ \ud83d\ude00","annotations":{"priority":1.0,"x-vendor":[true]},"#,
    r#""_meta":{"vendor.example/item":1e3}}],"structuredContent":{"exact":1.0,"thousand":1e3,"#,
    r#""huge":12345678901234567890,"minusZero":-0.0,"text":"\u00e4","spaced": [ 1, 2 ] },"isError":false,"#,
    r#""x-vendor":{"nested":{"kept":[1.0,1e3,12345678901234567890]}},"_meta":{"vendor.example/trace":"\u00e4"}}"#
);

/// The text that the tool `json_text` answers, itself a JSON document.
pub const JSON_TEXT: &str = r#"{"answer":42,"list":[1,2.0,"three"],"nested":{"text":"ä"}}"#;

/// The exit code of every crash that was asked for.
pub const CRASH_CODE: i32 = 3;

/// How long a process stays that does not leave at the end of its standard input.
pub const LINGER: Duration = Duration::from_secs(300);

/// Stands in for `--ignore-stop` once SIGTERM is ignored.
const STOP_IGNORED: &str = "--stop-ignored";

/// How to start and how to behave, from the command line.
#[derive(Debug, Default)]
struct Options {
    more: bool,
    read_only: bool,
    pages: usize,
    no_tools: bool,
    list_error: bool,
    modern_only: bool,
    never_initialize: bool,
    start_delay: Duration,
    exit_at_start: Option<i32>,
    env_required: Vec<String>,
    tell: Option<String>,
    fail_first: usize,
    state_file: Option<String>,
    start_file: Option<String>,
    banner: usize,
    crash_after: Option<usize>,
    linger: bool,
    ignore_stop: bool,
    stop_ignored: bool,
    hostile: Option<String>,
    tools_file: Option<String>,
    wrapper: bool,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let mut options = Self { pages: 1, ..Self::default() };
        let mut args = args.iter();
        while let Some(flag) = args.next() {
            let mut value = || args.next().cloned().ok_or_else(|| format!("{flag} needs a value"));
            match flag.as_str() {
                "--more" => options.more = true,
                "--read-only" => options.read_only = true,
                "--pages" => options.pages = number(flag, &value()?)?,
                "--no-tools" => options.no_tools = true,
                "--list-error" => options.list_error = true,
                "--modern-only" => options.modern_only = true,
                "--never-initialize" => options.never_initialize = true,
                "--start-delay-ms" => options.start_delay = Duration::from_millis(number(flag, &value()?)?),
                "--exit-at-start" => options.exit_at_start = Some(number(flag, &value()?)?),
                "--tell" => options.tell = Some(value()?),
                "--env-required" => options.env_required.push(value()?),
                "--fail-first" => options.fail_first = number(flag, &value()?)?,
                "--state-file" => options.state_file = Some(value()?),
                "--start-file" => options.start_file = Some(value()?),
                "--banner" => options.banner = number(flag, &value()?)?,
                "--crash-after" => options.crash_after = Some(number(flag, &value()?)?),
                "--linger" => options.linger = true,
                "--ignore-stop" => options.ignore_stop = true,
                STOP_IGNORED => options.stop_ignored = true,
                "--hostile" => options.hostile = Some(value()?),
                "--tools-file" => options.tools_file = Some(value()?),
                "--wrapper" => options.wrapper = true,
                _ => return Err(format!("unknown flag {flag}")),
            }
        }
        if options.pages == 0 {
            return Err("--pages must be at least 1".to_owned());
        }
        if options.fail_first > 0 && options.state_file.is_none() {
            return Err("--fail-first needs --state-file".to_owned());
        }
        Ok(options)
    }
}

fn number<T: std::str::FromStr>(flag: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{flag} needs a number, not {value}"))
}

/// Serves MCP on this process's standard input and output until the input ends, and returns the exit
/// code. `args` are the flags of the module's table; they must stand among the process's own arguments
/// (behind whatever made the caller come here), because `--wrapper` and `--ignore-stop` start the
/// process again with them.
///
/// Behind `--http` they are those of [`super::remote`], and it serves MCP over HTTP instead.
pub fn run(args: &[String]) -> i32 {
    if args.first().is_some_and(|flag| flag == "--http") {
        return super::remote::run(args);
    }
    let options = match Options::parse(args) {
        Ok(options) => options,
        Err(error) => {
            complain(&error);
            return 2;
        }
    };
    // The wrapper comes first: all other flags are meant for the child that it starts.
    if options.wrapper {
        return wrap();
    }
    if options.ignore_stop {
        return ignore_stop();
    }
    if let Some(path) = &options.start_file {
        append_line(Path::new(path), &process::id().to_string()).expect("the start file can be written");
    }
    if let Some(code) = options.hostile.as_deref().and_then(hostile::at_start) {
        return code;
    }
    thread::sleep(options.start_delay);
    if let Some(name) = options.env_required.iter().find(|name| env::var_os(name).is_none()) {
        complain(&format!("cannot start: missing environment variable {name}"));
        return 1;
    }
    if let Some(code) = options.exit_at_start {
        complain("cannot start: missing setting");
        tell(&options);
        return code;
    }
    tell(&options);
    if let Some(path) = &options.state_file {
        append_line(Path::new(path), "start").expect("the state file can be written");
        let starts = fs::read_to_string(path).expect("the state file can be read").lines().count();
        if starts <= options.fail_first {
            complain(&format!("cannot start: failure {starts} of {}", options.fail_first));
            return 1;
        }
    }

    // Plain files instead of the standard handles: no line buffer splits what is written at once.
    let input = File::from(io::stdin().as_fd().try_clone_to_owned().expect("standard input is open"));
    let output = File::from(io::stdout().as_fd().try_clone_to_owned().expect("standard output is open"));
    let output = Output::new(output);
    let banner = |n| format!("Welcome to the fixture, line {n}; this is not JSON\n");
    output.write((1..=options.banner).map(banner).collect::<String>().as_bytes());
    let stays = options.linger || options.stop_ignored;
    let mut server = Server::new(options, output);
    server.serve(input);
    if server.loot.deaf {
        server.go_deaf();
    }
    if stays {
        thread::sleep(LINGER);
    }
    0
}

/// Speaks a variable out loud, as servers do that say with what they were set up.
fn tell(options: &Options) {
    if let Some(name) = &options.tell {
        complain(&format!("{name} is {}", env::var(name).unwrap_or_default()));
    }
}

/// Serves MCP between these two, with flags of the table that concern no process.
pub(super) fn serve(args: &[String], input: impl io::Read, output: impl Write + Send + 'static) {
    match Options::parse(args) {
        Ok(options) => Server::new(options, Output::new(output)).serve(input),
        Err(error) => complain(&error),
    }
}

/// Behaves like the launchers that packages are started with: a child does the work, and closing the
/// wrapper's standard input makes the wrapper leave whatever the child does.
fn wrap() -> i32 {
    let args = match own_args("--wrapper", None) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let mut child = own_command(args).stdin(Stdio::piped()).spawn().expect("the wrapped process starts");
    let mut pipe = child.stdin.take().expect("the child's standard input is a pipe");
    thread::spawn(move || {
        // A write that fails means that the child has gone; its exit code is on its way then.
        if io::copy(&mut io::stdin().lock(), &mut pipe).is_ok() {
            drop(pipe);
            process::exit(0);
        }
    });
    child.wait().expect("the wrapped process can be waited for").code().unwrap_or(1)
}

/// Starts this process anew with SIGTERM ignored: a signal that is ignored stays so in the program that
/// takes the process over, and a shell can ignore one without any unsafe code. The process keeps its id.
fn ignore_stop() -> i32 {
    let args = match own_args("--ignore-stop", Some(STOP_IGNORED)) {
        Ok(args) => args,
        Err(code) => return code,
    };
    let own = env::current_exe().expect("this program has a path");
    let script = r#"trap "" TERM; exec "$0" "$@""#;
    let error = Command::new("/bin/sh").arg("-c").arg(script).arg(own).args(args).exec();
    complain(&format!("cannot start again with SIGTERM ignored: {error}"));
    1
}

/// This process's arguments with one flag taken out or replaced. It is an error if the flag is not
/// among them, since starting again with the same arguments would never end.
fn own_args(flag: &str, replacement: Option<&str>) -> Result<Vec<OsString>, i32> {
    let mut args: Vec<OsString> = env::args_os().skip(1).collect();
    let Some(at) = args.iter().position(|arg| arg == flag) else {
        complain(&format!("{flag} must be among the arguments of the process"));
        return Err(2);
    };
    args.splice(at..=at, replacement.map(OsString::from));
    Ok(args)
}

fn own_command(args: Vec<OsString>) -> Command {
    let mut command = Command::new(env::current_exe().expect("this program has a path"));
    command.args(args);
    // Programs that choose their part by the name they were called with keep it.
    if let Some(name) = env::args_os().next() {
        command.arg0(name);
    }
    command
}

/// Writes a line to standard error; who closed it does not want to know.
pub(super) fn complain(text: &str) {
    let _ = io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

/// Appends a line with one write, so that lines of several processes do not mix.
pub(super) fn append_line(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).append(true).open(path)?;
    file.write_all(format!("{text}\n").as_bytes())
}
