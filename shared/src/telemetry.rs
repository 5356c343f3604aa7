//! Logging: lines for people on a terminal, JSON elsewhere, always on standard error.

use std::{any::Any, backtrace, io::IsTerminal, panic, sync::OnceLock, thread, time::Duration};

mod levels;
mod lines;

use tracing::{Level, Metadata};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{LevelFilter, filter_fn},
    layer::SubscriberExt,
    registry, reload,
    util::SubscriberInitExt,
};

use self::lines::Lines;
use crate::{config::LogFormat, error::shorten};

pub use levels::{FilterError, check_filter, filters, set_filter};

/// What stands in the log while nobody asks for more.
const DEFAULT: &str = "info";
/// What `DEBUG=true` makes of it: our own crates only, because libraries say a lot at that level.
const DEBUG: &str = "info,mcp_gateway=debug,mcp_worker=debug,mcp_nats=debug,mcp_shared=debug";
/// Libraries that write what passes through them into the log, if they are let, with the level up to which
/// they are. No setting lifts that: below it stand whole messages, with users' arguments and secrets, and of
/// those that speak to remote servers also authorization codes, tokens and headers.
const OUTSPOKEN: [(&str, Level); 7] = [
    ("async_nats", Level::INFO),
    ("mongodb", Level::INFO),
    ("rmcp", Level::WARN),
    ("oauth2", Level::WARN),
    ("reqwest", Level::WARN),
    // With `hyper_util` and all others that begin so.
    ("hyper", Level::WARN),
    ("h2", Level::WARN),
];
/// Characters of a panic's message that reach the log; it may hold somebody's data.
const PANIC_MESSAGE: usize = 200;

/// How long what was logged may take to be written when the program ends.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Where the lines of this process are left.
static LINES: OnceLock<Lines> = OnceLock::new();

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not one; the settings have already refused such a filter.
    #[error("the log filter is not valid")]
    Filter(#[source] tracing_subscriber::filter::ParseError),
    /// The process has set up logging before.
    #[error("logging is already set up")]
    AlreadySet(#[source] tracing_subscriber::util::TryInitError),
    /// The thread that writes the log did not start.
    #[error("the thread that writes the log did not start")]
    Thread(#[source] std::io::Error),
}

/// Sets up logging for the whole process, once. Panics are logged from then on, by place and thread and with
/// little of their message; they unwind and end as before.
pub fn init(format: LogFormat, debug: bool, filter: Option<&str>) -> Result<(), TelemetryError> {
    let configured = directives(debug, filter);
    let filter = EnvFilter::try_new(&configured).map_err(TelemetryError::Filter)?;
    let (filter, handle) = reload::Layer::new(filter);
    let terminal = std::io::stderr().is_terminal();
    // The default time stamps are RFC 3339 in UTC.
    let out = Lines::to(std::io::stderr()).map_err(TelemetryError::Thread)?;
    let lines = tracing_subscriber::fmt::layer().with_writer(out.clone());
    let pretty = match format {
        LogFormat::Auto => terminal,
        LogFormat::Pretty => true,
        LogFormat::Json => false,
    };
    let layer = if !pretty {
        lines.json().flatten_event(true).with_span_list(false).boxed()
    } else if terminal {
        // Colours stay as the library has them: on, unless NO_COLOR says otherwise.
        lines.compact().boxed()
    } else {
        lines.compact().with_ansi(false).boxed()
    };
    registry()
        .with(layer.with_filter(filter_fn(is_discreet)))
        .with(filter)
        .try_init()
        .map_err(TelemetryError::AlreadySet)?;
    levels::control(configured, move |filter| handle.reload(filter).is_ok());
    let _ = LINES.set(out);
    panic::set_hook(Box::new(|info| {
        log_panic(info);
        flush();
    }));
    Ok(())
}

/// Waits until everything that was logged so far has been written, for a second at most.
pub fn flush() {
    if let Some(lines) = LINES.get() {
        lines.flush(LAST_LINES);
    }
}

/// Whether something may stand in the log, whatever was asked for.
fn is_discreet(about: &Metadata<'_>) -> bool {
    let mut outspoken = OUTSPOKEN.iter().filter(|(target, _)| about.target().starts_with(target));
    outspoken.all(|(_, most)| about.level() <= most)
}

/// The filter: `RUST_LOG`, to which `DEBUG=true` adds our crates unless it asks for as much already.
fn directives(debug: bool, filter: Option<&str>) -> String {
    match (debug, filter) {
        (false, filter) => filter.unwrap_or(DEFAULT).to_owned(),
        (true, None) => DEBUG.to_owned(),
        (true, Some(filter)) => {
            let verbose = |part: &str| {
                part.trim().parse::<LevelFilter>().is_ok_and(|level| level >= LevelFilter::DEBUG)
            };
            if filter.split(',').any(verbose) {
                filter.to_owned()
            } else {
                // Of two directives for the same target the later one holds.
                format!("{DEBUG},{filter}")
            }
        }
    }
}

fn log_panic(info: &panic::PanicHookInfo<'_>) {
    let location = info.location().map(ToString::to_string).unwrap_or_default();
    let current = thread::current();
    // Captured only where RUST_BACKTRACE asks for it, as usual.
    let backtrace = backtrace::Backtrace::capture();
    let backtrace = (backtrace.status() == backtrace::BacktraceStatus::Captured)
        .then(|| tracing::field::display(backtrace));
    tracing::error!(
        panic.location = location,
        panic.thread = current.name().unwrap_or("unnamed"),
        panic.message = panic_message(info.payload()),
        panic.backtrace = backtrace,
        "a thread panicked"
    );
}

fn panic_message(payload: &dyn Any) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    shorten(text.unwrap_or("(no text)"), PANIC_MESSAGE)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn rust_log_and_debug_together() {
        for (debug, filter, expected) in [
            (false, None, DEFAULT),
            (false, Some("warn,hyper=debug"), "warn,hyper=debug"),
            (true, None, DEBUG),
            (true, Some("trace"), "trace"),
            (true, Some("hyper=info, DEBUG"), "hyper=info, DEBUG"),
            (true, Some("off,mcp_worker=trace"), &format!("{DEBUG},off,mcp_worker=trace")),
        ] {
            assert_eq!(directives(debug, filter), expected);
            EnvFilter::try_new(expected).unwrap();
        }
        let merged = EnvFilter::try_new(directives(true, Some("warn,mcp_worker=trace"))).unwrap().to_string();
        let mut parts: Vec<_> = merged.split(',').collect();
        parts.sort_unstable();
        assert_eq!(
            parts,
            ["mcp_gateway=debug", "mcp_nats=debug", "mcp_shared=debug", "mcp_worker=trace", "warn"]
        );
    }

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn libraries_that_see_secrets_stay_silent_whatever_is_asked_for() {
        for directives in ["trace", "debug,rmcp=trace,oauth2=trace,reqwest=trace,hyper_util=trace,h2=trace"] {
            let buffer = Buffer::default();
            let writer = buffer.clone();
            let lines = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
            let subscriber = registry()
                .with(lines.with_filter(filter_fn(is_discreet)))
                .with(EnvFilter::try_new(directives).unwrap());
            tracing::subscriber::with_default(subscriber, || {
                macro_rules! say {
                    ($($target:literal),*) => { $(
                        tracing::trace!(target: $target, "canary");
                        tracing::debug!(target: $target, code = "canary", "asked");
                        tracing::info!(target: $target, "canary");
                        let _span = tracing::info_span!(target: $target, "s", token = "canary").entered();
                        tracing::warn!(target: $target, "warned by {}", $target);
                    )* };
                }
                say!(
                    "rmcp",
                    "rmcp::transport::auth",
                    "oauth2",
                    "reqwest::connect",
                    "hyper",
                    "hyper_util::client",
                    "h2"
                );
                tracing::debug!(target: "async_nats::client", "canary");
                tracing::info!(target: "mongodb", "informed");
                tracing::debug!(target: "mcp_worker::oauth", "ours");
            });
            let log = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
            assert!(!log.contains("canary"), "{log}");
            assert_eq!(log.matches("warned by").count(), 7, "{log}");
            assert!(log.contains("informed") && log.contains("ours"), "{log}");
        }
    }

    #[test]
    fn a_panic_is_logged_without_most_of_its_message() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let lines = tracing_subscriber::fmt::layer().json().flatten_event(true);
        let subscriber = registry().with(lines.with_writer(move || writer.clone()));
        let before = panic::take_hook();
        panic::set_hook(Box::new(log_panic));
        let ended = tracing::subscriber::with_default(subscriber, || {
            panic::catch_unwind(|| panic!("{}canary", "x".repeat(PANIC_MESSAGE)))
        });
        panic::set_hook(before);
        assert!(ended.is_err());
        let log = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        let line: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        assert_eq!(line["level"], "ERROR");
        assert!(line["panic.location"].as_str().unwrap().contains("telemetry.rs:"), "{log}");
        assert!(line["panic.thread"].as_str().unwrap().contains("a_panic_is_logged"), "{log}");
        assert!(log.contains("xxx") && !log.contains("canary"), "{log}");
        assert_eq!(panic_message(&7_u8), "(no text)");
    }

    #[test]
    fn a_bad_filter_is_an_error() {
        let error = init(LogFormat::Auto, false, Some("a=b=c"));
        assert!(matches!(error, Err(TelemetryError::Filter(_))));
    }
}
