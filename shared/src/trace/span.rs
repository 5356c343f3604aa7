//! Spans: what was done in which time, and what came of it. While nothing is exported, beginning one is one branch.
//!
//! What a span says is a closed list of keys, none of which ever has an argument, a result, a secret or a text of a
//! user.

use std::{
    borrow::Cow,
    cell::Cell,
    num::{NonZeroU64, NonZeroU128},
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use super::{KNOWN_FLAGS, SAMPLED, SpanContext, Trace, export::Queue};

/// Which traces are recorded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Whoever began the trace decides, if somebody else did.
    pub by_parent: bool,
    /// The share of the others, from 0 to 1. Every node comes to the same for the same trace.
    pub ratio: f64,
}

impl Sampler {
    fn takes(self, parent: Option<SpanContext>, trace: NonZeroU128) -> bool {
        match parent {
            Some(parent) if self.by_parent => parent.is_sampled(),
            // The lower half is random also where the upper one is a time.
            _ => {
                let drawn = u64::try_from(trace.get() & u128::from(u64::MAX)).unwrap_or(u64::MAX) >> 11;
                // 53 bits, which a float holds exactly.
                (drawn as f64) < self.ratio * (1_u64 << 53) as f64
            }
        }
    }
}

/// On which side of a message a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// On neither.
    Internal,
    /// Something was asked of this program.
    Server,
    /// This program asks somebody.
    Client,
}

macro_rules! keys {
    ($($variant:ident = $text:literal, $meaning:literal;)*) => {
        /// What a span may say. The set is closed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Key {
            $(#[doc = $meaning] $variant,)*
        }

        impl Key {
            /// All of them, in the order of the documentation.
            pub const ALL: &'static [Key] = &[$(Key::$variant,)*];

            /// As it is exported.
            pub fn as_str(self) -> &'static str {
                match self { $(Key::$variant => $text,)* }
            }

            /// What it means.
            pub fn meaning(self) -> &'static str {
                match self { $(Key::$variant => $meaning,)* }
            }
        }
    };
}

keys! {
    Method = "http.request.method", "The method of an HTTP request.";
    Route = "http.route", "The pattern that its path matched.";
    Status = "http.response.status_code", "The status of its answer.";
    Error = "error.type", "The code of the error that it ended with; `cancelled` if whoever asked was gone; `tool_error` if a tool says of its result that it is an error (`isError`).";
    Messaging = "messaging.system", "`nats`, where a service asked over the bus.";
    McpMethod = "mcp.method.name", "`tools/call`.";
    Server = "mcp.server.name", "The name of the server.";
    Tool = "gen_ai.tool.name", "The name of the tool.";
    Transport = "network.transport", "`pipe` or `tcp`: how the server is spoken to.";
    Outcome = "mcp.call.outcome", "What is known about a call that failed: `not_started`, `unknown` or `completed`.";
    Attempt = "mcp.call.attempt", "Which attempt at a call it was, if not the first, counted from 1.";
    Secrets = "mcp.call.has_secrets", "Whether secrets were added to the arguments.";
}

/// What it says under a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A word of our own, or a name.
    Text(Cow<'static, str>),
    /// A number.
    Number(i64),
    /// Yes or no.
    Flag(bool),
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Self {
        Value::Text(Cow::Borrowed(text))
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Value::Text(Cow::Owned(text))
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Value::Number(number)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Value::Flag(flag)
    }
}

/// A span that is over.
#[derive(Debug)]
pub(super) struct Record {
    pub context: SpanContext,
    pub state: Option<Arc<str>>,
    pub parent: Option<NonZeroU64>,
    /// The parent is another process's.
    pub remote: bool,
    pub name: Cow<'static, str>,
    pub kind: Kind,
    pub begun: SystemTime,
    pub ended: SystemTime,
    pub attributes: Vec<(Key, Value)>,
    pub failed: bool,
}

/// What spans are made with, once something is exported.
pub(super) struct Tracer {
    pub sampler: Sampler,
    pub queue: Arc<Queue>,
}

/// It is set when an export begins, and stays.
static TRACER: OnceLock<Tracer> = OnceLock::new();

pub(super) fn install(tracer: Tracer) -> bool {
    TRACER.set(tracer).is_ok()
}

/// A span under way. It ends with [`Span::end`] or [`Span::fail`]; one that is dropped before was cancelled. Most are
/// nothing at all: that of a trace which is not recorded costs nothing.
#[derive(Debug, Default)]
pub struct Span(Option<Box<Record>>);

/// Begins the span of something that another process caused. With it comes where that belongs which it causes: below
/// the span if there is one, and else below the other process's, as it came.
pub fn begin(
    caused_by: Option<Trace>,
    kind: Kind,
    name: impl FnOnce() -> Cow<'static, str>,
) -> (Span, Option<Trace>) {
    match TRACER.get() {
        None => (Span(None), caused_by),
        Some(tracer) => tracer.begin(caused_by, kind, name),
    }
}

impl Tracer {
    fn begin(
        &self,
        caused_by: Option<Trace>,
        kind: Kind,
        name: impl FnOnce() -> Cow<'static, str>,
    ) -> (Span, Option<Trace>) {
        let parent = caused_by.as_ref().map(|trace| trace.parent);
        let trace = parent.map_or_else(new_trace, SpanContext::trace);
        let sampled = self.sampler.takes(parent, trace);
        if let (Some(_), false) = (parent, sampled) {
            return (Span(None), caused_by);
        }
        // Those that come after have to know of a trace that is not recorded, so that they do not begin to.
        let flags = match parent {
            Some(parent) => parent.flags | SAMPLED,
            None => KNOWN_FLAGS & if sampled { !0 } else { !SAMPLED },
        };
        let context = SpanContext { trace, span: new_span(), flags };
        let follows = match &caused_by {
            Some(caused_by) => caused_by.with_parent(context),
            None => Trace::of(context),
        };
        let record = sampled.then(|| {
            let now = SystemTime::now();
            Box::new(Record {
                context,
                state: follows.state.as_ref().map(|state| Arc::clone(&state.0)),
                parent: parent.map(SpanContext::span),
                remote: parent.is_some(),
                name: name(),
                kind,
                begun: now,
                ended: now,
                attributes: Vec::with_capacity(6),
                failed: false,
            })
        });
        (Span(record), Some(follows))
    }
}

impl Span {
    /// One of a part of what this one is of.
    pub fn child(&self, kind: Kind, name: &'static str) -> Span {
        Span(self.0.as_deref().map(|whole| {
            let now = SystemTime::now();
            Box::new(Record {
                context: SpanContext { span: new_span(), ..whole.context },
                state: whole.state.clone(),
                parent: Some(whole.context.span),
                remote: false,
                name: Cow::Borrowed(name),
                kind,
                begun: now,
                ended: now,
                attributes: Vec::new(),
                failed: false,
            })
        }))
    }

    /// How others name it, if it is recorded.
    pub fn context(&self) -> Option<SpanContext> {
        self.0.as_deref().map(|record| record.context)
    }

    /// Whether it is recorded.
    pub fn is_recorded(&self) -> bool {
        self.0.is_some()
    }

    /// Says something of it. The value is made only if it is recorded.
    pub fn say<V: Into<Value>>(&mut self, key: Key, value: impl FnOnce() -> V) {
        if let Some(record) = &mut self.0 {
            record.attributes.push((key, value().into()));
        }
    }

    /// It is over, and went well.
    pub fn end(mut self) {
        if let Some(record) = self.0.take() {
            hand_over(record);
        }
    }

    /// It is over, with an error of this code.
    pub fn fail(mut self, code: &'static str) {
        if let Some(mut record) = self.0.take() {
            record.attributes.push((Key::Error, code.into()));
            record.failed = true;
            hand_over(record);
        }
    }

    /// It is over, with an error that is whose mistake it was who asked.
    pub fn refuse(mut self, code: &'static str) {
        self.say(Key::Error, || code);
        self.end();
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(mut record) = self.0.take() {
            record.attributes.push((Key::Error, "cancelled".into()));
            record.failed = true;
            hand_over(record);
        }
    }
}

fn hand_over(mut record: Box<Record>) {
    record.ended = SystemTime::now();
    if let Some(tracer) = TRACER.get() {
        tracer.queue.push(record);
    }
}

fn new_span() -> NonZeroU64 {
    loop {
        if let Some(id) = NonZeroU64::new(random()) {
            return id;
        }
    }
}

fn new_trace() -> NonZeroU128 {
    loop {
        if let Some(id) = NonZeroU128::new(u128::from(random()) << 64 | u128::from(random())) {
            return id;
        }
    }
}

/// A number of chance, without a system call each time. Ids of spans are no secrets.
fn random() -> u64 {
    thread_local! {
        static STATE: Cell<u64> = Cell::new(seed());
    }
    STATE.with(|state| {
        // SplitMix64, which has no bad seeds.
        let next = state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        state.set(next);
        let mut mixed = next;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    })
}

fn seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0 ^ uuid::Uuid::new_v4().as_u64_pair().1.rotate_left(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn tracer(by_parent: bool, ratio: f64) -> Tracer {
        Tracer { sampler: Sampler { by_parent, ratio }, queue: Arc::new(Queue::new(8, 8)) }
    }

    fn from(tracer: &Tracer, parent: Option<&str>) -> (Span, Option<Trace>) {
        let caused_by = parent.map(|parent| Trace::of(parent.parse().unwrap()));
        tracer.begin(caused_by, Kind::Server, || "test".into())
    }

    #[test]
    fn without_an_export_a_trace_is_passed_on_as_it_came() {
        let trace = Some(Trace::of(PARENT.parse().unwrap()));
        let (span, follows) = begin(trace.clone(), Kind::Server, || panic!("nobody wants a name"));
        assert!(!span.is_recorded() && follows == trace);
        let (span, follows) = begin(None, Kind::Server, || panic!("nobody wants a name"));
        assert!(!span.is_recorded() && follows.is_none());
        assert!(!span.child(Kind::Client, "part").is_recorded());
    }

    #[test]
    fn whoever_began_a_trace_decides_whether_it_is_recorded() {
        let not_sampled = PARENT.replace("-01", "-00");
        let every = tracer(true, 1.0);
        let (span, follows) = from(&every, Some(PARENT));
        let context = span.context().unwrap();
        assert_eq!(follows.unwrap().parent, context);
        assert_eq!(context.trace(), PARENT.parse::<SpanContext>().unwrap().trace());
        assert_ne!(context.span(), PARENT.parse::<SpanContext>().unwrap().span());
        let (span, follows) = from(&every, Some(&not_sampled));
        assert!(!span.is_recorded());
        assert_eq!(follows.unwrap().parent.to_string(), not_sampled);

        let none = tracer(true, 0.0);
        assert!(from(&none, Some(PARENT)).0.is_recorded());
        let (span, follows) = from(&none, None);
        assert!(!span.is_recorded() && !follows.unwrap().parent.is_sampled());
        let own = tracer(false, 1.0);
        let (span, follows) = from(&own, Some(&not_sampled));
        assert!(span.is_recorded() && follows.unwrap().parent.is_sampled());
        assert!(!from(&tracer(false, 0.0), Some(PARENT)).0.is_recorded());
    }

    #[test]
    fn a_share_of_traces_is_recorded_the_same_everywhere() {
        let sampler = Sampler { by_parent: true, ratio: 0.25 };
        let ids: Vec<_> = (0..10_000).map(|_| new_trace()).collect();
        let taken = ids.iter().filter(|id| sampler.takes(None, **id)).count();
        assert!((2_200..2_800).contains(&taken), "{taken}");
        assert!(ids.iter().all(|id| sampler.takes(None, *id) == sampler.takes(None, *id)));
    }

    #[test]
    fn keys_are_unique() {
        let names: std::collections::HashSet<_> = Key::ALL.iter().map(|key| key.as_str()).collect();
        assert_eq!(names.len(), Key::ALL.len());
    }
}
