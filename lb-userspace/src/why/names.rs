//! Who is who in a story: the maps know numbers and addresses, the daemon and the configuration know names.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
};

/// What is known of numbers. Everything may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Where backends are, by id.
    pub backends: BTreeMap<u8, SocketAddr>,
    /// Where listeners are, by id.
    pub listeners: BTreeMap<u8, SocketAddr>,
    /// SNAT addresses, by number, of IPv4 and IPv6.
    pub snat: [Vec<Option<IpAddr>>; 2],
    /// What a backend at an address is called.
    pub called: BTreeMap<SocketAddr, String>,
}

impl Names {
    /// A backend's name: the address where it has none, the number where not even that is known.
    pub(super) fn backend(&self, id: u8) -> String {
        match self.backends.get(&id) {
            None => format!("backend {id}"),
            Some(address) => self.called.get(address).cloned().unwrap_or_else(|| address.to_string()),
        }
    }

    /// The same with the address behind the name.
    pub(super) fn backend_and_address(&self, id: u8) -> String {
        let name = self.backend(id);
        match self.backends.get(&id).map(ToString::to_string) {
            Some(address) if address != name => format!("{name} ({address})"),
            _ => name,
        }
    }

    /// What a backend sees as the other end of a client's flow.
    pub(super) fn source(&self, client: SocketAddr, (number, port): (u8, u16)) -> Option<SocketAddr> {
        let addresses = &self.snat[usize::from(client.is_ipv6())];
        let address = addresses.get(usize::from(number)).copied().flatten()?;
        Some(SocketAddr::new(address, port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_called_by_the_best_that_is_known() {
        let (one, two) = ("172.16.0.11:6443".parse().unwrap(), "172.16.0.12:6443".parse().unwrap());
        let names = Names {
            backends: BTreeMap::from([(1, one), (2, two)]),
            called: BTreeMap::from([(two, "master-2".to_owned())]),
            ..Names::default()
        };
        assert_eq!((names.backend(2), names.backend(1)), ("master-2".into(), "172.16.0.11:6443".into()));
        assert_eq!(names.backend_and_address(2), "master-2 (172.16.0.12:6443)");
        assert_eq!(names.backend_and_address(1), "172.16.0.11:6443");
        assert_eq!(names.backend_and_address(3), "backend 3");
    }
}
