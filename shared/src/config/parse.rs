//! The grammar of each value. A parser answers what would be valid; the caller adds the variable's name
//! and the value, where it may be shown.

use std::{fmt, net::IpAddr, path::PathBuf, time::Duration};

use tracing_subscriber::EnvFilter;

use super::LogFormat;
use crate::crypter::LegacyMode;

/// What would be valid.
pub(super) type Valid = &'static str;

/// Where to listen: an address, or a name that the system resolves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenHost {
    /// An address; `localhost` is `127.0.0.1`.
    Address(IpAddr),
    /// Any other name.
    Name(String),
}

impl ListenHost {
    /// Whether only this machine can reach it. A name may resolve to anything, so it does not count.
    pub fn is_loopback(&self) -> bool {
        match self {
            ListenHost::Address(address) => address.to_canonical().is_loopback(),
            ListenHost::Name(_) => false,
        }
    }
}

/// The host alone, an IPv6 address without brackets: what resolving and binding take.
impl fmt::Display for ListenHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenHost::Address(address) => write!(f, "{address}"),
            ListenHost::Name(name) => f.write_str(name),
        }
    }
}

pub(super) fn host(text: &str) -> Result<ListenHost, Valid> {
    const VALID: Valid = "an IP address such as 127.0.0.1 or ::1, or a host name";
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    if let Some(inner) = bare {
        return inner.parse().map(|v6| ListenHost::Address(IpAddr::V6(v6))).map_err(|_| VALID);
    }
    if let Ok(address) = text.parse() {
        return Ok(ListenHost::Address(address));
    }
    match host_name(text) {
        Some(name) if name == "localhost" => Ok(ListenHost::Address(IpAddr::from([127, 0, 0, 1]))),
        Some(name) => Ok(ListenHost::Name(name)),
        None => Err(VALID),
    }
}

/// A host name in lower case. Names that end in a number are no names: resolvers take `127.1` and
/// `0x7f000001` for addresses.
fn host_name(text: &str) -> Option<String> {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let numeric = |label: &str| {
        let hex = label.strip_prefix("0x").or_else(|| label.strip_prefix("0X"));
        label.bytes().all(|b| b.is_ascii_digit())
            || hex.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    let valid =
        text.len() <= 253 && text.split('.').all(label) && !text.rsplit('.').next().is_some_and(numeric);
    valid.then(|| text.to_ascii_lowercase())
}

/// `host` or `host:port`, normalised: names in lower case, IPv6 addresses in brackets.
pub(super) fn host_and_port(text: &str) -> Option<(String, Option<u16>)> {
    let (host, port) = if text.starts_with('[') {
        let end = text.find(']')?;
        let v6: std::net::Ipv6Addr = text[1..end].parse().ok()?;
        let rest = &text[end + 1..];
        (format!("[{v6}]"), if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) })
    } else {
        let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
        let v4 = host.parse::<std::net::Ipv4Addr>().ok().map(|v4| v4.to_string());
        (v4.or_else(|| host_name(host))?, port)
    };
    let port = match port {
        Some(digits) => Some(whole(digits).and_then(|n| u16::try_from(n).ok()).filter(|port| *port > 0)?),
        None => None,
    };
    Some((host, port))
}

/// A whole number of digits alone: the standard library would also take `+80`.
pub(super) fn whole(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Splits a comma list, reads each entry and drops repetitions.
pub(super) fn list(text: &str, each: impl Fn(&str) -> Result<String, Valid>) -> Result<Vec<String>, Valid> {
    let mut out = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let entry = each(part)?;
        if !out.contains(&entry) {
            out.push(entry);
        }
    }
    Ok(out)
}

pub(super) fn allowed_hosts(text: &str) -> Result<Vec<String>, Valid> {
    list(text, |part| {
        if part.contains('*') {
            return Err("names in full: with * any web page could reach this program through a name of its \
                        own (DNS rebinding)");
        }
        match host_and_port(part) {
            Some((host, Some(port))) => Ok(format!("{host}:{port}")),
            Some((host, None)) => Ok(host),
            None => Err("host or host:port, comma-separated, such as tools.example.com or [fd00::1]:8080 \
                         (international names as xn--)"),
        }
    })
}

pub(super) fn allowed_origins(text: &str) -> Result<Vec<String>, Valid> {
    const VALID: Valid = "origins, comma-separated, such as https://app.example.com or \
                          http://localhost:3000, without a path or a trailing slash";
    list(text, |part| {
        if part.contains('*') {
            return Err("origins in full: with * any web page could start programs here through its \
                        visitor's browser");
        }
        if part.eq_ignore_ascii_case("null") {
            return Err("origins in full: any web page can send the origin null");
        }
        let (scheme, rest) = part.split_once("://").ok_or(VALID)?;
        let scheme = scheme.to_ascii_lowercase();
        let scheme_ok = scheme.starts_with(|c: char| c.is_ascii_lowercase())
            && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
        let (host, port) = host_and_port(rest).filter(|_| scheme_ok).ok_or(VALID)?;
        // Browsers leave the scheme's own port out, so an entry that has it would never match.
        match (scheme.as_str(), port) {
            (_, None) | ("http", Some(80)) | ("https", Some(443)) => Ok(format!("{scheme}://{host}")),
            (_, Some(port)) => Ok(format!("{scheme}://{host}:{port}")),
        }
    })
}

pub(super) fn port(text: &str) -> Result<u16, Valid> {
    let valid = "a number from 1 to 65535, or 0 for any free port";
    whole(text).and_then(|number| u16::try_from(number).ok()).ok_or(valid)
}

/// The least and the most that `PAYLOAD_LIMIT` may be.
const PAYLOAD: std::ops::RangeInclusive<u64> = 1024..=1024 * 1024 * 1024;
/// The least and the most that `MAX_BODY_BYTES` may be.
const ROOM: std::ops::RangeInclusive<u64> = 1024 * 1024..=64 * 1024 * 1024 * 1024;

pub(super) fn size(text: &str) -> Result<usize, Valid> {
    bytes_within(text, PAYLOAD).ok_or("a size from 1kb to 1gb, such as 6mb, 512kb, 1.5mb or 1048576")
}

/// Room for many bodies.
pub(super) fn room(text: &str) -> Result<usize, Valid> {
    bytes_within(text, ROOM).ok_or("a size from 1mb to 64gb, such as 256mb or 1gb")
}

fn bytes_within(text: &str, valid: std::ops::RangeInclusive<u64>) -> Option<usize> {
    let text = text.to_ascii_lowercase();
    let units = [("kb", 1024), ("mb", 1024 * 1024), ("gb", 1024 * 1024 * 1024), ("b", 1)];
    let (number, unit) = units
        .iter()
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))
        .unwrap_or((&text, 1_u64));
    let number = number.trim_end();
    let (integer, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // Bytes are not divisible, and nine digits after the point are exact below 1gb.
    let divisible = unit > 1 || !number.contains('.');
    if integer.is_empty() || fraction.is_empty() || fraction.len() > 9 || !divisible {
        return None;
    }
    let scale = 10_u64.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let bytes = whole(integer)
        .and_then(|integer| integer.checked_mul(unit))
        .zip(whole(fraction))
        .and_then(|(bytes, fraction)| bytes.checked_add(fraction * unit / scale))
        .filter(|bytes| valid.contains(bytes));
    bytes.and_then(|bytes| usize::try_from(bytes).ok())
}

pub(super) fn boolean(text: &str) -> Result<bool, Valid> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" => Ok(false),
        _ => Err("true or false (1, 0, yes and no as well)"),
    }
}

pub(super) fn seconds(text: &str) -> Result<Duration, Valid> {
    let number = whole(text).filter(|number| (1..=600).contains(number));
    number.map(Duration::from_secs).ok_or("a whole number of seconds from 1 to 600")
}

pub(super) fn seconds_or_none(text: &str) -> Result<Duration, Valid> {
    let number = whole(text).filter(|number| (0..=600).contains(number));
    number.map(Duration::from_secs).ok_or("a whole number of seconds from 0 to 600")
}

pub(super) fn log_format(text: &str) -> Result<LogFormat, Valid> {
    match text.to_ascii_lowercase().as_str() {
        "auto" => Ok(LogFormat::Auto),
        "pretty" => Ok(LogFormat::Pretty),
        "json" => Ok(LogFormat::Json),
        _ => Err("auto, pretty or json"),
    }
}

pub(super) fn log_filter(text: &str) -> Result<String, Valid> {
    match EnvFilter::try_new(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("a log filter, such as info, debug or mcp_gateway=debug,warn"),
    }
}

pub(super) fn legacy(text: &str) -> Result<LegacyMode, Valid> {
    match text.to_ascii_lowercase().as_str() {
        "rw" => Ok(LegacyMode::Rw),
        "ro" => Ok(LegacyMode::Ro),
        "off" => Ok(LegacyMode::Off),
        _ => Err("rw, ro or off"),
    }
}

pub(super) fn path(text: &str) -> Result<PathBuf, Valid> {
    Ok(PathBuf::from(text))
}

/// Whether a host, as [`host_and_port`] writes it, can only be this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// What percent signs stand for in the user information of a URL; `None` where they stand for nothing.
pub(super) fn percent_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
            let value = digit()? * 16 + digit()?;
            out.push(u8::try_from(value).ok()?);
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).ok()
}
