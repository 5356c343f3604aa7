//! Answers in several parts, so that a large result is sent as it came and not copied first.

use std::{
    convert::Infallible,
    mem,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use http::StatusCode;
use http_body::{Frame, SizeHint};
use mcp_shared::{
    answer::{success, success_in_parts},
    json::RawJson,
};

use crate::problem::{json_body, json_bytes};

/// Results up to this size are copied, in bytes: for them, one piece costs less than three.
const COPIED: usize = 16 * 1024;

/// The answer to a call that has this result.
pub fn answer(result: &RawJson) -> Response {
    if result.as_bytes().len() <= COPIED {
        return json_bytes(StatusCode::OK, success(result));
    }
    json_body(StatusCode::OK, Body::new(Parts(success_in_parts(result))))
}

/// A body in three parts, of a length that is known from the start.
struct Parts([Bytes; 3]);

impl http_body::Body for Parts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = self.0.iter_mut().find(|part| !part.is_empty());
        Poll::Ready(next.map(|part| Ok(Frame::data(mem::take(part)))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.iter().all(Bytes::is_empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|part| part.len() as u64).sum())
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_large_result_is_sent_as_it_came() {
        let text = "x".repeat(COPIED);
        let result = format!(r#"{{"content":[{{"type":"text","text":"{text}"}}]}}"#);
        let result = RawJson::parse(result).unwrap();
        let mut body = answer(&result).into_body();
        assert_eq!(body.size_hint().exact(), Some(success(&result).len() as u64));
        let mut whole = Vec::new();
        let mut copied = true;
        while let Some(frame) = body.frame().await {
            let part = frame.unwrap().into_data().unwrap();
            copied &= part.as_ptr() != result.as_bytes().as_ptr();
            whole.extend_from_slice(&part);
        }
        assert!(body.is_end_stream() && !copied);
        assert_eq!(whole, success(&result));
    }
}
