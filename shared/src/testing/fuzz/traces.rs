//! Trace context: what is accepted goes into messages on the bus, into lines of JSON, and into headers.

use crate::trace::{BAGGAGE, SpanContext, TRACEPARENT, TRACESTATE, Trace};

/// The first line is a `traceparent`, the next one a `tracestate`, and all others are fields of `baggage`.
pub fn trace_context(data: &[u8]) {
    let lines: Vec<&[u8]> = data.split(|byte| *byte == b'\n').collect();
    let received = Trace::received(|name| {
        let of = match name {
            TRACEPARENT => lines.get(..1),
            TRACESTATE => lines.get(1..2),
            BAGGAGE => lines.get(2..),
            other => panic!("nobody sends {other}"),
        };
        of.unwrap_or_default().iter().copied()
    });
    let Some(trace) = received else { return };
    let parent = trace.parent.to_string();
    assert_eq!(parent.len(), 55);
    assert!(parent.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f' | b'-')), "{parent}");
    assert_eq!(parent.parse::<SpanContext>(), Ok(trace.parent));
    // The ids are those that came.
    let line = String::from_utf8_lossy(lines[0]);
    assert_eq!(line.trim_matches([' ', '\t']).get(2..52), parent.get(2..52));
    for (text, most) in [(trace.state(), 512), (trace.baggage(), 8_192)] {
        let Some(text) = text else { continue };
        assert!((1..=most).contains(&text.len()), "{text}");
        assert!(text.bytes().all(|byte| matches!(byte, 0x20..=0x7e | b'\t')), "{text:?}");
        assert!(text.split(',').all(|member| member.contains('=') && !member.starts_with('=')), "{text:?}");
    }
    assert!(trace.baggage().is_none_or(|baggage| !baggage.contains(['"', '\\'])));
    // The next node takes it as it is.
    let sent = serde_json::to_string(&trace).expect("it can be written");
    assert_eq!(serde_json::from_str::<Trace>(&sent).expect("it can be read"), trace);
}
