//! One page in the browser: loaded, waited for, read, closed. It has a context of its own, so that it shares neither
//! cookies nor storage with any other, and a proxy of its own, through which everything goes that it loads.

use std::{future::Future, sync::Arc, time::Duration};

use mcp_shared::{egress::Egress, limits};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::task::TaskTracker;
use url::Url;

use super::{
    browser::{Browser, Browsers, Share},
    cdp::{Cdp, CdpError, Event},
    proxy::Proxy,
};

/// How long a step may take that does not wait for the page's server.
const STEP: Duration = Duration::from_secs(10);
/// How long a page may take to let itself be read, whatever its scripts do.
const READ: Duration = Duration::from_secs(5);
/// How long a page that has loaded may go on loading what its scripts ask for.
const SETTLE: Duration = Duration::from_secs(3);
/// How often it is looked whether a page has loaded too much.
const LOOK: Duration = Duration::from_millis(200);
/// Characters of a page that are read.
const CHARACTERS: usize = 4 * 1024 * 1024;

/// What a caller is told whose page was ended.
const TOO_MUCH: &str = "the page takes too much memory";
/// What the browser says of a document that something else came before.
const ABORTED: &str = "net::ERR_ABORTED";

/// What came of a page.
pub struct Rendered {
    /// Where it was in the end.
    pub url: String,
    /// The status of its server's answer.
    pub status: Option<u16>,
    /// The document as it is after its scripts have run.
    pub html: String,
    /// Whether that is not all of it.
    pub cut: bool,
    /// Whether it was still loading.
    pub unfinished: bool,
}

/// Why a page was not rendered.
#[derive(Debug)]
pub enum Failure {
    /// There is no browser, because of this.
    NoBrowser(String),
    /// The browser went away. Another may do it.
    Gone,
    /// The browser was ended because its pages took too much memory, this one or others. Another may do it.
    Crowded,
    /// The page's process went away.
    Crashed,
    /// It is no page.
    NoPage,
    /// It cannot be read; a sentence for the caller.
    Failed(String),
}

/// A page's place in the browser. When it is dropped the page is closed, by a task of its own; what the page has is
/// given back only then.
struct Place {
    open: Option<Open>,
    session: Option<String>,
    tasks: TaskTracker,
}

/// What a page has as long as it is not closed.
struct Open {
    share: Share,
    context: String,
    proxy: Proxy,
    _permit: Arc<OwnedSemaphorePermit>,
}

/// A page that is being loaded.
struct Load<'a> {
    cdp: &'a Cdp,
    session: &'a str,
    frame: &'a str,
    proxy: &'a Proxy,
    events: mpsc::Receiver<Event>,
    /// The document that was asked for last.
    url: String,
    request: String,
    /// Whether the first document has come, or does not.
    navigated: bool,
    status: Option<u16>,
    kind: Option<String>,
    loaded: Option<Instant>,
    quiet: bool,
}

#[derive(Deserialize)]
struct Read {
    html: String,
    size: usize,
    url: String,
}

/// Renders a page.
pub async fn render(
    browsers: &Arc<Browsers>,
    url: &Url,
    permit: &Arc<OwnedSemaphorePermit>,
) -> Result<Rendered, Failure> {
    let share = browsers.share().await.map_err(Failure::NoBrowser)?;
    let browser = Arc::clone(&share.0);
    match render_in(browsers, share, url, permit).await {
        Err(Failure::Crashed) if browser.ended_page() => Err(Failure::Failed(TOO_MUCH.to_owned())),
        Err(Failure::Crashed) => Err(Failure::Failed("the page crashed".to_owned())),
        Err(Failure::Gone) => Err(match browser.ended_with() {
            // It was nobody else.
            Some(1) => Failure::Failed(TOO_MUCH.to_owned()),
            Some(_) => Failure::Crowded,
            None => Failure::Gone,
        }),
        other => other,
    }
}

async fn render_in(
    browsers: &Browsers,
    share: Share,
    url: &Url,
    permit: &Arc<OwnedSemaphorePermit>,
) -> Result<Rendered, Failure> {
    let (cdp, browser) = (share.0.cdp.clone(), Arc::clone(&share.0));
    let gone = |error: CdpError| unusable(&browser, &error);
    // By a task, so that what is made for a caller who leaves meanwhile is taken away again.
    let opening = Place::open(browsers.egress.clone(), share, Arc::clone(permit), browsers.tasks.clone());
    let opened = browsers.tasks.spawn(opening).await;
    let mut place = opened.unwrap_or(Err(Failure::Gone))?;
    let Place { open: Some(Open { context, proxy, .. }), session: known, .. } = &mut place else {
        return Err(Failure::Gone);
    };
    let quietly = json!({"behavior": "deny", "browserContextId": context});
    step(cdp.call(None, "Browser.setDownloadBehavior", quietly)).await.map_err(gone)?;
    let target = json!({"url": "about:blank", "browserContextId": context});
    let target = text(&step(cdp.call(None, "Target.createTarget", target)).await.map_err(gone)?, "targetId");
    let attach = json!({"targetId": target, "flatten": true});
    let session =
        text(&step(cdp.call(None, "Target.attachToTarget", attach)).await.map_err(gone)?, "sessionId");
    let events = cdp.listen(&session);
    *known = Some(session.clone());
    for (method, params) in [
        ("Page.enable", json!({})),
        ("Inspector.enable", json!({})),
        (
            "Network.enable",
            json!({"maxTotalBufferSize": 0, "maxResourceBufferSize": 0, "maxPostDataSize": 1}),
        ),
        ("Page.setLifecycleEventsEnabled", json!({"enabled": true})),
    ] {
        step(cdp.call(Some(&session), method, params)).await.map_err(gone)?;
    }
    let mut load = Load {
        cdp: &cdp,
        session: &session,
        // Of a page, the frame has the name of the target.
        frame: &target,
        proxy,
        events,
        url: url.to_string(),
        request: String::new(),
        navigated: false,
        status: None,
        kind: None,
        loaded: None,
        quiet: false,
    };
    let rendered = load.run(url).await;
    match rendered {
        _ if proxy.is_used_up() => {
            let most = limits::WEB_PAGE_BYTES / 1024 / 1024;
            Err(Failure::Failed(format!("the page loads more than {most} MiB")))
        }
        other => other,
    }
}

/// Shows an empty page, which nothing leads out of, and says which browser did.
pub async fn show_empty(cdp: &Cdp) -> Result<String, CdpError> {
    let version = step(cdp.call(None, "Browser.getVersion", json!({}))).await?;
    let context =
        step(cdp.call(None, "Target.createBrowserContext", json!({"disposeOnDetach": true}))).await?;
    let target = json!({"url": "about:blank", "browserContextId": text(&context, "browserContextId")});
    let target = step(cdp.call(None, "Target.createTarget", target)).await?;
    let attach = json!({"targetId": text(&target, "targetId"), "flatten": true});
    let session = text(&step(cdp.call(None, "Target.attachToTarget", attach)).await?, "sessionId");
    // Only the page's own process can say that.
    let evaluate = json!({"expression": "6 * 7", "returnByValue": true});
    let answer = step(cdp.call(Some(&session), "Runtime.evaluate", evaluate)).await?;
    match answer.pointer("/result/value").and_then(Value::as_u64) {
        Some(42) => Ok(text(&version, "product")),
        _ => Err(CdpError::Refused("something else than it was asked".to_owned())),
    }
}

impl Load<'_> {
    async fn run(&mut self, url: &Url) -> Result<Rendered, Failure> {
        let unfinished = self.load(url).await?;
        let read = timeout(READ, self.read()).await;
        let read = read.unwrap_or_else(|_| {
            Err(Failure::Failed("the page's scripts do not let it be read: they do not end".to_owned()))
        })?;
        if !read.url.starts_with("http:") && !read.url.starts_with("https:") {
            // What the browser shows in the place of a page that a script or the page itself led to.
            return Err(self.explained("ERR_FAILED"));
        }
        Ok(Rendered {
            url: read.url,
            status: self.status,
            cut: read.size > CHARACTERS,
            html: read.html,
            unfinished,
        })
    }

    /// Waits until the page has loaded, and is quiet; says whether it was not by the end of its time.
    async fn load(&mut self, url: &Url) -> Result<bool, Failure> {
        let deadline = Instant::now() + limits::WEB_PAGE_TIMEOUT;
        let (cdp, session) = (self.cdp.clone(), self.session.to_owned());
        let params = json!({"url": url.as_str()});
        let mut navigate =
            std::pin::pin!(async move { cdp.call(Some(&session), "Page.navigate", params).await });
        loop {
            let settled = self.loaded.map(|loaded| loaded + SETTLE);
            if self.navigated && settled.is_some_and(|settled| self.quiet || Instant::now() >= settled) {
                return Ok(false);
            }
            let until = settled.unwrap_or(deadline).min(deadline).min(Instant::now() + LOOK);
            tokio::select! {
                biased;
                event = self.events.recv() => self.take(event).await?,
                answer = &mut navigate, if !self.navigated => {
                    self.navigated = true;
                    let answer = answer.map_err(refused)?;
                    if let Some(error) = answer.get("errorText").and_then(Value::as_str) {
                        self.catch_up().await?;
                        if answer.get("isDownload").and_then(Value::as_bool) == Some(true) {
                            return Err(Failure::NoPage);
                        }
                        return Err(self.explained(error));
                    }
                }
                () = sleep_until(until) => {}
            }
            if self.proxy.is_used_up() {
                return Err(Failure::Failed(String::new()));
            }
            if Instant::now() >= deadline {
                return match self.kind {
                    Some(_) => Ok(true),
                    None => Err(Failure::Failed(format!(
                        "the server did not answer within {} s",
                        limits::WEB_PAGE_TIMEOUT.as_secs()
                    ))),
                };
            }
        }
    }

    /// Takes in what was said already.
    async fn catch_up(&mut self) -> Result<(), Failure> {
        while let Ok(event) = self.events.try_recv() {
            self.take(Some(event)).await?;
        }
        Ok(())
    }

    async fn take(&mut self, event: Option<Event>) -> Result<(), Failure> {
        match event {
            None if self.cdp.is_gone() => return Err(Failure::Gone),
            None => return Err(Failure::Failed("the page does more than can be followed".to_owned())),
            Some(Event::Crashed) => return Err(Failure::Crashed),
            Some(Event::Dialog) => {
                let no = json!({"accept": false});
                let _ = step(self.cdp.call(Some(self.session), "Page.handleJavaScriptDialog", no)).await;
            }
            Some(Event::Requested { frame, request, url }) if frame == self.frame => {
                // What was heard before is of the document that this one replaces: of the empty one at first.
                (self.url, self.loaded, self.quiet) = (url, None, false);
                self.request = request;
            }
            // Of the first document, the answer to the question for it says the same, and more.
            Some(Event::Failed { request, error }) if request == self.request && self.navigated => {
                if error != ABORTED {
                    return Err(self.explained(&error));
                }
                // The page went elsewhere, of which will be heard, or stays as it is.
                self.loaded = Some(Instant::now());
            }
            Some(Event::Answered { frame, url, status, kind }) if frame == self.frame => {
                let page = kind.is_empty() || kind.contains("html");
                (self.url, self.status, self.kind) = (url, Some(status), Some(kind));
                if !page {
                    return Err(Failure::NoPage);
                }
            }
            Some(Event::Lifecycle { frame, name }) if frame == self.frame => match name.as_str() {
                "init" => (self.loaded, self.quiet) = (None, false),
                "load" => self.loaded = Some(Instant::now()),
                "networkAlmostIdle" => self.quiet = true,
                _ => {}
            },
            Some(_) => {}
        }
        Ok(())
    }

    /// Reads the document, in a world that the page's scripts cannot reach.
    async fn read(&mut self) -> Result<Read, Failure> {
        let world = json!({"frameId": self.frame, "worldName": "mcp-api"});
        let world = self.ask("Page.createIsolatedWorld", world).await?;
        let expression = format!(
            "(() => {{ const root = document.documentElement, html = root ? root.outerHTML : ''; return {{html: \
             html.slice(0, {CHARACTERS}).toWellFormed(), size: html.length, url: location.href}}; }})()"
        );
        let evaluate = json!({
            "contextId": world.get("executionContextId"), "expression": expression, "returnByValue": true,
        });
        let mut read = self.ask("Runtime.evaluate", evaluate).await?;
        let value = read.pointer_mut("/result/value").map(Value::take).unwrap_or_default();
        serde_json::from_value(value).map_err(|_| Failure::Failed("the page cannot be read".to_owned()))
    }

    /// Asks the page something, and goes on hearing of it meanwhile.
    async fn ask(&mut self, method: &str, params: Value) -> Result<Value, Failure> {
        let (cdp, session) = (self.cdp.clone(), self.session.to_owned());
        let mut answer = std::pin::pin!(async move { cdp.call(Some(&session), method, params).await });
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => {
                    if let Err(CdpError::Refused(_)) = &answer {
                        // A page that crashes answers nothing any more, of which may be heard before the crash.
                        self.catch_up().await?;
                    }
                    return answer.map_err(refused);
                }
                event = self.events.recv() => self.take(event).await?,
            }
        }
    }

    /// What an error of the browser's means, for a caller.
    fn explained(&self, error: &str) -> Failure {
        if self.kind.as_ref().is_some_and(|kind| !kind.contains("html")) {
            return Failure::NoPage;
        }
        let host = Url::parse(&self.url).ok().and_then(|url| url.host_str().map(str::to_owned));
        if let Some(refused) = host.and_then(|host| self.proxy.refused(&host)) {
            return Failure::Failed(refused.to_string());
        }
        let error = error.trim_start_matches("net::");
        Failure::Failed(match error {
            "ERR_TOO_MANY_REDIRECTS" => "it redirects too often".to_owned(),
            "ERR_UNSAFE_REDIRECT" => "it redirects to what is neither http nor https".to_owned(),
            "ERR_EMPTY_RESPONSE" | "ERR_CONNECTION_RESET" | "ERR_CONNECTION_CLOSED" => {
                "the connection broke off".to_owned()
            }
            certificate if certificate.starts_with("ERR_CERT") => {
                "the server's certificate is not valid".to_owned()
            }
            other => format!("the page cannot be loaded ({other})"),
        })
    }
}

impl Place {
    async fn open(
        egress: Egress,
        share: Share,
        permit: Arc<OwnedSemaphorePermit>,
        tasks: TaskTracker,
    ) -> Result<Self, Failure> {
        let proxy = Proxy::start(egress, &tasks).await.map_err(|error| {
            tracing::error!(%error, "a page has no proxy");
            Failure::NoBrowser("there is no port for its proxy".to_owned())
        })?;
        let settings = json!({
            "disposeOnDetach": true,
            "proxyServer": format!("http://{}", proxy.address),
            "proxyBypassList": "<-loopback>",
        });
        let context = step(share.0.cdp.call(None, "Target.createBrowserContext", settings)).await;
        let context = text(&context.map_err(|error| unusable(&share.0, &error))?, "browserContextId");
        Ok(Self { open: Some(Open { share, context, proxy, _permit: permit }), session: None, tasks })
    }
}

/// A browser in which no page can be opened.
fn unusable(browser: &Browser, error: &CdpError) -> Failure {
    tracing::warn!(%error, "a page could not be opened: its browser is of no more use");
    browser.kill();
    Failure::Gone
}

impl Drop for Place {
    fn drop(&mut self) {
        let (Some(open), session) = (self.open.take(), self.session.take()) else { return };
        self.tasks.spawn(async move {
            let cdp = &open.share.0.cdp;
            if let Some(session) = &session {
                cdp.forget(session);
            }
            let context = json!({"browserContextId": &open.context});
            match timeout(STEP, cdp.call(None, "Target.disposeBrowserContext", context)).await {
                Ok(Ok(_)) => {}
                _ if cdp.is_gone() => {}
                // Something of the page may go on; not for longer than this.
                _ => {
                    tracing::warn!("a page was not closed: its browser ends");
                    open.share.0.kill();
                }
            }
            drop(open);
        });
    }
}

fn refused(error: CdpError) -> Failure {
    match error {
        CdpError::Gone => Failure::Gone,
        CdpError::Refused(text) => {
            tracing::debug!(text, "the browser refuses");
            Failure::Failed("the page cannot be loaded".to_owned())
        }
    }
}

/// A step that does not wait for anybody's server.
async fn step(asked: impl Future<Output = Result<Value, CdpError>>) -> Result<Value, CdpError> {
    timeout(STEP, asked).await.unwrap_or_else(|_| Err(CdpError::Refused("nothing".to_owned())))
}

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}
