//! A target of the fuzzer: what comes from the bus.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "this is test support: a failure should end the test loudly"
)]

use bytes::Bytes;
use mcp_shared::{
    error::ErrorCode,
    ids::{RequestId, ServerName, UserId},
    limits,
};
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::{
    frames::{Assembled, Assembly},
    server::front_door,
    subjects::{Subjects, token},
    wire::{self, Beat, CallId, Frame, ToRouter, ToWorker},
};

/// Most bytes of a body that is put together here.
const MOST: usize = 4 * 1024;

/// Whatever can be read can be written and read again, and is the same then; a body is put together from its frames
/// or not at all; and a service's request is for the server and the user that its subject names. The first line of the
/// input is that subject's end, the rest the request; the whole is also a message of a node, and a row of frames.
pub fn bus_message(data: &[u8]) {
    let payload = Bytes::copy_from_slice(data);
    there_and_back::<(CallId, ToWorker)>(&payload);
    there_and_back::<ToRouter>(&payload);
    there_and_back::<Beat>(&payload);
    frames(&payload);
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let (subject, request) =
        (String::from_utf8_lossy(&data[..end]), payload.slice((end + 1).min(data.len())..));
    service(&subject, &request);
    tokens(&subject);
}

fn there_and_back<T: Serialize + DeserializeOwned>(payload: &Bytes) {
    let Ok((message, body)) = wire::decode::<T>(payload) else { return };
    assert!(payload.ends_with(&body), "a body is what stands at the end");
    let written = wire::encode(&message, &body).expect("what was read can be written");
    let (again, same) = wire::decode::<T>(&written).expect("what was written can be read");
    assert_eq!(same, body);
    assert_eq!(wire::encode(&again, &same).expect("it can be written again"), written);
}

/// Frames of which each is a message with a length before it.
fn frames(data: &Bytes) {
    let mut assembly = Assembly::default();
    let mut rest = data.clone();
    let mut taken = 0;
    while let Some(&length) = rest.first() {
        let one = rest.split_to(rest.len().min(usize::from(length) + 1)).slice(1..);
        let Ok((frame, part)) = wire::decode::<Frame>(&one) else { continue };
        taken += part.len();
        match assembly.take(&frame, part, MOST) {
            Assembled::Whole(body) => {
                assert!(body.len() <= MOST && body.len() == frame.total && body.len() <= taken);
                if frame.number > 0 {
                    assert_eq!(frame.sha256, Some(hex::encode(Sha256::digest(&body))));
                }
            }
            Assembled::TooLarge => assert!(frame.total > MOST),
            Assembled::Partly | Assembled::Broken => {}
        }
    }
}

fn service(subject: &str, request: &Bytes) {
    let subjects = Subjects::new("mcp");
    let whole = format!("mcp.v1.call.{subject}");
    match front_door::read(&subjects, &whole, request, RequestId::generate()) {
        Ok((context, call)) => {
            // A permission is for a subject: the request has to be for just that.
            let (server, user) = subject.split_once('.').unwrap();
            assert_eq!(
                (token(call.server.as_str()), token(context.user.as_str())),
                (server.into(), user.into())
            );
            assert_eq!(subjects.call(&call.server, &context.user), whole);
            assert!(call.arguments.is_object());
            assert!(context.timeout.is_none_or(|time| !time.is_zero() && time <= limits::TOOL_TIMEOUT_MAX));
            assert!(ServerName::parse_existing(call.server.as_str()).is_ok());
            assert!(UserId::parse(context.user.as_str()).is_ok());
        }
        Err(error) => {
            let expected = [ErrorCode::InvalidRequest, ErrorCode::InvalidJson, ErrorCode::InvalidServerName];
            assert!(expected.contains(&error.code), "{error:?}");
            assert!(error.message.len() < 1_024, "little of what was sent comes back");
        }
    }
}

/// A name becomes one token that has no meaning to NATS, and no other name has the same.
fn tokens(name: &str) {
    let one = token(name);
    assert!((1..=64).contains(&one.len()), "{one}");
    assert!(one.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=".contains(&byte)), "{one}");
    for other in
        [format!("{name} "), format!("{name}a"), one.clone(), name.to_lowercase(), name.replace('.', "-")]
    {
        assert!(other == name || token(&other) != one, "{name:?} and {other:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_bus() {
        mcp_shared::testing::fuzz::run("bus_message", bus_message);
    }
}
