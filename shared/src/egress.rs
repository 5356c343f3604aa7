//! Where requests may go that a user can steer: to public addresses, and to what an operator permits.
//!
//! A name is resolved once and connected to by the addresses that were judged, so that a name which
//! answers differently a moment later gains nothing. A name of which any address is refused is refused.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use async_trait::async_trait;
use ipnet::IpNet;
use url::{Host, Url};

/// Why a request does not leave.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EgressError {
    /// The text is no URL that requests can be sent to.
    #[error("the URL {0}")]
    InvalidUrl(&'static str),
    /// It leads to an address that is not public.
    #[error("Blocked private or local address: {0}")]
    Blocked(String),
    /// The name has no address, or nobody could say.
    #[error("the name of the host cannot be resolved")]
    Unresolved,
}

/// What looks names up. Tests bring their own.
#[async_trait]
pub trait Resolve: Send + Sync + 'static {
    /// All addresses of a name.
    async fn resolve(&self, host: &str) -> std::io::Result<Vec<IpAddr>>;
}

/// The operating system's.
struct System;

#[async_trait]
impl Resolve for System {
    async fn resolve(&self, host: &str) -> std::io::Result<Vec<IpAddr>> {
        Ok(tokio::net::lookup_host((host, 0)).await?.map(|address| address.ip()).collect())
    }
}

/// One entry of `EGRESS_ALLOW`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Permit {
    /// A host by its name, whatever its addresses are.
    Host(String),
    /// Every host below a domain, written `*.example.internal`.
    Domain(String),
    /// Addresses.
    Network(IpNet),
}

impl FromStr for Permit {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Ok(Self::Network(address.into()));
        }
        if let Ok(network) = bare.parse::<IpNet>() {
            return Ok(Self::Network(network.trunc()));
        }
        let (domain, name) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        // As a URL spells it, or it would never match.
        match Host::parse(name.trim_end_matches('.')) {
            Ok(Host::Domain(name)) if !name.is_empty() => {
                Ok(if domain { Self::Domain(format!(".{name}")) } else { Self::Host(name) })
            }
            _ => Err(()),
        }
    }
}

/// The guard in front of everything that leaves on a user's word. Cloning it is cheap.
#[derive(Clone)]
pub struct Egress {
    permits: Arc<[Permit]>,
    resolver: Arc<dyn Resolve>,
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Egress").field("permits", &self.permits).finish_non_exhaustive()
    }
}

impl Default for Egress {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl Egress {
    /// A guard that permits public addresses and these.
    pub fn new(permits: Vec<Permit>) -> Self {
        Self::with_resolver(permits, Arc::new(System))
    }

    /// As [`Egress::new`], with a resolver of the caller's.
    pub fn with_resolver(permits: Vec<Permit>, resolver: Arc<dyn Resolve>) -> Self {
        Self { permits: permits.into(), resolver }
    }

    /// Reads a URL that a request may be sent to, as far as it can be judged without asking for the
    /// addresses of its host.
    pub fn check(&self, text: &str) -> Result<Url, EgressError> {
        let url = Url::parse(text).map_err(|_| EgressError::InvalidUrl("is not a URL"))?;
        self.check_url(&url)?;
        Ok(url)
    }

    /// As [`Egress::check`], of a URL that was read already.
    pub fn check_url(&self, url: &Url) -> Result<(), EgressError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(EgressError::InvalidUrl("must begin with https:// or http://"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(EgressError::InvalidUrl("must not have a user name or a password in it"));
        }
        if url.fragment().is_some() {
            return Err(EgressError::InvalidUrl("must not have a fragment"));
        }
        if url.port() == Some(0) {
            return Err(EgressError::InvalidUrl("must not have the port 0"));
        }
        match url.host() {
            None => Err(EgressError::InvalidUrl("has no host")),
            Some(Host::Ipv4(address)) => self.check_address(address.into()),
            Some(Host::Ipv6(address)) => self.check_address(address.into()),
            Some(Host::Domain(name)) => {
                // One dot at the end is the root of all names. With more, `127.0.0.1..` would be a name for the
                // parser, and who knows what for a resolver.
                let name = name.strip_suffix('.').unwrap_or(name);
                if name.split('.').any(str::is_empty) {
                    return Err(EgressError::InvalidUrl("has a host name with an empty part"));
                }
                let local = name == "localhost" || name.ends_with(".localhost");
                // A network may be permitted that it resolves to.
                let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
                if local && !self.permits_host(name) && !loopback.iter().any(|one| self.permits_address(*one))
                {
                    return Err(EgressError::Blocked(name.to_owned()));
                }
                Ok(())
            }
        }
    }

    /// The addresses to connect to for a host, all of them judged. They are the only ones to connect to.
    pub async fn addresses(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, EgressError> {
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let addresses = match bare.parse::<IpAddr>() {
            Ok(address) => vec![address],
            Err(_) => self.resolver.resolve(host).await.map_err(|_| EgressError::Unresolved)?,
        };
        if addresses.is_empty() {
            return Err(EgressError::Unresolved);
        }
        if !self.permits_host(host.trim_end_matches('.')) {
            for address in &addresses {
                self.check_address(*address)?;
            }
        }
        Ok(addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect())
    }

    fn check_address(&self, address: IpAddr) -> Result<(), EgressError> {
        if is_public(address) || self.permits_address(address) {
            return Ok(());
        }
        Err(EgressError::Blocked(address.to_string()))
    }

    fn permits_host(&self, name: &str) -> bool {
        let name = name.to_ascii_lowercase();
        self.permits.iter().any(|permit| match permit {
            Permit::Host(host) => *host == name,
            Permit::Domain(domain) => name.ends_with(domain.as_str()),
            Permit::Network(_) => false,
        })
    }

    fn permits_address(&self, address: IpAddr) -> bool {
        // `::ffff:10.0.0.1` is reached as 10.0.0.1.
        let address = address.to_canonical();
        self.permits.iter().any(|permit| match permit {
            Permit::Network(network) => network.contains(&address),
            Permit::Host(_) | Permit::Domain(_) => false,
        })
    }
}

/// Whether an address is one of the public internet's, by the registries of special-purpose addresses.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => match embedded(address) {
            Some(inner) => is_public_v4(inner),
            None => is_public_v6(address),
        },
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = address.is_unspecified()
        || address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || address.is_broadcast()
        || address.is_documentation()
        || address.is_multicast()
        || a == 0
        || a >= 240
        // Carriers' networks, protocol assignments, the old relays of 6to4, benchmarks, AS112.
        || (a == 100 && (64..128).contains(&b))
        || (a, b, c) == (192, 0, 0)
        || (a, b, c) == (192, 88, 99)
        || (a == 198 && (18..20).contains(&b))
        || (a, b, c) == (192, 31, 196)
        || (a, b, c) == (192, 52, 193)
        || (a, b, c) == (192, 175, 48)
        // The address of the platform's own services in one of the large clouds.
        || address.octets() == [168, 63, 129, 16];
    !special
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    // Only 2000::/3 is given out; of that, protocol assignments, documentation and the like are not.
    let given_out = segments[0] & 0xe000 == 0x2000;
    let special = (segments[0] == 0x2001 && segments[1] < 0x200)
        || segments[..2] == [0x2001, 0xdb8]
        || (segments[0] == 0x3fff && segments[1] < 0x1000);
    given_out && !special
}

/// The IPv4 address that is reached through an IPv6 one.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = address.segments();
    let of = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    match [a, b, c, d, e, f] {
        // Mapped, translated by NAT64, and the deprecated compatible form.
        [0, 0, 0, 0, 0, 0xffff] | [0x64, 0xff9b, 0, 0, 0, 0] => Some(of(g, h)),
        [0, 0, 0, 0, 0, 0] if (g, h) != (0, 0) && (g, h) != (0, 1) => Some(of(g, h)),
        // 6to4.
        [0x2002, ..] => Some(of(b, c)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn guard(permits: &[&str]) -> Egress {
        Egress::new(permits.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn addresses_that_are_not_public_are_refused_however_they_are_spelled() {
        let guard = guard(&[]);
        for url in [
            "http://127.0.0.1",
            "http://127.1",
            "http://2130706433",
            "http://0x7f000001",
            "http://0177.0.0.1",
            "http://0x7f.1",
            "http://127.0.0.1.",
            "http://１２７.0.0.1",
            "http://127。0。0。1",
            "http://0.0.0.0",
            "http://0",
            "http://10.1.2.3",
            "http://172.16.0.1",
            "http://192.168.1.1",
            "http://169.254.169.254/latest/meta-data",
            "http://100.64.0.1",
            "http://192.0.0.8",
            "http://198.18.0.1",
            "http://192.0.2.1",
            "http://224.0.0.1",
            "http://255.255.255.255",
            "http://240.0.0.1",
            "http://168.63.129.16",
            "http://[::1]",
            "http://[::]",
            "http://[::ffff:127.0.0.1]",
            "http://[::ffff:a9fe:a9fe]",
            "http://[::127.0.0.1]",
            "http://[64:ff9b::7f00:1]",
            "http://[64:ff9b:1::1]",
            "http://[2002:7f00:1::]",
            "http://[2001::1]",
            "http://[2001:db8::1]",
            "http://[fe80::1]",
            "http://[fc00::1]",
            "http://[fd00:ec2::254]",
            "http://[ff02::1]",
            "http://[100::1]",
            "http://[3fff::1]",
            "http://localhost",
            "http://localhost.",
            "http://LOCALHOST:8080",
            "http://a.localhost",
        ] {
            assert!(
                matches!(guard.check(url), Err(EgressError::Blocked(_))),
                "{url}: {:?}",
                guard.check(url)
            );
        }
        for url in [
            "",
            "example.com",
            "file:///etc/passwd",
            "gopher://example.com",
            "http://",
            "http://user@example.com",
            "http://user:pass@example.com",
            "http://example.com:0",
            "http://example.com/#f",
            "http://1.2.3.4.5",
            "http://127.0.0.1..",
            "http://localhost..",
            "http://.example.com",
            "http://a..example.com",
            "http://exa mple.com",
        ] {
            assert!(matches!(guard.check(url), Err(EgressError::InvalidUrl(_))), "{url}");
        }
        for url in ["https://example.com/mcp?x=1", "http://93.184.216.34", "https://[2606:4700::1111]:8443/a"]
        {
            assert!(guard.check(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn what_the_operator_permits_is_permitted_and_nothing_beside_it() {
        let guard = guard(&["127.0.0.0/8", "10.0.0.7", "fd00::/8", "db.internal", "*.corp.example"]);
        for url in [
            "http://127.0.0.1:1",
            "http://localhost",
            "http://10.0.0.7",
            "http://[::ffff:10.0.0.7]",
            "http://[fd12::1]",
        ] {
            assert!(guard.check(url).is_ok(), "{url}");
        }
        for url in ["http://10.0.0.8", "http://[fe80::1]", "http://192.168.0.1", "http://[64:ff9b::a00:7]"] {
            assert!(guard.check(url).is_err(), "{url}");
        }
        for bad in ["", "a b", "10.0.0.0/40", "*.", "http://x"] {
            assert!(bad.parse::<Permit>().is_err(), "{bad}");
        }
    }

    /// Answers with a public address and a private one in turn, as a name does that is rebound.
    struct Rebinding(AtomicUsize);

    #[async_trait]
    impl Resolve for Rebinding {
        async fn resolve(&self, host: &str) -> std::io::Result<Vec<IpAddr>> {
            let (public, private) = ("93.184.216.34".parse().unwrap(), "127.0.0.1".parse().unwrap());
            Ok(match host {
                "both.example" => vec![public, private],
                "none.example" => Vec::new(),
                "db.internal" | "a.corp.example" => vec!["10.0.0.9".parse().unwrap()],
                _ if self.0.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) => vec![public],
                _ => vec![private],
            })
        }
    }

    #[tokio::test]
    async fn a_name_is_judged_by_the_addresses_that_are_connected_to() {
        let permits = vec!["db.internal".parse().unwrap(), "*.corp.example".parse().unwrap()];
        let guard = Egress::with_resolver(permits, Arc::new(Rebinding(AtomicUsize::new(0))));
        let mut refused = 0;
        for _ in 0..1_000 {
            match guard.addresses("rebound.example", 443).await {
                Ok(addresses) => assert_eq!(addresses, ["93.184.216.34:443".parse().unwrap()]),
                Err(EgressError::Blocked(address)) => {
                    assert_eq!(address, "127.0.0.1");
                    refused += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(refused, 500);
        assert!(matches!(guard.addresses("both.example", 1).await, Err(EgressError::Blocked(_))));
        assert_eq!(guard.addresses("none.example", 1).await, Err(EgressError::Unresolved));
        assert!(guard.addresses("db.internal", 1).await.is_ok());
        assert!(guard.addresses("a.corp.example", 1).await.is_ok());
        assert!(matches!(guard.addresses("[::1]", 1).await, Err(EgressError::Blocked(_))));
    }
}
