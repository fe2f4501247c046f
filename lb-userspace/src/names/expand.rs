//! Names become backends. Pure.

use std::{
    collections::{BTreeSet, HashSet},
    net::{IpAddr, SocketAddr},
};

use lb_common::layout;

use crate::config::{Backend, Config, NamedBackend, not_a_backend};

/// More addresses of one name are a mistake, or somebody else's.
const ADDRESSES_MAX: usize = 16;
/// What the data path holds, of all services; ids begin with 1.
const BACKENDS_MAX: usize = layout::BACKENDS as usize - 1;

/// The configuration with a backend for each address that its named backends have by `addresses`, and why one or the
/// other has none. What was checked when literal addresses were read is checked here, where a mistake costs one
/// backend and not the start.
pub(super) fn expand(config: &Config, addresses: impl Fn(&str) -> BTreeSet<IpAddr>) -> (Config, Vec<String>) {
    let mut expanded = config.clone();
    let mut problems = Vec::new();
    let vips: HashSet<IpAddr> =
        config.services.iter().flat_map(|service| &service.listen).map(SocketAddr::ip).collect();
    for service in &mut expanded.services {
        service.backends.retain(|backend| backend.host.is_none());
    }
    let mut total: usize = expanded.services.iter().map(|service| service.backends.len()).sum();
    for service in &mut expanded.services {
        let mut taken: HashSet<SocketAddr> = service.backends.iter().map(|it| it.address).collect();
        for named in &service.named_backends {
            let found = addresses(&named.host);
            let listens = |ip: &IpAddr| service.listen.iter().any(|it| it.is_ipv4() == ip.is_ipv4());
            let mut places = Vec::new();
            for ip in found.into_iter().filter(listens) {
                let place = SocketAddr::new(ip, named.port);
                let unusable = not_a_backend(ip, &vips, &config.dataplane.snat_addresses)
                    .or_else(|| {
                        (!taken.insert(place)).then(|| "another backend has that address too".to_owned())
                    })
                    .or_else(|| {
                        (places.len() == ADDRESSES_MAX).then(|| format!("it has more than {ADDRESSES_MAX}"))
                    })
                    .or_else(|| {
                        (total == BACKENDS_MAX).then(|| format!("{BACKENDS_MAX} backends are the most"))
                    });
                match unusable {
                    Some(reason) => {
                        problems.push(format!("backend {}: {ip} is left out: {reason}", named.name));
                    }
                    None => {
                        total += 1;
                        places.push(place);
                    }
                }
            }
            let several = places.len() > 1;
            service.backends.extend(places.into_iter().map(|place| backend(named, place, several)));
        }
    }
    (expanded, problems)
}

/// A name with several addresses is several backends, which need names of their own.
fn backend(named: &NamedBackend, address: SocketAddr, several: bool) -> Backend {
    let name = if several { format!("{}@{}", named.name, address.ip()) } else { named.name.clone() };
    Backend { name, address, weight: named.weight, host: Some(named.host.clone()), discovered: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(listen: &str, backends: &str) -> Config {
        let text = format!("[[service]]\nname = \"api\"\nlisten = [{listen}]\nbackends = [{backends}]");
        Config::parse(&text, "test.toml").unwrap().0
    }

    fn expanded(config: &Config, addresses: &[&str]) -> (Vec<(String, String)>, Vec<String>) {
        let found: BTreeSet<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        let (config, problems) = expand(config, |_| found.clone());
        let backends = &config.services[0].backends;
        (backends.iter().map(|it| (it.name.clone(), it.address.to_string())).collect(), problems)
    }

    fn pair(name: &str, address: &str) -> (String, String) {
        (name.to_owned(), address.to_owned())
    }

    const V4: &str = "\"192.0.2.1:6443\"";

    #[test]
    fn a_name_becomes_a_backend_for_each_address_of_a_listeners_family() {
        let config = config(V4, "\"10.0.0.9:6443\", \"master-1:6444\"");
        let literal = pair("10.0.0.9:6443", "10.0.0.9:6443");
        assert_eq!(expanded(&config, &[]), (vec![literal.clone()], vec![]));
        assert_eq!(
            expanded(&config, &["10.0.0.1", "fd00::1"]),
            (vec![literal.clone(), pair("master-1:6444", "10.0.0.1:6444")], vec![])
        );
        assert_eq!(
            expanded(&config, &["10.0.0.2", "10.0.0.1"]).0,
            [
                literal,
                pair("master-1:6444@10.0.0.1", "10.0.0.1:6444"),
                pair("master-1:6444@10.0.0.2", "10.0.0.2:6444")
            ]
        );
    }

    #[test]
    fn expanding_again_makes_named_ones_anew() {
        let config = config(V4, "\"master-1:6443\"");
        let at = |ip: &str| BTreeSet::from([ip.parse().unwrap()]);
        let (once, _) = expand(&config, |_| at("10.0.0.1"));
        assert_eq!(once.services[0].backends[0].host.as_deref(), Some("master-1"));
        let (twice, _) = expand(&once, |_| at("10.0.0.2"));
        assert_eq!(twice, expand(&config, |_| at("10.0.0.2")).0);
    }

    #[test]
    fn an_address_that_cannot_be_a_backend_is_left_out_and_named() {
        let config = config(V4, "\"10.0.0.9:6443\", \"master-1:6443\"");
        for (address, reason) in [
            ("192.0.2.1", "it is a VIP"),
            ("127.0.1.1", "loopback"),
            ("224.0.0.1", "not the address of one host"),
            ("10.0.0.9", "another backend has that address too"),
        ] {
            let (backends, problems) = expanded(&config, &[address, "10.0.0.1"]);
            assert_eq!(backends[1..], [pair("master-1:6443", "10.0.0.1:6443")]);
            assert!(problems[0].contains(reason) && problems.len() == 1, "{problems:?}");
        }
        let many: Vec<String> = (1..=20).map(|n| format!("10.1.0.{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let (backends, problems) = expanded(&config, &many);
        assert_eq!((backends.len(), problems.len()), (1 + ADDRESSES_MAX, 4));
    }
}
