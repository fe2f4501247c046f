//! Whether what clients may send fits through the links to the backends.

use std::collections::BTreeMap;

use super::{Finding, backends, listeners, warning};
use crate::{
    config::Config,
    network::{Interface, Kind, Network},
};

/// With two arms: the data path sends no ICMP errors of its own, so that what does not fit is lost without a word.
pub(super) async fn examine(network: &Network, config: &Config) -> Vec<Finding> {
    let mut clients = Vec::new();
    for vip in listeners(config) {
        let index = match network.interface_carrying(vip) {
            Some(index) => Some(index),
            None => network.route_to(vip).await.ok().map(|route| route.interface),
        };
        let interface = index.and_then(|index| network.interface(index).ok());
        // A VIP on the loopback interface is routed here, by which way is not known.
        clients.extend(interface.filter(|it| it.kind != Kind::Loopback));
    }
    let mut arms = BTreeMap::new();
    for backend in backends(config) {
        let route = network.route_to(backend).await.ok().filter(|route| !route.local);
        if let Some(arm) = route.and_then(|route| network.interface(route.interface).ok()) {
            arms.insert(arm.index, arm);
        }
    }
    let widest = clients.iter().max_by_key(|it| it.mtu);
    arms.values().filter_map(|arm| narrower(arm, widest?)).collect()
}

fn narrower(arm: &Interface, clients: &Interface) -> Option<Finding> {
    let is_narrower = arm.index != clients.index && arm.mtu < clients.mtu;
    is_narrower.then(|| {
        let what = format!(
            "leads to backends and has MTU {}, while clients come in by {} with {}: larger packets of theirs are dropped, \
             and no ICMP error says so",
            arm.mtu, clients.name, clients.mtu
        );
        let fix = format!("ip link set {} mtu {}, if its switch and the backends take that", arm.name, clients.mtu);
        warning(format!("interface {}", arm.name), what).fix(fix)
    })
}
