//! One process serves two users at once, and nothing of one ever reaches the other, however the server answers.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use reqwest::Method;
use serde_json::{Value, json};

use crate::deployment::Deployment;

/// Calls of each user.
const CALLS: usize = 2_500;
/// Calls of each user at the same time.
const AT_ONCE: usize = 24;

/// What a user calls, some of it only to confuse: answers that come twice, late, out of turn, or that nobody asked
/// for.
fn called(turn: usize) -> (&'static str, Value, Option<&'static str>) {
    match turn % 10 {
        0 => ("duplicate_answer", json!({}), None),
        1 => ("late_answer", json!({"ms": 60}), Some("20")),
        2 => ("unknown_ids", json!({"n": 3}), None),
        3 => ("progress", json!({"steps": 2, "delayMs": 1}), None),
        4 => ("sleep", json!({"ms": turn % 7}), None),
        _ => ("args", json!({ "turn": turn }), None),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_users_of_one_process_never_hear_of_each_other() {
    let api = Deployment::start().await;
    let server = json!({"concurrency": 2 * AT_ONCE, "scaling": "singleton"});
    api.add_fixture("shared", &["--more"], server).await;
    let users = [("anna", "canary-of-anna"), ("ben", "canary-of-ben")];
    for (user, canary) in users {
        api.set_secret(user, "shared", "token", canary).await.ok();
    }
    let of_user = async |(user, own): (&str, &str), other: &str| {
        let calls = stream::iter(0..CALLS).map(|turn| {
            let api = &api;
            async move {
                let (tool, args, time) = called(turn);
                let body =
                    json!({"username": user, "serverName": "shared", "methodName": tool, "args": args});
                let request = api.request(Method::POST, "/mcp/tool/call").json(&body);
                let request = match time {
                    Some(time) => request.header("X-Request-Timeout-Ms", time),
                    None => request,
                };
                (turn, tool, api.send(request.timeout(Duration::from_secs(120))).await)
            }
        });
        let mut calls = std::pin::pin!(calls.buffer_unordered(AT_ONCE));
        let mut told = 0;
        while let Some((turn, tool, answer)) = calls.next().await {
            assert!(!answer.text.contains(other), "{user} was told by {tool}: {}", answer.text);
            match tool {
                "args" => {
                    let got: Value = serde_json::from_str(&answer.tool_text()).unwrap();
                    assert_eq!(got, json!({"turn": turn, "token": own}));
                    told += 1;
                }
                // It may be in time after all where that is short.
                "late_answer" => assert!(matches!(answer.status, 200 | 504), "{}", answer.text),
                _ => drop(answer.ok()),
            }
        }
        told
    };
    let (anna, ben) = tokio::join!(of_user(users[0], users[1].1), of_user(users[1], users[0].1));
    assert_eq!((anna, ben), (CALLS / 2, CALLS / 2));
}
