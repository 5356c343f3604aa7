use mcp_shared::{
    error::{ErrorCode, Outcome},
    hosting::Placing,
    ids::ToolName,
};

use super::*;

fn round<T: Serialize + DeserializeOwned>(message: &T, body: &[u8]) -> (T, Bytes) {
    decode(&encode(message, body).unwrap()).unwrap()
}

#[test]
fn bodies_stay_as_they_are() {
    let body = b"{\"a\":1.0e2,\n \"b\":\"\\u00e4\"}";
    let (message, read) = round(&ToWorker::Go(Frame { number: 0, total: body.len(), sha256: None }), body);
    assert!(matches!(message, ToWorker::Go(Frame { number: 0, sha256: None, .. })));
    assert_eq!(read, body.as_slice());
}

#[test]
fn an_error_keeps_all_it_says() {
    let error = WorkerError::new(ErrorCode::McpError, "MCP error -1: \n x")
        .outcome(Outcome::Completed)
        .with("mcpCode", -1);
    let (message, body) = round(&ToRouter::Failed(error.clone()), b"");
    assert!(matches!(message, ToRouter::Failed(read) if read == error));
    assert!(body.is_empty());
}

/// Messages as version 1 wrote them. They must be readable for as long as a neighbour may write them;
/// members that a later version adds must not disturb.
#[test]
fn messages_of_version_1_are_understood() {
    let to_worker = [
        r#"{"offer":{"version":1,"request":"r-1","user":"default","timeoutMs":500,"spentMs":3,"size":17,"router":"g-1","call":{"server":"everything","tool":"echo","progress":false,"placing":"owned"},"later":1}}"#,
        r#"{"offer":{"version":1,"request":"r-1","user":"default","spentMs":0,"size":2,"router":"g-1","call":{"server":"everything","tool":"echo","progress":false,"placing":"take"},"trace":{"parent":"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01","state":"a=b","baggage":"c=d","later":1}}}"#,
        r#"{"go":{"n":0,"total":17}}"#,
        r#"{"go":{"n":3,"total":1000000,"sha256":"00","later":[]}}"#,
        r#""cancel""#,
        r#"{"credit":4}"#,
        r#"{"probe":{"router":"g-1","open":["000000000000000000000000000000ff"],"done":[]}}"#,
        r#"{"ask":{"start":{"user":"default","server":"everything"}}}"#,
        r#"{"ask":{"restart":{"user":"default","server":"everything"}}}"#,
        r#"{"ask":{"report":{"server":"everything"}}}"#,
        r#"{"ask":"reports"}"#,
        r#"{"ask":{"invalidate":{"change":{"kind":"secret","user":"u","server":"s","name":"n"}}}}"#,
        r#"{"pulse":{"at_ms":12}}"#,
    ];
    for line in to_worker {
        let id = CallId(0xff);
        let payload = Bytes::from(format!("[\"{id}\",{line}]\nbody"));
        let ((read, _), body) =
            decode::<(CallId, ToWorker)>(&payload).unwrap_or_else(|error| panic!("{line}: {error}"));
        assert_eq!((read, body), (id, Bytes::from("body")));
    }
    for line in [r#"{"log":"info,mcp_worker=debug"}"#, r#"{"log":null}"#] {
        let (beat, _) = decode::<Beat>(&Bytes::from(format!("{line}\n"))).unwrap();
        assert!(matches!(beat, Beat::Log(_)));
    }
    let to_router = [
        r#"{"wait":{"limit_ms":60000}}"#,
        r#"{"accept":{"limit_ms":60000}}"#,
        r#"{"refuse":{"why":"not_owner","owner":"w-1"}}"#,
        r#"{"refuse":{"why":"not_owner","owner":null}}"#,
        r#"{"refuse":{"why":"draining"}}"#,
        r#"{"refuse":{"why":"busy","error":{"code":"overloaded","message":"m","retryAfterMs":1000}}}"#,
        r#"{"refuse":{"why":"error","error":{"code":"server_not_found","message":"m","outcome":"not_started","details":{"serverName":"x"}}}}"#,
        r#""progress""#,
        r#"{"answer":{"n":0,"total":4}}"#,
        r#"{"failed":{"code":"deadline_exceeded","message":"m","outcome":"unknown"}}"#,
        r#""alive""#,
    ];
    for line in to_router {
        let payload = Bytes::from(format!("{line}\n"));
        decode::<ToRouter>(&payload).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
    let (offer, _) = decode::<ToWorker>(&Bytes::from(format!("{}\n", to_worker[0]))).unwrap();
    let ToWorker::Offer(offer) = offer else { panic!("{offer:?}") };
    assert_eq!(offer.trace, None);
    assert_eq!(offer.call.tool, ToolName::from_stored("echo"));
    assert_eq!((offer.timeout_ms, offer.call.placing), (Some(500), Placing::Owned));
}

#[test]
fn garbage_is_an_error() {
    for payload in ["", "\n", "{}\n", "{\"offer\":{}}\n", "{\"later\":1}\n", "no line", "[1]\n", "\u{0}\n"] {
        assert!(decode::<ToWorker>(&Bytes::from(payload.to_owned())).is_err(), "{payload:?}");
        assert!(decode::<ToRouter>(&Bytes::from(payload.to_owned())).is_err(), "{payload:?}");
    }
    for id in ["", "f", &"g".repeat(32), &"F".repeat(32), &"0".repeat(33), "+0000000000000000000000000000001"]
    {
        assert!(id.parse::<CallId>().is_err(), "{id}");
    }
}
