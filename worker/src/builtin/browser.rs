//! The browser of a worker: found, started when it is needed, watched, ended when nobody needs it, and started again
//! when it died.

use std::{
    fs,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use mcp_shared::{
    config::{BrowserChoice, Sandbox, WebToolSettings},
    egress::Egress,
    limits,
    metrics::Running,
};
use nix::unistd::{Pid, geteuid};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroizing;

use super::{
    cdp::Cdp,
    page,
    usage::{self, Shared},
};
use crate::{
    meters,
    supervisor::{Child, SpawnSpec, Streams, Supervisor},
};

/// Chromium wants the ends of its pipe as descriptors 3 and 4.
const WITH_PIPE: &str = r#"exec "$0" "$@" 3<&0 4>&1 0</dev/null 1>&2"#;
/// The proxy of whatever is no page: nobody listens there. (Pages have one each.)
const NO_PROXY: &str = "--proxy-server=http://127.0.0.1:1";
/// What every browser is started with.
const FLAGS: [&str; 34] = [
    "--headless",
    "--remote-debugging-pipe",
    "--no-startup-window",
    NO_PROXY,
    // Loopback would be left out of proxies otherwise.
    "--proxy-bypass-list=<-loopback>",
    // Names are looked up by the proxy.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    "--disable-quic",
    "--webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-domain-reliability",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-client-side-phishing-detection",
    "--disable-breakpad",
    "--disable-crash-reporter",
    "--disable-features=DialMediaRouteProvider,MediaRouter,OptimizationHints,AutofillServerCommunication,\
     PrivacySandboxSettings4,PreconnectToSearch,Translate",
    // It would connect to its search engine with every page.
    "--google-base-url=http://127.0.0.1:1/",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-pings",
    "--no-service-autorun",
    "--metrics-recording-only",
    "--password-store=basic",
    "--deny-permission-prompts",
    "--block-new-web-contents",
    "--mute-audio",
    "--hide-scrollbars",
    "--disable-gpu",
    "--disable-speech-api",
    // Nobody looks at them.
    "--blink-settings=imagesEnabled=false",
    "--js-flags=--max-old-space-size=512",
];
/// Has it share memory by files in its folder.
const SHARED_IN_FILES: &str = "--disable-dev-shm-usage";
/// How often a browser's memory is looked at while it has pages.
const LOOK: Duration = Duration::from_millis(250);
/// How often an idle browser is looked at.
const IDLE_LOOK: Duration = Duration::from_secs(5);
/// Pages of one browser. Then there is a new one: nothing that runs strangers' programs gets old.
const PAGES: usize = 500;
/// How long a killed browser may take to be gone.
const KILL_TIME: Duration = Duration::from_secs(5);
/// What the folders of browsers are called, with our process id and a number behind it.
const FOLDER: &str = "mcp-api-chromium";
/// Bytes of the path of the folder that they are in. Behind that are 34 of their own names and 47 of Chromium's socket.
const PARENT: usize = 26;
/// Bytes of what a browser says that are kept for the explanation of a failure. Chromium's reason stands before pages of
/// addresses.
const WORDS: usize = 16 * 1024;
/// What marks the line with the reason why it ended itself, or with the end of that.
const FATAL: &str = ":FATAL:";
/// How long after a page was ended because of its memory a crash may be heard of that is its own.
const HEARD: Duration = Duration::from_secs(10);

/// The browser that there is, or will be.
pub struct Browsers {
    settings: WebToolSettings,
    pub(super) egress: Egress,
    supervisor: Arc<Supervisor>,
    pub(super) tasks: TaskTracker,
    stopping: CancellationToken,
    /// Held while one is started.
    current: tokio::sync::Mutex<Current>,
}

#[derive(Default)]
struct Current {
    browser: Option<Arc<Browser>>,
    /// Why the last one did not start, and until when no other is tried.
    failed: Option<(Instant, String)>,
}

/// A browser that runs.
pub struct Browser {
    /// How to talk to it.
    pub cdp: Cdp,
    pid: u32,
    /// Pages that are open.
    open: AtomicUsize,
    /// Pages that there were.
    opened: AtomicUsize,
    /// What was ended because of its memory.
    excess: Mutex<Option<Excess>>,
    used: Mutex<Instant>,
    kill: CancellationToken,
}

/// What was ended because of too much memory.
#[derive(Clone, Copy)]
enum Excess {
    /// The largest page, then. None of the pages has said yet that this is the one.
    Page(Instant),
    /// The browser with all its pages, of which there were so many: none could be blamed.
    Browser(usize),
}

/// A page's share in a browser.
pub struct Share(
    pub Arc<Browser>,
    #[allow(dead_code, reason = "it counts as long as it is held")] Running<'static>,
);

impl Share {
    fn of(browser: &Arc<Browser>) -> Self {
        browser.open.fetch_add(1, Ordering::AcqRel);
        browser.opened.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(browser), meters::page())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        *lock(&self.0.used) = Instant::now();
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Browser {
    /// Ends it, with all its pages.
    pub fn kill(&self) {
        self.kill.cancel();
    }

    /// Whether a page that crashed just now was ended because of its memory. One page hears that for each that was
    /// ended, and none later: what was ended may have been a frame of a page that goes on.
    pub fn ended_page(&self) -> bool {
        let mut excess = lock(&self.excess);
        let recent = matches!(*excess, Some(Excess::Page(at)) if at.elapsed() < HEARD);
        if recent {
            *excess = None;
        }
        recent
    }

    /// If it was ended as a whole because of its memory: how many pages it had.
    pub fn ended_with(&self) -> Option<usize> {
        match *lock(&self.excess) {
            Some(Excess::Browser(pages)) => Some(pages),
            _ => None,
        }
    }
}

impl Browsers {
    /// Nothing is started yet.
    pub fn new(
        settings: WebToolSettings,
        egress: Egress,
        supervisor: Arc<Supervisor>,
        tasks: TaskTracker,
        stopping: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self { settings, egress, supervisor, tasks, stopping, current: Default::default() })
    }

    /// A share in the browser that runs, which may have to be started. The error says, after "because", why there is
    /// none.
    ///
    /// A start goes on when whoever asked for it leaves: the next one has the browser then.
    pub async fn share(self: &Arc<Self>) -> Result<Share, String> {
        let own = Arc::clone(self);
        let taken = self.tasks.spawn(async move { own.take_share().await }).await;
        taken.unwrap_or_else(|_| Err("this worker is stopping".to_owned()))
    }

    async fn take_share(&self) -> Result<Share, String> {
        let mut current = self.current.lock().await;
        if let Some(browser) = &current.browser
            && !browser.cdp.is_gone()
            && !browser.kill.is_cancelled()
        {
            if browser.opened.load(Ordering::Acquire) < PAGES {
                return Ok(Share::of(browser));
            }
            // It ends when its last page is closed.
            tracing::debug!("a browser had many pages: there will be a new one");
        }
        let program = program(&self.settings.browser)?;
        let sandboxed = sandboxed(self.settings.sandbox)?;
        if let Some((until, why)) = &current.failed
            && Instant::now() < *until
        {
            return Err(why.clone());
        }
        match self.start(&program, sandboxed).await {
            Ok(browser) => {
                meters::browser_started();
                current.failed = None;
                current.browser = Some(Arc::clone(&browser));
                Ok(Share::of(&browser))
            }
            Err(error) => {
                tracing::warn!(program = %program.display(), %error, "the browser does not start");
                let why = "the browser does not start".to_owned();
                current.failed = Some((Instant::now() + limits::BROWSER_PAUSE, why.clone()));
                Err(why)
            }
        }
    }

    /// Starts one for nobody, has it show an empty page, and ends it. Says which it is, or why it does not work.
    pub async fn try_out(&self, program: &Path, sandboxed: bool) -> Result<String, String> {
        let browser = self.start(program, sandboxed).await?;
        let _end = browser.kill.clone().drop_guard();
        page::show_empty(&browser.cdp).await.map_err(|error| format!("no page can be shown: {error}"))
    }

    async fn start(&self, program: &Path, sandboxed: bool) -> Result<Arc<Browser>, String> {
        let made = tokio::task::spawn_blocking(|| {
            let folder = make_folder()?;
            let shared = Shared::of(&folder.0);
            Ok::<_, String>((folder, shared))
        });
        let (folder, shared) = made.await.map_err(|error| error.to_string())??;
        let mut args = vec!["-c".to_owned(), WITH_PIPE.to_owned(), program.to_string_lossy().into_owned()];
        args.extend(FLAGS.map(str::to_owned));
        args.push(format!("--user-data-dir={}", folder.0.display()));
        if !sandboxed {
            args.push("--no-sandbox".to_owned());
        }
        if shared != Shared::Memory {
            args.push(SHARED_IN_FILES.to_owned());
        }
        let own = |name: &str| Some((name.to_owned(), Zeroizing::new(std::env::var(name).ok()?)));
        let mut env: Vec<_> = ["PATH", "LANG", "LC_ALL", "TZ"].into_iter().filter_map(own).collect();
        for name in ["HOME", "TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"] {
            env.push((name.to_owned(), Zeroizing::new(folder.0.to_string_lossy().into_owned())));
        }
        let spec = SpawnSpec { program: "/bin/sh".to_owned(), args, env, folder: Some(folder.0.clone()) };
        let (child, streams) = self.supervisor.spawn(spec).await?;
        let Streams { stdin, stdout, stderr } = streams;
        let cdp = Cdp::new(stdin, stdout, &self.tasks);
        let words = Arc::<Mutex<Vec<u8>>>::default();
        let hearing = self.tasks.spawn(keep_words(stderr, Arc::clone(&words)));
        let browser = Arc::new(Browser {
            cdp: cdp.clone(),
            pid: child.pid,
            open: AtomicUsize::new(0),
            opened: AtomicUsize::new(0),
            excess: Mutex::default(),
            used: Mutex::new(Instant::now()),
            kill: CancellationToken::new(),
        });
        // Whatever becomes of this start, the process has somebody who ends it.
        let guard = browser.kill.clone().drop_guard();
        self.tasks.spawn(watch(Arc::clone(&browser), child, folder, self.stopping.clone()));
        let version = timeout(limits::BROWSER_START, cdp.call(None, "Browser.getVersion", json!({}))).await;
        let version = match version {
            Ok(Ok(version)) => version,
            failed => {
                let reason = match failed {
                    Ok(Err(error)) => error.to_string(),
                    _ => "it says nothing".to_owned(),
                };
                // It has said everything when none of its processes is left.
                drop(guard);
                let _ = timeout(KILL_TIME, hearing).await;
                let said = last_words(&lock(&words));
                return Err(if said.is_empty() { reason } else { format!("{reason}: {said}") });
            }
        };
        guard.disarm();
        let version = version.get("product").and_then(Value::as_str).unwrap_or_default();
        tracing::info!(version, pid = browser.pid, sandboxed, "a browser renders pages");
        if !sandboxed {
            tracing::warn!(
                "the browser runs without its sandbox, which root cannot have, and nobody with CHROMIUM_SANDBOX=never: run \
                 this program as another user, with CHROMIUM_SANDBOX=auto"
            );
        }
        self.tasks.spawn(limit_memory(Arc::clone(&browser), self.settings.memory, shared));
        Ok(browser)
    }
}

/// Where the browser is. The error says, after "because", why there is none.
pub fn program(choice: &BrowserChoice) -> Result<PathBuf, String> {
    match choice {
        BrowserChoice::Program(path) => Ok(path.clone()),
        BrowserChoice::Never => Err("none is to be used here".to_owned()),
        BrowserChoice::Found => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&path)
                .flat_map(|folder| BrowserChoice::NAMES.map(|name| folder.join(name)))
                .find(|file| is_executable(file));
            found.ok_or_else(|| "none is installed".to_owned())
        }
    }
}

/// Whether it has its sandbox; the error says why it must not be started.
pub fn sandboxed(wanted: Sandbox) -> Result<bool, String> {
    match (wanted, geteuid().is_root()) {
        (Sandbox::Never, _) | (Sandbox::WherePossible, true) => Ok(false),
        (Sandbox::WherePossible | Sandbox::Always, false) => Ok(true),
        (Sandbox::Always, true) => Err("it has no sandbox when root runs it".to_owned()),
    }
}

/// Waits for a browser's end, or brings it about.
async fn watch(browser: Arc<Browser>, mut child: Child, folder: Folder, stopping: CancellationToken) {
    let idle = async {
        loop {
            sleep(IDLE_LOOK).await;
            let unused = browser.open.load(Ordering::Acquire) == 0;
            let spent = browser.opened.load(Ordering::Acquire) >= PAGES;
            if unused && (spent || lock(&browser.used).elapsed() >= limits::BROWSER_IDLE) {
                return;
            }
        }
    };
    let ended = tokio::select! {
        exit = child.exited() => Some(exit),
        () = browser.cdp.gone() => None,
        () = browser.kill.cancelled() => None,
        () = stopping.cancelled() => None,
        () = idle => None,
    };
    // No page is opened any more, and those that are open hear of it.
    browser.kill.cancel();
    match ended {
        Some(exit) => tracing::warn!(%exit, "the browser ended"),
        None => child.kill(),
    }
    browser.cdp.end();
    if ended.is_none() && timeout(KILL_TIME, child.exited()).await.is_err() {
        tracing::error!(pid = browser.pid, "a browser could not be ended");
    }
    // Removing it may take a moment.
    let _ = tokio::task::spawn_blocking(move || drop(folder)).await;
}

/// Ends the largest page as often as the browser takes more than it may.
async fn limit_memory(browser: Arc<Browser>, most: u64, shared: Shared) {
    loop {
        tokio::select! {
            () = browser.cdp.gone() => return,
            () = sleep(LOOK) => {}
        }
        if browser.open.load(Ordering::Acquire) == 0 {
            continue;
        }
        let (pid, mark, shared) = (browser.pid, Arc::clone(&browser), shared.clone());
        // It reads much of `/proc`, and waits for the end of what it ends.
        let looked = tokio::task::spawn_blocking(move || {
            let usage = usage::of(pid, most, &shared);
            if usage.bytes <= most {
                return true;
            }
            tracing::warn!(
                bytes = usage.bytes,
                most,
                "the browser takes too much memory: its largest page ends"
            );
            // Before its end, of which the page hears at once.
            *lock(&mark.excess) = Some(Excess::Page(Instant::now()));
            usage.end_largest()
        });
        if !looked.await.unwrap_or(true) {
            let pages = browser.open.load(Ordering::Acquire);
            *lock(&browser.excess) = Some(Excess::Browser(pages));
            browser.kill();
        }
    }
}

async fn keep_words(mut stderr: impl AsyncRead + Unpin, words: Arc<Mutex<Vec<u8>>>) {
    let mut chunk = vec![0; WORDS];
    while let Ok(count @ 1..) = stderr.read(&mut chunk).await {
        let mut words = lock(&words);
        words.extend_from_slice(&chunk[..count]);
        let spare = words.len().saturating_sub(WORDS);
        words.drain(..spare);
    }
}

fn last_words(words: &[u8]) -> String {
    let text = String::from_utf8_lossy(words);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let end = lines.iter().position(|line| line.contains(FATAL)).map_or(lines.len(), |at| at + 1);
    lines[end.saturating_sub(4)..end].join(" / ")
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// A browser's own folder, for as long as it runs.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::debug!(%error, "a browser's folder was not removed");
        }
    }
}

/// Where they are made. Chromium has a socket in its folder for temporary files, whose path the system holds to 107
/// bytes, and ends at once where that is longer.
fn parent(temporary: PathBuf) -> PathBuf {
    if temporary.as_os_str().len() > PARENT { PathBuf::from("/tmp") } else { temporary }
}

/// Makes one, and removes those of programs that were killed.
fn make_folder() -> Result<Folder, String> {
    let (parent, me) = (parent(std::env::temp_dir()), std::process::id());
    for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner =
            name.to_str().and_then(|name| name.strip_prefix(FOLDER)?.strip_prefix('-')?.split('-').next());
        let Some(owner) = owner.and_then(|pid| pid.parse::<i32>().ok()) else { continue };
        let gone = nix::sys::signal::kill(Pid::from_raw(owner), None) == Err(nix::errno::Errno::ESRCH);
        if gone && entry.metadata().is_ok_and(|found| found.uid() == geteuid().as_raw()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    let drawn = uuid::Uuid::new_v4().simple().to_string();
    let folder = parent.join(format!("{FOLDER}-{me}-{}", &drawn[..8]));
    let made = fs::DirBuilder::new().mode(0o700).create(&folder);
    made.map_err(|error| format!("there is no folder for it: {error}"))?;
    Ok(Folder(folder))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_page_that_was_ended_is_told_so_once_and_soon() {
        let (ours, _browser) = tokio::io::duplex(64);
        let (output, input) = tokio::io::split(ours);
        let browser = Browser {
            cdp: Cdp::new(input, output, &TaskTracker::new()),
            pid: 0,
            open: AtomicUsize::new(0),
            opened: AtomicUsize::new(0),
            excess: Mutex::default(),
            used: Mutex::new(Instant::now()),
            kill: CancellationToken::new(),
        };
        let is = |excess| *lock(&browser.excess) = Some(excess);
        assert!(!browser.ended_page() && browser.ended_with().is_none());
        is(Excess::Page(Instant::now()));
        assert!(browser.ended_with().is_none());
        assert_eq!([browser.ended_page(), browser.ended_page()], [true, false]);
        is(Excess::Page(Instant::now() - HEARD));
        assert!(!browser.ended_page(), "what crashes so much later does so by itself");
        // Nobody is blamed for what all of them did.
        is(Excess::Browser(3));
        assert_eq!((browser.ended_page(), browser.ended_with()), (false, Some(3)));
    }

    #[test]
    fn the_reason_stands_before_the_addresses() {
        let said = "one\ntwo\n\nFailed to move to new namespace\n[1:1:FATAL:x.cc(1)] Check failed\n#0 0x55d0 <unknown>\n\
                    #1 0x55d1 <unknown>\n#2 0x55d2 <unknown>\n#3 0x55d3 <unknown>\n";
        assert_eq!(
            last_words(said.as_bytes()),
            "one / two / Failed to move to new namespace / [1:1:FATAL:x.cc(1)] Check failed"
        );
        assert_eq!(last_words(b"a\nb\nc\nd\ne\n"), "b / c / d / e");
        assert_eq!(last_words(b""), "");
    }
}
