//! The built-in server `webtools`: beside the others, searching, and reading pages with a browser and without.

use std::{
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

pub use mcp_shared::testing::chromium::has_browser;
use serde_json::{Value, json};

use crate::deployment::{Answer, Builder, Deployment, alive, eventually};
use site::Site;

#[path = "webtools/site.rs"]
pub mod site;

/// The address that pages of these tests are on, and the only one that may be reached.
pub const OPEN: &str = "127.0.0.2";

/// A deployment whose pages may be on one address of loopback.
pub fn builder() -> Builder {
    Deployment::builder().env("EGRESS_ALLOW", OPEN)
}

pub async fn read(api: &Deployment, url: &str) -> Answer {
    api.call("webtools", "get_url_content", json!({"url": url})).await
}

/// Reads what has to fail, and says with which sentence it did.
pub async fn fails(api: &Deployment, url: &str) -> String {
    let answer = read(api, url).await.ok();
    assert_eq!(answer.json()["data"]["isError"], true, "{url}: {}", answer.text);
    answer.tool_text()
}

pub fn page(site: &Site, body: &str) -> String {
    let query: String =
        url::form_urlencoded::Serializer::new(String::new()).append_pair("body", body).finish();
    site.url(&format!("/page?{query}"))
}

/// Holds a text against a file beside this one; `UPDATE_GOLDEN=1` writes it.
#[track_caller]
fn golden(name: &str, text: &str, site: &Site) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/webtools").join(name);
    let text = text.replace(&site.address.to_string(), "gazette.example") + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(&file).unwrap_or_default(), "{name}");
}

#[tokio::test]
async fn it_stands_beside_the_others_and_stays_as_it_is() {
    let api = Deployment::start().await;
    api.add_fixture("echo", &[], json!({})).await;
    let listed = api.get("/mcp/servers").await.ok().json()["servers"].clone();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["echo", "webtools"]);
    let own = api.server("webtools").await;
    for (field, value) in [
        ("status", json!("connected")),
        ("enabled", json!(true)),
        ("transportType", json!("stdio")),
        ("command", json!("built-in")),
        ("source", json!("platform")),
    ] {
        assert_eq!((&own[field], &listed[1][field]), (&value, &value), "{field}");
    }
    // In a cluster every worker has it.
    let instances = own["instances"].as_array().unwrap();
    assert_eq!(instances.len(), api.owners().len());
    assert!(instances.iter().all(|one| one["status"] == "connected" && one["pid"].is_null()), "{own}");
    let tools = api.get("/mcp/tools").await.ok().json()["tools"].clone();
    let tools = tools.as_array().unwrap().iter().find_map(|one| one.get("webtools")).unwrap().clone();
    assert_eq!(tools, own["toolsList"]);
    let tools: Vec<_> =
        tools.as_array().unwrap().iter().map(|tool| tool["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(tools, ["get_url_content"], "nothing is searched without SEARXNG_URL");
    let fleet = api.get("/fleet").await.ok().json();
    for worker in fleet["workers"].as_array().unwrap() {
        assert!(
            worker["servers"].as_array().unwrap().iter().any(|load| load["name"] == "webtools"),
            "{fleet}"
        );
    }

    for name in ["webtools", "WebTools"] {
        api.register_fixture(name, &[], json!({})).await.fails(403, "builtin_server");
        let install = json!({"name": "some-package", "serverName": name});
        api.post("/packages/install", &install).await.fails(403, "builtin_server");
    }
    // A server of another database may have a name that differs in case; it is one like the others.
    for (name, status, code) in [("webtools", 403, "builtin_server"), ("WebTools", 404, "server_not_found")] {
        let change = json!({"command": "node"});
        api.put(&format!("/mcp/servers/{name}"), Some(&change)).await.fails(status, code);
        api.put(&format!("/mcp/servers/{name}/disable"), None).await.fails(status, code);
        api.put(&format!("/mcp/servers/{name}/enable"), None).await.fails(status, code);
        api.delete(&format!("/mcp/servers/{name}")).await.fails(status, code);
    }
    api.set_secret("alice", "webtools", "KEY", "x").await.fails(403, "builtin_server");
    let impact = api.get("/mcp/servers/webtools/delete-impact").await.ok().json();
    assert_eq!(impact["impact"]["usersWithSavedSecrets"], 0);
    assert_eq!(api.server("webtools").await["status"], "connected");

    let answer = api.call("webtools", "nope", json!({})).await.ok();
    assert_eq!(answer.json()["data"]["isError"], true);
    assert_eq!(answer.tool_text(), "Unknown tool: nope");
    api.call("webtools", "web_search", json!({"query": "x"})).await.ok();
    api.call("webtools", "get_url_content", json!({})).await.fails(400, "invalid_arguments");
    api.call("webtools", "get_url_content", json!({"url": 7})).await.fails(400, "invalid_arguments");
    for (url, says) in [
        ("no url", "is not a URL"),
        ("file:///etc/passwd", "must begin with https:// or http://"),
        ("chrome://version", "must begin with"),
        ("http://user:pass@example.com/", "user name"),
        ("http://169.254.169.254/latest/meta-data/", "Blocked private or local address"),
        ("http://[::ffff:10.0.0.1]/", "Blocked private or local address"),
    ] {
        let text = fails(&api, url).await;
        assert!(text.starts_with("Fetch error: ") && text.contains(says), "{url}: {text}");
    }
}

#[tokio::test]
async fn searches_go_to_the_operators_own_engine() {
    // It may be anywhere: nobody but the operator says where it is.
    let engine = Site::on("127.0.0.3").await;
    let url = format!("http://user:canary-login@{}/", engine.address);
    let api = Deployment::builder().env("EGRESS_ALLOW", "").env("SEARXNG_URL", url).start().await;
    let own = api.server("webtools").await;
    let tools: Vec<_> =
        own["toolsList"].as_array().unwrap().iter().map(|tool| tool["name"].clone()).collect();
    assert_eq!(tools, ["web_search", "get_url_content"]);
    let search = async |args: Value| api.call("webtools", "web_search", args).await;

    let found =
        search(json!({"query": "alte Bäume", "pageno": 2, "time_range": "year", "safesearch": "1"})).await;
    let text = found.tool_text();
    assert!(text.starts_with(
        "Title: Tree 1\nDescription: A tree, 木\nURL: https://trees.example/1\n\nTitle: Tree 2"
    ));
    assert_eq!(text.split("\n\n").count(), 10);
    let asked = engine.asked.lock().unwrap().pop().unwrap();
    assert_eq!(
        asked,
        "GET /search?q=alte+B%C3%A4ume&format=json&pageno=2&count=10&time_range=year&safesearch=1"
    );
    let all = search(json!({"query": "x", "count": 50})).await.tool_text();
    assert!(
        all.ends_with("Title: \nDescription: \nURL: https://bare.example/")
            && all.split("\n\n").count() == 13
    );
    assert_eq!(search(json!({"query": "none"})).await.tool_text(), "No results were found.");
    search(json!({})).await.fails(400, "invalid_arguments");
    search(json!({"query": "x", "time_range": "week"})).await.fails(400, "invalid_arguments");

    for (query, says) in [
        ("garbage", "not what SearXNG says"),
        ("odd", "not what SearXNG says"),
        ("refused", "search.formats"),
        ("broken", "status 500"),
        ("huge", "too large"),
    ] {
        let answer = search(json!({"query": query})).await.ok();
        assert_eq!(answer.json()["data"]["isError"], true, "{query}");
        let text = answer.tool_text();
        assert!(text.starts_with("Search error: ") && text.contains(says), "{query}: {text}");
        assert!(!text.contains("canary"), "{text}");
    }
    // The guard does not stand in front of it, so that it must not lead anywhere else.
    let elsewhere = Site::on("127.0.0.4").await;
    let moved = search(json!({"query": format!("moved {}", elsewhere.url("/search?q=x"))})).await;
    assert_eq!(moved.tool_text(), "Search error: the search engine answered with status 302");
    assert_eq!(*elsewhere.asked.lock().unwrap(), Vec::<String>::new());
    let slow = json!({"serverName": "webtools", "methodName": "web_search", "args": {"query": "slow"}});
    let slow = api
        .request(reqwest::Method::POST, "/mcp/tool/call")
        .header("x-request-timeout-ms", "300")
        .json(&slow);
    api.send(slow).await.fails(504, "deadline_exceeded");
    eventually("the engine is not asked any more", async || engine.open.load(Ordering::SeqCst) == 0).await;
    drop(engine);
    let answer = search(json!({"query": "x"})).await.ok();
    assert!(answer.tool_text().contains("cannot be reached"), "{}", answer.text);
    assert!(!api.log().contains("canary-login"));
}

#[tokio::test]
async fn pages_and_documents_are_read_without_a_browser() {
    let site = Site::on(OPEN).await;
    let api = builder().env("CHROMIUM", "none").start().await;
    golden("article.plain.md", &read(&api, &site.url("/article#part")).await.tool_text(), &site);
    golden("report.txt", &read(&api, &site.url("/report.pdf")).await.tool_text(), &site);
    assert_eq!(read(&api, &site.url("/note.txt")).await.tool_text(), "Bäume");
    assert_eq!(read(&api, &site.url("/data.json")).await.tool_text(), r#"{"a":1}"#);
    let missing = read(&api, &site.url("/nothing")).await.tool_text();
    assert!(missing.contains("no such page") && missing.contains("status 404"), "{missing}");
    let moved = read(&api, &site.url("/to?url=/note.txt")).await.tool_text();
    assert_eq!(moved, format!("(from {})\n\nBäume", site.url("/note.txt")));
    for (path, says) in [
        ("/image.png", "it has no text: it is image/png"),
        ("/broken.pdf", "it is not a PDF that can be read"),
        ("/circle", "it redirects more than 10 times"),
        ("/to?url=http://127.0.0.1:9/", "Blocked private or local address: 127.0.0.1"),
        ("/to?url=http://169.254.169.254/", "Blocked private or local address: 169.254.169.254"),
        ("/to?url=file:///etc/passwd", "must begin with https:// or http://"),
        ("/huge", "it has more than 24 MiB"),
        ("/endless", "it has more than 24 MiB"),
    ] {
        let text = fails(&api, &site.url(path)).await;
        assert!(text.contains(says), "{path}: {text}");
    }
    // What would be read for ever, or take all memory, is read by a process that may not.
    let bomb = format!("{}x", "<div><b><p>".repeat(60_000));
    let text = read(&api, &page(&site, "<p>before</p>")).await.tool_text();
    assert!(text.starts_with("before"), "{text}");
    let site_of_bombs = bombs(bomb).await;
    let text = fails(&api, &format!("http://{site_of_bombs}/")).await;
    assert!(text.contains("takes too much memory or time"), "{text}");
    assert_eq!(read(&api, &site.url("/note.txt")).await.tool_text(), "Bäume");
}

/// A server with one page, which is hard to read.
async fn bombs(body: String) -> std::net::SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind((OPEN, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let _ = client.read(&mut [0; 4096]).await;
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let _ = client.write_all(head.as_bytes()).await;
            let _ = client.write_all(body.as_bytes()).await;
        }
    });
    address
}

#[tokio::test]
async fn pages_and_documents_are_read_with_a_browser() {
    if !has_browser("pages_and_documents_are_read_with_a_browser") {
        return;
    }
    let site = Site::on(OPEN).await;
    let api = builder().start().await;
    let answer = read(&api, &site.url("/article#part")).await.ok();
    assert_eq!(answer.json()["data"]["_meta"]["mcp-api/rendered"], true, "{}", answer.text);
    golden("article.rendered.md", &answer.tool_text(), &site);
    // What is no page is not rendered, and reads alike.
    golden("report.txt", &read(&api, &site.url("/report.pdf")).await.tool_text(), &site);
    assert_eq!(read(&api, &site.url("/note.txt")).await.tool_text(), "Bäume");
    let missing = read(&api, &site.url("/nothing")).await.tool_text();
    assert!(missing.contains("no such page") && missing.contains("status 404"), "{missing}");
    // Nothing is downloaded. What the browser does not want is fetched without it, which is said.
    let download = read(&api, &site.url("/download")).await.tool_text();
    let said = "fetched without a browser, because the browser does not show it as a page";
    assert!(download.starts_with("Hi") && download.contains(said), "{download}");
    let by_script = page(
        &site,
        &format!("<script>location = '/nothing'; location = '{}'</script>", site.url("/article")),
    );
    let text = read(&api, &by_script).await.tool_text();
    assert!(
        text.contains("How trees count") && text.contains(&format!("(from {})", site.url("/article"))),
        "{text}"
    );
    let talks = page(
        &site,
        "<p>Before.</p><script>alert('x'); confirm('y'); document.body.append('After.')</script>",
    );
    assert!(read(&api, &talks).await.tool_text().contains("After."));
    assert_eq!(api.metric("mcp_browser_starts_total").await, browsers(&api).len() as f64);
}

/// The browsers of a deployment: the main process of each.
pub fn browsers(api: &Deployment) -> Vec<i32> {
    let owners = api.owners();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            let of = |owner: &i32| line.contains(&format!("mcp-api-chromium-{owner}-"));
            !line.contains("--type=")
                && !line.contains("crashpad")
                && !line.contains("/bin/sh")
                && owners.iter().any(of)
                && alive(*pid)
        })
        .collect()
}

#[tokio::test]
async fn without_a_browser_that_works_pages_are_fetched_and_that_is_said() {
    let site = Site::on(OPEN).await;
    let none = builder().env("CHROMIUM", "/bin/false").start().await;
    let text = read(&none, &site.url("/article")).await.tool_text();
    assert!(text.contains("fetched without a browser, because the browser does not start"), "{text}");
    let empty: PathBuf = none.data().path().join("nothing");
    std::fs::create_dir_all(&empty).unwrap();
    let none = builder().env("PATH", empty.to_str().unwrap()).start().await;
    let text = read(&none, &site.url("/article")).await.tool_text();
    assert!(text.contains("fetched without a browser, because none is installed"), "{text}");
    assert!(!text.contains("written by a script: the oldest"), "{text}");
}
