//! The ways in which the load balancer is joined to a segment: by a card, a VLAN, a bond, a bridge, and what can be built
//! of them. The switch has the counterpart at the other end of the wire.

use std::process::Command;

use anyhow::Result;
use lb_tests::lab::{Host, Lab, Namespace, Segment, run};

use crate::cards::Wire;

/// How a load balancer is joined to a segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Joint {
    /// Below everything.
    pub(crate) base: Base,
    /// The VLANs on it, outermost first.
    pub(crate) vlans: &'static [Vlan],
}

/// What VLANs, if any, are on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Base {
    /// A card of this wire.
    Card(&'static str),
    /// A bridge that has such a card as its port.
    Bridge(&'static str),
    /// A bond of two cards, in this mode.
    Bond(&'static str),
}

/// A VLAN: its protocol, as `ip` calls it, and its number.
pub(crate) type Vlan = (&'static str, u16);

/// The wires that bonds are made of.
const BONDED: [&str; 2] = ["front", "back"];
/// The load balancer's bond, and the switch's at the other end.
pub(crate) const BOND: &str = "bond0";
const FAR_BOND: &str = "lb.b";

impl Joint {
    /// A card and nothing else.
    pub(crate) const fn card(wire: &'static str) -> Self {
        Self { base: Base::Card(wire), vlans: &[] }
    }

    /// Joins `host` to a segment under this number.
    ///
    /// # Errors
    /// When a device cannot be made.
    pub(crate) fn join(self, lab: &Lab, host: &mut Host, segment: Segment, number: u8) -> Result<()> {
        let index = host.links().len();
        let switch = lab.switch_namespace();
        let (mut interface, mut ports) = match self.base {
            Base::Card(wire) => {
                let (card, port) = plug(host.namespace(), switch, wire, index)?;
                (card, vec![port])
            }
            Base::Bridge(wire) => {
                let (card, port) = plug(host.namespace(), switch, wire, index)?;
                host.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0")?;
                host.ip(&format!("link set {card} master br0 up"))?;
                ("br0".to_owned(), vec![port])
            }
            Base::Bond(mode) => (BOND.to_owned(), bond(host.namespace(), switch, mode)?),
        };
        for (protocol, id) in self.vlans {
            let ports = ports.iter_mut().map(|port| (switch, port));
            for (namespace, device) in ports.chain([(host.namespace(), &mut interface)]) {
                let vlan = format!("{device}.{id}");
                namespace.ip(&format!("link set {device} up"))?;
                namespace.ip(&format!(
                    "link add link {device} name {vlan} type vlan protocol {protocol} id {id}"
                ))?;
                *device = vlan;
            }
        }
        ports.iter().try_for_each(|port| lab.add_port(segment, port))?;
        lab.connect(host, segment, number, interface, ports.swap_remove(0))
    }
}

/// Gives a host one card of a wire, and the switch the other; their names there.
fn plug(host: &Namespace, switch: &Namespace, wire: &str, index: usize) -> Result<(String, String)> {
    let [card, peer] = Wire::fresh(wire)?;
    let (interface, port) = (format!("eth{index}"), format!("lb.{index}"));
    for (namespace, from, to) in [(host, card, &interface), (switch, peer, &port)] {
        run(Command::new("ip").args(["link", "set", "dev", &from, "netns", namespace.name(), "name", to]))?;
        namespace.ip(&format!("link set {to} up"))?;
    }
    Ok((interface, port))
}

/// A bond on the host, and the switch's ports for it: a bond of the same mode, where the switch must know of it.
fn bond(host: &Namespace, switch: &Namespace, mode: &str) -> Result<Vec<String>> {
    let options = if mode == "802.3ad" { "miimon 100 lacp_rate fast" } else { "miimon 100" };
    let make = |namespace: &Namespace, name: &str| {
        namespace.ip(&format!("link add {name} type bond mode {mode} {options}"))
    };
    make(host, BOND)?;
    if is_known_to_the_switch(mode) {
        make(switch, FAR_BOND)?;
    }
    let ports = (0..BONDED.len()).map(|index| add_member(host, switch, mode, index));
    let ports = ports.collect::<Result<_>>()?;
    host.ip(&format!("link set {BOND} up"))?;
    if !is_known_to_the_switch(mode) {
        return Ok(ports);
    }
    switch.ip(&format!("link set {FAR_BOND} up"))?;
    Ok(vec![FAR_BOND.to_owned()])
}

fn is_known_to_the_switch(mode: &str) -> bool {
    !["active-backup", "balance-tlb"].contains(&mode)
}

/// Gives a bond on the host a member, from 0: a card that was not there before, and the other end of its wire to the switch.
/// Its name there: a port of the switch's bond, or where that has none, of nothing yet.
pub(crate) fn add_member(host: &Namespace, switch: &Namespace, mode: &str, index: usize) -> Result<String> {
    let (card, port) = plug(host, switch, BONDED[index], index)?;
    // LACP bundles no card of unknown speed, as virtio's is until somebody says it.
    for (namespace, device) in [(host, &card), (switch, &port)] {
        run(namespace.command("ethtool").args(["-s", device, "speed", "1000", "duplex", "full"]))?;
    }
    join_bond(host, &card, BOND)?;
    if is_known_to_the_switch(mode) {
        join_bond(switch, &port, FAR_BOND)?;
    }
    Ok(port)
}

/// Makes a card a member of a bond.
pub(crate) fn join_bond(namespace: &Namespace, card: &str, bond: &str) -> Result<()> {
    // A bond takes no card that is up.
    for change in ["down", &format!("master {bond}"), "up"] {
        namespace.ip(&format!("link set {card} {change}"))?;
    }
    Ok(())
}
