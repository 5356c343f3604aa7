//! Traces: one call is one trace, from its caller to its server, and whatever becomes of the collector harms nobody.

use std::time::Duration;

use mcp_shared::testing::port::Port;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::{
    collector::{Collector, Seen},
    deployment::{Answer, Builder, Deployment, eventually, tls_file},
    remote,
    remote_tls::in_front_of,
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "b7ad6b7169203331";

fn parent(trace: &str, flags: &str) -> String {
    format!("00-{trace}-{SPAN}-{flags}")
}

/// A deployment that exports to a collector, soon.
fn exporting(collector: &Collector) -> Builder {
    Deployment::builder()
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url())
        .env("OTEL_BSP_SCHEDULE_DELAY", "20")
}

/// A call with headers of its own.
async fn call_with(
    api: &Deployment,
    headers: &[(&str, &str)],
    server: &str,
    tool: &str,
    args: Value,
) -> Answer {
    let body = json!({"serverName": server, "methodName": tool, "args": args});
    let request = api.request(Method::POST, "/mcp/tool/call").json(&body);
    api.send(headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))).await
}

/// What a server was told in `_meta`.
async fn meta(api: &Deployment, headers: &[(&str, &str)], server: &str) -> Value {
    serde_json::from_str(&call_with(api, headers, server, "meta", json!({})).await.tool_text()).unwrap()
}

#[track_caller]
fn named<'a>(spans: &'a [Seen], name: &str) -> &'a Seen {
    let mut found = spans.iter().filter(|span| span.name == name);
    let span = found.next().unwrap_or_else(|| panic!("no {name}: {spans:#?}"));
    assert!(found.next().is_none(), "{name} twice: {spans:#?}");
    span
}

/// Five spans, each below the other that caused it.
#[track_caller]
fn is_one_call(spans: &[Seen]) {
    let (request, call) = (named(spans, "POST /mcp/tool/call"), named(spans, "call"));
    assert_eq!((request.kind, request.service.as_str()), (2, "mcp-gateway"));
    assert_eq!(call.parent, request.id);
    let (kind, service) = if crate::CLUSTER { (2, "mcp-worker") } else { (1, "mcp-gateway") };
    assert_eq!((call.kind, call.service.as_str()), (kind, service));
    for (name, kind) in [("queue", 1), ("secrets", 1), ("tools/call", 3)] {
        let part = named(spans, name);
        assert_eq!((&part.parent, part.kind, &part.service), (&call.id, kind, &call.service), "{part:?}");
        assert!(
            part.begun >= call.begun && part.begun <= part.ended && part.ended <= call.ended,
            "{spans:#?}"
        );
    }
    assert_eq!(named(spans, "tools/call").says("mcp.method.name"), "tools/call");
    assert!(!call.instance.is_empty(), "{call:?}");
}

#[tokio::test]
async fn one_trace_goes_from_the_caller_to_the_server() {
    let collector = Collector::start().await;
    let api = exporting(&collector).start().await;
    api.add_fixture("shared", &["--more"], json!({})).await;
    api.set_secret("default", "shared", "KEY", "a-secret-value").await.ok();

    let given = parent(TRACE, "01");
    let headers =
        [("traceparent", given.as_str()), ("tracestate", "congo=t61rcWkgMzE"), ("baggage", "team=red")];
    let told = meta(&api, &headers, "shared").await;
    let spans = collector.trace(TRACE, 5).await;
    is_one_call(&spans);
    let request = named(&spans, "POST /mcp/tool/call");
    assert_eq!(request.parent, SPAN);
    assert_eq!(request.flags & 0x300, 0x300, "its parent is somebody else's");
    assert_eq!((request.says("http.route"), request.says("http.request.method")), ("/mcp/tool/call", "POST"));
    assert_eq!(request.says("http.response.status_code"), "200");
    assert!(spans.iter().all(|span| !span.failed && span.state == "congo=t61rcWkgMzE"), "{spans:#?}");
    let asking = named(&spans, "tools/call");
    assert_eq!((asking.says("mcp.server.name"), asking.says("gen_ai.tool.name")), ("shared", "meta"));
    assert_eq!(named(&spans, "secrets").says("mcp.call.has_secrets"), "true");
    let wanted = json!({"traceparent": format!("00-{TRACE}-{}-01", asking.id),
        "tracestate": "congo=t61rcWkgMzE", "baggage": "team=red"});
    assert_eq!(told, wanted);
    api.logged(TRACE).await;
    let line = api.log().lines().find(|line| line.contains(TRACE)).unwrap().to_owned();
    assert!(line.contains("mcp_gateway::access") && line.contains("\"trace_id\""), "{line}");

    // Without a caller that traces, the trace begins here.
    let told = meta(&api, &[], "shared").await;
    let trace = told["traceparent"].as_str().unwrap().split('-').nth(1).unwrap().to_owned();
    let spans = collector.trace(&trace, 5).await;
    is_one_call(&spans);
    assert_eq!(named(&spans, "POST /mcp/tool/call").parent, "");

    // A call with progress is over with its events, and not with the head of its answer.
    let trace = TRACE.replace("0af7", "0af8");
    let followed = [("traceparent", &*parent(&trace, "01")), ("accept", "text/event-stream")];
    call_with(&api, &followed, "shared", "progress", json!({"steps": 2, "delayMs": 20})).await.ok();
    let spans = collector.trace(&trace, 5).await;
    is_one_call(&spans);
    assert!(named(&spans, "POST /mcp/tool/call").ended >= named(&spans, "call").ended, "{spans:#?}");
}

#[tokio::test]
async fn errors_are_recorded_by_their_codes() {
    let collector = Collector::start().await;
    let api = exporting(&collector).start().await;
    api.add_fixture("shared", &["--more"], json!({"toolTimeout": 60_000})).await;
    let trace = |at: usize| TRACE.replace("0af7", &format!("{at:04x}"));
    let call = async |at: usize, headers: &[(&str, &str)], server: &str, tool: &str, args: Value| {
        let given = parent(&trace(at), "01");
        let headers = [&[("traceparent", given.as_str())], headers].concat();
        call_with(&api, &headers, server, tool, args).await
    };

    let said = json!({"code": -32000, "message": "a canary sang"});
    let code = call(1, &[], "shared", "rpc_error", said).await.code();
    let spans = collector.trace(&trace(1), 5).await;
    is_one_call(&spans);
    for name in ["tools/call", "call"] {
        assert!(named(&spans, name).failed, "{spans:#?}");
        assert_eq!(named(&spans, name).says("error.type"), code);
    }
    assert_eq!(named(&spans, "call").says("mcp.call.outcome"), "completed");
    assert_eq!(named(&spans, "POST /mcp/tool/call").says("error.type"), code);

    // For whoever asked over HTTP, a tool that failed has answered.
    assert_eq!(call(5, &[], "shared", "fail", json!({})).await.ok().json()["data"]["isError"], true);
    let spans = collector.trace(&trace(5), 5).await;
    is_one_call(&spans);
    for name in ["tools/call", "call"] {
        assert_eq!(
            (named(&spans, name).failed, named(&spans, name).says("error.type")),
            (true, "tool_error")
        );
    }
    assert!(!named(&spans, "POST /mcp/tool/call").failed, "{spans:#?}");

    // What is the caller's mistake is no failure of the route's.
    call(2, &[], "nobody", "echo", json!({"text": "a canary sang"})).await.fails(404, "server_not_found");
    let spans = collector.trace(&trace(2), 1).await;
    let request = named(&spans, "POST /mcp/tool/call");
    assert_eq!((request.failed, request.says("error.type")), (false, "server_not_found"));
    assert_eq!(request.says("http.response.status_code"), "404");

    let late = [("x-request-timeout-ms", "200")];
    call(3, &late, "shared", "hang", json!({})).await.fails(504, "deadline_exceeded");
    let spans = collector.trace(&trace(3), 5).await;
    is_one_call(&spans);
    for name in ["tools/call", "call", "POST /mcp/tool/call"] {
        assert!(named(&spans, name).failed, "{spans:#?}");
        assert_eq!(named(&spans, name).says("error.type"), "deadline_exceeded", "{spans:#?}");
    }

    // The caller leaves.
    let body = json!({"serverName": "shared", "methodName": "hang", "args": {}});
    let request = api.request(Method::POST, "/mcp/tool/call").json(&body);
    let request = request.header("traceparent", parent(&trace(4), "01"));
    assert!(request.timeout(Duration::from_millis(300)).send().await.is_err());
    let spans = collector.trace(&trace(4), 5).await;
    is_one_call(&spans);
    for name in ["tools/call", "call", "POST /mcp/tool/call"] {
        assert_eq!(named(&spans, name).says("error.type"), "cancelled", "{spans:#?}");
    }
    for body in collector.bodies() {
        assert!(!String::from_utf8_lossy(&body).contains("canary"), "nobody's texts are in spans");
    }
}

#[tokio::test]
async fn whoever_begins_a_trace_decides_whether_it_is_recorded() {
    let collector = Collector::start().await;
    let api = exporting(&collector).env("OTEL_TRACES_SAMPLER", "parentbased_always_off").start().await;
    api.add_fixture("shared", &["--more"], json!({})).await;
    // Nobody else began it, and this program does not.
    let told = meta(&api, &[], "shared").await;
    let (own, flags) = told["traceparent"].as_str().unwrap().rsplit_once('-').unwrap();
    assert!(!flags.ends_with(['1', '3']), "{told}");
    let not = TRACE.replace("0af7", "0000");
    let given = parent(&not, "00");
    assert_eq!(meta(&api, &[("traceparent", &given)], "shared").await, json!({ "traceparent": given }));
    let told = meta(&api, &[("traceparent", &parent(TRACE, "01"))], "shared").await;
    let spans = collector.trace(TRACE, 5).await;
    is_one_call(&spans);
    assert_eq!(told["traceparent"], format!("00-{TRACE}-{}-01", named(&spans, "tools/call").id));
    // With the end of the programs all has been sent that was to be.
    assert!(api.stop().await.success());
    let traces: std::collections::HashSet<_> = collector.spans().into_iter().map(|span| span.trace).collect();
    assert!(!traces.contains(&not) && !own.contains(TRACE), "{traces:?}");
    assert_eq!(traces.len(), 1, "{traces:?}");
}

#[tokio::test]
async fn context_is_passed_on_where_nothing_is_exported() {
    let elsewhere = remote::remote(&[]);
    let api = Deployment::start().await;
    api.add_fixture("shared", &["--more"], json!({})).await;
    remote::add(&api, "remote", &elsewhere, json!({})).await;
    let given = parent(TRACE, "01");
    let headers = [("traceparent", given.as_str()), ("tracestate", "a=b,c=\"d"), ("baggage", "team=red")];
    let wanted = json!({"traceparent": given, "tracestate": "a=b,c=\"d", "baggage": "team=red"});
    assert_eq!(meta(&api, &headers, "shared").await, wanted);

    // Servers elsewhere hear of the trace, and nothing of whom the caller works for.
    let wanted = json!({"traceparent": given, "tracestate": "a=b,c=\"d"});
    assert_eq!(meta(&api, &headers, "remote").await, wanted);
    let seen = elsewhere.seen();
    let call = seen.iter().find(|seen| seen.is("tools/call")).unwrap();
    assert_eq!((call.header("traceparent"), call.header("tracestate")), (given.as_str(), "a=b,c=\"d"));
    assert!(!format!("{seen:?}").contains("team"), "{seen:?}");

    // What is not well-formed does not count, and harms nothing.
    assert_eq!(meta(&api, &[], "shared").await, json!(null));
    for bad in [
        "",
        "00",
        &given.to_uppercase(),
        &given.replace("-01", "-0g"),
        &parent(&"0".repeat(32), "01"),
        "\u{e4}",
    ] {
        let headers = [("traceparent", bad), ("tracestate", "a=b"), ("baggage", "team=red")];
        assert_eq!(meta(&api, &headers, "shared").await, json!(null), "{bad}");
    }
    let twice = [("traceparent", given.as_str()), ("traceparent", given.as_str())];
    assert_eq!(meta(&api, &twice, "shared").await, json!(null));
    let half = [("traceparent", given.as_str()), ("tracestate", "A=b"), ("baggage", "team red=\"\\")];
    assert_eq!(meta(&api, &half, "shared").await, json!({ "traceparent": given }));
    assert_eq!(api.metric("mcp_trace_spans_exported_total").await, 0.0);
}

#[tokio::test]
async fn a_collector_that_is_away_harms_no_call() {
    // Somebody who takes connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let away = Port::keep();
    for (address, timeout, reason) in [
        (away.address(), "300", "export_failed"),
        (silent.local_addr().unwrap(), "300", "export_failed"),
        (silent.local_addr().unwrap(), "60000", "queue_full"),
    ] {
        let api = Deployment::builder()
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{address}"))
            .env("OTEL_EXPORTER_OTLP_TIMEOUT", timeout)
            .env("OTEL_BSP_SCHEDULE_DELAY", "20")
            .env("OTEL_BSP_MAX_QUEUE_SIZE", "16")
            .env("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
            .start()
            .await;
        api.add_fixture("shared", &[], json!({})).await;
        for at in 0..40 {
            let text = at.to_string();
            assert_eq!(api.call("shared", "echo", json!({ "text": text })).await.tool_text(), text);
        }
        let lost = format!("mcp_trace_spans_dropped_total{{reason=\"{reason}\"}}");
        eventually("spans that are lost are counted", async || api.metric(&lost).await > 0.0).await;
        assert_eq!(api.metric("mcp_trace_spans_exported_total").await, 0.0);
        assert!(api.stop().await.success(), "it does not hold up the end either");
    }
}

#[tokio::test]
async fn spans_go_over_tls_to_whom_somebody_vouches_for() {
    let collector = Collector::start().await;
    let port = in_front_of(&collector.url(), "localhost.pem").await;
    let builder = || {
        Deployment::builder()
            .env("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", format!("https://localhost:{port}/v1/traces"))
            .env("OTEL_EXPORTER_OTLP_HEADERS", "x-key=a%20key")
            .env("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
            .env("OTEL_BSP_SCHEDULE_DELAY", "20")
    };
    let trusting = builder().env("SSL_CERT_FILE", tls_file("authority.pem").to_str().unwrap()).start().await;
    trusting.add_fixture("shared", &[], json!({})).await;
    let given = parent(TRACE, "01");
    let echo = json!({"text": "x"});
    call_with(&trusting, &[("traceparent", &given)], "shared", "echo", echo.clone()).await.ok();
    is_one_call(&collector.trace(TRACE, 5).await);
    assert!(collector.keys().iter().all(|key| key == "a key"));

    let wary = builder().start().await;
    wary.add_fixture("shared", &[], json!({})).await;
    let trace = TRACE.replace("0af7", "0000");
    call_with(&wary, &[("traceparent", &parent(&trace, "01"))], "shared", "echo", echo).await.ok();
    let failed = "mcp_trace_spans_dropped_total{reason=\"export_failed\"}";
    eventually("nothing is exported", async || wary.metric(failed).await > 0.0).await;
    assert!(collector.spans().iter().all(|span| span.trace != trace));
}

#[tokio::test]
async fn a_batch_that_was_not_taken_for_the_moment_is_sent_again() {
    let collector = Collector::start().await;
    collector.fail(&[503, 429, 502]);
    let api = exporting(&collector).start().await;
    api.add_fixture("shared", &[], json!({})).await;
    call_with(&api, &[("traceparent", &parent(TRACE, "01"))], "shared", "echo", json!({"text": "x"}))
        .await
        .ok();
    is_one_call(&collector.trace(TRACE, 5).await);
    assert_eq!(collector.faults_left(), 0);
    let failed = "mcp_trace_spans_dropped_total{reason=\"export_failed\"}";
    assert_eq!(api.metric(failed).await, 0.0);
    assert!(api.metric("mcp_trace_spans_exported_total").await >= 5.0);

    // What is wrong with a batch does not get better.
    collector.fail(&[400]);
    let trace = TRACE.replace("0af7", "0000");
    call_with(&api, &[("traceparent", &parent(&trace, "01"))], "shared", "echo", json!({"text": "x"}))
        .await
        .ok();
    eventually("a refused batch is counted", async || api.metric(failed).await > 0.0).await;
}
