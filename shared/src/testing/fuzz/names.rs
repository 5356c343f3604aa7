//! Names and versions of packages: what is accepted goes into the arguments of npm and pip.

use std::path::{Component, Path};

use url::{Host, Url};

use crate::package::names;

/// No option, no address, no path upwards, nothing that a shell or a file of lines would read otherwise.
pub fn package_names(data: &[u8]) {
    let text = &*String::from_utf8_lossy(data);
    let plain = |extra: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c));

    if names::npm_name(text) {
        assert!(plain("@/._-~") && text.len() <= 214, "{text}");
        assert!(text.starts_with('@') || !text.contains('/'), "{text}");
        stays_below(text);
    }
    if names::npm_version(text) {
        assert!(plain(".-_+^~<>=*| "), "{text}");
        assert!(!text.starts_with(['-', '.', ' ', '|']), "{text}");
    }
    if names::python_name(text) {
        assert!(plain("._-[], "), "{text}");
        let (name, extras) = names::split_extras(text).unwrap();
        assert_eq!(format!("{name}{extras}"), text);
        assert!(extras.is_empty() || names::python_name(name), "{text}");
        stays_below(name);
    }
    if names::python_version(text) {
        assert!(plain(".-_+!"), "{text}");
        assert!(!text.starts_with('-'), "{text}");
        // A version can be asked for.
        assert!(names::pip_dependency(&format!("name=={text}")), "{text}");
    }
    if names::pip_dependency(text) {
        assert!(plain("._-[], <>=!~*+"), "{text:?}");
        assert!(text.starts_with(|c: char| c.is_ascii_alphanumeric()), "{text}");
        // Between name and specifiers there may be spaces, and nothing is an option.
        assert!(!text.split(' ').any(|word| word.starts_with('-')), "{text}");
    }
    if names::python_module(text) {
        assert!(
            plain("._") && !text.contains("..") && !text.starts_with('.') && !text.ends_with('.'),
            "{text}"
        );
    }
    if names::index_url(text).is_ok() {
        assert!(text.bytes().all(|byte| byte.is_ascii_graphic()), "{text}");
        let url = Url::parse(text).unwrap();
        assert!(url.username().is_empty() && url.password().is_none(), "{text}");
        let loopback = match url.host().unwrap() {
            Host::Domain(name) => name == "localhost",
            Host::Ipv4(address) => {
                assert!(!address.is_link_local() && !address.is_unspecified(), "{text}");
                address.is_loopback()
            }
            Host::Ipv6(address) => {
                assert!(address.to_ipv4_mapped().is_none() && !address.is_unicast_link_local(), "{text}");
                address.is_loopback()
            }
        };
        assert!(url.scheme() == "https" || (url.scheme() == "http" && loopback), "{text}");
    }
}

/// That a name as a path leads to below the folder that it is joined to.
fn stays_below(name: &str) {
    let normal = |component| matches!(component, Component::Normal(_));
    assert!(Path::new(name).components().all(normal), "{name}");
}
