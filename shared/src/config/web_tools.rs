//! Settings of the built-in tools for the web.

use std::{fmt, path::PathBuf};

use url::Url;

use super::{Reader, parse};

/// What the tools for the web work with.
#[derive(Debug, Clone)]
pub struct WebToolSettings {
    /// The search engine; without one nothing is searched.
    pub searxng: Option<SearxngUrl>,
    /// Where the browser is.
    pub browser: BrowserChoice,
    /// Whether pages may be rendered where the browser's own sandbox cannot be had.
    pub sandbox: Sandbox,
    /// Pages that are open at once on one worker.
    pub pages: usize,
    /// Bytes of memory that the browser may take, with all its processes. What they share counts once; what the system
    /// can read again from files (the browser's program, above all) does not count.
    pub memory: u64,
}

impl Default for WebToolSettings {
    fn default() -> Self {
        Self {
            searxng: None,
            browser: BrowserChoice::Found,
            sandbox: Sandbox::WherePossible,
            pages: 4,
            memory: 1024 * 1024 * 1024,
        }
    }
}

/// The address of a SearXNG instance. It is the operator's own, may have a login in it, and is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct SearxngUrl(Url);

impl SearxngUrl {
    /// As it was given.
    pub fn base(&self) -> &Url {
        &self.0
    }

    /// The address to search at.
    pub fn search(&self) -> Url {
        let mut url = self.0.clone();
        let path = format!("{}/search", url.path().trim_end_matches('/'));
        url.set_path(&path);
        url
    }
}

impl fmt::Debug for SearxngUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SearxngUrl")
    }
}

/// Which browser renders pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BrowserChoice {
    /// Whatever Chromium is found on the `PATH`.
    Found,
    /// This one.
    Program(PathBuf),
    /// None.
    Never,
}

impl BrowserChoice {
    /// What Chromium is called on the systems that there are, in the order in which it is looked for.
    pub const NAMES: [&str; 6] = [
        "chromium",
        "chromium-browser",
        "chromium-headless-shell",
        "google-chrome",
        "google-chrome-stable",
        "chrome",
    ];
}

/// When the browser's sandbox is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    /// For root, for whom Chromium has none.
    WherePossible,
    /// Always: something else has to keep a browser that was taken over from everything else.
    Never,
    /// Never: root gets no browser.
    Always,
}

fn searxng(text: &str) -> Result<SearxngUrl, parse::Valid> {
    const VALID: parse::Valid = "an http or https URL without query, such as http://searxng:8080";
    let url = Url::parse(text).map_err(|_| VALID)?;
    let plain = url.query().is_none() && url.fragment().is_none() && url.has_host();
    if matches!(url.scheme(), "http" | "https") && plain { Ok(SearxngUrl(url)) } else { Err(VALID) }
}

fn browser(text: &str) -> Result<BrowserChoice, parse::Valid> {
    match text {
        text if text.eq_ignore_ascii_case("auto") => Ok(BrowserChoice::Found),
        text if text.eq_ignore_ascii_case("none") => Ok(BrowserChoice::Never),
        text if text.starts_with('-') => Err("the path of a Chromium, auto or none"),
        path => Ok(BrowserChoice::Program(PathBuf::from(path))),
    }
}

fn sandbox(text: &str) -> Result<Sandbox, parse::Valid> {
    match text.to_ascii_lowercase().as_str() {
        "auto" => Ok(Sandbox::WherePossible),
        "never" => Ok(Sandbox::Never),
        "always" => Ok(Sandbox::Always),
        _ => Err("auto, always or never"),
    }
}

fn pages(text: &str) -> Result<usize, parse::Valid> {
    let number = parse::whole(text).and_then(|number| usize::try_from(number).ok());
    number.filter(|number| (1..=64).contains(number)).ok_or("a whole number from 1 to 64")
}

fn memory(text: &str) -> Result<u64, parse::Valid> {
    const VALID: parse::Valid = "a size from 256mb to 64gb, such as 2gb";
    let bytes = parse::room(text).ok().and_then(|bytes| u64::try_from(bytes).ok());
    bytes.filter(|bytes| *bytes >= 256 * 1024 * 1024).ok_or(VALID)
}

impl Reader {
    /// The settings of the tools for the web; those of a variable that is wrong are the default's.
    pub(super) fn web_tools(&mut self) -> WebToolSettings {
        let usual = WebToolSettings::default();
        WebToolSettings {
            searxng: self.optional("SEARXNG_URL", searxng),
            browser: self.required("CHROMIUM", browser).unwrap_or(usual.browser),
            sandbox: self.required("CHROMIUM_SANDBOX", sandbox).unwrap_or(usual.sandbox),
            pages: self.required("WEBTOOLS_PAGES", pages).unwrap_or(usual.pages),
            memory: self.required("CHROMIUM_MAX_MEMORY", memory).unwrap_or(usual.memory),
        }
    }
}
