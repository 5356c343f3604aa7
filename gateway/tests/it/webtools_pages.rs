//! What pages do to the built-in `get_url_content`, its browser and each other. They are the same wherever the browser is,
//! so that this is tried on one machine only.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, atomic::Ordering},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use tokio::net::UdpSocket;

use crate::{
    deployment::{Answer, alive, eventually},
    webtools::{OPEN, browsers, builder, fails, has_browser, page, read, site::Site},
};

/// A packet of the test's own.
const OWN: &[u8] = b"own";

/// A socket that keeps what comes to it, whatever it is.
async fn listening_udp() -> (SocketAddr, Arc<Mutex<Vec<Vec<u8>>>>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let (address, packets) = (socket.local_addr().unwrap(), Arc::<Mutex<Vec<Vec<u8>>>>::default());
    let heard = Arc::clone(&packets);
    tokio::spawn(async move {
        let mut packet = [0; 2048];
        while let Ok(count) = socket.recv(&mut packet).await {
            heard.lock().unwrap().push(packet[..count].to_vec());
        }
    });
    (address, packets)
}

/// How often a path was asked for.
fn count(site: &Site, path: &str) -> usize {
    site.asked.lock().unwrap().iter().filter(|asked| asked.contains(path)).count()
}

#[tokio::test]
async fn a_browser_leads_nowhere_that_the_guard_does_not_permit() {
    if !has_browser("a_browser_leads_nowhere_that_the_guard_does_not_permit") {
        return;
    }
    let (site, secret) = (Site::on(OPEN).await, Site::on("127.0.0.1").await);
    let (udp, heard) = listening_udp().await;
    // What is sent there is heard.
    let own = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    own.send_to(OWN, udp).await.unwrap();
    eventually("a packet is heard", async || *heard.lock().unwrap() == [OWN]).await;
    // What a page is not connected with stands in the log then.
    let api = builder().env("DEBUG", "true").start().await;
    let inside = secret.url("/secret");
    for (url, says) in [
        (site.url(&format!("/to?url={inside}")), "Blocked private or local address: 127.0.0.1"),
        (
            site.url("/to?url=http://169.254.169.254/latest"),
            "Blocked private or local address: 169.254.169.254",
        ),
        (
            site.url("/to?url=https://169.254.169.254/latest"),
            "Blocked private or local address: 169.254.169.254",
        ),
        (site.url("/to?url=http://[::1]:8099/"), "Blocked private or local address: ::1"),
        (site.url("/to?url=http://localhost:8099/"), "Blocked private or local address: localhost"),
        (site.url("/to?url=file:///etc/passwd"), "neither http nor https"),
        (site.url("/circle"), "redirects too often"),
        (page(&site, &format!("<script>location = '{inside}'</script>")), "Blocked private or local address"),
        (page(&site, &format!("<meta http-equiv=refresh content='0;url={inside}'>")), "Blocked private"),
    ] {
        let text = fails(&api, &url).await;
        assert!(text.contains(says), "{url}: {text}");
    }
    // Whatever a page loads, and however.
    let port = secret.address.port();
    let all = page(
        &site,
        &format!(
            "<p id=a>A page with much in it.</p><iframe src='{inside}'></iframe><img src='{inside}'>\
             <script src='{inside}'></script><link rel=stylesheet href='{inside}'><link rel=preconnect href='{inside}'>\
             <link rel=dns-prefetch href='{inside}'><object data='{inside}'></object><script>\
             const tell = text => document.body.append(' ' + text);\
             fetch('{inside}', {{mode: 'no-cors'}}).then(() => tell('FETCHED'), () => tell('refused'));\
             fetch('file:///etc/passwd').then(() => tell('FILE'), () => tell('no file'));\
             navigator.sendBeacon('{inside}', 'x'); new EventSource('{inside}');\
             new WebSocket('ws://127.0.0.1:{port}/secret').onopen = () => tell('SOCKET');\
             new Worker(URL.createObjectURL(new Blob([\"fetch('{inside}', {{mode: 'no-cors'}})\"])));\
             const peer = new RTCPeerConnection({{iceServers: [{{urls: 'stun:{udp}'}}, {{urls: 'turn:{udp}', \
             username: 'a', credential: 'b'}}, {{urls: 'turn:127.0.0.1:{port}?transport=tcp', username: 'a', \
             credential: 'b'}}]}}); peer.createDataChannel('x'); \
             peer.createOffer().then(offer => peer.setLocalDescription(offer)).then(() => tell('OFFERED'));\
             window.open('{inside}');</script>"
        ),
    );
    let text = read(&api, &all).await.tool_text();
    // It has looked for ways to its peer, too, when it was read.
    for done in ["refused", "no file", "OFFERED"] {
        assert!(text.contains(done), "{done}: {text}");
    }
    assert!(!text.contains("FETCHED") && !text.contains("SOCKET") && !text.contains("FILE"), "{text}");
    // When this one is heard, so is whatever came before it.
    own.send_to(OWN, udp).await.unwrap();
    eventually("a second packet is heard", async || {
        heard.lock().unwrap().iter().filter(|packet| *packet == OWN).count() == 2
    })
    .await;
    assert_eq!(heard.lock().unwrap().len(), 2, "none but those of this test");
    assert_eq!(*secret.asked.lock().unwrap(), Vec::<String>::new());
    // A page knows nothing of one that was before it.
    let sets =
        page(&site, "<script>document.cookie = 'k=v; max-age=999'; localStorage.k = 'v'</script><p>Set.</p>");
    let tells = page(
        &site,
        "<p id=p>-</p><script>p.textContent = `Cookie ${document.cookie}, item ${localStorage.k}.`</script>",
    );
    read(&api, &sets).await.ok();
    assert!(read(&api, &tells).await.tool_text().contains("Cookie , item undefined."));
    // Half of a character is no text. It harms neither the page that has it nor the browser.
    let browsers = api.metric("mcp_browser_starts_total").await;
    let half = page(&site, "<p id=p>-</p><script>p.textContent = 'Half of it: a\\ud800b.'</script>");
    let text = read(&api, &half).await.tool_text();
    assert!(text.contains("Half of it: a\u{fffd}b."), "{text}");
    assert_eq!(api.metric("mcp_browser_starts_total").await, browsers);
}

#[tokio::test]
async fn bad_pages_have_an_end() {
    if !has_browser("bad_pages_have_an_end") {
        return;
    }
    let site = Site::on(OPEN).await;
    let api = builder().env("WEBTOOLS_PAGES", "8").env("CHROMIUM_MAX_MEMORY", "2gb").start().await;
    let small = builder().workers(1).env("CHROMIUM_MAX_MEMORY", "500mb").start().await;
    let waits =
        page(&site, "<p>All that there is of it.</p><script src='/never'></script><p>Never seen.</p>");
    let loops = page(&site, "<p>Before.</p><script>for (;;) {}</script>");
    let loops_later = page(
        &site,
        "<p>Before.</p><script>addEventListener('load', () => setTimeout(() => {for (;;) {}}))</script>",
    );
    let huge = site.url("/endless");
    let never = site.url("/never");
    let floods = page(
        &site,
        "<p>Floods.</p><script>setInterval(() => {for (let i = 0; i < 50; i++) {\
        const f = document.createElement('iframe'); document.body.append(f); f.remove()}}, 1)</script>",
    );
    let (waits, loops, loops_later, huge, never, floods) = tokio::join!(
        read(&api, &waits),
        read(&api, &loops),
        read(&api, &loops_later),
        read(&api, &huge),
        read(&api, &never),
        read(&api, &floods),
    );
    let waits = waits.tool_text();
    assert!(
        waits.contains("All that there is of it.") && waits.contains("still loading after 20 s"),
        "{waits}"
    );
    let said = |answer: Answer, says: &str| {
        assert_eq!(answer.json()["data"]["isError"], true, "{says}: {}", answer.text);
        let text = answer.tool_text();
        assert!(text.contains(says), "{says}: {text}");
    };
    said(loops, "they do not end");
    said(loops_later, "they do not end");
    said(huge, "the page loads more than 24 MiB");
    said(never, "did not answer within 20 s");
    // It is read between two floods, or has told more of itself by then than can be followed, or than is read in time.
    let (failed, text) = (floods.json()["data"]["isError"].clone(), floods.tool_text());
    let ends = ["does more than can be followed", "scripts do not let it be read"];
    match failed.as_bool() {
        Some(true) => assert!(ends.iter().any(|end| text.contains(end)), "{text}"),
        _ => assert!(text.starts_with("Floods."), "{text}"),
    }
    let eats = page(
        &site,
        "<p>Eats.</p><script>const all = []; for (;;) all.push(new Uint8Array(16 << 20).fill(1))</script>",
    );
    // The page beside it, in the same browser, neither ends nor begins again.
    let beside = page(&site, "<p>Beside it.</p><script src='/after?path=/eaten'></script>");
    let eating = async {
        eventually("the page beside it is open", async || count(&site, "/after") > 0).await;
        let eats = read(&small, &eats).await;
        reqwest::get(site.url("/eaten")).await.unwrap();
        eats
    };
    let (beside, eats) = tokio::join!(read(&small, &beside), eating);
    said(eats, "the page takes too much memory");
    assert_eq!(beside.tool_text(), "Beside it.");
    assert_eq!(small.metric("mcp_browser_starts_total").await, 1.0);
    for api in [&small, &api] {
        assert!(read(api, &site.url("/article")).await.tool_text().contains("written by a script"));
    }
    drop(small);
    eventually("nothing is left of the pages", async || {
        api.metric("mcp_browser_pages").await == 0.0 && site.open.load(Ordering::SeqCst) == 0
    })
    .await;
}

/// Everything that runs of browsers of these programs.
fn everything_of(owners: &[i32]) -> Vec<i32> {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let of = |name: &str| {
                let bytes = std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
                let text = String::from_utf8_lossy(&bytes).into_owned();
                owners.iter().any(|owner| text.contains(&format!("mcp-api-chromium-{owner}-")))
            };
            (of("cmdline") || of("environ")) && alive(*pid)
        })
        .collect()
}

#[tokio::test]
async fn a_browser_that_dies_is_replaced_and_none_is_left_behind() {
    if !has_browser("a_browser_that_dies_is_replaced_and_none_is_left_behind") {
        return;
    }
    let site = Site::on(OPEN).await;
    let api = builder().env("WEBTOOLS_PAGES", "2").start().await;
    let slow = page(&site, "<p>The end of a wait.</p><script src='/once'></script>");
    // Killed while it renders: the page is rendered by another one, which is said.
    let killing = async {
        eventually("the page is being rendered", async || {
            count(&site, "/once") > 0 && !browsers(&api).is_empty()
        })
        .await;
        for pid in browsers(&api) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
    };
    let (answer, ()) = tokio::join!(read(&api, &slow), killing);
    let text = answer.tool_text();
    assert!(
        text.starts_with("The end of a wait.") && text.contains("which a new one loaded again"),
        "{text}"
    );
    assert_eq!(count(&site, "/once"), 2, "it was loaded twice");
    assert!(read(&api, &site.url("/article")).await.tool_text().contains("written by a script"));

    // A caller that leaves has its page closed.
    let url = site.url("/never?left");
    let call = json!({"serverName": "webtools", "methodName": "get_url_content", "args": {"url": url}});
    let request = api.request(reqwest::Method::POST, "/mcp/tool/call").json(&call);
    let leaving = tokio::spawn(async move { request.send().await });
    eventually("its page is open", async || count(&site, "/never?left") > 0).await;
    leaving.abort();
    eventually("its page is closed", async || site.open.load(Ordering::SeqCst) == 0).await;
    eventually("nothing is open", async || api.metric("mcp_browser_pages").await == 0.0).await;

    // No more pages than there may be. Four times as many wait, and one more is told so.
    let limit = 2;
    let mut crowd: Vec<_> = (0..=limit + 4 * limit)
        .map(|at| {
            let url = site.url(&format!("/never?crowd{at}"));
            let call =
                json!({"serverName": "webtools", "methodName": "get_url_content", "args": {"url": url}});
            let request = api.request(reqwest::Method::POST, "/mcp/tool/call").json(&call);
            tokio::spawn(async move { request.send().await })
        })
        .collect();
    eventually("all have come, and one has gone", async || {
        crowd.iter().any(|call| call.is_finished()) && count(&site, "/never?crowd") >= limit
    })
    .await;
    let gone = crowd.iter().position(|call| call.is_finished()).unwrap();
    let refused = crowd.swap_remove(gone).await.unwrap().unwrap().text().await.unwrap();
    assert!(refused.contains("too many pages are being read right now"), "{refused}");
    assert_eq!(count(&site, "/never?crowd"), limit);
    assert_eq!(api.metric("mcp_browser_pages").await, limit as f64);
    assert!(!crowd.iter().any(|call| call.is_finished()), "the others wait");
    for call in crowd {
        call.abort();
    }
    eventually("those that left leave room", async || {
        read(&api, &site.url("/article")).await.tool_text().contains("written by a script")
    })
    .await;

    let owners = api.owners();
    assert!(!everything_of(&owners).is_empty());
    for owner in &owners {
        kill(Pid::from_raw(*owner), Signal::SIGKILL).unwrap();
    }
    eventually("nothing of the browsers is left", async || everything_of(&owners).is_empty()).await;
}
