//! The browser that tests of pages need.

use std::io::Write;

use crate::config::BrowserChoice;

/// Set where there has to be one, as in CI.
const REQUIRED: &str = "TEST_CHROMIUM_REQUIRED";

/// Whether there is a browser to test with. Where there need not be one, it is said loudly what is not tested.
pub fn has_browser(test: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .any(|folder| BrowserChoice::NAMES.iter().any(|name| folder.join(name).is_file()));
    if !found {
        assert!(
            std::env::var_os(REQUIRED).is_none(),
            "there is no Chromium on the PATH, and {REQUIRED} is set"
        );
        // Not by the macro, whose words tests keep to themselves.
        let _ = writeln!(std::io::stderr(), "NOT TESTED, since there is no Chromium on the PATH: {test}");
    }
    found
}
