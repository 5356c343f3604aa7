//! The guard in front of requests that users steer.

use std::{
    future::Future,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    pin::pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll, Waker},
};

use async_trait::async_trait;
use ipnet::IpNet;
use url::{Host, Url};

use crate::egress::{Egress, EgressError, Permit, Resolve};

/// Networks that are not the public internet's, as the registries of special-purpose addresses list them.
static SPECIAL: LazyLock<Vec<IpNet>> = LazyLock::new(|| {
    [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "168.63.129.16/32",
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
    ]
    .iter()
    .map(|network| network.parse().unwrap())
    .collect()
});

/// Whether an address is public: written otherwise than the guard does it, so that the two can disagree.
fn public(address: IpAddr) -> bool {
    let special = |address: IpAddr| SPECIAL.iter().any(|network| network.contains(&address));
    let IpAddr::V6(v6) = address else { return !special(address) };
    let bits = u128::from(v6);
    let low = Ipv4Addr::from(u32::try_from(bits & 0xffff_ffff).unwrap());
    let within = |network: &str| network.parse::<IpNet>().unwrap().contains(&address);
    if within("::ffff:0:0/96") || within("64:ff9b::/96") {
        return !special(low.into());
    }
    if within("::/96") {
        return bits > 1 && !special(low.into());
    }
    if within("2002::/16") {
        return !special(Ipv4Addr::from(u32::try_from(bits >> 80 & 0xffff_ffff).unwrap()).into());
    }
    within("2000::/3") && !special(address)
}

/// Answers with these addresses, whatever it is asked.
struct Answers(Vec<IpAddr>);

#[async_trait]
impl Resolve for Answers {
    async fn resolve(&self, _: &str) -> std::io::Result<Vec<IpAddr>> {
        Ok(self.0.clone())
    }
}

/// A URL that passes leads to a public address, and stays itself; one that is blocked does not. The first four to
/// sixteen bytes of the input are also an address that a name may resolve to.
pub fn egress_url(data: &[u8]) {
    let text = &*String::from_utf8_lossy(data);
    let guard = Egress::default();
    match guard.check(text) {
        Ok(url) => passed(&guard, &url),
        Err(EgressError::Blocked(_)) => {
            let url = Url::parse(text).unwrap();
            match url.host().unwrap() {
                Host::Ipv4(address) => assert!(!public(address.into()), "{text}"),
                Host::Ipv6(address) => assert!(!public(address.into()), "{text}"),
                Host::Domain(name) => assert!(name.trim_end_matches('.').ends_with("localhost"), "{text}"),
            }
        }
        Err(EgressError::InvalidUrl(why)) => assert!(!why.is_empty()),
        Err(EgressError::Unresolved) => panic!("nobody was asked: {text}"),
    }
    resolved(data);

    // What an operator writes is a permit or not, and permits no more than it says.
    if let Ok(permit) = text.parse::<Permit>() {
        let narrow = Egress::new(vec![permit.clone()]);
        match permit {
            Permit::Host(name) => assert!(!name.is_empty(), "{text}"),
            Permit::Domain(name) => assert!(name.len() > 1 && name.starts_with('.'), "{text}"),
            Permit::Network(network) => {
                for address in ["10.11.12.13", "127.0.0.1", "169.254.169.254", "192.168.3.4"] {
                    let inside = network.contains(&address.parse::<IpAddr>().unwrap());
                    assert_eq!(
                        narrow.check(&format!("http://{address}/")).is_ok(),
                        inside,
                        "{text} {address}"
                    );
                }
            }
        }
    }
}

fn passed(guard: &Egress, url: &Url) {
    assert!(matches!(url.scheme(), "http" | "https"), "{url}");
    assert!(url.username().is_empty() && url.password().is_none() && url.fragment().is_none(), "{url}");
    assert_ne!(url.port(), Some(0), "{url}");
    match url.host().unwrap() {
        Host::Ipv4(address) => assert!(public(address.into()), "{url}"),
        Host::Ipv6(address) => assert!(public(address.into()), "{url}"),
        Host::Domain(name) => {
            let name = name.trim_end_matches('.');
            assert!(name != "localhost" && !name.ends_with(".localhost"), "{url}");
            // Whatever takes a name for an address after all: the guard has to have seen it as one.
            assert!(name.parse::<IpAddr>().is_err(), "{url}");
        }
    }
    // What was judged is what is sent: written and read again it is the same.
    assert_eq!(guard.check(url.as_str()).as_ref(), Ok(url));
}

fn resolved(data: &[u8]) {
    let v6 = data.first_chunk::<16>().map(|bytes| IpAddr::from(Ipv6Addr::from(*bytes)));
    let v4 = data.first_chunk::<4>().map(|bytes| IpAddr::from(Ipv4Addr::from(*bytes)));
    let addresses: Vec<_> = v6.into_iter().chain(v4).collect();
    let guard = Egress::with_resolver(Vec::new(), Arc::new(Answers(addresses.clone())));
    // This resolver has nothing to wait for.
    let asked = pin!(guard.addresses("name.example", 443)).poll(&mut Context::from_waker(Waker::noop()));
    let Poll::Ready(found) = asked else { panic!("it waits") };
    // One address that is not public spoils a name.
    let good = !addresses.is_empty() && addresses.iter().all(|address| public(*address));
    assert_eq!(found.is_ok(), good, "{addresses:?}");
    if let Ok(found) = found {
        assert_eq!(found.iter().map(std::net::SocketAddr::ip).collect::<Vec<_>>(), addresses);
    }
}
