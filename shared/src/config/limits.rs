//! Limits on what is taken in at once.

use super::{ConfigError, Reader, parse};

/// What a node takes in at once. Whatever comes beyond is refused without waiting.
#[derive(Debug, Clone, PartialEq)]
pub struct LimitSettings {
    /// Connections of clients that one gateway serves at once.
    pub connections: usize,
    /// Calls in flight at one gateway.
    pub calls: usize,
    /// Bytes of request bodies in flight at one gateway.
    pub body_bytes: usize,
    /// For each user.
    pub user: UserLimits,
    /// Calls that one worker looks after at once, waiting ones among them.
    pub worker_calls: usize,
    /// Calls that may wait for a free slot of one server on one worker.
    pub server_queue: usize,
    /// Processes that one server may have, with all that it starts.
    pub server_processes: Option<u64>,
    /// Bytes of memory that they may take together.
    pub server_memory: Option<u64>,
}

/// What each user may ask; `None`: as much as there is room for. The default has no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct UserLimits {
    /// Calls in flight.
    pub calls: Option<usize>,
    /// Calls in a second, above 0.
    pub rate: Option<f64>,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self {
            connections: 20_000,
            calls: 16_384,
            body_bytes: 256 * 1024 * 1024,
            user: UserLimits::default(),
            worker_calls: 16_384,
            server_queue: 1_024,
            server_processes: Some(1_024),
            server_memory: None,
        }
    }
}

/// Calls in flight that a user may have where users are known, and nothing else is said.
const USER_CALLS: usize = 256;

/// The most that a number of calls can be set to.
pub const MOST_CALLS: usize = 1_000_000;

pub(super) fn threads(text: &str) -> Result<usize, parse::Valid> {
    let number = parse::whole(text).and_then(|number| usize::try_from(number).ok());
    number.filter(|number| (1..=1_024).contains(number)).ok_or("a whole number from 1 to 1024")
}

/// The threads of a program that was not told. Beside one of a cluster there are NATS, perhaps other nodes, and the
/// servers that a worker starts: a thread more than there are cores for them wakes up in vain.
pub(super) fn usual_threads(in_cluster: bool) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if in_cluster { cores.saturating_sub(1).max(1) } else { cores }
}

fn count(text: &str) -> Result<usize, parse::Valid> {
    let number = parse::whole(text).and_then(|number| usize::try_from(number).ok());
    number.filter(|number| (1..=MOST_CALLS).contains(number)).ok_or("a whole number from 1 to 1000000")
}

/// What `none` stands for is no limit.
fn unless_none<T>(text: &str, read: impl Fn(&str) -> Option<T>) -> Option<Option<T>> {
    if text.eq_ignore_ascii_case("none") { Some(None) } else { read(text).map(Some) }
}

fn count_or_none(text: &str) -> Result<Option<usize>, parse::Valid> {
    unless_none(text, |text| count(text).ok()).ok_or("a whole number from 1 to 1000000, or none")
}

fn memory_or_none(text: &str) -> Result<Option<u64>, parse::Valid> {
    let bytes = |text: &str| parse::room(text).ok().and_then(|bytes| u64::try_from(bytes).ok());
    unless_none(text, bytes).ok_or("a size from 1mb to 64gb, such as 2gb, or none")
}

fn rate_or_none(text: &str) -> Result<Option<f64>, parse::Valid> {
    let read = |text: &str| {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        let number = plain.then(|| text.parse::<f64>().ok()).flatten();
        number.filter(|number| (0.001..=1_000_000.0).contains(number))
    };
    unless_none(text, read).ok_or("a number from 0.001 to 1000000, such as 50 or 0.5, or none")
}

impl Reader {
    /// `asked` is whether callers are known: then each has a limit, where nobody says otherwise.
    pub(super) fn limits(&mut self, payload_limit: Option<usize>, asked: bool) -> Option<LimitSettings> {
        let connections = self.required("MAX_CONNECTIONS", count);
        let calls = self.required("MAX_CALLS", count);
        let body_bytes = self.required("MAX_BODY_BYTES", parse::room);
        let usual = asked.then_some(USER_CALLS);
        let user_calls = match self.raw("USER_MAX_CALLS") {
            None => Some(usual),
            Some(_) => self.optional("USER_MAX_CALLS", count_or_none),
        };
        let rate = self.required("USER_MAX_RATE", rate_or_none);
        let worker_calls = self.required("WORKER_MAX_CALLS", count);
        let server_queue = self.required("SERVER_QUEUE", count);
        let server_processes = self.required("SERVER_MAX_PROCESSES", count_or_none);
        let server_memory = self.required("SERVER_MAX_MEMORY", memory_or_none);
        if let (Some(room), Some(one)) = (body_bytes, payload_limit)
            && room < one
        {
            let text = "it is less than PAYLOAD_LIMIT, so that the largest body that is allowed would never be taken";
            self.problems.push(ConfigError::new("MAX_BODY_BYTES", text));
        }
        Some(LimitSettings {
            connections: connections?,
            calls: calls?,
            body_bytes: body_bytes?,
            user: UserLimits { calls: user_calls?, rate: rate? },
            worker_calls: worker_calls?,
            server_queue: server_queue?,
            server_processes: server_processes?.and_then(|count| u64::try_from(count).ok()),
            server_memory: server_memory?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        for (text, rate) in
            [("50", Some(Some(50.0))), ("0.5", Some(Some(0.5))), ("none", Some(None)), ("None", Some(None))]
        {
            assert_eq!(rate_or_none(text).ok(), rate, "{text}");
        }
        for bad in ["0", "-1", "1e3", "inf", "nan", "", "0.0001", "1.2.3", "unlimited", "2000000"] {
            assert!(rate_or_none(bad).is_err(), "{bad}");
        }
        assert_eq!(count_or_none("64").ok(), Some(Some(64)));
        assert!(count_or_none("0").is_err() && count("none").is_err() && count("+5").is_err());
    }
}
