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
        let (mut interface, mut port) = match self.base {
            Base::Card(wire) => plug(host.namespace(), switch, wire, index)?,
            Base::Bridge(wire) => {
                let (card, port) = plug(host.namespace(), switch, wire, index)?;
                host.ip("link add br0 type bridge forward_delay 0 mcast_snooping 0")?;
                host.ip(&format!("link set {card} master br0 up"))?;
                ("br0".to_owned(), port)
            }
            Base::Bond(mode) => bond(host, lab, segment, mode)?,
        };
        for (protocol, id) in self.vlans {
            for (namespace, device) in [(host.namespace(), &mut interface), (switch, &mut port)] {
                let vlan = format!("{device}.{id}");
                namespace.ip(&format!("link set {device} up"))?;
                namespace.ip(&format!(
                    "link add link {device} name {vlan} type vlan protocol {protocol} id {id}"
                ))?;
                *device = vlan;
            }
        }
        lab.connect(host, segment, number, interface, port)
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

/// A bond on the host. The switch has one of the same mode, but for active-backup, which asks nothing of a switch.
fn bond(host: &Host, lab: &Lab, segment: Segment, mode: &str) -> Result<(String, String)> {
    let switch = lab.switch_namespace();
    let options = if mode == "802.3ad" { "miimon 100 lacp_rate fast" } else { "miimon 100" };
    let make = |namespace: &Namespace, name: &str| {
        namespace.ip(&format!("link add {name} type bond mode {mode} {options}"))
    };
    make(host.namespace(), "bond0")?;
    let is_alone = mode == "active-backup";
    if !is_alone {
        make(switch, "lb.b")?;
    }
    let mut ports = Vec::new();
    for (index, wire) in BONDED.iter().enumerate() {
        let (card, port) = plug(host.namespace(), switch, wire, index)?;
        for (namespace, device, bond) in [(host.namespace(), &card, "bond0"), (switch, &port, "lb.b")] {
            if namespace.name() == switch.name() && is_alone {
                continue;
            }
            // LACP bundles no card of unknown speed, as virtio's is until somebody says it.
            run(namespace.command("ethtool").args(["-s", device, "speed", "1000", "duplex", "full"]))?;
            // A bond takes no card that is up.
            for change in ["down", &format!("master {bond}"), "up"] {
                namespace.ip(&format!("link set {device} {change}"))?;
            }
        }
        ports.push(port);
    }
    host.ip("link set bond0 up")?;
    match (is_alone, ports.as_slice()) {
        // Both cables end in the segment; the caller connects the other.
        (true, [first, second]) => {
            lab.add_port(segment, second)?;
            Ok(("bond0".to_owned(), first.clone()))
        }
        _ => {
            switch.ip("link set lb.b up")?;
            Ok(("bond0".to_owned(), "lb.b".to_owned()))
        }
    }
}
