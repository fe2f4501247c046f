//! By which ports backends answer. What comes in by another in a backend's name is not believed: clients cannot send answers to
//! their own SYNs where they and the backends are behind different interfaces or VLANs.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::{Controller, Ports};
use crate::network::{Kind, Network};

/// The ports by which a packet of a backend may come in; None: by any. `homes`: of each SNAT address the ports that have it or its
/// subnet. `hops`: the ports that backends are reached by.
///
/// A packet is for an address of the interface that it comes in by, as in the strong model of hosts (RFC 1122 §3.3.4.2), or it
/// comes back by the way out. Of several interfaces in one subnet each answers for the addresses of all (`arp_ignore`). An address
/// that is on no port, as one on the loopback interface, is routed here by any.
fn answering(
    homes: impl IntoIterator<Item = BTreeSet<usize>>,
    hops: impl IntoIterator<Item = usize>,
) -> Option<BTreeSet<usize>> {
    let mut ports: BTreeSet<usize> = hops.into_iter().collect();
    for of_address in homes {
        if of_address.is_empty() {
            return None;
        }
        ports.extend(of_address);
    }
    Some(ports)
}

impl Controller {
    /// Tells the data path by which ports no backend answers. Call it whenever a next hop, an address or a port has changed.
    pub(super) fn write_clients_only(&mut self) {
        let clients_only: Vec<usize> = match self.answering() {
            Some(answering) => self.ports.numbers().filter(|port| !answering.contains(port)).collect(),
            None => Vec::new(),
        };
        if self.dataplane.set_clients_only(clients_only.iter().copied()) && !clients_only.is_empty() {
            let interfaces = self.ports.interfaces();
            // A port that only others before us had has no name of its own.
            let current = |port: &usize| {
                interfaces.get(*port).copied().filter(|index| self.ports.number(*index) == Some(*port))
            };
            let name = |port: &usize| self.network.interface(current(port)?).ok().map(|it| it.name);
            let names: Vec<String> = clients_only.iter().filter_map(name).collect();
            tracing::info!(
                "no backend answers by {}: what comes in there in a backend's name is dropped",
                names.join(", ")
            );
        }
    }

    fn answering(&self) -> Option<BTreeSet<usize>> {
        if let Some(names) = &self.config.dataplane.backend_interfaces {
            return Some(names.iter().filter_map(|name| self.number_of(name)).collect());
        }
        let backends = self.dataplane.backend_ports();
        let is_used = |ipv6: bool| backends.iter().any(|(of_ipv6, _)| *of_ipv6 == ipv6);
        let mut snat = self.dataplane.snat_places();
        snat.retain(|address| is_used(address.is_ipv6()));
        let homes = snat.into_iter().map(|address| self.homes(address));
        answering(homes, backends.iter().filter_map(|(_, port)| *port))
    }

    /// The ports that have an address, or its subnet.
    fn homes(&self, address: IpAddr) -> BTreeSet<usize> {
        // What is for an address on a dummy is routed here by any interface.
        let is_dummy = |index: u32| {
            self.network.interface(index).is_ok_and(|it| it.kind == Kind::Other("dummy".to_owned()))
        };
        let local = self.network.local_addresses();
        let here = local.iter().filter(|it| {
            let subnet = IpNet::new(it.address, it.prefix_length);
            subnet.is_ok_and(|subnet| subnet.contains(&address)) && !is_dummy(it.interface)
        });
        here.filter_map(|it| self.ports.number(it.interface)).collect()
    }

    fn number_of(&self, name: &str) -> Option<usize> {
        number_among(&self.ports, &self.network, name)
    }

    /// The number of one of these ports, if backends may answer by it. Err: why packets to a backend must not leave by it.
    pub(super) fn answers_by(&self, ports: &Ports, port: usize) -> Result<usize, String> {
        let Some(names) = &self.config.dataplane.backend_interfaces else { return Ok(port) };
        if names.iter().any(|name| number_among(ports, &self.network, name) == Some(port)) {
            return Ok(port);
        }
        let index = ports.interfaces().get(port).copied().unwrap_or_default();
        let name = self.network.interface(index).map_or_else(|_| "?".to_owned(), |found| found.name);
        Err(format!("it is reached by {name}, which dataplane.backend_interfaces does not name"))
    }
}

fn number_among(ports: &Ports, network: &Network, name: &str) -> Option<usize> {
    ports.number(network.interface_named(name).ok()?.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_answer_by_the_way_out_and_where_their_peer_is() {
        let home = |ports: &[usize]| ports.iter().copied().collect::<BTreeSet<_>>();
        assert_eq!(answering([home(&[1])], [1]), Some(home(&[1])), "two arms");
        assert_eq!(answering([home(&[0])], [1, 2]), Some(home(&[0, 1, 2])), "a VIP as the SNAT address");
        assert_eq!(answering([home(&[0, 1])], [0]), Some(home(&[0, 1])), "two interfaces in one subnet");
        assert_eq!(answering([home(&[1]), home(&[])], [1]), None, "an address on the loopback interface");
        assert_eq!(answering([], [1]), Some(home(&[1])));
    }
}
