//! What stands in the log, changed while the program runs.

use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use crate::limits;

/// What a filter set at run time must look like.
const RULE: &str = "must be levels (off, error, warn, info, debug, trace), each for everything or as target=level, \
                    comma-separated without spaces, such as info,mcp_worker=debug";

/// Why a filter was not set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// It is not one. The text says what would be.
    #[error("{RULE}")]
    Invalid,
    /// Logging was not set up in this process.
    #[error("logging was not set up")]
    NotSetUp,
}

/// The filter of this process.
struct Control {
    swap: Box<dyn Fn(EnvFilter) -> bool + Send + Sync>,
    /// As the settings have it.
    configured: String,
    now: Mutex<String>,
}

static CONTROL: OnceLock<Control> = OnceLock::new();

/// From now on the filter can be changed: `swap` does it, and says whether it could.
pub(super) fn control(configured: String, swap: impl Fn(EnvFilter) -> bool + Send + Sync + 'static) {
    let now = Mutex::new(configured.clone());
    let _ = CONTROL.set(Control { swap: Box::new(swap), configured, now });
}

/// The filter in force, and the one that the settings ask for.
pub fn filters() -> Option<(String, String)> {
    let control = CONTROL.get()?;
    let now = control.now.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Some((now, control.configured.clone()))
}

/// Checks a filter that somebody wants to set: less may stand in it than in `RUST_LOG`, where a word that means
/// nothing silences the log.
pub fn check_filter(text: &str) -> Result<(), FilterError> {
    let of_target = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b':' | b'-');
    let is_level = |text: &str| {
        // The library takes numbers and the empty text as well.
        text.bytes().all(|b| b.is_ascii_alphabetic())
            && !text.is_empty()
            && text.parse::<LevelFilter>().is_ok()
    };
    let good = text.len() <= limits::LOG_FILTER_BYTES
        && text.split(',').all(|part| match part.split_once('=') {
            Some((target, level)) => !target.is_empty() && target.bytes().all(of_target) && is_level(level),
            None => is_level(part),
        });
    if good && EnvFilter::try_new(text).is_ok() { Ok(()) } else { Err(FilterError::Invalid) }
}

/// Logs by this filter from now on, or without one as the settings say. What libraries may say at most holds in any
/// case.
pub fn set_filter(filter: Option<&str>) -> Result<(), FilterError> {
    let control = CONTROL.get().ok_or(FilterError::NotSetUp)?;
    let filter = match filter {
        Some(filter) => {
            check_filter(filter)?;
            filter
        }
        None => &control.configured,
    };
    let parsed = EnvFilter::try_new(filter).map_err(|_| FilterError::Invalid)?;
    let mut now = control.now.lock().unwrap_or_else(PoisonError::into_inner);
    if *now == filter {
        return Ok(());
    }
    if !(control.swap)(parsed) {
        return Err(FilterError::NotSetUp);
    }
    filter.clone_into(&mut now);
    drop(now);
    tracing::info!(filter, "the log's filter was changed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_levels() {
        for good in ["info", "warn,mcp_worker=debug", "off,a::b=TRACE", "mcp_nats::router=error"] {
            assert_eq!(check_filter(good), Ok(()), "{good}");
        }
        let long = "info,".repeat(300) + "info";
        for bad in [
            "",
            ",",
            "info,",
            "verbose",
            "a=",
            "=info",
            "a=loud",
            "a=b=c",
            "[span]=info",
            "a b=info",
            "info, warn",
            "info\n",
            "3",
            "ä=info",
            &long,
        ] {
            assert_eq!(check_filter(bad), Err(FilterError::Invalid), "{bad}");
        }
    }
}
